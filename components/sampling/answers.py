"""Answers of trained models to rows: images by a generator, other answers by an `Answerer`.

README.md has the table of rows and answers. A model of latents or of embeddings, and one that reads by another network,
answers only as a part of its cascade.
"""

import base64
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from components.configuration.families import family_name
from components.models.devices import products
from components.sampling.cascade import Cascade, opened
from components.sampling.device import best_device
from components.sampling.frozen_text import FrozenText, load_frozen_text
from components.sampling.generators.diffusion import check_sampling, class_log_probabilities, sample_upsampler
from components.sampling.generators.tokens import check_prior, sample_prior
from components.sampling.image_files import base64_png, encode_png, gray_png
from components.sampling.images import read_image, to_uint8
from components.sampling.model import SamplingModel
from components.sampling.plan import check_conditions, check_request, plan_of
from components.sampling.requests import Request, RequestRow, request_options, settings_of, with_settings

REGISTERED = "image_cascade.registered_name"  # in the metadata of a packed model: the name that it was packed for
Predict = Callable[[list[RequestRow]], list[str]]


class Answerer(NamedTuple):
    """A kind of model that answers rows without generating images."""

    answer: Callable[[SamplingModel, RequestRow], str]  # raises ValueError, in one line, for a row that can't be met
    reads: tuple[str, ...]  # columns of a row, beside those of what is drawn
    image: str = ""  # the setting that has the resolution of a row's image
    draws: bool = False  # by a seed, and under a label or a prompt where the model takes conditions


def predictor_of(folder: Path, *, name: str | None = None) -> Predict:
    """Loads the model in `folder` on the best device and returns the function that answers rows.
    Images of cascades carry their settings, with the registered `name` of the model or else the folder's."""
    device = best_device()
    model = opened(folder, device=device)
    if isinstance(model, Cascade):
        return lambda rows: _signed_images(model, [row.request() for row in rows], name or folder.name)
    if model is None:
        text = load_frozen_text(folder, device=device)
        return lambda rows: [json.dumps(each.tolist()) for each in text.encode([_prompt(row, text) for row in rows])]
    answerer = answerer_of(model)

    def answer(rows: list[RequestRow]) -> list[str]:
        if answerer is None:
            needs = f"the model of stage {model.name} needs the networks that it was trained with"
            raise ValueError(f"{needs}: load the composed cascade instead")
        for row in rows:
            check_row(model, answerer, row)
        with products("fp32"):
            return [answerer.answer(model, row) for row in rows]

    return answer


def _signed_images(cascade: Cascade, requests: Sequence[Request], name: str) -> list[str]:
    signed = (
        with_settings(encode_png(image), settings_of(request, model=name, version=None))
        for image, request in zip(cascade.sample(requests), requests, strict=True)
    )
    return [base64.b64encode(png).decode() for png in signed]


def example_of(folder: Path) -> RequestRow | None:
    """An example row for the model in `folder`; None for one that answers no rows outside its cascade."""
    model = opened(folder, weights=False)
    if isinstance(model, Cascade):
        return RequestRow.of(next(iter(model.makers.values())).example())
    if model is None:
        return RequestRow(prompt="red")
    answerer = answerer_of(model)
    if answerer is None:
        return None
    label = "0" if answerer.draws and model.classes else None
    prompt = "red" if label is None and model.reads_prompts else None
    image = gray_png(model.settings[answerer.image]) if answerer.image else None
    row = RequestRow.of(Request(label=label, prompt=prompt, image=image, seed=int(answerer.draws)))
    if not model.network.get("condition_grid"):
        return row
    height, width = model.network["condition_grid"]
    return row.model_copy(update={"condition": json.dumps([[0] * width] * height)})


def answerer_of(model: SamplingModel) -> Answerer | None:
    """The answerer of a model; None for a model that depends on other networks."""
    return ANSWERERS.get(family_name(model.kind)) if model.works_alone else None


def check_row(model: SamplingModel, answerer: Answerer, row: RequestRow) -> None:
    """Raise ValueError, in one line, for a field that a model without its cascade can't have."""
    request = row.model_copy(update={"image": None, "condition": None}).request()
    own, options = type(model.sampling).model_fields, request_options().items()
    drawn = [name for name, option in options if option.setting in own and option.stage in ("", model.name)]
    read = {*answerer.reads, "seed", *(("label", "prompt", "sampling", *drawn) if answerer.draws else ())}
    for name, value in row:
        if value is not None and name not in read:
            raise ValueError(f"{name} is not for the model of stage {model.name} alone: its cascade may take it")
    for stage, setting, _ in request.sampling:
        if stage != model.name:
            raise ValueError(f"sampling {stage}.{setting}: the only stage here is {model.name}")


def _prompt(row: RequestRow, text: FrozenText) -> str:
    if row.prompt is None:
        raise ValueError("this model needs a prompt")
    text.check(row.prompt)
    return row.prompt


def _image(row: RequestRow, resolution: int) -> torch.Tensor:
    """Returns the row's image, (3, S, S) in [-1, 1]. Raises ValueError for a row without image."""
    if row.image is None:
        raise ValueError("this model needs an image: base64 of a PNG")
    return read_image(base64.b64decode(row.image), resolution=resolution)


def _reconstruct(model: SamplingModel, row: RequestRow) -> str:
    return base64_png(reconstructed(model, _image(row, model.settings["resolution"])))


def reconstructed(model: SamplingModel, image: torch.Tensor) -> np.ndarray:
    """An autoencoder's reconstruction of an image (3, S, S) in [-1, 1]: uint8 (S, S, 3)."""
    return to_uint8(model.module.reconstruct(image[None].to(model.device)))[0]


@torch.no_grad()
def _embed(model: SamplingModel, row: RequestRow) -> str:
    network, text = model.module, model.text
    assert text is not None
    if (row.prompt is None) == (row.image is None):
        raise ValueError("this model needs either a prompt or an image")
    if row.prompt is None:
        image = _image(row, network.resolution)[None].to(model.device)
        return json.dumps(network.encode_image(image)[0].tolist())
    text.check(row.prompt)
    return json.dumps(network.encode_text(text.encode([row.prompt]).to(model.device)).embedding[0].tolist())


def _classify(model: SamplingModel, row: RequestRow) -> str:
    probabilities = class_log_probabilities(model, _image(row, model.settings["resolution"])[None])[0].exp()
    return json.dumps(dict(zip(model.classes, probabilities.tolist(), strict=True)))


def _draw_tokens(model: SamplingModel, row: RequestRow) -> str:
    """Draws tokens from a prior alone, a JSON list of rows; so is the condition image."""
    try:
        condition = None if row.condition is None else torch.tensor(json.loads(row.condition)).flatten()[None]
    except (ValueError, TypeError):
        raise ValueError("condition must be tokens of a prior alone: a JSON list of rows of numbers") from None
    request = row.model_copy(update={"condition": None}).request()
    check_request(request)
    if request.size is not None:
        raise ValueError("a prior alone takes no size: its cascade makes larger images")
    check_prior(model, request if condition is None else request.replace(condition=b"tokens"))
    return json.dumps(sample_prior(model, [plan_of(request, [model], model.classes)], condition)[0].tolist())


def _enlarge(model: SamplingModel, row: RequestRow) -> str:
    request = row.model_copy(update={"image": None}).request()
    check_request(request)
    check_conditions(model, request)
    plan = plan_of(request, [model], model.classes)
    check_sampling(model, plan.of(model))
    low_res = _image(row, model.settings["low_res_resolution"])[None]
    return base64_png(to_uint8(sample_upsampler(model, [plan], low_res))[0])


DRAWS = Answerer(_draw_tokens, ("condition",), draws=True)
ANSWERERS: dict[str, Answerer] = {  # by family
    "autoencoder": Answerer(_reconstruct, ("image",), "resolution"),
    "diffusion": Answerer(_enlarge, ("image",), "low_res_resolution", draws=True),
    "prior": DRAWS,
    "masked_prior": DRAWS,
    "pixels": DRAWS,
    "contrastive": Answerer(_embed, ("image", "prompt")),
    "classifier": Answerer(_classify, ("image",), "resolution"),
}
