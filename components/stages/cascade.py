"""Compose: one self-contained folder that holds every trained network of both roads."""

import json
from pathlib import Path

from components.configuration import Config
from components.stages.context import StageContext
from components.storage.artifact import Artifact


class CascadeConfig(Config):
    """Nothing to decide: the composed model is its parts."""


def compose_cascade(
    config: CascadeConfig,
    context: StageContext,
    *,
    tokenizer: Artifact,
    prior: Artifact,
    base: Artifact,
    upsamplers: list[Artifact],
) -> Artifact:
    """Copy the parts beside each other and say in `cascade.json` what each one is.

    Returns an artifact of kind `model` that `Cascade.load` opens anywhere, without the storage it came from.
    """
    folder = context.scratch()
    parts = {artifact.stage: artifact for artifact in (tokenizer, prior, base, *upsamplers)}
    for done, (name, artifact) in enumerate(parts.items(), start=1):
        artifact.download(folder / name)
        context.recorder.progress(context.stage, step=done, total=len(parts), unit="model")
    description = {
        "stages": {
            "tokenizer": tokenizer.stage,
            "prior": prior.stage,
            "base": base.stage,
            "upsamplers": [artifact.stage for artifact in upsamplers],
        },
        "classes": _classes(folder / base.stage),
    }
    (folder / "cascade.json").write_text(json.dumps(description, indent=1))
    resolutions = [artifact.metadata["resolution"] for artifact in (base, *upsamplers) if "resolution" in artifact.metadata]
    return context.commit("model", folder=folder, metadata={"classes": description["classes"], "resolutions": resolutions})


def _classes(folder: Path) -> list[str]:
    return json.loads((folder / "model.json").read_text())["settings"].get("classes", [])
