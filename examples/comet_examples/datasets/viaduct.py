"""VIADUCT: ``<root>/<class>/{train/good, val/good, test/<defect>, ground_truth/<defect>}``.

49 classes, published one archive a class (Fraunhofer, fordatis 363, CC BY 4.0). They are spelt
``11 ring cable lug`` or ``05_cable_end_sleeve``: a category is whatever folder is there, under its
own name.

The normal pictures of ``val`` are left out of training and test: nothing is selected by them, and
figures stay comparable to those on the published test set.

File names end in a view number (``<object>_<view>.png``), and the views of one object belong on one
side of any split. The published sets are kept as they are. Only
:func:`~comet_examples.datasets.contaminate` moves pictures, and it draws each by itself: at a noise
above 0, other views of a defective object drawn for training may remain in the test set.
"""

from pathlib import Path

from comet_examples.datasets._tree import load_tree, tree_categories
from comet_examples.datasets.base import Split

_NAME = "VIADUCT"


def categories(root: Path | None) -> list[str]:
    """The classes that are there.

    Args:
        root: The folder that has a folder for each class.

    Returns:
        Their names, sorted.

    Raises:
        DatasetError: If the folder is missing or holds no class.
    """
    return tree_categories(root, _NAME)


def load(root: Path | None, category: str) -> Split:
    """One class.

    Args:
        root: The folder that has a folder for each class.
        category: A name out of :func:`categories`.

    Returns:
        Its split. A defective test picture ``test/<defect>/<stem>.<ext>`` has the mask
        ``ground_truth/<defect>/<stem>_mask.<ext>`` or ``ground_truth/<defect>/<stem>.<ext>``, found
        by name.

    Raises:
        DatasetError: If class, split or a mask is missing.
    """
    return load_tree(root, category, _NAME, mask_suffixes=("_mask", ""))
