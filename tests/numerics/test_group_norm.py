"""Laws of the group norm under autocast: statistics in fp32, and on a GPU the type that it was given."""

import pytest
import torch
from torch import Tensor, nn

from components.configuration.dataset_info import DatasetInfo, TokenGrid
from components.models.layers import GroupNorm, Normalized16Bits
from components.training.building import make_network
from pipelines.recipes.paper import PRIORS, token_branch
from pipelines.recipes.paper_diffusion import PAPER_DIFFUSION
from tests.saved_bytes import bytes_a_sample

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


# GB that a sample more keeps for the backward pass on a GPU, in bf16: counted before the norm gave back its type, 5.12,
# 0.50, 0.45; transformers have no such norm.
GIGABYTES = {"adm_imagenet_64": 0.294, "adm_imagenet_256": 2.892, "ldm_imagenet_f4": 0.345}


@pytest.mark.parametrize("name", GIGABYTES)
def test_a_published_u_net_keeps_so_many_bytes_a_sample(name: str) -> None:
    training = PAPER_DIFFUSION[name]
    with torch.device("meta"):
        network = make_network(training, DatasetInfo(num_classes=1000)).train()
    side, channels = training.data.resolution, training.data.in_channels

    def forward(samples: int) -> Tensor:
        labels = torch.zeros(samples, dtype=torch.long, device="meta")
        image = torch.zeros(samples, channels, side, side, device="meta").to(memory_format=torch.channels_last)
        return network(image, labels, label=labels)

    assert bytes_a_sample(forward) / 1e9 == pytest.approx(GIGABYTES[name], abs=0.001)


def test_mindalle_keeps_three_quarters_of_a_gigabyte_a_sample() -> None:
    training = token_branch("mindalle_text_prior", PRIORS["mindalle_text_prior"]).prior
    info, grid = (
        DatasetInfo(num_classes=1, vocab_size=16_384, text_length=64),
        TokenGrid(height=16, width=16, codebook_size=16_384),
    )
    with torch.device("meta"):
        network = make_network(training, info, grid).train()

    def forward(samples: int) -> Tensor:
        tokens, text = (torch.zeros(samples, n, dtype=torch.long, device="meta") for n in (256, 64))
        return network(tokens, text=text)

    assert bytes_a_sample(forward) / 1e9 == pytest.approx(0.756, abs=0.001)
