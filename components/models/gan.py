"""Class-conditional residual GAN: generator and projection discriminator under spectral norm.

The blocks are those of BigGAN (Brock et al. 2019, "Large Scale GAN Training for High Fidelity Natural Image Synthesis",
appendix B); gains and biases belong to the class (Miyato & Koyama 2018, "cGANs with Projection Discriminator"); every
convolution, linear map and table has spectral norm 1 (Miyato et al. 2018, "Spectral Normalization for Generative
Adversarial Networks"), but for those inside attention and the gains and biases of the norms.

Shapes: B batch, Z noise_dim, C channels of a level, H W pixels of a level, N batches or ranks."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, distributed, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import ParametrizationList

from components.models.devices import autocast
from components.models.layers import NetworkBlock, SelfAttention2d

Layer = TypeVar("Layer", nn.Conv2d, nn.Linear, nn.Embedding)
POWER_ITERATIONS = 15  # from the singular vectors of the trained weights to those of their average
FOLDS = {  # which rows of a 3 x 3 kernel each row of the 4 x 4 kernel adds up
    "up": [[0.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]],
    "down": [[0.5, 0.0, 0.0], [0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 0.5]],
}


class NormedConv2d(nn.Conv2d):
    """Size-preserving convolution; the kernel as a (C_out, C_in k k) matrix has spectral norm 1.
    With `resample` it is one of 3 x 3 after nearest neighbor, (B, C_in, H, W) -> (B, C_out, 2H, 2W), or before the mean
    of 2 x 2 pixels, (B, C_in, H, W) -> (B, C_out, H/2, W/2): "up" is one transposed convolution with a 4 x 4 kernel of
    sums, as `autoencoder.Upsample`, "down" one of stride 2. The norm is that of the 3 x 3 kernel."""

    fold: Tensor  # (4, 3)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        bias: bool = True,
        resample: Literal["up", "down"] | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias)
        self.resample = resample
        normed(self)
        if resample is not None:
            self.register_buffer("fold", torch.tensor(FOLDS[resample]), persistent=False)

    def forward(self, input: Tensor) -> Tensor:  # (B, C_in, H, W) -> (B, C_out, H, W)
        weight = weight_of(self, input)
        if self.resample == "up":
            kernel = torch.einsum("ta,sb,oiab->iots", self.fold, self.fold, weight)
            return F.conv_transpose2d(input, kernel, self.bias, stride=2, padding=1)
        if self.resample == "down":
            kernel = torch.einsum("ta,sb,oiab->oits", self.fold, self.fold, weight)
            return F.conv2d(input, kernel, self.bias, stride=2, padding=1)
        return self._conv_forward(input, weight, self.bias)


def normed(layer: Layer) -> Layer:
    """Initialize orthogonally (Brock et al., 2019) and add torch's spectral norm.
    The norm takes a single power iteration in each training forward."""
    nn.init.orthogonal_(layer.weight)
    if not isinstance(layer, nn.Embedding) and layer.bias is not None:
        nn.init.zeros_(layer.bias)
    spectral_norm(layer)
    return layer


def weight_of(layer: nn.Conv2d | nn.Linear | nn.Embedding, input: Tensor) -> Tensor:
    """The normalized weight, in fp32 under autocast too, where products would mix the norm's dtypes."""
    with autocast(input.device, enabled=False):
        return layer.weight


class ConditionalBatchNorm2d(nn.Module):
    """Batch norm with a gain and a bias for each class, in the dtype of the weights.
    In training mode the statistics are those of the batch, on several ranks of the batches of all of them (which must
    have one size), with their gradient; in evaluation mode those that `estimate_statistics` set. With `num_classes`
    None there is one gain and bias for all, the ordinary batch norm. With `code_dim` both are linear in a code (B,
    code_dim) in place of the class, and the gain has 1 added (Brock et al., 2019, appendix B)."""

    mean: Tensor  # (C,)
    var: Tensor  # (C,)  biased

    def __init__(
        self, channels: int, *, num_classes: int | None, code_dim: int | None = None, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.eps, self.conditional, self.coded = eps, num_classes is not None, code_dim is not None
        if code_dim is not None:
            self.gain, self.bias = (normed(nn.Linear(code_dim, channels, bias=False)) for _ in range(2))
        else:
            self.gain, self.bias = (nn.Embedding(num_classes or 1, channels) for _ in range(2))
            nn.init.ones_(self.gain.weight)
            nn.init.zeros_(self.bias.weight)
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))
        self.collected: list[Tensor] | None = None  # moments of batches, while they are estimated

    def forward(self, x: Tensor, label: Tensor | None) -> Tensor:  # (B, C, H, W), (B,) or a code -> (B, C, H, W)
        x = x.to(self.mean.dtype)
        mean, var = self.moments(x)
        given = (self.conditional or self.coded) and label is not None
        rows = label if given else x.new_zeros(x.shape[0], dtype=torch.long)
        with autocast(x.device, enabled=False):
            gain = (self.gain(rows) + float(self.coded)) * torch.rsqrt(var + self.eps)  # (B, C)
            bias = self.bias(rows) - mean * gain
        return torch.addcmul(bias[:, :, None, None], x, gain[:, :, None, None])

    def moments(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (2, C)
        if self.training:
            own, alone = batch_moments(x), not distributed.is_initialized() or distributed.get_world_size() == 1
            return own if alone else pool_moments(_Gather.apply(own))
        if self.collected is None:
            return torch.stack([self.mean, self.var])
        self.collected.append(batch_moments(x))
        return self.collected[-1]


def batch_moments(x: Tensor) -> Tensor:
    """(B, C, H, W) -> mean and biased variance of each channel, (2, C)."""
    mean = x.mean(dim=(0, 2, 3))  # on CPUs two passes are faster than torch.var_mean
    var = (x - mean[:, None, None]).square().mean(dim=(0, 2, 3))
    return torch.stack([mean, var])


def pool_moments(moments: Tensor) -> Tensor:
    """Moments of N batches of equal size (N, 2, C) -> of all together (2, C): law of total variance."""
    mean, var = moments.unbind(1)
    return torch.stack([mean.mean(0), var.mean(0) + mean.var(0, correction=0)])


class _Gather(torch.autograd.Function):
    """Gather a tensor of each rank, (N, ...), with gradient.
    The backward pass sums the gradients of all ranks, so averages over the ranks are gradients of the mean loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # pyrefly: ignore[bad-override]
        gathered = [torch.empty_like(x) for _ in range(distributed.get_world_size())]
        distributed.all_gather(gathered, x.contiguous())
        return torch.stack(gathered)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyrefly: ignore[bad-override]
        gradient = gradient.contiguous().clone()
        distributed.all_reduce(gradient)
        return gradient[distributed.get_rank()]


class GeneratorBlock(NetworkBlock):
    """Residual block with doubled sides, (B, C_in, H, W) -> (B, C_out, 2H, 2W).
    Convolutions have no bias: the batch norm that follows would take it away."""

    def __init__(
        self, in_channels: int, *, out_channels: int, num_classes: int | None, code_dim: int | None, attention: bool
    ) -> None:
        super().__init__()
        self.norm_1 = ConditionalBatchNorm2d(in_channels, num_classes=num_classes, code_dim=code_dim)
        self.conv_1 = NormedConv2d(in_channels, out_channels, bias=False, resample="up")
        self.norm_2 = ConditionalBatchNorm2d(out_channels, num_classes=num_classes, code_dim=code_dim)
        self.conv_2 = NormedConv2d(out_channels, out_channels, bias=False)
        self.skip = NormedConv2d(in_channels, out_channels, 1, bias=False)
        self.attention = SelfAttention2d(out_channels, num_heads=1) if attention else nn.Identity()

    def forward(self, x: Tensor, label: Tensor | None) -> Tensor:
        h = self.conv_1(F.relu(self.norm_1(x, label)))
        h = self.conv_2(F.relu(self.norm_2(h, label)))
        skip = F.interpolate(self.skip(x), scale_factor=2, mode="nearest")  # pointwise, so the order is free
        return self.attention(h + skip)


class GANGenerator(nn.Module):
    """Noise and class -> image.

    Args:
        resolution: side of the images, pixels; a multiple of 2 ** len(channel_mult).
        channel_mult: one block each; width of the level at `resolution`, at half of it, and so on, over `channels`. The
            first feature map has the last width and side resolution / 2 ** len(channel_mult).
        noise_dim: Z, with shared_dim a multiple of len(channel_mult) + 1.
        num_classes: None for a generator without classes.
        attention_resolutions: in pixels; attention follows the blocks that end there.
        shared_dim: size of a class vector that all norms share; noise is then cut into equal parts, one for the first
            feature map and one for the norms of each block, beside that vector (Brock et al., 2019, figure 15). None:
            a table of classes for each norm, and all noise at the start."""

    def __init__(
        self,
        *,
        resolution: int,
        channels: int,
        channel_mult: Sequence[int],
        noise_dim: int,
        num_classes: int | None,
        attention_resolutions: Sequence[int] = (),
        shared_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.noise_dim, self.num_classes = noise_dim, num_classes
        self.start = resolution // 2 ** len(channel_mult)
        widths = [channels * mult for mult in channel_mult]
        width, self.part_dim, code_dim = widths[-1], noise_dim, None
        self.shared = None if shared_dim is None or num_classes is None else nn.Embedding(num_classes, shared_dim)
        if shared_dim is not None:
            self.part_dim = noise_dim // (len(widths) + 1)
            code_dim = self.part_dim + (0 if self.shared is None else shared_dim)
        self.project = normed(nn.Linear(self.part_dim, width * self.start**2))
        self.blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):
            attention, before, width = resolution // 2**level in attention_resolutions, width, widths[level]
            how = {"num_classes": num_classes, "code_dim": code_dim, "attention": attention}
            self.blocks.append(GeneratorBlock(before, out_channels=width, **how))
        self.norm_out = ConditionalBatchNorm2d(width, num_classes=None)
        self.conv_out = NormedConv2d(width, 3)

    def forward(self, noise: Tensor, label: Tensor | None = None) -> Tensor:  # (B, Z), (B,) -> (B, 3, H, W) in [-1, 1]
        first, *parts = noise.split(self.part_dim, dim=1)
        h = F.linear(first, weight_of(self.project, noise), self.project.bias)
        h = rearrange(h, "b (c h w) -> b c h w", h=self.start, w=self.start)
        h = h.contiguous(memory_format=torch.channels_last)
        codes = [label] * len(self.blocks) if not parts else self.codes(parts, label)
        for block, code in zip(self.blocks, codes, strict=True):
            h = block(h, code)
        with autocast(h.device, enabled=False):  # pixels and logits, here and below, in fp32
            return torch.tanh(self.conv_out(F.relu(self.norm_out(h, None))))

    def codes(self, parts: Sequence[Tensor], label: Tensor | None) -> list[Tensor]:
        """Codes of the blocks, (B, code_dim) each: the class vector and a part of the noise."""
        known = [] if self.shared is None else [self.shared(label)]
        return [torch.cat([*known, part], dim=1) for part in parts]


class DiscriminatorBlock(NetworkBlock):
    """Residual block, (B, C_in, H, W) -> (B, C_out, H/2, W/2), or of the same sides without `down`."""

    def __init__(
        self, in_channels: int, *, out_channels: int, down: bool, attention: bool = False, first: bool = False
    ) -> None:
        super().__init__()
        self.down, self.first = down, first  # the first block sees pixels, which no activation may touch
        self.conv_1 = NormedConv2d(in_channels, out_channels)
        self.conv_2 = NormedConv2d(out_channels, out_channels, resample="down" if down else None)
        self.skip = nn.Identity() if in_channels == out_channels else NormedConv2d(in_channels, out_channels, 1)
        self.attention = SelfAttention2d(out_channels, num_heads=1) if attention else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_2(F.relu(self.conv_1(x if self.first else F.relu(x))))
        return self.attention(h + self.skip(F.avg_pool2d(x, 2) if self.down else x))


class ProjectionDiscriminator(nn.Module):
    """Image and class -> a logit, higher for real: D(x, y) = psi(phi(x)) + e_y . phi(x).
    Equation 3 of Miyato & Koyama (2018), with phi the sum over positions of the last features. Arguments are those of
    the generator: each level halves the sides, and one block without halving follows; `num_classes` None leaves the
    projection out."""

    def __init__(
        self,
        *,
        resolution: int,
        channels: int,
        channel_mult: Sequence[int],
        num_classes: int | None,
        attention_resolutions: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        width = 3
        for level, mult in enumerate(channel_mult):
            attention = resolution // 2 ** (level + 1) in attention_resolutions
            block = DiscriminatorBlock(
                width, out_channels=channels * mult, down=True, attention=attention, first=level == 0
            )
            self.blocks.append(block)
            width = channels * mult
        self.blocks.append(DiscriminatorBlock(width, out_channels=width, down=False))
        self.logit = normed(nn.Linear(width, 1))
        self.embedding = None if num_classes is None else normed(nn.Embedding(num_classes, width))

    def forward(self, image: Tensor, label: Tensor | None = None) -> Tensor:  # (B, 3, H, W), (B,) -> (B,)
        features = self.features(image)
        with autocast(image.device, enabled=False):
            logits = F.linear(features, self.logit.weight, self.logit.bias)[:, 0]
        if self.embedding is None:
            return logits
        assert label is not None
        table = F.embedding(label, weight_of(self.embedding, features))
        return logits + (table * features).sum(dim=1)

    def features(self, image: Tensor) -> Tensor:  # (B, 3, H, W) -> phi (B, C)
        h = image
        for block in self.blocks:
            h = block(h)
        return F.relu(h).to(self.logit.bias.dtype).sum(dim=(2, 3))


@torch.no_grad()
def estimate_statistics(generator: GANGenerator, batches: Iterable[tuple[Tensor, Tensor | None]]) -> None:
    """Set the statistics of each batch norm from noise (B, Z) and labels (B,) in batches of equal size.
    They stand in place of averages over training (standing statistics; Brock et al., 2019, section 4.1). The generator
    must be in evaluation mode; ranks do not meet here."""
    norms = [module for module in generator.modules() if isinstance(module, ConditionalBatchNorm2d)]
    for norm in norms:
        norm.collected = []
    for noise, label in batches:
        generator(noise, label)
    for norm in norms:
        mean, var = pool_moments(torch.stack(norm.collected or []))
        norm.mean.copy_(mean)
        norm.var.copy_(var)
        norm.collected = None


@torch.no_grad()
def settle_spectral_norms(network: nn.Module) -> None:
    """Find the singular vectors of averaged weights, since the stored vectors fit other weights."""
    for module in network.modules():
        if isinstance(module, ParametrizationList):
            mode = module.training
            module.train()
            for _ in range(POWER_ITERATIONS):
                module()
            module.train(mode)
