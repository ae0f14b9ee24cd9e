"""Laws of the GAN's networks."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from components.configuration.networks import GANConfig
from components.models.gan import (
    ConditionalBatchNorm2d,
    GANGenerator,
    NormedConv2d,
    ProjectionDiscriminator,
    batch_moments,
    estimate_statistics,
    pool_moments,
    settle_spectral_norms,
)

SHAPE = {"resolution": 16, "channels": 8, "channel_mult": (1, 2), "attention_resolutions": (8,)}


def small_generator(shared_dim: int | None = None) -> GANGenerator:
    torch.manual_seed(0)
    return GANGenerator(**SHAPE, noise_dim=6, num_classes=3, shared_dim=shared_dim).double()


def small_discriminator(num_classes: int | None = 3) -> ProjectionDiscriminator:
    torch.manual_seed(1)
    return ProjectionDiscriminator(**SHAPE, num_classes=num_classes).double()


def scrambled(network: nn.Module) -> nn.Module:
    """Weights as training might leave them: of any norm, also where they start at zero."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter))
    return network


def noise_and_labels(samples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randn(samples, 6, dtype=torch.float64), torch.randint(3, (samples,))


def normed_layers(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if parametrize.is_parametrized(module, "weight")]


@pytest.mark.parametrize(
    "network",
    [small_generator(), small_generator(5), small_discriminator()],
    ids=["generator", "shared", "discriminator"],
)
def test_every_layer_has_spectral_norm_one(network: nn.Module):
    scrambled(network)
    for _ in range(6):  # the singular vectors it came with have nothing to do with these weights
        settle_spectral_norms(network)
    layers = normed_layers(network)
    plain = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear) and m not in layers]
    assert len(layers) >= 8
    assert len(plain) == 2  # the two maps inside attention
    assert_norms_of_one(layers)


def assert_norms_of_one(layers: list[nn.Module]) -> None:
    for layer in layers:
        norm = torch.linalg.matrix_norm(layer.weight.flatten(1), ord=2)
        torch.testing.assert_close(norm, torch.ones_like(norm), atol=0.02, rtol=0)


def test_training_finds_the_norms_by_itself():
    network = scrambled(small_discriminator())
    images, labels = torch.rand(2, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 2])
    for _ in range(40):
        network(images, labels)
    assert_norms_of_one(normed_layers(network.eval()))


def test_resampling_convolutions_are_their_two_steps_in_one():
    x = torch.randn(2, 5, 6, 8, dtype=torch.float64)
    up, down = NormedConv2d(5, 7, bias=False, resample="up"), NormedConv2d(5, 7, resample="down")
    up, down = up.double().eval(), down.double().eval()
    nn.init.normal_(down.bias)
    slow_up = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), up.weight, padding=1)
    torch.testing.assert_close(up(x), slow_up)
    torch.testing.assert_close(down(x), F.avg_pool2d(F.conv2d(x, down.weight, down.bias, padding=1), 2))


def test_evaluation_moves_no_buffer():
    network = scrambled(small_generator()).eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    first, second = (network(*noise_and_labels(4)) for _ in range(2))
    assert torch.equal(first, second)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_the_logit_is_psi_of_phi_plus_the_projection_on_the_class():
    """Miyato & Koyama (2018), equation 3, by hand; psi alone without classes, and each image for itself."""
    network = scrambled(small_discriminator()).eval()
    images, labels = torch.rand(4, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 2, 1, 2])
    h = images
    for block in network.blocks:
        h = block(h)
    phi = h.clamp(min=0).flatten(2).sum(-1)
    psi = phi @ network.logit.weight[0] + network.logit.bias
    by_hand = psi + torch.stack([phi[i] @ network.embedding.weight[label] for i, label in enumerate(labels)])
    torch.testing.assert_close(network(images, labels), by_hand)
    alone = torch.cat([network(image[None], label[None]) for image, label in zip(images, labels, strict=True)])
    torch.testing.assert_close(by_hand, alone)
    network = small_discriminator(num_classes=None).eval()
    torch.testing.assert_close(network(images), network.logit(network.features(images))[:, 0])


def test_conditional_batch_norm_has_its_closed_form():
    """Without classes it is the batch norm of torch."""
    norm = ConditionalBatchNorm2d(4, num_classes=3).double()
    nn.init.normal_(norm.gain.weight)
    nn.init.normal_(norm.bias.weight)
    x, label = 3 * torch.randn(5, 4, 6, 6, dtype=torch.float64) + 1, torch.tensor([0, 2, 1, 1, 0])
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
    expected = (x - mean) / (var + 1e-5).sqrt()
    for i, row in enumerate(label):
        expected[i] = expected[i] * norm.gain.weight[row, :, None, None] + norm.bias.weight[row, :, None, None]
    torch.testing.assert_close(norm(x, label), expected)
    norm, other = ConditionalBatchNorm2d(4, num_classes=None).double(), nn.BatchNorm2d(4).double()
    results = [norm(x.requires_grad_(), None), other(x)]
    torch.testing.assert_close(*results)
    weights = torch.randn_like(x)
    torch.testing.assert_close(*(torch.autograd.grad((result * weights).sum(), x)[0] for result in results))


def test_moments_of_parts_pool_to_the_moments_of_the_whole():
    x = torch.randn(12, 4, 3, 3, dtype=torch.float64) * torch.arange(1, 13)[:, None, None, None]
    parts = torch.stack([batch_moments(part) for part in x.chunk(3)])
    torch.testing.assert_close(pool_moments(parts), batch_moments(x))


def test_estimated_statistics_are_exactly_those_of_the_noise_they_were_made_from():
    """With the statistics of one batch, evaluation on that batch is what training computes on it."""
    network = scrambled(small_generator()).eval()
    settle_spectral_norms(network)
    noise, labels = noise_and_labels(9)
    estimate_statistics(network, [(noise, labels)])
    evaluated = network(noise, labels)
    for module in network.modules():
        if isinstance(module, ConditionalBatchNorm2d):
            module.train()
    torch.testing.assert_close(network(noise, labels), evaluated)


def test_several_batches_of_noise_count_together():
    """The first norm sees the same features whatever the batch, so it must get the moments of all of them."""
    network = scrambled(small_generator()).eval()
    batches = [noise_and_labels(5, seed) for seed in range(4)]
    estimate_statistics(network, batches)
    first = network.project(torch.cat([noise for noise, _ in batches])).reshape(20, 16, 4, 4)
    torch.testing.assert_close(
        torch.stack([network.blocks[0].norm_1.mean, network.blocks[0].norm_1.var]), batch_moments(first)
    )


def test_class_and_noise_decide_the_image():
    network = scrambled(small_generator()).eval()
    estimate_statistics(network, [noise_and_labels(32)])
    noise, _ = noise_and_labels(2)
    same = network(noise[:1].repeat(2, 1), torch.tensor([0, 1]))
    other = network(noise, torch.tensor([0, 0]))
    assert same.shape == (2, 3, 16, 16)
    assert same.abs().max() <= 1
    assert (same[0] - same[1]).abs().max() > 0.01
    assert (other[0] - other[1]).abs().max() > 0.01


def test_norms_that_share_a_class_vector_see_it_and_their_part_of_the_noise():
    """Of six numbers two make the first features, two each go to a block, beside five of the class."""
    network = scrambled(small_generator(5)).eval()
    noise, label = noise_and_labels(2)
    first, *parts = noise.split(2, dim=1)
    h = network.project(first).reshape(2, 16, 4, 4)
    for block, part in zip(network.blocks, parts, strict=True):
        code = torch.cat([network.shared.weight[label], part], dim=1)
        norm = block.norm_1
        gain, bias = 1 + code @ norm.gain.weight.T, code @ norm.bias.weight.T
        expected = h / math.sqrt(1 + norm.eps) * gain[:, :, None, None] + bias[:, :, None, None]
        torch.testing.assert_close(norm(h, code), expected)
        h = block(h, code)
    torch.testing.assert_close(network(noise, label), torch.tanh(network.conv_out(F.relu(network.norm_out(h, None)))))
    with pytest.raises(ValueError, match="noise_dim to be a multiple of 3"):
        GANConfig(channels=8, channel_mult=(1, 2), noise_dim=8, shared_dim=5)


def test_widths_are_those_of_biggan_128():
    """Brock et al. (2019), table 4: 16, 16, 8, 4, 2, 1 times 96 channels from 4 pixels on, and back; 8 here."""
    shape = {"resolution": 128, "channels": 8, "channel_mult": (1, 2, 4, 8, 16), "num_classes": 1000}
    with torch.device("meta"):
        generator, discriminator = GANGenerator(**shape, noise_dim=128), ProjectionDiscriminator(**shape)
    assert generator.start == 4
    ups = [(block.conv_1.in_channels // 8, block.conv_1.out_channels // 8) for block in generator.blocks]
    assert ups == [(16, 16), (16, 8), (8, 4), (4, 2), (2, 1)]
    downs = [(math.ceil(b.conv_1.in_channels / 8), b.conv_1.out_channels // 8) for b in discriminator.blocks]
    assert downs == [(1, 1), (1, 2), (2, 4), (4, 8), (8, 16), (16, 16)]
    assert [block.down for block in discriminator.blocks] == [True] * 5 + [False]
