"""Draw values of images in raster order from an exact model of pixels or tokens.

The order is row by row, left to right, color by color. Filters and guidance are those of `autoregressive.py`.

Shapes: B images, C colors, H W height and width, K num_values.
"""

from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from torch import Tensor

from components.models.masked import PixelNetwork
from components.sampling.autoregressive import check_filters, draw, guided_logits


def generate_grid(
    network: PixelNetwork,
    *,
    generators: Sequence[torch.Generator],
    height: int,
    width: int,
    label: Tensor | None = None,
    guidance_scale: float = 1.0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Sample an image for each generator.

    An image depends on its own generator and label, not on the rest of the batch.

    Args:
        network: in eval mode.
        generators: one CPU generator an image, B in all; each gives H * W * C uniform numbers.
        height, width: H and W.
        label: (B,) int64; None stands for the null label.
        guidance_scale: 1 is off; otherwise conditional and null logits are combined, in a batch of 2B.
        temperature: > 0, or 0 for the most likely value each time.
        top_k: keep the k most likely values, k >= 1. None: all.
        top_p: keep the most likely values of this mass, in (0, 1]. None: all.
        on_token: called with (values done, H * W * C) after each step.

    Returns:
        (B, C, H, W) int64 in [0, K), on the network's device.

    Raises:
        ValueError: when a setting is out of its range.
    """
    check_filters(temperature=temperature, top_k=top_k, top_p=top_p)
    device = network.head.out.weight.device
    batch_size, num_values = len(generators), height * width * network.num_channels
    uniforms = torch.stack([torch.rand(num_values, generator=g) for g in generators], dim=1).to(device)
    values = torch.empty(num_values, batch_size, dtype=torch.int64, device=device)
    guided = guidance_scale != 1.0
    labels = _with_null(network, batch_size, label) if guided else label
    with torch.inference_mode():
        logits, cache = network.start(len(generators) * (2 if guided else 1), height=height, width=width, label=labels)
        for i in range(num_values):
            if i > 0:
                logits = network.step(values[i - 1].repeat(2) if guided else values[i - 1], cache=cache)
            if guided:
                logits = guided_logits(logits, guidance_scale)
            values[i] = draw(logits, uniforms=uniforms[i], temperature=temperature, top_k=top_k, top_p=top_p)
            if on_token is not None:
                on_token(i + 1, num_values)
    return rearrange(values, "(h w c) b -> b c h w", h=height, w=width).contiguous()


def _with_null(network: PixelNetwork, batch_size: int, label: Tensor | None) -> Tensor:
    """The labels of a guided batch, (2B,): the requested labels, then as many null labels."""
    null = torch.full((batch_size,), network.null_label, device=network.head.out.weight.device)
    return torch.cat([null if label is None else label, null])
