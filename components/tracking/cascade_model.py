"""A registered model at work: rows in, images out. MLflow runs this file as it is, with the packed code next to it.

What a row may say depends on the model:
    cascade, base,  label or prompt, seed, generator, guidance_scale, steps, sampler, … -> PNG
    PixelCNN, GAN,  (and condition, a base64 PNG, where prior or base want one; classifier_scale, where one guides)
    VAE
    image-to-image  image and mask (base64 PNG), task, and label or prompt, seed, steps, … -> PNG
    upsampler       image (base64 PNG) and label or prompt, seed -> PNG
    autoencoder     image (base64) -> its reconstruction, PNG
    prior           label or prompt, seed, guidance_scale, … -> tokens, a JSON list of rows
    contrastive     prompt or image (base64) -> its embedding, of length 1, a JSON list
    text encoder    prompt -> its states, a JSON list with a list for each token
    classifier      image (base64) -> the probability of each class, a JSON object
A model of latents or of embeddings, and one that reads by another network, answers only as a part of its cascade.
"""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pydantic
import torch
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

from components.models.autoencoder import Autoencoder
from components.models.contrastive import ContrastiveEncoder
from components.sampling.cascade import DESCRIPTION, Cascade
from components.sampling.classifier import class_log_probabilities
from components.sampling.device import best_device
from components.sampling.diffusion import sample_upsampler
from components.sampling.frozen_text import load_frozen_text
from components.sampling.image_files import base64_png
from components.sampling.images import read_image, to_uint8
from components.sampling.model import (
    SamplingModel,
    check_conditions,
    check_prompt_length,
    generator_of,
    load_model,
    works_alone,
)
from components.sampling.prior import check_prior, sample_prior
from components.sampling.requests import Request, check_request
from components.storage.bundle import DESCRIPTION as MODEL

IMAGES = ("image", "mask", "condition")


class Row(pydantic.BaseModel):
    """One image; what is left out is the model's own choice."""

    label: str | None = None  # class name, or id as number or digits
    prompt: str | None = None
    seed: int | None = None
    generator: str | None = None  # diffusion, tokens, pixels, gan, vae or translate
    guidance_scale: float | None = None
    steps: int | None = None
    sampler: str | None = None  # ddpm, ddim, dpm_solver_pp, sde_dpm_solver_pp, heun or euler
    classifier_scale: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    best_of: int | None = None
    image: str | None = None  # base64 of the image to work on
    mask: str | None = None  # base64 of its mask: white is to be made
    task: str | None = None  # inpainting, uncropping, colorization, jpeg or super_resolution
    condition: str | None = None  # base64 of the image that the model is conditioned on; its tokens, for a lone prior

    @pydantic.field_validator("label", "seed", "steps", "top_k", "best_of", mode="before")
    @classmethod
    def whole(cls, value: object, info: pydantic.ValidationInfo) -> object:
        """A data frame with a gap in a column of integers holds floats; a class may come as its id."""
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        return str(value) if info.field_name == "label" and isinstance(value, int) else value

    def request(self) -> Request:
        given: dict[str, Any] = {name: value for name, value in self if value is not None and name in Request._fields}
        given |= {name: base64.b64decode(given[name]) for name in IMAGES if name in given}
        return Request(**given)

    def read_image(self, resolution: int) -> torch.Tensor:
        """The row's image, (3, resolution, resolution) in [-1, 1]. Raises ValueError if it has none."""
        if self.image is None:
            raise ValueError("this model needs an image: base64 of a PNG")
        return read_image(base64.b64decode(self.image), resolution=resolution)

    def text(self) -> str:
        """The row's prompt. Raises ValueError if it has none."""
        if self.prompt is None:
            raise ValueError("this model needs a prompt")
        return self.prompt


LONE_STAGE = dict.fromkeys(("autoencoder", "gan", "pixelcnn", "row_lstm"), "model")  # as a cascade calls its only model
Predict = Callable[[list[Row]], list[str]]


class CascadeModel(PythonModel):
    def load_context(self, context: PythonModelContext) -> None:
        self.answer = predictor_of(Path(context.artifacts["model"]))

    def predict(self, model_input: list[Row]) -> list[str]:
        """One string a row: base64 PNG, or JSON. Raises ValueError, in one line, for a row that can't be met."""
        return self.answer(model_input)


def predictor_of(folder: Path) -> Predict:
    """What a trained model in `folder` does with rows, on the best device that there is."""
    device = best_device()
    if (folder / DESCRIPTION).is_file():
        return _sample(Cascade.load(folder, device=device))
    if not (folder / MODEL).is_file():
        text = load_frozen_text(folder, device=device)
        return lambda rows: [json.dumps(states.tolist()) for states in text.encode([row.text() for row in rows]).states]
    model = load_model(_stage_of(folder), folder, device=device)
    lone = lone_cascade(model)
    if lone is not None:
        return _sample(lone)
    predict = _refuse
    if works_alone(model.kind, model.network, model.settings):
        predict = ANSWERS.get(model.kind, _draw_tokens)

    def answer(rows: list[Row]) -> list[str]:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # fp32 is meant, on a GPU too
            return [predict(model, row) for row in rows]

    return answer


def lone_cascade(model: SamplingModel) -> Cascade | None:
    """A cascade of nothing but this model, if it makes images by itself."""
    if not works_alone(model.kind, model.network, model.settings):
        return None
    if model.kind in ("diffusion", "dit") and model.settings["role"] == "base":
        return Cascade(base=model)
    return Cascade(model=model) if generator_of(model) else None


def _sample(cascade: Cascade) -> Predict:
    return lambda rows: [base64_png(image) for image in cascade.sample([row.request() for row in rows])]


def _reconstruct(model: SamplingModel, row: Row) -> str:
    image = row.read_image(model.settings["resolution"])[None].to(model.device)
    assert isinstance(model.module, Autoencoder)
    return base64_png(to_uint8(model.module.reconstruct(image))[0])


@torch.no_grad()
def _embed(model: SamplingModel, row: Row) -> str:
    """Images and texts are on one sphere: the likeness of two embeddings is the sum of their products."""
    network, text = model.module, model.text
    assert isinstance(network, ContrastiveEncoder)
    assert text is not None
    if (row.prompt is None) == (row.image is None):
        raise ValueError("this model needs either a prompt or an image")
    if row.prompt is None:
        image = row.read_image(network.resolution)[None].to(model.device)
        return json.dumps(network.encode_image(image)[0].tolist())
    check_prompt_length(text, row.prompt)
    return json.dumps(network.encode_text(text.encode([row.prompt]).to(model.device)).embedding[0].tolist())


def _classify(model: SamplingModel, row: Row) -> str:
    probabilities = class_log_probabilities(model, row.read_image(model.settings["resolution"])[None])[0].exp()
    return json.dumps(dict(zip(model.classes, probabilities.tolist(), strict=True)))


def _refuse(model: SamplingModel, row: Row) -> str:
    raise ValueError(
        f"the model of stage {model.name} needs the networks that it was trained with: "
        "load the composed cascade instead"
    )


def _draw_tokens(model: SamplingModel, row: Row) -> str:
    """Alone, a prior has no tokenizer: what it is conditioned on comes as tokens too, a JSON list of rows."""
    given = None if row.condition is None else torch.tensor(json.loads(row.condition)).flatten()[None]
    request = row.model_copy(update={"condition": None}).request()._replace(generator="tokens")
    check_request(request)
    check_prior(model, request if given is None else request._replace(condition=b"tokens"))
    return json.dumps(sample_prior(model, [request], given)[0].tolist())


def _enlarge(model: SamplingModel, row: Row) -> str:
    request = row.model_copy(update={"image": None}).request()._replace(generator="diffusion")
    check_request(request)
    check_conditions(model, request)
    low_res = row.read_image(model.settings["low_res_resolution"])[None]
    return base64_png(to_uint8(sample_upsampler(model, [request], low_res))[0])


ANSWERS: dict[str, Callable[[SamplingModel, Row], str]] = {  # of models that make no images by themselves; else tokens
    "autoencoder": _reconstruct,
    "diffusion": _enlarge,
    "dit": _enlarge,
    "contrastive": _embed,
    "noisy_classifier": _classify,
}


def _stage_of(folder: Path) -> str:
    """The stage's name gives a model its random streams: the same image alone as in the cascade."""
    description = json.loads((folder / MODEL).read_text())
    settings = description["settings"]
    if settings.get("role") == "upsampler":
        return f"upsampler_{settings['resolution']}"
    if settings.get("role") == "image_to_image":
        return "model"
    return settings.get("role") or LONE_STAGE.get(description["kind"], description["kind"])


set_model(CascadeModel())
