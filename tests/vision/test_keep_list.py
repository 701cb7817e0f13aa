"""The keep list, and the cleaned folder that it makes."""

import csv
import os
import re
import stat
from pathlib import Path

import pytest
import torch

from comet_meta import SoftConfidentWeighter, cli, report
from comet_meta.vision.keep_list import KeepListError, Row, apply, read, write
from comet_meta.weights.review import share_of_strata

NAMES = ["a/1.png", "a/2.png", "b/c/1.png", '=1,"x"\n.png', "grün.png"]


@pytest.fixture
def source(tmp_path) -> Path:
    for name in NAMES:
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return tmp_path / "pictures"


@pytest.fixture
def keep_csv(tmp_path, source) -> Path:
    file = tmp_path / "keep.csv"
    rows = [Row(Path(n), 0.5, 1.0, 0.0, i + 1, n != "a/2.png") for i, n in enumerate(NAMES)]
    write(file, [*rows, Row(Path("broken.png"), None, None, None, None, False)])
    return file


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_what_is_written_is_read_again(keep_csv):
    expected = [(f"./{n}" if n.startswith("=") else n, n != "a/2.png") for n in NAMES]
    assert read(keep_csv) == [*expected, ("broken.png", False)]
    with keep_csv.open(newline="", encoding="utf-8") as lines:
        first, *_, last = csv.DictReader(lines)
    assert first == {
        "path": "a/1.png", "score": "0.5", "weight": "1", "p_bad": "0", "rank": "1", "keep": "yes"
    }  # fmt: skip
    assert (last["score"], last["rank"], last["keep"]) == ("", "", "no")


@pytest.mark.skipif(os.name != "posix", reason="names of bytes that are no text")
def test_names_that_are_no_text_come_back(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    write(tmp_path / "keep.csv", [Row(Path(name), 1.0, 1.0, 0.0, 1, True)])
    assert read(tmp_path / "keep.csv") == [(name, True)]


@pytest.mark.parametrize("how", ["link", "copy"])
def test_the_cleaned_folder_holds_what_is_kept(tmp_path, source, keep_csv, how):
    before = content(source)
    assert apply(keep_csv, source, tmp_path / "clean", how=how) == (4, 0, 2)
    expected = {name: data for name, data in before.items() if name != "a/2.png"}
    assert content(tmp_path / "clean") == expected
    assert content(source) == before
    assert all((tmp_path / "clean" / name).is_symlink() == (how == "link") for name in expected)
    # Again: nothing is made twice, and what is missing is made.
    (tmp_path / "clean" / "a" / "1.png").unlink()
    assert apply(keep_csv, source, tmp_path / "clean", how=how) == (1, 3, 2)
    assert content(tmp_path / "clean") == expected


@pytest.mark.skipif(os.name != "posix", reason="names of up to 255 bytes")
def test_the_longest_names_are_copied(tmp_path, source):
    name = "\u00e4" * 125 + ".png"
    (source / name).write_bytes(b"long")
    write(tmp_path / "keep.csv", [Row(Path(name), 1.0, 1.0, 0.0, 1, True)])
    apply(tmp_path / "keep.csv", source, tmp_path / "clean", how="copy")
    assert content(tmp_path / "clean") == {name: b"long"}


def test_nothing_is_overwritten(tmp_path, source, keep_csv):
    other = tmp_path / "clean" / "b" / "c" / "1.png"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"precious")
    with pytest.raises(KeepListError, match=r"holds other files called b/c/1.png"):
        apply(keep_csv, source, tmp_path / "clean")
    assert content(tmp_path / "clean") == {"b/c/1.png": b"precious"}


def test_not_even_a_link_to_nowhere_is_overwritten(tmp_path, source, keep_csv):
    (tmp_path / "clean").mkdir()
    (tmp_path / "clean" / "grün.png").symlink_to("nowhere")
    with pytest.raises(KeepListError, match="holds other files"):
        apply(keep_csv, source, tmp_path / "clean", how="copy")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("../secret.png,yes", "is no picture below"),
        ("/etc/passwd,yes", "is no picture below"),
        ("a/../../x.png,no", "is no picture below"),
        (".,yes", "is no picture below"),
        ("a/9.png,yes", "lacks a/9.png"),
        ("a/1.png,maybe", "line 2 of .* expected a path, and yes or no"),
        (",yes", "expected a path"),
        ("a/1.png,no", "keeps no picture"),
        ("a/1.png,yes\na/1.png,no", "keeps and drops a/1.png"),
    ],
)
def test_wrong_lists_make_nothing(tmp_path, source, line, words):
    file = tmp_path / "list.csv"
    file.write_text(f"path,keep\n{line}\n")
    with pytest.raises(KeepListError, match=words):
        apply(file, source, tmp_path / "clean")
    assert not (tmp_path / "clean").exists()


def test_full_paths_below_the_source_will_do(tmp_path, source, monkeypatch):
    file = tmp_path / "list.csv"
    # With the mark and the capitals that a spreadsheet writes.
    file.write_text(f"path,keep\r\n{source / 'a' / '1.png'},YES\r\n", encoding="utf-8-sig")
    monkeypatch.chdir(tmp_path)
    assert apply(file, Path("pictures"), Path("clean")) == (1, 0, 0)
    assert content(tmp_path / "clean") == {"a/1.png": b"a/1.png"}
    assert (tmp_path / "clean" / "a" / "1.png").readlink().is_absolute()


def test_the_command(tmp_path, source, keep_csv, capsys):
    arguments = ["apply", str(keep_csv), str(source), str(tmp_path / "clean"), "--copy"]
    assert cli.main(arguments) == 0
    assert "4 pictures copied in" in capsys.readouterr().out
    assert cli.main(["apply", str(keep_csv), str(source), str(source / "clean")]) == 2
    assert "would be ranked with it" in capsys.readouterr().err
    assert cli.main(["apply", str(tmp_path / "no.csv"), str(source), str(tmp_path / "x")]) == 2
    assert "there's no list" in capsys.readouterr().err
    (tmp_path / "other.csv").write_text("name,label\n1,2\n")
    assert cli.main(["apply", str(tmp_path / "other.csv"), str(source), str(tmp_path / "x")]) == 2
    assert "has no column keep nor path" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(tmp_path, source, keep_csv, capsys):
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed").chmod(stat.S_IRUSR | stat.S_IXUSR)
    arguments = ["apply", str(keep_csv), str(source), str(tmp_path / "closed" / "clean")]
    assert cli.main(arguments) == 2
    assert "Permission denied" in capsys.readouterr().err


def test_the_report_from_a_loop_of_ones_own(tmp_path):
    import numpy as np
    from PIL import Image

    paths = [tmp_path / f"{i}.png" for i in range(12)]
    for i, path in enumerate(paths):
        pixels = np.full((20, 30), 20 * i, dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    weighter = SoftConfidentWeighter(12)
    weighter.fit(torch.erfinv(torch.linspace(-0.9, 0.9, 12)))
    file = report.write(weighter, [str(path) for path in paths], tmp_path / "report.html")
    page = file.read_text(encoding="utf-8")
    assert re.findall(r'"name":"(\d+).png"', page) == [str(i) for i in range(11, -1, -1)]
    assert "No evidence of bad pictures" in page
    assert '"heat":""' in page
    maps = []

    def mapped(some):
        maps.extend(some)
        return torch.rand(len(some), 8, 8)

    report.write(weighter, paths, tmp_path / "report.html", title="<line> 3", maps=mapped)
    page = file.read_text(encoding="utf-8")
    assert maps == paths[::-1]
    assert '"heat":""' not in page
    assert "&lt;line&gt; 3: curation report" in page
    with pytest.raises(ValueError, match="got 11 pictures and a weighter of 12 samples"):
        report.write(weighter, paths[:11], tmp_path / "report.html")


def test_beyond_the_first_pictures_the_page_lists_without_showing(tmp_path, monkeypatch):
    from PIL import Image

    from comet_meta.vision import html_report

    monkeypatch.setattr(html_report, "_SHOWN", 4)
    paths = [tmp_path / f"{i}.png" for i in range(300)]
    for path in paths:
        Image.new("L", (20, 20), 99).save(path)
    weighter = SoftConfidentWeighter(300)
    weighter.fit(torch.arange(300.0))
    page = report.write(weighter, paths, tmp_path / "report.html").read_text(encoding="utf-8")
    # The first four are shown, and the 60 of the sample, three of which are among them.
    assert page.count('"image":""') == 300 - 4 - 57
    assert page.index('"image":""') > page.index("296.png")
    assert all(path.name in page for path in paths)


def test_a_review_is_read_by_path_and_its_share_by_rank(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    # Every stratum of five is one picture but the last, of which one of three was looked at.
    lines = [
        "path,rank,keep,reviewed",
        *(f"{paths[2]},1,no,yes", f"{paths[4]},2,yes,yes"),
        *(f"{paths[1]},5,no,no", f"{paths[0]},4,yes,yes", f"{paths[3]},3,yes,"),
    ]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    index, bad, share = report.read_review(tmp_path / "list.csv", paths)
    assert (index, bad) == ([2, 4, 0], [True, False, False])
    assert share == share_of_strata([(1, 1, 1), (1, 1, 0), (3, 1, 0)])
    weighter = SoftConfidentWeighter(prior=torch.rand(5), review=(index, bad, share))
    assert weighter.contamination_ == share
    with pytest.raises(ValueError, match=r"2\.png in .*list\.csv is none of the 2 pictures"):
        report.read_review(tmp_path / "list.csv", paths[:2])
    # Of a part of the pictures, the share is that of all.
    part = report.read_review(tmp_path / "list.csv", [paths[4], paths[1], paths[2]], subset=True)
    assert part == ([2, 0], [True, False], share)
    with pytest.raises(ValueError, match=r"is none of the 1 pictures"):
        report.read_review(tmp_path / "list.csv", [paths[1]], subset=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "path,keep\na.png,yes\n",
            "has no column rank nor reviewed; expected the list that the report exports",
        ),
        ("path,rank,keep,reviewed\na.png,1,yes,no\n", "no picture that was looked at: show the"),
        (
            "path,rank,keep,reviewed\na.png,1,yes,yes\nb.png,2,yes,no\nc.png,3,no,no\n",
            "list.csv: no sample of the ranks 1 to 1 was looked at",
        ),
    ],
)
def test_a_list_without_a_whole_review_says_so(tmp_path, text, message):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        report.read_review(tmp_path / "list.csv", [tmp_path / "a.png"])


def test_scores_are_read_by_path_exactly(tmp_path):
    scores = [0.1, 1 / 3, -2e-9, 12345.678, 1.0]
    scores = torch.tensor(scores).tolist()  # float32
    names = ["b/2.png", "=1.png", "a/1.png", "3.png", "4.png"]
    lines = [
        Row(Path(name), score, 1.0, 0.0, rank, keep=True)
        for rank, (name, score) in enumerate(zip(names, scores, strict=True), start=1)
    ]
    write(
        tmp_path / "keep.csv", [*lines, Row(Path("broken.png"), None, None, None, None, keep=False)]
    )
    paths = [tmp_path / "pictures" / name for name in reversed(names)]
    prior = report.read_prior(tmp_path / "keep.csv", paths, tmp_path / "pictures")
    assert prior.tolist() == scores[::-1]
    roundabout = [path.parent / ".." / path.parent.name / path.name for path in paths]
    assert torch.equal(
        report.read_prior(tmp_path / "keep.csv", roundabout, tmp_path / "pictures"), prior
    )
    with pytest.raises(ValueError, match=r"keep\.csv lacks 5 of 5 pictures, the first of them"):
        report.read_prior(tmp_path / "keep.csv", paths, tmp_path)
    with pytest.raises(ValueError, match=r"broken\.png has no score .* leave it out of training"):
        report.read_prior(
            tmp_path / "keep.csv", [tmp_path / "pictures/broken.png"], tmp_path / "pictures"
        )


@pytest.mark.parametrize("score", ["high", "nan", "inf"])
def test_a_score_that_is_no_number_is_told(tmp_path, score):
    (tmp_path / "list.csv").write_text(f"path,score\na.png,{score}\n")
    with pytest.raises(ValueError, match=f"line 2 of .*list.csv has the score '{score}'"):
        report.read_prior(tmp_path / "list.csv", ["a.png"])


def test_the_core_imports_no_pictures():
    import subprocess
    import sys

    code = (
        "import sys, comet_meta, comet_meta.report, comet_meta.cli\n"
        "extra = {'PIL', 'timm', 'torchvision', 'matplotlib', 'filelock'}\n"
        "assert not extra & set(sys.modules), extra & set(sys.modules)\n"
        "assert not [m for m in sys.modules if m.startswith('comet_meta.vision')]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_the_extra_a_sentence(tmp_path, monkeypatch, capsys):
    import sys

    import comet_meta

    # An import in this test makes another module object; the package gets its own back.
    monkeypatch.setattr(comet_meta, "vision", comet_meta.vision)
    for name in [name for name in sys.modules if name.startswith("comet_meta.vision")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "filelock", None)
    assert cli.main(["rank", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert 'needs the package filelock: pip install "comet-meta[vision]"' in message
    with pytest.raises(ModuleNotFoundError, match=r'pip install "comet-meta\[vision\]"'):
        report.write(SoftConfidentWeighter(1), ["x.png"], tmp_path / "r.html")
