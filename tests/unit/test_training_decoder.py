"""Laws of diffusion models whose conditions come from frozen networks: DALL-E 2's decoder and Imagen's base."""

import pytest
import torch

from components.configuration.diffusion import DiffusionTraining
from components.configuration.sampling import DiffusionSampling
from components.sampling.frozen_text import frozen_conditions
from components.sampling.generators.diffusion import denoise
from components.sampling.model import SamplingModel
from components.sampling.plan import plan_of
from components.sampling.requests import Request
from components.training.frozen import check_sizes
from tests.tiny_text_image import PRIOR_DATASET_INFO, decoder_config, frozen_contrastive, prior_task


def model_of(config: DiffusionTraining) -> SamplingModel:
    network = prior_task(config).learner.network.eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))  # what starts at zero sees no condition
    arguments = config.network_arguments(PRIOR_DATASET_INFO)
    sampling = DiffusionSampling(num_inference_steps=4)
    return SamplingModel("base", "unet", arguments, config.settings(()), network, None, sampling)


def test_a_image_follows_its_prompt_through_the_frozen_text_and_not_its_batch() -> None:
    config, text = decoder_config(conditions=("text_states",)), frozen_contrastive()
    assert config.network_arguments(PRIOR_DATASET_INFO)["text_states_dim"] == 8
    model = model_of(config)
    red_and_blue = [Request(prompt=prompt, seed=1, guidance_scale=2.0) for prompt in ("a red circle", "a blue square")]
    requests = [plan_of(request, [model], ()) for request in red_and_blue]
    red, blue = denoise(model, requests, frozen=frozen_conditions(model, requests, text=text))
    alone = denoise(model, requests[1:], frozen=frozen_conditions(model, requests[1:], text=text))
    torch.testing.assert_close(alone[0], blue, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(red, blue, atol=1e-3)
    plain = [plan_of(request.replace(guidance_scale=1.0), [model], ()) for request in red_and_blue]
    assert not torch.allclose(denoise(model, plain, frozen=frozen_conditions(model, plain, text=text))[0], red)


def test_another_size_than_the_encoders_is_refused() -> None:
    check_sizes(decoder_config(), {"text_states_dim": 8, "text_states_length": 6, "image_embedding_dim": 6})
    with pytest.raises(ValueError, match="text_states_dim is 512 in the recipe, but its encoder makes 8"):
        check_sizes(decoder_config(text_states_dim=512), {"text_states_dim": 8})
