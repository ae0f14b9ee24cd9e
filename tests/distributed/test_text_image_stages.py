"""DALL-E 2's first two networks and a classifier, stage after stage, on one small cluster."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from components.data.encoding import part_names, set_encoder, shard_jobs
from components.data.shards import INDEX, load_index, read_bpe
from components.runtime.execution import Resources
from components.runtime.pool import Pool
from components.runtime.storage.artifact import Artifact, write_file, write_record
from components.runtime.storage.store import Store
from components.sampling.frozen_text import contrastive_text, sample_image_embeddings
from components.sampling.generators.diffusion import class_log_probabilities, classifier_score
from components.sampling.model import load_model
from components.sampling.plan import Plan
from components.stages.precompute import PrecomputeConfig, precompute
from components.stages.training import train_model
from components.training.frozen import ColumnEncoder, FrozenNetworks, frozen_encoders
from components.training.optim import WIDTHS, EMAProfile
from components.training.results import SNAPSHOTS, choose_average, kept_profiles
from tests.distributed.runs import context_of, images_artifact
from tests.tiny_text_image import classifier_config, contrastive_config, prior_config

CAPTION = "a red square"
COLUMNS = ("image_embedding", "text_states", "text_embedding")
CONFIG = PrecomputeConfig(columns=COLUMNS, resolution=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("generator")


@pytest.fixture(scope="module")
def contrastive(ray_cluster: None, folder: Path) -> Artifact:
    config, context = contrastive_config(resolution=16), context_of(folder, "contrastive", workers=2)
    return train_model(config, context, images=images_artifact(folder))


@pytest.fixture(scope="module")
def encoded(contrastive: Artifact, folder: Path) -> Artifact:
    context = context_of(folder, "precompute", workers=1)
    return precompute(CONFIG, context, images=images_artifact(folder), contrastive=contrastive)


@pytest.fixture(scope="module")
def prior(contrastive: Artifact, encoded: Artifact, folder: Path) -> Artifact:
    config = prior_config(resolution=16, ema="power", ema_sigma_rel=0.07)
    context = context_of(folder, "diffusion_prior", workers=1)
    return train_model(config, context, images=encoded, contrastive=contrastive)


def test_an_encoder_is_kept_with_its_tokenizer_and_says_how_well_pairs_find_each_other(contrastive: Artifact) -> None:
    assert {"model.json", "model.safetensors", "bpe.json"} <= set(contrastive.names())
    summary = contrastive.metadata["summary"]
    assert 0 <= summary["held_out_image_to_text"] <= 1
    assert summary["held_out_pairs"] > 1


def test_shards_that_were_encoded_before_are_not_encoded_again(contrastive: Artifact, encoded: Artifact, folder: Path):
    made, half = encoded.store.join("files"), Store(str(folder / "half"))
    assert load_index(encoded.url(INDEX)).array_names == [*COLUMNS]
    assert {"null_text_states.npy", "null_text_embedding.npy"} <= {*encoded.names()}
    index = load_index(images_artifact(folder).url(INDEX))
    networks, own = FrozenNetworks(contrastive=contrastive), {"resolution": CONFIG.resolution, "bpe": read_bpe(index)}
    load = partial(ColumnEncoder, frozen_encoders(COLUMNS, networks, **own).load_encoders, COLUMNS)
    kept, *_ = part_names(index)
    write_record(half, kept, write_file(half, "shard-000000.tar", b"kept as it is"))
    how: Any = {"resolution": 16, "kept_resolution": 16, "threads": 1, "precision": "fp32"}
    with Pool(Resources()) as pool:
        jobs = shard_jobs(index, part_names(index))
        assert len(list(pool.finish(set_encoder(index, load, files=half, **how), jobs, files=half))) == 3
    first, *lost = (shard.url for shard in load_index(encoded.url(INDEX)).shards)
    assert half.read(first) == b"kept as it is"
    assert all(half.read(name) == made.read(name) for name in lost)


def test_a_prior_draws_embeddings_for_prompts(contrastive: Artifact, prior: Artifact, tmp_path: Path) -> None:
    text = contrastive_text(contrastive.download(tmp_path / "contrastive"))
    model = load_model("diffusion_prior", prior.download(tmp_path / "prior"))
    found = sample_image_embeddings(model, text, [Plan(prompt=CAPTION, seed=seed) for seed in (1, 2)])
    torch.testing.assert_close(found.square().mean(dim=1), torch.ones(2))
    assert -1 <= prior.metadata["summary"]["held_out_prior_cosine"] <= 1


def test_snapshots_outlive_their_checkpoints_and_let_another_average_be_chosen(prior: Artifact, tmp_path: Path) -> None:
    folder = prior.download(tmp_path / "prior")
    assert [*kept_profiles(folder / SNAPSHOTS)] == [EMAProfile(step, width) for step in (10, 20) for width in WIDTHS]
    assert prior.metadata["summary"]["ema_sigma_rel"] == 0.07
    weights = load_model("prior", folder).module.state_dict()
    choose_average(folder, tmp_path / "other", sigma_rel=0.05)
    chosen = load_model("prior", tmp_path / "other").module.state_dict()
    assert any(not torch.equal(weights[name], chosen[name]) for name in weights)


def test_a_classifier_scores_and_judges(ray_cluster: None, folder: Path, tmp_path: Path) -> None:
    config, context = classifier_config(resolution=16), context_of(folder, "classifier", workers=1)
    artifact = train_model(config, context, images=images_artifact(folder))
    assert 0 <= artifact.metadata["summary"]["held_out_accuracy_50"] <= 1
    model = load_model("classifier", artifact.download(tmp_path))
    x_t, time = torch.randn(2, 3, 16, 16), torch.tensor([3, 9])
    assert classifier_score(model, torch.tensor([0, 2]), 1.0)(x_t, time).shape == x_t.shape
    torch.testing.assert_close(class_log_probabilities(model, x_t).exp().sum(dim=1), torch.ones(2))
