"""The shape of a recipe: every number that decides the result, and the facts that several stages share, checked."""

from typing import Literal, Self

from pydantic import model_validator

from components.configuration.config import Config
from components.configuration.diffusion import DiffusionTraining
from components.configuration.sampling import CascadeSampling
from components.configuration.trainings import AutoencoderTraining, PriorTraining
from components.stages.evaluate import EvaluationConfig
from components.stages.images import ImagesConfig
from components.stages.samples import SamplesConfig
from components.stages.tokens import TokensConfig
from pipelines.recipes.checks import check_cascade


class CascadeRecipe(Config):
    """The whole cascade. `cascade show NAME` prints it; an edited copy runs with `--recipe my.yaml`."""

    workflow: Literal["full_cascade"] = "full_cascade"
    name: str
    images: ImagesConfig
    tokenizer: AutoencoderTraining
    tokens: TokensConfig = TokensConfig()
    prior: PriorTraining
    base: DiffusionTraining
    upsamplers: tuple[DiffusionTraining, ...]
    sampling: CascadeSampling = CascadeSampling()
    samples: SamplesConfig
    evaluation: EvaluationConfig

    @model_validator(mode="after")
    def _stages_fit(self) -> Self:
        made = check_cascade(self.base, self.upsamplers, self.sampling, made=self.base.data.resolution)
        largest = max(made, self.tokenizer.data.resolution)
        if self.images.resolution < largest:
            raise ValueError(f"images.resolution {self.images.resolution} is below {largest}, which a model makes")
        return self
