"""Training of a diffusion model: base, upsampler (`low_res`), or image-to-image (`degradation`)."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from components.configuration.conditions import IMAGES, DatasetInfo, DiffusionConditions, TokenGrid
from components.configuration.config import Config
from components.configuration.networks import DiffusionNetwork, ImageAttentionUNetConfig, UNetSizes
from components.configuration.optimization import Training, TrainingNeeds
from components.configuration.processes import DiscreteProcess, Process
from components.models.diffusion.betas import ScheduleName

DegradationTask = Literal["inpainting", "uncropping", "colorization", "jpeg", "super_resolution"]
TASKS: tuple[DegradationTask, ...] = ("inpainting", "uncropping", "colorization", "jpeg", "super_resolution")


class DiffusionData(Config):
    """Size and channels of the images or latents of a diffusion training."""

    resolution: int = Field(ge=4)  # pixels, or sides of latents
    in_channels: int = Field(3, ge=1)  # and out; 1: gray images; else other than 3 where the image is a latent
    crop_size: int | None = Field(None, ge=4)  # pixels of the window that a step sees; None: whole images


class LowResConfig(Config):
    """The smaller input image of an upsampler, noised in training (Ho et al., 2022, section 4.2)."""

    low_res_resolution: int = Field(ge=4)  # pixels
    max_noise_level: int = Field(500, ge=0)  # in noising steps of 0 to augmentation_steps; each sample draws its own
    augmentation_schedule: ScheduleName = "cosine"
    augmentation_steps: int = Field(1000, ge=1)

    @model_validator(mode="after")
    def _level_exists(self) -> Self:
        if self.max_noise_level >= self.augmentation_steps:
            raise ValueError(f"max_noise_level must be below augmentation_steps {self.augmentation_steps}")
        return self


class DegradationConfig(Config):
    """Degradations that an image-to-image model learns to undo (Palette; Saharia et al., 2022)."""

    tasks: tuple[DegradationTask, ...] = TASKS  # each sample draws one, each alike; the network is not told which
    jpeg_qualities: tuple[int, int] = (5, 30)  # lowest and highest, drawn alike
    mask_area: tuple[float, float] = (0.1, 0.5)  # least and greatest share that rectangles and borders hide
    super_resolution_factors: tuple[int, ...] = (2, 4)  # one is drawn

    @model_validator(mode="after")
    def _degradations_exist(self) -> Self:
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks must name at least one task, each once, not {self.tasks}")
        lowest, highest = self.jpeg_qualities
        if not 1 <= lowest <= highest <= 95:
            raise ValueError(f"jpeg_qualities must be lowest and highest within [1, 95], not {self.jpeg_qualities}")
        least, greatest = self.mask_area
        if not 0 < least <= greatest < 1:
            raise ValueError(f"mask_area must be least and greatest share inside (0, 1), not {self.mask_area}")
        if "super_resolution" in self.tasks and not self.super_resolution_factors:
            raise ValueError("super_resolution needs super_resolution_factors, as (2, 4)")
        return self


class DiffusionTraining(Training):
    """Network, process and data of a diffusion model.

    Text-guided inpainting (GLIDE; Nichol et al., 2022) is conditions ("text",) and tasks ("inpainting",).
    """

    stage_version = 3  # windows are cut before noise is drawn

    network: DiffusionNetwork
    process: Process = DiscreteProcess()
    conditioning: DiffusionConditions = DiffusionConditions()
    low_res: LowResConfig | None = None
    degradation: DegradationConfig | None = None
    data: DiffusionData

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
        return (
            super().network_arguments(dataset_info, grid)
            | windows
            | {
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
        )

    def settings(self, classes: tuple[str, ...], grid: TokenGrid | None = None) -> dict[str, Any]:
        """Role, resolution, objective and classes, with the settings of `low_res` or `degradation`."""
        del grid
        settings: dict[str, Any] = {
            "role": "base",
            "resolution": self.data.resolution,
            "objective": self.process.objective(),
            "classes": list(classes),
        }
        if self.conditioning.condition_member is not None:
            settings["condition_member"] = self.conditioning.condition_member
        if self.low_res is not None:
            settings |= {"role": "upsampler", **self.low_res.model_dump()}
        if self.degradation is not None:
            degradation = self.degradation.model_dump(mode="json", exclude={"jpeg_qualities"})
            settings |= {"role": "image_to_image", **degradation}
        return settings

    @model_validator(mode="after")
    def _condition_image_is_named(self) -> Self:
        conditioning = self.conditioning
        if ("condition_image" in conditioning.conditions) != (conditioning.condition_member is not None):
            raise ValueError("condition_image among the conditions needs condition_member, image, depth or mask")
        class_token_dim = self.network.class_token_dim if isinstance(self.network, UNetSizes) else None
        if class_token_dim is not None and "label" not in conditioning.conditions:
            raise ValueError("class_token_dim needs label among the conditions")
        if isinstance(self.network, ImageAttentionUNetConfig):
            if "condition_image" not in conditioning.conditions:
                raise ValueError("network image_attention_unet needs condition_image among the conditions")
            if self.data.resolution % self.network.image_patch_size:
                raise ValueError(f"image_patch_size {self.network.image_patch_size} must divide {self.data.resolution}")
        return self

    @model_validator(mode="after")
    def _windows_fit(self) -> Self:
        size, network = self.data.crop_size, self.network
        if size is None:
            return self
        if not isinstance(network, UNetSizes) or network.attention_resolutions:
            raise ValueError("crop_size needs a unet with attention_resolutions (): attention sees the whole image")
        halvings = len(network.channel_mult) - 1
        if size >= self.data.resolution or size % 2**halvings:
            raise ValueError(
                f"crop_size {size} must be below resolution {self.data.resolution} and halve {halvings} times"
            )
        return self

    @model_validator(mode="after")
    def _low_res_is_smaller(self) -> Self:
        if self.low_res is not None and self.low_res.low_res_resolution >= self.data.resolution:
            raise ValueError(
                f"low_res_resolution {self.low_res.low_res_resolution} must be below {self.data.resolution}"
            )
        return self

    @model_validator(mode="after")
    def _given_images_have_colors(self) -> Self:
        if self.data.in_channels != 3 and (self.low_res is not None or self.degradation is not None):
            raise ValueError(
                f"in_channels must be 3 for a model that enlarges or restores images, not {self.data.in_channels}"
            )
        return self

    @model_validator(mode="after")
    def _one_image_is_given(self) -> Self:
        if self.degradation is None:
            return self
        if self.low_res is not None:
            raise ValueError("an image-to-image model takes no low_res: super_resolution is one of its tasks")
        if self.conditioning.condition_member is not None:
            raise ValueError("an image-to-image model is given the degraded image and its mask, and no other image")
        if getattr(self.process, "loss", "simple") != "simple" or self.data.crop_size is not None:
            raise ValueError("an image-to-image model learns from masks: loss must be simple, and crop_size None")
        for factor in self.degradation.super_resolution_factors:
            if factor < 2 or self.data.resolution % factor:
                raise ValueError(
                    f"super_resolution_factors: {factor} must be at least 2 and divide {self.data.resolution}"
                )
        return self
