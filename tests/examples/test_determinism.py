"""The same seed gives the same bits, whatever the workers, the order and the neighbours."""

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_scripts import run, tree
from torch import nn
from torch.utils.data import DataLoader

from comet_meta import (
    CoMetOptimizerWrapper,
    CovarianceMetaRegularizer,
    IndexedDataset,
    SoftConfidentWeighter,
    collect_scores,
)
from comet_meta.vision.backbones import load_backbone
from comet_meta.vision.features import FeatureStore, PatchFeatures
from comet_meta.vision.images import Transform, load_image


def states(out: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The trained detectors of all categories."""
    return {
        file.parent.name: torch.load(file, weights_only=True)["detector"]
        for file in sorted(out.glob("*/comet.pt"))
    }


def test_categories_do_not_depend_on_their_order_or_on_each_other(tmp_path, undrawn):
    root = tree(tree(tmp_path / "data", "mvtec", "a"), "mvtec", "b")
    for path in (root / "b").rglob("*_0.png"):  # other pictures than those of a
        pixels = np.asarray(Image.open(path))
        Image.fromarray(255 - pixels).save(path)
    for out, categories in (("ab", ["a", "b"]), ("ba", ["b", "a"]), ("b", ["b"])):
        assert run("simplenet_mvtec", root, tmp_path / out, "--category", *categories) == 0
    first, second, alone = (states(tmp_path / out) for out in ("ab", "ba", "b"))
    assert first.keys() == second.keys() == {"a", "b"}
    for category, state in first.items():
        assert all(torch.equal(value, second[category][name]) for name, value in state.items())
    assert all(torch.equal(value, alone["b"][name]) for name, value in first["b"].items())
    different = [not torch.equal(first["a"][name], first["b"][name]) for name in first["a"]]
    assert any(different)


def trained(workers: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A loop of a user's own, with a loader of several processes."""
    torch.manual_seed(0)
    data = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4))
    weighter = SoftConfidentWeighter(40)
    optimizer = CoMetOptimizerWrapper(
        torch.optim.AdamW(model.parameters(), lr=1e-2),
        weighter=weighter,
        regularizer=CovarianceMetaRegularizer(),
        model=model,
    )
    loader = DataLoader(
        IndexedDataset(data),
        batch_size=8,
        shuffle=True,
        num_workers=workers,
        generator=torch.Generator().manual_seed(2),
    )

    def losses(x):
        return (model(x) - x).square().mean(dim=1)

    for _ in range(2):
        model.train()
        for index, batch in loader:
            optimizer.step(lambda rows, x=batch: losses(x[rows]), index)
        model.eval()
        weighter.fit(collect_scores(losses, loader))
    return model.state_dict(), weighter.scores


def test_workers_of_the_loader_change_no_bit():
    alone, scores = trained(0)
    helped, same_scores = trained(4)
    assert all(torch.equal(value, helped[name]) for name, value in alone.items())
    assert torch.equal(scores, same_scores)


@pytest.fixture
def paths(tmp_path) -> list[Path]:
    generator = np.random.default_rng(0)
    files = []
    for i in range(9):
        files.append(tmp_path / f"{i}.png")
        Image.fromarray(generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(files[-1])
    return files


def load(path: Path) -> torch.Tensor:
    return load_image(path, Transform(40))


def features(folder: Path, paths: list[Path], workers: int = 0, budget: int = 0) -> torch.Tensor:
    torch.set_num_threads(1)
    (level,) = FeatureStore(folder, budget).get(
        PatchFeatures(load_backbone("resnet10t", "random")),
        paths,
        load,
        transform_key="40",
        batch_size=4,
        num_workers=workers,
    )
    return level.clone()


def test_workers_that_read_pictures_change_no_bit(tmp_path, paths):
    alone = features(tmp_path / "a", paths)
    assert torch.equal(features(tmp_path / "b", paths, workers=4), alone)
    assert torch.equal(features(tmp_path / "c", paths, budget=2**30), alone)


def write(folder: Path, paths: list[Path], result: Path, barrier) -> None:
    barrier.wait(60)
    torch.save(features(folder, paths), result)


def test_concurrent_writers_of_the_feature_cache_leave_one_whole_file(tmp_path, paths):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(3)
    cache = tmp_path / "cache"
    results = [tmp_path / f"{i}.pt" for i in range(3)]
    writers = [
        context.Process(target=write, args=(cache, paths, result, barrier)) for result in results
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    expected = features(tmp_path / "other", paths)
    for result in results:
        assert torch.equal(torch.load(result, weights_only=True), expected)
    assert len(list(cache.iterdir())) == 1  # nothing half written, nothing twice
    assert torch.equal(features(cache, paths), expected)
