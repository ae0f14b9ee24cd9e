"""Tars from untrusted writers: groups of members; members that no image set needs are refused.

Nothing is ever written to a disk and nothing unpickled. Sizes are checked before a byte is read: a sparse member may
claim any size, and a compressed tar may hold a thousand times its size. webdataset is imported where it is called: it
imports torch, seconds in each process that plans reading and does none.
"""

import gzip
import io
import json
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import PurePosixPath
from typing import Any, Literal, NamedTuple

from components.data.listing import ShardError
from components.data.sources.source import NAMES, first_caption

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff", "gif", "ppm", "pgm")
OTHER_IMAGES = ("avif", "heic", "heif", "jxl", "jp2")  # of formats that no decoder here reads
CONVERT = "convert them to PNG or JPEG, as with `magick mogrify -format jpg`"
PICKLE_SUFFIXES = frozenset({"pkl", "pickle", "pyd", "pth", "pt", "joblib", "dill"})
MAX_MEMBER_BYTES = 256 * 2**20
MAX_UNPACKED_BYTES = 2**30  # of a compressed tar, or twice its size
MAX_WORDS_BYTES = 2**20  # of a `json` member that is read
CHUNK = 2**20
GZIP = b"\x1f\x8b"
END = bytes(1024)  # last bytes of every complete tar
OWN_NOTES = re.compile(r"__[^/]*__($|/)")  # webdataset's notes about a tar: no samples
Member = Literal["image", "depth", "mask"]  # the member of a sample that is read as image


def is_image(name: str, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> bool:
    """True for the name of an image file."""
    return PurePosixPath(name).suffix.lower().lstrip(".") in suffixes


is_unread = partial(is_image, suffixes=OTHER_IMAGES)  # of a format that no decoder here reads


class Group(NamedTuple):
    """The members of a tar with a common key, undecoded."""

    key: str
    members: dict[str, bytes]  # by suffix

    @property
    def image(self) -> bytes | None:
        """The image; None in a group that is no sample."""
        return next((self.members[suffix] for suffix in IMAGE_SUFFIXES if suffix in self.members), None)

    def member(self, member: Member) -> bytes | None:
        """The file of a member: the image, `depth.png` or `mask.png`; None if the group lacks it."""
        return self.image if member == "image" else self.members.get(f"{member}.png")

    @property
    def words(self) -> "SampleWords":
        """Class and caption: of the members `cls` and `txt`, or of `json` where there is neither."""
        if {"cls", "txt"} & self.members.keys():
            texts = {name: self.members.get(name, b"").decode(errors="replace").strip() for name in ("cls", "txt")}
            return SampleWords(texts["cls"] if "cls" in self.members else None, texts["txt"])
        fields = _fields(self.members.get("json", b""))
        caption = next((fields[name] for name in NAMES["caption"] if fields.get(name)), None)
        labels = (fields[name] for name in NAMES["label"] if isinstance(fields.get(name), int | str))
        return SampleWords(next((str(label) for label in labels if label != ""), None), first_caption(caption).strip())


class SampleWords(NamedTuple):
    """Class and caption of a sample."""

    label: str | None  # a number or a name; None: the sample has no class
    caption: str  # empty: none


def _fields(data: bytes) -> dict[str, Any]:
    """The fields of a `json` member by lower-case name; none for other content."""
    try:
        fields = json.loads(data) if len(data) <= MAX_WORDS_BYTES else None
    except (ValueError, RecursionError):
        return {}
    return {name.lower(): value for name, value in fields.items()} if isinstance(fields, dict) else {}


def write_shard(samples: Iterable[dict[str, bytes | str]]) -> bytes:
    """Packs samples (`__key__` and members as bytes) as a tar; equal samples give equal bytes."""
    from webdataset import TarWriter

    with TarWriter(buffer := io.BytesIO(), mtime=0, encoder=False) as writer:
        for sample in samples:
            writer.write(sample)
    return buffer.getvalue()


class Unpacked(io.RawIOBase):
    """The bytes of a gzipped tar in order, unpacked a piece at a time.
    `read` raises ShardError for a damaged gzip file, or one that unpacks to far more than its own size."""

    def __init__(self, data: bytes, url: str) -> None:
        self.url, self.left = url, max(MAX_UNPACKED_BYTES, 2 * len(data))
        self.file = gzip.GzipFile(fileobj=io.BytesIO(data))

    def read(self, size: int = CHUNK, /) -> bytes:
        try:
            data = self.file.read(size)
        except EOFError as error:
            raise ShardError(f"shard {self.url} ends within its compressed data: truncated; restore it") from error
        except (zlib.error, gzip.BadGzipFile) as error:
            raise ShardError(f"shard {self.url} can't be decompressed ({error}); restore it") from error
        self.left -= len(data)
        if self.left < 0:
            most = f"{MAX_UNPACKED_BYTES:,} bytes and than twice its size"
            raise ShardError(f"shard {self.url} unpacks to more than {most}; unpack it, or cut it into smaller tars")
        return data


def has_end(data: bytes, url: str) -> bool:
    """True for a tar with an end mark: without it a tar cut between two members reads without any error.
    Raises ShardError as `Unpacked.read`."""
    if not data.startswith(GZIP):
        return data.endswith(END)
    tail, unpacked = b"", Unpacked(data, url)
    while chunk := unpacked.read():
        tail = (tail + chunk)[-len(END) :]
    return tail == END


def iterate_shard(data: bytes, url: str) -> Iterator[Group]:
    """Yields the samples of a tar as groups of undecoded members, grouped by webdataset's own function.
    Raises ShardError for a tar that can't be read, repeated names or keys, pickles, names that lead out of the folder,
    and members that are, or claim to be, larger than MAX_MEMBER_BYTES."""
    from webdataset.tariterators import group_by_keys

    keys: set[str] = set()
    try:
        for group in group_by_keys(_members(data, url)):
            key = group["__key__"]
            if key in keys:
                raise ShardError(f"shard {url}: members of {key} do not stand together; write it with tar --sort=name")
            keys.add(key)
            yield Group(key, {name: member for name, member in group.items() if not name.startswith("__")})
    except (tarfile.TarError, ValueError, EOFError, OSError, OverflowError) as error:
        raise ShardError(f"shard {url} can't be read as a tar: {error.args[0] if error.args else error}") from error


def _members(data: bytes, url: str) -> Iterator[dict[str, Any]]:
    """Yields regular files alone: links and devices are passed over, so that none is ever followed."""
    names: set[str] = set()
    packed = data.startswith(GZIP)
    with tarfile.open(
        fileobj=Unpacked(data, url) if packed else io.BytesIO(data), mode="r|" if packed else "r:"
    ) as tar:
        for info in tar:
            tar.members = []  # pyrefly: ignore[missing-attribute]  (or all stay in memory)
            if not info.isfile() or OWN_NOTES.match(info.name):
                continue
            _refuse_unsafe(info, names, url)
            names.add(info.name)
            file = tar.extractfile(info)
            assert file is not None  # a regular file
            yield {"fname": info.name, "data": file.read(), "__url__": url}


def _refuse_unsafe(info: tarfile.TarInfo, names: set[str], url: str) -> None:
    name = info.name  # a string, not a path: there are four members a sample
    if name.rpartition(".")[2].lower() in PICKLE_SUFFIXES:
        raise ShardError(f"shard {url} holds a pickle ({name}): unpickling runs code; remove it from the tar")
    if name.startswith("/") or ".." in name.split("/"):
        raise ShardError(f"shard {url} holds a name that climbs out of its folder ({name}); write the tar again")
    if not name.isascii() and name != name.encode(errors="replace").decode():
        raise ShardError(f"shard {url} holds a name that is not UTF-8 ({name!a}); write the tar again")
    if name in names:
        raise ShardError(f"shard {url} holds {name} twice (duplicate); write the tar again")
    if info.size > MAX_MEMBER_BYTES:  # of a sparse member: with all its gaps
        raise ShardError(f"shard {url}: {name} is larger than {MAX_MEMBER_BYTES:,} bytes; leave it out")
