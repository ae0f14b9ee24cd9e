"""Optimization of a network: steps, batch, rate, average, precision, and reports.

`precision: bf16` is a permission for GPUs. One without bf16 of its own (before Ampere) would emulate it in about three
times the time of fp32: it trains in fp32, and one line says so; a CPU always does. The key is the same either way, the
bits are not. The policy for all devices is `components.sampling.device`."""

from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from components.configuration.conditions import IMAGES, DatasetInfo, Member, TokenGrid
from components.configuration.config import Config, Since, Unkeyed, refuse
from components.configuration.networks import NetworkConfig

Precision = Literal["fp32", "tf32", "bf16"]


class PartConfig(Config):
    """Training of a part of a network."""

    learning_rate: float = Field(ge=0)  # in units of the training's; 0: the part is frozen


class OptimizationConfig(Config):
    """Settings shared by all trainings: steps, batch size, learning rate, EMA, precision, checkpoints."""

    can_recompute: ClassVar[bool] = True  # whether gradient_checkpointing may be set

    total_steps: int = Field(ge=1)
    global_batch_size: int = Field(ge=1)  # samples a step over all workers, however many
    seed: int = Field(0, ge=0)
    streams: int = Field(12, ge=12, multiple_of=12)  # of the order: workers that divide it read shards once
    learning_rate: float = Field(gt=0)  # peak, reached after the warm-up
    lr_decay: Literal["linear", "cosine"] = "linear"
    final_lr_fraction: float = Field(0.02, ge=0, le=1)  # of learning_rate, at the last step
    warmup_steps: int = Field(50, ge=0)
    # By patterns of names, as `down`, `blocks.1?`, `*.bias`; of several that fit a parameter the longest counts.
    parts: Annotated[dict[str, PartConfig], Since({})] = Field(default_factory=dict)
    # muon: weights of linear maps and convolutions by Muon, all others by AdamW; see docs/LOG.md.
    optimizer: Annotated[Literal["adamw", "muon"], Since("adamw")] = "adamw"
    betas: tuple[float, float] = (0.9, 0.99)  # of AdamW
    weight_decay: float = Field(0.0, ge=0)  # on matrices and kernels only
    max_grad_norm: float | None = Field(1.0, gt=0)  # None: gradients are not clipped
    ema_decay: float = Field(0.999, ge=0, lt=1)  # decay of the average of weights; 0: no average
    ema: Literal["exponential", "power"] = "exponential"  # power: its length can be chosen after training
    ema_sigma_rel: float = Field(0.1, gt=0, lt=0.28)  # of a power EMA: its length as a share of training
    precision: Precision = "fp32"  # bf16: autocast on GPUs that have it; weights stay fp32
    compile_network: bool = False  # torch.compile: a minute more, faster steps on GPUs; other rounding
    gradient_checkpointing: Annotated[bool, Unkeyed()] = False  # less memory, a third more time
    log_every: int = Field(20, ge=1)
    # Training stops where the logged loss is above so many times its running median, so many logs in a row.
    max_loss_factor: Annotated[float | None, Unkeyed()] = Field(20.0, gt=1)  # None: a finite loss never stops it
    max_loss_logs: Annotated[int, Unkeyed()] = Field(5, ge=1)
    checkpoint_every: int = Field(200, ge=1)  # steps; a power EMA keeps a snapshot at each
    checkpoint_minutes: Annotated[float | None, Unkeyed()] = Field(None, gt=0)  # in place of steps, by the clock
    sample_every: int = Field(200, ge=1)

    def __hash__(self) -> int:  # a dictionary has none
        return hash(self.model_dump_json())

    @property
    def equal_parts(self) -> int:
        """Number of equal parts of a worker's samples in a step; divides the number of samples."""
        return 1

    def _check(self) -> None:
        warmup, total = self.warmup_steps, self.total_steps
        refuse(warmup >= total, f"warmup_steps {warmup} must be below total_steps {total}")


class StartConfig(Config):
    """Weights that a training begins with, in place of random ones."""

    # A model of ours: the folder of its artifact or of its bundle. Its content enters the key, not its address.
    uri: Annotated[str, Unkeyed()] = Field(min_length=1)
    ignore: tuple[str, ...] = ()  # modules whose weights are new, by name, as class_embedding
    frozen: Annotated[bool, Since(False)] = False  # nothing is trained: the model is taken as it is


class AdapterConfig(Config):
    """Low-rank adapter (LoRA; Hu et al., 2021): all that is trained, but for new modules."""

    kind: Literal["lora"] = "lora"
    rank: int = Field(16, ge=1)
    alpha: int = Field(16, ge=1)  # the adapter's product counts alpha / rank times
    targets: tuple[str, ...] = Field(("qkv", "q", "kv", "context_kv", "proj"), min_length=1)  # modules, by last names


PerceptualNetwork = Literal["efficientnet_lite1", "vgg16_lpips", "none"]


class TrainingNeeds(NamedTuple):
    """Data and pretrained networks for a training."""

    resolution: int | None = None  # side of the images, pixels; None: the training reads tokens
    member: Member = "image"  # member of each sample to use as `image`
    mask_values: int | None = None  # classes of the masks to read; None: any number
    condition_member: Member | None = None  # member of each sample to use as `condition_image`
    degradations: tuple[str, ...] = ()  # tasks that make the `condition_image` of the `image`
    jpeg_qualities: tuple[int, int] = (5, 30)  # lowest and highest, of the task jpeg
    channels: int = 3  # in place of colors: 1 gray, or those of latents
    columns: tuple[str, ...] = ()  # arrays of frozen networks, unless the set holds them
    captions: bool = False  # the text tokenizer is stored with the model
    perceptual_network: PerceptualNetwork = "none"  # of the loss
    perceptual_weights_uri: str | None = None


class Training(Config):
    """The training of a model; these methods and `FAMILIES` say how model families differ."""

    optimization: OptimizationConfig
    network: NetworkConfig
    init_from: Annotated[StartConfig | None, Since(None)] = None  # None: from random weights
    adapter: Annotated[AdapterConfig | None, Since(None)] = None  # None: the weights are trained

    can_adapt: ClassVar[bool] = True  # whether adapter may be set
    can_freeze: ClassVar[bool] = False  # whether init_from.frozen may be set: of models that serve other trainings

    def model_post_init(self, context: Any) -> None:
        super().model_post_init(context)
        if not self.trains:
            start, kind = self.init_from, self.network.kind
            refuse(not self.can_freeze, f"a network {kind} is trained: leave init_from.frozen out")
            refuse(start and start.ignore, "init_from.ignore must be empty beside init_from.frozen: nothing is new")
            refuse(self.adapter, "adapter must be empty beside init_from.frozen: nothing is trained")
        if self.adapter is not None:
            own, kind = self.optimization, self.network.kind
            refuse(not self.can_adapt, f"a network {kind} takes no adapter: freeze parts of it by optimization.parts")
            refuse(self.init_from is None, "adapter needs weights to adapt: set init_from.uri")
            refuse(own.parts, "optimization.parts must be empty beside an adapter, which alone is trained")
            refuse(own.ema == "power", "optimization.ema must be exponential beside an adapter")

    @property
    def trains(self) -> bool:
        """False where the model is its start, as it is."""
        return self.init_from is None or not self.init_from.frozen

    @property
    def stage_name(self) -> str:
        """Stage name of a model without a role in a workflow; trainings of equal numbers run once."""
        return self.network.kind

    @property
    def has_codes(self) -> bool:
        """True if the model makes codes for a prior, and draws no images alone."""
        return False

    @property
    def token_grid(self) -> TokenGrid | None:
        """Grid of tokens of an image under the finished model; None for a model without tokens."""
        return None

    @property
    def encoded_sizes(self) -> dict[str, int]:
        """Fields of `DatasetInfo` set by the finished encoder for other trainings; empty for no encoder."""
        return {}

    @property
    def quiet_steps(self) -> int:
        """Number of cheaper first steps, before every loss has begun."""
        return 0

    def check_likelihood(self) -> None:
        """Raises ValueError, naming the field, if the finished model states no likelihood of 8-bit images."""
        raise ValueError(f"likelihood must be empty: a {self.network.kind} has none")

    def needs(self) -> TrainingNeeds:
        """Data and pretrained networks to read in the training."""
        raise NotImplementedError

    def network_arguments(self, dataset_info: DatasetInfo = IMAGES, grid: TokenGrid | None = None) -> dict[str, Any]:
        """Arguments of the network's constructor, plain values, stored with the model.
        `grid`: of the tokens that a prior learns; None for a training on images. Raises ValueError for a data set that
        the training can't learn from."""
        return self.network.model_dump(mode="json", exclude={"kind"} | self.network.unchanged())

    def discriminator_arguments(self, dataset_info: DatasetInfo = IMAGES) -> dict[str, Any] | None:
        """Arguments of the network trained against the stored network; None without a discriminator."""
        return None

    def settings(self, classes: tuple[str, ...], grid: TokenGrid | None = None) -> dict[str, Any]:
        """Facts of the training for a sampler, plain values, stored with the model."""
        raise NotImplementedError


class AdversarialOptimization(OptimizationConfig):
    """Optimization of an autoencoder and a discriminator."""

    betas: tuple[float, float] = (0.5, 0.9)  # of both optimizers; a GAN wants little momentum
    ema: Literal["exponential"] = "exponential"  # codebooks can't be combined afterwards


class GANOptimization(OptimizationConfig):
    """Optimization of a generator and a discriminator."""

    betas: tuple[float, float] = (0.0, 0.9)  # of both optimizers; a GAN wants no momentum
    ema: Literal["exponential"] = "exponential"  # statistics of batch norms can't be combined afterwards
    ema_decay: float = Field(0.999, gt=0, lt=1)  # of the generator; what samples is always the average
    can_recompute = False
    gradient_checkpointing: Literal[False] = False  # a second pass has other weights
    max_loss_factor: Annotated[float | None, Unkeyed()] = Field(None, gt=1)  # the loss is that of a contest
    discriminator_learning_rate: float = Field(gt=0)  # learning_rate is the generator's
    discriminator_steps: int = Field(1, ge=1)  # in each step, on equal parts of the batch

    @property
    def equal_parts(self) -> int:
        """Number of discriminator steps: each takes an equal part of the worker's samples."""
        return self.discriminator_steps

    def _check(self) -> None:
        super()._check()
        batch, steps = self.global_batch_size, self.discriminator_steps
        refuse(batch % steps, f"global_batch_size {batch} must be a multiple of discriminator_steps {steps}")


class ClassifierOptimization(OptimizationConfig):
    """Optimization of a classifier."""

    weight_decay: float = Field(0.05, ge=0)
