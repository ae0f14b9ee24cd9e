"""Stable Diffusion 1 or 2 in one file: U-Net, first stage and text encoder under the names of CompVis.

Sizes are told by names and shapes, as those of the parts' config.json. What these don't tell is the version's: images
of 512² (768² where version 2 predicts v), 8 heads or heads of 64, 32 groups of each norm, the schedule, heads of 64 in
the text tower. That of version 2 is OpenCLIP's, without its last layer. The file has no tokenizer."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from components.models.bundle import ModelBundle
from components.runtime.storage.artifact import Artifact
from components.runtime.storage.scratch import scratch_folder
from components.runtime.storage.store import Store
from components.sampling.frozen_text import CONFIG, TOKENIZER, TOKENIZER_CONFIG, WEIGHTS
from components.weights.families import autoencoders, text_unets
from components.weights.families.unets import KL_F8, upwards
from components.weights.files import CaptionTokenizer, WeightsFile
from components.weights.importing import bundle_of, named, recognize
from components.weights.open_clip import clip_tensors
from components.weights.stable_diffusion import DEFAULTS, commit_parts, process_of

UNET, FIRST_STAGE = "model.diffusion_model.", "first_stage_model."
TOWERS = {  # version -> its prefix and last norm
    1: ("cond_stage_model.transformer.", "text_model.final_layer_norm.bias"),
    2: ("cond_stage_model.model.", "ln_final.bias"),
}
SIDE, HEADS, GROUPS, HEAD_SIZE = 64, 8, 32, 64
PADS = {1: "<|endoftext|>", 2: "!"}
SCHEDULER = DEFAULTS | {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
LAST = 999  # step of the schedule: x_t is noise


def version_of(weights: WeightsFile) -> int | None:
    """1 or 2 for the tensors of a whole Stable Diffusion, else None."""
    parts = (f"{UNET}input_blocks.0.0.weight", f"{FIRST_STAGE}quant_conv.weight")
    found = (version for version, (tower, norm) in TOWERS.items() if {*parts, tower + norm} <= weights.tensors.keys())
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
        for prefix in (UNET, FIRST_STAGE, TOWERS[version][0])
    )
    title, side, scheduler = f"Stable Diffusion {version}", SIDE, SCHEDULER
    try:
        sizes, whole = text_unets.sizes(unet_config(unet, version, side)), recognize(weights, None)
        base = bundle_of(weights, named(whole, sizes, {}, title))
        if version > 1 and not gives_noise_back(base):
            side, scheduler = SIDE * 3 // 2, SCHEDULER | {"prediction_type": "v_prediction"}
            base = base._replace(network=base.network | text_unets.sizes(unet_config(unet, version, side)))
        settings = {"role": "base", "resolution": side, "classes": [], "latent_scale": KL_F8}
        base.settings.update(settings, objective=process_of(scheduler))
        config = vae_config(first_stage, side)
        own, about = autoencoders.diffusers_sizes(config), autoencoders.settings(config)
        recognized = recognize(weights._replace(tensors=first_stage), None)
        autoencoder = bundle_of(weights, named(recognized, own, about, "its first stage"))
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
    depth = max(int(name.split(".")[2]) for name in tensors if name.startswith("transformer.resblocks."))
    left_out = (f"transformer.resblocks.{depth}.", "text_projection", "logit_scale")
    return clip_tensors({name: own for name, own in tensors.items() if not name.startswith(left_out)})


def unet_config(tensors: Mapping[str, Tensor], version: int, side: int) -> dict[str, Any]:
    """The config.json of a U-Net, without what has a default. Raises ValueError for one of inpainting."""
    levels: list[list[int]] = [[]]  # places of residual blocks
    for place in range(1, len({name.split(".")[1] for name in tensors if name.startswith("input_blocks.")})):
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
    kinds = [text_unets.KINDS[not each] for each in attends]
    widths = [len(tensors[f"input_blocks.{each[0]}.0.in_layers.2.weight"]) for each in levels]
    return {
        "sample_size": side,
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": widths,
        "layers_per_block": len(levels[0]),
        "down_block_types": kinds,
        "up_block_types": upwards(kinds),
        "cross_attention_dim": tensors["middle_block.1.transformer_blocks.0.attn2.to_k.weight"].shape[1],
        "attention_head_dim": HEADS if version == 1 else [width // HEAD_SIZE for width in widths],
        "norm_num_groups": GROUPS,
    }


def vae_config(tensors: Mapping[str, Tensor], side: int) -> dict[str, Any]:
    """The config.json of a first stage of latents of so many positions a side."""
    numbers = {
        tuple(name.split(".")[2:5:2]) for name in tensors if name.startswith("encoder.down.") and ".block." in name
    }
    levels = sorted({int(level) for level, _ in numbers})
    return {
        "sample_size": side << levels[-1],
        "in_channels": tensors["encoder.conv_in.weight"].shape[1],
        "out_channels": len(tensors["decoder.conv_out.weight"]),
        "block_out_channels": [len(tensors[f"encoder.down.{level}.block.0.conv1.weight"]) for level in levels],
        "layers_per_block": len({block for _, block in numbers}),
        "down_block_types": ["DownEncoderBlock2D" for _ in levels],
        "up_block_types": ["UpDecoderBlock2D" for _ in levels],
        "latent_channels": len(tensors["post_quant_conv.weight"]),
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
    inside = "text_model.encoder.layers."
    config = {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": words,
        "hidden_size": width,
        "intermediate_size": len(tensors[f"{inside}0.mlp.fc1.bias"]),
        "num_hidden_layers": len({name.split(".")[3] for name in tensors if name.startswith(inside)}),
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
