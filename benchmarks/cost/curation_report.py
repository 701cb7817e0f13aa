"""Size of the curation report, and the time that writing it and opening it take.

python benchmarks/cost/curation_report.py --pictures 500 2000 10000

Takes Chromium with its driver (Debian: chromium chromium-driver) and the package selenium.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from selenium import webdriver

from comet_examples.report import machine
from comet_meta import SoftConfidentWeighter
from comet_meta.vision.html_report import Run, write_report
from comet_meta.vision.images import Transform
from comet_meta.vision.samples import Sample

_SIDE = 320


class Cost(NamedTuple):
    """What a report takes.

    Attributes:
        megabytes: Size of the file, in 10^6 bytes.
        writing: Seconds to write it, without the detector's anomaly maps.
        opening: Seconds until a browser that runs already shows its first pictures,
            the best of three times.
    """

    megabytes: float
    writing: float
    opening: float


def has_chromium() -> bool:
    """Whether Chromium and its driver are installed."""
    return bool(shutil.which("chromium") and shutil.which("chromedriver"))


@contextmanager
def chromium(folder: Path) -> Iterator[webdriver.Chrome]:
    """A headless Chromium with a fresh profile that reaches nothing outside.

    Args:
        folder: Empty; holds the profile and what is downloaded, in ``downloads``.

    Yields:
        Its driver.
    """
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for argument in (
        *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-quic"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *("--disable-dev-shm-usage", "--window-size=1400,1000"),
        f"--user-data-dir={folder / 'profile'}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        allow = {"behavior": "allow", "downloadPath": str(folder / "downloads")}
        browser.execute_cdp_cmd("Browser.setDownloadBehavior", allow)
        clipboard = {"permissions": ["clipboardReadWrite"]}
        browser.execute_cdp_cmd("Browser.grantPermissions", clipboard)
        yield browser
    finally:
        browser.quit()


def measure(browser: webdriver.Chrome, count: int, folder: Path) -> Cost:
    """Write a report and open it.

    Args:
        browser: From :func:`chromium`.
        count: Pictures in it: smooth colours under strong noise, which compress badly.
        folder: For the pictures and the report.

    Returns:
        What it took.
    """
    generator = np.random.default_rng(0)
    files = [folder / f"{i}.bmp" for i in range(40)]
    for file in files:
        coarse = Image.fromarray(generator.integers(0, 255, (8, 8, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((_SIDE, _SIDE)), dtype=float)
        noise = generator.normal(0, 12, pixels.shape)
        Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8)).save(file)
    samples = [Sample(files[i % len(files)], None) for i in range(count)]
    weighter = SoftConfidentWeighter(count)
    weighter.fit(torch.randn(count, generator=torch.Generator().manual_seed(0)))
    run = Run("pictures", f"{count} of them", {}, [], [], [{"loss": 1.0}])
    report = folder / "report.html"
    start = time.perf_counter()
    write_report(
        report, run, weighter, samples, Transform(_SIDE), lambda some: torch.rand(len(some), 80, 80)
    )
    written = time.perf_counter()
    openings = []
    for _ in range(3):
        begin = time.perf_counter()
        browser.get(report.as_uri())
        # The next frame comes when the first pictures are laid out and painted.
        browser.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0]))")
        openings.append(time.perf_counter() - begin)
    if not browser.find_elements("css selector", ".card img"):
        raise RuntimeError(f"{report} shows no pictures")
    return Cost(report.stat().st_size / 1e6, written - start, min(openings))


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, nargs="+", default=[500, 2000, 10000])
    counts = parser.parse_args().pictures
    print(machine())
    print("| pictures | MB | writing, s | opening, s |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name, chromium(Path(name)) as browser:
        for count in counts:
            cost = measure(browser, count, Path(name))
            print(f"| {count} | {cost.megabytes:.1f} | {cost.writing:.1f} | {cost.opening:.2f} |")


if __name__ == "__main__":
    main()
