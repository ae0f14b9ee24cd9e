"""Export of a model, or of each model of a cascade: files of each form, card, upload to a hub.

`huggingface_hub` (extra `hub`) is imported only where it is used; it reads HF_ENDPOINT and HF_TOKEN."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from components.models.bundle import DESCRIPTION, load_bundle
from components.runtime.storage.connection import reason
from components.runtime.storage.store import Store, in_parallel
from components.sampling.cascade import DESCRIPTION as CASCADE
from components.sampling.cascade import read_description
from components.sampling.model import BPE
from components.weights.families.autoencoders import SCALE
from components.weights.files import PIPELINE
from components.weights.programs import write_programs
from components.weights.stable_diffusion import join_pipeline
from components.weights.twins import write_twin

SAMPLES = "samples.png"  # beside the card
FORMS: dict[str, Callable[..., list[str]]] = {"pt2": write_programs, "onnx": write_programs, "diffusers": write_twin}


def write_parts(folder: Path, made: Path, form: str, title: str) -> list[str]:
    """Writes each model of the folder; returns a line about each, of a single model with its `title`.
    Raises ValueError, with the name of the model."""
    parts, scale, lines = {"": folder}, None, list[str]()
    if not (folder / DESCRIPTION).is_file():
        stages = read_description(folder)["stages"].values()
        parts = {name: folder / name for stage in stages for name in ([stage] if isinstance(stage, str) else stage)}
    for name, part in parts.items():
        if name and (part / DESCRIPTION).is_file():
            scale = json.loads((part / DESCRIPTION).read_text())["settings"].get("latent_scale", scale)
    for name, part in parts.items():
        (made / name).mkdir(exist_ok=True)
        try:
            lines.append(f"{name or title}: {', '.join(write_model(part, made / name, form, scale))}")
        except ValueError as error:
            raise ValueError(f"{name}: {error}" if name else str(error)) from None
    if "" not in parts:
        shutil.copy(folder / CASCADE, made / CASCADE)  # how they compose
        if form == "diffusers" and (line := join_pipeline(folder, made)):
            if (made / PIPELINE).is_file():  # files were moved
                names = {part: sorted(file.name for file in part.iterdir()) for part in made.iterdir() if part.is_dir()}
                lines = [f"{part.name}: {', '.join(names[part])}" for part in sorted(names)]
            lines.append(line)
    return lines


def write_model(folder: Path, made: Path, form: str, latent_scale: float | None) -> list[str]:
    """Writes the model of a folder, with its tokenizer of texts; returns the names of the files.
    An encoder of transformers is copied as it is."""
    if not (folder / DESCRIPTION).is_file():
        shutil.copytree(folder, made, dirs_exist_ok=True)
        return sorted(path.name for path in made.iterdir())
    bundle = load_bundle(folder)
    if latent_scale is not None and "objective" not in bundle.settings:
        bundle = bundle._replace(settings=bundle.settings | {SCALE: latent_scale})
    files = FORMS[form](bundle, made, form)
    if (folder / BPE).is_file():
        shutil.copy(folder / BPE, made / BPE)
    return files


def send(made: Path, store: Store) -> None:
    """Uploads all files below `made`, those at its top last: they say what the others are."""
    files = [path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file()]
    for deep in (True, False):
        in_parallel(lambda name: store.upload(made / name, name), [name for name in files if ("/" in name) == deep])


def write_card(path: Path, title: str, lines: list[str], *, form: str, known: str) -> None:
    """Writes a model card: what is known of the model, and its files.
    `lines` are about the files; `known` is Markdown, empty if nothing is known. SAMPLES beside the card are shown."""
    from huggingface_hub import ModelCard, ModelCardData

    library = {"pt2": "pytorch"}.get(form, form)
    data = ModelCardData(library_name=library, tags=["image-cascade", "image-generation"])
    about = [known or "Nothing is recorded of its data, license or figures."]
    about += [f"![Samples]({SAMPLES})"] if (path.parent / SAMPLES).is_file() else []
    parts = [f"---\n{data.to_yaml()}\n---", f"# {title}", *about, f"Exported by `cascade export MODEL --as {form}`:"]
    ModelCard("\n\n".join([*parts, "\n".join(f"- {line}" for line in lines)]) + "\n").save(path)


def push_to(repository: str, made: Path) -> str:
    """Uploads the folder to a repository of the hub that HF_ENDPOINT names; returns its address.
    The repository is made where there is none. Raises ValueError, in one line, if the hub takes no files."""
    from huggingface_hub import HfApi

    try:
        address = str(HfApi().create_repo(repository, exist_ok=True))
        HfApi().upload_folder(repo_id=repository, folder_path=made, commit_message="Files of cascade export")
    except Exception as error:  # where no hub answers, of whatever library sends its requests
        raise ValueError(f"--push {repository}: the hub takes no files ({reason(error)})") from error
    return address
