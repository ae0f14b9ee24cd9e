"""Import of weights: a foreign file becomes a model artifact, keyed by its content.

The file is recognized by its names, the network is built by the stage of a recipe or by the file's own config.json,
every tensor is renamed and has to fit, and nothing is written before all of them do."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from components.configuration.conditions import DatasetInfo, TokenGrid
from components.configuration.optimization import Training
from components.configuration.sampling import SamplingConfig
from components.models.bundle import NETWORKS, ModelBundle, save_bundle
from components.runtime.storage.artifact import Artifact, commit_artifact, load_artifact, upload_attempt
from components.runtime.storage.connection import shown
from components.runtime.storage.scratch import scratch_folder
from components.runtime.storage.store import Store, digest_of
from components.sampling.cascade import compose
from components.sampling.image_files import TextIds
from components.sampling.model import BPE
from components.weights.families import autoencoders, edm, transformers, unets
from components.weights.files import CONFIG, CaptionTokenizer, WeightsFile
from components.weights.renaming import Renamed, WeightFamily, check_fixed, fitted, rename

FAMILIES: tuple[WeightFamily, ...] = (
    unets.GLIDE,
    unets.OPENAI,
    unets.CLASSIFIER,
    unets.LATENT,
    edm.ADM,
    edm.DDPM_PLUS_PLUS,  # after the other, whose marks it lacks
    unets.BY_TEXT,  # before the other, whose marks it has too
    unets.DIFFUSERS,
    transformers.KARLO,
    transformers.DIT,
    transformers.DIT_TRANSFORMER,
    autoencoders.TAMING,
    autoencoders.LLAMAGEN,
    autoencoders.VQ,
    autoencoders.KL,
    transformers.TAMING,
    transformers.IGPT,
    transformers.MINDALLE,
)
OWN = "model of image-cascade"  # a family of its own: nothing is renamed
WHOLE = "models of one checkpoint"
STAGE, VERSION = "weights", 1  # of the artifact and of its key
CLASS_TABLES = ("class_embedding.weight", "pool.proj.weight")  # a row a class, and one for the null label
KEY_LENGTH = 20  # hexadecimal digits, as of every stage


class Target(NamedTuple):
    """The stage of a recipe that takes the weights."""

    name: str  # adm_imagenet_256/base
    training: Training
    grid: TokenGrid | None = None  # of the tokens of a prior
    of_latents: bool = False  # whether the model learns the latents of an autoencoder
    sampling: Mapping[str, Any] = MappingProxyType({})  # of the stage, plain values
    condition: TokenGrid | None = None  # of the tokens of another image, for a prior that sees one

    @property
    def inside(self) -> str:
        """Prefix of the tensors in a file of several models of a kind; empty where the kind says enough."""
        stage = self.name.rpartition("/")[2]
        return autoencoders.CONDITION if stage == "condition_tokenizer" else ""


class Recognized(NamedTuple):
    """The tensors of a model in a file, by the names of its family."""

    family: WeightFamily
    tensors: dict[str, Tensor]
    left_out: int  # tensors of training, or of other models of the file


class Fitted(NamedTuple):
    """A network of ours, described, and tensors of a file under its names, which all fit."""

    recognized: Recognized
    network: dict[str, Any]  # arguments of the constructor
    settings: dict[str, Any]  # for sampling
    tensors: dict[str, Tensor]


class Imported(NamedTuple):
    """A model made of a file."""

    artifact: Artifact
    bundle: ModelBundle
    recognized: Recognized


def import_weights(
    weights: WeightsFile, target: Target | None, *, out: Store, tokenizer: CaptionTokenizer | None = None
) -> Imported:
    """Commits the model to `out`, or adopts the model that is there by the same key.
    There is no target for a folder whose config.json says everything; a tokenizer is of a model that reads captions
    itself. Raises ValueError as `fit`, and for an `out` that holds another model."""
    fitting = fit(weights, target, tokenizer)
    bundle = bundle_of(weights, fitting)
    identity = {"file": weights.sha256, **facts_of(bundle)}
    identity |= {} if tokenizer is None else {"tokenizer": tokenizer.sha256}

    def fill(folder: Path) -> None:
        save_bundle(folder, bundle)
        if tokenizer is not None:
            (folder / BPE).write_text(tokenizer.content)

    artifact = commit(out, identity, {"origin": bundle.settings["origin"]}, fill)
    return Imported(artifact, bundle, fitting.recognized)


def facts_of(bundle: ModelBundle) -> dict[str, Any]:
    """Kind, network and settings of a model, for its key, without the place of its file."""
    kind, network, settings, _ = bundle
    own = {name: value for name, value in settings.items() if name != "origin"}
    return {"kind": kind, "network": network, "settings": own}


def import_parts(
    weights: WeightsFile,
    targets: Mapping[str, Target],
    sampling: SamplingConfig,
    *,
    out: Store,
    tokenizer: CaptionTokenizer | None = None,
) -> tuple[Artifact, dict[str, Recognized]]:
    """Commits the models of one file, by their parts of a cascade, to `out`, composed.
    Returns what was recognized of each part too. Raises ValueError as `fit`, for the first part that does not fit, and
    for an `out` that holds another model."""
    reading = [name for name, target in targets.items() if target.training.needs().captions]
    if tokenizer is not None and not reading:
        raise ValueError(f"no model of {', '.join(targets)} reads captions itself: leave --tokenizer out")
    fitting = {name: fit(weights, target, tokenizer if name in reading else None) for name, target in targets.items()}
    bundles = {name: bundle_of(weights, each) for name, each in fitting.items()}

    def fill(folder: Path) -> None:
        with scratch_folder("parts") as home:
            places: dict[str, Any] = {}
            for name, bundle in bundles.items():
                places[name] = home / name
                save_bundle(places[name], bundle)
                if tokenizer is not None and name in reading:
                    (places[name] / BPE).write_text(tokenizer.content)
            compose(folder, sampling=sampling.by_model(), precision=sampling.precision, **places)

    identity = {
        "file": weights.sha256,
        "parts": {name: facts_of(bundle) for name, bundle in bundles.items()},
        "sampling": sampling.model_dump(mode="json"),
    }
    identity |= {} if tokenizer is None else {"tokenizer": tokenizer.sha256}
    artifact = commit(out, identity, {"origin": weights.origin(WHOLE)}, fill)
    return artifact, {name: each.recognized for name, each in fitting.items()}


def import_own(folder: Path, uri: str, before: Artifact | None, *, out: Store) -> Artifact:
    """Commits a copy of a model of ours in `folder`, alone or a cascade, to `out`, keyed by its files.
    `before`: its artifact at `uri`, if it is one: what is known of the model stays, its origin too. Raises ValueError
    for an `out` that holds another model."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files = {name: digest_of(path).sha256 for name, path in paths.items()}
    content = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    origin = {"uri": shown(uri), "sha256": content, "family": OWN if before is None else f"{OWN}, {before.identity}"}
    known = {} if before is None else before.provenance
    fill = partial(shutil.copytree, folder, dirs_exist_ok=True)
    return commit(out, {"files": files}, {"origin": origin, **known}, fill)


def bundle_of(weights: WeightsFile, fitting: Fitted) -> ModelBundle:
    """The model with the tensors of the file, in evaluation mode; `origin` in its settings is the file."""
    (family, *_), network, settings, tensors = fitting
    settings["origin"] = weights.origin(family.title)
    module = NETWORKS[family.kind](**network)
    module.load_state_dict({name: fitted(tensors[name], to.shape) for name, to in module.state_dict().items()})
    return ModelBundle(family.kind, network, settings, module.eval())


def fit(weights: WeightsFile, target: Target | None, tokenizer: CaptionTokenizer | None = None) -> Fitted:
    """Recognizes a file, and gives its tensors the names of the target's network; builds no network.
    Raises ValueError, in one line, for a file of no known family or of another than the target takes, and for tensors
    that are missing, too many or of other shapes."""
    recognized, taker = recognize(weights, target), CONFIG if target is None else target.name
    try:
        network, settings = described(recognized, weights, target, tokenizer)
        return named(recognized, network, settings, taker)
    except ValueError as error:
        raise ValueError(f"{weights.uri}: {error}") from None
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{weights.uri}: its config.json is not whole: {error!r}") from None


def named(recognized: Recognized, network: dict[str, Any], settings: dict[str, Any], taker: str) -> Fitted:
    """The tensors under the names of a network of these arguments, but for what they tell themselves.
    Raises ValueError, in one line, for tensors that are missing, too many or of other shapes than the `taker` has."""
    family, kind = recognized.family, recognized.family.kind
    network |= {} if family.seen is None else family.seen(recognized.tensors, network)
    renamed = rename(recognized.tensors, family.rules(network))
    if family.adapted is not None:
        renamed = renamed._replace(tensors=family.adapted(renamed.tensors, network))
    own, tensors = on_meta(kind, network), renamed.tensors
    tables = [name for name in CLASS_TABLES if name in own and name in tensors]
    if tables and network.get("num_classes") is not None:  # as many as the file's table has rows
        network["num_classes"] = max(1, network["num_classes"] + len(tensors[tables[0]]) - len(own[tables[0]]))
        own = on_meta(kind, network)
    check(own, renamed, taker)
    return Fitted(recognized, network, settings, renamed.tensors)


def recognize(weights: WeightsFile, target: Target | None) -> Recognized:
    """The family of a file, and the tensors of the model that the target takes.
    Raises ValueError for a file of no known family, or for one with no such model."""
    named, inside = weights.config.get("_class_name"), "" if target is None else target.inside
    found = [
        (family, prefix)
        for family in FAMILIES
        for prefix in dict.fromkeys([*family.prefixes, inside or family.prefixes[0]])
        if named in (None, family.class_name) and all(prefix + mark in weights.tensors for mark in family.marks)
    ]
    if not found:
        what = f"names as {', '.join([*weights.tensors][:2])}" if named is None else f"a {named}"
        raise ValueError(f"{weights.uri} holds {what}, of no family known here: {', '.join(f.title for f in FAMILIES)}")
    kind = None if target is None else target.training.network.kind
    fitting = [each for each in found if target is None or each[0].kind == kind]
    if inside:
        fitting = [each for each in fitting if each[1] in ("", inside)]
    if target is not None and not fitting:
        titles = " and ".join(dict.fromkeys(family.title for family, _ in found))
        under = f" under {inside}*" if inside else ""
        takes = f"{target.name} takes a network {kind}{under}"
        raise ValueError(f"{weights.uri} is of the {titles}, but {takes}: name its stage")
    family, prefix = fitting[0]
    own = {name.removeprefix(prefix): tensor for name, tensor in weights.tensors.items() if name.startswith(prefix)}
    own = {name: tensor for name, tensor in own.items() if not re.match(family.training_only, name)}
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
    check_fixed(weights.config, family.fixed)
    sizes = family.sizes(weights.config) if family.sizes is not None and weights.config else {}
    if target is None:
        own = family.settings if sizes else None
        settings = dict(weights.settings) if own is None else own(weights.config)
        if not settings or not sizes:
            raise ValueError(f"nothing says how the {family.title} was trained: name a stage, --as RECIPE/STAGE")
        return sizes, settings
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
    """Sizes of a file's tables of text, and ids around a caption; one class and None without text.
    Raises ValueError for a tokenizer that is missing, not asked for, or of another vocabulary."""
    family = recognized.family
    if not target.training.needs().captions:
        if tokenizer is not None:
            raise ValueError(f"{target.name} reads no captions itself: leave --tokenizer out")
        if family.text_tables is not None:
            raise ValueError(f"the {family.title} reads captions, and {target.name} reads none: name another stage")
        return DatasetInfo(num_classes=1, condition=target.condition), None  # counted later
    if family.text_tables is None:
        raise ValueError(f"{target.name} reads captions, and no {family.title} does: name another stage")
    if tokenizer is None:
        raise ValueError(f"{target.name} reads captions: give the tokenizer of this model, --tokenizer FILE")
    words, places = (len(recognized.tensors[name]) for name in family.text_tables)
    pad = tokenizer.bpe.token_to_id(family.pad)
    largest = max(tokenizer.bpe.get_vocab().values())
    if pad is None or largest >= words:
        fault = f"no word {family.pad}" if pad is None else f"a word {largest} where the model has {words}"
        raise ValueError(f"{tokenizer.uri} has {fault}: it is not the tokenizer of this {family.title}")
    return DatasetInfo(num_classes=1, vocab_size=words, text_length=places), TextIds(None, None, pad)


def on_meta(kind: str, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors of a network, without memory."""
    with torch.device("meta"):
        return NETWORKS[kind](**arguments).state_dict()


def check(own: Mapping[str, Tensor], renamed: Renamed, taker: str) -> None:
    """Compare the tensors with those of our network.
    Raises ValueError, which names the first that does not fit."""
    tensors, origins = renamed
    if unused := [name for name in tensors if name not in own]:
        raise ValueError(f"{len(unused)} tensors have no place in {taker}, first {origins.get(unused[0], unused[0])}")
    if missing := [name for name in own if name not in tensors]:
        raise ValueError(f"{len(missing)} tensors of {taker} are missing, first {missing[0]}")
    if others := [name for name, to in own.items() if fitted(tensors[name], to.shape).shape != to.shape]:
        first, *sizes = others[0], list(tensors[others[0]].shape), list(own[others[0]].shape)
        where = f"first {origins.get(first, first)}: {sizes[0]}, not {sizes[1]}"
        raise ValueError(f"{len(others)} tensors have other shapes than in {taker}, {where}")


def commit(
    out: Store, identity: Mapping[str, Any], provenance: dict[str, Any], fill: Callable[[Path], object]
) -> Artifact:
    """Write a model to `out` as an artifact, keyed by its identity; `fill` writes the files into a folder.
    A model that is there by the same key is adopted. Raises ValueError if `out` holds another artifact."""
    content = json.dumps({"stage": STAGE, "version": VERSION, **identity}, sort_keys=True)
    key = hashlib.sha256(content.encode()).hexdigest()[:KEY_LENGTH]
    before = load_artifact(out)
    if before is not None:
        if before.key != key:
            raise ValueError(f"{shown(out.uri)} holds another model, {before.identity}: name a new folder")
        return before
    with scratch_folder("weights") as folder:
        fill(folder)
        entries = upload_attempt(out, folder)
    made = Artifact(kind="model", stage=STAGE, key=key, files=tuple(entries), provenance=provenance)
    return commit_artifact(out, made)
