"""Laws of a cascade whose base works in latents, on what frozen encoders say, or under a classifier's pull."""

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from components.configuration.sampling import DiffusionSampling
from components.models.autoencoder import Autoencoder
from components.sampling.cascade import DESCRIPTION, SNAPSHOTS, Cascade, compose
from components.sampling.frozen_text import contrastive_text
from components.sampling.generator import Look, Parts
from components.sampling.generators.diffusion import denoise, sample_guided
from components.sampling.images import to_uint8
from components.sampling.model import load_model
from components.sampling.plan import sampling_of
from components.sampling.requests import Request
from tests.refusals import one_line
from tests.tiny_cascade import CLASSES, DIFFUSION, FEW
from tests.tiny_diffusion_branches import (
    GENERATORS,
    LATENT_SCALE,
    base,
    classifier,
    contrastive,
    guided_in_latents,
    latent,
)
from tests.unit.test_frozen_text import pretrained_folder

PROMPTS = ("red apple", "grey cat")
REQUESTS = {
    "latent": [Request(label=seed % 3, seed=seed, guidance_scale=2.0) for seed in range(4)],
    "imagen": [Request(prompt=PROMPTS[seed % 2], seed=seed, guidance_scale=2.0) for seed in range(4)],
    "dalle2": [Request(prompt=PROMPTS[seed % 2], seed=seed) for seed in range(4)],
    "classifier_guided": [Request(label=seed % 3, seed=seed, classifier_scale=3.0) for seed in range(4)],
    "guided_in_latents": [Request(label=seed % 3, seed=seed, classifier_scale=3.0) for seed in range(4)],
    "autoguided": [Request(label=seed % 3, seed=seed) for seed in range(4)],
    "guided_by_the_classifier_alone": [Request(label=seed % 3, seed=seed) for seed in range(4)],
}


def part(name: str, folder: Path, sampling: dict[str, Any] | None = None) -> Any:
    return contrastive_text(folder) if name == "contrastive" else load_model(name, folder, sampling=sampling)


@pytest.fixture(scope="module")
def cascade_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Cascade]:
    """Each generator, loaded once."""
    return {name: Cascade.load(write(tmp_path_factory.mktemp(name))) for name, write in GENERATORS.items()}.__getitem__


def farthest(ours: list[np.ndarray], theirs: list[np.ndarray]) -> int:
    """The largest difference of gray levels."""
    return max(int(np.abs(a.astype(int) - b).max()) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("generator", GENERATORS)
def test_a_cascade_is_its_parts_wherever_they_lie(generator: str, tmp_path: Path) -> None:
    folder = GENERATORS[generator](tmp_path / "made").rename(tmp_path / "moved")
    names = {path.name for path in folder.iterdir() if path.is_dir()}
    sampling = json.loads((folder / DESCRIPTION).read_text())["sampling"]
    upsamplers = tuple(part(name, folder / name, sampling.get(name)) for name in names if "upsampler" in name)
    parts = {name: part(name, folder / name, sampling.get(name)) for name in names if "upsampler" not in name}
    by_hand, loaded = Cascade(**parts, upsamplers=upsamplers), Cascade.load(folder)
    assert loaded.generators == by_hand.generators == ("diffusion",)
    assert {field.name for field in fields(Parts) if getattr(loaded, field.name)} == {*parts} | (
        {"upsamplers"} if upsamplers else set()
    )
    assert farthest(loaded.sample(REQUESTS[generator]), by_hand.sample(REQUESTS[generator])) == 0


def test_steps_that_are_written_out_give_way_to_another_number_and_named_ones_stay(tmp_path: Path) -> None:
    folder = base(tmp_path / "base")
    for spacing, left in (((0, 5, 9), None), ("2,1", None), ("leading", "leading")):
        model = load_model("base", folder, sampling={"num_inference_steps": 3, "spacing": spacing})
        asked = [sampling_of(model, request, first=True) for request in (Request(), Request(steps=2))]
        assert [own.spacing for own in asked] == [spacing, left]
        again = sampling_of(model, Request(steps=2, sampling={"base": {"spacing": [1, 4]}}), first=True)
        assert again.spacing == (1, 4)


def test_snapshots_stay_beside_the_model(tmp_path: Path) -> None:
    model = base(tmp_path)
    (model / SNAPSHOTS).mkdir()
    (model / SNAPSHOTS / "average.safetensors").write_bytes(b"large")
    folder = compose(tmp_path / "cascade", base=model)
    assert {path.name for path in folder.rglob("*")} == {
        DESCRIPTION,
        "base",
        *("model.json", "model.safetensors", "bpe.json"),
    }
    assert Cascade.load(folder).sample([Request()])[0].shape == (8, 8, 3)


def test_a_latent_base_is_decoded_at_its_scale(cascade_of: Callable) -> None:
    cascade, request = cascade_of("latent"), REQUESTS["latent"][0]
    latents = denoise(cascade.base, [cascade.resolve(request)])
    assert latents.shape == (1, 8, 4, 4)
    decoder = cascade.autoencoder.module
    assert isinstance(decoder, Autoencoder)
    (wanted,) = to_uint8(decoder.from_latents(latents / LATENT_SCALE))
    (unscaled,) = to_uint8(decoder.from_latents(latents))
    (made,) = cascade.sample([request])
    np.testing.assert_array_equal(made, wanted)
    assert (made != unscaled).any()
    assert made.shape == (16, 16, 3)


def test_frames_of_latents_are_shown_as_images(cascade_of: Callable) -> None:
    cascade, frames = cascade_of("latent"), []

    def on_step(stage: str, step: int, time: float, x_t: Look, x_0: Look) -> None:
        assert stage == "base"
        assert x_t().shape == x_0().shape == (1, 3, 16, 16)
        frames.append(x_0())

    (made,) = cascade.sample(REQUESTS["latent"][:1])
    (images,) = cascade.sample_stages(REQUESTS["latent"][:1], on_step=on_step)
    assert len(frames) == FEW["num_inference_steps"]
    np.testing.assert_array_equal(images["base"], made)
    np.testing.assert_array_equal(to_uint8(frames[-1])[0], made)


def test_steps_that_nobody_looks_at_are_not_decoded(cascade_of: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    cascade, decoded, decode = cascade_of("latent"), [], Autoencoder.from_latents
    monkeypatch.setattr(Autoencoder, "from_latents", lambda self, z: decoded.append(len(z)) or decode(self, z))
    cascade.sample(REQUESTS["latent"], on_step=lambda *step: None)
    assert decoded == [4]


def test_latents_and_their_decoder_need_each_other(tmp_path: Path) -> None:
    folder = latent(tmp_path)
    with pytest.raises(ValueError, match="need each other"):
        Cascade(base=part("base", folder / "base"))
    images = part("base", base(tmp_path / "images"))
    decoder = part("autoencoder", folder / "autoencoder")
    with pytest.raises(ValueError, match="need each other"):
        Cascade(base=images, autoencoder=decoder)


@pytest.mark.parametrize("generator", ["imagen", "dalle2"])
def test_the_prompt_decides(cascade_of: Callable, generator: str) -> None:
    cascade, first = cascade_of(generator), Request(prompt="red apple", seed=1, guidance_scale=3.0)
    images = [stages["base"] for stages in cascade.sample_stages([first, first.replace(prompt="grey cat"), first])]
    assert (images[0] != images[1]).any()
    assert farthest(images[:1], images[2:]) <= 1
    with pytest.raises(ValueError, match="give a label or a prompt"):
        cascade.sample([Request(seed=1)])


def test_an_upsampler_reads_the_prompt_too(cascade_of: Callable) -> None:
    """At a guidance scale of 0 the base hears of no prompt; an upsampler keeps its own scale."""
    asked = [Request(prompt=prompt, seed=1, guidance_scale=0.0) for prompt in PROMPTS]
    one, other = cascade_of("imagen").sample_stages(asked)
    assert farthest([one["base"]], [other["base"]]) <= 1
    assert (one["upsampler_16"] != other["upsampler_16"]).mean() > 0.2


def test_a_pretrained_encoder_reads_and_refuses_what_is_too_long(tmp_path: Path) -> None:
    reads = base(tmp_path, text_conditioning="cross_attention", text_states_dim=8)
    encoder = pretrained_folder(tmp_path / "encoder", "t5", length=3)
    cascade = Cascade.load(compose(tmp_path / "cascade", base=reads, text_encoder=encoder))
    requests = [Request(prompt=prompt, seed=1, guidance_scale=3.0) for prompt in ("a red circle", "a blue square")]
    red, blue = cascade.sample(requests)
    assert (red != blue).any()
    assert farthest([red, blue], cascade.sample(requests, batch_size=1)) <= 1
    with one_line(ValueError, match=r"the prompt is too long: 6 tokens, the model takes at most 3"):
        cascade.resolve(requests[0].replace(prompt="a red circle a red circle"))


@pytest.mark.parametrize("generator", ["imagen", "dalle2"])
def test_a_prompt_that_the_encoder_can_not_read_to_its_end_is_refused(cascade_of: Callable, generator: str) -> None:
    with one_line(ValueError, match=r"the prompt is too long: \d+ tokens, the model takes at most 6"):
        cascade_of(generator).sample([Request(prompt="red apple " * 20)])


def test_a_base_that_reads_without_its_encoder_is_refused(tmp_path: Path) -> None:
    lone = Cascade(base=part("base", base(tmp_path, image_embedding_dim=6)))
    with pytest.raises(ValueError, match="needs a diffusion prior over 6 numbers"):
        lone.sample([Request(prompt="red apple")])
    text = part("contrastive", contrastive(tmp_path))
    with pytest.raises(ValueError, match="needs a diffusion prior over 6 numbers"):
        Cascade(base=lone.base, contrastive=text).sample([Request(prompt="red apple")])


@pytest.mark.parametrize("generator", ["classifier_guided", "guided_in_latents"])
def test_a_classifier_pulls_as_hard_as_it_is_asked_to(cascade_of: Callable, generator: str) -> None:
    cascade, asked = cascade_of(generator), REQUESTS[generator]
    without = Cascade(base=cascade.base, autoencoder=cascade.autoencoder).sample(
        [request.replace(classifier_scale=None) for request in asked]
    )
    off = cascade.sample([request.replace(classifier_scale=0.0) for request in asked])
    assert farthest(off, without) == 0
    weak, strong = (cascade.sample([r.replace(classifier_scale=scale) for r in asked]) for scale in (1.0, 20.0))
    its_own = cascade.sample([request.replace(classifier_scale=None) for request in asked])
    assert farthest(weak, its_own) == 0, "1 is what the classifier itself says"
    for k in range(len(asked)):
        assert (weak[k] != off[k]).any()
        assert np.abs(strong[k].astype(int) - off[k]).mean() > np.abs(weak[k].astype(int) - off[k]).mean()


def test_a_classifier_of_latents_of_another_scale_is_refused(tmp_path: Path) -> None:
    with one_line(ValueError, match="they differ in latent_scale"):
        Cascade.load(guided_in_latents(tmp_path, scale=2 * LATENT_SCALE))


def test_a_weaker_model_pushes_as_hard_as_it_is_asked_to(cascade_of: Callable) -> None:
    cascade, asked = cascade_of("autoguided"), REQUESTS["autoguided"]

    def at(scale: float) -> list[np.ndarray]:
        return cascade.sample([r.replace(sampling=(("base", "autoguidance_scale", scale),)) for r in asked])

    alone = Cascade(base=cascade.base._replace(sampling=DiffusionSampling(**FEW))).sample(asked)
    np.testing.assert_array_equal(at(1.0), alone)
    np.testing.assert_array_equal(at(3.0), cascade.sample(asked))
    wanted = to_uint8(sample_guided(cascade.base, cascade.resolve_all(asked), scale=3.0, weaker=cascade.weaker))
    np.testing.assert_array_equal(at(3.0), wanted)
    assert (np.stack(at(3.0)) != alone).any()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"guidance_scale": 2.0}, "guidance_scale and autoguidance_scale don't go together"),
        ({"sampling": (("base", "autoguidance_scale", -1.0),)}, "base.autoguidance_scale"),
    ],
)
def test_a_guidance_that_the_cascade_can_not_give_is_one_line(cascade_of: Callable, how: dict, words: str) -> None:
    with one_line(ValueError, match=words):
        cascade_of("autoguided").sample([Request(label=0).replace(**how)])
    unguided = Request(label=0, sampling=(("base", "autoguidance_scale", 2.0),))
    with pytest.raises(ValueError, match="this cascade has no weaker model"):
        cascade_of("classifier_guided").sample([unguided])


def test_guidance_and_spacing_that_a_model_can_not_have_are_refused_before_any_image(tmp_path: Path) -> None:
    flat = DIFFUSION["objective"] | {"zero_terminal_snr": True, "prediction_type": "v_prediction"}
    wrong = {
        "guidance_scale must be 1: this model has no condition": ({}, ("guidance_scale", 3.0)),
        "spacing leading skips the last step": ({"objective": flat}, ("spacing", "leading")),
        "spacing is of a process with": ({"objective": {"kind": "edm", "sigma_data": 0.5}}, ("spacing", "leading")),
    }
    for number, (words, (settings, change)) in enumerate(wrong.items()):
        place = tmp_path / str(number)
        cascade = Cascade.load(compose(place / "cascade", base=base(place, settings=settings)))
        plain = Request(seed=1, sampling=(("base", "num_inference_steps", 2),))
        asked = plain.replace(sampling=(*plain.sampling, ("base", *change)))
        with one_line(ValueError, f".*{words}"):
            cascade.sample([plain, asked])


@pytest.mark.parametrize(
    ("settings", "network", "words"),
    [
        ({"objective": DIFFUSION["objective"] | {"prediction_type": "epsilon"}}, {}, "they differ in prediction_type"),
        ({"objective": {"kind": "edm", "sigma_data": 0.5}}, {}, "they differ in kind"),
        ({}, {"num_classes": None}, "they differ in num_classes"),
    ],
)
def test_a_weaker_model_of_another_kind_is_refused(settings: dict, network: dict, words: str, tmp_path: Path) -> None:
    classes = {"num_classes": len(CLASSES)}
    other = base(tmp_path / "weaker", settings=settings, **classes | network)
    parts = {"base": base(tmp_path, **classes), "weaker": other}
    with one_line(ValueError, match=words):
        Cascade.load(compose(tmp_path / "cascade", **parts))


def test_a_classifier_tells_a_base_that_knows_none_of_the_classes(cascade_of: Callable) -> None:
    cascade, first = cascade_of("guided_by_the_classifier_alone"), Request(label=0, seed=1, classifier_scale=20.0)
    assert cascade.makers["diffusion"].classes == CLASSES
    requests = [first, first.replace(label="food"), first.replace(label=1), Request(seed=1)]
    zero, by_name, by_id, nothing = cascade.sample(requests)
    assert (zero != by_name).any()
    np.testing.assert_array_equal(by_name, by_id)
    np.testing.assert_array_equal(nothing, Cascade(base=cascade.base).sample([Request(seed=1)])[0])
    with pytest.raises(ValueError, match="unknown label 'cars': the classes are 0 animals"):
        cascade.sample([Request(label="cars")])


@pytest.mark.parametrize("generator", ["latent", "imagen", "dalle2"])
def test_a_classifier_scale_needs_a_classifier(cascade_of: Callable, generator: str) -> None:
    with one_line(ValueError, match="classifier_scale needs a cascade with a classifier"):
        cascade_of(generator).sample([REQUESTS[generator][1].replace(classifier_scale=1.0)])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"objective": DIFFUSION["objective"] | {"schedule": "linear"}}, "they differ in schedule"),
        ({"objective": DIFFUSION["objective"] | {"num_train_timesteps": 60}}, "they differ in num_train_timesteps"),
        ({"objective": {"kind": "edm", "sigma_data": 0.5}}, "they differ in kind, schedule"),
        ({"resolution": 16}, "they differ in resolution"),
        ({"classes": CLASSES[::-1]}, "they differ in classes"),
        ({"noisy": False}, "knows clean images only"),
    ],
)
def test_a_classifier_of_another_process_is_refused(settings: dict, words: str, tmp_path: Path) -> None:
    parts = {"base": base(tmp_path, num_classes=len(CLASSES)), "classifier": classifier(tmp_path, **settings)}
    with one_line(ValueError, match=words):
        Cascade.load(compose(tmp_path / "cascade", **parts))
