"""Shapes of recipes with checks: the cascade, a token branch, a single model; shapes by workflow.
A check raises ValueError and names the field."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from components.configuration import trainings
from components.configuration.config import Config, refuse
from components.configuration.diffusion import DiffusionTraining
from components.configuration.families import family_of
from components.configuration.optimization import Training
from components.configuration.sampling import (
    CascadeSampling,
    DiffusionBranchSampling,
    DiffusionSampling,
    MaskedTokenSampling,
    OneModelSampling,
    RerankerSampling,
    TokenBranchSampling,
    TokenSampling,
    TransformerSampling,
)
from components.evaluation.agreement import AgreementConfig
from components.evaluation.codes_study import CodesStudyConfig
from components.evaluation.likelihood_study import LikelihoodConfig
from components.stages.evaluate import EvaluationConfig
from components.stages.images import ImagesConfig
from components.stages.samples import SamplesConfig
from components.stages.tokens import TokensConfig
from pipelines.recipes.diffusion_shapes import (
    DiffusionBranchRecipe,
    DiffusionStudiesRecipe,
    ImageToImageRecipe,
    ObedienceRecipe,
    RecipeOfImages,
    check_cascade,
    check_channels,
    check_null,
)


class AgreementRecipe(Config):
    """Judges of finished images: a classifier for labels, a contrastive encoder for prompts."""

    judge: trainings.ClassifierTraining | None = None  # of clean images
    matcher: trainings.ContrastiveTraining | None = None
    measure: AgreementConfig = AgreementConfig()

    def _check(self) -> None:
        refuse(not (self.judge or self.matcher), "judge and matcher are missing: agreement needs one of them")
        refuse(self.judge is not None and self.judge.noisy, "judge.noisy must be false: it judges finished images")


class CascadeRecipe(RecipeOfImages):
    """The whole cascade; `cascade show NAME` prints a recipe, `--recipe my.yaml` runs an edited copy."""

    workflow: Literal["full_cascade"] = "full_cascade"
    tokenizer: trainings.AutoencoderTraining
    tokens: TokensConfig = TokensConfig()
    prior: trainings.PriorTraining
    reranker: trainings.ContrastiveTraining | None = None  # chooses among the token branch's images of a prompt
    base: DiffusionTraining
    upsamplers: tuple[DiffusionTraining, ...]
    sampling: CascadeSampling = CascadeSampling()
    samples: SamplesConfig
    evaluation: EvaluationConfig
    agreement: AgreementRecipe | None = None  # whether labels and prompts do anything
    obedience: ObedienceRecipe | None = None  # to captions of scenes

    def _check(self) -> None:
        check_channels(self.base, self.upsamplers)
        side, tokenized = check_cascade(self.base, self.upsamplers, self.sampling), self.tokenizer.data.resolution
        self.check_images(max(side, tokenized), "the largest that a model makes")
        check_reranker(self.reranker, self.sampling.reranker, tokenized)
        check_null("sampling.prior", self.sampling.prior, self.prior)
        made = min(side, tokenized)
        self.check_obedience(self.obedience, self.base.conditioning.conditions, made)
        for name in ("judge", "matcher"):  # of images no larger than finished ones
            model = getattr(self.agreement, name, None)
            too_large = model is not None and model.data.resolution > made
            refuse(too_large, f"agreement.{name}.data.resolution must be at most {made}, what is made")


def check_reranker(
    training: trainings.ContrastiveTraining | None, sampling: RerankerSampling | None, resolution: int
) -> None:
    """Raises ValueError for sampling without a model, or a model of larger images than the tokens are of."""
    too_large = training is not None and training.data.resolution > resolution
    refuse(too_large, f"reranker.resolution must be at most tokenizer.resolution {resolution}")
    without = training is None and sampling is not None
    refuse(without, "sampling.reranker is given, reranker is missing: there is nothing to choose by")


class ConditionRecipe(Config):
    """Another image of a sample, such as a depth map, as tokens in front of the prior's sequence."""

    tokenizer: trainings.AutoencoderTraining
    tokens: TokensConfig = TokensConfig()

    def _check(self) -> None:
        own, member = self.tokens.member, self.tokenizer.data.member
        refuse(own != member, f"tokens.member {own} must be tokenizer.member {member}")


class TokenBranchRecipe(RecipeOfImages):
    """A tokenizer, and a prior of any kind over the tokens."""

    workflow: Literal["token_branch"] = "token_branch"
    tokenizer: trainings.AutoencoderTraining
    tokens: TokensConfig = TokensConfig()
    condition: ConditionRecipe | None = None
    prior: trainings.AnyPrior
    reranker: trainings.ContrastiveTraining | None = None  # chooses among the images of a prompt
    sampling: TokenBranchSampling = TokenBranchSampling()
    samples: SamplesConfig
    evaluation: EvaluationConfig
    obedience: ObedienceRecipe | None = None  # to captions of scenes

    def _check(self) -> None:
        fault = "tokenizer.bottleneck gaussian makes no tokens; choose vq_ema, vq, gumbel or fsq"
        refuse(not self.tokenizer.has_codes, fault)
        resolution, conditions = self.tokenizer.data.resolution, self.prior.conditioning.conditions
        check_reranker(self.reranker, self.sampling.reranker, resolution)
        self.check_images(resolution, "tokenizer.resolution")
        self.check_obedience(self.obedience, conditions, resolution)
        if (self.condition is None) == ("condition" in conditions):
            state, asks = (
                ("missing", "asks for one") if self.condition is None else ("given", f"is only {[*conditions]}")
            )
            raise ValueError(f"condition is {state}, prior.conditions {asks}")
        grid = self.prior.needs().resolution
        refuse(grid is not None, "prior.resolution must be empty: the grid of the tokens decides")
        sampling, own = self.sampling.prior, family_of(self.prior.network.kind).sampling
        check_null("sampling.prior", sampling, self.prior)
        tokens = (self.tokenizer.data.resolution // self.tokenizer.network.factor) ** 2
        if isinstance(sampling, MaskedTokenSampling):
            fault = "sampling.prior takes no num_inference_steps: only a masked_transformer draws in steps"
            refuse(own is not MaskedTokenSampling, fault)
            fault = f"sampling.prior.num_inference_steps must be at most {tokens}, the tokens of an image"
            refuse(sampling.num_inference_steps > tokens, fault)
        wrong = isinstance(sampling, TransformerSampling) and own is not TransformerSampling
        refuse(wrong, "sampling.prior takes no compile_decoding: only a transformer is decoded so")


class OneModelRecipe(RecipeOfImages):
    """An autoencoder, a PixelCNN, a PixelRNN or a GAN."""

    workflow: Literal["one_model"] = "one_model"
    model: trainings.AnyLoneModel
    sampling: OneModelSampling = OneModelSampling()
    samples: SamplesConfig | None = None  # None: an autoencoder of which nothing is drawn
    likelihood: LikelihoodConfig | None = None  # exact of a PixelCNN or PixelRNN, a bound of a VAE
    codes_study: CodesStudyConfig | None = None
    evaluation: EvaluationConfig

    @property
    def drawn(self) -> SamplesConfig | None:
        """Settings of the samples; None for an autoencoder with codes: only a token branch draws codes."""
        return None if self.model.has_codes else self.samples

    def _check(self) -> None:
        if (side := self.model.data.resolution) is None:
            raise ValueError("model.resolution is missing: a model of images needs it")
        self.check_images(side, "model.resolution")
        kind, sampling = self.model.network.kind, self.sampling.model
        family = family_of(kind)
        unknown = self.samples is None and not family.reconstructs
        refuse(unknown, f"samples is missing: a {kind} is known by the images that it makes")
        if self.likelihood is not None:
            self.model.check_likelihood()
            steps = self.likelihood.timesteps_per_image
            refuse(steps is not None, "likelihood.timesteps_per_image must be empty: only diffusion has timesteps")
        codeless = self.codes_study is not None and not self.model.has_codes
        refuse(codeless, f"codes_study must be empty: this {kind} has no codes")
        if hasattr(self.model, "conditioning"):
            check_null("sampling.model", sampling, self.model)
        if sampling is not None and type(sampling) is not family.sampling:
            if family.sampling is None:
                raise ValueError(f"sampling.model must be empty: a {kind} leaves nothing to choose")
            raise ValueError(f"sampling.model: a {kind} takes {', '.join(family.sampling.model_fields)}")


Recipe = (
    CascadeRecipe
    | TokenBranchRecipe
    | OneModelRecipe
    | DiffusionBranchRecipe
    | ImageToImageRecipe
    | DiffusionStudiesRecipe
)
SHAPES: dict[str, type[Recipe]] = {shape.model_fields["workflow"].default: shape for shape in get_args(Recipe)}


@dataclass(frozen=True)
class RecipeRow:
    """A recipe of the catalog; calling the row builds the recipe."""

    name: str
    summary: str  # of a recipe of the lecture: its row, a colon and the rest
    build: Callable[[str], Recipe]  # takes the name

    def __call__(self) -> Recipe:
        return self.build(self.name)


class SharedParts(NamedTuple):
    """Images, samples and measures shared by recipes; the methods add a system's trainings."""

    images: ImagesConfig
    samples: SamplesConfig
    evaluation: EvaluationConfig

    def one_model(self, name: str, model: Training, **parts: Any) -> OneModelRecipe:
        """A recipe of a single model of images."""
        return OneModelRecipe(name=name, model=model, **self._asdict() | parts)

    def token_branch(
        self,
        name: str,
        tokenizer: trainings.AutoencoderTraining,
        prior: Training,
        sampling: TokenSampling | TokenBranchSampling,
        **parts: Any,
    ) -> TokenBranchRecipe:
        """A recipe of a tokenizer and a prior over the tokens; `sampling` is of the prior, or of all."""
        own = TokenBranchSampling(prior=sampling) if isinstance(sampling, TokenSampling) else sampling
        parts |= {"tokenizer": tokenizer, "prior": prior, "sampling": own}
        return TokenBranchRecipe(name=name, **self._asdict() | parts)

    def branch(
        self, name: str, base: DiffusionTraining, sampling: DiffusionSampling | DiffusionBranchSampling, **parts: Any
    ) -> DiffusionBranchRecipe:
        """A recipe of a diffusion model and models around the base; `sampling` is of the base, or of all."""
        own = DiffusionBranchSampling(base=sampling) if isinstance(sampling, DiffusionSampling) else sampling
        return DiffusionBranchRecipe(name=name, base=base, sampling=own, **self._asdict() | parts)

    def studies(
        self, name: str, base: DiffusionTraining, sampling: DiffusionSampling | None = None, **parts: Any
    ) -> DiffusionStudiesRecipe:
        """A recipe of a diffusion model and studies."""
        own = DiffusionBranchSampling(base=sampling or DiffusionSampling())
        return DiffusionStudiesRecipe(name=name, base=base, sampling=own, **self._asdict() | parts)
