"""What the network predicts, and the way from its output to x_0 and to the noise.

Sources: epsilon, Ho et al. (2020); v, Salimans and Ho (2022), appendix D; weights, Hang et al. (2023), equation 8.
Everywhere x_0, noise, x_t and prediction are (B, ...) of one shape and timesteps are (B,) int64 in [0, T).
"""

from typing import Literal

from torch import Tensor

from components.diffusion.schedule import Schedule

PredictionType = Literal["epsilon", "sample", "v_prediction"]


def target(
    schedule: Schedule, *, x_0: Tensor, noise: Tensor, timesteps: Tensor, prediction_type: PredictionType
) -> Tensor:
    """The tensor that the network should output."""
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return x_0
    signal, sigma = schedule.signal_and_noise(timesteps, x_0)
    return signal * noise - sigma * x_0


def predict_x_0(
    schedule: Schedule, *, prediction: Tensor, x_t: Tensor, timesteps: Tensor, prediction_type: PredictionType
) -> Tensor:
    """The clean image that a prediction implies; not clipped."""
    if prediction_type == "sample":
        return prediction
    signal, sigma = schedule.signal_and_noise(timesteps, x_t)
    if prediction_type == "epsilon":
        return (x_t - sigma * prediction) / signal
    return signal * x_t - sigma * prediction


def predict_noise(
    schedule: Schedule, *, prediction: Tensor, x_t: Tensor, timesteps: Tensor, prediction_type: PredictionType
) -> Tensor:
    """The noise that a prediction implies. With "sample" the prediction may be any x_0, such as a clipped one."""
    if prediction_type == "epsilon":
        return prediction
    signal, sigma = schedule.signal_and_noise(timesteps, x_t)
    if prediction_type == "sample":
        return (x_t - signal * prediction) / sigma
    return sigma * x_t + signal * prediction


def loss_weight(
    schedule: Schedule, timesteps: Tensor, *, prediction_type: PredictionType, min_snr_gamma: float | None
) -> Tensor:
    """Weight (B,) float32 of each sample's mean squared error; 1 without a gamma.

    With one it is min(snr, gamma) on the scale of x_0, divided by snr for epsilon and by snr + 1 for v.
    """
    snr = schedule.snr(timesteps)
    if min_snr_gamma is None:
        return snr.new_ones(snr.shape)
    clipped = snr.clamp(max=min_snr_gamma)
    return clipped / {"epsilon": snr, "sample": 1, "v_prediction": snr + 1}[prediction_type]
