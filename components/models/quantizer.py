"""Vector quantizer whose codebook is an exponential moving average of the latents that chose each code.

Sources: van den Oord et al. 2017, "Neural Discrete Representation Learning", equation 3 and appendix A.1 (EMA updates);
Yu et al. 2022, "Vector-quantized Image Modeling with Improved VQGAN", section 3.2 (l2-normalized short codes).

Shapes: B batch, D latent_channels, C codebook_dim, h w latent grid, K codebook_size, N = B*h*w latents.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, distributed, nn


class Quantized(NamedTuple):
    """What the quantizer makes of a batch."""

    z_q: Tensor  # (B, D, h, w)  straight-through: the value is the code's, the gradient is the encoder's
    indices: Tensor  # (B, h, w)  int64 in [0, K)
    commitment_loss: Tensor  # ()  fp32 ||z - sg[e]||^2, moves the encoder only
    latents: Tensor  # (N, C)  fp32, without gradient: what `update_codebook` averages


class EMAQuantizer(nn.Module):
    """Nearest-code lookup between two 1x1 projections; no gradient ever reaches the codebook.

    The codebook moves only in `update_codebook`, which the caller runs once after each optimizer step. Its whole state
    is in buffers and its randomness comes from the caller's generator, so a resumed run repeats itself bit for bit.
    """

    codebook: Tensor  # (K, C)
    ema_count: Tensor  # (K,)
    ema_sum: Tensor  # (K, C)
    initialized: Tensor  # ()  bool

    def __init__(
        self,
        *,
        latent_channels: int,
        codebook_size: int,
        codebook_dim: int,
        ema_decay: float = 0.99,
        dead_code_threshold: float = 0.25,
        l2_normalize: bool = True,
    ) -> None:
        """`dead_code_threshold` is a share of the mean EMA count: it needs no change with the batch size or ranks."""
        super().__init__()
        self.codebook_size = codebook_size
        self.ema_decay = ema_decay
        self.dead_code_threshold = dead_code_threshold
        self.l2_normalize = l2_normalize
        self.project_in = nn.Conv2d(latent_channels, codebook_dim, 1)
        self.project_out = nn.Conv2d(codebook_dim, latent_channels, 1)
        codebook = self._normalize(torch.randn(codebook_size, codebook_dim))
        self.register_buffer("codebook", codebook)
        self.register_buffer("ema_count", torch.ones(codebook_size))
        self.register_buffer("ema_sum", codebook.clone())
        self.register_buffer("initialized", torch.tensor(False))

    def forward(self, z_e: Tensor) -> Quantized:
        """Replace each latent of `z_e` (B, D, h, w) by its nearest code."""
        z = rearrange(self.project_in(z_e), "b c h w -> b h w c").float()  # (B, h, w, C)
        z = self._normalize(z)
        indices = self._nearest(z.detach())  # (B, h, w)
        e = self.codebook[indices].detach()  # (B, h, w, C)
        # e + (z - sg[z]) and not z + sg[e - z]: the value is then exactly the code, so that detokenize equals forward.
        return Quantized(
            z_q=self._to_decoder(e + (z - z.detach())),
            indices=indices,
            commitment_loss=F.mse_loss(z, e),
            latents=rearrange(z.detach(), "b h w c -> (b h w) c"),
        )

    def lookup(self, indices: Tensor) -> Tensor:
        """Codes of `indices` (B, h, w) as the decoder wants them: (B, D, h, w)."""
        return self._to_decoder(self.codebook[indices])

    @torch.no_grad()
    def update_codebook(self, latents: Tensor, *, indices: Tensor, generator: torch.Generator) -> Tensor:
        """One EMA step of the codebook over the latents of all ranks; dead codes restart at latents of this batch.

        The first call takes every code for dead: that is the initialization from data.

        Args:
            latents: (N, C) fp32, `Quantized.latents`; the same N on every rank. Micro-batches are concatenated.
            indices: N integers in any shape, `Quantized.indices` of the same latents.
            generator: CPU generator in the same state on every rank, derived from (seed, step).

        Returns:
            () int64, the number of codes that were restarted.
        """
        counts, sums = self._sum_over_ranks(latents, indices.flatten())
        if self.initialized:
            self.ema_count.lerp_(counts, 1 - self.ema_decay)
            self.ema_sum.lerp_(sums, 1 - self.ema_decay)
            self.codebook.copy_(self._normalize(self.ema_sum / self._smoothed_count()))
            dead = self.ema_count < self.dead_code_threshold * self.ema_count.mean()
        else:
            dead = torch.ones_like(self.ema_count, dtype=torch.bool)
            self.initialized.fill_(True)
        self._restart(dead, latents=latents, count=counts.mean(), generator=generator)
        return dead.sum()

    def _to_decoder(self, codes: Tensor) -> Tensor:
        """(B, h, w, C) -> (B, D, h, w), contiguous: the decoder's own weights then decide on its memory format."""
        return self.project_out(rearrange(codes, "b h w c -> b c h w").contiguous())

    def _normalize(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1) if self.l2_normalize else vectors

    def _nearest(self, z: Tensor) -> Tensor:
        """argmin ||z - e||^2; ||z||^2 is the same for every code and left out. fp32 also under autocast."""
        with torch.autocast(z.device.type, enabled=False):
            flat = rearrange(z, "b h w c -> (b h w) c")
            distances = torch.addmm(self.codebook.square().sum(dim=1), flat, self.codebook.T, alpha=-2)  # (N, K)
        return distances.argmin(dim=1).view(z.shape[:-1])

    def _smoothed_count(self) -> Tensor:
        """Laplace smoothing (N + eps) / (sum N + K eps) * sum N, as a column (K, 1)."""
        eps, total = 1e-5, self.ema_count.sum()
        return ((self.ema_count + eps) / (total + self.codebook_size * eps) * total)[:, None]

    def _sum_over_ranks(self, latents: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Count and sum of the latents of each code, over all ranks: (K,), (K, C).

        Summed in fp64 and rounded once, so that neither the split over ranks nor the order of additions shows.
        """
        ones = torch.ones(len(latents), 1, dtype=torch.float64, device=latents.device)
        totals = torch.zeros(self.codebook_size, latents.shape[1] + 1, dtype=torch.float64, device=latents.device)
        totals.index_add_(0, indices, torch.cat([ones, latents.double()], dim=1))
        if distributed.is_initialized():
            distributed.all_reduce(totals)
        return totals[:, 0].float(), totals[:, 1:].float()

    def _restart(self, dead: Tensor, *, latents: Tensor, count: Tensor, generator: torch.Generator) -> None:
        """Move the codes of `dead` (K,) onto latents of the batch, and their EMA state with them.

        Without the second half the old average would overwrite the new vector in the next step (espnet #6284).
        """
        num_dead = int(dead.sum())
        if num_dead == 0:
            return
        pool = _gather_over_ranks(latents)  # (N * world_size, C), the same on every rank
        # More codes than latents: some restart as twins, of which argmin uses one and the other soon restarts again.
        order = torch.randperm(len(pool), generator=generator)[torch.arange(num_dead) % len(pool)]
        chosen = pool[order.to(pool.device)]
        self.codebook[dead] = chosen
        self.ema_count[dead] = count
        self.ema_sum[dead] = chosen * count


def _gather_over_ranks(latents: Tensor) -> Tensor:
    if not distributed.is_initialized():
        return latents
    parts = [torch.empty_like(latents) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, latents.contiguous())
    return torch.cat(parts)


def codebook_histogram(indices: Tensor, *, codebook_size: int) -> Tensor:
    """How often each code occurs in `indices` (any shape): (K,) int64. Add them up over an epoch and over ranks."""
    return torch.bincount(indices.flatten(), minlength=codebook_size)


def codebook_usage(histogram: Tensor) -> Tensor:
    """Share of distinct codes in use, () in [0, 1], from a histogram (K,) of a whole epoch."""
    return (histogram > 0).double().mean()


def codebook_perplexity(histogram: Tensor) -> Tensor:
    """exp(-sum p log p), () in [1, K], from a histogram (K,) of a whole epoch: one batch alone underestimates it."""
    p = histogram.double() / histogram.sum()
    return torch.special.entr(p).sum().exp()
