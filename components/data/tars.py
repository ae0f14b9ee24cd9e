"""Tars as strangers write them: groups of members, with everything refused that an image set has no need of.

Nothing is ever written to a disk and nothing unpickled. Sizes are looked at before a byte is read: a sparse member says
that it is as large as it likes, and a compressed tar may hold a thousand times its size.

webdataset is imported where it is called: it imports torch, seconds in each of the many processes of a run that plan
reading and do none.
"""

import io
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

from components.data.errors import ShardError

IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff", "gif", "ppm", "pgm")
PICKLE_SUFFIXES = frozenset({"pkl", "pickle", "pyd", "pth", "pt", "joblib", "dill"})
MAX_MEMBER_BYTES = 256 * 2**20
MAX_UNPACKED_BYTES = 4 * 2**30  # of a compressed tar
GZIP = b"\x1f\x8b"
END = bytes(1024)  # of every tar that was written to its end
OWN_NOTES = re.compile(r"__[^/]*__($|/)")  # webdataset's notes about a tar: no samples
Member = Literal["image", "depth", "mask"]  # what of a sample is read as its image


class Group(NamedTuple):
    """The members of a tar that share a key, undecoded."""

    key: str
    members: dict[str, bytes]  # by suffix

    @property
    def image(self) -> bytes | None:
        """The image; a group without one is no sample."""
        return next((self.members[suffix] for suffix in IMAGE_SUFFIXES if suffix in self.members), None)

    def member(self, member: Member) -> bytes | None:
        """What is read as the image: the image itself, or `depth.png`, `mask.png` next to it; None if it lacks."""
        return self.image if member == "image" else self.members.get(f"{member}.png")

    def text(self, suffix: str) -> str:
        """A member as text, whatever its bytes; empty if it lacks."""
        return self.members.get(suffix, b"").decode(errors="replace").strip()


def write_shard(samples: Iterable[dict[str, bytes | str]]) -> bytes:
    """A tar of samples (`__key__` and members as bytes); equal samples give equal bytes."""
    from webdataset import TarWriter

    buffer = io.BytesIO()
    writer = TarWriter(buffer, mtime=0, encoder=False)
    for sample in samples:
        writer.write(sample)
    writer.close()
    return buffer.getvalue()


def unpack(data: bytes, url: str) -> bytes:
    """A tar as it is, or the one in a gzip file. Raises ShardError if that is damaged or larger than allowed."""
    unpacked = bytearray()
    while data.startswith(GZIP):  # gzip files may stand one after another
        inflate = zlib.decompressobj(wbits=31)
        try:
            unpacked += inflate.decompress(data, MAX_UNPACKED_BYTES + 1 - len(unpacked))
        except zlib.error as error:
            raise ShardError(f"shard {url} can't be decompressed ({error}); restore it") from error
        if len(unpacked) > MAX_UNPACKED_BYTES:
            raise ShardError(f"shard {url} unpacks to more than {MAX_UNPACKED_BYTES:,} bytes; cut it into smaller tars")
        if not inflate.eof:
            raise ShardError(f"shard {url} ends within its compressed data: truncated; restore it")
        data = inflate.unused_data
    return bytes(unpacked) or data


def iterate_shard(data: bytes, url: str) -> Iterator[Group]:
    """Samples of a tar as groups of undecoded members, grouped by webdataset's own function.

    Raises ShardError for a tar that can't be read, names or keys that come twice, pickles, names that climb out, and
    members that are larger than MAX_MEMBER_BYTES or say so.
    """
    from webdataset.tariterators import group_by_keys

    keys: set[str] = set()
    try:
        for group in group_by_keys(_members(unpack(data, url), url)):
            key = group["__key__"]
            if key in keys:
                raise ShardError(f"shard {url}: members of {key} do not stand together; write it with tar --sort=name")
            keys.add(key)
            yield Group(key, {name: member for name, member in group.items() if not name.startswith("__")})
    except (tarfile.TarError, ValueError, EOFError, OSError, OverflowError) as error:
        raise ShardError(f"shard {url} can't be read as a tar: {error.args[0] if error.args else error}") from error


def check_end(data: bytes, url: str) -> None:
    """Raise ShardError for a tar without its end: one that was cut between two members reads without any error."""
    if not data.endswith(END):
        raise ShardError(f"shard {url} has no end mark: truncated, or still being written; restore it")


def _members(data: bytes, url: str) -> Iterator[dict[str, Any]]:
    """Regular files alone: links and devices are passed over, so that none is ever followed."""
    names: set[str] = set()
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        for info in tar:
            tar.members = []  # pyrefly: ignore[missing-attribute]  (or it keeps them all)
            if not info.isfile() or OWN_NOTES.match(info.name):
                continue
            _refuse_unsafe(info, names, url)
            names.add(info.name)
            file = tar.extractfile(info)
            assert file is not None  # it is a regular file
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
