"""The numbers of every training. All of them decide the result, so all are identity; no torch is imported here."""

from typing import Literal, Self

from pydantic import Field, model_validator

from components.configuration import Config
from components.training.norm_groups import check_norm_groups

PerceptualNetwork = Literal["efficientnet_lite1", "vgg16_lpips", "none"]
Condition = Literal["label", "text", "text_states", "condition_image", "image_embedding"]
SamplerName = Literal["ddpm", "ddim", "dpm_solver_pp", "sde_dpm_solver_pp", "heun", "euler"]
DISCRETE_ONLY = (  # fields of a diffusion that other objectives have no use for
    *("zero_terminal_snr", "prediction_type", "variance", "loss", "timestep_sampling", "min_snr_gamma", "spacing"),
)
TokenCondition = Literal["label", "text", "condition"]  # condition: tokens of another image, by their own tokenizer


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
    ema: Literal["exponential", "power"] = "exponential"  # power: its length can be chosen after training
    ema_sigma_rel: float = Field(0.1, gt=0, lt=0.28)  # of a power EMA: its length as a share of training
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16 is autocast: weights, EMA and optimizer stay fp32
    log_every: int = Field(20, ge=1)
    checkpoint_every: int = Field(200, ge=1)
    sample_every: int = Field(200, ge=1)

    @model_validator(mode="after")
    def _warm_up_ends_in_time(self) -> Self:
        if self.warmup_steps >= self.total_steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be below total_steps {self.total_steps}")
        return self


class AutoencoderConfig(TrainingConfig):
    """Autoencoder: network, bottleneck and losses. A VAE, VAE-GAN, VQ-VAE, dVAE or VQ-GAN by its weights."""

    stage_version = 2  # codes of gumbel start as features
    network: Literal["autoencoder"] = "autoencoder"
    ema: Literal["exponential"] = "exponential"  # codebooks can't be combined afterwards
    resolution: int = Field(ge=8)  # pixels
    channels: int = Field(ge=4)
    channel_mult: tuple[int, ...]  # one level each; every further level halves the grid
    num_res_blocks: int = Field(ge=1)
    attention_resolutions: tuple[int, ...] = ()  # in pixels
    latent_channels: int = Field(ge=1)
    patch_shortcut: bool = False  # a linear map around encoder and decoder: colors in minutes
    norm_groups: int | None = Field(None, ge=1)  # 32 at published sizes; None: so that each keeps four channels
    bottleneck: Literal["vq_ema", "vq", "gumbel", "fsq", "gaussian"] = "vq_ema"
    codebook_size: int | None = Field(None, ge=2)  # of vq_ema, vq and gumbel, as the next
    codebook_dim: int | None = Field(None, ge=1)  # None: latent_channels
    codebook_decay: float = Field(0.99, gt=0, lt=1)  # EMA of the codes; this and the next of vq_ema
    codebook_init: Literal["data", "kmeans", "random"] = "data"  # data: of vq_ema and gumbel; random: of gumbel
    l2_normalize: bool = True  # codes of vq_ema and vq
    commitment_cost: float = Field(0.25, ge=0)
    fsq_levels: tuple[int, ...] = ()  # one a channel; their product is the number of codes
    kl_weight: float = Field(1.0, ge=0)  # of gaussian and gumbel; 1 is the bound, where reconstruction is a likelihood
    kl_warmup_steps: int = Field(0, ge=0)  # from 0 to kl_weight along a cosine
    temperature_steps: int = Field(0, ge=0)  # of gumbel: from 1 to final_temperature along a cosine
    final_temperature: float = Field(1 / 16, gt=0, le=1)
    reconstruction: Literal["l1", "mse", "logit_laplace", "discretized_logistic"] = "l1"
    betas: tuple[float, float] = (0.5, 0.9)  # of both optimizers; a GAN wants little momentum
    perceptual_network: PerceptualNetwork
    perceptual_weights_uri: str | None = None  # where the weights are, for networks that no package ships
    perceptual_weight: float = Field(1.0, ge=0)  # 0: the perceptual network is not loaded
    adversarial_weight: float = Field(0.8, ge=0)  # on top of the adaptive weight; 0: there is no discriminator
    discriminator_start: int = Field(0, ge=0)  # the generator hears it from then on; it learns from step 1
    discriminator_channels: int = Field(64, ge=4)
    discriminator_layers: int = Field(3, ge=1)
    member: Literal["image", "depth", "mask"] = "image"  # what of each sample is the image

    @model_validator(mode="after")
    def _weights_have_a_source(self) -> Self:
        if self.perceptual_network == "vgg16_lpips" and self.perceptual_weights_uri is None:
            raise ValueError("perceptual_network vgg16_lpips needs perceptual_weights_uri (its weights are no package)")
        return self

    @model_validator(mode="after")
    def _network_and_bottleneck_have_their_numbers(self) -> Self:
        check_norm_groups(self.norm_groups, self.channels, self.channel_mult)
        has_codebook = self.bottleneck in ("vq_ema", "vq", "gumbel")
        if has_codebook and self.codebook_size is None:
            raise ValueError(f"bottleneck {self.bottleneck} needs codebook_size")
        if not has_codebook and (self.codebook_size is not None or self.codebook_dim is not None):
            raise ValueError(f"bottleneck {self.bottleneck} takes no codebook_size and no codebook_dim")
        if (self.bottleneck == "fsq") != bool(self.fsq_levels):
            raise ValueError("fsq_levels belong to bottleneck fsq, which needs them, as (8, 5, 5, 5)")
        if self.fsq_levels and min(self.fsq_levels) < 2:
            raise ValueError(f"fsq_levels must be at least 2, not {min(self.fsq_levels)}")
        if self.codebook_init == "kmeans" and self.bottleneck != "vq_ema":
            raise ValueError(f"codebook_init kmeans belongs to bottleneck vq_ema, not {self.bottleneck}")
        if self.codebook_init == "random" and self.bottleneck != "gumbel":
            raise ValueError(f"codebook_init random belongs to bottleneck gumbel, not {self.bottleneck}")
        if self.starts_from_features and self.codebook_dim not in (None, self.latent_channels):
            raise ValueError(
                f"codebook_init data of gumbel needs codebook_dim {self.latent_channels}, that of latent_channels, not "
                f"{self.codebook_dim}; or take codebook_init random"
            )
        return self

    @property
    def starts_from_features(self) -> bool:
        """Whether relaxed codes start as features of the first batch."""
        return self.bottleneck == "gumbel" and self.codebook_init == "data"


class TokenNetworkConfig(TrainingConfig):
    """What both transformers over tokens share: their size, their conditions, and how they are sampled by default."""

    stage_version = 2  # dropout on residual branches alone
    model_dim: int = Field(ge=8)
    num_layers: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    positions: Literal["learned", "learned_2d", "rotary_2d"] = "learned"  # one table, rows and columns, or rotations
    conditions: tuple[TokenCondition, ...] = ("label",)
    cond_drop_prob: float = Field(0.1, ge=0, lt=1)
    cond_drop: Literal["joint", "independent"] = "joint"
    guidance_scale: float = Field(1.0, ge=0)  # at sampling, as the three below, where a request asks for nothing else
    temperature: float = Field(1.0, ge=0)
    top_k: int | None = Field(None, ge=1)
    top_p: float | None = Field(None, gt=0, le=1)

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.model_dim % self.num_heads:
            raise ValueError(f"model_dim {self.model_dim} must be a multiple of num_heads {self.num_heads}")
        head_dim = self.model_dim // self.num_heads
        if self.positions == "rotary_2d" and head_dim % 4:
            raise ValueError(f"positions rotary_2d needs model_dim / num_heads to be a multiple of 4, not {head_dim}")
        return self


class PriorConfig(TokenNetworkConfig):
    """Decoder-only transformer over tokens."""

    network: Literal["transformer"] = "transformer"
    token_corruption: float = Field(0.0, ge=0, lt=1)  # share of input tokens replaced by random ones in training
    text_loss_weight: float = Field(0.0, ge=0, lt=1)  # w text + (1 - w) image, DALL-E 1/8; 0: a condition only

    @model_validator(mode="after")
    def _there_is_a_text_to_learn(self) -> Self:
        if self.text_loss_weight > 0 and "text" not in self.conditions:
            raise ValueError(f"text_loss_weight {self.text_loss_weight} needs text among the conditions")
        return self


class MaskedPriorConfig(TokenNetworkConfig):
    """Transformer over tokens of which some are masked (MaskGIT; Chang et al., 2022)."""

    network: Literal["masked_transformer"] = "masked_transformer"
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    num_inference_steps: int = Field(12, ge=1)  # at sampling, where a request asks for none; at most tokens an image
    choice_temperature: float = Field(4.5, ge=0)  # of the noise on what is kept first; the paper's


class DiffusionConfig(TrainingConfig):
    """U-Net or DiT, objective and how it is sampled by default; `low_res_resolution` makes it an upsampler."""

    stage_version = 3  # windows are cut before noise is drawn

    resolution: int = Field(ge=4)  # pixels
    low_res_resolution: int | None = Field(None, ge=4)  # pixels of the condition; None: a base model
    model_channels: int = Field(ge=4)  # of a DiT: its width
    channel_mult: tuple[int | float, ...] = ()  # one level each, halves too; this and the next two of a U-Net
    num_res_blocks: int = Field(1, ge=1)
    attention_resolutions: tuple[int, ...] = ()  # in pixels
    head_dim: int | None = Field(32, ge=1)  # channels of a head; None: by num_heads
    dropout: float = Field(0.0, ge=0, lt=1)
    backbone: Literal["unet", "dit"] = "unet"
    num_heads: int | None = Field(None, ge=1)  # instead of head_dim, which is None then
    num_layers: int = Field(12, ge=1)  # of a DiT, as the next
    patch_size: int = Field(2, ge=1)
    scale_shift_norm: bool = True  # of a U-Net, as the next two: adaptive group norm, or time by addition
    resample_in_blocks: bool = True  # or by convolutions
    norm_groups: int | None = Field(None, ge=1)  # 32 at published sizes; None: so that each keeps four channels
    in_channels: int = Field(3, ge=1)  # and out; other than 3 where the image is a latent
    text_conditioning: Literal["pooled", "cross_attention", "spatial_transformer"] = "pooled"
    transformer_depth: int = Field(1, ge=1)  # of spatial transformers
    class_token_dim: int | None = Field(None, ge=1)  # the label is a token for them instead of part of the embedding
    text_states_dim: int | None = Field(None, ge=1)  # features of a state of a frozen text encoder
    image_embedding_dim: int | None = Field(None, ge=1)
    condition_image_channels: int = Field(0, ge=0)  # of the image that is concatenated
    text_padding: Literal["hidden", "learned"] = "hidden"  # learned: GLIDE's, attended to
    gradient_checkpointing: bool = False  # less memory for a third more time; the same numbers
    compile_network: bool = False  # torch.compile: a minute more at the start, faster steps on GPUs; other rounding
    conditions: tuple[Condition, ...] = ("label",)
    text_dim: int = Field(64, ge=8)  # the text transformer, where text is a condition
    text_layers: int = Field(2, ge=1)
    text_heads: int = Field(4, ge=1)
    cond_drop_prob: float = Field(0.1, ge=0, lt=1)
    cond_drop: Literal["joint", "independent"] = "joint"
    objective: Literal["discrete", "edm", "flow"] = "discrete"
    schedule: Literal["linear", "scaled_linear", "cosine"] = "cosine"  # of discrete, and of the low-res augmentation
    beta_start: float | None = Field(None, gt=0, lt=1)  # of a linear one, as they are: SR3 and Palette 1e-6 and 1e-2;
    beta_end: float | None = Field(None, gt=0, lt=1)  # None: the usual ones, times 1000 / num_train_timesteps
    num_train_timesteps: int = Field(1000, ge=1)
    zero_terminal_snr: bool = False  # this and the next five: discrete only
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "v_prediction"
    variance: Literal["fixed_small", "fixed_large", "learned_range"] = "fixed_small"  # of ancestral steps
    loss: Literal["simple", "hybrid", "vlb"] = "simple"
    timestep_sampling: Literal["uniform", "loss_aware"] = "uniform"
    min_snr_gamma: float | None = Field(5.0, gt=0)  # of the simple loss
    sigma_data: float = Field(0.5, gt=0)  # edm: deviation of the images or latents
    time_density: Literal["uniform", "logit_normal"] = "uniform"  # flow
    max_noise_level: int = Field(500, ge=0)  # of the low-res augmentation, in noising steps; each sample draws its own
    sampler: SamplerName = "ddim"  # this and all below: at sampling
    num_inference_steps: int = Field(50, ge=1)
    eta: float = Field(0.0, ge=0, le=1)  # ddim
    spacing: Literal["linspace", "leading", "trailing", "karras"] | None = None  # None: as suits the sampler
    threshold: Literal["static", "dynamic", "none"] = "static"  # of each predicted image; none is for latents
    threshold_percentile: float = Field(0.995, gt=0, le=1)  # dynamic
    noise_level: int = Field(100, ge=0)  # of the low-res augmentation
    guidance_scale: float = Field(1.0, ge=0)  # where a request asks for none; 1 is off
    guidance_interval: tuple[float, float] | None = None  # guide at these noise levels only, sigma / signal
    guidance_rescale: float = Field(0.0, ge=0, le=1)  # deviation of what is guided, back to that of what is not
    condition_member: Literal["image", "depth", "mask"] | None = None  # what of each sample is its condition_image
    crop_size: int | None = Field(None, ge=4)  # pixels of the window that a step sees; None: whole images

    @model_validator(mode="after")
    def _condition_image_is_named(self) -> Self:
        if ("condition_image" in self.conditions) != (self.condition_member is not None):
            raise ValueError("condition_image among the conditions needs condition_member, image, depth or mask")
        if self.condition_member is not None and self.condition_image_channels != 3:
            raise ValueError("a condition_member is an image: condition_image_channels must be 3")
        return self

    @model_validator(mode="after")
    def _windows_fit(self) -> Self:
        if self.crop_size is None:
            return self
        if self.attention_resolutions or self.backbone != "unet":
            raise ValueError("crop_size needs a unet with attention_resolutions (): attention sees the whole image")
        if self.crop_size >= self.resolution or self.crop_size % 2 ** (len(self.channel_mult) - 1):
            raise ValueError(
                f"crop_size {self.crop_size} must be below resolution {self.resolution} and halve "
                f"{len(self.channel_mult) - 1} times"
            )
        return self

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.low_res_resolution is not None and self.low_res_resolution >= self.resolution:
            raise ValueError(f"low_res_resolution {self.low_res_resolution} must be below {self.resolution}")
        if self.objective == "discrete" and self.num_inference_steps > self.num_train_timesteps:
            raise ValueError(f"num_inference_steps must be at most num_train_timesteps {self.num_train_timesteps}")
        if self.low_res_resolution is not None and not (
            self.noise_level <= self.max_noise_level < self.num_train_timesteps
        ):
            raise ValueError("an upsampler needs noise_level <= max_noise_level < num_train_timesteps")
        return self

    @model_validator(mode="after")
    def _network_has_its_numbers(self) -> Self:
        if (self.head_dim is None) == (self.num_heads is None):
            raise ValueError("give either head_dim or num_heads; head_dim=None where num_heads is given")
        if self.backbone == "unet":
            if not self.channel_mult:
                raise ValueError("backbone unet needs channel_mult, as (1, 2, 4)")
            check_norm_groups(self.norm_groups, self.model_channels, self.channel_mult)
            return self
        unknown = {"channel_mult": (), "dropout": 0.0, "text_conditioning": "pooled", "class_token_dim": None}
        for name, nothing in (unknown | {"norm_groups": None}).items():
            if getattr(self, name) != nothing:
                raise ValueError(f"backbone dit takes no {name}")
        return self

    @model_validator(mode="after")
    def _schedule_exists(self) -> Self:
        if (self.beta_start is None) != (self.beta_end is None):
            raise ValueError("give both beta_start and beta_end, or neither")
        if self.schedule == "cosine" and self.beta_start is not None:
            raise ValueError("schedule cosine takes no beta_start and no beta_end")
        last = {"linear": 20.0, "scaled_linear": 12.0, "cosine": 0.0}[self.schedule]
        if self.beta_end is None and last >= self.num_train_timesteps:
            raise ValueError(
                f"schedule {self.schedule} needs num_train_timesteps above {last:.0f}, not {self.num_train_timesteps}: "
                "its last beta must be below 1"
            )
        return self

    @model_validator(mode="after")
    def _objective_fits(self) -> Self:
        if self.objective != "discrete":
            fields = type(self).model_fields
            others = [name for name in DISCRETE_ONLY if getattr(self, name) != fields[name].default]
            if others:
                raise ValueError(f"objective {self.objective} takes no {', '.join(others)}: discrete does")
        if self.zero_terminal_snr and self.prediction_type == "epsilon":
            raise ValueError("zero_terminal_snr needs prediction_type v_prediction or sample, not epsilon")
        if self.zero_terminal_snr and self.min_snr_gamma is not None:
            raise ValueError("zero_terminal_snr needs min_snr_gamma None: the last step would weigh nothing")
        if self.zero_terminal_snr and (self.spacing == "leading" or self.num_train_timesteps < 2):
            raise ValueError("zero_terminal_snr needs num_train_timesteps of at least 2, and no spacing leading")
        if (self.variance == "learned_range") != (self.loss == "hybrid") and self.loss != "vlb":
            raise ValueError("variance learned_range and loss hybrid need each other (or loss vlb)")
        if self.loss == "vlb" and self.min_snr_gamma is not None:
            raise ValueError("loss vlb has its own weights: it needs min_snr_gamma None")
        return self

    @model_validator(mode="after")
    def _sampling_fits(self) -> Self:
        if self.eta > 0 and self.sampler != "ddim":
            raise ValueError(f"eta belongs to sampler ddim, not {self.sampler}")
        if self.guidance_interval is not None and not 0 <= self.guidance_interval[0] < self.guidance_interval[1]:
            raise ValueError(f"guidance_interval must rise from at least 0, not {self.guidance_interval}")
        return self


class PixelConfig(TrainingConfig):
    """Gated PixelCNN or Row LSTM, over the 8-bit values of RGB pixels or, where `resolution` is None, over tokens."""

    network: Literal["pixelcnn", "row_lstm"]
    channels: int = Field(ge=2)
    num_layers: int = Field(ge=1)  # after the first, which has a kernel of 7
    kernel_size: int = Field(5, ge=3)
    resolution: int | None = Field(None, ge=2)  # pixels; None: the grid of the tokens
    dropout: float = Field(0.0, ge=0, lt=1)
    conditions: tuple[Literal["label"], ...] = ("label",)
    cond_drop_prob: float = Field(0.1, ge=0, lt=1)
    cond_drop: Literal["joint", "independent"] = "joint"
    guidance_scale: float = Field(1.0, ge=0)  # at sampling, as the three below, where a request asks for nothing else
    temperature: float = Field(1.0, ge=0)
    top_k: int | None = Field(None, ge=1)
    top_p: float | None = Field(None, gt=0, le=1)

    @model_validator(mode="after")
    def _colors_share_the_channels(self) -> Self:
        shares = (1 if self.resolution is None else 3) * (2 if self.network == "row_lstm" else 1)
        if self.channels % shares:
            raise ValueError(f"channels {self.channels} must be a multiple of {shares} for a {self.network}")
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, not {self.kernel_size}")
        return self


class GANConfig(TrainingConfig):
    """Class-conditional residual GAN (Brock et al., 2019): both networks, and how they play."""

    network: Literal["gan"] = "gan"
    ema: Literal["exponential"] = "exponential"  # nor can the statistics of batch norms
    resolution: int = Field(ge=8)  # pixels; a multiple of 2 for each level
    channels: int = Field(ge=4)  # of the generator
    channel_mult: tuple[int, ...] = Field(min_length=1)  # from the full resolution down; each level halves the sides
    noise_dim: int = Field(ge=1)
    discriminator_channels: int = Field(ge=4)
    discriminator_channel_mult: tuple[int, ...] = Field(min_length=1)
    attention_resolutions: tuple[int, ...] = ()  # in pixels, of both networks
    conditions: tuple[Literal["label"], ...] = ("label",)  # or nothing
    discriminator_steps: int = Field(1, ge=1)  # in each step, on equal parts of the batch
    discriminator_learning_rate: float = Field(gt=0)  # learning_rate is the generator's
    betas: tuple[float, float] = (0.0, 0.9)  # of both optimizers; a GAN wants no momentum
    ema_decay: float = Field(0.999, gt=0, lt=1)  # of the generator; what samples is always the average
    augment: bool = False  # differentiable augmentation of all that the discriminator sees, for small sets

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        for name in ("channel_mult", "discriminator_channel_mult"):
            if self.resolution % 2 ** len(getattr(self, name)):
                raise ValueError(f"resolution {self.resolution} can't be halved once for each level of {name}")
        if self.global_batch_size % self.discriminator_steps:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} must be a multiple of discriminator_steps "
                f"{self.discriminator_steps}"
            )
        return self


class DatasetInfo(Config):
    """What a data set can condition on; from its index."""

    num_classes: int = Field(ge=1)
    vocab_size: int = Field(0, ge=0)  # of the BPE; 0: no captions
    text_length: int = Field(0, ge=0)
    condition: "TokenGrid | None" = None  # of the condition images, where there are any
    image_embedding_dim: int = Field(0, ge=0)  # what frozen encoders make, where there are any; this and the next two
    text_states_dim: int = Field(0, ge=0)
    text_states_length: int = Field(0, ge=0)


class TokenGrid(Config):
    """What a tokenizer makes of an image."""

    codebook_size: int = Field(ge=2)
    height: int = Field(ge=1)
    width: int = Field(ge=1)
