"""The two networks that judge reconstructions: a patch discriminator, and the distance LPIPS.

Sources: Isola et al. 2017, "Image-to-Image Translation with Conditional Adversarial Networks", section 3.2; Zhang et
al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", equation 1.
Shapes: B batch, H W pixels, h w patches; C_l H_l W_l features of layer l."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from components.models.devices import autocast
from components.models.layers import groups_of

VGG16_CONVS = (2, 2, 3, 3, 3)  # convolutions of each block, a max-pooling between blocks
VGG16_CHANNELS = (64, 128, 256, 512, 512)


class PatchDiscriminator(nn.Module):
    """Image (B, 3, H, W) in [-1, 1] -> a logit for each patch (B, 1, h, w), higher for real.
    Group norms in place of batch norms: nothing depends on a batch's split over ranks, and real and generated images
    may share one."""

    def __init__(self, *, channels: int = 64, num_layers: int = 3, norm_groups: int | None = None) -> None:
        super().__init__()
        widths = [channels * min(2**i, 8) for i in range(num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
        for i in range(num_layers):
            stride = 1 if i == num_layers - 1 else 2
            layers += [
                nn.Conv2d(widths[i], widths[i + 1], 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(groups_of(widths[i + 1], norm_groups), widths[i + 1]),
                nn.LeakyReLU(0.2, inplace=True),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.apply(_initialize)

    def forward(self, image: Tensor) -> Tensor:
        features = self.layers[:-1](image)
        with autocast(image.device, enabled=False):  # logits in fp32
            return self.layers[-1](features.to(self.layers[-1].weight.dtype))


def _initialize(module: nn.Module) -> None:
    """N(0, 0.02) for convolutions, N(1, 0.02) for norms, as published."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.GroupNorm):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


class PerceptualLoss(nn.Module):
    """Distance of two images in the unit-normalized features of a frozen network.

    `features` makes of an image (B, 3, H, W) in [-1, 1] a list of (B, C_l, H_l, W_l), scales its input itself, and
    stays frozen in eval mode. `layer_weights` are non-negative vectors (C_l,), the 1x1 weights of LPIPS; None counts
    every channel once."""

    def __init__(self, features: nn.Module, *, layer_weights: Sequence[Tensor] | None = None) -> None:
        super().__init__()
        self.features = features.requires_grad_(False).eval()
        self.num_weights = 0 if layer_weights is None else len(layer_weights)
        for i, weight in enumerate(layer_weights or ()):
            self.register_buffer(f"layer_weight_{i}", weight.detach().clone().float())

    def train(self, mode: bool = True) -> "PerceptualLoss":
        super().train(mode)
        self.features.eval()
        return self

    def forward(self, reconstruction: Tensor, image: Tensor) -> Tensor:
        """Distance of each pair of images (B, 3, H, W) in [-1, 1]: (B,) fp32. No gradient reaches `image`."""
        with torch.no_grad():
            targets = [_unit(f) for f in self.features(image)]
        outputs = self.features(reconstruction)
        distance = torch.zeros(len(image), device=image.device)
        for i, (output, target) in enumerate(zip(outputs, targets, strict=True)):
            squared = (_unit(output) - target).square()  # (B, C_l, H_l, W_l)
            if self.num_weights:
                squared = squared * self.get_buffer(f"layer_weight_{i}")[:, None, None]
            distance = distance + squared.sum(dim=1).mean(dim=(1, 2))
        return distance


def _unit(features: Tensor) -> Tensor:
    """Features scaled to unit length over the channels, in fp32."""
    features = features.float()  # by vector_norm, because sqrt has no finite gradient at dead pixels
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + 1e-10)


class VGG16Features(nn.Module):
    """Features relu1_2 ... relu5_3 of VGG-16 (Simonyan & Zisserman, 2015), as in LPIPS."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        width = 3
        for count, channels in zip(VGG16_CONVS, VGG16_CHANNELS, strict=True):
            layers: list[nn.Module] = [] if width == 3 else [nn.MaxPool2d(2)]
            for _ in range(count):
                layers += [nn.Conv2d(width, channels, 3, padding=1), nn.ReLU()]
                width = channels
            self.blocks.append(nn.Sequential(*layers))
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None])

    def forward(self, image: Tensor) -> list[Tensor]:  # (B, 3, H, W) in [-1, 1]
        x, features = (image - self.shift) / self.scale, []
        for block in self.blocks:
            x = block(x)
            features.append(x)
        return features
