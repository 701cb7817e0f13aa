"""MVTec AD: ``<root>/<category>/{train/good, test/<defect>, ground_truth/<defect>}``.

Bergmann et al.: MVTec AD - a comprehensive real-world dataset for unsupervised anomaly detection,
CVPR 2019.
"""

from collections.abc import Sequence
from pathlib import Path

from comet_examples.datasets._tree import load_tree, tree_categories
from comet_meta.vision.samples import Split

_NAME = "MVTec AD"


def categories(root: Path | None) -> list[str]:
    """The categories that a data set holds.

    Args:
        root: The folder that has a folder for each category.

    Returns:
        Their names, sorted.

    Raises:
        DatasetError: If the folder is missing or holds no category.
    """
    return tree_categories(root, _NAME)


def load(root: Path | None, category: str, good: Sequence[str] = ()) -> Split:
    """One category.

    Args:
        root: The folder that has a folder for each category.
        category: A name out of :func:`categories`.
        good: What folders of good pictures are called besides ``good`` and words like it.

    Returns:
        Its split. A defective test picture ``test/<defect>/<stem>.<ext>`` has the mask
        ``ground_truth/<defect>/<stem>_mask.<ext>``, found by name.

    Raises:
        DatasetError: If category, split or a mask is missing.
    """
    return load_tree(root, category, _NAME, mask_suffixes=("_mask",), good=good)
