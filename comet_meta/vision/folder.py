"""Any folder of pictures without labels, most of them normal, also in folders below it.

For ranking one's own pictures: all of them are for training, none for a test, and nothing about
them is known.
"""

from pathlib import Path

from comet_meta.vision.samples import (
    DatasetError,
    Sample,
    Split,
    composed_name,
    pictures_below,
)


def categories(root: Path | None) -> list[str]:
    """The only category.

    Args:
        root: The folder.

    Returns:
        The folder's name.

    Raises:
        DatasetError: If the folder is missing.
    """
    return [_name(_checked(root))]


def load(root: Path | None, category: str) -> Split:
    """The pictures of the folder.

    Args:
        root: The folder. It is searched recursively; hidden files and folders are left out,
            and those that no person made: thumbnails, results of earlier runs.
        category: The name out of :func:`categories`.

    Returns:
        Its split: all pictures, with unknown labels, are the training set; the test set is empty.

    Raises:
        DatasetError: If folder, category or pictures are missing.
    """
    folder = _checked(root)
    if composed_name(category) != composed_name(_name(folder)):
        raise DatasetError(f"there's no category {category!r} in {root}; found: {_name(folder)}")
    train = tuple(Sample(path, None) for path in pictures_below(folder))
    if not train:
        raise DatasetError(
            f"{root} holds no picture, nor do the folders below it; pass a folder with png, jpg, "
            "bmp, tif, webp or other files that Pillow reads"
        )
    return Split(category, train, (), has_masks=False)


def _checked(root: Path | None) -> Path:
    if root is None:
        raise DatasetError("a folder of pictures needs --data-root: the folder")
    if not root.is_dir():
        raise DatasetError(f"there's no folder {root}; --data-root takes the folder of pictures")
    return root


def _name(folder: Path) -> str:
    # A drive's root has no name.
    return folder.resolve().name or "folder"
