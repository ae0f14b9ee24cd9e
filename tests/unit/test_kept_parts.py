"""Laws of what outlives a try: a part is adopted as it was made or not at all, and a forced try adopts nothing,
wherever it is killed."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from components.runtime.storage.artifact import (
    FORCED,
    MANIFEST,
    RECORDS,
    Artifact,
    Look,
    begin_forced_try,
    commit_artifact,
    current_try,
    describe,
    has_committed,
    load_artifact,
    look_at,
    read_record,
    record_path,
    recorded_parts,
    write_file,
    write_record,
)
from components.runtime.storage.garbage import collect, find_garbage
from components.runtime.storage.store import DamagedFileError, Store, StoreError
from tests.stored_files import flip

FIRST, SECOND = "1" * 12, "2" * 12


@pytest.fixture
def files(tmp_path: Path) -> Store:
    """One part of two files."""
    store = Store(str(tmp_path / "files"))
    written = [write_file(store, name, name.encode() * 100) for name in ("a.npz", "deep/b.tar")]
    write_record(store, "a", *written, recipe="r", count=3)
    return store


def test_a_part_that_is_as_it_was_made_is_adopted_with_what_its_maker_told(any_store: str):
    store = Store(any_store)
    assert recorded_parts(store) == set()
    written = write_file(store, "a.npz", b"data")
    record = write_record(store, "a", written, recipe="r", count=3)
    assert recorded_parts(store) == {"a"}
    assert look_at(store, "a", recipe="r") == Look(record=record)
    assert look_at(store, "a", recipe="another") == Look()
    assert (record.files, record.facts) == ((describe(b"data", "a.npz"),), {"count": 3})


DAMAGE: dict[str, Callable[[Path], object]] = {
    "flipped": flip,
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "empty": lambda file: file.write_bytes(b""),
    "gone": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["a.npz", "deep/b.tar", record_path("a")])
def test_whatever_is_damaged_is_named_and_not_adopted(files: Store, name: str, damage: str):
    DAMAGE[damage](Path(files.url(name)))
    if (damage, name) == ("gone", record_path("a")):
        assert recorded_parts(files) == set()
        return
    look = look_at(files, "a", recipe="r")
    assert look.record is None
    assert look.damage.startswith(files.url(name) + " is missing" * (damage == "gone"))
    assert "\n" not in look.damage


def test_no_bit_of_a_record_can_be_flipped_unseen(files: Store):
    path = Path(files.url(record_path("a")))
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 7):
        path.write_bytes(whole[: bit // 8] + bytes([whole[bit // 8] ^ 1 << bit % 8]) + whole[bit // 8 + 1 :])
        with pytest.raises(DamagedFileError, match=f"{RECORDS}/a.json differs"):
            read_record(files, "a")


BEFORE = ("files/a", "work/b", "train/key/c", f"files-{FIRST}/a", f"work-{FIRST}/b", f"train-{FIRST}/key/c")


def artifact(content: bytes, path: str, **provenance: str) -> Artifact:
    entries = (describe(content, path),)
    return Artifact(kind="shards", stage="images", key="k", files=entries, provenance=provenance)


def stage_folder(place: Path, *, committed: bool) -> Store:
    """A stage with the work of a try and of a forced one, of which the second has committed, or was killed."""
    store = Store(str(place))
    for path in BEFORE:
        store.write(path, b"before")
    store.write(FORCED, FIRST.encode())
    store.write("log/0-a-000000.jsonl", b"")
    if committed:
        commit_artifact(store, artifact(b"before", f"files-{FIRST}/a"))
    return store


class KilledError(BaseException):
    pass


@pytest.mark.parametrize("committed", [True, False])
def test_wherever_a_forced_try_is_killed_nothing_of_before_is_adopted(
    tmp_path: Path, committed: bool, monkeypatch: pytest.MonkeyPatch
):
    """From the moment that the forced try has a name; until then all is as it was."""
    steps = 0
    while True:
        store, left = stage_folder(tmp_path / str(steps), committed=committed), iter(range(steps))
        with monkeypatch.context() as patch:
            for name in ("write", "delete", "delete_folder"):
                patch.setattr(Store, name, until(left, getattr(Store, name)))
            ended = True
            try:
                begin_forced_try(store, SECOND)
            except KilledError:
                ended = False
        if steps > 1:
            assert adoptable(store) == []
        else:  # the log may be gone, the new try has no name yet
            assert store.exists(MANIFEST) == committed
        if committed:  # readers of the artifact of before
            assert store.read(f"files-{FIRST}/a") == b"before"
            kept = [info.path for info in store.list() if info.path.startswith(("manifest", "superseded"))]
            assert kept
        begin_forced_try(store, SECOND)  # as Ray tries again
        assert (current_try(store), has_committed(store, SECOND), adoptable(store)) == (SECOND, False, [])
        assert store.list("log") == []
        assert [name for name in store.folders() if name.startswith(("train", "work"))] == []
        if ended:
            break
        steps += 1
    assert steps > 4


def until(left: Iterator[int], action: Callable) -> Callable:
    """The action, or a kill where no steps are left."""

    def act(self: Store, *arguments: object, **options: object) -> object:
        if next(left, None) is None:
            raise KilledError
        return action(self, *arguments, **options)

    return act


def adoptable(store: Store) -> list[str]:
    """What a try without force would find in its folders."""
    own = current_try(store)
    return [info.path for kind in ("files", "work", "train") for info in store.list(f"{kind}-{own}" if own else kind)]


def test_a_forced_try_that_goes_on_keeps_its_own_work_and_ends_when_it_has_committed(tmp_path: Path):
    store = stage_folder(tmp_path, committed=True)
    begin_forced_try(store, SECOND)
    for kind in ("files", "work", "train"):
        store.write(f"{kind}-{SECOND}/a", b"after")
    begin_forced_try(store, SECOND)
    assert len(adoptable(store)) == 3
    commit_artifact(store, artifact(b"after", f"files-{SECOND}/a", forced=SECOND))
    assert has_committed(store, SECOND)
    assert has_committed(store, "")
    assert not has_committed(store, FIRST)
    committed = load_artifact(store)
    assert committed is not None
    assert (committed.names(), committed.read("a")) == (["a"], b"after")


def test_files_of_a_try_that_was_superseded_are_garbage_once_another_has_committed(tmp_path: Path):
    root, store = Store(str(tmp_path)), stage_folder(tmp_path / "stages/images/k", committed=True)
    begin_forced_try(store, SECOND)
    assert find_garbage(root) == []
    store.write(f"files-{SECOND}/a", b"after")
    commit_artifact(store, artifact(b"after", f"files-{SECOND}/a"))
    collect(root, find_garbage(root))
    assert [name for name in store.folders() if name.startswith("files")] == [f"files-{SECOND}"]


def test_a_damaged_name_of_a_forced_try_is_one_line_and_force_mends_it(tmp_path: Path):
    store = stage_folder(tmp_path, committed=False)
    store.write(FORCED, b"\xff" * 12)
    with pytest.raises(StoreError, match=r"forced is damaged, .* run the stage again with --force"):
        current_try(store)
    begin_forced_try(store, SECOND)
    assert current_try(store) == SECOND
