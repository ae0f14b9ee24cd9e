"""The shape of a recipe: every number that decides the result, and the facts that several stages share, checked."""

from typing import Literal, Self

from pydantic import model_validator

from components.configuration import Config
from components.stages.cascade import CascadeConfig
from components.stages.evaluate import EvaluationConfig
from components.stages.images import ImagesConfig
from components.stages.samples import SamplesConfig
from components.stages.tokens import TokensConfig
from components.training.config import AutoencoderConfig, DiffusionConfig, PriorConfig


class CascadeRecipe(Config):
    """The whole cascade. `cascade show NAME` prints it; an edited copy runs with `--recipe my.yaml`."""

    workflow: Literal["full_cascade"] = "full_cascade"
    name: str
    images: ImagesConfig
    tokenizer: AutoencoderConfig
    tokens: TokensConfig = TokensConfig()
    prior: PriorConfig
    base: DiffusionConfig
    upsamplers: tuple[DiffusionConfig, ...]
    cascade: CascadeConfig = CascadeConfig()
    samples: SamplesConfig
    evaluation: EvaluationConfig

    @model_validator(mode="after")
    def _stages_fit(self) -> Self:
        if self.base.low_res_resolution is not None:
            raise ValueError("base.low_res_resolution must be empty: the base model starts from noise alone")
        made = self.base.resolution
        for number, upsampler in enumerate(self.upsamplers):
            if upsampler.low_res_resolution != made:
                raise ValueError(
                    f"upsamplers.{number}.low_res_resolution must be {made}, what the stage before it makes"
                )
            made = upsampler.resolution
        largest = max(made, self.tokenizer.resolution)
        if self.images.resolution < largest:
            raise ValueError(f"images.resolution {self.images.resolution} is below {largest}, which a model makes")
        return self
