"""Import of weights: a foreign file becomes a model artifact, keyed by its content.

The file is recognized by its names, the network is built by the stage of a recipe or by the file's own config.json,
every tensor is renamed and has to fit, and nothing is written before all of them do."""

import hashlib
import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from components.configuration.conditions import DatasetInfo, TokenGrid
from components.configuration.optimization import Training
from components.models.bundle import NETWORKS, ModelBundle, save_bundle
from components.runtime.storage.artifact import Artifact, commit_artifact, load_artifact, upload_attempt
from components.runtime.storage.connection import shown
from components.runtime.storage.store import SCRATCH, Store
from components.sampling.image_files import TextIds
from components.sampling.model import BPE
from components.weights.families import autoencoders, dit, glide, text_unets, token_transformers, unets
from components.weights.files import CONFIG, CaptionTokenizer, WeightsFile
from components.weights.renaming import Renamed, WeightFamily, fitted, rename

FAMILIES: tuple[WeightFamily, ...] = (
    glide.GLIDE,
    unets.OPENAI,
    unets.CLASSIFIER,
    unets.LATENT,
    text_unets.DIFFUSERS,  # before the other, whose marks it has too
    unets.DIFFUSERS,
    dit.FACEBOOK,
    dit.DIFFUSERS,
    autoencoders.TAMING,
    autoencoders.VQ,
    autoencoders.KL,
    token_transformers.TAMING,
    token_transformers.IGPT,
    token_transformers.MINDALLE,
)
STAGE, VERSION = "weights", 1  # of the artifact and of its key
CLASS_TABLES = ("class_embedding.weight", "pool.proj.weight")  # a row a class, and one for the null label
ONE_CLASS = DatasetInfo(num_classes=1)  # until the tables of the file are counted
KEY_LENGTH = 20  # hexadecimal digits, as of every stage


class Target(NamedTuple):
    """The stage of a recipe that takes the weights."""

    name: str  # adm_imagenet_256/base
    training: Training
    grid: TokenGrid | None = None  # of the tokens of a prior
    of_latents: bool = False  # whether the model learns the latents of an autoencoder
    sampling: Mapping[str, Any] = MappingProxyType({})  # of the stage, plain values


class Recognized(NamedTuple):
    """The tensors of a model in a file, by the names of its family."""

    family: WeightFamily
    tensors: dict[str, Tensor]
    left_out: int  # tensors of training, or of other models of the file


class Fitted(NamedTuple):
    """A network of ours, described, and tensors of a file under its names, which all fit."""

    recognized: Recognized
    kind: str  # a key of NETWORKS
    network: dict[str, Any]  # arguments of the constructor
    settings: dict[str, Any]  # for sampling
    tensors: dict[str, Tensor]


class Imported(NamedTuple):
    """A model made of a file, and counts of the file's tensors."""

    artifact: Artifact
    bundle: ModelBundle
    family: str
    read: int
    left_out: int


def import_weights(
    weights: WeightsFile, target: Target | None, *, out: Store, tokenizer: CaptionTokenizer | None = None
) -> Imported:
    """Commits the model to `out`, or adopts the model that is there by the same key.

    Args:
        target: None for a folder whose config.json says everything.
        tokenizer: of a model that reads captions itself.

    Raises ValueError as `fit`, and for an `out` that holds another model."""
    (family, own, left_out), kind, network, settings, tensors = fit(weights, target, tokenizer)
    settings["origin"] = {"uri": weights.uri, "sha256": weights.sha256, "family": family.title}
    settings["origin"] |= {} if weights.license is None else {"license": weights.license}
    module = NETWORKS[kind](**network)
    module.load_state_dict({name: fitted(tensors[name], to.shape) for name, to in module.state_dict().items()})
    bundle = ModelBundle(kind, network, settings, module.eval())
    return Imported(commit(bundle, weights, out, tokenizer), bundle, family.title, len(own), left_out)


def fit(weights: WeightsFile, target: Target | None, tokenizer: CaptionTokenizer | None = None) -> Fitted:
    """Recognizes a file, and gives its tensors the names of the target's network; builds no network.
    Raises ValueError, in one line, for a file of no known family or of another than the target takes, and for tensors
    that are missing, too many or of other shapes."""
    recognized = recognize(weights, target)
    family, kind = recognized.family, recognized.family.kinds[0]
    try:
        network, settings = described(recognized, weights, target, tokenizer)
        network |= {} if family.seen is None else family.seen(recognized.tensors, network)
        renamed = rename(recognized.tensors, family.rules(network))
        if family.adapted is not None:
            renamed = renamed._replace(tensors=family.adapted(renamed.tensors, network))
        network |= counted_classes(kind, network, renamed.tensors)
        with torch.device("meta"):
            check(NETWORKS[kind](**network).state_dict(), renamed, CONFIG if target is None else target.name)
    except ValueError as error:
        raise ValueError(f"{weights.uri}: {error}") from None
    return Fitted(recognized, kind, network, settings, renamed.tensors)


def recognize(weights: WeightsFile, target: Target | None) -> Recognized:
    """The family of a file, and the tensors of the model that the target takes.
    Raises ValueError for a file of no known family, or for one with no such model."""
    named, found = weights.config.get("_class_name"), list[tuple[WeightFamily, str]]()
    for family in FAMILIES:
        for prefix in family.prefixes:
            known = named in (None, family.class_name)
            if known and all(prefix + mark in weights.tensors for mark in family.marks):
                found.append((family, prefix))
    if not found:
        what = f"names as {', '.join([*weights.tensors][:2])}" if named is None else f"a {named}"
        raise ValueError(f"{weights.uri} holds {what}, of no family known here: {', '.join(f.title for f in FAMILIES)}")
    kind = None if target is None else target.training.network.kind
    fitting = [(family, prefix) for family, prefix in found if kind is None or kind in family.kinds]
    if target is not None and not fitting:
        titles = " and ".join(dict.fromkeys(family.title for family, _ in found))
        raise ValueError(f"{weights.uri} is of the {titles}, but {target.name} takes a network {kind}: name its stage")
    family, prefix = fitting[0]
    own = {name.removeprefix(prefix): tensor for name, tensor in weights.tensors.items() if name.startswith(prefix)}
    own = {name: tensor for name, tensor in own.items() if re.match(family.training_only, name) is None}
    if family.average is not None:
        own = {name: weights.tensors.get(family.average(name), tensor) for name, tensor in own.items()}
    own |= {name: weights.tensors[place] for place, name in family.outside.items() if place in weights.tensors}
    return Recognized(family, own, len(weights.tensors) - len(own))


def described(
    recognized: Recognized, weights: WeightsFile, target: Target | None, tokenizer: CaptionTokenizer | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of the network, and settings for sampling: sizes by config.json, all else by the target.
    Raises ValueError where neither says enough, or the two disagree."""
    family = recognized.family
    sizes = family.sizes(weights.config) if family.sizes is not None and weights.config else {}
    if target is None:
        if family.settings is None or not sizes:
            raise ValueError(f"nothing says how the {family.title} was trained: name a stage, --as RECIPE/STAGE")
        return sizes, family.settings(weights.config)
    training, grid = target.training, target.grid
    info, special = read_captions(recognized, target, tokenizer)
    arguments, settings = training.network_arguments(info, grid), training.settings((), grid)
    if special is not None:
        settings["text_ids"] = special._asdict()
        if "text" in arguments:
            arguments["text"]["pad_id"] = special.pad
    variance = arguments.get("learned_variance")
    if sizes.get("learned_variance", variance) != variance:
        raise ValueError(f"{CONFIG} and {target.name} disagree on whether a variance is predicted")
    if "resolution" in sizes:
        settings["resolution"] = sizes["resolution"]
    if target.of_latents:
        if family.latent_scale is None:
            raise ValueError(f"{target.name} is of latents, whose scale no {family.title} says")
        settings["latent_scale"] = family.latent_scale(arguments | sizes)
    if sampling := {**target.sampling, **family.sampling}:
        settings["sampling"] = sampling
    before = training.network.before()  # such values are not written, so that keys stay
    merged = (arguments | sizes).items()
    return {name: value for name, value in merged if name not in before or value != before[name]}, settings


def read_captions(
    recognized: Recognized, target: Target, tokenizer: CaptionTokenizer | None
) -> tuple[DatasetInfo, TextIds | None]:
    """Sizes of a file's tables of text, and ids around a caption; ONE_CLASS and None without text.
    Raises ValueError for a tokenizer that is missing, not asked for, or of another vocabulary."""
    family = recognized.family
    if not target.training.needs().captions or family.text_tables is None:
        if target.training.needs().captions:
            raise ValueError(f"{target.name} reads captions, and no {family.title} does: name another stage")
        if tokenizer is not None:
            raise ValueError(f"{target.name} reads no captions itself: leave --tokenizer out")
        return ONE_CLASS, None
    if tokenizer is None:
        raise ValueError(f"{target.name} reads captions: give the tokenizer of this model, --tokenizer FILE")
    words, places = (len(recognized.tensors[name]) for name in family.text_tables)
    pad = tokenizer.bpe.token_to_id(family.pad)
    largest = max(tokenizer.bpe.get_vocab().values())
    if pad is None or largest >= words:
        fault = f"no word {family.pad}" if pad is None else f"a word {largest} where the model has {words}"
        raise ValueError(f"{tokenizer.uri} has {fault}: it is not the tokenizer of this {family.title}")
    return DatasetInfo(num_classes=1, vocab_size=words, text_length=places), TextIds(None, None, pad)


def counted_classes(kind: str, arguments: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The argument `num_classes` by the rows of the file's table; none for a network without classes."""
    if arguments.get("num_classes") is None:
        return {}
    with torch.device("meta"):
        own = NETWORKS[kind](**arguments).state_dict()
    known = arguments["num_classes"]
    more = [len(tensors[name]) - len(own[name]) for name in CLASS_TABLES if name in own and name in tensors]
    return {"num_classes": max(1, known + more[0])} if more else {}


def check(own: Mapping[str, Tensor], renamed: Renamed, taker: str) -> None:
    """Compare the tensors with those of our network.
    Raises ValueError, which names the first that does not fit."""
    tensors, origins = renamed
    unused = [name for name in tensors if name not in own]
    missing = [name for name in own if name not in tensors]
    others = [
        name for name in tensors if name in own and fitted(tensors[name], own[name].shape).shape != own[name].shape
    ]
    if unused:
        raise ValueError(f"{len(unused)} tensors have no place in {taker}, first {origins.get(unused[0], unused[0])}")
    if missing:
        raise ValueError(f"{len(missing)} tensors of {taker} are missing, first {missing[0]}")
    if others:
        first, sizes = others[0], [list(tensors[others[0]].shape), list(own[others[0]].shape)]
        where = f"first {origins.get(first, first)}: {sizes[0]}, not {sizes[1]}"
        raise ValueError(f"{len(others)} tensors have other shapes than in {taker}, {where}")


def commit(bundle: ModelBundle, weights: WeightsFile, out: Store, tokenizer: CaptionTokenizer | None) -> Artifact:
    """Write the model to `out` as an artifact, keyed by sha256s of files, network and settings.
    Raises ValueError if `out` holds another artifact."""
    settings = {name: value for name, value in bundle.settings.items() if name != "origin"}
    identity = {"stage": STAGE, "version": VERSION, "file": weights.sha256, "kind": bundle.kind}
    identity |= {"network": bundle.network, "settings": settings}
    content = None if tokenizer is None else tokenizer.bpe.to_str()
    identity |= {} if content is None else {"tokenizer": hashlib.sha256(content.encode()).hexdigest()}
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:KEY_LENGTH]
    before = load_artifact(out)
    if before is not None and before.key != key:
        raise ValueError(f"{shown(out.uri)} holds another model, {before.identity}: name a new folder")
    if before is not None:
        return before
    with tempfile.TemporaryDirectory(prefix=f"{SCRATCH}weights-") as folder:
        save_bundle(Path(folder), bundle)
        if content is not None:
            (Path(folder) / BPE).write_text(content)
        entries = upload_attempt(out, Path(folder))
    provenance = {"origin": bundle.settings["origin"]}
    return commit_artifact(
        out, Artifact(kind="model", stage=STAGE, key=key, files=tuple(entries), provenance=provenance)
    )
