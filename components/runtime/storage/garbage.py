"""Garbage in storage, listed by no manifest: lost or broken tries, state of finished stages.

Two laws: stages that a run names stay, and stages with a living worker are left alone. The collector holds the stage's
lease, as a driver does, and looks again before the first deletion. The manifest goes first, and lists of other files
(`*.json`) next: the rest of a collection that was killed is adopted by no run, and is found by the next collection.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

from pydantic import BaseModel

from components.configuration.file_names import FolderName
from components.runtime.storage.artifact import MANIFEST, load_artifact, parse_stored
from components.runtime.storage.connection import FencedError
from components.runtime.storage.lease import TTL, Lease, Seen
from components.runtime.storage.store import FileInfo, Store, in_parallel

PLAN, ANNOUNCED = "plan.json", "announced.json"  # stages of a run: with their ends; before the start
LEASE = "lease"  # folder in that of a stage
UNUSED = "no run uses this stage"
REASONS = {  # kind of a folder that no manifest lists -> reason for a deletion
    "attempt": "a try that was not committed",
    "files": "files of a try that was superseded, or of no more use",
    "train": "training state of a finished stage",
    "work": "what a finished stage worked with",
}


class PlannedKey(BaseModel):
    """Name and key of a run's stage: the place of the stage's artifact."""

    name: FolderName
    key: FolderName


class RunPlan(BaseModel):
    """The stages of a run, read from the run's files."""

    stages: tuple[PlannedKey, ...]
    saved: float = 0.0  # seconds since 1970


class Garbage(NamedTuple):
    """A folder that may be deleted."""

    path: str  # relative to the storage root
    bytes: int
    reason: str
    seen: Seen = Seen()  # the stage's lease at that time

    @property
    def stage(self) -> str:
        """Folder of the stage, relative to the storage root."""
        return "/".join(self.path.split("/")[:3])


def find_garbage(
    root: Store, *, unused: bool = False, ttl: float = TTL, on_wait: Callable[[str], None] = lambda line: None
) -> list[Garbage]:
    """Folders for deletion, in stages without a living worker.
    `unused`: also whole stages that no run below `runs/` names. `ttl`: seconds without a heartbeat after which the
    holder of a lease counts as dead. `on_wait`: receives a line before they are waited for. Raises ArtifactError."""
    used = used_stages(root) if unused else None
    stages = [f"stages/{stage}/{key}" for stage in root.folders("stages") for key in root.folders(f"stages/{stage}")]
    folders = {stage: garbage for stage in stages if (garbage := _in_stage(root, stage, used))}
    looks = {stage: _lease(root, stage, ttl).look() for stage in folders}
    held = [stage for stage, seen in looks.items() if seen.holder]
    if held:
        on_wait(f"somebody works on {', '.join(held)}, or was killed there: looking again in {ttl:g} s")
        time.sleep(ttl)
    for stage in held:
        again = _lease(root, stage, ttl).look()
        if again.holder and again != looks[stage]:
            del folders[stage]
        looks[stage] = again
    return [each._replace(seen=looks[stage]) for stage, garbage in folders.items() for each in garbage]


def collect(root: Store, garbage: list[Garbage], *, unused: bool = False, ttl: float = TTL) -> list[Garbage]:
    """Delete folders from `find_garbage` that are still garbage. Returns the deleted folders."""
    deleted: list[Garbage] = []
    for stage in dict.fromkeys(each.stage for each in garbage):
        chosen = [each for each in garbage if each.stage == stage]
        lease = _lease(root, stage, ttl)
        if not lease.take(chosen[0].seen):
            continue  # work has begun there again
        held = Store(root.uri, lease.fence)
        try:
            still = {each.path for each in _in_stage(held, stage, used_stages(root) if unused else None)}
            deleted += [each for each in chosen if each.path in still and _delete(held, each)]
        except FencedError:
            continue  # this collector stood still, and work has begun
        finally:
            lease.release()
        if not _files(root.join(stage)):
            lease.withdraw()
    return deleted


def used_stages(root: Store) -> set[str]:
    """Folders of the stages of runs, ended runs and announced runs."""
    paths = [info.path for info in root.list("runs") if info.path.rpartition("/")[2] in (PLAN, ANNOUNCED)]
    try:
        plans = in_parallel(lambda path: parse_stored(RunPlan, root.read(path), root.url(path)), paths)
    except FileNotFoundError:  # a run took its announcement back
        return used_stages(root)
    return {f"stages/{stage.name}/{stage.key}" for plan in plans for stage in plan.stages}


def _in_stage(root: Store, stage: str, used: set[str] | None) -> list[Garbage]:
    """Garbage of a stage; `used` is None where unused stages stay."""
    store = root.join(stage)
    if used is not None and stage not in used:
        files = _files(store)
        return [Garbage(stage, sum(info.bytes for info in files), UNUSED)] if files else []
    artifact = load_artifact(store)
    if artifact is None:
        return []  # not committed: a later run resumes from these files
    listed = {entry.path.partition("/")[0] for entry in artifact.files}
    return [
        Garbage(f"{stage}/{name}", sum(info.bytes for info in store.list(name)), REASONS[kind])
        for name in store.folders()
        if (kind := name.partition("-")[0]) in REASONS and name not in listed
    ]


def _delete(root: Store, garbage: Garbage) -> bool:
    """Delete a folder; False where a run needs the folder after all. Raises FencedError."""
    store = root.join(garbage.path)
    if garbage.path == garbage.stage and store.exists(MANIFEST):
        manifest = store.read(MANIFEST)
        store.delete(MANIFEST)
        if garbage.path in used_stages(root):  # by a run that looked before this deletion
            store.write_once(MANIFEST, manifest)
            return False

    paths = [info.path for info in _files(store)]
    for lists in (True, False):  # of other files first
        in_parallel(store.delete, [path for path in paths if path.endswith(".json") == lists])
    for name in store.folders() if garbage.path == garbage.stage else [""]:  # of a disk, empty now
        store.delete_folder(name) if name != LEASE else None
    return True


def _files(store: Store) -> list[FileInfo]:
    """The files in a stage's folder, or in a folder below, without the lease's."""
    return [info for info in store.list() if not info.path.startswith(f"{LEASE}/")]


def _lease(root: Store, stage: str, ttl: float) -> Lease:
    return Lease(root.join(stage, LEASE), ttl=ttl, on_lost=lambda: None)  # what is deleted is behind its fence
