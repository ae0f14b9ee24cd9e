"""The numbers of a classifier's training; no torch."""

from typing import Literal, Self

from pydantic import Field, model_validator

from components.training.config import DiffusionConfig, TrainingConfig
from components.training.norm_groups import check_norm_groups

PROCESS = (  # what a classifier must share with the model that it guides
    *("objective", "schedule", "beta_start", "beta_end", "num_train_timesteps", "zero_terminal_snr", "sigma_data"),
)


class ClassifierConfig(TrainingConfig):
    """Classifier of noisy images, for guidance (Dhariwal and Nichol, 2021), or of clean ones, for measurement."""

    network: Literal["classifier"] = "classifier"
    resolution: int = Field(ge=4)  # pixels
    model_channels: int = Field(ge=4)
    channel_mult: tuple[int | float, ...] = Field(min_length=1)
    num_res_blocks: int = Field(ge=1)
    attention_resolutions: tuple[int, ...] = ()  # in pixels
    head_dim: int = Field(32, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    norm_groups: int | None = Field(None, ge=1)  # 32 at published sizes; None: so that each keeps four channels
    conditions: tuple[Literal["label"], ...] = ("label",)
    noisy: bool = True  # False: it sees clean images only, and guides nothing
    objective: Literal["discrete", "edm", "flow"] = "discrete"  # this and the next seven: those of the diffusion model
    schedule: Literal["linear", "scaled_linear", "cosine"] = "cosine"  # that it guides
    beta_start: float | None = Field(None, gt=0, lt=1)
    beta_end: float | None = Field(None, gt=0, lt=1)
    num_train_timesteps: int = Field(1000, ge=1)
    zero_terminal_snr: bool = False
    sigma_data: float = Field(0.5, gt=0)
    time_density: Literal["uniform", "logit_normal"] = "uniform"
    max_shift: int = Field(0, ge=0)  # pixels that images are moved by in training, at most and each way
    mirror: bool = False  # half of the images are mirrored in training
    guidance_scale: float = Field(1.0, ge=0)  # at sampling, where a request asks for none; 0 is off
    weight_decay: float = Field(0.05, ge=0)

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.resolution % 2 ** (len(self.channel_mult) - 1):
            raise ValueError(f"resolution {self.resolution} can't be halved between the levels of channel_mult")
        check_norm_groups(self.norm_groups, self.model_channels, self.channel_mult)
        return self


def check_guide(classifier: ClassifierConfig, base: DiffusionConfig) -> None:
    """Raise ValueError, naming the field, if the recipe's classifier can't guide its base: other images or noise."""
    if not classifier.noisy:
        raise ValueError("classifier.noisy must be true: it guides noisy images")
    if classifier.resolution != base.resolution:
        raise ValueError(f"classifier.resolution must be base.resolution {base.resolution}")
    for name in PROCESS:
        if getattr(classifier, name) != getattr(base, name):
            raise ValueError(f"classifier.{name} must be base.{name} {getattr(base, name)!r}")
