"""Transformers: diffusion transformers, priors of embeddings, and transformers over image tokens.

DiT, of facebookresearch/DiT and as DiTTransformer2DModel of diffusers, was trained on latents of Stable Diffusion's
autoencoder. Diffusers keeps a copy of the embeddings of time and class in every block, and computes other frequencies
of the time than the code that the weights were trained by (`downscale_freq_shift` 1); ours are those of that code.
Guidance moves three of the four channels, as in `forward_with_cfg` of facebookresearch/DiT.

PriorTransformer of diffusers, as in Karlo, makes the embedding of an image of a text. The sequence is ours: states of
the text, its embedding, the time, the noised embedding and a query. Mean and deviation of CLIP's embeddings stand
beside the network there and are left out: its pipeline moves the sampled embedding by them, as ours has embeddings of
unit variance.

Over tokens stand GPT of taming-transformers, iGPT and text prior of minDALL-E. Taming's classes share the table of the
codes, and class c is code c; the unconditional model begins with code 0. Codes of another image, of depth or of
segmentation, share it too, and stand before those of the image in one sequence. iGPT has a table of classes, or one
vector for all, which has no position. None knows a null label or a null code: ours gets the mean of the classes, of the
codes. The transformers by text and by another image have no class token: the last token of text, most often a pad, or
of the other image predicts the first of the image, and pads are tokens as others."""

import math
from typing import Any

import torch
from torch import Tensor

from components.configuration.diffusion import DiscreteProcess
from components.models.dit import grid_positions
from components.weights.families.unets import latent_scale
from components.weights.renaming import Arguments, Rules, WeightFamily, segments

CLASSES = 1000  # of ImageNet, taming's only data; its shapes don't say
FIXED_OF_DIT = {"activation_fn": "gelu-approximate", "norm_type": "ada_norm_zero", "attention_bias": True}
FIXED_OF_DIT |= {"norm_elementwise_affine": False}
FIXED_OF_KARLO = {"time_embed_act_fn": "silu", "encoder_hid_proj_type": "linear", "added_emb_type": "prd"}
FIXED_OF_KARLO |= {"additional_embeddings": 4, "norm_in_type": None, "embedding_proj_norm_type": None}
FIXED_OF_KARLO |= {"time_embed_dim": None, "embedding_proj_dim": None, "clip_embed_dim": None}
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
OF_DIT_TRANSFORMER: Rules = [
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
OF_KARLO = segments("""
    time_embedding.linear_1=time_mlp.0
    time_embedding.linear_2=time_mlp.2
    proj_in=image_in embedding_proj=text_in
    encoder_hidden_states_proj=states_in
    positional_embedding=position_embedding
    prd_embedding=query norm_out=norm
    transformer_blocks=blocks norm1=norm_1
    norm3=norm_2 attn1.to_q=attention.qkv#0
    attn1.to_k=attention.qkv#1
    attn1.to_v=attention.qkv#2
    attn1.to_out.0=attention.proj
    ff.net.0.proj=expand ff.net.2=contract
    proj_to_clip_embeddings=image_out
""")
# minGPT's, with tables of their own
OF_GPT = segments("""
    tok_emb=token_embedding
    tok_emb_img=token_embedding
    tok_emb_txt=text_embedding
    pos_emb=position
    pos_emb_img.weight=position
    pos_emb_txt.weight=text_position
    sos.weight=sos sos=class_embedding.weight
    head_img=head head_txt=text_head
    ln_f=norm_out ln1=norm_1 ln2=norm_2
    attn.query=attention.qkv#0
    attn.key=attention.qkv#1
    attn.value=attention.qkv#2
    attn.proj=attention.proj mlp.0=expand
    mlp.2=contract
""")


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


def dit_sizes(config: Arguments) -> dict[str, Any]:
    """Arguments of `DiT` by a config.json."""
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


def prior_sizes(config: Arguments) -> dict[str, Any]:
    """Arguments of `DiffusionPrior` by a config.json."""
    heads = config["num_attention_heads"]
    return {
        "embedding_dim": config["embedding_dim"],
        "text_length": config["num_embeddings"],
        "text_dim": config["embedding_dim"],
        "model_dim": heads * config["attention_head_dim"],
        "num_layers": config["num_layers"],
        "num_heads": heads,
        "dropout": config["dropout"],
    }


def prior_settings(config: Arguments) -> dict[str, Any]:
    """The process of Karlo's scheduler: the embedding is predicted, by a cosine of 1000 steps."""
    del config
    process = DiscreteProcess(schedule="cosine", prediction_type="sample", min_snr_gamma=None)
    return {"role": "diffusion_prior", "objective": process.objective()}


def without_batch(tensors: dict[str, Tensor], network: Arguments) -> dict[str, Tensor]:
    """Positions and query without dimensions of one."""
    del network
    return tensors | {name: tensors[name].squeeze(0).squeeze(0) for name in ("position_embedding", "query")}


def of_taming(tensors: dict[str, Tensor], network: Arguments) -> dict[str, Tensor]:
    """Tables of classes, or of codes of another image, from the table of codes; positions of each part."""
    codes, positions = tensors["token_embedding.weight"], tensors["position"][0]
    if network.get("condition_grid"):  # the input of the last position predicts nothing
        rows = codes[: network["condition_codebook_size"]]
        places = math.prod(network["condition_grid"])
        end = places + network["num_tokens"] - 1
        return tensors | {
            "condition_embedding.weight": and_mean(rows),
            "condition_position": positions[:places],
            "position": positions[places:end],
        }
    rows = codes[:CLASSES] if network["num_classes"] is not None else codes[:1]
    return tensors | {"position": positions, "class_embedding.weight": with_null(rows, network)}


def of_igpt(tensors: dict[str, Tensor], network: Arguments) -> dict[str, Tensor]:
    """Positions moved by a place: ours stand at the input that predicts a token, theirs at the token."""
    positions, rows = tensors["position"], tensors["class_embedding.weight"].flatten(0, -2)
    moved = torch.cat([torch.zeros_like(positions[:1]), positions[:-1]])
    return tensors | {"position": moved, "class_embedding.weight": with_null(rows, network)}


def with_null(rows: Tensor, network: Arguments) -> Tensor:
    """The table of classes (K, D) with a null label at the end; a start token (1, D) is the null label."""
    return rows if network["num_classes"] is None else and_mean(rows)


def and_mean(rows: Tensor) -> Tensor:
    """Rows (K, D) with their mean at the end."""
    return torch.cat([rows, rows.float().mean(0, keepdim=True).to(rows.dtype)])


DIT = WeightFamily(
    "DiT",
    kind="dit",
    marks=("x_embedder.proj.weight", "final_layer.linear.weight"),
    names=OF_FACEBOOK,
    adapted=without_copies,
    latent_scale=latent_scale,
    sampling={"guided_channels": 3},
)
DIT_TRANSFORMER = DIT._replace(
    title="DiTTransformer2DModel of diffusers",
    marks=("transformer_blocks.0.norm1.emb.timestep_embedder.linear_1.weight", "proj_out_1.weight"),
    names=OF_DIT_TRANSFORMER,
    class_name="DiTTransformer2DModel",
    fixed=FIXED_OF_DIT,
    sizes=dit_sizes,
)
KARLO = WeightFamily(
    "PriorTransformer of diffusers",
    kind="diffusion_prior",
    marks=("prd_embedding", "proj_to_clip_embeddings.weight", "transformer_blocks.0.attn1.to_q.weight"),
    names=OF_KARLO,
    training_only=r"clip_(mean|std)$",
    adapted=without_batch,
    class_name="PriorTransformer",
    fixed=FIXED_OF_KARLO,
    sizes=prior_sizes,
    settings=prior_settings,
)
TAMING = WeightFamily(
    "transformer of taming-transformers",
    kind="transformer",
    marks=("tok_emb.weight", "pos_emb", "blocks.0.attn.query.weight"),
    names=OF_GPT,
    prefixes=("transformer.", ""),
    training_only=r".*\.attn\.mask$",
    adapted=of_taming,
)
IGPT = WeightFamily(
    "iGPT of minDALL-E",
    kind="transformer",
    marks=("tok_emb_img.weight", "pos_emb_img.weight", "blocks.0.attn.query.weight", "head.weight"),
    names=OF_GPT,
    prefixes=("", "stage2."),
    adapted=of_igpt,
)
MINDALLE = IGPT._replace(
    title="transformer by text of minDALL-E",
    marks=("tok_emb_img.weight", "tok_emb_txt.weight", "blocks.0.attn.query.weight", "head_img.weight"),
    adapted=lambda tensors, network: tensors | {"position": tensors["position"][:-1]},  # the last predicts nothing
    text_tables=("tok_emb_txt.weight", "pos_emb_txt.weight"),
    pad="[PAD]",
)
