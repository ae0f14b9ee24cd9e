"""The codes of images as colors: what a tokenizer keeps of an image, to be looked at.

Shapes: N images, H W pixels, h w latent grid, K codes, C their components.
"""

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from components.models.autoencoder import Autoencoder
from components.sampling.images import from_uint8


@torch.inference_mode()
def index_grids(network: Autoencoder, images: np.ndarray) -> Tensor:
    """The codes of images (N, H, W, 3) uint8, each in its color: (N, 3, h, w) in [-1, 1].

    Raises ValueError for a network without codes.
    """
    device = next(network.parameters()).device
    indices = network.tokenize(from_uint8(images).to(device))  # (N, h, w)
    every = torch.arange(network.codebook_size, device=device)
    codes = network.lookup(every[:, None, None])[:, :, 0, 0]  # (K, C)
    return rearrange(code_colors(codes)[indices], "n h w c -> n c h w")


def code_colors(codes: Tensor) -> Tensor:
    """A color in [-1, 1] for each code, (K, C) -> (K, 3): near codes look alike.

    Red, green and blue are the first three principal components of the codes, each by its rank, so that a far code
    does not make all others alike. Where codes have fewer than three components, the other colors stay in the middle.
    Equal codes have one color, and count once: a product of equal rows may differ in its last bit.
    """
    distinct, number = codes.double().unique(dim=0, return_inverse=True)  # sorted: the order of codes does not show
    centered = distinct - distinct.mean(dim=0)
    _, lengths, directions = torch.linalg.svd(centered, full_matrices=False)
    directions = directions * directions.gather(1, directions.abs().argmax(dim=1, keepdim=True)).sign()  # SVD has none
    colors = torch.zeros(len(distinct), 3, dtype=torch.float64, device=codes.device)
    for channel, direction in enumerate(directions[: min(3, int((lengths > 1e-6 * lengths[:1]).sum()))]):
        place = (centered @ direction).unique(return_inverse=True)[1].double()
        colors[:, channel] = 2 * place / place.max().clamp(min=1) - 1
    return colors.float()[number]
