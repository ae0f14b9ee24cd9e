"""Trained models work on a GPU where there is one, and everything that they are given goes there with them."""

import base64
import io
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from components.runtime.tracking import registry
from components.runtime.tracking.registry import input_example
from components.sampling import answers
from components.sampling.answers import predictor_of
from components.sampling.device import best_device, native_bf16
from components.sampling.requests import RequestRow
from pipelines.command import loading
from pipelines.command.loading import load_cascade
from pipelines.command.sample import sample, translate
from tests.image_sets import png
from tests.pretend_gpu import GPU, pretend_gpu
from tests.tiny_cascade import commit_model, write_cascade
from tests.tiny_diffusion_branches import GENERATORS, classifier, contrastive
from tests.tiny_generators import LONE, PRIORS, conditioned, lone, token_branch
from tests.tiny_palette import pixels, write_palette
from tests.unit.test_frozen_text import pretrained_folder

MODELS: dict[str, Callable[[Path], Path]] = {
    **{generator: GENERATORS[generator] for generator in ("latent", "imagen", "dalle2", "classifier_guided")},
    **{generator: lambda folder, generator=generator: lone(generator, folder) for generator in LONE},
    **{f"{name} prior": lambda folder, prior=prior: token_branch(prior, folder) for name, prior in PRIORS.items()},
    **{"conditioned": conditioned, "palette": write_palette},
    **{"tokenizer": lambda folder: write_cascade(folder) / "tokenizer"},
    **{"lone prior": lambda folder: conditioned(folder) / "prior"},
    **{"upsampler": lambda folder: write_cascade(folder) / "upsampler_16"},
    **{"contrastive": contrastive, "classifier": classifier},
    **{"text_encoder": lambda folder: pretrained_folder(folder / "text_encoder", "bert")},
}


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decision falls on the GPU that is none."""
    for module in (answers, loading):
        monkeypatch.setattr(module, "best_device", lambda: GPU)


def numbers_in(answer: str) -> np.ndarray:
    """Levels of an image, or what stands in a JSON answer."""
    if answer.startswith(("[", "{")):
        found = json.loads(answer)
        return np.array(list(found.values()) if isinstance(found, dict) else found, dtype=float)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer)))).astype(float)


@pytest.mark.parametrize("there", [True, False])
def test_a_gpu_is_taken_where_torch_can_use_one_and_has_bf16_where_it_is_not_emulated(
    there: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert best_device() == torch.device("cuda" if there else "cpu")
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *, including_emulation: including_emulation or there)
    assert native_bf16(torch.device("cuda", 0)) is there


PROCESSORS = {
    "Xeon of 2017": ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, True, False),
    "Xeon of 2023": ({"avx512_f": True, "avx512_bf16": True, "amx_bf16": True}, True, True),
    "EPYC of 2022": ({"avx512_f": True, "avx512_bf16": True}, True, True),
    "Graviton 2": ({"neon": True, "bf16": False}, True, False),
    "Graviton 3": ({"neon": True, "bf16": True}, True, True),
    "of which torch does not say": (None, True, False),
    "Mac, whose torch has no oneDNN": ({"neon": True, "bf16": True}, False, False),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_processor_has_bf16_where_it_multiplies_and_onednn_is_there(name: str, monkeypatch: pytest.MonkeyPatch):
    capabilities, onednn, expected = PROCESSORS[name]
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    if capabilities is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
    assert native_bf16(torch.device("cpu")) is expected


@pytest.mark.parametrize("kind", MODELS)
def test_a_registered_model_on_a_gpu_answers_as_on_the_processor(kind: str, tmp_path: Path, request: Any):
    folder = MODELS[kind](tmp_path)
    (row,) = input_example(folder) or []
    rows = [RequestRow(**row | ({"steps": 2} if kind in (*GENERATORS, "palette") else {}))]
    rows += [RequestRow(image=base64.b64encode(png(pixels(0, 12))).decode())] if kind == "contrastive" else []
    wanted = predictor_of(folder)(rows)
    request.getfixturevalue("on_gpu")
    with pretend_gpu() as computing:
        predict, computing.count = predictor_of(folder), 0
        answers = predict(rows)
    assert computing.count > 0
    for ours, theirs in zip(answers, wanted, strict=True):
        levels = 1e-5 if theirs.startswith(("[", "{")) else 1  # of an image, as everywhere: one gray level
        np.testing.assert_allclose(numbers_in(ours), numbers_in(theirs), rtol=0, atol=levels)


@pytest.mark.usefixtures("on_gpu")
def test_cascade_sample_and_translate_work_on_a_gpu(tmp_path: Path):
    (tmp_path / "photo.png").write_bytes(png(pixels(0, 16)))
    out = tmp_path / "out"
    with pretend_gpu() as computing:
        sample(str(write_cascade(tmp_path / "sampled")), label=["1"], seed=4, count=1, steps=2, out=out)
        sampled = computing.count
        palette = str(write_palette(tmp_path / "translated"))
        translate(tmp_path / "photo.png", palette, task="jpeg", steps=2, out=out)
    assert 0 < sampled < computing.count


PLACES: dict[str, Callable[[Path], str]] = {
    "registry": lambda folder: "models:/image-cascade@champion",
    "folder": lambda folder: str(write_cascade(folder)),
    "artifact": lambda folder: commit_model(folder / "runs", "cascade", "key", write_cascade(folder)).root,
}


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("place", PLACES)
def test_wherever_a_model_lies_all_of_it_is_loaded_onto_the_gpu(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(registry, "download_model", lambda name, folder, *, tracking_uri: write_cascade(folder))
    where = PLACES[place](tmp_path)
    with pretend_gpu():
        cascade = load_cascade(where, None)
    models = (cascade.base, *cascade.upsamplers, cascade.prior, cascade.tokenizer)
    assert {model.device for model in models} == {GPU}
