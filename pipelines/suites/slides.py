"""Slides of the lecture, read from `lecture.md`, and the code of the formulas, read from the source.

Code is read when a page is drawn, so that the page shows the lines that run.
"""

import ast
import re
from pathlib import Path
from typing import Any, NamedTuple

import components
from components.configuration.config import Config

LECTURE = Path(__file__).with_name("lecture.md")
ROOT = Path(components.__file__).parents[1]
WHOLE = 14  # lines of a definition; of a longer one those near the formula
NEAR = 5  # lines before and after it
SEPARATORS = {"branch": " > ", "side_by_side": ", ", "recipes": ", "}  # between values of a line
KEYS = ("slip", "code", "branch", "draws", "side_by_side", "recipes", "shows", "source", "row")  # of a slide's lists
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
    branch: tuple[str, ...] = ()  # of the taxonomy, from the root, that its recipes stand in
    draws: tuple[str, ...] = ()  # drawings of the page itself
    side_by_side: tuple[str, ...] = ()  # recipes whose images are set side by side
    sources: tuple[tuple[str, str], ...] = ()  # title and address
    code: tuple[CodeReference, ...] = ()
    recipes: tuple[str, ...] = ()  # whose results stand here
    shows: tuple[str, ...] = ()  # images, plots and tables; empty: all that others leave
    rows: tuple[str, ...] = ()  # row | what it takes | recipe or command | tests, for docs/ROWS.md


class CodeLine(NamedTuple):
    """A line of the product's code on a slide, with its number in the file.
    Lines of the slide's formula are marked, so that the page can set them apart from the lines around."""

    number: int
    text: str
    is_formula: bool


def read_slides(text: str) -> tuple[Slide, ...]:
    """Slides of a Markdown text, in the order of the text; `lecture.md` says how a slide is written.
    Raises LookupError, with the slide's title, for a list item with an unknown key, and for a `code` item that is not a
    file, a definition and words."""
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
    values: dict[str, Any] = {key: [] for key in KEYS}
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
    values["code"] = [match.groupdict() for match in references if match]
    for key, separator in SEPARATORS.items():
        values[key] = [part for line in values[key] for part in line.split(separator)]
    values["slip"] = " ".join(values["slip"])
    values["sources"] = [line.partition(" | ")[::2] for line in values.pop("source")]
    values["rows"] = values.pop("row")
    values |= {"chapter": chapter, "title": title, "text": " ".join(words), "formulas": formulas}
    return Slide.model_validate(values)


def read_code(reference: CodeReference) -> list[CodeLine]:
    """The lines of a definition without the docstring, the formula marked.
    The formula is the smallest statement with the words of the reference. Of a long head or body only whole statements
    near the formula are shown, with an ellipsis at each cut. Raises LookupError where there is no such file, definition
    or statement (any more)."""
    path = ROOT / reference.file
    if not path.is_file():
        raise LookupError(f"no file {reference.file}")
    text = path.read_text()
    definition, source = find_definition(ast.parse(text), reference), text.splitlines()
    opening, documented = definition.body[0], ast.get_docstring(definition, clean=False) is not None
    head = range(definition.lineno, opening.lineno)
    start = (opening.end_lineno or 0) + 1 if documented and len(definition.body) > 1 else opening.lineno
    body = range(start, (definition.end_lineno or 0) + 1)
    place = next((number for number in body if reference.words in source[number - 1]), None)
    if place is None:
        raise LookupError(f"{reference.words!r} stands nowhere in {reference.name} of {reference.file}")
    statements = [node for node in ast.walk(definition) if isinstance(node, ast.stmt) and not hasattr(node, "body")]
    spans = [range(node.lineno, (node.end_lineno or node.lineno) + 1) for node in statements]
    formula = min((span for span in spans if place in span), key=len, default=range(place, place + 1))
    near = body
    if len(body) > WHOLE:  # some lines before and after the formula; no statement is cut
        first, last = max(body.start, formula.start - NEAR), min(body.stop, formula.stop + NEAR) - 1
        start = min([first, *(span.start for span in spans if first in span)])
        near = range(start, max([last + 1, *(span.stop for span in spans if last in span)]))
    shown_head, cut, shown = head if len(head) <= WHOLE else head[:1], range(0), []
    cut_before = len(shown_head) < len(head) or near.start > body.start
    for part in (shown_head, *[cut] * cut_before, near, *[cut] * (near.stop < body.stop)):
        lines = [CodeLine(number, source[number - 1][definition.col_offset :], number in formula) for number in part]
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
