"""Compose: one self-contained folder that holds every trained network of both roads."""

from components.configuration import Config
from components.sampling.cascade import compose
from components.stages.context import StageContext
from components.storage.artifact import Artifact


class CascadeConfig(Config):
    """Nothing to decide: the composed model is its parts."""


def compose_cascade(
    config: CascadeConfig, context: StageContext, *, upsamplers: list[Artifact] | None = None, **parts: Artifact
) -> Artifact:
    """Copy the parts beside each other and say in `cascade.json` what each one is.

    Args:
        upsamplers: smallest first.
        parts: the other models by what they are in a `Cascade`: tokenizer, prior, condition, base, model.

    Returns an artifact of kind `model` that `Cascade.load` opens anywhere, without the storage it came from.
    """
    larger = {artifact.stage: artifact for artifact in upsamplers or []}
    total, folders = len(parts) + len(larger), {}
    for done, (name, artifact) in enumerate({**parts, **larger}.items(), start=1):
        folders[name] = artifact.download(context.scratch())
        context.recorder.progress(context.stage, step=done, total=total, unit="model")
    folder = compose(
        context.scratch(),
        upsamplers={name: folders.pop(name) for name in larger},
        **folders,
    )
    return context.commit("model", folder=folder, metadata={"parts": [*parts, *larger]})
