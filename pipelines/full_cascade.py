"""The whole system on one screen, and the program that `ray job submit -- python pipelines/full_cascade.py` runs."""

from typing import Literal, Self

from pydantic import model_validator

from components.configuration.config import Config
from components.configuration.diffusion import DiffusionTraining
from components.configuration.sampling import CascadeSampling
from components.configuration.trainings import AutoencoderTraining, PriorTraining
from components.stages.autoencoder import train_autoencoder
from components.stages.cascade import compose_cascade
from components.stages.diffusion import train_diffusion
from components.stages.evaluate import EvaluationConfig, evaluate
from components.stages.images import ImagesConfig, images_identity, ingest_images
from components.stages.prior import train_prior
from components.stages.samples import SamplesConfig, sample_generators
from components.stages.tokens import TokensConfig, tokenize_images
from pipelines.agreement import AgreementRecipe, agreement_stages
from pipelines.recipes.checks import check_cascade, check_channels
from pipelines.workflow import Stage, Workflow


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
    agreement: AgreementRecipe | None = None  # whether labels and prompts do anything

    @model_validator(mode="after")
    def _stages_fit(self) -> Self:
        check_channels(self.base, self.upsamplers)
        made = check_cascade(self.base, self.upsamplers, self.sampling, made=self.base.data.resolution)
        largest = max(made, self.tokenizer.data.resolution)
        if self.images.resolution < largest:
            raise ValueError(f"images.resolution {self.images.resolution} is below {largest}, which a model makes")
        if self.agreement is not None:
            self.agreement.check_size(min(made, self.tokenizer.data.resolution))
        return self


def full_cascade(recipe: CascadeRecipe) -> Workflow:
    """Two generators from the same images: tokens (VQ-GAN, transformer prior) and diffusion (base, upsamplers)."""
    images = Stage("images", ingest_images, recipe.images, identity=images_identity)

    tokenizer = Stage("tokenizer", train_autoencoder, recipe.tokenizer, images=images)
    tokens = Stage("tokens", tokenize_images, recipe.tokens, images=images, tokenizer=tokenizer)
    prior = Stage("prior", train_prior, recipe.prior, tokens=tokens, tokenizer=tokenizer)

    base = Stage("base", train_diffusion, recipe.base, images=images)
    upsamplers = [Stage(f"upsampler_{u.data.resolution}", train_diffusion, u, images=images) for u in recipe.upsamplers]

    models = {"tokenizer": tokenizer, "prior": prior, "base": base, "upsamplers": upsamplers}
    cascade = Stage("cascade", compose_cascade, recipe.sampling, **models)
    samples = Stage("samples", sample_generators, recipe.samples, images=images, cascade=cascade)
    evaluation = Stage("evaluation", evaluate, recipe.evaluation, images=images, tokenizer=tokenizer, samples=samples)
    agreement = agreement_stages(recipe.agreement, images=images, cascade=cascade)

    trained = [tokenizer, tokens, prior, base, *upsamplers]
    return Workflow(recipe.name, [images, *trained, cascade, samples, evaluation, *agreement])


if __name__ == "__main__":
    from pipelines.command.cli import run_script

    run_script()
