"""`cascade sample`: pictures and a labelled grid from a registered model or a cascade artifact."""

import re
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from components.evaluation.grids import labelled_grid
from components.sampling.cascade import Cascade
from components.sampling.requests import Request
from components.storage.artifact import load_artifact
from components.storage.store import Store, absolute
from components.tracking.environment import environment
from components.tracking.registry import download_model
from pipelines.profiles import tracking_uri
from pipelines.session import set_environment
from pipelines.workflow import UsageError


def sample_pictures(
    model: str,
    *,
    labels: list[str],
    prompts: list[str],
    road: str,
    seed: int,
    count: int,
    steps: int | None,
    guidance_scale: float | None,
    tracking: str | None,
    out: Path,
    console: Console,
) -> Path:
    """Sample `count` pictures for each label and prompt; returns the path of the grid.

    Raises UsageError for a model that is not there or a request that it can't serve.
    """
    asked: list[tuple[str | None, str | None]] = [(label, None) for label in labels]
    asked += [(None, prompt) for prompt in prompts] or ([] if labels else [(None, None)])
    requests = [
        Request(label=label, prompt=prompt, seed=seed + i, road=road, guidance_scale=guidance_scale, steps=steps)
        for label, prompt in asked
        for i in range(count)
    ]
    started = time.monotonic()
    try:
        with Progress(console=console, transient=True) as bar:
            bar.add_task("loading and sampling", total=None)
            pictures = Cascade.load(_folder(model, tracking)).sample(requests)
    except ValueError as error:
        raise UsageError(str(error)) from error
    grid = _write(pictures, requests, out)
    console.print(f"{len(pictures)} pictures in {time.monotonic() - started:.1f} s, in {out}", highlight=False)
    return grid


def _write(pictures: list[np.ndarray], requests: list[Request], out: Path) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    names = [str(request.label or request.prompt or "unconditional") for request in requests]
    for picture, name, request in zip(pictures, names, requests, strict=True):
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower())[:40]
        Image.fromarray(picture).save(out / f"{slug}-{request.road}-{request.seed:04d}.png")
    grid = out / "grid.png"
    grid.write_bytes(labelled_grid(pictures, names))
    return grid


def _folder(model: str, tracking: str | None) -> Path:
    """A local folder with the cascade: from the registry, from storage, or as it lies on disk."""
    set_environment(environment())
    scratch = Path(tempfile.mkdtemp(prefix="cascade-model-"))
    if model.startswith("models:/"):
        registry = tracking_uri(tracking)
        if registry is None:
            raise UsageError(f"{model} is in a registry: name it with --tracking")
        return download_model(model, scratch, tracking_uri=registry)
    if (Path(model) / "cascade.json").is_file():
        return Path(model)
    artifact = load_artifact(Store(absolute(model)))
    if artifact is None or "cascade.json" not in artifact.names():
        raise UsageError(f"no cascade at {model}; give models:/NAME@champion or the folder of a cascade stage")
    return artifact.download(scratch)
