"""The workflows by name: the shape of their recipes, and the graph of stages that one makes."""

from collections.abc import Callable
from typing import Any

from pipelines.diffusion_branch import DiffusionBranchRecipe, diffusion_branch
from pipelines.diffusion_studies import DiffusionStudiesRecipe, diffusion_studies
from pipelines.full_cascade import CascadeRecipe, full_cascade
from pipelines.image_to_image import ImageToImageRecipe, image_to_image
from pipelines.one_model import OneModelRecipe, one_model
from pipelines.token_branch import TokenBranchRecipe, token_branch
from pipelines.workflow import Workflow

Recipe = (
    CascadeRecipe
    | TokenBranchRecipe
    | OneModelRecipe
    | DiffusionBranchRecipe
    | ImageToImageRecipe
    | DiffusionStudiesRecipe
)
WORKFLOWS: dict[str, tuple[type[Recipe], Callable[[Any], Workflow]]] = {
    "full_cascade": (CascadeRecipe, full_cascade),
    "token_branch": (TokenBranchRecipe, token_branch),
    "one_model": (OneModelRecipe, one_model),
    "diffusion_branch": (DiffusionBranchRecipe, diffusion_branch),
    "image_to_image": (ImageToImageRecipe, image_to_image),
    "diffusion_studies": (DiffusionStudiesRecipe, diffusion_studies),
}


def build_workflow(recipe: Recipe) -> Workflow:
    """The graph of stages of a recipe; building it runs nothing."""
    _, graph = WORKFLOWS[recipe.workflow]
    return graph(recipe)
