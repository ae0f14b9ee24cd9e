"""Laws of tars that are written again: each sample as it was and once, mixed, and no tar that is done read again."""

import inspect
import os
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest

from components.data.listing import ShardError, SourceError
from components.data.parts import even_parts
from components.data.shards import ShardIndex
from components.data.source_check import check_outside
from components.data.tars import Group, iterate_shard
from pipelines.command import cli
from pipelines.command.data import default_samples
from tests.image_sets import CLASSES, image, ingest_here, png, tar_of, write_tar
from tests.stored_files import flip


def reshard(tar: Path, out: Path, *, samples: int = 8, holdout: float = 0.1) -> ShardIndex:
    how = {"samples_per_shard": samples, "holdout_fraction": holdout, "max_corrupt_fraction": 0.1}
    return ingest_here("webdataset", tar, out, reshard=True, **how)


def groups(path: Path) -> dict[str, Group]:
    found = list(iterate_shard(path.read_bytes(), str(path)))
    assert len({group.key for group in found}) == len(found)
    return {group.key: group for group in found}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_each_sample_is_written_once_as_it_was(tmp_path: Path) -> None:
    extra = {"000003.depth.png": b"as it is", "000003.json": b"{}", "notes.txt": b"no sample"}
    write_tar(tmp_path / "in.tar", range(30), side=9, extra=extra)
    index = reshard(tmp_path / "in.tar", tmp_path / "out")
    assert [entry.samples for entry in index.shards] == [7, 7, 7, 8]
    written = [groups(tmp_path / "out" / entry.url) for entry in index.shards]
    assert sum(map(len, written)) == 29  # its depth map can't be decoded
    together = {key: group for shard in written for key, group in shard.items()}
    original = groups(tmp_path / "in.tar")
    assert together == {key: group for key, group in original.items() if key not in ("notes", "000003")}
    (refused,) = index.shards[0].quarantined
    assert (refused.key, refused.shard) == ("000003", str(tmp_path / "in.tar"))


def test_a_class_that_stood_together_is_in_every_shard(tmp_path: Path) -> None:
    files = [
        (f"{number:06d}.{name}", data)
        for number in [*range(0, 300, 3), *range(1, 301, 3)]
        for name, data in (("png", png(image(number))), ("cls", CLASSES[number % 3].encode()))
    ]
    (tmp_path / "in.tar").write_bytes(tar_of(files))
    index = reshard(tmp_path / "in.tar", tmp_path / "out", samples=25)
    for entry in index.shards:
        labels = Counter(group.words.label for group in groups(tmp_path / "out" / entry.url).values())
        assert set(labels) == {"red", "green"}
        assert min(labels.values()) >= 5


def test_equal_tars_give_equal_bytes_and_one_that_is_done_is_not_read_again(tmp_path: Path) -> None:
    write_tar(tmp_path / "in.tar", range(30), side=8)
    first, other = (reshard(tmp_path / "in.tar", tmp_path / name) for name in ("one", "other"))
    assert first.shards == other.shards
    assert files(tmp_path / "one") == files(tmp_path / "other")
    stamp = (tmp_path / "in.tar").stat()  # other bytes of the same size and time: only a reader would see it
    (tmp_path / "in.tar").write_bytes(bytes(stamp.st_size))
    os.utime(tmp_path / "in.tar", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert reshard(tmp_path / "in.tar", tmp_path / "one") == first


@pytest.mark.parametrize("lacking", ["record", "shard", "half a shard", "a bit of a shard", "a bit of the record"])
def test_what_was_killed_half_way_is_written_again_to_the_same_bytes(tmp_path: Path, lacking: str) -> None:
    write_tar(tmp_path / "in.tar", range(30), side=8)
    index, out = reshard(tmp_path / "in.tar", tmp_path / "out"), tmp_path / "out"
    whole = files(out)
    (record,), shard = (out / "parts").iterdir(), out / index.shards[2].url
    if lacking in ("record", "shard"):
        {"record": record, "shard": shard}[lacking].unlink()
    elif lacking == "half a shard":
        shard.write_bytes(shard.read_bytes()[:1000])
    else:
        flip(record if lacking.endswith("record") else shard)
    assert reshard(tmp_path / "in.tar", out) == index
    assert files(out) == whole


def test_another_size_or_hold_out_is_other_work_and_a_tar_of_which_nothing_can_be_decoded_is_counted(tmp_path: Path):
    write_tar(tmp_path / "spoiled/0.tar", range(3), side=8, corrupt={0, 1, 2})
    write_tar(tmp_path / "spoiled/1.tar", range(30, 60), side=8)
    entry = reshard(tmp_path / "spoiled", tmp_path / "out").shards[0]
    assert (entry.samples, len(entry.quarantined)) == (0, 3)
    write_tar(tmp_path / "in.tar", range(30), side=8)
    assert len(reshard(tmp_path / "in.tar", tmp_path / "out", samples=30).shards) == 1
    assert len(reshard(tmp_path / "in.tar", tmp_path / "out", samples=10).shards) == 3
    (entry,) = reshard(tmp_path / "in.tar", tmp_path / "out", samples=30, holdout=0).shards
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
