"""Laws of sampling: images belong to their seeds, and wrong requests are refused before any work."""

from pathlib import Path

import numpy as np
import pytest
import torch

from components.data.ingest import train_bpe
from components.sampling.cascade import Cascade, compose
from components.sampling.generator import Look
from components.sampling.plan import random_stream
from components.sampling.requests import Request
from components.serving.versions import generator_card
from tests.refusals import one_line
from tests.tiny_cascade import DIFFUSION, FEW, UNET, write_cascade, write_model, write_models

UNKNOWN_SAMPLER = r"base.sampler: Input should be 'ddpm', 'ddim', 'dpm_solver_pp'.* \(got 'plms'\)"


@pytest.fixture(scope="module")
def cascade(tmp_path_factory: pytest.TempPathFactory) -> Cascade:
    return Cascade.load(write_cascade(tmp_path_factory.mktemp("cascade")))


@pytest.mark.parametrize("generator", ["diffusion", "tokens"])
def test_another_seed_label_or_prompt_gives_another_image(cascade: Cascade, generator: str):
    first = Request(label="food", prompt="red apple", seed=1, generator=generator, guidance_scale=3.0)
    others = [first.replace(seed=2), first.replace(label="flags"), first.replace(prompt="grey cat")]
    images = cascade.sample([first, *others])
    assert all((images[0] != other).any() for other in images[1:])


def test_requests_of_all_kinds_come_back_in_their_order(cascade: Cascade):
    requests = [
        Request(label=0, seed=1, generator="tokens"),
        Request(label=0, seed=1),
        Request(prompt="red flag", seed=2, steps=7),
        Request(label="0", seed=1, generator="tokens", top_k=3),
        Request(label="animals", seed=1),
    ]
    mixed = cascade.sample(requests)
    one_by_one = [cascade.sample([request])[0] for request in requests]
    assert max(np.abs(a.astype(int) - b).max() for a, b in zip(mixed, one_by_one, strict=True)) <= 1
    assert np.array_equal(mixed[1], mixed[4]), "a class by name and by id is one class"


def test_a_request_may_name_the_sampler_of_the_base(cascade: Cascade):
    requests = [Request(label=1, seed=3, sampler=sampler) for sampler in (None, "ddpm", "ddim", "heun")]
    images = [stages["base"] for stages in cascade.sample_stages(requests)]
    assert np.array_equal(images[0], images[1]), "ddpm is what the model itself says"
    assert (images[0] != images[2]).any()
    assert (images[2] != images[3]).any()


def test_each_stage_and_seed_has_a_stream_of_its_own():
    streams = [random_stream(seed, stage) for seed in (0, 1, -1, 2**70) for stage in ("base", "upsampler_64")]
    draws = {torch.rand(1, generator=stream).item() for stream in streams}
    assert len(draws) == len(streams)


def test_each_stage_of_the_generator_shows_its_image_and_its_steps(cascade: Cascade):
    steps: list[tuple[str, int]] = []

    def on_step(stage: str, step: int, timestep: int, x_t: Look, x_0: Look) -> None:
        assert x_t().shape == x_0().shape
        steps.append((stage, step))

    (images,) = cascade.sample_stages([Request(label=1, steps=3)], on_step=on_step)
    assert {stage: image.shape[0] for stage, image in images.items()} == {"base": 8, "upsampler_16": 16}
    assert steps == [("base", i) for i in range(3)] + [("upsampler_16", i) for i in range(4)]


def test_an_upsampler_of_half_the_strength_takes_half_its_steps_from_its_low_res_image(cascade: Cascade):
    noise_levels: dict[float, list[float]] = {1.0: [], 0.5: []}
    for strength, seen in noise_levels.items():

        def on_step(stage: str, step: int, timestep: int, x_t: Look, x_0: Look) -> None:
            if stage == "upsampler_16":
                seen.append(timestep)  # noqa: B023

        request = Request(label=1, steps=3, sampling=(("upsampler_16", "strength", strength),))
        cascade.sample_stages([request], on_step=on_step)
    assert noise_levels[0.5] == noise_levels[1.0][2:]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(), "give a label or a prompt"),
        (Request(label=3), "unknown label 3: the classes are 0 animals"),
        (Request(label="cars"), "unknown label 'cars'"),
        (Request(prompt=" "), "the prompt is empty"),
        (Request(prompt="red apple " * 20), "the prompt is too long: "),
        (Request(label=0, generator="air"), "this cascade has no air generator; it has diffusion and tokens"),
        (Request(label=0, steps=0), r"base.num_inference_steps: Input should be greater than or equal to 1 \(got 0\)"),
        (Request(label=0, steps=51), r"steps must be in \[1, 50\], not 51"),
        (Request(label=0, sampler="plms"), UNKNOWN_SAMPLER),
        (Request(label=0, sampler="ddim", generator="tokens"), "the tokens generator takes no sampler"),
        (Request(label=0, steps=4, generator="tokens"), "this prior takes no steps"),
        (Request(label=0, sampling=(("upsampler_16", "eta", 2.0),)), "upsampler_16.eta: Input should be less than"),
        (Request(label=0, sampling=(("upsampler_16", "noise_level", 21),)), r"noise_level must be in \[0, 20\]"),
        (Request(label=0, sampling=(("base", "strength", 0.5),)), "base: strength must be 1: only an upsampler has"),
        (Request(label=0, sampling=(("base", "top_k", 3),)), "base.top_k: this model takes no such setting"),
        (Request(label=0, sampling=(("upsampler_32", "eta", 0.5),)), "no stage 'upsampler_32' of the diff"),
        (Request(label=0, top_k=4), "the diffusion generator takes no top_k"),
        (Request(label=0, generator="tokens", top_p=0.0), "prior.top_p: Input should be greater than 0"),
        (Request(label=0, guidance_scale=float("nan")), "base.guidance_scale: Input should be a finite number"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_in_one_line(cascade: Cascade, request_: Request, message: str):
    with one_line(ValueError, match=message):
        cascade.sample([request_])
    with pytest.raises(ValueError, match="request 2: "):
        cascade.sample([Request(label=0), request_])


def test_a_model_of_one_class_is_asked_for_nothing_and_makes_images_of_that_class(tmp_path: Path):
    about = DIFFUSION | {"role": "base", "resolution": 8, "classes": ["image"]}
    base = write_model(tmp_path / "base", "unet", UNET | {"resolution": 8, "num_classes": 1}, about)
    only = Cascade.load(compose(tmp_path / "cascade", base=base, sampling={"base": FEW}))
    asked = [Request(seed=1, guidance_scale=2.0), Request(label="image", seed=1, guidance_scale=2.0)]
    assert np.array_equal(*only.sample(asked))


def test_a_model_that_learned_no_caption_needs_no_prompt(tmp_path: Path):
    about = DIFFUSION | {"role": "base", "resolution": 8, "classes": ["image"]}
    base = write_model(tmp_path / "base", "unet", UNET | {"resolution": 8, "num_classes": None}, about)
    with one_line(ValueError, match="give a label or a prompt"):
        Cascade.load(compose(tmp_path / "reads", base=base)).sample([Request()])
    (base / "bpe.json").write_text(train_bpe([""], vocab_size=280))
    only = Cascade.load(compose(tmp_path / "cascade", base=base, sampling={"base": FEW}))
    assert only.sample([Request()])[0].shape == (8, 8, 3)
    assert not generator_card(only.makers["diffusion"]).reads_prompts


def test_an_upsampler_that_does_not_fit_is_refused(tmp_path: Path):
    upsampler = write_models(tmp_path)["upsampler_16"]
    folder = compose(tmp_path / "cascade", base=upsampler, upsamplers={"upsampler_16": upsampler})
    with pytest.raises(ValueError, match="upsampler_16 enlarges 8² images, the stage before it makes 16²"):
        Cascade.load(folder)


def test_a_folder_without_a_cascade_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"holds no cascade\.json"):
        Cascade.load(tmp_path)
