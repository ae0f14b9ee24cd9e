"""Laws of tars that are written again: each sample as it was and once, mixed, and no tar that is done read again."""

import inspect
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest

from components.data.listing import ShardError, SourceError
from components.data.parts import even_parts
from components.data.source_check import check_outside
from components.data.sources.webdataset import TarFacts, TarResharder
from components.data.tars import Group, iterate_shard
from components.runtime.storage.artifact import look_at, recorded_parts
from components.runtime.storage.store import Store
from pipelines.command import cli
from pipelines.command.data import default_samples
from tests.image_sets import CLASSES, image, png, tar_of, write_tar
from tests.stored_files import flip


def reshard(tar: Path, out: Path, *, samples: int = 8, holdout: float = 0.1) -> TarFacts:
    """As the ingest does it: what is there is taken if it is whole."""
    work, content = TarResharder(Store(str(out)), holdout, samples), f"{tar}\n1\nmark"
    part = work.part_name(content)
    record = look_at(work.out, part).record if part in recorded_parts(work.out) else None
    return TarFacts.model_validate_json(work(0, content)) if record is None else TarFacts.model_validate(record.facts)


def groups(path: Path) -> dict[str, Group]:
    found = list(iterate_shard(path.read_bytes(), str(path)))
    assert len({group.key for group in found}) == len(found)
    return {group.key: group for group in found}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_each_sample_is_written_once_as_it_was(tmp_path: Path) -> None:
    extra = {"000003.depth.png": b"as it is", "000003.json": b"{}", "notes.txt": b"no sample"}
    write_tar(tmp_path / "in.tar", range(30), side=9, extra=extra)
    facts = reshard(tmp_path / "in.tar", tmp_path / "out")
    assert [entry.samples for entry in facts.entries] == [7, 7, 7, 8]
    written = [groups(tmp_path / "out" / entry.url) for entry in facts.entries]
    assert sum(map(len, written)) == 29  # its depth map can't be decoded
    together = {key: group for shard in written for key, group in shard.items()}
    original = groups(tmp_path / "in.tar")
    assert together == {key: group for key, group in original.items() if key not in ("notes", "000003")}
    (refused,) = facts.entries[0].quarantined
    assert (refused.key, refused.shard) == ("000003", str(tmp_path / "in.tar"))


def test_a_class_that_stood_together_is_in_every_shard(tmp_path: Path) -> None:
    files = [
        (f"{number:06d}.{name}", data)
        for number in [*range(0, 300, 3), *range(1, 301, 3)]
        for name, data in (("png", png(image(number))), ("cls", CLASSES[number % 3].encode()))
    ]
    (tmp_path / "in.tar").write_bytes(tar_of(files))
    facts = reshard(tmp_path / "in.tar", tmp_path / "out", samples=25)
    for entry in facts.entries:
        labels = Counter(group.words.label for group in groups(tmp_path / "out" / entry.url).values())
        assert set(labels) == {"red", "green"}
        assert min(labels.values()) >= 5


def test_equal_tars_give_equal_bytes_and_one_that_is_done_is_not_read_again(tmp_path: Path) -> None:
    write_tar(tmp_path / "in.tar", range(30), side=8)
    first, other = (reshard(tmp_path / "in.tar", tmp_path / name) for name in ("one", "other"))
    assert first == other
    assert files(tmp_path / "one") == files(tmp_path / "other")
    (tmp_path / "in.tar").unlink()
    assert reshard(tmp_path / "in.tar", tmp_path / "one") == first


@pytest.mark.parametrize("lacking", ["record", "shard", "half a shard", "a bit of a shard", "a bit of the record"])
def test_what_was_killed_half_way_is_written_again_to_the_same_bytes(tmp_path: Path, lacking: str) -> None:
    write_tar(tmp_path / "in.tar", range(30), side=8)
    facts, out = reshard(tmp_path / "in.tar", tmp_path / "out"), tmp_path / "out"
    whole = files(out)
    (record,), shard = (out / "parts").iterdir(), out / facts.entries[2].url
    if lacking in ("record", "shard"):
        {"record": record, "shard": shard}[lacking].unlink()
    elif lacking == "half a shard":
        shard.write_bytes(shard.read_bytes()[:1000])
    else:
        flip(record if lacking.endswith("record") else shard)
    assert reshard(tmp_path / "in.tar", out) == facts
    assert files(out) == whole


def test_another_size_or_hold_out_is_other_work_and_a_tar_of_which_nothing_can_be_decoded_is_counted(tmp_path: Path):
    write_tar(tmp_path / "spoiled.tar", range(3), side=8, corrupt={0, 1, 2})
    (entry,) = reshard(tmp_path / "spoiled.tar", tmp_path / "out").entries
    assert (entry.samples, len(entry.quarantined)) == (0, 3)
    write_tar(tmp_path / "in.tar", range(30), side=8)
    assert len(reshard(tmp_path / "in.tar", tmp_path / "out", samples=30).entries) == 1
    assert len(reshard(tmp_path / "in.tar", tmp_path / "out", samples=10).entries) == 3
    (entry,) = reshard(tmp_path / "in.tar", tmp_path / "out", samples=30, holdout=0).entries
    assert entry.train_samples == 30


def test_a_tar_that_was_cut_short_leaves_nothing(tmp_path: Path) -> None:
    write_tar(tmp_path / "in.tar", range(30), side=8)
    data = (tmp_path / "in.tar").read_bytes()
    for length in (len(data) // 2, len(data.rstrip(b"\0"))):
        (tmp_path / "in.tar").write_bytes(data[:length])
        with pytest.raises(ShardError, match=r"in\.tar .*truncated"):
            reshard(tmp_path / "in.tar", tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 64, 65, 1000])
def test_parts_are_even_and_none_is_larger_than_asked(count: int) -> None:
    keys = [Group(str(number), {}) for number in range(count)]
    parts = even_parts(keys, 8)
    assert [group for part in parts for group in part] == keys
    sizes = {len(part) for part in parts}
    assert max(sizes) <= 8
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("path", "out", "inside"),
    [
        ("s3://b/tars/*.tar", "s3://b/tars", True),
        ("s3://b/tars/*.tar", "s3://b/tars/small", True),
        ("s3://b/tars", "s3://b/tars/small", True),
        ("s3://b/tars/train-*.tar", "s3://b/tars/small", False),
        ("s3://b/tars/*.tar", "s3://b/tars-small", False),
        ("s3://b/tars/*.tar", "s3://b", False),
        ("s3://b/tars/one.tar", "s3://b/tars", False),
        ("/data/tars", "/data/tars", True),
    ],
)
def test_what_is_written_never_becomes_a_part_of_the_source(path: str, out: str, inside: bool) -> None:
    with pytest.raises(SourceError, match="lies in the source") if inside else nullcontext():
        check_outside(out, path)


def test_the_command_says_how_many_samples_a_shard_has_where_the_user_says_nothing() -> None:
    about = inspect.signature(cli.data).parameters["samples_per_shard"].annotation.__metadata__[0].help
    assert f"{default_samples('folder')}; of tars that are written again {default_samples('webdataset')}" in about
