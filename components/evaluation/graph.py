"""The workflow as a layered graph in inline SVG.

Each stage is drawn below its inputs, in the colors of the page.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

BOX_WIDTH, BOX_HEIGHT = 140, 50
COLUMN, ROW = 156, 88  # distance of neighboring boxes
MARGIN = 8


class Node(NamedTuple):
    """A box of the graph: a stage with state, detail and inputs."""

    name: str
    state: str  # a CSS class too
    detail: str  # second line
    inputs: Sequence[str]  # names of the nodes above


def graph_svg(nodes: Sequence[Node], *, title: str) -> str:
    """Draws nodes, listed after all inputs, as an `<svg>`; lines implied by longer paths are left out."""
    if not nodes:
        return ""
    parents = direct_parents({node.name: node.inputs for node in nodes})
    places = place(parents)
    left, right = min(x for x, _ in places.values()), max(x for x, _ in places.values())
    bottom = max(y for _, y in places.values())
    centers = {
        name: (MARGIN + BOX_WIDTH / 2 + (x - left) * COLUMN, MARGIN + BOX_HEIGHT / 2 + y * ROW)
        for name, (x, y) in places.items()
    }
    width = 2 * MARGIN + BOX_WIDTH + (right - left) * COLUMN
    height = 2 * MARGIN + BOX_HEIGHT + bottom * ROW
    lines = [_line(centers[parent], centers[name]) for name, above in parents.items() for parent in above]
    boxes = [_box(node, centers[node.name]) for node in nodes]
    words = f"{title}: " + "; ".join(
        f"{node.name} ({node.state}, {node.detail or 'no time'}) from {', '.join(node.inputs) or 'nothing'}"
        for node in nodes
    )
    return (
        f'<svg class="graph" role="img" viewBox="0 0 {width:g} {height:g}" style="max-width:{width:g}px" '
        f'aria-labelledby="graph-title"><title id="graph-title">{escape(words)}</title>{"".join(lines + boxes)}</svg>'
    )


def direct_parents(inputs: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Inputs of each node that no other input already implies (transitive reduction)."""
    above: dict[str, set[str]] = {}
    direct = {}
    for name, parents in inputs.items():
        known = [parent for parent in dict.fromkeys(parents) if parent in above]
        reached = set().union(*(above[parent] for parent in known))
        direct[name] = [parent for parent in known if parent not in reached]
        above[name] = reached | set(known)
    return direct


def place(parents: Mapping[str, Sequence[str]]) -> dict[str, tuple[float, int]]:
    """(column, row) of each node: a row below the lowest parent; children spread below a common parent."""
    children: dict[str, list[str]] = {name: [] for name in parents}
    for name, above in parents.items():
        for parent in above:
            children[parent].append(name)
    places: dict[str, tuple[float, int]] = {}
    for name, above in parents.items():
        row = 1 + max((places[parent][1] for parent in above), default=-1)
        wanted = sum(_wish(name, places[parent][0], children[parent]) for parent in above) / max(1, len(above))
        taken = {column for column, other in places.values() if other == row}
        places[name] = (_free(wanted, taken), row)
    return places


def _wish(name: str, parent_column: float, siblings: Sequence[str]) -> float:
    return parent_column + siblings.index(name) - (len(siblings) - 1) / 2


def _free(wanted: float, taken: set[float]) -> float:
    """The wanted column, or the nearest column to the right with enough room."""
    while any(abs(wanted - column) < 1 for column in taken):
        wanted += 0.5
    return wanted


def _line(start: tuple[float, float], end: tuple[float, float]) -> str:
    top, bottom = start[1] + BOX_HEIGHT / 2, end[1] - BOX_HEIGHT / 2
    bend = min(ROW - BOX_HEIGHT, bottom - top)
    turn = bottom - bend
    return (
        f'<path class="edge" d="M{start[0]:g} {top:g}V{turn:g}'
        f'C{start[0]:g} {turn + bend / 2:g} {end[0]:g} {turn + bend / 2:g} {end[0]:g} {bottom:g}"/>'
    )


def _box(node: Node, center: tuple[float, float]) -> str:
    x, y = center[0] - BOX_WIDTH / 2, center[1] - BOX_HEIGHT / 2
    return (
        f'<g class="node {escape(node.state)}"><rect x="{x:g}" y="{y:g}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" '
        f'rx="10"/><text x="{center[0]:g}" y="{center[1] - 3:g}" class="name">{escape(node.name.replace("_", " "))}'
        f'</text><text x="{center[0]:g}" y="{center[1] + 15:g}" class="detail">{escape(node.detail)}</text></g>'
    )
