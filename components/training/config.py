"""The numbers of every training. All of them decide the result, so all are identity; no torch is imported here."""

from typing import Literal, Self

from pydantic import Field, model_validator

from components.configuration import Config

PerceptualNetwork = Literal["efficientnet_lite1", "vgg16_lpips", "none"]
Condition = Literal["label", "text"]


class TrainingConfig(Config):
    """What all trainings share; flat, so that recipes override leaves as `base.total_steps`."""

    total_steps: int = Field(ge=1)
    global_batch_size: int = Field(ge=1)  # samples a step over all workers; the number of workers is not identity
    seed: int = Field(0, ge=0)
    learning_rate: float = Field(gt=0)  # peak, reached after the warm-up
    lr_decay: Literal["linear", "cosine"] = "linear"
    final_lr_fraction: float = Field(0.02, ge=0, le=1)  # of learning_rate, at the last step
    warmup_steps: int = Field(50, ge=0)
    betas: tuple[float, float] = (0.9, 0.99)  # AdamW
    weight_decay: float = Field(0.0, ge=0)  # on matrices and kernels only
    max_grad_norm: float = Field(1.0, gt=0)
    ema_decay: float = Field(0.999, ge=0, lt=1)  # of the weights; 0 keeps no average
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16 is autocast: weights, EMA and optimizer stay fp32
    log_every: int = Field(20, ge=1)
    checkpoint_every: int = Field(200, ge=1)
    sample_every: int = Field(200, ge=1)

    @model_validator(mode="after")
    def _warm_up_ends_in_time(self) -> Self:
        if self.warmup_steps >= self.total_steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be below total_steps {self.total_steps}")
        return self


class TokenizerConfig(TrainingConfig):
    """VQ-GAN (Esser et al., 2021): network, codebook and losses."""

    resolution: int = Field(ge=8)  # pixels
    channels: int = Field(ge=4)
    channel_mult: tuple[int, ...]  # one level each; every further level halves the grid
    num_res_blocks: int = Field(ge=1)
    attention_resolutions: tuple[int, ...] = ()  # in pixels
    latent_channels: int = Field(ge=1)
    codebook_size: int = Field(ge=2)
    codebook_dim: int = Field(ge=1)
    codebook_decay: float = Field(0.99, gt=0, lt=1)  # EMA of the codes
    commitment_cost: float = Field(0.25, ge=0)
    betas: tuple[float, float] = (0.5, 0.9)  # of both optimizers; a GAN wants little momentum
    perceptual_network: PerceptualNetwork
    perceptual_weights_uri: str | None = None  # where the weights are, for networks that no package ships
    perceptual_weight: float = Field(1.0, ge=0)
    adversarial_weight: float = Field(0.8, ge=0)  # on top of the adaptive weight
    discriminator_start: int = Field(0, ge=0)  # the generator hears it from then on; it learns from step 1
    discriminator_channels: int = Field(64, ge=4)
    discriminator_layers: int = Field(3, ge=1)

    @model_validator(mode="after")
    def _weights_have_a_source(self) -> Self:
        if self.perceptual_network == "vgg16_lpips" and self.perceptual_weights_uri is None:
            raise ValueError("perceptual_network vgg16_lpips needs perceptual_weights_uri (its weights are no package)")
        return self


class PriorConfig(TrainingConfig):
    """Decoder-only transformer over tokens."""

    model_dim: int = Field(ge=8)
    num_layers: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    conditions: tuple[Condition, ...] = ("label",)
    cond_drop_prob: float = Field(0.1, ge=0, lt=1)
    cond_drop: Literal["joint", "independent"] = "joint"
    guidance_scale: float = Field(1.0, ge=0)  # at sampling, as the three below, where a request asks for nothing else
    temperature: float = Field(1.0, ge=0)
    top_k: int | None = Field(None, ge=1)
    top_p: float | None = Field(None, gt=0, le=1)


class DiffusionConfig(TrainingConfig):
    """U-Net, objective and how it is sampled by default; `low_res_resolution` makes it an upsampler."""

    resolution: int = Field(ge=4)  # pixels
    low_res_resolution: int | None = Field(None, ge=4)  # pixels of the condition; None: a base model
    model_channels: int = Field(ge=4)
    channel_mult: tuple[int, ...]
    num_res_blocks: int = Field(ge=1)
    attention_resolutions: tuple[int, ...] = ()  # in pixels
    head_dim: int = Field(32, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    conditions: tuple[Condition, ...] = ("label",)
    text_dim: int = Field(64, ge=8)  # the text transformer, where text is a condition
    text_layers: int = Field(2, ge=1)
    text_heads: int = Field(4, ge=1)
    cond_drop_prob: float = Field(0.1, ge=0, lt=1)
    cond_drop: Literal["joint", "independent"] = "joint"
    schedule: Literal["linear", "cosine"] = "cosine"
    num_train_timesteps: int = Field(1000, ge=1)
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "v_prediction"
    min_snr_gamma: float | None = Field(5.0, gt=0)
    max_noise_level: int = Field(500, ge=0)  # of the low-res augmentation, in noising steps; each sample draws its own
    sampler: Literal["ddpm", "ddim"] = "ddim"
    num_inference_steps: int = Field(50, ge=1)
    noise_level: int = Field(100, ge=0)  # of the low-res augmentation at sampling
    guidance_scale: float = Field(1.0, ge=0)  # at sampling, where a request asks for none; 1 is off

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.low_res_resolution is not None and self.low_res_resolution >= self.resolution:
            raise ValueError(f"low_res_resolution {self.low_res_resolution} must be below {self.resolution}")
        if self.num_inference_steps > self.num_train_timesteps:
            raise ValueError(f"num_inference_steps must be at most num_train_timesteps {self.num_train_timesteps}")
        if self.low_res_resolution is not None and not (
            self.noise_level <= self.max_noise_level < self.num_train_timesteps
        ):
            raise ValueError("an upsampler needs noise_level <= max_noise_level < num_train_timesteps")
        return self


class Conditions(Config):
    """What a data set can condition on; from its index."""

    num_classes: int = Field(ge=1)
    vocab_size: int = Field(0, ge=0)  # of the BPE; 0: no captions
    text_length: int = Field(0, ge=0)


class TokenGrid(Config):
    """What a tokenizer makes of a picture."""

    codebook_size: int = Field(ge=2)
    height: int = Field(ge=1)
    width: int = Field(ge=1)
