"""A plan: a request resolved against a model, once. Generators read plans, never requests.

Shapes: B plans, L text length, S resolution.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from components.configuration.sampling import ModelSampling
from components.models.diffusion.corruption import MASK_TASKS, TASKS, gray, upsample
from components.models.diffusion.steps import Spacing
from components.sampling.image_files import open_given_image, to_rgb
from components.sampling.images import fitted_image, from_uint8, read_mask
from components.sampling.model import SamplingModel, checked
from components.sampling.requests import Request, request_options


class Given(NamedTuple):
    """The image of a plan, in the form of the network's input."""

    known: Tensor  # (3, S, S) in [-1, 1]
    mask: Tensor  # (1, S, S), 1 where pixels are to be made
    has_known: bool  # whether pixels outside of the mask stay as they are


@dataclass(frozen=True, eq=False, kw_only=True)
class Plan:
    """A checked request for an image, with all names looked up and all files decoded."""

    generator: str = ""
    seed: int = 0
    label: int | None = None  # class id
    prompt: str | None = None
    condition: Image.Image | None = None  # that the model is conditioned on, RGB of any size
    given: Given | None = None
    sampling: Mapping[str, ModelSampling] = field(default_factory=dict)  # by stage
    candidates: int = 1  # images of which the best is kept
    grid: tuple[int, int] | None = None  # of tokens, height and width, where larger
    size: tuple[int, int] | None = None  # height and width, pixels, where they are not the generator's own

    @property
    def way(self) -> tuple[object, ...]:
        """The key of plans for a common batch: plans with equal keys may be made together."""
        return self.generator, tuple(self.sampling.items()), self.candidates, self.grid

    def of(self, model: SamplingModel) -> Any:
        """Returns the sampling settings of a model."""
        return self.sampling.get(model.name, model.sampling)


class Conditions(NamedTuple):
    """Conditions of a batch of plans on the model's device, and the null conditions for guidance.
    Both hold tensors with the batch as first dimension, by the argument names of the network."""

    condition: dict[str, Tensor]  # label (B,), text (B, L), condition_image (B, 3, S, S)
    null: dict[str, Tensor]  # the same keys: what stands for "no condition"

    def guided(self, scale: float) -> dict[str, Tensor]:
        """The conditions of a guided batch of 2B, the null ones last; of one of B for a scale of 1."""
        if scale == 1:
            return self.condition
        return {name: torch.cat([value, self.null[name]]) for name, value in self.condition.items()}


UNCONDITIONED = Conditions({}, {})


def random_stream(seed: int, stage: str) -> torch.Generator:
    """Returns a CPU generator for an image (by its seed) and a stage, which nothing else moves."""
    digest = hashlib.sha256(f"{seed}/{stage}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))


def noise_of(plans: Sequence[Plan], stage: str, shape: Sequence[int], device: torch.device) -> Callable[..., Tensor]:
    """Returns a function that draws the next standard normal noise (B, *shape), row i by plan i and stage."""
    streams = [random_stream(plan.seed, stage) for plan in plans]

    def noise(step: int = 0) -> Tensor:
        del step  # the order of the draws is what counts
        return torch.stack([torch.randn(*shape, generator=stream) for stream in streams]).to(device)

    return noise


def best_of(sample: Callable[[int], Tensor], score: Callable[[Tensor], Tensor], *, n: int) -> Tensor:
    """Draw n candidates of each of B images and keep the first one of the highest score.
    DALL-E ranks 512 candidates by a contrastive model (Ramesh et al. 2021, 2.6).
    `sample`: called with the candidate's number k from 0, gives (B, …): tokens or images. Where candidate k of a image
    is a function of (its seed, k), so is the choice. `score`: (B, …) -> (B,), the higher the better; NaN is never
    better. `n`: candidates, at least 1."""
    chosen = sample(0)
    best = score(chosen).float().nan_to_num(nan=-torch.inf)  # (B,)
    for k in range(1, n):
        drawn = sample(k)
        scores = score(drawn).float()
        better = scores > best
        best = torch.where(better, scores, best)
        chosen = torch.where(better.to(chosen.device).view(-1, *[1] * (chosen.ndim - 1)), drawn, chosen)
    return chosen


def sampling_of(model: SamplingModel, request: Request, *, first: bool) -> Any:
    """Returns the model's sampling settings, with the request's settings of the stage.
    `first`: whether it is the generator's first model, which most options are for. Raises ValueError for a misfit."""
    changes: dict[str, Any] = {}
    for name, option in request_options().items():
        value = getattr(request, name)
        if option.setting and value is not None and (option.stage == model.name or (first and not option.stage)):
            changes[option.setting] = value
    changes |= {name: value for stage, name, value in request.sampling if stage == model.name}
    if not changes:
        return model.sampling
    own = model.sampling.model_dump()
    if changes.keys() >= {"num_inference_steps"} and own.get("spacing") not in get_args(Spacing):
        own.pop("spacing", None)  # steps that are written out are no other number of steps
    return checked(type(model.sampling), own | changes, model.name)


def plan_of(
    request: Request,
    models: Sequence[SamplingModel],
    classes: Sequence[str],
    *,
    generator: str = "",
    given: Given | None = None,
) -> Plan:
    """Returns the plan of a request with checked conditions.
    `models`: whose settings the request may change, the one that its options are for first. `classes`: names by id.
    Raises ValueError, in one line, for a setting that is out of range or an image that can't be read."""
    only = 0 if len(classes) == 1 else None  # every image that was learned has the only class
    return Plan(
        generator=generator,
        seed=request.seed,
        label=only if request.label is None else class_id(request.label, classes),
        prompt=request.prompt,
        condition=None if request.condition is None else open_given_image(request.condition, to_rgb),
        given=given,
        sampling={model.name: sampling_of(model, request, first=model is models[0]) for model in models},
    )


def class_id(label: int | str, classes: Sequence[str]) -> int:
    """Returns the id of a class given by id (also as digits) or by name. Raises ValueError for any other."""
    if isinstance(label, str) and label in classes:
        return classes.index(label)
    if isinstance(label, str) and label.strip().isdecimal():
        label = int(label)
    if isinstance(label, int) and 0 <= label < len(classes):
        return label
    names = ", ".join(f"{index} {name}" for index, name in enumerate(classes[:20]))
    raise ValueError(f"unknown label {label!r}: the classes are {names}{', …' if len(classes) > 20 else ''}")


def check_request(request: Request) -> None:
    """Raise ValueError, in one line, for a request that no generator accepts."""
    if request.prompt is not None and not request.prompt.strip():
        raise ValueError("the prompt is empty; leave it out to sample without one")
    if request.best_of is not None and request.best_of < 1:
        raise ValueError(f"best_of must be at least 1, not {request.best_of}")
    if request.best_of is not None and request.size is not None:
        raise ValueError("best_of and size don't go together: a larger image is not scored as a whole")


def check_conditions(model: SamplingModel, request: Request) -> None:
    """Raise ValueError, in one line, for conditions that the model doesn't take."""
    if request.label is not None:
        if not model.classes:
            raise ValueError(f"the model of stage {model.name} takes no label: it was trained without classes")
        class_id(request.label, model.classes)
    wanted = model.takes_condition_image
    if wanted != (request.condition is not None):
        reason = "needs a condition image, and none is given" if wanted else "takes no condition image"
        raise ValueError(f"the model of stage {model.name} {reason}")
    if request.label is None and len(model.classes) > 1 and not model.network.get("null_label", True):
        raise ValueError(f"the model of stage {model.name} needs a label: it was trained with one in every sample")
    if request.prompt is None:
        shown = request.image or (request.condition and model.network.get("condition_image_channels"))
        asks = len(model.classes) > 1 or (not model.classes and model.reads_words)
        if request.label is None and not shown and asks:  # an image says enough
            raise ValueError("give a label or a prompt")
    elif model.text is not None:
        model.text.check(request.prompt)
    elif not model.reads_by_frozen_encoder:
        raise ValueError(f"the model of stage {model.name} takes no prompt: it was trained without captions")


def condition_images(plans: Sequence[Plan], height: int, width: int, *, nearest: bool = False) -> Tensor:
    """Returns the plans' condition images (B, 3, H, W); every plan must have one."""
    given = [plan.condition for plan in plans if plan.condition is not None]
    return torch.stack([fitted_image(image, height=height, width=width, nearest=nearest) for image in given])


def encode_conditions(model: SamplingModel, plans: Sequence[Plan]) -> Conditions:
    """Returns the conditions of plans on the model's device; a missing label or prompt is the null one."""
    condition: dict[str, Tensor] = {}
    null: dict[str, Tensor] = {}
    if model.classes:
        missing = len(model.classes)  # the null label
        labels = [missing if plan.label is None else plan.label for plan in plans]
        condition["label"] = torch.tensor(labels, device=model.device)
        if model.network.get("null_label", True):
            null["label"] = torch.full_like(condition["label"], missing)
    if model.text is not None:
        condition["text"] = model.text.encode([plan.prompt or "" for plan in plans]).to(model.device)
        null["text"] = model.text.encode([""] * len(plans)).to(model.device)
    if model.network.get("condition_image_channels") and model.takes_condition_image:
        side = model.settings["resolution"]
        condition["condition_image"] = condition_images(plans, side, side).to(model.device)
        null["condition_image"] = torch.zeros_like(condition["condition_image"])
    return Conditions(condition, null)


def given_in_mask(model: SamplingModel, request: Request, *, size: int) -> Given:
    """Returns the image of a request whose mask a model fills by putting known pixels back.
    `size`: height and width of the image.
    Raises ValueError, in one line, for a task, image or mask that can't be met so."""
    if request.task not in (None, *MASK_TASKS):
        raise ValueError(f"this model makes what a mask hides and nothing else: {' or '.join(MASK_TASKS)}")
    if model.network.get("in_channels", 3) != 3:
        raise ValueError(f"the model of stage {model.name} makes no images in color, and keeps no pixels of one")
    return given_for_task(model, request.replace(task=request.task or "inpainting"), MASK_TASKS, size=size)


def given_for_task(model: SamplingModel, request: Request, tasks: Sequence[str], *, size: int | None = None) -> Given:
    """Returns the image of a request for a task of the model's.
    `size`: height and width of the image; None: the model's own.
    Raises ValueError, in one line, for a task, image or mask that the model can't work on."""
    size, task = size or model.settings["resolution"], request.task or (None if len(tasks) > 1 else tasks[0])
    if request.image is None:
        raise ValueError("an image to work on is missing")
    if task not in (None, *TASKS):
        raise ValueError(f"unknown task {task!r}: choose {' or '.join(TASKS)}")
    if task in MASK_TASKS and request.mask is None:
        raise ValueError(f"{task} needs a mask of the image's size, white where pixels are to be made")
    if task not in (None, *MASK_TASKS) and request.mask is not None:
        raise ValueError(f"{task} takes no mask: it changes every pixel")
    if task is None:
        raise ValueError(f"name a task: this model was trained for {', '.join(tasks)}")
    if task not in tasks:
        raise ValueError(f"the model of stage {model.name} was not trained for {task}: {', '.join(tasks)}")
    image = open_given_image(request.image, to_rgb)
    factors = model.settings["super_resolution_factors"] if task == "super_resolution" else [1]
    sides = [size // factor for factor in factors]
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
