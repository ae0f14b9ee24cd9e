"""A picture in, a picture out: holes filled, colors given, artifacts and blur removed, by one model (Palette).

Shapes: B requests, S = resolution.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from components.diffusion.corruption import upsample
from components.diffusion.degradation import HOLE_TASKS, Degraded, denoise_in_hole, fill_hole, gray
from components.diffusion.samplers import OnStep
from components.sampling.diffusion import denoise, noise_of
from components.sampling.model import SamplingModel, asked_or_set
from components.sampling.pictures import as_tensor, open_picture
from components.sampling.requests import Request, check_given_picture

WHITE = 128  # gray levels of a mask from here on are its hole


class Given(NamedTuple):
    """One request's picture as the network knows it."""

    known: Tensor  # (3, S, S)
    hole: Tensor  # (1, S, S), 1 where pixels are to be made
    has_known: bool  # whether pixels outside of the hole stay as they are


@torch.no_grad()
def translate(model: SamplingModel, requests: Sequence[Request], *, on_step: OnStep | None = None) -> Tensor:
    """Pictures (B, 3, S, S) in [-1, 1] of checked requests that share guidance_scale, steps and sampler.

    The known pixels of inpainting and uncropping stand before the network at every step, and come out as they came in
    (Saharia et al., 2022). Each request has a task of its own.
    """
    noise, first = noise_of(model, requests), requests[0]
    known, hole, filled = given_pictures(model, requests, noise(-1))
    made = denoise(
        model,
        requests,
        {"condition_image": Degraded(filled, hole).condition},
        noise,
        guidance_scale=asked_or_set(first.guidance_scale, model.settings, "guidance_scale", 1.0),
        num_inference_steps=asked_or_set(first.steps, model.settings, "num_inference_steps", None),
        sampler=asked_or_set(first.sampler, model.settings, "sampler", "ddim"),
        on_step=on_step,
        around=partial(denoise_in_hole, known=known, hole=hole),
    )
    return torch.where(hole > 0, made, known)


def given_pictures(model: SamplingModel, requests: Sequence[Request], noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Known pixels (B, 3, S, S), holes (B, 1, S, S), and the pictures with their holes filled by noise (B, 3, S, S).

    Where a task changes every pixel the hole is all of the picture, and what the network is shown has no noise.
    """
    given = [read_given(model, request) for request in requests]
    known = torch.stack([each.known for each in given]).to(model.device)
    hole = torch.stack([each.hole for each in given]).to(model.device)
    filled = [
        fill_hole(picture, where, drawn) if each.has_known else picture
        for each, picture, where, drawn in zip(given, known, hole, noise, strict=True)
    ]
    return known, hole, torch.stack(filled)


def check_translation(model: SamplingModel, request: Request) -> None:
    """Raise ValueError, in one line, for a task, picture or mask that the model can't work on."""
    check_given_picture(request._replace(task=task_of(model, request)))
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
    """The picture and the hole of one request. Raises ValueError if they don't fit the model or each other."""
    task, size = task_of(model, request), model.settings["resolution"]
    image = open_picture(request.image or b"")
    sides = [size // factor for factor in model.settings["factors"]] if task == "super_resolution" else [size]
    if image.size not in [(side, side) for side in sides]:
        wanted = " or ".join(f"{side}x{side}" for side in sides)
        raise ValueError(f"the picture has {image.width}x{image.height} pixels, for {task} this model takes {wanted}")
    picture = as_tensor(image)
    if task in HOLE_TASKS:
        return Given(picture, read_hole(request.mask or b"", image.size), True)
    if task == "colorization":
        picture = gray(picture[None])[0]
    if task == "super_resolution":
        picture = upsample(picture[None], size)[0]
    return Given(picture, torch.ones(1, size, size), False)


def read_hole(data: bytes, size: tuple[int, int]) -> Tensor:
    """A mask file as (1, height, width), 1 where it is white. Raises ValueError for another size, or nothing white."""
    mask = open_picture(data, mode="L")
    if mask.size != size:
        raise ValueError(f"the mask has {mask.width}x{mask.height} pixels, the picture {size[0]}x{size[1]}")
    hole = torch.from_numpy(np.array(mask) >= WHITE).float()[None]
    if not hole.any():
        raise ValueError("the mask has no white pixel: there is nothing to make")
    return hole
