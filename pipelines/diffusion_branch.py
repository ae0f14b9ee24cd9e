"""The continuous branch alone: a base, its upsamplers, and the networks that they are trained against."""

from typing import Any

from components.stages.autoencoder import train_autoencoder
from components.stages.cascade import compose_cascade
from components.stages.classifier import train_classifier
from components.stages.contrastive import train_contrastive
from components.stages.diffusion import train_diffusion
from components.stages.diffusion_prior import train_diffusion_prior
from components.stages.evaluate import evaluate
from components.stages.images import images_identity, ingest_images
from components.stages.precompute import precompute
from components.stages.samples import sample_generators
from components.stages.text_encoder import import_text_encoder
from pipelines.one_model import autoencoder_name
from pipelines.recipes.diffusion_branch import DiffusionBranchRecipe
from pipelines.workflow import Stage, Workflow


def diffusion_branch(recipe: DiffusionBranchRecipe) -> Workflow:
    """DDPM, cascades, latent diffusion, Imagen and DALL-E 2: what of this there is, the recipe says."""
    images = Stage("images", ingest_images, recipe.images, identity=images_identity)
    frozen: dict[str, Any] = {}
    if recipe.contrastive is not None:
        frozen["contrastive"] = Stage("contrastive", train_contrastive, recipe.contrastive, images=images)
    if recipe.text_encoder is not None:
        frozen["text_encoder"] = Stage("text_encoder", import_text_encoder, recipe.text_encoder)
    first = {**frozen}  # of the base alone
    if recipe.autoencoder is not None:
        name = autoencoder_name(recipe.autoencoder)
        first["autoencoder"] = Stage(name, train_autoencoder, recipe.autoencoder, images=images)

    encoded, made = images, []  # what frozen networks make of the images, at each step or once for all
    if recipe.precompute is not None:
        encoded = Stage("precompute", precompute, recipe.precompute, images=images, **first)
        made.append(encoded)
    base = Stage("base", train_diffusion, recipe.base, images=encoded, **first)
    upsamplers = [
        Stage(f"upsampler_{u.data.resolution}", train_diffusion, u, images=images, **frozen) for u in recipe.upsamplers
    ]

    helpers: dict[str, Stage] = {}
    if recipe.diffusion_prior is not None:
        inputs = {"images": encoded, "contrastive": frozen["contrastive"]}
        helpers["diffusion_prior"] = Stage("diffusion_prior", train_diffusion_prior, recipe.diffusion_prior, **inputs)
    if recipe.classifier is not None:
        helpers["classifier"] = Stage("classifier", train_classifier, recipe.classifier, images=images)

    parts: dict[str, Any] = {**first, **helpers, "base": base, "upsamplers": upsamplers}
    cascade = Stage("cascade", compose_cascade, recipe.sampling, **parts)
    samples = Stage("samples", sample_generators, recipe.samples, images=images, cascade=cascade)
    evaluation = Stage("evaluation", evaluate, recipe.evaluation, images=images, samples=samples)
    stages = [images, *first.values(), *made, *helpers.values(), base, *upsamplers, cascade, samples, evaluation]
    return Workflow(recipe.name, stages)
