"""Laws of counted activations: what a step is said to keep is what the real one keeps, told without memory."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from components.configuration.conditions import DatasetInfo, TokenGrid
from components.models.devices import autocast, autocast_dtype
from components.training.activations import GPUKernels, Keeping, Kept, activations, step_keeps
from components.training.batches import to_batch
from components.training.loop import Batch, Task
from components.training.step_model import StepModel, WithoutNumbers
from tests.tiny_text_image import PRIOR_DATASET_INFO
from tests.tiny_training import DATASET_INFO, GRID, batches
from tests.trained_networks import TRAININGS, learners_of

META = torch.device("meta")
SAMPLES = 8
TWO_PASSES = ("gan", "contrastive")  # a step's second pass begins when the first has let go of what it kept
WHOLE_STEP = [name for name in TRAININGS if name not in TWO_PASSES]


def config_of(name: str, **changes: Any) -> Any:
    return TRAININGS[name].config(**changes)


def info_of(name: str) -> DatasetInfo:
    return PRIOR_DATASET_INFO if name == "diffusion_prior" else DATASET_INFO


def grid_of(config: Any) -> TokenGrid | None:
    data = getattr(config, "data", None)
    return GRID if data is None or data.resolution is None else None


def told(name: str, config: Any, *, samples: int = SAMPLES) -> list[Kept]:
    """Counted on the meta device, with the kernels of a CPU's plain attention."""
    model = StepModel(config, info_of(name), grid=grid_of(config))
    with WithoutNumbers(), sdpa_kernel(SDPBackend.MATH):
        return step_keeps(model.loaded_task(), model.batch(samples), step=config.optimization.total_steps)


def real(name: str, config: Any) -> tuple[Task, Batch]:
    return TRAININGS[name].task(config), next(batches(config, to_batch))


def kept_in_a_step(name: str, config: Any) -> Kept:
    """Counted in a real step of training on this CPU."""
    task, batch = real(name, config)
    task.train_step(batch, 1)
    with sdpa_kernel(SDPBackend.MATH):
        keeping = Keeping([learner.network for learner in learners_of(task)])
        with keeping.during():
            task.train_step(batch, config.optimization.total_steps)
        return keeping.kept()


@pytest.mark.parametrize("name", WHOLE_STEP)
def test_a_step_keeps_what_is_told_to_the_byte(name: str) -> None:
    config = config_of(name)
    assert told(name, config) == [kept_in_a_step(name, config)]


@pytest.mark.parametrize("name", TWO_PASSES)
def test_the_larger_pass_of_a_step_keeps_what_is_told_to_the_byte(name: str) -> None:
    config = config_of(name)
    task, batch = real(name, config)
    with sdpa_kernel(SDPBackend.MATH):
        assert told(name, config) == step_keeps(task, batch, step=config.optimization.total_steps)


@pytest.mark.parametrize("name", WHOLE_STEP)
def test_a_step_that_computes_its_blocks_again_keeps_what_is_told(name: str) -> None:
    config = config_of(name)
    (counted,) = told(name, config)
    assert counted.recomputed < counted.whole
    again = kept_in_a_step(name, config_of(name, gradient_checkpointing=True))
    assert again.recomputed == counted.recomputed
    options = 0.05 * counted.recomputed  # masks and labels that blocks are given by name, which torch's hooks don't see
    assert counted.recomputed - options < again.whole <= counted.recomputed


@pytest.mark.parametrize("name", TRAININGS)
def test_what_is_kept_grows_linearly_in_samples(name: str) -> None:
    config = config_of(name, precision="bf16")
    model = StepModel(config, info_of(name), grid=grid_of(config))
    kept = activations(model)
    with GPUKernels():
        passes = step_keeps(model.loaded_task(), model.batch(6), step=config.optimization.total_steps)
    assert kept.whole.of(6) == max(each.whole for each in passes)
    assert kept.recomputed.of(6) == max(each.recomputed for each in passes)
    assert kept.block.of(6) >= max(block for each in passes for block in each.blocks)
    assert kept.whole.sample > kept.recomputed.sample > 0


@pytest.mark.parametrize("name", ["base", "prior", "tokenizer"])
def test_in_bf16_samples_keep_less_and_copies_of_the_weights_stay_beside_them(name: str) -> None:
    fp32, bf16 = (
        activations(StepModel(config, info_of(name), grid=grid_of(config)))
        for config in (config_of(name, precision=precision) for precision in ("fp32", "bf16"))
    )
    assert bf16.whole.sample < fp32.whole.sample
    assert bf16.whole.fixed > fp32.whole.fixed


def test_a_model_of_gray_images_is_counted_though_it_checks_the_colors_of_real_ones() -> None:
    config = config_of("pixelcnn", in_channels=1)
    task, batch = real("pixelcnn", config)
    batch["image"] = batch["image"][:, :1].expand(-1, 3, -1, -1)
    with sdpa_kernel(SDPBackend.MATH):
        assert told("pixelcnn", config) == step_keeps(task, batch, step=config.optimization.total_steps)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_innermost_autocast_counts_on_the_meta_device_as_on_others(enabled: bool) -> None:
    for device in (META, torch.device("cpu")):
        x, weight = torch.ones(2, 3, device=device), torch.ones(4, 3, device=device, requires_grad=True)
        with autocast(device, enabled=True), nullcontext() if enabled else autocast(device, enabled=False):
            made = torch.nn.functional.linear(x, weight)
            assert (autocast_dtype(device) == torch.bfloat16) == enabled
        assert made.dtype == (torch.bfloat16 if enabled else torch.float32)
        assert made.softmax(dim=1).dtype == made.dtype, "outside nothing is cast"
        assert autocast_dtype(device) is None


def test_a_weight_is_copied_to_bf16_once_in_an_autocast_however_often_it_is_used() -> None:
    x, weight = torch.ones(2, 3, device=META), torch.ones(3, 3, device=META, requires_grad=True)
    keeping = Keeping()
    with keeping.during(), autocast(META, enabled=True):
        product = (x @ weight) @ weight
    assert product.requires_grad
    copies = [2 * weight.numel(), 2 * x.numel(), 2 * x.numel()]  # of the weight, of x, and of what is between
    assert keeping.kept().whole == sum(copies)
