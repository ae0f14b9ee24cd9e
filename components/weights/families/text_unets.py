"""U-Nets by the states of a text: UNet2DConditionModel of diffusers, Stable Diffusion 1 and 2.

Each attention is a spatial transformer (Rombach et al., 2022). Its field `attention_head_dim` is the number of heads: 1
has one for all levels, 2 a list, of heads of one size. Projections into and out of a transformer are convolutions of
one pixel or, by `use_linear_projection`, matrices of the same numbers. Diffusers sees all states unless it is given a
mask; ours doesn't see states of zeros, which stand for padding."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from components.weights.families import unets
from components.weights.renaming import SPATIAL_TRANSFORMER, Arguments, refuse_trait

FIXED = unets.FIXED | {"mid_block_type": "UNetMidBlock2DCrossAttn", "only_cross_attention": False}
FIXED |= {"dual_cross_attention": False, "encoder_hid_dim": None, "addition_embed_type": None}
FIXED |= {"num_attention_heads": None, "attention_type": "default"}
FIXED |= {"timestep_post_act": None, "time_embedding_act_fn": None}
FIXED |= {"cross_attention_norm": None, "conv_in_kernel": 3, "conv_out_kernel": 3, "resnet_out_scale_factor": 1.0}
KINDS = ("CrossAttnDownBlock2D", "DownBlock2D")


def sizes(config: Arguments) -> dict[str, Any]:
    """Arguments of `UNet` by a config.json.
    Raises ValueError for a field that our network can't follow."""
    shared = unets.shared_sizes(config, FIXED, KINDS)
    for name in ("cross_attention_dim", "transformer_layers_per_block", "layers_per_block"):
        if not isinstance(config.get(name, 1), int):
            raise ValueError(f"config.json has {name} {config[name]}: our network has one number for all levels")
    return shared | {
        "text_conditioning": "spatial_transformer",
        "text_states_dim": config["cross_attention_dim"],
        "transformer_depth": config.get("transformer_layers_per_block", 1),
        "resample_in_blocks": False,
        **heads(config["attention_head_dim"], widths=config["block_out_channels"]),
    }


def heads(counts: int | Sequence[int], *, widths: Sequence[int]) -> dict[str, int | None]:
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


def config(network: Arguments, module: nn.Module) -> dict[str, Any]:
    """The config.json of `sizes` for a U-Net of ours.
    Raises ValueError, which names a trait, where there is none."""
    refuse_trait(network.get("text_conditioning") != "spatial_transformer", "its attention sees no states of a text")
    refuse_trait(network.get("resample_in_blocks", True), "it resamples inside residual blocks")
    refuse_trait(not network.get("middle_attention", True), "its middle has no attention")
    own = unets.shared_config(network, module, KINDS, conditions=("label", "text_states"))
    counts = [unets.heads(network, channels=width) for width in own["block_out_channels"]]
    return own | {
        "mid_block_type": FIXED["mid_block_type"],
        "cross_attention_dim": network["text_states_dim"],
        "transformer_layers_per_block": network.get("transformer_depth", 1),
        "attention_head_dim": counts if len({*counts}) > 1 else counts[0],
    }


DIFFUSERS = unets.DIFFUSERS._replace(
    title="UNet2DConditionModel of diffusers",
    marks=("time_embedding.linear_1.weight", "mid_block.attentions.0.transformer_blocks.0.attn2.to_q.weight"),
    places=lambda network: [*unets.places(network), *SPATIAL_TRANSFORMER],
    class_name="UNet2DConditionModel",
    sizes=sizes,
    config=config,
    latent_scale=unets.latent_scale,
)
