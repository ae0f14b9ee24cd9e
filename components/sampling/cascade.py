"""The whole cascade on disk and at work: the generators from a request to an image.

    diffusion: (prompt -> frozen text encoder -> (diffusion prior ->)) base (-> autoencoder's decoder) -> upsampler -> …
    tokens:    (tokens of a condition image ->) prior -> tokenizer's decoder -> image
    pixels:    PixelCNN or PixelRNN -> image
    gan, vae:  noise -> generator or decoder -> image
    translate: an image with something missing -> image-to-image model -> image

On disk it is a folder with one sub-folder for each model and `cascade.json`:
    {"stages": {"tokenizer": "tokenizer", "prior": "prior", "base": "base", "upsamplers": ["upsampler_64"]}}
A cascade has one generator at least. Imports only what the packed model of the registry carries.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from components.models.autoencoder import Autoencoder
from components.models.transformer import Transformer
from components.sampling.classifier import check_guides
from components.sampling.condition import condition_tokens
from components.sampling.diffusion import check_sampling, sample_base, sample_upsampler
from components.sampling.frozen_conditions import frozen_conditions
from components.sampling.frozen_text import ContrastiveText, FrozenText, contrastive_text, load_frozen_text
from components.sampling.gan import sample_gan
from components.sampling.image_to_image import check_translation, translate
from components.sampling.images import to_uint8
from components.sampling.model import (
    Conditions,
    SamplingModel,
    check_conditions,
    check_prompt_length,
    generator_of,
    load_model,
    most_at_once,
    takes_condition_image,
)
from components.sampling.pixels import sample_pixels
from components.sampling.prior import check_prior, sample_best, sample_prior
from components.sampling.requests import Request, check_request, class_id
from components.sampling.vae import sample_vae

DESCRIPTION = "cascade.json"
SNAPSHOTS = "snapshots"  # of averages, to choose a model's from: of use next to the model only
OnStep = Callable[[str, int, float, Tensor, Tensor], None]  # (stage, step from 0, time, x_t, clipped x_0)
Images = dict[str, np.ndarray]  # stage -> uint8 (H, W, 3), in the order in which they were made


class ConditionImages(NamedTuple):
    """What a request's condition image is."""

    resolution: int
    member: str  # what of a sample it was in training: image, depth or mask


def compose(folder: Path, *, upsamplers: Mapping[str, Path] | None = None, **parts: Path) -> Path:
    """Copy the folders of trained models into `folder` as one cascade.

    Args:
        upsamplers: by stage name, smallest first.
        parts: the other fields of `Cascade` by name, those that there are.
    """
    for name, source in {**parts, **(upsamplers or {})}.items():
        shutil.copytree(source, folder / name, dirs_exist_ok=True, ignore=shutil.ignore_patterns(SNAPSHOTS))
    description = {"stages": {name: name for name in parts} | {"upsamplers": list(upsamplers or {})}}
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1))
    return folder


@dataclass(frozen=True)
class Cascade:
    """Loaded models, in fp32."""

    tokenizer: SamplingModel | None = None
    prior: SamplingModel | None = None
    condition: SamplingModel | None = None  # tokenizer of the images that the prior is conditioned on
    base: SamplingModel | None = None
    autoencoder: SamplingModel | None = None  # decoder of a base that makes latents
    contrastive: ContrastiveText | None = None  # reads prompts for the base (Imagen) or the diffusion prior (DALL-E 2)
    text_encoder: FrozenText | None = None  # the same, pretrained elsewhere
    diffusion_prior: SamplingModel | None = None
    classifier: SamplingModel | None = None  # of noisy images; guides the base
    upsamplers: tuple[SamplingModel, ...] = ()
    model: SamplingModel | None = None  # makes images by itself: PixelCNN, PixelRNN, GAN, VAE, image-to-image

    def __post_init__(self) -> None:
        """Raise ValueError if the models don't fit each other."""
        made = self.autoencoder or self.base
        for upsampler in self.upsamplers:
            takes, makes = upsampler.settings["low_res_resolution"], made.settings["resolution"] if made else None
            if takes != makes:
                raise ValueError(f"{upsampler.name} enlarges {takes}² images, the stage before it makes {makes}²")
            made = upsampler
        if self.base is not None and ("latent_scale" in self.base.settings) != (self.autoencoder is not None):
            raise ValueError("a base that makes latents and the autoencoder of those latents need each other")
        if self.base is not None and self.classifier is not None:
            check_guides(self.classifier, self.base)

    @classmethod
    def load(cls, folder: Path | str, *, device: str | torch.device = "cpu") -> "Cascade":
        """Load a composed cascade. Raises ValueError if `folder` holds none."""
        path = Path(folder) / DESCRIPTION
        if not path.is_file():
            raise ValueError(f"{folder} holds no {DESCRIPTION}; give the folder of a composed cascade")
        stages = json.loads(path.read_text())["stages"]
        names = stages.pop("upsamplers", [])
        single = {name: load_part(name, path.parent / sub, device=device) for name, sub in stages.items()}
        return cls(**single, upsamplers=tuple(load_model(name, path.parent / name, device=device) for name in names))

    @property
    def generators(self) -> tuple[str, ...]:
        return tuple(self.first_models)

    @property
    def first_models(self) -> dict[str, SamplingModel]:
        """Generator -> the model that it starts with, whose conditions a request may name."""
        own = (generator_of(self.model) if self.model else None) or ""
        starts = {"diffusion": self.base, "tokens": self.prior if self.tokenizer else None, own: self.model}
        return {generator: model for generator, model in starts.items() if model is not None}

    def classes(self, generator: str) -> list[str]:
        """Names of the classes that requests of a generator may ask for, by id: those of its first model, or where that
        knows none, those of the classifier that guides it."""
        own = self.first_models[generator].classes
        return own if own or generator != "diffusion" or self.classifier is None else self.classifier.classes

    @property
    def most_at_once(self) -> int:
        """Images of one batch."""
        models = [model for model in (*self.first_models.values(), self.autoencoder, *self.upsamplers) if model]
        sides = [model.settings.get("resolution") or 1 for model in models]
        return most_at_once(max(sides))

    @property
    def condition_images(self) -> ConditionImages | None:
        """What images it is conditioned on, by their tokenizer or by a base that takes them; None if on none."""
        if self.condition is not None:
            return ConditionImages(self.condition.settings["resolution"], self.condition.settings["member"])
        if self.base is not None and takes_condition_image(self.base):
            return ConditionImages(self.base.settings["resolution"], self.base.settings["condition_member"])
        return None

    def with_generator(self, request: Request) -> Request:
        """The request with its generator named."""
        return request if request.generator or not self.generators else request._replace(generator=self.generators[0])

    def check(self, request: Request) -> None:
        """Raise ValueError, in one line, if this cascade can't make the image."""
        request = self.with_generator(request)
        check_request(request)
        if request.generator not in self.generators:
            there = " and ".join(self.generators) or "none"
            raise ValueError(f"this cascade has no {request.generator} generator; it has {there}")
        first = self.first_models[str(request.generator)]
        if request.generator == "tokens":
            check_prior(first, request)
            self._grid(request)
            return
        if request.generator == "translate":
            check_translation(first, request)
        if request.classifier_scale is not None and (request.generator != "diffusion" or self.classifier is None):
            raise ValueError("classifier_scale needs a cascade with a classifier, and its diffusion branch")
        self._check_prompt(request)
        if request.label is not None and not first.classes and self.classes(str(request.generator)):
            class_id(request.label, self.classes(str(request.generator)))
            request = request._replace(label=None)  # the classifier alone hears of it
        check_conditions(first, request)  # upsamplers enlarge what the base made and take what they know of the request
        if request.generator in ("diffusion", "translate"):
            check_sampling(first, request)
        elif request.steps is not None:
            raise ValueError(f"the {request.generator} generator takes no steps")

    def sample(
        self, requests: Sequence[Request], *, batch_size: int = 64, on_step: OnStep | None = None
    ) -> list[np.ndarray]:
        """One finished uint8 image (H, W, 3) for each request, in their order.

        The same request gives the same image, within one grey level, in whatever company.
        Raises ValueError, before any work, if a request can't be met; the message names it by its number from 1.
        """
        return [
            list(images.values())[-1] for images in self.sample_stages(requests, batch_size=batch_size, on_step=on_step)
        ]

    @torch.no_grad()
    def sample_stages(
        self, requests: Sequence[Request], *, batch_size: int = 64, on_step: OnStep | None = None
    ) -> list[Images]:
        """As `sample`, with the image that each stage of the generator made, the finished one last."""
        for number, request in enumerate(requests, 1):
            try:
                self.check(request)
            except ValueError as error:
                raise ValueError(f"request {number}: {error}" if len(requests) > 1 else str(error)) from None
        requests = [self.with_generator(request) for request in requests]
        finished: list[Images] = [{} for _ in requests]
        for batch in batches(requests, batch_size=min(batch_size, self.most_at_once)):
            asked = [requests[index] for index in batch]
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # fp32 is meant, on a GPU too
                made = self._make(asked, on_step)
            for stage, images in made.items():
                for index, image in zip(batch, to_uint8(images), strict=True):
                    finished[index][stage] = image
        return finished

    def _make(self, requests: Sequence[Request], on_step: OnStep | None) -> dict[str, Tensor]:
        """Images (B, 3, H, W) of each stage of the requests' generator."""
        if requests[0].generator == "diffusion":
            return self._diffusion(requests, on_step)
        if requests[0].generator == "tokens":
            return self._tokens(requests)
        assert self.model is not None
        if requests[0].generator == "translate":
            on_step_of_model = _of_stage(on_step, self.model.name)
            return {self.model.name: translate(self.model, requests, on_step=on_step_of_model)}
        makers = {"pixels": sample_pixels, "gan": sample_gan, "vae": sample_vae}
        return {self.model.name: makers[str(requests[0].generator)](self.model, requests)}

    def _diffusion(self, requests: Sequence[Request], on_step: OnStep | None) -> dict[str, Tensor]:
        assert self.base is not None
        frozen = self._frozen_conditions(self.base, requests)
        shown = _of_stage(on_step, "base", self._image)
        made = sample_base(self.base, requests, frozen=frozen, classifier=self.classifier, on_step=shown)
        images = {"base": self._image(made)}
        for model in self.upsamplers:
            low_res, frozen = list(images.values())[-1], self._frozen_conditions(model, requests)
            shown = _of_stage(on_step, model.name)
            images[model.name] = sample_upsampler(model, requests, low_res, frozen=frozen, on_step=shown)
        return images

    def _image(self, made: Tensor) -> Tensor:
        """What the base made as images (B, 3, H, W)."""
        if self.autoencoder is None or self.base is None:
            return made
        decoder = self.autoencoder.module
        assert isinstance(decoder, Autoencoder)
        return decoder.from_latents(made / self.base.settings["latent_scale"])

    def _frozen_conditions(self, model: SamplingModel, requests: Sequence[Request]) -> Conditions:
        text = self.contrastive if self.diffusion_prior else self.text_encoder or self.contrastive
        return frozen_conditions(model, requests, text=text, prior=self.diffusion_prior)

    def _check_prompt(self, request: Request) -> None:
        """Raise ValueError for a prompt that is too long for the contrastive encoder; others cut it themselves."""
        if request.generator == "diffusion" and request.prompt is not None and self.contrastive is not None:
            check_prompt_length(self.contrastive.text, request.prompt)

    def _tokens(self, requests: Sequence[Request]) -> dict[str, Tensor]:
        assert self.prior is not None
        assert self.tokenizer is not None
        condition = None if self.condition is None else condition_tokens(self.condition, requests)
        candidates = requests[0].best_of or 1
        if candidates > 1:
            tokens = sample_best(self.prior, requests, condition, n=candidates).chosen  # (B, h, w)
        else:
            tokens = sample_prior(self.prior, requests, condition, grid=self._grid(requests[0]))
        decoder = self.tokenizer.module
        assert isinstance(decoder, Autoencoder)
        return {"tokenizer": decoder.detokenize(tokens.to(self.tokenizer.device))}

    def _grid(self, request: Request) -> tuple[int, int] | None:
        """The grid of tokens of a request's size; None for that of the model. Raises ValueError if there is none."""
        if request.size is None:
            return None
        assert self.prior is not None
        assert self.tokenizer is not None
        height, width = self.prior.settings["grid"]
        factor = self.tokenizer.settings["resolution"] // height
        smallest = (height * factor, width * factor)
        if any(side % factor for side in request.size) or any(
            side < least for side, least in zip(request.size, smallest, strict=True)
        ):
            raise ValueError(f"size must be multiples of {factor} of at least {smallest}, not {request.size}")
        if not isinstance(self.prior.module, Transformer) or self.condition is not None:
            raise ValueError("this prior makes no larger images: only a transformer without condition image does")
        return request.size[0] // factor, request.size[1] // factor


def batches(requests: Sequence[Request], *, batch_size: int) -> Iterable[list[int]]:
    """Places of requests that can be sampled together, at most batch_size of them. Raises ValueError below 1."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    ways: dict[tuple[object, ...], list[int]] = {}
    for index, request in enumerate(requests):
        ways.setdefault(request.sampling_options(), []).append(index)
    for indices in ways.values():
        yield from (indices[start : start + batch_size] for start in range(0, len(indices), batch_size))


def load_part(name: str, folder: Path, *, device: str | torch.device) -> Any:
    """One part of a cascade by its field: a frozen text encoder, or a model."""
    if name == "contrastive":
        return contrastive_text(folder, device=device)
    if name == "text_encoder":
        return load_frozen_text(folder, device=device)
    return load_model(name, folder, device=device)


def _of_stage(
    on_step: OnStep | None, stage: str, image: Callable[[Tensor], Tensor] = lambda image: image
) -> Callable[[int, float, Tensor, Tensor], None] | None:
    if on_step is None:
        return None
    return lambda step, time, x_t, x_0: on_step(stage, step, time, image(x_t), image(x_0))
