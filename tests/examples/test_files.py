"""Files on the disk: killed writers, full disks, two writers, archives and downloads."""

import errno
import hashlib
import http.server
import io
import os
import random
import signal
import stat
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import timm
import torch
from test_scripts import run, tree
from test_training import a_data_set, build, same
from tqdm import tqdm

from comet_examples import cli
from comet_examples.datasets import DATASETS, DatasetError
from comet_examples.datasets.archives import unpack
from comet_examples.training import ResumeError, TrainingSettings, train
from comet_meta.vision import download
from comet_meta.vision.backbones import load_backbone
from comet_meta.vision.download import DownloadError
from comet_meta.vision.files import replacing, sole_writer

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")


def in_a_child(body: Callable[[], object]) -> int:
    """The way a child process ends that runs the body: 0, or minus the signal that killed it."""
    child = os.fork()
    if child == 0:
        tqdm.set_lock(threading.RLock())  # another thread may have held the old one
        try:
            body()
        finally:
            os._exit(3)  # only a kill was expected
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_self(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_while_writing(point: str, path: Path) -> None:
    """Write a new content and be killed with kill -9 at some point of it."""
    if point == "before it is on the disk":
        os.fsync = kill_self
    elif point == "before it is moved":
        Path.replace = kill_self
    with replacing(path) as aside:
        with aside.open("wb") as file:
            file.write(b"new " * 500)
            if point == "midway":
                file.flush()
                kill_self()
            file.write(b"new " * 500)
        if point == "after the last byte":
            kill_self()
    kill_self()


@pytest.mark.parametrize(
    ("point", "left"),
    [
        ("midway", b"old"),
        ("after the last byte", b"old"),
        ("before it is on the disk", b"old"),
        ("before it is moved", b"old"),
        ("after all", b"new " * 1000),
    ],
)
def test_a_killed_writer_leaves_the_old_file_or_the_new_one_whole(tmp_path, point, left):
    file = tmp_path / "run.pt"
    file.write_bytes(b"old")
    assert in_a_child(lambda: killed_while_writing(point, file)) == -signal.SIGKILL
    assert file.read_bytes() == left
    # What it left half written goes when the next run takes the folder.
    assert len(list(tmp_path.glob("*.partial"))) == (0 if point == "after all" else 1)
    with sole_writer(tmp_path):
        assert not list(tmp_path.glob("*.partial"))
    assert file.read_bytes() == left


def test_a_replaced_file_and_its_folder_reach_the_disk_in_that_order(tmp_path, monkeypatch):
    done = []
    sync, replace = os.fsync, Path.replace

    def synced(descriptor):
        folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        done.append("folder" if folder else "file")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", lambda self, to: (done.append("moved"), replace(self, to)))
    with replacing(tmp_path / "deep" / "run.pt") as aside:
        aside.write_bytes(b"new")
    assert done == ["file", "moved", "folder"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["run.pt"]


def test_a_full_disk_keeps_the_last_checkpoint_and_says_so(tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    file, settings = tmp_path / "run.pt", TrainingSettings("comet", epochs=3)
    whole = train(build, a_data_set(), settings)
    train(build, a_data_set(), TrainingSettings("comet", epochs=2), checkpoint=file)
    first = file.read_bytes()

    def fill_up() -> None:
        # The system itself stops the write after a thousand bytes.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            train(build, a_data_set(), settings, checkpoint=file, resume=True)
        except OSError as error:
            os._exit(0 if error.errno == errno.EFBIG and not partial() else 4)

    def partial() -> list[Path]:
        return list(tmp_path.glob("*.partial"))

    assert in_a_child(fill_up) == 0
    assert file.read_bytes() == first
    resumed = train(build, a_data_set(), settings, checkpoint=file, resume=True)
    assert same(resumed.detector, whole.detector)


def test_a_full_disk_gets_a_sentence(tmp_path, monkeypatch, capsys, undrawn):
    def full(self, _):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    assert small_run(tmp_path) == 1
    error = capsys.readouterr().err
    assert "error: part: [Errno 28] No space left on device: " in error
    assert "Traceback" not in error


def small_run(tmp_path: Path, *more: str) -> int:
    root = tmp_path / "data"
    if not root.exists():
        tree(root, "mvtec")
    return run("simplenet_mvtec", root, tmp_path / "out", *more)


def test_two_runs_do_not_share_a_folder(tmp_path, capsys, undrawn):
    started, go = os.pipe(), os.pipe()

    def hold() -> None:
        with sole_writer(tmp_path / "out" / "part"):
            os.write(started[1], b"x")
            os.read(go[0], 1)
            kill_self()

    child = os.fork()
    if child == 0:
        hold()
    os.read(started[0], 1)
    try:
        assert small_run(tmp_path) == 2
        assert "error: another run is writing to" in (error := capsys.readouterr().err)
        assert "give another folder" in error
    finally:
        os.write(go[1], b"x")
        os.waitpid(child, 0)
    # The lock of a killed run is gone with it.
    assert small_run(tmp_path) == 0


def test_a_category_named_twice_is_trained_once(tmp_path, capsys, undrawn):
    assert small_run(tmp_path, "--category", "part", "part") == 0
    assert capsys.readouterr().out.count("training pictures") == 1


def test_a_truncated_checkpoint_is_refused_with_a_sentence(tmp_path):
    file, settings = tmp_path / "run.pt", TrainingSettings("comet", epochs=1)
    train(build, a_data_set(), settings, checkpoint=file)
    content = file.read_bytes()
    for length in (0, 10, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(ResumeError, match="remove it to start from the beginning"):
            train(build, a_data_set(), settings, checkpoint=file, resume=True)


def test_a_checkpoint_that_would_run_code_is_refused_and_does_not_run(tmp_path):
    marker = tmp_path / "ran"

    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    file = tmp_path / "run.pt"
    torch.save({"run": {}, "detector": Malicious()}, file)
    with pytest.raises(ResumeError):
        train(build, a_data_set(), TrainingSettings("comet", 1), checkpoint=file, resume=True)
    assert not marker.exists()


# Archives.


def archive_of(path: Path, members: dict[str, bytes], **changes: object) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            for attribute, value in changes.items():
                setattr(info, attribute, value)
            archive.writestr(info, content)
    return path


GOOD = {"train/good/a_0.png": b"a", "test/good/b_0.png": b"b", "test/bent/ü c_0.png": b"c"}


@pytest.mark.parametrize("wrapped", ["", "05_cable/"])
def test_an_archive_becomes_a_folder(tmp_path, wrapped):
    archive = archive_of(tmp_path / "x.zip", {wrapped + name: c for name, c in GOOD.items()})
    unpack(archive, tmp_path / "05_cable")
    found = {
        path.relative_to(tmp_path / "05_cable").as_posix(): path.read_bytes()
        for path in (tmp_path / "05_cable").rglob("*.png")
    }
    assert found == GOOD
    assert sorted(path.name for path in tmp_path.iterdir()) == ["05_cable", "x.zip"]


UNSAFE = {
    "up": ({"../evil.png": b"x"}, {}, "leads out of the folder"),
    "further up": ({"a/../../evil.png": b"x"}, {}, "leads out of the folder"),
    "absolute": ({"/evil.png": b"x"}, {}, "leads out of the folder"),
    "backslash": ({"..\\evil.png": b"x"}, {}, "leads out of the folder"),
    "drive": ({"C:evil.png": b"x"}, {}, "leads out of the folder"),
    "link": ({"a": b"/etc"}, {"external_attr": (stat.S_IFLNK | 0o777) << 16}, "link or a special"),
    "device": ({"a": b""}, {"external_attr": (stat.S_IFCHR | 0o666) << 16}, "link or a special"),
    "twice": ({"a.png": b"x", "A.png": b"y"}, {}, "'A.png' twice"),
    "bomb": ({"a.bmp": b"\0" * (80 * 2**20)}, {}, "as no pictures do"),
}


@pytest.mark.parametrize("case", UNSAFE)
def test_an_unsafe_archive_is_refused_whole(tmp_path, case):
    members, changes, message = UNSAFE[case]
    (tmp_path / "root").mkdir()
    archive = archive_of(tmp_path / "root" / "x.zip", {"good.png": b"g", **members}, **changes)
    with pytest.raises(DatasetError, match=f"can't unpack .*{message}"):
        unpack(archive, tmp_path / "root" / "x")
    assert [path.name for path in tmp_path.rglob("*")] == ["root", "x.zip"]


def test_a_bomb_that_lies_about_its_size_is_stopped(tmp_path):
    archive = archive_of(tmp_path / "x.zip", {"a.png": b"\0" * 200_000})
    content = archive.read_bytes()
    size = (200_000).to_bytes(4, "little")
    assert content.count(size) == 2
    archive.write_bytes(content.replace(size, (1000).to_bytes(4, "little")))
    with pytest.raises(DatasetError, match="can't unpack"):
        unpack(archive, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_damaged_archive_is_refused_whole(tmp_path):
    archive = archive_of(tmp_path / "x.zip", {f"{i}.png": os.urandom(500) for i in range(20)})
    content = bytearray(archive.read_bytes())
    for damage in (content[:-30], content[:100], b"", content[:3000] + b"\xff" + content[3001:]):
        archive.write_bytes(damage)
        with pytest.raises(DatasetError, match="get the archive anew"):
            unpack(archive, tmp_path / "x")
        assert [path.name for path in tmp_path.iterdir()] == ["x.zip"]


def test_an_archive_that_does_not_fit_the_disk_is_refused(tmp_path, monkeypatch):
    archive = archive_of(tmp_path / "x.zip", GOOD)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2))
    with pytest.raises(DatasetError, match="takes 3 bytes, and 2 are free"):
        unpack(archive, tmp_path / "x")


def test_viaduct_unpacks_its_archives_once(tmp_path, monkeypatch):
    archive_of(tmp_path / "05_cable.zip", GOOD)
    archive_of(tmp_path / "11 lug.zip", {f"11 lug/{name}": c for name, c in GOOD.items()})
    viaduct = DATASETS["viaduct"]
    assert viaduct.categories(tmp_path) == ["05_cable", "11 lug"]
    split = viaduct.load(tmp_path, "11 lug")
    assert (len(split.train), len(split.test)) == (1, 2)
    monkeypatch.setattr("comet_examples.datasets.archives.unpack", None)
    assert viaduct.categories(tmp_path) == ["05_cable", "11 lug"]


# Downloads.


CONTENT = random.Random(0).randbytes(300_000)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT, in the ways of good and bad servers."""

    requests: ClassVar[list[str | None]]
    ranges = True
    breaks = 0  # transfers to break off
    status = 200

    def do_GET(self) -> None:
        cls = type(self)
        wanted = self.headers.get("Range")
        cls.requests.append(wanted)
        if self.path == "/insecure":
            self.send_response(302)
            self.send_header("Location", "ftp://elsewhere/weights.pth")
            self.end_headers()
            return
        if cls.status != 200:
            self.send_error(cls.status)
            return
        start = int(wanted[6:-1]) if wanted and cls.ranges else 0
        if start >= len(CONTENT):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        body = CONTENT[start:]
        if cls.breaks:
            cls.breaks -= 1
            body = body[: len(body) // 3]
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    """A server, with plain http allowed for it; its class sets its ways."""

    class Own(Server):
        requests: ClassVar[list[str | None]] = []

    monkeypatch.setattr(download, "_SCHEMES", ("https", "http"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Own) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        Own.url = f"http://127.0.0.1:{running.server_port}/weights.pth"
        yield Own
        running.shutdown()
        thread.join()


def test_a_download_is_checked_and_kept(tmp_path, server):
    address = f"{server.url}#sha256={DIGEST.upper()}"
    file = download.download(address, tmp_path)
    assert file.read_bytes() == CONTENT
    assert file.suffix == ".pth"
    assert download.download(address, tmp_path) == file
    assert len(server.requests) == 1
    file.write_bytes(b"damaged since")
    assert download.download(address, tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_transfer_goes_on_where_it_was(tmp_path, server, ranges):
    server.breaks, server.ranges = 2, ranges
    file = download.download(f"{server.url}#sha256={DIGEST}", tmp_path)
    assert file.read_bytes() == CONTENT
    assert server.requests[0] is None
    assert server.requests[1] == "bytes=100000-"
    assert len(server.requests) == 3


def test_a_download_that_stopped_goes_on_in_the_next_call(tmp_path, server):
    server.breaks = 4
    with pytest.raises(DownloadError, match="it goes on from where it broke off"):
        download.download(f"{server.url}#sha256={DIGEST}", tmp_path)
    assert not list(tmp_path.glob("*.pth"))
    file = download.download(f"{server.url}#sha256={DIGEST}", tmp_path)
    assert file.read_bytes() == CONTENT
    assert server.requests[4] is not None


def test_other_contents_are_refused_and_removed(tmp_path, server):
    with pytest.raises(DownloadError, match=f"has the SHA-256 {DIGEST}, expected 0000"):
        download.download(f"{server.url}#sha256={'0' * 64}", tmp_path)
    assert not list(tmp_path.glob("*weights*"))


def test_a_partial_file_that_is_too_long_is_begun_anew(tmp_path, server):
    (tmp_path / f"{DIGEST[:16]}-weights.pth.part").write_bytes(b"x" * 400_000)
    file = download.download(f"{server.url}#sha256={DIGEST}", tmp_path)
    assert file.read_bytes() == CONTENT


def test_a_refusal_is_not_tried_again(tmp_path, server):
    server.status = 404
    with pytest.raises(DownloadError, match="404"):
        download.download(f"{server.url}#sha256={DIGEST}", tmp_path)
    assert len(server.requests) == 1


def test_redirections_to_insecure_addresses_are_refused(tmp_path, server):
    url = server.url.replace("weights.pth", "insecure")
    with pytest.raises(DownloadError, match="not secure"):
        download.download(f"{url}#sha256={DIGEST}", tmp_path)


@pytest.mark.parametrize(
    "address",
    [
        f"http://example.org/x.pth#sha256={DIGEST}",
        f"file:///etc/passwd#sha256={DIGEST}",
        "https://example.org/x.pth",
        "https://example.org/x.pth#sha256=12ab",
    ],
)
def test_addresses_need_https_and_a_digest(tmp_path, address, capsys):
    with pytest.raises(DownloadError, match="expected https://"):
        load_backbone("resnet10t", address)
    arguments = ["--data-root", str(tmp_path), "--dataset", "folder", "--weights", address]
    (tmp_path / "x.png").write_bytes(b"")
    assert cli.main("simplenet", "mvtec", arguments) == 2
    assert "error: " in capsys.readouterr().err


def test_weights_come_from_an_address(tmp_path, server, monkeypatch):
    content = io.BytesIO()
    torch.save(timm.create_model("resnet10t").state_dict(), content)
    monkeypatch.setitem(globals(), "CONTENT", content.getvalue())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    digest = hashlib.sha256(content.getvalue()).hexdigest()
    backbone = load_backbone("resnet10t", f"{server.url}#sha256={digest}")
    assert backbone.channels
    assert list((tmp_path / "comet-meta" / "weights").glob("*.pth"))
