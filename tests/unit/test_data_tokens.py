"""Laws of token shards: one file a shard, and the same law of order as for images."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from components.data.encoding import token_names
from components.data.listing import ShardError
from components.data.order import permutation
from components.data.tokens import TokenSet, parse_tokens, select_split, token_batches, write_tokens


def token_set(first: int, count: int) -> TokenSet:
    numbers = np.arange(first, first + count)
    return TokenSet(
        tuple(f"{number:04d}" for number in numbers),
        np.tile(numbers[:, None], (1, 4)),
        numbers % 3,
        np.tile(numbers[:, None], (1, 5)),
        np.array(["holdout" if number % 10 == 0 else "train" for number in numbers]),
    )


def batches(samples: TokenSet, *, world_size: int, start_step: int = 0) -> list[np.ndarray]:
    """Global batches put together from the ranks' slices: (position, number) pairs."""
    how = {"global_batch_size": 8, "world_size": world_size, "seed": 5, "start_step": start_step, "total_steps": 30}
    shares = [token_batches(samples, rank=rank, **how) for rank in range(world_size)]
    return [
        np.stack([np.stack([share["position"], share["tokens"][:, 0]], axis=1) for share in step], axis=1).reshape(
            -1, 2
        )
        for step in zip(*shares, strict=True)
    ]


def test_what_was_written_is_read_and_equal_samples_give_equal_bytes_and_a_truncated_file_is_named() -> None:
    samples = token_set(0, 25)
    read = parse_tokens(write_tokens(samples), "x.parquet")
    assert read.key == samples.key
    for field in ("tokens", "label", "text", "split"):
        np.testing.assert_array_equal(getattr(read, field), getattr(samples, field))
    assert read.tokens.dtype == read.text.dtype == read.label.dtype == np.int64
    assert write_tokens(token_set(0, 9)) == write_tokens(token_set(0, 9))
    with pytest.raises(ShardError, match=r"x\.parquet"):
        parse_tokens(write_tokens(token_set(0, 9))[:-20], "x.parquet")


def test_one_shard_of_images_gives_one_file_of_a_fixed_name() -> None:
    shards = [SimpleNamespace(url=url) for url in ("shard-000003.tar", "s3://bucket/set/part.tar.gz")]
    names = token_names(cast(Any, SimpleNamespace(shards=shards)))
    assert names == ["000000-shard-000003.parquet", "000001-part.parquet"]


def test_the_global_batches_are_the_same_for_any_number_of_ranks_and_any_start() -> None:
    samples = select_split(token_set(0, 37), "train")
    whole = batches(samples, world_size=1)
    for world_size in (2, 4):
        np.testing.assert_array_equal(whole, batches(samples, world_size=world_size))
    np.testing.assert_array_equal(whole[13:], batches(samples, world_size=2, start_step=13))


def test_each_epoch_serves_each_training_sample_once_in_the_order_of_its_permutation() -> None:
    samples = select_split(token_set(0, 37), "train")
    positions, numbers = np.concatenate(batches(samples, world_size=1)).T
    count = len(samples.key)
    np.testing.assert_array_equal(positions, np.arange(240))
    for start in range(0, 240 - count, count):
        assert set(numbers[start : start + count]) == {number for number in range(37) if number % 10}
    samples = token_set(0, 11)
    for position, number in np.concatenate(batches(samples, world_size=2)):
        assert number == permutation(11, key=(5, position // 11))[position % 11]


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        batches(token_set(0, 9), world_size=3)
