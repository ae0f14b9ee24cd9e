"""What the tests of a GPU do, done on the CPU: it can be told apart, so that on a GPU it holds something."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.compiled_graphs import recorded_graphs
from tests.on_device import (
    errors_of_products,
    in_company,
    losses_and_norms,
    norm_of_16_bits,
    numbered_rows,
    sums_ahead,
    sums_at_once,
)
from tests.tiny_cascade import write_cascade

CPU = torch.device("cpu")


def test_compiled_steps_have_the_losses_and_gradients_of_plain_ones_and_another_rate_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = losses_and_norms("base", CPU)
    compiled = recorded_graphs(monkeypatch)
    assert losses_and_norms("base", CPU, compile_network=True) == pytest.approx(plain, rel=1e-3)
    assert compiled
    assert losses_and_norms("base", CPU, learning_rate=2.2e-3) != pytest.approx(plain, rel=1e-3)


def test_errors_of_products_tell_fp32_from_ten_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert max(errors_of_products(CPU)) < 3e-5
    matmul, conv2d = torch.matmul, nn.functional.conv2d
    monkeypatch.setattr(torch, "matmul", lambda a, b: matmul(ten_bits(a), ten_bits(b)))
    monkeypatch.setattr(nn.functional, "conv2d", lambda a, b: conv2d(ten_bits(a), ten_bits(b)))
    assert min(errors_of_products(CPU)) > 1e-4


def ten_bits(x: torch.Tensor) -> torch.Tensor:
    """As TF32 rounds fp32; others are left alone."""
    if x.dtype != torch.float32:
        return x
    return ((x.view(torch.int32) + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32)


def test_on_the_cpu_a_norm_of_16_bits_is_of_32() -> None:
    found, exact = norm_of_16_bits(CPU)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact)


def test_an_image_is_the_same_in_whatever_company_and_another_seed_is_far(tmp_path: Path) -> None:
    company = in_company(write_cascade(tmp_path), CPU, generator="diffusion", precision="bf16")
    assert company.distance.max() <= 1
    assert abs(company.together[0] - company.together[1]).mean() > 4
    assert company.together.std() > 4


def test_batches_ahead_are_those_that_are_asked_for() -> None:
    assert sums_ahead(CPU, count=4, work=1) == pytest.approx(sums_at_once(4))
    assert len({*sums_at_once(4)}) == len([*numbered_rows(4)]) == 4
