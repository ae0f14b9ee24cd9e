"""The pool of Ray workers for all work but training, and the check of values sent to another node.

Nodes share the network and object storage, no disk. So values for a worker hold no path, no scratch folder and no
`StageContext`; only the URI of a store or a source may cross. `portable` refuses the rest.

A job is a part that leaves one npz file under a fixed name, with a record: a stage that was killed does no finished job
again whose file is unchanged.
"""

import io
import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import PurePath
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import ray
from ray import ObjectRef, cloudpickle
from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError

import components
from components.runtime.execution import Resources, node_threads
from components.runtime.storage.artifact import look_at, recorded_parts, write_file, write_record
from components.runtime.storage.scratch import SCRATCH
from components.runtime.storage.store import Store

logger = logging.getLogger(__name__)
LOST = (RayActorError, NodeDiedError, ObjectLostError, OutOfMemoryError)  # errors of a part whose worker is gone
IN_HAND = 2  # parts that a worker holds at most: one on its device, and one whose `Later` is not done yet


class HandoverError(TypeError):
    """A value of a single node was about to be sent to another node; the message names the value."""


def one_line(error: BaseException) -> str:
    """The first line of an error below Ray's layers, with the type's name unless the type is ours."""
    while isinstance(error, RayTaskError) or type(error).__module__.split(".")[0] == "ray":
        cause = getattr(error, "cause", None) or error.__cause__
        if cause is None:
            break
        error = cause
    text = next((line for line in str(error).splitlines() if line.strip()), "")
    own = type(error).__module__.startswith(components.__name__)
    return text if own else f"{type(error).__name__}: {text}"


class Job(Protocol):
    """A part that ends as a file."""

    @property
    def name(self) -> str: ...  # of its file, without `.npz`


class Later(NamedTuple):
    """The rest of a part, such as writing the file: a thread does it while the device is at the next part."""

    finish: Callable[[], Any]  # returns the part's result


class Left(NamedTuple):
    """A worker's answer for a part with a pending `Later`."""


class Held(NamedTuple):
    """A part in the hands of a worker."""

    actor: Any
    number: int
    at_device: bool


P = TypeVar("P")
T = TypeVar("T")
J = TypeVar("J", bound=Job)


def portable(value: T, *, what: str) -> T:
    """Returns `value` if every node can use all of the value.
    `what`: names the value in the message. Raises HandoverError for a path or a scratch folder, however deep."""
    _Checker(io.BytesIO(), what).dump(value)
    return value


class _Checker(cloudpickle.Pickler):
    """Pickles as Ray does, and checks every value on the way. Arrays are not copied."""

    def __init__(self, file: io.BytesIO, what: str) -> None:
        super().__init__(file, protocol=5, buffer_callback=deque[object](maxlen=0).append)  # arrays hold no path
        self.what = what

    def persistent_id(self, value: object) -> None:
        local = isinstance(value, PurePath) or (isinstance(value, str) and SCRATCH in value)
        if local:
            raise HandoverError(f"{self.what} holds {value}, which is on this node only; pass an artifact or a store")

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, ray.actor.ActorHandle):  # Ray counts pickled handles
            return str, ("an actor",)
        return super().reducer_override(value)


class Pool:
    """Workers of a stage, at most resources.num_actors, started on demand and ended with the context.
    A worker gets parts only once it has started. In the place of a lost worker another is started, and any free worker
    does the lost parts again; a part that has cost more than resources.max_failures workers ends the work with the
    error of the last. `warn` receives a line for each damaged file of an earlier try."""

    def __init__(self, resources: Resources, *, warn: Callable[[str], None] = logger.warning) -> None:
        self.resources, self.warn = resources, warn
        self.actors: list[Any] = []  # started ones
        self.starting: dict[ObjectRef, Any] = {}
        self.lost_starting = 0  # workers in a row that were lost before they had started

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for actor in [*self.actors, *self.starting.values()]:
            ray.kill(actor)

    def map(self, make_worker: Callable[[], Callable[[P], Any]], parts: Sequence[P]) -> Iterator[Any]:
        """Yields the workers' results for the parts, in order, each as soon as no earlier part is missing.
        `make_worker`: called once in each process that works; its function takes a part, and may return `Later`."""
        early, turn = dict[int, Any](), 0
        for number, result in self.as_done(make_worker, parts):
            early[number] = result
            while turn in early:
                yield early.pop(turn)
                turn += 1

    def as_done(self, make_worker: Callable[[], Callable[[P], Any]], parts: Sequence[P]) -> Iterator[tuple[int, Any]]:
        """Yields (number of a part, result) as parts are done; otherwise like `map`."""
        if not parts:
            return
        for part in parts:
            portable(part, what="a part of the pool's work")
        shared = ray.put(portable(make_worker, what="a worker of the pool"))
        self._start(min(self.resources.num_actors, len(parts)) - len(self.actors) - len(self.starting))
        todo, cost = deque(range(len(parts))), Counter[int]()
        held: dict[ObjectRef, Held] = {}
        while todo or held:
            at_device = {id(part.actor) for part in held.values() if part.at_device}
            count = Counter(id(part.actor) for part in held.values())
            free = [each for each in self.actors if id(each) not in at_device and count[id(each)] < IN_HAND]
            for actor in free[: len(todo)]:
                number = todo.popleft()
                held[actor.run.remote(shared.hex(), shared, number, parts[number])] = Held(actor, number, True)
            (ready,), _ = ray.wait([*held, *self.starting])
            if ready in self.starting:
                self._arrived(ready)
                continue
            actor, number, _ = held.pop(ready)
            try:
                result = ray.get(ready)
            except LOST:
                cost[number] += 1
                if 0 <= self.resources.max_failures < cost[number]:
                    raise
                if actor in self.actors:  # started anew once, even if several parts were lost
                    self.actors.remove(actor)
                    ray.kill(actor)
                    self._start(1)
                todo.appendleft(number)
                continue
            if isinstance(result, Left):
                held[actor.finish.remote(number)] = Held(actor, number, False)
            else:
                yield number, result

    def call(self, function: Callable[[], T]) -> T:
        """Calls the function in a worker and returns the result."""
        portable(function, what="a call of the pool")
        ((_, result),) = self.as_done(lambda: lambda work: work(), [function])
        return result

    def finish(self, make_worker: Callable[[], Callable[[J], Any]], jobs: Sequence[J], *, files: Store) -> Iterator[J]:
        """Do all jobs without a whole file from an earlier try; yields each job at the file's arrival.
        `make_worker`: as in `map`; its function calls `write_job`."""
        recorded, whole = recorded_parts(files), set[str]()
        left = [job for job in jobs if job.name in recorded]
        for number, look in self.as_done(lambda: partial(look_at, files), [job.name for job in left]):
            if look.record is not None:
                whole.add(left[number].name)
                yield left[number]
            elif look.damage:
                self.warn(f"{look.damage}; it is made again")
        missing = [job for job in jobs if job.name not in whole]
        for number, _ in self.as_done(make_worker, missing):
            yield missing[number]

    def _arrived(self, started: ObjectRef) -> None:
        actor = self.starting.pop(started)
        try:
            ray.get(started)
        except LOST:
            self.lost_starting += 1
            if 0 <= self.resources.max_failures < self.lost_starting:
                raise
            self._start(1)
        else:
            self.actors.append(actor)
            self.lost_starting = 0

    def _start(self, count: int) -> None:
        cpus, gpus = self.resources.cpus_per_worker, self.resources.gpus_per_worker
        make = ray.remote(num_cpus=cpus, num_gpus=gpus, max_concurrency=IN_HAND)(PoolWorker)
        for _ in range(count):
            actor = make.remote(self.resources)
            self.starting[actor.started.remote()] = actor


def file_name(job: str) -> str:
    """Name of a job's file."""
    return f"{job}.npz"


def write_job(files: Store, job: str, data: bytes, **facts: Any) -> None:
    """Write the file of a finished job, and a record with the facts."""
    write_record(files, job, write_file(files, file_name(job), data), **facts)


class PoolWorker:
    """The actor of a pool; keeps the last `map`'s function, such as a loaded network, for later parts."""

    def __init__(self, resources: Resources) -> None:
        from components.models.devices import state_products

        self.threads, self.turn = node_threads(resources), threading.Lock()
        state_products("fp32")
        self.made: tuple[str, Callable[[Any], Any]] | None = None
        self.left: dict[int, Later] = {}

    def started(self) -> None: ...

    def run(self, name: str, make_worker: Callable[[], Callable[[Any], Any]], number: int, part: Any) -> Any:
        """Do a part, except for a `Later`, which `finish` does."""
        import torch

        with self.turn:  # the last part of a `map` that was broken off may still be at work
            torch.set_num_threads(self.threads)  # it counts for the calling thread alone
            if self.made is None or self.made[0] != name:
                self.made = None  # frees its memory before another is loaded
                self.made = (name, make_worker())
            result = self.made[1](part)
        if not isinstance(result, Later):
            return result
        self.left[number] = result
        return Left()

    def finish(self, number: int) -> Any:
        """Do the rest of a part, while `run` may be at the next part."""
        return self.left.pop(number).finish()
