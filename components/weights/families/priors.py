"""Priors from a text to the embedding of an image: PriorTransformer of diffusers, as in Karlo.

The sequence is ours: states of the text, its embedding, the time, the noised embedding and a query. Mean and deviation
of CLIP's embeddings stand beside the network there and are left out: its pipeline moves the sampled embedding by them,
as ours has embeddings of unit variance."""

from typing import Any

from torch import Tensor

from components.configuration.processes import DiscreteProcess
from components.weights.renaming import Arguments, WeightFamily, check_fixed, segments

FIXED = {"time_embed_act_fn": "silu", "norm_in_type": None, "embedding_proj_norm_type": None, "time_embed_dim": None}
FIXED |= {"encoder_hid_proj_type": "linear", "added_emb_type": "prd", "additional_embeddings": 4}
FIXED |= {"embedding_proj_dim": None, "clip_embed_dim": None}
NAMES = segments("""
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


def sizes(config: Arguments) -> dict[str, Any]:
    """Arguments of `DiffusionPrior` by a config.json.
    Raises ValueError for a field that our network can't follow."""
    check_fixed(config, FIXED)
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


def settings(config: Arguments) -> dict[str, Any]:
    """The process of Karlo's scheduler: the embedding is predicted, by a cosine of 1000 steps."""
    del config
    process = DiscreteProcess(schedule="cosine", prediction_type="sample", min_snr_gamma=None)
    return {"role": "diffusion_prior", "objective": process.objective()}


def without_batch(tensors: dict[str, Tensor], network: Arguments) -> dict[str, Tensor]:
    """Positions and query without dimensions of one."""
    del network
    return tensors | {name: tensors[name].squeeze(0).squeeze(0) for name in ("position_embedding", "query")}


DIFFUSERS = WeightFamily(
    "PriorTransformer of diffusers",
    kind="diffusion_prior",
    marks=("prd_embedding", "proj_to_clip_embeddings.weight", "transformer_blocks.0.attn1.to_q.weight"),
    names=NAMES,
    training_only=r"clip_(mean|std)$",
    adapted=without_batch,
    class_name="PriorTransformer",
    sizes=sizes,
    settings=settings,
)
