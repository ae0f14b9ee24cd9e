"""Laws of what crosses from the head to workers: nothing of one node's disk, and no network is loaded on the head; and
of what crosses from one try of a stage to the next: nothing that is damaged, and nothing at all where it is forced.

Every stage runs here with workers that are simulated in this process: what they are given is pickled and unpickled as
Ray would, after the same check, and only they may load weights.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from ray import cloudpickle
from torch import nn

import components.stages
from components.configuration.optimization import StartConfig
from components.configuration.sampling import CascadeSampling, DiffusionSampling, RestorationSampling
from components.data.shards import BPE, INDEX
from components.data.stream import rank_batches
from components.evaluation.agreement import AgreementConfig
from components.evaluation.features import FeatureExtractor
from components.evaluation.likelihood_study import LikelihoodConfig
from components.evaluation.metrics import METRICS, USUAL, Metric
from components.evaluation.noising_study import NoisingStudyConfig
from components.evaluation.obedience import ObedienceConfig, SceneJudgeConfig
from components.evaluation.restoration import RestorationConfig
from components.runtime.events import Event, Recorder, Warning
from components.runtime.execution import Resources
from components.runtime.pool import HandoverError, Later, Pool, file_name, portable
from components.runtime.storage.artifact import RECORDS, Artifact, begin_forced_try, load_artifact, verify_files
from components.runtime.storage.scratch import SCRATCH
from components.runtime.storage.store import Store
from components.stages.context import StageContext
from components.stages.evaluate import EvaluationConfig, evaluate, run_study, train_scene_judge
from components.stages.images import ImagesConfig, ingest_images
from components.stages.precompute import PrecomputeConfig, TextEncoderConfig, import_text_encoder, precompute
from components.stages.samples import SamplesConfig, compose_cascade, preserve_prior, sample_generators
from components.stages.tokens import TokensConfig, tokenize_images
from components.stages.training import train_model
from components.training import launch
from components.training.parallel import ALONE
from components.training.results import finish
from components.training.subject import SubjectConfig
from components.training.worker import TrainingJob
from pipelines.workflow import Stage, stage_key
from tests.stored_files import flip
from tests.tiny_text_image import classifier_config, contrastive_config
from tests.tiny_text_image import prior_config as diffusion_prior_config
from tests.tiny_training import (
    autoencoder_config,
    diffusion_config,
    gan_config,
    image_to_image_config,
    masked_prior_config,
    pixel_config,
    prior_config,
)
from tests.unit.test_evaluation_studies import GUIDANCE, STEPS
from tests.unit.test_frozen_text import pretrained_folder

SIDE, FORCED = 16, "0123456789ab"
SET = {"resolution": SIDE, "samples_per_shard": 24, "holdout_fraction": 0.2, "vocab_size": 300, "text_length": 16}
VAE = {"bottleneck": "gaussian", "channel_mult": (1, 2, 2)}
LATENT = {"resolution": 4, "in_channels": 8, "attention_resolutions": (), "conditions": ("label",)}
at_work = False  # whether a simulated worker is


class LoadedOnTheHeadError(AssertionError):
    pass


@contextmanager
def working() -> Iterator[None]:
    global at_work
    at_work = True
    try:
        yield
    finally:
        at_work = False


def sent(value: Any, what: str = "a value") -> Any:
    """As it comes out on another node."""
    return cloudpickle.loads(cloudpickle.dumps(portable(value, what=what)))


def finished(made: Any) -> Any:
    return made.finish() if isinstance(made, Later) else made


class SimulatedPool(Pool):
    def as_done(self, make_worker: Callable[[], Callable[[Any], Any]], parts: Sequence[Any]) -> Iterator[Any]:
        if not parts:  # then no worker is started either
            return
        with working():
            work = sent(make_worker)()
            made = [sent(finished(work(sent(part)))) for part in parts]
        yield from enumerate(made)

    def call(self, function: Callable[[], Any]) -> Any:
        with working():
            return sent(sent(function)())


def read_pieces(work: Any, pieces: Sequence[Any], *, num_cpus: float) -> Iterator[Any]:
    del num_cpus
    with working():
        made = [sent(work)(piece) for piece in pieces]
    yield from made


def run_trainer(job: TrainingJob) -> bool:
    """A training of no steps: the real task with its data, and the files of its model."""
    job = sent(job, "the job")
    with working():
        task = job.make_task(worker=ALONE)
        held_out = job.held_out()
        assert len(next(iter(held_out.values()))) > 0
        assert job.stream.func is rank_batches
        (samples,) = job.stream.args
        if samples.decoded:
            next(job.stream(rank=0, world_size=1, start_step=0))
        summary = {"steps": 0.0, "ema_sigma_rel": 0.1} | task.evaluate({n: rows[:2] for n, rows in held_out.items()})
        previews = task.preview(held_out, 0)
        finish(job.run, job.store, job.model, weights=task.state_dict()["weights"], summary=summary, previews=previews)
    return False


@pytest.fixture(scope="module")
def simulated() -> Iterator[None]:
    load_state_dict = nn.Module.load_state_dict

    def load(self: nn.Module, *arguments: Any, **options: Any) -> Any:
        if not at_work:
            raise LoadedOnTheHeadError(type(self).__name__)
        return load_state_dict(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "load_state_dict", load)
        patch.setattr(StageContext, "pool", lambda self: SimulatedPool(self.resources, warn=self.warn))
        for module in ("ingest", "parts"):
            patch.setattr(f"components.data.{module}.run_pieces", read_pieces)
        patch.setattr(launch, "run_trainer", run_trainer)
        yield


class Warnings(Recorder):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def emit(self, event: Event) -> None:
        self.lines += [event.line] if isinstance(event, Warning) else []


class House:
    """Runs each stage once, with what it needs before it."""

    def __init__(self, root: Path) -> None:
        self.root, self.made = root, dict[str, Artifact]()
        (root / "scratch").mkdir()

    def context(self, name: str, *, key: str = "key", forced: str = "") -> StageContext:
        store = Store(str(self.root / "stages" / name / key))
        resources, scratch = Resources(num_workers=1, num_actors=2), self.root / "scratch"
        return StageContext(name, key, store, resources, Warnings(), scratch, forced=forced)

    def __call__(self, name: str) -> Artifact:
        if name not in self.made:
            self.made[name] = self.run(self.context(name))
        return self.made[name]

    def run(self, context: StageContext) -> Artifact:
        run, config, inputs = STAGES[context.stage]
        given = {field: self.given(other) for field, other in inputs.items()}
        if context.stage == "text_encoder":
            config = TextEncoderConfig(uri=str(pretrained_folder(self.root / "bert", "bert", length=None)), length=5)
        if context.stage == "subject":
            start = StartConfig(uri=self("base").root)
            config = SubjectConfig(init_from=start, label=0, class_label=1, samples=2, sampling=FEW)
        return run(config, context, **given)

    def given(self, other: str | list[str]) -> Artifact | list[Artifact]:
        return [self(each) for each in other] if isinstance(other, list) else self(other)


@pytest.fixture(scope="module")
def house(simulated: None, tmp_path_factory: pytest.TempPathFactory) -> House:
    return House(tmp_path_factory.mktemp("house"))


FEW = DiffusionSampling(num_inference_steps=3)
IMAGES, CODES = {"images": "images"}, {"tokens": "tokens", "tokenizer": "tokenizer"}
STAGES: dict[str, tuple[Callable[..., Artifact], Any, dict[str, Any]]] = {
    "images": (ingest_images, ImagesConfig(source="scenes", limit=72, **SET), {}),
    "tokenizer": (train_model, autoencoder_config(), IMAGES),
    "vae": (train_model, autoencoder_config(**VAE), IMAGES),
    "tokens": (tokenize_images, TokensConfig(), {**IMAGES, "tokenizer": "tokenizer"}),
    "depth_tokens": (tokenize_images, TokensConfig(member="depth"), {**IMAGES, "tokenizer": "tokenizer"}),
    "prior": (train_model, prior_config(), CODES),
    "conditional_prior": (
        train_model,
        prior_config(conditions=("label", "condition")),
        {**CODES, "condition": "depth_tokens"},
    ),
    "masked_prior": (train_model, masked_prior_config(), CODES),
    "pixel_prior": (train_model, pixel_config(resolution=None), CODES),
    "base": (train_model, diffusion_config(conditions=("label",)), IMAGES),
    "weaker": (train_model, diffusion_config(conditions=("label",), seed=8), IMAGES),
    "upsampler_16": (train_model, diffusion_config(resolution=16, low_res_resolution=8), IMAGES),
    "latents": (
        precompute,
        PrecomputeConfig(columns=("latents", "image_embedding", "text_states"), resolution=16),
        {**IMAGES, "autoencoder": "vae", "contrastive": "contrastive"},
    ),
    "latent_base": (train_model, diffusion_config(**LATENT), {**IMAGES, "autoencoder": "vae"}),
    "precomputed_base": (train_model, diffusion_config(**LATENT), {"images": "latents", "autoencoder": "vae"}),
    "contrastive": (train_model, contrastive_config(), IMAGES),
    "diffusion_prior": (train_model, diffusion_prior_config(), {**IMAGES, "contrastive": "contrastive"}),
    "text_encoder": (import_text_encoder, None, {}),
    "imagen": (
        train_model,
        diffusion_config(conditions=("text_states",), ema="power", ema_sigma_rel=0.1),
        {**IMAGES, "text_encoder": "text_encoder"},
    ),
    "classifier": (train_model, classifier_config(), IMAGES),
    "judge": (train_model, classifier_config(noisy=False), IMAGES),
    "gan": (train_model, gan_config(), IMAGES),
    "pixels": (train_model, pixel_config(), IMAGES),
    "palette": (train_model, image_to_image_config(), IMAGES),
    "cascade": (
        compose_cascade,
        CascadeSampling(base=FEW, upsamplers=(FEW,)),
        {"tokenizer": "tokenizer", "prior": "prior", "base": "base", "upsamplers": ["upsampler_16"]},
    ),
    "subject": (preserve_prior, None, IMAGES),
    "restoring": (compose_cascade, RestorationSampling(model=FEW), {"model": "palette"}),
    "samples": (
        sample_generators,
        SamplesConfig(measured_samples=2, images_per_class=1, max_classes=2, num_prompts=1, images_per_prompt=1),
        {**IMAGES, "cascade": "cascade"},
    ),
    "evaluation": (
        evaluate,
        EvaluationConfig(reference_samples=4, held_out_samples=2),
        {**IMAGES, "tokenizer": "tokenizer", "samples": "samples"},
    ),
    "restoration": (
        run_study,
        RestorationConfig(samples=2, feature_network="none"),
        {**IMAGES, "cascade": "restoring"},
    ),
    "agreement": (
        run_study,
        AgreementConfig(samples=3),
        {**IMAGES, "cascade": "cascade", "judge": "judge", "matcher": "contrastive"},
    ),
    "scene_judge": (
        train_scene_judge,
        SceneJudgeConfig(renderings=64, steps=2, held_out=8, least_accuracy=0),
        {},
    ),
    "obedience": (
        run_study,
        ObedienceConfig(samples=4, seeds=1),
        {**IMAGES, "cascade": "cascade", "judge": "scene_judge"},
    ),
    "likelihood": (run_study, LikelihoodConfig(samples=2, timesteps_per_image=3), {**IMAGES, "model": "base"}),
    "image_likelihood": (run_study, LikelihoodConfig(samples=2), {**IMAGES, "model": "pixels"}),
    "noising_study": (run_study, NoisingStudyConfig(samples=2, shown=1), {**IMAGES, "model": "base"}),
    "steps_study": (run_study, STEPS.replace(samples=2, reference_samples=4), {**IMAGES, "cascade": "cascade"}),
    "guidance_study": (
        run_study,
        GUIDANCE.replace(samples=2, reference_samples=4),
        {**IMAGES, "base": "base", "judge": "judge", "weaker": "weaker", "classifier": "classifier"},
    ),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_sends_nothing_of_its_disk_to_workers_and_loads_no_network_itself(house: House, stage: str) -> None:
    artifact = house(stage)
    assert load_artifact(artifact.store) == artifact
    assert all(not entry.path.startswith("/") for entry in artifact.files)


class KilledError(Exception):
    """In place of a kill, where the artifact would be committed."""


def killed(store: Store, artifact: Artifact) -> Artifact:
    raise KilledError(artifact.stage)


def run_until_commit(house: House, context: StageContext, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("components.stages.context.commit_artifact", killed)
        with pytest.raises(KilledError):
            house.run(context)


def made_of(artifact: Artifact) -> tuple[dict[str, str], dict[str, Any]]:
    """All that an artifact holds, but for the time that it took."""
    metadata = {name: value for name, value in artifact.metadata.items() if "seconds" not in str(value)}
    return dict(zip(artifact.names(), (entry.sha256 for entry in artifact.files), strict=True)), metadata


def files_left(context: StageContext) -> list[Path]:
    """What a try leaves of its work, without the records of parts."""
    folders = [Path(store.uri) for store in (context.files_store, context.work_store)]
    return [file for folder in folders for file in folder.rglob("*") if file.is_file() and file.parent.name != RECORDS]


KEEPING = (
    *("images", "tokens", "latents", "samples", "likelihood", "image_likelihood"),
    *("restoration", "agreement", "steps_study", "guidance_study"),
)


@pytest.mark.parametrize("stage", KEEPING)
def test_a_resume_adopts_no_flipped_bit_and_a_forced_try_nothing(
    house: House, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, context = made_of(house(stage)), house.context(stage, key="killed")
    run_until_commit(house, context, monkeypatch)
    damaged = files_left(context)
    for file in damaged:
        flip(file)
    resumed = house.run(context)
    assert made_of(resumed) == whole
    assert verify_files(resumed.store, resumed.files) == []
    said = {file for file in damaged if any(f"{file} differs" in line for line in context.recorder.lines)}
    made_by_every_try, of_a_part_that_is_said = {INDEX, BPE}, {"null_text_states.npy"}
    assert {file.name for file in set(damaged) - said} <= made_by_every_try | of_a_part_that_is_said
    for file in files_left(context):
        flip(file)
    before = {file: file.read_bytes() for file in files_left(context)}
    listed = [entry for entry in resumed.files if entry.path.startswith("files/")]
    assert len(verify_files(resumed.store, resumed.files)) == len(listed)
    begin_forced_try(context.store, FORCED)
    forced = house.run(house.context(stage, key="killed", forced=FORCED))
    assert made_of(forced) == whole
    assert verify_files(forced.store, forced.files) == []
    assert {file: file.read_bytes() for file in before} == before  # of those who still read the artifact of before


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of images that the feature network is given from now on."""
    seen, call = list[int](), FeatureExtractor.__call__

    def counting(self: FeatureExtractor, images: np.ndarray) -> np.ndarray:
        seen.append(len(images))
        return call(self, images)

    monkeypatch.setattr(FeatureExtractor, "__call__", counting)
    return seen


def test_another_figure_of_the_same_images_moves_the_key_and_costs_no_pass_of_the_network(
    house: House, forwards: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = house("evaluation").metadata["distances"]
    forwards.clear()
    spread = Metric("Spread", lambda compared: float(compared.features.std()), share=False)
    monkeypatch.setitem(METRICS, "spread", spread)
    keys = {
        stage_key(Stage("evaluation", evaluate, EvaluationConfig(metrics=names)), {})
        for names in ((*USUAL, "spread"), ("distance", "precision", "recall"))
    }
    assert len(keys) == 2
    run, config, inputs = STAGES["evaluation"]
    monkeypatch.setitem(STAGES, "evaluation", (run, config.replace(metrics=(*USUAL, "spread")), inputs))
    report = house.run(house.context("evaluation", key="spread"))
    assert forwards == []
    rows = report.metadata["distances"]
    assert all(row["spread"] > 0 for row in rows[1:])
    assert [{name: value for name, value in row.items() if name != "spread"} for row in rows] == before
    assert "spread_efficientnet_lite0_noise" in report.metadata["summary"]


def test_features_that_were_damaged_are_measured_again(house: House, forwards: list[int]) -> None:
    whole = made_of(house("evaluation"))
    features = [*house.root.glob("stages/samples/key/files/features/*.npz")]
    for file in features:
        flip(file)
    forwards.clear()
    context = house.context("evaluation", key="damaged")
    assert made_of(house.run(context)) == whole
    assert all(any(f"{file} differs" in line for line in context.recorder.lines) for file in features)
    assert sum(forwards) == 2 * 3  # two images of each of three stages


def test_a_forced_evaluation_measures_everything_anew_and_goes_on_where_it_was_killed(
    house: House, forwards: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = made_of(house("evaluation"))
    forwards.clear()
    run_until_commit(house, house.context("evaluation", key="forced", forced=FORCED), monkeypatch)
    assert sum(forwards) >= 2 * 3 + 4  # at least the samples and the training images
    forwards.clear()
    assert made_of(house.run(house.context("evaluation", key="forced", forced=FORCED))) == whole
    assert forwards == []


def test_a_model_that_was_damaged_before_its_training_committed_is_made_again(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, context = made_of(house("gan")), house.context("gan", key="killed")
    run_until_commit(house, context, monkeypatch)
    (model,) = Path(context.store.uri).glob("attempt-*/model.safetensors")
    flip(model)
    resumed = house.run(context)
    assert made_of(resumed) == whole
    assert verify_files(resumed.store, resumed.files) == []
    assert [line.partition(" differs")[0] for line in context.recorder.lines] == [str(model)]


def stages_in(module: ModuleType) -> set[Callable[..., Artifact]]:
    """The run functions of a module: those that return an artifact from a configuration, a context and artifacts."""
    found = set()
    for _, function in inspect.getmembers(module, inspect.isfunction):
        signature = inspect.signature(function)
        first, rest = list(signature.parameters.values())[:2], list(signature.parameters.values())[2:]
        by_name = all(parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_KEYWORD) for parameter in rest)
        if function.__module__ == module.__name__ and by_name and signature.return_annotation is Artifact:
            found |= {function} if [parameter.name for parameter in first] == ["config", "context"] else set()
    return found


def test_every_stage_is_among_them() -> None:
    names = [f"components.stages.{info.name}" for info in pkgutil.iter_modules(components.stages.__path__)]
    stages = set().union(*(stages_in(importlib.import_module(name)) for name in names))
    assert train_model in stages
    assert stages == {run for run, _, _ in STAGES.values()}


def test_what_is_on_one_node_only_is_refused_by_name(tmp_path: Path) -> None:
    store, context = Store("s3://bucket/runs"), House(tmp_path).context("prior")
    for local in (tmp_path, [{"deep": tmp_path}], partial(print, tmp_path), lambda: tmp_path, f"/tmp/{SCRATCH}a/b"):
        with pytest.raises(HandoverError, match=r"the job of stage prior holds .* on this node only"):
            portable(local, what="the job of stage prior")
    for kept in (context, [context], lambda: context, context.report_images):
        with pytest.raises(HandoverError, match="context of stage prior is of this node only"):
            portable(kept, what="the job")
    with pytest.raises(HandoverError, match="a part of the pool's work holds"):
        list(Pool(Resources()).map(lambda: print, [1, tmp_path]))
    images = np.zeros((2, 4, 4, 3), np.uint8)
    for sendable in (store, str(tmp_path / "storage"), images, partial(print, store, images), file_name):
        assert portable(sendable, what="a value") is sendable


def test_weights_are_not_loaded_on_the_head(house: House) -> None:
    from components.data.encoding import describe_autoencoder, open_autoencoder

    with pytest.raises(LoadedOnTheHeadError):
        open_autoencoder(house("tokenizer"))
    described = describe_autoencoder(house("tokenizer"))
    assert {parameter.device.type for parameter in described.parameters()} == {"meta"}
    with working():
        network = open_autoencoder(house("tokenizer"))
    assert (described.grid, described.diffused_shape) == (network.grid, network.diffused_shape)
