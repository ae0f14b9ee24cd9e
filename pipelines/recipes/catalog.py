"""The recipes by name, and how one is loaded, overridden and checked."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from components.configuration.usage import UsageError, explain, nearest
from pipelines.recipes.diffusion_rows import DIFFUSION_ROWS
from pipelines.recipes.discrete_rows import DISCRETE_ROWS
from pipelines.recipes.fashion import FASHION
from pipelines.recipes.openmoji import openmoji
from pipelines.recipes.overrides import apply_overrides
from pipelines.recipes.paper import paper_recipes
from pipelines.recipes.shapes import SHAPES, Recipe
from pipelines.recipes.smoke import smoke
from pipelines.recipes.taxonomy import TAXONOMY

ROWS = {**DISCRETE_ROWS, **DIFFUSION_ROWS, **FASHION}  # recipe -> row of the lecture
RECIPES: dict[str, Callable[[], Recipe]] = {
    **{recipe.__name__: recipe for recipe in (openmoji, smoke, *ROWS, *TAXONOMY)},
    **paper_recipes(),
}
DEMO = "openmoji"


def load_recipe(name_or_file: str, assignments: list[str]) -> Recipe:
    """A recipe by name or from a YAML file as `cascade show` prints it, with `--set` assignments applied.

    Raises UsageError, one line, for an unknown recipe, field or a value that does not fit.
    """
    tree = _tree(name_or_file)
    workflow = tree.get("workflow", "full_cascade")
    if workflow not in SHAPES:
        raise UsageError(f"recipe {name_or_file}: unknown workflow {workflow!r}{nearest(str(workflow), SHAPES)}")
    shape = SHAPES[workflow]
    try:
        shape.model_validate(tree)
        return shape.model_validate(apply_overrides(tree, assignments, shape))
    except ValidationError as error:
        raise UsageError(f"recipe {name_or_file}: {explain(error, shape)}") from error


def resolved_yaml(recipe: Recipe) -> str:
    """The recipe with every number, as `cascade show` prints it."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=110)


def _tree(name_or_file: str) -> dict[str, Any]:
    if name_or_file in RECIPES:
        return RECIPES[name_or_file]().model_dump(mode="json")
    path = Path(name_or_file)
    if not path.is_file():
        raise UsageError(f"no recipe {name_or_file!r}{nearest(name_or_file, RECIPES)}, or a YAML file")
    try:
        tree = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UsageError(f"recipe {path} is no YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(tree, dict):
        raise UsageError(f"recipe {path} holds no fields; start from `cascade show {DEMO} > {path}`")
    return tree
