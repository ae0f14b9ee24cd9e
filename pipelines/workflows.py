"""Which workflow a recipe is for."""

from collections.abc import Callable
from typing import Any

from pipelines.diffusion_branch import diffusion_branch
from pipelines.diffusion_studies import diffusion_studies
from pipelines.full_cascade import full_cascade
from pipelines.image_to_image import image_to_image
from pipelines.one_model import one_model
from pipelines.recipes.catalog import Recipe
from pipelines.token_branch import token_branch
from pipelines.workflow import Workflow

WORKFLOWS: dict[str, Callable[[Any], Workflow]] = {
    "full_cascade": full_cascade,
    "token_branch": token_branch,
    "one_model": one_model,
    "diffusion_branch": diffusion_branch,
    "image_to_image": image_to_image,
    "diffusion_studies": diffusion_studies,
}


def build_workflow(recipe: Recipe) -> Workflow:
    """The graph of stages of a recipe; building it runs nothing."""
    return WORKFLOWS[recipe.workflow](recipe)
