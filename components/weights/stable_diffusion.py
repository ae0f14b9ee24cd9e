"""Stable Diffusion as a whole: from its folder of diffusers to a cascade, and back.

U-Net, first stage and text encoder go by their own families. Here stand the schedule, the scale of the latents, and the
places of the parts in a folder of `StableDiffusionPipeline` (Rombach et al., 2022)."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from components.configuration.processes import DiscreteProcess
from components.configuration.sampling import DiffusionSampling
from components.models.bundle import ModelBundle, save_bundle
from components.models.diffusion.objective import make_objective
from components.runtime.storage.artifact import Artifact
from components.runtime.storage.scratch import scratch_folder
from components.runtime.storage.store import Store, absolute, digest_of, list_url
from components.sampling.cascade import DESCRIPTION as CASCADE
from components.sampling.cascade import compose
from components.sampling.frozen_text import LENGTH, TOKENIZER, TOKENIZER_CONFIG, WORDS, load_frozen_text
from components.weights.families.autoencoders import SCALE
from components.weights.families.unets import KL_F8
from components.weights.files import CONFIG, PIPELINE, fetch_encoder, license_of, read_config, read_weights
from components.weights.importing import bundle_of, commit, facts_of, fit
from components.weights.renaming import Arguments

NAME, SCHEDULER = "StableDiffusionPipeline", "scheduler/scheduler_config.json"
DEFAULTS = {  # of diffusers' schedulers
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 2e-2,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "rescale_betas_zero_snr": False,
    "trained_betas": None,
    "thresholding": False,
}
SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}  # theirs -> ours
GUIDANCE, CLIP_LENGTH = 7.5, 77  # of the pipeline and its tokenizer, where nothing else is said
INDEX = {
    "_class_name": NAME,
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "scheduler": ("diffusers", "DDIMScheduler"),
    **dict.fromkeys(("safety_checker", "feature_extractor"), (None, None)),
    "requires_safety_checker": False,
}
TOWERS = {  # model_type of a text encoder -> its class, and its tokenizer's where nothing else is said
    "clip_text_model": ("CLIPTextModel", "CLIPTokenizer"),
    "t5": ("T5EncoderModel", "T5Tokenizer"),
}
MOVED = {"base/unet": "unet", "base/scheduler": "scheduler", "autoencoder": "vae"}  # our place -> theirs


def is_pipeline(uri: str) -> bool:
    """True for a folder with the whole of a Stable Diffusion."""
    names = {info.path for info in list_url(absolute(uri))}
    return PIPELINE in names and read_config(Store(absolute(uri)), PIPELINE).get("_class_name") == NAME


def import_pipeline(uri: str, *, out: Store) -> Artifact:
    """Commits the parts to `out` as a cascade that samples as the pipeline does.
    Raises ValueError, in one line, for parts that are missing, do not fit ours or each other, and for an `out` that
    holds another model; StoreError if storage can't be reached."""
    uri = absolute(uri).rstrip("/")
    scheduler, stated = DEFAULTS | read_config(Store(uri), SCHEDULER), license_of(Store(uri))
    settings = {"role": "base", "classes": [], "objective": process_of(scheduler)}
    unet, vae = (
        file._replace(license=stated or file.license)
        for file in (read_weights(f"{uri}/unet"), read_weights(f"{uri}/vae"))
    )
    settings |= {"resolution": unet.config.get("sample_size"), "latent_scale": vae.config.get(SCALE, KL_F8)}
    files = {"base": unet._replace(settings=settings), "autoencoder": vae}
    bundles = {name: bundle_of(file, fit(file, None)) for name, file in files.items()}
    with scratch_folder("pipeline") as place:
        fetch_encoder(f"{uri}/text_encoder", place / "text_encoder")
        identity = {"unet": unet.sha256, "vae": vae.sha256}
        origin = unet._replace(uri=uri).origin(f"{NAME} of diffusers")
        return commit_parts(place, bundles, scheduler, identity, origin, out=out)


def commit_parts(
    home: Path,
    bundles: Mapping[str, ModelBundle],
    scheduler: Arguments,
    content: Mapping[str, str],
    origin: dict[str, str],
    *,
    out: Store,
) -> Artifact:
    """Commits base and autoencoder, with the text encoder in `home`, to `out` as a cascade.
    `content`: sha256 of the files, for the key. Raises ValueError where text encoder and base don't fit."""
    text = home / "text_encoder"
    stated = read_config(Store(str(text)), TOKENIZER_CONFIG) if (text / TOKENIZER_CONFIG).is_file() else {}
    length = stated.get("model_max_length", CLIP_LENGTH)
    (text / LENGTH).write_text(json.dumps({"length": length, "pads": "attended"}))
    width, taken = load_frozen_text(text).states_shape[1], bundles["base"].network["text_states_dim"]
    if width != taken:
        raise ValueError(f"{origin['uri']}: its text encoder has {width} features a token, its U-Net takes {taken}")
    files = {path.name: digest_of(path).sha256 for path in sorted(text.iterdir())}
    models = {name: facts_of(bundle) for name, bundle in bundles.items()}
    identity = {"parts": {**content, **files}, "models": models, "scheduler": scheduler}

    def fill(folder: Path) -> None:
        for name, bundle in bundles.items():
            save_bundle(home / name, bundle)
        own = {"base": sampling_of(scheduler).model_dump(mode="json")}
        places: dict[str, Any] = {name: home / name for name in bundles}
        compose(folder, sampling=own, text_encoder=text, **places)

    return commit(out, identity, {"origin": origin}, fill)


def process_of(scheduler: Arguments) -> dict[str, Any]:
    """The objective of a scheduler_config.json. Raises ValueError for a field that ours can't follow."""
    if scheduler["thresholding"]:
        raise ValueError("scheduler_config.json has thresholding: ours cuts no latents")
    name, given = scheduler["beta_schedule"], scheduler["trained_betas"]
    no_signal = scheduler["rescale_betas_zero_snr"] or (bool(given) and given[-1] == 1)
    if name not in SCHEDULES:
        raise ValueError(f"scheduler_config.json has beta_schedule {name!r}: ours are {', '.join(SCHEDULES)}")
    if no_signal and scheduler["timestep_spacing"] == "leading":
        raise ValueError("scheduler_config.json leaves no signal, and its timestep_spacing leading skips that step")
    ends = () if name == "squaredcos_cap_v2" else ("beta_start", "beta_end")
    values = {field: scheduler[field] for field in ("num_train_timesteps", "prediction_type", *ends)}
    values["zero_terminal_snr"] = no_signal
    objective = DiscreteProcess.of(schedule=SCHEDULES[name], min_snr_gamma=None, **values).objective()
    if given is not None:  # as of our own exports, exact but for the last bits of another machine
        process: Any = make_objective(objective)
        betas = process.schedule.betas
        if len(given) != len(betas) or not np.allclose(given, betas, rtol=1e-9, atol=0):
            raise ValueError(f"scheduler_config.json has trained_betas that are not of its beta_schedule {name}")
    return objective


def sampling_of(scheduler: Arguments) -> DiffusionSampling:
    """The pipeline's own 50 steps of DDIM, spaced as the scheduler has them."""
    spacing = scheduler["timestep_spacing"]
    from_1 = spacing == "leading" and scheduler["steps_offset"] == 1
    return DiffusionSampling(spacing="leading_from_1" if from_1 else spacing, threshold="none", guidance_scale=GUIDANCE)


def join_pipeline(folder: Path, made: Path) -> str | None:
    """Moves the exported parts of the cascade in `folder` to their places in a pipeline.
    Returns a line about it, or why nothing is moved; None for a cascade of other parts."""
    parts = {path.name for path in folder.iterdir() if path.is_dir()}
    if parts != {"base", "autoencoder", "text_encoder"} or not (folder / "text_encoder" / LENGTH).is_file():
        return None
    if trait := lacking_trait(folder / "text_encoder", made):
        return f"no {NAME}: {trait}"
    text, tokenizer, files = made / "text_encoder", made / "tokenizer", Store(str(made))
    tokenizer.mkdir()
    for name in (TOKENIZER, *WORDS, TOKENIZER_CONFIG):
        if (text / name).is_file():
            shutil.move(text / name, tokenizer / name)
    own = f"tokenizer/{TOKENIZER_CONFIG}"
    stated = read_config(files, own) if files.exists(own) else {}
    stated["model_max_length"] = read_config(files, f"text_encoder/{LENGTH}")["length"]
    (tokenizer / TOKENIZER_CONFIG).write_text(json.dumps(stated))
    (text / LENGTH).unlink()
    for place, theirs in MOVED.items():
        shutil.move(made / place, made / theirs)
    (made / "base").rmdir()
    (made / CASCADE).unlink()
    encoder, words = TOWERS[read_config(files, f"text_encoder/{CONFIG}")["model_type"]]
    towers = {"text_encoder": encoder, "tokenizer": stated.get("tokenizer_class", words)}
    index = INDEX | {part: ("transformers", name) for part, name in towers.items()}
    (made / PIPELINE).write_text(json.dumps(index, indent=1))
    return f"a whole {NAME}"


def lacking_trait(text: Path, made: Path) -> str | None:
    """The first trait of exported parts that the pipeline lacks; None where it computes the same."""
    encoder, reading = (read_config(Store(str(text)), name) for name in (CONFIG, LENGTH))
    files = Store(str(made))
    unet, vae = (
        read_config(files, name) if files.exists(name) else {"_class_name": None}
        for name in (f"base/unet/{CONFIG}", f"autoencoder/{CONFIG}")
    )
    if unet["_class_name"] != "UNet2DConditionModel":
        return "its base is no UNet2DConditionModel"
    if unet["num_class_embeds"] is not None:
        return "its base takes a label"
    if read_config(files, f"base/{SCHEDULER}")["_class_name"] != "DDIMScheduler":
        return "its variance is learned"
    if vae["_class_name"] != "AutoencoderKL" or vae["shift_factor"]:
        return "its first stage is no AutoencoderKL, or shifts latents"
    if encoder.get("model_type") not in TOWERS:
        return f"its text encoder is {encoder.get('model_type')}, not the text's tower of CLIP alone, or T5"
    if reading.get("pads", "hidden") != "attended" or reading.get("skipped_layers"):
        return "pads are hidden from its base, or layers of its text encoder are left out"
    return None
