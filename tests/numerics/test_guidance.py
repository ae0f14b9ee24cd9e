"""Laws of classifier-free guidance."""

import pytest
import torch
from torch import Tensor

from components.diffusion.guidance import guide
from components.diffusion.objective import predict_x_0
from components.diffusion.samplers import sample
from components.diffusion.schedule import make_schedule

X_T, TIMESTEPS = torch.randn(4, 3, 2, 2), torch.tensor([5, 10, 20, 30])
LABEL, NULL, LOW_RES = torch.tensor([1, 2, 3, 4]), torch.full((4,), 9), torch.randn(4, 3, 2, 2)


class CountingModel:
    """Depends on every argument, sample by sample, and remembers the batch sizes that it was called with."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, x_t: Tensor, timesteps: Tensor, *, label: Tensor, low_res: Tensor) -> Tensor:
        self.batches.append(len(x_t))
        return torch.sin(x_t * label[:, None, None, None]) + low_res * timesteps[:, None, None, None] / 100


def conditional(label: Tensor) -> Tensor:
    return CountingModel()(X_T, TIMESTEPS, label=label, low_res=LOW_RES)


def guided(guidance_scale: float | Tensor, model: CountingModel | None = None) -> Tensor:
    condition = {"label": LABEL, "low_res": LOW_RES}
    return guide(model or CountingModel(), condition, {"label": NULL}, guidance_scale)(X_T, TIMESTEPS)


@pytest.mark.parametrize("guidance_scale", [0.0, 0.5, 3.0, 7.5])
def test_guidance_extrapolates_from_the_null_to_the_condition_and_keeps_what_has_no_null(guidance_scale):
    expected = conditional(NULL) + guidance_scale * (conditional(LABEL) - conditional(NULL))
    torch.testing.assert_close(guided(guidance_scale), expected)


@pytest.mark.parametrize("guidance_scale", [1, 1.0, torch.ones(4)])
def test_scale_1_changes_nothing_and_runs_the_network_once(guidance_scale):
    model = CountingModel()
    assert torch.equal(guided(guidance_scale, model), conditional(LABEL))
    assert model.batches == [4]


def test_any_other_scale_runs_one_doubled_batch():
    model = CountingModel()
    guided(2.0, model)
    assert model.batches == [8]


def test_each_sample_has_its_own_scale():
    scales = torch.tensor([1.0, 0.0, 2.0, 7.0])
    together = guided(scales)
    for i, scale in enumerate(scales.tolist()):
        torch.testing.assert_close(together[i], guided(scale)[i])
    assert torch.equal(together[0], conditional(LABEL)[0])


def test_a_null_without_a_condition_is_refused():
    with pytest.raises(ValueError, match="text"):
        guide(CountingModel(), {"label": LABEL}, {"text": NULL}, 2.0)


def test_guidance_comes_before_clipping():
    schedule = make_schedule("cosine", num_train_timesteps=50)
    denoise = guide(CountingModel(), {"label": LABEL, "low_res": LOW_RES}, {"label": NULL}, 5.0)
    shown = []
    sample(
        denoise,
        schedule,
        X_T,
        prediction_type="epsilon",
        sampler="ddim",
        num_inference_steps=5,
        noise=torch.zeros_like,
        on_step=lambda step, timestep, x_t, x_0: shown.append((timestep, x_t, x_0)),
    )
    for timestep, x_t, x_0 in shown:
        t = torch.full((4,), timestep)
        prediction = denoise(x_t, t)
        raw = predict_x_0(schedule, prediction=prediction, x_t=x_t, timesteps=t, prediction_type="epsilon")
        torch.testing.assert_close(x_0, raw.clamp(-1, 1), atol=1e-4, rtol=0)
