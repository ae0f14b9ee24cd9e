"""The numbers of DALL-E 2's first two networks: the contrastive encoder and the diffusion prior; no torch."""

from typing import Literal, Self

from pydantic import Field, model_validator

from components.training.config import TrainingConfig
from components.training.norm_groups import check_norm_groups


class ContrastiveConfig(TrainingConfig):
    """Contrastive text-image encoder (CLIP; Radford et al., 2021). Its batch decides how hard the task is."""

    network: Literal["contrastive"] = "contrastive"
    resolution: int = Field(ge=4)  # pixels
    channels: int = Field(ge=4)
    channel_mult: tuple[int, ...] = Field(min_length=1)  # one level each; every further level halves the sides
    num_res_blocks: int = Field(ge=1)
    patch_size: int = Field(4, ge=1)  # pixels; the first level has resolution / patch_size positions on a side
    embedding_dim: int = Field(ge=2)
    norm_groups: int | None = Field(None, ge=1)  # None: 32, or fewer so that each keeps four channels
    text_dim: int = Field(ge=8)  # the text transformer
    text_layers: int = Field(ge=1)
    text_heads: int = Field(ge=1)
    max_shift: int = Field(0, ge=0)  # pixels that images are moved by in training, at most and each way
    conditions: tuple[Literal["text"], ...] = ("text",)

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        factor = self.patch_size * 2 ** (len(self.channel_mult) - 1)
        if self.resolution % factor:
            raise ValueError(f"resolution {self.resolution} must be a multiple of {factor}, of its patches and levels")
        if self.text_dim % self.text_heads:
            raise ValueError(f"text_dim {self.text_dim} must be a multiple of text_heads {self.text_heads}")
        check_norm_groups(self.norm_groups, self.channels, self.channel_mult)
        return self


class DiffusionPriorConfig(TrainingConfig):
    """Diffusion prior of DALL-E 2 (Ramesh et al., 2022, section 2.2), over the embeddings of a contrastive encoder."""

    stage_version = 2  # attention in fp32 on a CPU
    network: Literal["diffusion_prior"] = "diffusion_prior"
    resolution: int = Field(ge=4)  # pixels; that of the contrastive encoder
    model_dim: int = Field(ge=8)
    num_layers: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    conditions: tuple[Literal["text_states", "text_embedding"], ...] = ("text_states", "text_embedding")
    cond_drop_prob: float = Field(0.1, ge=0, lt=1)
    cond_drop: Literal["joint"] = "joint"
    schedule: Literal["linear", "cosine"] = "cosine"
    num_train_timesteps: int = Field(1000, ge=1)
    sampler: Literal["ddpm", "ddim", "dpm_solver_pp"] = "ddpm"
    num_inference_steps: int = Field(64, ge=1)
    guidance_scale: float = Field(1.0, ge=0)  # at sampling; 1 is off
    candidates: int = Field(2, ge=1)  # at sampling: as many are drawn, and the one nearest to the text is kept

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.model_dim % (2 * self.num_heads):
            raise ValueError(f"model_dim {self.model_dim} must be a multiple of twice num_heads {self.num_heads}")
        if self.num_inference_steps > self.num_train_timesteps:
            raise ValueError(f"num_inference_steps must be at most num_train_timesteps {self.num_train_timesteps}")
        return self
