"""Laws for files of strangers: nothing of theirs runs, is written, is followed, or takes memory without end."""

import bz2
import gzip
import io
import struct
import tarfile
import tracemalloc
import zlib
from pathlib import Path

import pytest
from PIL import Image

from components.data import tars
from components.data.images import load_depth
from components.data.listing import ShardError
from components.data.sources.webdataset import TarFacts, TarSurvey
from components.data.tars import MAX_MEMBER_BYTES, iterate_shard
from components.runtime.storage.store import Store
from components.sampling.image_files import MAX_PIXELS, decode_image
from tests.image_sets import image, png, tar_of, write_tar

PNG = png(image(1))


def header_of(name: str, **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def peak_bytes(action: object, *arguments: object) -> int:
    tracemalloc.start()
    try:
        with pytest.raises((ShardError, ValueError, Image.DecompressionBombError)):
            list(action(*arguments))
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def png_of(width: int, height: int, rows: bytes) -> bytes:
    """A PNG of one grey byte a pixel that says it is as large as one likes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


REFUSED = {
    "a name that comes again": (tar_of([("a.png", PNG), ("b.png", PNG), ("a.png", PNG)]), r"a\.png twice"),
    "a name twice in a row": (tar_of([("a.png", PNG), ("a.png", PNG)]), "duplicate"),
    # Otherwise one sample would be two, and the second would have no image.
    "members apart": (tar_of([("a.png", PNG), ("b.png", PNG), ("a.cls", b"1")]), "members of a do not stand together"),
    "a name that is not UTF-8": (tar_of([("\udcff.png", PNG)]), "not UTF-8"),
    "a member too large": (header_of("a.png", size=MAX_MEMBER_BYTES + 1).tobuf() + bytes(4096), "larger than"),
    "a compression that no limit watches": (bz2.compress(tar_of([("a.png", PNG)])), "can't be read as a tar"),
    "compressed twice": (gzip.compress(gzip.compress(tar_of([("a.png", PNG)]))), "can't be read as a tar"),
    "no tar": (b"not a tar at all" * 100, r"x\.tar can't be read as a tar"),
    # webdataset's default decoders would run the code in pickles.
    **{name: (tar_of([("a.png", b"x"), (name, b"x")]), "pickle") for name in ("a.pkl", "a.pickle", "a.pth", "a.pyd")},
    "a.extra.PKL": (tar_of([("a.png", b"x"), ("a.extra.PKL", b"x")]), "pickle"),
    **{name: (tar_of([(name, b"x")]), "climbs out") for name in ("../a.png", "/etc/a.png", "b/../../a.png")},
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_no_tar_of_samples_holds_is_refused(what: str) -> None:
    data, said = REFUSED[what]
    with pytest.raises(ShardError, match=said):
        list(iterate_shard(data, "x.tar"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_passed_over(kind: bytes) -> None:
    odd = header_of("a.txt", type=kind, linkname="/etc/passwd")
    (group,) = iterate_shard(tar_of([("a.png", PNG), (odd, b"")]), "x.tar")
    assert group.members == {"png": PNG}
    (group,) = iterate_shard(tar_of([("a.png", PNG), (header_of("b.png", type=kind, linkname="a.png"), b"")]), "x")
    assert group.key == "a"  # nor is a link to a member a second sample


def test_a_sparse_member_takes_no_memory() -> None:
    """A header of 512 bytes: the file it describes has a terabyte of zeros."""
    info = header_of("a.png", type=tarfile.GNUTYPE_SPARSE, size=1)
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[483:495] = tarfile.itn(2**40, 12, tarfile.GNU_FORMAT)  # the size after expansion
    block[386:398] = tarfile.itn(0, 12, tarfile.GNU_FORMAT)
    block[398:410] = tarfile.itn(1, 12, tarfile.GNU_FORMAT)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    assert peak_bytes(iterate_shard, bytes(block) + b"x" + bytes(2047), "x.tar") < 2**20


def test_a_compressed_tar_is_read_and_one_without_end_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    small, bomb = (gzip.compress(tar_of([("a.png", PNG), ("a.txt", bytes(size))])) for size in (10, 2**24))
    assert [group.key for group in iterate_shard(small, "x.tgz")] == ["a"]
    monkeypatch.setattr(tars, "MAX_UNPACKED_BYTES", 2**16)
    assert len(bomb) < 2**16
    assert peak_bytes(iterate_shard, bomb, "x.tgz") < 2**20
    with pytest.raises(ShardError, match="truncated"):
        list(iterate_shard(small[:-30], "x.tgz"))


def test_a_compressed_tar_is_unpacked_a_member_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its reader has no copy of the tar: a tar of 64 MB takes a few members, also where its end is looked for."""
    monkeypatch.setattr(tars, "MAX_UNPACKED_BYTES", 2**27)
    data = gzip.compress(tar_of((f"{number:03d}.png", bytes(2**20)) for number in range(64)))
    tracemalloc.start()
    assert sum(len(group.members["png"]) for group in iterate_shard(data, "x.tgz")) == 64 * 2**20
    assert tars.has_end(data, "x.tgz")
    assert not tars.has_end(gzip.compress(tar_of([("a.png", PNG)], end=False)), "x.tgz")
    assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    tracemalloc.stop()


def test_gzip_files_one_after_another_are_one_tar_and_are_counted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    data = tar_of([("a.png", PNG), ("b.png", PNG)])
    halves = gzip.compress(data[:1024]) + gzip.compress(data[1024:])
    assert [group.key for group in iterate_shard(halves, "x.tgz")] == ["a", "b"]
    monkeypatch.setattr(tars, "MAX_UNPACKED_BYTES", len(data) - 1)
    with pytest.raises(ShardError, match="unpacks to more"):
        list(iterate_shard(halves, "x.tgz"))


def test_a_image_that_says_it_is_endless_is_refused_before_it_is_decoded() -> None:
    assert peak_bytes(decode_image, png_of(2**16, 2**16, bytes(2**20))) < 2**22
    bomb = png_of(2**14, MAX_PIXELS // 2**14 + 1, bytes(2**20))
    assert peak_bytes(decode_image, bomb) < 2**22
    with pytest.raises(ValueError, match=f"more than {MAX_PIXELS:,}"):
        decode_image(bomb)
    with pytest.raises(ValueError, match="more than"):
        load_depth(bomb, resolution=8)
    assert decode_image(png_of(4000, 3000, bytes(3000 * 4001))).size == (4000, 3000)  # which is within the limit


def test_no_program_is_started_to_draw_a_image() -> None:
    """Pillow hands EPS to Ghostscript, whatever the file is called."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "EPS")
    with pytest.raises(OSError, match="cannot identify"):
        decode_image(buffer.getvalue())


def survey(tar: Path) -> TarFacts:
    return TarSurvey(Store(str(tar.parent / "out")), 0)({"part": f"{tar}\n1\nmark"})["part"]


def test_hostile_images_in_tars_of_the_user_are_quarantined_when_they_are_indexed(tmp_path: Path) -> None:
    bomb = {"000003.png": png_of(2**16, 2**16, b""), "000003.cls": b"red", "000003.txt": b"x"}
    spoiled = {"000001.depth.png": PNG[:40]}
    spoiled |= {"000009.png": PNG, "000009.cls": b"\xff", "000009.txt": b"\xfe"}  # words of any bytes stop nothing
    write_tar(tmp_path / "x.tar", range(3), side=8, extra=bomb | spoiled)
    facts = survey(tmp_path / "x.tar")
    found = {entry.key: entry.reason for entry in facts.entries[0].quarantined}
    assert set(found) == {"000001", "000003"}
    assert "DecompressionBomb" in found["000003"]
    assert facts.entries[0].samples == 3
    assert "\ufffd" in facts.classes
    assert all(entry.shard.endswith("x.tar") for entry in facts.entries[0].quarantined)


def test_a_tar_that_was_cut_between_two_members_is_not_indexed(tmp_path: Path) -> None:
    """Its index would bear witness to half a tar."""
    (tmp_path / "x.tar").write_bytes(tar_of([("a.png", PNG), ("a.cls", b"1")], end=False))
    with pytest.raises(ShardError, match="no end mark"):
        survey(tmp_path / "x.tar")
