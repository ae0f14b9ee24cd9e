"""The ordered stream through Ray Data itself: rows arrive as planned, whatever the number of ranks."""

import threading

import numpy as np
import pytest

from components.data.crews import split_stream
from components.data.listing import ShardError
from components.data.shards import ShardIndex, View
from components.data.stream import rank_batches, training_stream
from components.runtime.storage.store import Store
from tests.image_sets import number_of, write_set

pytestmark = pytest.mark.usefixtures("ray_cluster")
BATCH, STEPS = 16, 200


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return write_set(Store(str(tmp_path_factory.mktemp("set"))), sizes=(50, 40, 60, 30, 20, 35))


def stream(index: ShardIndex, *, world_size: int, start_step: int = 0, total_steps: int = STEPS) -> list[dict]:
    """The global batches, put together from what each rank's own iterator gave."""
    dataset = training_stream(
        index,
        View(8),
        global_batch_size=BATCH,
        world_size=world_size,
        seed=7,
        start_step=start_step,
        total_steps=total_steps,
    )
    steps, ranks = total_steps - start_step, [[] for _ in range(world_size)]

    def consume(rank: int, iterator: object) -> None:
        ranks[rank] += rank_batches(iterator, batch_size=BATCH // world_size, steps=steps)

    threads = [
        threading.Thread(target=consume, args=pair) for pair in enumerate(split_stream(dataset, world_size=world_size))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(rank) for rank in ranks] == [steps] * world_size
    return [
        {name: np.concatenate([rank[step][name] for rank in ranks]) for name in ranks[0][0]} for step in range(steps)
    ]


@pytest.fixture(scope="module")
def alone(index: ShardIndex) -> list[dict]:
    return stream(index, world_size=1)


def test_positions_count_through_and_each_epoch_serves_each_sample_once(index: ShardIndex, alone: list[dict]) -> None:
    np.testing.assert_array_equal(np.concatenate([b["position"] for b in alone]), np.arange(STEPS * BATCH))
    numbers, epoch = np.concatenate([number_of(batch["image"]) for batch in alone]), index.train_samples
    for start in range(0, len(numbers) - epoch, epoch):
        assert len(set(numbers[start : start + epoch])) == epoch
    assert {name: (column.dtype, column.shape) for name, column in alone[0].items()} == {
        "image": (np.uint8, (BATCH, 8, 8, 3)),
        "label": (np.int64, (BATCH,)),
        "text": (np.int64, (BATCH, 8)),
        "position": (np.int64, (BATCH,)),
    }


@pytest.mark.parametrize(("world_size", "start_step"), [(4, 0), (2, 33), (16, 33)])
def test_batches_do_not_depend_on_ranks_or_on_where_the_stream_starts(
    index: ShardIndex, alone: list[dict], world_size: int, start_step: int
) -> None:
    found = stream(index, world_size=world_size, start_step=start_step)
    for step, (batch, expected) in enumerate(zip(found, alone[start_step:], strict=True), start=start_step):
        for name in expected:
            np.testing.assert_array_equal(batch[name], expected[name], err_msg=f"{name} of step {step}")


def test_a_run_of_a_billion_steps_starts_as_a_short_one(index: ShardIndex, alone: list[dict]) -> None:
    """Its reading tasks are made as they are needed: all of them would not fit into any memory."""
    dataset = training_stream(
        index, View(8), global_batch_size=BATCH, world_size=1, seed=7, start_step=0, total_steps=10**9
    )
    (iterator,) = split_stream(dataset, world_size=1)
    for batch, expected in zip(rank_batches(iterator, batch_size=BATCH, steps=150), alone[:150], strict=True):
        np.testing.assert_array_equal(batch["image"], expected["image"])


def test_a_truncated_tar_stops_the_stream_naming_the_shard(tmp_path_factory: pytest.TempPathFactory) -> None:
    store = Store(str(tmp_path_factory.mktemp("truncated")))
    index = write_set(store, sizes=(20, 20))
    store.write("shard-000001.tar", store.read("shard-000001.tar")[:-2048])
    dataset = training_stream(index, View(8), global_batch_size=8, world_size=1, seed=0, start_step=0, total_steps=40)
    (iterator,) = split_stream(dataset, world_size=1)
    with pytest.raises(Exception, match=r"shard-000001\.tar has \d+ bytes") as caught:
        list(rank_batches(iterator, batch_size=8, steps=40))
    assert ShardError.__name__ in str(caught.value)
