"""Autoencoders of taming-transformers, latent diffusion and diffusers.

VQ-GAN, the first stages kl-* and vq-*, AutoencoderKL and VQModel are one network in two layouts. Blocks and attention
of a level stand in lists apart there, and in one list here, each attention after its block. Taming counts the decoder's
levels from the pixels, diffusers and ours from the features. The first stages of Stable Diffusion 3 and FLUX have no
convolutions around their bottleneck; MAR's KL-16 has attention in its encoder alone."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from components.configuration.networks import AutoencoderNetworkConfig
from components.weights.renaming import (
    Arguments,
    Rules,
    WeightFamily,
    check_fixed,
    norm_groups_of,
    refuse_trait,
    whole_factor,
)

DIFFUSERS = {"act_fn": "silu", "norm_type": "group", "mid_block_add_attention": True}
DIFFUSERS |= {"latents_mean": None, "latents_std": None}
COLORS = 3


def place_of(network: Arguments, *, decoder: bool, from_pixels: bool) -> Callable[[re.Match[str]], str]:
    """Replacement of (level, list, index) by our place: blocks, attention after each, then resampling.

    Args:
        from_pixels: whether the layout counts the levels of a decoder from the pixels.
    """
    last, blocks = len(network["channel_mult"]) - 1, network["num_res_blocks"] + decoder
    own = network.get("decoder_attention_resolutions") if decoder else None
    attends = network["attention_resolutions"] if own is None else own

    def place(found: re.Match[str]) -> str:
        level, kind, index = int(found[1]), found[2], int(found[3] or 0)
        level = last - level if decoder and from_pixels else level
        size = network["resolution"] >> (last - level if decoder else level)
        step = 2 if size in attends else 1
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


def seen_in_taming(tensors: Mapping[str, Tensor], network: Arguments) -> dict[str, Any]:
    """Arguments told by names and shapes: other channels than colors, attention of the decoder alone."""
    channels = tensors["encoder.conv_in.weight"].shape[1]
    places = (re.match(r"(encoder)\.down\.(\d+)\.attn\.|(decoder)\.up\.(\d+)\.attn\.", name) for name in tensors)
    levels: dict[str, set[int]] = {"encoder": set(), "decoder": set()}
    for place in filter(None, places):
        levels[place[1] or place[3]].add(int(place[2] or place[4]))
    found: dict[str, Any] = {} if channels == COLORS else {"image_channels": channels}
    if levels["encoder"] != levels["decoder"]:
        own = [network["resolution"] >> level for level in sorted(levels["decoder"])]
        found["decoder_attention_resolutions"] = own
    return found


def diffusers_sizes(config: Arguments) -> dict[str, Any]:
    """Arguments of `Autoencoder` by a config.json of AutoencoderKL or VQModel.
    Raises ValueError for a field that our network can't follow."""
    check_fixed(config, DIFFUSERS)
    channels, projections = config["in_channels"], config.get("use_quant_conv", True)
    check_fixed(config, {"out_channels": channels, "use_post_quant_conv": projections})
    own = {"projections": projections, "latent_shift": config.get("shift_factor") or 0.0}
    young = AutoencoderNetworkConfig.before() | {"image_channels": COLORS}
    own |= {"image_channels": channels, "decoder_attention_resolutions": None}
    widths, side, codes = config["block_out_channels"], config["sample_size"], config.get("num_vq_embeddings")
    attends = [kind.startswith("Attn") for kind in config["down_block_types"]]
    if attends != [kind.startswith("Attn") for kind in reversed(config["up_block_types"])]:
        up = reversed([*enumerate(reversed(config["up_block_types"]))])
        own["decoder_attention_resolutions"] = [side >> level for level, kind in up if kind.startswith("Attn")]
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
        **{name: value for name, value in own.items() if value != young[name]},
    }


def diffusers_config(network: Arguments, module: nn.Module) -> dict[str, Any]:
    """The config.json of `diffusers_sizes` for an autoencoder of ours.
    Raises ValueError, which names a trait, where there is none."""
    codes, side, outputs = dict(network["bottleneck"]), network["resolution"], network.get("reconstruction", "l1")
    kind, latents = codes["kind"], network["latent_channels"]
    refuse_trait(kind not in ("gaussian", "vq", "vq_ema"), f"its bottleneck is {kind}")
    refuse_trait(network.get("patch_shortcut"), "it has a patch_shortcut")
    refuse_trait(outputs not in ("l1", "mse"), f"its decoder gives the parameters of {outputs}")
    refuse_trait(network["channel_mult"][0] != 1, f"its first level has {network['channel_mult'][0]} times channels")
    resolutions, own = network["attention_resolutions"], network.get("decoder_attention_resolutions")
    sides = [side >> level for level in range(len(network["channel_mult"]))]
    attends, attends_up = (
        [each in there for each in sides] for there in (resolutions, resolutions if own is None else own)
    )
    projections, shift = network.get("projections", True), network.get("latent_shift", 0.0)
    refuse_trait(
        kind != "gaussian" and (shift or not projections), "its codes stand without projections, or are shifted"
    )
    config = DIFFUSERS | {
        "in_channels": network.get("image_channels", COLORS),
        "out_channels": network.get("image_channels", COLORS),
        "use_quant_conv": projections,
        "use_post_quant_conv": projections,
        "shift_factor": shift or None,
        "sample_size": side,
        "block_out_channels": [network["channels"] * mult for mult in network["channel_mult"]],
        "layers_per_block": network["num_res_blocks"],
        "down_block_types": [f"{'Attn' * each}DownEncoderBlock2D" for each in attends],
        "up_block_types": [f"{'Attn' * each}UpDecoderBlock2D" for each in reversed(attends_up)],
        "latent_channels": latents,
        "norm_num_groups": norm_groups_of(module),
    }
    of_gaussians = ("use_quant_conv", "use_post_quant_conv", "shift_factor", "latents_mean", "latents_std")
    unknown = ("norm_type",) if kind == "gaussian" else of_gaussians  # to the class
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
    training_only=r"loss\.|model_ema\.|colorize$",
    seen=seen_in_taming,
)
KL, VQ = (
    WeightFamily(
        f"{name} of diffusers",
        kinds=("autoencoder",),
        marks=("encoder.down_blocks.0.resnets.0.norm1.weight", "decoder.conv_norm_out.weight", *marks),
        rules=diffusers_rules,
        class_name=name,
        sizes=diffusers_sizes,
        settings=settings,
        config=diffusers_config,
    )
    for name, marks in (("AutoencoderKL", ()), ("VQModel", ("quantize.embedding.weight",)))
)
