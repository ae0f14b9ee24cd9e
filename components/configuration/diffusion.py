"""Noise and training of a diffusion model: base, upsampler (`low_res`), or image-to-image."""

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field

from components.configuration.conditions import IMAGES, DatasetInfo, DiffusionConditions, TokenGrid
from components.configuration.config import Config, Since, refuse
from components.configuration.networks import DiffusionNetwork, ImageAttentionUNetConfig, UNetSizes
from components.configuration.optimization import Training, TrainingNeeds
from components.models.diffusion.betas import SCHEDULES, ScheduleName, check_ends

DegradationTask = Literal["inpainting", "uncropping", "colorization", "jpeg", "super_resolution"]
TASKS: tuple[DegradationTask, ...] = get_args(DegradationTask)


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


class DiffusionData(Config):
    """Size and channels of the images or latents of a diffusion training."""

    resolution: int = Field(ge=4)  # pixels, or sides of latents
    in_channels: int = Field(3, ge=1)  # and out; 1: gray images; others: latents
    crop_size: int | None = Field(None, ge=4)  # pixels of the window that a step sees; None: whole images


class LowResConfig(Config):
    """The smaller input image of an upsampler, noised in training (Ho et al., 2022, section 4.2)."""

    low_res_resolution: int = Field(ge=4)  # pixels
    max_noise_level: int = Field(500, ge=0)  # noising steps, below augmentation_steps; drawn by sample
    augmentation_schedule: ScheduleName = "cosine"
    augmentation_steps: int = Field(1000, ge=1)

    def _check(self) -> None:
        steps = self.augmentation_steps
        refuse(self.max_noise_level >= steps, f"max_noise_level must be below augmentation_steps {steps}")


class DegradationConfig(Config):
    """Degradations that an image-to-image model learns to undo (Palette; Saharia et al., 2022)."""

    tasks: tuple[DegradationTask, ...] = TASKS  # each sample draws one; the network is not told which
    jpeg_qualities: tuple[int, int] = (5, 30)  # lowest and highest, drawn alike
    mask_area: tuple[float, float] = (0.1, 0.5)  # least and greatest hidden share
    super_resolution_factors: tuple[int, ...] = (2, 4)  # one is drawn

    def _check(self) -> None:
        tasks, (lowest, highest), (least, most) = self.tasks, self.jpeg_qualities, self.mask_area
        refuse(not tasks or len(set(tasks)) < len(tasks), f"tasks must name at least one task, each once, not {tasks}")
        wrong = not 1 <= lowest <= highest <= 95
        refuse(wrong, f"jpeg_qualities must be lowest and highest within [1, 95], not {self.jpeg_qualities}")
        wrong = not 0 < least <= most < 1
        refuse(wrong, f"mask_area must be least and greatest share inside (0, 1), not {self.mask_area}")
        lacking = "super_resolution" in tasks and not self.super_resolution_factors
        refuse(lacking, "super_resolution needs super_resolution_factors, as (2, 4)")


class DiffusionTraining(Training):
    """Network, process and data of a diffusion model.
    Text-guided inpainting (GLIDE; Nichol et al., 2022) is conditions ("text",) and tasks ("inpainting",)."""

    stage_version = 3  # windows are cut before noise is drawn

    network: DiffusionNetwork
    process: Process = DiscreteProcess()
    conditioning: DiffusionConditions = DiffusionConditions()
    low_res: LowResConfig | None = None
    degradation: DegradationConfig | None = None
    data: DiffusionData

    @property
    def places_tokens(self) -> bool:
        """True where attention sees other tokens beside the patches of an image."""
        words = {"text", "text_states"} & {*self.conditioning.conditions}
        return isinstance(self.network, ImageAttentionUNetConfig) and bool(words or self.network.class_token_dim)

    @property
    def revision(self) -> dict[str, str]:
        """Such tokens lay at the first patch before."""
        return {"other_tokens": "nowhere"} if self.places_tokens else {}

    @property
    def image_channels(self) -> int:
        """Channels of the image concatenated to x_t: a condition image, or a degraded image and a mask."""
        if self.degradation is not None:
            return 4
        return 3 if "condition_image" in self.conditioning.conditions else 0

    def needs(self) -> TrainingNeeds:
        degradation = self.degradation
        return TrainingNeeds(
            self.data.resolution,
            condition_member=self.conditioning.condition_member,
            degradations=() if degradation is None else degradation.tasks,
            jpeg_qualities=(5, 30) if degradation is None else degradation.jpeg_qualities,
            channels=self.data.in_channels,
            columns=self.conditioning.conditions,
            captions="text" in self.conditioning.conditions,
        )

    def network_arguments(self, dataset_info: DatasetInfo = IMAGES, grid: TokenGrid | None = None) -> dict[str, Any]:
        """Arguments of a U-Net or DiT, with embeddings only for labels that drop and for noise levels."""
        conditioning, data, low_res = self.conditioning, self.data, self.low_res
        text = conditioning.text.arguments(dataset_info) if "text" in conditioning.conditions else None
        sizes = {"text_states": dataset_info.text_states_dim, "image_embedding": dataset_info.image_embedding_dim}
        encoded = {name: size for name, size in sizes.items() if name in conditioning.conditions}
        windows = {"middle_attention": data.crop_size is None} if isinstance(self.network, UNetSizes) else {}
        windows |= {"others_nowhere": True} if self.places_tokens else {}
        return super().network_arguments(dataset_info, grid) | {
            **windows,
            "resolution": data.resolution,
            "in_channels": data.in_channels,
            "out_channels": data.in_channels,
            "learned_variance": getattr(self.process, "variance", None) == "learned_range",
            "num_classes": conditioning.num_classes(dataset_info),
            "null_label": conditioning.cond_drop_prob > 0,
            "text": text,
            "text_states_dim": conditioning.text_states_dim or encoded.get("text_states"),
            "image_embedding_dim": conditioning.image_embedding_dim or encoded.get("image_embedding"),
            "condition_image_channels": self.image_channels,
            "low_res": low_res is not None,
            "embed_noise_level": low_res is None or low_res.max_noise_level > 0,
        }

    def settings(self, classes: tuple[str, ...], grid: TokenGrid | None = None) -> dict[str, Any]:
        """Role, resolution, objective and classes, with the settings of `low_res` or `degradation`."""
        settings: dict[str, Any] = {"role": "base", "resolution": self.data.resolution}
        settings |= {"objective": self.process.objective(), "classes": list(classes)}
        if self.conditioning.condition_member is not None:
            settings["condition_member"] = self.conditioning.condition_member
        if self.low_res is not None:
            settings |= {"role": "upsampler", **self.low_res.model_dump()}
        if self.degradation is not None:
            degradation = self.degradation.model_dump(mode="json", exclude={"jpeg_qualities"})
            settings |= {"role": "image_to_image", **degradation}
        return settings

    def _check(self) -> None:
        network, data, low_res, process = self.network, self.data, self.low_res, self.process
        conditions, member, size = self.conditioning.conditions, self.conditioning.condition_member, data.crop_size
        unnamed = ("condition_image" in conditions) != (member is not None)
        refuse(unnamed, "condition_image among the conditions needs condition_member, image, depth or mask")
        if isinstance(network, UNetSizes) and network.class_token_dim is not None:
            refuse("label" not in conditions, "class_token_dim needs label among the conditions")
        if isinstance(network, ImageAttentionUNetConfig):
            alone, patch = "condition_image" not in conditions, network.image_patch_size
            refuse(alone, "network image_attention_unet needs condition_image among the conditions")
            refuse(data.resolution % patch, f"image_patch_size {patch} must divide {data.resolution}")
        if size is not None:
            if not isinstance(network, UNetSizes) or network.attention_resolutions:
                raise ValueError("crop_size needs a unet with attention_resolutions (): attention sees the whole image")
            halvings = len(network.channel_mult) - 1
            fits = size < data.resolution and size % 2**halvings == 0
            refuse(not fits, f"crop_size {size} must be below resolution {data.resolution} and halve {halvings} times")
        if low_res is not None:
            side = low_res.low_res_resolution
            refuse(side >= data.resolution, f"low_res_resolution {side} must be below {data.resolution}")
        if low_res is not None or self.degradation is not None:
            wanted = f"in_channels must be 3 for a model that enlarges or restores images, not {data.in_channels}"
            refuse(data.in_channels != 3, wanted)
        if self.degradation is None:
            return
        refuse(low_res is not None, "an image-to-image model takes no low_res: super_resolution is one of its tasks")
        given = member is not None
        refuse(given, "an image-to-image model is given the degraded image and its mask, and no other image")
        masked = getattr(process, "loss", "simple") == "simple" and size is None
        refuse(not masked, "an image-to-image model learns from masks: loss must be simple, and crop_size None")
        for factor in self.degradation.super_resolution_factors:
            fault = f"super_resolution_factors: {factor} must be at least 2 and divide {data.resolution}"
            refuse(factor < 2 or data.resolution % factor, fault)
