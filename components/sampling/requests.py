"""What an image is asked for by, and the random stream that makes it the same image in whatever batch."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from components.models.diffusion.degradation import MASK_TASKS, TASKS

OPTIONS = (  # fields of a request that some generators take and others don't
    *("condition", "image", "mask", "task", "guidance_scale", "steps", "temperature", "top_k", "top_p"),
    *("best_of", "size", "sampler", "classifier_scale", "truncation"),
)


class Request(NamedTuple):
    """One image. What is None is left to the model's own settings."""

    label: int | str | None = None  # class id, or class name
    prompt: str | None = None
    seed: int = 0
    condition: bytes | None = None  # PNG of the image (such as a depth map) that the model is conditioned on
    image: bytes | None = None  # PNG of the image to work on; this and the next two: translate, or diffusion in a mask
    mask: bytes | None = None  # PNG of its mask, white where pixels are to be made; inpainting and uncropping only
    task: str | None = None  # of TASKS; None is the only one that the model was trained for
    generator: str | None = None  # by its name; None is the first one that the cascade has
    guidance_scale: float | None = None  # 1 is no guidance
    steps: int | None = None  # of the base, an image-to-image model, or a masked prior; upsamplers keep their own
    temperature: float | None = None  # this and the next two: token branch only
    top_k: int | None = None
    top_p: float | None = None
    best_of: int | None = None  # candidates, of which the one that its condition explains best is kept; tokens only
    size: tuple[int, int] | None = None  # height and width, pixels, at least those of the model; token branch only
    sampler: str | None = None  # of the base or an image-to-image model, as steps
    classifier_scale: float | None = None  # of the classifier that guides the base; 0 is no guidance
    truncation: float | None = None  # greatest |z| of a GAN's noise
    sampling: tuple[tuple[str, str, Any], ...] = ()  # (stage, setting, value): any sampling setting of any stage

    def sampling_options(self) -> tuple[object, ...]:
        """What requests must have in common to be sampled in one batch."""
        return self[self._fields.index("generator") :]


def check_request(request: Request) -> None:
    """Raise ValueError, in one line, for what no generator could do."""
    if request.prompt is not None and not request.prompt.strip():
        raise ValueError("the prompt is empty; leave it out to sample without one")
    if request.best_of is not None and request.best_of < 1:
        raise ValueError(f"best_of must be at least 1, not {request.best_of}")
    if request.best_of is not None and request.size is not None:
        raise ValueError("best_of and size don't go together: a larger image is not scored as a whole")


def check_given_image(request: Request) -> None:
    """Raise ValueError, in one line, for an image, mask or task that no model could work on."""
    if request.image is None:
        raise ValueError("an image to work on is missing")
    if request.task not in (None, *TASKS):
        raise ValueError(f"unknown task {request.task!r}: choose {' or '.join(TASKS)}")
    if request.task in MASK_TASKS and request.mask is None:
        raise ValueError(f"{request.task} needs a mask of the image's size, white where pixels are to be made")
    if request.task not in (None, *MASK_TASKS) and request.mask is not None:
        raise ValueError(f"{request.task} takes no mask: it changes every pixel")


def read_size(text: str) -> tuple[int, int]:
    """`64x128` as height and width. Raises ValueError for anything else."""
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise ValueError(f"size {text}: write it as HEIGHTxWIDTH in pixels, such as 64x128")
    return int(height), int(width)


def stage_settings(nested: Mapping[str, Mapping[str, Any]]) -> tuple[tuple[str, str, Any], ...]:
    """Sampling settings by stage and name, as JSON or YAML has them, as `Request.sampling`, which can be hashed.

    Raises ValueError, in one line, for anything else.
    """
    if not isinstance(nested, Mapping) or not all(isinstance(own, Mapping) for own in nested.values()):
        raise ValueError(f'sampling must be such as {{"upsampler_64": {{"noise_level": 20}}}}, not {nested!r:.80}')
    return tuple((stage, name, _frozen(value)) for stage, own in nested.items() for name, value in own.items())


def nested_settings(sampling: Iterable[tuple[str, str, Any]]) -> dict[str, dict[str, Any]]:
    """`Request.sampling` by stage and name: the inverse of `stage_settings`. The last of a name counts."""
    nested: dict[str, dict[str, Any]] = {}
    for stage, name, value in sampling:
        nested.setdefault(stage, {})[name] = value
    return nested


def _frozen(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(map(_frozen, value))
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"a sampling setting is a number, a word, true, false, null or a list of them, not {value!r:.80}")


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
