"""`cascade export`: models as files that others open, a model alone or a whole cascade.

Everything is made in a scratch folder and compared there; the place that the user named is written last."""

import shutil
import tempfile
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from components.configuration.usage import UsageError, usage_errors
from components.models.bundle import DESCRIPTION, load_bundle
from components.runtime.storage.connection import shown
from components.runtime.storage.store import SCRATCH, Store, absolute, list_url
from components.sampling.cascade import DESCRIPTION as CASCADE
from components.sampling.cascade import read_description
from components.sampling.model import BPE
from components.weights.twins import write_twin
from pipelines.command.loading import local_model


def export_model(model: str, *, out: str, tracking: str | None, console: Console) -> str:
    """Write a model, or each model of a cascade, to `out`; returns lines about the files.
    Raises UsageError for a model that is not there or can't be exported so, and for a folder that holds something."""
    store, lines = Store(absolute(out)), list[str]()
    if list_url(store.uri):
        raise UsageError(
            f"--out {out} holds something already: name a new folder",
        )
    with (
        usage_errors(),
        local_model(model, tracking) as folder,
        tempfile.TemporaryDirectory(prefix=SCRATCH) as scratch,
        Progress(console=console, transient=True) as bar,
    ):
        made, parts = Path(scratch), models_in(folder)
        for name, part in bar.track(parts.items(), description="export"):
            (made / name).mkdir(exist_ok=True)
            with usage_errors(f"{name}: " if name else ""):
                lines.append(f"{name or folder.name}: {', '.join(write_model(part, made / name))}")
        if "" not in parts:
            shutil.copy(folder / CASCADE, made / CASCADE)  # how they compose
        files = [path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file()]
        for name in sorted(files, key=lambda name: "/" not in name):  # those at the top last: they say what others are
            store.upload(made / name, name)
    return "\n".join([*lines, f"exported: {shown(store.uri)}"])


def write_model(folder: Path, made: Path) -> list[str]:
    """Writes the model of a folder, with its tokenizer of texts; returns the names of the files."""
    if not (folder / DESCRIPTION).is_file():  # an encoder of transformers, which is one of others already
        shutil.copytree(folder, made, dirs_exist_ok=True)
        return sorted(path.name for path in made.iterdir())
    files = write_twin(load_bundle(folder), made)
    if (folder / BPE).is_file():
        shutil.copy(folder / BPE, made / BPE)
    return files


def models_in(folder: Path) -> dict[str, Path]:
    """The folder of each model by name, a model alone without one."""
    if (folder / DESCRIPTION).is_file():
        return {"": folder}
    stages = read_description(folder)["stages"].values()
    names = [name for stage in stages for name in ([stage] if isinstance(stage, str) else stage)]
    return {name: folder / name for name in names}
