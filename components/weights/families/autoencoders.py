"""Autoencoders of taming-transformers, latent diffusion, LlamaGen and diffusers.

VQ-GAN, the first stages kl-* and vq-*, AutoencoderKL and VQModel are one network in three layouts. Blocks and attention
of a level stand in lists apart there, and in one list here, each attention after its block. Taming counts the decoder's
levels from the pixels, the others and ours from the features. The first stages of Stable Diffusion 3 and FLUX have no
convolutions around their bottleneck; MAR's KL-16 has attention in its encoder alone. LlamaGen (Sun et al., 2024)
compares codes by direction, and has attention at the last level alone."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from components.configuration.networks import AutoencoderNetworkConfig
from components.weights.renaming import (
    DIFFUSERS_BLOCKS,
    Arguments,
    Rules,
    WeightFamily,
    check_fixed,
    indices,
    norm_groups_of,
    refuse_trait,
    segments,
    whole_factor,
)

SCALE = "scaling_factor"  # diffusers' name of our latent_scale
FIXED = {"act_fn": "silu", "mid_block_add_attention": True}
UNSHIFTED = {"latents_mean": None, "latents_std": None}
OF_LEVELS = ("block_out_channels", "down_block_types", "up_block_types")
COLORS = 3
CONDITION = "cond_stage_model."  # the first stage of taming's condition images
PLACE = (
    r"^(encoder|decoder)\.(?:down|up|conv)(_blocks)?\.(\d+)\."
    r"(block|resnets|res|attn|attentions|downsample|upsample)(?:rs)?\.(?:(\d+)\.)?"
)
AROUND_CODES = segments(
    "quant_conv=project_in post_quant_conv=project_out quantize.embedding.weight=bottleneck.codebook"
)
OF_TAMING = segments("""
    mid.block_1=middle.0 mid.attn_1=middle.1
    mid.block_2=middle.2 nin_shortcut=skip
    q=qkv#0 k=qkv#1 v=qkv#2 proj_out=proj
    norm1=norm_1 norm2=norm_2 conv1=conv_1
    conv2=conv_2
""")


def places(network: Arguments) -> Rules:
    """Rules of (level, list, index) to our place: blocks, attention after each, then resampling."""
    last = len(network["channel_mult"]) - 1

    def place(found: re.Match[str]) -> str:
        side, from_features, level, kind, index = found[1], found[2], int(found[3]), found[4], int(found[5] or 0)
        upwards = side == "decoder"
        halvings = last - level if upwards and from_features else level
        own = network.get("decoder_attention_resolutions") if upwards else None
        attends = network["attention_resolutions"] if own is None else own
        step = 2 if network["resolution"] >> halvings in attends else 1
        blocks = network["num_res_blocks"] + upwards
        row = blocks * step if kind.endswith("sample") else index * step + kind.startswith("att")
        return f"{side}.levels.{last - halvings if upwards else halvings}.{row}."

    return [(PLACE, place)]


def seen_in_taming(tensors: Mapping[str, Tensor], network: Arguments) -> dict[str, Any]:
    """Arguments told by names and shapes: other channels than colors, attention of the decoder alone."""
    channels = tensors["encoder.conv_in.weight"].shape[1]
    encoder, decoder = (indices(tensors, rf"{side}\.(\d+)\.attn\.") for side in (r"encoder\.down", r"decoder\.up"))
    found: dict[str, Any] = {}
    if channels != network.get("image_channels", COLORS):
        found["image_channels"] = channels
    if channels not in (1, COLORS):
        found["reconstruction"] = "classes"
    if encoder != decoder:
        found["decoder_attention_resolutions"] = [network["resolution"] >> level for (level,) in sorted(decoder)]
    return found


def seen_in_llamagen(tensors: Mapping[str, Tensor], network: Arguments) -> dict[str, Any]:
    """Sizes told by names and shapes, all but the resolution."""
    sizes = sizes_of_levels(tensors, "conv_blocks", "res")
    codes = dict(zip(("codebook_size", "codebook_dim"), tensors["quantize.embedding.weight"].shape, strict=True))
    return sizes | {
        "attention_resolutions": [network["resolution"] >> len(sizes["channel_mult"]) - 1],
        "latent_channels": len(tensors["encoder.conv_out.weight"]),
        "bottleneck": {"kind": "vq", "l2_normalize": True, **codes},
    }


def first_stage_sizes(tensors: Mapping[str, Tensor], side: int) -> dict[str, Any]:
    """Arguments of an autoencoder of taming's names, kl-*, whose latents have `side` positions a side."""
    sizes = sizes_of_levels(tensors, "down", "block")
    return {"resolution": side << len(sizes["channel_mult"]) - 1, **sizes} | {
        "attention_resolutions": [],
        "latent_channels": len(tensors["post_quant_conv.weight"]),
        "bottleneck": {"kind": "gaussian"},
    }


def sizes_of_levels(tensors: Mapping[str, Tensor], levels: str, blocks: str) -> dict[str, Any]:
    """Channels, and blocks of each level, by the encoder's lists of these names."""
    numbers = indices(tensors, rf"encoder\.{levels}\.(\d+)\.{blocks}\.(\d+)\.")
    width, count = len(tensors["encoder.conv_in.weight"]), len({level for level, _ in numbers})
    first = (tensors[f"encoder.{levels}.{level}.{blocks}.0.conv1.weight"] for level in range(count))
    return {
        "channels": width,
        "channel_mult": [len(tensor) // width for tensor in first],
        "num_res_blocks": len({block for _, block in numbers}),
    }


def diffusers_sizes(config: Arguments) -> dict[str, Any]:
    """Arguments of `Autoencoder` by a config.json of AutoencoderKL or VQModel.
    Raises ValueError for a field that our network can't follow."""
    channels, projections = config["in_channels"], config.get("use_quant_conv", True)
    check_fixed(config, {"out_channels": channels, "use_post_quant_conv": projections})
    widths, downs, ups = lists = [config[name] for name in OF_LEVELS]
    if len({*map(len, lists)}) > 1:
        levels = ", ".join(str(len(own)) for own in lists)
        raise ValueError(f"config.json has {', '.join(OF_LEVELS)} of {levels} levels")
    codes = config.get("num_vq_embeddings")
    sides = [config["sample_size"] >> level for level in range(len(widths))]
    down, up = ([side for side, kind in zip(sides, own, strict=True) if "Attn" in kind] for own in (downs, ups[::-1]))
    bottleneck: dict[str, Any] = {"kind": "gaussian"}
    if codes is not None:
        dim = config.get("vq_embed_dim") or config["latent_channels"]
        bottleneck = {"kind": "vq", "codebook_size": codes, "codebook_dim": dim, "l2_normalize": False}
    own = {"image_channels": channels, "projections": projections, "latent_shift": config.get("shift_factor") or 0.0}
    own |= {"decoder_attention_resolutions": None if up == down else up[::-1]}
    young = AutoencoderNetworkConfig.before()
    return {
        "resolution": sides[0],
        "channels": widths[0],
        "channel_mult": [whole_factor(width, widths[0]) for width in widths],
        "num_res_blocks": config["layers_per_block"],
        "attention_resolutions": down,
        "latent_channels": config["latent_channels"],
        "bottleneck": bottleneck,
        "norm_groups": config["norm_num_groups"],
        **{name: value for name, value in own.items() if value != young[name]},
    }


def diffusers_config(network: Arguments, module: nn.Module) -> dict[str, Any]:
    """The config.json of `diffusers_sizes` for an autoencoder of ours.
    Raises ValueError, which names a trait, where there is none."""
    codes, outputs, mult = network["bottleneck"], network["reconstruction"], network["channel_mult"]
    projections, shift = network["projections"], network["latent_shift"]
    kind, gaussian = codes["kind"], codes["kind"] == "gaussian"
    refuse_trait(kind not in ("gaussian", "vq", "vq_ema"), f"its bottleneck is {kind}")
    refuse_trait(network["patch_shortcut"], "it has a patch_shortcut")
    refuse_trait(outputs not in ("l1", "mse", "classes"), f"its decoder gives the parameters of {outputs}")
    refuse_trait(mult[0] != 1, f"its first level has {mult[0]} times channels")
    bare = not gaussian and (shift or not projections)
    refuse_trait(bare, "its codes stand without projections, or are shifted")
    own = network["decoder_attention_resolutions"]
    down, up = (
        ["Attn" * (network["resolution"] >> level in sides) for level in range(len(mult))]
        for sides in (network["attention_resolutions"], network["attention_resolutions"] if own is None else own)
    )
    config = FIXED | {
        **dict.fromkeys(("in_channels", "out_channels"), network["image_channels"]),
        "sample_size": network["resolution"],
        "block_out_channels": [network["channels"] * factor for factor in mult],
        "layers_per_block": network["num_res_blocks"],
        "down_block_types": [f"{attention}DownEncoderBlock2D" for attention in down],
        "up_block_types": [f"{attention}UpDecoderBlock2D" for attention in reversed(up)],
        "latent_channels": network["latent_channels"],
        "norm_num_groups": norm_groups_of(module),
    }
    if gaussian:
        around = dict.fromkeys(("use_quant_conv", "use_post_quant_conv"), projections)
        return config | UNSHIFTED | around | {"shift_factor": shift or None}
    dim = codes.get("codebook_dim") or network["latent_channels"]
    return config | {"norm_type": "group", "num_vq_embeddings": codes["codebook_size"], "vq_embed_dim": dim}


def settings(config: Arguments) -> dict[str, Any]:
    own = {SCALE: config[SCALE]} if SCALE in config else {}
    return {"resolution": config["sample_size"], "member": "image", **own}


TAMING = WeightFamily(
    "autoencoder of taming-transformers or latent diffusion",
    kind="autoencoder",
    marks=("encoder.down.0.block.0.norm1.weight", "quant_conv.weight"),
    names=[*OF_TAMING, *AROUND_CODES],
    places=places,
    prefixes=("", "first_stage_model.", "stage1."),
    training_only=r"loss\.|model_ema\.|colorize$",
    seen=seen_in_taming,
)
LLAMAGEN = TAMING._replace(
    title="VQ of LlamaGen",
    marks=("encoder.conv_blocks.0.res.0.norm1.weight", "quantize.embedding.weight"),
    names=[*TAMING.names, *segments("mid=middle")],
    prefixes=("",),
    training_only=r"quantize\.codebook_used$",
    seen=seen_in_llamagen,
)
KL = WeightFamily(
    "AutoencoderKL of diffusers",
    kind="autoencoder",
    marks=("encoder.down_blocks.0.resnets.0.norm1.weight", "decoder.conv_norm_out.weight"),
    names=[*DIFFUSERS_BLOCKS, *AROUND_CODES],
    places=places,
    class_name="AutoencoderKL",
    fixed=FIXED | UNSHIFTED | {"norm_type": "group"},
    sizes=diffusers_sizes,
    settings=settings,
    config=diffusers_config,
)
VQ = KL._replace(title="VQModel of diffusers", class_name="VQModel", marks=(*KL.marks, "quantize.embedding.weight"))
