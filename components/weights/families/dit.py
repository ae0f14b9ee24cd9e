"""Diffusion transformers: facebookresearch/DiT, and DiTTransformer2DModel of diffusers.

Both were trained on latents of Stable Diffusion's autoencoder. Diffusers keeps a copy of the embeddings of time and
class in every block, and computes other frequencies of the time than the code that the weights were trained by
(`downscale_freq_shift` 1); ours are those of that code. Guidance moves three of the four channels, as in
`forward_with_cfg` of facebookresearch/DiT."""

from typing import Any

import torch
from torch import Tensor

from components.models.dit import grid_positions
from components.weights.families.unets import latent_scale
from components.weights.renaming import Arguments, Rules, WeightFamily, check_fixed, segments

FIXED = {"activation_fn": "gelu-approximate", "norm_type": "ada_norm_zero", "attention_bias": True}
FIXED |= {"norm_elementwise_affine": False}
OF_FACEBOOK = segments("""
    x_embedder.proj=patches
    t_embedder.mlp=time_mlp
    y_embedder.embedding_table=class_embedding
    pos_embed=positions attn.qkv=qkv
    attn.proj=proj mlp.fc1=expand
    mlp.fc2=contract
    final_layer.linear=linear_out
    final_layer.adaLN_modulation.1=modulation_out
    adaLN_modulation.1=modulation
""")
OF_DIFFUSERS: Rules = [
    (r"^transformer_blocks\.(\d+)\.norm1\.emb\.", r"copies.\1."),
    (r"^copies\.0\.", ""),
    *segments("""
        timestep_embedder.linear_1=time_mlp.0
        timestep_embedder.linear_2=time_mlp.2
        class_embedder.embedding_table=class_embedding
        transformer_blocks=blocks
        pos_embed.proj=patches
        pos_embed.pos_embed=positions
        norm1.linear=modulation
        attn1.to_q=qkv#0 attn1.to_k=qkv#1
        attn1.to_v=qkv#2 attn1.to_out.0=proj
        ff.net.0.proj=expand ff.net.2=contract
        proj_out_1=modulation_out
        proj_out_2=linear_out
    """),
]


def without_copies(tensors: dict[str, Tensor], network: Arguments) -> dict[str, Tensor]:
    """Leaves out equal copies, and positions that our network computes.
    Raises ValueError for copies that differ, or positions that were learned."""
    kept = dict(tensors)
    for name in [name for name in tensors if name.startswith("copies.")]:
        own = name.split(".", 2)[2]
        if own not in tensors or not torch.equal(kept.pop(name), tensors[own]):
            raise ValueError(f"each block has a {own} of its own: our network has one for all")
    if (positions := kept.pop("positions", None)) is not None:
        ours = grid_positions(network["resolution"] // network["patch_size"], dim=network["model_dim"])
        if positions[0].shape != ours.shape or not torch.allclose(positions[0].float(), ours, atol=1e-4):
            raise ValueError("its positions are not the sinusoids of DiT: another size, or learned")
    return kept


def diffusers_sizes(config: Arguments) -> dict[str, Any]:
    """Arguments of `DiT` by a config.json. Raises ValueError for a field that our network can't follow."""
    check_fixed(config, FIXED)
    channels, heads = config["in_channels"], config["num_attention_heads"]
    return {
        "resolution": config["sample_size"],
        "in_channels": channels,
        "out_channels": channels,
        "learned_variance": config["out_channels"] == 2 * channels,
        "patch_size": config["patch_size"],
        "model_dim": heads * config["attention_head_dim"],
        "num_layers": config["num_layers"],
        "num_heads": heads,
    }


FACEBOOK = WeightFamily(
    "DiT",
    kind="dit",
    marks=("x_embedder.proj.weight", "final_layer.linear.weight"),
    names=OF_FACEBOOK,
    adapted=without_copies,
    latent_scale=latent_scale,
    sampling={"guided_channels": 3},
)
DIFFUSERS = FACEBOOK._replace(
    title="DiTTransformer2DModel of diffusers",
    marks=("transformer_blocks.0.norm1.emb.timestep_embedder.linear_1.weight", "proj_out_1.weight"),
    names=OF_DIFFUSERS,
    class_name="DiTTransformer2DModel",
    sizes=diffusers_sizes,
)
