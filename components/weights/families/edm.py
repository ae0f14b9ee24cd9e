"""U-Nets of NVlabs/edm (Karras et al., 2022): the networks of ADM and DDPM++ under other names.

Blocks are named by the side of their maps, attention is part of its block, and what halves or doubles a map stands in
the level that it leads to. Projections of attention have rows (heads, d, 3). Classes are columns of a matrix, without
a null label; in DDPM++ they are times the root of their number and have a bias. The state of `EDMPrecond` is read;
NCSN++ (Fourier features of the time, another way down, wider filters) computes what our U-Net doesn't."""

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from components.weights.families import unets
from components.weights.renaming import Arguments, Rules, WeightFamily, segments

NAMES = segments("""
    map_layer0=time_mlp.0 map_layer1=time_mlp.2
    map_label=class_embedding out_norm=norm_out
    out_conv=conv_out norm0=0.norm_1 conv0=0.conv_1
    affine=0.embedding_projection norm1=0.norm_2
    conv1=0.conv_2 skip=0.skip norm2=1.norm
    qkv=1.qkv proj=1.proj
""")
CLASSES = "class_embedding.weight"
OF_PLUS_PLUS = r"^dec\.\d+x\d+_aux_(norm|conv)\."  # the end of DDPM++


def places(network: Arguments) -> Rules:
    """Rules of (side of the maps, part of the level) to our place, by the sizes of `network`."""
    blocks, last = network["num_res_blocks"], len(network["channel_mult"]) - 1
    attends = network["attention_resolutions"]

    def place(found: re.Match[str]) -> str:
        side, part, rest = int(found[2]), found[3], found[4]
        level = (network["resolution"] // side).bit_length() - 1
        first = (level if found[1] == "enc" else last - level) * (blocks + 1)  # in the list of our path
        if part == "conv":
            return f"conv_in.{rest}"
        if part.startswith("in"):
            return f"middle.{rest}" if part == "in0" else f"middle.2{rest[1:]}"
        if part.startswith("block"):
            return f"{'down' if found[1] == 'enc' else 'up'}.{first + int(part[5:])}.{rest}"
        if part == "down":
            return f"down.{first - 1}.{rest}"
        return f"up.{first - 1}.{1 + (side // 2 in attends)}{rest[1:]}"

    return [*NAMES, (r"^(enc|dec)\.(\d+)x\d+_(\w+)\.(.*)$", place)]


def in_our_order(tensors: dict[str, Tensor], network: Arguments) -> dict[str, Tensor]:
    """Rows of attention's projections with queries, keys and values outermost; a row for each class."""
    adapted = unets.in_our_order(tensors, network, rows="heads d part")
    if (table := tensors.get(CLASSES)) is not None:
        scale = math.sqrt(table.shape[1]) if "class_embedding.bias" in tensors else 1.0
        adapted[CLASSES] = table.T * scale + adapted.pop("class_embedding.bias", 0.0)
    return adapted


def seen(tensors: Mapping[str, Tensor], network: Arguments) -> dict[str, Any]:
    """No null label: a training that drops labels gives a vector of zeros."""
    del network
    return {"null_label": False} if "map_label.weight" in tensors else {}


ADM = WeightFamily(
    "ADM of EDM",
    kind=unets.OPENAI.kind,
    marks=("map_layer0.weight", "map_layer1.weight", "out_norm.weight", "out_conv.weight"),
    names=(),
    places=places,
    prefixes=("model.", ""),
    training_only=r"map_augment\.|.*resample_filter$",
    adapted=in_our_order,
    seen=seen,
)
DDPM_PLUS_PLUS = ADM._replace(
    title="DDPM++ of EDM",
    marks=("map_layer0.weight", "map_layer1.weight"),
    places=lambda network: [(OF_PLUS_PLUS, r"\1_out."), *places(network)],
)
