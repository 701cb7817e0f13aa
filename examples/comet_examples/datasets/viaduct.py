"""VIADUCT: ``<root>/<class>/{train/good, val/good, test/<defect>, ground_truth/<defect>}``.

49 classes, published one archive a class (Fraunhofer, fordatis 363, CC BY 4.0). They are spelt
``11 ring cable lug`` or ``05_cable_end_sleeve``: a category is whatever folder is there, under its
own name. Archives ``<class>.zip`` in the root are unpacked beside themselves first.

The normal pictures of ``val`` are left out of training and test: nothing is selected by them, and
figures stay comparable to those on the published test set.

The views of one object belong on one side of any split. An object is known by its file names: they
are taken to be ``<object>_<view>.png`` throughout, as in ``Image_broken_007_0.png``, so that the
number after the last underscore tells views, not objects. Pictures in folders of different defects
are taken to be of different objects, whatever their names. A name without such a number is a
picture of its own. The published sets are kept as they are;
:func:`~comet_examples.datasets.contaminate` moves whole objects out of the test set.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from comet_examples.datasets._tree import load_tree, tree_categories
from comet_examples.datasets.archives import unpack_missing
from comet_meta.vision.samples import Sample, Split

_NAME = "VIADUCT"
_VIEW = re.compile(r"_\d+$")


def categories(root: Path | None) -> list[str]:
    """The classes that are there.

    Args:
        root: The folder that has a folder for each class.

    Returns:
        Their names, sorted.

    Raises:
        DatasetError: If the folder is missing or holds no class, or an archive in it can't be
            unpacked.
    """
    if root is not None and root.is_dir():
        unpack_missing(root)
    return tree_categories(root, _NAME)


def load(root: Path | None, category: str, good: Sequence[str] = ()) -> Split:
    """One class.

    Args:
        root: The folder that has a folder for each class.
        category: A name out of :func:`categories`.
        good: What folders of good pictures are called besides ``good`` and words like it.

    Returns:
        Its split. A defective test picture ``test/<defect>/<stem>.<ext>`` has the mask
        ``ground_truth/<defect>/<stem>_mask.<ext>`` or ``ground_truth/<defect>/<stem>.<ext>``, found
        by name. The views of one object share their ``group``.

    Raises:
        DatasetError: If class, split or a mask is missing, or an archive can't be unpacked.
    """
    categories(root)
    split = load_tree(root, category, _NAME, mask_suffixes=("_mask", ""), good=good)
    return replace(
        split,
        train=tuple(_grouped(sample) for sample in split.train),
        test=tuple(_grouped(sample) for sample in split.test),
    )


def _grouped(sample: Sample) -> Sample:
    name, views = _VIEW.subn("", sample.path.stem)
    return replace(sample, group=f"{sample.defect}/{name}") if views else sample
