"""A cascade on disk and in memory: from requests to images by generators.

On disk it is a folder with one sub-folder for each model and `cascade.json`:
    {"stages": {"tokenizer": "tokenizer", "prior": "prior", "base": "base", "upsamplers": ["upsampler_64"]},
     "sampling": {"base": {"sampler": "ddim", "num_inference_steps": 50, …}, …}, "precision": "bf16"}
Imports only what the packed model of the registry carries.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from components.configuration.families import family_of
from components.configuration.file_names import folder_name
from components.configuration.optimization import Precision
from components.models.bundle import DESCRIPTION as MODEL
from components.sampling.device import sampling_in
from components.sampling.frozen_text import load_frozen_text
from components.sampling.generator import Between, ConditionImages, Generator, Hooks, OnStep, Parts
from components.sampling.generators.diffusion import Diffusion
from components.sampling.generators.one_model import GAN, VAE, ImageToImage, Pixels
from components.sampling.generators.tokens import Tokens
from components.sampling.images import to_bytes
from components.sampling.model import SamplingModel, describe_model, load_model, most_at_once
from components.sampling.plan import Plan, check_request
from components.sampling.requests import Request, request_options

DESCRIPTION = "cascade.json"
SNAPSHOTS = "snapshots"  # of averages, to choose a model's from: of use next to the model only
FROZEN = ("contrastive", "text_encoder")  # parts that read prompts for others
GENERATORS: dict[str, type[Generator]] = {  # by name, in a cascade's order of preference
    kind.name: kind for kind in (Diffusion, Tokens, Pixels, GAN, VAE, ImageToImage)
}
Images = dict[str, np.ndarray]  # stage -> uint8 (H, W, 3), in the order in which they were made


def compose(
    folder: Path,
    *,
    upsamplers: Mapping[str, Path] | None = None,
    sampling: Mapping[str, Mapping[str, Any]] | None = None,
    precision: Precision = "bf16",
    **parts: Path,
) -> Path:
    """Copy the folders of trained models, `parts` by the names of `Parts`, into `folder` as a cascade.
    `upsamplers`: by stage name, smallest first. `sampling`: by part, or stage name of an upsampler. `precision`: in
    which all of them sample on a GPU."""
    for name, source in {**parts, **(upsamplers or {})}.items():
        shutil.copytree(source, folder / name, dirs_exist_ok=True, ignore=shutil.ignore_patterns(SNAPSHOTS))
    stages: dict[str, Any] = {name: name for name in parts}
    stages["upsamplers"] = list(upsamplers or {})
    description = {"stages": stages, "sampling": dict(sampling or {}), "precision": precision}
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1))
    return folder


@dataclass(frozen=True)
class Cascade(Parts):
    """Loaded models and their generators, of which a useful cascade has at least one."""

    precision: Precision = "bf16"  # in which they sample on a GPU; see `components.sampling.device`

    def __post_init__(self) -> None:
        """Raise ValueError if the models don't fit each other."""
        _ = self.makers

    @classmethod
    def load(cls, folder: Path | str, *, device: str | torch.device = "cpu") -> "Cascade":
        """Load a composed cascade. Raises ValueError if there is none in `folder`, or one of another version."""
        return cls(**read_parts(Path(folder), device=device))

    @cached_property
    def makers(self) -> dict[str, Generator]:
        """The generators of the models by name, in order of preference."""
        return {name: kind(self) for name, kind in GENERATORS.items() if kind.first_of(self) is not None}

    @property
    def generators(self) -> tuple[str, ...]:
        return tuple(self.makers)

    @property
    def most_at_once(self) -> int:
        """The largest batch size, in images."""
        return most_at_once(max(side for maker in self.makers.values() for side in maker.sides))

    @property
    def condition_images(self) -> ConditionImages | None:
        """The size and kind of the condition images; None for a cascade without condition images."""
        return next((found for maker in self.makers.values() if (found := maker.condition_images)), None)

    def with_generator(self, request: Request) -> Request:
        """Returns the request with the generator's name filled in."""
        return request if request.generator or not self.generators else request.replace(generator=self.generators[0])

    def resolve(self, request: Request) -> Plan:
        """Returns the plan of a request. Raises ValueError, in one line, if this cascade can't make the image."""
        request = self.with_generator(request)
        check_request(request)
        maker = self.makers.get(str(request.generator))
        if maker is None:
            there = " and ".join(self.generators) or "none"
            raise ValueError(f"this cascade has no {request.generator} generator; it has {there}")
        for option in request_options():
            if getattr(request, option) is not None and option not in maker.options:
                raise ValueError(f"the {maker.name} generator takes no {option}")
        stages = [model.name for model in maker.models]
        for stage, _, _ in request.sampling:
            if stage not in stages:
                raise ValueError(f"no stage {stage!r} of the {maker.name} generator: {', '.join(stages)}")
        return maker.resolve(request)

    def resolve_all(self, requests: Sequence[Request]) -> list[Plan]:
        """Returns the plan of each request. Raises ValueError, which names a request by its number from 1."""
        plans = []
        for number, request in enumerate(requests, 1):
            try:
                plans.append(self.resolve(request))
            except ValueError as error:
                raise ValueError(f"request {number}: {error}" if len(requests) > 1 else str(error)) from None
        return plans

    def sample(self, requests: Sequence[Request], **settings: Any) -> list[np.ndarray]:
        """Returns a finished uint8 image (H, W, 3) for each request, in order; `settings`: see `make`.
        The same request gives the same image in whatever company (`components.sampling.device`). Raises ValueError,
        before any work, if a request can't be met; the message names it by its number from 1."""
        return [list(images.values())[-1] for images in self.sample_stages(requests, **settings)]

    def sample_stages(self, requests: Sequence[Request], **settings: Any) -> list[Images]:
        """Samples like `sample`, and returns the images of every stage, the finished images last."""
        plans = self.resolve_all(requests)
        finished: list[Images] = [{} for _ in plans]
        for batch, made in self.make(plans, **settings):
            for stage, images in made.items():
                for index, image in zip(batch, images.cpu().numpy(), strict=True):
                    finished[index][stage] = image
        return finished

    @torch.no_grad()
    def make(
        self,
        plans: Sequence[Plan],
        *,
        batch_size: int | None = None,
        on_step: OnStep | None = None,
        between: Between | None = None,
    ) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Yields the images of plans batch by batch: (places of the plans, images of each stage).
        The images are uint8 (B, H, W, 3) and still on the device, which may be computing them. `batch_size`: images of
        a batch at most; None: `most_at_once`. `on_step`, `between`: see `Hooks`."""
        hooks = Hooks(on_step, between)
        for batch in batches(plans, batch_size=self.most_at_once if batch_size is None else batch_size):
            together = [plans[index] for index in batch]
            hooks.each()
            maker = self.makers[together[0].generator]
            with sampling_in(self.precision, maker.first.device):
                made = maker.make(together, hooks)
            yield batch, {stage: to_bytes(images) for stage, images in made.items()}


def quick(cascade: Cascade, request: Request) -> Request:
    """Returns the request with two steps of each stage that has steps, or unchanged if that is refused."""
    models = cascade.makers[str(cascade.with_generator(request).generator)].models
    steps = "num_inference_steps"
    changes = tuple((model.name, steps, 2) for model in models if steps in type(model.sampling).model_fields)
    shorter = request.replace(steps=None, sampling=request.sampling + changes)
    try:
        cascade.resolve(shorter)
    except ValueError:
        return request
    return shorter


def opened(folder: Path, *, device: str | torch.device = "cpu", weights: bool = True) -> Cascade | SamplingModel | None:
    """Loads `folder`, a single model with the random streams of a cascade.
    Returns a cascade for a composed one and for a single model that makes images, None for a pretrained text encoder.
    Without weights: as `read_parts`. Raises ValueError if the folder can't be read."""
    if (folder / DESCRIPTION).is_file():
        return Cascade(**read_parts(folder, device=device, weights=weights))
    if not (folder / MODEL).is_file():
        return None
    description = json.loads((folder / MODEL).read_text())
    settings, kind = description["settings"], description["kind"]
    role = settings.get("role") or ("model" if family_of(kind).alone else kind)
    # The stage's name seeds the same random streams as in the cascade.
    stage = {"upsampler": f"upsampler_{settings.get('resolution')}", "image_to_image": "model"}.get(role, role)
    model = load_model(stage, folder, device=device) if weights else describe_model(stage, folder)
    if not model.works_alone:
        return model
    alone = Cascade(base=model) if role == "base" else Cascade(model=model)
    return alone if alone.generators else model


def cascade_in(folder: Path, *, device: str | torch.device = "cpu", weights: bool = True) -> Cascade | None:
    """Loads `folder` like `opened`; returns None for a model that makes no images."""
    model = opened(folder, device=device, weights=weights)
    return model if isinstance(model, Cascade) else None


def read_parts(folder: Path, *, device: str | torch.device = "cpu", weights: bool = True) -> dict[str, Any]:
    """Reads the fields of `Cascade` from a composed cascade.
    Without weights, networks have no memory, and networks that read prompts for other models are left out. Raises
    ValueError as `read_description`."""
    description = read_description(folder)
    stages, sampling = description["stages"], description["sampling"]
    names = stages.pop("upsamplers", [])
    found: dict[str, Any] = {}
    for name, place in (stages | {name: name for name in names}).items():
        if not weights and name not in FROZEN:
            found[name] = describe_model(name, folder / place)
        elif weights and name in FROZEN:
            found[name] = load_frozen_text(folder / place, device=device)
        elif weights:
            found[name] = load_model(name, folder / place, device=device, sampling=sampling.get(name))
    precision = description.get("precision", "fp32")  # which those of older versions meant
    return found | {"upsamplers": tuple(found.pop(name) for name in names), "precision": precision}


def read_description(folder: Path) -> dict[str, Any]:
    """Reads a composed cascade's `cascade.json`.
    Raises ValueError if `folder` holds no cascade, one of another version, or one with a part outside `folder`."""
    path = folder / DESCRIPTION
    if not path.is_file():
        raise ValueError(f"{folder} holds no {DESCRIPTION}; give the folder of a composed cascade")
    try:
        description = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): copy the model again") from None
    if "sampling" not in description:
        raise ValueError(f"{path} says nothing of sampling: it is of an older version; compose it again")
    for place in description["stages"].values():
        for name in place if isinstance(place, list) else [place]:
            try:
                folder_name(name)
            except ValueError as error:
                raise ValueError(f"{path}: {error}; compose it again") from None
    return description


def batches(plans: Sequence[Plan], *, batch_size: int) -> Iterable[list[int]]:
    """Groups plans of one `way` into batches: the places of each batch's plans."""
    ways: dict[tuple[object, ...], list[int]] = {}
    for index, plan in enumerate(plans):
        ways.setdefault(plan.way, []).append(index)
    for indices in ways.values():
        yield from (indices[start : start + batch_size] for start in range(0, len(indices), batch_size))
