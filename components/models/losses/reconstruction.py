"""Reconstruction losses, the image in a decoder's output, and its similarity to the original.

    l1                    mean absolute difference, as in the published code of VQ-GAN (Esser et al. 2021)
    mse                   mean squared difference (van den Oord et al. 2017)
    logit_laplace         -log density in nats (Ramesh et al. 2021, appendix A.3)
    discretized_logistic  -log probability of 8-bit values in nats (Salimans et al. 2017, "PixelCNN++", equation 2, with
                          one component): the only kind that gives bits per dimension
    classes               binary cross-entropy in nats of the plane of each class, 1 where a pixel is of it, of maps of
                          classes (Esser et al. 2021, published code)

For figures there are PSNR and SSIM of levels, 0 to 255, in float64. A figure of a set is the mean of its images'
figures, as first stages are compared in papers. Blurred images may have the larger values: LPIPS stands beside them.

Shapes: B batch, H W pixels, O channels of the output: 3, 6 where a location has a log-scale, or the classes."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LOGIT_LAPLACE_EPS = 0.1
HALF_LEVEL = 1 / 255  # of 256 levels over [-1, 1]
MIN_LOG_SCALE = -7.0


def discretized_logistic_nll(output: Tensor, *, image: Tensor) -> Tensor:
    """-log P of each 8-bit value in nats, (B, 3, H, W) fp32, under a discretized logistic.
    P is the logistic's mass within half a level around the value. The two edges are open, so that the 256 probabilities
    sum to one. `output` (B, 6, H, W) holds means in [-1, 1] and log-scales, of which those below -7 count as -7;
    `image` is (B, 3, H, W) in [-1, 1], of 8 bits."""
    mean, log_scale = output.float().chunk(2, dim=1)
    log_scale = log_scale.clamp(min=MIN_LOG_SCALE)
    image = image.float()
    inverse_scale = (-log_scale).exp()
    above, below = ((image - mean + side) * inverse_scale for side in (HALF_LEVEL, -HALF_LEVEL))
    # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)): no difference of near numbers, no clamp
    up_to = F.logsigmoid(above)  # log P(at most the level), where below is minus infinity
    from_on = F.logsigmoid(-below)
    between = up_to + from_on + torch.log(-torch.expm1(-2 * HALF_LEVEL * inverse_scale))
    log_probability = torch.where(image < -0.999, up_to, torch.where(image > 0.999, from_on, between))
    return -log_probability


def logit_laplace_nll(output: Tensor, *, image: Tensor) -> Tensor:
    """-log f of each value in nats, (B, 3, H, W) fp32, of the density on (0, 1)

        log f(y) = -log(2b) - log(y (1 - y)) - |logit(y) - mu| / b,

    where y = (1 - 2 eps) x + eps and x is the image in [0, 1]. A density may exceed one, so nats may be negative.
    `output` (B, 6, H, W) holds mu and log b; `image` is (B, 3, H, W) in [-1, 1]."""
    mean, log_scale = output.float().chunk(2, dim=1)
    y = (1 - 2 * LOGIT_LAPLACE_EPS) * (image.float() + 1) / 2 + LOGIT_LAPLACE_EPS
    distance = (y.logit() - mean).abs() * (-log_scale).exp()
    return math.log(2) + log_scale + (y * (1 - y)).log() + distance


LIKELIHOODS = {"logit_laplace": logit_laplace_nll, "discretized_logistic": discretized_logistic_nll}
KINDS = ("l1", "mse", "classes", *LIKELIHOODS)


def reconstruction_loss(output: Tensor, *, image: Tensor, kind: str = "l1") -> Tensor:
    """Mean loss of the decoder's output (B, O, H, W) for images (B, 3, H, W) in [-1, 1], () in fp32.
    `classes`: for planes (B, O, H, W), each 1 where a pixel is of the class and 0 elsewhere."""
    if kind == "classes":
        return F.binary_cross_entropy_with_logits(output.float(), image.float())
    if kind in LIKELIHOODS:
        return LIKELIHOODS[kind](output, image=image).mean()
    difference = F.mse_loss if kind == "mse" else F.l1_loss
    return difference(output.float(), image.float())


def output_channels(*, kind: str, channels: int = 3) -> int:
    """Number O of the decoder's output channels, once or twice the image's; ValueError for unknown kinds."""
    if kind not in KINDS:
        raise ValueError(f"unknown reconstruction {kind!r}: choose {', '.join(KINDS)}")
    return 2 * channels if kind in LIKELIHOODS else channels


def image_of(output: Tensor, *, kind: str = "l1") -> Tensor:
    """Return the image (B, 3, H, W) in an output (B, O, H, W), near [-1, 1] and not clipped.
    `classes`: the gray (B, 1, H, W) of the likeliest of n classes, 255 v / (n - 1) in 8 bits for class v."""
    if kind == "classes":
        return (255 * output.argmax(dim=1, keepdim=True) / (output.shape[1] - 1)).round() / 127.5 - 1
    if kind not in LIKELIHOODS:
        return output
    mean = output.chunk(2, dim=1)[0]
    if kind == "discretized_logistic":
        return mean
    # The image at mu, by the sigmoid and the inverse map, in [-1.25, 1.25].
    return 2 * (mean.sigmoid() - LOGIT_LAPLACE_EPS) / (1 - 2 * LOGIT_LAPLACE_EPS) - 1


LEVELS = 255
ROUNDING = 1 / 12  # variance of rounding to 8 bits: no squared error is measured below
WINDOW, SIGMA = 11, 1.5  # pixels, of the paper's Gaussian
LIGHT, CONTRAST = (0.01 * LEVELS) ** 2, (0.03 * LEVELS) ** 2  # C1 and C2 of the paper


def psnr(levels: Tensor, original: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image (B, 3, H, W), (B,) in dB.
    A mean squared error below that of rounding counts as that of rounding: equal images have 58.9 dB, not infinity."""
    errors = (levels.double() - original.double()).square().mean(dim=(1, 2, 3))
    return 10 * (LEVELS**2 / errors.clamp(min=ROUNDING)).log10()


def ssim(levels: Tensor, original: Tensor) -> Tensor:
    """Structural similarity of each image (B, 3, H, W), (B,): the mean over places and channels.
    Wang et al., 2004, "Image Quality Assessment: From Error Visibility to Structural Similarity", equation 13, under a
    Gaussian window of 11 x 11 with sigma 1.5, wherever it lies inside the image. Raises ValueError for smaller
    images."""
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
