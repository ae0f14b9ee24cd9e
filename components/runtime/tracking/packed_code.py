"""Code under a private package name: for the wheel, and for each registered model.

In the wheel the folders `components` and `pipelines` lie in `image_cascade`, and in a model in a package named after
its code: two models in one process run each their own. This file needs Python alone, for the wheel is built with it.
"""

import ast
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

PUBLIC = "image_cascade"
INSTALLED = {name: f"{PUBLIC}.{name}" for name in ("components", "pipelines")}  # in the checkout -> in the wheel
ROOM = Path(__file__).parent
PACKED = ("__init__.py", "configuration", "models", "sampling")
MODEL_CODE = ROOM / "cascade_model.py"


def pack_code(folder: Path) -> Path:
    """Write the rooms for sampling into `folder` as a package. Returns the package's own folder.
    Its name ends in twelve digits of its sha256, the same from a checkout and from the wheel."""
    # Each packed file by its path in the package, in the wheel's form.
    files = {"__init__.py": '"""The code of a registered model; it runs this and nothing that is installed."""\n'}
    rooms = ROOM.parents[1]
    for part in PACKED:
        for path in sorted((rooms / part).rglob("*.py")) if (rooms / part).is_dir() else [rooms / part]:
            files[f"components/{path.relative_to(rooms).as_posix()}"] = renamed(path.read_text(), INSTALLED)
    digest = hashlib.sha256()
    for name, text in files.items():
        digest.update(f"{name}\0{len(text.encode())}\0{text}".encode())
    package = folder / f"{PUBLIC}_{digest.hexdigest()[:12]}"
    for name, text in files.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(renamed(text, {PUBLIC: package.name}))
    return package


def model_code(package: str) -> str:
    """The program of a registered model (`cascade_model.py`) that runs the package's code."""
    return renamed(renamed(MODEL_CODE.read_text(), INSTALLED), {PUBLIC: package})


def renamed(source: str, names: Mapping[str, str]) -> str:
    """A module's text with renamed package imports; every line stays in place.
    `names`: a package's dotted name -> its new one. Raises ValueError for `import package.module` with no `as`."""
    lines = source.encode().split(b"\n")  # columns of the syntax tree count bytes
    for number, column, old, new in sorted(_renamings(ast.parse(source), names), reverse=True):
        line = lines[number - 1]
        if not line.startswith(old.encode(), column):
            raise ValueError(f"line {number}: write the import of {old} with single spaces")
        lines[number - 1] = line[:column] + new.encode() + line[column + len(old) :]
    return b"\n".join(lines).decode()


def _renamings(tree: ast.Module, names: Mapping[str, str]) -> Iterator[tuple[int, int, str, str]]:
    """(line, column, old name, new name) of each import of the packages, at any depth."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            if new := _new_name(node.module, names):
                yield node.lineno, node.col_offset + len("from "), node.module, new
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if new := _new_name(alias.name, names):
                    if alias.asname is None and "." in alias.name:
                        raise ValueError(f"line {node.lineno}: write `from … import …` for `import {alias.name}`")
                    yield alias.lineno, alias.col_offset, alias.name, new + f" as {alias.name}" * (not alias.asname)


def _new_name(module: str, names: Mapping[str, str]) -> str | None:
    for package, new in names.items():
        if module == package or module.startswith(f"{package}."):
            return new + module.removeprefix(package)
    return None
