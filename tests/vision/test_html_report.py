"""The curation report, as a file."""

import dataclasses
import os
import re

import numpy as np
import pytest
import torch
from html_runs import (
    RUN,
    content,
    corner_maps,
    pictures,
    spared_and_suspects,
    write,
)
from PIL import Image

from comet_meta import SoftConfidentWeighter
from comet_meta.vision import html_report
from comet_meta.vision.images import Transform


def test_every_picture_is_there_most_suspect_first(report, samples):
    found = content(report)
    shown = [picture["path"] for picture in found["pictures"]]
    assert sorted(shown) == sorted(str(sample.path) for sample in samples)
    bad = {str(sample.path) for sample in samples if sample.label == 1}
    assert set(shown[: len(bad)]) == bad
    scores = [picture["score"] for picture in found["pictures"]]
    assert scores == sorted(scores, reverse=True)
    assert [picture["weight"] for picture in found["pictures"]][:22] == [0] * 22
    assert found["threshold"] == pytest.approx(0.5, abs=0.5)


def test_with_a_prior_no_threshold_is_drawn_in_what_has_another_unit(tmp_path):
    samples = pictures(tmp_path, [f"{i:02d}.png" for i in range(20)])
    prior = torch.tensor([float(sample.label or 0) for sample in samples])
    weighter = SoftConfidentWeighter(prior=prior + torch.linspace(0, 0.1, 20))
    weighter.fit(torch.linspace(100, 200, 20))
    file = tmp_path / "out" / "report.html"
    html_report.write_report(file, RUN, weighter, samples, Transform((48, 32)), corner_maps)
    found = content(file)
    suspicion = [picture["suspicion"] for picture in found["pictures"]]
    assert found["prior"] is True
    assert suspicion == sorted(suspicion, reverse=True)
    assert max(suspicion) < 100
    assert found["threshold"] is None
    assert {picture["score"] for picture in found["pictures"]} >= {100, 200}


def test_the_file_tells_lost_weight_and_likely_bad_apart(tmp_path):
    found = content(spared_and_suspects(tmp_path))["pictures"]
    assert [picture["weight"] for picture in found[:10]] == [0] * 10
    assert [picture["anomalous"] for picture in found] == pytest.approx([1.0] * 4 + [0.1] * 16)


def test_the_file_needs_nothing_else(report):
    text = report.read_text(encoding="utf-8")
    text = text.replace("http://www.w3.org/2000/svg", "")  # a name, never fetched
    assert "http:" not in text
    assert "https:" not in text
    assert not re.search(r"<(link|img|script|iframe)[^>]* (src|href)=", text)


def test_no_name_reaches_the_markup(report):
    text = report.read_text(encoding="utf-8")
    assert "<img src=x" not in text
    assert "<b>hole" not in text
    assert text.count("<script") == 2
    assert "<title>part &lt;1&gt;: curation report</title>" in text


def test_pictures_without_score_or_spread_are_told_in_json(tmp_path):
    samples = pictures(tmp_path, ["a.png", "b.png"])
    file = tmp_path / "out" / "report.html"
    weighter = SoftConfidentWeighter(2)
    html_report.write_report(file, RUN, weighter, samples, Transform((48, 32)), corner_maps)
    found = content(file)
    assert found["threshold"] is None
    assert [p["score"] for p in found["pictures"]] == [None, None]
    assert [p["weight"] for p in found["pictures"]] == [1, 1]
    charts = {chart["caption"]: chart for chart in found["curves"]}
    assert list(charts) == ["Loss", "Mean weight", "Penalty λ(Σ)"]
    assert [s["values"] for s in charts["Loss"]["series"]] == [[1, 0.5], [2, None]]


def test_names_that_are_no_text_are_shown_all_the_same(tmp_path):
    try:
        samples = pictures(tmp_path, [os.fsdecode(b"\xff.png"), "a.png"])
    except OSError:
        pytest.skip("this file system takes only text for names")
    run = dataclasses.replace(RUN, heading=os.fsdecode(b"\xff"))
    found = content(write(tmp_path / "out", samples, run))
    assert found["pictures"][0]["uri"].endswith("/%FF.png")


def test_heat_maps_share_one_scale_and_the_pictures_shape(tmp_path):
    samples = pictures(tmp_path, [f"{i}.png" for i in range(10)])
    maps = torch.zeros(10, 96, 64)
    maps[3, :24, :24] = 4.0
    maps[5, :24, :24] = 2.0
    chunks = []

    def asked(chosen):
        chunks.append(len(chosen))
        return maps[[samples.index(sample) for sample in chosen]]

    heats = list(html_report._heat_maps(samples, asked))
    assert chunks == [10]
    alphas = []
    for heat in heats:
        (tmp_path / "heat.webp").write_bytes(heat)
        with Image.open(tmp_path / "heat.webp") as picture:
            assert picture.size == (32, 48)
            alphas.append(np.asarray(picture.convert("RGBA"))[..., 3].astype(float))
    hottest = [alpha[:10, :10].mean() for alpha in alphas]
    assert hottest[3] > 1.2 * hottest[5] > 50
    assert max(hottest[i] for i in range(10) if i not in (3, 5)) < 5
    assert max(alpha[30:, :].max() for alpha in alphas) < 20


def test_thumbnails_fit_their_share_of_the_bytes():
    noise = np.random.default_rng(0).integers(0, 255, (300, 200, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    for allowance in (10**6, 9000, 2000):
        found = html_report._thumbnail_format([picture] * 3, allowance)
        assert len(html_report._thumbnail(picture, *found)) <= allowance
        larger = html_report._THUMBNAILS[: html_report._THUMBNAILS.index(found)]
        assert all(len(html_report._thumbnail(picture, *size)) > allowance for size in larger)
    assert html_report._thumbnail_format([picture], -5) == (64, 30)  # the least, rather than none
