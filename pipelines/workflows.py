"""Graphs of stages of all recipes but the cascade's, and the table of graphs by workflow."""

from collections.abc import Callable
from typing import Any

from components.configuration.config import Config
from components.configuration.families import family_of
from components.stages.evaluate import evaluate, run_study
from components.stages.images import images_identity, ingest_images
from components.stages.precompute import encoder_identity, import_text_encoder, precompute
from components.stages.samples import compose_cascade, preserve_prior, sample_generators
from components.stages.tokens import tokenize_images
from components.stages.training import train_model
from pipelines.full_cascade import full_cascade, obedience_stages
from pipelines.recipes.diffusion_shapes import DiffusionBranchRecipe, DiffusionStudiesRecipe, ImageToImageRecipe
from pipelines.recipes.shapes import OneModelRecipe, Recipe, TokenBranchRecipe
from pipelines.workflow import Stage, Workflow


def token_branch(recipe: TokenBranchRecipe) -> Workflow:
    """Images to tokens, a prior over the tokens; a condition's tokens stand in front of the sequence."""
    images = Stage("images", ingest_images, recipe.images, identity=images_identity)
    tokenizer = Stage("tokenizer", train_model, recipe.tokenizer, images=images)
    tokens = Stage("tokens", tokenize_images, recipe.tokens, images=images, tokenizer=tokenizer)
    stages = [images, tokenizer, tokens]
    inputs: dict[str, Any] = {"tokens": tokens, "tokenizer": tokenizer}
    parts: dict[str, Any] = {"tokenizer": tokenizer}

    if recipe.condition is not None:
        encoder = Stage("condition_tokenizer", train_model, recipe.condition.tokenizer, images=images)
        condition = Stage("condition", tokenize_images, recipe.condition.tokens, images=images, tokenizer=encoder)
        stages += [encoder, condition]
        inputs["condition"], parts["condition"] = condition, encoder

    prior = Stage("prior", train_model, recipe.prior, **inputs)
    if recipe.reranker is not None:
        parts["reranker"] = Stage("contrastive", train_model, recipe.reranker, images=images)
        stages.append(parts["reranker"])
    cascade = Stage("cascade", compose_cascade, recipe.sampling, prior=prior, **parts)
    samples = Stage("samples", sample_generators, recipe.samples, images=images, cascade=cascade)
    evaluation = Stage("evaluation", evaluate, recipe.evaluation, images=images, tokenizer=tokenizer, samples=samples)
    judged = obedience_stages(recipe.obedience, images=images, cascade=cascade)
    return Workflow(recipe.name, [*stages, prior, cascade, samples, evaluation, *judged])


def one_model(recipe: OneModelRecipe) -> Workflow:
    """A model and images: reconstructions of held-out images by an autoencoder, else images from noise."""
    images = Stage("images", ingest_images, recipe.images, identity=images_identity)
    model = Stage(recipe.model.stage_name, train_model, recipe.model, images=images)
    stages: list[Stage] = [images, model]
    shown: dict[str, Any] = {"tokenizer": model} if family_of(recipe.model.network.kind).reconstructs else {}
    if recipe.drawn is not None:
        cascade = Stage("cascade", compose_cascade, recipe.sampling, model=model)
        shown["samples"] = Stage("samples", sample_generators, recipe.drawn, images=images, cascade=cascade)
        stages += [cascade, shown["samples"]]
    studies = {"likelihood": recipe.likelihood, "codes_study": recipe.codes_study}
    stages += [Stage(name, run_study, own, images=images, model=model) for name, own in studies.items() if own]
    return Workflow(recipe.name, [*stages, Stage("evaluation", evaluate, recipe.evaluation, images=images, **shown)])


def diffusion_branch(recipe: DiffusionBranchRecipe) -> Workflow:
    """DDPM, cascades, latent diffusion, Imagen and DALL-E 2, with the stages of the recipe."""
    given = images = Stage("images", ingest_images, recipe.images, identity=images_identity)
    frozen: dict[str, Any] = {}
    if recipe.contrastive is not None:
        frozen["contrastive"] = Stage("contrastive", train_model, recipe.contrastive, images=given)
    if (own := recipe.text_encoder) is not None:
        frozen["text_encoder"] = Stage("text_encoder", import_text_encoder, own, identity=encoder_identity)
    vae = recipe.autoencoder
    latents = {} if vae is None else {"autoencoder": Stage(vae.stage_name, train_model, vae, images=given)}
    first = frozen | latents  # of the base, and of what guides it
    if recipe.subject is not None:
        start, sampling = recipe.subject.init_from or recipe.base.init_from, recipe.subject.sampling
        subject = recipe.subject.model_copy(update={"init_from": start, "sampling": sampling or recipe.sampling.base})
        images = Stage("subject", preserve_prior, subject, images=given, **first)

    encoded = images  # frozen networks work on the images at each step, or once before all of them
    if recipe.precompute is not None:
        encoded = Stage("precompute", precompute, recipe.precompute, images=images, **first)
    base = Stage("base", train_model, recipe.base, images=encoded, **first)
    upsamplers = []
    for own in recipe.upsamplers:
        reads = frozen if own.conditioning.conditions else {}
        upsamplers.append(Stage(f"upsampler_{own.data.resolution}", train_model, own, images=images, **reads))

    rows: list[tuple[str, Config | None, dict[str, Any]]] = [
        ("diffusion_prior", recipe.diffusion_prior, {"images": encoded, "contrastive": frozen.get("contrastive")}),
        ("classifier", recipe.classifier, {"images": encoded, **latents} if latents else {"images": images}),
        ("weaker", recipe.weaker, {"images": encoded, **first}),
    ]
    helpers = {name: Stage(name, train_model, config, **inputs) for name, config, inputs in rows if config}

    parts: dict[str, Any] = {**first, **helpers, "base": base, "upsamplers": upsamplers}
    cascade = Stage("cascade", compose_cascade, recipe.sampling, **parts)
    samples = Stage("samples", sample_generators, recipe.samples, images=images, cascade=cascade)
    evaluation = Stage("evaluation", evaluate, recipe.evaluation, images=images, samples=samples)
    before = dict.fromkeys((given, *first.values(), images, encoded, *helpers.values()))
    judged = obedience_stages(recipe.obedience, images=images, cascade=cascade)
    if recipe.stages_study is not None:
        judged.append(Stage("stages_study", run_study, recipe.stages_study, images=images, cascade=cascade))
    return Workflow(recipe.name, [*before, base, *upsamplers, cascade, samples, evaluation, *judged])


def image_to_image(recipe: ImageToImageRecipe) -> Workflow:
    """Palette, GLIDE's inpainting, super-resolution: a model of the recipe's tasks, images restored."""
    images = Stage("images", ingest_images, recipe.images, identity=images_identity)
    model = Stage("image_to_image", train_model, recipe.model, images=images)
    cascade = Stage("cascade", compose_cascade, recipe.sampling, model=model)
    restoration = Stage("restoration", run_study, recipe.restoration, images=images, cascade=cascade)
    return Workflow(recipe.name, [images, model, cascade, restoration])


def diffusion_studies(recipe: DiffusionStudiesRecipe) -> Workflow:
    """The base model, guiding and judging models, and the recipe's studies."""
    images = Stage("images", ingest_images, recipe.images, identity=images_identity)
    base = Stage("base", train_model, recipe.base, images=images)
    trainings = {"weaker": recipe.weaker, "classifier": recipe.classifier, "judge": recipe.judge}
    helpers = {name: Stage(name, train_model, own, images=images) for name, own in trainings.items() if own is not None}
    cascade = Stage("cascade", compose_cascade, recipe.sampling, base=base)
    samples = Stage("samples", sample_generators, recipe.samples, images=images, cascade=cascade)
    evaluation = Stage("evaluation", evaluate, recipe.evaluation, images=images, samples=samples)

    rows: list[tuple[str, Config | None, dict[str, Any]]] = [
        ("noising_study", recipe.noising_study, {"model": base}),
        ("likelihood", recipe.likelihood, {"model": base}),
        ("steps_study", recipe.steps_study, {"cascade": cascade}),
        ("guidance_study", recipe.guidance_study, {"base": base, **helpers}),
    ]
    studies = [Stage(name, run_study, config, images=images, **models) for name, config, models in rows if config]
    return Workflow(recipe.name, [images, base, *helpers.values(), cascade, samples, *studies, evaluation])


GRAPHS: dict[str, Callable[[Any], Workflow]] = {
    graph.__name__: graph
    for graph in (full_cascade, token_branch, one_model, diffusion_branch, image_to_image, diffusion_studies)
}


def build_workflow(recipe: Recipe) -> Workflow:
    """The graph of stages of a recipe, without running a stage."""
    return GRAPHS[recipe.workflow](recipe)
