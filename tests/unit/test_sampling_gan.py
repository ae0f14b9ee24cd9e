"""Laws of sampling from a GAN: images belong to their seeds and labels."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from components.models.bundle import ModelBundle, save_bundle
from components.models.gan import GANGenerator, estimate_statistics
from components.sampling.answers import predictor_of
from components.sampling.cascade import Cascade
from components.sampling.generators.one_model import sample_gan, truncated
from components.sampling.images import to_uint8
from components.sampling.model import SamplingModel, load_model
from components.sampling.plan import Plan, random_stream
from components.sampling.requests import Request, RequestRow
from tests.refusals import one_line

CLASSES = ["animals", "food", "flags"]
NETWORK = {"resolution": 16, "channels": 8, "channel_mult": [1, 2], "attention_resolutions": [8]}
NETWORK |= {"noise_dim": 6, "num_classes": 3}


def model_of(folder: Path, **changes: object) -> SamplingModel:
    """A generator of random weights, from disk."""
    torch.manual_seed(0)
    arguments = NETWORK | changes
    network = GANGenerator(**arguments)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    network.eval()
    label = torch.randint(3, (32,)) if arguments["num_classes"] else None
    estimate_statistics(network, [(torch.randn(32, 6), label)])
    save_bundle(folder, ModelBundle("gan", arguments, {"resolution": 16, "classes": CLASSES}, network))
    return load_model("gan", folder)


@pytest.fixture
def model(tmp_path: Path) -> SamplingModel:
    return model_of(tmp_path)


def test_a_request_without_a_label_gets_one_of_its_own_and_every_class_is_met(model: SamplingModel) -> None:
    drawn = []
    for seed in range(24):
        images = sample_gan(model, [Plan(seed=seed), *(Plan(label=label, seed=seed) for label in range(3))])
        (same,) = torch.nonzero(torch.isclose(images[1:], images[0], atol=1e-5).flatten(1).all(1)).flatten(0, 0)
        drawn.append(int(same))
    assert set(drawn) == {0, 1, 2}


def test_a_generator_without_classes_samples(tmp_path: Path) -> None:
    assert sample_gan(model_of(tmp_path, num_classes=None), [Plan(seed=3)]).shape == (1, 3, 16, 16)


def noise_of(request: Request) -> torch.Tensor:
    return torch.randn(1, 6, generator=random_stream(request.seed, "gan"))


@pytest.mark.parametrize("truncation", [0.04, 0.5, 1.0, 2.0])
def test_truncated_noise_is_the_truncated_normal(truncation: float) -> None:
    """The distribution of rejection, which Brock et al. draw by, without any draw."""
    noise = truncated(torch.randn(50_000, generator=torch.Generator().manual_seed(0)), truncation)
    assert noise.abs().max() <= torch.tensor(truncation)
    assert stats.kstest(noise.numpy(), stats.truncnorm(-truncation, truncation).cdf).pvalue > 0.01
    assert stats.kstest(noise.numpy(), stats.norm.cdf).pvalue < 1e-9


def test_truncation_keeps_sign_and_order_and_goes_to_the_normal() -> None:
    noise = torch.tensor([-30.0, -9.0, -2.0, -1e-4, 0.0, 1e-4, 2.0, 9.0, 30.0])
    for threshold in (0.1, 1.0, 3.0):
        made = truncated(noise, threshold)
        assert (made.diff() >= 0).all()
        assert torch.equal(made, -truncated(-noise, threshold))
        assert torch.equal(made[[0, 4, -1]], torch.tensor([-threshold, 0, threshold]))
    torch.testing.assert_close(truncated(noise, 38.0), noise)
    assert truncated(noise, None) is noise


def test_a_request_decides_its_truncation_in_whatever_company(model: SamplingModel) -> None:
    requests = [Request(label=1, seed=5, truncation=truncation) for truncation in (None, 0.3, 1.0)]
    images = Cascade(model=model).sample_stages(requests)
    for request, stages in zip(requests, images, strict=True):
        wanted = model.module(truncated(noise_of(request), request.truncation), torch.tensor([1]))
        assert (stages["gan"] == to_uint8(wanted)[0]).all()
    assert (images[0]["gan"] != images[1]["gan"]).any()


@pytest.mark.parametrize("truncation", [0.0, -1.0, float("nan"), float("inf")])
def test_a_truncation_that_leaves_nothing_is_refused(model: SamplingModel, truncation: float) -> None:
    with one_line(ValueError, match=r"gan\.truncation: Input should be .* \(got "):
        Cascade(model=model).sample([Request(label=1, truncation=truncation)])


def test_a_registered_model_takes_it_as_a_column_or_among_its_settings(tmp_path: Path) -> None:
    model_of(tmp_path)
    plain = RequestRow(label="1", seed=5)
    changes = ({}, {"truncation": 0.3}, {"sampling": '{"model": {"truncation": 0.3}}'})
    made = predictor_of(tmp_path)([plain.model_copy(update=change) for change in changes])
    free, column, setting = (np.asarray(Image.open(io.BytesIO(base64.b64decode(image)))) for image in made)
    assert (free != column).any()
    assert (column == setting).all()
