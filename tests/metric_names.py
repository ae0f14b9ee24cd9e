"""Names of metrics: those that a dashboard asks for, that source code declares, and that a node exports."""

import ast
import json
import re
import urllib.request
from pathlib import Path
from typing import NamedTuple

from prometheus_client.parser import text_string_to_metric_families
from ray.util.metrics import Metric

SUFFIXES = {"Counter": ("_total",), "Gauge": ("",), "Histogram": ("_bucket", "_sum", "_count")}  # as Ray exports them
FROM_PROMETHEUS = {"le", "pod", "ray_io_cluster"}  # labels of buckets, and of the pod that is asked


class Query(NamedTuple):
    panel: str
    text: str  # PromQL
    metrics: frozenset[str]
    labels: frozenset[str]


def queries(dashboard: Path) -> list[Query]:
    """Every query of the panels of a Grafana dashboard."""
    panels = json.loads(dashboard.read_text())["panels"]
    return [read_query(panel["title"], target["expr"]) for panel in panels for target in panel["targets"]]


def read_query(panel: str, text: str) -> Query:
    by = re.findall(r"\b(?:by|without)\s*\(([^)]*)\)", text)
    matched = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", "".join(re.findall(r"\{[^}]*\}", text)))
    labels = {label.strip() for clause in by for label in clause.split(",")} | set(matched)
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\b(?:by|without)\s*\([^)]*\)", " ", text)
    names = re.findall(r"\b[a-zA-Z_:][\w:]*\b(?!\s*\()", bare)
    return Query(panel, text, frozenset(names), frozenset(labels))


def exported(metric: Metric) -> dict[str, frozenset[str]]:
    """What Ray exports of a metric -> its labels."""
    labels = frozenset(metric.info["tag_keys"])
    return {f"ray_{metric.info['name']}{suffix}": labels for suffix in SUFFIXES[type(metric).__name__]}


def declared(files: list[Path]) -> list[re.Pattern[str]]:
    """What Ray exports of the counters, gauges and histograms that Python files make; what a name is put together of
    may be any word."""
    calls = [node for file in files for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    patterns = []
    for call in calls:
        kind = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        named = [keyword.value for keyword in call.keywords if keyword.arg == "name"]
        if kind in SUFFIXES and (call.args or named):
            name = pattern_of((call.args or named)[0])
            patterns += [re.compile(f"ray_{name}{suffix}") for suffix in SUFFIXES[kind] if name]
    return patterns


def pattern_of(name: ast.expr) -> str:
    """A regular expression of a string, or "" where it isn't one."""
    if isinstance(name, ast.Constant) and isinstance(name.value, str):
        return re.escape(name.value)
    if isinstance(name, ast.JoinedStr):
        return "".join(pattern_of(part) if isinstance(part, ast.Constant) else r"\w+" for part in name.values)
    return ""


def series_at(agent: str) -> dict[str, set[str]]:
    """Every series that a node's agent (host:port) exports now -> the labels that it has somewhere."""
    found: dict[str, set[str]] = {}
    text = urllib.request.urlopen(f"http://{agent}/metrics", timeout=30).read().decode()
    for metric in text_string_to_metric_families(text):
        for sample in metric.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def lacking(wanted: list[Query], found: dict[str, set[str]]) -> list[str]:
    """What queries ask for and nobody exports."""
    metrics = [name for query in wanted for name in query.metrics if name not in found]
    labels = [
        f"{label} of {name}"
        for query in wanted
        for name in query.metrics & found.keys()
        for label in query.labels - FROM_PROMETHEUS - found[name]
    ]
    return metrics + labels
