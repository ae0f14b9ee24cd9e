"""Records the code behind a stage's numbers with the artifact, and names later changes.

Never part of a key. Each module is known by its text and by its syntax tree without comments and docstrings, so that
neither of these is called a change; names of modules are those of the checkout, so that a wheel has the same digests.
"""

import ast
import hashlib
import importlib.metadata
import json
import math
import platform
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from components.configuration.families import family_name
from components.configuration.optimization import Training
from components.runtime.storage.artifact import FORCED
from pipelines.engine.provenance import PACKAGES, PROJECT, ROOT, short, version
from pipelines.workflow import PlannedStage, Stage

DECIDING = ("configuration", "data", "evaluation", "models", "sampling", "stages", "training")
LEFT_OUT = {  # what draws and reports, in rooms that decide
    *(f"components/evaluation/{name}.py" for name in ("gallery", "grids", "plots")),
    "components/stages/context.py",
}
DIGITS = 12  # hexadecimal, of a digest
MOST_FILES = 8  # in a line
INSTALLED = re.compile(rf"\bimage_cascade(?:_[0-9a-f]+)?\.(?=(?:{'|'.join(PACKAGES)})\b)")  # before a module's name
SAME_NAME = re.compile(r"^(\s*import (\w+)) as \2$", re.MULTILINE)  # of a wheel


class ModuleFile:
    """A module's file with the checkout's names of modules: imports and digests."""

    def __init__(self, path: Path) -> None:
        self.text = _as_in_the_checkout(path.read_text())

    @cached_property
    def imports(self) -> list[tuple[str, str]]:
        """(module, name) of each import anywhere in the file; the name is empty for a whole module."""
        nodes = [*ast.walk(ast.parse(self.text))]
        names = [(n.module, a.name) for n in nodes if isinstance(n, ast.ImportFrom) and n.module for a in n.names]
        names += [(alias.name, "") for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        return [(module, name) for module, name in names if module.split(".")[0] in PACKAGES]

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()[:DIGITS]

    @cached_property
    def tree_digest(self) -> str:
        return tree_digest(self.text)


def code_of(stage: Stage, root: Path = ROOT) -> dict[str, Any]:
    """Versions, and digests (text, syntax tree) of each module behind the stage's numbers, by path.
    These are the modules that its function and its configuration import, and so on; of networks those of the kinds of
    the stage and of those that it needs, of tasks that of its family."""
    from components.models.bundle import NETWORKS  # torch takes seconds to import
    from components.training.step_model import TASKS

    families = {family_name(stage.config.network.kind)} if isinstance(stage.config, Training) else set[str]()
    foreign = _names_of_others(NETWORKS, _kinds(stage)) | _names_of_others(TASKS, families)
    todo = [_file(INSTALLED.sub("", part.__module__), root) for part in (stage.run, type(stage.config))]
    reached: set[Path] = set()
    while todo:
        path = todo.pop()
        if path is None or path in reached:
            continue
        reached.add(path)
        imports = [(module, name) for module, name in _source(path).imports if name not in foreign]
        todo += [_file(f"{module}.{name}", root) or _file(module, root) for module, name in imports]
    names = sorted(path.relative_to(root).as_posix() for path in reached)
    rooms = tuple(f"components/{room}/" for room in DECIDING)
    sources = {name: _source(root / name) for name in names if name.startswith(rooms) and name not in LEFT_OUT}
    return _versions() | {"modules": {name: [own.digest, own.tree_digest] for name, own in sources.items()}}


def changes_of_code(planned: Sequence[PlannedStage], root: Path = ROOT) -> list[str]:
    """A line for each change of code since cached stages were made, with the stages and the remedy."""
    lines: dict[str, list[str]] = {}
    stages = {entry.stage: entry.cached.provenance for entry in planned if entry.cached and not entry.wanted}
    begun = {stage: provenance.get("started", math.nan) for stage, provenance in stages.items()}
    forced = {stage: begun[stage] for stage, provenance in stages.items() if FORCED in provenance}
    for stage, provenance in stages.items():
        parents = [parent for parent in stage.parents.values() if parent in forced]
        if anew := [parent.name for parent in parents if forced[parent] > begun[stage]]:
            lines.setdefault(f"{' and '.join(anew)} was made anew since", []).append(stage.name)
        for change in _changes(provenance.get("code"), root):
            lines.setdefault(change, []).append(stage.name)
    again = {change: "it" if len(names) == 1 else "them" for change, names in lines.items()}
    return [f"{', '.join(names)}: cached, but {c}; `--force` makes {again[c]} anew" for c, names in lines.items()]


def code_digest(records: Mapping[str, Mapping[str, Any] | None]) -> str:
    """Digest of the modules behind all stages of a recipe, as `3.11:0123456789ab`, the Python first.
    `records` are by stage, as `code_of` makes them; empty where one is not known."""
    known = {stage: record for stage, record in sorted(records.items()) if record is not None}
    if not records or len(known) < len(records):
        return ""
    trees = [[stage, name, tree] for stage in known for name, (_, tree) in sorted(known[stage]["modules"].items())]
    pythons = "+".join(sorted({record["python"] for record in known.values()}))
    return f"{pythons}:{hashlib.sha256(json.dumps(trees).encode()).hexdigest()[:DIGITS]}"


def made_by(provenance: Mapping[str, Any]) -> str:
    """Commit and versions of an artifact's code, in one line, from the manifest; empty without any."""
    versions = {name: value for name, value in provenance.get("code", {}).items() if name != "modules"}
    commits = [short(provenance["git_commit"])] if "git_commit" in provenance else []
    return ", ".join([*commits, *(f"{name} {value}" for name, value in versions.items())])


def _changes(record: Mapping[str, Any] | None, root: Path) -> Iterator[str]:
    if record is None:
        yield "which code made it is not known"
        return
    changed, unlike, same_python = [], [], record["python"] == _versions()["python"]
    for name, (text, tree) in record["modules"].items():
        own = _source(root / name) if (root / name).is_file() else None
        if own is None or (own.digest != text and same_python and own.tree_digest != tree):
            changed.append(name)
        elif own.digest != text and not same_python:
            unlike.append(name)
    if changed:
        yield f"{_some(changed)} {'has' if len(changed) == 1 else 'have'} changed"
    if unlike:
        pythons = f"trees of Python {record['python']} and {_versions()['python']} can't be compared"
        yield f"{_some(unlike)} may have changed ({pythons})"
    for name, now in _versions().items():
        if record[name] != now:
            yield f"{name} was {record[name]} and is {now}"


@cache
def _versions() -> dict[str, str]:
    torch = importlib.metadata.version("torch").partition("+")[0]  # whatever it was built for
    return {PROJECT: version(), "python": ".".join(platform.python_version_tuple()[:2]), "torch": torch}


def _kinds(stage: Stage) -> set[str]:
    """Every `kind` in the configurations of a stage and the stage's ancestors."""
    own = re.findall(r'"kind":"(\w+)"', stage.config.model_dump_json())
    return {*own}.union(*map(_kinds, stage.parents.values()))


def _names_of_others(table: Mapping[str, Callable[..., Any]], own: set[str]) -> set[str]:
    return {made.__name__ for made in table.values()} - {table[key].__name__ for key in own & table.keys()}


def _file(module: str, root: Path) -> Path | None:
    path = root.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def _source(path: Path) -> ModuleFile:
    stat = path.stat()
    return _read(path, stat.st_mtime_ns, stat.st_size)


@cache
def _read(path: Path, changed: int, size: int) -> ModuleFile:  # once for each state of the file
    return ModuleFile(path)


def tree_digest(text: str) -> str:
    """Digest of a module's syntax tree, without docstrings and with the checkout's names of modules."""
    tree = ast.parse(_as_in_the_checkout(text))
    for node in ast.walk(tree):
        if isinstance(body := getattr(node, "body", None), list):
            body[:] = [part for part in body if not (isinstance(part, ast.Expr) and _is_text(part.value))]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:DIGITS]


def _as_in_the_checkout(text: str) -> str:
    return SAME_NAME.sub(r"\1", INSTALLED.sub("", text))


def _is_text(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def _some(files: Sequence[str]) -> str:
    return ", ".join(files[:MOST_FILES]) + (f" and {len(files) - MOST_FILES} more" if len(files) > MOST_FILES else "")
