"""Records the code behind a stage's numbers with the artifact, and names later changes.

Never part of a key: whether a change matters is for people to say. Each module is known by its text and by its syntax
tree without comments and docstrings, so that neither of these is called a change; names of modules are those of the
checkout, so that a wheel and a packed model have the same digests.
"""

import ast
import hashlib
import importlib.metadata
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from components.configuration.families import family_name
from components.configuration.optimization import Training
from pipelines.engine.provenance import PACKAGES, PROJECT, ROOT, short, version
from pipelines.workflow import PlannedStage, Stage

DECIDING = ("configuration", "data", "evaluation", "models", "sampling", "stages", "training")
LEFT_OUT = {  # what draws and reports, in rooms that decide
    *(f"components/evaluation/{name}.py" for name in ("gallery", "grids", "plots")),
    "components/stages/context.py",
}
NETWORKS = "components/models/bundle.py", "NETWORKS"  # file and name of a table: kind -> class
TASKS = "components/training/families.py", "TASKS"  # the same: model family -> class or function
DIGITS = 12  # hexadecimal, of a digest
MOST_FILES = 8  # in a line
INSTALLED = re.compile(rf"\bimage_cascade(?:_[0-9a-f]+)?\.(?=(?:{'|'.join(PACKAGES)})\b)")  # before a module's name
SAME_NAME = re.compile(r"^(\s*import (\w+)) as \2$", re.MULTILINE)  # of a wheel: import image_cascade.components as …


class Import(NamedTuple):
    """An import of a module, or of a single name from a module, anywhere in a file."""

    module: str  # as components.models.unet
    name: str  # of what is taken of it; empty: nothing


def code_of(stage: Stage, root: Path = ROOT) -> dict[str, Any]:
    """Versions, and digests (text, syntax tree) of each module behind the stage's numbers, by path.

    These are the modules that its function and its configuration import, inside functions too, and so on. A network is
    one of them if the stage or one that it needs has its kind, a training's task if it is that of the stage's family.
    """
    families = {family_name(stage.config.network.kind)} if isinstance(stage.config, Training) else set[str]()
    foreign = _names(root, NETWORKS, without=_kinds(stage)) | _names(root, TASKS, without=families)
    todo = [_file(INSTALLED.sub("", part.__module__), root) for part in (stage.run, type(stage.config))]
    reached: set[Path] = set()
    while todo:
        path = todo.pop()
        if path is None or path in reached:
            continue
        reached.add(path)
        todo += [
            _file(f"{each.module}.{each.name}", root) or _file(each.module, root)
            for each in _imports(*_state(path))
            if each.name not in foreign
        ]
    names = sorted(path.relative_to(root).as_posix() for path in reached)
    states = {name: _state(root / name) for name in names if _decides(name)}
    return _versions() | {"modules": {n: [_text_digest(*state), _tree_digest(*state)] for n, state in states.items()}}


def changes_of_code(planned: Sequence[PlannedStage], root: Path = ROOT) -> list[str]:
    """A line for each change of code since cached stages were made, with the stages and the remedy."""
    lines: dict[str, list[str]] = {}
    for entry in planned:
        if entry.cached is not None and not entry.wanted:
            for change in _changes(entry.cached.provenance.get("code"), root):
                lines.setdefault(change, []).append(entry.stage.name)
    return [
        f"{', '.join(names)}: cached, but {change}; `--force` makes {'it' if len(names) == 1 else 'them'} anew"
        for change, names in lines.items()
    ]


def made_by(provenance: Mapping[str, Any]) -> str:
    """Commit and versions of the code that made an artifact, in one line, from the manifest.

    Empty where the manifest has none.
    """
    versions = {name: value for name, value in provenance.get("code", {}).items() if name != "modules"}
    commits = [short(provenance["git_commit"])] if "git_commit" in provenance else []
    return ", ".join([*commits, *(f"{name} {value}" for name, value in versions.items())])


def _changes(record: Mapping[str, Any] | None, root: Path) -> Iterator[str]:
    if record is None:
        yield "which code made it is not known"
        return
    changed, unlike = [], []
    for name, (text, tree) in record["modules"].items():
        path = root / name
        if path.is_file() and _text_digest(*_state(path)) == text:
            continue
        same_python = record["python"] == _versions()["python"]
        if not path.is_file() or (same_python and _tree_digest(*_state(path)) != tree):
            changed.append(name)
        elif not same_python:
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


def _decides(name: str) -> bool:
    return name not in LEFT_OUT and name.startswith(tuple(f"components/{room}/" for room in DECIDING))


def _kinds(stage: Stage) -> set[str]:
    """Every `kind` in the configurations of a stage and the stage's ancestors."""
    kinds = _kinds_in(stage.config.model_dump(mode="json"))
    return kinds.union(*(_kinds(parent) for parent in stage.parents()))


def _kinds_in(value: Any) -> set[str]:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    own = {str(value["kind"])} if isinstance(value, dict) and "kind" in value else set()
    return own.union(*(_kinds_in(part) for part in parts))


def _names(root: Path, place: tuple[str, str], *, without: set[str]) -> set[str]:
    """Names of the values of a table, without the values of the keys in `without`."""
    file, title = place
    tree = ast.parse((root / file).read_text())
    (table,) = [n.value for n in tree.body if isinstance(n, ast.AnnAssign) and ast.unparse(n.target) == title]
    assert isinstance(table, ast.Dict)
    keys = [key.value for key in table.keys if isinstance(key, ast.Constant)]
    rows = [*zip(keys, map(ast.unparse, table.values), strict=True)]
    return {name for _, name in rows} - {name for key, name in rows if key in without}


def _file(module: str, root: Path) -> Path | None:
    path = root.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def _state(path: Path) -> tuple[Path, int, int]:
    """Path, time and size of a file: the cache key of its text."""
    stat = path.stat()
    return path, stat.st_mtime_ns, stat.st_size


@cache
def _imports(path: Path, changed: int, size: int) -> tuple[Import, ...]:
    imports = []
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.ImportFrom) and node.module:
            imports += [Import(INSTALLED.sub("", node.module), alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            imports += [Import(INSTALLED.sub("", alias.name), "") for alias in node.names]
    return tuple(one for one in imports if one.module.split(".")[0] in PACKAGES)


@cache
def _text_digest(path: Path, changed: int, size: int) -> str:
    return _digest(_as_in_the_checkout(path.read_text()))


@cache
def _tree_digest(path: Path, changed: int, size: int) -> str:
    return tree_digest(path.read_text())


def tree_digest(text: str) -> str:
    """Digest of a module's syntax tree, without docstrings and with the checkout's names of modules."""
    tree = ast.parse(_as_in_the_checkout(text))
    for node in ast.walk(tree):
        if isinstance(body := getattr(node, "body", None), list):
            body[:] = [part for part in body if not _is_text(part)]
    return _digest(ast.dump(tree))


def _as_in_the_checkout(text: str) -> str:
    return SAME_NAME.sub(r"\1", INSTALLED.sub("", text))


def _is_text(statement: ast.stmt) -> bool:
    value = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


def _some(files: Sequence[str]) -> str:
    return ", ".join(files[:MOST_FILES]) + (f" and {len(files) - MOST_FILES} more" if len(files) > MOST_FILES else "")
