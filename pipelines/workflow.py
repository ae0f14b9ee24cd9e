"""Stage and Workflow: dependencies, content keys, and the plan of stages to run.

Building a workflow runs nothing. A key is the sha256 of (stage name, version, configuration, keys of the inputs), and
for a first stage the digest of its source's listing; never of an address, a machine or a number of workers.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from components.configuration.config import Config
from components.configuration.usage import UsageError, nearest
from components.runtime.storage.artifact import Artifact, load_artifact
from components.runtime.storage.store import Store
from components.weights.starts import config_identity

KEY_LENGTH = 20  # hexadecimal digits, 80 bits


class Stage:
    """A node of the graph: `run(config, context, **inputs) -> Artifact`.
    `identity`: what of the configuration enters the key, where that is not all of it (a first stage replaces its
    source's address by the digest of the source's listing). `inputs`: other stages, or lists of them, passed to `run`
    by name as artifacts."""

    def __init__(
        self,
        name: str,
        run: Callable[..., Artifact],
        config: Config,
        *,
        identity: Callable[[Any], dict[str, Any]] | None = None,
        **inputs: "Stage | list[Stage]",
    ) -> None:
        self.name, self.run, self.config, self.inputs = name, run, config, inputs
        self.identity = identity or config_identity

    @property
    def parents(self) -> dict[str, "Stage"]:
        """Stages among the inputs by name, those of a list as `upsamplers.0`, `upsamplers.1`, …"""
        flat: dict[str, Stage] = {}
        for name, own in self.inputs.items():
            flat |= {f"{name}.{i}": each for i, each in enumerate(own)} if isinstance(own, list) else {name: own}
        return flat

    @property
    def upstream(self) -> list["Stage"]:
        """Direct and indirect inputs; one that several of them read stands there several times."""
        return [stage for parent in self.parents.values() for stage in (parent, *parent.upstream)]


class PlannedStage(NamedTuple):
    """A stage with its key, its folder in storage and the cached artifact of the key, if any.
    `input_keys` holds the keys of the inputs by input name; the manifest records them with the artifact."""

    stage: Stage
    key: str
    store: Store  # {root}/stages/{stage}/{key}
    cached: Artifact | None
    wanted: bool  # has to run now
    input_keys: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Stages of a workflow to run; a cached stage never runs unless `force`."""

    only: Sequence[str] = ()
    from_: str | None = None
    until: str | None = None
    force: bool = False


class Workflow:
    """A graph of stages, each after the stage's inputs."""

    def __init__(self, name: str, stages: Iterable[Stage]) -> None:
        self.name, self.stages = name, tuple(stages)
        self.by_name: dict[str, Stage] = {}
        for stage in self.stages:
            missing = [parent.name for parent in stage.parents.values() if parent.name not in self.by_name]
            if stage.name in self.by_name or missing:
                raise ValueError(f"stage {stage.name} is listed twice or before its inputs {missing}")
            self.by_name[stage.name] = stage

    def plan(self, root: Store, selection: Selection | None = None) -> list[PlannedStage]:
        """Keys, caches and stages to run. Raises UsageError for an unknown stage or a missing input."""
        selection = selection or Selection()
        selected = self.selected(selection)
        keys = stage_keys(self.stages)
        planned = []
        for stage in self.stages:
            input_keys = {name: _key_of(upstream, keys) for name, upstream in stage.inputs.items()}
            store = root.join("stages", stage.name, keys[stage.name])
            cached = load_artifact(store)
            wanted = stage.name in selected and (cached is None or selection.force)
            planned.append(PlannedStage(stage, keys[stage.name], store, cached, wanted, input_keys))
        ready = {entry.stage.name for entry in planned if entry.cached is not None or entry.wanted}
        for stage in (entry.stage for entry in planned if entry.wanted):
            if missing := [parent.name for parent in stage.parents.values() if parent.name not in ready]:
                raise UsageError(f"{stage.name} needs {', '.join(missing)}, not yet made; run without --only/--from")
        return planned

    def selected(self, selection: Selection) -> set[str]:
        """Names of the selected stages. Raises UsageError for an unknown stage."""
        for name in (*selection.only, selection.from_, selection.until):
            if name is not None and name not in self.by_name:
                raise UsageError(f"no stage {name!r} in {self.name}{nearest(name, self.by_name)}")
        names = set(selection.only) or set(self.by_name)
        if selection.from_:
            names &= {selection.from_} | self.after(selection.from_)
        if selection.until:
            names &= {selection.until} | self.before(selection.until)
        if not names:
            raise UsageError("--only, --from and --until leave no stage: --until must be --from, or come after it")
        return names

    def before(self, name: str) -> set[str]:
        """Names of all direct and indirect inputs of a stage."""
        return {stage.name for stage in self.by_name[name].upstream}

    def after(self, name: str) -> set[str]:
        """Names of all stages that depend on a stage, directly or not."""
        return {stage.name for stage in self.stages if name in self.before(stage.name)}


def stage_key(stage: Stage, input_keys: dict[str, str]) -> str:
    """The content key of a stage: 20 hexadecimal digits."""
    identity = {
        "stage": stage.name,
        "version": stage.config.stage_version,
        "config": stage.identity(stage.config),
        "inputs": input_keys,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:KEY_LENGTH]


def stage_keys(stages: Iterable[Stage]) -> dict[str, str]:
    """Name -> key of stages, each after the stage's inputs."""
    keys: dict[str, str] = {}
    for stage in stages:
        keys[stage.name] = stage_key(stage, {name: _key_of(upstream, keys) for name, upstream in stage.inputs.items()})
    return keys


def _key_of(upstream: Stage | list[Stage], keys: dict[str, str]) -> str:
    return ",".join(keys[stage.name] for stage in upstream) if isinstance(upstream, list) else keys[upstream.name]
