"""A first guess at the bad training samples from frozen features, before any training."""

import math

import torch
from torch import Tensor

_CHUNK_VALUES = 2**25


class MemoryScorer:
    """Anomaly scores of the training set by distance to what other training samples look like.

    A sample's patches are compared with a memory: all patches of a random share of the *other*
    samples. A patch's distance is that to its nearest neighbour in the memory, a sample's the mean
    of its highest, averaged over several memories. No memory holds the scored sample, so none
    explains itself away; a bad sample needs another one like it in most memories to look normal.

    A rare variant of the product is far from most memories too, but in all of its patches, where a
    defect shows in some. So distances are divided by m + scale * M: m is the upper quartile
    over the sample's own patches, M the median of m over samples. What counts is how far a sample's
    strange patches stand out from its others.

    Use the scores as the ``prior`` of a :class:`~comet_meta.SoftConfidentWeighter`. A few dozen
    patches a sample are enough: average finer ones first.

    Args:
        draws: Memories. More of them lower the variance of the scores; time grows alike.
        share: Share of the samples in each memory, in (0, 1). Small memories miss rare normal
            variants, large ones hold more bad samples.
        top: Patch distances that are averaged, >= 1; all where a sample has fewer.
        scale: How much a sample's distances are measured by those usual in the set, and not by its
            own, > 0. ``math.inf``: by the former alone. That finds a little more in folders of one
            product, but takes a variant of less than a third of the samples for bad. Of no effect
            with one patch a sample.
        max_patches: Most patches in a memory; a random choice of them where there are more. Bounds
            the time, which is draws * N * P * max_patches * C multiplications at the most.
        seed: Of the random choices.

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
        share: float = 0.25,
        top: int = 5,
        scale: float = 1.5,
        max_patches: int = 8192,
        seed: int = 0,
    ) -> None:
        for name, value in (("draws", draws), ("top", top), ("max_patches", max_patches)):
            if value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1")
        if not 0 < share < 1:
            raise ValueError(f"share is {share}; expected one in (0, 1)")
        if not scale > 0:
            raise ValueError(f"scale is {scale}; expected a factor > 0, or math.inf")
        self.draws = draws
        self.share = share
        self.top = top
        self.scale = scale
        self.max_patches = max_patches
        self.seed = seed

    @torch.no_grad()
    def __call__(self, features: Tensor) -> Tensor:
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
        if not features.is_floating_point():
            raise TypeError(f"features is {features.dtype}; expected a floating-point tensor")
        if features.dim() == 2:
            features = features.unsqueeze(1)
        if features.dim() != 3 or len(features) < 2:
            raise ValueError(
                f"features has shape {tuple(features.shape)}; expected (N, P, C) or (N, C), N >= 2"
            )
        count = len(features)
        size = min(max(1, round(self.share * count)), count - 1)
        # On the CPU, so that every device makes the same choices.
        generator = torch.Generator().manual_seed(self.seed)
        totals = torch.zeros(count, device=features.device)
        seen = torch.zeros(count, device=features.device)
        draws = 0
        # Further draws until every sample has been outside of a memory.
        while draws < self.draws or not bool((seen > 0).all()):
            order = torch.randperm(count, generator=generator).to(features.device)
            inside, outside = order[:size], order[size:]
            memory = features[inside].flatten(0, 1).float()
            if len(memory) > self.max_patches:
                kept = torch.randperm(len(memory), generator=generator)[: self.max_patches]
                memory = memory[kept.to(memory.device)]
            totals[outside] += self._scores(features, outside, memory)
            seen[outside] += 1
            draws += 1
        scores = totals / seen
        if not bool(torch.isfinite(scores).all()):
            bad = (~torch.isfinite(features)).flatten(1).any(dim=1).nonzero().flatten()
            raise ValueError(
                f"features of {len(bad)} samples are NaN or infinite (first at positions "
                f"{bad[:8].tolist()}); expected finite features"
            )
        return scores

    def _scores(self, features: Tensor, rows: Tensor, memory: Tensor) -> Tensor:
        """Scores of some samples against a memory (M, C), in chunks of bounded size."""
        patches = features.shape[1]
        chunk = max(1, _CHUNK_VALUES // (patches * len(memory)))
        distances = torch.cat(
            [
                self._nearest(features[part].flatten(0, 1).float(), memory).reshape(-1, patches)
                for part in torch.split(rows, chunk)
            ]
        )
        highest = distances.topk(min(self.top, patches), dim=1).values.mean(dim=1)
        if patches == 1:
            return highest
        own = distances.kthvalue(max(1, 3 * patches // 4), dim=1).values
        usual = own.median()
        usual = usual.where(usual > 0, 1)  # copies of each other
        if math.isinf(self.scale):
            return highest / usual
        return highest * (1 + self.scale) / (own + self.scale * usual)

    @staticmethod
    def _nearest(queries: Tensor, memory: Tensor) -> Tensor:
        """Euclidean distance of each query (Q, C) to the nearest entry of the memory, (Q,)."""
        # |q - m|^2 = |q|^2 + |m|^2 - 2 q m, so that the work is one matrix product.
        cross = torch.addmm(memory.square().sum(dim=1), queries, memory.T, alpha=-2)
        squared = cross.amin(dim=1) + queries.square().sum(dim=1)
        return squared.clamp_min(0).sqrt()
