"""Laws of keys and plans: what changes a key, what never does, and what has to run again."""

import uuid
from typing import Any

import pytest

from components.configuration.config import Config
from components.configuration.usage import UsageError
from components.runtime.storage.artifact import Artifact, commit_artifact
from components.runtime.storage.store import Store
from pipelines.workflow import Selection, Stage, Workflow, stage_key
from tests.tiny_training import diffusion_config


class Number(Config):
    value: int = 1
    address: str = "here"


def never_run(*arguments: Any, **named: Any) -> Artifact:
    raise AssertionError("planning runs nothing")


def diamond(**values: int) -> Workflow:
    source = Stage("source", never_run, Number(value=values.get("source", 1)))
    left = Stage("left", never_run, Number(value=values.get("left", 1)), source=source)
    right = Stage("right", never_run, Number(value=values.get("right", 1)), source=source)
    return Workflow("diamond", [source, left, right, Stage("end", never_run, Number(), sides=[left, right])])


def keys(workflow: Workflow, root: Store) -> dict[str, str]:
    return {entry.stage.name: entry.key for entry in workflow.plan(root)}


def commit(workflow: Workflow, root: Store, *names: str) -> None:
    for entry in workflow.plan(root):
        if entry.stage.name in names:
            commit_artifact(entry.store, Artifact(kind="report", stage=entry.stage.name, key=entry.key, files=()))


@pytest.fixture
def root() -> Store:
    return Store(f"memory://workflow-{uuid.uuid4().hex}")


def test_a_changed_number_changes_its_stage_and_what_follows_and_nothing_else(root: Store):
    before, after = keys(diamond(), root), keys(diamond(left=2), root)
    assert {name for name in before if before[name] != after[name]} == {"left", "end"}


def test_keys_do_not_depend_on_where_the_artifacts_are(root: Store):
    assert keys(diamond(), root) == keys(diamond(), Store("memory://elsewhere"))


def test_a_stage_version_is_part_of_its_key(root: Store):
    class Revised(Number):
        stage_version = 2

    first = Workflow("w", [Stage("a", never_run, Number())])
    second = Workflow("w", [Stage("a", never_run, Revised())])
    assert keys(first, root) != keys(second, root)


def test_a_first_stage_is_known_by_the_digest_of_its_source_not_by_its_address(root: Store):
    def identity(config: Number) -> dict[str, Any]:
        return {"value": config.value, "digest": "abc"}

    here = Workflow("w", [Stage("a", never_run, Number(address="here"), identity=identity)])
    there = Workflow("w", [Stage("a", never_run, Number(address="there"), identity=identity)])
    assert keys(here, root) == keys(there, root)


def test_what_is_committed_does_not_run_again_unless_forced(root: Store):
    workflow = diamond()
    commit(workflow, root, "source", "left")
    assert [entry.stage.name for entry in workflow.plan(root) if entry.wanted] == ["right", "end"]
    forced = workflow.plan(root, Selection(only=("left",), force=True))
    assert [entry.stage.name for entry in forced if entry.wanted] == ["left"]


def test_selections_cut_the_graph(root: Store):
    workflow = diamond()

    def wanted(selection: Selection) -> list[str]:
        return [entry.stage.name for entry in workflow.plan(root, selection) if entry.wanted]

    assert wanted(Selection(until="left")) == ["source", "left"]
    commit(workflow, root, "source", "right")
    assert wanted(Selection(from_="left")) == ["left", "end"]
    for refused, words in (
        (Selection(only=("end",)), "end needs left"),
        (Selection(from_="end", until="source"), "leave no stage"),
        (Selection(until="rihgt"), "did you mean 'right'"),
    ):
        with pytest.raises(UsageError, match=words):
            wanted(refused)


def test_a_graph_lists_each_stage_after_its_inputs():
    first = Stage("first", never_run, Number())
    with pytest.raises(ValueError, match="before its inputs"):
        Workflow("w", [Stage("second", never_run, Number(), input=first), first])


def test_when_a_training_is_saved_and_what_it_computes_again_is_no_part_of_its_key():
    """A finished training isn't made again, and one that is under way goes on, when these are set otherwise."""
    found = set()
    for changes in ({}, {"checkpoint_minutes": 5.0}, {"checkpoint_minutes": 20.0}, {"gradient_checkpointing": True}):
        config = diffusion_config(**changes)
        assert type(config).model_validate(config.model_dump(mode="json")) == config
        found.add(stage_key(Stage("base", never_run, config), {}))
    assert len(found) == 1
    assert found != {stage_key(Stage("base", never_run, diffusion_config(total_steps=21)), {})}
