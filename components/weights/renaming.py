"""Families of foreign weights, and renaming of tensors to the names of our networks."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Arguments = Mapping[str, Any]  # of the constructor of our network
Rules = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]  # in order
PART = re.compile(r"#\d")  # in a new name: which of several tensors that are one in our network


class WeightFamily(NamedTuple):
    """A layout of weights: the names that it is known by, and the names in our network."""

    title: str
    kind: str  # of our network, a key of `components.models.bundle.NETWORKS`
    marks: tuple[str, ...]  # names that every file of the family holds, after a prefix
    names: Rules
    places: Callable[[Arguments], Rules] | None = None  # by sizes of our network; applied first
    prefixes: tuple[str, ...] = ("",)  # of the part of a file with several models
    training_only: str = r"(?!)"  # pattern of names that only training needs
    adapted: Callable[[dict[str, Tensor], Arguments], dict[str, Tensor]] | None = None  # after renaming
    class_name: str = ""  # in the config.json of diffusers
    fixed: Arguments = MappingProxyType({})  # fields of it that our network has no argument for, as we know them
    sizes: Callable[[Arguments], dict[str, Any]] | None = None  # our arguments by it
    seen: Callable[[Mapping[str, Tensor], Arguments], dict[str, Any]] | None = None  # arguments by names
    settings: Callable[[Arguments], dict[str, Any]] | None = None  # for sampling, by config.json
    config: Callable[[Arguments, nn.Module], dict[str, Any]] | None = None  # config.json of a network of ours
    latent_scale: Callable[[Arguments], float] | None = None  # of its models' latents
    sampling: Mapping[str, Any] = MappingProxyType({})  # that its code samples by
    text_tables: tuple[str, str] | None = None  # of words and places, where it reads captions
    pad: str = ""  # the word that its texts are padded with
    average: Callable[[str], str] | None = None  # name -> name of the moving average in the file
    outside: Mapping[str, str] = MappingProxyType({})  # names in the file -> names in the model

    def rules(self, network: Arguments) -> Rules:
        """All rules for a network of these arguments, in order."""
        return [*(self.places(network) if self.places else ()), *self.names]


class Renamed(NamedTuple):
    """Tensors under our names, and the foreign name that stands for each in messages."""

    tensors: dict[str, Tensor]
    origins: dict[str, str]


def segments(pairs: str) -> Rules:
    """Rules of whole segments of a name: `to_out.0=proj to_q=q` makes `x.proj.bias` of `x.to_out.0.bias`."""
    split = (pair.split("=") for pair in pairs.split())
    return [(rf"(?<![^.]){re.escape(theirs)}(?![^.])", ours) for theirs, ours in split]


# Names in blocks of diffusers, those of attention before version 0.18 too.
DIFFUSERS_BLOCKS = segments("""
    mid_block.resnets.0=middle.0
    mid_block.attentions.0=middle.1
    mid_block.resnets.1=middle.2
    conv_norm_out=norm_out norm1=norm_1
    norm2=norm_2 conv1=conv_1 conv2=conv_2
    conv_shortcut=skip group_norm=norm
    to_q=qkv#0 query=qkv#0 to_k=qkv#1
    key=qkv#1 to_v=qkv#2 value=qkv#2
    to_out.0=proj proj_attn=proj
""")
# Names in a spatial transformer, of latent diffusion and of diffusers.
SPATIAL_TRANSFORMER = segments("""
    transformer_blocks=blocks norm1=norm_1
    norm2=norm_2 norm3=norm_3
    attn1=self_attention attn2=cross_attention
    to_q=q to_k=kv#0 to_v=kv#1 to_out.0=proj
    ff.net.0.proj=expand ff.net.2=contract
""")


def new_name(origin: str, rules: Rules) -> str:
    """Our name of a foreign tensor, with its part where ours joins several; unchanged if no rule knows it."""
    for pattern, replacement in rules:
        origin = re.sub(pattern, replacement, origin)
    return origin


def rename(tensors: Mapping[str, Tensor], rules: Rules) -> Renamed:
    """Applies all rules to each name; parts `name#0.weight`, `name#1.weight` are joined along dimension 0.
    A name that no rule knows stays as it is."""
    parts: dict[str, dict[str, str]] = {}  # our name -> name with its part -> foreign name
    for origin in tensors:
        name = new_name(origin, rules)
        parts.setdefault(PART.sub("", name), {})[name] = origin
    origins = {name: next(iter(own.values())) for name, own in parts.items()}
    joined = {name: tensors[origin] for name, origin in origins.items()}
    joined |= {
        name: torch.cat([tensors[own[part]] for part in sorted(own)]) for name, own in parts.items() if len(own) > 1
    }
    return Renamed(joined, origins)


def indices(names: Iterable[str], pattern: str) -> set[tuple[int, ...]]:
    """The numbers that a pattern's groups find at the beginning of names."""
    return {tuple(map(int, found.groups())) for name in names if (found := re.match(pattern, name))}


def fitted(tensor: Tensor, shape: torch.Size) -> Tensor:
    """The tensor in `shape`, where only ones at the end differ: a kernel of one pixel is a matrix."""
    own, wanted = list(tensor.shape), list(shape)
    for sizes in (own, wanted):
        while len(sizes) > 1 and sizes[-1] == 1:
            sizes.pop()
    return tensor.reshape(shape) if own == wanted else tensor


def check_fixed(config: Arguments, fixed: Arguments) -> None:
    """Raise ValueError for a field of a config.json with a value that our network lacks."""
    for name, known in fixed.items():
        if name in config and config[name] != known:
            raise ValueError(f"config.json has {name} {config[name]!r}: our network knows {known!r} alone")


def norm_groups_of(network: nn.Module) -> int:
    """Groups of all group norms. Raises ValueError if they differ: diffusers has one number for all."""
    found = sorted({norm.num_groups for norm in network.modules() if isinstance(norm, nn.GroupNorm)})
    refuse_trait(len(found) > 1, f"its group norms have {', '.join(map(str, found))} groups; train with norm_groups")
    return found[0]


def refuse_trait(present: object, trait: str) -> None:
    """Raise ValueError for a trait of our network that a class of diffusers lacks."""
    if present:
        raise ValueError(f"{trait}: no class of diffusers computes that; take --as pt2 or onnx")


def whole_factor(channels: int, base: int) -> int | float:
    """Channels of a level in units of the first, an int where it is one."""
    return channels // base if channels % base == 0 else channels / base
