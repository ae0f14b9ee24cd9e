"""Starts: models of ours whose weights a training begins with.

A start is compared with the network by names and shapes, on the meta device, before anything starts. Its description
says all of that, so planning reads no weights; the sha256 of the file with the weights is its content, in the key of
the stage."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from torch import Tensor, nn

from components.configuration.conditions import DatasetInfo, TokenGrid
from components.configuration.config import IDENTITY, Config
from components.configuration.optimization import StartConfig, Training
from components.configuration.usage import nearest, usage_errors
from components.models.bundle import DESCRIPTION, WEIGHTS, ModelBundle, describe_bundle
from components.runtime.storage.artifact import ArtifactError, load_artifact
from components.runtime.storage.connection import shown
from components.runtime.storage.scratch import scratch_folder
from components.runtime.storage.store import Digest, Store, absolute, digest_of
from components.sampling.model import BPE
from components.weights.files import CONFIG, PICKLED, PIPELINE, SAFE, local_file, read_safetensors
from components.weights.importing import check, facts_of, on_meta
from components.weights.renaming import Renamed, fitted

FOREIGN = ("hf://", "models:/")
SCALE = "latent_scale"  # in a model's settings
TEXT = re.compile(r"(^|\.)(text_encoder\.token_embedding|text_embedding)\.weight$")  # tables by ids of captions
REMEDY = "give the folder of a trained model, or of what `cascade import` made"


class StartModel(NamedTuple):
    """The files of a model to start from."""

    store: Store
    description: str  # its path in the store
    weights: str  # likewise
    digest: Digest  # of the weights

    @property
    def model(self) -> ModelBundle:
        """The model on the meta device. Raises ValueError for one of another version."""
        try:
            return describe_bundle(self.store.read(self.description))
        except (ValueError, KeyError) as error:
            raise ValueError(f"{shown(self.store.url(self.description))}: {error}") from None

    @property
    def tokenizer(self) -> str | None:
        """The tokenizer of captions, as text; None for a model without one."""
        place = str(PurePosixPath(self.description).with_name(BPE))
        return self.store.read(place).decode() if self.store.exists(place) else None


class Counts(NamedTuple):
    """Tensors of a network and of its start."""

    taken: int  # of the start
    new: int  # of the network, which the start does not give
    unused: int  # of the start

    def __str__(self) -> str:
        return f"{self.taken} tensors from it, {self.new} new, {self.unused} unused"


def open_start(config: StartConfig) -> StartModel:
    """Finds the files of a model; reads its manifest, or hashes the weights where it has none.
    Raises ValueError, in one line, for a place without a model of ours; StoreError if storage can't be reached."""
    uri = config.uri
    if uri.startswith(FOREIGN) or uri.endswith(SAFE + PICKLED):
        raise ValueError(f"{shown(uri)} is no folder of a model of ours: {REMEDY}")
    store, part = Store(absolute(uri)), ""
    artifact = load_artifact(store)
    if artifact is None:  # or a model inside a cascade
        around, _, name = absolute(uri).rstrip("/").rpartition("/")
        whole = load_artifact(Store(around))
        if whole is not None and f"{name}/{WEIGHTS}" in whole.names():
            store, artifact, part = Store(around), whole, f"{name}/"
    if artifact is not None:
        try:
            entry = artifact.entry(f"{part}{WEIGHTS}")
            return StartModel(store, artifact.entry(f"{part}{DESCRIPTION}").path, entry.path, entry.digest)
        except ArtifactError:
            raise ValueError(f"{shown(uri)} is {artifact.identity}, not one model alone: {REMEDY}") from None
    names = {name for name in (DESCRIPTION, WEIGHTS, CONFIG, PIPELINE) if store.exists(name)}
    if not names >= {DESCRIPTION, WEIGHTS}:
        what = "weights of other code" if names & {CONFIG, PIPELINE} else "no model"
        raise ValueError(f"{shown(uri)} holds {what}: {REMEDY}")
    with local_file(store, WEIGHTS) as path:
        return StartModel(store, DESCRIPTION, WEIGHTS, digest_of(path))


def config_identity(config: Config) -> dict[str, Any]:
    """The configuration of a stage as it enters the key, with the content of weights to start from.
    Raises UsageError, in one line, for weights that are not there; StoreError if storage can't be reached."""
    values = config.model_dump(mode="json", context=IDENTITY)
    if (given := getattr(config, "init_from", None)) is None:
        return values
    with usage_errors("init_from: "):
        start = open_start(given)
        model = start.model
    scale = model.settings.get(SCALE)
    facts: dict[str, Any] = {"weights": start.digest.sha256} | ({} if scale is None else {SCALE: scale})
    if given.frozen or not isinstance(config, Training):  # the start's own network and settings are taken
        facts["model"] = facts_of(model)
        if (tokenizer := start.tokenizer) is not None:  # it decides what the captions of samples are to the model
            facts["tokenizer"] = digest_of(tokenizer.encode()).sha256
    return values | {"start": facts}


def start_loader(
    config: Training, dataset_info: DatasetInfo, grid: TokenGrid | None, *, bpe: str | None
) -> Callable[[nn.Module], None] | None:
    """A loader of the weights that a training begins with; None for random ones.
    `bpe` is the tokenizer of the set's captions, None without. Raises ValueError, in one line, for weights that do not
    fit, or that know other ids of captions, and as `open_start`."""
    if config.init_from is None:
        return None
    start, ignore = open_start(config.init_from), config.init_from.ignore
    own = on_meta(config.network.kind, config.network_arguments(dataset_info, grid))
    compare(own, start.model.module.state_dict(), ignore=ignore)
    texts = [name.rpartition(".")[0] for name in own if TEXT.search(name) and not is_below(name, ignore)]
    if texts and bpe is not None and start.tokenizer not in (None, bpe):
        raise ValueError(
            f"init_from: {shown(start.store.uri)} has another tokenizer of captions than this set: "
            f"name {' and '.join(texts)} in ignore"
        )
    return partial(load_start, start=start, ignore=ignore)


def planned_counts(config: Training, infos: Sequence[DatasetInfo], grid: TokenGrid | None) -> Counts:
    """Counts as of `compare`, before the set is known.
    `infos` are facts of possible sets: tensors whose shapes they decide are compared by the training itself. Raises
    ValueError as `compare` and `open_start`."""
    assert config.init_from is not None
    given = open_start(config.init_from).model.module.state_dict()
    own, *others = (on_meta(config.network.kind, config.network_arguments(info, grid)) for info in infos)
    open_ = [name for name in own if any(name in other and other[name].shape != own[name].shape for other in others)]
    own |= {name: given[name] for name in open_ if name in given}
    return compare(own, given, ignore=config.init_from.ignore)


def compare(own: Mapping[str, Tensor], start: Mapping[str, Tensor], *, ignore: Sequence[str]) -> Counts:
    """Counts the tensors that a network takes of a start; both may be on the meta device.
    Tensors of modules in `ignore` are new. Raises ValueError, in one line, for tensors that are missing, too many or
    of other shapes, and for a module that is not there."""
    for module in ignore:
        if not any(is_below(name, (module,)) for name in (*own, *start)):  # of the start: its weights are left out
            modules = dict.fromkeys(name.partition(".")[0] for name in (*own, *start))
            raise ValueError(f"ignore: the network has no module {module!r}{nearest(module, modules)}")
    wanted = {name: tensor for name, tensor in own.items() if not is_below(name, ignore)}
    given = {name: tensor for name, tensor in start.items() if not is_below(name, ignore)}
    try:
        check(wanted, Renamed(given, {}), "the network")
    except ValueError as error:
        raise ValueError(f"{error}; name the modules that are to be new in ignore") from None
    return Counts(len(wanted), len(own) - len(wanted), len(start) - len(wanted))


def load_start(network: nn.Module, *, start: StartModel, ignore: Sequence[str]) -> None:
    """Gives a network the tensors of a start, verified; those of modules in `ignore` stay as they are.
    Raises DamagedFileError for weights that are not those of the key, ValueError as `compare`."""
    with scratch_folder("start") as folder:
        start.store.download(start.weights, folder, WEIGHTS, expected=start.digest)
        tensors, _ = read_safetensors(folder / WEIGHTS, shown(start.store.url(start.weights)))
        own = network.state_dict()
        compare(own, tensors, ignore=ignore)
        taken = {name: fitted(tensors[name], to.shape) for name, to in own.items() if not is_below(name, ignore)}
        network.load_state_dict(own | taken)


def is_below(name: str, modules: Sequence[str]) -> bool:
    """True for the name of a tensor of one of the modules, or of modules below."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)
