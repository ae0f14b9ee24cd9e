"""Laws of the ingest on one machine: changed files are read again, settings that can't be met are refused."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from components.data.images import decode_sample
from components.data.ingest import IngestConfig
from components.data.listing import DataError, ShardError, SourceError
from components.data.shards import ShardIndex
from components.data.source_check import check_source, detect_source
from components.data.tars import iterate_shard
from pipelines.engine.driver import RunOptions, prepare
from tests.image_sets import ingest_here, png, tar_of, write_files, write_parquet

NUMBERS = {"resolution": 8, "samples_per_shard": 5, "holdout_fraction": 0.1, "vocab_size": 300, "text_length": 8}
RED, BLUE = (255, 0, 0), (0, 0, 255)
Ingest = Callable[..., ShardIndex]


def solid(color: tuple[int, int, int]) -> bytes:
    return png(np.full((8, 8, 3), color, np.uint8))


def write_folder(folder: Path, color: tuple[int, int, int]) -> Path:
    for number in range(20):
        name = f"{('cat', 'dog')[number % 2]}/{number}.png"
        write_files(folder, {name: solid(color)})
        os.utime(folder / name, (number, color[0]))  # seconds alone differ: the files are of one size
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Ingest:
    """The ingest, as a user calls it again and again with the same folder."""
    return lambda source, path, **how: ingest_here(source, path, tmp_path / "out", **how)


def colors(index: ShardIndex, out: Path) -> set[tuple[int, ...]]:
    groups = (group for entry in index.shards for group in iterate_shard((out / entry.url).read_bytes(), entry.url))
    return {tuple(decode_sample(group.image).getpixel((0, 0))) for group in groups if group.image is not None}


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_files_that_changed_since_an_earlier_try_are_read_again(tmp_path: Path, run: Ingest, kind: str) -> None:
    for number in (100, 200):
        if kind == "folder":
            write_folder(tmp_path / "set", (number, 0, 127))
        else:
            write_parquet(tmp_path / "set" / "a.parquet", [number] * 20)
            os.utime(tmp_path / "set" / "a.parquet", (1, number))
        assert colors(run(kind, tmp_path / "set"), tmp_path / "out") == {(number, 0, 127)}


def test_a_file_that_was_mended_is_read_by_the_same_command(tmp_path: Path, run: Ingest) -> None:
    bad = write_folder(tmp_path / "set", RED) / "cat" / "0.png"
    bad.write_bytes(b"damaged")
    with pytest.raises(DataError, match="1 of 20 images"):
        run("folder", tmp_path / "set")
    bad.write_bytes(solid(RED))
    assert run("folder", tmp_path / "set").quarantined == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("limit", 0),
        ("limit", -5),
        ("samples_per_shard", 0),
        ("holdout_fraction", -0.1),
        ("holdout_fraction", 1),
        ("text_length", 2),
        ("vocab_size", 10),
        ("max_corrupt_fraction", -1),
        ("resolution", 0),
    ],
)
def test_numbers_that_no_set_can_have_are_refused_before_anything_is_read(name: str, value: float) -> None:
    with pytest.raises(ValidationError, match=name):
        IngestConfig(**NUMBERS | {name: value})


def test_a_set_with_an_index_says_what_it_keeps_and_what_it_can_t_meet(tmp_path: Path, run: Ingest) -> None:
    run("folder", write_folder(tmp_path / "set", RED))
    said: list[str] = []
    run("shards", tmp_path / "out", warn=said.append)
    assert said == []
    run("shards", tmp_path / "out", warn=said.append, holdout_fraction=0.3)
    assert "holdout_fraction 0.1 in place of 0.3" in said[0]
    run("shards", tmp_path / "out", warn=said.append, limit=3)
    assert "limit 20 in place of 3" in said[1]
    with pytest.raises(SourceError, match=r"8², fewer pixels than resolution 16"):
        run("shards", tmp_path / "out", resolution=16)


def test_a_drawn_source_takes_no_path() -> None:
    with pytest.raises(SourceError, match="takes no path, not /photos"):
        check_source("scenes", "/photos")


def test_links_to_folders_and_to_nothing_are_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", RED)
    (folder / "cat" / "link.png").symlink_to(folder / "dog" / "1.png")
    assert detect_source(str(folder)).source == "folder"
    (folder / "bird").symlink_to(folder / "dog")
    with pytest.raises(SourceError, match="bird is a link to a folder"):
        detect_source(str(folder))
    (folder / "bird").unlink()
    (folder / "cat" / "gone.png").symlink_to(folder / "nothing.png")
    with pytest.raises(SourceError, match=r"gone\.png is a link to nothing"):
        detect_source(str(folder))


def test_a_file_behind_a_link_that_was_written_anew_is_another_version(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", RED)
    (tmp_path / "behind.png").write_bytes(solid(RED))
    (folder / "cat" / "link.png").symlink_to(tmp_path / "behind.png")
    before = check_source("folder", str(folder)).facts
    os.utime(tmp_path / "behind.png", (5, 5))
    assert check_source("folder", str(folder)).facts != before


def test_storage_within_the_source_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_folder(tmp_path / "photos", RED))
    with pytest.raises(SourceError, match=r"--storage .*/photos/runs lies in the source \."):
        prepare(RunOptions(recipe="openmoji", set=["images.source=."], tracking="none"))


def test_members_whose_names_are_cut_at_their_first_dot_are_counted(tmp_path: Path, run: Ingest) -> None:
    named = [(f"cat{number}.png", solid(RED)) for number in range(10)]
    (tmp_path / "a.tar").write_bytes(tar_of([*named, ("dog.2.png", solid(RED))]))
    index = run("webdataset", tmp_path / "a.tar", max_corrupt_fraction=0.5)
    (refused,) = index.shards[0].quarantined
    assert refused.key == "dog"
    assert "cut at their first dot, which leaves .2.png" in refused.reason
    (tmp_path / "a.tar").write_bytes(tar_of([(f"cat.{number}.png", solid(RED)) for number in range(10)]))
    with pytest.raises((DataError, ShardError), match="cut at their first dot"):
        run("webdataset", tmp_path / "a.tar")


def test_a_folder_that_is_named_as_a_parquet_file_is_read(tmp_path: Path, run: Ingest) -> None:
    write_parquet(tmp_path / "set.parquet" / "part-0.parquet", range(10))
    assert run("parquet", tmp_path / "set.parquet").samples == 10
