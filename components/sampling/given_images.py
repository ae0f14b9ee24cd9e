"""The image of a request for editing: checked, decoded, with the mask of known pixels.

A model that was not trained to fill masks does it all the same: known pixels are put back at each step, as noisy as the
step is (Song et al., 2021, "Score-Based Generative Modeling through Stochastic Differential Equations", appendix I.2;
RePaint without its resampling: Lugmayr et al., 2022, equation 8).

Shapes: B plans, S = resolution.
"""

from collections.abc import Sequence

import numpy as np
import torch

from components.models.diffusion.corruption import gray, upsample
from components.models.diffusion.degradation import MASK_TASKS, TASKS
from components.models.diffusion.samplers import Known
from components.sampling.image_files import open_given_image
from components.sampling.images import from_uint8, read_mask
from components.sampling.model import SamplingModel
from components.sampling.plan import Given, Plan, random_stream
from components.sampling.requests import Request


def given_in_mask(model: SamplingModel, request: Request) -> Given:
    """Returns the image of a request whose mask a model fills by putting known pixels back.

    Raises ValueError, in one line, for a task, image or mask that can't be met so.
    """
    if request.task not in (None, *MASK_TASKS):
        raise ValueError(f"this model makes what a mask hides and nothing else: {' or '.join(MASK_TASKS)}")
    check_given_image(request.image, request.mask, request.task or "inpainting")
    if model.network.get("in_channels", 3) != 3:
        raise ValueError(f"the model of stage {model.name} makes no images in color, and keeps no pixels of one")
    image, side = open_given_image(request.image or b""), model.settings["resolution"]
    if image.size != (side, side):
        raise ValueError(f"the image has {image.width}x{image.height} pixels, this model takes {side}x{side}")
    return Given(from_uint8(np.array(image)), read_mask(request.mask or b"", image.size), True)


def given_for_task(model: SamplingModel, request: Request) -> Given:
    """Returns the image of a request for the task of an image-to-image model.

    Raises ValueError, in one line, for a task, image or mask that the model can't work on.
    """
    check_given_image(request.image, request.mask, request.task)
    tasks, size = model.settings["tasks"], model.settings["resolution"]
    if request.task is None and len(tasks) > 1:
        raise ValueError(f"name a task: this model was trained for {', '.join(tasks)}")
    if request.task not in (None, *tasks):
        raise ValueError(f"the model of stage {model.name} was not trained for {request.task}: {', '.join(tasks)}")
    task = request.task or tasks[0]
    check_given_image(request.image, request.mask, task)
    image = open_given_image(request.image or b"")
    sides = [size // factor for factor in model.settings["super_resolution_factors"]]
    sides = sides if task == "super_resolution" else [size]
    if image.size not in [(side, side) for side in sides]:
        takes = " or ".join(f"{side}x{side}" for side in sides)
        raise ValueError(f"the image has {image.width}x{image.height} pixels, for {task} this model takes {takes}")
    known = from_uint8(np.array(image))
    if task in MASK_TASKS:
        return Given(known, read_mask(request.mask or b"", image.size), True)
    if task == "colorization":
        known = gray(known[None])[0]
    if task == "super_resolution":
        known = upsample(known[None], size)[0]
    return Given(known, torch.ones(1, size, size), False)


def check_given_image(image: bytes | None, mask: bytes | None, task: str | None) -> None:
    """Raise ValueError, in one line, for an image, mask or task that no model accepts."""
    if image is None:
        raise ValueError("an image to work on is missing")
    if task not in (None, *TASKS):
        raise ValueError(f"unknown task {task!r}: choose {' or '.join(TASKS)}")
    if task in MASK_TASKS and mask is None:
        raise ValueError(f"{task} needs a mask of the image's size, white where pixels are to be made")
    if task not in (None, *MASK_TASKS) and mask is not None:
        raise ValueError(f"{task} takes no mask: it changes every pixel")


def known_pixels(model: SamplingModel, plans: Sequence[Plan]) -> Known | None:
    """Returns the pixels that the plans keep; None where no plan has an image.

    Plans without an image keep no pixels. The noise of an image is a function of its seed, and no other random number
    depends on it.
    """
    if all(plan.given is None for plan in plans):
        return None
    side = model.settings["resolution"]
    images, masks = torch.zeros(len(plans), 3, side, side), torch.zeros(len(plans), 1, side, side).bool()
    for row, plan in enumerate(plans):
        if plan.given is not None:
            images[row], masks[row] = plan.given.known, plan.given.mask == 0
    streams = [random_stream(plan.seed, f"{model.name}/known") for plan in plans]
    noise = torch.stack([torch.randn(3, side, side, generator=stream) for stream in streams])
    return Known(images.to(model.device), masks.to(model.device), noise.to(model.device))
