"""Laws of lists that are held as columns: they are the lists that they were made from."""

import pickle
from pathlib import Path

import pytest

from components.data.shards import Quarantined, ShardEntry, ShardIndex, TextInfo, load_index, save_index
from components.runtime.storage.artifact import Artifact, ArtifactError, FileEntry
from components.runtime.storage.model_table import ModelTable, column_of, ending
from components.runtime.storage.store import Store

BAD = Quarantined(key="a/1", shard="é-0001.tar", reason="truncated")
ENTRIES = tuple(
    ShardEntry(
        url=f"é-{number:04d}.tar",
        bytes=2**40 + number,
        sha256=f"{number:064x}",
        samples=10,
        train_samples=number,
        quarantined=(BAD,) * (number == 1),
    )
    for number in range(5)
)
PATHS = ("attempt-1/a.json", "files/b/a.json", "files-0a/c.json", "a.json", "files/xa.json")


def index_of(*entries: ShardEntry) -> ShardIndex:
    text = TextInfo(sha256="0" * 64, vocab_size=1, text_length=1)
    counts = {"samples": 1, "train_samples": 1, "quarantined": 0, "holdout_fraction": 0}
    return ShardIndex(source="", license="", resolution=8, classes=(), text=text, shards=entries, **counts)


def artifact_of(*paths: str) -> Artifact:
    files = tuple(FileEntry(path=path, bytes=number, sha256="") for number, path in enumerate(paths))
    return Artifact(kind="report", stage="s", key="k", files=files)


@pytest.mark.parametrize("entries", [(), ENTRIES[:1], ENTRIES])
def test_a_table_is_the_list_that_it_was_made_from(entries: tuple[ShardEntry, ...], tmp_path: Path) -> None:
    made = index_of(*entries)
    save_index(Store(str(tmp_path)), made)
    for index in (made, load_index(str(tmp_path)), pickle.loads(pickle.dumps(made))):
        shards = index.shards
        assert isinstance(shards, ModelTable)
        assert shards == made.shards
        assert tuple(shards) == entries
        assert len(shards) == len(entries)
        assert tuple(shards[number] for number in range(-len(entries), len(entries))) == entries * 2
        assert shards[1:3] == entries[1:3]
        assert column_of(shards, "bytes").tolist() == [entry.bytes for entry in entries]
        assert column_of(shards, "url").tolist() == column_of(entries, "url").tolist()


def test_the_json_of_a_table_is_that_of_the_list() -> None:
    index = index_of(*ENTRIES)
    listed = index.model_copy(update={"shards": ENTRIES})
    assert index.model_dump_json(indent=1) == listed.model_dump_json(indent=1)
    assert index.model_dump(mode="json")["shards"] == [entry.model_dump(mode="json") for entry in ENTRIES]


def test_a_table_of_other_values_is_another() -> None:
    assert index_of(*ENTRIES) != index_of(*ENTRIES[:-1], ENTRIES[-1].model_copy(update={"bytes": 1}))


@pytest.mark.parametrize("text", ["", ".tar", "3", "é", "3.tar", "é-0004.tar", "_.tar", "%"])
def test_values_are_found_by_the_end_of_their_text_as_in_a_list(text: str) -> None:
    assert [*ending(index_of(*ENTRIES).shards, "url", text)] == [*ending(ENTRIES, "url", text)]


def test_an_artifact_finds_the_first_file_of_a_name_with_and_without_its_folder() -> None:
    artifact = artifact_of(*PATHS)
    assert artifact.names() == ["a.json", "b/a.json", "c.json", "a.json", "xa.json"]
    found = [artifact.entry(name).bytes for name in (*PATHS, "a.json", "c.json", "xa.json")]
    assert found == [0, 1, 2, 0, 4, 0, 2, 4]
    with pytest.raises(ArtifactError, match=r"lists no file json; it has a.json, b/a.json"):
        artifact.entry("json")


def test_a_pickle_of_an_index_takes_the_bytes_of_its_values() -> None:
    """Every rank and its reader are sent one; as objects they took twice as much, and 1.6 kB of memory a shard."""
    small, large = (len(pickle.dumps(index_of(*ENTRIES[2:3] * count))) for count in (1, 1001))
    values = len(ENTRIES[2].url.encode()) + len(ENTRIES[2].sha256) + 3 * 8
    assert large - small <= 1000 * (values + 3 * 4) + 500  # three offsets: of two texts and of the quarantined
