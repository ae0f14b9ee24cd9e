"""Frozen text encoders, and the conditions that they and a diffusion prior make of plans.

An encoder is the text tower of a contrastive encoder, or a model of `transformers`, which is imported only where one is
chosen (Saharia et al. 2022, "Photorealistic Text-to-Image Diffusion Models with Deep Language Understanding", section
2.1). A diffusion prior makes the embedding of the image that a prompt asks for (DALL-E 2's first half).

Shapes: B texts or plans, L text length, D features of a state, E embedding of a contrastive encoder.
"""

import json
from collections.abc import Callable, Collection, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from components.models.bundle import DESCRIPTION, load_bundle
from components.models.contrastive import ContrastiveEncoder, unit_variance
from components.models.diffusion.guidance import guide
from components.models.diffusion.objective import make_objective
from components.models.diffusion.samplers import sample
from components.sampling.image_files import LOWERED, load_bpe
from components.sampling.model import BPE, SamplingModel, TextCondition, check_length
from components.sampling.plan import Conditions, Plan, best_of, noise_of

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"  # as save_pretrained writes them
SHARDS = f"{WEIGHTS}.index.json"  # in place of WEIGHTS: the names of several files
WORDS = ("vocab.json", "merges.txt")  # in place of TOKENIZER, as CLIP's
TOKENIZER_CONFIG = "tokenizer_config.json"  # may be missing; names the pad
ELSEWHERE = {"spiece.model": TOKENIZER, "pytorch_model.bin": WEIGHTS}  # not read here, and what stands for it
LENGTH = "text_encoder.json"  # {"length": …}: what texts are padded or cut to; fields of PretrainedText, if others


class FrozenTextError(ValueError):
    """The chosen text encoder is missing; the message says how to install the encoder."""


class FrozenText(Protocol):
    """The interface of both kinds of encoder; the null text of guidance is the empty text, ""."""

    states_shape: tuple[int, int]  # (L, D)

    def check(self, prompt: str) -> None:
        """Raise ValueError, in one line, for a prompt that would lose its end."""

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Encodes captions as states (B, L, D) fp32 for another network, zeros at padding."""


class ContrastiveText:
    """The text tower of a contrastive encoder, with its tokenizer."""

    def __init__(self, network: ContrastiveEncoder, text: TextCondition) -> None:
        self.network, self.text = network, text
        self.states_shape = (text.text_length, network.text_projection.in_features)

    def check(self, prompt: str) -> None:
        self.text.check(prompt)

    def encode(self, captions: Sequence[str]) -> Tensor:
        return self.conditions(captions)["text_states"]

    def conditions(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """The conditions of a diffusion prior: text_states (B, L, D) and text_embedding (B, E).
        Embeddings are scaled from length 1 to unit variance of their components, the scale of network inputs."""
        return self.encode_ids(self.text.encode(captions).to(self.network.log_scale.device))

    @torch.no_grad()
    def encode_ids(self, text: Tensor) -> dict[str, Tensor]:
        """Encodes ids (B, L) of the contrastive tokenizer as `conditions`."""
        states, embedding = self.network.encode_text(text)
        return {"text_states": states, "text_embedding": unit_variance(embedding)}


class PretrainedText:
    """The encoder of a `transformers` model such as T5 or BERT, with the model's tokenizer.
    `length`: L; longer captions lose their end. `attend_padding`: pads are tokens as others, with states, as in Stable
    Diffusion; else their states are zeros. `lowered`: texts are as captions in training, which are decoded from ids."""

    def __init__(
        self,
        network: nn.Module,
        tokenizer: Tokenizer,
        *,
        length: int,
        width: int,
        pad_id: int,
        attend_padding: bool = False,
        lowered: bool = False,
    ) -> None:
        self.network, self.tokenizer = network.eval().requires_grad_(False), tokenizer
        self.states_shape, self.attend_padding, self.lowered = (length, width), attend_padding, lowered
        self.tokenizer.enable_truncation(length)
        self.tokenizer.enable_padding(length=length, pad_id=pad_id)

    def check(self, prompt: str) -> None:
        first = self.tokenizer.encode(self.as_trained(prompt), add_special_tokens=False)
        tokens = sum(sum(part.attention_mask) for part in (first, *first.overflowing))
        check_length(tokens, self.states_shape[0] - self.tokenizer.num_special_tokens_to_add(is_pair=False))

    def as_trained(self, caption: str) -> str:
        return LOWERED.normalize_str(caption).strip() if self.lowered else caption

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> Tensor:
        encodings = self.tokenizer.encode_batch([self.as_trained(caption) for caption in captions])
        device = next(self.network.parameters()).device
        ids = torch.tensor([encoding.ids for encoding in encodings], device=device)
        present = torch.tensor([encoding.attention_mask for encoding in encodings], device=device)
        present = torch.ones_like(present) if self.attend_padding else present
        present[:, 0] = 1  # an empty text of a tokenizer without begin and end is one pad
        states = self.network(input_ids=ids, attention_mask=present).last_hidden_state.float()
        return states * present[..., None]


def load_frozen_text(folder: Path, *, device: str | torch.device = "cpu") -> FrozenText:
    """Loads the text encoder in `folder`: a contrastive model, or a pretrained one next to its length.
    Raises FrozenTextError if the folder holds neither, or `transformers` is not installed where it is needed."""
    if (folder / DESCRIPTION).is_file():
        return contrastive_text(folder, device=device)
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    encoder_files(str(folder), names, lambda name: (folder / name).read_bytes(), needed=(LENGTH,))
    return pretrained_text(folder, device=device, **json.loads((folder / LENGTH).read_text()))


def encoder_files(
    place: str, names: Collection[str], read: Callable[[str], bytes], *, needed: Sequence[str] = ()
) -> list[str]:
    """Names of the files of a pretrained encoder, among the files at `place`.
    Raises FrozenTextError, with `place`, if one of them or of those `needed` is missing."""
    weights = [WEIGHTS]
    if WEIGHTS not in names and SHARDS in names:
        weights = [SHARDS, *files_of_index(read(SHARDS))]
    tokenizer = WORDS if TOKENIZER not in names and set(WORDS) <= set(names) else (TOKENIZER,)
    wanted = [CONFIG, *tokenizer, *weights, *needed]
    if missing := [name for name in wanted if name not in names]:
        old = [name for name, new in ELSEWHERE.items() if name in names and new in missing]
        remedy = "give a folder that transformers wrote by save_pretrained of a model and its tokenizer, or train a "
        remedy += "contrastive encoder and take its text tower"
        if old:
            remedy = f"{' and '.join(old)} stay closed here, components/weights/README.md says how to convert them"
        raise FrozenTextError(f"{place} holds no text encoder, it lacks {', '.join(missing)}: {remedy}")
    return [*wanted, *({TOKENIZER_CONFIG} & set(names))]


def files_of_index(index: bytes) -> list[str]:
    """Names of the files that stand in place of one, by their index. Raises ValueError for another file."""
    try:
        return sorted(set(json.loads(index)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError("an index of weights has no weight_map that names their files: fetch it again") from None


def contrastive_text(folder: Path, *, device: str | torch.device = "cpu") -> ContrastiveText:
    """Loads the text tower of the contrastive model in `folder`.
    Raises FrozenTextError for a model of another kind."""
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


def pretrained_text(
    folder: Path,
    *,
    device: str | torch.device,
    length: int,
    pads: str = "hidden",
    skipped_layers: int = 0,
    lowered: bool = False,
) -> PretrainedText:
    """Loads the encoder of text of a `transformers` model in a local folder, without downloads.
    `pads`: "attended", as tokens, or "hidden", with states of zero. `skipped_layers`: last layers left out; the norm
    after the last one stays. Raises FrozenTextError if the package is missing or can't load the model, or for too many
    skipped_layers."""
    check_transformers()
    network = pretrained_encoder(folder)
    config = network.config
    if not 0 <= skipped_layers < (depth := config.num_hidden_layers):
        raise FrozenTextError(f"skipped_layers must be in [0, {depth - 1}] for the model in {folder}: {skipped_layers}")
    lists = (module for module in network.modules() if isinstance(module, nn.ModuleList) and len(module) == depth)
    if (layers := next(lists, None)) is not None:
        del layers[depth - skipped_layers :]
    elif skipped_layers:  # of ALBERT, whose layers are one
        raise FrozenTextError(
            f"skipped_layers must be 0 for the model in {folder}, which has no list of {depth} layers"
        )
    tokenizer, pad_id = pretrained_tokenizer(folder, config)
    sizes = {"length": length, "width": int(config.hidden_size), "pad_id": pad_id}
    reads = {"attend_padding": pads == "attended", "lowered": lowered}
    return PretrainedText(network.to(device), tokenizer, **reads, **sizes)


def pretrained_encoder(folder: Path) -> Any:
    """The encoder of text of a `transformers` model in a local folder.
    Raises FrozenTextError if the package can't load it, or weights of it are missing."""
    from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING as ENCODERS
    from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, CLIPTextModel
    from transformers.utils import logging

    logging.disable_progress_bar()  # of a command's standard error
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        known = type(config) in ENCODERS  # of T5 the encoder alone
        cls: Any = CLIPTextModel if config.model_type == "clip" else AutoModelForTextEncoding if known else AutoModel
        found = cls.from_pretrained(folder, local_files_only=True, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise FrozenTextError(f"transformers can't load the model in {folder}: {error}") from error
    network, info = found
    missing = sorted(name for name in info["missing_keys"] if "pooler" not in name)
    if missing:
        raise FrozenTextError(f"the model in {folder} lacks {len(missing)} weights, first {missing[0]}")
    return network.get_encoder() if config.is_encoder_decoder and cls is AutoModel else network


def pretrained_tokenizer(folder: Path, config: Any) -> tuple[Tokenizer, int]:
    """The tokenizer of a `transformers` model in a local folder, and the id of its pad.
    The model's own config.json may name another pad than texts had (CLIP of Stable Diffusion: 1 in place of 49,407)."""
    if (folder / TOKENIZER).is_file():
        tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    else:
        from transformers import AutoTokenizer, CLIPTokenizer

        cls: Any = CLIPTokenizer if config.model_type.startswith("clip") else AutoTokenizer
        tokenizer = cls.from_pretrained(folder, local_files_only=True).backend_tokenizer
    stated = json.loads((folder / TOKENIZER_CONFIG).read_text()) if (folder / TOKENIZER_CONFIG).is_file() else {}
    pad = stated.get("pad_token")  # a word, or a field of one
    pad_id = tokenizer.token_to_id(pad["content"] if isinstance(pad, dict) else pad) if pad else None
    if pad_id is None and tokenizer.padding is not None:
        pad_id = tokenizer.padding["pad_id"]
    return tokenizer, (config.pad_token_id or 0) if pad_id is None else pad_id


def frozen_conditions(
    model: SamplingModel,
    plans: Sequence[Plan],
    *,
    text: FrozenText | None = None,
    prior: SamplingModel | None = None,
    on_step: Callable[..., None] | None = None,
) -> Conditions:
    """Returns a diffusion model's conditions from frozen networks, and the null of each condition.
    They are text_states (B, L, D) and image_embedding (B, E), as the model takes them; a plan without a prompt counts
    as the empty text. `text`: the encoder that the model, or the diffusion prior before it, was trained with. Raises
    ValueError, in one line, if one that is needed is missing or does not fit."""
    condition, null = dict[str, Tensor](), dict[str, Tensor]()
    if width := model.network.get("text_states_dim"):
        if text is None or text.states_shape[1] != width:
            raise ValueError(f"the model of stage {model.name} needs a text encoder of {width} features a token")
        condition["text_states"] = text.encode([plan.prompt or "" for plan in plans])
        null["text_states"] = text.encode([""]).expand_as(condition["text_states"])
    if size := model.network.get("image_embedding_dim"):
        if prior is None or prior.network["embedding_dim"] != size or not isinstance(text, ContrastiveText):
            raise ValueError(
                f"the model of stage {model.name} needs a diffusion prior over {size} numbers, and the encoder of that"
            )
        embedding = sample_image_embeddings(prior, text, plans, on_step=on_step)
        condition["image_embedding"] = embedding.to(model.device)
        null["image_embedding"] = torch.zeros_like(condition["image_embedding"])
    return Conditions(condition, null)


def sample_image_embeddings(
    model: SamplingModel,
    text: ContrastiveText,
    plans: Sequence[Plan],
    *,
    on_step: Callable[..., None] | None = None,
) -> Tensor:
    """Image embeddings (B, E) of unit variance for the plans' prompts, by a diffusion prior on its device.
    Of several candidates (two, as published) each plan gets the one nearest to the text's embedding. Diffusion runs
    without clipping; the samplers see images of one pixel. `text`: the tower that the prior was trained with."""
    sampling, objective = plans[0].of(model), make_objective(model.settings["objective"])
    condition = text.conditions([plan.prompt or "" for plan in plans])

    def network(x_t: Tensor, time: Tensor, **conditions: Tensor) -> Tensor:
        return model.module(x_t[:, :, 0, 0], time, **conditions)[:, :, None, None]

    guided = guide(objective, network, condition, text.conditions([""] * len(plans)), sampling.guidance_scale)

    def candidate(number: int) -> Tensor:
        stage = model.name if number == 0 else f"{model.name}/{number}"
        noise = noise_of(plans, stage, (model.network["embedding_dim"], 1, 1), model.device)
        settings = sampling.model_dump(include={"sampler", "num_inference_steps"})
        x_0 = sample(guided, objective, noise(), noise=noise, threshold="none", on_step=on_step, **settings)
        return unit_variance(x_0[:, :, 0, 0])

    likeness = partial(F.cosine_similarity, condition["text_embedding"])
    return best_of(candidate, likeness, n=sampling.candidates)
