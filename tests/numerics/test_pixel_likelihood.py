"""Laws of the likelihoods of images."""

import math

import pytest
import torch
from torch.distributions import Laplace, SigmoidTransform, TransformedDistribution

from components.models.losses.reconstruction import (
    discretized_logistic_nll,
    image_of,
    logit_laplace_nll,
    output_channels,
    reconstruction_loss,
)


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


@pytest.mark.parametrize("mean", [-2.0, 0.0, 0.7])
@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_logit_laplace_is_a_density_on_the_open_interval(mean: float, scale: float):
    """In u = logit(y) the integral is one of a smooth function: dy = y (1 - y) du."""
    u = torch.linspace(mean - 30 * scale, mean + 30 * scale, 60_001).double()
    y = u.sigmoid()
    image = 2 * (y - 0.1) / 0.8 - 1  # the image that maps to y
    values = torch.tensor([mean] * 3 + [math.log(scale)] * 3).double().view(1, 6, 1, 1).expand(1, 6, 1, len(u))
    inside = (y > 1e-5) & (y < 1 - 1e-5)  # where fp32 still tells y from 0 and 1
    density = (-logit_laplace_nll(values, image=image.expand(1, 3, 1, -1))).exp()[0, 0, 0].double()
    integral = torch.trapezoid((density * y * (1 - y))[inside], u[inside])
    assert abs(float(integral) - 1) < 1e-3


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
