"""Laws of counted operations: what a step is said to cost is what the real one costs, told without memory."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from components.configuration.conditions import TokenGrid
from components.training.batches import to_batch
from components.training.loop import Batch, Task
from components.training.step_model import StepModel
from tests import tiny_autoencoders
from tests.tiny_text_image import PRIOR_DATASET_INFO, classifier_config, contrastive_config, prior_config, prior_task
from tests.tiny_training import DATASET_INFO, GRID, KINDS, batches, config_of, make_task

OTHERS = ("gan", "edm", "flow", "vlb")
DROPPED = {"num_train_timesteps": 50}


def counted(task: Task, batch: Batch, *, step: int) -> int:
    """Operations of a real step on this CPU. The first step of a codebook is another one: it is taken before."""
    task.train_step(batch, 1)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        task.train_step(batch, step)
    return counter.get_total_flops()


def grid_of(config: Any) -> TokenGrid | None:
    """The tokens that a training learns from, where it does."""
    data = getattr(config, "data", None)
    return GRID if data is None or data.resolution is None else None


def told(config: Any, **step: int) -> int:
    return StepModel(config, DATASET_INFO, grid=grid_of(config)).flops(**step)


@pytest.mark.parametrize("kind", [*KINDS, *OTHERS])
def test_a_step_costs_what_is_told_for_each_kind_of_training(kind):
    config = config_of(kind)
    assert told(config) == counted(make_task(config), next(batches(config, to_batch)), step=20) > 0


@pytest.mark.parametrize("name", tiny_autoencoders.RECIPES)
def test_a_step_costs_what_is_told_for_each_kind_of_autoencoder(name):
    config = tiny_autoencoders.config_of(name)
    assert told(config) == counted(make_task(config), next(batches(config, to_batch)), step=20) > 0


@pytest.mark.parametrize("noisy", [True, False])
def test_a_step_of_a_classifier_costs_what_is_told(noisy):
    config = classifier_config(**({"noisy": noisy} | ({} if noisy else {"process": {"kind": "discrete"}})))
    assert told(config) == counted(make_task(config), next(batches(config, to_batch)), step=20) > 0


def test_a_step_of_a_contrastive_encoder_costs_what_is_told_with_all_pairs_of_the_batch():
    for samples in (2, 8):
        config = contrastive_config(global_batch_size=samples)
        assert told(config) == counted(make_task(config), next(batches(config, to_batch)), step=20) > 0


def test_a_step_of_a_diffusion_prior_costs_what_is_told_and_what_its_frozen_encoders_make_at_each_step():
    config, encoder = prior_config(), contrastive_config()
    info = PRIOR_DATASET_INFO.replace(vocab_size=280, text_length=6)
    real = counted(prior_task(config), next(batches(config, to_batch)), step=20)
    maker, own = StepModel(encoder, info), StepModel(config, info).flops()
    frozen = maker.encoding_flops("image_embedding") + maker.encoding_flops("text_states")
    assert own + config.optimization.global_batch_size * frozen == real > own


def test_the_discriminator_costs_more_once_it_is_heard_and_a_whole_training_knows_when_that_is():
    config = config_of("tokenizer")
    batch = next(batches(config, to_batch))
    quiet, heard = (counted(make_task(config), batch, step=step) for step in (3, 4))
    assert (told(config, step=3), told(config, step=4)) == (quiet, heard)
    assert quiet < heard
    assert StepModel(config).training_flops() == (heard, 3 * quiet + 17 * heard)


def test_recomputed_activations_are_no_part_of_what_a_model_needs():
    assert told(config_of("base", gradient_checkpointing=True)) == told(config_of("base"))


def test_what_a_frozen_autoencoder_makes_costs_its_encoder_alone():
    config = config_of("tokenizer")
    network, image = make_task(config).generator.network, torch.zeros(3, 3, 16, 16)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network.to_latents(image)
    assert 3 * StepModel(config).encoding_flops("latents") == counter.get_total_flops() > 0
