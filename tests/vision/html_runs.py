"""Pictures and reports for the tests of the curation report."""

import json
import math
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from comet_meta import SoftConfidentWeighter
from comet_meta.vision import html_report
from comet_meta.vision.images import Transform
from comet_meta.vision.samples import Sample

HOSTILE = [
    "<img src=x onerror=window.pwned=1>.png",
    "a</script><script>window.pwned=1</script>.png",
    '" onmouseover="window.pwned=1',
    "${alert(1)} $title 'q', \"quoted\", comma.png",
    "two\nlines.png",
    "=1+1 grün &amp; &lt;b&gt;.png",
    "javascript:window.pwned=1",
]


def pictures(folder: Path, names: list[str]) -> list[Sample]:
    """Grey pictures, every fifth of them with a bright corner and known to be bad."""
    generator = np.random.default_rng(0)
    samples = []
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(90, 120, (48, 32), dtype=np.uint8)
        if bad := i % 5 == 0:
            pixels[:12, :12] = 250
        Image.fromarray(pixels).save(path, "png")
        samples.append(Sample(path, int(bad), defect="<b>hole</b>" if bad else "good"))
    return samples


def fitted(samples: list[Sample]) -> SoftConfidentWeighter:
    """Bad pictures have the highest scores; the scores tell all pictures apart."""
    weighter = SoftConfidentWeighter(len(samples), rule="hard")
    steps = torch.linspace(0, 0.5, len(samples))
    weighter.fit(steps + 5.0 * torch.tensor([sample.label or 0 for sample in samples]))
    return weighter


def corner_maps(samples: list[Sample]) -> torch.Tensor:
    maps = torch.zeros(len(samples), 48, 32)
    maps[:, :12, :12] = 1.0
    return maps


RUN = html_report.Run(
    heading="part <1>",
    subtitle="a detector & a data set",
    settings={"noise": 0.1, "transform": {"resize": (48, 32), "crop": None}, "overlap": False},
    metrics=[{"method": "plain", "I-AUROC": 0.5}, {"method": "comet", "AUPRO": 0.25}],
    highlights=[("I-AUROC on the test set", 0.9)],
    history=[
        {"loss": 1.0, "query_loss": 2.0, "mean_weight": 1.0, "strength": 0.0},
        {"loss": 0.5, "query_loss": math.nan, "mean_weight": 0.9, "strength": 0.0},
    ],
)


def write(folder: Path, samples: list[Sample], run: html_report.Run = RUN) -> Path:
    file = folder / "report.html"
    html_report.write_report(file, run, fitted(samples), samples, Transform((48, 32)), corner_maps)
    return file


def content(file: Path) -> dict:
    """The JSON that the page holds."""
    text = file.read_text(encoding="utf-8")
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert len(found) == 1
    return json.loads(found[0])


def spared_and_suspects(folder: Path) -> Path:
    """A report on twenty pictures of which ten have lost their weight and four are likely bad."""
    samples = pictures(folder, [f"{i:02d}.png" for i in range(20)])
    weighter = fitted(samples)
    weighter.weights[weighter.ranking(10)] = 0.0
    weighter.p_bad.fill_(0.1)
    weighter.p_bad[weighter.ranking(4)] = 1.0
    file = folder / "out" / "report.html"
    html_report.write_report(file, RUN, weighter, samples, Transform((48, 32)), corner_maps)
    return file
