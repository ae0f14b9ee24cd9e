"""Laws of what frozen networks make of requests."""

import pytest
import torch
from torch import nn

from components.configuration.sampling import DiffusionPriorSampling, DiffusionSampling
from components.models.contrastive import DiffusionPrior
from components.sampling.frozen_text import frozen_conditions, sample_image_embeddings
from components.sampling.model import SamplingModel
from components.sampling.plan import Plan
from tests.tiny_text_image import PRIOR_DATASET_INFO, frozen_contrastive, prior_config

PLANS = (Plan(prompt="a red circle", seed=1), Plan(seed=2))


def base(**network: int) -> SamplingModel:
    return SamplingModel("base", "unet", network, {}, nn.Linear(1, 1), None, DiffusionSampling())


def prior() -> SamplingModel:
    config = prior_config()
    arguments = config.network_arguments(PRIOR_DATASET_INFO)
    settings, sampling = {"objective": config.process.objective()}, DiffusionPriorSampling(num_inference_steps=4)
    module = DiffusionPrior(**arguments).eval()
    return SamplingModel("prior", "diffusion_prior", arguments, settings, module, None, sampling)


def test_states_are_those_of_the_prompt_and_the_null_is_the_empty_text() -> None:
    text = frozen_contrastive()
    condition, null = frozen_conditions(base(text_states_dim=8), PLANS, text=text)
    torch.testing.assert_close(condition["text_states"], text.encode(["a red circle", ""]))
    torch.testing.assert_close(null["text_states"], text.encode(["", ""]))
    empty, null = frozen_conditions(base(text_states_dim=8), PLANS[1:], text=text)
    assert torch.equal(empty["text_states"], null["text_states"])  # both alone: a larger batch rounds in its own way


def test_an_embedding_is_what_the_prior_draws_and_its_null_is_zero() -> None:
    text, model = frozen_contrastive(), prior()
    condition, null = frozen_conditions(base(image_embedding_dim=6), PLANS, text=text, prior=model)
    torch.testing.assert_close(condition["image_embedding"], sample_image_embeddings(model, text, PLANS))
    assert not null["image_embedding"].any()


def test_a_model_without_frozen_conditions_gets_none() -> None:
    assert frozen_conditions(base(), PLANS) == ({}, {})


def test_what_does_not_fit_is_refused() -> None:
    text = frozen_contrastive()
    with pytest.raises(ValueError, match="text encoder of 8 features"):
        frozen_conditions(base(text_states_dim=8), PLANS)
    with pytest.raises(ValueError, match="text encoder of 9 features"):
        frozen_conditions(base(text_states_dim=9), PLANS, text=text)
    with pytest.raises(ValueError, match="prior over 7 numbers"):
        frozen_conditions(base(image_embedding_dim=7), PLANS, text=text, prior=prior())
