"""Drivers of a stage in one process, whose every request to a store in memory is let through, refused or left without
an answer by whoever holds the world: leases and stalls of minutes pass in milliseconds, the same way each time.

What runs is the product's: `run_stage` with its lease and heartbeat, retries, fences and commits, and `cascade gc`. A
driver is a few strands (greenlets), its heartbeat one of them; each stops before a request and wherever it would sleep.
"""

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import fsspec
import pytest
from greenlet import getcurrent, greenlet

from components.runtime.execution import Resources
from components.runtime.storage import artifact, connection, garbage, lease
from components.runtime.storage.artifact import (
    MANIFEST,
    Artifact,
    ArtifactError,
    look_at,
    recorded_parts,
    write_file,
    write_record,
)
from components.runtime.storage.connection import FencedError
from components.runtime.storage.store import Digest, Store, StoreError, digest_of
from components.stages.context import StageContext
from pipelines.engine import execute

Answer = Literal["ok", "refused", "lost"]
ROOT, STAGE = "drivers://root", "root/stages/base/k"
PARTS = {f"part-{number}": b"data of part %d" % number for number in range(2)}
STEPS = 3  # of the training, with a checkpoint after each
STATES = [b"weights after step %d" % step for step in range(STEPS + 1)]
TRUTH = {f"{part}.bin": digest_of(data) for part, data in PARTS.items()} | {"model.bin": digest_of(STATES[-1])}
HELD = ("train", "work", "superseded-", "forced", MANIFEST)  # what only the holder of the lease changes
LATEST = "latest.json"  # names the training's last checkpoint


class GoneError(BaseException):
    """The process of a strand has ended; no `except Exception` in it goes on."""


class Strand:
    """A thread of a driver."""

    def __init__(self, driver: "Driver", body: Callable[[], object]) -> None:
        self.driver, self.body = driver, body
        self.ready: Callable[[], bool] = lambda: True
        self.listed: int | None = None  # latest generation that it has seen since it changed a file
        self.greenlet = greenlet(self._run, parent=driver.world.hub)

    def _run(self, _: Answer) -> None:
        with suppress(GoneError):
            self.body()

    def wait(self, ready: Callable[[], bool]) -> Answer:
        """Let others go on until this one is `ready` and chosen. Raises GoneError if its driver was killed."""
        self.ready, answer = ready, "refused"
        if self in self.driver.strands:
            answer = self.driver.world.hub.switch()
        if self not in self.driver.strands:
            raise GoneError
        return answer


class Driver:
    """A process with a clock of its own, which does one thing after another."""

    def __init__(self, world: "World") -> None:
        self.world, self.strands, self.gone = world, list[Strand](), list[Strand]()
        self.ahead = 0.0  # seconds, of its clock
        self.generation = 0  # that it holds, or held last
        self.result: Artifact | None = None
        self.body: Callable[[], object] = lambda: None

    def start(self, body: Callable[[], object]) -> Strand:
        self.strands.append(strand := Strand(self, body))
        return strand

    def begin(self, body: Callable[[], object]) -> None:
        """Do something that may end with a line for the user."""

        def ending() -> None:
            with suppress(StoreError, ArtifactError, FileNotFoundError):
                body()
            self.end()

        self.body, self.result = body, None
        self.start(ending)

    def end(self) -> None:
        """End the process: what it would clean up reaches nothing."""
        self.gone, self.strands = self.gone + self.strands, []

    def kill(self) -> None:
        self.end()
        self.bury()

    def go_on(self, number: int, answer: Answer) -> bool:
        """Let one of its strands go on to its next request or sleep; False where none can."""
        ready = [strand for strand in self.strands if strand.ready()]
        if ready:
            strand = ready[number % len(ready)]
            strand.greenlet.switch(answer)
            if strand.greenlet.dead and strand in self.strands:
                self.strands.remove(strand)
        self.bury()
        return bool(ready)

    def bury(self) -> None:
        while self.gone:
            with suppress(GoneError):
                self.gone[-1].greenlet.throw(GoneError)
            self.gone.pop()

    def now(self) -> float:
        return self.world.seconds + self.ahead

    def work(self, *, forced: bool) -> None:
        """Begin the stage; Ray begins it again where the process ends itself."""
        names = f"{next(self.world.numbers):012x}" if forced else ""
        of = Store(f"{ROOT}/stages/base/k")
        job = execute.StageJob("base", "k", stage, {}, {}, of, Resources(), {"config": {}}, names)
        recorder: Any = SimpleNamespace(emit=lambda *event, **options: None)

        def run() -> None:
            self.result = execute.run_stage(job, recorder)

        self.begin(run)

    def collect(self) -> None:
        """Begin `cascade gc`."""
        self.begin(lambda: garbage.collect(Store(ROOT), garbage.find_garbage(Store(ROOT))))


class World:
    """All drivers, the time and the store; and what was seen of the laws."""

    def __init__(self, patch: pytest.MonkeyPatch, drivers: int) -> None:
        self.hub, self.seconds, self.numbers = getcurrent(), 0.0, itertools.count(1)
        self.drivers = [Driver(self) for _ in range(drivers)]
        self.files, self.requests, self.counts = dict[str, bytes](), 0, Counter[str]()
        self.damaged = dict[str, int]()  # path -> requests before
        self.commits, self.broken = dict[bytes, dict[str, Digest]](), list[str]()  # with the files that they list
        Bucket.world = self
        fsspec.register_implementation("drivers", Bucket, clobber=True)
        clock = SimpleNamespace(monotonic=self.now, sleep=self.sleep)
        for module in (lease, garbage, connection):
            patch.setattr(module, "time", clock)
        patch.setattr(connection, "sleep_using_event", lambda event: self.sleep)
        patch.setattr(lease, "threading", SimpleNamespace(Event=Event, Thread=Thread))
        made = SimpleNamespace(uuid4=lambda: SimpleNamespace(hex=f"{next(self.numbers):012x}{0:020x}"))
        for module in (lease, artifact):
            patch.setattr(module, "uuid", made)
        for module in (garbage, artifact):
            patch.setattr(module, "in_parallel", lambda action, items, **most: [action(item) for item in items])
        patch.setattr(execute, "os", SimpleNamespace(_exit=self.exit))

    @property
    def strand(self) -> Strand | None:
        """The one that runs; None for whoever looks at the world from outside."""
        strands = [strand for driver in self.drivers for strand in driver.strands + driver.gone]
        return next((strand for strand in strands if strand.greenlet is getcurrent()), None)

    @property
    def here(self) -> Strand:
        strand = self.strand
        assert strand is not None
        return strand

    def now(self) -> float:
        return self.strand.driver.now() if self.strand else self.seconds

    def sleep(self, seconds: float) -> None:
        strand, driver = self.here, self.here.driver
        until = driver.now() + seconds
        strand.wait(lambda: driver.now() >= until)

    def exit(self, code: int) -> None:
        driver = self.here.driver
        driver.end()
        driver.begin(driver.body)
        raise GoneError

    def change(self, path: str, data: bytes | None) -> None:
        """Write or delete a file, which a law may forbid."""
        strand, old, area = self.here, self.files.get(path), path.removeprefix(f"{STAGE}/")
        said = f"{'delete' if data is None else 'write'} {area} by generation {strand.driver.generation}"
        if area.startswith(HELD):
            if strand.listed is None or strand.listed > strand.driver.generation:
                self.broken.append(f"{said}: it saw generation {strand.listed} before")
            strand.listed = None
        if area == MANIFEST:
            if old not in (None, data, *(self.files[name] for name in self.files if "/superseded-" in name)):
                self.broken.append(f"{said}: a commit is lost")
            if data is not None:
                files = json.loads(data)["files"]
                self.commits[data] = {file["path"]: Digest(file["bytes"], file["sha256"]) for file in files}
        if data is None and any(area in files for files in [*self.commits.values()][-1:]):
            self.broken.append(f"{said}: a file of the last commit is lost")
        if area.startswith("lease/") and data is not None and (state := json.loads(data))["beat"] == 0:
            strand.driver.generation = int(area[6:14])
            self.counts["lease taken"] += 1
            if old is not None and json.loads(old)["id"] != state["id"]:
                self.broken.append(f"{said}: two hold it")
        self.files.pop(path, None)
        self.damaged.pop(path, None)
        if data is not None:
            self.files[path] = data

    def damage(self, path: str, place: int) -> None:
        if path not in self.damaged:  # the same bit again would mend it
            data = bytearray(self.files[path])
            data[place % len(data)] ^= 1
            self.files[path], self.damaged[path] = bytes(data), self.requests

    def adopt(self, path: str, *, since: int) -> None:
        """A file counts as whole after a look that began with request `since`."""
        if self.damaged.get(path, since) < since:
            self.broken.append(f"adopt {path}, damaged before")


def stage(context: StageContext) -> Artifact:
    """Parts that are adopted or made, a training with checkpoints that are listed and pruned, and a commit."""
    files, train, records = context.files_store, context.train_store, []
    for part, data in PARTS.items():
        since = Bucket.world.requests + 1
        record = look_at(files, part).record if part in recorded_parts(files) else None
        if record is not None:
            Bucket.world.adopt(f"{files.uri.removeprefix('drivers://')}/{part}.bin", since=since)
        records += (record or write_record(files, part, write_file(files, f"{part}.bin", data))).files
    step = last_step(train)
    while step < STEPS:
        step += 1
        name = f"step-{step}.{context.fence.generation if context.fence else ''}"
        train.write(f"{name}/state", STATES[step])
        train.write(LATEST, json.dumps([name, digest_of(STATES[step])]).encode())
        for info in train.list():
            if info.path != LATEST and not info.path.startswith(name):
                train.delete(info.path)
    folder = context.scratch()
    (folder / "model.bin").write_bytes(STATES[step])
    return context.commit("model", folder=folder, parts=records)


def last_step(train: Store) -> int:
    """Steps of the last checkpoint; 0 where it is not there, or not whole."""
    try:
        name, digest = json.loads(train.read(LATEST))
        return STATES.index(train.read(f"{name}/state", expected=Digest(*digest)))
    except FencedError:
        raise
    except (FileNotFoundError, StoreError, ValueError):
        return 0


class Event:
    """A `threading.Event` of strands."""

    def __init__(self) -> None:
        self.is_it = False

    def set(self) -> None:
        self.is_it = True

    def is_set(self) -> bool:
        return self.is_it

    def wait(self, seconds: float = math.inf) -> bool:
        strand = Bucket.world.here
        until = strand.driver.now() + seconds
        strand.wait(lambda: self.is_it or strand.driver.now() >= until)
        return self.is_it


class Thread:
    """A `threading.Thread` that is a strand."""

    def __init__(self, *, target: Callable[[], object], **name: object) -> None:
        self.target = target

    def start(self) -> None:
        self.strand = Bucket.world.here.driver.start(self.target)

    def join(self) -> None:
        Bucket.world.here.wait(lambda: self.strand.greenlet.dead)


class Bucket(fsspec.AbstractFileSystem):
    """An object store in memory: whole files, conditional puts, deletions that don't mind a missing file."""

    protocol = "drivers"
    world: ClassVar[World]

    def ask(self, effect: Callable[[], Any], *, at_once: bool = False) -> Any:
        """Let a request wait for its answer; an effect may be there though the answer is not."""
        strand = self.world.strand
        self.world.requests += 1
        answer = "ok" if strand is None or at_once else strand.wait(lambda: True)
        self.world.counts[f"request {answer}"] += 1
        if answer == "refused":
            raise ConnectionError("no route to the store")
        result = effect()
        if answer == "lost":
            raise ConnectionError("the answer was lost")
        return result

    def there(self, path: str) -> bytes:
        if path not in self.world.files:
            raise FileNotFoundError(path)
        return self.world.files[path]

    def put(self, path: str, data: bytes, mode: str) -> None:
        if mode == "create" and path in self.world.files:
            raise FileExistsError(path)
        self.world.change(path, data)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: object) -> None:
        self.ask(lambda: self.put(path, value, mode))

    def put_file(self, lpath: str, rpath: str, **options: object) -> None:
        self.ask(lambda: self.put(rpath, Path(lpath).read_bytes(), "overwrite"))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: object) -> bytes:
        return self.ask(lambda: self.there(path))[start:end]

    def open(self, path: str, mode: str = "rb", **options: object) -> BytesIO:
        return BytesIO(self.cat_file(path))

    def size(self, path: str) -> int:
        return self.ask(lambda: len(self.there(path)))

    def exists(self, path: str, **options: object) -> bool:
        return self.ask(lambda: any(name == path or name.startswith(f"{path}/") for name in self.world.files))

    def ls(self, path: str, detail: bool = True, **options: object) -> list[dict[str, Any]]:
        names = self.ask(lambda: {name[len(path) + 1 :] for name in self.world.files if name.startswith(f"{path}/")})
        folders = {name.partition("/")[0] for name in names if "/" in name}
        return [{"name": f"{path}/{name}", "type": "directory"} for name in folders]

    def find(self, path: str, *rest: object, **options: object) -> dict[str, dict[str, Any]]:
        def look() -> dict[str, dict[str, Any]]:
            found = {name: data for name, data in self.world.files.items() if name.startswith(f"{path}/")}
            if path == f"{STAGE}/lease" and (strand := self.world.strand) is not None:
                strand.listed = max((int(name[-13:-5]) for name in found), default=0)
            return {name: {"size": len(data)} for name, data in found.items()}

        return self.ask(look)

    def rm_file(self, path: str) -> None:
        self.rm(path)

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        def remove() -> None:
            strand = self.world.here
            listed = strand.listed
            for name in [name for name in self.world.files if name == path or name.startswith(f"{path}/")]:
                strand.listed = listed  # one request for all of them
                self.world.change(name, None)

        # On its way while the lease passes on, it would take the next holder's commit: no store refuses that.
        self.ask(remove, at_once=path.endswith(f"/{MANIFEST}"))
