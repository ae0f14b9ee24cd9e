"""Laws of the trainings behind frozen encoders and of the classifier, without Ray."""

import torch

from components.training.batches import to_batch
from components.training.frozen import encoded
from components.training.randomness import dropped_conditions
from tests.tiny_text_image import PRIOR_DATASET_INFO, classifier_config, frozen_contrastive, prior_config, prior_task
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


def test_the_frozen_encoder_is_no_part_of_what_is_trained_or_kept() -> None:
    task = prior_task(prior_config())
    names = {name.split(".")[1] for name in weights_of(task)}
    assert names <= {name for name, _ in task.learner.network.named_children()} | {"query", "position_embedding"}
