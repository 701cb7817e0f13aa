"""The curation report: one HTML page on which a person decides which training pictures stay.

The page holds everything it shows, opens from a file and asks no network. Names and paths of
pictures come from outside: they reach the page as JSON, and its script shows them as plain text.
"""

import base64
import hashlib
import html
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, repeat
from pathlib import Path
from string import Template
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from comet_meta import SoftConfidentWeighter
from comet_meta.vision.estimate import in_words
from comet_meta.vision.files import replacing
from comet_meta.vision.images import Transform, load_image
from comet_meta.vision.samples import Sample
from comet_meta.weights.review import ranks_to_review, strata

_PARTS = Path(__file__).with_name("html_page")
# Of the pictures and heat maps together, before base64 makes them a third larger.
_BYTES = 18 * 2**20
# Longer side in pixels and quality of the thumbnails: the first of them that fit the bytes.
_THUMBNAILS = ((320, 80), (256, 75), (192, 70), (160, 60), (128, 50), (96, 40), (64, 30))
_TRIED = 24  # pictures on which that is decided
_HEAT_SIDE = 48
_HEAT_QUALITY = 60
_HEAT_BYTES = 1000  # about what a heat map of that size takes
_CHUNK = 128
_SHOWN = 5000
_KINDS = {0: "normal", 1: "bad", None: "unknown"}
_CURVES = {"mean_weight": "Mean weight", "strength": "Penalty λ(Σ)"}


@dataclass(frozen=True)
class Run:
    """What is known of a training besides its pictures.

    Attributes:
        heading: Names it, for instance by the category.
        subtitle: A sentence below.
        settings: Values of the settings by name.
        metrics: Rows of a table of figures, one for each method.
        highlights: Figures that matter most: caption and value.
        history: One entry for each epoch: values by name.
    """

    heading: str
    subtitle: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    metrics: Sequence[Mapping[str, str | float]] = ()
    highlights: Sequence[tuple[str, float]] = ()
    history: Sequence[Mapping[str, float]] = ()


def write_report(
    file: Path,
    run: Run,
    weighter: SoftConfidentWeighter,
    samples: Sequence[Sample],
    transform: Transform,
    maps: Callable[[Sequence[Sample]], Tensor] | None = None,
) -> None:
    """Write the page.

    It lists every training picture, the most suspect first. The first 5,000 are shown, and those
    of a sample that tells how many are bad: the more there are, the smaller the thumbnails, so that
    the page stays below 30 MB.

    Args:
        file: HTML file to write.
        run: Heading, settings, figures and curves.
        weighter: After training.
        samples: The training set, in the weighter's order.
        transform: How to read the pictures. All come out in one size.
        maps: Anomaly maps (B, H, W) of some of the pictures, called for a chunk at a time; None:
            without heat maps.

    Raises:
        DatasetError: If a picture can't be read.
        ValueError: If there isn't one sample for each of the weighter's.
    """
    if len(samples) != len(weighter.weights) or not samples:
        raise ValueError(
            f"got {len(samples)} pictures and a weighter of {len(weighter.weights)} samples; "
            "expected one picture for each sample, in the weighter's order"
        )
    # Before a model has scored anything, the prior is all there is to show.
    prior_alone = weighter.prior is not None and bool(weighter.scores.isnan().all())
    scores = weighter.prior if weighter.prior is not None and prior_alone else weighter.scores
    suspicion = scores if prior_alone else weighter.ranking_scores()
    in_units_of_threshold = prior_alone or weighter.prior is None
    order = weighter.ranking().tolist()
    ranked = [samples[i] for i in order]
    review = ranks_to_review(len(ranked))
    shown = sorted({*range(min(_SHOWN, len(ranked))), *chain.from_iterable(review)})
    seen = [ranked[rank] for rank in shown]
    width, height = _load(ranked[0], transform).size
    tried = seen[:: math.ceil(len(seen) / _TRIED)]
    format_ = _thumbnail_format(
        [_load(sample, transform) for sample in tried],
        _BYTES // len(seen) - (_HEAT_BYTES if maps else 0),
    )
    heat_maps = _heat_maps(seen, maps) if maps else repeat(b"", len(seen))
    images = {
        rank: (_encoded(_thumbnail(_load(ranked[rank], transform), *format_)), _encoded(heat))
        for rank, heat in zip(shown, heat_maps, strict=True)
    }
    weights = weighter.mean_weights()
    pictures = [
        {
            "path": str(sample.path.absolute()),
            "name": sample.path.name,
            "uri": sample.path.absolute().as_uri(),
            "kind": _KINDS[sample.label],
            "defect": sample.defect,
            "weight": _number(weights[i]),
            "anomalous": _number(weighter.p_bad[i]),
            "score": _number(scores[i]),
            "suspicion": _number(suspicion[i]),
            "image": image,
            "heat": heat,
        }
        for rank, (i, sample) in enumerate(zip(order, ranked, strict=True))
        for image, heat in [images.get(rank, ("", ""))]
    ]
    paths = "\n".join(str(picture["path"]) for picture in pictures)
    content = {
        "id": hashlib.sha256(paths.encode(errors="replace")).hexdigest()[:16],
        "heading": run.heading,
        "subtitle": run.subtitle,
        "verdict": in_words(weighter),
        "settings": {name: _text(value) for name, value in run.settings.items()},
        "metrics": run.metrics,
        "highlights": run.highlights,
        "curves": _curves(run.history),
        # Beside a model's scores, the prior's threshold has another unit than what is shown.
        "threshold": _number(weighter.threshold) if in_units_of_threshold else None,
        "prior": not in_units_of_threshold,
        "aspect": width / height,
        # Of each stratum of the ranking: its size, and the ranks that a person looks at.
        "review": [
            {"size": len(ranks), "ranks": chosen}
            for ranks, chosen in zip(strata(len(ranked)), review, strict=True)
        ],
        "pictures": pictures,
    }
    with replacing(file) as aside:
        # Names of files may hold bytes that are no text.
        aside.write_text(_page(run.heading, content), encoding="utf-8", errors="replace")


def _page(title: str, content: Mapping[str, Any]) -> str:
    page, style, script = (
        (_PARTS / name).read_text(encoding="utf-8")
        for name in ("page.html", "style.css", "script.js")
    )
    # A second wall behind the script's care: nothing but this very style and script may run, and
    # nothing may be fetched.
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; "
        f"script-src '{_hash(script)}'; base-uri 'none'; form-action 'none'"
    )
    # No name can close the element that holds the JSON.
    data = json.dumps(content, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return Template(page).substitute(
        title=html.escape(f"{title}: curation report"),
        policy=policy,
        style=style,
        script=script,
        data=data,
    )


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _curves(history: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    """Charts of the history: all losses in one, any other value in one of its own."""
    names = list(dict.fromkeys(name for epoch in history for name in epoch))
    losses = [name for name in names if name.split("_")[-1] == "loss"]
    charts = [("Loss", losses)] if losses else []
    charts += [(_CURVES.get(n, _spoken(n)), [n]) for n in names if n not in losses]
    return [
        {
            "caption": caption,
            "series": [
                {"name": _spoken(n), "values": [_number(epoch.get(n)) for epoch in history]}
                for n in chart
            ],
        }
        for caption, chart in charts
    ]


def _heat_maps(
    samples: Sequence[Sample], maps: Callable[[Sequence[Sample]], Tensor]
) -> Iterator[bytes]:
    """Heat maps to lay over the pictures, on one colour scale: the top quarter of all pixels."""
    small = [
        _shrunk(maps(samples[start : start + _CHUNK])) for start in range(0, len(samples), _CHUNK)
    ]
    values = torch.cat(small).numpy()
    low, high = np.quantile(values, [0.75, 0.999])
    shares = np.clip((values - low) / max(high - low, np.finfo(np.float32).tiny), 0, 1)
    colors = mpl.colormaps["inferno"]
    for share in shares:
        pixels = colors(share, bytes=True)
        # Never opaque: the picture below is what a person judges.
        pixels[..., 3] = (255 * 0.6 * np.sqrt(share)).astype(np.uint8)
        yield _webp(Image.fromarray(pixels), _HEAT_QUALITY)


def _shrunk(maps: Tensor) -> Tensor:
    """Maps (B, H, W) with a longer side of at most 48, as float32 on the CPU."""
    height, width = maps.shape[-2:]
    scale = min(1, _HEAT_SIDE / max(height, width))
    size = (max(1, round(scale * height)), max(1, round(scale * width)))
    return F.adaptive_avg_pool2d(maps.float().cpu().unsqueeze(1), size).squeeze(1)


def _load(sample: Sample, transform: Transform) -> Image.Image:
    return Image.fromarray(load_image(sample.path, transform).permute(1, 2, 0).numpy())


def _thumbnail_format(pictures: Sequence[Image.Image], allowance: int) -> tuple[int, int]:
    """Side and quality at which the pictures take that many bytes on average, or the least."""
    for side, quality in _THUMBNAILS:
        sizes = [len(_thumbnail(picture, side, quality)) for picture in pictures]
        if sum(sizes) <= allowance * len(sizes):
            break
    return side, quality


def _thumbnail(picture: Image.Image, side: int, quality: int) -> bytes:
    small = picture.copy()
    small.thumbnail((side, side))
    return _webp(small, quality)


def _webp(picture: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "webp", quality=quality, method=2)
    return buffer.getvalue()


def _encoded(picture: bytes) -> str:
    return base64.b64encode(picture).decode()


def _number(value: Tensor | float | None) -> float | None:
    """JSON's numbers, rounded; None for what JSON has no number for."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{float(value):.6g}")


def _text(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_text(inner)}" for name, inner in value.items()) or "none"
    if isinstance(value, list | tuple):
        return " x ".join(map(_text, value))
    if value is None:
        return "default"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def _spoken(name: str) -> str:
    text = name.replace("_", " ")
    return text[:1].upper() + text[1:]
