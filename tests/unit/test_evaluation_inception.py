"""Inception's features and figures are torch-fidelity's own; one line says which weights are missing."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch_fidelity.defaults import DEFAULTS
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from components.configuration.usage import UsageError
from components.evaluation import metrics
from components.evaluation.features import (
    FEATURES,
    FeatureExtractor,
    FeatureNetwork,
    FeatureNetworkError,
    MeasureConfig,
)
from components.evaluation.metrics import METRICS, Compared, gaussian_from, gaussian_of, measured_row, published_name
from components.runtime.storage.store import digest_of
from components.sampling.device import best_device
from components.weights.features import SHA256
from pipelines.planning.preflight import Needs, check_needs
from pipelines.recipes.catalog import load_recipe
from tests.feature_weights import dinov2_network, inception_network, write_inception
from tests.refusals import one_line


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inception(tmp_path_factory.mktemp("weights") / "inception.pth")


@pytest.fixture(scope="module")
def ours(weights: Path) -> FeatureExtractor:
    return FeatureExtractor(config_of("inception", weights))


@pytest.fixture(scope="module")
def theirs(weights: Path) -> torch.nn.Module:
    return inception_network(weights, "2048", "logits_unbiased").to(best_device())


def config_of(network: FeatureNetwork, weights: Path) -> MeasureConfig:
    return MeasureConfig(feature_network=network, feature_weights=str(weights))


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


@pytest.mark.parametrize("shape", [(64, 64), (40, 70), (320, 310), (299, 299)])
def test_features_and_logits_are_those_of_torch_fidelitys_network(
    ours: FeatureExtractor, theirs: torch.nn.Module, shape: tuple[int, int]
) -> None:
    images = noise(2, *shape)
    with torch.inference_mode():
        features, logits = theirs(torch.from_numpy(images).permute(0, 3, 1, 2).to(best_device()))
    found = ours(images)
    np.testing.assert_allclose(found[FEATURES], features.cpu(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["logits"], logits.cpu(), rtol=1e-4, atol=1e-4)
    assert found[FEATURES].std() > 0.01


def test_features_of_dinov2_are_those_of_torch_fidelitys_protocol(tmp_path: Path, weights: Path) -> None:
    theirs, images = dinov2_network(tmp_path / "dinov2"), noise(2, 40, 70)
    with torch.inference_mode():
        (features,) = theirs(torch.from_numpy(images).permute(0, 3, 1, 2))
    ours = FeatureExtractor(config_of("dinov2", tmp_path / "dinov2"))(images)
    np.testing.assert_allclose(ours[FEATURES], features, rtol=1e-4, atol=1e-4)
    assert (list(ours), ours[FEATURES].shape) == ([FEATURES], (2, 32))
    assert published_name("distance", "dinov2", 50_000) == "fd_dinov2_50k"
    with one_line(FeatureNetworkError, r"inception\.pth: its config\.json is no dinov2's; dinov2 takes a folder"):
        config_of("dinov2", weights).check_network()
    tensors = load_file(tmp_path / "dinov2/model.safetensors")
    save_file({name: tensors[name] for name in [*tensors][1:]}, tmp_path / "dinov2/model.safetensors")
    with one_line(FeatureNetworkError, "missing keys: .*, 1 in all; dinov2 takes"):
        config_of("dinov2", tmp_path / "dinov2").check_network()
    with one_line(UsageError, "dinov2 needs feature_weights, the URI of a folder with config.json"):
        load_recipe("openmoji", ["evaluation.feature_network=dinov2"])


def test_the_clean_resize_is_antialiased_and_bicubic_in_floating_point(weights: Path, ours: FeatureExtractor) -> None:
    extract = FeatureExtractor(config_of("inception_clean", weights))
    for images in (noise(2, 320, 640), noise(2, 64, 64)):
        image = torch.from_numpy(images).permute(0, 3, 1, 2).float()
        expected = F.interpolate(image, (299, 299), mode="bicubic", antialias=True).clamp(0, 255)
        torch.testing.assert_close(extract.module.resized(images).cpu(), expected, rtol=0, atol=0.01)
    stripes = np.zeros((1, 3 * 299, 3 * 299, 3), np.uint8)
    stripes[:, :, 1::3] = 255
    legacy = ours.module.resized(stripes)
    assert abs(float(extract.module.resized(stripes).mean()) - 85) < 1
    assert abs(float(legacy.mean()) - 85) > 20


def test_figures_of_the_same_features_are_torch_fidelitys_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ten parts of the sets, where both programs draw a hundred."""
    assert (DEFAULTS["kid_subsets"], DEFAULTS["kid_subset_size"]) == (metrics.SUBSETS, metrics.SUBSET)
    monkeypatch.setattr(metrics, "SUBSETS", 10)
    generator, seed = np.random.default_rng(0), 5
    made, real = (generator.normal(shift, 1.2, (1200, 48)) @ generator.normal(size=(48, 48)) for shift in (0, 0.3))
    logits = 3 * generator.normal(size=(1200, 20))
    compared = Compared(made, real, gaussian_of(real), seed=seed, logits=logits)
    row = measured_row("made", "model", compared, tuple(METRICS))
    one, other = torch.from_numpy(made), torch.from_numpy(real)
    statistics = [fid_features_to_statistics(each) for each in (one, other)]
    kid = kid_features_to_metric(one, other, kid_subsets=10, rng_seed=seed, verbose=False)
    score = isc_features_to_metric(torch.from_numpy(logits), splits=10, shuffle=True, rng_seed=seed)
    theirs = {
        "distance": fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"],
        "kid": kid["kernel_inception_distance_mean"],
        "inception_score": score["inception_score_mean"],
        **prc_features_to_metric(one, other, verbose=False),
    }
    assert {name: row.figure(name) for name in METRICS} == pytest.approx({n: theirs[n] for n in METRICS}, rel=1e-6)
    known = gaussian_from(statistics[1]["mu"], statistics[1]["sigma"])
    of_statistics = measured_row("made", "model", Compared(made, made[:0], known, seed=seed), tuple(METRICS))
    assert of_statistics.distance == pytest.approx(theirs["distance"], rel=1e-6)
    assert {name for name in METRICS if of_statistics.figure(name) is not None} == {"distance"}


def test_names_of_figures_have_network_protocol_and_number() -> None:
    features = np.random.default_rng(0).normal(size=(2000, 4))
    compared = Compared(features, features[:99], gaussian_of(features), seed=0, logits=features)
    row = measured_row("diffusion branch, 64²", "model", compared, ("kid", "inception_score", "recall"))
    names = [
        "fid_inception_2k",
        "recall_inception_99",
        "kid_inception_99",
        "is_inception_2k",
    ]  # of both sets: the fewer
    assert [*row.published("inception")] == names
    assert next(iter(row.metrics("inception_clean"))) == "fid_clean_2k_diffusion_branch_64"
    assert row.model_copy(update={"samples": 1234}).published("inception").keys() >= {"fid_inception_1234"}
    assert next(iter(row.metrics("efficientnet_lite0"))) == "fd_efficientnet_lite0_diffusion_branch_64"


def test_missing_weights_are_one_line_with_name_size_and_sha256_before_anything_starts() -> None:
    words = rf"inception needs feature_weights.*weights-inception-2015-12-05-6726825d.pth.*95,628,359 bytes.*{SHA256}"
    with one_line(UsageError, words):
        load_recipe("openmoji", ["evaluation.feature_network=inception"])
    with one_line(UsageError, "takes no feature_weights"):
        load_recipe("openmoji", ["evaluation.feature_weights=w.pth"])
    with one_line(UsageError, "measured in fp32"):
        given = [
            f"evaluation.{field}" for field in ("feature_network=inception", "feature_weights=w", "precision=bf16")
        ]
        load_recipe("openmoji", given)


class Opened:
    """A pickle that runs code where it is opened."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("opened",)


def test_weights_that_are_not_there_or_not_its_own_are_one_line(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tensors = torch.load(weights, weights_only=True)
    torch.save({"code": Opened()}, tmp_path / "code.pth")
    torch.save({name: tensors[name] for name in [*tensors][:-1]}, tmp_path / "fewer.pth")
    (tmp_path / "half.pth").write_bytes(weights.read_bytes()[:50_000])
    faults = {
        "none.pth": "no such file",
        "code.pth": "may run code",
        "half.pth": "fetch it again",
        "fewer.pth": "fc.bias",
    }
    for file, words in faults.items():
        config = MeasureConfig(feature_network="inception", feature_weights=file)
        with one_line(UsageError, rf"feature_weights {file}: .*{words}.*{SHA256}"):
            check_needs(Needs((config,)))
    assert not (tmp_path / "opened").exists()
    assert config_of("inception", weights).check_network() == digest_of(weights).sha256
    assert Needs((config,)).addresses() == ["fewer.pth"]


def test_a_classifiers_figure_is_asked_of_a_classifier_alone() -> None:
    with one_line(UsageError, "inception_score needs a classifier; feature_network efficientnet_lite0 is none"):
        load_recipe("openmoji", ["evaluation.metrics=[distance,inception_score]"])
