"""Laws of degradations: each image for itself, known pixels as they are, and a loss that does not look at them."""

import pytest
import torch

from components.models.diffusion.corruption import gray
from components.models.diffusion.degradation import (
    MASK_TASKS,
    NUMBERS,
    TASKS,
    add_noise_in_mask,
    degrade,
    denoise_in_mask,
    loss_in_mask,
)
from components.models.diffusion.objective import make_objective

DISCRETE = {"kind": "discrete", "schedule": "cosine", "num_train_timesteps": 50}
OBJECTIVES = [
    *({**DISCRETE, "prediction_type": kind} for kind in ("epsilon", "sample", "v_prediction")),
    {"kind": "edm"},
    {"kind": "flow"},
]
HOW = {"mask_area": (0.2, 0.5), "factors": (2, 4)}


def stored(count: int, size: int = 16) -> torch.Tensor:
    """Images of 8 bits."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator) / 127.5 - 1


def inputs(tasks: list[str], size: int = 16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    image = stored(len(tasks), size)
    return {
        "image": image,
        "compressed": image.flip(0),
        "numbers": torch.rand(len(tasks), NUMBERS, generator=generator),
        "noise": torch.randn(image.shape, generator=generator),
    }


def degraded(tasks: list[str], part: slice = slice(None)):
    given = {name: value[part] for name, value in inputs(tasks).items()}
    image, compressed = given.pop("image"), given.pop("compressed")
    return degrade(image, compressed, tasks=tasks[part], **given, **HOW)


def test_a_image_is_degraded_alone_as_in_its_batch() -> None:
    tasks = list(TASKS) * 3
    whole = degraded(tasks)
    for row in range(len(tasks)):
        alone = degraded(tasks, slice(row, row + 1))
        assert torch.equal(alone.condition, whole.condition[row : row + 1])


def test_the_pixels_outside_of_a_mask_are_exactly_the_image_and_inside_is_noise() -> None:
    tasks = list(MASK_TASKS) * 8
    made, given = degraded(tasks), inputs(tasks)
    mask = made.mask.expand_as(made.image) > 0
    assert torch.equal(made.image[~mask], given["image"][~mask])
    assert torch.equal(made.image[mask], given["noise"][mask])
    assert set(made.mask.unique().tolist()) == {0.0, 1.0}
    assert made.condition.shape == (16, 4, 16, 16)


def test_tasks_that_change_every_pixel_have_a_mask_of_ones_and_show_what_is_left() -> None:
    tasks = ["colorization", "jpeg", "super_resolution"]
    made, given = degraded(tasks), inputs(tasks)
    assert (made.mask == 1).all()
    assert torch.equal(made.image[1], given["compressed"][1])
    assert torch.equal(made.image[0, 0], made.image[0, 1])
    assert not torch.equal(made.image[2], given["image"][2])
    assert not torch.isin(made.image, given["noise"]).any()


def test_gray_is_the_luma_and_leaves_gray_images_as_they_are() -> None:
    red = torch.tensor([1.0, -1.0, -1.0]).reshape(1, 3, 1, 1)
    assert gray(red).mean().item() == pytest.approx(2 * 0.299 - 1, abs=0.5 / 127.5)
    once = gray(stored(2))
    torch.testing.assert_close(gray(once), once, rtol=0, atol=1e-6)


@pytest.mark.parametrize("factor", [2, 4])
def test_super_resolution_keeps_what_fewer_pixels_can(factor: int) -> None:
    """The blurred image has the mean of the sharp one, and no checkerboard survives."""
    board = ((torch.arange(16)[:, None] + torch.arange(16)) % 2 * 2.0 - 1).expand(1, 3, 16, 16)
    numbers = torch.full((1, NUMBERS), 0.0 if factor == 2 else 0.9)
    made = degrade(
        board,
        board,
        tasks=["super_resolution"],
        numbers=numbers,
        noise=torch.zeros_like(board),
        mask_area=(0.2, 0.5),
        factors=(2, 4),
    )
    assert made.image.abs().max() <= 1 / 127.5


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown task 'rotation': choose inpainting or"):
        degraded(["rotation"])


def diffusion_tensors(settings: dict):
    objective = make_objective(settings)
    generator = torch.Generator().manual_seed(3)
    x_0, noise, output = torch.randn(3, 4, 3, 8, 8, generator=generator, dtype=torch.float64)
    mask = (torch.rand(4, 1, 8, 8, generator=generator) < 0.4).double()
    time = objective.times(torch.tensor([0.1, 0.4, 0.6, 0.9]))
    return objective, x_0, noise, output.requires_grad_(), mask, time


@pytest.mark.parametrize("settings", OBJECTIVES, ids=lambda s: s.get("prediction_type", s["kind"]))
def test_the_loss_does_not_look_at_known_pixels_and_is_the_mean_over_the_mask(settings: dict) -> None:
    objective, x_0, noise, output, mask, time = diffusion_tensors(settings)
    x_t = add_noise_in_mask(objective, x_0, noise, time, mask)
    loss = loss_in_mask(objective, output, x_0=x_0, noise=noise, x_t=x_t, time=time, mask=mask)
    (gradient,) = torch.autograd.grad(loss.sum(), output)
    inside = mask.expand_as(gradient) > 0
    assert (gradient[~inside] == 0).all()
    assert (gradient[inside] != 0).all()
    for row in range(4):  # the plain loss of nothing but the mask's pixels, laid out as an image of one row
        inner = mask[row, 0] > 0
        pixels = {n: v[row][:, inner][None, :, None] for n, v in {"x_0": x_0, "noise": noise, "x_t": x_t}.items()}
        alone = objective.loss(output[row][:, inner][None, :, None], **pixels, time=time[row : row + 1])
        torch.testing.assert_close(loss[row : row + 1], alone)


@pytest.mark.parametrize("settings", OBJECTIVES, ids=lambda s: s.get("prediction_type", s["kind"]))
def test_a_mask_of_ones_changes_nothing(settings: dict) -> None:
    objective, x_0, noise, output, mask, time = diffusion_tensors(settings)
    mask = torch.ones_like(mask)
    x_t = objective.add_noise(x_0, noise, time)
    assert torch.equal(add_noise_in_mask(objective, x_0, noise, time, mask), x_t)
    given = {"x_0": x_0, "noise": noise, "x_t": x_t, "time": time}
    torch.testing.assert_close(
        loss_in_mask(objective, output, **given, mask=mask), objective.loss(output, **given), rtol=0, atol=0
    )


def test_noise_is_added_in_the_mask_only() -> None:
    objective, x_0, noise, _, mask, time = diffusion_tensors(OBJECTIVES[0])
    x_t = add_noise_in_mask(objective, x_0, noise, time, mask)
    inside = mask.expand_as(x_t) > 0
    assert torch.equal(x_t[~inside], x_0[~inside])
    assert torch.equal(x_t[inside], objective.add_noise(x_0, noise, time)[inside])


def test_the_network_of_a_sampler_sees_the_known_pixels() -> None:
    known, x_t = torch.randn(2, 2, 3, 8, 8).unbind()
    mask = (torch.rand(2, 1, 8, 8) < 0.5).float()
    seen = denoise_in_mask(lambda x, time: x + time, known, mask)(x_t, torch.zeros(()))
    assert torch.equal(seen, torch.where(mask > 0, x_t, known))
