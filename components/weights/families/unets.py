"""U-Nets of diffusion and classifiers of noisy images, of OpenAI's code and of diffusers.

In openai/guided-diffusion and openai/improved-diffusion (ADM, IDDPM) blocks have the places of ours, but that the first
convolution counts there. Attention projects to (heads, 3, d); only ADM's model at 64² was trained with
`--use_new_attention_order`, (3, heads, d) as ours, which no name or shape tells. In diffusers blocks and attention of a
level stand in lists apart; here each step of the network is a list, and resampling upwards ends a level's last."""

import re
from typing import Any

from torch import Tensor, nn

from components.models.layers import SelfAttention2d
from components.weights.renaming import (
    DIFFUSERS_BLOCKS,
    SPATIAL_TRANSFORMER,
    Arguments,
    Rules,
    WeightFamily,
    check_fixed,
    norm_groups_of,
    queries_outermost,
    refuse_trait,
    segments,
    whole_factor,
)

KL_F8 = 0.18215  # the scale of the latents of Stable Diffusion's first stage
NEW_ORDER = 64  # pixels, of the only published network with the new order of attention
FIXED = {"time_embedding_type": "positional", "time_embedding_dim": None, "mid_block_scale_factor": 1}
FIXED |= {"act_fn": "silu", "class_embed_type": None, "center_input_sample": False}
# What a config.json leaves out that was written before the field was there, as those of `google/ddpm-*`.
DEFAULTS: dict[str, Any] = {
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "downsample_padding": 1,
    "norm_eps": 1e-5,
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "dropout": 0.0,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "downsample_type": "conv",
    "upsample_type": "conv",
}
NUMBERS = {  # their name -> ours
    "sample_size": "resolution",
    "layers_per_block": "num_res_blocks",
    "dropout": "dropout",
    "norm_eps": "norm_eps",
    "freq_shift": "frequency_shift",
}
KINDS = ("AttnDownBlock2D", "DownBlock2D", "ResnetDownsampleBlock2D")
OF_OPENAI: Rules = [
    (r"^input_blocks\.0\.0\.", "conv_in."),
    (r"^input_blocks\.(\d+)\.", lambda found: f"down.{int(found[1]) - 1}."),
    (r"^(down\.\d+\.\d+)\.op\.", r"\1."),
    (r"^output_blocks\.", "up."),
    (r"^(up\.\d+\.\d+)\.conv\.", r"\1.1."),  # after nearest neighbor
    *segments("""
        time_embed=time_mlp
        label_emb=class_embedding
        middle_block=middle in_layers.0=norm_1
        in_layers.2=conv_1
        emb_layers.1=embedding_projection
        out_layers.0=norm_2
        out_layers.3=conv_2
        skip_connection=skip out.0=norm_out
        out.2.positional_embedding=pool.positions
        out.2.qkv_proj=pool.qkv
        out.2.c_proj=pool.proj out.2=conv_out
    """),
]
OF_ATTENTION = segments("proj_out=proj")
OF_DIFFUSERS: Rules = [
    (r"^(down\.\d+\.\d+)\.conv\.", r"\1."),
    (r"^(up\.\d+\.\d+)\.conv\.", r"\1.1."),  # after nearest neighbor
    *segments("""
        time_emb_proj=embedding_projection
        time_embedding.linear_1=time_mlp.0
        time_embedding.linear_2=time_mlp.2
    """),
    *DIFFUSERS_BLOCKS,
]


def latent_scale(network: Arguments) -> float:
    """The scale of the latents that a model was trained on.
    DiT and the U-Net by text have those of kl-f8, others those of vq-*, which are taken as they are."""
    return KL_F8 if "patch_size" in network or network["text_states_dim"] else 1.0


def in_our_order(tensors: dict[str, Tensor], network: Arguments) -> dict[str, Tensor]:
    """Rows of attention's projections in our order; positions of the pool as rows (places, channels)."""
    at_64 = network["resolution"] == NEW_ORDER and "low_res" in network  # a classifier has no such argument
    new_order = at_64 and network["resample_in_blocks"] and not network["low_res"]
    adapted = dict(tensors)
    for name, tensor in tensors.items():
        if ".qkv." in name and not name.startswith("pool.") and not new_order:
            adapted[name] = queries_outermost(tensor, num_heads=heads(network, channels=len(tensor) // 3))
        elif name == "pool.positions":
            adapted[name] = tensor.T
    return adapted


def heads(network: Arguments, *, channels: int) -> int:
    """Heads of an attention of so many channels."""
    count: Any = network.get("num_heads")
    return count or max(1, channels // network["head_dim"])


def places(network: Arguments) -> Rules:
    """Rules of diffusers' (level, list, index) to our place, by the sizes of `network`."""
    blocks, last = network["num_res_blocks"], len(network["channel_mult"]) - 1

    def place(found: re.Match[str]) -> str:
        side, level, kind, index = found[1], int(found[2]), found[3], int(found[4])
        row, upwards = level * (blocks + 1), side == "up"
        if kind.endswith("samplers"):
            attends = network["resolution"] >> (last - level) in network["attention_resolutions"]
            return f"{side}.{row + blocks}.{1 + attends if upwards else 0}."
        return f"{side}.{row + index}.{int(kind == 'attentions')}."

    return [(r"^(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.", place)]


def diffusers_sizes(config: Arguments) -> dict[str, Any]:
    """Arguments of `UNet` by a config.json. Raises ValueError for a field that our network can't follow."""
    shared, config = shared_sizes(config, FIXED, KINDS), DEFAULTS | dict(config)
    if config["attn_norm_num_groups"] is not None:
        check_fixed(config, {"attn_norm_num_groups": config["norm_num_groups"]})
    inside = config["downsample_type"] == "resnet"
    resampled = {
        inside if kind.startswith("Attn") else kind.startswith("Resnet") for kind in config["down_block_types"]
    }
    if len(resampled) > 1 or config["downsample_type"] != config["upsample_type"]:
        raise ValueError("config.json resamples in two ways: our network has one")
    if config["downsample_padding"] != 0:
        check_fixed(config, {"downsample_padding": 1})
    heads = config["attention_head_dim"]
    return shared | {
        "middle_attention": config["add_attention"],
        "head_dim": heads,
        "num_heads": 1 if heads is None else None,
        "resample_in_blocks": resampled.pop(),
    }


def shared_sizes(config: Arguments, fixed: Arguments, known: tuple[str, ...]) -> dict[str, Any]:
    """Arguments that config.json says in the same fields for all U-Nets of diffusers.
    Raises ValueError for another value of a fixed field, and for other blocks than the known."""
    check_fixed(config, fixed)
    config = DEFAULTS | dict(config)
    kinds, channels, widths = config["down_block_types"], config["in_channels"], config["block_out_channels"]
    if unknown := [kind for kind in kinds if kind not in known]:
        raise ValueError(f"config.json has blocks {unknown[0]}: our network has {', '.join(known)}")
    check_fixed(config, {"up_block_types": upwards(kinds)})
    return {ours: config[theirs] for theirs, ours in NUMBERS.items()} | {
        "attention_resolutions": [config["sample_size"] >> level for level, kind in enumerate(kinds) if "Attn" in kind],
        "in_channels": channels,
        "out_channels": channels,
        "learned_variance": config["out_channels"] == 2 * channels,
        "model_channels": widths[0],
        "channel_mult": [whole_factor(width, widths[0]) for width in widths],
        "scale_shift_norm": config["resnet_time_scale_shift"] == "scale_shift",
        "norm_groups": config["norm_num_groups"],
        "sines_first": not config["flip_sin_to_cos"],
        "pads_end": config["downsample_padding"] == 0,
    }


def upwards(kinds: list[str]) -> list[str]:
    """Blocks of the way up that mirror those of the way down."""
    return [kind.replace("Down", "Up") for kind in reversed(kinds)]


def diffusers_config(network: Arguments, module: nn.Module) -> dict[str, Any]:
    """The config.json of `diffusers_sizes` for a U-Net of ours.
    Raises ValueError, which names a trait, where there is none."""
    inside = network.get("resample_in_blocks", True)
    own = shared_config(network, module, (KINDS[0], KINDS[1 + inside]), conditions=("label",))
    attentions = [part for part in module.modules() if isinstance(part, SelfAttention2d)]
    sizes = {part.qkv.in_channels // part.num_heads for part in attentions}
    alone = all(part.num_heads == 1 for part in attentions)
    refuse_trait(len(sizes) > 1 and not alone, "its heads of attention have several sizes")
    resampled = dict.fromkeys(("downsample_type", "upsample_type"), "resnet" if inside else "conv")
    own |= resampled | {"attention_head_dim": None if alone else sizes.pop()}
    own |= {"add_attention": network.get("middle_attention", True), "attn_norm_num_groups": own["norm_num_groups"]}
    return own


def shared_config(
    network: Arguments, module: nn.Module, kinds: tuple[str, ...], *, conditions: tuple[str, ...]
) -> dict[str, Any]:
    """Fields of config.json that U-Nets of diffusers share.
    The `kinds` are names of blocks with attention, and of those without. Raises ValueError, which names a trait, for
    other conditions than these, and where no U-Net there has the trait."""
    others = [name for name in getattr(module, "conditions", ()) if name not in conditions]
    refuse_trait(others, f"it is conditioned on {' and '.join(others)}")
    refuse_trait(network.get("class_token_dim"), "its label is a token")
    refuse_trait(network.get("plus_plus"), "it is DDPM++")
    refuse_trait(network["channel_mult"][0] != 1, f"its first level has {network['channel_mult'][0]} model_channels")
    levels, attends = range(len(network["channel_mult"])), network["attention_resolutions"]
    blocks = [kinds[network["resolution"] >> level not in attends] for level in levels]
    table: Any = getattr(module, "class_embedding", None)
    return {
        **FIXED,
        **{theirs: network.get(ours, DEFAULTS.get(theirs)) for theirs, ours in NUMBERS.items()},
        "in_channels": network.get("in_channels", 3),
        "out_channels": getattr(module, "output_channels", 3),
        "block_out_channels": [int(network["model_channels"] * mult) for mult in network["channel_mult"]],
        "down_block_types": blocks,
        "up_block_types": upwards(blocks),
        "resnet_time_scale_shift": "scale_shift" if network.get("scale_shift_norm", True) else "default",
        "norm_num_groups": norm_groups_of(module),
        "num_class_embeds": None if table is None else table.num_embeddings,
        "flip_sin_to_cos": not network.get("sines_first", False),
        "downsample_padding": 0 if network.get("pads_end", False) else 1,
    }


OPENAI = WeightFamily(
    "U-Net of guided-diffusion or improved-diffusion",
    kind="unet",
    marks=("time_embed.0.weight", "input_blocks.0.0.weight", "output_blocks.0.0.in_layers.0.weight"),
    names=[*OF_OPENAI, *OF_ATTENTION],
    adapted=in_our_order,
)
CLASSIFIER = OPENAI._replace(
    title="classifier of guided-diffusion",
    kind="classifier",
    marks=("time_embed.0.weight", "input_blocks.0.0.weight", "out.2.positional_embedding"),
)
LATENT = OPENAI._replace(
    title="U-Net of latent diffusion",
    names=OF_OPENAI,
    places=lambda network: (
        SPATIAL_TRANSFORMER if network["text_conditioning"] == "spatial_transformer" else OF_ATTENTION
    ),
    prefixes=("model.diffusion_model.",),
    latent_scale=latent_scale,
    average=lambda name: f"model_ema.{f'diffusion_model.{name}'.replace('.', '')}",  # in a checkpoint, without dots
    outside={"cond_stage_model.embedding.weight": "label_emb.weight"},  # the table of class tokens
)
DIFFUSERS = WeightFamily(
    "UNet2DModel of diffusers",
    kind="unet",
    marks=("time_embedding.linear_1.weight", "down_blocks.0.resnets.0.norm1.weight"),
    names=OF_DIFFUSERS,
    places=places,
    class_name="UNet2DModel",
    sizes=diffusers_sizes,
    config=diffusers_config,
)
