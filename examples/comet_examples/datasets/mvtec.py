"""MVTec AD: ``<root>/<category>/{train/good, test/<defect>, ground_truth/<defect>}``.

Bergmann et al.: MVTec AD - a comprehensive real-world dataset for unsupervised anomaly detection,
CVPR 2019.
"""

import logging
from pathlib import Path

from comet_examples.datasets.base import DatasetError, Sample, Split, image_files, subfolders

_LOGGER = logging.getLogger(__name__)


def categories(root: Path | None) -> list[str]:
    """The categories that a data set holds.

    Args:
        root: The folder that has a folder for each category.

    Returns:
        Their names, sorted.

    Raises:
        DatasetError: If the folder is missing or holds no category.
    """
    if root is None:
        raise DatasetError("MVTec AD needs --data-root: the folder that has the category folders")
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


def load(root: Path | None, category: str) -> Split:
    """One category.

    Args:
        root: The folder that has a folder for each category.
        category: A name out of :func:`categories`.

    Returns:
        Its split. A defective test picture ``test/<defect>/<stem>.<ext>`` has the mask
        ``ground_truth/<defect>/<stem>_mask.<ext>``, found by name.

    Raises:
        DatasetError: If category, split or a mask is missing.
    """
    found = categories(root)
    if root is None or category not in found:
        raise DatasetError(f"there's no category {category!r} in {root}; found: {', '.join(found)}")
    folder = root / category
    train = [Sample(path, 0) for path in _required(folder / "train" / "good")]
    has_masks = (folder / "ground_truth").is_dir()
    if not has_masks:
        _LOGGER.warning("%s has no ground_truth folder: no pixel metrics", folder)
    test: list[Sample] = []
    for kind in subfolders(_folder(folder / "test")):
        masks = _masks(folder / "ground_truth" / kind.name) if has_masks else {}
        for path in image_files(kind):
            if kind.name == "good":
                test.append(Sample(path, 0))
                continue
            mask = masks.get(f"{path.stem}_mask")
            if has_masks and mask is None:
                raise DatasetError(
                    f"{path} has no mask: expected {folder / 'ground_truth' / kind.name}"
                    f"/{path.stem}_mask.png"
                )
            test.append(Sample(path, 1, mask, kind.name))
    if not test:
        raise DatasetError(f"{folder / 'test'} holds no picture")
    return Split(category, tuple(train), tuple(test), has_masks)


def _is_category(folder: Path) -> bool:
    return (folder / "train").is_dir() or (folder / "test").is_dir()


def _folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise DatasetError(
            f"there's no folder {folder}; MVTec AD's layout has it in every category"
        )
    return folder


def _required(folder: Path) -> list[Path]:
    files = image_files(_folder(folder))
    if not files:
        raise DatasetError(f"{folder} holds no picture")
    return files


def _masks(folder: Path) -> dict[str, Path]:
    files = image_files(folder) if folder.is_dir() else []
    return {path.stem: path for path in files}
