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
    Arguments,
    Rules,
    WeightFamily,
    check_fixed,
    norm_groups_of,
    queries_outermost,
    refuse_trait,
    whole_factor,
)

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
MIRRORED = {"DownBlock2D": "UpBlock2D", "AttnDownBlock2D": "AttnUpBlock2D"}
MIRRORED |= {"ResnetDownsampleBlock2D": "ResnetUpsampleBlock2D"}


def openai_rules(network: Arguments) -> Rules:
    """Names of a U-Net, or of the half of it that is a classifier."""
    del network
    return [
        (r"^time_embed\.", "time_mlp."),
        (r"^label_emb\.", "class_embedding."),
        (r"^input_blocks\.0\.0\.", "conv_in."),
        (r"^input_blocks\.(\d+)\.", lambda found: f"down.{int(found[1]) - 1}."),
        (r"^(down\.\d+\.\d+)\.op\.", r"\1."),
        (r"^middle_block\.", "middle."),
        (r"^output_blocks\.", "up."),
        (r"^(up\.\d+\.\d+)\.conv\.", r"\1.1."),  # after nearest neighbor
        (r"\.in_layers\.0\.", ".norm_1."),
        (r"\.in_layers\.2\.", ".conv_1."),
        (r"\.emb_layers\.1\.", ".embedding_projection."),
        (r"\.out_layers\.0\.", ".norm_2."),
        (r"\.out_layers\.3\.", ".conv_2."),
        (r"\.skip_connection\.", ".skip."),
        (r"\.proj_out\.", ".proj."),
        (r"^out\.0\.", "norm_out."),
        (r"^out\.2\.positional_embedding$", "pool.positions"),
        (r"^out\.2\.qkv_proj\.", "pool.qkv."),
        (r"^out\.2\.c_proj\.", "pool.proj."),
        (r"^out\.2\.", "conv_out."),
    ]


def latent_rules(network: Arguments) -> Rules:
    """Names of latent diffusion: OpenAI's, and those of spatial transformers."""
    if network["text_conditioning"] != "spatial_transformer":
        return openai_rules(network)
    own = [(pattern, name) for pattern, name in openai_rules(network) if "proj_out" not in pattern]
    return [
        *own,
        (r"\.transformer_blocks\.", ".blocks."),
        (r"\.norm([123])\.", r".norm_\1."),
        (r"\.attn1\.", ".self_attention."),
        (r"\.attn2\.", ".cross_attention."),
        (r"\.to_q\.", ".q."),
        (r"\.to_k\.", ".kv#0."),
        (r"\.to_v\.", ".kv#1."),
        (r"\.to_out\.0\.", ".proj."),
        (r"\.ff\.net\.0\.proj\.", ".expand."),
        (r"\.ff\.net\.2\.", ".contract."),
    ]


def latent_scale(network: Arguments) -> float:
    """The scale of the latents that latent diffusion was trained on.
    The model by text has those of kl-f8, the others those of vq-*, which are taken as they are."""
    return 0.18215 if network["text_states_dim"] else 1.0


def name_of_average(name: str) -> str:
    """Name of a tensor's moving average in a checkpoint of latent diffusion, without dots."""
    return f"model_ema.{f'diffusion_model.{name}'.replace('.', '')}"


def in_our_order(tensors: dict[str, Tensor], network: Arguments) -> dict[str, Tensor]:
    """Rows of attention's projections in our order; positions of the pool as rows (places, channels)."""
    is_unet = "low_res" in network
    new_order = (
        is_unet and network["resolution"] == NEW_ORDER and network["resample_in_blocks"] and not network["low_res"]
    )
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


def diffusers_rules(network: Arguments) -> Rules:
    """Names of the sizes of `network`."""
    blocks, last = network["num_res_blocks"], len(network["channel_mult"]) - 1

    def down(found: re.Match[str]) -> str:
        level, kind, index = int(found[1]), found[2], int(found[3])
        if kind == "downsamplers":
            return f"down.{level * (blocks + 1) + blocks}.0."
        return f"down.{level * (blocks + 1) + index}.{int(kind == 'attentions')}."

    def up(found: re.Match[str]) -> str:
        level, kind, index = int(found[1]), found[2], int(found[3])
        attends = network["resolution"] >> (last - level) in network["attention_resolutions"]
        if kind == "upsamplers":
            return f"up.{level * (blocks + 1) + blocks}.{1 + attends}."
        return f"up.{level * (blocks + 1) + index}.{int(kind == 'attentions')}."

    lists = r"(resnets|attentions|downsamplers|upsamplers)\.(\d+)\."
    return [
        (rf"^down_blocks\.(\d+)\.{lists}", down),
        (rf"^up_blocks\.(\d+)\.{lists}", up),
        (r"^mid_block\.resnets\.(\d)\.", lambda found: f"middle.{2 * int(found[1])}."),
        (r"^mid_block\.attentions\.0\.", "middle.1."),
        (r"^(down\.\d+\.\d+)\.conv\.", r"\1."),
        (r"^(up\.\d+\.\d+)\.conv\.", r"\1.1."),  # after nearest neighbor
        (r"\.(norm|conv)([12])\.", r".\1_\2."),
        (r"\.time_emb_proj\.", ".embedding_projection."),
        (r"\.conv_shortcut\.", ".skip."),
        (r"\.group_norm\.", ".norm."),
        (r"\.(to_q|query)\.", ".qkv#0."),
        (r"\.(to_k|key)\.", ".qkv#1."),
        (r"\.(to_v|value)\.", ".qkv#2."),
        (r"\.(to_out\.0|proj_attn)\.", ".proj."),
        (r"^time_embedding\.linear_1\.", "time_mlp.0."),
        (r"^time_embedding\.linear_2\.", "time_mlp.2."),
        (r"^conv_norm_out\.", "norm_out."),
    ]


def diffusers_sizes(config: Arguments) -> dict[str, Any]:
    """Arguments of `UNet` by a config.json. Raises ValueError for a field that our network can't follow."""
    check_fixed(config, FIXED)
    config = DEFAULTS | dict(config)
    side, kinds = config["sample_size"], config["down_block_types"]
    if config["attn_norm_num_groups"] is not None:
        check_fixed(config, {"attn_norm_num_groups": config["norm_num_groups"]})
    if unknown := [kind for kind in kinds if kind not in MIRRORED]:
        raise ValueError(f"config.json has blocks {unknown[0]}: our network has {', '.join(MIRRORED)}")
    check_fixed(config, {"up_block_types": [MIRRORED[kind] for kind in reversed(kinds)]})
    resampled = {kind.startswith("Resnet") for kind in kinds if not kind.startswith("Attn")}
    resampled |= {config["downsample_type"] == "resnet" for kind in kinds if kind.startswith("Attn")}
    if len(resampled) > 1 or config["downsample_type"] != config["upsample_type"]:
        raise ValueError("config.json resamples in two ways: our network has one")
    if config["downsample_padding"] not in (0, 1):
        check_fixed(config, {"downsample_padding": 1})
    heads, attends = config["attention_head_dim"], [kind.startswith("Attn") for kind in kinds]
    return shared_sizes(config) | {
        "attention_resolutions": [side >> level for level, attention in enumerate(attends) if attention],
        "middle_attention": config["add_attention"],
        "head_dim": heads,
        "num_heads": 1 if heads is None else None,
        "resample_in_blocks": resampled.pop(),
    }


def shared_sizes(config: Arguments) -> dict[str, Any]:
    """Arguments that config.json says in the same fields for all U-Nets of diffusers."""
    config = DEFAULTS | dict(config)
    channels, widths = config["in_channels"], config["block_out_channels"]
    return {
        "resolution": config["sample_size"],
        "in_channels": channels,
        "out_channels": channels,
        "learned_variance": config["out_channels"] == 2 * channels,
        "model_channels": widths[0],
        "channel_mult": [whole_factor(width, widths[0]) for width in widths],
        "num_res_blocks": config["layers_per_block"],
        "dropout": config["dropout"],
        "scale_shift_norm": config["resnet_time_scale_shift"] == "scale_shift",
        "norm_groups": config["norm_num_groups"],
        "norm_eps": config["norm_eps"],
        "frequency_shift": config["freq_shift"],
        "sines_first": not config["flip_sin_to_cos"],
        "pads_end": config["downsample_padding"] == 0,
    }


def diffusers_config(network: Arguments, module: nn.Module) -> dict[str, Any]:
    """The config.json of `diffusers_sizes` for a U-Net of ours.
    Raises ValueError, which names a trait, where there is none."""
    own, attends = shared_config(network, module, conditions=("label",))
    attentions = [part for part in module.modules() if isinstance(part, SelfAttention2d)]
    sizes = {part.qkv.in_channels // part.num_heads for part in attentions}
    alone = all(part.num_heads == 1 for part in attentions)
    refuse_trait(len(sizes) > 1 and not alone, "its heads of attention have several sizes")
    inside = network.get("resample_in_blocks", True)
    kinds = ["AttnDownBlock2D" if each else f"{'ResnetDownsample' if inside else 'Down'}Block2D" for each in attends]
    return own | {
        "down_block_types": kinds,
        "up_block_types": [MIRRORED[kind] for kind in reversed(kinds)],
        "downsample_type": "resnet" if inside else "conv",
        "upsample_type": "resnet" if inside else "conv",
        "attention_head_dim": None if alone else sizes.pop(),
        "add_attention": network.get("middle_attention", True),
        "attn_norm_num_groups": own["norm_num_groups"],
    }


def shared_config(
    network: Arguments, module: nn.Module, *, conditions: tuple[str, ...]
) -> tuple[dict[str, Any], list[bool]]:
    """Fields of config.json that U-Nets of diffusers share, and the presence of attention by level.
    Raises ValueError, which names a trait, for other conditions than these, and where no U-Net there has the trait."""
    others = [name for name in getattr(module, "conditions", ()) if name not in conditions]
    refuse_trait(others, f"it is conditioned on {' and '.join(others)}")
    refuse_trait(network.get("class_token_dim"), "its label is a token")
    refuse_trait(network["channel_mult"][0] != 1, f"its first level has {network['channel_mult'][0]} model_channels")
    widths = [int(network["model_channels"] * mult) for mult in network["channel_mult"]]
    table: Any = getattr(module, "class_embedding", None)
    fields = FIXED | {
        "sample_size": network["resolution"],
        "in_channels": network.get("in_channels", 3),
        "out_channels": getattr(module, "output_channels", 3),
        "block_out_channels": widths,
        "layers_per_block": network["num_res_blocks"],
        "dropout": network.get("dropout", 0.0),
        "resnet_time_scale_shift": "scale_shift" if network.get("scale_shift_norm", True) else "default",
        "norm_num_groups": norm_groups_of(module),
        "num_class_embeds": None if table is None else table.num_embeddings,
        "norm_eps": network.get("norm_eps", 1e-5),
        "freq_shift": network.get("frequency_shift", 0),
        "flip_sin_to_cos": not network.get("sines_first", False),
        "downsample_padding": 0 if network.get("pads_end", False) else 1,
    }
    return fields, [network["resolution"] >> level in network["attention_resolutions"] for level in range(len(widths))]


OPENAI = WeightFamily(
    "U-Net of guided-diffusion or improved-diffusion",
    kinds=("unet",),
    marks=("time_embed.0.weight", "input_blocks.0.0.weight", "output_blocks.0.0.in_layers.0.weight"),
    rules=openai_rules,
    adapted=in_our_order,
)
CLASSIFIER = WeightFamily(
    "classifier of guided-diffusion",
    kinds=("classifier",),
    marks=("time_embed.0.weight", "input_blocks.0.0.weight", "out.2.positional_embedding"),
    rules=openai_rules,
    adapted=in_our_order,
)
LATENT = WeightFamily(
    "U-Net of latent diffusion",
    kinds=("unet",),
    marks=("time_embed.0.weight", "input_blocks.0.0.weight", "output_blocks.0.0.in_layers.0.weight"),
    rules=latent_rules,
    prefixes=("model.diffusion_model.",),
    adapted=in_our_order,
    latent_scale=latent_scale,
    average=name_of_average,
    outside={"cond_stage_model.embedding.weight": "label_emb.weight"},  # the table of class tokens
)
DIFFUSERS = WeightFamily(
    "UNet2DModel of diffusers",
    kinds=("unet",),
    marks=("time_embedding.linear_1.weight", "down_blocks.0.resnets.0.norm1.weight"),
    rules=diffusers_rules,
    class_name="UNet2DModel",
    sizes=diffusers_sizes,
    config=diffusers_config,
)
