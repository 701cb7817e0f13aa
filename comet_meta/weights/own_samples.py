"""Whose weights they are: a weighter, saved or not, refuses the samples of another data set."""

from collections.abc import Mapping, Sized
from typing import Any

from torch import Tensor

from comet_meta.data import check_positions
from comet_meta.identity import sample_identity


class OwnSamples:
    """The samples that a weighter's positions stand for, as far as it was told.

    Attributes:
        identity: What tells them from other samples (:func:`~comet_meta.identity.sample_identity`);
            None where nobody told.

    Example:
        >>> samples = OwnSamples()
        >>> samples.identify(["a.png", "b.png"], None)
        >>> samples.identify(["a.png", "c.png"], None)
        Traceback (most recent call last):
        ValueError: the weights belong to other samples: ...
    """

    def __init__(self) -> None:
        self.identity: str | None = None

    def identify(self, dataset: Sized, size: int | None) -> None:
        """Note the samples of a data set.

        Args:
            dataset: The training set.
            size: Number of samples that it must have, where known.

        Raises:
            TypeError: If its items carry positions in parts of it.
            ValueError: If it has another size, or other samples than were noted before.
        """
        check_positions(dataset)
        if size not in (None, len(dataset)):
            raise ValueError(f"the weighter is for {size} samples, the data set has {len(dataset)}")
        identity = sample_identity(dataset)
        self._check(identity)
        self.identity = identity

    def check_saved(
        self, state_dict: Mapping[str, Any], size: int | None, prior: Tensor | None
    ) -> None:
        """Check that a weighter's saved state is of these samples.

        Args:
            state_dict: The saved state.
            size: Number of samples that it must have, where known.
            prior: The prior of the weighter that is to load it.

        Raises:
            ValueError: If it is of another number of samples, or of other samples, or only one of
                the two weighters has a prior.
        """
        saved = state_dict.get("scores")
        if saved is not None and size not in (None, len(saved)):
            raise ValueError(
                f"the saved weights are of {len(saved)} samples, this weighter is for "
                f"{size}: they belong to another training set"
            )
        if (state_dict.get("prior") is None) != (prior is None):
            here, there = ("no", "a") if prior is None else ("a", "no")
            raise ValueError(f"the saved weighter has {there} prior, this one has {here}")
        extra = state_dict.get("_extra_state")
        if isinstance(extra, Mapping):
            self._check(extra.get("samples"))

    def _check(self, identity: str | None) -> None:
        if None in (identity, self.identity) or identity == self.identity:
            return
        then, now = (str(each).split(":")[0] for each in (self.identity, identity))
        raise ValueError(
            f"the weights belong to other samples: {then} here and {now} there, "
            "of other names or in another order. Use the data set as it was, or start from the "
            "beginning, without the saved weights or with a new weighter"
        )
