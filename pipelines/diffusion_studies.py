"""One diffusion model and what is measured of it: likelihood, samplers by steps, guidance by scale."""

from typing import Any

from components.stages.cascade import compose_cascade
from components.stages.classifier import train_classifier
from components.stages.diffusion import train_diffusion
from components.stages.evaluate import evaluate
from components.stages.images import images_identity, ingest_images
from components.stages.likelihood import measure_likelihood
from components.stages.samples import sample_generators
from components.stages.studies import study_guidance, study_steps
from pipelines.recipes.diffusion_studies import DiffusionStudiesRecipe
from pipelines.workflow import Stage, Workflow


def diffusion_studies(recipe: DiffusionStudiesRecipe) -> Workflow:
    """The base model, those that guide or judge it, and the studies that the recipe asks for."""
    images = Stage("images", ingest_images, recipe.images, identity=images_identity)
    base = Stage("base", train_diffusion, recipe.base, images=images)
    helpers = {
        name: Stage(name, train, config, images=images, **inputs)
        for name, train, config, inputs in (
            ("weaker", train_diffusion, recipe.weaker, {}),
            ("classifier", train_classifier, recipe.classifier, {}),
            ("judge", train_classifier, recipe.judge, {}),
        )
        if config is not None
    }
    cascade = Stage("cascade", compose_cascade, recipe.sampling, base=base)
    samples = Stage("samples", sample_generators, recipe.samples, images=images, cascade=cascade)
    evaluation = Stage("evaluation", evaluate, recipe.evaluation, images=images, samples=samples)

    wanted: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "likelihood": (measure_likelihood, recipe.likelihood, {"model": base}),
        "steps_study": (study_steps, recipe.steps_study, {"cascade": cascade}),
        "guidance_study": (study_guidance, recipe.guidance_study, {"base": base, **helpers}),
    }
    studies = [
        Stage(name, study, config, images=images, **models)
        for name, (study, config, models) in wanted.items()
        if config is not None
    ]
    return Workflow(recipe.name, [images, base, *helpers.values(), cascade, samples, *studies, evaluation])
