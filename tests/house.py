"""Counts of the house, beside their limits: how much there is, in what shape, in what words.

`python -m tests.house` prints the table and ends with 1 where a count is beyond its limit; `make check` runs it. Limits
stand in `tests/contracts/budget.toml`. Only text is read; nothing of the product is imported.
"""

import ast
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
BUDGET = ROOT / "tests/contracts/budget.toml"
PACKAGES = ("components", "pipelines")
OTHER = (".css", ".html", ".j2", ".js", ".json", ".svg")  # files of the product that are not Python
OPENINGS = {"What", "Of", "Those", "As", "By", "Whether", "That", "Which"}
PRONOUNS = {
    *("it", "its", "itself", "they", "them", "their", "themselves", "one", "ones", "others", "this", "that", "these"),
    *("those", "what", "which", "who", "whose", "whom"),
}
FIRST_LINE = 100  # characters
HELPER = 6  # lines of a function that its one caller could hold
BARE = re.compile(r"[\[\](){},:]+")  # a line of brackets alone

Function = ast.FunctionDef | ast.AsyncFunctionDef
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class Module:
    """One file of the product."""

    def __init__(self, path: Path, root: Path) -> None:
        self.name = path.relative_to(root).as_posix()
        self.text = path.read_text()
        self.tree = ast.parse(self.text)
        self.lines = self.text.count("\n")

    @property
    def room(self) -> str:
        """`components/data`, and `pipelines` for what stands in no room of it."""
        parts = self.name.split("/")
        return "/".join(parts[:2]) if len(parts) > 2 else parts[0]

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(self.tree))

    @property
    def functions(self) -> list[Function]:
        return [node for node in self.nodes if isinstance(node, Function)]

    @property
    def docstrings(self) -> Iterator[tuple[Documented, str]]:
        for node in self.nodes:
            if isinstance(node, Documented) and (text := ast.get_docstring(node)):
                yield node, text

    @property
    def code(self) -> list[str]:
        """Lines that hold code: no blank, comment, docstring or import, and no bracket alone."""
        silent: set[int] = set()
        for node, _ in self.docstrings:
            silent.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
        for node in self.nodes:
            if isinstance(node, ast.Import | ast.ImportFrom):
                silent.update(range(node.lineno, (node.end_lineno or 0) + 1))
        numbered = [(number, line.strip()) for number, line in enumerate(self.text.split("\n"), start=1)]
        kept = [n for n, line in numbered if n not in silent and line and line[0] != "#" and not BARE.fullmatch(line)]
        return [self.text.split("\n")[number - 1] for number in kept]


class Count(NamedTuple):
    """A count, its limit, and where the house goes; `places`: the worst of it, to be mended first."""

    name: str
    value: float
    limit: float
    goal: float
    least: bool = False  # the limit is the least that is allowed
    places: Sequence[str] = ()

    @property
    def beyond(self) -> bool:
        return self.value < self.limit if self.least else self.value > self.limit


@cache
def modules(root: Path = ROOT) -> list[Module]:
    """Every file of the product, by name."""
    return [Module(path, root) for package in PACKAGES for path in sorted((root / package).rglob("*.py"))]


def length(function: Function) -> int:
    """Lines of a function without its docstring."""
    lines = (function.end_lineno or 0) - function.lineno + 1
    if ast.get_docstring(function):
        lines -= (function.body[0].end_lineno or 0) - function.body[0].lineno + 1
    return lines


def helpers(house: Sequence[Module]) -> list[str]:
    """Functions of few lines that are named once beside their definition."""
    uses: Counter[str] = Counter()
    for module in house:
        uses.update(node.id for node in module.nodes if isinstance(node, ast.Name))
        uses.update(node.attr for node in module.nodes if isinstance(node, ast.Attribute))
    return [
        f"{module.name}:{function.lineno} {function.name}"
        for module in house
        for function in module.functions
        if uses[function.name] == 1 and length(function) <= HELPER and not function.name.startswith("__")
    ]


def unused(house: Sequence[Module], root: Path = ROOT) -> list[str]:
    """Functions and classes that tests alone call. A decorator, or a manifest, is a user of the product."""
    manifests = "".join(path.read_text() for path in (root / "infra").rglob("*.yaml"))
    defined = {
        (module.name, node.name)
        for module in house
        for node in module.tree.body
        if isinstance(node, Function | ast.ClassDef) and not node.decorator_list
    }
    for module in house:
        taken = {node.id for node in module.nodes if isinstance(node, ast.Name)}
        attributes = {node.attr for node in module.nodes if isinstance(node, ast.Attribute)}
        defined -= {(module.name, name) for name in taken}
        defined = {(place, name) for place, name in defined if name not in attributes}
        for node in module.nodes:
            if isinstance(node, ast.ImportFrom) and node.module:
                defined -= {(f"{node.module.replace('.', '/')}.py", alias.name) for alias in node.names}
    dotted = {f"{place.removesuffix('.py').replace('/', '.')}:{name}": f"{place}:{name}" for place, name in defined}
    return sorted(place for path, place in dotted.items() if path not in manifests)


def first_lines(house: Sequence[Module]) -> list[tuple[str, str]]:
    """(place, first line) of each docstring."""
    return [
        (f"{module.name}:{getattr(node, 'lineno', 1)}", text.split("\n")[0])
        for module in house
        for node, text in module.docstrings
    ]


def counts(house: Sequence[Module], root: Path = ROOT) -> dict[str, float]:
    """Every count of the house by name; those of rooms are `lines components/data`."""
    files = [module for module in house if not module.name.endswith("__init__.py")]
    functions = [function for module in house for function in module.functions]
    texts = [text for module in house for _, text in module.docstrings]
    code = [line for module in house for line in module.code]
    lines = first_lines(house)
    words = [word.lower() for _, line in lines for word in re.findall(r"[A-Za-z']+", line)]
    public = [bool(ast.get_docstring(function)) for function in functions if not function.name.startswith("_")]
    others = [p for package in PACKAGES for p in (root / package).rglob("*") if p.suffix in OTHER and p.is_file()]
    tests = [path for path in (root / "tests").rglob("*.py")]
    total = sum(module.lines for module in house)
    rooms: Counter[str] = Counter()
    for module in house:
        rooms[f"lines {module.room}"] += module.lines
    return {
        "lines": total,
        "files": len(files),
        "statements": sum(isinstance(node, ast.stmt) for module in house for node in module.nodes),
        "lines that are not Python": sum(path.read_text().count("\n") for path in others),
        "median file": median(module.lines for module in files),
        "files under 50 lines": sum(module.lines < 50 for module in files),
        "longest file": max(module.lines for module in files),
        "longest function": max(map(length, functions)),
        "median function": median(map(length, functions)),
        "percent code": 100 * len(code) / total,
        "characters of a line of code": mean(map(len, code)),
        "percent helpers of one caller": 100 * len(helpers(house)) / len(functions),
        "code that tests alone call": len(unused(house, root)),
        "words of a docstring": mean(len(text.split()) for text in texts),
        "percent of public functions with a docstring": 100 * mean(public),
        "docstrings with a riddling opening": sum(line.split()[0].strip(",.:;") in OPENINGS for _, line in lines),
        "first lines over 100 characters": sum(len(line) > FIRST_LINE for _, line in lines),
        "pronouns in 100 words of first lines": 100 * sum(word in PRONOUNS for word in words) / len(words),
        "tests per line of product": sum(path.read_text().count("\n") for path in tests) / total,
        **dict(sorted(rooms.items())),
    }


def places(house: Sequence[Module]) -> Mapping[str, list[str]]:
    """Where to begin, for the counts that are of places."""
    lines = first_lines(house)
    return {
        "files under 50 lines": [m.name for m in house if m.lines < 50 and not m.name.endswith("__init__.py")],
        "longest file": [max(house, key=lambda module: module.lines).name],
        "percent helpers of one caller": helpers(house),
        "code that tests alone call": unused(house),
        "docstrings with a riddling opening": [p for p, line in lines if line.split()[0].strip(",.:;") in OPENINGS],
        "first lines over 100 characters": [place for place, line in lines if len(line) > FIRST_LINE],
    }


def measured(root: Path = ROOT, budget: Path = BUDGET) -> list[Count]:
    """Each count of the table with its limit. Raises KeyError for a count without one: a new room needs a line."""
    house = modules(root)
    limits, where = tomllib.loads(budget.read_text()), places(house)
    values = counts(house, root)
    return [Count(name, value, **limits[name], places=where.get(name, ())) for name, value in values.items()]


def main() -> None:
    """Print the table; `python -m tests.house PLACES` lists the places of the counts that have some."""
    table, console = Table("count", "now", "limit", "goal"), Console()
    rows = measured()
    for row in rows:
        sign = "≥" if row.least else "≤"
        shown = [f"{number:,.1f}".removesuffix(".0") for number in (row.value, row.limit, row.goal)]
        table.add_row(row.name, shown[0], *(f"{sign} {text}" for text in shown[1:]), style="red" if row.beyond else "")
        if row.beyond or "PLACES" in sys.argv:
            console.print(*(f"{row.name}: {place}" for place in row.places), sep="\n")
    console.print(table)
    sys.exit(any(row.beyond for row in rows))


if __name__ == "__main__":
    main()
