"""Laws of the studies of samplers and of guidance: what is counted, compared and drawn."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from components.evaluation import sampling_studies
from components.evaluation.generated import SampleJob, jobs_of
from components.evaluation.image_sets import HELD_OUT, FileImages
from components.evaluation.metrics import share_error
from components.evaluation.sampling_studies import (
    GuidanceSetting,
    GuidanceStudy,
    GuidanceStudyConfig,
    Models,
    StagesStudy,
    StagesStudyConfig,
    StepsSetting,
    StepsStudyConfig,
    judge,
    off,
)
from components.evaluation.study import (
    ArrayWorker,
    Findings,
    Measured,
    Point,
    VariantsConfig,
    VariantStudy,
    counted,
    read_points,
)
from components.runtime.events import Recorder
from components.runtime.execution import Resources
from components.runtime.pool import file_name
from components.runtime.storage.store import Store
from components.sampling.cascade import Cascade
from components.sampling.model import load_model
from components.sampling.requests import Request
from components.stages.context import StageContext
from components.stages.evaluate import commit_findings
from pipelines.engine.run_report import run_images, study_of
from tests.image_sets import write_set
from tests.tiny_cascade import CLASSES, commit_model, write_cascade, write_models
from tests.tiny_generators import write
from tests.unit.test_evaluation_report import Page

REQUESTS = tuple(Request(label=number % 3, seed=number) for number in range(6))
STEPS = StepsStudyConfig(samplers=("ddim", "heun"), steps=(4, 2), reference_steps=8, samples=6)
GUIDANCE = GuidanceStudyConfig(
    methods=("classifier", "classifier_unconditional", "classifier_free", "interval", "autoguidance"),
    scales=(2.0,),
    classifier_scales=(1.5,),
    num_inference_steps=3,
    samples=6,
)
CLASSIFIER = {"resolution": 8, "num_classes": len(CLASSES), "model_channels": 8, "channel_mult": [1, 2]}
CLASSIFIER |= {"num_res_blocks": 1, "attention_resolutions": [], "head_dim": 8}


@pytest.fixture(scope="module")
def cascade(tmp_path_factory: pytest.TempPathFactory) -> Cascade:
    return Cascade.load(write_cascade(tmp_path_factory.mktemp("cascade")))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("models")
    base = load_model("base", write_models(folder)["base"])
    described = {"resolution": 8, "noisy": True, "objective": base.settings["objective"], "classes": CLASSES}
    classifier = load_model("classifier", write(folder / "classifier", "classifier", CLASSIFIER, described))
    weaker = load_model("base", write_models(folder / "weaker")["base"])
    for parameter in weaker.module.parameters():
        parameter.data.mul_(0.8)
    return Models(base, judge=classifier, weaker=weaker, classifier=classifier)


def study(config: VariantsConfig, stage: str = "s") -> VariantStudy[Any]:
    """A study without images and models at hand."""
    return config.study(config, None, {}, None, stage)


def job(variant: object, requests: tuple[Request, ...] = REQUESTS) -> SampleJob:
    return SampleJob("job", requests, variant=variant)


@pytest.mark.parametrize(("sampler", "evaluations"), [("ddpm", 5), ("ddim", 5), ("dpm_solver_pp", 5), ("heun", 9)])
def test_network_evaluations_are_counted_not_assumed(cascade: Cascade, sampler: str, evaluations: int) -> None:
    made = study(STEPS).sample(cascade, job(StepsSetting(sampler, 5)))
    assert made["evaluations"] == evaluations
    assert made["images"].shape == (6, 8, 8, 3)
    module = torch.nn.Linear(2, 2)
    with counted(module) as sizes:
        module(torch.zeros(3, 2))
    module(torch.zeros(5, 2))
    assert sizes == [3]  # the count ends with its context


def test_neither_the_cut_into_jobs_nor_another_setting_moves_a_image(cascade: Cascade) -> None:
    setting = StepsSetting("ddpm", 4)
    whole = study(STEPS).sample(cascade, job(setting))["images"]
    alone = study(STEPS).sample(cascade, job(setting, REQUESTS[4:5]))["images"]
    assert np.abs(whole[4].astype(int) - alone[0]).max() <= 1
    asked = [request.replace(sampler="ddpm", steps=4) for request in REQUESTS]
    np.testing.assert_array_equal(whole, [made["base"] for made in cascade.sample_stages(asked)])


def test_every_sampler_runs_every_number_of_steps_and_the_reference_once() -> None:
    names = list(study(STEPS).settings())
    assert names == ["ddim_2", "ddim_4", "heun_2", "heun_4", "ddpm_8"]
    assert len(study(StepsStudyConfig()).settings()) == 4 * 5 + 1
    with pytest.raises(ValidationError, match="needs a feature network"):
        VariantsConfig(feature_network="none")
    config = STEPS.replace(samplers=("ddpm",), steps=(2, 8))
    assert list(study(config).settings()) == ["ddpm_2", "ddpm_8"]


def measured(settings: Mapping[str, object]) -> Measured:
    """Distances 11, 12, … in the order of the settings, 10 of held-out images; two in three images are correct."""
    images = list(np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8))
    correct = np.array([True, True, True, False, True, False])
    points = {n: Point(s, 11.0 + i, 4.0, correct, images) for i, (n, s) in enumerate(settings.items())}
    return Measured(points, held_out_distance={HELD_OUT: 10.0}, held_out_accuracy=0.9)


def test_the_steps_study_draws_and_lists_every_sampler() -> None:
    settings = study(STEPS).settings()
    found = measured(settings)
    described = study(STEPS).described(found)
    (svg,), (table,) = described.plots.values(), described.tables.values()
    assert all(words in Page(svg).text for words in ("ddim", "heun", "ddpm, 8 steps 15", HELD_OUT))
    assert [row[:2] for row in table["rows"]] == [list(s) for s in settings.values()]
    assert described.summary["fd_efficientnet_lite0_heun_4"] == 14.0
    assert list(described.headline.values()) == [12.0, 14.0, 15.0]


@pytest.fixture(scope="module")
def stages_study(tmp_path_factory: pytest.TempPathFactory) -> StagesStudy:
    root = tmp_path_factory.mktemp("stages")
    artifact = commit_model(root, "cascade", "k", write_cascade(root))
    config = StagesStudyConfig(steps=(4, 2), samples=6)
    return StagesStudy(config, None, {"cascade": artifact}, Store("memory://stages"), "stages_study")


def test_each_stage_in_turn_takes_every_number_of_steps_and_the_others_their_own(
    cascade: Cascade, stages_study: StagesStudy
) -> None:
    settings = stages_study.settings()
    assert list(settings) == ["base_2", "base_4", "upsampler_16_2", "upsampler_16_4"]
    assert stages_study.side(cascade) == 16
    made = {name: stages_study.sample(cascade, job(setting)) for name, setting in settings.items()}
    assert [each["evaluations"] for each in made.values()] == [2, 4, 2, 4]
    assert all(each["images"].shape == (6, 16, 16, 3) for each in made.values())
    own = cascade.sample([request.replace(generator="diffusion") for request in REQUESTS], batch_size=6)
    for name, each in made.items():  # 4 steps are each stage's own
        assert np.array_equal(each["images"], own) == name.endswith("_4")


def test_the_stages_study_has_a_line_for_each_stage(stages_study: StagesStudy) -> None:
    described = stages_study.described(measured(stages_study.settings()))
    (svg,), (table,) = described.plots.values(), described.tables.values()
    assert all(words in Page(svg).text for words in ("base", "upsampler 16", HELD_OUT))
    assert [row[:2] for row in table["rows"]] == [["base", 2], ["base", 4], ["upsampler 16", 2], ["upsampler 16", 4]]
    assert list(described.headline.values()) == [11.0, 12.0, 13.0, 14.0]
    assert described.summary["fd_efficientnet_lite0_upsampler_16_2"] == 13.0


def test_scale_off_is_the_same_model_by_every_method_and_is_sampled_once(models: Models) -> None:
    settings = study(GUIDANCE).settings()
    assert list(settings) == [
        "unguided",
        "classifier_1_5",
        "classifier_unconditional_0",
        "classifier_unconditional_1_5",
        "classifier_free_2",
        "interval_2",
        "autoguidance_2",
    ]
    every = {
        method: study(GUIDANCE).sample(models, job(GuidanceSetting(method, off(method))))["images"]
        for method in GUIDANCE.methods
    }
    for method in ("classifier_free", "interval", "autoguidance"):
        np.testing.assert_array_equal(every["classifier"], every[method])
    assert (every["classifier"] != every["classifier_unconditional"]).any()


def test_every_guidance_moves_images_and_counts_the_guided_network_alone(models: Models) -> None:
    made = {name: study(GUIDANCE).sample(models, job(setting)) for name, setting in study(GUIDANCE).settings().items()}
    assert {name: found["evaluations"] for name, found in made.items()} == {
        "unguided": 3,
        "classifier_1_5": 3,
        "classifier_unconditional_0": 3,
        "classifier_unconditional_1_5": 3,
        "classifier_free_2": 6,
        "interval_2": 4,  # one of three steps lies in (0.2, 5)
        "autoguidance_2": 3,
    }
    different = {found["images"].tobytes() for found in made.values()}
    assert len(different) == len(made)
    assert all(found["correct"].shape == (6,) for found in made.values())


class Brightest(nn.Module):
    """Its class is the color of which there is most."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(5.0))

    def forward(self, x_t: Tensor, time: Tensor) -> Tensor:
        del time
        return self.slope * x_t.mean(dim=(2, 3))


@pytest.mark.parametrize("method", ["classifier", "classifier_unconditional"])
def test_a_classifier_pulls_images_towards_what_it_is_asked_for(models: Models, method: str) -> None:
    judge = models.judge._replace(module=Brightest())

    def right(scale: float) -> float:
        asked = job((method, scale), REQUESTS * 4)
        own = models._replace(judge=judge, classifier=judge)
        return float(study(GUIDANCE).sample(own, asked)["correct"].mean())

    assert right(100.0) == 1 > right(0.0) + 0.3


def test_the_judge_sees_images_as_it_was_trained_on_them(models: Models) -> None:
    images = np.random.default_rng(0).integers(0, 256, (300, 8, 8, 3), dtype=np.uint8)
    image = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    logits = models.judge.module(image, torch.zeros(300, dtype=torch.int64))
    np.testing.assert_array_equal(judge(models.judge, images), logits.argmax(dim=1).numpy())


def test_the_guidance_study_draws_every_method_against_scale_and_accuracy() -> None:
    settings = study(GUIDANCE).settings()
    found = measured(settings)
    assert found.points["unguided"].accuracy == pytest.approx(4 / 6)
    assert share_error(1.0, 6) == 0
    assert share_error(4 / 6, 6) == pytest.approx((4 / 6 * 2 / 6 / 6) ** 0.5)
    described = study(GUIDANCE).described(found)
    texts = [Page(svg).text for svg in described.plots.values()]
    assert len(texts) == 2
    assert all(title in text for title in sampling_studies.TITLES.values() for text in texts)
    assert "classifier-free 11 at 1 15 at 2" in texts[0]
    assert "held-out images 0.9" in texts[0]
    (table,) = described.tables.values()
    assert [len(row) for row in table["rows"]] == [len(table["columns"])] * 10
    assert described.headline["distance, autoguidance, scale 2 (N 6)"] == 17.0
    assert described.headline["distance, no guidance (N 6)"] == 11.0
    assert described.summary["accuracy_held_out"] == 0.9


def test_a_set_that_holds_no_image_out_has_no_accuracy_of_held_out_images(models: Models, tmp_path: Path) -> None:
    index = write_set(Store(str(tmp_path)), sizes=(8,), holdout_fraction=0)
    guidance = GuidanceStudy(GUIDANCE, index, {}, Store("memory://guidance"), "s")
    accuracy = guidance.held_out_accuracy(models, 8)
    assert math.isnan(accuracy)
    found = measured(guidance.settings())._replace(held_out_distance={}, held_out_accuracy=accuracy)
    assert not [svg for svg in guidance.described(found).plots.values() if HELD_OUT in svg]


def test_scales_of_no_guidance_alone_are_a_study_of_the_unguided_model() -> None:
    alone = study(GUIDANCE.replace(methods=("classifier_free",), scales=(1.0,)))
    described = alone.described(measured(alone.settings()))
    assert described.headline["distance, no guidance (N 6)"] == 11.0
    assert len(described.headline) == 2


def test_what_jobs_left_is_what_was_made_in_their_order(tmp_path: Path) -> None:
    files = Store(str(tmp_path))
    requests = [Request(label=0, seed=n) for n in range(70)]
    jobs = [one._replace(variant=StepsSetting("ddim", 2)) for one in jobs_of("way", requests)]
    assert [(one.name, len(one.requests)) for one in jobs] == [("way-000", 64), ("way-001", 6)]
    images = np.arange(70 * 12, dtype=np.uint8).reshape(70, 2, 2, 3)

    def sample(models: np.ndarray, one: SampleJob) -> dict[str, Any]:
        seeds = [request.seed for request in one.requests]
        return {"images": models[seeds], "evaluations": 5.0, "correct": np.zeros(len(seeds), bool)}

    sampler = ArrayWorker(lambda: images, sample, files)
    for one in jobs:
        sampler(one)
    found = read_points(files, {"way": jobs}, {"way": 3.0})["way"]
    assert (found.setting, found.distance) == (StepsSetting("ddim", 2), 3.0)
    np.testing.assert_array_equal(found.first, images[:8])
    parts = [FileImages(files, file_name(one.name), "images", len(one.requests)) for one in jobs]
    np.testing.assert_array_equal(np.concatenate([made for part in parts for made in part.batches()]), images)
    assert found.evaluations == 5.0
    assert found.correct.shape == (70,)


def test_a_committed_study_is_shown_by_the_report_as_it_is(tmp_path: Path) -> None:
    context = StageContext("steps_study", "k", Store(str(tmp_path)), Resources(), Recorder(), tmp_path)
    found = measured(study(STEPS).settings())
    artifact = commit_findings(context, study(STEPS).described(found))
    shown = study_of(artifact)
    assert shown.stage == "steps_study"
    assert [svg[:5] for svg in shown.plots.values()] == ["<svg "]
    assert shown.tables["Fréchet distances by sampler and steps"].rows[0][:2] == ("ddim", 2)
    assert list(run_images({"steps_study": artifact})) == ["by_steps"]


def test_figures_that_are_not_finite_are_left_out_of_a_committed_study_and_its_report(tmp_path: Path) -> None:
    context, figures = StageContext("s", "k", Store(str(tmp_path)), Resources(), Recorder(), tmp_path), {"mean": 2.5}
    unknown = figures | {"its standard error": math.nan}
    metadata = commit_findings(context, Findings({}, {}, unknown, unknown, {})).metadata
    assert metadata["summary"] == metadata["headline"] == figures
