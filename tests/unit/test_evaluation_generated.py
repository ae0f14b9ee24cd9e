"""Laws of sampling both generators for the report, with a whole tiny cascade and real Ray actors."""

import io
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from components.data.encoding import open_autoencoder
from components.data.held_out import random_part, read_split
from components.data.shards import View, load_index
from components.evaluation import generated
from components.evaluation.agreement import AgreementConfig, wanted_of
from components.evaluation.features import FeatureExtractor
from components.evaluation.gallery import GalleryConfig, draw_gallery, gallery_jobs, gallery_requests
from components.evaluation.generated import (
    SampledImages,
    SampleJob,
    draw_job,
    measured_requests,
    pack_job,
    read_jobs,
    request_for,
    unpack_job,
)
from components.evaluation.grids import readable
from components.evaluation.image_sets import (
    HELD_OUT,
    REFERENCE,
    ImageSet,
    MadeStage,
    SmallerImages,
    held_out_parts,
    in_batches,
    shrink,
    window_sets,
)
from components.evaluation.metrics import frechet_distance, gaussian_of
from components.evaluation.reconstructions import PairMeasurer, reconstruct
from components.evaluation.sampling_studies import StepsStudyConfig, judge
from components.runtime.events import Recorder
from components.runtime.execution import Resources
from components.runtime.pool import file_name, write_job
from components.runtime.storage.artifact import Artifact, read_records
from components.runtime.storage.store import Store
from components.sampling.cascade import Cascade
from components.sampling.model import load_model
from components.sampling.requests import Request
from components.stages.context import StageContext
from components.stages.evaluate import EvaluationConfig, evaluate, run_study
from components.stages.samples import SamplesConfig, sample_generators
from pipelines.engine.run_report import study_of
from tests import image_sets
from tests.image_sets import write_set
from tests.refusals import one_line
from tests.tiny_cascade import CLASSES, OBJECTIVE, write_cascade, write_models
from tests.tiny_diffusion_branches import guided_by_the_classifier_alone
from tests.tiny_generators import lone, write
from tests.unit.test_evaluation_studies import CLASSIFIER

CONFIG = GalleryConfig(images_per_class=2, num_prompts=2, images_per_prompt=2, strip_frames=3)
JOB, MEASURED = 24, 34  # images of a job, and of each of two generators: two jobs, and enough for an error
LABELS, CAPTIONS = np.array([0, 1, 2, 1]), ("red apple", "grey cat", "red flag", "green apple")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cascade(tmp_path_factory.mktemp("cascade"))


@pytest.fixture(scope="module")
def cascade(folder: Path) -> Cascade:
    return Cascade.load(folder)


def requests_of(cascade: Cascade, *, count: int, seed: int = 0) -> list[Request]:
    return measured_requests(cascade, "diffusion", labels=LABELS, captions=CAPTIONS, count=count, seed=seed)


def test_measured_conditions_are_those_of_the_set_and_stay_together(cascade: Cascade) -> None:
    requests = requests_of(cascade, count=10)
    pairs = set(zip(LABELS.tolist(), CAPTIONS, strict=True))
    assert {(request.label, request.prompt) for request in requests} == pairs
    assert len({request.seed for request in requests}) == 10
    assert requests == requests_of(cascade, count=10) != requests_of(cascade, count=10, seed=1)


def test_a_request_loses_only_what_its_generator_does_not_take(cascade: Cascade) -> None:
    short = Request(label=1, prompt="grey cat")
    assert request_for(cascade, short) == short
    long = Request(label=1, prompt="a caption of far too many words for so small a text model as this one is")
    assert request_for(cascade, long) == Request(label=1)


def test_a_strip_ends_in_the_image_and_begins_in_noise_and_is_stored_whole(cascade: Cascade) -> None:
    made = draw_job(cascade, SampleJob("strip", (Request(label=0), Request(label=1)), frames=3)).fetched()
    assert list(made.strips) == ["base", "upsampler_16"]
    for stage, strip in made.strips.items():
        assert len(strip.x_t) == len(strip.x_0) == len(strip.timesteps) == 3
        assert (np.diff(strip.timesteps) < 0).all()
        np.testing.assert_array_equal(strip.x_0[-1], made.stages[stage])
    again = unpack_job(pack_job(made))
    assert list(again.stages) == list(made.stages) == list(made.strips)
    np.testing.assert_array_equal(again.finished, made.finished)
    np.testing.assert_array_equal(again.strips["base"].x_t, made.strips["base"].x_t)


def test_the_gallery_shows_both_generators_by_class_and_prompt_the_strip_and_the_stages(
    cascade: Cascade, tmp_path: Path
) -> None:
    requests, files = gallery_requests(CONFIG, cascade, captions=CAPTIONS, seed=0), Store(str(tmp_path))
    for job in (jobs := gallery_jobs(requests, strip_frames=3)):
        files.write(file_name(job.name), pack_job(draw_job(cascade, job).fetched()))
    drawn = draw_gallery(requests, files, classes=CLASSES)
    assert set(drawn) == {
        *(f"{generator}_by_{kind}" for generator in ("diffusion", "tokens") for kind in ("class", "prompt")),
        "cascade_side_by_side",
        "strip_base",
        "strip_upsampler_16",
    }
    assert all(Image.open(io.BytesIO(png)).size[0] > 128 for png, _ in drawn.values())
    # Every grid keeps the words that its images were asked for by.
    words = {name: asked for name, (_, asked) in drawn.items()}
    assert words["tokens_by_prompt"] == words["diffusion_by_prompt"] == CAPTIONS[:2]
    assert words["diffusion_by_class"] == tuple(readable(name) for name in CLASSES)
    (shown,) = next(job.requests for job in jobs if job.frames)
    assert words["strip_base"] == (shown.prompt or readable(CLASSES[shown.label]),)


def test_classes_that_the_classifier_alone_knows_are_shown_and_measured(tmp_path: Path) -> None:
    cascade = Cascade.load(guided_by_the_classifier_alone(tmp_path))
    shown = gallery_requests(CONFIG, cascade, captions=CAPTIONS, seed=0)
    assert {request.label for request in shown["diffusion_by_class"]} == {0, 1, 2}
    measured = measured_requests(cascade, "diffusion", labels=np.array([2, 1]), captions=["", "red"], count=2, seed=0)
    assert {request.label for request in measured} == {1, 2}


def test_shown_prompts_are_the_given_ones_or_captions_each_once(cascade: Cascade) -> None:
    shown = gallery_requests(CONFIG, cascade, captions=("grey cat", "grey cat", "", "red flag"), seed=0)
    assert [r.prompt for r in shown["tokens_by_prompt"]] == ["grey cat", "grey cat", "red flag", "red flag"]
    given = gallery_requests(CONFIG.replace(prompts=("red apple",)), cascade, captions=(), seed=0)
    assert [r.prompt for r in given["diffusion_by_prompt"]] == ["red apple", "red apple"]


def test_guidance_of_shown_images_is_of_the_generators_that_take_it(cascade: Cascade, tmp_path: Path) -> None:
    guided = CONFIG.replace(guidance_scale=3.0)
    shown = gallery_requests(guided, cascade, captions=CAPTIONS, seed=0)
    assert {request.guidance_scale for request in shown["diffusion_by_prompt"]} == {3.0}
    gan = Cascade.load(lone("gan", tmp_path))
    assert (
        gallery_requests(guided, gan, captions=(), seed=0) == gallery_requests(CONFIG, gan, captions=(), seed=0) != {}
    )


def test_a_prompt_that_no_generator_takes_is_refused(cascade: Cascade) -> None:
    long = "a caption of far too many words for so small a text model as this one is"
    with one_line(ValueError, "samples.prompts: no generator takes 'a caption of far .*shorten it, or leave it out"):
        gallery_requests(CONFIG.replace(prompts=("red apple", long)), cascade, captions=(), seed=0)


def test_a_part_of_a_set_holds_enough_and_does_not_depend_on_the_order_of_asking(tmp_path: Path) -> None:
    index = write_set(Store(str(tmp_path)), sizes=(8, 8, 8, 8, 8))
    part = random_part(index, samples=10, seed=3)
    assert 10 <= sum(shard.train_samples for shard in part.shards) < index.train_samples
    assert part == random_part(index, samples=10, seed=3)
    assert random_part(index, samples=1000, seed=3) == index


class Fixture:
    """A small run in storage: images, tokenizer, cascade; and contexts for the two stages."""

    def __init__(self, root: Path, cascade: Path) -> None:
        self.root = root
        self.images = self.commit_images("k")
        self.cascade = self.context("cascade").commit("model", folder=cascade)
        self.tokenizer = self.context("tokenizer").commit("model", folder=write_models(root / "models")["tokenizer"])

    def context(self, stage: str, *, key: str = "k") -> StageContext:
        store = Store(str(self.root / "stages" / stage / key))
        resources = Resources(num_workers=2, cpus_per_worker=0.1)
        return StageContext(stage, key, store, resources, Recorder(), self.root)

    def commit_images(self, key: str, *, holdout_fraction: float = 0.1) -> Artifact:
        context = self.context("images", key=key)
        write_set(context.files_store, sizes=(30, 30), holdout_fraction=holdout_fraction, resolution=16)
        return context.commit("shards", written=[info.path for info in context.files_store.list()])

    def evaluate(self, key: str, *, images: Artifact | None = None, config: Any = None, **inputs: Artifact) -> Artifact:
        context = self.context("evaluation", key=key)
        return evaluate(config or EvaluationConfig(), context, images=images or self.images, **inputs)

    def few_steps(self, key: str, images: Artifact) -> Artifact:
        """A study of steps of few images."""
        config = StepsStudyConfig(samplers=("ddim",), steps=(1,), reference_steps=2, samples=4, reference_samples=4)
        return run_study(config, self.context("steps", key=key), images=images, cascade=self.cascade)

    def samples(self, *, key: str = "k", measured: int = MEASURED) -> Artifact:
        config = SamplesConfig(**CONFIG.model_dump() | {"prompts": ("red apple",)}, measured_samples=measured)
        return sample_generators(config, self.context("samples", key=key), images=self.images, cascade=self.cascade)


@pytest.fixture(scope="module")
def run(ray_cluster: None, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fixture]:
    with mock.patch.object(generated, "JOB_SIZE", JOB):
        yield Fixture(tmp_path_factory.mktemp("run"), folder)


@pytest.fixture(scope="module")
def samples(run: Fixture) -> Artifact:
    return run.samples()


def test_the_samples_stage_leaves_grids_and_all_measured_images_and_shows_where_none_are_measured(
    run: Fixture, samples: Artifact
) -> None:
    assert {"cascade_side_by_side.png", "strip_base.png", "tokens_by_prompt.png"} <= set(samples.names())
    assert samples.metadata["words"]["tokens_by_prompt"] == ["red apple"]
    assert set(samples.metadata["words"]) == {name.removesuffix(".png") for name in samples.names() if "png" in name}
    for generator, files in samples.metadata["measured"].items():
        assert sum(len(unpack_job(samples.read(file)).finished) for file in files) == MEASURED
        assert 0 < samples.metadata["summary"][f"seconds_per_image_{generator}"] < 1
    shown = run.samples(key="shown", measured=0)
    assert "cascade_side_by_side.png" in shown.names()
    assert shown.metadata["measured"]
    assert not any(shown.metadata["measured"].values())


def test_a_finished_job_is_not_sampled_again(run: Fixture, samples: Artifact) -> None:
    """A stage that was killed goes on: the file of a finished job is taken as its record has it."""
    context = run.context("samples", key="killed")
    wrong = samples.read("measured_tokens-001.npz")
    stages = {"tokenizer": (6, 16)}
    write_job(context.files_store, "measured_tokens-000", wrong, seconds=10.5 * MEASURED, stages=stages)
    again = run.samples(key="killed")
    assert again.read("measured_tokens-000.npz") == wrong
    assert again.read("measured_diffusion-000.npz") == samples.read("measured_diffusion-000.npz")
    assert 10 < again.metadata["summary"]["seconds_per_image_tokens"] < 11  # its own seconds, in all images


def test_the_evaluation_measures_every_stage_of_both_generators_and_the_scale(run: Fixture, samples: Artifact) -> None:
    report = run.evaluate("k", tokenizer=run.tokenizer, samples=samples)
    rows = {row["name"]: row for row in report.metadata["distances"]}
    assert list(rows) == [
        "two halves of the training images",
        "held-out images",
        "training images shrunk to 8²",
        "noise",
        "reconstructions of held-out images",
        "diffusion branch: base, 8²",
        "diffusion branch: upsampler 16, 16²",
        "token branch: tokenizer, 16²",
    ]
    base = rows["diffusion branch: base, 8²"]
    assert base["samples"] == MEASURED
    assert set(report.metadata["nearest"]) == {"diffusion branch: upsampler 16, 16²", "token branch: tokenizer, 16²"}
    assert base["standard_error"] > 0
    assert 0 <= base["precision"] <= 1
    assert 0 <= base["recall"] <= 1
    assert rows["two halves of the training images"]["precision"] is None
    assert rows["training images shrunk to 8²"]["distance"] < rows["noise"]["distance"]
    drawn = {"originals_and_reconstructions", "index_grids", "diffusion_nearest", "tokens_nearest", "real_images"}
    assert set(report.names()) == {f"{name}.png" for name in drawn}
    assert report.metadata["held_out_codebook"]["codebook_size"] == 32


def test_larger_images_are_also_measured_window_by_window(run: Fixture, samples: Artifact) -> None:
    report = run.evaluate("windows", config=EvaluationConfig(window=8), samples=samples)
    rows = [row for row in report.metadata["distances"] if "windows" in row["name"]]
    assert [(row["name"], row["purpose"]) for row in rows] == [
        ("two halves of the windows of 8² of training images of 16²", "scale"),
        ("windows of 8² of held-out images", "scale"),
        ("windows of 8² of diffusion branch: upsampler 16, 16²", "model"),  # the base's are no larger than a window
        ("windows of 8² of token branch: tokenizer, 16²", "model"),
    ]
    assert rows[2]["samples"] == MEASURED
    assert rows[2]["distance"] != rows[3]["distance"]
    plain = run.evaluate("whole", samples=samples)
    assert [row for row in report.metadata["distances"] if row not in rows] == plain.metadata["distances"]


def test_windows_are_of_images_of_the_training_images_side_alone() -> None:
    part: Any = SimpleNamespace(num_images=2)
    made = [MadeStage("gan", "model", side, (part,)) for side in (16, 12)]
    sets = {name: ImageSet((part,), "scale") for name in (REFERENCE, HELD_OUT, *(stage.name for stage in made))}
    assert list(window_sets(sets, made, side=8, whole=16, seed=0)) == [
        "windows of 8² of training images of 16²",
        "windows of 8² of held-out images",
        "windows of 8² of gan branch, 16²",
    ]


def test_windows_are_parts_of_their_images_anywhere_in_them_and_the_same_each_time() -> None:
    place = np.arange(12, dtype=np.uint8)
    image = np.stack(np.broadcast_arrays(place[:, None], place[None], np.uint8(7)), axis=-1)  # where each pixel is
    images = np.stack([image] * 70)
    part: Any = SimpleNamespace(num_images=70, place=Store("memory://images"), batches=lambda: in_batches(images))
    windows = np.concatenate([*SmallerImages(part, 4, (0, 1)).batches()])
    assert windows.shape == (70, 4, 4, 3)
    corners = windows[:, 0, 0, :2]
    for window, (y, x) in zip(windows, corners, strict=True):
        assert np.array_equal(window, image[y : y + 4, x : x + 4])
    assert (corners.min(), corners.max()) == (0, 8)
    assert np.array_equal(windows, np.concatenate([*SmallerImages(part, 4, (0, 1)).batches()]))
    assert not np.array_equal(windows, np.concatenate([*SmallerImages(part, 4, (0, 2)).batches()]))


def test_reconstructions_are_measured_beside_their_originals_where_a_recipe_asks(run: Fixture) -> None:
    config = EvaluationConfig(pairs=("rfid", "psnr", "ssim"), held_out_samples=5)
    summary = run.evaluate("pairs", config=config, tokenizer=run.tokenizer).metadata["summary"]
    parts = held_out_parts(load_index(run.images.url("index.json")), resolution=16, limit=5)
    originals = np.concatenate([images for part in parts for images in part.batches()])
    made = reconstruct(open_autoencoder(run.tokenizer), originals)[0]
    extract = FeatureExtractor(config)
    distance = frechet_distance(*(gaussian_of(extract(images)["features"]) for images in (made, originals)))
    assert summary["rfd_efficientnet_lite0"] == pytest.approx(distance, rel=1e-3)
    expected = {name: float(each.mean()) for name, each in PairMeasurer(config)(made, originals).items()}
    assert {name: summary[f"{name}_5"] for name in ("psnr", "ssim")} == pytest.approx(expected, rel=1e-3)
    with one_line(ValueError, "there is no autoencoder to judge"):
        run.evaluate("none to judge", config=config)


def test_a_single_held_out_image_is_measured_by_pairs_and_no_distance_is_said(run: Fixture) -> None:
    images = run.commit_images("alone", holdout_fraction=0.01)
    assert load_index(images.url("index.json")).train_samples == 59
    config = EvaluationConfig(pairs=("rfid", "psnr"), reference_samples=20)
    report = run.evaluate("alone", images=images, config=config, tokenizer=run.tokenizer)
    assert [name for name in report.metadata["summary"] if name.startswith(("rf", "psnr"))] == ["psnr_1"]
    (table,) = run.few_steps("alone", images).metadata["tables"].values()
    assert [row[:2] for row in table["rows"]] == [["ddim", 1], ["ddpm", 2]]


def test_no_training_image_is_called_held_out(run: Fixture, samples: Artifact) -> None:
    images, config = run.commit_images("trained", holdout_fraction=0), EvaluationConfig(window=8)
    report = run.evaluate("trained", images=images, config=config, tokenizer=run.tokenizer, samples=samples)
    rows = [row["name"] for row in report.metadata["distances"]]
    assert "reconstructions of training images" in rows
    assert not [row for row in rows if HELD_OUT in row]
    assert report.metadata["nearest"] == {}
    assert set(report.names()) == {"trained_and_reconstructions.png", "index_grids.png"}
    assert not [svg for svg in study_of(run.few_steps("trained", images)).plots.values() if HELD_OUT in svg]


def test_copies_are_found_at_their_own_size_beside_larger_images(run: Fixture) -> None:
    noise = lambda number, resolution: np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)  # noqa: E731
    copied, name, stages = run.context("samples", key="copied"), "copies", {"model": (12, 8)}
    with mock.patch.object(image_sets, "image", noise):
        images = run.commit_images("noise")
    copies = shrink(read_split(load_index(images.url("index.json")), "train", View(16), limit=12).image, 8)
    made = pack_job(SampledImages({"model": copies}, {}))
    write_job(copied.files_store, name, made, stages=stages, seconds=0)
    (record,) = read_records(copied.files_store, [name])
    facts = {"measured": {"gan": [file_name(name)]}, "contents": {file_name(name): stages}}
    samples = copied.commit("samples", parts=[*record.files], metadata=facts)
    report = run.evaluate("copied", images=images, tokenizer=run.tokenizer, samples=samples)  # the tokenizer: of 16²
    near = report.metadata["nearest"]["gan branch, 8²"]
    assert near["median"] < 0.01 * near["held_out_median"]
    assert near["share_nearer"] == 1


def test_without_a_feature_network_the_evaluation_still_reconstructs(run: Fixture, samples: Artifact) -> None:
    config = EvaluationConfig(feature_network="none")
    report = run.evaluate("none", config=config, tokenizer=run.tokenizer, samples=samples)
    assert report.metadata["distances"] == []
    assert set(report.names()) == {"originals_and_reconstructions.png", "index_grids.png"}


def test_the_agreement_of_a_branch_is_that_of_the_images_that_it_left(run: Fixture, tmp_path: Path) -> None:
    settings = {"resolution": 8, "noisy": False, "objective": OBJECTIVE, "classes": CLASSES}
    folder, context = write(tmp_path / "judge", "classifier", CLASSIFIER, settings), run.context("agreement")
    judge_model = run.context("judge").commit("model", folder=folder)
    config, index = AgreementConfig(samples=5), load_index(run.images.url("index.json"))
    report = run_study(config, context, images=run.images, cascade=run.cascade, judge=judge_model)
    (table,) = report.metadata["tables"].values()
    rows = {row[0]: dict(zip(table["columns"], row, strict=True)) for row in table["rows"]}
    assert list(rows) == ["diffusion branch", "token branch", "held-out images"]
    asked = np.array([each.label for each in wanted_of(index, 5)["label"].values()])
    for generator, name in (("diffusion", "diffusion branch"), ("tokens", "token branch")):
        made = read_jobs([SampleJob(f"{generator}_by_label-000", ())], context.files_store).finished
        assert made.shape == (5, 16, 16, 3)
        seen = judge(load_model("judge", folder), shrink(made, 8))
        assert rows[name]["accuracy"] == (seen == asked).mean()
        assert rows[name]["N"] == 5
    assert study_of(report).tables
