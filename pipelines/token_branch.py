"""The discrete branch alone: a tokenizer, a prior over its tokens, and images of both."""

from typing import Any, Literal, Self

from pydantic import model_validator

from components.configuration.config import Config
from components.configuration.sampling import MaskedTokenSampling, TokenBranchSampling, TransformerSampling
from components.configuration.trainings import (
    AnyPrior,
    AutoencoderTraining,
    ContrastiveTraining,
    MaskedPriorTraining,
    PixelTraining,
    PriorTraining,
)
from components.stages.autoencoder import train_autoencoder
from components.stages.cascade import compose_cascade
from components.stages.contrastive import train_contrastive
from components.stages.evaluate import EvaluationConfig, evaluate
from components.stages.images import ImagesConfig, images_identity, ingest_images
from components.stages.prior import train_prior
from components.stages.samples import SamplesConfig, sample_generators
from components.stages.tokens import TokensConfig, tokenize_images
from pipelines.workflow import Stage, Workflow


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
    reranker: ContrastiveTraining | None = None  # chooses among the images of a prompt
    sampling: TokenBranchSampling = TokenBranchSampling()
    samples: SamplesConfig
    evaluation: EvaluationConfig

    @model_validator(mode="after")
    def _stages_fit(self) -> Self:
        if self.tokenizer.network.bottleneck.kind == "gaussian":
            raise ValueError("tokenizer.bottleneck gaussian makes no tokens; choose vq_ema, vq, gumbel or fsq")
        resolution, conditions = self.tokenizer.data.resolution, self.prior.conditioning.conditions
        if self.reranker is not None and self.reranker.data.resolution > resolution:
            raise ValueError(f"reranker.resolution must be at most tokenizer.resolution {resolution}")
        if self.reranker is None and self.sampling.reranker is not None:
            raise ValueError("sampling.reranker is given, reranker is missing: there is nothing to choose by")
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
        if isinstance(sampling, TransformerSampling) and not isinstance(self.prior, PriorTraining):
            raise ValueError("sampling.prior takes no compile_decoding: only a transformer is decoded so")
        if isinstance(sampling, MaskedTokenSampling) and sampling.num_inference_steps > side**2:
            raise ValueError(f"sampling.prior.num_inference_steps must be at most {side**2}, the tokens of an image")
        if isinstance(self.prior, PixelTraining) and self.prior.data.resolution is not None:
            raise ValueError("prior.resolution must be empty: the grid of the tokens decides")
        return self


def token_branch(recipe: TokenBranchRecipe) -> Workflow:
    """Images to tokens and a prior over them; tokens of a condition stand in front of the prior's sequence."""
    images = Stage("images", ingest_images, recipe.images, identity=images_identity)
    tokenizer = Stage("tokenizer", train_autoencoder, recipe.tokenizer, images=images)
    tokens = Stage("tokens", tokenize_images, recipe.tokens, images=images, tokenizer=tokenizer)
    stages = [images, tokenizer, tokens]
    inputs: dict[str, Any] = {"tokens": tokens, "tokenizer": tokenizer}
    parts: dict[str, Any] = {"tokenizer": tokenizer}

    if recipe.condition is not None:
        seen = Stage("condition_tokenizer", train_autoencoder, recipe.condition.tokenizer, images=images)
        condition = Stage("condition", tokenize_images, recipe.condition.tokens, images=images, tokenizer=seen)
        stages, inputs, parts = (
            [*stages, seen, condition],
            inputs | {"condition": condition},
            parts | {"condition": seen},
        )

    prior = Stage("prior", train_prior, recipe.prior, **inputs)
    if recipe.reranker is not None:
        parts["reranker"] = Stage("contrastive", train_contrastive, recipe.reranker, images=images)
        stages.append(parts["reranker"])
    cascade = Stage("cascade", compose_cascade, recipe.sampling, prior=prior, **parts)
    samples = Stage("samples", sample_generators, recipe.samples, images=images, cascade=cascade)
    evaluation = Stage("evaluation", evaluate, recipe.evaluation, images=images, tokenizer=tokenizer, samples=samples)
    return Workflow(recipe.name, [*stages, prior, cascade, samples, evaluation])
