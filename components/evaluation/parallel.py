"""Work in parts on a pool of Ray actors: resources.num_actors of them; results in the order of the parts.

A job is a part that leaves one npz file under a fixed name, so a stage that was killed does no finished job again.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import ray
from ray.util import ActorPool

from components.execution import Resources
from components.storage.store import Store


class Job(Protocol):
    @property
    def name(self) -> str: ...  # of its file, without `.npz`


P = TypeVar("P")
J = TypeVar("J", bound=Job)


def finish_jobs(
    make_worker: Callable[[], Callable[[J], J]], jobs: Sequence[J], *, files: Store, resources: Resources
) -> Iterator[J]:
    """Do the jobs whose files are missing; yields each job once its file is there.

    Args:
        make_worker: as in `map_parts`; what it returns writes the file of a job and returns the job.
    """
    written = {file.path for file in files.list()}
    missing = [job for job in jobs if file_name(job.name) not in written]
    yield from (job for job in jobs if file_name(job.name) in written)
    yield from map_parts(make_worker, missing, resources=resources)


def file_name(job: str) -> str:
    return f"{job}.npz"


def map_parts(
    make_worker: Callable[[], Callable[[P], Any]], parts: Sequence[P], *, resources: Resources
) -> Iterator[Any]:
    """What the workers make of the parts, in their order, each as soon as it is there.

    Args:
        make_worker: called once in each actor; what it returns is called with the parts. An actor that dies is made
            again and repeats its part, resources.max_failures times.
    """
    if not parts:
        return
    remote = ray.remote(
        num_cpus=resources.cpus_per_worker,
        num_gpus=resources.gpus_per_worker,
        max_restarts=resources.max_failures,
        max_task_retries=resources.max_failures,
    )(PartWorker)
    actors = [
        remote.remote(make_worker, threads=resources.threads) for _ in range(min(resources.num_actors, len(parts)))
    ]
    try:
        yield from ActorPool(actors).map(_submit, parts)
    finally:
        for actor in actors:
            ray.kill(actor)


class PartWorker:
    """Body of an actor."""

    def __init__(self, make_worker: Callable[[], Callable[[Any], Any]], *, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.work = make_worker()

    def run(self, part: Any) -> Any:
        return self.work(part)


def _submit(actor: Any, part: Any) -> Any:
    return actor.run.remote(part)
