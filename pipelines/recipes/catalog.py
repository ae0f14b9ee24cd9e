"""All recipes by name; loading, overriding (`--set a.b=value`) and checking a recipe."""

import copy
import re
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel

from components.configuration.config import KIND, Config, PlaceError, find, kind_of, members, parts_of, put, started
from components.configuration.optimization import Training
from components.configuration.usage import UsageError, nearest, validated
from pipelines.recipes.diffusion_rows import DIFFUSION_ROWS, FASHION
from pipelines.recipes.published import PAPER_RECIPES
from pipelines.recipes.rows import DISCRETE_ROWS, TAXONOMY
from pipelines.recipes.shapes import SHAPES, Recipe, RecipeRow
from pipelines.recipes.systems import described, openmoji, openmoji_hour, smoke

DEMO, DRAWINGS = "scenes", "openmoji"
LECTURE_ROWS = (*DISCRETE_ROWS, *DIFFUSION_ROWS, *FASHION)
RECIPES: dict[str, RecipeRow] = {
    row.name: row
    for row in (
        RecipeRow(DEMO, "Scenes by caption: tokenizer at 64², base at 16², upsampler 16² -> 64²; the demo.", described),
        RecipeRow(DRAWINGS, "The same cascade on the drawings of OpenMoji, by class and caption.", openmoji),
        RecipeRow("openmoji_hour", "The same in about an hour on two cores: what more steps buy.", openmoji_hour),
        RecipeRow(
            "smoke", "Colored solids: the whole cascade in about four minutes on two cores, most of it start-up.", smoke
        ),
        *(*LECTURE_ROWS, *TAXONOMY, *PAPER_RECIPES.values()),
    )
}
LENGTHS = ("total_steps", "sample_every", "kl_warmup_steps", "discriminator_start")  # in steps of a training
ROWS = {row.name: row.summary.partition(":")[0] for row in LECTURE_ROWS}  # recipe -> row of the lecture


def load_recipe(name_or_file: str, assignments: list[str]) -> Recipe:
    """Loads a recipe by name or from a YAML file of `cascade show`, with `--set` assignments applied.
    Raises UsageError, one line, for an unknown recipe, field or a value that does not fit."""
    tree = _tree(name_or_file)
    workflow = tree.get("workflow", "full_cascade")
    if workflow not in SHAPES:
        raise UsageError(f"recipe {name_or_file}: unknown workflow {workflow!r}{nearest(str(workflow), SHAPES)}")
    shape = SHAPES[workflow]
    place = f"recipe {name_or_file}: "
    validated(shape, tree, place)
    return validated(shape, apply_overrides(tree, assignments, shape), place)


def resolved_yaml(recipe: Recipe) -> str:
    """The recipe with every number, in the form of `cascade show`."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=110)


def _tree(name_or_file: str) -> dict[str, Any]:
    if name_or_file in RECIPES:
        return RECIPES[name_or_file]().model_dump(mode="json")
    path = Path(name_or_file)
    if not path.is_file():
        raise UsageError(f"no recipe {name_or_file!r}{nearest(name_or_file, RECIPES)}, or a YAML file")
    try:
        tree = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"recipe {path} is no YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(tree, dict):
        raise UsageError(f"recipe {path} holds no fields; start from `cascade show {DEMO} > {path}`")
    return tree


def varied(recipe: Recipe, *, seed: int, factor: float) -> list[str]:
    """`--set` assignments of another seed for trainings and samples, and of so many times the steps.
    A seed of 0 and a factor of 1 change nothing. With the steps goes what begins within them; learning rates fall to
    the new end, and checkpoints are saved as often as before."""
    parts = {name: getattr(recipe, name) for name in type(recipe).model_fields}
    lists = {name: own for name, own in parts.items() if isinstance(own, tuple)}
    parts |= {f"{name}.{number}": each for name, own in lists.items() for number, each in enumerate(own)}
    longer = [
        f"{path}.{part}.{name}={round(factor * value)}"
        for path, training in parts.items()
        if isinstance(training, Training)
        for part, settings in training
        if isinstance(settings, Config) and factor != 1
        for name, value in settings
        if name in LENGTHS
    ]
    return (
        longer
        + [f"{name}.optimization.seed={seed}" for name, own in parts.items() if seed and isinstance(own, Training)]
        + [f"samples.seed={seed}"] * bool(seed)
    )


def apply_overrides(tree: dict[str, Any], assignments: list[str], shape: type[BaseModel]) -> dict[str, Any]:
    """A copy of a recipe's tree with `a.b=value` assignments applied; items of lists have their number.
    A name may be short where only one part below has it (`base.total_steps`), a kind stands in the place of its part
    (`base.network=dit`), and a part that the recipe left out (`null`) is created when one of its fields is set. Raises
    UsageError for a malformed assignment, or a field that does not exist or stands in several places."""
    result = copy.deepcopy(tree)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise UsageError(f"--set {assignment!r}: write it as field.name=value")
        try:
            set_value(result, shape, path.strip(), text.strip())
        except yaml.YAMLError as error:
            raise UsageError(f"--set {path}: {text!r} is no YAML: {str(error).splitlines()[0]}") from None
        except PlaceError as error:
            raise UsageError(f"--set {path}: {error}{hint(error, path, result, shape)}") from None
    return result


class Values(yaml.SafeLoader):
    """YAML in which 010 is not octal, 20:00 not of base 60 and 2024-05-01 not a date."""


Values.yaml_implicit_resolvers = {
    first: [("tag:yaml.org,2002:str", re.compile(r"[-+]?0[0-9_]+$|.*:|[0-9]+-")), *known]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_value(text: str, annotation: Any) -> Any:
    """The value of an assignment: as typed for a field of text, else YAML. Raises YAMLError.
    Quoted text is YAML too, as is null where the field may be null."""
    quoted, null = text[:1] in ("'", '"'), text in ("null", "~") and annotation == str | None
    if text and annotation in (str, str | None) and not (quoted or null):
        return text
    value = yaml.load(text, Values)
    return text if isinstance(value, str) and not quoted else value  # whose " #" begins no comment


def set_value(tree: dict[str, Any], shape: type[BaseModel], path: str, text: str) -> None:
    """Set a value in a tree. Raises PlaceError and YAMLError."""
    first, _, rest = path.partition(".")
    *parents, leaf = find(shape, tree, first)
    for parent in parents:  # of a part that is named short
        part = members(shape, tree, parent)[0]
        tree[parent] = tree.get(parent) or started(shape, parent, part)
        shape, tree = part, tree[parent]
    if not rest or (rest == KIND and parts_of(shape, leaf)):
        field = shape.model_fields.get(leaf)
        put(tree, shape, (leaf,), read_value(text, field and field.annotation))
    elif isinstance(tree.get(leaf), list):
        set_item(tree, shape, leaf, rest, text)
    elif parts := members(shape, tree, leaf):
        chosen = rest.removesuffix(f".{KIND}")
        named = text.strip("'\"")
        owners = (p for p in parts_of(shape, leaf) if named in map(kind_of, parts_of(p, chosen)))
        part = next(owners, parts[0])
        kind = {} if kind_of(part) is None else {KIND: kind_of(part)}
        tree[leaf] = kind | {name: own for name, own in (tree.get(leaf) or {}).items() if name in part.model_fields}
        set_value(tree[leaf], part, rest, text)
    else:
        raise PlaceError(f"{leaf!r} is a plain value: it has no {rest!r}")


def set_item(tree: dict[str, Any], shape: type[BaseModel], name: str, path: str, text: str) -> None:
    """Set a value of an item of a list, or the item. Raises PlaceError and YAMLError."""
    number, _, rest = path.partition(".")
    items, model = list(tree[name]), get_args(shape.model_fields[name].annotation)[0]
    if not number.isdecimal() or int(number) >= len(items):
        raise PlaceError(f"item {number!r} of {len(items)}; they count from 0")
    if not rest:
        items[int(number)] = read_value(text, model)
    elif isinstance(model, type) and issubclass(model, BaseModel):
        items[int(number)] = dict(items[int(number)])
        set_value(items[int(number)], model, rest, text)
    else:
        raise PlaceError(f"item {number} is a plain value: it has no {rest!r}")
    tree[name] = items


def hint(error: PlaceError, path: str, tree: dict[str, Any], shape: type[BaseModel]) -> str:
    """The full name if the path is a sampling setting, else the nearest field's."""
    if not error.known:
        return ""
    try:
        set_value(copy.deepcopy(tree), shape, f"sampling.{path}", "null")
    except PlaceError:
        return nearest(path.rpartition(".")[2], error.known)
    return f"; it is sampling.{path}"
