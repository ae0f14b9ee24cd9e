"""Files of weights: safetensors, pickles of tensors alone, folders of diffusers.

A pickle can run any code when it is opened. So files of torch are read by `weights_only` alone, and a file that holds
anything else is refused, with the name of the first such thing."""

import hashlib
import json
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor

from components.runtime.storage.artifact import load_artifact
from components.runtime.storage.connection import StoreError, reason, shown
from components.runtime.storage.scratch import scratch_folder
from components.runtime.storage.store import LOCAL, Store, absolute, digest_of, list_url
from components.sampling.frozen_text import TOKENIZER, WORDS, FrozenTextError, encoder_files, files_of_index

SAFE, PICKLED = (".safetensors",), (".pt", ".pth", ".ckpt", ".bin", ".pkl")
CONFIG, PIPELINE, CARD = "config.json", "model_index.json", "README.md"
INDEX = ".index.json"  # after a file's name: the names of several files in its place
WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors", "diffusion_pytorch_model.bin")  # by preference
WEIGHTS += (*(f"{name}{INDEX}" for name in WEIGHTS), "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
NESTS = ("ema", "state_dict", "model", "module")  # of a checkpoint; the average first
LICENSE = re.compile(r"^license:\s*(?:- *)?(\S+)", re.MULTILINE)  # the first of a list
README = "components/weights/README.md"
PACKAGE = "package://"  # NAME/FOLDER: a folder in an installed Python package


class WeightsFile(NamedTuple):
    """Tensors of a file by name, and what is known of the file."""

    uri: str  # of the file, without a password
    sha256: str  # of several files that of theirs, one after another
    tensors: dict[str, Tensor]
    config: dict[str, Any]  # of the config.json beside the file; empty where there is none
    license: str | None  # if stated
    settings: Mapping[str, Any] = MappingProxyType({})  # for sampling, where files around it say them

    def origin(self, family: str) -> dict[str, str]:
        """Address, sha256, family and license, for the settings and the manifest of a model."""
        stated = {} if self.license is None else {"license": self.license}
        return {"uri": self.uri, "sha256": self.sha256, "family": family, **stated}


def read_weights(uri: str) -> WeightsFile:
    """Reads a file or a folder, local or in storage, without running anything in it.
    Raises ValueError, in one line, for a file that is missing, is damaged, or holds more than tensors, and
    StoreError."""
    uri, names = absolute(uri), tuple[str, ...]()
    folder, _, name = uri.rpartition("/")
    if uri.endswith((*SAFE, *PICKLED, INDEX)):
        names = (CONFIG,) if Store(folder).exists(CONFIG) else ()
    else:
        folder, names = uri, tuple(info.path for info in list_url(uri))
        if PIPELINE in names:
            parts = sorted({name.partition("/")[0] for name in names if name.endswith(SAFE + PICKLED)})
            raise ValueError(f"{shown(uri)} is a whole pipeline: name one of its folders, {', '.join(parts)}")
        if not (name := next((each for each in WEIGHTS if each in names), "")):
            forms = ", ".join(SAFE + PICKLED)
            raise ValueError(f"{shown(uri)} holds no weights: give a file ({forms}) or a folder of diffusers")
    store, place = Store(folder), shown(f"{folder}/{name}")
    config = read_config(store) if CONFIG in names else {}
    tensors, metadata, digests = dict[str, Tensor](), dict[str, str](), list[str]()
    parts = [name]
    if name.endswith(INDEX):
        with local_file(store, name) as path:
            parts = files_of_index(path.read_bytes())
    for each in parts:
        with local_file(store, each) as path:
            own = shown(f"{folder}/{each}")
            found = read_safetensors(path, own) if each.endswith(SAFE) else (read_pickle(path, own), {})
            digests.append(digest_of(path).sha256)
        tensors, metadata = tensors | found[0], metadata | found[1]
    sha256 = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    license_ = license_of(store) or metadata.get("license") or metadata.get("modelspec.license")
    return WeightsFile(place, sha256, tensors, config, license_)


def license_of(store: Store) -> str | None:
    """The license that the card of a folder states; the first of a list."""
    stated = LICENSE.search(store.read(CARD).decode(errors="replace")) if store.exists(CARD) else None
    return None if stated is None else stated[1]


class CaptionTokenizer(NamedTuple):
    """A tokenizer of captions, and the address of its file."""

    uri: str  # of the file, without a password
    bpe: Tokenizer

    @property
    def content(self) -> str:
        """The text of the file."""
        return self.bpe.to_str()

    @property
    def sha256(self) -> str:
        return digest_of(self.content.encode()).sha256


def read_tokenizer(uri: str) -> CaptionTokenizer:
    """Reads a tokenizer.json, local or in storage, without its own padding and cutting of texts.
    Raises ValueError, in one line, for a file that is not there or is no tokenizer, and StoreError."""
    folder, _, name = absolute(uri).rpartition("/")
    store = Store(folder)
    place = shown(f"{folder}/{name}")
    try:
        bpe = Tokenizer.from_str(store.read(name).decode())
    except FileNotFoundError:
        raise ValueError(f"{place}: no such file") from None
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"{place} is no tokenizer.json ({str(error)[:80]}); {README} says how to make one") from None
    bpe.no_padding()
    bpe.no_truncation()
    return CaptionTokenizer(place, bpe)


def read_config(store: Store, name: str = CONFIG) -> dict[str, Any]:
    """The config.json of a folder, or another file of fields. Raises ValueError if it is missing or none."""
    try:
        config = json.loads(store.read(name))
    except FileNotFoundError:
        raise ValueError(f"{shown(store.url(name))}: no such file") from None
    except ValueError as error:
        raise ValueError(f"{shown(store.url(name))} is no JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{shown(store.url(name))} holds no fields")
    return config


@contextmanager
def local_file(store: Store, name: str) -> Iterator[Path]:
    """The path of a file on the local disk, of a copy that is removed afterwards where it lies in storage.
    Raises ValueError if there is no such file."""
    protocol, _, path = store.uri.rpartition("://")
    try:
        if (protocol or None) in LOCAL:
            if not (Path(path) / name).is_file():
                raise FileNotFoundError
            yield Path(path) / name
            return
        with scratch_folder("weights") as folder:
            store.download(name, folder, name)
            yield folder / name
    except FileNotFoundError:
        raise ValueError(f"{shown(store.url(name))}: no such file") from None


def read_safetensors(path: Path, place: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header fields of a safetensors file. Raises ValueError for a damaged one."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{place} is no whole safetensors file ({reason(error)}): fetch it again") from None


def read_pickle(path: Path, place: str) -> dict[str, Tensor]:
    """Tensors of a file of torch.save; of a checkpoint those of its average, or of its model.
    Raises ValueError for a file that holds more than tensors and plain values, or none of them."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of another protocol of pickles
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        more = f"asks for {asked.group(1)}" if asked else "holds more than tensors"
        raise ValueError(f"{place} {more} and may run code: it stays closed; {README} says how to convert it") from None
    except Exception as error:  # a damaged pickle raises a dozen kinds
        fault = (str(error).splitlines() or ["it ends too early"])[0]
        raise ValueError(f"{place} can't be read as a file of torch ({fault}): fetch it again") from None
    for nest in NESTS:
        if isinstance(content, Mapping) and isinstance(content.get(nest), Mapping):
            content = content[nest]
    named = content.items() if isinstance(content, Mapping) else ()
    tensors = {name: each for name, each in named if isinstance(each, Tensor)}
    if not tensors or not all(isinstance(name, str) for name in tensors):
        raise ValueError(f"{place} holds no tensors by name: give a state_dict")
    return tensors


def fetch_encoder(uri: str, folder: Path) -> Path:
    """Copies the files of a text encoder from `uri` to `folder`. Raises FrozenTextError without one."""
    places = encoder_places(uri)
    try:
        for name, place in places.items():
            Store(place).download(name, folder, name)
    except (OSError, StoreError) as error:
        raise FrozenTextError(f"the text encoder at {uri} can't be read: {error}; give another uri") from error
    return folder


def encoder_places(uri: str) -> dict[str, str]:
    """The files of a pretrained encoder, each with its folder: `uri`, or the tokenizer's beside it.
    Pipelines of diffusers keep text_encoder and tokenizer apart; one inside a cascade (`models/sd/text_encoder`) lies
    where the manifest says. Raises FrozenTextError if one is missing."""
    uri = encoder_folder(uri)
    around, _, name = uri.rstrip("/").rpartition("/")
    sibling, config = f"{around}/tokenizer", f"{name}/{CONFIG}"
    try:
        found = {info.path: uri for info in list_url(uri)}
        if not found and (whole := load_artifact(Store(absolute(around)))) and config in whole.names():
            return encoder_places(whole.url(config).removesuffix(f"/{CONFIG}"))
        if not {TOKENIZER, *WORDS} & set(found):
            found = {info.path: sibling for info in list_url(sibling)} | found
        names = encoder_files(uri, found, Store(uri).read)
    except (OSError, StoreError) as error:
        raise FrozenTextError(f"the text encoder at {uri} can't be read: {error}; give another uri") from error
    return {name: found[name] for name in names}


def encoder_folder(uri: str) -> str:
    """URL of a text encoder's folder; `package://NAME/FOLDER` lies in the installed Python package NAME.
    Raises FrozenTextError without the package."""
    if not uri.startswith(PACKAGE):
        return uri
    name, _, folder = uri.removeprefix(PACKAGE).partition("/")
    found = find_spec(name)
    if found is None or found.origin is None:
        raise FrozenTextError(f"the text encoder {uri} is in a package: pip install {name.replace('_', '-')}")
    return str(Path(found.origin).parent / folder)
