"""A plan: a request resolved against a model, once. Generators read plans, never requests.

Shapes: B plans, L text length, S resolution.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from components.configuration.sampling import ModelSampling
from components.sampling.image_files import open_given_image
from components.sampling.images import fitted_image
from components.sampling.model import (
    SamplingModel,
    TextCondition,
    checked,
    reads_by_frozen_encoder,
    takes_condition_image,
)
from components.sampling.requests import Request, class_id, request_options


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
    sampling: Mapping[str, ModelSampling] = field(default_factory=dict)  # by stage; of the others the model's own
    candidates: int = 1  # images of which the best is kept
    grid: tuple[int, int] | None = None  # of tokens, height and width, where it is larger than the trained one
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

    Both hold tensors with the batch as first dimension, by the argument names of the network.
    """

    condition: dict[str, Tensor]  # label (B,), text (B, L), condition_image (B, 3, S, S): what the network takes
    null: dict[str, Tensor]  # the same keys: what stands for "no condition"


def random_stream(seed: int, stage: str) -> torch.Generator:
    """Returns a CPU generator for an image (by its seed) and a stage.

    Neither the batch nor another stage moves the stream.
    """
    digest = hashlib.sha256(f"{seed}/{stage}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))


def sampling_of(model: SamplingModel, request: Request, *, first: bool) -> ModelSampling:
    """Returns the model's sampling settings, with the request's settings of the stage.

    Args:
        first: whether the model is the generator's first one, which most of the request's options are for.

    Raises ValueError, in one line, for a value that does not fit.
    """
    changes: dict[str, Any] = {}
    for name, option in request_options().items():
        value = getattr(request, name)
        if option.setting and value is not None and (option.stage == model.name or (first and not option.stage)):
            changes[option.setting] = value
    changes |= {name: value for stage, name, value in request.sampling if stage == model.name}
    return (
        checked(type(model.sampling), model.sampling.model_dump() | changes, model.name) if changes else model.sampling
    )


def plan_of(
    request: Request,
    models: Sequence[SamplingModel],
    classes: Sequence[str],
    *,
    generator: str = "",
    given: Given | None = None,
) -> Plan:
    """Returns the plan of a request with checked conditions.

    Args:
        models: whose sampling settings the request may change, the one that its options are for first.
        classes: names by id.

    Raises ValueError, in one line, for a setting that is out of range or an image that can't be read.
    """
    return Plan(
        generator=generator,
        seed=request.seed,
        label=None if request.label is None else class_id(request.label, classes),
        prompt=request.prompt,
        condition=None if request.condition is None else open_given_image(request.condition),
        given=given,
        sampling={model.name: sampling_of(model, request, first=model is models[0]) for model in models},
    )


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
    wanted = takes_condition_image(model)
    if wanted != (request.condition is not None):
        reason = "needs a condition image, and none is given" if wanted else "takes no condition image"
        raise ValueError(f"the model of stage {model.name} {reason}")
    if request.label is None and model.classes and not model.network.get("null_label", True):
        raise ValueError(f"the model of stage {model.name} needs a label: it was trained with one in every sample")
    if request.prompt is None:
        shown = request.image or (request.condition and model.network.get("condition_image_channels"))
        asks = model.classes or model.text or reads_by_frozen_encoder(model)
        if request.label is None and not shown and asks:  # an image says enough
            raise ValueError("give a label or a prompt")
    elif model.text is not None:
        check_prompt_length(model.text, request.prompt)
    elif not reads_by_frozen_encoder(model):
        raise ValueError(f"the model of stage {model.name} takes no prompt: it was trained without captions")


def check_prompt_length(text: TextCondition, prompt: str) -> None:
    """Raise ValueError if the prompt has more tokens than the model was trained with."""
    length, limit = text.num_tokens(prompt), text.text_length - 2
    if length > limit:
        raise ValueError(f"the prompt is too long: {length} tokens, the model takes at most {limit}")


def encode_conditions(model: SamplingModel, plans: Sequence[Plan]) -> Conditions:
    """Returns the conditions of plans on the model's device.

    A missing label or prompt becomes the null condition.
    """
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
    if model.network.get("condition_image_channels") and takes_condition_image(model):
        size = model.settings["resolution"]
        images = [fitted_image(plan.condition, resolution=size) for plan in plans if plan.condition is not None]
        condition["condition_image"] = torch.stack(images).to(model.device)
        null["condition_image"] = torch.zeros_like(condition["condition_image"])
    return Conditions(condition, null)
