"""Inpainting by a diffusion model that was not trained for it: known pixels are put back at each step, as noisy as the
step is (Song et al., 2021, "Score-Based Generative Modeling through Stochastic Differential Equations", appendix I.2;
RePaint without its resampling: Lugmayr et al., 2022, equation 8).

Shapes: B requests, S = resolution.
"""

from collections.abc import Sequence

import numpy as np
import torch

from components.models.diffusion.degradation import MASK_TASKS
from components.models.diffusion.samplers import Known
from components.sampling.image_files import open_given_image
from components.sampling.images import from_uint8, read_mask
from components.sampling.model import SamplingModel, check_given_image, random_stream
from components.sampling.requests import Request


def check_replacement(model: SamplingModel, request: Request) -> None:
    """Raise ValueError, in one line, for a task, image or mask that can't be met by putting pixels back."""
    if request.task not in (None, *MASK_TASKS):
        raise ValueError(f"this model makes what a mask hides and nothing else: {' or '.join(MASK_TASKS)}")
    check_given_image(request.replace(task=request.task or "inpainting"))
    if model.network.get("in_channels", 3) != 3:
        raise ValueError(f"the model of stage {model.name} makes no images in color, and keeps no pixels of one")
    image, side = open_given_image(request.image or b""), model.settings["resolution"]
    if image.size != (side, side):
        raise ValueError(f"the image has {image.width}x{image.height} pixels, this model takes {side}x{side}")
    read_mask(request.mask or b"", image.size)


def known_pixels(model: SamplingModel, requests: Sequence[Request]) -> Known | None:
    """What checked requests say of their images: of some nothing; None where no request has one.

    The noise of an image is a function of its seed, and no other random number depends on it.
    """
    if all(request.image is None for request in requests):
        return None
    side = model.settings["resolution"]
    images, masks = torch.zeros(len(requests), 3, side, side), torch.zeros(len(requests), 1, side, side).bool()
    for row, request in enumerate(requests):
        if request.image is not None:
            images[row] = from_uint8(np.array(open_given_image(request.image)))
            masks[row] = read_mask(request.mask or b"", (side, side)) == 0
    streams = [random_stream(request.seed, f"{model.name}/known") for request in requests]
    noise = torch.stack([torch.randn(3, side, side, generator=stream) for stream in streams])
    return Known(images.to(model.device), masks.to(model.device), noise.to(model.device))
