"""`cascade sample`: images and a labelled grid from a registered model or a cascade artifact."""

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from rich.console import Console
from rich.progress import Progress

from components.configuration.usage import UsageError
from components.data.images import load_depth, load_image
from components.evaluation.grids import labelled_grid
from components.runtime.storage.store import absolute
from components.runtime.tracking import registry
from components.runtime.tracking.names import REGISTRY, environment
from components.sampling.answers import cascade_in
from components.sampling.cascade import Cascade
from components.sampling.device import best_device
from components.sampling.frozen_text import FrozenTextError
from components.sampling.image_files import encode_png, open_header
from components.sampling.request_forms import settings_of, with_settings
from components.sampling.requests import Request, StageSettings, nested_settings, stage_settings
from pipelines.command.like import asked_like, named_model, read_like
from pipelines.engine.session import set_environment
from pipelines.planning.profiles import tracking_uri

COUNT = 4  # images for each label or prompt, where nothing else is said


class ModelSource(NamedTuple):
    """Where a model comes from."""

    address: str  # models:/NAME/VERSION where it is registered, else as the user gave it
    name: str  # registered, or of its folder: no path of this machine
    version: str | None  # registered

    def png(self, image: np.ndarray, request: Request) -> bytes:
        """Encodes a sampled image, uint8 (H, W, 3), as a PNG with the settings that made the image."""
        return with_settings(encode_png(image), settings_of(request, model=self.name, version=self.version))


def sample_images(
    model: str | None,
    *,
    labels: list[str],
    prompts: list[str],
    conditions: list[Path],
    seed: int | None,
    count: int | None,
    options: Mapping[str, Any],
    tracking: str | None,
    out: Path,
    console: Console,
    settings: Sequence[str] = (),
    like: Path | None = None,
) -> Path:
    """Sample `count` images for each label or prompt, and each condition image.

    Returns the path of the grid.

    Args:
        options: fields of the request by name.
        like: a PNG of an image to make again; what is None or empty is as it was for that one, and `count` is 1.

    Raises UsageError for a model that is not there or a request that it can't serve.
    """
    started = time.monotonic()
    try:
        with Progress(console=console, transient=True) as bar:
            bar.add_task("loading and sampling", total=None)
            known = read_like(like)
            source = source_of(named_model(model, known), tracking)
            cascade = load_cascade(source.address, tracking)
            known.check_given(condition=conditions)
            changes = {"seed": seed, **options}
            plain = asked_like(known, cascade, changes, sampling=read_settings(settings))
            asked = [plain.replace(label=label, prompt=None) for label in labels]
            asked += [plain.replace(label=None, prompt=prompt) for prompt in prompts]
            asked = asked or [plain]
            if conditions:
                given = [_condition(path, cascade) for path in conditions]
                asked = [request.replace(condition=image) for request in asked for image in given]
            count = count or (COUNT if like is None else 1)
            requests = [request.replace(seed=request.seed + i) for request in asked for i in range(count)]
            images = cascade.sample(requests)
    except (ValueError, FrozenTextError) as error:
        raise UsageError(str(error)) from error
    grid = _write(images, requests, source, out)
    console.print(f"{len(images)} images in {time.monotonic() - started:.1f} s, in {out}", highlight=False)
    return grid


def read_settings(assignments: Sequence[str]) -> StageSettings:
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
    return stage_settings(nested_settings(found))


def _condition(path: Path, cascade: Cascade) -> bytes:
    """Reads a file as the condition image of the tokenizer of conditions, or of the base.

    A depth map of 16 bits becomes an image as in training; an image is taken as it is. Raises ValueError for a file
    that is neither.
    """
    wanted = cascade.condition_images
    if wanted is None:
        raise ValueError("this model takes no condition image; leave --condition out")
    if not path.is_file():
        raise ValueError(f"--condition {path}: no such file")
    data, resolution = path.read_bytes(), wanted.resolution
    try:
        raw_depth = wanted.member == "depth" and open_header(data).mode.startswith(("I", "F"))
        return encode_png((load_depth if raw_depth else load_image)(data, resolution=resolution))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"--condition {path} can't be read as an image ({error})") from error


def _write(images: list[np.ndarray], requests: list[Request], source: ModelSource, out: Path) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    seen = list(dict.fromkeys(request.condition for request in requests))
    bare = [f"condition {seen.index(r.condition)}" if r.condition else "unconditional" for r in requests]
    names = [str(request.label or request.prompt or name) for request, name in zip(requests, bare, strict=True)]
    for image, name, request in zip(images, names, requests, strict=True):
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower())[:40]
        (out / f"{slug}-{request.generator}-{request.seed:04d}.png").write_bytes(source.png(image, request))
    grid = out / "grid.png"
    grid.write_bytes(labelled_grid(images, names))
    return grid


def source_of(model: str, tracking: str | None) -> ModelSource:
    """Resolves the address of a model.

    Raises UsageError, or ValueError from the registry, if there is no such model.
    """
    if not model.startswith(REGISTRY):
        return ModelSource(model, absolute(model).rstrip("/").rpartition("/")[2], None)
    if not registry.NAMED.fullmatch(model):  # models:/ID, a logged model of no version
        return ModelSource(model, model.removeprefix(REGISTRY), None)
    set_environment(environment())
    named = registry.find_named(model, tracking_uri=tracking_uri(tracking))
    return ModelSource(named.uri, named.name, named.version)


def load_cascade(model: str, tracking: str | None) -> Cascade:
    """Loads a cascade from the registry, storage or disk, on the best device.

    A model that makes images by itself becomes a cascade of its own, which samples as its kind does.

    Raises UsageError, or ValueError, if there is none.
    """
    with local_model(model, tracking) as folder:
        cascade = cascade_in(folder, device=best_device())
    if cascade is None:
        raise UsageError(f"no cascade at {model}; give models:/NAME@champion or the folder of a cascade stage")
    return cascade


@contextmanager
def local_model(model: str, tracking: str | None) -> Iterator[Path]:
    """The local folder of a trained model or a cascade from the registry, storage or disk.

    Raises ValueError if there is none.
    """
    set_environment(environment())
    with registry.local_model(model, tracking_uri=tracking_uri(tracking)) as folder:
        yield folder
