"""Laws of shards: what a tar must be is in its index, and nothing else is read."""

from pathlib import Path

import numpy as np
import pytest

from components.data.held_out import joined_words, read_split, shard_words
from components.data.listing import ShardError, SourceError
from components.data.shards import ShardIndex, View, load_index, read_shard, save_index, split_of
from components.data.tars import iterate_shard
from components.runtime.storage.store import Store
from tests.image_sets import number_of, read_whole_shard, tar_of, write_set


@pytest.fixture
def index(any_store: str) -> ShardIndex:
    return write_set(Store(any_store), sizes=(20, 12, 7))


@pytest.fixture
def local_index(tmp_path: Path) -> ShardIndex:
    return write_set(Store(str(tmp_path)), sizes=(20, 12, 7))


def test_what_was_written_is_read_on_every_kind_of_storage(index: ShardIndex) -> None:
    numbers = [number_of(read_whole_shard(index, entry, View(8)).image) for entry in index.shards]
    np.testing.assert_array_equal(np.concatenate(numbers), np.arange(39))


def test_a_tar_that_is_truncated_or_missing_or_not_what_the_index_counts_raises_naming_the_shard(
    local_index: ShardIndex,
) -> None:
    """Ray's and webdataset's readers give half the samples of such a tar, without any error."""
    store, entry = Store(local_index.root), local_index.shards[1]
    store.write(entry.url, store.read(entry.url)[:-4096])
    with pytest.raises(ShardError, match=r"shard-000001\.tar differs: it has \d+ bytes, not \d+ as in its index"):
        read_shard(local_index, entry)
    store.delete("shard-000002.tar")
    with pytest.raises(ShardError, match=r"shard-000002\.tar is missing"):
        read_shard(local_index, local_index.shards[2])
    for wrong in ({"samples": 21}, {"train_samples": 3}):
        with pytest.raises(ShardError, match="the index does not match"):
            read_shard(local_index, local_index.shards[0].model_copy(update=wrong))


def test_a_tar_with_one_changed_byte_raises(local_index: ShardIndex) -> None:
    store, entry = Store(local_index.root), local_index.shards[0]
    data = bytearray(store.read(entry.url))
    data[len(data) // 2] ^= 1
    store.write(entry.url, bytes(data))
    with pytest.raises(ShardError, match=r"shard-000000\.tar .*sha256"):
        read_shard(local_index, entry)


def test_the_image_of_a_sample_is_its_own_not_its_mask() -> None:
    members = {"a.depth.png": b"depth", "a.jpg": b"image", "a.mask.png": b"mask"}
    (group,) = iterate_shard(tar_of(members.items()), "x.tar")
    assert group.image == b"image"


def test_the_split_of_a_sample_never_moves_and_a_larger_share_holds_out_all_that_a_smaller_one_did() -> None:
    """Frozen: a change here would leak held-out images into training for everyone."""
    held_out = [number for number in range(100) if split_of(f"{number:06d}", 0.1) == "holdout"]
    assert held_out == [16, 19, 22, 23, 38, 44, 46, 53, 56, 60, 61, 64, 71]
    keys = [f"key-{number}" for number in range(2000)]
    small, large = ({key for key in keys if split_of(key, share) == "holdout"} for share in (0.05, 0.2))
    assert small < large
    assert 300 < len(large) < 500


def test_the_splits_are_disjoint_and_together_the_set_and_a_limit_gives_the_first_samples_of_one(
    local_index: ShardIndex,
) -> None:
    train, holdout = (set(read_split(local_index, split, View(8)).key) for split in ("train", "holdout"))
    assert not train & holdout
    assert len(train | holdout) == 39
    assert len(train) == local_index.train_samples
    whole, part = (read_split(local_index, "train", View(8), limit=limit) for limit in (None, 23))
    assert part.key == whole.key[:23]
    np.testing.assert_array_equal(part.image, whole.image[:23])
    assert part.text.shape == (23, 8)


def test_words_are_those_of_the_split_though_no_image_is_decoded(local_index: ShardIndex) -> None:
    for split in ("train", "holdout"):
        words = joined_words([shard_words(local_index.header, split, entry) for entry in local_index.shards])
        whole = read_split(local_index, split, View(8))
        np.testing.assert_array_equal(words.label, whole.label)
        assert words.caption == whole.caption


def test_an_index_survives_its_file_into_which_its_place_is_not_written(local_index: ShardIndex) -> None:
    save_index(Store(local_index.root), local_index)
    assert load_index(f"{local_index.root}/index.json") == local_index
    assert local_index.root not in Store(local_index.root).read("index.json").decode()


def test_a_folder_without_an_index_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cascade data"):
        load_index(str(tmp_path))


def test_another_tokenizer_than_the_index_names_is_refused(local_index: ShardIndex) -> None:
    store = Store(local_index.root)
    store.write("bpe.json", store.read("bpe.json").replace(b"0.1", b"0.2", 1) + b" ")
    with pytest.raises(ShardError, match="tokenizer"):
        read_split(local_index, "train", View(8))
