"""Shapes of recipes with checks: the cascade, a token branch, a single model; shapes by workflow.

A check raises ValueError and names the field.
"""

from typing import Any, Literal, NamedTuple, Self

from pydantic import model_validator

from components.configuration.config import Config
from components.configuration.diffusion import DiffusionTraining
from components.configuration.families import family_of
from components.configuration.optimization import Training
from components.configuration.sampling import (
    CascadeSampling,
    DiffusionBranchSampling,
    DiffusionSampling,
    MaskedTokenSampling,
    OneModelSampling,
    TokenBranchSampling,
    TokenSampling,
    TransformerSampling,
)
from components.configuration.trainings import (
    AnyLoneModel,
    AnyPrior,
    AutoencoderTraining,
    ClassifierTraining,
    ContrastiveTraining,
    PriorTraining,
)
from components.evaluation.agreement import AgreementConfig
from components.stages.evaluate import EvaluationConfig
from components.stages.images import ImagesConfig
from components.stages.likelihood import LikelihoodConfig
from components.stages.samples import SamplesConfig
from components.stages.tokens import TokensConfig
from pipelines.recipes.diffusion_shapes import (
    DiffusionBranchRecipe,
    DiffusionStudiesRecipe,
    ImageToImageRecipe,
    check_cascade,
    check_channels,
)


class AgreementRecipe(Config):
    """Judges of finished images: a classifier for labels, a contrastive encoder for prompts."""

    judge: ClassifierTraining | None = None  # of clean images
    matcher: ContrastiveTraining | None = None
    measure: AgreementConfig = AgreementConfig()

    @model_validator(mode="after")
    def _somebody_judges_finished_images(self) -> Self:
        if self.judge is None and self.matcher is None:
            raise ValueError("judge and matcher are missing: agreement needs one of them")
        if self.judge is not None and self.judge.noisy:
            raise ValueError("judge.noisy must be false: it judges finished images")
        return self

    def check_size(self, side: int) -> None:
        """Raise ValueError for a network of images larger than the finished images, `side` pixels wide."""
        for name in ("judge", "matcher"):
            model = getattr(self, name)
            if model is not None and model.data.resolution > side:
                raise ValueError(f"agreement.{name}.data.resolution must be at most {side}, what is made")


class CascadeRecipe(Config):
    """The whole cascade; `cascade show NAME` prints a recipe, `--recipe my.yaml` runs an edited copy."""

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
    agreement: AgreementRecipe | None = None  # whether labels and prompts do anything

    @model_validator(mode="after")
    def _stages_fit(self) -> Self:
        check_channels(self.base, self.upsamplers)
        side = check_cascade(self.base, self.upsamplers, self.sampling)
        largest = max(side, self.tokenizer.data.resolution)
        if self.images.resolution < largest:
            raise ValueError(f"images.resolution {self.images.resolution} is below {largest}, which a model makes")
        if self.agreement is not None:
            self.agreement.check_size(min(side, self.tokenizer.data.resolution))
        return self


class ConditionRecipe(Config):
    """Another image of a sample, such as a depth map, as tokens in front of the prior's sequence."""

    tokenizer: AutoencoderTraining
    tokens: TokensConfig = TokensConfig()

    @model_validator(mode="after")
    def _same_member(self) -> Self:
        if self.tokens.member != (member := self.tokenizer.data.member):
            raise ValueError(f"tokens.member {self.tokens.member} must be tokenizer.member {member}")
        return self


class TokenBranchRecipe(Config):
    """A tokenizer, and a prior of any kind over the tokens."""

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
        if not self.tokenizer.has_codes:
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
        own = family_of(self.prior.network.kind).sampling
        if isinstance(sampling, MaskedTokenSampling) and own is not MaskedTokenSampling:
            raise ValueError("sampling.prior takes no num_inference_steps: only a masked_transformer draws in steps")
        if isinstance(sampling, TransformerSampling) and own is not TransformerSampling:
            raise ValueError("sampling.prior takes no compile_decoding: only a transformer is decoded so")
        if isinstance(sampling, MaskedTokenSampling) and sampling.num_inference_steps > side**2:
            raise ValueError(f"sampling.prior.num_inference_steps must be at most {side**2}, the tokens of an image")
        if self.prior.needs().resolution is not None:
            raise ValueError("prior.resolution must be empty: the grid of the tokens decides")
        return self


class OneModelRecipe(Config):
    """An autoencoder, a PixelCNN, a PixelRNN or a GAN."""

    workflow: Literal["one_model"] = "one_model"
    name: str
    images: ImagesConfig
    model: AnyLoneModel
    sampling: OneModelSampling = OneModelSampling()
    samples: SamplesConfig | None = None  # None: an autoencoder of which nothing is drawn
    likelihood: LikelihoodConfig | None = None  # exact of a PixelCNN or PixelRNN, a bound of a VAE
    evaluation: EvaluationConfig

    @property
    def drawn(self) -> SamplesConfig | None:
        """Settings of the samples; None for an autoencoder with codes: only a token branch draws codes."""
        return None if self.model.has_codes else self.samples

    @model_validator(mode="after")
    def _images_are_large_enough(self) -> Self:
        side = self.model.data.resolution
        if side is None:
            raise ValueError("model.resolution is missing: a model of images needs it")
        if self.images.resolution < side:
            raise ValueError(f"images.resolution must be at least model.resolution {side}")
        return self

    @model_validator(mode="after")
    def _a_generator_is_sampled(self) -> Self:
        kind = self.model.network.kind
        if self.samples is None and not family_of(kind).reconstructs:
            raise ValueError(f"samples is missing: a {kind} is known by the images that it makes")
        return self

    @model_validator(mode="after")
    def _the_model_has_a_likelihood(self) -> Self:
        if self.likelihood is None:
            return self
        self.model.check_likelihood()
        if self.likelihood.timesteps_per_image is not None:
            raise ValueError("likelihood.timesteps_per_image must be empty: only diffusion has timesteps")
        return self

    @model_validator(mode="after")
    def _sampling_is_its_own(self) -> Self:
        sampling, kind = self.sampling.model, self.model.network.kind
        own = family_of(kind).sampling
        if sampling is None or type(sampling) is own:
            return self
        if own is None:
            raise ValueError(f"sampling.model must be empty: a {kind} leaves nothing to choose")
        raise ValueError(f"sampling.model: a {kind} takes {', '.join(own.model_fields)}")


Recipe = (
    CascadeRecipe
    | TokenBranchRecipe
    | OneModelRecipe
    | DiffusionBranchRecipe
    | ImageToImageRecipe
    | DiffusionStudiesRecipe
)
SHAPES: dict[str, type[Recipe]] = {
    "full_cascade": CascadeRecipe,
    "token_branch": TokenBranchRecipe,
    "one_model": OneModelRecipe,
    "diffusion_branch": DiffusionBranchRecipe,
    "image_to_image": ImageToImageRecipe,
    "diffusion_studies": DiffusionStudiesRecipe,
}


class SharedParts(NamedTuple):
    """Images, samples and measures shared by recipes; the methods add a system's trainings."""

    images: ImagesConfig
    samples: SamplesConfig
    evaluation: EvaluationConfig

    def one_model(self, name: str, model: Training, **parts: Any) -> OneModelRecipe:
        """A recipe of a single model of images."""
        return OneModelRecipe(
            name=name, images=self.images, model=model, samples=self.samples, evaluation=self.evaluation, **parts
        )

    def token_branch(
        self, name: str, tokenizer: AutoencoderTraining, prior: Training, sampling: TokenSampling, **parts: Any
    ) -> TokenBranchRecipe:
        """A recipe of a tokenizer and a prior over the tokens."""
        return TokenBranchRecipe(
            name=name,
            images=self.images,
            tokenizer=tokenizer,
            prior=prior,
            sampling=TokenBranchSampling(prior=sampling),
            samples=self.samples,
            evaluation=self.evaluation,
            **parts,
        )

    def branch(
        self, name: str, base: DiffusionTraining, sampling: DiffusionSampling | DiffusionBranchSampling, **parts: Any
    ) -> DiffusionBranchRecipe:
        """A recipe of a diffusion model and models around the base; `sampling` is of the base, or of all."""
        return DiffusionBranchRecipe(
            name=name,
            images=self.images,
            base=base,
            sampling=DiffusionBranchSampling(base=sampling) if isinstance(sampling, DiffusionSampling) else sampling,
            samples=self.samples,
            evaluation=self.evaluation,
            **parts,
        )

    def studies(
        self, name: str, base: DiffusionTraining, sampling: DiffusionSampling | None = None, **parts: Any
    ) -> DiffusionStudiesRecipe:
        """A recipe of a diffusion model and studies."""
        return DiffusionStudiesRecipe(
            name=name,
            images=self.images,
            base=base,
            sampling=DiffusionBranchSampling(base=sampling or DiffusionSampling()),
            samples=self.samples,
            evaluation=self.evaluation,
            **parts,
        )
