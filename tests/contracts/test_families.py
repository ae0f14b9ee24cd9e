"""Model families are told apart in their tables and in their own files, nowhere else."""

import ast
import inspect
import typing
from collections.abc import Iterator
from pathlib import Path

from components.configuration.families import FAMILIES
from components.configuration.networks import NetworkConfig
from components.models.bundle import NETWORKS
from components.training.step_model import TASKS
from tests.house import Module

TABLES = {
    "components/configuration/families.py",
    "components/models/bundle.py",
    "components/sampling/answers.py",
    "components/training/learner.py",
    "components/training/step_model.py",
}
GENERATORS = "components/sampling/generators/"  # how families sample
PARTS = {  # where another model's part must be of one family -> that part
    "components/data/encoding.py": "an autoencoder makes latents and tokens",
    "components/sampling/frozen_text.py": "a contrastive encoder makes the states of a text",
    "components/training/frozen.py": "a contrastive encoder makes the embedding of an image",
    "pipelines/command/reconstruct.py": "an autoencoder reconstructs",
}
KINDS = frozenset(NETWORKS)


def configurations(training: type) -> Iterator[type]:
    """Classes of the networks that a training may have, with the classes that they inherit from."""
    annotation = training.model_fields["network"].annotation
    for network in typing.get_args(annotation) or (annotation,):
        yield from (base for base in network.__mro__ if issubclass(base, NetworkConfig) and base is not NetworkConfig)


def own_files(repository: Path) -> dict[str, set[str]]:
    """Each name of a family's class or kind -> files in which the family may be told from others."""
    files: dict[str, set[str]] = {}
    for name, family in FAMILIES.items():
        networks = [NETWORKS[kind] for kind in family.networks]
        parts = [family.training, TASKS[name], *configurations(family.training), *networks]
        homes = {Path(inspect.getfile(part)).resolve().relative_to(repository).as_posix() for part in parts}
        for each in (*(part.__name__ for part in parts), *family.networks):
            files.setdefault(each, set()).update(homes)
    return files


def decisions(tree: ast.AST, names: set[str]) -> Iterator[tuple[int, set[str]]]:
    """Line and names of each choice by a family's class or by the kind of its network; assertions choose nothing."""
    asserted = {id(node) for check in ast.walk(tree) if isinstance(check, ast.Assert) for node in ast.walk(check)}
    for node in ast.walk(tree):
        if id(node) in asserted:
            continue
        if isinstance(node, ast.MatchClass):
            chosen = {ast.unparse(node.cls)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            chosen = {part.id for part in ast.walk(node.args[1]) if isinstance(part, ast.Name)}
        elif isinstance(node, ast.Compare) and "kind" in ast.unparse(node):
            chosen = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)} & KINDS
        elif (
            isinstance(node, ast.Dict) and len(keys := {k.value for k in node.keys if isinstance(k, ast.Constant)}) > 1
        ):
            chosen = keys if keys <= KINDS else set()
        else:
            continue
        if chosen & names:
            yield node.lineno, chosen & names


def test_families_are_told_apart_in_their_tables_and_their_own_files_alone(
    repository: Path, house: list[Module]
) -> None:
    own, found, parts = own_files(repository), [], set()
    for module in house:
        name = module.name
        if name in TABLES or name.startswith(GENERATORS):
            continue
        for line, chosen in decisions(module.tree, {*own}):
            if all(name in own.get(each, ()) for each in chosen):
                continue
            if name in PARTS:
                parts.add(name)
            else:
                found.append(f"{name}:{line}: {', '.join(sorted(chosen))}")
    assert found == []
    assert parts == PARTS.keys()
