"""Methods trained and judged on categories, with results, pictures and checkpoints on disk."""

import hashlib
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import timm
import torch

import comet_meta
from comet_examples import report
from comet_examples.datasets import DatasetError, Split, bad_samples, contaminate, survey
from comet_examples.experiment import Experiment, Judged, Outcome, can_be_judged
from comet_examples.length import chosen, losses_by_length
from comet_examples.metrics import curation_metrics
from comet_examples.presets import Preset
from comet_examples.results import Results, fingerprint
from comet_examples.training import ResumeError, TrainingSettings
from comet_meta import SoftConfidentWeighter
from comet_meta.report import read_review
from comet_meta.vision import html_report
from comet_meta.vision.backbones import Backbone
from comet_meta.vision.features import FeatureStore
from comet_meta.vision.files import sole_writer, unforeseen
from comet_meta.weights.review import Review

if TYPE_CHECKING:
    from comet_examples.tensorboard import TensorBoardLog
    from comet_examples.training import Method

_SUSPECTS_MAPPED = 8


@dataclass(frozen=True)
class Session:
    """What to train, how, and where the results go.

    Attributes:
        detector: Name in ``DETECTORS``.
        dataset: Name in ``DATASETS``.
        preset: Picture size and detector settings.
        training: How to train; its method is replaced by each of ``methods``.
        methods: What to train, in this order; ``"bank"``, which isn't trained, may be among them.
        backbone: Makes the frozen features.
        out: Folder that gets a folder for each category.
        device: Where to train.
        noise: Share of bad training pictures to add, in [0, 1).
        overlap: Whether they stay in the test set too.
        resume: Continue a method that was stopped from its last epoch.
        store: Keeps the features.
        keep_going: Whether to train without the pictures that can't be used.
        review: List of a report in whose sample the bad pictures were ticked.
        tensorboard: Whether to write logs for TensorBoard; takes the package ``tensorboard``.
        chooses_length: Whether each category's pictures choose between the length of ``training``
            and a longer one (:mod:`comet_examples.length`), the same for all methods.
    """

    detector: str
    dataset: str
    preset: Preset
    training: TrainingSettings
    methods: Sequence[str]
    backbone: Backbone
    out: Path
    device: str = "cpu"
    noise: float = 0.0
    overlap: bool = False
    resume: bool = False
    store: FeatureStore = field(default_factory=FeatureStore)
    tensorboard: bool = False
    keep_going: bool = False
    review: Path | None = None
    chooses_length: bool = False

    def run(self, categories: Sequence[Split]) -> tuple[list[dict[str, str | float]], list[str]]:
        """Train and judge what isn't finished yet.

        A category that fails is reported and doesn't take the others with it.

        Args:
            categories: The categories, before contamination.

        Returns:
            A table's rows, those of earlier runs included, and the names of the categories that
            failed.

        Raises:
            ResumeError: If ``out`` holds work that these settings can't go on from.
            BusyError: If another run writes to a category's folder.
        """
        rows: list[dict[str, str | float]] = []
        failed: list[str] = []
        prepared = []
        with ExitStack() as locks:
            # All of them before the first training: a refusal must not come after hours.
            for clean in categories:
                locks.enter_context(sole_writer(self.out / clean.category))
                with _reported(clean.category, failed, self.out / clean.category):
                    prepared.append((clean, *self._prepared(clean)))
            for clean, split, results in prepared:
                with _reported(clean.category, failed, self.out / clean.category):
                    self._finish(clean, split, results)
                rows += results.rows(self.methods)
        return rows, failed

    def _prepared(self, clean: Split) -> tuple[Split, Results]:
        if self.noise > 0 and (bad := int(bad_samples(clean.train).sum())):
            raise DatasetError(
                f"{bad} of the training pictures are bad already, which --noise {self.noise} would "
                "not count; leave --noise out, or add --curated to remove them first"
            )
        split = contaminate(clean, self.noise, seed=self.training.seed, overlap=self.overlap)
        training = asdict(self.training)
        del training["method"]
        if self.chooses_length:
            training["steps"] = "auto"
        if self.review is not None:
            self._review(split)  # a list that doesn't fit is refused before the first training
            digest = hashlib.sha256(self.review.read_bytes()).hexdigest()
            training["review"] = f"{self.review.name}, sha256 {digest[:12]}"
        settings = {
            "category": clean.category,
            "dataset": self.dataset,
            "pictures": fingerprint((*clean.train, *clean.test)),
            "noise": self.noise,
            "overlap": self.overlap,
            "transform": asdict(self.preset.transform) | {"fits": self.preset.fits},
            "backbone": self.backbone.fingerprint,
            "detector": self.detector,
            "detector options": self.preset.detector,
            **training,
        }
        return split, Results(self.out / clean.category / "results.json", settings)

    def _review(self, split: Split) -> Review | None:
        if self.review is None:
            return None
        return read_review(self.review, [sample.path for sample in split.train])

    def _finish(self, clean: Split, split: Split, results: Results) -> None:
        """Train and judge the methods that aren't finished yet."""
        print(f"{split.category}: {_described(split)}")
        kept = [method for method in self.methods if method in results.methods]
        if kept:
            print(f"{split.category}: {', '.join(kept)} finished before, see {results.file}")
        missing = [method for method in self.methods if method not in kept]
        if not missing:
            return
        surveyed = survey(clean)
        if self.keep_going and surveyed.faults:
            print(f"{clean.category}: {len(surveyed.faults)} pictures left out:", file=sys.stderr)
            for fault in surveyed.faults.values():
                print(f"  {fault}", file=sys.stderr)
            clean, split = surveyed.without_faults(clean), surveyed.without_faults(split)
            surveyed = replace(surveyed, faults={})
        experiment = Experiment(
            clean, self.detector, self.preset, self.backbone, self.store, self.device, surveyed
        )
        results.save()
        folder = results.file.parent
        training = self.training
        if self.chooses_length:
            training = training.stretched(self._times(experiment, split, results))
        for method in missing:
            if method == "bank":
                judged = experiment.bank(split, self.training.seed)
                entry = {"test": judged.figures, "environment": _environment(self.device)}
                _draw_maps(split, judged, experiment, folder, method)
                results.add(method, entry)
                continue
            log = _log(folder / "tensorboard" / method) if self.tensorboard else None
            settings = replace(training, method=cast("Method", method))
            if method == "comet":
                settings = replace(settings, review=self._review(split))
            outcome = experiment.run(
                split,
                settings,
                checkpoint=results.file.with_name(f"{method}.pt"),
                resume=self.resume,
                on_epoch=None if log is None else log.epoch,
            )
            entry = _entry(split, outcome) | {"environment": _environment(self.device)}
            _draw(split, outcome, experiment, folder, method)
            _report(split, outcome, experiment, results, method, entry)
            results.add(method, entry)
            if log is not None:
                _finish_log(log, outcome, entry, sorted(folder.glob(f"{method}_*.png")))

    def _times(self, experiment: Experiment, split: Split, results: Results) -> float:
        """How many times the preset's length the category's training pictures choose."""
        if not results.lengths:
            print(f"{split.category}: choosing the length by pictures that are held out")
            losses = losses_by_length(
                experiment.build, experiment.rows(split.train), self.training, device=self.device
            )
            means = {times: float(own.mean()) for times, own in losses.items()}
            chosen(means)  # what can't be chosen from isn't kept
            results.lengths = {f"{times:g}": mean for times, mean in means.items()}
            results.save()
        means = {float(times): mean for times, mean in results.lengths.items()}
        times = chosen(means)
        found = ", ".join(f"{mean:.4g} after {n:g} x" for n, mean in means.items())
        print(f"{split.category}: {times:g} x the preset's length; loss held out: {found}")
        return times


@contextmanager
def _reported(category: str, failed: list[str], folder: Path) -> Iterator[None]:
    """Say why a category failed, note it, and go on."""
    try:
        yield
    except ResumeError:
        raise
    except (ValueError, OSError) as error:  # a full disk, a file that vanished
        print(f"error: {category}: {error}", file=sys.stderr)
        failed.append(category)
    except Exception as error:  # noqa: BLE001 - the other categories go on
        print(f"error: {category}: {unforeseen(error, folder)}", file=sys.stderr)
        failed.append(category)


def _described(split: Split) -> str:
    labels = [sample.label for sample in split.train]
    known = f"{labels.count(1)} bad" if None not in labels else "no one knows which are bad"
    text = f"{len(split.train)} training pictures ({known}), {len(split.test)} test pictures"
    if can_be_judged(split):
        return text
    return f"{text}; no test figures, which take normal and anomalous test pictures"


def _entry(split: Split, outcome: Outcome) -> dict[str, Any]:
    """Figures of the test set and, where there are weights, the training set's ranking."""
    trained = outcome.training
    entry: dict[str, Any] = {"test": outcome.figures, "history": trained.history}
    weighter = trained.optimizer.weighter
    if weighter is None:
        return entry
    order = weighter.ranking()
    weights = weighter.mean_weights()
    entry["suspects"] = [
        {
            "path": str(split.train[i].path),
            "weight": round(float(weights[i]), 6),
            "score": round(float(weighter.scores[i]), 6),
        }
        for i in order.tolist()
    ]
    bad = bad_samples(split.train)
    if bad.any():
        # By rank: weights alone are tied at both ends.
        suspicion = torch.empty(len(order))
        suspicion[order] = torch.arange(len(order), 0, -1).float()
        entry["curation"] = curation_metrics(suspicion, bad)
    return entry


def _draw_maps(
    split: Split, judged: Judged, experiment: Experiment, folder: Path, method: str
) -> None:
    """Write the anomaly maps of the test pictures, if there are any."""
    if split.test:
        report.draw_heat_maps(
            split.test,
            judged.scores,
            judged.maps,
            experiment.preset.transform,
            f"{_heading(split, method)}: test pictures and their anomaly maps",
            folder / f"{method}_maps.png",
            shown=report.spread(split.test),
        )


def _heading(split: Split, method: str) -> str:
    return f"{report.printable(split.category)}, {method}"


def _draw(
    split: Split, outcome: Outcome, experiment: Experiment, folder: Path, method: str
) -> None:
    """Write the pictures of a trained method."""
    heading = _heading(split, method)
    transform = experiment.preset.transform
    _draw_maps(split, outcome, experiment, folder, method)
    weighter: SoftConfidentWeighter | None = outcome.training.optimizer.weighter
    if weighter is None:
        return
    report.draw_weights(
        weighter, split.train, f"{heading}: the training set", folder / f"{method}_weights.png"
    )
    report.draw_suspects(
        weighter,
        split.train,
        transform,
        f"{heading}: the training pictures that fit in least",
        folder / f"{method}_suspects.png",
    )
    suspects = [split.train[i] for i in weighter.ranking(_SUSPECTS_MAPPED).tolist()]
    report.draw_heat_maps(
        suspects,
        *experiment.predict(outcome.training, suspects),
        transform,
        f"{heading}: the most suspect training pictures and their anomaly maps",
        folder / f"{method}_suspect_maps.png",
        shown=range(len(suspects)),
    )


def _report(
    split: Split,
    outcome: Outcome,
    experiment: Experiment,
    results: Results,
    method: str,
    entry: Mapping[str, Any],
) -> None:
    """Write the page on which a person decides which training pictures stay."""
    weighter = outcome.training.optimizer.weighter
    if weighter is None:
        return
    row = results.row(method, entry)
    settings = results.settings
    captions = {
        "I-AUROC": "I-AUROC on the test set",
        "curation AUROC": "AUROC of the ranking",
    }
    file = results.file.with_name(f"{method}_report.html")
    html_report.write_report(
        file,
        html_report.Run(
            heading=split.category,
            subtitle=f"{settings['detector']} on {settings['dataset']}, trained with {method}",
            settings=settings,
            metrics=[*results.rows(results.methods), row],
            highlights=[(captions[name], float(row[name])) for name in captions if name in row],
            history=outcome.training.history,
        ),
        weighter,
        split.train,
        experiment.preset.transform,
        lambda samples: experiment.predict(outcome.training, samples)[1],
    )
    print(f"{split.category}: look through the training pictures in {file}")


def _log(folder: Path) -> "TensorBoardLog":
    # Only here, so that nobody else needs the package.
    from comet_examples.tensorboard import TensorBoardLog

    return TensorBoardLog(folder)


def _finish_log(
    log: "TensorBoardLog", outcome: Outcome, entry: Mapping[str, Any], pictures: Sequence[Path]
) -> None:
    weighter = outcome.training.optimizer.weighter
    curated = {f"curation {name}": value for name, value in entry.get("curation", {}).items()}
    values = (
        {} if weighter is None else {"scores": weighter.scores, "weights": weighter.mean_weights()}
    )
    log.finish(entry["test"] | curated, values, pictures)


def _environment(device: str) -> dict[str, str]:
    return {
        "device": device,
        "comet_meta": comet_meta.__version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
    }
