"""A file for each shard of a set, made by an actor pool of Ray Data with a network in each actor.

Parts have fixed names, numbered in the order of the index: a whole part of any earlier try is not made again.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import ray.data
import torch

from components.data.pieces import WARN, Warn, whole_parts
from components.data.shards import ShardEntry, ShardIndex
from components.runtime.execution import Resources, node_threads
from components.runtime.pool import portable
from components.runtime.storage.store import Store
from components.sampling.device import state_products


class ShardJob(NamedTuple):
    """A shard to be processed."""

    number: int  # in the order of the index
    name: str  # of the part to write
    shard: ShardEntry


Worker = Callable[[ShardJob], None]  # reads the shard, writes the files of the part, and its record last


def process_shards(
    make_worker: Callable[[], Worker],
    index: ShardIndex,
    names: list[str],
    *,
    files: Store,
    resources: Resources,
    warn: Warn = WARN,
) -> Iterator[int]:
    """Write the parts that `files` does not hold whole; yields the number of parts after each.

    Args:
        make_worker: picklable; called in each actor before its first shard, in at most resources.num_actors.
        names: of the parts, one for each shard.
        warn: receives a line for each damaged file of an earlier try.

    Raises ShardError for a shard that differs from the index.
    """
    whole = whole_parts(dict.fromkeys(names, ""), files=files, num_cpus=resources.cpus_per_core, warn=warn)
    jobs = [
        ShardJob(number, name, shard)
        for number, (name, shard) in enumerate(zip(names, index.shards, strict=True))
        if name not in whole
    ]
    yield len(names) - len(jobs)
    if jobs:
        for done, _ in enumerate(_finished(make_worker, jobs, resources), start=1):
            yield len(names) - len(jobs) + done


class PoolActor:
    """An actor of the pool. Jobs come as rows of text: Ray Data's blocks hold no objects of ours."""

    def __init__(self, make_worker: Callable[[], Worker], resources: Resources) -> None:
        torch.set_num_threads(node_threads(resources))
        state_products("fp32")
        self.make_worker = make_worker
        self.work: Worker | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        if self.work is None:  # not before the first shard: Ray Data kills actors that still start when all is done
            self.work = self.make_worker()
        job = ShardJob(row["number"], row["name"], ShardEntry.model_validate_json(row["shard"]))
        self.work(job)
        return {"name": job.name}


def _finished(
    make_worker: Callable[[], Worker], jobs: list[ShardJob], resources: Resources
) -> Iterator[dict[str, Any]]:
    portable(make_worker, what="what encodes shards")
    rows = [job._asdict() | {"shard": job.shard.model_dump_json()} for job in jobs]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        PoolActor,
        fn_constructor_args=(make_worker, resources),
        compute=ray.data.ActorPoolStrategy(size=min(resources.num_actors, len(rows))),
        num_cpus=resources.cpus_per_worker,
        num_gpus=resources.gpus_per_worker,
    )
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    return dataset.iter_rows()
