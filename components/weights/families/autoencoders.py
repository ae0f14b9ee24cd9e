"""Autoencoders of taming-transformers, latent diffusion and diffusers.

VQ-GAN, the first stages kl-* and vq-*, AutoencoderKL and VQModel are one network in two layouts. Blocks and attention
of a level stand in lists apart there, and in one list here, each attention after its block. Taming counts the decoder's
levels from the pixels, diffusers and ours from the features."""

import re
from collections.abc import Callable
from typing import Any

from torch import nn

from components.weights.renaming import (
    Arguments,
    Rules,
    WeightFamily,
    check_fixed,
    norm_groups_of,
    refuse_trait,
    whole_factor,
)

DIFFUSERS = {"act_fn": "silu", "norm_type": "group", "mid_block_add_attention": True, "in_channels": 3}
DIFFUSERS |= {"out_channels": 3, "use_quant_conv": True, "use_post_quant_conv": True}


def place_of(network: Arguments, *, decoder: bool, from_pixels: bool) -> Callable[[re.Match[str]], str]:
    """Replacement of (level, list, index) by our place: blocks, attention after each, then resampling.

    Args:
        from_pixels: whether the layout counts the levels of a decoder from the pixels.
    """
    last, blocks = len(network["channel_mult"]) - 1, network["num_res_blocks"] + decoder

    def place(found: re.Match[str]) -> str:
        level, kind, index = int(found[1]), found[2], int(found[3] or 0)
        level = last - level if decoder and from_pixels else level
        size = network["resolution"] >> (last - level if decoder else level)
        step = 2 if size in network["attention_resolutions"] else 1
        if "sample" in kind:
            return f"{'decoder' if decoder else 'encoder'}.levels.{level}.{blocks * step}."
        return f"{'decoder' if decoder else 'encoder'}.levels.{level}.{index * step + kind.startswith('att')}."

    return place


def taming_rules(network: Arguments) -> Rules:
    """Names of taming-transformers, latent diffusion and minDALL-E."""
    lists = r"(block|attn|downsample|upsample)\.(?:(\d+)\.)?"
    return [
        (rf"^encoder\.down\.(\d+)\.{lists}", place_of(network, decoder=False, from_pixels=True)),
        (rf"^decoder\.up\.(\d+)\.{lists}", place_of(network, decoder=True, from_pixels=True)),
        (r"\.mid\.block_1\.", ".middle.0."),
        (r"\.mid\.attn_1\.", ".middle.1."),
        (r"\.mid\.block_2\.", ".middle.2."),
        (r"\.nin_shortcut\.", ".skip."),
        (r"\.q\.", ".qkv#0."),
        (r"\.k\.", ".qkv#1."),
        (r"\.v\.", ".qkv#2."),
        (r"\.proj_out\.", ".proj."),
        *SHARED,
    ]


def diffusers_rules(network: Arguments) -> Rules:
    """Names of diffusers, those of attention before version 0.18 too."""
    lists = r"(resnets|attentions|downsamplers|upsamplers)\.(\d+)\."
    return [
        (rf"^encoder\.down_blocks\.(\d+)\.{lists}", place_of(network, decoder=False, from_pixels=False)),
        (rf"^decoder\.up_blocks\.(\d+)\.{lists}", place_of(network, decoder=True, from_pixels=False)),
        (r"\.mid_block\.resnets\.(\d)\.", lambda found: f".middle.{2 * int(found[1])}."),
        (r"\.mid_block\.attentions\.0\.", ".middle.1."),
        (r"\.conv_norm_out\.", ".norm_out."),
        (r"\.conv_shortcut\.", ".skip."),
        (r"\.group_norm\.", ".norm."),
        (r"\.(to_q|query)\.", ".qkv#0."),
        (r"\.(to_k|key)\.", ".qkv#1."),
        (r"\.(to_v|value)\.", ".qkv#2."),
        (r"\.(to_out\.0|proj_attn)\.", ".proj."),
        *SHARED,
    ]


SHARED: Rules = [
    (r"\.(norm|conv)([12])\.", r".\1_\2."),
    (r"^quant_conv\.", "project_in."),
    (r"^post_quant_conv\.", "project_out."),
    (r"^quantize\.embedding\.weight$", "bottleneck.codebook"),
]


def diffusers_sizes(config: Arguments) -> dict[str, Any]:
    """Arguments of `Autoencoder` by a config.json of AutoencoderKL or VQModel.
    Raises ValueError for a field that our network can't follow."""
    check_fixed(config, DIFFUSERS)
    widths, side, codes = config["block_out_channels"], config["sample_size"], config.get("num_vq_embeddings")
    attends = [kind.startswith("Attn") for kind in config["down_block_types"]]
    bottleneck: dict[str, Any] = {"kind": "gaussian"}
    if codes is not None:
        dim = config.get("vq_embed_dim") or config["latent_channels"]
        bottleneck = {"kind": "vq", "codebook_size": codes, "codebook_dim": dim, "l2_normalize": False}
    return {
        "resolution": side,
        "channels": widths[0],
        "channel_mult": [whole_factor(width, widths[0]) for width in widths],
        "num_res_blocks": config["layers_per_block"],
        "attention_resolutions": [side >> level for level, attention in enumerate(attends) if attention],
        "latent_channels": config["latent_channels"],
        "bottleneck": bottleneck,
        "norm_groups": config["norm_num_groups"],
    }


def diffusers_config(network: Arguments, module: nn.Module) -> dict[str, Any]:
    """The config.json of `diffusers_sizes` for an autoencoder of ours.
    Raises ValueError, which names a trait, where there is none."""
    codes, side, outputs = dict(network["bottleneck"]), network["resolution"], network.get("reconstruction", "l1")
    kind, latents = codes["kind"], network["latent_channels"]
    refuse_trait(
        kind not in ("gaussian", "vq", "vq_ema"),
        f"its bottleneck is {kind}",
    )
    refuse_trait(
        network.get("patch_shortcut"),
        "it has a patch_shortcut",
    )
    refuse_trait(
        outputs not in ("l1", "mse"),
        f"its decoder gives the parameters of {outputs}",
    )
    refuse_trait(
        network["channel_mult"][0] != 1,
        f"its first level has {network['channel_mult'][0]} times channels",
    )
    attends = [side >> level in network["attention_resolutions"] for level in range(len(network["channel_mult"]))]
    config = DIFFUSERS | {
        "sample_size": side,
        "block_out_channels": [network["channels"] * mult for mult in network["channel_mult"]],
        "layers_per_block": network["num_res_blocks"],
        "down_block_types": [f"{'Attn' * each}DownEncoderBlock2D" for each in attends],
        "up_block_types": [f"{'Attn' * each}UpDecoderBlock2D" for each in reversed(attends)],
        "latent_channels": latents,
        "norm_num_groups": norm_groups_of(module),
    }
    unknown = ("norm_type",) if kind == "gaussian" else ("use_quant_conv", "use_post_quant_conv")  # to the class
    config = {name: value for name, value in config.items() if name not in unknown}
    if kind == "gaussian":
        return config
    return config | {"num_vq_embeddings": codes["codebook_size"], "vq_embed_dim": codes.get("codebook_dim") or latents}


def settings(config: Arguments) -> dict[str, Any]:
    return {"resolution": config["sample_size"], "member": "image"}


TAMING = WeightFamily(
    "autoencoder of taming-transformers or latent diffusion",
    kinds=("autoencoder",),
    marks=("encoder.down.0.block.0.norm1.weight", "quant_conv.weight"),
    rules=taming_rules,
    prefixes=("", "first_stage_model.", "stage1."),
    training_only=r"loss\.|model_ema\.",
)
KL, VQ = (
    WeightFamily(
        f"{name} of diffusers",
        kinds=("autoencoder",),
        marks=("encoder.down_blocks.0.resnets.0.norm1.weight", "quant_conv.weight", *marks),
        rules=diffusers_rules,
        class_name=name,
        sizes=diffusers_sizes,
        settings=settings,
        config=diffusers_config,
    )
    for name, marks in (("AutoencoderKL", ()), ("VQModel", ("quantize.embedding.weight",)))
)
