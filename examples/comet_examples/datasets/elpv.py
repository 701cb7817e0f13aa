"""Solar cells in electroluminescence light, from the PyPI package ``elpv-dataset``.

2,624 pictures of 300 x 300 pixels, each with the probability that the cell is defective as judged
by experts: 0, 1/3, 2/3 or 1. Cells of probability 0 are taken as normal, of probability 1 as
anomalous; the uncertain ones are left out. There are no masks. Categories: ``mono`` and ``poly``
(mono- and polycrystalline). Licence of the pictures: CC BY-NC-SA 4.0.

Buerhop-Lutz et al.: A benchmark for visual identification of defective solar cells in
electroluminescence imagery, EU PVSEC 2018.
"""

from importlib.util import find_spec
from pathlib import Path

import numpy as np

from comet_meta.vision.samples import DatasetError, Sample, Split

# So many that 40 % contamination still leaves defective cells of either kind for the test.
_TRAIN_COUNT = 400


def categories(root: Path | None) -> list[str]:
    """The kinds of cells.

    Args:
        root: A folder with ``labels.csv``; None for the installed package.

    Returns:
        Their names, sorted.

    Raises:
        DatasetError: If the package or the folder's list is missing.
    """
    return sorted({kind for _, _, kind in _labels(root)})


def load(root: Path | None, category: str, seed: int = 0) -> Split:
    """One kind of cells.

    Args:
        root: A folder with ``labels.csv``; None for the installed package.
        category: A name out of :func:`categories`.
        seed: Decides the split. It is no part of the contamination protocol: keep it for all seeds
            of a comparison.

    Returns:
        Its split: 400 normal cells, drawn with the seed, are the training set (70 % of them where
        there are fewer than 500); the others and all anomalous cells are the test set.

    Raises:
        DatasetError: If package, list, category, or one of the two kinds of cells is missing.
    """
    rows = [(path, probability) for path, probability, kind in _labels(root) if kind == category]
    if not rows:
        raise DatasetError(
            f"there's no category {category!r}; found: {', '.join(categories(root))}"
        )
    normal = [Sample(path, 0) for path, probability in rows if probability == 0]
    anomalous = [Sample(path, 1, None, "defective") for path, p in rows if p == 1]
    if not normal or not anomalous:
        raise DatasetError(
            f"{category} has {len(normal)} cells of probability 0 and {len(anomalous)} of "
            "probability 1; both kinds are needed, for training and for the test"
        )
    order = np.random.default_rng(seed).permutation(len(normal))
    cut = _TRAIN_COUNT if len(normal) >= 500 else round(0.7 * len(normal))
    train, held_out = sorted(order[:cut]), sorted(order[cut:])
    return Split(
        category,
        tuple(normal[i] for i in train),
        (*(normal[i] for i in held_out), *anomalous),
        has_masks=False,
    )


def _labels(root: Path | None) -> list[tuple[Path, float, str]]:
    if root is None:
        spec = find_spec("elpv_dataset")
        if spec is None or spec.origin is None:
            raise DatasetError(
                "the solar-cell pictures are not installed: pip install elpv-dataset, "
                'or pip install "comet-meta[examples]"'
            )
        root = Path(spec.origin).parent / "data"
    table = root / "labels.csv"
    if not table.is_file():
        raise DatasetError(f"there's no {table}; expected the list of the elpv data set")
    try:
        rows = np.loadtxt(table, dtype=str, comments=None, ndmin=2, encoding="utf-8").tolist()
        return [(root / name, float(probability), kind) for name, probability, kind in rows]
    except ValueError as error:
        raise DatasetError(
            f"can't read {table}: {error}; expected lines of path, probability and kind"
        ) from error
