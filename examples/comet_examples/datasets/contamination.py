"""The contamination protocol: bad pictures in the training set, a known number of them."""

from collections.abc import Hashable
from dataclasses import replace
from itertools import chain

import numpy as np
import numpy.typing as npt

from comet_meta.vision.samples import DatasetError, Sample, Split


def contaminate(split: Split, noise: float, *, seed: int, overlap: bool = False) -> Split:
    """Move anomalous test pictures into the training set.

    All normal training pictures stay; of the anomalous test pictures as many are drawn, uniformly,
    as make up the share ``noise`` of the new training set (to the nearest picture, half to even).
    For one seed the draw at a lower share is part of the draw at a higher one. The training set is
    shuffled, so its order tells nothing.

    Pictures of one object (``Sample.group``) are drawn one after the other, so that few objects are
    torn apart: at most the last one. What is left of a drawn object's pictures leaves the test set
    without coming into the training set.

    Args:
        split: A split with a clean training set.
        noise: Share of bad pictures in the new training set, in [0, 1).
        seed: Decides the draw and the shuffle.
        overlap: Whether the drawn objects stay in the test set too.

    Returns:
        The contaminated split; ``noise`` 0 returns the split itself.

    Raises:
        DatasetError: If the share is out of range, the training set is not clean, or there are too
            few anomalous pictures: without ``overlap``, those of one object must stay in the test.
    """
    if not 0 <= noise < 1:
        raise DatasetError(f"the noise is {noise}; expected a share in [0, 1), for instance 0.1")
    if noise == 0:
        return split
    if bad := int(bad_samples(split.train).sum()):
        raise DatasetError(
            f"{split.category} has {bad} anomalous training pictures already, which noise {noise} "
            "would not count; contaminate a clean split, for instance that of oracle()"
        )
    anomalous = [sample for sample in split.test if sample.label == 1]
    permutation = np.random.default_rng(seed).permutation(len(anomalous))
    objects: dict[Hashable, list[Sample]] = {}
    for sample in (anomalous[i] for i in permutation):
        objects.setdefault(_object(sample), []).append(sample)
    draw = list(chain.from_iterable(objects.values()))
    # The last object of all is never drawn, so that something is left to be found.
    staying = 0 if overlap else max(1, len(next(reversed(objects.values()), [])))
    available = len(draw) - staying
    wanted = round(noise / (1 - noise) * len(split.train))
    if wanted > available:
        most = max(available, 0) / (max(available, 0) + len(split.train))
        kept = "" if overlap else f", of which one object's ({staying}) must stay in the test set"
        raise DatasetError(
            f"noise {noise} of {split.category} takes {wanted} anomalous pictures, but there are "
            f"{len(anomalous)}{kept}; the most is noise {np.floor(most * 1000) / 1000:.3f}"
        )
    drawn = draw[:wanted]
    gone = set() if overlap else {_object(sample) for sample in drawn}
    train = [*split.train, *drawn]
    order = np.random.default_rng([seed, len(train)]).permutation(len(train))
    test = tuple(sample for sample in split.test if _object(sample) not in gone)
    return replace(split, train=tuple(train[i] for i in order), test=test)


def oracle(split: Split) -> Split:
    """The same split as if somebody had removed the bad training pictures.

    Args:
        split: A contaminated split.

    Returns:
        The split with normal training pictures only, in their order.
    """
    return replace(split, train=tuple(s for s in split.train if s.label != 1))


def bad_samples(samples: tuple[Sample, ...]) -> npt.NDArray[np.bool_]:
    """Which samples are anomalous, bool (N,), for judging a ranking after the fact."""
    return np.array([sample.label == 1 for sample in samples], dtype=bool)


def _object(sample: Sample) -> Hashable:
    """What the picture shows: its group, or the picture itself."""
    return sample if sample.group is None else sample.group
