"""Laws of token files: one a shard, read in the order of the images' stream, and never as a whole set."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from components.data import stream
from components.data.encoding import token_names
from components.data.listing import ShardError, TokensError
from components.data.order import Order
from components.data.stream import Layout, RankReader, Share, rank_batches
from components.data.tokens import HELD_OUT, TokenSamples, check_condition, held_out_tokens, parse_tokens, write_tokens
from components.runtime.storage.artifact import Artifact, ArtifactError
from components.runtime.storage.store import Store
from tests.counted_files import counted_files
from tests.token_sets import numbered_sets, token_set, write_token_set

STREAMS, STEPS, BATCH = 12, 40, 12
TRAINED = [number for number in range(90) if number % 10]


def written(folder: Path, *counts: int, **how: Any) -> Artifact:
    return write_token_set(Store(str(folder)), numbered_sets(*counts, **how))


def global_batches(tokens: Artifact, *, world_size: int, start_step: int = 0) -> np.ndarray:
    """(position, number) of each sample, steps x batch x 2, put together from the ranks' rows."""
    place = {"global_batch_size": BATCH, "seed": 5, "streams": STREAMS, "total_steps": STEPS, "start_step": start_step}
    ranks = [rank_batches(TokenSamples(tokens), rank=r, world_size=world_size, **place) for r in range(world_size)]
    steps = []
    for batches in zip(*ranks, strict=True):
        pairs = np.stack([np.stack([own["position"], own["tokens"][:, 0]], axis=1) for own in batches], axis=1)
        steps.append(pairs.reshape(-1, 2))
    return np.stack(steps)


def test_what_was_written_is_read_and_equal_samples_give_equal_bytes_and_a_truncated_file_is_named() -> None:
    samples = token_set(0, 25)
    read = parse_tokens(write_tokens(samples), "x.parquet")
    assert read.key == samples.key
    for field in ("tokens", "label", "text", "split"):
        np.testing.assert_array_equal(getattr(read, field), getattr(samples, field))
    assert write_tokens(token_set(0, 9)) == write_tokens(token_set(0, 9))
    assert parse_tokens(write_tokens(token_set(0, 0)), "x.parquet").tokens.shape == (0, 4)
    with pytest.raises(ShardError, match=r"x\.parquet"):
        parse_tokens(write_tokens(token_set(0, 9))[:-20], "x.parquet")


def test_one_shard_of_images_gives_one_file_of_a_fixed_name() -> None:
    shards = [SimpleNamespace(url=url) for url in ("shard-000003.tar", "s3://bucket/set/part.tar.gz")]
    names = token_names(cast(Any, SimpleNamespace(shards=shards)))
    assert names == ["000000-shard-000003.parquet", "000001-part.parquet"]


def test_the_global_batches_are_the_same_for_any_number_of_ranks_and_any_start(tmp_path: Path) -> None:
    tokens = written(tmp_path, 37, 0, 23, 30)
    whole = global_batches(tokens, world_size=1)
    for world_size in (2, 3, 4):
        np.testing.assert_array_equal(whole, global_batches(tokens, world_size=world_size))
    np.testing.assert_array_equal(whole[13:], global_batches(tokens, world_size=2, start_step=13))


def test_each_epoch_serves_each_training_sample_once_in_the_order_of_images(tmp_path: Path) -> None:
    tokens = written(tmp_path, 37, 0, 23, 30)
    positions, numbers = global_batches(tokens, world_size=2).reshape(-1, 2).T
    np.testing.assert_array_equal(positions, np.arange(STEPS * BATCH))
    for start in range(0, STEPS * BATCH - len(TRAINED), len(TRAINED)):
        assert sorted(numbers[start : start + len(TRAINED)]) == TRAINED
    places = Order(TokenSamples(tokens).counts, seed=5, streams=STREAMS).locate(positions)
    own = [
        [number for number in TRAINED if first <= number < stop]
        for first, stop in ((0, 37), (0, 0), (37, 60), (60, 90))
    ]
    assert numbers.tolist() == [own[shard][ordinal] for shard, ordinal in zip(*places, strict=True)]


def test_no_reader_holds_more_of_a_set_ten_times_as_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "SPARE_BYTES", 0)
    monkeypatch.setattr(stream, "SOON_ROWS", 16)
    held = []
    for files in (30, 300):
        tokens = written(tmp_path / str(files), *(20,) * files)
        samples, share = TokenSamples(tokens), Share(BATCH, 5, STREAMS, 10**6)
        reader, most = RankReader(samples, share, layout=Layout.of(samples, share)), 0
        for step in range(files * 18 // BATCH):
            reader.rows(step, step + 1)
            most = max(most, sum(shard.result().nbytes for shard in reader.shards.values()))
        held.append(most)
    assert held[1] <= held[0] + samples.open(0).nbytes
    assert max(held) <= 4 * STREAMS * samples.open(0).nbytes


def test_held_out_samples_come_from_the_first_files_alone(tmp_path: Path) -> None:
    tokens = written(tmp_path, *(10_000,) * 4)
    with counted_files(tmp_path) as server:
        rows = held_out_tokens(tokens.model_copy(update={"root": server.url}))
    assert len(server.sent) == -(-HELD_OUT // 1000)
    assert rows["tokens"][:, 0].tolist() == list(range(0, 10 * HELD_OUT, 10))
    assert {column.dtype for column in rows.values()} == {np.dtype(np.int64)}


def test_a_set_without_held_out_samples_shows_its_own(tmp_path: Path) -> None:
    samples = token_set(1, 9)
    rows = held_out_tokens(write_token_set(Store(str(tmp_path)), [samples]))
    np.testing.assert_array_equal(rows["tokens"], samples.tokens)


def test_condition_tokens_come_with_their_own_image(tmp_path: Path) -> None:
    tokens = written(tmp_path / "tokens", 30, 25)
    files = numbered_sets(30, 25, width=2, shift=1000)
    condition = write_token_set(Store(str(tmp_path / "condition")), files, grid=(1, 2))
    check_condition(tokens, condition, wanted=True)
    samples, place = TokenSamples(tokens, condition), {"seed": 5, "streams": STREAMS, "total_steps": 6}
    for rows in rank_batches(samples, global_batch_size=8, rank=1, world_size=2, start_step=2, **place):
        np.testing.assert_array_equal(rows["condition"], 1000 + rows["tokens"][:, :2])
    held_out = held_out_tokens(tokens, condition)
    assert held_out["tokens"][:, 0].tolist() == [0, 10, 20, 30, 40, 50]
    np.testing.assert_array_equal(held_out["condition"], 1000 + held_out["tokens"][:, :2])
    assert "condition" not in held_out_tokens(tokens)


def test_condition_tokens_that_do_not_fit_are_named_in_one_line_and_no_file_is_read(tmp_path: Path) -> None:
    tokens = written(tmp_path / "tokens", 30, 25)
    nowhere = tokens.model_copy(update={"root": str(tmp_path / "nowhere")})
    others = [token_set(0, 30), token_set(31, 25)]
    other = write_token_set(Store(str(tmp_path / "other")), others)
    with pytest.raises(TokensError, match=r"^the condition tokens of 000001-a\.parquet are of other images: make both"):
        check_condition(nowhere, other, wanted=True)
    with pytest.raises(TokensError, match=r"^2 files of tokens, 1 of condition tokens: make both from the same images"):
        check_condition(nowhere, write_token_set(Store(str(tmp_path / "one")), others[:1]), wanted=True)
    with pytest.raises(TokensError, match="no condition tokens are given"):
        check_condition(nowhere, None, wanted=True)
    with pytest.raises(TokensError, match="not among the recipe's conditions"):
        check_condition(nowhere, tokens, wanted=False)


def test_a_damaged_file_ends_the_stream_with_its_name(tmp_path: Path) -> None:
    tokens = written(tmp_path, 30)
    Store(str(tmp_path)).write("files/000000-a.parquet", write_tokens(token_set(0, 29)))
    with pytest.raises(ArtifactError, match=r"000000-a\.parquet"):
        global_batches(tokens, world_size=1)
