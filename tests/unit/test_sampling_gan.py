"""Laws of sampling from a GAN: images belong to their seeds and labels."""

from pathlib import Path

import pytest
import torch

from components.models.gan import GANGenerator, estimate_statistics
from components.sampling.generators.gan import sample_gan
from components.sampling.model import SamplingModel, load_model
from components.sampling.requests import Request
from components.storage.bundle import ModelBundle, save_bundle

CLASSES = ["animals", "food", "flags"]
NETWORK = {
    "resolution": 16,
    "channels": 8,
    "channel_mult": [1, 2],
    "noise_dim": 6,
    "num_classes": 3,
    "attention_resolutions": [8],
}


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


def test_the_same_request_gives_the_same_image_in_whatever_batch(model: SamplingModel) -> None:
    requests = [Request(label=seed % 3 if seed % 2 else None, seed=seed) for seed in range(7)]
    together = sample_gan(model, requests)
    assert together.shape == (7, 3, 16, 16)
    torch.testing.assert_close(together, torch.cat([sample_gan(model, [request]) for request in requests]))
    torch.testing.assert_close(together, sample_gan(model, requests[::-1]).flip(0))


def test_another_seed_or_label_gives_another_image(model: SamplingModel) -> None:
    first = Request(label="food", seed=1)
    images = sample_gan(model, [first, first._replace(seed=2), first._replace(label="flags"), first])
    assert all((images[0] - other).abs().max() > 0.02 for other in images[1:3])
    torch.testing.assert_close(images[0], images[3])


def test_a_request_without_a_label_gets_one_of_its_own_and_every_class_is_met(model: SamplingModel) -> None:
    drawn = []
    for seed in range(24):
        images = sample_gan(model, [Request(seed=seed), *(Request(label=label, seed=seed) for label in range(3))])
        (same,) = torch.nonzero(torch.isclose(images[1:], images[0], atol=1e-5).flatten(1).all(1)).flatten(0, 0)
        drawn.append(int(same))
    assert set(drawn) == {0, 1, 2}


def test_an_unknown_label_is_refused_naming_the_classes(model: SamplingModel) -> None:
    with pytest.raises(ValueError, match="unknown label 'cars': the classes are 0 animals, 1 food, 2 flags"):
        sample_gan(model, [Request(label="cars")])


def test_a_generator_without_classes_samples(tmp_path: Path) -> None:
    assert sample_gan(model_of(tmp_path, num_classes=None), [Request(seed=3)]).shape == (1, 3, 16, 16)
