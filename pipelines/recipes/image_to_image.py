"""The shape of a recipe of one model that works on images."""

from typing import Literal, Self

from pydantic import model_validator

from components.configuration import Config
from components.stages.cascade import CascadeConfig
from components.stages.images import ImagesConfig
from components.stages.restoration import RestorationConfig
from components.training.image_to_image_config import ImageToImageConfig


class ImageToImageRecipe(Config):
    """One model, and how well it restores held-out images."""

    workflow: Literal["image_to_image"] = "image_to_image"
    name: str
    images: ImagesConfig
    model: ImageToImageConfig
    cascade: CascadeConfig = CascadeConfig()
    restoration: RestorationConfig

    @model_validator(mode="after")
    def _images_are_large_enough(self) -> Self:
        if self.images.resolution < self.model.resolution:
            raise ValueError(f"images.resolution must be at least model.resolution {self.model.resolution}")
        if self.images.holdout_fraction == 0:
            raise ValueError("images.holdout_fraction must be above 0: held-out images are restored")
        return self
