"""Laws of the code's record: a change of what decides a stage's numbers is named, and nothing else is."""

import re
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.runtime.storage.artifact import Artifact, commit_artifact
from components.runtime.storage.store import Store
from components.runtime.tracking.packed_code import INSTALLED, pack_code, renamed
from pipelines.engine import code_seen
from pipelines.engine.code_seen import LEFT_OUT, changes_of_code, code_digest, code_of, made_by, tree_digest
from pipelines.engine.provenance import PACKAGES, ROOT
from pipelines.recipes.catalog import load_recipe
from pipelines.workflow import Workflow
from pipelines.workflows import build_workflow

LOSS, UNET = "components/models/losses/reconstruction.py", "components/models/unet.py"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The packages' files, to be changed."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


@pytest.fixture(scope="module")
def workflow() -> Workflow:
    return build_workflow(load_recipe("smoke", []))


@pytest.fixture(scope="module")
def records(workflow: Workflow) -> dict[str, dict[str, Any]]:
    return {stage.name: code_of(stage) for stage in workflow.stages}


@pytest.fixture
def changes(checkout: Path, workflow: Workflow, records: dict[str, dict[str, Any]]) -> Callable[..., list[str]]:
    """What is said of the smoke recipe in the copy, all of it cached and made by the code that was copied."""
    root = Store(f"memory://code-{uuid.uuid4().hex}")

    def said(**versions: str) -> list[str]:
        for entry in workflow.plan(root):
            if entry.cached is None:
                code: dict[str, Any] = records[entry.stage.name] | versions
                artifact = Artifact(
                    kind="report", stage=entry.stage.name, key=entry.key, files=(), provenance={"code": code}
                )
                commit_artifact(entry.store, artifact)
        return changes_of_code(workflow.plan(root), checkout)

    return said


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def stages_of(line: str) -> set[str]:
    return set(line.partition(":")[0].split(", "))


def test_a_loss_that_changed_or_is_gone_is_named_with_the_stages_that_reach_it(
    checkout: Path, changes: Callable[..., list[str]]
) -> None:
    assert changes() == []
    edit(checkout / LOSS, ".mean(", ".sum(")
    (line,) = changes()
    assert f"cached, but {LOSS} has changed; `--force` makes them anew" in line
    assert {"tokenizer", "base"} <= stages_of(line)
    assert "images" not in stages_of(line)
    (checkout / LOSS).unlink()
    (line,) = changes()
    assert f"{LOSS} has changed" in line


def test_a_network_is_named_where_a_stage_or_one_that_it_needs_has_its_kind(
    checkout: Path, changes: Callable[..., list[str]]
) -> None:
    """The loop knows all kinds, by imports and by a table; a stage has its own and those that it is given."""
    assert changes() == []
    edit(checkout / UNET, "return", "return 0.5 *")
    (line,) = changes()
    assert stages_of(line) == {"base", "upsampler_32", "cascade", "samples", "evaluation"}


def test_comments_docstrings_lines_and_what_is_to_run_are_not_named(
    checkout: Path, workflow: Workflow, changes: Callable[..., list[str]]
) -> None:
    assert changes() == []
    text = (checkout / LOSS).read_text()
    (checkout / LOSS).write_text(text.replace('"""', '"""Otherwise said. ', 1) + "\n\n# A comment\n")
    assert changes() == []
    (checkout / LOSS).unlink()
    assert changes_of_code(workflow.plan(Store(f"memory://code-{uuid.uuid4().hex}")), checkout) == []


def test_other_versions_are_named(changes: Callable[..., list[str]]) -> None:
    said = changes(torch="1.0.0")
    assert [line.partition("cached, but ")[2] for line in said] == [
        f"torch was 1.0.0 and is {code_seen._versions()['torch']}; `--force` makes them anew"
    ]


def test_a_stage_that_is_older_than_what_it_is_made_of_is_named(workflow: Workflow) -> None:
    """`--force --only base` makes the base anew, and leaves what follows it as it was."""
    root = Store(f"memory://code-{uuid.uuid4().hex}")
    for number, entry in enumerate(workflow.plan(root)):
        provenance: dict[str, Any] = {"code": code_of(entry.stage), "started": float(number)}
        if entry.stage.name in ("base", "images"):  # images were forced before all else, and are older than it
            provenance |= {"forced": "a" * 12, "started": 1000.0 if entry.stage.name == "base" else 0.0}
        made = Artifact(kind="report", stage=entry.stage.name, key=entry.key, files=(), provenance=provenance)
        commit_artifact(entry.store, made)
    (line,) = changes_of_code(workflow.plan(root))
    assert line == "cascade: cached, but base was made anew since; `--force` makes it anew"


def test_a_record_is_of_a_python_without_its_patch(records: dict[str, dict[str, Any]]) -> None:
    assert all(re.fullmatch(r"3\.\d+", record["python"]) for record in records.values())


def test_of_another_python_equal_files_are_equal_and_others_may_have_changed(
    checkout: Path, changes: Callable[..., list[str]]
) -> None:
    now = code_seen._versions()["python"]
    assert [line.partition("cached, but ")[2].partition(";")[0] for line in changes(python="3.1")] == [
        f"python was 3.1 and is {now}"
    ]
    (checkout / LOSS).write_text((checkout / LOSS).read_text() + "# A comment\n")
    (line,) = [line for line in changes() if LOSS in line]
    assert f"{LOSS} may have changed (trees of Python 3.1 and {now} can't be compared)" in line


def test_checkout_wheel_and_packed_model_have_the_same_digests(tmp_path: Path) -> None:
    packed = pack_code(tmp_path)
    files = sorted(path.relative_to(packed).as_posix() for path in (packed / "components").rglob("*.py"))
    assert len(files) > 50
    for name in files:
        assert tree_digest((packed / name).read_text()) == tree_digest((ROOT / name).read_text()), name
    for path in sorted((ROOT / "components").rglob("*.py")):
        here, in_wheel = path.read_text(), renamed(path.read_text(), INSTALLED)
        assert code_seen._as_in_the_checkout(in_wheel) == code_seen._as_in_the_checkout(here), path


def test_what_draws_and_what_serves_is_left_out(workflow: Workflow, records: dict[str, dict[str, Any]]) -> None:
    assert all((ROOT / name).is_file() for name in LEFT_OUT)
    for stage in workflow.stages:
        modules = records[stage.name]["modules"]
        assert f"components/stages/{stage.run.__module__.rpartition('.')[2]}.py" in modules
        assert not LEFT_OUT & modules.keys()
        assert {name.split("/")[1] for name in modules} <= set(code_seen.DECIDING)


def test_imports_inside_functions_are_seen(checkout: Path, workflow: Workflow) -> None:
    stage = workflow.by_name["images"]
    assert UNET not in code_of(stage, checkout)["modules"]
    path = checkout / "components" / "stages" / "images.py"
    path.write_text(path.read_text() + "\n\ndef later():\n    from components.models import unet_blocks\n")
    assert "components/models/unet_blocks.py" in code_of(stage, checkout)["modules"]


def test_the_maker_in_a_line() -> None:
    provenance = {
        "git_commit": "0" * 40 + "+changes",
        "code": {"image-cascade": "0.1.0", "torch": "2.9.0", "modules": {}},
    }
    assert made_by(provenance) == "000000000000+changes, image-cascade 0.1.0, torch 2.9.0"
    assert made_by({}) == ""


def test_the_digest_of_a_recipe_s_code_moves_with_a_tree_of_any_stage_and_is_empty_where_one_is_unknown() -> None:
    base = {"python": "3.11", "modules": {"a.py": ["text", "tree"]}}
    whole = code_digest({"images": base, "base": base})
    assert whole == code_digest({"base": base, "images": base | {"modules": {"a.py": ["a comment", "tree"]}}})
    assert whole != code_digest({"images": base, "base": base | {"modules": {"a.py": ["text", "other"]}}})
    assert whole.startswith("3.11:")
    assert code_digest({"images": base, "base": None}) == code_digest({}) == ""
