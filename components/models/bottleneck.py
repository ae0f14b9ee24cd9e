"""Bottlenecks between encoder and decoder: a Gaussian, relaxed categorical codes, or rounded scalars.

Sources: Kingma & Welling 2014, "Auto-Encoding Variational Bayes", section 3 and appendix B; Ramesh et al. 2021,
"Zero-Shot Text-to-Image Generation", section 2.1; Mentzer et al. 2023, "Finite Scalar Quantization: VQ-VAE Made
Simple", section 3. Nearest-code lookups are in `quantizer.py`.

Shapes: B batch, C channels of the bottleneck, h w latent grid, K codebook_size."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class Encoded(NamedTuple):
    """Result of a bottleneck for a batch: the decoder's input, losses, indices and latents."""

    z: Tensor  # (B, C, h, w)  what the decoder takes
    losses: dict[str, Tensor]  # name -> () fp32; the task knows their weights
    indices: Tensor | None = None  # (B, h, w)  int64 in [0, K); None for a Gaussian
    latents: Tensor | None = None  # (B*h*w, C)  fp32, without gradient: what `EMAQuantizer.update_codebook` averages


class GaussianBottleneck(nn.Module):
    """A diagonal Gaussian for each position: mean and log-variance (B, 2C, h, w) -> a sample (B, C, h, w).
    `kl_loss` is KL(q(z|x) || N(0, I)) in nats an image: 1/2 sum(mean^2 + s^2 - 1 - log s^2)."""

    def __init__(self, *, channels: int) -> None:
        super().__init__()
        self.in_channels, self.channels = 2 * channels, channels

    def forward(self, moments: Tensor, *, noise: Tensor | None = None) -> Encoded:
        """Sample with `noise`, N(0, I) of shape (B, C, h, w); without noise z is the mean."""
        mean, log_variance = moments.float().chunk(2, dim=1)
        log_variance = log_variance.clamp(-30, 20)  # as published with LDM: exp stays finite
        z = mean if noise is None else mean + (0.5 * log_variance).exp() * noise
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
        return Encoded(z=z, losses={"kl_loss": kl.sum(dim=(1, 2, 3)).mean()})


class GumbelQuantizer(nn.Module):
    """A relaxed categorical over K codes for each position: logits (B, K, h, w) -> z (B, C, h, w).
    `kl_loss` is KL(q(code|x) || uniform) in nats an image: sum over positions of sum_k q_k (log q_k + log K)."""

    sharpness = 20.0  # of logits that start as distances: the mean squared distance between two codes, in nats

    def __init__(self, *, codebook_size: int, codebook_dim: int, codebook_init: str = "data") -> None:
        """Codes start at random; with `codebook_init` "data" training first calls `start_at`."""
        super().__init__()
        self.codebook_size = self.in_channels = codebook_size
        self.channels, self.codebook_init = codebook_dim, codebook_init
        self.codebook = nn.Parameter(torch.randn(codebook_size, codebook_dim))  # (K, C)

    def forward(self, logits: Tensor, *, noise: Tensor | None = None, temperature: float = 1.0) -> Encoded:
        """z = softmax((logits + noise) / temperature) @ codebook, with Gumbel noise (B, K, h, w).
        Without noise z is the code of the largest logit, as for tokens; no gradient reaches the logits through it."""
        logits = logits.float()
        indices = logits.argmax(dim=1)
        if noise is None:
            z = self.lookup(indices)
        else:
            weights = ((logits + noise) / temperature).softmax(dim=1)
            z = torch.einsum("b k h w, k c -> b c h w", weights, self.codebook.float()).contiguous()
        log_q = logits.log_softmax(dim=1)
        kl = (log_q.exp() * (log_q + math.log(self.codebook_size))).sum(dim=(1, 2, 3))
        return Encoded(z=z, losses={"kl_loss": kl.mean()}, indices=indices)

    @torch.no_grad()
    def start_at(self, centers: Tensor, *, project_in: nn.Conv2d) -> None:
        """Make the codes of `centers` (K, C), and `project_in` (C -> K, 1 x 1) to match.
        logit_k = -beta ||f - c_k||^2, of which a softmax does not see the part beta ||f||^2, so that it is linear in f:
        the relaxation starts as soft vector quantization. From random logits most codes are never used again."""
        mean = centers.mean(dim=0)
        codes = centers - mean
        beta = self.sharpness / torch.cdist(codes, codes).square().mean()
        project_in.weight.copy_(2 * beta * codes[:, :, None, None])
        assert project_in.bias is not None
        project_in.bias.copy_(-beta * codes.square().sum(dim=1) - 2 * beta * codes @ mean)
        self.codebook.copy_(codes / codes.square().mean().sqrt())

    def lookup(self, indices: Tensor) -> Tensor:
        """Codes of `indices` (B, h, w): (B, C, h, w)."""
        return rearrange(F.embedding(indices, self.codebook), "b h w c -> b c h w").contiguous()


class ScalarQuantizer(nn.Module):
    """Finite scalar quantization: each channel is bounded and rounded to `levels[c]` values in [-1, 1].
    There is no codebook to learn and no loss; K is the product of the levels. Index i has the digits i % levels[0],
    then i // levels[0] % levels[1] and so on, one a channel."""

    levels: Tensor  # (C,) int64
    basis: Tensor  # (C,) int64, products of the levels before

    def __init__(self, *, levels: Sequence[int]) -> None:
        """Raises ValueError for no levels, or fewer than two of a channel."""
        super().__init__()
        if len(levels) == 0 or min(levels) < 2:
            raise ValueError(f"levels must be numbers of at least 2, one a channel, not {list(levels)}")
        self.codebook_size = math.prod(levels)
        self.in_channels = self.channels = len(levels)
        basis = [math.prod(levels[:channel]) for channel in range(len(levels))]
        self.register_buffer("levels", torch.tensor(list(levels)), persistent=False)
        self.register_buffer("basis", torch.tensor(basis), persistent=False)

    def forward(self, z_e: Tensor) -> Encoded:
        """Round `z_e` (B, C, h, w), straight-through: the code's value, the gradient of the bound.
        The bound has as many integers in each channel as the channel has levels. An even number of levels is off center
        by half a step; the shift keeps zero at zero."""
        reach = (self.levels - 1) * (1 + 1e-3) / 2
        offset = (self.levels % 2 == 0) * 0.5
        z = rearrange(z_e, "b c h w -> b h w c").float()
        bounded = (z + (offset / reach).atanh()).tanh() * reach - offset
        half = self.levels // 2
        rounded = bounded.detach().round()
        digits = rounded.long() + half
        z = rearrange((rounded + (bounded - bounded.detach())) / half, "b h w c -> b c h w").contiguous()
        return Encoded(z=z, losses={}, indices=(digits * self.basis).sum(dim=-1))

    def lookup(self, indices: Tensor) -> Tensor:
        """Codes of `indices` (B, h, w): (B, C, h, w) in [-1, 1]."""
        half = self.levels // 2
        digits = indices[..., None] // self.basis % self.levels
        return rearrange((digits - half) / half, "b h w c -> b c h w").contiguous()
