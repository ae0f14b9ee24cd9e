"""An image in, an image out: masks filled, colors given, artifacts and blur removed, by one model (Palette).

Shapes: B requests, S = resolution.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from components.models.diffusion import samplers
from components.models.diffusion.corruption import upsample
from components.models.diffusion.degradation import MASK_TASKS, Degraded, denoise_in_mask, fill_mask, gray
from components.sampling.generator import Generator, Hooks, Parts
from components.sampling.generators.diffusion import check_sampling, denoise, first_sampling, noise_of
from components.sampling.image_files import gray_png, open_given_image
from components.sampling.images import from_uint8, read_mask
from components.sampling.model import SamplingModel, check_given_image
from components.sampling.requests import Request


class Given(NamedTuple):
    """One request's image as the network knows it."""

    known: Tensor  # (3, S, S)
    mask: Tensor  # (1, S, S), 1 where pixels are to be made
    has_known: bool  # whether pixels outside of the mask stay as they are


@torch.no_grad()
def translate(model: SamplingModel, requests: Sequence[Request], *, on_step: samplers.OnStep | None = None) -> Tensor:
    """Images (B, 3, S, S) in [-1, 1] of checked requests that share guidance_scale, steps and sampler.

    The known pixels of inpainting and uncropping stand before the network at every step, and come out as they came in
    (Saharia et al., 2022). Each request has a task of its own.
    """
    noise = noise_of(model, requests)
    known, mask, filled = given_images(model, requests, noise(-1))
    made = denoise(
        model,
        requests,
        {"condition_image": Degraded(filled, mask).condition},
        noise,
        first_sampling(model, requests[0]),
        on_step=on_step,
        around=partial(denoise_in_mask, known=known, mask=mask),
    )
    return torch.where(mask > 0, made, known)


def given_images(model: SamplingModel, requests: Sequence[Request], noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Known pixels (B, 3, S, S), masks (B, 1, S, S), and the images with their masks filled by noise (B, 3, S, S).

    Where a task changes every pixel the mask is all of the image, and what the network is shown has no noise.
    """
    given = [read_given(model, request) for request in requests]
    known = torch.stack([each.known for each in given]).to(model.device)
    mask = torch.stack([each.mask for each in given]).to(model.device)
    filled = [
        fill_mask(image, where, drawn) if each.has_known else image
        for each, image, where, drawn in zip(given, known, mask, noise, strict=True)
    ]
    return known, mask, torch.stack(filled)


def check_translation(model: SamplingModel, request: Request) -> None:
    """Raise ValueError, in one line, for a task, image or mask that the model can't work on."""
    check_given_image(request)
    check_given_image(request.replace(task=task_of(model, request)))
    read_given(model, request)


def task_of(model: SamplingModel, request: Request) -> str:
    """The request's task, or the only one that the model was trained for. Raises ValueError."""
    tasks = model.settings["tasks"]
    if request.task is None and len(tasks) > 1:
        raise ValueError(f"name a task: this model was trained for {', '.join(tasks)}")
    if request.task not in (None, *tasks):
        raise ValueError(f"the model of stage {model.name} was not trained for {request.task}: {', '.join(tasks)}")
    return request.task or tasks[0]


def read_given(model: SamplingModel, request: Request) -> Given:
    """The image and the mask of one request. Raises ValueError if they don't fit the model or each other."""
    task, size = task_of(model, request), model.settings["resolution"]
    image = open_given_image(request.image or b"")
    factors = model.settings["super_resolution_factors"] if task == "super_resolution" else [1]
    sides = [size // factor for factor in factors]
    if image.size not in [(side, side) for side in sides]:
        wanted = " or ".join(f"{side}x{side}" for side in sides)
        raise ValueError(f"the image has {image.width}x{image.height} pixels, for {task} this model takes {wanted}")
    known = from_uint8(np.array(image))
    if task in MASK_TASKS:
        return Given(known, read_mask(request.mask or b"", image.size), True)
    if task == "colorization":
        known = gray(known[None])[0]
    if task == "super_resolution":
        known = upsample(known[None], size)[0]
    return Given(known, torch.ones(1, size, size), False)


class ImageToImage(Generator):
    """An image with something missing -> an image-to-image model -> the image."""

    name, title = "translate", "Image to image"
    shows_steps = True

    @classmethod
    def first_of(cls, parts: Parts) -> SamplingModel | None:
        model = parts.model
        return model if model is not None and model.settings.get("role") == "image_to_image" else None

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.first.settings["tasks"])

    def check(self, request: Request) -> None:
        check_translation(self.first, request)
        super().check(request)
        check_sampling(self.first, first_sampling(self.first, request))

    def sample(self, requests: Sequence[Request], hooks: Hooks) -> dict[str, Tensor]:
        name = self.first.name
        return {name: translate(self.first, requests, on_step=hooks.of_stage(name))}

    def example(self) -> Request:
        settings = self.first.settings
        task, side = settings["tasks"][0], settings["resolution"]
        side = side // settings["super_resolution_factors"][0] if task == "super_resolution" else side
        mask = gray_png(side) if task in MASK_TASKS else None
        return super().example().replace(task=task, image=gray_png(side), mask=mask)
