"""From the scores of patches to anomaly maps in the pictures' size."""

import math

import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf


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
        maps = tvf.gaussian_blur(maps, [2 * radius + 1] * 2, [blur_sigma] * 2)
    return maps.squeeze(1)
