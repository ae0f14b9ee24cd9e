"""Context of a stage's run function, besides configuration and inputs: stores, pool, progress, commit."""

import tempfile
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from components.runtime import events
from components.runtime.execution import Resources
from components.runtime.pool import HandoverError, Pool
from components.runtime.storage.artifact import (
    Artifact,
    ArtifactKind,
    FileEntry,
    commit_artifact,
    describe,
    upload_attempt,
)
from components.runtime.storage.scratch import SCRATCH
from components.runtime.storage.store import Fence, Store, in_parallel

REPORTS = 64  # number of reports in the measurement of a pace
AT_ONCE = 0.02  # seconds


class Pace:
    """Rate of a stage over the last reports, images/s."""

    def __init__(self) -> None:
        self.reports: deque[tuple[float, int]] = deque(maxlen=REPORTS)  # (seconds, images done)

    def rate(self, done: int, now: float) -> float | None:
        """Images/s after `done` images at time `now` in seconds; None for an unknown rate.
        What comes at once in the beginning says nothing: so comes all that an earlier try left."""
        other_work = self.reports and done < self.reports[-1][1]
        if other_work or (len(self.reports) == 1 and now - self.reports[0][0] < AT_ONCE):
            self.reports.clear()
        self.reports.append((now, done))
        (first, before), (last, after) = self.reports[0], self.reports[-1]
        return (after - before) / (last - first) if last > first else None


@dataclass(frozen=True)
class StageContext:
    """Stores, workers and reports of a stage's run; nothing here is part of its identity."""

    stage: str
    key: str
    store: Store  # the stage's folder, {root}/stages/{stage}/{key}
    resources: Resources
    recorder: events.Recorder
    scratch_folder: Path  # node-local, for the stage's run
    inputs: dict[str, str] = field(default_factory=dict)  # name -> key, for the manifest
    provenance: dict[str, Any] = field(default_factory=dict)
    pace: Pace = field(default_factory=Pace, compare=False)
    forced: str = ""  # id of the forced try whose folders these are
    fence: Fence | None = None  # of the stage's lease

    @property
    def train_store(self) -> Store:
        """Ray Train's run folder: the same at each try, so Train resumes; a forced try has a separate folder."""
        return Store(self.store.uri, self.fence).join(self._folder("train"))

    @property
    def files_store(self) -> Store:
        """Store of outputs with fixed names, filled together by several tries."""
        return self.store.join(self._folder("files"))

    @property
    def work_store(self) -> Store:
        """Store of unfinished work, left for the next try; useless after the commit of the stage."""
        return Store(self.store.uri, self.fence).join(self._folder("work"))

    def _folder(self, name: str) -> str:
        return f"{name}-{self.forced}" if self.forced else name

    def scratch(self) -> Path:
        """A new private folder on the node, removed by the runner of the stage."""
        return Path(tempfile.mkdtemp(prefix=f"{SCRATCH}{self.stage}-", dir=self.scratch_folder))

    def pool(self) -> Pool:
        """Workers for the stage's work: `with context.pool() as pool`."""
        return Pool(self.resources, warn=self.warn)

    def __reduce__(self) -> NoReturn:
        raise HandoverError(f"the context of stage {self.stage} is of this node only; pass what is needed of it")

    def warn(self, line: str) -> None:
        """Tell the user, now and in the report."""
        self.recorder.emit(events.Warning(self.stage, line))

    def report_images(self, done: int, total: int) -> None:
        """Reports progress of a stage over single images."""
        rate = self.pace.rate(done, time.monotonic())
        self.recorder.emit(events.Progress(self.stage, done, total, "image", rate))

    def write_images(self, folder: Path, images: Mapping[str, bytes]) -> None:
        """Writes and records images (PNG) by name."""
        for name, png in images.items():
            (folder / f"{name}.png").write_bytes(png)
            self.recorder.emit(events.Image(self.stage, 0, name, png))

    def commit(
        self,
        kind: ArtifactKind,
        *,
        folder: Path | None = None,
        entries: Iterable[FileEntry] = (),
        parts: Iterable[FileEntry] = (),
        written: Iterable[str] = (),
        metadata: dict[str, Any] | None = None,
    ) -> Artifact:
        """Uploads `folder`, lists all files of the stage's folder, and writes the manifest.

        Args:
            folder: local files of this try.
            entries: files of the stage's folder that were uploaded before.
            parts: files of `files_store`, as the records of finished parts list them.
            written: files of `files_store` that this try has written, whatever was there; read back and hashed here.

        Returns the committed artifact: this one, or the one of whoever committed first."""
        own = [*parts, *in_parallel(lambda path: describe(self.files_store.read(path), path), written)]
        place = self._folder("files")
        listed = [*entries, *(entry.model_copy(update={"path": f"{place}/{entry.path}"}) for entry in own)]
        if folder is not None:
            listed += upload_attempt(self.store, folder)
        started = self.provenance.get("started")
        artifact = Artifact(
            kind=kind,
            stage=self.stage,
            key=self.key,
            files=tuple(listed),
            metadata=metadata or {},
            inputs=self.inputs,
            provenance=self.provenance | ({} if started is None else {"seconds": time.time() - started}),
        )
        committed = commit_artifact(Store(self.store.uri, self.fence), artifact)
        self.work_store.delete_folder()
        return committed
