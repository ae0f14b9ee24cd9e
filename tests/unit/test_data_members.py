"""Laws of members: depth maps and masks are read by the laws of images, also as second images of the same samples."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from components.data.decoded import ImageSamples
from components.data.encoding import ShardJob, TokenEncoder
from components.data.held_out import held_out_arrays, read_split
from components.data.images import Degradation, degrade, jpeg_compressed, load_depth, load_image, load_mask
from components.data.listing import ShardError
from components.data.shards import Member, ShardEntry, ShardIndex, View, check_member, load_index
from components.data.tars import iterate_shard
from components.data.tokens import parse_tokens
from components.models.bundle import load_bundle
from components.runtime.storage.store import Store
from components.sampling.images import from_uint8
from components.stages.training import train_model
from components.training.batches import to_batch
from tests.distributed.runs import context_of, images_artifact
from tests.image_sets import read_rows, read_whole_shard, rewrite, write_scenes, write_set
from tests.tiny_cascade import commit_model, write_models
from tests.tiny_training import autoencoder_config

RESOLUTION, SIZES = 16, (7, 6, 5)
MEMBERS: tuple[Member, ...] = ("image", "depth", "mask")
PLAIN = {"image", "label", "text", "position"}
TASKS = ("jpeg", "colorization", "inpainting")
HOW = Degradation(seed=3, tasks=TASKS)


@pytest.fixture
def scenes(tmp_path: Path) -> ShardIndex:
    return write_scenes(Store(str(tmp_path)), sizes=SIZES, resolution=RESOLUTION)


def stored(index: ShardIndex, entry: ShardEntry) -> list[dict[str, bytes]]:
    return [group.members for group in iterate_shard(Store(index.root).read(entry.url), entry.url)]


@pytest.mark.parametrize("resolution", [16, 12])
def test_each_member_is_what_its_file_gives(scenes: ShardIndex, resolution: int) -> None:
    groups = stored(scenes, scenes.shards[0])
    expected = {
        "image": [load_image(group["png"], resolution=resolution) for group in groups],
        "depth": [load_depth(group["depth.png"], resolution=resolution) for group in groups],
        "mask": [load_mask(group["mask.png"], resolution=resolution, mask_values=3) for group in groups],
    }
    for member in MEMBERS:
        read = read_whole_shard(scenes, scenes.shards[0], View(resolution, member=member))
        np.testing.assert_array_equal(read.image, np.stack(expected[member]))


def test_keys_labels_captions_and_splits_do_not_depend_on_the_member(scenes: ShardIndex) -> None:
    for split in ("train", "holdout"):
        plain, *others = (read_split(scenes, split, View(8, member=member)) for member in MEMBERS)
        for other in others:
            assert (other.key, other.caption) == (plain.key, plain.caption)
            np.testing.assert_array_equal(other.label, plain.label)
            np.testing.assert_array_equal(other.text, plain.text)
            assert (other.image != plain.image).any()


def test_the_depth_of_a_scene_is_nearest_on_a_solid_or_the_floor_and_farthest_on_the_wall(scenes: ShardIndex) -> None:
    depth, mask = (read_whole_shard(scenes, scenes.shards[0], View(16, member=m)).image for m in MEMBERS[1:])
    assert (depth.max((1, 2, 3)) == 255).all()
    assert (depth.min((1, 2, 3)) == 0).all()
    assert set(np.unique(mask)) <= {0, 128, 255}


@pytest.mark.parametrize("how", [{"member": "depth"}, {"member": "mask"}, {"condition_member": "depth"}])
def test_a_set_without_the_member_is_refused_naming_shard_sample_and_remedy(
    tmp_path: Path, how: dict[str, Member]
) -> None:
    index, (member,) = write_set(Store(str(tmp_path)), sizes=(3, 2)), how.values()
    said = rf"shard-000000\.tar, sample 000000: no {member}\.png next to the image; .* or set member to image"
    with pytest.raises(ShardError, match=said):
        read_split(index, "train", View(8, **how))
    with pytest.raises(ShardError, match=said):
        check_member(index, member)
    check_member(index, "image")


def test_a_stage_refuses_a_set_without_the_member_before_anything_trains(tmp_path: Path) -> None:
    config, context = autoencoder_config(member="depth"), context_of(tmp_path, "autoencoder", workers=1)
    with pytest.raises(ShardError, match=r"shard-000000\.tar, sample 000000: no depth\.png"):
        train_model(config, context, images=images_artifact(tmp_path))
    assert not list(context.store.list())


def test_a_stage_refuses_masks_of_another_number_of_classes(tmp_path: Path) -> None:
    classes = {"reconstruction": "classes", "image_channels": 7, "member": "mask", "adversarial_weight": 0.0}
    write_scenes(Store(str(tmp_path / "images" / "files")), sizes=SIZES, resolution=RESOLUTION)
    context = context_of(tmp_path, "autoencoder", workers=1)
    with pytest.raises(ValueError, match=r"masks of 3 values need image_channels=3 in the recipe"):
        train_model(autoencoder_config(**classes), context, images=images_artifact(tmp_path))


@pytest.mark.parametrize("member", ["depth", "mask"])
def test_the_tokens_of_a_member_are_those_of_its_images(scenes: ShardIndex, tmp_path: Path, member: Member) -> None:
    folder, files = write_models(tmp_path / "models")["tokenizer"], Store(str(tmp_path / "tokens"))
    encoder = TokenEncoder(scenes, commit_model(tmp_path, "autoencoder", "key", folder), files, member=member)
    encoder(ShardJob(0, "x.parquet", scenes.shards[0])).finish()
    found = parse_tokens(files.read("x.parquet"), "x.parquet")
    images = read_whole_shard(scenes, scenes.shards[0], View(16, member=member))
    expected = load_bundle(folder).module.tokenize(from_uint8(images.image)).flatten(1)
    assert found.key == images.key
    np.testing.assert_array_equal(found.tokens, expected.numpy())


def test_one_sample_that_lacks_the_member_is_named(scenes: ShardIndex) -> None:
    """The first sample has it, so the check at the start passes, and reading tells."""
    entry = scenes.shards[1]
    groups = list(iterate_shard(Store(scenes.root).read(entry.url), entry.url))
    del groups[2].members["depth.png"]
    changed = rewrite(Store(scenes.root), entry, groups)
    index = scenes.model_copy(update={"shards": (scenes.shards[0], changed)})
    check_member(index, "depth")
    with pytest.raises(ShardError, match=rf"shard-000001\.tar, sample {groups[2].key}: no depth\.png"):
        read_whole_shard(index, changed, View(8, member="depth"))
    assert len(read_whole_shard(index, changed, View(8)).key) == SIZES[1]


def test_a_mask_with_more_values_than_the_index_says_is_refused_and_an_index_can_say_more_or_nothing(
    scenes: ShardIndex,
) -> None:
    few = scenes.model_copy(update={"mask_values": 2})
    with pytest.raises(ShardError, match=r"mask\.png can't be decoded: the mask holds the value 2, .* mask_values"):
        read_split(few, "train", View(16, member="mask"))
    many = scenes.model_copy(update={"mask_values": 6})
    assert set(np.unique(read_split(many, "train", View(16, member="mask")).image)) == {0, 51, 102}
    store = Store(scenes.root)
    written = json.loads(store.read("index.json"))
    del written["mask_values"]
    store.write("index.json", json.dumps(written).encode())
    assert load_index(scenes.root) == scenes


def rows_of(
    index: ShardIndex, degradation: Degradation | None = None, *, condition_member: Member | None = None, **place: int
) -> dict[str, np.ndarray]:
    """The first two epochs and more of the training stream."""
    view = View(8, condition_member=condition_member)
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
    images = read_split(scenes, "train", View(8, condition_member=condition_member))
    for image, condition in zip(both["image"], both["condition_image"], strict=True):
        (found,) = np.nonzero((images.image == image).all((1, 2, 3)))
        assert len(found) == 1
        np.testing.assert_array_equal(condition, images.condition_image[found[0]])


@pytest.mark.parametrize("member", ["depth", "mask"])
def test_a_second_member_is_what_the_first_would_be(scenes: ShardIndex, member: Member) -> None:
    """In a split, in the stream, and among held-out samples; one process, one cache: none is taken for another."""
    views = View(8, member=member, condition_member="image"), View(8, condition_member=member)
    for read in (
        lambda view: read_split(scenes, "train", view)._asdict(),
        lambda view: read_rows(ImageSamples(scenes, view)),
        lambda view: held_out_arrays(scenes, view, limit=4),
    ):
        swapped, plain = map(read, views)
        np.testing.assert_array_equal(swapped["image"], plain["condition_image"])
        np.testing.assert_array_equal(swapped["condition_image"], plain["image"])
        np.testing.assert_array_equal(swapped["label"], plain["label"])
    assert read_split(scenes, "train", View(8)).condition_image is None


@pytest.mark.parametrize("how", [{"condition_member": "depth"}, {"degradation": HOW}])
def test_conditions_depend_on_the_position_alone(scenes: ShardIndex, how: dict[str, Any]) -> None:
    whole, part = rows_of(scenes, **how), rows_of(scenes, first=5, rank=1, world_size=2, **how)
    for name, column in part.items():
        np.testing.assert_array_equal(column, whole[name][part["position"]], err_msg=name)


def test_two_condition_images_are_refused(scenes: ShardIndex) -> None:
    with pytest.raises(ValueError, match="either depth or a degraded image, not both"):
        ImageSamples(scenes, View(8, condition_member="depth"), HOW)


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
