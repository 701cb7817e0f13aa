"""Trees in the way of MVTec AD, which other data sets follow.

``<root>/<category>/{train/good, test/<defect>, ground_truth/<defect>}``.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from comet_meta.vision.samples import DatasetError, Sample, Split, image_files, subfolders

_LOGGER = logging.getLogger(__name__)


def tree_categories(root: Path | None, dataset: str) -> list[str]:
    """The categories that a tree holds.

    Args:
        root: The folder that has a folder for each category.
        dataset: Name of the data set for messages.

    Returns:
        Their names, sorted.

    Raises:
        DatasetError: If the folder is missing or holds no category.
    """
    if root is None:
        raise DatasetError(f"{dataset} needs --data-root: the folder that has the category folders")
    if not root.is_dir():
        raise DatasetError(f"there's no folder {root}; --data-root takes the unpacked data set")
    found = [folder.name for folder in subfolders(root) if _is_category(folder)]
    if not found:
        parent = root.resolve().parent
        hint = f"; it looks like a single category: pass {parent}" if _is_category(root) else ""
        raise DatasetError(
            f"{root} holds no category, that is no folder with train/good and test in it{hint}"
        )
    return found


def load_tree(
    root: Path | None, category: str, dataset: str, mask_suffixes: Sequence[str]
) -> Split:
    """One category of a tree.

    Args:
        root: The folder that has a folder for each category.
        category: A name out of :func:`tree_categories`.
        dataset: Name of the data set for messages.
        mask_suffixes: What a mask's stem may have after that of its picture; the first one that
            is found counts.

    Returns:
        Its split: ``train/good`` is the training set, all of ``test`` the test set. Masks are found
        by name in the folder of ``ground_truth`` called like that of the picture; without a folder
        ``ground_truth``, there are none.

    Raises:
        DatasetError: If category, split or a mask is missing.
    """
    found = tree_categories(root, dataset)
    if root is None or category not in found:
        raise DatasetError(f"there's no category {category!r} in {root}; found: {', '.join(found)}")
    folder = root / category
    train = [Sample(path, 0) for path in _required(folder / "train" / "good", dataset)]
    has_masks = (folder / "ground_truth").is_dir()
    if not has_masks:
        _LOGGER.warning("%s has no ground_truth folder: no pixel metrics", folder)
    test: list[Sample] = []
    for kind in subfolders(_folder(folder / "test", dataset)):
        if kind.name == "good":
            test += [Sample(path, 0) for path in image_files(kind)]
            continue
        truth = folder / "ground_truth" / kind.name
        masks = {path.stem: path for path in image_files(truth)} if truth.is_dir() else {}
        for path in image_files(kind):
            stems = [path.stem + suffix for suffix in mask_suffixes]
            mask = next((masks[stem] for stem in stems if stem in masks), None)
            if has_masks and mask is None:
                names = " or ".join(f"{stem}.png" for stem in stems)
                raise DatasetError(f"{path} has no mask: expected {names} in {truth}")
            test.append(Sample(path, 1, mask, kind.name))
    if not test:
        raise DatasetError(f"{folder / 'test'} holds no picture")
    return Split(category, tuple(train), tuple(test), has_masks)


def _is_category(folder: Path) -> bool:
    return (folder / "train").is_dir() or (folder / "test").is_dir()


def _folder(folder: Path, dataset: str) -> Path:
    if not folder.is_dir():
        raise DatasetError(
            f"there's no folder {folder}; {dataset}'s layout has it in every category"
        )
    return folder


def _required(folder: Path, dataset: str) -> list[Path]:
    files = image_files(_folder(folder, dataset))
    if not files:
        raise DatasetError(f"{folder} holds no picture")
    return files
