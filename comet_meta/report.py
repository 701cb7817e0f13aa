"""Write the curation report from your own training loop."""

from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path

from torch import Tensor

from comet_meta.weights.weighter import SoftConfidentWeighter


def write(
    weighter: SoftConfidentWeighter,
    paths: Sequence[str | PathLike[str]],
    file: str | PathLike[str] = "report.html",
    *,
    title: str = "Training pictures",
    size: tuple[int, int] = (256, 256),
    maps: Callable[[Sequence[Path]], Tensor] | None = None,
) -> Path:
    """Write an HTML page on which a person decides which training pictures to keep.

    The page is one file with small copies of the pictures; it needs no network. Writing it needs
    the extra ``comet-meta[vision]``.

    Args:
        weighter: The weighter after training, or with a prior.
        paths: The pictures' files: sample i is ``paths[i]``.
        file: HTML file to write or replace.
        title: Heading.
        size: Largest height and width in pixels at which the pictures are shown; they are padded,
            not stretched.
        maps: Function from some of the paths to their anomaly maps (B, H, W), shown as heat maps.
            None for none.

    Returns:
        The file.

    Raises:
        ModuleNotFoundError: If the extra isn't installed.
        ValueError: If there isn't one picture for each sample, or one can't be read.

    Example:
        >>> from comet_meta import report
        >>> report.write(weighter, paths, "report.html")  # doctest: +SKIP
    """
    # Only here: the core of the package doesn't need pictures.
    try:
        from comet_meta.vision.html_report import Run, write_report
        from comet_meta.vision.images import Transform
        from comet_meta.vision.samples import Sample
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'the report needs the package {error.name}: pip install "comet-meta[vision]"',
            name=error.name,
        ) from error

    write_report(
        Path(file),
        Run(heading=title, subtitle=""),
        weighter,
        [Sample(Path(path), None) for path in paths],
        Transform(size, keep_aspect=True),
        None if maps is None else lambda samples: maps([sample.path for sample in samples]),
    )
    return Path(file)
