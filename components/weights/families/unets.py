"""U-Nets of diffusion and classifiers of noisy images, of OpenAI's code and of diffusers.

In openai/guided-diffusion and openai/improved-diffusion (ADM, IDDPM) blocks have the places of ours, but that the first
convolution counts there. Attention projects to (heads, 3, d); only ADM's model at 64² was trained with
`--use_new_attention_order`, (3, heads, d) as ours, which no name or shape tells. In diffusers blocks and attention of a
level stand in lists apart; here each step of the network is a list, and resampling upwards ends a level's last.

The U-Nets of openai/glide-text2im by text (Nichol et al., 2022) have the names of guided-diffusion; beside these stand
a transformer over the text, whose last state joins the embedding of the time, and keys and values of the text in every
attention, all with heads outermost. A pad is the last word of the vocabulary; token 0 is a word. Base and upsampler
differ in sizes and in the upsampler's input; models for inpainting have inputs that ours lack.

In `UNet2DConditionModel` (Stable Diffusion 1 and 2) each attention is a spatial transformer (Rombach et al., 2022). Its
field `attention_head_dim` is the number of heads: 1 has one for all levels, 2 a list, of heads of one size. Projections
into and out of a transformer are convolutions of one pixel or, by `use_linear_projection`, matrices of the same
numbers. Diffusers sees all states unless it is given a mask; ours doesn't see states of zeros, which stand for
padding."""

import re
from collections.abc import Sequence
from typing import Any

from einops import rearrange
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
    refuse_trait,
    segments,
    whole_factor,
)

KL_F8 = 0.18215  # the scale of the latents of Stable Diffusion's first stage
NEW_ORDER = 64  # pixels, of the only published network with the new order of attention
FIXED = {"time_embedding_type": "positional", "time_embedding_dim": None, "mid_block_scale_factor": 1}
FIXED |= {"act_fn": "silu", "class_embed_type": None, "center_input_sample": False}
FIXED_BY_TEXT = FIXED | {"mid_block_type": "UNetMidBlock2DCrossAttn", "only_cross_attention": False}
FIXED_BY_TEXT |= {"dual_cross_attention": False, "encoder_hid_dim": None, "addition_embed_type": None}
FIXED_BY_TEXT |= {"num_attention_heads": None, "attention_type": "default", "cross_attention_norm": None}
FIXED_BY_TEXT |= {"timestep_post_act": None, "time_embedding_act_fn": None}
FIXED_BY_TEXT |= {"conv_in_kernel": 3, "conv_out_kernel": 3, "resnet_out_scale_factor": 1.0}
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
KINDS_BY_TEXT = ("CrossAttnDownBlock2D", "DownBlock2D")
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
OF_GLIDE = segments("""
    transformer.resblocks=text_encoder.blocks
    token_embedding=text_encoder.token_embedding
    padding_embedding=text_encoder.padding_embedding
    positional_embedding=text_encoder.position_embedding
    final_ln=text_encoder.norm
    transformer_proj=text_projection
    attn.c_qkv=qkv attn.c_proj=proj
    ln_1=attention_norm ln_2=mlp.0
    mlp.c_fc=mlp.1 mlp.c_proj=mlp.3
    encoder_kv=context_kv
""")
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


def in_our_order(tensors: dict[str, Tensor], network: Arguments, *, rows: str = "heads part d") -> dict[str, Tensor]:
    """Projections of attention with queries, keys and values outermost; theirs have `rows`."""
    adapted = dict(tensors)
    for name, tensor in tensors.items():
        parts = 3 if ".qkv." in name else 2 if ".context_kv." in name else 0
        if parts and not name.startswith("pool."):
            of_text = name.startswith("text_encoder.")
            own = network["text"]["num_heads"] if of_text else heads(network, channels=len(tensor) // parts)
            adapted[name] = rearrange(tensor, f"({rows}) ... -> (part heads d) ...", part=parts, heads=own)
    return adapted


def of_openai(tensors: dict[str, Tensor], network: Arguments) -> dict[str, Tensor]:
    """Projections of attention in our order; positions of a classifier's pool as rows (places, channels)."""
    at_64 = network["resolution"] == NEW_ORDER and "low_res" in network  # a classifier has no such argument
    new_order = at_64 and network["resample_in_blocks"] and not network["low_res"]
    positions = {name: tensor.T for name, tensor in tensors.items() if name == "pool.positions"}
    return (tensors if new_order else in_our_order(tensors, network)) | positions


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
    shared, config = shared_sizes(config, KINDS), DEFAULTS | dict(config)
    if config["attn_norm_num_groups"] is not None:
        check_fixed(config, {"attn_norm_num_groups": config["norm_num_groups"]})
    inside = config["downsample_type"] == "resnet"
    resampled = {
        inside if kind.startswith("Attn") else kind.startswith("Resnet") for kind in config["down_block_types"]
    }
    if len(resampled) > 1 or config["downsample_type"] != config["upsample_type"]:
        raise ValueError("config.json resamples in two ways: our network has one")
    heads = config["attention_head_dim"]
    return shared | {
        "middle_attention": config["add_attention"],
        "head_dim": heads,
        "num_heads": 1 if heads is None else None,
        "resample_in_blocks": resampled.pop(),
    }


def sizes_by_text(config: Arguments) -> dict[str, Any]:
    """Arguments of `UNet` by a config.json of UNet2DConditionModel, as `diffusers_sizes`."""
    shared = shared_sizes(config, KINDS_BY_TEXT)
    for name in ("cross_attention_dim", "transformer_layers_per_block", "layers_per_block"):
        if not isinstance(config.get(name, 1), int):
            raise ValueError(f"config.json has {name} {config[name]}: our network has one number for all levels")
    return shared | {
        "text_conditioning": "spatial_transformer",
        "text_states_dim": config["cross_attention_dim"],
        "transformer_depth": config.get("transformer_layers_per_block", 1),
        "resample_in_blocks": False,
        **heads_of_levels(config["attention_head_dim"], widths=config["block_out_channels"]),
    }


def heads_of_levels(counts: int | Sequence[int], *, widths: Sequence[int]) -> dict[str, int | None]:
    """Arguments for one number of heads, or for those of each level.
    Raises ValueError for neither one number of heads nor one size of them."""
    if isinstance(counts, int) or len({*counts}) == 1:
        return {"head_dim": None, "num_heads": counts if isinstance(counts, int) else counts[0]}
    sizes = {width / count for width, count in zip(widths, counts, strict=False)}
    if len(sizes) > 1 or len(counts) != len(widths):
        raise ValueError(
            f"config.json has attention_head_dim {counts}: our network has heads of one size, or one number"
        )
    return {"head_dim": int(sizes.pop()), "num_heads": None}


def shared_sizes(config: Arguments, known: tuple[str, ...]) -> dict[str, Any]:
    """Arguments that config.json says in the same fields for all U-Nets of diffusers.
    Raises ValueError for other blocks than the known."""
    config = DEFAULTS | dict(config)
    kinds, channels, widths = config["down_block_types"], config["in_channels"], config["block_out_channels"]
    if unknown := [kind for kind in kinds if kind not in known]:
        raise ValueError(f"config.json has blocks {unknown[0]}: our network has {', '.join(known)}")
    padded, shifted = config["downsample_padding"] != 0, config["resnet_time_scale_shift"] != "scale_shift"
    fixed = {"up_block_types": upwards(kinds)} | ({"downsample_padding": 1} if padded else {})
    check_fixed(config, fixed | ({"resnet_time_scale_shift": "default"} if shifted else {}))
    return {ours: config[theirs] for theirs, ours in NUMBERS.items()} | {
        "attention_resolutions": [config["sample_size"] >> level for level, kind in enumerate(kinds) if "Attn" in kind],
        "in_channels": channels,
        "out_channels": channels,
        "learned_variance": config["out_channels"] == 2 * channels,
        "model_channels": widths[0],
        "channel_mult": [whole_factor(width, widths[0]) for width in widths],
        "scale_shift_norm": not shifted,
        "norm_groups": config["norm_num_groups"],
        "sines_first": not config["flip_sin_to_cos"],
        "pads_end": not padded,
    }


def upwards(kinds: list[str]) -> list[str]:
    """Blocks of the way up that mirror those of the way down."""
    return [kind.replace("Down", "Up") for kind in reversed(kinds)]


def diffusers_config(network: Arguments, module: nn.Module) -> dict[str, Any]:
    """The config.json of `diffusers_sizes` for a U-Net of ours.
    Raises ValueError, which names a trait, where there is none."""
    inside = network["resample_in_blocks"]
    own = shared_config(network, module, (KINDS[0], KINDS[1 + inside]), conditions=("label",))
    attentions = [part for part in module.modules() if isinstance(part, SelfAttention2d)]
    sizes = {part.qkv.in_channels // part.num_heads for part in attentions}
    alone = all(part.num_heads == 1 for part in attentions)
    refuse_trait(len(sizes) > 1 and not alone, "its heads of attention have several sizes")
    resampled = dict.fromkeys(("downsample_type", "upsample_type"), "resnet" if inside else "conv")
    own |= resampled | {"attention_head_dim": None if alone else sizes.pop()}
    return own | {"add_attention": network["middle_attention"], "attn_norm_num_groups": own["norm_num_groups"]}


def config_by_text(network: Arguments, module: nn.Module) -> dict[str, Any]:
    """The config.json of `sizes_by_text` for a U-Net of ours, as `diffusers_config`."""
    refuse_trait(network["text_conditioning"] != "spatial_transformer", "its attention sees no states of a text")
    refuse_trait(network["resample_in_blocks"], "it resamples inside residual blocks")
    refuse_trait(not network["middle_attention"], "its middle has no attention")
    own = shared_config(network, module, KINDS_BY_TEXT, conditions=("label", "text_states"))
    counts = [heads(network, channels=width) for width in own["block_out_channels"]]
    return own | {
        "mid_block_type": FIXED_BY_TEXT["mid_block_type"],
        "cross_attention_dim": network["text_states_dim"],
        "transformer_layers_per_block": network["transformer_depth"],
        "attention_head_dim": counts if len({*counts}) > 1 else counts[0],
    }


def shared_config(
    network: Arguments, module: nn.Module, kinds: tuple[str, ...], *, conditions: tuple[str, ...]
) -> dict[str, Any]:
    """Fields of config.json that U-Nets of diffusers share.
    The `kinds` are names of blocks with attention, and of those without. Raises ValueError, which names a trait, for
    other conditions than these, and where no U-Net there has the trait."""
    others = [name for name in getattr(module, "conditions", ()) if name not in conditions]
    refuse_trait(others, f"it is conditioned on {' and '.join(others)}")
    refuse_trait(network["class_token_dim"], "its label is a token")
    refuse_trait(network["plus_plus"], "it is DDPM++")
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
        "resnet_time_scale_shift": "scale_shift" if network["scale_shift_norm"] else "default",
        "norm_num_groups": norm_groups_of(module),
        "num_class_embeds": None if table is None else table.num_embeddings,
        "flip_sin_to_cos": not network.get("sines_first", False),
        "downsample_padding": 0 if network["pads_end"] else 1,
    }


OPENAI = WeightFamily(
    "U-Net of guided-diffusion or improved-diffusion",
    kind="unet",
    marks=("time_embed.0.weight", "input_blocks.0.0.weight", "output_blocks.0.0.in_layers.0.weight"),
    names=[*OF_OPENAI, *OF_ATTENTION],
    adapted=of_openai,
)
CLASSIFIER = OPENAI._replace(
    title="classifier of guided-diffusion",
    kind="classifier",
    marks=("time_embed.0.weight", "input_blocks.0.0.weight", "out.2.positional_embedding"),
)
GLIDE = OPENAI._replace(
    title="U-Net of GLIDE",
    marks=("time_embed.0.weight", "transformer.resblocks.0.attn.c_qkv.weight", "padding_embedding"),
    names=[*OF_GLIDE, *OPENAI.names],
    adapted=in_our_order,
    text_tables=("token_embedding.weight", "positional_embedding"),
    pad="<|endoftext|>",
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
    fixed=FIXED,
    sizes=diffusers_sizes,
    config=diffusers_config,
)
BY_TEXT = DIFFUSERS._replace(
    title="UNet2DConditionModel of diffusers",
    marks=("time_embedding.linear_1.weight", "mid_block.attentions.0.transformer_blocks.0.attn2.to_q.weight"),
    places=lambda network: [*places(network), *SPATIAL_TRANSFORMER],
    class_name="UNet2DConditionModel",
    fixed=FIXED_BY_TEXT,
    sizes=sizes_by_text,
    config=config_by_text,
    latent_scale=latent_scale,
)
