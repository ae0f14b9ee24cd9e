"""A trained model for sampling: bundle, text tokenizer and sampling settings.

Shapes: B prompts, L text length.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from pydantic import ValidationError
from tokenizers import Tokenizer
from torch import Tensor

from components.configuration.families import family_of
from components.configuration.sampling import ModelSampling
from components.models.bundle import DESCRIPTION, describe_bundle, load_bundle
from components.sampling.image_files import HOUSE_IDS, SPECIAL_TOKENS, TextIds, encode_text, load_bpe

BPE, STEPS = "bpe.json", "num_inference_steps"
MOST_PIXELS = 2**20  # of a batch


Sampling = TypeVar("Sampling", bound=ModelSampling)


class TextCondition(NamedTuple):
    """How a text-conditional model reads a prompt."""

    bpe: Tokenizer
    text_length: int  # L
    special: TextIds = HOUSE_IDS

    @property
    def most_tokens(self) -> int:
        """Tokens of the longest prompt that is read whole."""
        return self.text_length - self.special.around

    def check(self, prompt: str) -> None:
        """Raise ValueError, in one line, for a prompt of more tokens than are read."""
        check_length(self.num_tokens(prompt), self.most_tokens)

    def num_tokens(self, prompt: str) -> int:
        return len(self.bpe.encode(prompt, add_special_tokens=False).ids)

    def encode(self, prompts: Sequence[str]) -> Tensor:  # (B, L) int64
        return torch.from_numpy(encode_text(self.bpe, prompts, text_length=self.text_length, special=self.special))


def check_length(tokens: int, most: int) -> None:
    """Raise ValueError, in one line, for a prompt of more tokens than are read."""
    if tokens > most:
        raise ValueError(f"the prompt is too long: {tokens} tokens, the model takes at most {most}")


def class_names(network: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """Names of a model's classes by id; numbers where the settings name none."""
    return settings.get("classes") or [str(index) for index in range(network.get("num_classes") or 0)]


class SamplingModel(NamedTuple):
    """A loaded model with the settings of its training and the sampling settings of its stage.
    The module is in fp32 and in eval mode; `describe_model` returns one whose tensors have no memory."""

    name: str  # of its stage: "prior", "base", "upsampler_64"; names its random streams too
    kind: str
    network: dict[str, Any]  # constructor arguments
    settings: dict[str, Any]
    module: Any  # the network of its kind
    text: TextCondition | None  # None if the model takes no prompt
    sampling: ModelSampling  # where a request asks for nothing else

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def classes(self) -> list[str]:
        """Names of the classes by id; empty if the model knows none."""
        return class_names(self.network, self.settings) if self.network.get("num_classes") else []

    @property
    def takes_condition_image(self) -> bool:
        """Tells whether the model takes a condition image, besides an image to work on."""
        given = self.network.get("condition_codebook_size") or self.network.get("condition_image_channels")
        return bool(given) and self.settings.get("role") != "image_to_image"

    @property
    def reads_by_frozen_encoder(self) -> bool:
        """Tells whether the model reads prompts through a frozen network."""
        return bool(self.network.get("text_states_dim") or self.network.get("image_embedding_dim"))

    @property
    def reads_prompts(self) -> bool:
        own = self.text or self.network.get("text") or self.network.get("text_length")
        return bool(own) or self.reads_by_frozen_encoder

    @property
    def has_null(self) -> bool:
        """Tells whether a condition can be left out, for guidance."""
        label = bool(self.classes) and self.network.get("null_label", True)
        return label or self.reads_prompts or self.takes_condition_image

    @property
    def reads_words(self) -> bool:
        """Tells whether the model reads prompts and was trained with captions.
        The tokenizer of a set without captions has bytes and special tokens alone."""
        words = 0 if self.text is None else self.text.bpe.get_vocab_size()
        return self.reads_by_frozen_encoder or words > 256 + len(SPECIAL_TOKENS)

    @property
    def works_alone(self) -> bool:
        """Tells whether no frozen network makes the model's conditions, or images of its latents."""
        encoded = self.reads_by_frozen_encoder or self.network.get("text_dim")
        return not encoded and "latent_scale" not in self.settings


def load_model(
    name: str, folder: Path, *, device: str | torch.device = "cpu", sampling: Mapping[str, Any] | None = None
) -> SamplingModel:
    """Load the bundle in `folder` in fp32 with sampling settings; None: its own, or its kind's defaults.
    Raises ValueError if it is none, lacks its text tokenizer, or can't sample so."""
    kind, network, settings, module = load_bundle(folder)
    text_length = network["text"]["context_length"] if network.get("text") else network.get("text_length")
    text = None
    if text_length:
        if not (folder / BPE).is_file():
            raise ValueError(f"{folder} holds a text-conditional model but no {BPE}")
        special = TextIds(**settings.get("text_ids", {}))
        text = TextCondition(load_bpe(folder / BPE), text_length, special)
    chosen = family_of(kind).sampling or ModelSampling
    values, steps = settings.get("sampling", {}) if sampling is None else sampling, chosen.model_fields.get(STEPS)
    most = settings.get("objective", {}).get("num_train_timesteps") or network.get("num_tokens")
    if steps is not None and most is not None:  # it may have been trained with fewer than the default
        values = {STEPS: min(steps.default, most), **values}
    return SamplingModel(name, kind, network, settings, module.to(device), text, checked(chosen, values, name))


def describe_model(name: str, folder: Path) -> SamplingModel:
    """Describes the model in `folder` without weights, text tokenizer or memory for the network."""
    kind, network, settings, module = describe_bundle((folder / DESCRIPTION).read_bytes())
    return SamplingModel(name, kind, network, settings, module, None, (family_of(kind).sampling or ModelSampling)())


def checked(kind: type[Sampling], values: Mapping[str, Any], stage: str) -> Sampling:
    """Checks the sampling settings of a stage's model. Raises ValueError, in one line, for a misfit."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join([stage, *map(str, first["loc"])])
        if first["type"] == "extra_forbidden":
            known = ", ".join(kind.model_fields) or "nothing"
            raise ValueError(f"{name}: this model takes no such setting; it takes {known}") from None
        got = f" (got {first['input']!r})" if first["loc"] else ""  # else of several fields
        raise ValueError(f"{name}: {first['msg'].removeprefix('Value error, ')}{got}") from None


def most_at_once(resolution: int) -> int:
    """The largest batch size at a resolution: maps of a few gigabytes, at most 64 images."""
    return max(1, min(64, MOST_PIXELS // resolution**2))


def in_slices(make: Callable[[Tensor], Tensor], batch: Tensor, *, resolution: int) -> Tensor:
    """Calls `make` on slices of a batch, of `most_at_once` samples at the resolution of the result."""
    return torch.cat([make(part) for part in batch.split(most_at_once(resolution))])
