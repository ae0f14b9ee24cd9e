"""Laws of training on degraded images: what is drawn, what is looked at, and what a recipe may say."""

from typing import Any

import torch

from components.configuration.diffusion import TASKS
from components.models.diffusion.corruption import MASK_TASKS
from components.training.batches import to_batch
from components.training.randomness import draw_windows, dropped_conditions
from components.training.tasks.diffusion import ImageToImageTask
from tests.tiny_training import DATASET_INFO, diffusion_config, image_to_image_config, make_task, rows_at


def task_and_batch(count: int = 24, **changes: Any) -> tuple[ImageToImageTask, dict[str, torch.Tensor]]:
    config = image_to_image_config(**changes)
    task = make_task(config)
    assert isinstance(task, ImageToImageTask)
    return task, to_batch(rows_at(config, range(count)))


def part(batch: dict[str, torch.Tensor], rows: slice) -> dict[str, torch.Tensor]:
    return {name: column[rows] for name, column in batch.items()}


def test_what_is_left_of_a_image_depends_on_seed_and_position_alone() -> None:
    task, batch = task_and_batch()
    whole = task.degraded(batch).condition
    parts = [task.degraded(part(batch, rows)).condition for rows in (slice(0, 5), slice(5, 24))]
    assert torch.equal(torch.cat(parts), whole)
    other, _ = task_and_batch(seed=6)
    assert not torch.equal(other.degraded(batch).condition, whole)
    elsewhere = task.degraded(batch | {"position": batch["position"] + 24}).condition
    assert not torch.equal(elsewhere, whole)


def test_only_the_pixels_of_a_mask_are_changed_where_a_task_keeps_the_others() -> None:
    task, batch = task_and_batch()
    made = task.degraded(batch)
    keeps = torch.tensor([TASKS[place] in MASK_TASKS for place in batch["task"].tolist()])
    assert 0 < keeps.sum() < 24
    known = (made.mask == 0).expand_as(made.image)
    assert torch.equal(made.image[known], batch["image"][known])
    assert (made.mask[~keeps] == 1).all()
    assert 0 < made.mask[keeps].mean() < 0.9


def test_the_loss_has_no_gradient_at_known_pixels() -> None:
    task, batch = task_and_batch(tasks=MASK_TASKS)
    batch["task"] %= 2
    seen: list[torch.Tensor] = []

    def network(x_t: torch.Tensor, time: torch.Tensor, **conditions: torch.Tensor) -> torch.Tensor:
        seen.append(x_t)
        seen.append(torch.zeros_like(x_t).requires_grad_())
        return seen[-1]

    conditions = task.conditioning_images(batch)
    task.losses(network, batch, conditions, task.uniform_timesteps(batch["position"])).sum().backward()
    x_t, output = seen
    mask = conditions["condition_image"][:, 3:].expand_as(x_t) > 0
    assert torch.equal(x_t[~mask], batch["image"][~mask])
    assert (output.grad[~mask] == 0).all()
    assert (output.grad[mask] != 0).all()


def test_the_restored_image_keeps_the_known_pixels() -> None:
    task, batch = task_and_batch()
    made = task.sample(batch)
    known = (task.degraded(batch).mask == 0).expand_as(made)
    assert torch.equal(made[known], batch["image"][known])


def test_training_evaluation_and_previews_see_windows_and_the_trained_network_whole_images() -> None:
    config = diffusion_config(low_res_resolution=4, crop_size=4, attention_resolutions=())
    task, rows = make_task(config), rows_at(config, range(6))
    batch, sizes = to_batch(rows), []
    for network in (task.learner.network, task.learner.snapshot()):
        network.register_forward_pre_hook(lambda module, inputs: sizes.append(tuple(inputs[0].shape[2:])))
    task.train_step(batch, 1)
    task.evaluate(rows)
    task.preview(rows, 1)
    assert set(sizes) == {(4, 4)}
    low_res, level = task.conditioning_images(batch)["low_res"], torch.zeros(6, dtype=torch.int64)
    conditions = {name: batch[name] for name in config.conditioning.conditions} | {
        "low_res": low_res,
        "noise_level": level,
    }
    whole = task.learner.snapshot()(batch["image"], level, **conditions)
    assert whole.shape == batch["image"].shape
    names = [type(module).__name__ for module in task.learner.network.modules()]
    assert not [name for name in names if "Attention" in name]


def test_windows_are_those_of_the_whole_images_before_noise_is_added() -> None:
    config = diffusion_config(low_res_resolution=4, crop_size=4, attention_resolutions=())
    task, batch = make_task(config), to_batch(rows_at(config, range(6)))
    seen, given = task.crop(batch, noise_level=0)  # no noise
    windows = draw_windows(config.optimization.seed, batch["position"], resolution=8, size=4)
    assert torch.equal(seen["image"], windows.cut(batch["image"]))
    assert torch.equal(given["low_res"], windows.cut(task.conditioning_images(batch)["low_res"]))


def test_a_condition_image_is_dropped_to_zeros_sample_by_sample() -> None:
    image = {"condition_member": "depth", "cond_drop": "independent"}
    config = diffusion_config(conditions=("label", "condition_image"), **image)
    task, batch = make_task(config), to_batch(rows_at(config, range(60)))
    given = dropped_conditions(batch, config.conditioning, DATASET_INFO, seed=5)["condition_image"]
    dropped = (given == 0).all(dim=(1, 2, 3))
    assert 0.15 < dropped.float().mean() < 0.45  # cond_drop_prob is 0.3
    assert torch.equal(given[~dropped], batch["condition_image"][~dropped])
    assert torch.isfinite(task.part_losses(batch)["loss"])
