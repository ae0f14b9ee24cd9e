"""Laws of the prediction types: three ways to say one thing."""

import pytest
import torch
from diffusers import DDPMScheduler

from components.diffusion.objective import loss_weight, predict_noise, predict_x_0, target
from components.diffusion.schedule import make_schedule

PREDICTION_TYPES = ["epsilon", "sample", "v_prediction"]
SCHEDULE = make_schedule("linear", num_train_timesteps=1000)
TIMESTEPS = torch.tensor([0, 1, 10, 250, 500, 999])


def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, len(TIMESTEPS), 3, 4, 4, dtype=torch.float64).unbind()


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_true_target_implies_the_true_image_and_the_true_noise(prediction_type):
    x_0, noise = pictures()
    x_t = SCHEDULE.add_noise(x_0, noise, TIMESTEPS)
    true = target(SCHEDULE, x_0=x_0, noise=noise, timesteps=TIMESTEPS, prediction_type=prediction_type)
    known = {"prediction": true, "x_t": x_t, "timesteps": TIMESTEPS, "prediction_type": prediction_type}
    torch.testing.assert_close(predict_x_0(SCHEDULE, **known), x_0)
    torch.testing.assert_close(predict_noise(SCHEDULE, **known), noise)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_any_prediction_implies_an_image_and_a_noise_that_make_up_x_t(prediction_type):
    x_t, prediction = pictures()
    known = {"prediction": prediction, "x_t": x_t, "timesteps": TIMESTEPS, "prediction_type": prediction_type}
    again = SCHEDULE.add_noise(predict_x_0(SCHEDULE, **known), predict_noise(SCHEDULE, **known), TIMESTEPS)
    torch.testing.assert_close(again, x_t)


def test_v_is_the_velocity_of_diffusers():
    x_0, noise = (tensor.float() for tensor in pictures())
    ours = target(SCHEDULE, x_0=x_0, noise=noise, timesteps=TIMESTEPS, prediction_type="v_prediction")
    peer = DDPMScheduler(1000, beta_start=1e-4, beta_end=2e-2).get_velocity(x_0, noise, TIMESTEPS)
    torch.testing.assert_close(ours, peer, atol=3.3e-5, rtol=0)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("min_snr_gamma", [1.0, 5.0])
def test_weighted_losses_of_all_prediction_types_are_one_loss(prediction_type, min_snr_gamma):
    """The weight times the squared error of the prediction is min(snr, gamma) times the squared error of x_0."""
    prediction, x_t = pictures()
    known = {"x_t": x_t, "timesteps": TIMESTEPS, "prediction_type": prediction_type}
    error = predict_x_0(SCHEDULE, prediction=prediction + 1, **known) - predict_x_0(
        SCHEDULE, prediction=prediction, **known
    )
    snr = SCHEDULE.snr(TIMESTEPS)
    weight = loss_weight(SCHEDULE, TIMESTEPS, prediction_type=prediction_type, min_snr_gamma=min_snr_gamma)
    of_x_0 = snr.clamp(max=min_snr_gamma).double() * error.square().mean((1, 2, 3))
    torch.testing.assert_close(weight.double(), of_x_0, atol=0, rtol=1e-4)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_without_gamma_every_sample_weighs_one(prediction_type):
    weight = loss_weight(SCHEDULE, TIMESTEPS, prediction_type=prediction_type, min_snr_gamma=None)
    assert torch.equal(weight, torch.ones(len(TIMESTEPS)))
