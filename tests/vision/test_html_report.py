"""The curation report, as a file and in a real browser."""

import csv
import dataclasses
import json
import math
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from comet_meta import SoftConfidentWeighter, choose_for_review, share_from_review
from comet_meta import report as report_of
from comet_meta.vision import html_report
from comet_meta.vision.images import Transform
from comet_meta.vision.samples import Sample
from comet_meta.weights.review import ranks_to_review, share_of_strata, strata

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


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> list[Sample]:
    names = [f"line-{'ab'[i % 2]}/{i:03d}.png" for i in range(100)]
    return pictures(tmp_path_factory.mktemp("pictures"), names + HOSTILE)


@pytest.fixture(scope="module")
def report(samples, tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("out"), samples)


# --- the file ---------------------------------------------------------------------------------


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


# --- in the browser ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("browser")


@pytest.fixture(scope="module")
def driver(folder):
    pytest.importorskip("selenium")
    from curation_report import chromium, has_chromium

    if not has_chromium():
        pytest.skip("needs chromium and chromedriver (Debian: chromium chromium-driver)")
    with chromium(folder) as browser:
        yield browser


@pytest.fixture
def page(driver, report):
    """The report, opened with no decisions taken."""
    driver.get(report.as_uri())
    driver.execute_script("localStorage.clear()")
    driver.get(report.as_uri())
    yield driver
    errors = [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    assert not errors


def paths(page) -> list[str]:
    """Full paths of the cards that are there, in their order."""
    script = "return [...document.querySelectorAll('.card .name')].map((name) => name.title)"
    return page.execute_script(script)


def choose(page, name: str, value: str) -> None:
    page.find_element("css selector", f"#{name} option[value={value}]").click()


def click(page, name: str) -> None:
    page.find_element("id", name).click()


def text(page, name: str) -> str:
    return page.find_element("id", name).text


def wait_for(condition, seconds: float = 10.0):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.05)
    return found


def test_it_opens_and_tells_what_there_is(page):
    assert page.title == "part <1>: curation report"
    assert text(page, "heading") == "part <1>"
    tiles = dict(
        reversed(li.text.split("\n")) for li in page.find_elements("css selector", ".tiles li")
    )
    assert tiles["training pictures"] == "107"
    assert tiles["suspects (20.6 %)"] == "22"
    assert tiles["I-AUROC on the test set"] == "0.900"
    charts = [title.text for title in page.find_elements("css selector", "figcaption")]
    assert charts[:3] == ["Loss Loss Query loss", "Mean weight last 0.9", "Penalty λ(Σ)"]
    assert "threshold" in page.find_element("id", "charts").text
    rows = [row.text for row in page.find_elements("css selector", "#metrics tr")]
    dash = "\N{EN DASH}"
    assert rows == ["method I-AUROC AUPRO", f"plain 0.500 {dash}", f"comet {dash} 0.250"]
    page.find_element("css selector", "#settings summary").click()
    assert "resize 48 x 32, crop default" in text(page, "settings")


def test_nothing_is_fetched(page):
    script = "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    assert all(name.startswith("data:") for name in page.execute_script(script))


def test_names_do_nothing(page, samples):
    page.find_element("id", "filter").send_keys("pwned")
    wanted = {str(sample.path) for sample in samples if "pwned" in str(sample.path)}
    assert set(paths(page)) == wanted
    assert len(wanted) == 4
    for button in page.find_elements("css selector", ".open"):
        button.click()
        click(page, "close")
    names = page.execute_script(
        "return [...document.querySelectorAll('.card .name')].map((name) => name.textContent)"
    )
    assert "<img src=x onerror=window.pwned=1>.png" in names
    time.sleep(0.2)
    assert page.execute_script("return window.pwned") is None
    assert not page.find_elements("css selector", "img[onerror], .name *, .label *")


def test_even_markup_that_slips_through_may_not_run(page):
    page.execute_script(
        "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=window.pwned=2>');"
        "const s = document.createElement('script'); s.textContent = 'window.pwned = 2';"
        "document.body.append(s);"
    )
    time.sleep(0.2)
    assert page.execute_script("return window.pwned") is None
    page.get_log("browser")  # the refusals, which are errors there


def test_it_sorts(page, samples):
    total = len(samples)
    first = paths(page)
    for order, reverse in (("high", True), ("low", False)):
        choose(page, "sort", order)
        scores = dict(
            zip((str(s.path) for s in samples), fitted(samples).scores.tolist(), strict=True)
        )
        found = [scores[path] for path in paths(page)]
        assert found == sorted(scores.values(), reverse=reverse)[: len(found)]
    choose(page, "sort", "path")
    assert paths(page) == sorted(str(sample.path) for sample in samples)[: len(paths(page))]
    choose(page, "sort", "trusted")
    badge = page.find_element("css selector", ".badge").text
    assert badge == f"#{total}"
    choose(page, "sort", "suspect")
    assert paths(page) == first


def test_it_filters(page, samples):
    field = page.find_element("id", "filter")
    field.send_keys("LINE-B  /07")
    found = {Path(path).name for path in paths(page)}
    assert found == {"071.png", "073.png", "075.png", "077.png", "079.png"}
    assert text(page, "count") == "5 of 107 pictures shown, 0 marked to drop"
    field.clear()
    field.send_keys("no such picture")
    assert paths(page) == []
    assert not page.find_element("id", "mark").is_enabled()
    field.clear()
    field.send_keys(" ")
    choose(page, "show", "suspects")
    assert set(paths(page)) == {str(sample.path) for sample in samples if sample.label == 1}


def test_a_sample_tells_how_many_are_bad(page, samples, folder):
    assert not page.find_element("id", "share").is_displayed()
    choose(page, "show", "sample")
    ranks = ranks_to_review(len(samples))
    ranked = [str(samples[i].path) for i in fitted(samples).ranking().tolist()]
    assert paths(page) == [ranked[rank] for some in ranks for rank in some]
    none = "0 are ticked: about 0 % (0 to 2 %) of all 107 pictures are bad."
    assert none in text(page, "share")
    assert text(page, "share").endswith("say contamination=0.")
    for card in page.find_elements("css selector", ".card .drop input")[:3]:
        card.click()
    ticked = set([rank for some in ranks for rank in some][:3])
    counts = [
        (len(part), len(some), len(ticked & set(some)))
        for part, some in zip(strata(len(samples)), ranks, strict=True)
    ]
    share, low, high = share_of_strata(counts)
    assert (
        f"3 are ticked: about {100 * share:.0f} % ({100 * low:.0f} to {100 * high:.0f} %)"
        in text(page, "share")
    )
    assert text(page, "share").endswith(f"say contamination={share:.3f}.")
    # Ticked elsewhere: no part of the estimate, in the page and in the list.
    choose(page, "show", "all")
    outside = next(
        card
        for card in page.find_elements("css selector", ".card")
        if int(card.get_attribute("data-i")) not in {rank for some in ranks for rank in some}
    )
    outside.find_element("css selector", ".drop input").click()
    page.refresh()  # the browser remembers that the sample was shown
    click(page, "export")
    file = wait_for(lambda: next((folder / "downloads").glob("part_1__keep_drop.csv"), None))
    index, bad, found = report_of.read_review(file, [sample.path for sample in samples])
    file.unlink()
    assert sorted(index) == sorted(choose_for_review(fitted(samples).scores).tolist())
    assert sum(bad) == 3
    assert found == pytest.approx((share, low, high))
    assert share_from_review(fitted(samples).scores, index, bad) == pytest.approx(found)


def test_of_many_pictures_those_of_the_sample_have_thumbnails(tmp_path, monkeypatch):
    monkeypatch.setattr(html_report, "_SHOWN", 10)
    samples = pictures(tmp_path, [f"{i:03d}.png" for i in range(100)])
    found = content(write(tmp_path, samples))
    sampled = {rank for stratum in found["review"] for rank in stratum["ranks"]}
    assert len(sampled) == 60
    with_image = {rank for rank, picture in enumerate(found["pictures"]) if picture["image"]}
    assert with_image == sampled | set(range(10))
    assert {rank for rank, picture in enumerate(found["pictures"]) if picture["heat"]} == with_image


def test_a_spared_picture_is_no_suspect(driver, tmp_path):
    driver.get(spared_and_suspects(tmp_path).as_uri())
    tiles = driver.find_element("css selector", ".tiles").text
    assert "4\nsuspects (20.0 %)" in tiles
    choose(driver, "show", "suspects")
    assert len(paths(driver)) == 4
    assert len(driver.find_elements("css selector", ".card.suspect")) == 4


def test_all_pictures_come_by_scrolling(page, samples):
    assert len(paths(page)) < len(samples)

    def all_there():
        page.execute_script("scrollTo(0, document.body.scrollHeight)")
        return len(paths(page)) == len(samples)

    wait_for(all_there)


def test_it_exports_what_was_decided(page, samples, folder):
    choose(page, "show", "suspects")
    click(page, "mark")
    choose(page, "show", "all")
    kept = page.find_element("css selector", ".card .drop input")
    kept.click()  # the most suspect one is fine, after all
    assert text(page, "count") == "107 of 107 pictures shown, 21 marked to drop"
    click(page, "export")
    file = wait_for(lambda: next((folder / "downloads").glob("part_1__keep_drop.csv"), None))
    with file.open(newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    file.unlink()
    assert [int(row["rank"]) for row in rows] == list(range(1, 108))
    assert {row["path"] for row in rows} == {str(sample.path) for sample in samples}
    bad = {str(sample.path) for sample in samples if sample.label == 1}
    assert {row["reviewed"] for row in rows} == {"no"}  # the sample was never shown
    dropped = {row["path"] for row in rows if row["keep"] == "no"}
    assert dropped == bad - {rows[0]["path"]}
    assert {row["keep"] for row in rows} == {"yes", "no"}
    by_path = {row["path"]: row for row in rows}
    for sample, score, weight in zip(samples, *_state(samples), strict=True):
        row = by_path[str(sample.path)]
        assert float(row["score"]) == pytest.approx(score, rel=1e-5, abs=1e-6)
        assert float(row["weight"]) == weight
    # A spreadsheet takes nothing in it for a formula.
    assert not any(row["path"].startswith(("=", "+", "-", "@")) for row in rows)


def _state(samples):
    weighter = fitted(samples)
    return weighter.scores.tolist(), weighter.weights.tolist()


def test_it_copies_the_selected_paths(page):
    assert not page.find_element("id", "copy").is_enabled()
    first = paths(page)[:3]
    for box in page.find_elements("css selector", ".card .drop input")[:3]:
        box.click()
    click(page, "copy")
    assert wait_for(lambda: text(page, "message")) == "3 paths copied."
    copied = page.execute_async_script("navigator.clipboard.readText().then(arguments[0])")
    assert copied.split("\n") == first


def test_decisions_outlast_the_page_and_can_be_taken_back(page, report):
    click(page, "mark")
    page.get(report.as_uri())
    assert text(page, "count") == "107 of 107 pictures shown, 107 marked to drop"
    assert (
        page.find_element("css selector", ".card").get_attribute("class") == "card suspect dropped"
    )
    click(page, "unmark")
    page.get(report.as_uri())
    assert text(page, "count") == "107 of 107 pictures shown, 0 marked to drop"


def test_heat_maps_and_known_labels_are_toggled(page):
    heat = page.find_element("css selector", ".card .heat")
    label = page.find_element("css selector", ".card .label")
    assert (heat.is_displayed(), label.is_displayed()) == (False, True)
    assert label.text == "<b>hole</b>"
    click(page, "heat")
    click(page, "truth")
    assert (heat.is_displayed(), label.is_displayed()) == (True, False)
    loaded = "return [...document.querySelectorAll('.card img')].every((i) => i.naturalWidth > 20)"
    wait_for(lambda: page.execute_script(loaded))


def test_without_known_labels_nobody_speaks_of_them(driver, tmp_path):
    samples = [Sample(s.path, None) for s in pictures(tmp_path, [f"{i}.png" for i in range(9)])]
    driver.get(write(tmp_path, samples).as_uri())
    assert not driver.find_element("id", "truth-label").is_displayed()
    # The heading says how many look bad; nothing below it says which are.
    words = driver.find_element("css selector", "main").text
    assert not any(word in words for word in ("normal", "bad", "hole"))
    assert "bad" in text(driver, "verdict")


def test_the_keyboard_is_enough(page):
    keys = pytest.importorskip("selenium.webdriver").Keys
    first = paths(page)

    def press(key):
        page.switch_to.active_element.send_keys(key)

    def focused():
        return page.switch_to.active_element.get_attribute("aria-label")

    page.execute_script("document.getElementById('export').focus()")
    press(keys.TAB)
    assert focused() == f"Enlarge {Path(first[0]).name}"
    press(keys.ARROW_RIGHT)
    press("d")
    assert text(page, "count").endswith("1 marked to drop")
    press(keys.ARROW_DOWN)
    press(keys.ARROW_UP)
    press(keys.ENTER)
    viewer = page.find_element("id", "viewer")
    assert viewer.is_displayed()
    assert first[1] in viewer.text
    assert page.find_element("id", "viewer-drop").is_selected()
    press(keys.ARROW_RIGHT)
    assert first[2] in viewer.text
    press("d")
    press("h")
    assert page.find_element("id", "viewer-heat").is_selected()
    assert page.find_element("id", "viewer-link").get_attribute("href") == Path(first[2]).as_uri()
    press(keys.ESCAPE)
    assert not viewer.is_displayed()
    assert text(page, "count").endswith("2 marked to drop")


@pytest.mark.slow
def test_two_thousand_pictures_open_in_two_seconds_and_stay_below_30_mb(driver, tmp_path):
    from curation_report import measure

    cost = measure(driver, 2000, tmp_path)
    assert 10 < cost.megabytes < 30
    assert cost.opening < 2
