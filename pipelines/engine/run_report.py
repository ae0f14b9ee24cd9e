"""Files of a run in storage (recipe, plan, errors), and the report of these files."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from difflib import ndiff
from typing import Any, NamedTuple

from components.configuration.usage import UsageError
from components.data.shards import INDEX
from components.evaluation import report
from components.evaluation.metrics import DistanceRow
from components.runtime.storage.artifact import MANIFEST, Artifact, ArtifactError, load_artifact, parse_stored
from components.runtime.storage.garbage import ANNOUNCED, PLAN, RunPlan
from components.runtime.storage.store import Store
from components.runtime.tracking.event_log import stage_points, stage_warnings
from pipelines.engine.code_seen import changes_of_code, made_by
from pipelines.engine.execute import Outcome
from pipelines.engine.recorder import StageStatus
from pipelines.workflow import PlannedStage

REPORT, TRACES = "report.html", "traces"  # file and folder of a run
SOURCE_IMAGES = "source_images.png"  # file of a run that ingested a user's images


@contextmanager
def announced(root: Store, run: str, planned: Sequence[PlannedStage]) -> Iterator[None]:
    """Announce the stages of a run, so that `cascade gc` leaves them; withdraws after an error.
    Raises UsageError if a collection was faster."""
    folder = root.join("runs", run)
    before = folder.read(ANNOUNCED) if folder.exists(ANNOUNCED) else None
    stages = [{"name": entry.stage.name, "key": entry.key} for entry in planned]
    folder.write(ANNOUNCED, json.dumps({"stages": stages}).encode())
    try:
        gone = [e.stage.name for e in planned if e.cached is not None and not e.store.exists(MANIFEST)]
        if gone:
            raise UsageError(f"{', '.join(gone)}: deleted since the run was planned; run the same command again")
        yield
    except BaseException:
        folder.delete(ANNOUNCED) if before is None else folder.write(ANNOUNCED, before)
        raise


def check_same_run(root: Store, run: str, planned: Sequence[PlannedStage]) -> None:
    """Raise UsageError for a saved run with stages of other keys: its figures are of other models."""
    try:
        saved = _plan_of(root, run)
    except (FileNotFoundError, ArtifactError):  # none, or damaged by a full disk: the run writes it anew
        return
    if {(each.name, each.key) for each in saved.stages} != {(entry.stage.name, entry.key) for entry in planned}:
        raise UsageError(f"--run {run}: that run has other stages or settings; choose another name")


def save_run(
    folder: Store,
    recipe_yaml: str,
    planned: Sequence[PlannedStage],
    statuses: Sequence[StageStatus],
    outcome: Outcome,
    **about: Any,
) -> None:
    """Write recipe, plan with the stages' final states, and errors of a run to the run's folder.
    `about`: `facts` that the report names (commit, machine, storage), and the `seconds` of the whole run."""
    states, stages = {status.name: status for status in statuses}, []
    for entry in planned:
        inputs, name = [parent.name for parent in entry.stage.parents.values()], entry.stage.name
        stages.append({"key": entry.key, "inputs": inputs} | asdict(states.get(name) or StageStatus(name)))
    folder.write("recipe.yaml", recipe_yaml.encode())
    plan = {"saved": time.time(), **about, "code_changes": changes_of_code(planned), "stages": stages}
    folder.write(PLAN, json.dumps(plan, indent=1).encode())
    text = "\n\n".join(f"{stage}\n{details}" for stage, details in outcome.tracebacks.items())
    folder.write("errors.txt", text.encode())


def newest_run(root: Store) -> str:
    """Name of the latest saved run. Raises UsageError without runs."""
    saved = {name: _plan_of(root, name).saved for name in _runs(root)}
    if not saved:
        raise UsageError(f"no run in {root.uri}; start one with `cascade run`")
    return max(saved, key=lambda name: saved[name])


def load_plan(root: Store, run: str) -> dict[str, Any]:
    """The plan from `save_run`: `stages`, each with name, key and state, and `facts`.
    Raises UsageError for no such run, ArtifactError where a stage's name or key is none."""
    if run not in _runs(root):
        raise UsageError(f"no run {run!r} in {root.uri}; there are {', '.join(_runs(root)) or 'none'}")
    _plan_of(root, run)
    return json.loads(root.read(f"runs/{run}/{PLAN}"))


def _plan_of(root: Store, run: str) -> RunPlan:
    path = f"runs/{run}/{PLAN}"
    return parse_stored(RunPlan, root.read(path), root.url(path))


def render_run(root: Store, run: str) -> tuple[str, str]:
    """Draw the report of a saved run again; returns URL and text."""
    folder, plan = root.join("runs", run), load_plan(root, run)
    keys = {stage["name"]: stage["key"] for stage in plan["stages"]}
    stored = {name: load_artifact(root.join("stages", name, key)) for name, key in keys.items()}
    artifacts = {name: artifact for name, artifact in stored.items() if artifact is not None}
    metadata = {name: artifact.metadata for name, artifact in artifacts.items()}
    evaluation, tokens, images = (metadata.get(name, {}) for name in ("evaluation", "tokens", "images"))
    corrupt, shown, codebook = images.get("quarantined", []), None, evaluation.get("held_out_codebook", {})
    left_out = [f"{len(corrupt)} corrupt images were left out, see {INDEX}"] if corrupt else []
    if images:
        names = ("source", "license", "samples", "train_samples", "resolution", "classes")
        lines = tuple(f"{entry['key']} in {entry['shard']}: {entry['reason']}" for entry in corrupt)
        unseen = tuple(images.get("held_out_pairs", ()))
        shown = report.DataFacts(quarantined=lines, held_out_pairs=unseen, **{name: images[name] for name in names})
    source_images = {"images_of_the_source": folder.read(SOURCE_IMAGES)} if folder.exists(SOURCE_IMAGES) else {}
    if tokens:
        codebook = {"codebook_size": tokens["codebook_size"], **tokens["summary"]}
    told = [f"{name}: {line}" for name, key in keys.items() for line in stage_warnings(root.join("stages", name, key))]
    before = run_before(root, run, plan, evaluation)
    studies = (study_of(artifact) for artifact in artifacts.values() if "plots" in artifact.metadata)
    data = report.ReportData(
        run=run,
        recipe=plan["facts"]["recipe"],
        recipe_yaml=folder.read("recipe.yaml").decode(),
        stages=tuple(_stage_row(stage, artifacts.get(stage["name"])) for stage in plan["stages"]),
        finished=plan["saved"],
        seconds=plan["seconds"],
        facts={name: value for name, value in plan["facts"].items() if name != "recipe"},
        curves={name: stage_curve(root, name, key) for name, key in keys.items()},
        images=run_images(artifacts) | source_images | (before.images if before else {}),
        words=run_words(artifacts),
        nearest=evaluation.get("nearest", {}),
        earlier_run=before.run if before else "",
        feature_network=evaluation.get("feature_network"),
        distances=tuple(DistanceRow(**row) for row in evaluation.get("distances", [])),
        codebook=codebook,
        studies=(*studies, *([before.changes] if before else [])),
        data=shown,
        warnings=(*left_out, *told, *plan["code_changes"]),
        traces=tuple(traces_of(root, run)),
    )
    html = report.render_report(data)
    folder.write(REPORT, html.encode())
    return folder.url(REPORT), html


class RunBefore(NamedTuple):
    """The finished run of the same recipe and models before a run."""

    run: str
    changes: report.Study
    images: dict[str, bytes]  # of its samples


def run_before(root: Store, run: str, plan: Mapping[str, Any], evaluation: Mapping[str, Any]) -> RunBefore | None:
    """The newest finished run before `run`: distances of both, changed lines of the recipe, samples."""
    earlier = []
    alike = [name for name in root.folders("runs") if name.rpartition("-")[0] == run.rpartition("-")[0] and name != run]
    for name in alike:
        same, folder = ("recipe", "models"), root.join("runs", name)
        try:  # a run that is damaged, or that is not there whole, is none to compare with
            other, _ = json.loads(folder.read(PLAN)), folder.read("recipe.yaml").decode()
        except (FileNotFoundError, ValueError):
            continue
        done = all(stage["state"] in ("done", "cached") for stage in other["stages"])
        if done and other["saved"] < plan["saved"] and all(other["facts"].get(f) == plan["facts"].get(f) for f in same):
            earlier.append((other["saved"], name, other["stages"]))
    if not earlier:
        return None
    _, name, stages = max(earlier)
    keys = {stage["name"]: stage["key"] for stage in stages if stage["name"] in ("samples", "evaluation")}
    stored = {stage: load_artifact(root.join("stages", stage, key)) for stage, key in keys.items()}
    artifacts = {stage: artifact for stage, artifact in stored.items() if artifact is not None}
    measured = {} if "evaluation" not in artifacts else artifacts["evaluation"].metadata
    then, now = (_distances(facts) for facts in (measured, evaluation))
    comparable = [row for row in now if row in then and measured["feature_network"] == evaluation["feature_network"]]
    old, new = (root.read(f"runs/{each}/recipe.yaml").decode().splitlines() for each in (name, run))
    changed = [(line[2:].strip(), line[0].replace("-", "before").replace("+", "now")) for line in ndiff(old, new)]
    tables = {
        "Fréchet distances": report.Table(
            columns=("images", "N", "before", "now"), rows=tuple((*row, then[row], now[row]) for row in comparable)
        ),
        "Lines of the recipe that differ": report.Table(
            columns=("line", "run"), rows=tuple(line for line in changed if line[1] in ("before", "now"))
        ),
    }
    images = run_images(artifacts).items()
    samples = {f"{report.BEFORE}{n}": png for n, png in images if report.described_image(n)[0] == "samples"}
    shown = {title: table for title, table in tables.items() if table.rows}
    return RunBefore(name, report.Study(stage="the run before", tables=shown), samples)


def _distances(evaluation: Mapping[str, Any]) -> dict[tuple[str, int], float]:
    rows = [row for row in evaluation.get("distances", ()) if row["purpose"] == "model"]
    return {(row["name"], row["samples"]): row["distance"] for row in rows}  # of another N: another quantity


def link_pages(root: Store, run: str, pages: Mapping[str, str]) -> None:
    """Draw the report of a saved run again, with links to the run's pages in MLflow. Raises StoreError."""
    plan = load_plan(root, run)
    plan["facts"] |= pages
    root.write(f"runs/{run}/{PLAN}", json.dumps(plan, indent=1).encode())
    render_run(root, run)


def _stage_row(stage: dict[str, Any], artifact: Artifact | None) -> report.StageRow:
    started, finished = stage["started"], stage["finished"]
    ran, provenance = started is not None and finished is not None, {} if artifact is None else artifact.provenance
    once = provenance.get("seconds") if stage["state"] == "cached" else None
    known = artifact is not None and stage["name"] != "evaluation"
    return report.StageRow(
        name=stage["name"],
        key=stage["key"],
        state=stage["state"],
        seconds=finished - started if ran else once,
        started=started if ran else None,
        inputs=tuple(stage["inputs"]),
        uri="" if artifact is None else artifact.root,
        note=stage["note"] if stage["state"] in ("failed", "skipped") else "",
        summary=artifact.metadata.get("summary", {}) if known else {},
        code=made_by(provenance),
    )


def stage_curve(root: Store, name: str, key: str) -> tuple[tuple[int, dict[str, float]], ...]:
    """Values of a training's metrics by step, in order; empty for fewer than two steps."""
    points = tuple(stage_points(root.join("stages", name, key)).items())
    return points if len(points) > 1 else ()


def run_images(artifacts: dict[str, Artifact]) -> dict[str, bytes]:
    """The grids of the samples, the evaluation and all studies, by name."""
    shown = [artifact for kind in ("samples", "report") for artifact in artifacts.values() if artifact.kind == kind]
    grids = [(artifact, name) for artifact in shown for name in artifact.names() if name.endswith(".png")]
    return {name.removesuffix(".png"): artifact.read(name) for artifact, name in grids}


def run_words(artifacts: dict[str, Artifact]) -> dict[str, tuple[str, ...]]:
    """Labels and prompts of the rows or columns of each image, by the image's name."""
    tables = [artifact.metadata.get("words", {}) for artifact in artifacts.values() if artifact.kind == "samples"]
    return {name: tuple(words) for table in tables for name, words in table.items()}


def study_of(artifact: Artifact) -> report.Study:
    """Plots (title -> file) and tables from a stage's metadata."""
    plots = {title: artifact.read(file).decode() for title, file in artifact.metadata["plots"].items()}
    tables = artifact.metadata.get("tables", {})
    return report.Study.model_validate({"stage": artifact.stage, "plots": plots, "tables": tables})


def _runs(root: Store) -> list[str]:
    return [name for name in root.folders("runs") if root.exists(f"runs/{name}/{PLAN}")]


def traces_of(root: Store, run: str) -> list[str]:
    """URLs of a run's traces."""
    folder = root.join("runs", run, TRACES)
    return [folder.url(file.path) for file in folder.list()]
