"""Laws of the contrastive encoder, of the classifier, and of what is trained and sampled behind frozen encoders."""

import pytest
import torch
from torch import nn

from components.configuration.conditions import DatasetInfo
from components.configuration.diffusion import DiffusionTraining
from components.configuration.sampling import DiffusionPriorSampling, DiffusionSampling
from components.models.contrastive import DiffusionPrior
from components.sampling.frozen_text import frozen_conditions, sample_image_embeddings
from components.sampling.generators.diffusion import denoise
from components.sampling.model import SamplingModel
from components.sampling.plan import Plan, plan_of
from components.sampling.requests import Request
from components.training.batches import to_batch
from components.training.frozen import check_sizes, encoded
from components.training.randomness import dropped_conditions, mirrored, shifted
from tests.tiny_text_image import (
    PRIOR_DATASET_INFO,
    classifier_config,
    contrastive_config,
    decoder_config,
    frozen_contrastive,
    prior_config,
    prior_task,
)
from tests.tiny_training import batches, make_task, rows_at, weights_of


def test_a_classifier_of_clean_images_sees_no_noise() -> None:
    for noisy in (True, False):
        task = make_task(classifier_config(noisy=noisy))
        batch = next(batches(task.config, to_batch))
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []

        def spy(x_t: torch.Tensor, time: torch.Tensor, kept=seen) -> torch.Tensor:
            kept.append((x_t, time))
            return torch.zeros(len(x_t), 3)

        task.logits(spy, batch["image"], batch)
        x_t, time = seen[0]
        assert torch.equal(x_t, batch["image"]) != noisy
        assert bool((time == 0).all()) != noisy


def test_accuracy_is_measured_at_several_levels_and_repeats_itself() -> None:
    task = make_task(classifier_config())
    rows = rows_at(task.config, range(1000, 1012))
    metrics = task.evaluate(rows)
    assert metrics == task.evaluate(rows)
    assert {"held_out_accuracy", "held_out_accuracy_25", "held_out_accuracy_75"} < {*metrics}
    assert "held_out_accuracy_25" not in make_task(classifier_config(noisy=False)).evaluate(rows)


def test_frozen_encoders_add_columns_and_their_nulls() -> None:
    task = prior_task(prior_config())
    batch = encoded(next(batches(task.config, to_batch)), task.encoders)
    torch.testing.assert_close(batch["image_embedding"].square().mean(dim=1), torch.ones(8))
    empty = frozen_contrastive().conditions([""])
    for row in range(8):
        torch.testing.assert_close(batch["null_text_states"][row], empty["text_states"][0])
        torch.testing.assert_close(batch["null_text_embedding"][row], empty["text_embedding"][0])
    assert not any(tensor.requires_grad for tensor in batch.values())


def test_dropped_conditions_of_frozen_encoders_are_those_of_the_empty_text_both_together() -> None:
    config = prior_config(cond_drop_prob=0.5, global_batch_size=64)
    task = prior_task(config)
    batch = encoded(next(batches(config, to_batch)), task.encoders)
    mixed = dropped_conditions(batch, config.conditioning, PRIOR_DATASET_INFO, seed=5)
    states = (mixed["text_states"] == batch["null_text_states"]).flatten(1).all(1)
    embedding = (mixed["text_embedding"] == batch["null_text_embedding"]).all(1)
    assert torch.equal(states, embedding)
    assert 16 < int(states.sum()) < 48
    assert torch.equal(mixed["text_states"][~states], batch["text_states"][~states])


def test_training_moves_every_weight_and_learns_pairs_by_heart() -> None:
    config = contrastive_config(total_steps=60, warmup_steps=2, max_shift=0, learning_rate=5e-3)
    task = make_task(config)
    before, batch, losses = weights_of(task), next(batches(config, to_batch)), []
    for step in range(1, config.optimization.total_steps + 1):
        losses.append(float(task.train_step(batch, step)["loss"]))
    after = weights_of(task)
    assert not [name for name in before if "network." in name and torch.equal(before[name], after[name])]
    assert losses[-1] < 0.1 * losses[0]
    rows = rows_at(config, range(config.optimization.global_batch_size))
    metrics = task.evaluate({name: rows[name] for name in ("image", "text")})
    assert metrics["held_out_image_to_text"] == metrics["held_out_text_to_image"] == 1
    assert task.evaluate(rows) == task.evaluate(rows)


def test_a_set_without_captions_is_refused() -> None:
    with pytest.raises(ValueError, match="this set has none"):
        contrastive_config().network_arguments(DatasetInfo(num_classes=3))


def test_shifts_move_each_image_by_its_position_and_repeat_its_edge() -> None:
    image = torch.arange(2 * 3 * 6 * 6.0).reshape(2, 3, 6, 6).repeat(8, 1, 1, 1)
    position = torch.arange(16)
    moved = shifted(image, position, seed=1, max_shift=2)
    assert torch.equal(shifted(image[5:7], position[5:7], seed=1, max_shift=2), moved[5:7])
    assert len({tuple(row.flatten().tolist()) for row in moved[::2]}) > 3  # not all by the same
    for before, after in zip(image, moved, strict=True):
        padded = torch.nn.functional.pad(before, [2] * 4, mode="replicate")
        windows = [padded[:, y : y + 6, x : x + 6] for y in range(5) for x in range(5)]
        assert any(torch.equal(after, window) for window in windows)
    assert shifted(image, position, seed=1, max_shift=0) is image


def test_mirroring_takes_about_half_of_the_images() -> None:
    image = torch.randn(200, 1, 2, 2)
    moved = mirrored(image, torch.arange(200), seed=1)
    flipped = (moved == image.flip(3)).flatten(1).all(1)
    assert torch.equal(moved[~flipped], image[~flipped])
    assert 60 < int(flipped.sum()) < 140


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
