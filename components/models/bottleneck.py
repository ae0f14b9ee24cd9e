"""Bottlenecks of an autoencoder: a Gaussian, relaxed codes, rounded scalars, or nearest codes.

Sources: Kingma & Welling 2014, "Auto-Encoding Variational Bayes", section 3 and appendix B; Ramesh et al. 2021,
"Zero-Shot Text-to-Image Generation", section 2.1; Mentzer et al. 2023, "Finite Scalar Quantization: VQ-VAE Made
Simple", section 3. Nearest codes, moved by averages or by gradient: van den Oord et al. 2017, "Neural Discrete
Representation Learning", equation 3 and appendix A.1 (EMA updates); Yu et al. 2022, "Vector-quantized Image Modeling
with Improved VQGAN", section 3.2 (l2-normalized short codes).

Shapes: B batch, C channels of the bottleneck (codebook_dim), h w latent grid, K codebook_size, N = B*h*w latents."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, distributed, nn

from components.models.devices import autocast, products, to_device


class Encoded(NamedTuple):
    """Result of a bottleneck for a batch: the decoder's input, losses, indices and latents."""

    z: Tensor  # (B, C, h, w)  what the decoder takes
    losses: dict[str, Tensor]  # name -> () fp32; the task knows their weights
    indices: Tensor | None = None  # (B, h, w)  int64 in [0, K); None for a Gaussian
    latents: Tensor | None = None  # (B*h*w, C) fp32, without gradient, for `EMAQuantizer`


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

    sharpness = 20.0  # of logits: the mean squared distance between two codes, in nats

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
        """Raises ValueError for no levels, or fewer than three of a channel: two have 0.2 % of a gradient."""
        super().__init__()
        if len(levels) == 0 or min(levels) < 3:
            raise ValueError(f"levels must be numbers of at least 3, one a channel, not {list(levels)}")
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


KMEANS_STEPS = 10


class VectorQuantizer(nn.Module):
    """Nearest-code lookup in a codebook of parameters, trained by `codebook_loss`.
    `codebook_loss` is equation 3 of van den Oord et al. Its weight is 1 and the weight of `commitment_loss` is lower:
    the published code of VQ-GAN has the two the other way round (taming-transformers #57)."""

    def __init__(
        self, *, codebook_size: int, codebook_dim: int, l2_normalize: bool = False, codebook_init: str = "uniform"
    ) -> None:
        """Codes start in U(-1/K, 1/K) as published, or as random directions with `l2_normalize`.
        With `codebook_init` "data" training first calls `start_at`."""
        super().__init__()
        self.codebook_size, self.codebook_init, self.l2_normalize = codebook_size, codebook_init, l2_normalize
        self.in_channels = self.channels = codebook_dim
        codebook = torch.empty(codebook_size, codebook_dim).uniform_(-1 / codebook_size, 1 / codebook_size)
        self.codebook = nn.Parameter(F.normalize(torch.randn_like(codebook), dim=-1) if l2_normalize else codebook)

    def forward(self, z_e: Tensor) -> Encoded:
        """Replace each latent of `z_e` (B, C, h, w) by the nearest code."""
        z = rearrange(z_e, "b c h w -> b h w c").float()
        z, codes = (F.normalize(x, dim=-1) if self.l2_normalize else x for x in (z, self.codebook.float()))
        indices = nearest_codes(z.detach(), codes.detach())  # (B, h, w)
        e = F.embedding(indices, codes)  # (B, h, w, C)
        losses = {"codebook_loss": F.mse_loss(e, z.detach()), "commitment_loss": F.mse_loss(z, e.detach())}
        return Encoded(z=_straight_through(e.detach(), z), losses=losses, indices=indices)

    @torch.no_grad()
    def start_at(self, centers: Tensor, *, project_in: nn.Conv2d) -> None:
        """Make codes of `centers` (K, D), features of which `project_in` (D -> C, 1 x 1) makes latents.
        Codes in U(-1/K, 1/K) are nearly equal: a few are nearest to all latents, and only those ever move."""
        codes = rearrange(project_in(centers[:, :, None, None]), "k c 1 1 -> k c")
        self.codebook.copy_(F.normalize(codes, dim=-1) if self.l2_normalize else codes)

    def lookup(self, indices: Tensor) -> Tensor:
        """Codes of `indices` (B, h, w): (B, C, h, w)."""
        codes = F.normalize(self.codebook, dim=-1) if self.l2_normalize else self.codebook
        return rearrange(F.embedding(indices, codes), "b h w c -> b c h w").contiguous()


class EMAQuantizer(nn.Module):
    """Nearest-code lookup in a codebook without gradient, moved by averages of the codes' latents.
    It moves only in `update_codebook`, once after each optimizer step. Its whole state is in buffers and its randomness
    comes from the caller's generator, so a resumed run repeats itself bit for bit."""

    codebook: Tensor  # (K, C)
    ema_count: Tensor  # (K,)
    ema_sum: Tensor  # (K, C)
    initialized: Tensor  # ()  bool

    def __init__(
        self,
        *,
        codebook_size: int,
        codebook_dim: int,
        codebook_decay: float = 0.99,
        dead_code_threshold: float = 0.25,
        l2_normalize: bool = True,
        codebook_init: str = "data",
    ) -> None:
        """`dead_code_threshold` is a share of the mean EMA count.
        It depends on neither the batch size nor the number of ranks. The first update takes some of its latents as
        codes with `codebook_init` "data", their clusters with "kmeans"."""
        super().__init__()
        self.codebook_size, self.codebook_init, self.l2_normalize = codebook_size, codebook_init, l2_normalize
        self.codebook_decay, self.dead_code_threshold = codebook_decay, dead_code_threshold
        self.in_channels = self.channels = codebook_dim
        codebook = self._normalize(torch.randn(codebook_size, codebook_dim))
        self.register_buffer("codebook", codebook)
        self.register_buffer("ema_count", torch.ones(codebook_size))
        self.register_buffer("ema_sum", codebook.clone())
        self.register_buffer("initialized", torch.tensor(False))
        self.has_started = False  # what the host knows of `initialized`

    def forward(self, z_e: Tensor) -> Encoded:
        """Replace each latent of `z_e` (B, C, h, w) by the nearest code."""
        z = self._normalize(rearrange(z_e, "b c h w -> b h w c").float())  # (B, h, w, C)
        indices = nearest_codes(z.detach(), self.codebook)  # (B, h, w)
        e = self.codebook[indices].detach()  # (B, h, w, C)
        return Encoded(
            z=_straight_through(e, z),
            losses={"commitment_loss": F.mse_loss(z, e)},
            indices=indices,
            latents=rearrange(z.detach(), "b h w c -> (b h w) c"),
        )

    def lookup(self, indices: Tensor) -> Tensor:
        """Codes of `indices` (B, h, w): (B, C, h, w)."""
        return rearrange(self.codebook[indices], "b h w c -> b c h w").contiguous()

    @torch.no_grad()
    def update_codebook(
        self, latents: Tensor, *, indices: Tensor, generator: torch.Generator, taken: Tensor | None = None
    ) -> Tensor:
        """Move the codebook by an EMA step over the latents of all ranks; restart dead codes at latents.
        The first call takes every code for dead: that is the initialization from data. Sums are in fp64 and rounded
        once, so that neither the split over ranks nor the order of additions shows. `latents` (N, C) fp32 and N
        `indices` (B, ...) are those of an `Encoded`, the same N on every rank; the CPU generator is in the same state
        on every rank. Where `taken` () bool is false nothing moves. Returns the number of codes that were
        restarted, () int64."""
        taken = torch.ones_like(self.initialized) if taken is None else taken
        totals = _totals_by_code(latents, indices.flatten(), codebook_size=self.codebook_size)
        if distributed.is_initialized():
            distributed.all_reduce(totals)
        counts, sums = totals[:, 0].float(), totals[:, 1:].float()
        ema_count = self.ema_count.lerp(counts, 1 - self.codebook_decay)
        ema_sum = self.ema_sum.lerp(sums, 1 - self.codebook_decay)
        eps, total = 1e-5, ema_count.sum()
        smoothed = (ema_count + eps) / (total + self.codebook_size * eps) * total  # by Laplace
        codebook = self._normalize(ema_sum / smoothed[:, None])
        dead = ~self.initialized | (ema_count < self.dead_code_threshold * ema_count.mean())
        cells, count = math.prod(indices.shape[1:]), counts.mean()
        chosen = self._restarts(dead, latents=latents, cells=cells, generator=generator)
        # Without the last line the old average would overwrite the new vector in the next step (espnet #6284).
        self.codebook.copy_(torch.where(taken, torch.where(dead[:, None], chosen, codebook), self.codebook))
        self.ema_count.copy_(torch.where(taken, torch.where(dead, count, ema_count), self.ema_count))
        self.ema_sum.copy_(torch.where(taken, torch.where(dead[:, None], chosen * count, ema_sum), self.ema_sum))
        self.initialized.logical_or_(taken)
        return (dead & taken).sum()

    def _normalize(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1) if self.l2_normalize else vectors

    def _restarts(self, dead: Tensor, *, latents: Tensor, cells: int, generator: torch.Generator) -> Tensor:
        """New vectors (K, C) for the codes of `dead` (K,): latents in random order, or clusters of latents.
        Rows of other codes have no meaning. Of more dead codes than latents some restart as twins, of which argmin uses
        one and the other soon restarts again."""
        if self.codebook_init == "kmeans" and not self.has_started:
            self.has_started = bool(self.initialized)  # the device is asked until an update was taken
            if not self.has_started:
                pool = gather_over_ranks(latents, cells=cells)  # (N * world_size, C), the same on every rank
                return self._cluster(pool, centers=draw_latents(pool, len(dead), generator=generator))
        total = len(latents) * (distributed.get_world_size() if distributed.is_initialized() else 1)
        if total == 0:
            return self.codebook
        order = to_device(torch.randperm(total, generator=generator), latents.device)
        return rows_of_ranks(latents, order[(dead.cumsum(0) - 1) % total], cells=cells)

    def _cluster(self, points: Tensor, *, centers: Tensor) -> Tensor:
        """k-means of `points` (P, C) from `centers` (K, C): (K, C). A center without nearest points stays.
        Every rank has all points and takes the same steps; rank 0 speaks for all where a device adds in any order."""
        for _ in range(KMEANS_STEPS):
            totals = _totals_by_code(points, nearest_codes(points, centers), codebook_size=len(centers))
            means = self._normalize((totals[:, 1:] / totals[:, :1].clamp(min=1)).to(centers.dtype))
            centers = torch.where(totals[:, :1] > 0, means, centers)
        if distributed.is_initialized():
            distributed.broadcast(centers, src=0)
        return centers


def nearest_codes(z: Tensor, codebook: Tensor) -> Tensor:
    """argmin_k ||z - e_k||^2 for z (..., C) and codes (K, C): (...) int64, any of equal codes.
    In fp32 under autocast too, and without TF32; ||z||^2 is the same for every code and left out."""
    with autocast(z.device, enabled=False), products("fp32"):
        flat = z.reshape(-1, z.shape[-1])
        distances = torch.addmm(codebook.square().sum(dim=1), flat, codebook.T, alpha=-2)  # (N, K)
    return distances.argmin(dim=1).view(z.shape[:-1])


def _straight_through(e: Tensor, z: Tensor) -> Tensor:
    """Value of the codes e, gradient to z; both (B, h, w, C) -> (B, C, h, w).
    e + (z - sg[z]) and not z + sg[e - z]: the value is then exactly the code, so that detokenize equals forward.
    Contiguous: the decoder's own weights then decide on its memory format."""
    return rearrange(e + (z - z.detach()), "b h w c -> b c h w").contiguous()


def _totals_by_code(latents: Tensor, indices: Tensor, *, codebook_size: int) -> Tensor:
    """Count and sum of the latents (N, C) of each code, in fp64: (K, 1 + C)."""
    ones = torch.ones(len(latents), 1, dtype=torch.float64, device=latents.device)
    totals = torch.zeros(codebook_size, latents.shape[1] + 1, dtype=torch.float64, device=latents.device)
    return totals.index_add_(0, indices, torch.cat([ones, latents.double()], dim=1))


def gather_over_ranks(latents: Tensor, *, cells: int) -> Tensor:
    """Gather the latents (N, C) of all ranks in the order of the stream: (N * world_size, C).
    Each rank has every world_size-th sample, and N / `cells` of them, from its rank on."""
    if not distributed.is_initialized():
        return latents
    parts = [torch.empty_like(latents) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, latents.contiguous())
    return rearrange(torch.stack(parts), "rank (sample cell) c -> (sample rank cell) c", cell=cells)


def rows_of_ranks(latents: Tensor, places: Tensor, *, cells: int) -> Tensor:
    """Rows `places` (K,) of the latents of all ranks in the order of the stream, (K, C).
    Each rank gives its own and all are added, so that as much goes over the wire with many ranks as with two."""
    if not distributed.is_initialized():
        return latents[places]
    samples, ranks = places // cells, distributed.get_world_size()
    own = latents[samples // ranks * cells + places % cells]
    rows = torch.where((samples % ranks == distributed.get_rank())[:, None], own, 0.0)
    distributed.all_reduce(rows)
    return rows


def draw_latents(pool: Tensor, count: int, *, generator: torch.Generator) -> Tensor:
    """`count` latents of (N, C), each once before any comes twice: (count, C)."""
    order = torch.randperm(len(pool), generator=generator)[torch.arange(count) % len(pool)]
    return pool[to_device(order, pool.device)]


def codebook_histogram(indices: Tensor, *, codebook_size: int) -> Tensor:
    """Count of each code in `indices` (any shape), to be added up over an epoch and ranks: (K,) int64."""
    return torch.bincount(indices.flatten(), minlength=codebook_size)


def codebook_usage(histogram: Tensor) -> Tensor:
    """Share of distinct codes in use, () in [0, 1], from a histogram (K,) of a whole epoch."""
    return (histogram > 0).double().mean()


def codebook_perplexity(histogram: Tensor) -> Tensor:
    """Perplexity exp(-sum p log p), () in [1, K], from a histogram (K,) of an epoch; a batch's is too low."""
    p = histogram.double() / histogram.sum()
    return torch.special.entr(p).sum().exp()
