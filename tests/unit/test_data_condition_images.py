"""Laws of condition images in the stream: a second image of the same sample, and nothing else changes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from components.data.decoded import ImageSamples
from components.data.held_out import held_out_arrays, read_split
from components.data.images import Degradation, degrade, jpeg_compressed
from components.data.listing import ShardError
from components.data.shards import Member, ShardIndex, View
from components.runtime.storage.store import Store
from components.training.batches import to_batch
from tests.image_sets import read_rows, write_scenes, write_set

SIZES, RESOLUTION = (7, 6, 5), 8
PLAIN = {"image", "label", "text", "position"}
TASKS = ("jpeg", "colorization", "inpainting")
HOW = Degradation(seed=3, tasks=TASKS)


@pytest.fixture
def scenes(tmp_path: Path) -> ShardIndex:
    return write_scenes(Store(str(tmp_path)), sizes=SIZES, resolution=16)


def rows_of(
    index: ShardIndex, degradation: Degradation | None = None, *, condition_member: Member | None = None, **place: int
) -> dict[str, np.ndarray]:
    """The first two epochs and more of the training stream."""
    view = View(RESOLUTION, condition_member=condition_member)
    return read_rows(ImageSamples(index, view, degradation), **place)


@pytest.mark.parametrize("condition_member", ["depth", "mask", "image"])
def test_the_condition_image_is_of_the_same_sample_and_the_stream_stays_what_it_was(
    scenes: ShardIndex, condition_member: Any
) -> None:
    plain, both = rows_of(scenes), rows_of(scenes, condition_member=condition_member)
    assert set(plain) == PLAIN
    assert set(both) == PLAIN | {"condition_image"}
    for name in PLAIN:
        np.testing.assert_array_equal(both[name], plain[name])
    images = read_split(scenes, "train", View(RESOLUTION, condition_member=condition_member))
    for image, condition in zip(both["image"], both["condition_image"], strict=True):
        (found,) = np.nonzero((images.image == image).all((1, 2, 3)))
        assert len(found) == 1
        np.testing.assert_array_equal(condition, images.condition_image[found[0]])


def test_a_second_member_is_what_the_first_would_be(scenes: ShardIndex) -> None:
    swapped = read_split(scenes, "train", View(8, member="depth", condition_member="image"))
    plain = read_split(scenes, "train", View(8, condition_member="depth"))
    np.testing.assert_array_equal(swapped.image, plain.condition_image)
    np.testing.assert_array_equal(swapped.condition_image, plain.image)
    assert read_split(scenes, "train", View(8)).condition_image is None


@pytest.mark.parametrize("how", [{"condition_member": "depth"}, {"degradation": HOW}])
def test_conditions_depend_on_the_position_alone(scenes: ShardIndex, how: dict[str, Any]) -> None:
    whole, part = rows_of(scenes, **how), rows_of(scenes, first=5, rank=1, world_size=2, **how)
    for name, column in part.items():
        np.testing.assert_array_equal(column, whole[name][part["position"]], err_msg=name)


def test_a_set_without_the_condition_member_is_refused(tmp_path: Path) -> None:
    index = write_set(Store(str(tmp_path)), sizes=(3, 2))
    with pytest.raises(ShardError, match=r"sample 000000: no depth\.png next to the image"):
        read_split(index, "train", View(8, condition_member="depth"))
    with pytest.raises(ValueError, match="either depth or a degraded image, not both"):
        ImageSamples(index, View(8, condition_member="depth"), HOW)


def test_held_out_arrays_serve_the_condition_and_batches_make_floats_of_it(scenes: ShardIndex) -> None:
    held_out = held_out_arrays(scenes, View(8, condition_member="mask"), limit=4)
    batch = to_batch(held_out)
    assert batch["condition_image"].shape == batch["image"].shape
    assert batch["condition_image"].dtype == torch.float32
    assert batch["condition_image"].abs().max() <= 1
    degraded = held_out_arrays(scenes, View(8), limit=4, degradation=HOW)
    expected = degrade(degraded["image"], np.arange(len(degraded["image"])), HOW)
    for name in ("task", "condition_image"):
        np.testing.assert_array_equal(degraded[name], expected[name])
    assert to_batch(degraded)["task"].dtype == torch.int64


def random_images(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)


def test_a_degradation_is_of_its_task_alone_and_depends_on_seed_and_position_and_not_on_the_batch() -> None:
    images, position = random_images(60), np.arange(100, 160)
    whole = degrade(images, position, HOW)
    changed = (whole["condition_image"] != images).any((1, 2, 3))
    np.testing.assert_array_equal(changed, whole["task"] == TASKS.index("jpeg"))
    assert set(whole["task"]) == {0, 1, 2}
    parts = [degrade(images[part], position[part], HOW) for part in (slice(0, 7), slice(7, 60))]
    for name, column in whole.items():
        np.testing.assert_array_equal(column, np.concatenate([part[name] for part in parts]))
    assert (degrade(images, position, HOW._replace(seed=4))["task"] != whole["task"]).any()
    assert (degrade(images, position + 40, HOW)["task"] != whole["task"]).any()


def test_tasks_and_qualities_are_drawn_alike_and_a_lower_quality_keeps_less() -> None:
    only = Degradation(seed=0, tasks=("jpeg",), jpeg_qualities=(5, 7))
    image = random_images(1)
    by_quality = [jpeg_compressed(image[0], quality=quality) for quality in (5, 6, 7)]
    rows = degrade(np.repeat(image, 300, axis=0), np.arange(300), only)["condition_image"]
    counts = [int((rows == made).all((1, 2, 3)).sum()) for made in by_quality]
    assert sum(counts) == 300
    assert min(counts) > 70
    tasks = degrade(np.repeat(image, 600, axis=0), np.arange(600), HOW)["task"]
    assert np.bincount(tasks).min() > 150
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[:, None, None] * 4, (64, 64, 3)).copy()
    ramp[::7, ::5] = (200, 30, 90)
    kept = [jpeg_compressed(ramp, quality=quality).astype(float) for quality in (5, 10, 20, 90)]
    errors = [np.square(each - ramp.astype(float)).mean() for each in kept]
    assert errors == sorted(errors, reverse=True)
