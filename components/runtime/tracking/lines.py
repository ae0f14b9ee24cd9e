"""Events as lines of the journal: what each of them holds, and how points are joined before they are sent.

Lines of an earlier version are still read: a field may be added, none renamed (`tests/old_journal.jsonl`).
"""

from collections.abc import Callable, Iterable
from typing import Any

from components.runtime import events
from components.runtime.storage.artifact import Artifact
from components.runtime.tracking.journal import Line


def line_of(event: events.Event, *, time_ms: int, write_blob: Callable[[bytes, str], str]) -> Line | None:
    """What the journal holds of an event; None for what MLflow does not show.

    Args:
        time_ms: of points that have no time of their own.
        write_blob: keeps bytes, with their suffix, next to the journal and returns their name.
    """
    match event:
        case events.Metrics(_, step, values, own_ms):
            time_ms = time_ms if own_ms is None else own_ms
            return {"event": "metrics", "points": [[name, step, float(v), time_ms] for name, v in values.items()]}
        case events.Image(_, step, name, png):
            return {"event": "image", "step": step, "name": name, "blob": write_blob(png, ".png")}
        case events.Text(_, name, content):
            return {"event": "text", "name": name, "blob": write_blob(content.encode(), ".txt")}
        case events.StageStarted(_, _, config, inputs, points):
            documents = [as_document(artifact) for artifact in inputs.values()]
            return {"event": "start_stage", "config": config, "inputs": documents, "points": points}
        case events.StageCached(_, artifact, points):
            return {"event": "stage_cached", "artifact": as_document(artifact), "points": points}
        case events.StageEnded(_, status, artifact, error):
            document = None if artifact is None else as_document(artifact)
            return {"event": "end_stage", "status": status, "artifact": document, "error": error}
        case events.RunStarted(_, recipe_yaml, parameters, tags):
            return {"event": "start_run", "recipe_yaml": recipe_yaml, "parameters": parameters, "tags": tags}
        case events.ModelsDescribed(about, details):
            return {"event": "describe_models", "about": about, "details": details}
        case events.RunEnded(status, promote):
            return {"event": "end_run", "status": status, "promote": promote}
    return None


def as_document(artifact: Artifact) -> dict[str, Any]:
    """An artifact as JSON, with the address that its manifest leaves out."""
    return {"root": artifact.root, "manifest": artifact.model_dump(mode="json")}


def as_artifact(document: dict[str, Any]) -> Artifact:
    return Artifact(**document["manifest"], root=document["root"])


def coalesce(lines: Iterable[Line]) -> list[Line]:
    """Join the metrics of each run that no other event of that run stands between, in the order of the rest."""
    joined: list[Line] = []
    open_: dict[tuple[str, str], Line] = {}
    for line in lines:
        place = (line["run"], line["key"])
        if line["event"] != "metrics":
            open_.pop(place, None)
            joined.append(line)
        elif place in open_:
            open_[place]["points"].extend(line["points"])
        else:
            open_[place] = line | {"points": list(line["points"])}
            joined.append(open_[place])
    return joined
