"""Laws of the diffusion prior and of its sampling."""

import pytest
import torch

from components.configuration.sampling import DiffusionPriorSampling
from components.models.contrastive import DiffusionPrior
from components.sampling.frozen_text import sample_image_embeddings
from components.sampling.model import SamplingModel
from components.sampling.plan import Plan
from tests.tiny_text_image import PRIOR_DATASET_INFO, frozen_contrastive, prior_config

CONFIG = prior_config()


def prior(**changes: object) -> SamplingModel:
    arguments = CONFIG.network_arguments(PRIOR_DATASET_INFO)
    sampling = DiffusionPriorSampling(**({"num_inference_steps": 4, "guidance_scale": 1.5} | changes))
    settings, module = {"objective": CONFIG.process.objective()}, DiffusionPrior(**arguments).eval()
    return SamplingModel("prior", "diffusion_prior", arguments, settings, module, None, sampling)


def inputs(size: int = 3) -> dict[str, torch.Tensor]:
    states = torch.randn(size, 6, 8)
    states[:, 4:] = 0
    return {"text_states": states, "text_embedding": torch.randn(size, 6)}


def test_the_query_sees_everything_but_padding() -> None:
    network, conditions = prior().module, inputs()
    for value in conditions.values():
        value.requires_grad_()
    x_t = torch.randn(3, 6, requires_grad=True)
    network(x_t, torch.full((3,), 7), **conditions).sum().backward()
    assert bool((x_t.grad != 0).any(1).all())
    assert bool((conditions["text_embedding"].grad != 0).any(1).all())
    assert bool((conditions["text_states"].grad[:, :4] != 0).any(2).all())
    assert bool((conditions["text_states"].grad[:, 4:] == 0).all())


def test_what_stands_before_the_query_sees_nothing_behind_it() -> None:
    network, conditions = prior().module, inputs()
    states: list[torch.Tensor] = []
    network.blocks[-1].register_forward_hook(lambda module, args, output: states.append(output))
    for x_t in (torch.zeros(3, 6), torch.ones(3, 6)):
        network(x_t, torch.full((3,), 7), **conditions)
    torch.testing.assert_close(states[0][:, :8], states[1][:, :8])  # text, its embedding, time
    assert not torch.allclose(states[0][:, 8:], states[1][:, 8:])


def test_a_text_of_another_length_is_refused() -> None:
    conditions = {"text_states": torch.zeros(1, 5, 8), "text_embedding": torch.zeros(1, 6)}
    with pytest.raises(ValueError, match="5 tokens where 6"):
        prior().module(torch.zeros(1, 6), torch.zeros(1), **conditions)


def test_an_embedding_does_not_depend_on_the_batch() -> None:
    model, text = prior(), frozen_contrastive()
    requests = [Plan(prompt="a red circle", seed=1), Plan(prompt="a blue square", seed=2), Plan(seed=3)]
    together = sample_image_embeddings(model, text, requests)
    torch.testing.assert_close(together.square().mean(dim=1), torch.ones(3))
    for row, request in enumerate(requests):
        torch.testing.assert_close(sample_image_embeddings(model, text, [request])[0], together[row])


def test_of_two_candidates_the_one_nearer_to_the_text_is_kept() -> None:
    text = frozen_contrastive()
    requests = [Plan(prompt="a red circle", seed=seed) for seed in range(8)]
    wanted = text.conditions(["a red circle"] * 8)["text_embedding"]
    torch.manual_seed(0)
    one, two = prior(candidates=1), prior(candidates=2)
    two.module.load_state_dict(one.module.state_dict())
    first, best = (sample_image_embeddings(model, text, requests) for model in (one, two))
    likeness = [torch.cosine_similarity(found, wanted) for found in (first, best)]
    assert bool((likeness[1] >= likeness[0] - 1e-6).all())
    changed = likeness[1] > likeness[0] + 1e-6
    assert bool(changed.any())
    assert not bool(changed.all())


def test_a_perfect_prior_is_sampled_at_its_embedding_whatever_its_components() -> None:
    """Nothing is clipped to [-1, 1]: components of unit variance reach beyond."""
    model, text = prior(guidance_scale=1.0), frozen_contrastive()
    wanted = torch.tensor([2.0, -1.2, 0.3, 0.1, -0.5, 0.2])
    wanted = wanted / wanted.square().mean().sqrt()
    with torch.no_grad():
        model.module.image_out.weight.zero_()
        model.module.image_out.bias.copy_(wanted)
    found = sample_image_embeddings(model, text, [Plan(prompt="a red circle")])
    torch.testing.assert_close(found[0], wanted, rtol=1e-4, atol=1e-4)
