"""The curation report, in a real browser."""

import csv
import time
from pathlib import Path

import pytest
from html_runs import content, fitted, pictures, spared_and_suspects, write

from comet_meta import choose_for_review, share_from_review
from comet_meta import report as report_of
from comet_meta.vision import html_report
from comet_meta.vision.samples import Sample
from comet_meta.weights.review import ranks_to_review, share_of_strata, strata


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
