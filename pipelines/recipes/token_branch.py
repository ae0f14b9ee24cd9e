"""The shape of a recipe of the discrete branch alone."""

from typing import Literal, Self

from pydantic import model_validator

from components.configuration.config import Config
from components.configuration.sampling import MaskedTokenSampling, TokenBranchSampling
from components.configuration.trainings import AnyPrior, AutoencoderTraining, MaskedPriorTraining, PixelTraining
from components.stages.evaluate import EvaluationConfig
from components.stages.images import ImagesConfig
from components.stages.samples import SamplesConfig
from components.stages.tokens import TokensConfig


class ConditionRecipe(Config):
    """Another image of each sample (its depth map, or itself, smaller) as tokens in front of the prior's sequence."""

    tokenizer: AutoencoderTraining
    tokens: TokensConfig = TokensConfig()

    @model_validator(mode="after")
    def _same_member(self) -> Self:
        if self.tokens.member != (member := self.tokenizer.data.member):
            raise ValueError(f"tokens.member {self.tokens.member} must be tokenizer.member {member}")
        return self


class TokenBranchRecipe(Config):
    """A tokenizer, and a prior of any kind over its tokens."""

    workflow: Literal["token_branch"] = "token_branch"
    name: str
    images: ImagesConfig
    tokenizer: AutoencoderTraining
    tokens: TokensConfig = TokensConfig()
    condition: ConditionRecipe | None = None
    prior: AnyPrior
    sampling: TokenBranchSampling = TokenBranchSampling()
    samples: SamplesConfig
    evaluation: EvaluationConfig

    @model_validator(mode="after")
    def _stages_fit(self) -> Self:
        if self.tokenizer.network.bottleneck == "gaussian":
            raise ValueError("tokenizer.bottleneck gaussian makes no tokens; choose vq_ema, vq, gumbel or fsq")
        resolution, conditions = self.tokenizer.data.resolution, self.prior.conditioning.conditions
        if self.images.resolution < resolution:
            raise ValueError(f"images.resolution must be at least tokenizer.resolution {resolution}")
        if (self.condition is None) == ("condition" in conditions):
            asks = "asks for one" if self.condition is None else f"is only {list(conditions)}"
            raise ValueError(
                f"condition is {'missing' if self.condition is None else 'given'}, prior.conditions {asks}"
            )
        side, sampling = resolution // self.tokenizer.network.factor, self.sampling.prior
        if isinstance(sampling, MaskedTokenSampling) and not isinstance(self.prior, MaskedPriorTraining):
            raise ValueError("sampling.prior takes no num_inference_steps: only a masked_transformer draws in steps")
        if isinstance(sampling, MaskedTokenSampling) and sampling.num_inference_steps > side**2:
            raise ValueError(f"sampling.prior.num_inference_steps must be at most {side**2}, the tokens of an image")
        if isinstance(self.prior, PixelTraining) and self.prior.data.resolution is not None:
            raise ValueError("prior.resolution must be empty: the grid of the tokens decides")
        return self
