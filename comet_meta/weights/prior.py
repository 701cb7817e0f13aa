"""Priors: anomaly scores of the training set from frozen features, before any training.

:class:`MemoryScorer` is for pictures, with features of their patches. :class:`RowScorer` is for
tables and embeddings, with one row per sample.
"""

import math

import torch
from torch import Tensor

from comet_meta.arrays import ArrayLike, as_floats

_CHUNK_VALUES = 2**25
_LEAST_SAMPLES = 30  # in a memory: of fewer, most memories of a small set lack a rare variant
MAX_WHITENED_COLUMNS = 2048
"""Rows of more columns aren't whitened: the work grows with the cube of their number."""


class MemoryScorer:
    """Anomaly scores of the training set: distances between the samples' frozen features.

    1. A memory holds all patches of a random part of the *other* samples.
    2. A patch's distance is the distance to its nearest neighbour in the memory, averaged over
       several memories.
    3. A place that varies in all samples, such as an edge, is no defect. So a distance is divided
       by r + R: r is the median over the samples of the distances at the same place, R the median
       of all distances. This is the patch's own score (:meth:`score_parts`).
    4. A rare variant of the product is far from most memories in all of its patches; a defect is
       far in a few. So the patches' scores are divided by m + scale * M: m is the upper quartile of
       the sample's own distances, M the median of m over all samples.
    5. A sample's score is the mean of its highest ones.

    No memory holds the scored sample or a copy of it. A bad sample therefore looks normal only if
    most memories hold another one like it.

    Which samples a memory holds depends on the seed and the features, not on the order in which
    the samples come.

    Use the scores as the ``prior`` of a :class:`~comet_meta.SoftConfidentWeighter`. A few dozen to
    a few hundred patches per sample are enough: average finer ones first.

    Args:
        draws: Number of memories, >= 1. More memories lower the variance of the scores; the time
            grows in proportion.
        fraction: Fraction of the samples in each memory, in (0, 1). Small memories miss rare normal
            variants, large ones hold more bad samples. A memory holds at least 30 samples, or half
            of them where there are fewer than 60.
        top_patches: Number of highest patch distances that are averaged, >= 1; all of them where a
            sample has fewer.
        scale: Weight of M, the distance that is usual in the set, against the sample's own m, > 0.
            ``math.inf``: divide by M alone. That finds a little more in folders of one product, but
            takes a variant of less than a third of the samples for bad. No effect with one patch
            per sample.
        max_patches: Largest number of patches in a memory, >= 1; where there are more, a random
            choice of them. It bounds the time: draws * N * P * max_patches * C multiplications.
        seed: Seed of the random choices.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> features = torch.randn(40, 6, 8, generator=generator)
        >>> features[7, 2] += 9  # one strange patch
        >>> int(MemoryScorer()(features).argmax())
        7

    Source: distance to the nearest patch of a memory as in Roth et al.: Towards total recall in
    industrial anomaly detection, CVPR 2022 (PatchCore); ensembles of random sub-samples as in
    Bandaragoda et al.: Isolation-based anomaly detection using nearest-neighbor ensembles, 2018.
    """

    def __init__(
        self,
        *,
        draws: int = 8,
        fraction: float = 0.25,
        top_patches: int = 5,
        scale: float = 1.5,
        max_patches: int = 2048,
        seed: int = 0,
    ) -> None:
        for name, value in (
            ("draws", draws),
            ("top_patches", top_patches),
            ("max_patches", max_patches),
        ):
            if value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")
        if not 0 < fraction < 1:
            raise ValueError(f"fraction is {fraction}; expected one in (0, 1)")
        if not scale > 0:
            raise ValueError(f"scale is {scale}; expected a factor > 0, or math.inf")
        self.draws = draws
        self.fraction = fraction
        self.top_patches = top_patches
        self.scale = scale
        self.max_patches = max_patches
        self.seed = seed

    def __call__(self, features: ArrayLike) -> Tensor:
        """Score the training set.

        Args:
            features: Frozen features of all samples' patches, shape (N, P, C), or of the samples,
                (N, C); N >= 2. Give all channels a comparable scale.

        Returns:
            Anomaly scores, higher = more anomalous, float32, shape (N,), on the features' device.

        Raises:
            TypeError: If the features aren't floating-point.
            ValueError: If they have another shape or are not finite.
        """
        return self.score_parts(features)[0]

    @torch.no_grad()
    def score_parts(self, features: ArrayLike) -> tuple[Tensor, Tensor]:
        """Score the training set and each of its patches.

        Args:
            features: As for a call.

        Returns:
            Anomaly scores of the samples, shape (N,), and of their patches (step 3), shape (N, P).
            Both float32, on the features' device.

        Raises:
            TypeError: If the features aren't floating-point.
            ValueError: If they have another shape or are not finite.

        Example:
            >>> features = torch.randn(40, 6, 8, generator=torch.Generator().manual_seed(0))
            >>> features[7, 2] += 9  # one strange patch
            >>> _, patch_scores = MemoryScorer().score_parts(features)
            >>> divmod(int(patch_scores.argmax()), 6)
            (7, 2)
        """
        features = as_floats(features, "features")
        if features.dim() == 2:
            features = features.unsqueeze(1)
        if features.dim() != 3 or len(features) < 2:
            raise ValueError(
                f"features has shape {tuple(features.shape)}; expected (N, P, C) or (N, C), N >= 2"
            )
        count, patches, _ = features.shape
        # A copy in the memory would make a sample look normal: draw among different samples.
        sums = _random_sums(features.flatten(1))
        group, different = _group_by(sums)
        if len(different) == 1:
            zeros = torch.zeros(count, patches, device=features.device)
            return zeros[:, 0], zeros
        # In an order that depends on the features alone, not on the order of the samples.
        by_content = sums[different, 0].argsort()
        least = min(_LEAST_SAMPLES, len(different) // 2)
        size = min(max(least, round(self.fraction * len(different))), len(different) - 1)
        # Distances of features that are far from 0 lose precision: centre them.
        centre = features.mean(dim=(0, 1), dtype=torch.float64).to(torch.float32)
        # On the CPU, so that every device makes the same choices.
        generator = torch.Generator().manual_seed(self.seed)
        totals = torch.zeros(count, patches, device=features.device)
        seen = torch.zeros(count, device=features.device)
        draws = 0
        # Draw on until every sample was outside of at least one memory.
        while draws < self.draws or not bool((seen > 0).all()):
            # 1)
            order = torch.randperm(len(different), generator=generator).to(features.device)
            inside = by_content[order[:size]]
            is_inside = torch.zeros(len(different), dtype=torch.bool, device=features.device)
            is_inside[inside] = True
            outside = (~is_inside[group]).nonzero().flatten()
            memory = self._memory(features, different[inside], generator) - centre
            # 2)
            totals[outside] += self._distances(features, outside, memory, centre)
            seen[outside] += 1
            draws += 1
        distances = totals / seen.unsqueeze(1)
        if not bool(torch.isfinite(distances).all()):
            bad = (~torch.isfinite(features)).flatten(1).any(dim=1).nonzero().flatten()
            if not len(bad):
                raise ValueError(
                    f"features reach {float(features.abs().max()):.0e}: their squares overflow; "
                    "bring every channel to a comparable scale first"
                )
            raise ValueError(
                f"features of {len(bad)} samples are NaN or infinite (first at positions "
                f"{bad[:8].tolist()}); expected finite features"
            )
        # 3)
        usual = distances.median(dim=0).values + distances.median()
        patch_scores = distances / usual.where(usual > 0, 1)
        # 4), 5)
        highest = (patch_scores / self._own_scale(distances)).topk(min(self.top_patches, patches))
        return highest.values.mean(dim=1), patch_scores

    def _memory(self, features: Tensor, inside: Tensor, generator: torch.Generator) -> Tensor:
        """The patches of some samples, or a random choice of at most ``max_patches``, (M, C)."""
        patches = features.shape[1]
        if len(inside) * patches <= self.max_patches:
            return features[inside].flatten(0, 1).float()
        kept = torch.randperm(len(inside) * patches, generator=generator)[: self.max_patches]
        kept = kept.to(features.device)
        return features[inside[kept // patches], kept % patches].float()

    def _distances(
        self, features: Tensor, samples: Tensor, memory: Tensor, centre: Tensor
    ) -> Tensor:
        """Distances (S, P) of some samples' patches to a centred memory (M, C)."""
        patches = features.shape[1]
        chunk = max(1, _CHUNK_VALUES // (patches * len(memory)))
        return torch.cat(
            [
                self._nearest(features[part].flatten(0, 1).float() - centre, memory).reshape(
                    -1, patches
                )
                for part in torch.split(samples, chunk)
            ]
        )

    def _own_scale(self, distances: Tensor) -> Tensor:
        """What is usual in a sample and in the set, of distances (N, P), see step 4, (N, 1)."""
        patches = distances.shape[1]
        own = distances.kthvalue(max(1, 3 * patches // 4), dim=1, keepdim=True).values
        if patches == 1:
            return torch.ones_like(own)
        usual = own.median()
        usual = usual.where(usual > 0, 1)  # 0 where most samples are equal
        if math.isinf(self.scale):
            return usual.expand_as(own)
        return (own + self.scale * usual) / (1 + self.scale)

    @staticmethod
    def _nearest(queries: Tensor, memory: Tensor) -> Tensor:
        """Euclidean distance of each query (Q, C) to the nearest entry of the memory, (Q,)."""
        # argmin over m of |q - m|^2 = |q|^2 + |m|^2 - 2 q m: the search is one matrix product.
        # The distance is then computed directly, since the product leaves a rounding error between
        # equal vectors.
        cross = torch.addmm(memory.square().sum(dim=1), queries, memory.T, alpha=-2)
        distance: Tensor = (queries - memory[cross.argmin(dim=1)]).norm(dim=1)
        return distance


class RowScorer:
    """Anomaly scores of the rows of a table, or of embeddings, by distance to a few others.

    1. Every column is brought to mean 0 and standard deviation 1 and cut at 20 of these; constant
       columns drop out.
    2. A row's distance to the nearest of 16 other rows, drawn at random, is averaged over 64 draws.
       So few rows seldom hold a bad one, even where the bad ones resemble each other.
    3. The same is done on whitened rows, where a deviation counts more in a direction in which the
       others vary less. The mean variance is added to each direction's variance, so that directions
       without variance don't count.
    4. The score is the mean of both, each divided by its median.

    A row is never compared with itself or with a copy of itself.

    Args:
        draws: Number of draws, >= 1. The time grows in proportion.
        size: Number of rows in a draw, >= 1; half of the rows where there are fewer than twice as
            many.
        seed: Seed of the draws.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> rows = torch.randn(100, 5, generator=generator)
        >>> rows[7] += 4
        >>> int(RowScorer()(rows).argmax())
        7

    Source: ensembles of nearest neighbours in small random sub-samples as in Bandaragoda et al.:
    Isolation-based anomaly detection using nearest-neighbor ensembles, 2018.
    """

    def __init__(self, *, draws: int = 64, size: int = 16, seed: int = 0) -> None:
        for name, value in (("draws", draws), ("size", size)):
            if value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")
        self.draws = draws
        self.size = size
        self.seed = seed

    def __call__(self, rows: ArrayLike) -> Tensor:
        """Score the training set.

        Args:
            rows: Floating-point tensor of shape (N, C), N >= 2.

        Returns:
            Anomaly scores, higher = more anomalous, float32, shape (N,), on the rows' device.

        Raises:
            TypeError: If the rows aren't a floating-point tensor.
            ValueError: If they have another shape or are not finite.
        """
        return self._score(rows, parts=False)[0]

    def score_parts(self, rows: ArrayLike) -> tuple[Tensor, Tensor]:
        """Score the training set and each of its values.

        Args:
            rows: As for a call.

        Returns:
            Anomaly scores of the rows, shape (N,), and of their values, shape (N, C): a value's
            score is its difference from the same column of the nearest row of step 2, averaged over
            the draws, in standard deviations of the column. Both float32, on the rows' device.

        Raises:
            TypeError: If the rows aren't a floating-point tensor.
            ValueError: If they have another shape or are not finite.

        Example:
            >>> rows = torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
            >>> rows[7, 2] = 9.0
            >>> _, value_scores = RowScorer().score_parts(rows)
            >>> divmod(int(value_scores.argmax()), 5)
            (7, 2)
        """
        return self._score(rows, parts=True)

    @torch.no_grad()
    def _score(self, rows: ArrayLike, *, parts: bool) -> tuple[Tensor, Tensor]:
        """Scores of the rows (N,), and of their values (N, C), which are 0 without ``parts``."""
        rows = as_floats(rows, "rows")
        if rows.dim() != 2 or len(rows) < 2:
            raise ValueError(f"rows has shape {tuple(rows.shape)}; expected (N, C), N >= 2")
        bad = (~rows.isfinite().all(dim=1)).nonzero().flatten()
        if len(bad):
            raise ValueError(
                f"{len(bad)} rows have values that are NaN or infinite (first at positions "
                f"{bad[:8].tolist()}); fill them in or leave these rows out"
            )
        group, different = group_equal_rows(rows)
        value_scores = torch.zeros(rows.shape, device=rows.device)
        # 1)
        scaled, varying = standardise_columns(rows)
        if len(different) == 1 or not bool(varying.any()):
            return torch.zeros(len(rows), device=rows.device), value_scores
        # 2)
        view = scaled.float()
        distances, differences = self._compare(view, group, different, parts=parts)
        scores = [distances]
        if parts:
            value_scores[:, varying] = differences
        # 3)
        if scaled.shape[1] <= MAX_WHITENED_COLUMNS:
            view = whiten(scaled).float()
            scores.append(self._compare(view, group, different, parts=False)[0])
        # 4)
        return mean_in_medians(torch.stack(scores)), value_scores

    def _compare(
        self, view: Tensor, group: Tensor, different: Tensor, *, parts: bool
    ) -> tuple[Tensor, Tensor]:
        """Compare rows (N, C) with the nearest of a few others.

        Returns:
            The mean distance, (N,), and with ``parts`` the mean difference by column, (N, C).
        """
        size = min(self.size, max(1, len(different) // 2))
        generator = torch.Generator().manual_seed(self.seed)
        totals = torch.zeros(len(view), dtype=torch.float64, device=view.device)
        differences = torch.zeros_like(view) if parts else view.new_zeros(0)
        seen = torch.zeros_like(totals)
        draws = 0
        # Draw on until every row was compared with at least one other.
        while draws < self.draws or not bool((seen > 0).all()):
            chosen = torch.randperm(len(different), generator=generator)[:size].to(view.device)
            others = view[different[chosen]]
            distances = torch.cdist(view, others, compute_mode="donot_use_mm_for_euclid_dist")
            distances.masked_fill_(group.unsqueeze(1) == chosen, torch.inf)
            nearest = distances.min(dim=1)
            met = nearest.values.isfinite()
            totals += nearest.values.where(met, 0)
            if parts:
                differences += (view - others[nearest.indices]).abs_() * met.unsqueeze(1)
            seen += met
            draws += 1
        if parts:
            differences /= seen.unsqueeze(1).float()
        return (totals / seen).float(), differences


def mean_in_medians(scores: Tensor) -> Tensor:
    """Mean of several scores of the same samples, each divided by its median.

    Args:
        scores: Anomaly scores >= 0, shape (S, N). Scores whose median is 0 aren't divided.

    Returns:
        Shape (N,).

    Example:
        >>> mean_in_medians(torch.tensor([[1.0, 2.0, 3.0], [10.0, 10.0, 40.0]]))
        tensor([0.7500, 1.0000, 2.7500])
    """
    typical = scores.median(dim=1, keepdim=True).values
    mean: Tensor = (scores / typical.where(typical > 0, 1)).mean(dim=0)
    return mean


def group_equal_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Number the groups of equal rows.

    Args:
        rows: Shape (N, C).

    Returns:
        The number of each row's group, shape (N,), counted in the order of their first rows; and
        the positions of these first rows, shape (G,).

    Example:
        >>> group_equal_rows(torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0]]))
        (tensor([0, 1, 0]), tensor([0, 1]))
    """
    return _group_by(_random_sums(rows))


def _random_sums(rows: Tensor) -> Tensor:
    """Two random weighted sums of each row in double precision, (N, C) -> (N, 2).

    They are equal for equal rows, and in practice only for these.
    """
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2, rows.shape[1], dtype=torch.float64, generator=generator)
    weights = weights.to(rows.device)
    chunk = max(1, _CHUNK_VALUES // (8 * max(1, rows.shape[1])))
    return torch.cat(
        [
            torch.stack([(part.double() * w).sum(dim=1) for w in weights], dim=1)
            for part in torch.split(rows, chunk)
        ]
    )


def _group_by(sums: Tensor) -> tuple[Tensor, Tensor]:
    """What :func:`group_equal_rows` returns, from the random sums of the rows, (N, 2)."""
    group: Tensor = torch.unique(sums, dim=0, return_inverse=True)[1]
    positions = torch.arange(len(sums), device=sums.device)
    first = torch.full((int(group.max()) + 1,), len(sums), device=sums.device)
    first = first.scatter_reduce(0, group, positions, "amin")
    order = first.argsort()
    number = torch.empty_like(order)
    number[order] = torch.arange(len(order), device=sums.device)
    groups: Tensor = number[group]
    return groups, first[order]


def standardise_columns(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Bring columns to mean 0 and standard deviation 1, and cut them at 20 of these.

    Args:
        rows: Shape (N, C).

    Returns:
        The columns that vary, in double precision, shape (N, V), and which these are, shape (C,).
    """
    rows = rows.double()
    # Squares of values beyond 1e154 overflow. Powers of 2 change no digit.
    exponent = torch.frexp(rows.abs().amax(dim=0)).exponent.clamp(-1000, 1000)
    rows = rows * torch.full_like(rows[0], 2).pow(-exponent)
    deviation, mean = torch.std_mean(rows, dim=0, correction=0)
    varying = deviation > 1e-9 * mean.abs()
    return ((rows - mean) / deviation)[:, varying].clamp(-20, 20), varying


def whiten(rows: Tensor) -> Tensor:
    """Whiten centred rows: each direction is divided by sqrt(variance + mean variance).

    Args:
        rows: Shape (N, C).

    Returns:
        Shape (N, C).
    """
    variances, directions = torch.linalg.eigh(rows.T @ rows / len(rows))
    variances = variances.clamp_min(0)
    projected: Tensor = rows @ directions
    whitened: Tensor = projected / (variances + variances.mean()).sqrt()
    return whitened
