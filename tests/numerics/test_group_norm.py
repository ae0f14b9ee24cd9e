"""Laws of the group norm under autocast: statistics in fp32, and on a GPU the type that it was given."""

import pytest
import torch
from torch import Tensor, nn

from components.models.layers import GroupNorm, Normalized16Bits
from pipelines.planning.memory import counted_activations, model_of
from pipelines.recipes.published import PAPER_RECIPES
from pipelines.workflows import build_workflow

SHIFT = 30.0  # deviations that the mean lies away from zero: statistics of 16 bits would be off by a twentieth of one


def parts() -> tuple[Tensor, Tensor, Tensor]:
    """x of 16 bits, weight and bias."""
    x = (torch.randn(3, 8, 5, 5) + SHIFT).bfloat16().to(memory_format=torch.channels_last)
    return x, torch.randn(8).requires_grad_(), torch.randn(8).requires_grad_()


def test_a_norm_of_16_bits_is_that_of_fp32_rounded_once():
    x, weight, bias = parts()
    given, wanted = (x.clone().requires_grad_() for _ in range(2))
    ours = Normalized16Bits.apply(given, weight, bias, 2, 1e-5)
    exact = nn.functional.group_norm(wanted.float().contiguous(), 2, weight, bias, 1e-5)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, exact.bfloat16())
    gradient = torch.randn_like(ours)
    found = torch.autograd.grad(ours, (given, weight, bias), gradient)
    for one, other in zip(found, torch.autograd.grad(exact, (wanted, weight, bias), gradient.float()), strict=True):
        torch.testing.assert_close(one, other)
    assert found[0].dtype == torch.bfloat16


def test_on_a_cpu_a_norm_returns_the_type_of_its_weights_and_elsewhere_what_it_was_given():
    norm = GroupNorm(8)
    assert norm(torch.zeros(1, 8, 2, 2, dtype=torch.bfloat16)).dtype == torch.float32
    there = norm.to("meta")(torch.zeros(1, 8, 2, 2, dtype=torch.bfloat16, device="meta"))
    assert there.dtype == torch.bfloat16
    assert norm(torch.zeros(1, 8, 2, 2, device="meta")).dtype == torch.float32


# GB that a sample more keeps for the backward pass on a GPU, in bf16, with its loss: before the norm gave back its type
# U-Nets kept 0.50, 5.12 and 0.45; transformers have no such norm.
GIGABYTES = {
    ("adm_imagenet_64_256", "base"): 0.283,
    ("adm_imagenet_256", "base"): 2.908,
    ("ldm_imagenet_f4", "base"): 0.345,
    ("mindalle_text_prior", "prior"): 0.777,
}


@pytest.mark.parametrize(("recipe", "stage"), GIGABYTES)
def test_a_published_network_keeps_so_many_bytes_a_sample(recipe: str, stage: str) -> None:
    workflow = build_workflow(PAPER_RECIPES[recipe]())
    kept = counted_activations(model_of(workflow.by_name[stage], workflow.stages))
    assert kept.whole.sample / 1e9 == pytest.approx(GIGABYTES[recipe, stage], abs=0.001)
