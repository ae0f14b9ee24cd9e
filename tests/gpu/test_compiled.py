"""A compiled training is the plain one within rounding."""

import pytest
import torch

from tests.on_device import losses_and_norms

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kind", ["base", "upsampler", "dit", "prior", "tokenizer"])
def test_compiled_steps_have_the_losses_and_gradients_of_plain_ones(kind: str, gpu: torch.device) -> None:
    torch.compiler.reset()
    plain, compiled = (losses_and_norms(kind, gpu, compile_network=there) for there in (False, True))
    assert compiled == pytest.approx(plain, rel=1e-3)
