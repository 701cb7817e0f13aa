"""From the scores of patches to those of pictures and to anomaly maps."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf


def image_scores(patch_scores: Tensor, top: int) -> Tensor:
    """Anomaly scores of pictures: the mean of their highest patch scores.

    Args:
        patch_scores: Shape (B, h, w).
        top: How many, >= 1; 1 is the maximum, as in the papers. All where there are fewer.

    Returns:
        Scores, shape (B,).
    """
    patches = patch_scores.flatten(1)
    return patches.topk(min(top, patches.shape[1]), dim=1).values.mean(dim=1)


def at_grid(part_weights: Tensor, grid: Sequence[int]) -> Tensor:
    """Weights of patches on the grid of a detector's losses.

    Args:
        part_weights: Shape (B, rows, columns), in [0, 1].
        grid: Height h and width w, in positions.

    Returns:
        Weights, shape (B, h, w); each position has that of the patch in which its centre lies.
    """
    return F.interpolate(part_weights.unsqueeze(1), size=tuple(grid), mode="nearest-exact").squeeze(
        1
    )


def on_finest_grid(levels: Sequence[Tensor]) -> Tensor:
    """Scores of several levels, resized bilinearly to the grid of the first.

    Args:
        levels: Shape (B, h, w) each, finest first.

    Returns:
        Shape (B, levels, h, w).
    """
    grid = levels[0].shape[-2:]
    return torch.cat(
        [F.interpolate(x.unsqueeze(1), size=grid, mode="bilinear") for x in levels], dim=1
    )


def smooth_maps(patch_scores: Tensor, size: tuple[int, int], blur_sigma: float) -> Tensor:
    """Resize the patches' scores bilinearly and smooth them.

    Args:
        patch_scores: Shape (B, h, w).
        size: Height and width of the maps, in pixels.
        blur_sigma: Standard deviation of the Gaussian, in pixels; 0 for none.

    Returns:
        Maps, shape (B, H, W).
    """
    maps = F.interpolate(patch_scores.unsqueeze(1), size=size, mode="bilinear")
    if blur_sigma > 0:
        # Four standard deviations either way, as scipy.ndimage.gaussian_filter does.
        radius = min(math.ceil(4 * blur_sigma), *(side - 1 for side in size))
        size_1d = 2 * radius + 1
        # One axis after the other is the same and takes a sixteenth of the time.
        for kernel in ([size_1d, 1], [1, size_1d]):
            maps = tvf.gaussian_blur(maps, kernel, [blur_sigma] * 2)
    return maps.squeeze(1)
