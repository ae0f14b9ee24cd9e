"""Laws of condition members: depth maps and masks are read by the laws of images, and nothing else changes."""

import json
from pathlib import Path

import numpy as np
import pytest

from components.data.decoded import ImageSamples
from components.data.encoding import ShardJob, TokenEncoder
from components.data.held_out import held_out_arrays, read_split
from components.data.images import load_depth, load_image, load_mask
from components.data.listing import ShardError
from components.data.shards import Member, ShardEntry, ShardIndex, View, check_member, load_index
from components.data.tars import iterate_shard
from components.data.tokens import parse_tokens
from components.models.bundle import load_bundle
from components.runtime.storage.store import Store
from components.sampling.images import from_uint8
from components.stages.training import train_model
from tests.distributed.runs import context_of, images_artifact
from tests.image_sets import read_rows, read_whole_shard, rewrite, write_scenes, write_set
from tests.tiny_cascade import commit_model, write_models
from tests.tiny_training import autoencoder_config

RESOLUTION, SIZES = 16, (7, 6, 5)
MEMBERS: tuple[Member, ...] = ("image", "depth", "mask")


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


def rows_of(index: ShardIndex, member: Member) -> dict[str, np.ndarray]:
    """The first two epochs and more of the training stream, read in this process."""
    return read_rows(ImageSamples(index, View(8, member)))


def test_the_training_stream_serves_the_member_of_the_samples_that_it_would_serve_anyway(scenes: ShardIndex) -> None:
    """One process, one cache: no member may be taken for another. Held-out samples serve it too."""
    plain, depth, mask = (rows_of(scenes, member) for member in MEMBERS)
    splits = {member: read_split(scenes, "train", View(8, member=member)).image for member in MEMBERS}
    held_out = held_out_arrays(scenes, View(8, member="depth"), limit=4)["image"]
    split = "holdout" if scenes.train_samples < scenes.samples else "train"
    np.testing.assert_array_equal(held_out, read_split(scenes, split, View(8, member="depth"), limit=4).image)
    for rows in (depth, mask):
        for name in ("label", "text", "position"):
            np.testing.assert_array_equal(rows[name], plain[name])
    for image, far, shape in zip(plain["image"], depth["image"], mask["image"], strict=True):
        (found,) = np.nonzero((splits["image"] == image).all((1, 2, 3)))
        assert len(found) == 1
        np.testing.assert_array_equal(far, splits["depth"][found[0]])
        np.testing.assert_array_equal(shape, splits["mask"][found[0]])


def test_the_depth_of_a_scene_is_nearest_on_a_solid_or_the_floor_and_farthest_on_the_wall(scenes: ShardIndex) -> None:
    depth, mask = (read_whole_shard(scenes, scenes.shards[0], View(16, member=m)).image for m in MEMBERS[1:])
    assert (depth.max((1, 2, 3)) == 255).all()
    assert (depth.min((1, 2, 3)) == 0).all()
    assert set(np.unique(mask)) <= {0, 128, 255}


@pytest.mark.parametrize("member", ["depth", "mask"])
def test_a_set_without_the_member_is_refused_naming_shard_sample_and_remedy(tmp_path: Path, member: Member) -> None:
    index = write_set(Store(str(tmp_path)), sizes=(3, 2))
    said = rf"shard-000000\.tar, sample 000000: no {member}\.png next to the image; .* or set member to image"
    with pytest.raises(ShardError, match=said):
        read_split(index, "train", View(8, member=member))
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
