"""No file that is stored names a place outside its own folder: in whatever form, whoever reads it."""

import hashlib
import json
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from components.configuration.file_names import file_name, folder_name
from components.data.listing import SourceError
from components.data.shards import load_index
from components.runtime.storage.artifact import (
    MANIFEST,
    Artifact,
    ArtifactError,
    commit_artifact,
    describe,
    load_artifact,
)
from components.runtime.storage.garbage import ANNOUNCED, PLAN, find_garbage
from components.runtime.storage.store import DamagedFileError, Store, StoreError
from components.sampling.cascade import read_description
from components.training.checkpoint import STATE, digests_file
from components.training.results import FINISHED, read_finished
from components.training.run_folder import SNAPSHOT, fetch_once, last_checkpoint
from pipelines.engine.run_report import load_plan, newest_run
from tests.in_process import in_process
from tests.refusals import assert_refused, one_line

OUTSIDE = "{outside}/made"  # which the watched folder takes the place of
FORMS = {
    "absolute": OUTSIDE,
    "absolute below a folder": "files/" + OUTSIDE,
    "up": "../outside/made",
    "up from below": "attempt-1/../../outside/made",
    "up at the end": "attempt-1/..",
    "here": "attempt-1/./a.bin",
    "doubled slash": "files//a.bin",
    "slash at the end": "files/",
    "nothing": "",
    "backslash": "..\\outside\\made",
    "drive": "C:/made",
    "drive without a slash": "c:made",
    "address": "file://" + OUTSIDE,
    "chained address": "a::file:" + OUTSIDE,
    "wildcard": "*/a.bin",
    "control character": "a\x07.bin",
    "end of a line": "a\n.bin",
    "turned direction": "a\u202enib.bin",
    "half a character": "a\ud800.bin",
    "too long": "a" * 256,
    "too long in all": "/".join(["a" * 250] * 5),
    "another Unicode form": unicodedata.normalize("NFD", "ä.bin"),
}
IN_JSON = [name for name in FORMS if name != "half a character"]  # which no text in UTF-8 can hold


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A folder next to all others of the test, in which nothing may be made."""
    folder = tmp_path / "outside"
    folder.mkdir()
    yield folder
    assert not list(folder.iterdir())


@pytest.fixture
def stage(tmp_path: Path) -> Store:
    """A committed model of one file."""
    store = Store(str(tmp_path / "stage"))
    store.write("attempt-1/a.bin", b"data")
    commit_artifact(store, Artifact(kind="model", stage="base", key="k", files=(describe(b"data", "attempt-1/a.bin"),)))
    return store


def form(name: str, outside: Path) -> str:
    return FORMS[name].format(outside=outside)


def change_manifest(store: Store, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what a manifest says, with the digest that belongs to it."""
    values = json.loads(store.read(MANIFEST))
    change(values)
    values.pop("digest")
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    store.write(MANIFEST, json.dumps({**values, "digest": digest}).encode())


@pytest.mark.parametrize("name", FORMS)
def test_what_is_no_name_is_refused_with_the_name(name: str, outside: Path):
    with one_line(ValueError, match="is no name of a file inside a folder") as caught:
        file_name(form(name, outside))
    assert repr(form(name, outside)[:60]) in str(caught.value)


@pytest.mark.parametrize("name", ["a", "attempt-1/a.bin", "..a/b..c", ".hidden", "größe/ä", "ab:c", "a b", "a" * 255])
def test_names_that_people_use_are_names_and_that_of_a_folder_has_one_part(name: str):
    assert file_name(name) == name
    with pytest.raises(ValueError, match="several parts"):
        folder_name(f"base/{name}")


def test_a_store_takes_no_path_that_is_none(any_store: str, tmp_path: Path, outside: Path):
    store, local = Store(any_store), tmp_path / "local"
    local.write_bytes(b"data")
    store.write("a.bin", b"data")
    uses: list[Callable[[str], object]] = [
        lambda bad: store.download("a.bin", tmp_path / "in", bad),
        lambda bad: store.join("stages", bad),
        lambda bad: store.write(bad, b"data"),
        lambda bad: store.write_once(bad, b"data"),
        lambda bad: store.upload(local, bad),
        lambda bad: store.download(bad, tmp_path / "in", "a.bin"),
        lambda bad: store.read(bad),
        lambda bad: store.delete(bad),
        lambda bad: store.delete_folder(bad),
    ]
    for bad in (form(name, outside) for name in FORMS):
        for use in uses if bad else uses[:2]:  # an empty path is the store itself
            with pytest.raises(StoreError, match="is no name of a file inside a folder"):
                use(bad)
    assert [info.path for info in store.list()] == ["a.bin"]


def test_nothing_follows_a_link_out_of_a_store_or_of_a_folder(tmp_path: Path, outside: Path):
    store, local = Store(str(tmp_path / "store")), tmp_path / "local"
    store.write("a.bin", b"data")
    local.mkdir()
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    for folder in (tmp_path / "store", local):
        (folder / "link").symlink_to(outside)
        (folder / "file").symlink_to(secret)
    uses = [
        lambda: store.write("link/made", b"data"),
        lambda: store.write("file", b"data"),
        lambda: store.write_once("link/made", b"data"),
        lambda: store.upload(secret, "link/made"),
        lambda: store.read("file"),
        lambda: store.delete_folder("link"),
        lambda: store.join("link"),
        lambda: store.download("a.bin", local, "link/made"),
        lambda: store.download("a.bin", local, "file"),
    ]
    for use in uses:
        with pytest.raises(StoreError, match="remove the link"):
            use()
    assert secret.read_bytes() == b"secret"
    (tmp_path / "by another name").symlink_to(tmp_path / "store")
    Store(str(tmp_path / "by another name")).write("b.bin", b"data")  # a store may lie behind a link


@pytest.mark.parametrize("name", IN_JSON)
def test_a_manifest_names_no_place_outside(name: str, stage: Store, outside: Path):
    written = stage.read(MANIFEST)
    change_manifest(stage, lambda values: values["files"][0].update(path=form(name, outside)))
    with one_line(ArtifactError, match=r"manifest\.json can't be used: files\.0\.path: .* run again"):
        load_artifact(stage)
    for field in ("stage", "key"):
        stage.write(MANIFEST, written)
        change_manifest(stage, lambda values, field=field: values.update({field: "../base"}))
        with pytest.raises(ArtifactError, match=f"{field}: '../base'"):
            load_artifact(stage)


CHANGES = {
    "metadata": lambda values: values["metadata"].update(resolution=65),
    "inputs": lambda values: values["inputs"].update(images="l"),
    "provenance": lambda values: values["provenance"].update(git_commit="0"),
    "kind": lambda values: values.update(kind="shards"),
    "files": lambda values: values["files"][0].update(sha256="0"),
    "no digest": lambda values: values.pop("digest"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_manifest_is_as_it_was_written(what: str, stage: Store):
    values = json.loads(stage.read(MANIFEST))
    CHANGES[what](values)
    stage.write(MANIFEST, json.dumps(values).encode())
    with pytest.raises(ArtifactError, match=r"manifest\.json is not as it was written: .* run again"):
        load_artifact(stage)


def test_each_flipped_bit_of_a_manifest_is_seen(stage: Store):
    values = json.loads(stage.read(MANIFEST))
    whole = json.dumps(values, separators=(",", ":")).encode()  # without white space, which says nothing
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        stage.write(MANIFEST, bytes(flipped))
        with one_line(ArtifactError, match=""):
            load_artifact(stage)


def test_the_digest_of_a_manifest_is_of_what_it_says_and_not_of_where_or_in_which_order():
    files = (describe(b"data", "a.bin"),)
    first = Artifact(kind="model", stage="base", key="k", files=files, metadata={"a": 1e16, "b": (float("nan"), 2)})
    second = first.model_copy(update={"root": "s3://bucket", "metadata": {"b": [None, 2], "a": 1e16}})
    assert first.digest == second.digest
    assert first.digest != first.model_copy(update={"inputs": {"images": "l"}}).digest


@pytest.mark.parametrize("name", IN_JSON)
def test_neither_digests_nor_results_nor_the_last_checkpoint_of_a_training_name_a_place_outside(
    name: str, tmp_path: Path, outside: Path
):
    run = Store(str(tmp_path / "run"))
    run.write(f"step-000000001/{digests_file(STATE)}", json.dumps({form(name, outside): [4, "0"]}).encode())
    with one_line(DamagedFileError, match=r"step-000000001 is not whole: digests-00000\.json .* is no name"):
        fetch_once(run, "step-000000001", STATE, place=tmp_path / "local")
    entry = {"path": form(name, outside), "bytes": 4, "sha256": "0"}
    run.write(FINISHED, json.dumps({"entries": [entry], "summary": {}}).encode())
    with one_line(ArtifactError, match=r"finished\.json can't be used: entries\.0\.path: "):
        read_finished(run)
    for bad in (form(name, outside), f"step-{form(name, outside)}", "step-000000001\n"):
        latest = {"checkpoint_dir_name": bad}
        run.write(SNAPSHOT, json.dumps({"latest_checkpoint_result": latest}).encode())
        with pytest.raises(StoreError, match=rf"{SNAPSHOT} lists .*, no checkpoint; delete .* and run again"):
            last_checkpoint(run)


@pytest.mark.parametrize("name", [*IN_JSON, "several parts"])
def test_a_plan_names_stages_and_keys(name: str, tmp_path: Path, outside: Path):
    root, bad = Store(str(tmp_path / "store")), "base/k" if name == "several parts" else form(name, outside)
    for stage in ({"name": bad, "key": "k"}, {"name": "base", "key": bad}):
        for file in (PLAN, ANNOUNCED):
            root.write(f"runs/a/{file}", json.dumps({"saved": 1.0, "stages": [stage | {"state": "done"}]}).encode())
            uses = [lambda: find_garbage(root, unused=True)]
            for use in uses if file == ANNOUNCED else [*uses, lambda: load_plan(root, "a"), lambda: newest_run(root)]:
                with one_line(ArtifactError, match=rf"runs/a/{file} can't be used: stages\.0\."):
                    use()
            root.delete(f"runs/a/{file}")


@pytest.mark.parametrize("name", IN_JSON)
def test_a_composed_cascade_has_its_parts_in_its_folder(name: str, tmp_path: Path, outside: Path):
    for stages in ({"base": form(name, outside)}, {"upsamplers": [form(name, outside)]}):
        (tmp_path / "cascade.json").write_text(json.dumps({"stages": stages, "sampling": {}}))
        with pytest.raises(ValueError, match=r"cascade\.json: .* is no name .*; compose it again"):
            read_description(tmp_path)


def test_an_index_names_files_of_its_own_folder_or_whole_addresses(tmp_path: Path):
    shard = {"url": "a.tar", "bytes": 1, "sha256": "0", "samples": 1, "train_samples": 1}
    text = {"sha256": "0", "vocab_size": 1, "text_length": 1}
    index = {"source": "s", "license": "l", "resolution": 8, "classes": ["a"], "holdout_fraction": 0.1, "samples": 1}
    index |= {"train_samples": 1, "quarantined": 0, "text": text, "shards": [shard]}

    def loaded(**changes: object) -> object:
        (tmp_path / "index.json").write_text(json.dumps(index | changes))
        return load_index(str(tmp_path))

    loaded()
    for url in ("s3://bucket/a.tar", "/data/a.tar"):  # tars that lie where the user has them
        loaded(shards=[shard | {"url": url}])
    for changes in ({"shards": [shard | {"url": "../a.tar"}]}, {"text": text | {"bpe": "../bpe.json"}}):
        with pytest.raises(SourceError, match=r"'\.\./.* is no name"):
            loaded(**changes)


@pytest.mark.parametrize("name", ["absolute below a folder", "up from below", "drive"])
def test_sample_refuses_a_hostile_model_and_a_changed_one(name: str, stage: Store, outside: Path, tmp_path: Path):
    written, sample = stage.read(MANIFEST), ("sample", "--model", stage.uri)
    change_manifest(stage, lambda values: values["files"][0].update(path=form(name, outside)))
    place = f"{stage.uri}/manifest.json can't be used: files.0.path"
    assert_refused(in_process(*sample, cwd=tmp_path), f"error: {place}: '{form(name, outside)[:60]}'")
    stage.write(MANIFEST, written.replace(b'"metadata": {}', b'"metadata": {"a": 1}'))
    assert_refused(in_process(*sample, cwd=tmp_path), "is not as it was written")


@pytest.mark.parametrize("arguments", [["verify"], ["report"], ["gc", "--unused", "--yes"]])
def test_who_reads_plans_refuses_a_hostile_one(arguments: list[str], outside: Path, tmp_path: Path):
    root = Store(str(tmp_path / "store"))
    root.write("stages/base/k/attempt-1/a.bin", b"data")
    root.write("runs/a/plan.json", b'{"saved": 1.0, "stages": [{"name": "..", "key": "outside", "state": "done"}]}')
    done = in_process(*arguments, "--storage", root.uri, cwd=tmp_path)
    assert_refused(done, "runs/a/plan.json can't be used: stages.0.name: '..' is no name")
    assert len(root.list()) == 2
