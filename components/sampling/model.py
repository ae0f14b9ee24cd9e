"""A trained model as sampling uses it: its bundle, its text tokenizer, and requests as its conditions.

Shapes: B requests, L text length, S resolution.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from pydantic import ValidationError
from tokenizers import Tokenizer
from torch import Tensor, nn

from components.configuration.families import family_of
from components.configuration.sampling import ModelSampling
from components.models.bundle import DESCRIPTION, describe_bundle, load_bundle
from components.models.diffusion.degradation import MASK_TASKS, TASKS
from components.sampling.images import read_image
from components.sampling.requests import Request, class_id
from components.sampling.text_encoding import encode_text, load_bpe

BPE = "bpe.json"
MOST_PIXELS = 2**20  # of a batch


Sampling = TypeVar("Sampling", bound=ModelSampling)


class TextCondition(NamedTuple):
    """How a text-conditional model reads a prompt."""

    bpe: Tokenizer
    text_length: int  # L

    def num_tokens(self, prompt: str) -> int:
        return len(self.bpe.encode(prompt, add_special_tokens=False).ids)

    def encode(self, prompts: Sequence[str]) -> Tensor:  # (B, L) int64
        return torch.from_numpy(encode_text(self.bpe, prompts, text_length=self.text_length))


class SamplingModel(NamedTuple):
    name: str  # of its stage: "prior", "base", "upsampler_64"; names its random streams too
    kind: str
    network: dict[str, Any]  # constructor arguments
    settings: dict[str, Any]
    module: nn.Module
    text: TextCondition | None  # None if the model takes no prompt
    sampling: ModelSampling  # where a request asks for nothing else

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def classes(self) -> list[str]:
        """Names of the classes by id; empty if the model knows none."""
        num_classes = self.network.get("num_classes") or 0
        names = self.settings.get("classes") or [str(index) for index in range(num_classes)]
        return names if num_classes else []


class Conditions(NamedTuple):
    condition: dict[str, Tensor]  # label (B,), text (B, L), condition_image (B, 3, S, S): what the network takes
    null: dict[str, Tensor]  # the same keys: what stands for "no condition"


def load_model(
    name: str, folder: Path, *, device: str | torch.device = "cpu", sampling: Mapping[str, Any] | None = None
) -> SamplingModel:
    """Load the bundle in `folder`, in fp32, with how it samples; None: as its kind does.

    Raises ValueError if it is none, lacks its text tokenizer, or can't sample so.
    """
    kind, network, settings, module = load_bundle(folder)
    text_length = network["text"]["context_length"] if network.get("text") else network.get("text_length")
    text = None
    if text_length:
        if not (folder / BPE).is_file():
            raise ValueError(f"{folder} holds a text-conditional model but no {BPE}")
        text = TextCondition(load_bpe(folder / BPE), text_length)
    chosen = family_of(kind).sampling or ModelSampling
    values = fewest_steps(chosen, network, settings) | dict(sampling or {})
    return SamplingModel(name, kind, network, settings, module.to(device), text, checked(chosen, values, name))


def fewest_steps(kind: type[ModelSampling], network: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, int]:
    """The default number of steps, where a model has fewer of them."""
    most = settings.get("objective", {}).get("num_train_timesteps") or network.get("num_tokens")
    field = kind.model_fields.get("num_inference_steps")
    return {} if field is None or most is None else {"num_inference_steps": min(field.default, most)}


def describe_model(name: str, folder: Path) -> SamplingModel:
    """The model in `folder` without weights and text tokenizer, its network without memory."""
    kind, network, settings, module = describe_bundle((folder / DESCRIPTION).read_bytes())
    return SamplingModel(name, kind, network, settings, module, None, (family_of(kind).sampling or ModelSampling)())


def checked(kind: type[Sampling], values: Mapping[str, Any], stage: str) -> Sampling:
    """Sampling settings of the model of a stage. Raises ValueError, in one line, for a value that does not fit."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join([stage, *map(str, first["loc"])])
        if first["type"] == "extra_forbidden":
            known = ", ".join(kind.model_fields) or "nothing"
            raise ValueError(f"{name}: this model takes no such setting; it takes {known}") from None
        got = f" (got {first['input']!r})" if first["loc"] else ""  # else of several fields, which the message names
        raise ValueError(f"{name}: {first['msg'].removeprefix('Value error, ')}{got}") from None


def sampling_of(model: SamplingModel, request: Request, **asked: Any) -> Any:
    """The model's sampling settings with what the request sets for its stage.

    Args:
        asked: settings that the request has a short name for; None is not asked.

    Raises ValueError, in one line, for a value that does not fit.
    """
    changes = {name: value for name, value in asked.items() if value is not None}
    changes |= {name: value for stage, name, value in request.sampling if stage == model.name}
    return checked(type(model.sampling), model.sampling.model_dump() | changes, model.name)


def most_at_once(resolution: int) -> int:
    """Images of a batch: as many as a network's maps of them fit into a few gigabytes, at most 64."""
    return max(1, min(64, MOST_PIXELS // resolution**2))


def in_slices(make: Callable[[Tensor], Tensor], batch: Tensor, *, resolution: int) -> Tensor:
    """What `make` makes of a batch, `most_at_once` at the resolution of what it makes; a smaller batch as it is."""
    return torch.cat([make(part) for part in batch.split(most_at_once(resolution))])


def takes_condition_image(model: SamplingModel) -> bool:
    """Whether the model wants another image to be conditioned on, besides one to work on."""
    if model.settings.get("role") == "image_to_image":
        return False
    return bool(model.network.get("condition_codebook_size") or model.network.get("condition_image_channels"))


def check_conditions(model: SamplingModel, request: Request) -> None:
    """Raise ValueError, in one line, if the model can't be conditioned on what the request names."""
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


def reads_prompts(model: SamplingModel) -> bool:
    """Whether requests may have a prompt."""
    return bool(model.text or model.network.get("text") or model.network.get("text_length")) or reads_by_frozen_encoder(
        model
    )


def reads_by_frozen_encoder(model: SamplingModel) -> bool:
    """Whether prompts come to the model through a network that was trained before."""
    return bool(model.network.get("text_states_dim") or model.network.get("image_embedding_dim"))


def works_alone(kind: str, network: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether a model needs none of the networks that were trained before it: what makes its conditions, or images of
    its latents."""
    frozen = network.get("text_states_dim") or network.get("image_embedding_dim")
    return kind != "diffusion_prior" and not frozen and "latent_scale" not in settings


def check_prompt_length(text: TextCondition, prompt: str) -> None:
    """Raise ValueError if the prompt has more tokens than the model was trained with."""
    length, limit = text.num_tokens(prompt), text.text_length - 2
    if length > limit:
        raise ValueError(f"the prompt is too long: {length} tokens, the model takes at most {limit}")


def random_stream(seed: int, stage: str) -> torch.Generator:
    """Returns a CPU generator for an image (by its seed) and a stage: no batch and no other stage moves it."""
    digest = hashlib.sha256(f"{seed}/{stage}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))


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


def encode_conditions(model: SamplingModel, requests: Sequence[Request]) -> Conditions:
    """Conditions of checked requests on the model's device; a missing label or prompt becomes the null condition."""
    condition: dict[str, Tensor] = {}
    null: dict[str, Tensor] = {}
    if model.classes:
        missing = len(model.classes)  # the null label
        labels = [missing if r.label is None else class_id(r.label, model.classes) for r in requests]
        condition["label"] = torch.tensor(labels, device=model.device)
        if model.network.get("null_label", True):
            null["label"] = torch.full_like(condition["label"], missing)
    if model.text is not None:
        condition["text"] = model.text.encode([r.prompt or "" for r in requests]).to(model.device)
        null["text"] = model.text.encode([""] * len(requests)).to(model.device)
    if model.network.get("condition_image_channels") and takes_condition_image(model):
        size = model.settings["resolution"]
        images = [read_image(request.condition or b"", resolution=size) for request in requests]
        condition["condition_image"] = torch.stack(images).to(model.device)
        null["condition_image"] = torch.zeros_like(condition["condition_image"])
    return Conditions(condition, null)
