"""The model of a command: from the registry, storage or disk, by `--model` or by the PNG of `--like`."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from rich.console import Console
from rich.progress import Progress

from components.configuration.config import refuse
from components.configuration.usage import UsageError, usage_errors
from components.data.shards import ShardIndex, load_index
from components.runtime.storage.artifact import ArtifactError
from components.runtime.storage.connection import StoreError
from components.runtime.storage.store import absolute
from components.runtime.tracking import registry
from components.runtime.tracking.names import REGISTRY, environment
from components.sampling import requests
from components.sampling.cascade import Cascade, cascade_in
from components.sampling.device import best_device
from components.sampling.requests import Request, StageSettings, nested_settings, request_of
from pipelines.command.options import check_out
from pipelines.engine.session import set_environment
from pipelines.planning.profiles import tracking_uri

TAKES = {"image": "translate", "mask": "translate", "condition": "sample"}  # commands, of images


class OpenModel(NamedTuple):
    """A loaded model with its origin, and the request of the image that is made again."""

    cascade: Cascade
    address: str  # models:/NAME/VERSION if registered, else as given
    name: str  # registered, or of its folder: no path of this machine
    version: str | None  # registered
    like: Request  # of no image, the defaults of a request

    def request(self, options: Mapping[str, Any], assignments: Sequence[str]) -> Request:
        """Returns the image's request, with the command's options that are not None and those of `--set`.
        Raises ValueError, in one line, for a value of another type."""
        changes = {name: value for name, value in options.items() if value is not None}
        request = self.cascade.with_generator(self.like.replace(**changes))
        maker, marks = self.cascade.makers.get(str(request.generator)), requests.request_options()
        first = "" if maker is None else maker.first.name
        replaced = {(mark.stage or first, mark.setting) for name in changes if (mark := marks.get(name))}
        kept = [each for each in request.sampling if each[:2] not in replaced]
        return request.replace(sampling=nested_settings((*kept, *parsed_settings(assignments))))

    def signed(self, png: bytes, request: Request) -> bytes:
        """Returns a sampled image as a PNG with the settings that made the image."""
        return requests.with_settings(png, requests.settings_of(request, model=self.name, version=self.version))


@contextmanager
def at_work(out: Path, console: Console) -> Iterator[None]:
    """Shows that the command loads and samples into a folder; a ValueError inside becomes a UsageError.
    Raises UsageError, before any work, for a folder out of reach for writing."""
    check_out(out)
    with usage_errors(), Progress(console=console, transient=True) as bar:
        bar.add_task("loading and sampling", total=None)
        yield


def open_model(model: str | None, *, like: Path | None, tracking: str | None, **given: object) -> OpenModel:
    """Loads the model of a command: the command's, else that of `like`, the PNG of an image to make again.
    `given`: images that the command takes, None or empty where the user gives none. Raises UsageError, or ValueError in
    one line, for a file without settings, a missing image, or no such model."""
    settings = {} if like is None else read_like(like)
    needs = settings.get("needs")
    for name in (name for name in requests.IMAGES if isinstance(needs, list) and name in needs):
        if name not in given:
            raise ValueError(f"the image of --like was made with --{name}, which `cascade {TAKES[name]}` takes")
        if not given[name]:
            raise ValueError(f"the image of --like was made with --{name}: give it again")
    name, version = str(settings.get("model")), str(settings.get("version"))
    if model is None and re.fullmatch(r"[^/:@]+", name) and re.fullmatch(r"\d+", version):
        model = f"{REGISTRY}{name}/{version}"
    if model is None:
        wanted = "models:/NAME@champion, or the folder of a cascade artifact"
        raise ValueError(f"name the model with --model: {wanted}; only the image of a registered model names its own")
    address, name, version = model, absolute(model).rstrip("/").rpartition("/")[2], None
    if registry.NAMED.fullmatch(model):
        set_environment(environment())
        named = registry.find_named(model, tracking_uri=tracking_uri(tracking))
        address, name, version = named.uri, named.name, named.version
    elif model.startswith(REGISTRY):  # models:/ID, of no version
        name = model.removeprefix(REGISTRY)
    return OpenModel(load_cascade(address, tracking), address, name, version, request_of(settings))


def read_like(path: Path) -> dict[str, Any]:
    """Reads the settings in a PNG. Raises ValueError, in one line, for a file without valid settings."""
    if not path.is_file():
        raise ValueError(f"--like {path}: no such file")
    try:
        settings = requests.read_settings(path.read_bytes())
        if settings is None:
            raise ValueError("this PNG has no settings; give one image that cascade sample, translate or serve made")
        request_of(settings)
    except ValueError as error:
        raise ValueError(f"--like {path}: {error}") from error
    return settings


def parsed_settings(assignments: Sequence[str]) -> StageSettings:
    """Parses `STAGE.SETTING=VALUE` for a request. Raises ValueError for other text."""
    found = []
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        stage, dot, setting = path.strip().partition(".")
        if not (equals and dot and setting):
            raise ValueError(f"--set {assignment!r}: write it as STAGE.SETTING=VALUE, such as base.eta=0.5")
        try:
            found.append((stage, setting, yaml.safe_load(text)))
        except yaml.YAMLError as error:
            raise ValueError(f"--set {assignment!r}: its value is no YAML") from error
    return requests.stage_settings(nested_settings(found))


def load_cascade(model: str, tracking: str | None) -> Cascade:
    """Loads a cascade, or a model that makes images by itself, from registry, storage or disk.
    Raises UsageError, or ValueError, if there is none."""
    with local_model(model, tracking) as folder:
        cascade = cascade_in(folder, device=best_device())
    if cascade is None:
        raise UsageError(f"no cascade at {model}; give models:/NAME@champion or the folder of a cascade stage")
    return cascade


def held_out_set(model: str, tracking: str | None) -> ShardIndex:
    """The set of training images of a model, with a held-out part.
    Raises ValueError, in one line that names `--reference`, for one that isn't there or holds out none."""
    from components.evaluation.given import image_set_of  # other commands need none of it

    try:
        refuse(not model.startswith(REGISTRY) and registry.is_model_folder(model), f"{model} has no manifest beside it")
        stored = registry.NAMED.fullmatch(model) and registry.stored_model(model, tracking_uri=tracking_uri(tracking))
        images = image_set_of(stored[1] if stored else registry.model_artifact(model))
        index = load_index(images.url("index.json"))
        refuse(index.samples == index.train_samples, f"{images.identity} holds out no images of {index.source}")
    except (ValueError, StoreError, ArtifactError) as error:
        raise ValueError(f"no held-out images of the model: {error}; give images as --reference") from error
    return index


def local_model(model: str, tracking: str | None) -> AbstractContextManager[Path]:
    """The local folder of a trained model or a cascade from the registry, storage or disk.
    Raises ValueError if there is none."""
    set_environment(environment())
    return registry.local_model(model, tracking_uri=tracking_uri(tracking))
