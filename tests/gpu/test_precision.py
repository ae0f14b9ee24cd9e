"""What `precision` means on a GPU, held by the device itself, and that a compiled training is the plain one."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from components.configuration.optimization import Precision
from components.models.devices import products, state_products
from components.sampling.device import computes_bf16, sampling_in
from components.training.learner import Learner
from components.training.parallel import Worker
from tests.on_device import errors_of_products, in_company, losses_and_norms, norm_of_16_bits
from tests.tiny_cascade import write_cascade
from tests.tiny_training import config_of

pytestmark = pytest.mark.gpu
FP32_ROUNDING, TF32_ROUNDING = 3e-5, 1e-4  # at most that of 24 bits; at least that of 11


@pytest.fixture(autouse=True)
def in_fp32() -> Iterator[None]:
    state_products("fp32")
    yield
    state_products("fp32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cascade(tmp_path_factory.mktemp("cascade"))


@pytest.mark.parametrize("word", ["fp32", "bf16"])
def test_without_tf32_products_round_as_fp32_does(word: Precision, gpu: torch.device) -> None:
    with products(word):
        assert max(errors_of_products(gpu)) < FP32_ROUNDING


def test_tf32_is_seen_in_matrices_and_convolutions_alike(gpu: torch.device) -> None:
    there = torch.cuda.get_device_capability(gpu) >= (8, 0)
    with products("tf32"):
        errors = errors_of_products(gpu)
    assert [error > TF32_ROUNDING for error in errors] == [there, there]


def test_training_and_sampling_compute_in_bf16_where_the_gpu_has_it(gpu: torch.device) -> None:
    there = torch.cuda.is_bf16_supported(including_emulation=False)
    assert computes_bf16("bf16", gpu) == there
    learner = Learner(
        torch.nn.Linear(2, 2), config=config_of("base", precision="bf16").optimization, worker=Worker(device=gpu)
    )
    one = torch.ones(2, 2, device=gpu)
    for inside in (learner.autocast(), sampling_in("bf16", gpu)):
        with inside:
            assert (one @ one).dtype == (torch.bfloat16 if there else torch.float32)
    assert (one @ one).dtype == torch.float32


@pytest.mark.parametrize("kind", ["base", "upsampler", "dit", "prior", "tokenizer"])
def test_compiled_steps_have_the_losses_and_gradients_of_plain_ones(kind: str, gpu: torch.device) -> None:
    torch.compiler.reset()
    plain, compiled = (losses_and_norms(kind, gpu, compile_network=there) for there in (False, True))
    assert compiled == pytest.approx(plain, rel=1e-3)


def test_a_group_norm_gives_back_16_bits_rounded_once(gpu: torch.device) -> None:
    found, exact = norm_of_16_bits(gpu)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact, rtol=2**-8, atol=1e-5)


def test_in_fp32_an_image_is_the_same_in_whatever_company_within_one_gray_level(
    folder: Path, gpu: torch.device
) -> None:
    assert in_company(folder, gpu, generator="diffusion", precision="fp32").distance.max() <= 1


def test_in_bf16_it_is_the_same_to_the_eye(folder: Path, gpu: torch.device) -> None:
    company = in_company(folder, gpu, generator="diffusion", precision="bf16")
    assert company.distance.mean() < 4
    assert company.together.std() > 4, "images that show nothing would be the same too"


def test_an_image_of_tokens_has_its_size_and_most_of_its_pixels_in_whatever_company(
    folder: Path, gpu: torch.device
) -> None:
    """A token that is drawn where two are as likely may be another."""
    company = in_company(folder, gpu, generator="tokens", precision="bf16")
    assert company.together.shape == company.alone.shape
    assert (company.distance <= 4).mean() > 0.5
