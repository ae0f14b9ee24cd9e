"""Laws of patch training: windows are uniform and inside, one for all images of a sample, and know no batch."""

import torch

from components.models.diffusion.schedule import make_schedule
from components.training.randomness import cropped, draw_windows


def test_windows_lie_inside_and_each_place_comes_alike() -> None:
    windows = draw_windows(0, torch.arange(4000), resolution=8, size=5)
    for corner in (windows.top, windows.left):
        counts = corner.bincount(minlength=4)
        assert len(counts) == 4
        assert counts.min() > 900
    together = (4 * windows.top + windows.left).bincount(minlength=16)
    assert together.min() > 180


def test_a_window_depends_on_seed_and_position_alone() -> None:
    position = torch.arange(100, 116)
    whole = draw_windows(3, position, resolution=64, size=16)
    for part in (slice(0, 5), slice(5, 16)):
        alone = draw_windows(3, position[part], resolution=64, size=16)
        assert torch.equal(alone.top, whole.top[part])
        assert torch.equal(alone.left, whole.left[part])
    assert not torch.equal(draw_windows(4, position, resolution=64, size=16).top, whole.top)


def test_all_images_of_a_sample_are_cut_alike_and_the_rest_stays() -> None:
    place = torch.arange(64.0).reshape(1, 1, 8, 8)
    batch = {"image": place.expand(3, 3, 8, 8), "low_res": -place.expand(3, 3, 8, 8), "label": torch.arange(3)}
    cut = cropped(batch, draw_windows(0, torch.arange(3), resolution=8, size=4))
    assert cut["image"].shape == (3, 3, 4, 4)
    assert torch.equal(cut["image"], -cut["low_res"])
    assert torch.equal(cut["label"], batch["label"])
    assert (cut["image"][:, 0].diff(dim=2) == 1).all()
    assert (cut["image"][:, 0].diff(dim=1) == 8).all()


def test_cropping_commutes_with_adding_noise() -> None:
    schedule = make_schedule("cosine", num_train_timesteps=50)
    x_0, noise = torch.randn(2, 4, 3, 8, 8).unbind()
    timesteps, windows = torch.tensor([0, 10, 30, 49]), draw_windows(1, torch.arange(4), resolution=8, size=3)
    after = windows.cut(schedule.add_noise(x_0, noise, timesteps))
    assert torch.equal(after, schedule.add_noise(windows.cut(x_0), windows.cut(noise), timesteps))


def test_a_window_of_the_whole_size_is_the_image() -> None:
    image = torch.randn(2, 3, 8, 8)
    windows = draw_windows(0, torch.arange(2), resolution=8, size=8)
    assert torch.equal(windows.cut(image), image)
