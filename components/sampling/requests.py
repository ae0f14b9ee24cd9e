"""What a picture is asked for by, and the random stream that makes it the same picture in whatever batch."""

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from components.diffusion.degradation import HOLE_TASKS, TASKS

ROADS = ("diffusion", "tokens", "pixels", "gan", "vae", "translate")
TOKEN_ROADS = ("tokens", "pixels")  # one value after another
TOKEN_OPTIONS = ("temperature", "top_k", "top_p")


class Request(NamedTuple):
    """One picture. What is None is left to the model's own settings."""

    label: int | str | None = None  # class id, or class name
    prompt: str | None = None
    seed: int = 0
    condition: bytes | None = None  # PNG of the picture (such as a depth map) that the model is conditioned on
    image: bytes | None = None  # PNG of the picture to work on; this and the next two: translate road only
    mask: bytes | None = None  # PNG of its hole, white where pixels are to be made; inpainting and uncropping only
    task: str | None = None  # of TASKS; None is the only one that the model was trained for
    road: str | None = None  # of ROADS; None is the first one that the model has
    guidance_scale: float | None = None  # 1 is no guidance
    steps: int | None = None  # of the base, an image-to-image model, or a masked prior; upsamplers keep their own
    temperature: float | None = None  # this and the next two: token road only
    top_k: int | None = None
    top_p: float | None = None
    best_of: int | None = None  # candidates, of which the one that its condition explains best is kept; token road only
    size: tuple[int, int] | None = None  # height and width, pixels, at least those of the model; token road only
    sampler: str | None = None  # of the base or an image-to-image model, as steps
    classifier_scale: float | None = None  # of the classifier that guides the base; 0 is no guidance

    def way(self) -> tuple[object, ...]:
        """What requests must have in common to be sampled in one batch."""
        return self[self._fields.index("road") :]


def check_request(request: Request) -> None:
    """Raise ValueError, in one line, for what no model could do. Without a road, only what holds for all is checked."""
    if request.road not in (None, *ROADS):
        raise ValueError(f"unknown road {request.road!r}: choose {' or '.join(ROADS)}")
    if request.prompt is not None and not request.prompt.strip():
        raise ValueError("the prompt is empty; leave it out to sample without one")
    for option in ("guidance_scale", "classifier_scale"):
        scale = getattr(request, option)
        if scale is not None and not (math.isfinite(scale) and scale >= 0):
            raise ValueError(f"{option} must be a finite number of at least 0, not {scale}")
    check_given_picture(request)
    if request.road in ("gan", "vae") and request.guidance_scale is not None:
        raise ValueError(f"the {request.road} road takes no guidance_scale")
    for option in () if request.road in TOKEN_ROADS else TOKEN_OPTIONS:
        if getattr(request, option) is not None:
            raise ValueError(f"the {request.road} road takes no {option}")
    if request.temperature is not None and not (math.isfinite(request.temperature) and request.temperature >= 0):
        raise ValueError(f"temperature must be a finite number of at least 0, not {request.temperature}")
    if request.top_k is not None and request.top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {request.top_k}")
    for option in ("best_of", "size"):
        if getattr(request, option) is not None and request.road != "tokens":
            raise ValueError(f"only the token road takes {option}")
    if request.sampler is not None and request.road not in (None, "diffusion", "translate"):
        raise ValueError(f"the {request.road} road takes no sampler")
    if request.best_of is not None and request.best_of < 1:
        raise ValueError(f"best_of must be at least 1, not {request.best_of}")
    if request.best_of is not None and request.size is not None:
        raise ValueError("best_of and size don't go together: a larger picture is not scored as a whole")
    if request.top_p is not None and not 0 < request.top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], not {request.top_p}")


def check_given_picture(request: Request) -> None:
    """Raise ValueError, in one line, for a picture, mask or task that no model could work on."""
    if request.road not in (None, "translate"):
        for option in ("image", "mask", "task"):
            if getattr(request, option) is not None:
                raise ValueError(f"only the translate road takes {option}, not the {request.road} road")
    if request.road == "translate" and request.image is None:
        raise ValueError("the translate road needs an image, the picture to work on")
    if request.task not in (None, *TASKS):
        raise ValueError(f"unknown task {request.task!r}: choose {' or '.join(TASKS)}")
    if request.task in HOLE_TASKS and request.mask is None:
        raise ValueError(f"{request.task} needs a mask of the picture's size, white where pixels are to be made")
    if request.task not in (None, *HOLE_TASKS) and request.mask is not None:
        raise ValueError(f"{request.task} takes no mask: it changes every pixel")


def class_id(label: int | str, classes: Sequence[str]) -> int:
    """The id of a class given by id (also as digits) or by name. Raises ValueError for any other."""
    if isinstance(label, str) and label in classes:
        return classes.index(label)
    if isinstance(label, str) and label.strip().isdecimal():
        label = int(label)
    if isinstance(label, int) and 0 <= label < len(classes):
        return label
    known = ", ".join(f"{index} {name}" for index, name in enumerate(classes[:20]))
    raise ValueError(f"unknown label {label!r}: the classes are {known}{', …' if len(classes) > 20 else ''}")


def random_stream(seed: int, stage: str) -> torch.Generator:
    """A CPU generator of its own for each picture (by its seed) and stage: no batch and no other stage moves it."""
    digest = hashlib.sha256(f"{seed}/{stage}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
