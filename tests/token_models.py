"""Tiny transformers of tokens whose every part shows in the logits, and what drawing from any model is held to."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from components.models.transformer import Transformer
from components.sampling.plan import Conditions

CONDITIONED = {"num_classes": 5, "vocab_size": 12, "text_length": 5}
POSITIONS = ("learned", "learned_2d", "rotary_2d")
TEXT = torch.tensor([[1, 7, 9, 2, 0], [1, 4, 5, 6, 2], [1, 2, 0, 0, 0], [1, 9, 9, 2, 0], [1, 3, 2, 0, 0]])
LABEL = torch.tensor([0, 3, 4, 1, 2])
GIVEN = {"label": LABEL, "text": TEXT}
NULL = {"label": torch.full((5,), 5), "text": torch.tensor([1, 2, 0, 0, 0]).expand(5, 5)}


def unit_gain(network: Any) -> Any:
    """In eval mode, with matrices of unit gain."""
    for parameter in network.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_().mul_(0.3)
    return network.eval()


def transformer(**settings: Any) -> Transformer:
    """Of 13 codes, two layers and four heads; by class and text."""
    torch.manual_seed(0)
    sizes = {"codebook_size": 13, "num_tokens": 10, "model_dim": 32, "num_layers": 2, "num_heads": 4}
    return unit_gain(Transformer(**sizes | CONDITIONED | settings))


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def rows(part: slice, given: Mapping[str, Tensor] = GIVEN, null: Mapping[str, Tensor] = NULL) -> Conditions:
    """The conditions of some images."""
    return Conditions(*({name: value[part] for name, value in each.items()} for each in (given, null)))


def assert_own_streams(draw: Callable[[slice, Sequence[int]], Tensor], images: int) -> None:
    """A seed gives its image in whatever company, another seed another; `draw` takes images' conditions and seeds."""
    together = draw(slice(images), range(images))
    for i in range(images):
        assert torch.equal(draw(slice(i, i + 1), [i]), together[i : i + 1])
    assert not torch.equal(draw(slice(images), range(images, 2 * images)), together)


def unmoved(network: nn.Module) -> list[str]:
    """Parameters that the last backward pass has not reached."""
    return [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


def heard(network: nn.Module, *embeddings: str) -> dict[str, Tensor]:
    """What embeddings give in the next forward pass, with gradients."""
    vectors: dict[str, Tensor] = {}
    for name in embeddings:
        getattr(network, name).register_forward_hook(
            lambda _module, _inputs, output, name=name: vectors.update({name: output.requires_grad_()})
        )
    return vectors


def reach(logits: Tensor, vectors: Mapping[str, Tensor]) -> dict[str, list[bool]]:
    """Of the first image of each embedding, the places on which logits depend."""
    gradients = torch.autograd.grad(logits.square().sum(), list(vectors.values()), retain_graph=True)
    return {name: (g[0].abs().sum(dim=-1) > 0).tolist() for name, g in zip(vectors, gradients, strict=True)}


def train_on(network: nn.Module, distribution: Tensor, loss: Callable[[int, Tensor], Tensor]) -> None:
    """300 steps on 256 rows each, drawn with these probabilities; `loss` of a step's number and rows."""
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for step, rows in enumerate(torch.multinomial(distribution, 300 * 256, replacement=True).view(300, 256)):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 300)
        optimizer.zero_grad()
        loss(step, rows).backward()
        optimizer.step()
