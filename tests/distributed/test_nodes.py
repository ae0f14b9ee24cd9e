"""A cluster whose driver is on another node than its workers: threads are those of each one's node, the order holds.

As a program, a driver of its own: `python -m tests.distributed.test_nodes FOLDER`.
"""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from components.data.decoded import ImageSamples
from components.data.order import Order
from components.data.shards import ShardIndex, View, load_index, read_shard, split_of
from components.data.stream import rank_batches
from components.runtime.events import Recorder
from components.runtime.execution import Resources, node_threads
from components.runtime.pool import Pool
from components.runtime.storage.store import Store
from components.training.launch import train
from components.training.loop import Arrays
from components.training.parallel import Worker
from components.training.results import ModelDescription
from components.training.tasks.diffusion import DiffusionTask
from components.training.worker import TrainingJob
from tests.image_sets import STREAMS, number_of, write_set
from tests.tiny_training import DATASET_INFO, diffusion_config, rows_at
from tests.warm_workers import warm_environment

CORES = os.cpu_count() or 1
SMALL, LARGE, WITH_GPUS = 1, 3, 4  # logical CPUs of the three nodes that work; the head's has none
RESOURCES = Resources(num_workers=2, num_actors=2, cpus_per_worker=1, threads=None)  # one of them finds room on SMALL
BATCH, STEPS, SEED = 8, 200, 7  # of the order
SHARDS = (50, 40, 60, 30, 20, 35, 45)
WORKERS = (2, 4, 1)  # of each try
CONFIG = diffusion_config(total_steps=2, checkpoint_every=2, sample_every=2, warmup_steps=1)


def threads_here() -> dict[str, int]:
    """Logical CPUs of the node, by which the test knows it, and torch's threads in this process."""
    here = ray.get_runtime_context().get_node_id()
    cpus = next(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["NodeID"] == here)
    return {"cpus": int(cpus), "threads": torch.get_num_threads()}


class TellingTask(DiffusionTask):
    """Leaves a file that says with how many threads its rank works."""

    def __init__(self, *arguments: Any, place: str, worker: Worker, **options: Any) -> None:
        super().__init__(*arguments, worker=worker, **options)
        Store(place).write(f"rank-{worker.rank}", json.dumps(threads_here()).encode())


def rows(*, rank: int, world_size: int, start_step: int) -> Iterator[Arrays]:
    size = CONFIG.optimization.global_batch_size
    for step in range(start_step, CONFIG.optimization.total_steps):
        yield rows_at(CONFIG, range(step * size + rank, (step + 1) * size, world_size))


def trained(place: Store) -> list[dict[str, int]]:
    train(
        TrainingJob(
            partial(TellingTask, CONFIG, dataset_info=DATASET_INFO, place=place.uri),
            config=CONFIG.optimization,
            stage="base",
            key="key",
            folder=place.join("train"),
            stream=rows,
            held_out=partial(rows_at, CONFIG, range(1000, 1008)),
            recorder=Recorder(),
            resources=RESOURCES,
            store=place,
            model=ModelDescription("unet", CONFIG.network_arguments(DATASET_INFO), settings={}),
        )
    )
    return [json.loads(place.read(f"rank-{rank}")) for rank in range(2)]


def pool_of_parts(resources: Resources) -> list[dict[str, int]]:
    with Pool(resources) as pool:
        return list(pool.map(part_worker, [0, 1, 2]))


def part_worker() -> Callable[[int], dict[str, int]]:
    return lambda part: threads_here()


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


def main(folder: Path) -> None:
    from ray.cluster_utils import Cluster

    from pipelines.engine.session import start_ray

    torch.set_num_threads(1)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for given in ({"num_cpus": SMALL}, {"num_cpus": LARGE}, {"num_cpus": WITH_GPUS, "num_gpus": 2}):
        cluster.add_node(**given)
    os.environ["RAY_ADDRESS"] = cluster.address
    place = Store(str(folder / "place"))
    found: dict[str, Any] = {"cluster": start_ray(worker_start_timeout=120, verbose=False)._asdict()}
    for node in ray.nodes():
        where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ask = ray.remote(num_cpus=0, scheduling_strategy=where)(node_threads)
        resources = Resources(threads=None, gpus_per_worker=float("GPU" in node["Resources"]))
        cpus = int(node["Resources"].get("CPU", 0))
        found[f"node of {cpus}"] = ray.get([ask.remote(resources), ask.remote(Resources(threads=7))])
    large = RESOURCES.replace(cpus_per_worker=SMALL + 1)  # one worker may do all parts while the other one starts
    found["working"] = [*pool_of_parts(large), *trained(place)]
    workers = [node["NodeID"] for node in ray.nodes() if node["Resources"].get("CPU", 0) > SMALL]
    index = load_index(str(folder / "set"))
    found["order"] = [run_try(index, workers, *one) for one in tries()]
    (folder / "found.json").write_text(json.dumps(found))
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the program found, in a process of its own: these nodes are no part of the suite's cluster."""
    folder = tmp_path_factory.mktemp("nodes")
    write_set(Store(str(folder / "set")), sizes=SHARDS)
    command = [sys.executable, "-m", "tests.distributed.test_nodes", str(folder)]
    environment = os.environ | warm_environment()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "found.json").read_text()) | {"set": str(folder / "set")}


def test_what_there_is_to_share_is_counted_over_the_nodes(found: dict[str, Any]) -> None:
    assert found["cluster"] == {
        "cpus": SMALL + LARGE + WITH_GPUS,
        "gpus": 2,
        "cpus_per_gpu": WITH_GPUS / 2,
        "nodes": 3,
        "cpus_per_core": 1,
        "here": False,
        "gpu": None,
        "network": "tcp",
        "node_gpus": 2,
    }


def test_a_node_says_itself_how_many_threads_a_worker_has_there(found: dict[str, Any]) -> None:
    assert found[f"node of {SMALL}"] == [1, 7]
    assert found[f"node of {LARGE}"] == [min(CORES, LARGE), 7]
    assert found[f"node of {WITH_GPUS}"] == [max(1, min(CORES, WITH_GPUS) // 2), 7]  # by its GPUs


def test_workers_of_trainings_and_of_the_pool_have_the_threads_of_their_node(found: dict[str, Any]) -> None:
    working = found["working"]
    assert len(working) == 3 + 2
    for worker in working:
        assert worker["threads"] == min(CORES, worker["cpus"])
    assert all(max(worker["cpus"] for worker in kind) > SMALL for kind in (working[:3], working[3:]))


def test_order_holds_on_two_nodes_through_resumes_and_changes_of_workers(found: dict[str, Any]) -> None:
    expected = law(load_index(found["set"]))
    for (workers, start, stop), seen in zip(tries(), found["order"], strict=True):
        np.testing.assert_array_equal(seen["numbers"], expected[start:stop], err_msg=f"{workers} workers from {start}")
        np.testing.assert_array_equal(seen["positions"], np.arange(start * BATCH, stop * BATCH).reshape(-1, BATCH))
        assert seen["nodes"] == min(2, workers)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
