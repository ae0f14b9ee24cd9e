"""Patch discriminator (Isola et al. 2017, "Image-to-Image Translation", section 3.2).

The full title ends "with Conditional Adversarial Networks".

Group normalization in place of batch normalization: no statistics over a batch, so none that depend on its split
over ranks, and real and generated images may share a batch.

Shapes: B batch, H W pixels, h w patches.
"""

from torch import Tensor, nn

from components.models.layers import groups_of


class PatchDiscriminator(nn.Module):
    """Image (B, 3, H, W) in [-1, 1] -> a logit for each patch (B, 1, h, w), higher for real.

    Args:
        norm_groups: of every group norm; see `groups_of`.
    """

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
        return self.layers(image)


def _initialize(module: nn.Module) -> None:
    """N(0, 0.02) for convolutions, N(1, 0.02) for norms, as published."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.GroupNorm):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
