"""Stable Diffusion as a whole: from its folder of diffusers, or from one file, to a cascade, and back.

U-Net, first stage and text encoder go by their own families. Here stand the schedule, the scale of the latents, and the
places of the parts in a folder of `StableDiffusionPipeline` (Rombach et al., 2022).

In one file version 1 or 2 has the names of CompVis. Sizes are told by names and shapes. What these don't tell is the
version's: images of 512² (768² where version 2 predicts v), 8 heads or heads of 64, 32 groups of each norm, the
schedule, heads of 64 in the text tower. That of version 2 is OpenCLIP's, without its last layer. The file has no
tokenizer."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from components.configuration.diffusion import DiscreteProcess
from components.configuration.sampling import DiffusionSampling
from components.models.bundle import ModelBundle, save_bundle
from components.models.diffusion.objective import make_objective
from components.runtime.storage.artifact import Artifact
from components.runtime.storage.scratch import scratch_folder
from components.runtime.storage.store import Store, absolute, digest_of, list_url
from components.sampling.cascade import DESCRIPTION as CASCADE
from components.sampling.cascade import compose
from components.sampling.frozen_text import LENGTH, TOKENIZER, TOKENIZER_CONFIG, WEIGHTS, WORDS, load_frozen_text
from components.weights.families import unets
from components.weights.families.autoencoders import SCALE, first_stage_sizes
from components.weights.files import (
    CONFIG,
    PIPELINE,
    CaptionTokenizer,
    WeightsFile,
    fetch_encoder,
    license_of,
    read_config,
    read_weights,
)
from components.weights.importing import bundle_of, commit, facts_of, fit, named, recognize
from components.weights.open_clip import clip_tensors
from components.weights.renaming import Arguments, indices

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
UNET, FIRST_STAGE = "model.diffusion_model.", "first_stage_model."
TEXT_TOWERS = {  # version -> its prefix and last norm
    1: ("cond_stage_model.transformer.", "text_model.final_layer_norm.bias"),
    2: ("cond_stage_model.model.", "ln_final.bias"),
}
SIDE, HEADS, GROUPS, HEAD_SIZE = 64, 8, 32, 64
PADS = {1: "<|endoftext|>", 2: "!"}
PUBLISHED = DEFAULTS | {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
LAST = 999  # step of the schedule: x_t is noise


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
    settings |= {"resolution": unet.config.get("sample_size"), "latent_scale": vae.config.get(SCALE, unets.KL_F8)}
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


def version_of(weights: WeightsFile) -> int | None:
    """1 or 2 for the tensors of a whole Stable Diffusion, else None."""
    parts = (f"{UNET}input_blocks.0.0.weight", f"{FIRST_STAGE}quant_conv.weight")
    found = (
        version for version, (tower, norm) in TEXT_TOWERS.items() if {*parts, tower + norm} <= weights.tensors.keys()
    )
    return next(found, None)


def import_single_file(
    weights: WeightsFile, version: int, tokenizer: CaptionTokenizer | None, *, out: Store
) -> Artifact:
    """Commits the parts to `out` as a cascade, as `import_pipeline`.
    Raises ValueError, in one line, for tensors that don't fit, and for a tokenizer that is missing or another's."""
    if tokenizer is None:
        raise ValueError(f"{weights.uri} holds a Stable Diffusion without its tokenizer: give CLIP's, --tokenizer FILE")
    unet, first_stage, tower = (
        {name.removeprefix(prefix): own for name, own in weights.tensors.items() if name.startswith(prefix)}
        for prefix in (UNET, FIRST_STAGE, TEXT_TOWERS[version][0])
    )
    title, side, scheduler = f"Stable Diffusion {version}", SIDE, PUBLISHED
    try:
        sizes, whole = unets.sizes_by_text(unet_config(unet, version, side)), recognize(weights, None)
        base = bundle_of(weights, named(whole, sizes, {}, title))
        if version > 1 and not gives_noise_back(base):
            side, scheduler = SIDE * 3 // 2, PUBLISHED | {"prediction_type": "v_prediction"}
            base = base._replace(network=base.network | unets.sizes_by_text(unet_config(unet, version, side)))
        settings = {"role": "base", "resolution": side, "classes": [], "latent_scale": unets.KL_F8}
        base.settings.update(settings, objective=process_of(scheduler))
        recognized, own = recognize(weights._replace(tensors=first_stage), None), first_stage_sizes(first_stage, side)
        about = {"resolution": own["resolution"], "member": "image"}
        autoencoder = bundle_of(weights, named(recognized, own | {"norm_groups": GROUPS}, about, "its first stage"))
        tower = tower if version == 1 else of_openclip(tower)
    except KeyError as error:
        raise ValueError(f"{weights.uri}: a tensor of {title} is missing, {error.args[0]}") from None
    except ValueError as error:
        raise ValueError(f"{weights.uri}: {error}") from None
    with scratch_folder("single") as place:
        write_tower(place / "text_encoder", tower, tokenizer, version)
        bundles = {"base": base, "autoencoder": autoencoder}
        return commit_parts(place, bundles, scheduler, {"file": weights.sha256}, weights.origin(title), out=out)


@torch.no_grad()
def gives_noise_back(unet: ModelBundle) -> bool:
    """True for a U-Net that predicts noise: at the last step that is its input, and v nearly the image.
    No name or shape says which of the two a version 2 was trained for."""
    channels, width = unet.network["in_channels"], unet.network["text_states_dim"]
    noise = torch.randn(1, channels, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    made = unet.module(noise, torch.tensor([LAST]), text_states=torch.zeros(1, 1, width))
    return bool(F.cosine_similarity(made.flatten(), noise.flatten(), dim=0) > 0.5)


def of_openclip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenCLIP's text tower by the names of transformers, without its last layer and projection."""
    (last,) = max(indices(tensors, r"transformer\.resblocks\.(\d+)\."))
    left_out = (f"transformer.resblocks.{last}.", "text_projection", "logit_scale")
    return clip_tensors({name: own for name, own in tensors.items() if not name.startswith(left_out)})


def unet_config(tensors: Mapping[str, Tensor], version: int, side: int) -> dict[str, Any]:
    """The config.json of a U-Net, without what has a default. Raises ValueError for one of inpainting."""
    levels: list[list[int]] = [[]]  # places of residual blocks
    for place in range(1, len(indices(tensors, r"input_blocks\.(\d+)\."))):
        if f"input_blocks.{place}.0.op.weight" in tensors:
            levels.append([])
        else:
            levels[-1].append(place)
    channels, gives = tensors["input_blocks.0.0.weight"].shape[1], len(tensors["out.2.weight"])
    if channels != gives:
        raise ValueError(
            f"a U-Net takes {channels} channels and gives {gives}: ours take no mask or image beside latents"
        )
    attends = [f"input_blocks.{blocks[0]}.1.norm.weight" in tensors for blocks in levels]
    kinds = [unets.KINDS_BY_TEXT[not each] for each in attends]
    widths = [len(tensors[f"input_blocks.{each[0]}.0.in_layers.2.weight"]) for each in levels]
    return {
        "sample_size": side,
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": widths,
        "layers_per_block": len(levels[0]),
        "down_block_types": kinds,
        "up_block_types": unets.upwards(kinds),
        "cross_attention_dim": tensors["middle_block.1.transformer_blocks.0.attn2.to_k.weight"].shape[1],
        "attention_head_dim": HEADS if version == 1 else [width // HEAD_SIZE for width in widths],
        "norm_num_groups": GROUPS,
    }


def write_tower(folder: Path, tensors: Mapping[str, Tensor], tokenizer: CaptionTokenizer, version: int) -> None:
    """Writes CLIP's text tower and its tokenizer as transformers does.
    Raises ValueError for a tokenizer of another vocabulary."""
    words, width = tensors["text_model.embeddings.token_embedding.weight"].shape
    places = len(tensors["text_model.embeddings.position_embedding.weight"])
    pad, end = map(tokenizer.bpe.token_to_id, (PADS[version], PADS[1]))
    if pad is None or end is None or max(tokenizer.bpe.get_vocab().values()) >= words:
        raise ValueError(f"{tokenizer.uri} is not the tokenizer of this text encoder of {words} words")
    layers = r"text_model\.encoder\.layers\.(\d+)\."
    config = {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": words,
        "hidden_size": width,
        "intermediate_size": len(tensors["text_model.encoder.layers.0.mlp.fc1.bias"]),
        "num_hidden_layers": len(indices(tensors, layers)),
        "num_attention_heads": width // HEAD_SIZE,
        "max_position_embeddings": places,
        "hidden_act": "quick_gelu" if version == 1 else "gelu",
        **dict.fromkeys(("bos_token_id", "eos_token_id"), end),
        "pad_token_id": pad,
    }
    stated = {"pad_token": PADS[version], "tokenizer_class": "CLIPTokenizer", "model_max_length": places}
    folder.mkdir()
    kept = {name: own.float().contiguous() for name, own in tensors.items() if not name.endswith("position_ids")}
    save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / TOKENIZER).write_text(tokenizer.bpe.to_str())
    (folder / CONFIG).write_text(json.dumps(config))
    (folder / TOKENIZER_CONFIG).write_text(json.dumps(stated))


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
    files, tower = Store(str(made)), encoder.get("model_type")
    unet, scheduler, vae = (
        read_config(files, name) if files.exists(name) else {}
        for name in (f"base/unet/{CONFIG}", f"base/{SCHEDULER}", f"autoencoder/{CONFIG}")
    )
    first_stage = vae.get("_class_name") == "AutoencoderKL" and not vae["shift_factor"]
    states = reading.get("pads") == "attended" and not reading.get("skipped_layers")
    traits = {
        "its base is no UNet2DConditionModel": unet.get("_class_name") != "UNet2DConditionModel",
        "its base takes a label": unet.get("num_class_embeds") is not None,
        "its variance is learned": scheduler.get("_class_name") != "DDIMScheduler",
        "its first stage is no AutoencoderKL, or shifts latents": not first_stage,
        f"its text encoder is {tower}, not the text's tower of CLIP alone, or T5": tower not in TOWERS,
        "pads are hidden from its base, or layers of its text encoder are left out": not states,
    }
    return next((trait for trait, present in traits.items() if present), None)
