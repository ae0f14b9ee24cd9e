"""Noising processes of images, and targets of networks, for `make_objective` by `objective()`."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field

from components.configuration.config import Config, Since, refuse
from components.models.diffusion.betas import SCHEDULES, ScheduleName, check_ends


class DiscreteNoise(Config):
    """Noise in steps (Ho et al., 2020)."""

    kind: Literal["discrete"] = "discrete"
    schedule: ScheduleName = "cosine"
    beta_start: float | None = Field(None, gt=0, lt=1)  # of a linear one, as they are: SR3 and Palette 1e-6 and 1e-2;
    beta_end: float | None = Field(None, gt=0, lt=1)  # None: the usual ones, times 1000 / num_train_timesteps
    num_train_timesteps: int = Field(1000, ge=1)
    zero_terminal_snr: bool = False

    def _check(self) -> None:
        check_ends(self.schedule, self.beta_start, self.beta_end)
        few, steps = SCHEDULES[self.schedule].too_few_steps, self.num_train_timesteps
        needs = f"schedule {self.schedule} needs num_train_timesteps above {few:.0f}, not {steps}"
        refuse(self.beta_end is None and few >= steps, f"{needs}: its last beta must be below 1")
        refuse(self.zero_terminal_snr and steps < 2, "zero_terminal_snr needs num_train_timesteps of at least 2")

    @property
    def noise(self) -> "DiscreteNoise":
        """The noising of images alone, without the target of a network."""
        return DiscreteNoise(**{name: getattr(self, name) for name in DiscreteNoise.model_fields})

    def objective(self) -> dict[str, Any]:
        """Plain values for `make_objective`; the target of a network is irrelevant to noising alone."""
        return self.model_dump(mode="json") | {"prediction_type": "v_prediction"}


class DiscreteProcess(DiscreteNoise):
    """Noise in steps with the target, loss and weighting of a network."""

    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "v_prediction"
    variance: Literal["fixed_small", "fixed_large", "learned_range"] = "fixed_small"  # of ancestral steps
    loss: Literal["simple", "hybrid", "vlb"] = "simple"
    timestep_sampling: Literal["uniform", "loss_aware"] = "uniform"
    min_snr_gamma: float | None = Field(5.0, gt=0)  # of the simple loss
    rescale_time: Annotated[bool, Since(False)] = False  # the network sees 1000 / T of a step (Improved DDPM)

    def objective(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude={"timestep_sampling"} | self.unchanged())

    def _check(self) -> None:
        super()._check()
        zero, weighted, bound = self.zero_terminal_snr, self.min_snr_gamma is not None, self.loss == "vlb"
        noisy = zero and self.prediction_type == "epsilon"
        refuse(noisy, "zero_terminal_snr needs prediction_type v_prediction or sample, not epsilon")
        refuse(zero and weighted, "zero_terminal_snr needs min_snr_gamma None: the last step would weigh nothing")
        single = (self.variance == "learned_range") != (self.loss == "hybrid")
        refuse(single and not bound, "variance learned_range and loss hybrid need each other (or loss vlb)")
        refuse(bound and weighted, "loss vlb has its own weights: it needs min_snr_gamma None")


class ContinuousProcess(Config):
    """Noise at any time, without steps: the noising and the target of a network are given together."""

    @property
    def noise(self) -> Self:
        return self

    def objective(self) -> dict[str, Any]:
        """Plain values for `make_objective`."""
        return self.model_dump(mode="json")


class EDMProcess(ContinuousProcess):
    """Noise of any level with preconditioning (Karras et al., 2022)."""

    kind: Literal["edm"] = "edm"
    sigma_data: float = Field(0.5, gt=0)  # deviation of the images or latents


class FlowProcess(ContinuousProcess):
    """A straight line from noise to image (rectified flow; Liu et al., 2023)."""

    kind: Literal["flow"] = "flow"
    time_density: Literal["uniform", "logit_normal"] = "uniform"


Process = Annotated[DiscreteProcess | EDMProcess | FlowProcess, Field(discriminator="kind")]
Noise = Annotated[DiscreteNoise | EDMProcess | FlowProcess, Field(discriminator="kind")]
