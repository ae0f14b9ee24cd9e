"""The order on Ray nodes: ranks on all of them, resumed, with other ranks."""

import random
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import ray

from components.data.decoded import ImageSamples
from components.data.order import Order
from components.data.shards import ShardIndex, View, read_shard, split_of
from components.data.stream import rank_batches
from components.runtime.storage.store import Store
from tests.image_sets import STREAMS, number_of, write_set

BATCH, STEPS, SEED = 8, 200, 7
SHARDS = (50, 40, 60, 30, 20, 35, 45)
WORKERS = (2, 4, 1)  # of each try


def tries() -> list[tuple[int, int, int]]:
    """(workers, start_step, stop_step): each goes on at a random step that the one before has passed."""
    draw, start, found = random.Random(11), 0, []
    for workers in WORKERS:
        stop = STEPS if len(found) == len(WORKERS) - 1 else draw.randrange(start + 30, start + 90)
        found.append((workers, start, stop))
        start = draw.randrange(start + 1, stop)
    return found


def law(index: ShardIndex) -> np.ndarray:  # (STEPS, BATCH)
    """Numbers of the images of each global batch, from the definition of the order alone."""
    numbers = [
        [
            int(sample.key)
            for sample in read_shard(index, entry)
            if split_of(sample.key, index.holdout_fraction) == "train"
        ]
        for entry in index.shards
    ]
    order = Order([len(shard) for shard in numbers], seed=SEED, streams=STREAMS)
    places = zip(*order.locate(np.arange(STEPS * BATCH)), strict=True)
    return np.array([numbers[shard][ordinal] for shard, ordinal in places]).reshape(STEPS, BATCH)


@ray.remote(num_cpus=0)
def consume(index: ShardIndex, steps: int, **place: int) -> tuple[str, list[list[int]], list[list[int]]]:
    """(node, numbers of the images of each step, their positions) of one rank."""
    how = {"global_batch_size": BATCH, "seed": SEED, "streams": STREAMS, "total_steps": STEPS}
    batches = list(islice(rank_batches(ImageSamples(index, View(8)), **how, **place), steps))
    numbers = [number_of(batch["image"]).tolist() for batch in batches]
    return ray.get_runtime_context().get_node_id(), numbers, [batch["position"].tolist() for batch in batches]


def run_try(index: ShardIndex, nodes: list[str], workers: int, start: int, stop: int) -> dict[str, Any]:
    places = [ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
    ranks = ray.get(
        [
            consume.options(scheduling_strategy=places[rank % len(places)]).remote(
                index, stop - start, start_step=start, rank=rank, world_size=workers
            )
            for rank in range(workers)
        ]
    )
    nodes_of_ranks, numbers, positions = zip(*ranks, strict=True)
    return {
        "nodes": len(set(nodes_of_ranks)),
        "numbers": [list(chain(*zip(*step, strict=True))) for step in zip(*numbers, strict=True)],
        "positions": [list(chain(*zip(*step, strict=True))) for step in zip(*positions, strict=True)],
    }


def test_order_holds_through_resumes_and_changes_of_workers(ray_cluster: None, tmp_path: Path):
    """On two nodes: see test_nodes.py."""
    index, (node,) = write_set(Store(str(tmp_path / "set")), sizes=SHARDS), ray.nodes()
    assert_order(index, all_tries(index, [node["NodeID"]]), nodes=1)


def assert_order(index: ShardIndex, found: list[dict[str, Any]], *, nodes: int) -> None:
    """What tries found is the law, and so many nodes were at work."""
    expected = law(index)
    for (workers, start, stop), seen in zip(tries(), found, strict=True):
        np.testing.assert_array_equal(seen["numbers"], expected[start:stop], err_msg=f"{workers} workers from {start}")
        np.testing.assert_array_equal(seen["positions"], np.arange(start * BATCH, stop * BATCH).reshape(-1, BATCH))
        assert seen["nodes"] == min(nodes, workers)


def all_tries(index: ShardIndex, nodes: list[str]) -> list[dict[str, Any]]:
    return [run_try(index, nodes, *one) for one in tries()]
