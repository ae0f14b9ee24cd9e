"""Laws of the losses and of the likelihoods of images; those of images' tokens stand with their networks."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Laplace, SigmoidTransform, TransformedDistribution

from components.models.losses.adversarial import (
    adaptive_weight,
    balanced_generator_loss,
    generator_loss,
    hinge_discriminator_loss,
)
from components.models.losses.cross_entropy import text_loss, text_nats, token_loss
from components.models.losses.reconstruction import (
    discretized_logistic_nll,
    image_of,
    logit_laplace_nll,
    output_channels,
    reconstruction_loss,
)


def test_hinge_losses_have_their_closed_form():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 0.5])
    expected = 0.5 * ((0 + 0.5 + 2.0) / 3 + (0 + 1.0 + 1.5) / 3)
    torch.testing.assert_close(hinge_discriminator_loss(real, fake_logits=fake), torch.tensor(expected))
    torch.testing.assert_close(generator_loss(fake), torch.tensor(2.5 / 3))


def test_the_adaptive_weight_is_the_clamped_ratio_of_the_norms():
    nll, adversarial = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])
    torch.testing.assert_close(adaptive_weight(nll, adversarial_gradient=adversarial), torch.tensor(5 / (2 + 1e-4)))
    assert adaptive_weight(nll, adversarial_gradient=torch.zeros(2)) == 1e4
    assert adaptive_weight(torch.zeros(2), adversarial_gradient=adversarial) == 0


def small_gan() -> tuple[nn.Module, nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    body, last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)
    discriminator = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 1, 3))
    return body, last, discriminator, torch.rand(2, 3, 8, 8) * 2 - 1


def test_the_balanced_loss_has_the_value_and_gradient_of_the_published_formula():
    body, last, discriminator, image = small_gan()
    parameters = [*body.parameters(), *last.parameters()]

    def losses() -> tuple[Tensor, Tensor, Tensor]:
        reconstruction = last(torch.tanh(body(image)))
        return reconstruction, (reconstruction - image).abs().mean(), generator_loss(discriminator(reconstruction))

    _, nll_loss, adversarial_loss = losses()
    both = (nll_loss, adversarial_loss)
    norms = [torch.autograd.grad(loss, last.weight, retain_graph=True)[0].norm() for loss in both]
    expected_weight = norms[0] / (norms[1] + 1e-4)
    expected = nll_loss + 0.8 * expected_weight.detach() * adversarial_loss
    expected_gradients = torch.autograd.grad(expected, parameters)
    reconstruction, nll_loss, adversarial_loss = losses()
    given = {"nll_loss": nll_loss, "adversarial_loss": adversarial_loss, "last_layer": last.weight}
    balanced = balanced_generator_loss(reconstruction, **given, adversarial_weight=0.8)
    balanced.loss.backward()
    torch.testing.assert_close(balanced.adaptive_weight, expected_weight)
    torch.testing.assert_close(balanced.loss, expected)
    torch.testing.assert_close([p.grad for p in parameters], list(expected_gradients))


def test_the_generator_step_leaves_no_gradient_in_the_discriminator_and_its_graph_for_the_hinge_loss():
    """Shubhamai/pytorch-vqgan #3: gradients of the generator's step were added to the discriminator's."""
    body, last, discriminator, image = small_gan()
    reconstruction = last(torch.tanh(body(image)))
    fake_logits = discriminator(reconstruction)
    given = {"nll_loss": (reconstruction - image).abs().mean(), "adversarial_loss": generator_loss(fake_logits)}
    balanced_generator_loss(reconstruction, **given, last_layer=last.weight, adversarial_weight=0.8).loss.backward()
    assert all(p.grad is None for p in discriminator.parameters())
    generator_gradient = last.weight.grad.clone()
    parameters = list(discriminator.parameters())
    hinge_discriminator_loss(discriminator(image), fake_logits=fake_logits).backward(inputs=parameters)
    apart = hinge_discriminator_loss(discriminator(image), fake_logits=discriminator(reconstruction.detach()))
    torch.testing.assert_close([p.grad for p in parameters], list(torch.autograd.grad(apart, parameters)))
    assert torch.equal(last.weight.grad, generator_gradient)


def test_reconstruction_loss_is_the_mean_absolute_difference():
    image = torch.zeros(1, 3, 2, 2)
    assert reconstruction_loss(image + 0.5, image=image) == 0.5


TEXT = torch.tensor([[1, 7, 9, 2, 0, 0], [1, 2, 0, 0, 0, 0], [1, 4, 5, 6, 7, 2], [0, 0, 0, 0, 0, 0]])


def test_a_uniform_model_has_the_logarithm_of_the_vocabulary_as_loss():
    tokens = torch.randint(0, 7, (3, 4))
    torch.testing.assert_close(token_loss(torch.zeros(3, 4, 7), tokens=tokens), torch.tensor(math.log(7)))
    torch.testing.assert_close(text_loss(torch.zeros(3, 5, 12), text=TEXT[:3]), torch.tensor(math.log(12)))


def test_text_loss_is_what_the_hand_computes():
    """Logit i is of token i + 1; pads count nothing; each text is averaged over its own tokens."""
    logits = torch.randn(4, 5, 12)
    log_p = logits.log_softmax(dim=-1)
    first = -(log_p[0, 0, 7] + log_p[0, 1, 9] + log_p[0, 2, 2])
    second = -log_p[1, 0, 2]
    third = -(log_p[2, 0, 4] + log_p[2, 1, 5] + log_p[2, 2, 6] + log_p[2, 3, 7] + log_p[2, 4, 2])
    nats, count = text_nats(logits, text=TEXT)
    torch.testing.assert_close(nats, torch.stack([first, second, third, torch.tensor(0.0)]))
    assert count.tolist() == [3, 1, 5, 0]
    torch.testing.assert_close(text_loss(logits, text=TEXT), (first / 3 + second + third / 5) / 4)


def output_of(mean: float, log_scale: float, *, width: int) -> torch.Tensor:
    """The same location and log-scale for all values of an image (1, 3, 1, width)."""
    values = torch.tensor([mean] * 3 + [log_scale] * 3)
    return values.view(1, 6, 1, 1).expand(1, 6, 1, width)


@pytest.mark.parametrize("mean", [-1.3, -0.31, 0.0, 0.999, 4.0])
@pytest.mark.parametrize("log_scale", [-7.0, -3.0, 0.0, 3.0])
def test_the_256_probabilities_of_the_discretized_logistic_sum_to_one(mean: float, log_scale: float):
    levels = (torch.arange(256) / 127.5 - 1).expand(1, 3, 1, 256)
    nll = discretized_logistic_nll(output_of(mean, log_scale, width=256), image=levels)
    assert nll.min() >= 0
    torch.testing.assert_close((-nll.double()).exp().sum(dim=3), torch.ones(1, 3, 1).double(), atol=2e-5, rtol=0)


def test_the_discretized_logistic_is_a_difference_of_sigmoids_inside():
    mean, scale = 0.1, 0.05
    image = (torch.arange(100, 160) / 127.5 - 1).double()
    expected = ((image - mean + 1 / 255) / scale).sigmoid() - ((image - mean - 1 / 255) / scale).sigmoid()
    output = output_of(mean, math.log(scale), width=60)
    nll = discretized_logistic_nll(output, image=image.float().expand(1, 3, 1, 60))
    torch.testing.assert_close(nll[0, 0, 0].double(), -expected.log(), atol=1e-4, rtol=0)


def test_far_from_its_mean_the_discretized_logistic_keeps_a_finite_value_and_gradient():
    output = output_of(-50.0, -7.0, width=1).clone().requires_grad_()
    nll = discretized_logistic_nll(output, image=torch.full((1, 3, 1, 1), 0.4))
    assert nll.isfinite().all()
    (gradient,) = torch.autograd.grad(nll.sum(), output)
    assert gradient.isfinite().all()
    assert (gradient[:, :3] != 0).all()


def test_logit_laplace_equals_the_transformed_distribution_of_torch():
    output, image = torch.randn(2, 6, 3, 3), torch.rand(2, 3, 3, 3) * 2 - 1
    mean, log_scale = output.chunk(2, dim=1)
    peer = TransformedDistribution(Laplace(mean, log_scale.exp()), [SigmoidTransform()])
    expected = -peer.log_prob(0.8 * (image + 1) / 2 + 0.1)
    torch.testing.assert_close(logit_laplace_nll(output, image=image), expected, atol=1e-5, rtol=1e-5)


def test_the_likeliest_output_shows_the_image():
    image = torch.rand(2, 3, 4, 4) * 1.98 - 0.99
    logits = (0.8 * (image + 1) / 2 + 0.1).logit()
    shown = image_of(torch.cat([logits, logits], dim=1), kind="logit_laplace")
    torch.testing.assert_close(shown, image, atol=1e-5, rtol=0)
    assert torch.equal(image_of(torch.cat([image, image], dim=1), kind="discretized_logistic"), image)
    assert torch.equal(image_of(image, kind="mse"), image)


@pytest.mark.parametrize("kind", ["l1", "mse", "logit_laplace", "discretized_logistic"])
def test_every_kind_costs_least_where_its_output_is_the_image(kind: str):
    image = torch.rand(2, 3, 4, 4) * 1.8 - 0.9
    location = (0.8 * (image + 1) / 2 + 0.1).logit() if kind == "logit_laplace" else image

    def loss_at(shift: float) -> torch.Tensor:
        scale = torch.full_like(image, -3.0)
        output = location + shift if output_channels(kind=kind) == 3 else torch.cat([location + shift, scale], dim=1)
        return reconstruction_loss(output, image=image, kind=kind)

    assert loss_at(0.0).shape == ()
    assert loss_at(0.0) < min(loss_at(0.1), loss_at(-0.1))


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="unknown reconstruction 'l2'"):
        output_channels(kind="l2")
