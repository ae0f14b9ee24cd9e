"""What an autoencoder keeps of pictures, and how it uses its codebook.

Shapes: N pictures, H W pixels, h w tokens, K codes.
"""

from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from components.configuration import Config
from components.models.autoencoder import Autoencoder
from components.models.quantizer import codebook_histogram, codebook_perplexity, codebook_usage

BATCH = 64


class CodebookUse(Config):
    """Over all tokens of a set at once: single batches would underestimate both numbers."""

    codebook_size: int  # K
    codebook_usage: float  # share of codes that occur at all, in [0, 1]
    codebook_perplexity: float  # exp of the entropy of their frequencies, in [1, K]
    dead_codes: int
    pictures: int


class Reconstruction(NamedTuple):
    pictures: np.ndarray  # (N, H, W, 3) uint8
    tokens: np.ndarray | None  # (N, h, w) int64; None where a Gaussian stands in place of codes


def codebook_use(tokens: np.ndarray, *, codebook_size: int) -> CodebookUse:
    """Use of the codebook by the tokens (N, ...) of a whole set."""
    histogram = codebook_histogram(torch.from_numpy(tokens), codebook_size=codebook_size)
    return CodebookUse(
        codebook_size=codebook_size,
        codebook_usage=float(codebook_usage(histogram)),
        codebook_perplexity=float(codebook_perplexity(histogram)),
        dead_codes=int((histogram == 0).sum()),
        pictures=len(tokens),
    )


@torch.inference_mode()
def reconstruct(autoencoder: Autoencoder, pictures: np.ndarray) -> Reconstruction:
    """Pictures (N, H, W, 3) uint8, of the autoencoder's resolution, through tokens or a Gaussian's mean and back."""
    tokens, made = [], []
    for start in range(0, len(pictures), BATCH):
        image = rearrange(torch.from_numpy(pictures[start : start + BATCH]), "n h w c -> n c h w").float() / 127.5 - 1
        encoded = autoencoder.encode(image)
        made.append(_to_uint8(autoencoder.decode(encoded.z)))
        if encoded.indices is not None:
            tokens.append(encoded.indices.numpy())
    return Reconstruction(np.concatenate(made), np.concatenate(tokens) if tokens else None)


def _to_uint8(image: Tensor) -> np.ndarray:
    levels = ((image.float() + 1) * 127.5).round().clamp(0, 255).byte()
    return rearrange(levels, "n c h w -> n h w c").numpy()
