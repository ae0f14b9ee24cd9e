"""U-Nets with attention to states of a text: UNet2DConditionModel of diffusers, Stable Diffusion 1.

Each attention is a spatial transformer (Rombach et al., 2022). Its field `attention_head_dim` is the number of heads.
Diffusers sees all states unless it is given a mask; ours doesn't see states of zeros, which stand for padding."""

from typing import Any

from torch import nn

from components.models.unet_blocks import CrossAttention
from components.weights.families import unets
from components.weights.renaming import Arguments, Rules, WeightFamily, check_fixed, refuse_trait

FIXED = unets.FIXED | {"mid_block_type": "UNetMidBlock2DCrossAttn", "only_cross_attention": False}
FIXED |= {"dual_cross_attention": False, "encoder_hid_dim": None, "addition_embed_type": None}
FIXED |= {"num_attention_heads": None, "upcast_attention": False, "attention_type": "default"}
FIXED |= {"cross_attention_norm": None, "conv_in_kernel": 3, "conv_out_kernel": 3, "resnet_out_scale_factor": 1.0}
MIRRORED = {"CrossAttnDownBlock2D": "CrossAttnUpBlock2D", "DownBlock2D": "UpBlock2D"}


def rules(network: Arguments) -> Rules:
    """Names of UNet2DModel's blocks, and those of spatial transformers."""
    return [
        (r"\.transformer_blocks\.", ".blocks."),
        (r"\.norm3\.", ".norm_3."),
        (r"\.attn1\.", ".self_attention."),
        (r"\.attn2\.", ".cross_attention."),
        (r"\.to_q\.", ".q."),
        (r"\.to_k\.", ".kv#0."),
        (r"\.to_v\.", ".kv#1."),
        (r"\.ff\.net\.0\.proj\.", ".expand."),
        (r"\.ff\.net\.2\.", ".contract."),
        *unets.diffusers_rules(network),
    ]


def sizes(config: Arguments) -> dict[str, Any]:
    """Arguments of `UNet` by a config.json.
    Raises ValueError for a field that our network can't follow."""
    check_fixed(config, FIXED)
    side, kinds = config["sample_size"], config["down_block_types"]
    if unknown := [kind for kind in kinds if kind not in MIRRORED]:
        raise ValueError(f"config.json has blocks {unknown[0]}: our network has {', '.join(MIRRORED)}")
    check_fixed(config, {"up_block_types": [MIRRORED[kind] for kind in reversed(kinds)]})
    for name in ("attention_head_dim", "cross_attention_dim", "transformer_layers_per_block", "layers_per_block"):
        if not isinstance(config.get(name, 1), int):
            raise ValueError(f"config.json has {name} {config[name]}: our network has one number for all levels")
    return unets.shared_sizes(config) | {
        "attention_resolutions": [side >> level for level, kind in enumerate(kinds) if kind.startswith("Cross")],
        "text_conditioning": "spatial_transformer",
        "text_states_dim": config["cross_attention_dim"],
        "transformer_depth": config.get("transformer_layers_per_block", 1),
        "head_dim": None,
        "num_heads": config["attention_head_dim"],
        "resample_in_blocks": False,
    }


def config(network: Arguments, module: nn.Module) -> dict[str, Any]:
    """The config.json of `sizes` for a U-Net of ours.
    Raises ValueError, which names a trait, where there is none."""
    refuse_trait(network.get("text_conditioning") != "spatial_transformer", "its attention sees no states of a text")
    refuse_trait(network.get("resample_in_blocks", True), "it resamples inside residual blocks")
    refuse_trait(not network.get("middle_attention", True), "its middle has no attention")
    heads = {part.num_heads for part in module.modules() if isinstance(part, CrossAttention)}
    refuse_trait(len(heads) > 1, "its attentions have several numbers of heads")
    own, attends = unets.shared_config(network, module, conditions=("label", "text_states"))
    kinds = ["CrossAttnDownBlock2D" if each else "DownBlock2D" for each in attends]
    return own | {
        "mid_block_type": FIXED["mid_block_type"],
        "down_block_types": kinds,
        "up_block_types": [MIRRORED[kind] for kind in reversed(kinds)],
        "cross_attention_dim": network["text_states_dim"],
        "transformer_layers_per_block": network.get("transformer_depth", 1),
        "attention_head_dim": heads.pop(),
    }


DIFFUSERS = WeightFamily(
    "UNet2DConditionModel of diffusers",
    kinds=("unet",),
    marks=("time_embedding.linear_1.weight", "mid_block.attentions.0.transformer_blocks.0.attn2.to_q.weight"),
    rules=rules,
    class_name="UNet2DConditionModel",
    sizes=sizes,
    config=config,
    latent_scale=unets.latent_scale,
)
