"""Stable Diffusion 1 in one file: U-Net, first stage and text encoder under the names of CompVis.

Sizes are told by names and shapes, as those of the parts' config.json. What these don't tell is version 1's: images of
512², 8 heads, 32 groups of each norm, the schedule, heads of 64 in CLIP's tower. The file has no tokenizer."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from components.runtime.storage.artifact import Artifact
from components.runtime.storage.store import SCRATCH, Store
from components.sampling.frozen_text import CONFIG, TOKENIZER, TOKENIZER_CONFIG, WEIGHTS
from components.weights.families import autoencoders, text_unets
from components.weights.families.unets import KL_F8, upwards
from components.weights.files import CaptionTokenizer, WeightsFile
from components.weights.importing import bundle_of, named, recognize
from components.weights.stable_diffusion import DEFAULTS, commit_parts, process_of

UNET, FIRST_STAGE, TOWER = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
MARKS = (
    f"{UNET}input_blocks.0.0.weight",
    f"{FIRST_STAGE}quant_conv.weight",
    f"{TOWER}text_model.final_layer_norm.bias",
)
SIDE, HEADS, GROUPS, HEAD_OF_CLIP, PAD = 64, 8, 32, 64, "<|endoftext|>"
SCHEDULER = DEFAULTS | {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}


def is_single_file(weights: WeightsFile) -> bool:
    """True for the tensors of a whole Stable Diffusion 1."""
    return all(mark in weights.tensors for mark in MARKS)


def import_single_file(weights: WeightsFile, tokenizer: CaptionTokenizer | None, *, out: Store) -> Artifact:
    """Commits the parts to `out` as a cascade, as `import_pipeline`.
    Raises ValueError, in one line, for tensors that don't fit, and for a tokenizer that is missing or another's."""
    if tokenizer is None:
        raise ValueError(f"{weights.uri} holds a Stable Diffusion without its tokenizer: give CLIP's, --tokenizer FILE")
    parts = {
        prefix: {name.removeprefix(prefix): own for name, own in weights.tensors.items() if name.startswith(prefix)}
        for prefix in (UNET, FIRST_STAGE, TOWER)
    }
    settings = {"role": "base", "resolution": SIDE, "classes": []}
    settings |= {"objective": process_of(SCHEDULER), "latent_scale": KL_F8}
    base, autoencoder = text_unets.sizes(unet_config(parts[UNET])), vae_config(parts[FIRST_STAGE])
    first_stage = weights._replace(tensors=parts[FIRST_STAGE])
    try:
        fitting = {
            "base": named(recognize(weights, None), base, settings, "Stable Diffusion 1"),
            "autoencoder": named(
                recognize(first_stage, None),
                autoencoders.diffusers_sizes(autoencoder),
                autoencoders.settings(autoencoder),
                "its first stage",
            ),
        }
    except ValueError as error:
        raise ValueError(f"{weights.uri}: {error}") from None
    with tempfile.TemporaryDirectory(prefix=f"{SCRATCH}single-") as place:
        write_tower(Path(place) / "text_encoder", parts[TOWER], tokenizer)
        bundles = {name: bundle_of(weights, each) for name, each in fitting.items()}
        origin = {"uri": weights.uri, "family": "Stable Diffusion 1", "sha256": weights.sha256}
        return commit_parts(Path(place), bundles, SCHEDULER, {"file": weights.sha256}, origin, out=out)


def unet_config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
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
    return {
        "sample_size": SIDE,
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": [len(tensors[f"input_blocks.{each[0]}.0.in_layers.2.weight"]) for each in levels],
        "layers_per_block": len(levels[0]),
        "down_block_types": kinds,
        "up_block_types": upwards(kinds),
        "cross_attention_dim": tensors["middle_block.1.transformer_blocks.0.attn2.to_k.weight"].shape[1],
        "attention_head_dim": HEADS,
        "norm_num_groups": GROUPS,
    }


def vae_config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The config.json of a first stage."""
    numbers = {
        tuple(name.split(".")[2:5:2]) for name in tensors if name.startswith("encoder.down.") and ".block." in name
    }
    levels = sorted({int(level) for level, _ in numbers})
    return {
        "sample_size": SIDE << levels[-1],
        "in_channels": tensors["encoder.conv_in.weight"].shape[1],
        "out_channels": len(tensors["decoder.conv_out.weight"]),
        "block_out_channels": [len(tensors[f"encoder.down.{level}.block.0.conv1.weight"]) for level in levels],
        "layers_per_block": len({block for _, block in numbers}),
        "down_block_types": ["DownEncoderBlock2D" for _ in levels],
        "up_block_types": ["UpDecoderBlock2D" for _ in levels],
        "latent_channels": len(tensors["post_quant_conv.weight"]),
        "norm_num_groups": GROUPS,
    }


def write_tower(folder: Path, tensors: Mapping[str, Tensor], tokenizer: CaptionTokenizer) -> None:
    """Writes CLIP's text tower and its tokenizer as transformers does.
    Raises ValueError for a tokenizer of another vocabulary."""
    words, width = tensors["text_model.embeddings.token_embedding.weight"].shape
    places = len(tensors["text_model.embeddings.position_embedding.weight"])
    pad = tokenizer.bpe.token_to_id(PAD)
    if pad is None or max(tokenizer.bpe.get_vocab().values()) >= words:
        raise ValueError(f"{tokenizer.uri} is not the tokenizer of this text encoder of {words} words")
    inside = "text_model.encoder.layers."
    config = {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": words,
        "hidden_size": width,
        "intermediate_size": len(tensors[f"{inside}0.mlp.fc1.bias"]),
        "num_hidden_layers": len({name.split(".")[3] for name in tensors if name.startswith(inside)}),
        "num_attention_heads": width // HEAD_OF_CLIP,
        "max_position_embeddings": places,
        "hidden_act": "quick_gelu",
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), pad),
    }
    stated = {"pad_token": PAD, "tokenizer_class": "CLIPTokenizer", "model_max_length": places}
    folder.mkdir()
    kept = {name: own.float().contiguous() for name, own in tensors.items() if not name.endswith("position_ids")}
    save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / TOKENIZER).write_text(tokenizer.bpe.to_str())
    (folder / CONFIG).write_text(json.dumps(config))
    (folder / TOKENIZER_CONFIG).write_text(json.dumps(stated))
