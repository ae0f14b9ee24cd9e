"""Composition of a self-contained folder with every trained network of both generators."""

import tempfile
from functools import partial
from pathlib import Path

from components.configuration.sampling import SamplingConfig
from components.runtime.storage.artifact import Artifact, FileEntry, upload_attempt
from components.runtime.storage.store import SCRATCH, Store
from components.sampling.cascade import compose
from components.stages.context import StageContext


def compose_cascade(
    config: SamplingConfig, context: StageContext, *, upsamplers: list[Artifact] | None = None, **parts: Artifact
) -> Artifact:
    """Copies the parts side by side, and writes roles and sampling settings to `cascade.json`.

    Args:
        upsamplers: smallest first.
        parts: the other models by what they are in a `Cascade`: tokenizer, prior, condition, base, model.

    Returns an artifact of kind `model` that `Cascade.load` opens anywhere, without the storage it came from.
    """
    larger = {artifact.stage: artifact for artifact in upsamplers or []}
    config.by_model(tuple(larger))  # raises here, for another number of upsamplers
    with context.pool() as pool:
        entries = pool.call(partial(copy_parts, parts, larger, config, context.store))
    return context.commit("model", entries=entries, metadata={"parts": [*parts, *larger]})


def copy_parts(
    parts: dict[str, Artifact], upsamplers: dict[str, Artifact], sampling: SamplingConfig, store: Store
) -> list[FileEntry]:
    """Composes the models in a folder with sampling settings, and uploads the folder to the store.
    Runs in a worker."""
    with tempfile.TemporaryDirectory(prefix=f"{SCRATCH}cascade-") as place:
        folders = {
            name: artifact.download(Path(place) / "parts" / name) for name, artifact in {**parts, **upsamplers}.items()
        }
        larger = {name: folders.pop(name) for name in upsamplers}
        settings = sampling.by_model(tuple(larger))
        composed = Path(place) / "composed"
        compose(composed, upsamplers=larger, sampling=settings, precision=sampling.precision, **folders)
        return upload_attempt(store, composed)
