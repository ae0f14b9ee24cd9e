"""The discrete branch alone: a tokenizer, a prior over its tokens, and images of both."""

from typing import Any

from components.stages.autoencoder import train_autoencoder
from components.stages.cascade import compose_cascade
from components.stages.evaluate import evaluate
from components.stages.images import images_identity, ingest_images
from components.stages.prior import train_prior
from components.stages.samples import sample_generators
from components.stages.tokens import tokenize_images
from pipelines.recipes.token_branch import TokenBranchRecipe
from pipelines.workflow import Stage, Workflow


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
    cascade = Stage("cascade", compose_cascade, recipe.sampling, prior=prior, **parts)
    samples = Stage("samples", sample_generators, recipe.samples, images=images, cascade=cascade)
    evaluation = Stage("evaluation", evaluate, recipe.evaluation, images=images, tokenizer=tokenizer, samples=samples)
    return Workflow(recipe.name, [*stages, prior, cascade, samples, evaluation])
