"""Similarity of images to their originals, for figures: PSNR and SSIM, in float64.

Images are given in levels, 0 to 255, as the papers' constants are. A figure of a set is the mean of its images'
figures, as first stages are compared in papers; the peak signal-to-noise ratio of the mean squared error of all images
would be lower. Neither sees what eyes do: blurred images may have the larger values, and LPIPS stands beside them.

Shapes: B images, H W their pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 255
ROUNDING = 1 / 12  # variance of rounding to 8 bits: no squared error is measured below
WINDOW, SIGMA = 11, 1.5  # pixels, of the paper's Gaussian
LIGHT, CONTRAST = (0.01 * LEVELS) ** 2, (0.03 * LEVELS) ** 2  # C1 and C2 of the paper


def psnr(levels: Tensor, original: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image (B, 3, H, W), (B,) in dB.

    A mean squared error below that of rounding counts as that of rounding: equal images have 58.9 dB, not infinity.
    """
    errors = (levels.double() - original.double()).square().mean(dim=(1, 2, 3))
    return 10 * (LEVELS**2 / errors.clamp(min=ROUNDING)).log10()


def ssim(levels: Tensor, original: Tensor) -> Tensor:
    """Structural similarity of each image (B, 3, H, W), (B,): the mean over places and channels.

    Wang et al., 2004, "Image Quality Assessment: From Error Visibility to Structural Similarity", equation 13, under a
    Gaussian window of 11 x 11 with sigma 1.5, wherever it lies inside the image. Raises ValueError for smaller images.
    """
    if min(levels.shape[2:]) < WINDOW:
        raise ValueError(f"ssim needs images of at least {WINDOW} pixels a side, not {tuple(levels.shape[2:])}")
    x, y = levels.double(), original.double()
    # Variances and the covariance are means of products less products of means, under the same window.
    mean_x, mean_y, xx, yy, xy = (local_mean(each) for each in (x, y, x * x, y * y, x * y))
    closeness = (2 * mean_x * mean_y + LIGHT) * (2 * (xy - mean_x * mean_y) + CONTRAST)
    spread = (mean_x**2 + mean_y**2 + LIGHT) * (xx - mean_x**2 + yy - mean_y**2 + CONTRAST)
    return (closeness / spread).mean(dim=(1, 2, 3))


def local_mean(values: Tensor) -> Tensor:
    """Means of (B, 3, H, W) under the window, (B, 3, H - 10, W - 10)."""
    places = torch.arange(WINDOW, device=values.device, dtype=values.dtype) - WINDOW // 2
    weights = (-places.square() / (2 * SIGMA**2)).exp()
    row = (weights / weights.sum()).expand(3, 1, 1, -1)
    return F.conv2d(F.conv2d(values, row, groups=3), row.transpose(2, 3), groups=3)
