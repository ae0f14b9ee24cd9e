"""What storage holds that no manifest lists: tries that lost or broke off, and state of finished stages.

First a plan, then the deletion; a stage that somebody works on now (its lease has a holder) is left alone.
"""

import json
from typing import NamedTuple

from components.storage.artifact import load_artifact
from components.storage.store import Store

REASONS = {  # kind of a folder that the manifest of its stage does not list -> why it may go
    "attempt": "a try that was not committed",
    "files": "files of a try that was superseded, or of no more use",
    "train": "training state of a finished stage",
    "work": "what a finished stage worked with",
}


class Garbage(NamedTuple):
    path: str  # folder, relative to the storage root
    bytes: int
    reason: str


def find_garbage(root: Store, *, unused: bool = False) -> list[Garbage]:
    """Folders that may go. `unused`: also whole stages that no run below `runs/` names."""
    used = _used_keys(root)
    found = []
    for stage in root.folders("stages"):
        for key in root.folders(f"stages/{stage}"):
            folder = f"stages/{stage}/{key}"
            if _held(root.join(folder)):
                continue
            if unused and key not in used:
                found.append(Garbage(folder, _size(root, folder), "no run uses this stage"))
            else:
                found += _in_stage(root, folder)
    return found


def collect(root: Store, garbage: list[Garbage]) -> None:
    """Delete what was planned."""
    for folder in garbage:
        root.delete_folder(folder.path)


def _in_stage(root: Store, folder: str) -> list[Garbage]:
    artifact = load_artifact(root.join(folder))
    if artifact is None:
        return []  # not committed: a later run resumes from what is there
    listed = {entry.path.split("/")[0] for entry in artifact.files}
    found = []
    for name in root.folders(folder):
        reason = REASONS.get(name.partition("-")[0])
        if reason is not None and name not in listed:
            found.append(Garbage(f"{folder}/{name}", _size(root, f"{folder}/{name}"), reason))
    return found


def _used_keys(root: Store) -> set[str]:
    plans = [info.path for info in root.list("runs") if info.path.endswith("/plan.json")]
    return {stage["key"] for path in plans for stage in json.loads(root.read(path))["stages"]}


def _held(stage: Store) -> bool:
    names = [info.path for info in stage.list("lease")]
    return bool(names) and not json.loads(stage.read(names[-1]))["released"]


def _size(root: Store, folder: str) -> int:
    return sum(info.bytes for info in root.list(folder))
