"""Training loop and command line, end to end on small data."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from comet_examples import cli, training
from comet_examples.detectors import SimpleNet
from comet_examples.training import FeatureRows, ResumeError, TrainingSettings, predict, train
from comet_meta import (
    CoMetOptimizerWrapper,
    SoftConfidentWeighter,
    choose_for_review,
    learn_from_review,
)
from comet_meta.vision.features import PatchFeatures
from comet_meta.vision.picture_prior import (
    memory_part_prior,
    memory_prior,
    strangest_features,
)
from comet_meta.weights.contamination import Contamination
from comet_meta.weights.review import Review

METHODS = ("plain", "oracle", "paper", "comet")


def a_data_set(count: int = 30, bad: int = 4) -> FeatureRows:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(count + 5, 6, 3, 3, generator=generator)
    features[:bad] += 4
    return FeatureRows([features], torch.arange(count))


def build() -> SimpleNet:
    return SimpleNet([6], (12, 12), hidden=16)


def same(left: SimpleNet, right: SimpleNet) -> bool:
    pairs = zip(left.state_dict().values(), right.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_bits(method):
    settings = TrainingSettings(method, epochs=2)
    first = train(build, a_data_set(), settings)
    torch.rand(7)
    assert same(first.detector, train(build, a_data_set(), settings).detector)
    other = TrainingSettings(method, epochs=2, seed=1)
    assert not same(first.detector, train(build, a_data_set(), other).detector)


class StopError(Exception):
    """Stands for Ctrl-C."""


@pytest.mark.parametrize("method", ["plain", "comet", "paper"])
@pytest.mark.parametrize("stop_at", [1, 5, 9, 14])
def test_a_stopped_run_resumes_bit_equal(tmp_path, method, stop_at):
    settings = TrainingSettings(method, epochs=4, strength=0.001)
    whole = train(build, a_data_set(), settings)
    calls = []

    class Stopping(SimpleNet):
        def _confidence(self, features, part_weights):  # of either kind of loss
            calls.append(1)
            steps = 8 if method == "paper" else 1
            if len(calls) > stop_at * steps:
                raise StopError
            return super()._confidence(features, part_weights)

    def stopping():
        return Stopping([6], (12, 12), hidden=16)

    checkpoint = tmp_path / "run.pt"
    with pytest.raises(StopError):
        train(stopping, a_data_set(), settings, checkpoint=checkpoint)
    assert not list(tmp_path.glob("*.partial"))
    resumed = train(build, a_data_set(), settings, checkpoint=checkpoint, resume=True)
    assert same(whole.detector, resumed.detector)
    assert resumed.history == whole.history
    if method != "plain":
        assert torch.equal(whole.optimizer.weighter(), resumed.optimizer.weighter())


def test_steps_make_sets_of_any_size_equally_long():
    settings = TrainingSettings("plain", steps=7)
    # 30 pictures are 4 steps of 8; a last batch of one picture isn't a step.
    lengths = {count: len(train(build, a_data_set(count), settings).history) for count in (17, 30)}
    assert lengths == {17: 4, 30: 2}
    assert TrainingSettings("plain", steps=1).epochs_for(1000) == 1
    assert TrainingSettings("plain", epochs=3).epochs_for(1000) == 3
    for both in ({}, {"epochs": 1, "steps": 1}):
        with pytest.raises(ValueError, match="give one of the two"):
            TrainingSettings("plain", **both)


@pytest.mark.parametrize("method", METHODS)
def test_every_methods_rates_fall_as_half_a_cosine(method, monkeypatch):
    rates = []
    step = CoMetOptimizerWrapper.step

    def seen(self, *arguments, **options):
        rates.append([group["lr"] for group in self.param_groups])
        return step(self, *arguments, **options)

    monkeypatch.setattr(CoMetOptimizerWrapper, "step", seen)
    trained = train(build, a_data_set(), TrainingSettings(method, steps=8, schedule="cosine"))
    assert len(rates) == 8
    for step_number, found in enumerate(rates):
        factor = (1 + math.cos(math.pi * step_number / 8)) / 2
        assert found == pytest.approx([rate * factor for rate in rates[0]])
    assert min(rates[0]) > 0
    ends = [group["lr"] for group in trained.optimizer.param_groups]
    assert ends == pytest.approx([0.0] * len(ends), abs=1e-12)
    rates.clear()
    train(build, a_data_set(), TrainingSettings(method, steps=8))
    assert rates == [rates[0]] * 8


@pytest.mark.parametrize("method", ["plain", "comet"])
def test_a_stopped_run_with_a_schedule_resumes_bit_equal(tmp_path, method):
    settings = TrainingSettings(method, steps=16, schedule="cosine", strength=0.001)
    whole = train(build, a_data_set(), settings)
    checkpoint = tmp_path / "run.pt"

    def stop(epoch, _):
        if epoch == 2:
            raise StopError

    with pytest.raises(StopError):
        train(build, a_data_set(), settings, checkpoint=checkpoint, on_epoch=stop)
    assert "scheduler" in torch.load(checkpoint, weights_only=True)
    resumed = train(build, a_data_set(), settings, checkpoint=checkpoint, resume=True)
    assert same(whole.detector, resumed.detector)
    assert resumed.history == whole.history
    longer = TrainingSettings(method, steps=32, schedule="cosine", strength=0.001)
    with pytest.raises(ResumeError, match="epochs was 4, is 8"):
        train(build, a_data_set(), longer, checkpoint=checkpoint, resume=True)
    # By another name it is the same length.
    named = replace(settings, steps=None, epochs=4)
    assert same(
        train(build, a_data_set(), named, checkpoint=checkpoint, resume=True).detector,
        whole.detector,
    )


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    file = tmp_path / "run.pt"
    settings = TrainingSettings("comet", epochs=1)
    train(build, a_data_set(), settings, checkpoint=file, identity="bottle")
    for changed, identity in (
        (TrainingSettings("comet", epochs=1, seed=3), "bottle"),
        (settings, "zipper"),
    ):
        with pytest.raises(ResumeError, match=r"seed was 0, is 3|identity was 'bottle'"):
            train(build, a_data_set(), changed, checkpoint=file, identity=identity, resume=True)
    file.write_bytes(b"damaged")
    with pytest.raises(ResumeError, match="remove it to start"):
        train(build, a_data_set(), settings, checkpoint=file, identity="bottle", resume=True)


def test_a_picture_of_nan_features_is_left_out_and_ranked_first(caplog):
    data = a_data_set()
    data.features[0][5, 0] = torch.nan
    spoilt = train(unscaled, data, TrainingSettings("comet", epochs=3))
    assert all(epoch["dropped"] == 1 for epoch in spoilt.history)
    assert all(p.isfinite().all() for p in spoilt.detector.parameters())
    assert spoilt.optimizer.weighter.ranking(5).tolist().count(5) == 1
    assert "samples [5]" in caplog.text


def unscaled() -> SimpleNet:
    return SimpleNet([6], (12, 12), hidden=16, standardize=False)


def test_an_epoch_without_any_step_is_an_error():
    data = a_data_set()
    data.features[0][:] = torch.nan
    with pytest.raises(ValueError, match="every step of epoch 1 was skipped"):
        train(unscaled, data, TrainingSettings("plain", epochs=2))


def test_weights_are_one_per_picture_and_come_from_the_trained_model():
    data = a_data_set()

    def told(detector, data, settings):  # thirty pictures prove nothing by themselves
        prior = memory_prior(data.batches(), len(data))
        weighter = SoftConfidentWeighter(prior=prior, contamination=0.13)
        return CoMetOptimizerWrapper(detector.optimizers(), weighter=weighter)

    trained = train(build, data, TrainingSettings("comet", epochs=30), wrap=told)
    weighter = trained.optimizer.weighter
    scores, _ = predict(trained.detector, data)
    assert weighter.scores.shape == (30,)
    assert torch.equal(weighter.scores, scores)
    one_epoch = train(build, data, TrainingSettings("comet", epochs=1)).optimizer.weighter
    assert not torch.equal(one_epoch.scores, weighter.scores)  # refreshed, not computed once
    assert set(weighter.ranking(4).tolist()) == {0, 1, 2, 3}


def tree(root: Path, category: str = "bottle") -> Path:
    """Striped pictures; defective ones have a bright square, marked by the mask."""
    generator = np.random.default_rng(0)
    stripes = np.tile((np.arange(64) // 8 % 2 * 60 + 60)[:, None, None], (1, 64, 3))

    def save(part: str, name: str, square: tuple[int, int] | None = None) -> None:
        pixels = stripes + generator.integers(0, 20, stripes.shape)
        mask = np.zeros((64, 64), dtype=np.uint8)
        if square:
            row, column = square
            pixels[row : row + 16, column : column + 16] = 250
            mask[row : row + 16, column : column + 16] = 255
        for folder, image in ((part, pixels.astype(np.uint8)), (None, mask)):
            if folder is None:
                if not square:
                    continue
                folder = part.replace("test", "ground_truth")
                name = name + "_mask"
            path = root / category / folder / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)

    for i in range(24):
        save("train/good", f"{i:03d}")
    for i in range(8):
        save("test/good", f"{i:03d}")
        save("test/square", f"{i:03d}", (8 * (i % 4), 40 - 4 * i))
    return root


SMALL = [
    *("--backbone", "resnet10t", "--weights", "random", "--resize", "64", "--epochs", "2"),
    *("--device", "cpu"),
]


def run(root: Path, out: Path, *more: str) -> tuple[int, dict]:
    status = cli.main(
        "simplenet", "mvtec", ["--data-root", str(root), "--out", str(out), *SMALL, *more]
    )
    results = out / "bottle" / "results.json"
    return status, json.loads(results.read_text()) if results.exists() else {}


def test_the_command_line_end_to_end(tmp_path, capsys, monkeypatch):
    seen = []
    forward = PatchFeatures.forward
    monkeypatch.setattr(
        PatchFeatures, "forward", lambda self, x: seen.append(len(x)) or forward(self, x)
    )
    root = tree(tmp_path / "data")
    status, results = run(root, tmp_path / "out", "--noise", "0.1", "--plain", "--oracle")
    assert status == 0
    # The backbone saw every picture once, whatever the number of methods and epochs.
    assert sum(seen) == 24 + 16
    assert list(results["methods"]) == ["plain", "oracle", "comet"]
    for method in results["methods"].values():
        assert set(method["test"]) == {"I-AUROC", "I-AP", "P-AUROC", "P-AP", "AUPRO"}
        assert len(method["history"]) == 2
    suspects = results["methods"]["comet"]["suspects"]
    assert len(suspects) == 27  # 24 good and 3 bad: 3 / 27 = 0.11
    assert sum("square" in suspect["path"] for suspect in suspects) == 3
    printed = capsys.readouterr().out
    assert "27 training pictures (3 bad), 13 test pictures" in printed
    assert "| bottle   | comet  |" in printed
    for name in ("comet_maps", "comet_weights", "comet_suspects", "plain_maps"):
        with Image.open(tmp_path / "out" / "bottle" / f"{name}.png") as picture:
            assert picture.size[0] > 500


def test_the_bank_is_a_row_and_is_told_where_it_is_ahead(tmp_path, capsys, undrawn, monkeypatch):
    root = tree(tmp_path / "data")
    status, results = run(root, tmp_path / "out", "--bank")
    assert status == 0
    assert list(results["methods"]) == ["bank", "comet"]
    bank, comet = (results["methods"][name]["test"] for name in ("bank", "comet"))
    assert bank.keys() == comet.keys()
    assert bank["I-AUROC"] > 0.9
    printed = capsys.readouterr().out
    assert "| bottle   | bank   |" in printed
    ahead = "bottle: the memory bank is ahead of comet"
    assert (ahead in printed.splitlines()[-1]) == (bank["I-AUROC"] > comet["I-AUROC"])
    monkeypatch.setattr(SimpleNet, "scores", lambda self, x: -x[0].flatten(1).std(dim=1))
    run(root, tmp_path / "beaten", "--bank")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(ahead)
    assert last.endswith("use the bank here")


def test_the_length_by_steps_from_the_command_line(tmp_path, undrawn):
    root = tree(tmp_path / "data")
    arguments = [*SMALL[: SMALL.index("--epochs")], "--device", "cpu", "--steps", "5"]
    more = ["--data-root", str(root), "--out", str(tmp_path / "out"), *arguments]
    assert cli.main("simplenet", "mvtec", more) == 0
    results = json.loads((tmp_path / "out" / "bottle" / "results.json").read_text())
    assert (results["settings"]["epochs"], results["settings"]["steps"]) == (None, 5)
    assert len(results["methods"]["comet"]["history"]) == 2  # of three steps each
    with pytest.raises(SystemExit, match="2"):
        cli.main("simplenet", "mvtec", [*more, "--epochs", "2"])


def test_no_test_picture_or_label_reaches_training(tmp_path, undrawn):
    root = tree(tmp_path / "data")
    run(root, tmp_path / "before")
    test = root / "bottle" / "test"
    (test / "good").rename(test / "kept")
    (test / "square").rename(test / "good")
    (test / "kept").rename(test / "square")
    (root / "bottle" / "ground_truth" / "square").rename(tmp_path / "masks")
    (root / "bottle" / "ground_truth").rmdir()
    _, after = run(root, tmp_path / "after")
    states = [
        torch.load(tmp_path / name / "bottle" / "comet.pt", weights_only=True)["detector"]
        for name in ("before", "after")
    ]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert set(after["methods"]["comet"]["test"]) == {"I-AUROC", "I-AP"}


def test_the_last_epoch_is_the_result_whatever_the_test_set_says(tmp_path, undrawn):
    root = tree(tmp_path / "data")
    _, results = run(root, tmp_path / "out")
    state = torch.load(tmp_path / "out" / "bottle" / "comet.pt", weights_only=True)
    assert len(state["history"]) == len(results["methods"]["comet"]["history"]) == 2


def test_ctrl_c_says_how_to_go_on_and_resume_ends_in_the_same_bits(
    tmp_path, undrawn, capsys, monkeypatch
):
    root = tree(tmp_path / "data")
    run(root, tmp_path / "whole")
    calls = []
    losses = SimpleNet.losses

    def interrupted(self, features, part_weights=None):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return losses(self, features, part_weights)

    monkeypatch.setattr(SimpleNet, "losses", interrupted)
    status, _ = run(root, tmp_path / "stopped")
    assert status == 130
    assert "--resume" in capsys.readouterr().err
    monkeypatch.setattr(SimpleNet, "losses", losses)
    status, _ = run(root, tmp_path / "stopped", "--resume")
    assert status == 0
    states = [
        torch.load(tmp_path / name / "bottle" / "comet.pt", weights_only=True)["detector"]
        for name in ("whole", "stopped")
    ]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_category_that_fails_does_not_take_the_others_with_it(tmp_path, undrawn, capsys):
    root = tree(tree(tmp_path / "data"), "cable")
    (root / "bottle" / "train" / "good" / "000.png").write_bytes(b"")
    status, _ = run(root, tmp_path / "out")
    captured = capsys.readouterr()
    assert status == 1
    assert "error: bottle: can't read the picture" in captured.err
    assert "| cable    | comet  |" in captured.out
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--category", "cork"], "found: bottle"),
        (["--weights", "nowhere.pth"], "there's no weights file"),
        (["--noise", "0.9"], "the most is noise"),
        (["--backbone", "resnet5000"], "timm has no model"),
    ],
)
def test_wrong_arguments_get_a_sentence(tmp_path, capsys, arguments, message):
    status, _ = run(tree(tmp_path / "data"), tmp_path / "out", *arguments)
    captured = capsys.readouterr()
    assert status != 0
    assert message in captured.err
    assert "Traceback" not in captured.err


def test_without_a_data_root_the_first_line_says_demo(capsys, monkeypatch):
    asked = {}
    monkeypatch.setattr(cli, "_run", lambda options: asked.update(vars(options)) or 0)
    assert cli.main("fastflow", "ksdd2", []) == 0
    assert capsys.readouterr().out.startswith("DEMO: no --data-root")
    assert (asked["dataset"], asked["category"], asked["noise"]) == ("elpv", ["mono"], 0.1)
    assert asked["methods"] == ["plain", "comet"]
    assert asked["out"] == Path("runs/fastflow_elpv")
    assert asked["resize"] == [cli.DEMO_PIXELS]
    assert cli.main("fastflow", "ksdd2", ["--resize", "64"]) == 0
    assert asked["resize"] == [64]
    assert cli.main("fastflow", "elpv", []) == 0
    assert asked["resize"] is None


def test_a_data_set_that_is_asked_for_is_no_demo(capsys):
    assert cli.main("simplenet", "mvtec", ["--dataset", "folder", *SMALL]) == 2
    captured = capsys.readouterr()
    assert "DEMO" not in captured.out
    assert "a folder of pictures needs --data-root" in captured.err


def test_comet_starts_from_the_prior_of_the_frozen_features():
    data = a_data_set()
    optimizer = training.wrap(build(), data, TrainingSettings("comet", epochs=1))
    expected = memory_prior(data.batches(), len(data))
    assert torch.equal(optimizer.weighter.prior, expected)
    assert int(optimizer.weighter.ranking(1)) == int(expected.argmax())
    assert optimizer.weighter().mean() == pytest.approx(0.9, abs=0.01)  # they prove nothing
    assert not optimizer.weighter.has_parts
    told = training.wrap(build(), data, TrainingSettings("comet", epochs=1, contamination=0.1))
    assert told.weighter().mean() == pytest.approx(0.8, abs=0.01)  # the tenth, and another
    assert not told.weighter.has_parts


def test_of_few_pictures_a_tenth_is_left_out_and_nothing_judged():
    settings = TrainingSettings("comet", epochs=8)
    weighter = training.wrap(build(), a_data_set(99), settings).weighter
    assert not weighter.needs_scores
    assert float((1 - weighter()).sum()) == pytest.approx(9.9, abs=1e-3)


@pytest.mark.parametrize(("epochs", "judged"), [(2, 1), (8, 2), (10, 2)])
def test_the_model_judges_what_is_held_out_after_a_quarter_of_the_training(epochs, judged):
    held = []

    def wrap(*args):
        optimizer = training.wrap(*args)
        held.append(optimizer.weighter)
        return optimizer

    def note(epoch, _):
        waits.append(held[0].needs_scores)
        weights.append(held[0]())

    waits, weights = [], []
    data = a_data_set(120)
    train(build, data, TrainingSettings("comet", epochs), wrap=wrap, on_epoch=note)
    assert waits == [epoch < judged for epoch in range(1, epochs + 1)]
    assert all(torch.equal(later, weights[judged - 1]) for later in weights[judged:])
    first = training.wrap(build(), data, TrainingSettings("comet", epochs)).weighter()
    assert (first == 0).sum() == 24 + 32  # a fifth, and a third of the others
    assert weights[-1].mean() > first.mean()
    assert (weights[-1][first > 0] == 1).all()


@pytest.mark.parametrize(
    ("method", "expected"), [("plain", [8]), ("paper", [8]), ("comet", [2, 8])]
)
def test_scores_are_fitted_at_the_end_and_for_a_judgement_alone(method, expected):
    epochs, done = [], [0]

    class Fitted(SimpleNet):
        def fit_scores(self, batches):
            epochs.append(done[0] + 1)

    train(
        lambda: Fitted([6], (12, 12), hidden=16),
        a_data_set(120),
        TrainingSettings(method, epochs=8),
        on_epoch=lambda epoch, _: done.append(done.pop() + 1),
    )
    assert epochs == expected


@pytest.mark.parametrize("stopped", [1, 2, 3])
def test_a_training_that_was_stopped_before_or_after_the_judgement_goes_on_alike(tmp_path, stopped):
    data, settings = a_data_set(120), TrainingSettings("comet", epochs=8)
    whole = train(build, data, settings)

    def stop(epoch, _):
        if epoch == stopped:
            raise KeyboardInterrupt

    file = tmp_path / "x.pt"
    with pytest.raises(KeyboardInterrupt):
        train(build, data, settings, checkpoint=file, on_epoch=stop)
    again = train(build, data, settings, checkpoint=file, resume=True)
    assert same(whole.detector, again.detector)
    assert torch.equal(whole.optimizer.weighter(), again.optimizer.weighter())


def test_the_prior_of_a_training_learns_from_the_review():
    data = a_data_set(120)
    prior, patch_scores = memory_part_prior(data.batches(), len(data))
    look_at = choose_for_review(prior)
    review = Review(look_at, look_at < 12)
    strange = strangest_features(data.batches(), patch_scores)
    expected = learn_from_review(prior, strange, review)
    settings = TrainingSettings("comet", epochs=1, review=review)
    weighter = training.wrap(build(), data, settings).weighter
    assert torch.equal(weighter.prior, expected.prior)
    assert not torch.equal(weighter.prior.argsort(), prior.argsort())
    assert weighter.contamination_ == expected.review.share


def test_a_training_with_a_review_goes_on_alike_and_not_with_another(tmp_path):
    review = Review([3, 1, 2], [True, False, False], Contamination(0.1, 0.05, 0.2))
    data, settings = a_data_set(120), TrainingSettings("comet", epochs=4, review=review)
    whole = train(build, data, settings)

    def stop(epoch, _):
        if epoch == 2:
            raise KeyboardInterrupt

    file = tmp_path / "x.pt"
    with pytest.raises(KeyboardInterrupt):
        train(build, data, settings, checkpoint=file, on_epoch=stop)
    other = replace(settings, review=review._replace(bad=[False, True, False]))
    with pytest.raises(ResumeError, match="review was"):
        train(build, data, other, checkpoint=file, resume=True)
    again = train(build, data, settings, checkpoint=file, resume=True)
    assert same(whole.detector, again.detector)
    assert torch.equal(whole.optimizer.weighter(), again.optimizer.weighter())
    assert again.optimizer.weighter.reviewed == (3, 1)


def test_comet_can_be_told_how_many_are_bad(monkeypatch):
    asked = {}
    monkeypatch.setattr(cli, "_run", lambda options: asked.update(vars(options)) or 0)
    assert cli.main("simplenet", "elpv", ["--contamination", "0.25"]) == 0
    settings = TrainingSettings("comet", epochs=1, contamination=asked["contamination"])
    weighter = training.wrap(build(), a_data_set(), settings).weighter
    assert weighter.contamination == 0.25
    assert (weighter.p_bad > 0.5).float().mean() == pytest.approx(0.25, abs=0.05)


@pytest.mark.parametrize(("told", "exposed"), [(0.0, False), (0.09, False), (0.11, True)])
def test_twenty_likely_bad_pictures_are_learned_from_as_anomalous(told, exposed, monkeypatch):
    count = 200
    asked = []
    pairs = SimpleNet.loss_pairs
    monkeypatch.setattr(
        SimpleNet, "loss_pairs", lambda self, x, w: asked.append(len(x[0])) or pairs(self, x, w)
    )
    features = [torch.randn(count, 8, 2, 2)]
    data = FeatureRows(features, torch.arange(count))
    settings = TrainingSettings("comet", 1, 50, contamination=told)
    train(lambda: SimpleNet([8], (8, 8), hidden=4), data, settings)
    assert sum(asked) == (count if exposed else 0)
