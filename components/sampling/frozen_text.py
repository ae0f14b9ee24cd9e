"""Frozen text encoders: the text tower of a contrastive encoder, or a model of `transformers`.

Pretrained encoders follow Saharia et al. 2022, "Photorealistic Text-to-Image Diffusion Models with Deep Language
Understanding", section 2.1.

`transformers` is imported only where a pretrained encoder is chosen.

Shapes: B texts, L their length, D features of a state, E embedding of a contrastive encoder.
"""

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from components.models.bundle import DESCRIPTION, load_bundle
from components.models.contrastive import ContrastiveEncoder, unit_variance
from components.sampling.model import TextCondition
from components.sampling.text_encoding import load_bpe

BPE = "bpe.json"
PRETRAINED_FILES = ("config.json", "tokenizer.json", "model.safetensors")  # as save_pretrained writes them
LENGTH = "text_encoder.json"  # {"length": ...}: of what texts are padded or cut to


class FrozenTextError(RuntimeError):
    """The chosen text encoder is missing; the message says how to install the encoder."""


class TextStates(NamedTuple):
    """States of texts from a frozen encoder without a common embedding of text and image."""

    states: Tensor  # (B, L, D) fp32, zeros at padding


class EmbeddedStates(NamedTuple):
    """States of texts from a contrastive encoder, and the texts' embeddings.

    The embedding is scaled from length 1 to unit variance of its components, the scale of network inputs.
    """

    states: Tensor  # (B, L, D) fp32, zeros at padding
    embedding: Tensor  # (B, E) of unit variance


class FrozenText(Protocol):
    """The interface of both kinds of encoder.

    The null text of guidance is the empty text, "".
    """

    states_shape: tuple[int, int]  # (L, D)

    def encode(self, captions: Sequence[str]) -> TextStates | EmbeddedStates:
        """Encodes captions as conditions of another network."""


class ContrastiveText:
    """The text tower of a contrastive encoder, with its tokenizer."""

    def __init__(self, network: ContrastiveEncoder, text: TextCondition) -> None:
        self.network, self.text = network, text
        self.states_shape = (text.text_length, network.text_projection.in_features)

    def encode(self, captions: Sequence[str]) -> EmbeddedStates:
        return self.encode_ids(self.text.encode(captions).to(self.network.log_scale.device))

    @torch.no_grad()
    def encode_ids(self, text: Tensor) -> EmbeddedStates:
        """Encodes ids (B, L) of the contrastive tokenizer."""
        states, embedding = self.network.encode_text(text)
        return EmbeddedStates(states, unit_variance(embedding))


class PretrainedText:
    """The encoder of a `transformers` model such as T5 or BERT, with the model's tokenizer.

    Args:
        length: L; longer texts lose their end.
    """

    def __init__(self, network: nn.Module, tokenizer: Tokenizer, *, length: int, width: int, pad_id: int) -> None:
        self.network, self.tokenizer, self.states_shape = (
            network.eval().requires_grad_(False),
            tokenizer,
            (length, width),
        )
        self.tokenizer.enable_truncation(length)
        self.tokenizer.enable_padding(length=length, pad_id=pad_id)

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> TextStates:
        encodings = self.tokenizer.encode_batch(list(captions))
        device = next(self.network.parameters()).device
        ids = torch.tensor([encoding.ids for encoding in encodings], device=device)
        present = torch.tensor([encoding.attention_mask for encoding in encodings], device=device)
        present[:, 0] = 1  # an empty text of a tokenizer without begin and end is one pad
        states = self.network(input_ids=ids, attention_mask=present).last_hidden_state.float()
        return TextStates(states * present[..., None])


def load_frozen_text(folder: Path, *, device: str | torch.device = "cpu") -> FrozenText:
    """Loads the text encoder in `folder`.

    The encoder is a contrastive model of this house, or a pretrained model next to its length.

    Raises:
        FrozenTextError: the folder holds neither, or `transformers` is not installed where it is needed.
    """
    if (folder / DESCRIPTION).is_file():
        return contrastive_text(folder, device=device)
    missing = [name for name in (*PRETRAINED_FILES, LENGTH) if not (folder / name).is_file()]
    if missing:
        raise FrozenTextError(
            f"{folder} holds no text encoder, it lacks {', '.join(missing)}: give the folder of a contrastive model, "
            "or what the text_encoder stage makes of one that transformers wrote"
        )
    return pretrained_text(folder, device=device, length=int(json.loads((folder / LENGTH).read_text())["length"]))


def contrastive_text(folder: Path, *, device: str | torch.device = "cpu") -> ContrastiveText:
    """Loads the text tower of the contrastive model in `folder`.

    Raises FrozenTextError for a model of another kind.
    """
    bundle = load_bundle(folder)
    if not isinstance(bundle.module, ContrastiveEncoder) or not (folder / BPE).is_file():
        raise FrozenTextError(f"{folder} holds a {bundle.kind} model and no contrastive one with its {BPE}")
    text = TextCondition(load_bpe(folder / BPE), bundle.network["text"]["context_length"])
    return ContrastiveText(bundle.module.to(device).requires_grad_(False), text)


def check_transformers() -> None:
    """Raise FrozenTextError if the library of pretrained encoders is not installed."""
    if find_spec("transformers") is None:
        raise FrozenTextError(
            "a pretrained text encoder needs transformers: pip install 'image-cascade[text]', or take the text tower "
            "of a contrastive encoder that you train"
        )


def pretrained_text(folder: Path, *, device: str | torch.device, length: int) -> PretrainedText:
    """Loads the encoder of a `transformers` model in a local folder, without downloads.

    Of a model with encoder and decoder only the encoder is loaded. Raises FrozenTextError if the package is missing or
    can't load it.
    """
    check_transformers()
    from transformers import AutoModel

    try:
        network = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise FrozenTextError(f"transformers can't load the model in {folder}: {error}") from error
    config = network.config
    network = network.get_encoder() if config.is_encoder_decoder else network
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return PretrainedText(
        network.to(device), tokenizer, length=length, width=int(config.hidden_size), pad_id=config.pad_token_id or 0
    )
