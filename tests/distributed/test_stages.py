"""The token branch, stage after stage, on one small cluster."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from components.configuration.optimization import StartConfig
from components.configuration.sampling import DiffusionSampling
from components.data.encoding import TokenEncoder, shard_jobs, token_names
from components.data.held_out import read_split
from components.data.shards import View, load_index
from components.data.tokens import parse_tokens
from components.models.bundle import load_bundle
from components.runtime.storage.artifact import Artifact, describe, verify_files, write_file, write_record
from components.runtime.storage.store import Store
from components.sampling.cascade import Cascade, compose
from components.sampling.images import from_uint8
from components.sampling.requests import Request
from components.stages.samples import preserve_prior
from components.stages.tokens import TokensConfig, tokenize_images
from components.stages.training import train_model
from components.training.subject import SUBJECT, SubjectConfig
from tests.distributed.runs import context_of, images_artifact, model_weights, run_stage
from tests.image_sets import write_set
from tests.tiny_cascade import FEW
from tests.tiny_training import config_of, prior_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("generator")


@pytest.fixture(scope="module")
def tokenizer(ray_cluster: None, folder: Path) -> Artifact:
    return run_stage(folder, "tokenizer", workers=1)


@pytest.fixture(scope="module")
def tokens(tokenizer: Artifact, folder: Path) -> Artifact:
    images = images_artifact(folder)
    return tokenize_images(TokensConfig(), context_of(folder, "tokens", workers=1), images=images, tokenizer=tokenizer)


def test_model_artifact_holds_all_that_its_readers_need(tokenizer: Artifact) -> None:
    assert verify_files(tokenizer.store, tokenizer.files) == []
    assert set(tokenizer.names()) == {"metrics.json", "model.json", "model.safetensors", "preview.png"}
    summary = tokenizer.metadata["summary"]
    assert summary["steps"] == 20
    assert 0 < summary["held_out_codebook_usage"] <= 1
    assert summary["parameters"] > 1000


def test_tokens_are_those_of_the_kept_tokenizer(tokenizer: Artifact, tokens: Artifact, folder: Path, tmp_path: Path):
    network = load_bundle(tokenizer.download(tmp_path)).module
    name = tokens.metadata["shards"][0]["name"]
    found = parse_tokens(tokens.read(name), name)
    index = load_index(images_artifact(folder).url("index.json"))
    images = read_split(index.model_copy(update={"shards": index.shards[:1]}), "train", View(16))
    expected = network.tokenize(from_uint8(images.image)).flatten(1).numpy()
    np.testing.assert_array_equal(found.tokens[found.split == "train"], expected)


def test_finished_shards_are_not_encoded_again(tokenizer: Artifact, tokens: Artifact, folder: Path) -> None:
    index, context = load_index(images_artifact(folder).url("index.json")), context_of(folder, "tokens", workers=1)
    files = Store(str(folder / "half"))
    kept, *lost = token_names(index)
    write_record(files, kept, write_file(files, kept, b"kept as it is"))
    with context.pool() as pool:
        done = pool.finish(
            partial(TokenEncoder, index.header, tokenizer, files), shard_jobs(index, [kept, *lost]), files=files
        )
        assert sorted(job.name for job in done) == sorted([kept, *lost])
    assert files.read(kept) == b"kept as it is"
    assert all(files.read(name) == tokens.read(name) for name in lost)


def test_prior_learns_tokens_and_shows_images(tokenizer: Artifact, tokens: Artifact, folder: Path) -> None:
    context = context_of(folder, "prior", workers=2)
    artifact = train_model(prior_config(), context, tokens=tokens, tokenizer=tokenizer)
    assert {"model.safetensors", "bpe.json", "preview.png"} <= set(artifact.names())
    assert 0 < artifact.metadata["summary"]["held_out_bits_per_token"] < 8
    logged = context.recorder.lines("metrics")
    assert [line["step"] for line in logged] == [5, 10, 15, 20]
    assert all(line["bits_per_token"] > 0 and "system/cpu_utilization_percentage" in line for line in logged)


def test_a_stage_begins_with_the_model_of_another_and_trains_its_adapter(ray_cluster: None, tmp_path: Path) -> None:
    start = run_stage(tmp_path / "start", "base", workers=1, total_steps=10)
    given = {"init_from": {"uri": start.root}, "total_steps": 10}
    model = run_stage(tmp_path / "adapted", "base", workers=2, adapter={"rank": 2}, **given)
    assert {*model.names()} - {*start.names()} == {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    before, after = (model_weights(each, tmp_path / name) for name, each in (("before", start), ("after", model)))
    assert before.keys() == after.keys()
    moved = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"qkv", "proj"}
    with pytest.raises(ValueError, match=r"\d+ tensors have other shapes than in the network, first "):
        run_stage(tmp_path / "wider", "base", workers=1, model_channels=16, **given)


@pytest.fixture(scope="module")
def kept(ray_cluster: None, folder: Path) -> Artifact:
    """An autoencoder of 4² latents that another run has trained, taken as it is."""
    smooth = {"bottleneck": "gaussian", "latent_channels": 4, "channel_mult": (1, 2, 2)}
    made = run_stage(folder / "smooth", "tokenizer", workers=1, **smooth)
    context = context_of(folder, "kept", workers=1)
    config = config_of("tokenizer", init_from={"uri": made.root, "frozen": True}, **smooth)
    kept = train_model(config, context, images=images_artifact(folder))
    assert kept.entry("model.safetensors").sha256 == made.entry("model.safetensors").sha256
    assert kept.read("model.json") == made.read("model.json")
    assert not context.recorder.lines("metrics")
    assert not context.train_store.exists("finished.json")
    return kept


@pytest.mark.parametrize("in_latents", [False, True])
def test_a_subject_is_learned_beside_samples_of_the_start(
    kept: Artifact, folder: Path, tmp_path: Path, in_latents: bool
) -> None:
    """DreamBooth: three images at half of the samples' weight, in the start's own classes; the same bits again."""
    parts, side = ({"autoencoder": kept}, 16) if in_latents else ({}, 8)
    network = {"resolution": 4, "in_channels": 4, "attention_resolutions": (2,)} if in_latents else {}
    own, images = partial(config_of, "base", **network), images_artifact(folder)
    start = train_model(own(total_steps=10), context_of(tmp_path, "start", workers=1), images=images, **parts)
    store = Store(str(tmp_path / "few"))
    given = read_split(
        write_set(store.join("files"), sizes=(3,), resolution=16, holdout_fraction=0.0), "train", View(side)
    )
    entries = tuple(describe(store.read(file.path), file.path) for file in store.list())
    few = Artifact(kind="shards", stage="images", key="images", files=entries, root=store.uri)
    sampling = DiffusionSampling(**FEW, threshold="none" if in_latents else "static")
    words = {"label": 0, "prompt": "sks red", "class_label": "green", "class_prompt": "red"}
    config = SubjectConfig(**words, init_from=StartConfig(uri=start.root), samples=6, weight=0.5, sampling=sampling)
    made, again = (
        preserve_prior(config, context_of(tmp_path / name, "subject", workers=1), images=few, **parts) for name in "ab"
    )
    assert made.entry(SUBJECT).sha256 == again.entry(SUBJECT).sha256
    index = load_index(made.url("index.json"))
    rows = read_split(index, "train", View(side))
    assert made.metadata["weight"] == 0.5
    assert rows.label.tolist() == 12 * [0] + 6 * [1]
    assert [*dict.fromkeys(rows.caption)] == ["sks red", "red"]
    np.testing.assert_array_equal(rows.image[:12], np.concatenate(4 * [given.image]))
    models: dict[str, Any] = {name: part.download(tmp_path / name) for name, part in {"base": start, **parts}.items()}
    model = compose(tmp_path / "composed", sampling={"base": sampling.model_dump()}, **models)
    requests = [Request(label=1, prompt="red", seed=seed) for seed in range(6)]
    assert np.abs(np.stack(Cascade.load(model).sample(requests)).astype(int) - rows.image[12:]).max() <= 1
    tuned = own(init_from={"uri": start.root}, total_steps=5)
    trained = train_model(tuned, context_of(tmp_path, "tuned", workers=1), images=made, **parts)
    assert load_bundle(trained.download(tmp_path / "tuned")).settings["classes"] == list(index.classes)
