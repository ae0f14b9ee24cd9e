"""The order on one and on two Ray nodes (two raylets on this machine): ranks on both, resumed, with other ranks.

As a program, a driver of its own: `python -m tests.distributed.test_order_nodes FOLDER`.
"""

import json
import os
import random
import subprocess
import sys
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from components.data.decoded import ImageSamples
from components.data.order import Order
from components.data.shards import ShardIndex, View, load_index, read_shard, split_of
from components.data.stream import rank_batches
from components.runtime.storage.store import Store
from tests.image_sets import STREAMS, number_of, write_set
from tests.warm_workers import warm_environment

BATCH, STEPS, SEED = 8, 200, 7
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


@pytest.mark.parametrize("nodes", [1, 2])
def test_order_holds_on_nodes_through_resumes_and_changes_of_workers(ray_cluster: None, nodes: int, tmp_path: Path):
    index = write_set(Store(str(tmp_path / "set")), sizes=(50, 40, 60, 30, 20, 35, 45))
    expected, found = law(index), all_tries(index) if nodes == 1 else on_two_nodes(tmp_path)
    for (workers, start, stop), seen in zip(tries(), found, strict=True):
        np.testing.assert_array_equal(seen["numbers"], expected[start:stop], err_msg=f"{workers} workers from {start}")
        np.testing.assert_array_equal(seen["positions"], np.arange(start * BATCH, stop * BATCH).reshape(-1, BATCH))
        assert seen["nodes"] == min(nodes, workers)


def all_tries(index: ShardIndex) -> list[dict[str, Any]]:
    """On the nodes of the cluster that this process has joined."""
    known = [node["NodeID"] for node in ray.nodes()]
    return [run_try(index, known, *one) for one in tries()]


def on_two_nodes(folder: Path) -> list[dict[str, Any]]:
    """In a process of its own: a second node is no part of the suite's cluster."""
    command = [sys.executable, "-m", "tests.distributed.test_order_nodes", str(folder)]
    environment = os.environ | warm_environment()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())


def main(folder: Path) -> None:
    from ray.cluster_utils import Cluster

    from pipelines.engine.session import start_ray

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    os.environ["RAY_ADDRESS"] = cluster.address
    start_ray(worker_start_timeout=120, verbose=False)
    (folder / "found.json").write_text(json.dumps(all_tries(load_index(str(folder / "set")))))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
