"""Laws of folders as others lay them out: columns by their common names, imagefolder's files and splits, and a word
about whatever is left out."""

import json
import logging
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.data.listing import SourceError
from components.data.source_check import check_source, detect_source, source_digest
from components.data.sources.folder import list_folder
from components.data.sources.source import Columns, Source
from components.stages.images import ImagesConfig, images_identity
from tests.image_sets import image, png, write_files

NO_FILE = r" can't be read \(row 2 has .*each line needs a file and a caption"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four images at the top."""
    return add_images(tmp_path, "a.png", "b.png", "c.png", "d.png")


def add_images(folder: Path, *names: str) -> Path:
    return write_files(folder, {name: png(image(number)) for number, name in enumerate(names)})


def read(source: Source) -> dict[str, tuple[str, str]]:
    """File -> (class, caption)."""
    return {item.location: (source.classes[item.label], item.caption) for item in source.items}


@pytest.mark.parametrize(
    ("file", "label"),
    [
        *(("file", "class"), ("file_name", "label"), ("filename", "labels")),
        *(("path", "Category"), ("image", "class_name"), ("image_path", "target")),
    ],
)
@pytest.mark.parametrize("caption", ["caption", "text", "prompt", "Description"])
def test_common_names_of_columns_are_understood(folder: Path, file: str, label: str, caption: str) -> None:
    (folder / "captions.csv").write_text(f"{file},{caption},{label}\na.png,one,x\nb.png,two,y\n")
    assert read(list_folder(str(folder))) == {"a.png": ("x", "one"), "b.png": ("y", "two")}


def test_columns_can_be_chosen(folder: Path) -> None:
    (folder / "captions.csv").write_text("id,file_name,caption,label,genus\na.png,zzz,one,x,cat\n")
    chosen = Columns(image="id", caption="label", label="genus")
    assert read(list_folder(str(folder), columns=chosen)) == {"a.png": ("cat", "x")}
    with pytest.raises(SourceError, match=r"captions.csv: column 'genu' is not there, did you mean 'genus'\?"):
        list_folder(str(folder), columns=Columns(label="genu"))


def test_what_is_not_read_is_named_with_what_it_might_be(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = "".join(f"{name}.png,one,x\n" for name in "abcd")
    (folder / "captions.csv").write_text(f"file_name,caption,label\n{lines}")
    with caplog.at_level(logging.WARNING):
        check_source("folder", str(folder))
    assert not caplog.messages
    (folder / "captions.csv").write_text("file_name,caption,lable,width\na.png,one,x,8\nb.png,two,y,8\n")
    with caplog.at_level(logging.WARNING):
        check_source("folder", str(folder))
    assert "captions.csv: image from file_name, caption from caption; not read: lable (near label" in caplog.text
    assert ", width (`cascade data --label-column`" in caplog.text
    assert f"{folder}: 2 images are not named in captions.csv and are left out" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("captions.csv", "file,caption\na.png,one\n,two\n", NO_FILE),
        ("captions.jsonl", '{"file": "a.png", "caption": "one"}\n{"caption": "two"}', NO_FILE),
        ("captions.jsonl", '{"file": "a.png", "caption": "one"}\n{"file": null, "caption": "two"}', NO_FILE),
        ("captions.jsonl", '{"file": "a.png"}', "needs a file and a caption"),
        ("captions.jsonl", '{"file": ', "needs a file and a caption"),
        ("captions.jsonl", '{"file": "z.png", "caption": "x"}', "names z.png"),
        ("captions.jsonl", '{"file": "a.png", "caption": "x"}\n{"file": "a.png", "caption": "y"}', "names a.png twice"),
        ("captions.jsonl", "", "names no image"),
        ("captions.csv", "file,caption\na.png,red, round\n", "line 2 has more fields than there are columns"),
        ("captions.csv", "file;caption\na.png;one\n", "separated by ';'; save it with commas"),
        ("captions.csv", "file\tcaption\na.png\tone\n", r"separated by '\\t'; save it with commas"),
        ("captions.csv", "file,caption\na.png,caf\u00e9\n", "is not UTF-8 .*iconv -f latin1 -t utf-8"),
    ],
)
def test_a_captions_file_that_does_not_fit_is_refused_with_a_remedy(
    folder: Path, name: str, content: str, said: str
) -> None:
    (folder / name).write_bytes(content.encode("latin1"))
    with pytest.raises(SourceError, match=rf"{name}.*{said}"):
        list_folder(str(folder))


def test_a_plain_folder_is_a_set_without_conditions_and_says_so(folder: Path) -> None:
    add_images(folder, "more.png")
    source = list_folder(str(folder))
    assert source.classes == ("image",)
    assert set(read(source).values()) == {("image", "")}
    assert {"a.png", "more.png"} <= read(source).keys()
    assert any("images without classes and captions" in note for note in source.notes)
    with pytest.raises(SourceError, match="is no table, and column 'genus' for label"):
        list_folder(str(folder), columns=Columns(label="genus"))


def test_images_that_no_decoder_reads_are_counted_and_named(folder: Path) -> None:
    for name in ("x.HEIC", "y.heic", "z.avif"):
        (folder / name).write_bytes(b"ftyp")
    (folder / "captions.csv").write_text("file,caption\na.png,one\nx.HEIC,two\n")
    source = list_folder(str(folder))
    assert read(source) == {"a.png": ("image", "one")}
    assert any("3 images are .avif and .heic and are not read: convert" in note for note in source.notes)


@pytest.mark.parametrize("file", ["file", "file_name", "filename", "path", "image", "image_path"])
def test_empty_cells_are_no_word_none_under_any_name_of_files(folder: Path, file: str) -> None:
    (folder / "captions.jsonl").write_text(json.dumps({file: "a.png", "caption": None, "label": None}))
    assert read(list_folder(str(folder))) == {"a.png": ("image", "")}


def test_json_lines_end_at_line_feeds_alone(folder: Path) -> None:
    words = "one\u2028two\x85three"  # line breaks of Unicode, which JSON leaves within its strings
    line = json.dumps({"file": "a.png", "caption": words}, ensure_ascii=False)
    (folder / "captions.jsonl").write_text(f"{line}\r\n\r\n", encoding="utf-8")
    assert read(list_folder(str(folder))) == {"a.png": ("image", words)}


def write_metadata(folder: Path, kind: str, rows: list[dict[str, object]]) -> None:
    if kind == "csv":
        lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
        (folder / "metadata.csv").write_text("\n".join(lines))
    elif kind == "jsonl":
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        pq.write_table(pa.Table.from_pylist(rows), folder / "metadata.parquet")


def test_damaged_metadata_is_named(folder: Path) -> None:
    write_metadata(folder, "parquet", [{"file_name": "a.png", "text": "one"}])
    data = (folder / "metadata.parquet").read_bytes()
    size = int.from_bytes(data[-8:-4], "little")  # of the footer
    (folder / "metadata.parquet").write_bytes(data[: -8 - size] + b"\xff" * size + data[-8:])
    with pytest.raises(SourceError, match=r"metadata.parquet can't be read \(.*each line needs a file and a caption"):
        list_folder(str(folder))


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_imagefolder_with_metadata_in_its_splits_is_read(tmp_path: Path, kind: str) -> None:
    add_images(tmp_path, "train/1.png", "train/more/2.png", "test/1.png")
    rows = [("1.png", "one", "x"), ("more/2.png", "two", "y")]
    write_metadata(
        tmp_path / "train", kind, [{"file_name": file, "text": text, "label": label} for file, text, label in rows]
    )
    write_metadata(tmp_path / "test", kind, [{"file_name": "1.png", "text": "three", "label": "x"}])
    assert detect_source(str(tmp_path)).source == "folder"
    source = list_folder(str(tmp_path))
    assert read(source) == {"train/1.png": ("x", "one"), "train/more/2.png": ("y", "two")}
    assert any("train is read (2 files) and test (1 file) is not" in note for note in source.notes)


def test_metadata_at_the_top_names_images_of_all_splits(tmp_path: Path) -> None:
    add_images(tmp_path, "train/1.png", "validation/2.png")
    rows = [{"file_name": "train/1.png", "text": "one"}, {"file_name": "validation/2.png", "text": "two"}]
    write_metadata(tmp_path, "csv", rows)
    assert read(list_folder(str(tmp_path))) == {"train/1.png": ("image", "one")}


def test_without_a_class_column_sub_folders_are_the_classes(tmp_path: Path) -> None:
    add_images(tmp_path, "cat/1.png", "black_dog/2.png")
    write_metadata(tmp_path, "jsonl", [{"file_name": "cat/1.png", "text": "one"}])
    write_metadata(tmp_path / "black_dog", "jsonl", [{"file_name": "2.png", "text": "two"}])
    found = {"cat/1.png": ("cat", "one"), "black_dog/2.png": ("black_dog", "two")}
    assert read(list_folder(str(tmp_path))) == found


def test_sub_folders_of_a_split_are_the_classes(tmp_path: Path) -> None:
    add_images(tmp_path, "train/cat/1.png", "train/dog/1.png", "val/cat/1.png", "test/dog/1.png")
    source = list_folder(str(tmp_path))
    assert read(source) == {"train/cat/1.png": ("cat", "cat"), "train/dog/1.png": ("dog", "dog")}
    assert "test (1 file) and validation (1 file) is not" in source.notes[0]
    add_images(tmp_path / "other", "train/1.png", "bus/1.png")
    assert list_folder(str(tmp_path / "other")).classes == ("bus", "train")  # a class that is called as a split


def test_class_numbers_are_ordered_by_their_size(tmp_path: Path) -> None:
    add_images(tmp_path, *(f"{number}.png" for number in range(11)))
    write_metadata(tmp_path, "csv", [{"file_name": f"{number}.png", "label": number} for number in range(11)])
    source = list_folder(str(tmp_path))
    assert source.classes == tuple(map(str, range(11)))


def test_a_set_of_which_another_column_is_read_now_gets_another_key(folder: Path) -> None:
    """A run before it was read had one class for all: its shards must not be taken for these."""
    (folder / "captions.csv").write_text("file_name,caption,other\na.png,one,x\nb.png,two,y\n")
    known = source_digest("folder", str(folder))
    stamp = (folder / "captions.csv").stat()
    (folder / "captions.csv").write_text("file_name,caption,label\na.png,one,x\nb.png,two,y\n")
    os.utime(folder / "captions.csv", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert source_digest("folder", str(folder)) != known


def test_chosen_columns_are_part_of_the_key_and_others_are_not(folder: Path) -> None:
    (folder / "captions.csv").write_text("file_name,caption,genus\na.png,one,x\n")
    settings = {"resolution": 8, "samples_per_shard": 8, "holdout_fraction": 0.1, "vocab_size": 300, "text_length": 8}
    common = images_identity(ImagesConfig(source=str(folder), **settings))
    chosen = images_identity(ImagesConfig(source=str(folder), columns=Columns(label="genus"), **settings))
    assert "columns" not in common
    assert chosen["columns"] == {"image": None, "caption": None, "label": "genus"}
