"""Transformers over image tokens: GPT of taming-transformers, iGPT and text prior of minDALL-E.

Taming's classes share the table of the codes, and class c is code c; the unconditional model begins with code 0. Codes
of another image, of depth or of segmentation, share it too, and stand before those of the image in one sequence. iGPT
has a table of classes, or one vector for all, which has no position. None knows a null label or a null code: ours gets
the mean of the classes, of the codes. The transformers by text and by another image have no class token: the last token
of text, most often a pad, or of the other image predicts the first of the image, and pads are tokens as others."""

import math

import torch
from torch import Tensor

from components.weights.renaming import Arguments, WeightFamily, segments

CLASSES = 1000  # of ImageNet, taming's only data; its shapes don't say


# minGPT's, with tables of their own
NAMES = segments("""
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


TAMING = WeightFamily(
    "transformer of taming-transformers",
    kind="transformer",
    marks=("tok_emb.weight", "pos_emb", "blocks.0.attn.query.weight"),
    names=NAMES,
    prefixes=("transformer.", ""),
    training_only=r".*\.attn\.mask$",
    adapted=of_taming,
)
IGPT = WeightFamily(
    "iGPT of minDALL-E",
    kind="transformer",
    marks=("tok_emb_img.weight", "pos_emb_img.weight", "blocks.0.attn.query.weight", "head.weight"),
    names=NAMES,
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
