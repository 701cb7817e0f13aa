"""KolektorSDD2: ``<root>/{train,test}/<id>.png``, each with a mask ``<id>_GT.png``.

Surfaces of one product, about 230 x 630 pixels: 2,331 training pictures, of which 246 are
defective, and 1,004 test pictures, of which 110 are. A picture is defective if any pixel of its
mask is above 0. The published archive has a stray ``10301 (copy).png`` with its mask; files named
so are left out.

The training set is uncurated: its defective pictures stay, with a label that training doesn't see.
:func:`~comet_examples.datasets.oracle` makes the curated one, without them.

Božič et al.: Mixed supervision for surface-defect detection: from weakly to fully supervised
learning, Computers in Industry 2021.
"""

from pathlib import Path

from comet_meta.vision.images import has_defect
from comet_meta.vision.samples import DatasetError, Sample, Split, composed_name, image_files

_CATEGORY = "ksdd2"
_MASK = "_GT"
_STRAY = " (copy)"


def categories(root: Path | None) -> list[str]:
    """The only category.

    Args:
        root: The folder that has the folders ``train`` and ``test``.

    Returns:
        Its name, ``ksdd2``.

    Raises:
        DatasetError: If the folder is missing.
    """
    _checked(root)
    return [_CATEGORY]


def load(root: Path | None, category: str = _CATEGORY) -> Split:
    """The data set, uncurated.

    Every mask is read for the labels.

    Args:
        root: The folder that has the folders ``train`` and ``test``.
        category: The name out of :func:`categories`.

    Returns:
        Its split, with defective pictures in the training set. Only they and the defective test
        pictures have a mask.

    Raises:
        DatasetError: If category, folder, pictures, a mask, or a mask's picture is missing, or a
            mask can't be read.
    """
    folder = _checked(root)
    if category != _CATEGORY:
        raise DatasetError(f"there's no category {category!r} in {root}; found: {_CATEGORY}")
    return Split(category, _samples(folder / "train"), _samples(folder / "test"), has_masks=True)


def _checked(root: Path | None) -> Path:
    if root is None:
        raise DatasetError(
            "KSDD2 needs --data-root: the folder that has the folders train and test"
        )
    if not root.is_dir():
        raise DatasetError(f"there's no folder {root}; --data-root takes the unpacked data set")
    return root


def _samples(folder: Path) -> tuple[Sample, ...]:
    if not folder.is_dir():
        raise DatasetError(f"there's no folder {folder}; KSDD2's layout has train and test in it")
    files = [path for path in image_files(folder) if not path.stem.endswith(_STRAY)]
    masks = {
        composed_name(path.stem.removesuffix(_MASK)): path
        for path in files
        if path.stem.endswith(_MASK)
    }
    pictures = [path for path in files if not path.stem.endswith(_MASK)]
    if not pictures:
        raise DatasetError(f"{folder} holds no picture")
    for path in pictures:
        if composed_name(path.stem) not in masks:
            raise DatasetError(
                f"{path} has no mask: expected {path.stem}{_MASK}.png beside it, black if the "
                "picture is normal"
            )
    known = {composed_name(path.stem) for path in pictures}
    for stem, mask in masks.items():
        if stem not in known:
            raise DatasetError(f"the mask {mask} has no picture: expected {stem}.png beside it")
    return tuple(_sample(path, masks[composed_name(path.stem)]) for path in pictures)


def _sample(path: Path, mask: Path) -> Sample:
    return Sample(path, 1, mask, "defective") if has_defect(mask) else Sample(path, 0)
