"""Transformers over image tokens: GPT of taming-transformers, iGPT and text prior of minDALL-E.

Taming's classes share the table of the codes, and class c is code c; the unconditional model begins with code 0. iGPT
has a table of classes, or one vector for all, which has no position. Neither knows a null label: ours gets the mean of
the classes. The transformer by text has no class token: its last token of text, most often a pad, predicts the first of
the image, and pads are tokens as others."""

import torch
from torch import Tensor

from components.weights.renaming import Arguments, Rules, WeightFamily

CLASSES = 1000  # of ImageNet, the only data of taming's class-conditional model; its shapes don't say


def rules(network: Arguments) -> Rules:
    """Names of both: minGPT's, with tables of their own."""
    del network
    return [
        (r"^tok_emb(_img)?\.", "token_embedding."),
        (r"^pos_emb(_img\.weight)?$", "position"),
        (r"^sos(\.weight)?$", "class_embedding.weight"),
        (r"^tok_emb_txt\.", "text_embedding."),
        (r"^pos_emb_txt\.weight$", "text_position"),
        (r"^head_img\.", "head."),
        (r"^head_txt\.", "text_head."),
        (r"^ln_f\.", "norm_out."),
        (r"\.ln([12])\.", r".norm_\1."),
        (r"\.attn\.query\.", ".attention.qkv#0."),
        (r"\.attn\.key\.", ".attention.qkv#1."),
        (r"\.attn\.value\.", ".attention.qkv#2."),
        (r"\.attn\.proj\.", ".attention.proj."),
        (r"\.mlp\.0\.", ".expand."),
        (r"\.mlp\.2\.", ".contract."),
    ]


def of_taming(tensors: dict[str, Tensor], network: Arguments) -> dict[str, Tensor]:
    """The table of classes from that of the codes; positions without their first dimension."""
    codes = tensors["token_embedding.weight"]
    rows = codes[:CLASSES] if network["num_classes"] is not None else codes[:1]
    adapted = tensors | {"position": tensors["position"][0]}
    return adapted | {"class_embedding.weight": with_null(rows, network)}


def of_igpt(tensors: dict[str, Tensor], network: Arguments) -> dict[str, Tensor]:
    """Positions moved by a place: ours stand at the input that predicts a token, theirs at the token."""
    positions, rows = tensors["position"], tensors["class_embedding.weight"].flatten(0, -2)
    moved = torch.cat([torch.zeros_like(positions[:1]), positions[:-1]])
    return tensors | {"position": moved, "class_embedding.weight": with_null(rows, network)}


def of_mindalle(tensors: dict[str, Tensor], network: Arguments) -> dict[str, Tensor]:
    """Positions without that of the last token, which predicts nothing."""
    del network
    return tensors | {"position": tensors["position"][:-1]}


def with_null(rows: Tensor, network: Arguments) -> Tensor:
    """The table of classes (K, D) with a null label at the end; a start token (1, D) is the null label."""
    return (
        rows if network["num_classes"] is None else torch.cat([rows, rows.float().mean(0, keepdim=True).to(rows.dtype)])
    )


TAMING = WeightFamily(
    "transformer of taming-transformers",
    kinds=("transformer",),
    marks=("tok_emb.weight", "pos_emb", "blocks.0.attn.query.weight"),
    rules=rules,
    prefixes=("transformer.", ""),
    training_only=r".*\.attn\.mask$",
    adapted=of_taming,
)
IGPT = WeightFamily(
    "iGPT of minDALL-E",
    kinds=("transformer",),
    marks=("tok_emb_img.weight", "pos_emb_img.weight", "blocks.0.attn.query.weight", "head.weight"),
    rules=rules,
    prefixes=("", "stage2."),
    adapted=of_igpt,
)
MINDALLE = WeightFamily(
    "transformer by text of minDALL-E",
    kinds=("transformer",),
    marks=("tok_emb_img.weight", "tok_emb_txt.weight", "blocks.0.attn.query.weight", "head_img.weight"),
    rules=rules,
    prefixes=("", "stage2."),
    adapted=of_mindalle,
    text_tables=("tok_emb_txt.weight", "pos_emb_txt.weight"),
    pad="[PAD]",
)
