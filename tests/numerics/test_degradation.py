"""Laws of degradations, masks and an upsampler's condition: each image for itself, known pixels as they are."""

import pytest
import torch
from scipy import ndimage

from components.models.diffusion.corruption import (
    MASK_TASKS,
    NUMBERS,
    RECTANGLES,
    TASKS,
    add_noise_in_mask,
    augment_low_res,
    border_mask,
    brushed,
    degrade,
    denoise_in_mask,
    downsample,
    gray,
    inpainting_mask,
    loss_in_mask,
    quantize_8_bit,
    rectangle,
    strokes,
    upsample,
)
from components.models.diffusion.objective import make_objective
from components.models.diffusion.schedule import make_schedule

DISCRETE = {"kind": "discrete", "schedule": "cosine", "num_train_timesteps": 50}
OBJECTIVES = [
    *({**DISCRETE, "prediction_type": kind} for kind in ("epsilon", "sample", "v_prediction")),
    {"kind": "edm"},
    {"kind": "flow"},
]


AREA = (0.2, 0.5)


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
    return degrade(image, compressed, tasks=tasks[part], **given, mask_area=AREA, factors=(2, 4))


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
    given = {"numbers": numbers, "noise": torch.zeros_like(board), "mask_area": AREA, "factors": (2, 4)}
    made = degrade(board, board, tasks=["super_resolution"], **given)
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
def test_noise_is_added_in_the_mask_and_the_loss_is_the_mean_over_it_and_sees_no_known_pixel(
    settings: dict,
) -> None:
    objective, x_0, noise, output, mask, time = diffusion_tensors(settings)
    x_t = add_noise_in_mask(objective, x_0, noise, time, mask)
    torch.testing.assert_close(x_t, torch.where(mask > 0, objective.add_noise(x_0, noise, time), x_0), rtol=0, atol=0)
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


def test_the_network_of_a_sampler_sees_the_known_pixels() -> None:
    known, x_t = torch.randn(2, 2, 3, 8, 8).unbind()
    mask = (torch.rand(2, 1, 8, 8) < 0.5).float()
    seen = denoise_in_mask(lambda x, time: x + time, known, mask)(x_t, torch.zeros(()))
    assert torch.equal(seen, torch.where(mask > 0, x_t, known))


def draws(count: int) -> list[list[float]]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, NUMBERS, generator=generator, dtype=torch.float64).tolist()


@pytest.mark.parametrize("resolution", [4, 8, 64])
@pytest.mark.parametrize("make", [inpainting_mask, border_mask])
def test_a_mask_has_pixels_and_leaves_pixels(make, resolution: int) -> None:
    for numbers in draws(200):
        mask = make(numbers, resolution, area=AREA)
        assert mask.shape == (resolution, resolution)
        assert mask.dtype == torch.bool
        assert 0 < mask.sum() < mask.numel()


@pytest.mark.parametrize("extreme", [0.0, 1 - 2**-24])
def test_the_ends_of_the_unit_interval_make_masks_too(extreme: float) -> None:
    for resolution in (4, 16):
        for mask in (
            border_mask([extreme] * NUMBERS, resolution, area=AREA),
            strokes([extreme] * NUMBERS, resolution),
            rectangle([extreme] * NUMBERS, resolution, area=AREA),
        ):
            assert 0 < mask.sum() < mask.numel()


@pytest.mark.parametrize("make", [rectangle, border_mask])
def test_a_rectangle_and_a_border_hide_the_share_that_was_drawn(make) -> None:
    for numbers in draws(50):
        wanted = AREA[0] + (AREA[1] - AREA[0]) * numbers[0]
        assert make(numbers, 512, area=AREA).double().mean().item() == pytest.approx(wanted, abs=0.01)


def test_a_rectangle_is_one_filled_box_anywhere_in_the_image() -> None:
    seen = torch.zeros(16, 16)
    for numbers in draws(2000):
        mask = rectangle(numbers, 16, area=(0.05, 0.2))
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        box = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert box.all()
        assert 0.35 <= len(rows) / len(columns) <= 2.9  # from half to twice, rounded to pixels
        seen += mask
    assert (seen > 0).all()


def test_a_border_has_one_width_and_each_number_of_sides_comes_alike() -> None:
    counts = [0] * 5
    for numbers in draws(800):
        mask = border_mask(numbers, 64, area=AREA)
        known = ~mask
        rows, columns = known.any(1).nonzero().flatten(), known.any(0).nonzero().flatten()
        assert known[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all()
        widths = [int(w) for w in (rows.min(), 63 - rows.max(), columns.min(), 63 - columns.max()) if w > 0]
        assert len({*widths}) == 1
        counts[len(widths)] += 1
    assert counts[0] == 0
    assert min(counts[1:]) > 150


def test_a_brushed_line_is_all_that_lies_within_its_radius() -> None:
    mask = brushed(torch.tensor([[2.0, 8.5], [14.0, 8.5]], dtype=torch.float64), 2.0, 16)
    assert mask[8, 2:14].all()
    assert torch.equal(mask.any(1).nonzero().flatten(), torch.arange(6, 11))
    assert torch.equal(mask, mask.flip(1))


def test_strokes_are_at_most_three_pieces_and_scale_with_the_image() -> None:
    shares = {64: [], 128: []}
    for numbers in draws(60):
        for resolution, found in shares.items():
            mask = strokes(numbers, resolution)
            assert ndimage.label(mask.numpy(), structure=[[1] * 3] * 3)[1] <= 3
            found.append(mask.double().mean().item())
    assert shares[64] == pytest.approx(shares[128], abs=0.02)
    assert 0.05 < sum(shares[64]) / 60 < 0.5


def test_half_of_the_inpainting_masks_are_rectangles() -> None:
    for numbers in draws(30):
        made = rectangle(numbers[1:], 32, area=AREA) if numbers[0] < RECTANGLES else strokes(numbers[1:], 32)
        assert torch.equal(inpainting_mask(numbers, 32, area=AREA), made)


SCHEDULE = make_schedule("linear", num_train_timesteps=100)


@pytest.mark.parametrize("size", [16, 8, 4])
def test_downsampling_never_aliases(size):
    """The finest checkerboard turns gray; interpolation without antialiasing turns it into black or white."""
    checkerboard = ((torch.arange(32)[:, None] + torch.arange(32)) % 2 * 2.0 - 1).expand(1, 3, 32, 32)
    torch.testing.assert_close(downsample(checkerboard, size), torch.zeros(1, 3, size, size))


def test_resizing_keeps_flat_color_and_means_of_areas():
    flat = torch.full((1, 3, 8, 8), 0.3)
    torch.testing.assert_close(upsample(flat, 32), torch.full((1, 3, 32, 32), 0.3))
    image = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(downsample(image, 2).mean(), image.mean())
    torch.testing.assert_close(downsample(image, 4)[0, 0, 1, 2], image[0, 0, 2:4, 4:6].mean())


def test_upsampling_keeps_pixel_centers_where_they_are():
    ramp = (torch.arange(8.0) + 0.5).expand(1, 1, 8, 8)
    torch.testing.assert_close(upsample(ramp, 16)[0, 0, 8, 1:-1], (torch.arange(16.0)[1:-1] + 0.5) / 2)


def test_noise_level_0_leaves_the_condition_and_level_n_is_n_noising_steps():
    low_res, noise = torch.randn(2, 3, 3, 4, 4).unbind()
    augmented = augment_low_res(SCHEDULE, low_res, noise, torch.tensor([0, 1, 60]))
    assert torch.equal(augmented[0], low_res[0])
    stepped = SCHEDULE.add_noise(low_res[1:], noise[1:], torch.tensor([0, 59]))
    torch.testing.assert_close(augmented[1:], stepped)  # each sample at its own level


def test_stored_images_pass_8_bit_rounding_unchanged():
    stored = torch.arange(256).reshape(1, 1, 16, 16) / 127.5 - 1
    torch.testing.assert_close(quantize_8_bit(stored), stored)


def test_8_bit_rounding_goes_to_the_nearest_stored_value_and_into_the_range():
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    assert (quantize_8_bit(image) - image).abs().max() <= 0.5 / 127.5 + 1e-6
    assert len(quantize_8_bit(image).unique()) <= 256
    assert quantize_8_bit(torch.tensor([-3.0, 3.0])).tolist() == [-1, 1]
