"""Where stages hand work to Ray: what may cross to another node, and the pool of workers that does all but training.

Nodes share the network and object storage, no disk. So what a worker is given holds no path, no scratch folder and no
`StageContext`; of what is local, only the URI of a store or a source may cross. `portable` refuses the rest.

A job is a part that leaves one npz file under a fixed name, with a record: a stage that was killed does no finished job
again whose file is still what it was.
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
from components.runtime.execution import Resources
from components.runtime.node import node_threads
from components.runtime.storage.kept_parts import Look, look_at, recorded_parts, write_part
from components.runtime.storage.store import SCRATCH, Store

logger = logging.getLogger(__name__)
LOST = (RayActorError, NodeDiedError, ObjectLostError, OutOfMemoryError)  # what a worker that is gone leaves of a part
IN_HAND = 2  # parts that a worker holds at most: one on its device, and one of which `Later` is left


class HandoverError(TypeError):
    """Something that exists on one node only was about to be sent to another; the message names it."""


def one_line(error: BaseException) -> str:
    """The message of the error that matters, without the layers that Ray puts around it."""
    while True:
        cause = getattr(error, "cause", None) or error.__cause__
        if (not isinstance(error, RayTaskError) and type(error).__module__.split(".")[0] != "ray") or cause is None:
            break
        error = cause
    text = next((line for line in str(error).splitlines() if line.strip()), "")
    own = type(error).__module__.startswith(components.__name__)
    return text if own else f"{type(error).__name__}: {text}"


class Job(Protocol):
    @property
    def name(self) -> str: ...  # of its file, without `.npz`


class Later(NamedTuple):
    """What is left of a part once the device has done its share, such as packing and writing its file: a thread of the
    worker's process does it while the device is at the next part. The part is done when it is."""

    finish: Callable[[], Any]  # returns what the part comes to


class Left(NamedTuple):
    """What a worker says of a part of which `Later` is left."""


class Held(NamedTuple):
    """A part that a worker has."""

    actor: Any
    number: int
    at_device: bool


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

    A worker is handed parts once it has started: while it waits for a place, it keeps none from the others. If it is
    lost, another is started in its place, and any that is free does its parts again; a part that has cost more than
    resources.max_failures workers ends the work with the error of the last.
    """

    def __init__(self, resources: Resources, *, warn: Callable[[str], None] = logger.warning) -> None:
        """`warn` is told of files that an earlier try left and that are damaged."""
        self.resources, self.warn = resources, warn
        self.actors: list[Any] = []  # that have started
        self.starting: dict[ObjectRef, Any] = {}
        self.lost_starting = 0  # one after another

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for actor in [*self.actors, *self.starting.values()]:
            ray.kill(actor)

    def map(self, make_worker: Callable[[], Callable[[P], Any]], parts: Sequence[P]) -> Iterator[Any]:
        """What the workers make of the parts, in their order, each as soon as it and those before it are there.

        Args:
            make_worker: called once in each process that works; what it returns is called with the parts, one at a
                time, and may return `Later`.
        """
        early: dict[int, Any] = {}
        turn = 0
        for number, made in self.as_done(make_worker, parts):
            early[number] = made
            while turn in early:
                yield early.pop(turn)
                turn += 1

    def as_done(self, make_worker: Callable[[], Callable[[P], Any]], parts: Sequence[P]) -> Iterator[tuple[int, Any]]:
        """As `map`, with the number of each part, in the order in which they are done."""
        if not parts:
            return
        for part in parts:
            portable(part, what="a part of the pool's work")
        shared = ray.put(portable(make_worker, what="a worker of the pool"))
        self._grow(min(self.resources.num_actors, len(parts)))
        todo, cost = deque(range(len(parts))), Counter[int]()
        held: dict[ObjectRef, Held] = {}
        while todo or held:
            for actor in self._free(list(held.values()))[: len(todo)]:
                number = todo.popleft()
                held[actor.run.remote(shared.hex(), shared, number, parts[number])] = Held(actor, number, True)
            (ready,), _ = ray.wait([*held, *self.starting])
            if ready in self.starting:
                self._arrived(ready)
                continue
            actor, number, _ = held.pop(ready)
            try:
                made = ray.get(ready)
            except LOST:
                cost[number] += 1
                if self._too_many(cost[number]):
                    raise
                self._replace(actor)
                todo.appendleft(number)
                continue
            if isinstance(made, Left):
                held[actor.finish.remote(number)] = Held(actor, number, False)
            else:
                yield number, made

    def call(self, function: Callable[[], T]) -> T:
        """What one worker returns when it calls the function."""
        portable(function, what="a call of the pool")
        ((_, made),) = self.as_done(_caller, [function])
        return made

    def finish(self, make_worker: Callable[[], Callable[[J], Any]], jobs: Sequence[J], *, files: Store) -> Iterator[J]:
        """Do the jobs that no earlier try has left whole; yields each job once its file is there.

        Args:
            make_worker: as in `map`; what it returns writes the file of a job by `write_job`.
        """
        recorded, whole = recorded_parts(files), set[str]()
        left = [job for job in jobs if job.name in recorded]
        for number, look in self.as_done(partial(_looking, files), [job.name for job in left]):
            if look.record is not None:
                whole.add(left[number].name)
                yield left[number]
            elif look.damage:
                self.warn(f"{look.damage}; it is made again")
        missing = [job for job in jobs if job.name not in whole]
        for number, _ in self.as_done(make_worker, missing):
            yield missing[number]

    def _free(self, held: Sequence[Held]) -> list[Any]:
        """Workers whose device has nothing to do, and which may hold another part."""
        at_device = {id(part.actor) for part in held if part.at_device}
        count = Counter(id(part.actor) for part in held)
        return [actor for actor in self.actors if id(actor) not in at_device and count[id(actor)] < IN_HAND]

    def _arrived(self, started: ObjectRef) -> None:
        actor = self.starting.pop(started)
        try:
            ray.get(started)
        except LOST:
            self.lost_starting += 1
            if self._too_many(self.lost_starting):
                raise
            self._grow(len(self.actors) + len(self.starting) + 1)
        else:
            self.actors.append(actor)
            self.lost_starting = 0

    def _too_many(self, failures: int) -> bool:
        return 0 <= self.resources.max_failures < failures

    def _replace(self, actor: Any) -> None:
        """Start another worker in the place of one that is lost, once, though several of its parts are."""
        if actor in self.actors:
            self.actors.remove(actor)
            ray.kill(actor)
            self._grow(len(self.actors) + len(self.starting) + 1)

    def _grow(self, count: int) -> None:
        resources = self.resources
        make = ray.remote(
            num_cpus=resources.cpus_per_worker,
            num_gpus=resources.gpus_per_worker,
            max_concurrency=IN_HAND,
        )(PoolWorker)
        for _ in range(count - len(self.actors) - len(self.starting)):
            actor = make.remote(resources)
            self.starting[actor.started.remote()] = actor


def _caller() -> Callable[[Callable[[], T]], T]:
    return _call


def _call(function: Callable[[], T]) -> T:
    return function()


def _looking(files: Store) -> Callable[[str], Look]:
    return partial(look_at, files)


def file_name(job: str) -> str:
    return f"{job}.npz"


def write_job(files: Store, job: str, data: bytes, **facts: Any) -> None:
    """Leave the file of a finished job, and the facts in its record."""
    write_part(files, job, file_name(job), data, **facts)


class PoolWorker:
    """Body of an actor. It keeps what the last `map` made, such as a loaded network, for the parts that follow."""

    def __init__(self, resources: Resources) -> None:
        from components.sampling.precision import state_products

        self.threads, self.turn = node_threads(resources), threading.Lock()
        self._use_threads()
        state_products("fp32")
        self.made: tuple[str, Callable[[Any], Any]] | None = None
        self.left: dict[int, Later] = {}

    def started(self) -> None:
        """Answers once the worker is there."""

    def run(self, name: str, make_worker: Callable[[], Callable[[Any], Any]], number: int, part: Any) -> Any:
        """Do the part, but for what is left for `finish`."""
        with self.turn:  # where a `map` was broken off, its last part may be at work
            self._use_threads()
            made = self._worker(name, make_worker)(part)
        if not isinstance(made, Later):
            return made
        self.left[number] = made
        return Left()

    def finish(self, number: int) -> Any:
        """Do what is left of a part, while `run` may be at the next one."""
        return self.left.pop(number).finish()

    def _worker(self, name: str, make_worker: Callable[[], Callable[[Any], Any]]) -> Callable[[Any], Any]:
        if self.made is None or self.made[0] != name:
            self.made = None  # frees its memory before another is loaded
            self.made = (name, make_worker())
        return self.made[1]

    def _use_threads(self) -> None:
        """Of torch, which counts them for each thread that calls it."""
        import torch

        torch.set_num_threads(self.threads)
