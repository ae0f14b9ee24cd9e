"""Laws of the look at a user's source: it says what an ingest will find and refuse, and reads little."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from components.data import source_look
from components.data.ingest import IngestConfig
from components.data.listing import ShardError, SourceError
from components.data.source_look import IMAGES, SourceLook, look_at
from components.runtime.storage.store import Store
from pipelines.engine import driver
from tests.image_sets import image, png, write_files, write_parquet, write_set, write_tar

NUMBERS = {"resolution": 8, "samples_per_shard": 40, "holdout_fraction": 0.1, "vocab_size": 300, "text_length": 8}
NOISE = np.random.default_rng(0)


def look(source: str, path: Path) -> SourceLook:
    found = look_at(source, str(path), IngestConfig(**NUMBERS))
    assert found is not None
    return found


def pets(folder: Path, *, damaged: int = 0) -> Path:
    names = [f"{('cat', 'dog', 'dog')[number % 3]}/{number:02d}.png" for number in range(30)]
    return write_files(folder, {name: png(image(n))[: 40 if n < damaged else None] for n, name in enumerate(names)})


def large_tar(path: Path) -> Path:
    """A tar of 40 images of 30 kB, which no look reads whole below."""
    pixels = {n: png(NOISE.integers(0, 256, (100, 100, 3), np.uint8)) for n in range(40)}
    members = {f"{n:04d}.{name}": data for n, own in pixels.items() for name, data in (("png", own), ("cls", b"cat"))}
    write_tar(path, range(0), side=8, extra=members)
    return path


def test_a_folder_is_counted_by_class_and_a_few_images_are_shown(tmp_path: Path) -> None:
    seen = look("folder", pets(tmp_path))
    (line,) = seen.lines
    assert line.startswith(f"{tmp_path}: 30 images, 2 classes: dog 20, cat 10; captions such as '")
    assert len(seen.images) == len(seen.captions) == IMAGES
    assert {pixels.shape for pixels in seen.images} == {(64, 64, 3)}
    assert set(seen.captions) == {"cat", "dog"}


def test_images_that_can_t_be_used_are_said_and_end_it_where_there_are_no_others(tmp_path: Path) -> None:
    (line, warning) = look("folder", pets(tmp_path / "some", damaged=15)).lines
    assert "30 images" in line
    assert "of 12 samples that were looked at can't be used: " in warning
    assert warning.endswith("the ingest stops where they are more than 1.0%")
    with pytest.raises(SourceError, match=r"12 of 12 samples .* mend the source"):
        look("folder", pets(tmp_path / "all", damaged=30))


def test_the_other_sources_are_looked_at_too(tmp_path: Path) -> None:
    for part in range(2):
        write_parquet(tmp_path / f"set/{part}.parquet", range(part * 20, part * 20 + 20))
    assert "the first file: 20 images" in look("parquet", tmp_path / "set").lines[0]
    write_set(Store(str(tmp_path / "shards")), sizes=(5, 5))
    seen = look("shards", tmp_path / "shards")
    assert seen.lines[0].endswith(
        ": 10 images in shards, 3 classes: blue, green, red; captions such as 'a red square' and 'a green square'"
    )
    assert len(seen.images) == 5
    assert look_at("openmoji", None, IngestConfig(**NUMBERS)) is None


def test_words_of_json_are_seen_in_the_first_bytes_of_tars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = {f"{n:06d}.json": json.dumps({"caption": f"number {n}", "label": "abc"[n % 3]}).encode() for n in range(6)}
    write_tar(tmp_path / "a.tar", range(6), side=8, members=("png",), extra=words)
    (line,) = look("webdataset", tmp_path).lines
    assert line.endswith("of the first 6 samples 3 classes: a 2, b 2, c 2; captions such as 'number 0' and 'number 1'")
    monkeypatch.setattr(source_look, "TAR_BYTES", 200_000)
    read: list[int] = []
    original = source_look.read_range
    monkeypatch.setattr(
        source_look, "read_range", lambda url, start, end: read.append(end - start) or original(url, start, end)
    )
    for number in range(6):
        large_tar(tmp_path / f"large/{number}.tar")
    (tmp_path / "large/6.tar.gz").write_bytes(gzip.compress((tmp_path / "large/0.tar").read_bytes()))
    seen = look("webdataset", tmp_path / "large")
    assert "7 tars of" in seen.lines[0]
    assert "of the first 18 samples 1 classes: cat 18; no captions" in seen.lines[0]
    assert sum(read) < 3 * 201_100


def test_what_the_ingest_refuses_in_sight_ends_the_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_look, "TAR_BYTES", 200_000)
    whole = large_tar(tmp_path / "whole.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:400_000])
    (tmp_path / "none.tar").write_bytes(bytes(range(256)) * 2000 + whole[-1024:])
    write_tar(tmp_path / "some.tar", range(4), side=8, members=("png",), extra={"000001.cls": b"cat"})
    for name, said in {
        "cut.tar": "no end mark",
        "none.tar": "can't be read as a tar",
        "some.tar": "3 samples in .* have no class and others do",
    }.items():
        with pytest.raises((ShardError, SourceError), match=said):
            look("webdataset", tmp_path / name)


def test_a_plan_says_what_it_saw_and_the_name_of_the_models(tmp_path: Path) -> None:
    folder = pets(tmp_path / "pets")
    options = driver.RunOptions(recipe="smoke", set=[f"images.source={folder}"], storage=str(tmp_path / "runs"))
    seen = driver.prepare(options).seen
    assert seen[0].startswith(f"{folder}: 30 images, 2 classes: dog 20, cat 10")
    assert seen[-1] == "models: image-cascade-smoke_on_pets"
