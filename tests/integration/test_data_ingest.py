"""The ingest through Ray Data: every source, resumed without doing a finished shard again, bad images counted."""

import io
import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ray
from PIL import Image

from components.data.held_out import read_split
from components.data.ingest import IngestConfig, ingest
from components.data.listing import DataError, SourceError
from components.data.shards import ShardIndex, View, load_index
from components.runtime.storage.store import Store
from tests.image_sets import image, number_of, png, read_whole_shard, write_files, write_tar

pytestmark = pytest.mark.usefixtures("ray_cluster")


def config(**changes: object) -> IngestConfig:
    settings = {
        "resolution": 8,
        "samples_per_shard": 40,
        "holdout_fraction": 0.1,
        "vocab_size": 300,
        "text_length": 8,
        **changes,
    }
    return IngestConfig(**settings)


def images(folder: Path, count: int, *, corrupt: int = 0) -> Path:
    """Numbered images in two class folders, some of them cut short."""
    names = [f"{('even', 'odd')[number % 2]}/{number:04d}.png" for number in range(count)]
    return write_files(folder, {name: png(image(n))[: 40 if n < corrupt else None] for n, name in enumerate(names)})


def numbers(index: ShardIndex) -> list[int]:
    found = [number_of(read_whole_shard(index, entry, View(8)).image) for entry in index.shards]
    return np.concatenate(found).tolist()


def test_a_folder_becomes_shards_that_hold_each_image_once(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    index = ingest(
        "folder",
        str(images(tmp_path / "in", 100)),
        out=Store(str(tmp_path / "out")),
        config=config(),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert sorted(numbers(index)) == list(range(100))
    assert [entry.samples for entry in index.shards] == [40, 40, 20]
    assert index.classes == ("even", "odd")
    assert index.samples == 100
    assert seen[-1] == (100, 100)
    samples = read_split(index, "train", View(8))
    assert all(number % 2 == label for number, label in zip(number_of(samples.image), samples.label, strict=True))
    assert set(samples.caption) == {"even", "odd"}
    assert load_index(index.root) == index


def test_equal_sources_give_equal_bytes_and_a_second_run_makes_no_shard_again(tmp_path: Path) -> None:
    source = str(images(tmp_path / "in", 90))
    first, second = Store(str(tmp_path / "first")), Store(str(tmp_path / "second"))
    index = ingest("folder", source, out=first, config=config())
    assert ingest("folder", source, out=second, config=config()).shards == index.shards
    second.delete("index.json")
    second.delete("shard-000001.tar")
    kept = (tmp_path / "second" / "shard-000000.tar").stat().st_mtime_ns
    assert ingest("folder", source, out=second, config=config()).shards == index.shards
    assert (tmp_path / "second" / "shard-000000.tar").stat().st_mtime_ns == kept


def test_another_resolution_makes_all_shards_again(tmp_path: Path) -> None:
    source, out = str(images(tmp_path / "in", 30)), Store(str(tmp_path / "out"))
    ingest("folder", source, out=out, config=config())
    index = ingest("folder", source, out=out, config=config(resolution=4))
    assert read_split(index, "train", View(4)).image.shape[1:] == (4, 4, 3)
    assert index.resolution == 4


def test_a_few_corrupt_images_are_quarantined_counted_and_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    source = str(images(tmp_path / "in", 400, corrupt=2))
    with caplog.at_level(logging.WARNING):
        index = ingest("folder", source, out=Store(str(tmp_path / "out")), config=config(samples_per_shard=200))
    assert (index.samples, index.quarantined) == (398, 2)
    assert sorted(numbers(index)) == list(range(2, 400))
    assert {entry.key for shard in index.shards for entry in shard.quarantined} == {"even/0000", "odd/0001"}
    assert "2 of 400 images (0.5%) are corrupt" in caplog.text


INGEST = """
import sys
import ray
from components.data.ingest import IngestConfig, ingest
from components.runtime.storage.store import Store

address, place, out, config = sys.argv[1:]
ray.init(address=address, log_to_driver=False)
for kind, source, reshard in (("folder", "folder", False), ("webdataset", "tars", False), ("webdataset", "tars", True)):
    files = Store(out).join(f"{source}-{reshard}")
    ingest(kind, f"{place}/{source}", out=files, config=IngestConfig.model_validate_json(config), reshard=reshard)
"""


def test_two_processes_make_equal_bytes_of_a_set_with_files_that_can_t_be_read(tmp_path: Path) -> None:
    """Images cut short, an empty file and a text, in a folder and in tars: the index says why, and names no object of
    the process that looked."""
    jpeg = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(jpeg, "JPEG")
    cut = {"png.png": png(image(1))[:40], "jpeg.jpg": jpeg.getvalue()[:900]}
    dirty = {**cut, "empty.png": b"", "text.png": b"no image at all\n"}
    write_files(images(tmp_path / "folder", 20) / "even", dirty)
    labels = {f"{Path(name).stem}.cls": b"red" for name in dirty}
    for shard in range(2):
        write_tar(tmp_path / "tars" / f"{shard}.tar", range(shard * 10, shard * 10 + 10), side=8, extra=dirty | labels)
    settings = config(max_corrupt_fraction=0.5).model_dump_json()
    address = ray.get_runtime_context().gcs_address
    outs = [tmp_path / f"out{number}" for number in range(2)]
    arguments = [[address, str(tmp_path), str(out), settings] for out in outs]
    processes = [subprocess.Popen([sys.executable, "-c", INGEST, *values]) for values in arguments]
    assert [process.wait(300) for process in processes] == [0, 0]
    assert [load_index(str(folder)).quarantined for folder in sorted(outs[0].iterdir())] == [4, 8, 8]
    first, second = ({path.relative_to(out): path.read_bytes() for path in out.glob("**/*.*")} for out in outs)
    assert second == first


def test_many_corrupt_images_are_an_error_and_leave_no_index(tmp_path: Path) -> None:
    out = Store(str(tmp_path / "out"))
    with pytest.raises(DataError, match=r"5 of 100 images \(5.0%\) are corrupt, such as .*more than 1.0%"):
        ingest("folder", str(images(tmp_path / "in", 100, corrupt=5)), out=out, config=config())
    assert not out.exists("index.json")


def test_tars_of_the_user_stay_where_they_are_and_are_not_written_to(tmp_path: Path) -> None:
    for shard in range(2):
        write_tar(tmp_path / "in" / f"part{shard}.tar", range(shard * 10, shard * 10 + 10), side=20)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "in").iterdir()}
    index = ingest("webdataset", f"{tmp_path}/in/*.tar", out=Store(str(tmp_path / "out")), config=config())
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "in").iterdir()} == before
    assert [entry.url for entry in index.shards] == [f"{tmp_path}/in/part{shard}.tar" for shard in range(2)]
    assert index.classes == ("blue", "green", "red")
    samples = read_whole_shard(index, index.shards[0], View(8))
    np.testing.assert_array_equal(number_of(samples.image), range(10))
    assert [index.classes[label] for label in samples.label[:3]] == ["red", "green", "blue"]


def test_tars_without_classes_and_captions_and_plain_folders_are_sets_of_one_class(tmp_path: Path) -> None:
    write_tar(tmp_path / "in.tar", range(30), side=8, members=("png",))
    for number in range(30):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / f"in/{number:04d}.png").write_bytes(png(image(number)))
    for source, path in {"webdataset": "in.tar", "folder": "in"}.items():
        index = ingest(source, str(tmp_path / path), out=Store(str(tmp_path / source)), config=config())
        samples = read_split(index, "train", View(8))
        assert index.classes == ("image",)
        assert (set(samples.label.tolist()), set(samples.caption)) == ({0}, {""})


@pytest.mark.parametrize("reshard", [False, True])
def test_class_and_caption_are_read_of_json_where_a_sample_has_no_other(tmp_path: Path, reshard: bool) -> None:
    """In the forms of img2dataset and of a list of captions; the bytes of `json` are an untrusted writer's."""
    words = [{"caption": "a red one", "label": 10}, {"Text": ["two", "of it"], "class": "9", "url": "x"}]
    words += [b"[" * 100_000, b"\xff", b'"word"']
    extra = {f"{n:06d}.json": w if isinstance(w, bytes) else json.dumps(w).encode() for n, w in enumerate(words)}
    write_tar(tmp_path / "in.tar", range(2), side=8, members=("png",), extra=dict(list(extra.items())[:2]))
    settings = config(holdout_fraction=0.0)
    place = {"out": Store(str(tmp_path / "out")), "config": settings, "reshard": reshard}
    index = ingest("webdataset", str(tmp_path / "in.tar"), **place)
    samples = read_split(index, "train", View(8))
    assert index.classes == ("9", "10")
    assert set(zip(samples.label.tolist(), samples.caption, strict=True)) == {(1, "a red one"), (0, "two")}
    write_tar(tmp_path / "bad.tar", range(5), side=8, members=("png",), extra=dict(list(extra.items())[1:]))
    with pytest.raises(SourceError, match=r"4 samples in .* have no class and others do"):
        ingest("webdataset", str(tmp_path / "bad.tar"), **place)


def test_images_of_one_pixel_and_of_other_formats_are_quarantined_in_any_source(tmp_path: Path) -> None:
    odd = {"x.png": png(image(0, resolution=1)), "y.avif": b"ftyp", "y.txt": b"a word"}
    write_tar(tmp_path / "in.tar", range(30), side=8, extra=odd)
    (tmp_path / "in").mkdir()
    for number in range(30):
        (tmp_path / f"in/{number:04d}.png").write_bytes(png(image(number, resolution=8 if number else 1)))
    reasons = {
        "webdataset": {"x": "1 x 1 pixels", "y": r".avif is not read: convert"},
        "folder": {"0000": "1 x 1 pixels"},
    }
    for source, path in {"webdataset": "in.tar", "folder": "in"}.items():
        settings = config(max_corrupt_fraction=0.1)
        index = ingest(source, str(tmp_path / path), out=Store(str(tmp_path / source)), config=settings)
        found = {entry.key: entry.reason for shard in index.shards for entry in shard.quarantined}
        assert found.keys() == reasons[source].keys()
        assert all(said in found[key] for key, said in reasons[source].items())


def test_tars_that_are_written_again_are_a_set_of_small_shards_with_the_same_samples(tmp_path: Path) -> None:
    """And read as any source."""
    for shard in range(3):
        write_tar(tmp_path / "in" / f"{shard}.tar", range(shard * 50, shard * 50 + 50), side=8, corrupt={7})
    tars, out, seen = f"{tmp_path}/in/*.tar", Store(str(tmp_path / "out")), list[tuple[int, int]]()
    settings = config(samples_per_shard=20, max_corrupt_fraction=0.1)
    in_place = ingest("webdataset", tars, out=Store(str(tmp_path / "index")), config=settings)
    index = ingest(
        "webdataset",
        tars,
        out=out,
        config=settings,
        reshard=True,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert sorted(numbers(index)) == sorted(numbers(in_place)) == [number for number in range(150) if number != 7]
    assert max(entry.samples for entry in index.shards) <= 20
    assert (index.samples, index.quarantined, index.train_samples) == (149, 1, in_place.train_samples)
    assert (index.classes, index.labels, index.text) == (in_place.classes, in_place.labels, in_place.text)
    assert seen[-1] == (3, 3)
    adopted = ingest("shards", out.uri, out=Store(str(tmp_path / "adopted")), config=settings)
    assert sorted(numbers(adopted)) == sorted(numbers(index))
    assert all(entry.url.startswith(out.uri) for entry in adopted.shards), "they stay where they lie"
    samples = read_split(adopted, "train", View(8))
    known = [adopted.classes[label] for label in samples.label]
    assert known == [("red", "green", "blue")[number % 3] for number in number_of(samples.image)]
