"""`cascade sample`: images and a labelled grid from a registered model or a cascade artifact."""

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.progress import Progress

from components.data.images import load_depth, load_image
from components.evaluation.grids import labelled_grid
from components.sampling.answers import cascade_in
from components.sampling.cascade import Cascade
from components.sampling.device import best_device
from components.sampling.frozen_text import FrozenTextError
from components.sampling.image_files import encode_png, open_header
from components.sampling.requests import Request, nested_settings, read_size, stage_settings
from components.tracking import model_source
from components.tracking.environment import environment
from pipelines.profiles import tracking_uri
from pipelines.session import set_environment
from pipelines.workflow import UsageError


def sample_images(
    model: str,
    *,
    labels: list[str],
    prompts: list[str],
    conditions: list[Path],
    generator: str | None,
    seed: int,
    count: int,
    steps: int | None,
    sampler: str | None,
    guidance_scale: float | None,
    classifier_scale: float | None,
    truncation: float | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    best_of: int | None,
    size: str | None,
    tracking: str | None,
    out: Path,
    console: Console,
    settings: Sequence[str] = (),
) -> Path:
    """Sample `count` images for each label or prompt, and each condition image; returns the path of the grid.

    Raises UsageError for a model that is not there or a request that it can't serve.
    """
    started = time.monotonic()
    try:
        with Progress(console=console, transient=True) as bar:
            bar.add_task("loading and sampling", total=None)
            cascade = load_cascade(model, tracking)
            asked = [Request(label=label) for label in labels] + [Request(prompt=prompt) for prompt in prompts]
            asked = asked or [Request()]
            if conditions:
                given = [_condition(path, cascade) for path in conditions]
                asked = [request._replace(condition=image) for request in asked for image in given]
            options = partial(
                Request._replace,
                generator=generator,
                guidance_scale=guidance_scale,
                steps=steps,
                sampler=sampler,
                classifier_scale=classifier_scale,
                truncation=truncation,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                best_of=best_of,
                size=None if size is None else read_size(size),
                sampling=read_settings(settings),
            )
            asked = [cascade.with_generator(options(request)) for request in asked]
            requests = [request._replace(seed=seed + i) for request in asked for i in range(count)]
            images = cascade.sample(requests)
    except (ValueError, FrozenTextError) as error:
        raise UsageError(str(error)) from error
    grid = _write(images, requests, out)
    console.print(f"{len(images)} images in {time.monotonic() - started:.1f} s, in {out}", highlight=False)
    return grid


def read_settings(assignments: Sequence[str]) -> tuple[tuple[str, str, Any], ...]:
    """`STAGE.SETTING=VALUE` as a request has them. Raises ValueError for anything else."""
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
    """A file as the condition image that the tokenizer of conditions, or the base, was trained on: a depth map of 16
    bits becomes one, an image is taken as it is. Raises ValueError."""
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


def _write(images: list[np.ndarray], requests: list[Request], out: Path) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    seen = list(dict.fromkeys(request.condition for request in requests))
    bare = [f"condition {seen.index(r.condition)}" if r.condition else "unconditional" for r in requests]
    names = [str(request.label or request.prompt or name) for request, name in zip(requests, bare, strict=True)]
    for image, name, request in zip(images, names, requests, strict=True):
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower())[:40]
        (out / f"{slug}-{request.generator}-{request.seed:04d}.png").write_bytes(encode_png(image))
    grid = out / "grid.png"
    grid.write_bytes(labelled_grid(images, names))
    return grid


def load_cascade(model: str, tracking: str | None) -> Cascade:
    """The cascade in the registry, in storage, or as it lies on disk, on the best device that there is; and a model
    that makes images by itself as a cascade of its own, which samples as its kind does.

    Raises UsageError, or ValueError, if there is none.
    """
    with local_model(model, tracking) as folder:
        cascade = cascade_in(folder, device=best_device())
    if cascade is None:
        raise UsageError(f"no cascade at {model}; give models:/NAME@champion or the folder of a cascade stage")
    return cascade


@contextmanager
def local_model(model: str, tracking: str | None) -> Iterator[Path]:
    """The folder of a trained model or a cascade that is in the registry, in storage, or on disk already.

    Raises ValueError if there is none.
    """
    set_environment(environment())
    with model_source.local_model(model, tracking_uri=tracking_uri(tracking)) as folder:
        yield folder
