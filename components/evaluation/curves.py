"""Figures of systems over budgets of training, and crossings of their curves."""

import math
from collections.abc import Iterable, Mapping
from statistics import fmean, pstdev
from typing import NamedTuple

from components.evaluation.plots import Panel, Series, plot_svg

SURE = 2.0  # standard errors from which on a figure is the smaller
WORDS = {1: "ahead", 0: "level within errors", -1: "behind"}


class CurvePoint(NamedTuple):
    """A figure at a budget, the mean over its trainings."""

    minutes: int  # of one core
    value: float
    error: float = 0.0  # standard error; 0 where none was measured


Curve = list[CurvePoint]  # by minutes, ascending


def averaged_curves(measured: Iterable[tuple[str, int, float | None, float | None]]) -> dict[str, Curve]:
    """Curves by name, from (name, minutes, value, standard error) of each training; without None.
    The error of a mean is what samples leave of it or what the spread of trainings does, the larger of both."""
    points: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for name, minutes, value, error in measured:
        if value is not None:
            points.setdefault(name, {}).setdefault(minutes, []).append((value, error or 0.0))
    return {
        name: [
            CurvePoint(minutes, fmean(v), max(math.hypot(*e) / len(e), pstdev(v) / math.sqrt(max(len(v) - 1, 1))))
            for minutes, own in sorted(budgets.items())
            for v, e in [[*zip(*own, strict=True)]]
        ]
        for name, budgets in points.items()
    }


def crossing(title: str, curve: Curve, rival_title: str, rival: Curve) -> str:
    """A sentence about a curve's crossing below a rival's, or its absence, at the budgets of both.
    A crossing lies between the last budget at which the curve is surely above, and that from which on it is surely
    below, to the largest one. Empty without a common budget."""
    pairs = [(point, other) for point in curve for other in rival if point.minutes == other.minutes]
    if not pairs:
        return ""
    gaps = [(other.value - point.value, SURE * math.hypot(point.error, other.error)) for point, other in pairs]
    states = [(gap > sure) - (gap < -sure) for gap, sure in gaps]
    told = [
        f"{WORDS[state]} at {point.minutes} min ({point.value:.0f} ± {point.error:.1f} against {other.value:.0f} ± "
        f"{other.error:.1f})"
        for state, (point, other) in zip(states, pairs, strict=True)
    ]
    since = max((place for place, state in enumerate(states, start=1) if state < 1), default=0)
    above = max((point.minutes for state, (point, _) in zip(states, pairs, strict=True) if state < 0), default=0)
    last = pairs[-1][0].minutes
    verdict = (
        f"at {last} minutes, the largest common budget, it is not ahead of {rival_title}"
        if since == len(states)
        else f"the curves cross between {above} and {pairs[since][0].minutes} minutes"
        if above
        else f"it is ahead of {rival_title} from {pairs[since][0].minutes} minutes on"
    )
    known = f", and both are measured to {last}" * (since < len(states) and last < max(curve[-1], rival[-1]).minutes)
    return f"{title}: {verdict}{known}; {', '.join(told)}."


def is_wide(curves: Mapping[str, Curve]) -> bool:
    """Tell whether values differ by more than a factor of ten, which a linear axis would flatten."""
    values = [point.value for curve in curves.values() for point in curve]
    return 10 * min(values) < max(values) and min(values) > 0


def draw_curves(
    figures: Mapping[str, Mapping[str, Curve]], *, levels: Mapping[str, float], against: tuple[str, str]
) -> str:
    """Draws a panel for each figure over minutes, a line for each system, as SVG; empty without points.
    `against`: two figures, the first of which is drawn over the second too, which has a logarithmic axis; so has what
    is wide. `levels`: name -> height of a dashed line beside the former."""
    quality, cost = against
    panels = [
        Panel(
            *("minutes of training, one core", name),
            [Series(title, *zip(*curve, strict=True)) for title, curve in curves.items()],
            levels=levels if name == quality else {},
            log_x=True,
            log_y=name == cost or is_wide(curves),
        )
        for name, curves in figures.items()
        if curves
    ]
    pairs = {
        title: [(x.value, *y[1:]) for x in figures[cost].get(title, []) for y in curve if x.minutes == y.minutes]
        for title, curve in figures[quality].items()
    }
    lines = [Series(title, *zip(*own, strict=True)) for title, own in pairs.items() if own]
    panels += [Panel(cost, quality, lines, log_x=True)] if lines else []
    return plot_svg(panels, salt="comparison", across=2) if panels else ""
