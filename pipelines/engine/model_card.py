"""Descriptions of a run's models for MLflow, in Markdown: recipe, data, license, command, code, figures."""

import re
import shlex
from collections.abc import Mapping, Sequence

from components.data.sources.folder import LICENSE as UNSPECIFIED
from components.evaluation.measure import DistanceRow
from components.runtime.storage.artifact import Artifact
from pipelines.engine.code_seen import made_by

LONGEST = 5000  # characters of a description that MLflow takes
COMMIT = re.compile(r"[0-9a-f]{40}")
PAGES = {"openmoji": "from [openmoji.org](https://openmoji.org)"}  # that a license asks to be named


def model_card(
    artifacts: Mapping[str, Artifact], *, recipe: str, run: str, command: Sequence[str], commit: str
) -> tuple[str, str]:
    """Returns what is true of every version of its models, and what of those of this run alone.

    Args:
        artifacts: stage -> what it made, now or before.
        command: as it was typed, without places.
        commit: of the code that runs.
    """
    about = f"Recipe `{recipe}`.{_data(artifacts)}"
    again = f"    {shlex.join(command)}"
    if COMMIT.fullmatch(commit):
        again = f"    git checkout {commit}\n{again}"
    again = f"Run `{run}`; its `recipe.yaml` has every number. To make it again:\n\n{again}"
    details = "\n\n".join(part for part in (again, _code(artifacts), _figures(artifacts)) if part)
    return about, details[: LONGEST - len(about) - 2]


def _data(artifacts: Mapping[str, Artifact]) -> str:
    if "images" not in artifacts:
        return ""
    facts = artifacts["images"].metadata
    license_ = "unknown, the source states none" if facts["license"] == UNSPECIFIED else facts["license"]
    page = f", {PAGES[facts['source']]}" if facts["source"] in PAGES else ""
    return f" Trained on {facts['train_samples']:,} images of `{facts['source']}`{page}; their license: {license_}."


def _figures(artifacts: Mapping[str, Artifact]) -> str:
    facts = artifacts["evaluation"].metadata if "evaluation" in artifacts else {}
    if not facts.get("distances"):
        return ""
    network = f"`fd_{facts['feature_network']}`"
    lines = [
        f"Fréchet distances {network} to the training images, smaller is nearer. Nobody states the license of that "
        "network's pretrained weights; no model here holds them.",
        "",
        "| images | N | distance |",
        "|---|---:|---:|",
    ]
    for row in (DistanceRow(**row) for row in facts["distances"]):
        error = "" if row.standard_error is None else f" ± {row.standard_error:.1f}"
        lines.append(f"| {row.name} | {row.samples:,} | {row.distance:.1f}{error} |")
    return "\n".join(lines)


def _code(artifacts: Mapping[str, Artifact]) -> str:
    """A line for each code that made some of the models."""
    makers: dict[str, list[str]] = {}
    for stage, artifact in artifacts.items():
        if artifact.kind == "model":
            makers.setdefault(made_by(artifact.provenance) or "code that is not known", []).append(stage)
    return "\n".join(f"- {', '.join(stages)}: made by {maker}" for maker, stages in makers.items())
