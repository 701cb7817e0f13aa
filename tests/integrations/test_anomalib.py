"""anomalib's models train with CoMet, from generated pictures and without pretrained weights."""

import shutil
from functools import partial, partialmethod
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from comet_meta import CovarianceMetaRegularizer, SoftConfidentWeighter
from snippets import ROOT, run

anomalib = pytest.importorskip("anomalib", reason='needs pip install "comet-meta[anomalib]"')

import anomalib.models as models  # noqa: E402
import timm  # noqa: E402
import torchvision  # noqa: E402
from anomalib.callbacks.checkpoint import ModelCheckpoint  # noqa: E402
from anomalib.data import Folder  # noqa: E402
from anomalib.engine import Engine  # noqa: E402
from anomalib.models.components import AnomalibModule, MemoryBankMixin  # noqa: E402
from anomalib.pre_processing import PreProcessor  # noqa: E402
from lightning.pytorch import Callback, seed_everything  # noqa: E402
from PIL import Image  # noqa: E402
from torchvision.transforms.v2 import Resize  # noqa: E402

from comet_meta.integrations.anomalib import CoMetCallback, _of_sample  # noqa: E402

PAGE = "docs/integrations/anomalib.md"
slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Fifteen pictures of noise, of which the last two have a bright square; and textures."""
    root = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for folder, count in (("train", 15), ("textures/one", 3)):
        (root / folder).mkdir(parents=True)
        for k in range(count):
            picture = random.normal(128, 10, (64, 64, 3)).clip(0, 255).astype("uint8")
            if folder == "train" and k >= 13:
                picture[16:48, 16:48] = [255, 0, 0]
            Image.fromarray(picture).save(root / folder / f"{k:02}.png")
    return root


@pytest.fixture(autouse=True)
def no_downloads(monkeypatch, tmp_path):
    """Random weights wherever a model would load trained ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timm, "create_model", unpretrained(timm.create_model, pretrained=False))
    for name in ("resnet18", "wide_resnet50_2", "efficientnet_b5"):
        build = unpretrained(getattr(torchvision.models, name), weights=None)
        monkeypatch.setattr(torchvision.models, name, build)
    for method in ("prepare_pretrained_model",):
        for model in (models.EfficientAd, models.Dsr):
            monkeypatch.setattr(model, method, staticmethod(lambda *_: None))
    from anomalib.models.image.csflow import torch_model as csflow
    from anomalib.models.image.dsr.torch_model import DsrModel

    monkeypatch.setattr(csflow, "efficientnet_b5", torchvision.models.efficientnet_b5)
    monkeypatch.setattr(DsrModel, "load_pretrained_discrete_model_weights", lambda *_: None)


def unpretrained(build, **forced):
    return lambda *args, **settings: build(*args, **(settings | forced))


def made(name: str, root: Path, size: int = 64, **settings) -> nn.Module:
    return getattr(models, name)(
        pre_processor=PreProcessor(Resize((size, size), antialias=True)),
        evaluator=False,
        visualizer=False,
        **settings,
    )


def fastflow(root: Path = Path()) -> nn.Module:
    return made("Fastflow", root, pre_trained=False, flow_steps=2)


def stfpm(root: Path = Path()) -> nn.Module:
    return made("Stfpm", root)


small = {"backbone": "resnet18", "pre_trained": False}
# How weights act, and the smallest model of the kind that still is one.
MODELS = {
    "Cfa": ("losses", lambda root: made("Cfa", root, backbone="resnet18")),
    "Csflow": (
        "losses",
        lambda root: made("Csflow", root, 256, cross_conv_hidden_channels=16, n_coupling_blocks=1),
    ),
    "Draem": ("losses", lambda root: made("Draem", root, dtd_dir=root / "textures")),
    "Dsr": ("losses", lambda root: made("Dsr", root)),
    "Fastflow": ("losses", fastflow),
    "Fre": ("losses", lambda root: made("Fre", root, input_dim=1024, latent_dim=16, **small)),
    "Ganomaly": ("losses", lambda root: made("Ganomaly", root, batch_size=4, n_features=8)),
    "Patchflow": (
        "losses",
        lambda root: made("Patchflow", root, backbone="efficientnet_b0", pre_trained=False),
    ),
    "ReverseDistillation": ("losses", lambda root: made("ReverseDistillation", root, **small)),
    "Stfpm": ("losses", stfpm),
    "Supersimplenet": (
        "losses",
        lambda root: made("Supersimplenet", root, 256, backbone="resnet18"),
    ),
    "Uflow": ("losses", lambda root: made("Uflow", root, backbone="resnet18", flow_steps=1)),
    "UniNet": ("losses", lambda root: made("UniNet", root)),
    "Cflow": (
        "rows",
        lambda root: made(
            "Cflow",
            root,
            layers=("layer2", "layer3"),
            coupling_blocks=2,
            fiber_batch_size=16,
            **small,
        ),
    ),
    "Dinomaly": (
        "rows",
        lambda root: made("Dinomaly", root, 112, encoder_name="vit_small_patch14_reg4_dinov2"),
    ),
    "EfficientAd": (
        "rows",
        lambda root: made("EfficientAd", root, 256, imagenet_dir=root / "textures"),
    ),
    "FoundAD": (
        "rows",
        lambda root: made(
            "FoundAD",
            root,
            56,
            encoder_name="dinov2_vit_small_14",
            image_size=56,
            pred_depth=1,
            pred_emb_dim=96,
        ),
    ),
    "GeneralAD": (
        "rows",
        lambda root: made(
            "GeneralAD",
            root,
            224,
            backbone="vit_tiny_patch16_224",
            layers=(3,),
            hidden_dim=64,
            pre_trained=False,
        ),
    ),
    "Glass": (
        "rows",
        lambda root: made(
            "Glass",
            root,
            input_shape=(64, 64),
            backbone="resnet18",
            pretrain_embed_dim=64,
            target_embed_dim=64,
            discriminator_hidden=32,
        ),
    ),
}
MODELS |= {
    "InpFormer": (
        "rows",
        lambda root: made("InpFormer", root, 112, encoder_name="vit_small_patch14_reg4_dinov2"),
    ),
    "L2BT": ("rows", lambda root: made("L2BT", root, 56)),
}
NOT_VERIFIED = {"CFM"}  # its weights need a download, and it takes point clouds beside pictures
ZERO_SHOT = {"AnomalyVFM", "VlmAd", "WinClip"}
SLOW = {"Csflow", "Dinomaly", "Draem", "Dsr", "EfficientAd", "Supersimplenet"}
SLOW |= {"FoundAD", "InpFormer", "L2BT", "UniNet"}


def fit(
    model: nn.Module, root: Path, *callbacks: Callback, batch: int = 4, epochs: int = 2, **more
):
    seed_everything(0)
    # A fifth of the pictures goes into anomalib's test set: twelve stay.
    data = Folder(
        "pictures",
        root=root,
        normal_dir="train",
        train_batch_size=batch,
        num_workers=0,
        seed=0,
    )
    engine = Engine(
        callbacks=list(callbacks),
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        default_root_dir=root / "results",
    )
    engine.fit(model=model, datamodule=data, **more)
    return engine


def halves(scores: torch.Tensor) -> torch.Tensor:
    return torch.where(scores <= scores.median(), 0.9, 0.2)


def ones(scores: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(scores)


def callback(rule=halves, **settings) -> CoMetCallback:
    return CoMetCallback(SoftConfidentWeighter(rule=rule), **settings)


@pytest.mark.parametrize(
    "name", [slow(name) if name in SLOW else pytest.param(name) for name in MODELS]
)
def test_the_model_trains(pictures, name):
    if not hasattr(models, name):
        pytest.skip(f"anomalib {anomalib.__version__} has no {name}")
    by, make = MODELS[name]
    model, comet = make(pictures), callback()
    before = [parameter.clone() for parameter in model.parameters()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    fit(model, pictures, comet, batch=1 if name == "EfficientAd" else 4)
    assert comet.by == by
    scores, weights = comet.weighter.scores, comet.weighter()
    assert scores.shape == (12,)
    assert torch.isfinite(scores).all()
    # Random features leave some models' first scores all equal, and all weights 1.
    assert (weights.min() < 0.5) == (scores.min() < scores.max())
    changed = zip(before, model.parameters(), strict=True)
    assert any(not torch.equal(old, new) for old, new in changed)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert "training_step" not in vars(model)
    # Some models grow modules as they are fitted; none keeps a hook of ours.
    assert sum(len(module._forward_hooks) for module in model.modules()) == sum(hooks)


def test_the_table_names_these_models():
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (ROOT / PAGE).read_text().splitlines()
        if line.startswith("| `")
    ]
    table = {row[0].strip("`"): row[1] for row in rows}
    tried = {name: f"`{by}`" for name, (by, _) in MODELS.items()}
    assert table == tried | dict.fromkeys(NOT_VERIFIED, "not verified here")


def test_no_model_that_trains_by_gradients_is_missing_in_the_table():
    found = {
        name
        for name, kind in vars(models).items()
        if isinstance(kind, type)
        and issubclass(kind, AnomalibModule)
        and not issubclass(kind, MemoryBankMixin)
        and kind is not AnomalibModule
    }
    assert found - ZERO_SHOT <= MODELS.keys() | NOT_VERIFIED


@pytest.mark.parametrize("name", ["Fastflow", "Ganomaly", "Cflow", "Stfpm"])
def test_weights_of_one_leave_training_as_it_was(pictures, name):
    trained = []
    for callbacks in ([], [callback(ones)]):
        seed_everything(1)
        model = MODELS[name][1](pictures)
        fit(model, pictures, *callbacks)
        trained.append(model.model.state_dict())
    for key, value in trained[0].items():
        assert torch.equal(value, trained[1][key]), key


class Spy(Callback):
    """The last step's batch, weights and gradients, and the model before it."""

    def __init__(self, comet: CoMetCallback) -> None:
        self.comet = comet

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batch, self.weights = batch, self.comet.weighter(self.comet._index(batch))
        self.state = {key: value.clone() for key, value in pl_module.state_dict().items()}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        named = pl_module.named_parameters()
        self.gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}


def fastflow_losses(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each picture, and the batch's as anomalib has it: their mean."""
    hidden, jacobians = model(images)
    each = sum(
        0.5 * z.square().sum(dim=(1, 2, 3)) - j for z, j in zip(hidden, jacobians, strict=True)
    )
    return each / len(images)


def stfpm_losses(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Squared distances of directions; anomalib sums them over the batch."""
    each = torch.zeros(len(images))
    teacher, student = model(images)
    for layer, features in teacher.items():
        height, width = features.shape[2:]
        t, s = (nn.functional.normalize(f) for f in (features, student[layer]))
        each = each + 0.5 / (height * width) * (t - s).square().sum(dim=(1, 2, 3))
    return each


@pytest.mark.parametrize(("make", "losses"), [(fastflow, fastflow_losses), (stfpm, stfpm_losses)])
def test_the_gradient_is_that_of_the_weighted_losses(pictures, make, losses):
    comet = callback()
    spy = Spy(comet)
    fit(make(), pictures, comet, spy)
    assert spy.weights.min() < 0.5 < spy.weights.max()

    alone = make()
    alone.load_state_dict(spy.state)
    alone.train()
    (spy.weights * losses(alone.model, spy.batch.image)).sum().backward()
    gradients = {n: p.grad for n, p in alone.named_parameters() if p.grad is not None}
    assert gradients.keys() == spy.gradients.keys()
    for name, gradient in gradients.items():
        scale = gradient.abs().max()
        torch.testing.assert_close(
            spy.gradients[name] / scale, gradient / scale, rtol=1e-3, atol=1e-4
        )


def test_rows_stay_as_often_as_their_weights_say():
    comet = callback(by="rows")
    comet.weighter = SoftConfidentWeighter(8, rule=halves)
    comet.weighter.fit(torch.arange(8.0))
    comet._comet = SimpleNamespace(generator=torch.Generator().manual_seed(0))
    index = torch.tensor([0, 7, 1, 6])
    stays = torch.zeros(4)
    for _ in range(2000):
        stays[comet._draw(index)] += 1
    torch.testing.assert_close(stays / 2000, torch.tensor([0.9, 0.2, 0.9, 0.2]), rtol=0, atol=0.03)


def test_the_loss_of_the_rows_that_stay_counts_their_share(pictures):
    class Counts(Callback):
        batches: list = []  # noqa: RUF012

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            Counts.batches.append((comet._kept, outputs["loss"].item(), pl_module.seen))

    comet = callback(by="rows")
    model = fastflow()
    loss = model.loss.forward

    def seen(hidden, jacobians):
        model.seen = (len(jacobians[0]), loss(hidden, jacobians))
        return model.seen[1]

    model.loss.forward = seen
    fit(model, pictures, comet, Counts())
    kept = {share for share, *_ in Counts.batches}
    assert len(kept) > 1
    for share, value, (rows, own) in Counts.batches:
        assert rows == share * 4
        assert value == pytest.approx(share * own.item(), rel=1e-5)


def test_the_regularizer_joins_in(pictures):
    comet = callback(regularizer=CovarianceMetaRegularizer(base_strength=1e-4))
    fit(fastflow(), pictures, comet)
    assert int(comet.regularizer.count) == 6


def test_bad_pictures_are_suspects(pictures):
    seed_everything(0)
    comet = CoMetCallback(warm_up=4)
    fit(fastflow(), pictures, comet, epochs=8)
    bad = {path for path in comet._paths if Path(path).stem in ("13", "14")}
    assert bad
    assert set(comet.suspects(len(bad))) == bad
    assert len(comet.suspects()) == 12


def test_weights_come_back_with_a_checkpoint(pictures, tmp_path):
    saving = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    first, again = callback(), callback(warm_up=9)  # the second one fits none of its own
    fit(fastflow(), pictures, first, saving)
    fit(fastflow(), pictures, again, epochs=3, ckpt_path=tmp_path / "last.ckpt")
    assert torch.equal(again.weighter.scores, first.weighter.scores)
    assert again.suspects() == first.suspects()
    assert again.weighter().min() < 0.5


def test_arguments_of_a_loss_are_told_apart_by_sample():
    batch = {"a": torch.arange(4), "b": [torch.eye(2), None], "twice": torch.arange(4)}
    part = _of_sample(batch, 1, 2)
    assert part["a"].tolist() == [1, 3]  # an augmented copy lies behind the batch
    assert part["b"][0].tolist() == [[0, 1]]
    with pytest.raises(ValueError, match="by='rows'"):
        _of_sample(torch.arange(3), 0, 2)


def spoiled(model: nn.Module) -> nn.Module:
    """The model, whose loss module or step finds a NaN in one batch of each epoch."""
    step, seen = model.training_step, []

    def training_step(batch, *args, **kwargs):
        seen.append(len(batch.image))
        if len(seen) % 3 == 2:
            batch.image[1] = torch.nan
        return step(batch, *args, **kwargs)

    model.training_step = training_step
    return model


@pytest.mark.parametrize(
    ("name", "by"), [("Fastflow", "losses"), ("Stfpm", "losses"), ("Fastflow", "rows")]
)
@pytest.mark.parametrize("rule", [halves, ones])
def test_a_picture_with_nan_costs_its_batch_alone(pictures, name, by, rule, caplog):
    model = spoiled(MODELS[name][1](pictures))
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    fit(model, pictures, callback(rule, by=by))
    after = model.model.state_dict()
    assert all(torch.isfinite(value).all() for value in after.values())
    assert any(not torch.equal(value, before[key]) for key, value in after.items())
    assert "losses are NaN or infinite" in caplog.text
    assert "step skipped" in caplog.text


def test_a_checkpoint_is_refused_after_a_picture_was_renamed(pictures, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(pictures / "train", root / "train")
    saving = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    comet = callback()
    fit(fastflow(), root, comet, saving)
    moved = tmp_path / "moved"
    shutil.copytree(root / "train", moved / "train")
    fit(fastflow(), moved, callback(), epochs=3, ckpt_path=tmp_path / "last.ckpt")
    renamed = Path(comet.paths[4])
    renamed.rename(renamed.with_name("zebra.png"))
    with pytest.raises(ValueError, match="the weights belong to other samples"):
        fit(fastflow(), root, callback(), epochs=3, ckpt_path=tmp_path / "last.ckpt")


def test_one_callback_over_two_folders_starts_fresh(pictures, tmp_path):
    shutil.copytree(pictures / "train", tmp_path / "other" / "train")
    comet = callback()
    seen = []

    class Looks(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 0:
                seen.append(float(comet.weighter(comet._index(batch)).min()))

    for root in (pictures, tmp_path / "other"):
        fit(fastflow(), root, comet, Looks())
        assert comet.weighter().min() < 0.5
    assert seen == [1.0, 1.0]
    assert str(tmp_path) in comet.suspects(1)[0]


class TestErrors:
    """Each says what to change."""

    def test_a_memory_bank(self, pictures):
        model = made("Patchcore", pictures, backbone="resnet18", pre_trained=False)
        with pytest.raises(TypeError, match="Patchcore isn't a gradient-trained"):
            fit(model, pictures, callback(), epochs=1)

    def test_the_regularizer_without_losses(self, pictures):
        comet = callback(by="rows", regularizer=CovarianceMetaRegularizer())
        with pytest.raises(ValueError, match="leave it out"):
            fit(fastflow(), pictures, comet)

    def test_losses_of_a_model_that_has_none(self, pictures):
        with pytest.raises(ValueError, match="use by='rows'"):
            fit(MODELS["Cflow"][1](pictures), pictures, callback(by="losses"))

    def test_an_unknown_way(self):
        with pytest.raises(ValueError, match="by is 'samples'"):
            callback(by="samples")

    def test_suspects_before_training(self):
        with pytest.raises(RuntimeError, match=r"Engine\.fit"):
            CoMetCallback().suspects()


def test_the_snippet_runs(pictures, monkeypatch):
    monkeypatch.chdir(pictures)
    monkeypatch.setattr(Folder, "__init__", partialmethod(Folder.__init__, num_workers=0))
    size = PreProcessor(Resize((64, 64), antialias=True))
    monkeypatch.setattr(models.Stfpm, "configure_pre_processor", lambda *_: size)
    seed_everything(0)
    paths = run(PAGE, "anomalib", {})["suspects"]
    assert {Path(path).stem for path in paths[:1]} <= {"13", "14"}


def test_a_ranking_and_a_review_are_the_prior(pictures, monkeypatch, tmp_path):
    """The snippet, and that its order of the pictures is that of the training."""
    from comet_meta.vision.keep_list import Row, write

    monkeypatch.chdir(pictures)
    names = [f"{k:02}.png" for k in range(15)]
    rows = [Row(Path(name), k / 15, 1.0, 0.0, 15 - k, True) for k, name in enumerate(names)]
    write(pictures / "train_ranked" / "keep.csv", rows)
    lines = [
        f"{pictures / 'train' / name},{15 - k},{'yes' if k < 13 else 'no'},yes"
        for k, name in enumerate(names)
    ]
    data = Folder("pictures", normal_dir="train", num_workers=0, seed=0)
    data.setup()
    trained = {Path(path).name for path in data.train_data.samples["image_path"]}
    assert len(trained) < len(names)  # the others are split off
    text = "\n".join(["path,rank,keep,reviewed", *lines])
    (pictures / "list.csv").write_text(text)
    page = {"datamodule": data, "CoMetCallback": CoMetCallback}
    comet = run(PAGE, "prior", page)["comet"]
    quiet = {"logger": False, "enable_progress_bar": False, "default_root_dir": tmp_path}
    Engine(callbacks=[comet], max_epochs=1, accelerator="cpu", devices=1, **quiet).fit(
        model=stfpm(), datamodule=data
    )
    by_name = dict(zip(map(Path, comet.paths), comet.weighter.weights.tolist(), strict=True))
    assert {path.name for path in by_name} == trained
    for path, weight in by_name.items():
        assert weight == float(path.name < "13.png")
    assert not comet.weighter.scores.isnan().any()  # scored for the ranking
