"""Tries of a stage: one goes on where the one before was killed, but a forced one begins anew and adopts nothing.

A forced try works in folders of its own (`files-ID`, `work-ID`, `train-ID`), which the file `forced` names before the
manifest moves aside: whenever it is killed, no later try works in the folders of before. What older manifests list
stays where it is, for whoever still reads it, until `cascade gc`.
"""

import re

from components.runtime.storage.artifact import MANIFEST, load_artifact
from components.runtime.storage.store import Store, StoreError

FORCED = "forced"  # holds the id of the forced try that was begun last
CURVE = "curve.json"
NOT_LISTED = ("train", "work")  # folders of which no manifest lists a file


def current_try(store: Store) -> str:
    """The id of the forced try whose folders the next try goes on with; "" where none was forced. Raises StoreError."""
    if not store.exists(FORCED):
        return ""
    content = store.read(FORCED).decode(errors="replace")
    if not re.fullmatch("[0-9a-f]{12}", content):
        raise StoreError(f"{store.url(FORCED)} is damaged, it names no try; run the stage again with --force")
    return content


def begin_forced_try(store: Store, forced: str) -> None:
    """Make room for the forced try of this id, or go on with it where it has begun. Called under the stage's lease."""
    if not store.exists(FORCED) or store.read(FORCED) != forced.encode():
        store.delete(CURVE)
        store.write(FORCED, forced.encode())
    if store.exists(MANIFEST):
        store.write(f"superseded-{forced}.json", store.read(MANIFEST))
        store.delete(MANIFEST)
    for name in store.folders():
        kind, _, own = name.partition("-")
        if kind in NOT_LISTED and own != forced:
            store.delete_folder(name)


def has_committed(store: Store, forced: str) -> bool:
    """True if the stage is committed; where `forced` is given, by that try."""
    if not forced:
        return store.exists(MANIFEST)
    artifact = load_artifact(store)
    return artifact is not None and artifact.provenance.get(FORCED) == forced
