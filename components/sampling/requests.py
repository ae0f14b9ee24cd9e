"""What an image is asked for by, and the random stream that makes it the same image in whatever batch."""

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from components.diffusion.degradation import MASK_TASKS, TASKS

GENERATORS = ("diffusion", "tokens", "pixels", "gan", "vae", "translate")
TOKEN_GENERATORS = ("tokens", "pixels")  # one value after another
TOKEN_OPTIONS = ("temperature", "top_k", "top_p")


class Request(NamedTuple):
    """One image. What is None is left to the model's own settings."""

    label: int | str | None = None  # class id, or class name
    prompt: str | None = None
    seed: int = 0
    condition: bytes | None = None  # PNG of the image (such as a depth map) that the model is conditioned on
    image: bytes | None = None  # PNG of the image to work on; this and the next two: translate generator only
    mask: bytes | None = None  # PNG of its mask, white where pixels are to be made; inpainting and uncropping only
    task: str | None = None  # of TASKS; None is the only one that the model was trained for
    generator: str | None = None  # of GENERATORS; None is the first one that the model has
    guidance_scale: float | None = None  # 1 is no guidance
    steps: int | None = None  # of the base, an image-to-image model, or a masked prior; upsamplers keep their own
    temperature: float | None = None  # this and the next two: token branch only
    top_k: int | None = None
    top_p: float | None = None
    best_of: int | None = None  # candidates, of which the one that its condition explains best is kept; tokens only
    size: tuple[int, int] | None = None  # height and width, pixels, at least those of the model; token branch only
    sampler: str | None = None  # of the base or an image-to-image model, as steps
    classifier_scale: float | None = None  # of the classifier that guides the base; 0 is no guidance

    def sampling_options(self) -> tuple[object, ...]:
        """What requests must have in common to be sampled in one batch."""
        return self[self._fields.index("generator") :]


def check_request(request: Request) -> None:
    """Raise ValueError, in one line, for what no model could do; without a generator, for what none of them could."""
    if request.generator not in (None, *GENERATORS):
        raise ValueError(f"unknown generator {request.generator!r}: choose {' or '.join(GENERATORS)}")
    if request.prompt is not None and not request.prompt.strip():
        raise ValueError("the prompt is empty; leave it out to sample without one")
    for option in ("guidance_scale", "classifier_scale"):
        scale = getattr(request, option)
        if scale is not None and not (math.isfinite(scale) and scale >= 0):
            raise ValueError(f"{option} must be a finite number of at least 0, not {scale}")
    check_given_image(request)
    if request.generator in ("gan", "vae") and request.guidance_scale is not None:
        raise ValueError(f"the {request.generator} generator takes no guidance_scale")
    for option in () if request.generator in TOKEN_GENERATORS else TOKEN_OPTIONS:
        if getattr(request, option) is not None:
            raise ValueError(f"the {request.generator} generator takes no {option}")
    if request.temperature is not None and not (math.isfinite(request.temperature) and request.temperature >= 0):
        raise ValueError(f"temperature must be a finite number of at least 0, not {request.temperature}")
    if request.top_k is not None and request.top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {request.top_k}")
    for option in ("best_of", "size"):
        if getattr(request, option) is not None and request.generator != "tokens":
            raise ValueError(f"only the token branch takes {option}")
    if request.sampler is not None and request.generator not in (None, "diffusion", "translate"):
        raise ValueError(f"the {request.generator} generator takes no sampler")
    if request.best_of is not None and request.best_of < 1:
        raise ValueError(f"best_of must be at least 1, not {request.best_of}")
    if request.best_of is not None and request.size is not None:
        raise ValueError("best_of and size don't go together: a larger image is not scored as a whole")
    if request.top_p is not None and not 0 < request.top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], not {request.top_p}")


def check_given_image(request: Request) -> None:
    """Raise ValueError, in one line, for an image, mask or task that no model could work on."""
    if request.generator not in (None, "translate"):
        for option in ("image", "mask", "task"):
            if getattr(request, option) is not None:
                raise ValueError(f"only the translate generator takes {option}, not the {request.generator} generator")
    if request.generator == "translate" and request.image is None:
        raise ValueError("the translate generator needs an image, the image to work on")
    if request.task not in (None, *TASKS):
        raise ValueError(f"unknown task {request.task!r}: choose {' or '.join(TASKS)}")
    if request.task in MASK_TASKS and request.mask is None:
        raise ValueError(f"{request.task} needs a mask of the image's size, white where pixels are to be made")
    if request.task not in (None, *MASK_TASKS) and request.mask is not None:
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
    """A CPU generator of its own for each image (by its seed) and stage: no batch and no other stage moves it."""
    digest = hashlib.sha256(f"{seed}/{stage}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
