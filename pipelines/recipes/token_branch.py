"""The shape of a recipe of the discrete branch alone."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from components.configuration import Config
from components.stages.cascade import CascadeConfig
from components.stages.evaluate import EvaluationConfig
from components.stages.images import ImagesConfig
from components.stages.samples import SamplesConfig
from components.stages.tokens import TokensConfig
from components.training.config import AutoencoderConfig, MaskedPriorConfig, PixelConfig, PriorConfig


class ConditionRecipe(Config):
    """Another image of each sample (its depth map, or itself, smaller) as tokens in front of the prior's sequence."""

    tokenizer: AutoencoderConfig
    tokens: TokensConfig = TokensConfig()

    @model_validator(mode="after")
    def _same_member(self) -> Self:
        if self.tokens.member != self.tokenizer.member:
            raise ValueError(f"tokens.member {self.tokens.member} must be tokenizer.member {self.tokenizer.member}")
        return self


class TokenBranchRecipe(Config):
    """A tokenizer, and a prior of any kind over its tokens."""

    workflow: Literal["token_branch"] = "token_branch"
    name: str
    images: ImagesConfig
    tokenizer: AutoencoderConfig
    tokens: TokensConfig = TokensConfig()
    condition: ConditionRecipe | None = None
    prior: Annotated[PriorConfig | MaskedPriorConfig | PixelConfig, Field(discriminator="network")]
    cascade: CascadeConfig = CascadeConfig()
    samples: SamplesConfig
    evaluation: EvaluationConfig

    @model_validator(mode="after")
    def _stages_fit(self) -> Self:
        if self.tokenizer.bottleneck == "gaussian":
            raise ValueError("tokenizer.bottleneck gaussian makes no tokens; choose vq_ema, vq, gumbel or fsq")
        if self.images.resolution < self.tokenizer.resolution:
            raise ValueError(f"images.resolution must be at least tokenizer.resolution {self.tokenizer.resolution}")
        if (self.condition is None) == ("condition" in self.prior.conditions):
            asks = "asks for one" if self.condition is None else f"is only {list(self.prior.conditions)}"
            raise ValueError(
                f"condition is {'missing' if self.condition is None else 'given'}, prior.conditions {asks}"
            )
        side = self.tokenizer.resolution // 2 ** (len(self.tokenizer.channel_mult) - 1)
        if isinstance(self.prior, MaskedPriorConfig) and self.prior.num_inference_steps > side**2:
            raise ValueError(f"prior.num_inference_steps must be at most {side**2}, the tokens of an image")
        if isinstance(self.prior, PixelConfig) and self.prior.resolution is not None:
            raise ValueError("prior.resolution must be empty: the grid of the tokens decides")
        return self
