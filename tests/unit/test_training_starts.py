"""Trainings that begin with given weights: what the plan says, what is refused, what the key holds; parts and rates."""

import json
import re
import shutil
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from components.configuration.conditions import DatasetInfo
from components.configuration.optimization import StartConfig
from components.configuration.usage import UsageError
from components.data.held_out import read_split
from components.data.shards import View, load_index
from components.models.bundle import DESCRIPTION, WEIGHTS, ModelBundle, save_bundle
from components.runtime.storage.artifact import Artifact, commit_artifact, upload_attempt
from components.runtime.storage.connection import StoreError
from components.runtime.storage.store import Store
from components.runtime.tracking.names import CANDIDATE, MANIFEST, PLACE
from components.runtime.tracking.registry import create_name
from components.sampling.model import BPE
from components.sampling.requests import Request
from components.training.batches import to_batch
from components.training.learner import make_network
from components.training.loop import fit
from components.training.optim import factor_of
from components.training.subject import SubjectConfig, write_subject
from components.weights.starts import load_start, open_start, start_loader
from pipelines.engine.driver import Prepared, RunOptions, prepare
from pipelines.planning.cost import stage_costs
from pipelines.planning.memory import step_model
from pipelines.planning.profiles import GPUS, Cluster, Profile
from pipelines.planning.shares import share_cluster, trainings
from pipelines.recipes.catalog import load_recipe
from pipelines.workflow import Workflow
from tests.image_sets import write_set
from tests.in_process import Done, in_process
from tests.refusals import assert_refused, one_line
from tests.served_models import Registry
from tests.tiny_cascade import commit_model
from tests.tiny_training import (
    DATASET_INFO,
    assert_equal_bits,
    autoencoder_config,
    batches,
    diffusion_config,
    gan_config,
    make_task,
    weights_of,
)
from tests.trained_networks import resumed

BASE = "image-cascade-tiny-base"
SMOKE = DatasetInfo(num_classes=7, vocab_size=280, text_length=12)  # of other sets than the recipe's
NINE = SMOKE.model_copy(update={"num_classes": 9})
OBJECTS = [*(f"class {number}" for number in range(8)), "Objects"]
PARTS = {"down": {"learning_rate": 0}, "down.1": {"learning_rate": 0.5}, "*.bias": {"learning_rate": 3}}


def bundle_of(config: Any, info: DatasetInfo = DATASET_INFO, *, seed: int = 3, **settings: Any) -> ModelBundle:
    torch.manual_seed(seed)
    network = make_network(config, info)
    for tensor in network.parameters():
        nn.init.normal_(tensor, std=0.1)
    return ModelBundle(config.network.kind, config.network_arguments(info), settings, network)


def written(folder: Path, config: Any, info: DatasetInfo = DATASET_INFO, **how: Any) -> Path:
    save_bundle(folder, bundle_of(config, info, **how))
    return folder


def smoke_base() -> Any:
    return load_recipe("smoke", []).base


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """A model of smoke's base, of another set."""
    return written(tmp_path / "start", smoke_base(), SMOKE)


def plan(folder: Path, **init_from: Any) -> Done:
    values = ", ".join(f"{name}: {value}" for name, value in init_from.items())
    command = ("plan", "--recipe", "smoke", "--storage", str(folder / "runs"), "--set")
    return in_process(*command, f"base.init_from={{{values}}}", cwd=folder)


def key_of(folder: Path, *changes: str) -> str:
    options = RunOptions("smoke", list(changes), storage=str(folder / "runs"), tracking="none")
    return next(entry.key for entry in prepare(options).planned if entry.stage.name == "base")


def test_the_plan_says_how_many_tensors_come_from_the_start(tmp_path: Path, start: Path):
    """Also before the set is read, whose captions and classes decide the sizes of two tables."""
    count = len(bundle_of(smoke_base(), SMOKE).module.state_dict())
    done = plan(tmp_path, uri="start")
    assert done.returncode == 0, done.stderr
    assert f"base starts from start: {count} tensors from it, 0 new, 0 unused" in done.stdout
    done = plan(tmp_path, uri="start", ignore="[class_embedding]")
    assert f"base starts from start: {count - 1} tensors from it, 1 new, 1 unused" in done.stdout
    plain = in_process("plan", "--recipe", "smoke", "--storage", str(tmp_path / "runs"), cwd=tmp_path)
    assert "starts from" not in plain.stdout


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"conditions": ("text",)}, ("1 tensors of the network are missing, first class_embedding.weight", "ignore")),
        ({"model_channels": 32}, ("tensors have other shapes than in the network", "not [")),
        ({"num_res_blocks": 2}, ("tensors have no place in the network, first ")),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(tmp_path: Path, change: dict, words: tuple[str, ...]):
    written(tmp_path / "start", smoke_base().replace(**change), SMOKE)
    assert_refused(plan(tmp_path, uri="start"), "base.init_from: ", *words)
    assert not (tmp_path / "runs/stages").exists()


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("none", ("none holds no model", "cascade import")),
        ("theirs", ("theirs holds weights of other code", "cascade import")),
        ("last.ckpt", ("last.ckpt is no folder of a model of ours", "cascade import")),
        ("hf://owner/model", ("hf://owner/model is no folder", "cascade import")),
    ],
)
def test_what_is_no_model_of_ours_is_refused(tmp_path: Path, uri: str, words: tuple[str, ...]):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/config.json").write_text("{}")
    assert_refused(plan(tmp_path, uri=uri), "init_from: ", *words)


def test_a_module_that_is_not_there_can_t_be_ignored(tmp_path: Path, start: Path):
    done = plan(tmp_path, uri="start", ignore="[clas_embedding]")
    assert_refused(done, "ignore: the network has no module 'clas_embedding'; did you mean 'class_embedding'?")


def test_a_module_of_the_start_alone_is_left_out_by_its_name(tmp_path: Path, start: Path):
    """A model without labels begins with one by class."""
    config = smoke_base().replace(conditions=("text",))
    own = config.replace(init_from=StartConfig(uri=str(start)))
    with one_line(ValueError, match="first class_embedding.weight; name the modules that are to be new in ignore"):
        start_loader(own, SMOKE, None, bpe=None)
    ignoring = config.replace(init_from=StartConfig(uri=str(start), ignore=("class_embedding",)))
    load = start_loader(ignoring, SMOKE, None, bpe=None)
    assert load is not None
    load(network := make_network(config, SMOKE))
    given = bundle_of(smoke_base(), SMOKE).module.state_dict()
    assert_equal_bits(network.state_dict(), {name: given[name] for name in network.state_dict()})


def test_the_key_holds_the_content_of_the_start_and_not_its_address(tmp_path: Path, start: Path):
    uri, ignore = "base.init_from.uri={}".format, "base.init_from.ignore=[class_embedding]"
    shutil.copytree(start, tmp_path / "copy")
    written(tmp_path / "other", smoke_base(), SMOKE, seed=4)
    written(tmp_path / "scaled", smoke_base(), SMOKE, latent_scale=0.2)
    committed(tmp_path / "committed", start)
    keys = [key_of(tmp_path), *(key_of(tmp_path, uri(tmp_path / name)) for name in ("start", "other", "scaled"))]
    assert len({*keys, key_of(tmp_path, uri(start), ignore)}) == 5
    assert key_of(tmp_path, uri(tmp_path / "copy")) == key_of(tmp_path, uri(tmp_path / "committed")) == keys[1]


def committed(folder: Path, files: Path) -> Artifact:
    store = Store(str(folder))
    return commit_artifact(store, Artifact(kind="model", stage="base", key="k", files=upload_attempt(store, files)))


def registered(registry: Registry, folder: Path, *, seed: int) -> Artifact:
    """What a new version, the candidate, was registered from."""
    artifact = commit_model(
        folder, "base", f"k{seed}", written(folder / f"start-{seed}", smoke_base(), SMOKE, seed=seed)
    )
    create_name(registry.client, BASE)
    tags = {PLACE: artifact.root, MANIFEST: artifact.digest}
    version = registry.client.create_model_version(BASE, artifact.root, tags=tags)
    registry.client.set_registered_model_alias(BASE, CANDIDATE, version.version)
    return artifact


def test_a_registered_start_is_its_artifact_of_when_the_run_is_planned(
    tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch
):
    registry = Registry(tmp_path, empty_database)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry.uri)
    uri, by_alias = "base.init_from.uri={}".format, f"models:/{BASE}@candidate"
    keys = []
    for seed in (3, 4):
        artifact = registered(registry, tmp_path, seed=seed)
        prepared = prepare(RunOptions("smoke", [uri(by_alias)], storage=str(tmp_path / "runs")))
        keys.append(next(entry.key for entry in prepared.planned if entry.stage.name == "base"))
        assert keys[-1] == key_of(tmp_path, uri(artifact.root))
        assert prepared.workflow.by_name["base"].config.init_from.uri == artifact.root
        assert prepared.starts[0] == f"{by_alias} is models:/{BASE}/{seed - 2} in {artifact.root}"
    assert keys[0] != keys[1]
    Store(artifact.root).delete("manifest.json")
    assert_refused(
        plan(tmp_path, uri=f"'{by_alias}'"), f"base.init_from: models:/{BASE}/2 was registered from", "folder"
    )


def test_weights_that_are_not_those_of_the_manifest_are_never_taken(tmp_path: Path, start: Path):
    """A manifest that lists them is believed by the plan, and held against them where they are read."""
    artifact = committed(tmp_path / "committed", start)
    opened = open_start(StartConfig(uri=str(tmp_path / "committed")))
    network = make_network(smoke_base(), SMOKE)
    load_start(network, start=opened, ignore=())
    assert_equal_bits(network.state_dict(), dict(bundle_of(smoke_base(), SMOKE).module.state_dict()))
    save_bundle(tmp_path / "other", bundle_of(smoke_base(), SMOKE, seed=4))
    shutil.copy(tmp_path / "other" / WEIGHTS, tmp_path / "committed" / artifact.entry(WEIGHTS).path)
    with one_line(StoreError, match=WEIGHTS):
        load_start(network, start=opened, ignore=())


def test_a_start_lies_in_storage_too(start: Path):
    """A bundle alone there has the same content as on the disk, and as an artifact that lists it."""
    opened = []
    for how in ("bundle", "artifact"):
        store = Store(f"memory://start-{uuid.uuid4().hex}")
        if how == "artifact":
            files = upload_attempt(store, start)
            commit_artifact(store, Artifact(kind="model", stage="base", key="k", files=files))
        else:
            for path in start.iterdir():
                store.upload(path, path.name)
        opened.append(open_start(StartConfig(uri=store.uri)))
        network = make_network(smoke_base(), SMOKE)
        load_start(network, start=opened[-1], ignore=())
        assert_equal_bits(network.state_dict(), dict(bundle_of(smoke_base(), SMOKE).module.state_dict()))
    assert opened[0].digest == opened[1].digest == open_start(StartConfig(uri=str(start))).digest


def loader(config: Any, folder: Path, *ignore: str) -> Callable[[nn.Module], None] | None:
    own = config.replace(init_from=StartConfig(uri=str(folder), ignore=ignore))
    return start_loader(own, DATASET_INFO, None, bpe=None)


def test_network_and_average_begin_with_the_weights_and_ignored_modules_as_ever(tmp_path: Path):
    config = diffusion_config()
    given = bundle_of(config).module.state_dict()
    folder = written(tmp_path / "start", config)
    plain, task = make_task(config), make_task(config, load_start=loader(config, folder, "class_embedding"))
    drawn, begun = plain.learner.network.state_dict(), task.learner.network.state_dict()
    assert_equal_bits(begun, given | {"class_embedding.weight": drawn["class_embedding.weight"]})
    assert_equal_bits(begun, task.learner.ema.network.state_dict())
    assert loader(config, folder) is not None
    with one_line(ValueError, match="class_embedding.weight: .*other shapes|other shapes.*class_embedding.weight"):
        start_loader(
            config.replace(init_from=StartConfig(uri=str(folder))),
            DATASET_INFO.model_copy(update={"num_classes": 9}),
            None,
            bpe=None,
        )


def test_captions_of_another_tokenizer_are_refused(tmp_path: Path):
    config = diffusion_config()
    folder = written(tmp_path / "start", config)
    (folder / BPE).write_text("theirs")
    own = config.replace(init_from=StartConfig(uri=str(folder)))
    assert start_loader(own, DATASET_INFO, None, bpe="theirs") is not None
    with one_line(ValueError, match=r"another tokenizer .* name text_encoder.token_embedding in ignore"):
        start_loader(own, DATASET_INFO, None, bpe="ours")
    ignoring = config.replace(init_from=StartConfig(uri=str(folder), ignore=("text_encoder",)))
    assert start_loader(ignoring, DATASET_INFO, None, bpe="ours") is not None


@pytest.mark.parametrize("parts", [{}, PARTS])
def test_a_resumed_run_needs_no_start_and_has_the_same_bits(tmp_path: Path, parts: dict):
    config = diffusion_config(total_steps=8, warmup_steps=2, checkpoint_every=4, parts=parts)
    load = loader(config, written(tmp_path / "start", config))
    whole, broken_off = make_task(config, load_start=load), make_task(config, load_start=load)
    fit(whole, batches(config, to_batch), config.optimization)
    fit(broken_off, batches(config, to_batch), config.optimization.model_copy(update={"total_steps": 4}))
    shutil.rmtree(tmp_path / "start")
    task = resumed(tmp_path, config, broken_off, make_task)
    assert_equal_bits(weights_of(task), weights_of(whole))


def test_codes_of_a_start_are_not_started_again(tmp_path: Path):
    """A codebook that begins at features of the first batch would be another one."""
    config = autoencoder_config(bottleneck={"kind": "vq", "codebook_size": 16, "codebook_init": "data"})
    folder = written(tmp_path / "start", config)
    for ignore in ((), ("bottleneck",)):
        own = config.replace(init_from=StartConfig(uri=str(folder), ignore=ignore))
        task = make_task(own, load_start=loader(config, folder, *ignore))
        before = task.learner.network.bottleneck.codebook.detach().clone()
        task.train_step(next(batches(config, to_batch)), 1)
        moved = float((task.learner.network.bottleneck.codebook.detach() - before).abs().max())
        assert (moved > 0.05) == bool(ignore)  # a step of Adam moves nothing so far


def moves(config: Any, *, steps: int = 1) -> dict[str, Tensor]:
    """How far each parameter went, as a share of the rate."""
    task = make_task(config)
    before = {name: tensor.detach().clone() for name, tensor in task.learner.network.named_parameters()}
    stream = batches(config, to_batch)
    for step in range(1, steps + 1):
        task.train_step(next(stream), step)
    return {name: tensor.detach() - before[name] for name, tensor in task.learner.network.named_parameters()}


def test_parts_have_rates_of_their_own_and_frozen_ones_keep_every_bit():
    plain = diffusion_config(weight_decay=0.0, max_grad_norm=1e9, warmup_steps=0)
    own, whole = moves(plain.replace(parts=PARTS)), moves(plain)
    for name, move in own.items():
        factor = factor_of(name, plain.replace(parts=PARTS).optimization.parts)
        wanted = 3 if name.endswith(".bias") else 0.5 if name.startswith("down.1.") else 0 if "down." in name else 1
        if not name.endswith(".bias") or "down." not in name:
            assert factor == wanted, name
        torch.testing.assert_close(move, factor * whole[name], rtol=1e-3, atol=1e-7, msg=name)
    frozen = diffusion_config(parts=PARTS, weight_decay=0.1)
    assert all(bool((move == 0).all()) for name, move in moves(frozen, steps=3).items() if is_frozen(name))
    task = make_task(frozen)
    fit(task, batches(frozen, to_batch), frozen.optimization)
    for name, tensor in make_task(frozen).learner.network.named_parameters():
        if is_frozen(name):
            assert torch.equal(task.learner.ema.network.get_parameter(name), tensor)


def is_frozen(name: str) -> bool:
    return name.startswith("down.0.") and not name.endswith(".bias")


def test_the_longest_pattern_counts_whatever_the_order():
    parts = diffusion_config(
        parts={"*": {"learning_rate": 0}, "up": {"learning_rate": 2}, "up.[1-9]": {"learning_rate": 3}}
    )
    factors = [factor_of(name, parts.optimization.parts) for name in ("conv_in.weight", "up.0.weight", "up.1.bias")]
    assert factors == [0, 2, 3]
    assert make_task(parts).learner.optimizer.param_groups[0]["factor"] == 2


def test_frozen_parts_have_no_state_and_no_bytes_in_the_plan():
    plain, frozen = diffusion_config(), diffusion_config(parts={"down": {"learning_rate": 0}})
    task = make_task(frozen)
    task.train_step(next(batches(frozen, to_batch)), 1)
    trained = [parameter for parameter in task.learner.network.parameters() if parameter.requires_grad]
    assert len(task.learner.optimizer.state) == len(trained)
    counted = sum(p.numel() for p in step_model(frozen, DATASET_INFO).network.parameters() if p.requires_grad)
    assert counted == sum(p.numel() for p in trained) < sum(p.numel() for p in task.learner.network.parameters())
    assert step_model(plain, DATASET_INFO) is not step_model(frozen, DATASET_INFO)


@pytest.mark.parametrize(
    ("make_config", "parts", "words"),
    [
        (diffusion_config, "donw", "parts: no parameter is named as 'donw'"),
        (diffusion_config, "*", "parts: nothing is left to train"),
        (autoencoder_config, "decoder", "parts: the adaptive weight needs the last layer to train"),
        (partial(gan_config), "discriminator", "parts: no parameter is named as 'discriminator'"),
    ],
)
def test_parts_that_can_t_be_are_refused(make_config: Callable[..., Any], parts: str, words: str):
    with one_line(ValueError, match=words.replace("*", r"\*")):
        make_task(make_config(parts={parts: {"learning_rate": 0}}))


def test_the_command_refuses_parts_before_anything_starts(tmp_path: Path):
    command = ("plan", "--recipe", "smoke", "--storage", str(tmp_path / "runs"), "--set")
    done = in_process(*command, "base.parts={donw: {learning_rate: 0}}", cwd=tmp_path)
    assert_refused(done, "base: parts: no parameter is named as 'donw'")
    done = in_process(
        *command, "base.parts={donw: {learning_rate: 0}}", "--cluster", "gpus=8", "--gpu", "h100", cwd=tmp_path
    )
    assert_refused(done, "base: parts: no parameter is named as 'donw'")
    done = in_process(*command, "base.parts={down: {learning_rate: -1}}", cwd=tmp_path)
    assert_refused(done, "base.optimization.parts.down.learning_rate")


@pytest.fixture
def of_dogs(tmp_path: Path) -> Any:
    """A recipe whose autoencoder and start lie in the test's folder, beside three images of a dog."""
    recipe = load_recipe("dit", [])
    written(tmp_path / "vae", recipe.autoencoder, NINE)
    written(tmp_path / "start", recipe.base, NINE, classes=OBJECTS)
    (tmp_path / "dogs/dog").mkdir(parents=True)
    for name in "abc":
        Image.new("RGB", (16, 16), "red").save(tmp_path / f"dogs/dog/{name}.png")
    return recipe


def subject_of(folder: Path, *changes: str) -> Prepared:
    """A subject of three images, learned beside samples of a start, before anything starts."""
    given = [
        f"base.init_from.uri={folder}/start",
        f"images.source={folder}/dogs",
        "images.holdout_fraction=0",
        "images.held_out_pairs=0",
    ]
    given += [f"autoencoder.init_from={{uri: {folder}/vae, frozen: true}}"]
    given += ["subject.label=Objects", "subject.class_label=4", *changes]
    return prepare(RunOptions("dit", given, storage=str(folder / "runs"), tracking="none"))


def test_a_subject_is_planned_in_the_classes_of_the_start(tmp_path: Path, of_dogs: Any):
    plain, longer, other = (
        subject_of(tmp_path, *change) for change in ((), ("base.total_steps=60",), ("subject.weight=2",))
    )
    assert plain.running[:5] == ["images", "vae", "subject", "precompute", "base"]
    assert all("tensors from it, 0 new, 0 unused" in line for line in plain.starts)
    written(tmp_path / "start", of_dogs.base, NINE, classes=OBJECTS, seed=4)
    keys = [next(each.key for each in own.planned if each.stage.name == "subject") for own in (plain, longer, other)]
    assert keys[0] == keys[1] != keys[2]
    assert keys[0] != next(each.key for each in subject_of(tmp_path).planned if each.stage.name == "subject")
    for change, words in {
        "subject.class_label=null": "subject: class_label is missing",
        "subject.prompt=dog": "subject: prompt must be empty",
        "subject.label=Object": "subject: unknown label 'Object': the classes are 0 class 0",
        "base.init_from=null": "base.init_from.uri is missing",
    }.items():
        with one_line(UsageError, match=words):
            subject_of(tmp_path, change)


@pytest.mark.usefixtures("of_dogs")
def test_the_key_of_what_is_taken_as_it_is_holds_its_network_and_settings(tmp_path: Path):
    """Of an autoencoder that is not trained, and of the start that a subject is sampled by."""

    def key(stage: str) -> str:
        return next(each.key for each in subject_of(tmp_path, "subject.label=5").planned if each.stage.name == stage)

    for place, stage, network in (
        ("vae", "vae", {"latent_shift": 0.5}),
        ("start", "subject", {"num_heads": 1}),
    ):
        for change in ({"network": network}, {"settings": {"resolution": 32}}):
            before, file = key(stage), tmp_path / place / DESCRIPTION
            described = json.loads(file.read_text())
            file.write_text(json.dumps(described | {name: described[name] | own for name, own in change.items()}))
            assert key(stage) != before, (place, change)
    before = key("subject")
    (tmp_path / "start" / BPE).write_text("{}")
    assert key("subject") != before, "the tokenizer of its captions"


def test_a_subject_takes_classes_by_number_of_a_start_that_names_none(tmp_path: Path):
    """As of an imported DiT."""
    base = load_recipe("dit", []).base
    start = open_start(StartConfig(uri=str(written(tmp_path / "start", base, NINE, classes=[]))))
    words = SubjectConfig(label=8, class_label="3").requests(start.model)
    assert [request.label for request in words] == [8, 3]
    with one_line(ValueError, match="unknown label 9: the classes are 0 0, 1 1"):
        SubjectConfig(label=9, class_label=3).requests(start.model)
    index = write_set(Store(str(tmp_path / "few")), sizes=(3,), holdout_fraction=0.0)
    files = Store(str(tmp_path / "made"))
    write_subject(start, 1.0, index, words, np.zeros((2, 8, 8, 3), np.uint8), files)
    made = load_index(files.url("index.json"))
    assert made.classes == tuple("012345678")
    assert read_split(made, "train", View(8)).label.tolist() == [8] * 3 + [3] * 2


def latents_of(folder: Path, *changes: str) -> Prepared:
    """The recipe `latent_diffusion` with an autoencoder that is there, before anything starts."""
    given = [f"autoencoder.init_from={{uri: {folder}/vae, frozen: true}}", *changes]
    return prepare(RunOptions("latent_diffusion", given, storage=str(folder / "runs"), tracking="none"))


def test_an_autoencoder_is_taken_as_it_is_and_costs_no_training(tmp_path: Path):
    vae = load_recipe("latent_diffusion", []).autoencoder
    written(tmp_path / "vae", vae, DatasetInfo(num_classes=1))
    prepared = latents_of(tmp_path)
    assert "vae" in prepared.running
    said = rf"vae is taken as it is from {tmp_path}/vae: \d+ tensors from it, 0 new, 0 unused"
    assert re.fullmatch(said, *prepared.starts)
    workflow = Workflow("latent_diffusion", [entry.stage for entry in prepared.planned])
    assert [*trainings(workflow)] == ["base"]
    cluster = Cluster(gpus=8, cpus=64, gpu=GPUS["h100"])
    costs = stage_costs(workflow, share_cluster(workflow, Profile(), cluster), cluster, images=1000)
    assert [cost.stage for cost in costs] == ["precompute", "base"]
    written(tmp_path / "vae", vae, DatasetInfo(num_classes=1), seed=4)
    keys = [{entry.stage.name: entry.key for entry in own.planned} for own in (prepared, latents_of(tmp_path))]
    assert {name for name in keys[0] if keys[0][name] == keys[1][name]} == {"images"}
    for change, words in {
        "autoencoder.init_from.ignore=[decoder]": "init_from.ignore must be empty beside init_from.frozen",
        f"base.init_from={{uri: {tmp_path}, frozen: true}}": "a network unet is trained: leave init_from.frozen out",
    }.items():
        with one_line(UsageError, match=re.escape(words)):
            latents_of(tmp_path, change)


def test_a_subject_in_latents_needs_the_autoencoder_of_its_start(tmp_path: Path):
    recipe = load_recipe("latent_diffusion", [])
    written(tmp_path / "vae", recipe.autoencoder, DatasetInfo(num_classes=1))
    written(tmp_path / "start", recipe.base, DatasetInfo(num_classes=8), classes=["a", "b"])
    subject = (f"base.init_from.uri={tmp_path}/start", "subject.label=a", "subject.class_label=b")
    stages = [entry.stage for entry in latents_of(tmp_path, *subject).planned]
    (made,) = (stage for stage in stages if stage.name == "subject")
    assert [*made.inputs] == ["images", "autoencoder"]
    assert made.config.sampling == recipe.sampling.base
    with one_line(UsageError, match=r"set autoencoder\.init_from\.frozen"):
        latents_of(tmp_path, *subject, "autoencoder.init_from.frozen=false")


def test_samples_of_a_start_without_classes_stand_in_those_of_the_images(tmp_path: Path):
    """As of an imported Stable Diffusion; a label that no class has could not be read."""
    config = smoke_base().replace(conditions=("text",))
    start = open_start(StartConfig(uri=str(written(tmp_path / "start", config, classes=[]))))
    index = write_set(Store(str(tmp_path / "few")), sizes=(3,), holdout_fraction=0.0)
    words, files = (Request(prompt="sks red"), Request(prompt="red")), Store(str(tmp_path / "made"))
    write_subject(start, 1.0, index, words, np.zeros((2, 8, 8, 3), np.uint8), files)
    made = load_index(files.url("index.json"))
    rows = read_split(made, "train", View(8))
    assert (made.classes, rows.label.tolist()) == (index.classes, [0] * 5)
    assert [*rows.caption] == ["sks red"] * 3 + ["red"] * 2
