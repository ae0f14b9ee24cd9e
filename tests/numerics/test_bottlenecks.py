"""Laws of the bottlenecks; oracles are torch.distributions, vector-quantize-pytorch and diffusers."""

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import VectorQuantizer as DiffusersQuantizer
from torch import Tensor
from torch.distributions import Categorical, Normal, kl_divergence
from vector_quantize_pytorch import FSQ, VectorQuantize

from components.models.bottleneck import (
    GaussianBottleneck,
    GumbelQuantizer,
    ScalarQuantizer,
    VectorQuantizer,
    nearest_codes,
)
from components.models.losses.reconstruction import discretized_logistic_nll

TOLERANCE = {"atol": 1.2e-6, "rtol": 0.0}  # ten times the difference measured between implementations
LEVELS = (8, 5, 5, 5)


def test_the_gaussian_divergence_is_that_of_torch():
    moments = torch.randn(3, 8, 2, 2)
    mean, log_variance = moments.chunk(2, dim=1)
    expected = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(0.0, 1.0)).sum(dim=(1, 2, 3)).mean()
    torch.testing.assert_close(GaussianBottleneck(channels=4)(moments).losses["kl_loss"], expected)


def test_divergence_and_likelihood_bound_the_evidence_and_the_true_posterior_touches_it():
    """One value x with p(z) = N(0, 1) and p(x|z) logistic around z/2: -log p(x) by integration."""
    grid = torch.linspace(-8, 8, 20_001)
    image = torch.tensor(87 / 255 * 2 - 1)

    def nll_at(z: Tensor) -> Tensor:
        output = torch.stack([z / 2, torch.full_like(z, -1.5)], dim=0)[None, :, :, None]
        return discretized_logistic_nll(output, image=image.expand(1, 1, len(z), 1)).flatten()

    log_joint = -nll_at(grid) + Normal(0.0, 1.0).log_prob(grid)
    evidence = -torch.logsumexp(log_joint + math.log(16 / 20_000), dim=0)
    posterior = log_joint.softmax(dim=0)
    mean = (posterior * grid).sum()
    deviation = (posterior * (grid - mean).square()).sum().sqrt()
    noise = Normal(0.0, 1.0).icdf((torch.arange(4000) + 0.5) / 4000).view(-1, 1, 1, 1)  # a quadrature of N(0, 1)

    def bound(mean: Tensor, deviation: Tensor) -> Tensor:
        moments = torch.stack([mean, 2 * deviation.log()]).view(1, 2, 1, 1).expand(4000, 2, 1, 1)
        encoded = GaussianBottleneck(channels=1)(moments, noise=noise)
        return nll_at(encoded.z.flatten()).mean() + encoded.losses["kl_loss"]

    assert 0 < bound(mean, deviation) - evidence < 0.02  # not zero: the posterior is no Gaussian
    for shift, scale in ((0.5, 1.0), (-0.5, 1.0), (0.0, 2.0), (0.0, 0.3)):
        assert bound(mean + shift, deviation * scale) > bound(mean, deviation)


def test_the_relaxation_becomes_the_largest_logit_as_its_temperature_falls():
    quantizer = GumbelQuantizer(codebook_size=16, codebook_dim=4)
    logits, noise = torch.randn(2, 16, 3, 3), -torch.empty(2, 16, 3, 3).exponential_().log()
    soft = quantizer(logits, noise=noise, temperature=1e-3).z
    torch.testing.assert_close(soft, quantizer.lookup((logits + noise).argmax(dim=1)), atol=1e-4, rtol=0)
    hard = quantizer(logits)
    assert torch.equal(hard.indices, logits.argmax(dim=1))
    assert torch.equal(hard.z, quantizer.lookup(hard.indices))


def test_the_categorical_divergence_is_that_of_torch_and_zero_for_equal_logits():
    quantizer = GumbelQuantizer(codebook_size=16, codebook_dim=4)
    logits = torch.randn(3, 16, 2, 2)
    uniform = Categorical(logits=torch.zeros(16))
    expected = kl_divergence(Categorical(logits=logits.permute(0, 2, 3, 1)), uniform).sum(dim=(1, 2)).mean()
    torch.testing.assert_close(quantizer(logits).losses["kl_loss"], expected)
    assert abs(float(quantizer(torch.full_like(logits, 0.7)).losses["kl_loss"])) < 1e-5


def test_a_relaxation_that_starts_at_features_is_soft_vector_quantization():
    quantizer, to_logits = GumbelQuantizer(codebook_size=16, codebook_dim=4), torch.nn.Conv2d(4, 16, 1)
    centers, features = 3 + 0.1 * torch.randn(16, 4), 3 + 0.1 * torch.randn(2, 4, 5, 5)
    quantizer.start_at(centers, project_in=to_logits)
    distances = (features[:, None] - centers[None, :, :, None, None]).square().sum(dim=2)  # (B, K, h, w)
    beta = GumbelQuantizer.sharpness / torch.cdist(centers, centers).square().mean()
    logits = to_logits(features)
    torch.testing.assert_close(logits.softmax(dim=1), (-beta * distances).softmax(dim=1), atol=1e-4, rtol=0)
    assert torch.equal(quantizer(logits).indices, nearest_codes(features.permute(0, 2, 3, 1), centers))
    scale = (centers - centers.mean(dim=0)).square().mean().sqrt()
    torch.testing.assert_close(quantizer.codebook * scale + centers.mean(dim=0), centers)


def test_the_relaxation_reaches_logits_and_codes_by_gradient():
    quantizer = GumbelQuantizer(codebook_size=16, codebook_dim=4)
    logits = torch.randn(2, 16, 3, 3, requires_grad=True)
    noise = -torch.empty_like(logits).exponential_().log()
    z = quantizer(logits, noise=noise.detach(), temperature=0.5).z
    to_logits, to_codes = torch.autograd.grad(z.square().sum(), (logits, quantizer.codebook))
    assert (to_logits.abs().sum(dim=(1, 2, 3)) > 0).all()
    assert (to_codes.abs().sum(dim=1) > 0).all()


def test_finite_scalars_equal_the_oracle():
    ours, peer = ScalarQuantizer(levels=LEVELS), FSQ(list(LEVELS))
    z_e = 3 * torch.randn(4, 4, 8, 8)
    mine, theirs = (z_e.clone().requires_grad_() for _ in range(2))
    encoded, (z, indices) = ours(mine), peer(theirs)
    assert torch.equal(encoded.indices, indices.long())
    torch.testing.assert_close(encoded.z, z, **TOLERANCE)
    direction = torch.randn_like(z)
    torch.testing.assert_close(
        torch.autograd.grad(encoded.z, mine, direction)[0], torch.autograd.grad(z, theirs, direction)[0], **TOLERANCE
    )
    assert encoded.losses == {}


@pytest.mark.parametrize("levels", [LEVELS, (4, 3), (4, 7, 3)])
def test_every_scalar_code_can_be_reached_and_has_an_index_of_its_own(levels: tuple[int, ...]):
    quantizer = ScalarQuantizer(levels=levels)
    assert quantizer.codebook_size == math.prod(levels)
    indices = torch.arange(quantizer.codebook_size).view(1, -1, 1)
    codes = quantizer.lookup(indices)
    assert codes.abs().max() <= 1
    half = torch.tensor([level // 2 for level in levels]).view(1, -1, 1, 1)
    offset = torch.tensor([0.5 * (level % 2 == 0) for level in levels]).view(1, -1, 1, 1)
    reach = torch.tensor([(level - 1) * 1.001 / 2 for level in levels]).view(1, -1, 1, 1)
    z_e = ((codes * half + offset) / reach).clamp(-1 + 1e-6, 1 - 1e-6).atanh() - (offset / reach).atanh()
    encoded = quantizer(z_e)
    assert torch.equal(encoded.indices, indices)
    assert torch.equal(encoded.z, codes)


def test_levels_that_hold_no_choice_or_learn_none_are_refused():
    for levels in ((), (8, 1), (8, 2)):
        with pytest.raises(ValueError, match="at least 3"):
            ScalarQuantizer(levels=levels)


def test_codebook_and_commitment_loss_and_their_gradients_equal_the_oracle_with_the_weights_of_the_paper():
    """taming-transformers #57: the weights stood on each other's term, and nothing failed."""
    ours = VectorQuantizer(codebook_size=16, codebook_dim=4)
    assert ours.codebook.abs().max() <= 1 / 16  # as published
    ours.codebook.data.normal_()
    peer = DiffusersQuantizer(16, 4, beta=0.25, legacy=False, sane_index_shape=True)
    peer.embedding.weight.data.copy_(ours.codebook)
    z_e = torch.randn(3, 4, 5, 5, requires_grad=True)
    encoded = ours(z_e)
    z_q, loss, (_, _, indices) = peer(z_e)
    mine = encoded.losses["codebook_loss"] + 0.25 * encoded.losses["commitment_loss"]
    assert torch.equal(encoded.indices, indices)
    torch.testing.assert_close(encoded.z, z_q, **TOLERANCE)
    torch.testing.assert_close(mine, loss, **TOLERANCE)
    direction = torch.randn_like(z_q)
    gradients = torch.autograd.grad((encoded.z * direction).sum() + mine, (z_e, ours.codebook))
    expected = torch.autograd.grad((z_q * direction).sum() + loss, (z_e, peer.embedding.weight))
    torch.testing.assert_close(gradients, expected, **TOLERANCE)


def test_a_learnable_codebook_has_the_gradients_of_vector_quantize_pytorch():
    """There one squared difference moves codes and latents alike: the sum of our two losses, each with weight one."""
    ours = VectorQuantizer(codebook_size=16, codebook_dim=4)
    ours.codebook.data.normal_()
    how = {"learnable_codebook": True, "ema_update": False, "rotation_trick": False, "commitment_weight": 1.0}
    peer = VectorQuantize(dim=4, codebook_size=16, accept_image_fmap=True, **how).train()
    peer._codebook.embed.data.copy_(ours.codebook[None])
    z_e = torch.randn(3, 4, 5, 5, requires_grad=True)
    encoded, (z, indices, loss) = ours(z_e), peer(z_e)
    assert torch.equal(encoded.indices, indices)
    torch.testing.assert_close(encoded.z, z, **TOLERANCE)
    torch.testing.assert_close(encoded.losses["commitment_loss"], loss.squeeze(), **TOLERANCE)
    gradients = torch.autograd.grad(sum(encoded.losses.values()), (z_e, ours.codebook))
    expected = torch.autograd.grad(loss.squeeze(), (z_e, peer._codebook.embed))
    torch.testing.assert_close(gradients, (expected[0], expected[1][0]), **TOLERANCE)


def test_normalized_codes_are_found_by_direction():
    quantizer = VectorQuantizer(codebook_size=16, codebook_dim=4, l2_normalize=True)
    quantizer.codebook.data.mul_(torch.rand(16, 1) * 5 + 0.1)
    encoded = quantizer(torch.randn(2, 4, 4, 4))
    torch.testing.assert_close(encoded.z.norm(dim=1), torch.ones(2, 4, 4))
    assert torch.equal(encoded.z, quantizer.lookup(encoded.indices))
    scaled = VectorQuantizer(codebook_size=16, codebook_dim=4, l2_normalize=True)
    scaled.codebook.data.copy_(F.normalize(quantizer.codebook.data, dim=1))
    z_e = torch.randn(2, 4, 4, 4)
    assert torch.equal(quantizer(7 * z_e).indices, scaled(z_e).indices)


@pytest.mark.parametrize("l2_normalize", [False, True])
def test_codes_that_start_at_data_are_found_by_that_data(l2_normalize: bool):
    quantizer = VectorQuantizer(codebook_size=16, codebook_dim=4, l2_normalize=l2_normalize, codebook_init="data")
    project_in, centers = torch.nn.Conv2d(6, 4, 1), torch.randn(16, 6)
    quantizer.start_at(centers, project_in=project_in)
    encoded = quantizer(project_in(centers[:, :, None, None]))
    assert torch.equal(encoded.indices.flatten(), torch.arange(16))
    torch.testing.assert_close(encoded.losses["codebook_loss"], torch.zeros(()))
