"""Tiny exact models of images that several tests share, and what a logit of theirs can see."""

from typing import Any

import torch
from torch import Tensor

from components.models.pixelcnn import GatedPixelCNN
from components.models.row_lstm import RowLSTM
from components.sampling.autoregressive import PixelNetwork

KINDS: dict[str, type[GatedPixelCNN] | type[RowLSTM]] = {"pixelcnn": GatedPixelCNN, "row_lstm": RowLSTM}
Place = tuple[int, int, int]  # row, column, color


def make_model(kind: str, **settings: Any) -> PixelNetwork:
    """In fp64, with weights of unit gain, so that every part shows in the logits."""
    torch.manual_seed(0)
    numbers = {"num_values": 5, "num_channels": 3, "channels": 24, "num_layers": 2, "kernel_size": 3, "num_classes": 4}
    model = KINDS[kind](**(numbers | settings)).double().eval()
    for name, parameter in model.named_parameters():
        if "label" in name:
            parameter.data.normal_()
        elif parameter.ndim > 1 and not name.startswith("embedding"):
            parameter.data.mul_(2)
    return model


def random_values(model: PixelNetwork, *, batch_size: int, height: int, width: int, num_values: int = 5) -> Tensor:
    return torch.randint(0, num_values, (batch_size, model.num_channels, height, width))


def seen_places(model: PixelNetwork, *, height: int, width: int) -> dict[Place, set[Place]]:
    """For each value the places whose values its logits depend on: where the gradient is not exactly zero.

    Of four images, because in a single one all of a color's units in the head can be off.
    """
    embedded = {}
    hook = model.embedding.register_forward_hook(
        lambda _module, _inputs, output: embedded.update(x=output.detach().requires_grad_()) or embedded["x"]
    )
    logits = model(random_values(model, batch_size=4, height=height, width=width))
    hook.remove()
    colors = torch.tensor(model.embedding.groups)
    seen = {}
    for place in places(model, height=height, width=width):
        row, column, color = place
        loss = logits[:, color, row, column].square().sum()
        (gradient,) = torch.autograd.grad(loss, embedded["x"], retain_graph=True)
        seen[place] = {
            (int(i), int(j), int(colors[channel]))
            for channel, i, j in (gradient != 0).any(dim=0).nonzero()
            if colors[channel] >= 0
        }
    return seen


def places(model: PixelNetwork, *, height: int, width: int) -> list[Place]:
    """In the order in which they are drawn, which is the order of the tuples."""
    return [
        (row, column, color) for row in range(height) for column in range(width) for color in range(model.num_channels)
    ]
