"""The numbers of an image-to-image model (Palette; Saharia et al., 2022). No torch is imported here."""

from typing import Literal, Self

from pydantic import model_validator

from components.training.config import Condition, DiffusionConfig

DegradationTask = Literal["inpainting", "uncropping", "colorization", "jpeg", "super_resolution"]
TASKS: tuple[DegradationTask, ...] = ("inpainting", "uncropping", "colorization", "jpeg", "super_resolution")


class ImageToImageConfig(DiffusionConfig):
    """One model for several degradations; flat, as all configurations, so that recipes override its leaves.

    Text-guided inpainting (GLIDE; Nichol et al., 2022) is conditions ("text",) and tasks ("inpainting",).
    """

    conditions: tuple[Condition, ...] = ()  # besides the degraded image
    condition_image_channels: int = 4  # the degraded image and its mask
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
        return self

    @model_validator(mode="after")
    def _factors_fit(self) -> Self:
        for factor in self.super_resolution_factors:
            if factor < 2 or self.resolution % factor:
                raise ValueError(f"super_resolution_factors: {factor} must be at least 2 and divide {self.resolution}")
        if "super_resolution" in self.tasks and not self.super_resolution_factors:
            raise ValueError("super_resolution needs super_resolution_factors, as (2, 4)")
        return self

    @model_validator(mode="after")
    def _one_image_is_given(self) -> Self:
        if self.low_res_resolution is not None:
            raise ValueError("an image-to-image model takes no low_res: super_resolution is one of its tasks")
        if self.condition_member is not None or self.condition_image_channels != 4:
            raise ValueError("an image-to-image model is given the degraded image and its mask, and no other image")
        if self.loss != "simple" or self.crop_size is not None:
            raise ValueError("an image-to-image model learns from masks: loss must be simple, and crop_size None")
        return self
