"""Where stages hand work to Ray: what may cross to another node, and the pool of workers that does all but training.

Nodes share the network and object storage, no disk. So what a worker is given holds no path, no scratch folder and no
`StageContext`; of what is local, only the URI of a store or a source may cross. `portable` refuses the rest.

A job is a part that leaves one npz file under a fixed name: a stage that was killed does no finished job again.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePath
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

import ray
from ray import cloudpickle
from ray.util import ActorPool

from components.execution import Resources
from components.node import node_threads
from components.storage.store import SCRATCH, Store


class HandoverError(TypeError):
    """Something that exists on one node only was about to be sent to another; the message names it."""


class Job(Protocol):
    @property
    def name(self) -> str: ...  # of its file, without `.npz`


P = TypeVar("P")
T = TypeVar("T")
J = TypeVar("J", bound=Job)


def portable(value: T, *, what: str) -> T:
    """`value`, if every node can use it. Raises HandoverError for one that holds a path or a scratch folder.

    Args:
        what: names the value in the message, such as "the job of stage prior".
    """
    _Checker(io.BytesIO(), what).dump(value)
    return value


def _pass_over(buffer: object) -> None:
    """An array's bytes hold no path."""


class _Checker(cloudpickle.Pickler):
    """Pickles as Ray does, and looks at everything on the way. Arrays are not copied."""

    def __init__(self, file: io.BytesIO, what: str) -> None:
        super().__init__(file, protocol=5, buffer_callback=_pass_over)
        self.what = what

    def persistent_id(self, value: object) -> None:
        local = isinstance(value, PurePath) or (isinstance(value, str) and SCRATCH in value)
        if local:
            raise HandoverError(f"{self.what} holds {value}, which is on this node only; pass an artifact or a store")

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, ray.actor.ActorHandle):  # Ray counts its handles, and this one goes nowhere
            return str, ("an actor",)
        return super().reducer_override(value)


class Pool:
    """Workers of one stage, at most resources.num_actors, started when they are needed and ended with the context.

    A worker that dies is started again and repeats its part, resources.max_failures times.
    """

    def __init__(self, resources: Resources) -> None:
        self.resources = resources
        self.actors: list[Any] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for actor in self.actors:
            ray.kill(actor)

    def map(self, make_worker: Callable[[], Callable[[P], T]], parts: Sequence[P]) -> Iterator[T]:
        """What the workers make of the parts, in their order, each as soon as it is there.

        Args:
            make_worker: called once in each process that works; what it returns is called with the parts.
        """
        if not parts:
            return
        for part in parts:
            portable(part, what="a part of the pool's work")
        shared = ray.put(portable(make_worker, what="a worker of the pool"))
        self._grow(min(self.resources.num_actors, len(parts)))

        def submit(actor: Any, part: P) -> Any:
            return actor.run.remote(shared.hex(), shared, part)

        yield from ActorPool(self.actors).map(submit, list(parts))

    def call(self, function: Callable[[], T]) -> T:
        """What one worker returns when it calls the function."""
        portable(function, what="a call of the pool")
        self._grow(1)
        return ray.get(self.actors[0].call.remote(function))

    def finish(self, make_worker: Callable[[], Callable[[J], J]], jobs: Sequence[J], *, files: Store) -> Iterator[J]:
        """Do the jobs whose files are missing; yields each job once its file is there.

        Args:
            make_worker: as in `map`; what it returns writes the file of a job and returns the job.
        """
        written = {file.path for file in files.list()}
        missing = [job for job in jobs if file_name(job.name) not in written]
        yield from (job for job in jobs if file_name(job.name) in written)
        yield from self.map(make_worker, missing)

    def _grow(self, count: int) -> None:
        resources = self.resources
        remote = ray.remote(
            num_cpus=resources.cpus_per_worker,
            num_gpus=resources.gpus_per_worker,
            max_restarts=resources.max_failures,
            max_task_retries=resources.max_failures,
        )(PoolWorker)
        self.actors += [remote.remote(resources) for _ in range(count - len(self.actors))]


def file_name(job: str) -> str:
    return f"{job}.npz"


class PoolWorker:
    """Body of an actor. It keeps what the last `map` made, such as a loaded network, for the parts that follow."""

    def __init__(self, resources: Resources) -> None:
        import torch

        from components.sampling.precision import state_products

        torch.set_num_threads(node_threads(resources))
        state_products("fp32")
        self.made: tuple[str, Callable[[Any], Any]] | None = None

    def run(self, name: str, make_worker: Callable[[], Callable[[Any], Any]], part: Any) -> Any:
        if self.made is None or self.made[0] != name:
            self.made = None  # frees its memory before another is loaded
            self.made = (name, make_worker())
        return self.made[1](part)

    def call(self, function: Callable[[], Any]) -> Any:
        return function()
