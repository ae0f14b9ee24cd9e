"""Slides of the lecture, read from `lecture.md`, and the code of the formulas, read from the source.

Code is read when a page is drawn, so that the page shows the lines that run.
"""

import ast
import re
from pathlib import Path
from typing import NamedTuple

import components
from components.configuration.config import Config

LECTURE = Path(__file__).with_name("lecture.md")
ROOT = Path(components.__file__).parents[1]
WHOLE = 14  # lines of a definition that are shown all; of a longer one those near the formula
NEAR = 5  # lines before and after it
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class CodeReference(Config):
    """Place of a formula in the code: a function or class of a file, and words of a statement."""

    file: str  # components/models/diffusion/schedule.py
    name: str  # Schedule.add_noise
    words: str  # signal * x_0 + sigma * noise


class Slide(Config):
    """A slide of the lecture, or several with the same content."""

    chapter: str
    title: str
    text: str = ""
    formulas: tuple[str, ...] = ()  # LaTeX
    slip: str = ""  # what the slide has wrong, and what is right
    code: tuple[CodeReference, ...] = ()
    recipes: tuple[str, ...] = ()  # whose results stand here
    shows: tuple[str, ...] = ()  # names of their images, titles of plots and tables; empty: all that others leave
    rows: tuple[str, ...] = ()  # row | what it takes | recipe or command | tests that hold it, for docs/ROWS.md


class CodeLine(NamedTuple):
    """A line of the product's code on a slide, with its number in the file.

    Lines of the slide's formula are marked, so that the page can set them apart from the lines around.
    """

    number: int
    text: str
    is_formula: bool


def read_slides(text: str) -> tuple[Slide, ...]:
    """Slides of a Markdown text, in the order of the text; `lecture.md` says how a slide is written.

    Raises LookupError, with the slide's title, for a list item with an unknown key, and for a `code` item that is
    not a file, a definition and words.
    """
    slides, chapter = [], ""
    for section in re.split(r"^(?=##? )", text, flags=re.MULTILINE)[1:]:
        heading, _, body = section.partition("\n")
        marks, _, title = heading.partition(" ")
        chapter = title if marks == "#" else chapter
        slides += [] if marks == "#" else [read_slide(chapter, title, body)]
    return tuple(slides)


def read_slide(chapter: str, title: str, body: str) -> Slide:
    """A slide of paragraphs: words, formulas between `$$`, or lists of `- key: value`."""
    words: list[str] = []
    formulas: list[str] = []
    values: dict[str, list[str]] = {key: [] for key in ("slip", "code", "recipes", "shows", "row")}
    for paragraph in body.strip().split("\n\n"):
        if paragraph.startswith("$$"):
            formulas.append(paragraph.strip("$"))
        elif not paragraph.startswith("- "):
            words += paragraph.split()
        for line in re.findall(r"^- (.*(?:\n  .*)*)", paragraph, re.MULTILINE):
            key, _, value = line.partition(": ")
            if key not in values:
                raise LookupError(f"slide {title!r} has a line {key!r}; there are {', '.join(values)}")
            values[key].append(" ".join(value.split()))
    references = [re.fullmatch(r"(?P<file>\S+) (?P<name>\S+) `(?P<words>.+)`", line) for line in values["code"]]
    if None in references:
        wrong = values["code"][references.index(None)]
        raise LookupError(f"slide {title!r}: {wrong!r} is no file, definition and `words`")
    return Slide(
        chapter=chapter,
        title=title,
        text=" ".join(words),
        formulas=tuple(formulas),
        slip=" ".join(values["slip"]),
        code=tuple(CodeReference(**match.groupdict()) for match in references if match),
        recipes=tuple(name for line in values["recipes"] for name in line.split(", ")),
        shows=tuple(values["shows"]),
        rows=tuple(values["row"]),
    )


def read_code(reference: CodeReference) -> list[CodeLine]:
    """The lines of a definition without the docstring, the formula marked.

    Raises LookupError where there is no such file, definition or statement (any more).
    """
    path = ROOT / reference.file
    if not path.is_file():
        raise LookupError(f"no file {reference.file}")
    text = path.read_text()
    definition, source = find_definition(ast.parse(text), reference), text.splitlines()
    formula, margin, shown = find_statement(definition, source, reference), definition.col_offset, []
    for part in shown_parts(definition, formula):
        lines = [CodeLine(number, source[number - 1][margin:], number in formula) for number in part]
        shown += [line for line in lines if line.text.strip()] or [CodeLine(0, "    …", False)]
    return shown


def find_definition(tree: ast.Module, reference: CodeReference) -> Definition:
    """The function or class called so, methods as `Class.method`."""
    node: ast.Module | Definition = tree
    for part in reference.name.split("."):
        inside = [each for each in node.body if isinstance(each, Definition) and each.name == part]
        if not inside:
            raise LookupError(f"no {reference.name} in {reference.file}")
        node = inside[0]
    assert isinstance(node, Definition)  # `split` gives a part at least
    return node


def find_statement(definition: Definition, lines: list[str], reference: CodeReference) -> range:
    """Line numbers of the smallest statement of the definition with the words of the reference."""
    inside = range(body_start(definition), (definition.end_lineno or 0) + 1)
    first = next((number for number in inside if reference.words in lines[number - 1]), None)
    if first is None:
        raise LookupError(f"{reference.words!r} stands nowhere in {reference.name} of {reference.file}")
    return min((span for span in spans_of(definition) if first in span), key=len, default=range(first, first + 1))


def spans_of(definition: Definition) -> list[range]:
    """Line numbers of each statement without statements inside."""
    nodes = [node for node in ast.walk(definition) if isinstance(node, ast.stmt) and not hasattr(node, "body")]
    return [range(node.lineno, (node.end_lineno or node.lineno) + 1) for node in nodes]


def shown_parts(definition: Definition, formula: range) -> list[range]:
    """Line numbers of head and body; of a long head or body the lines near the formula; empty: a cut."""
    head, cut = range(definition.lineno, definition.body[0].lineno), range(0)
    body = range(body_start(definition), (definition.end_lineno or 0) + 1)
    near = body if len(body) <= WHOLE else whole_statements(definition, body, formula)
    first = head if len(head) <= WHOLE else head[:1]
    before = len(first) < len(head) or near.start > body.start
    return [first, *[cut] * before, near, *[cut] * (near.stop < body.stop)]


def whole_statements(definition: Definition, body: range, formula: range) -> range:
    """Some lines before and after the formula; no statement is cut."""
    spans = spans_of(definition)
    first, last = max(body.start, formula.start - NEAR), min(body.stop, formula.stop + NEAR) - 1
    start = min([first, *(span.start for span in spans if first in span)])
    return range(start, max([last + 1, *(span.stop for span in spans if last in span)]))


def body_start(definition: Definition) -> int:
    """Number of the first line behind head and docstring."""
    body = definition.body
    documented = len(body) > 1 and ast.get_docstring(definition, clean=False) is not None
    return (body[0].end_lineno or 0) + 1 if documented else body[0].lineno
