"""Trees in the way of MVTec AD, which other data sets follow.

``<root>/<category>/{train/good, test/<defect>, ground_truth/<defect>}``.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from comet_meta.vision.samples import (
    DatasetError,
    Sample,
    Split,
    composed_name,
    find_by_name,
    image_files,
    pictures_below,
    subfolders,
)

_LOGGER = logging.getLogger(__name__)
# What folders of good pictures are called, in lower case and without signs between the words.
_GOOD = {
    *("good", "goods", "ok", "okay", "okey", "normal", "normals", "nominal", "io", "gut", "bon"),
    *("clean", "healthy", "pass", "passed", "fine", "perfect", "defectfree", "nodefect"),
    *("nodefects", "nondefective", "nondefect", "undamaged", "intact", "faultfree", "nofault"),
    *("anomalyfree", "noanomaly", "nonanomalous", "notanomalous", "negative"),
}


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
    found = [folder.name for folder in subfolders(root, outputs=True) if _is_category(folder)]
    if not found:
        parent = root.resolve().parent
        hint = f"; it looks like a single category: pass {parent}" if _is_category(root) else ""
        raise DatasetError(
            f"{root} holds no category, that is no folder with train/good and test in it{hint}"
        )
    return found


def load_tree(
    root: Path | None,
    category: str,
    dataset: str,
    mask_suffixes: Sequence[str],
    good: Sequence[str] = (),
) -> Split:
    """One category of a tree.

    Args:
        root: The folder that has a folder for each category.
        category: A name out of :func:`tree_categories`.
        dataset: Name of the data set for messages.
        mask_suffixes: What a mask's stem may have after that of its picture; the first one that
            is found counts.
        good: What folders of good pictures are called besides ``good`` and words like it (``ok``,
            ``Normal``, ``defect-free`` ...).

    Returns:
        Its split: ``train/good`` is the training set, all of ``test`` the test set, both with the
        folders below them. Masks are found by name in the folder of ``ground_truth`` called like
        that of the picture; without a folder ``ground_truth``, there are none.

    Raises:
        DatasetError: If category, split or a mask is missing, or ``good`` names no folder.
    """
    found = tree_categories(root, dataset)
    folder = None if root is None else find_by_name(subfolders(root, outputs=True), category)
    if folder is None or folder.name not in found:
        raise DatasetError(f"there's no category {category!r} in {root}; found: {', '.join(found)}")
    known = {_word(name) for name in good}
    parts = {name: _part(folder, name) for name in ("train", "test", "ground_truth")}
    test_folder = _folder(parts["test"], dataset)
    kinds = subfolders(test_folder)
    absent = known - {_word(kind.name) for kind in kinds}
    if absent:
        raise DatasetError(
            f"--good {' '.join(good)}: {test_folder} has no such folder; found: "
            + ", ".join(kind.name for kind in kinds)
        )
    train = _training(parts["train"], known, dataset)
    has_masks = parts["ground_truth"].is_dir()
    if not has_masks:
        _LOGGER.warning("%s has no ground_truth folder: no pixel metrics", folder)
    _say_loose(test_folder)
    test: list[Sample] = []
    for kind in kinds:
        if _is_good(kind.name, known):
            if kind.name != "good":
                _LOGGER.info("%s: taken for good pictures", kind)
            test += [Sample(path, 0) for path in pictures_below(kind)]
            continue
        truth = (has_masks and find_by_name(subfolders(parts["ground_truth"]), kind.name)) or (
            parts["ground_truth"] / kind.name
        )
        masks = _Masks(truth, mask_suffixes)
        for path in pictures_below(kind):
            mask = masks.of(path, kind)
            if has_masks and mask is None:
                names = " or ".join(f"{path.stem}{suffix}.png" for suffix in mask_suffixes)
                raise DatasetError(
                    f"{path} has no mask: expected {names} in {truth}; if {kind.name} holds good "
                    f"pictures, say --good {kind.name!r}"
                )
            test.append(Sample(path, 1, mask, kind.name))
    if not test:
        raise DatasetError(f"{folder / 'test'} holds no picture")
    if not any(sample.label == 0 for sample in test):
        _LOGGER.warning(
            "%s: all of %s are taken for defects; if one of them is of good pictures, name it by "
            "--good",
            *(test_folder, ", ".join(kind.name for kind in kinds)),
        )
    return Split(category, tuple(train), tuple(test), has_masks)


class _Masks:
    """Masks of one kind of defect, by the names of their pictures."""

    def __init__(self, truth: Path, suffixes: Sequence[str]) -> None:
        self._suffixes = suffixes
        self._by_place: dict[tuple[str, ...], Path] = {}
        by_stem: dict[str, list[Path]] = {}
        for path in pictures_below(truth) if truth.is_dir() else []:
            self._by_place[_place(path, truth)] = path
            by_stem.setdefault(composed_name(path.stem), []).append(path)
        # A name that is there twice tells nothing.
        self._by_stem = {stem: found[0] for stem, found in by_stem.items() if len(found) == 1}

    def of(self, picture: Path, kind: Path) -> Path | None:
        """The mask in the same place below its folder, or else the only one of that name."""
        *below, stem = _place(picture, kind)
        for suffix in self._suffixes:
            name = composed_name(stem + suffix)
            found = self._by_place.get((*below, name)) or self._by_stem.get(name)
            if found is not None:
                return found
        return None


def _place(path: Path, folder: Path) -> tuple[str, ...]:
    return tuple(map(composed_name, (*path.parent.relative_to(folder).parts, path.stem)))


def _training(folder: Path, known: set[str], dataset: str) -> list[Sample]:
    """Pictures of ``train/good``, or of the folder that is called by another word for good."""
    kinds = subfolders(folder) if folder.is_dir() else []
    chosen = [kind for kind in kinds if kind.name == "good"]
    chosen = chosen or [kind for kind in kinds if _is_good(kind.name, known)]
    if not chosen:
        return [Sample(path, 0) for path in _required(folder / "good", dataset)]
    for kind in kinds:
        if kind not in chosen and (count := len(pictures_below(kind))):
            _LOGGER.warning(
                "%s: %d pictures left out; training pictures are those in %s",
                *(kind, count, ", ".join(map(str, chosen))),
            )
    _say_loose(folder)
    for kind in chosen:
        if kind.name != "good":
            _LOGGER.info("%s: taken for good pictures", kind)
    return [Sample(path, 0) for kind in chosen for path in _required(kind, dataset)]


def _say_loose(folder: Path) -> None:
    if loose := image_files(folder):
        _LOGGER.warning(
            "%s: %d pictures left out that lie beside its folders (%s), as nothing says what they "
            "are; put them into one",
            *(folder, len(loose), loose[0].name),
        )


def _is_good(name: str, known: set[str]) -> bool:
    return (word := _word(name)) in _GOOD or word in known


def _word(name: str) -> str:
    """A folder's name in lower case, without spaces, dots, hyphens and underscores."""
    return "".join(c for c in composed_name(name).casefold() if c.isalnum())


def _part(folder: Path, name: str) -> Path:
    return find_by_name(subfolders(folder), name) or folder / name


def _is_category(folder: Path) -> bool:
    return any(_part(folder, name).is_dir() for name in ("train", "test"))


def _folder(folder: Path, dataset: str) -> Path:
    if not folder.is_dir():
        raise DatasetError(
            f"there's no folder {folder}; {dataset}'s layout has it in every category"
        )
    return folder


def _required(folder: Path, dataset: str) -> list[Path]:
    files = pictures_below(_folder(folder, dataset))
    if not files:
        raise DatasetError(f"{folder} holds no picture")
    return files
