"""Export of a model, or of each model of a cascade: files of each form, card, upload to a hub.

As folders of diffusers our weights stand under the names of a class that computes the same. The rules that import a
family are read the other way: the class of diffusers, built on the meta device by its config.json, tells the names. So
exporting and importing again gives the same tensors. A network with a trait that the class lacks is refused by the
trait; one of diffusion becomes a program with a pipeline of its own.

`huggingface_hub` (extra `hub`) is imported only where it is used; it reads HF_ENDPOINT and HF_TOKEN."""

import inspect
import json
import shutil
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from components.models.bundle import DESCRIPTION, NETWORKS, ModelBundle, load_bundle
from components.models.diffusion import betas
from components.models.diffusion.discrete import DiscreteObjective
from components.models.diffusion.objective import Objective, make_objective
from components.runtime.storage.connection import reason
from components.runtime.storage.store import Store, in_parallel
from components.sampling.cascade import DESCRIPTION as CASCADE
from components.sampling.cascade import read_description
from components.sampling.model import BPE
from components.weights.families.autoencoders import SCALE
from components.weights.files import CONFIG, PIPELINE, WEIGHTS
from components.weights.importing import FAMILIES
from components.weights.programs import exported, quiet, write_programs
from components.weights.renaming import PART, WeightFamily, new_name, refuse_trait
from components.weights.stable_diffusion import SCHEDULER, SCHEDULES, join_pipeline

SAMPLES = "samples.png"  # beside the card
EVERY_TENTH = 10  # of the training steps, for the scale of the time
STEPS = 50  # of a pipeline of its own, as of our sampling


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


def write_twin(bundle: ModelBundle, folder: Path, form: str) -> list[str]:
    """Writes a folder that diffusers opens; returns the names of its files.
    Raises ValueError, before it writes, for a model without a twin that is not of diffusion."""
    if find_spec("diffusers") is None:
        raise ValueError(f"--as {form} needs the names in diffusers: pip install diffusers, or take --as pt2")
    try:
        return write_classes(bundle, folder)
    except ValueError as error:
        if "objective" not in bundle.settings or not hasattr(bundle.module, "conditions"):
            raise
        return [*write_pipeline(bundle, folder), f"without a twin ({error})"]


def write_classes(bundle: ModelBundle, folder: Path) -> list[str]:
    """Writes config.json and weights of a class of diffusers; returns the names of the files.
    A model of diffusion has its network in `unet` and its schedule in `scheduler`, and is a whole pipeline where it
    makes images without a condition. Raises ValueError, before it writes, for a model without a twin."""
    family, config = twin_of(bundle)
    with quiet():
        tensors = foreign_tensors(bundle, family, config)
    files = {CONFIG: {"_class_name": family.class_name, **config}}
    if SCALE in bundle.settings:  # of latents: of the autoencoder there, of the model of diffusion here
        files[CONFIG][SCALE] = bundle.settings[SCALE]
    if "objective" in bundle.settings:
        files = {f"unet/{CONFIG}": files[CONFIG], SCHEDULER: scheduler_config(bundle)}
        if not bundle.module.conditions and "latent_scale" not in bundle.settings:
            scheduler = files[SCHEDULER]["_class_name"]
            pipeline = {"_class_name": scheduler.replace("Scheduler", "Pipeline")}
            pipeline["unet"] = ["diffusers", family.class_name]
            files[PIPELINE] = pipeline | {"scheduler": ["diffusers", scheduler]}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=1))
    weights = next(name for name in files if name.endswith(CONFIG)).replace(CONFIG, WEIGHTS[0])
    save_file(tensors, folder / weights, metadata={"format": "pt"})
    return [*files, weights]


def twin_of(bundle: ModelBundle) -> tuple[WeightFamily, dict[str, Any]]:
    """The family of diffusers whose class computes the same, and its config.json.
    Raises ValueError if there is none, with the trait that the last of them lacks."""
    codes = bundle.network.get("bottleneck", {}).get("kind", "gaussian") != "gaussian"
    fault = ValueError(f"no class of diffusers is a twin of a network {bundle.kind}: take --as pt2 or onnx")
    for family in FAMILIES:
        if family.config is not None and bundle.kind == family.kind and ("VQ" in family.class_name) == codes:
            try:
                return family, family.config(whole_arguments(bundle), bundle.module)
            except ValueError as error:
                fault = error
    raise fault


def whole_arguments(bundle: ModelBundle) -> dict[str, Any]:
    """Arguments of the network's constructor, those at their defaults too."""
    parameters = inspect.signature(NETWORKS[bundle.kind]).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not each.empty} | bundle.network


def foreign_tensors(bundle: ModelBundle, family: WeightFamily, config: dict[str, Any]) -> dict[str, Tensor]:
    """The network's tensors by the names of the class. Raises ValueError if one has no place there."""
    import diffusers

    with torch.device("meta"):
        wanted = getattr(diffusers, family.class_name).from_config(config).state_dict()
    assert family.sizes is not None
    rules, own = family.rules(family.sizes(config)), dict(bundle.module.state_dict())
    if "VQ" in family.class_name:  # codes as they are looked up, of length 1 where latents are compared so
        codebook: Any = bundle.module
        indices = torch.arange(codebook.codebook_size)[None, None]
        own = {name: each for name, each in own.items() if not name.startswith("bottleneck.")}
        own["bottleneck.codebook"] = codebook.lookup(indices)[0, :, 0].T
    places = {foreign: new_name(foreign, rules) for foreign in wanted}
    names = {foreign: PART.sub("", place) for foreign, place in places.items()}
    parts = Counter(names.values())  # our name -> how many foreign tensors it is
    if other := sorted(parts.keys() ^ own.keys()):
        raise ValueError(f"{family.class_name} and the network differ in {other[0]}: take --as pt2 or onnx")
    found = {}
    for foreign, name in names.items():
        number = PART.search(places[foreign])
        piece = own[name].chunk(parts[name])[int(number.group()[1:]) if number else 0]
        found[foreign] = piece.reshape(wanted[foreign].shape).detach().cpu().contiguous().clone()
    return found


def network_inputs(objective: Objective, times: Tensor) -> tuple[Tensor, Tensor]:
    """The times (N,) float64 as the network sees them, and the factors (N,) of its x_t."""
    seen: dict[str, Tensor] = {}

    def network(x_t: Tensor, time: Tensor) -> Tensor:
        seen["time"] = time
        return x_t

    scale = objective.apply(network, torch.ones(len(times), 1, 1, 1, dtype=torch.float64), times)
    return seen["time"].double(), scale.flatten()


def scheduler_config(bundle: ModelBundle) -> dict[str, Any]:
    """The scheduler of a model of diffusion, with our betas; DDPM's for a learned variance, else DDIM's.
    Raises ValueError for another process, or another scale of the time."""
    objective = make_objective(bundle.settings["objective"])
    if not isinstance(objective, DiscreteObjective):
        raise ValueError(f"its process is {bundle.settings['objective']['kind']}, without steps: take --as pt2 or onnx")
    times = torch.arange(0, len(objective.schedule), EVERY_TENTH)
    seen, _ = network_inputs(objective, times)
    refuse_trait(not torch.equal(seen, times.double()), "its time is on another scale than its steps")
    learned, process = objective.variance == "learned_range", bundle.settings["objective"]
    own, scale = betas.SCHEDULES[process["schedule"]].ends or (), 1000 / len(objective.schedule)
    ends = zip(("beta_start", "beta_end"), own, strict=False)
    return {
        "_class_name": "DDPMScheduler" if learned else "DDIMScheduler",
        "num_train_timesteps": len(objective.schedule),
        "trained_betas": objective.schedule.betas.tolist(),
        "beta_schedule": {ours: theirs for theirs, ours in SCHEDULES.items()}[process["schedule"]],
        **{name: process.get(name) or scale * end for name, end in ends},
        "prediction_type": objective.prediction_type,
        "clip_sample": "latent_scale" not in bundle.settings,
        "timestep_spacing": "trailing",
        "steps_offset": 1,  # which trailing steps don't read, and newer pipelines ask for
        **({"variance_type": "learned_range"} if learned else {"set_alpha_to_one": True}),
    }


def sampling_steps(objective: Objective, num_inference_steps: int) -> list[dict[str, float]]:
    """The steps of sampling as numbers: time and factor of the network's x_t, levels, the clean image.
    For every process the image is linear in x_t and the output."""
    times, signal, sigma = objective.trajectory(num_inference_steps)
    one = torch.ones(len(times), 1, 1, 1, dtype=torch.float64)
    seen, scale = network_inputs(objective, times)
    columns = {"time": seen, "scale": scale, "signal": signal[:-1], "sigma": sigma[:-1]}
    columns |= {"next_signal": signal[1:], "next_sigma": sigma[1:]}
    columns["of_x_t"] = objective.predict_x_0(0 * one, x_t=one, time=times).flatten()
    columns["of_output"] = objective.predict_x_0(one, x_t=0 * one, time=times).flatten()
    return [{name: float(column[step]) for name, column in columns.items()} for step in range(len(times))]


def write_pipeline(bundle: ModelBundle, folder: Path) -> list[str]:
    """Writes a model of diffusion as a program with a pipeline.py; returns the names of the files.
    Raises ValueError, before it writes, if the program computes something else."""
    from components.weights import pipeline

    with quiet():
        (made,) = exported(bundle)
    objective, labels = make_objective(bundle.settings["objective"]), bundle.network.get("num_classes")
    steps = min(STEPS, bundle.settings["objective"].get("num_train_timesteps", STEPS))
    config = {
        "_class_name": pipeline.ProgramModel.__name__,
        "inputs": made.inputs,
        "steps": sampling_steps(objective, steps),
        "initial_scale": objective.trajectory(steps).initial_scale,
        "clip_sample": "latent_scale" not in bundle.settings,
        "null_label": labels if bundle.network.get("null_label", True) else None,
    }
    file, below = Path(pipeline.__file__), folder / "denoiser"
    index = {"_class_name": [file.stem, pipeline.ProgramPipeline.__name__]}
    index |= {below.name: [file.stem, pipeline.ProgramModel.__name__]}
    below.mkdir()
    torch.export.save(made.program, below / pipeline.PROGRAM)
    (below / CONFIG).write_text(json.dumps(config))
    (folder / PIPELINE).write_text(json.dumps(index, indent=1))
    for place in (folder, below):  # diffusers looks for the class of a part in its folder
        (place / file.name).write_text(file.read_text())
    return [PIPELINE, file.name, f"{below.name}/{pipeline.PROGRAM}"]


FORMS: dict[str, Callable[..., list[str]]] = {"pt2": write_programs, "onnx": write_programs, "diffusers": write_twin}


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
