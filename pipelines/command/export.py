"""`cascade export`: models as files that others open, with a model card; a model alone or a cascade.

Everything is made in a scratch folder and compared there; the place that the user named is written last."""

import tempfile
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from components.configuration.usage import UsageError, usage_errors
from components.runtime.storage.connection import shown
from components.runtime.storage.store import SCRATCH, Store, absolute, list_url
from components.runtime.tracking import registry
from components.runtime.tracking.names import REGISTRY, environment
from components.weights.exporting import push_to, send, write_card, write_parts
from components.weights.files import CARD
from pipelines.command.loading import local_model
from pipelines.engine.code_seen import made_by
from pipelines.engine.session import set_environment
from pipelines.planning.profiles import tracking_uri


def export_model(
    model: str, *, form: str, out: str, tracking: str | None, console: Console, push: str | None = None
) -> str:
    """Write a model, or each model of a cascade, to `out`; returns lines about the files.
    With `push` also to that repository of a hub. Raises UsageError for a model that is not there or can't be exported
    so, for a folder that holds something, and for a hub that takes no files."""
    store = Store(absolute(out))
    if list_url(store.uri):
        raise UsageError(f"--out {out} holds something already: name a new folder")
    if push is not None and find_spec("huggingface_hub") is None:
        raise UsageError("--push needs huggingface_hub: pip install 'image-cascade[hub]'")
    set_environment(environment())
    with usage_errors(), local_model(model, tracking) as folder, tempfile.TemporaryDirectory(prefix=SCRATCH) as scratch:
        made = Path(scratch)
        with Progress(console=console, transient=True) as bar:
            bar.add_task("exporting and comparing", total=None)
            lines = list(write_parts(folder, made, form))
        if find_spec("huggingface_hub") is not None:
            title = model.removeprefix(REGISTRY).rstrip("/").rpartition("/")[2].partition("@")[0]
            write_card(made / CARD, title, lines, form=form, known=known_of(model, tracking))
        send(made, store)
        pushed = [] if push is None else [f"pushed: {push_to(push, made)}"]
    return "\n".join([*lines, f"exported: {shown(store.uri)}", *pushed])


def known_of(model: str, tracking: str | None) -> str:
    """Markdown about a model, of its registry or of its manifest; empty for a bare folder.
    Raises ValueError if the registry can't be reached."""
    if model.startswith(REGISTRY):
        return registry.description_of(model, tracking_uri=tracking_uri(tracking))
    if registry.is_model_folder(model):
        return ""
    artifact = registry.model_artifact(model)
    lines = [f"Model `{artifact.identity}`, made by {made_by(artifact.provenance) or 'code that is not known'}."]
    if origin := artifact.provenance.get("origin"):
        license_ = origin.get("license", "not stated")
        lines.append(f"Weights of the {origin['family']}, sha256 `{origin['sha256']}`; their license: {license_}.")
    return "\n\n".join(lines)
