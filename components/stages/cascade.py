"""Compose: one self-contained folder that holds every trained network of both roads."""

from components.configuration import Config
from components.sampling.cascade import compose
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
    parts = {artifact.stage: artifact for artifact in (tokenizer, prior, base, *upsamplers)}
    folders = {}
    for done, (name, artifact) in enumerate(parts.items(), start=1):
        folders[name] = artifact.download(context.scratch())
        context.recorder.progress(context.stage, step=done, total=len(parts), unit="model")
    folder = compose(
        context.scratch(),
        tokenizer=folders[tokenizer.stage],
        prior=folders[prior.stage],
        base=folders[base.stage],
        upsamplers={artifact.stage: folders[artifact.stage] for artifact in upsamplers},
    )
    return context.commit("model", folder=folder, metadata={"parts": list(parts)})
