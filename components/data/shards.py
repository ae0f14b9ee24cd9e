"""Shards: WebDataset tars, and the index with size, sha256 and counts of each.

A sample is a group of members with one key: an image (`png`, `jpg`, ...), `cls` (label), `txt` (caption), `json`
(its origin), and whatever else a source adds (`depth.png`, `mask.png`). A truncated tar reads without any error in
every tar library, so a reader here fetches the whole shard and checks size, sha256 and count.

Batch keys: `image` uint8 (B, H, W, 3); `label` int64 (B,); `text` int64 (B, L); `position` int64 (B,); with a second
image of each sample, `condition_image` uint8 (B, H, W, 3). An encoded set has arrays too (`latents.npy`, ...), float16
(B, ...) under their own names, in numpy's format; shape and type come from the index: no header is believed, and
nothing can be unpickled.
"""

import hashlib
import io
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Annotated, Literal, NamedTuple, Self

import numpy as np
from pydantic import AfterValidator, Field, ValidationError

from components.configuration.config import Config, first_fault
from components.configuration.file_names import FileName, file_name
from components.data.listing import ShardError, SourceError
from components.data.sources.source import ONE_CLASS
from components.data.tars import Group, Member, iterate_shard
from components.runtime.storage.model_table import AsTable
from components.runtime.storage.store import DamagedFileError, Digest, Store, read_url

INDEX = "index.json"
BPE = "bpe.json"
DTYPE = np.dtype("<f2")
Split = Literal["train", "holdout"]


class ArrayInfo(Config):
    """An array of every sample of a set, the member `{name}.npy`."""

    name: str
    shape: tuple[int, ...] = Field(min_length=1)
    made_by: str  # stage and key of the model that made the array


def write_array(array: np.ndarray) -> bytes:
    """Encodes an array as a `.npy` file, rounded to float16."""
    np.save(buffer := io.BytesIO(), np.ascontiguousarray(array, DTYPE), allow_pickle=False)
    return buffer.getvalue()


def parse_arrays(files: Sequence[tuple[str, bytes]], info: ArrayInfo, where: str) -> np.ndarray:
    """Parses the `.npy` files of N samples, each with its key -> float16 (N, ...).
    Raises ShardError naming `where` (shard and member) and the sample for an array of another shape or type."""
    out = np.empty((len(files), *info.shape), DTYPE)
    start = write_array(zeros := np.zeros(info.shape, DTYPE)).removesuffix(zeros.tobytes())
    for row, (key, file) in zip(out, files, strict=True):
        if len(file) != len(start) + row.nbytes or not file.startswith(start):
            raise ShardError(f"{where}: that of sample {key} is not float16 of shape {info.shape}; make the set again")
        row[...] = np.frombuffer(file, DTYPE, offset=len(start)).reshape(info.shape)
    return out


class Quarantined(Config):
    """A sample in no split, because its image can't be read."""

    key: str
    shard: str
    reason: str


def shard_url(url: str) -> str:
    """Checks a URL of a shard. Raises ValueError if a relative one leads out of the index's folder."""
    return url if "://" in url or url.startswith("/") else file_name(url)


class ShardEntry(Config):
    """A tar in the index. `samples` counts usable samples: quarantined samples are in no split."""

    url: Annotated[str, AfterValidator(shard_url)]  # relative to the index, or of the user's own tars
    bytes: int
    sha256: str
    samples: int
    train_samples: int
    quarantined: tuple[Quarantined, ...] = ()


class TextInfo(Config):
    """The caption tokenizer of the set."""

    bpe: FileName = BPE  # relative to the index
    sha256: str
    vocab_size: int
    text_length: int
    examples: tuple[str, ...] = ()  # captions, offered as prompts


class ShardIndex(Config):
    """A data set: shards in canonical order, and the meaning of the samples."""

    version: Literal[1] = 1
    source: str
    license: str
    resolution: int | None  # side of the stored images; None: any, resized when read
    classes: tuple[str, ...]
    labels: Literal["index", "name"] = "index"  # content of `cls`: the label, or a name in `classes`
    holdout_fraction: float = Field(ge=0, lt=1)
    samples: int
    train_samples: int
    quarantined: int
    held_out_pairs: tuple[str, ...] = ()  # of scenes: colors with shapes that no training image shows
    mask_values: int = Field(default=3, ge=2, le=65536)  # `mask.png` holds 0 to mask_values - 1
    text: TextInfo
    arrays: tuple[ArrayInfo, ...] = ()  # of each sample, next to its image
    shards: Annotated[Sequence[ShardEntry], AsTable(ShardEntry)]
    root: str = Field(default="", exclude=True)  # URL of the index's folder, no part of the identity

    @property
    def header(self) -> Self:
        """The index without its shards: small, for other processes."""
        return self.model_copy(update={"shards": ()})

    @property
    def array_names(self) -> list[str]:
        """Names of the set's arrays."""
        return [info.name for info in self.arrays]

    def array(self, name: str) -> ArrayInfo:
        """The set's array of a name. Raises KeyError if the set has no such array."""
        return {info.name: info for info in self.arrays}[name]

    def url(self, path: str) -> str:
        """Absolute URL of a shard or another file of the set."""
        return path if "://" in path or path.startswith("/") else f"{self.root}/{path}"


class View(NamedTuple):
    """The part of each sample to read; order and split of the samples do not depend on it."""

    resolution: int  # side of the images in pixels; others are resized when read
    member: Member = "image"  # the member read as image
    condition_member: Member | None = None  # the member read as condition image, if any
    arrays: tuple[str, ...] = ()  # names of arrays of the set


STORED = View(resolution=0)  # labels, captions and undecoded images


class ShardSample(NamedTuple):
    """A sample in stored form, undecoded."""

    key: str
    image: bytes  # of the requested member
    label: int
    caption: str
    condition: bytes | None = None  # of the requested condition member
    arrays: tuple[bytes, ...] = ()  # of the requested names


def split_of(key: str, holdout_fraction: float) -> Split:
    """The split of a sample: a function of the key alone, so that no sample moves when the set grows."""
    draw = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    return "holdout" if draw < holdout_fraction else "train"


def order_of(key: str) -> bytes:
    """Sort key of a sample in a shuffled order: another hash than that of its split."""
    return hashlib.sha256(f"order {key}".encode()).digest()


def save_index(store: Store, index: ShardIndex) -> None:
    """Write `index.json` into the folder of the set."""
    store.write(INDEX, index.model_dump_json(indent=1).encode())


def load_index(url: str) -> ShardIndex:
    """The index at the URL of the file, or of its folder. Raises SourceError if there is no such index."""
    url = url if url.endswith(".json") else f"{url.rstrip('/')}/{INDEX}"
    try:
        index = ShardIndex.model_validate_json(read_url(url))
    except FileNotFoundError as error:
        raise SourceError(f"no {INDEX} at {url}; make one with `cascade data SOURCE PATH --out FOLDER`") from error
    except ValidationError as error:
        raise SourceError(f"{url} is not an index of shards ({first_fault(error)}); write it again") from error
    return index.model_copy(update={"root": url.rpartition("/")[0]})


def read_bpe(index: ShardIndex) -> str:
    """The text of the set's `bpe.json`. Raises ShardError if its sha256 differs from the index."""
    url = index.url(index.text.bpe)
    if hashlib.sha256(data := _fetch(url)).hexdigest() != index.text.sha256:
        raise ShardError(f"{url} is not the tokenizer that the index names (sha256 differs); ingest the set again")
    return data.decode()


def fetch_shard(index: ShardIndex, entry: ShardEntry) -> bytes:
    """Fetch a whole tar, verified by size and sha256. Raises ShardError, naming the shard, if it differs."""
    try:
        return _fetch(index.url(entry.url), Digest(entry.bytes, entry.sha256))
    except DamagedFileError as error:
        raise ShardError(f"shard {error} as in its index: truncated or changed; restore or ingest it") from error


def read_shard(
    index: ShardIndex, entry: ShardEntry, view: View = STORED, *, data: bytes | None = None
) -> list[ShardSample]:
    """The usable samples of a shard in canonical (tar) order, verified. Raises ShardError.
    `data` is the tar, if `fetch_shard` was called already."""
    url, train = index.url(entry.url), 0
    samples: list[ShardSample] = []
    for group in usable_groups(index, entry, data):
        image = _image(group, view.member, url)
        condition = None if view.condition_member is None else _image(group, view.condition_member, url)
        where, count, (raw, caption) = f"shard {url}, sample {group.key}", len(index.classes), group.words
        try:
            if raw is None or (index.classes == ONE_CLASS and "cls" not in group.members):
                label = 0
            else:
                label = index.classes.index(raw) if index.labels == "name" else int(raw)
        except ValueError as error:
            raise ShardError(f"{where}: class {raw!r} is not in the index") from error
        if not 0 <= label < count:
            raise ShardError(f"{where}: label {label} of {count} classes")
        if missing := [name for name in view.arrays if f"{name}.npy" not in group.members]:
            raise ShardError(f"{where}: no {missing[0]}.npy, which the index lists; make it again")
        files = tuple(group.members[f"{name}.npy"] for name in view.arrays)
        samples.append(ShardSample(group.key, image, label, caption, condition, files))
        train += split_of(group.key, index.holdout_fraction) == "train"
    if (len(samples), train) != (entry.samples, entry.train_samples):
        raise ShardError(
            f"shard {url} holds {len(samples)} samples ({train} to train on), its index says {entry.samples} "
            f"({entry.train_samples}): the index does not match; ingest the set again"
        )
    return samples


def usable_groups(index: ShardIndex, entry: ShardEntry, data: bytes | None = None) -> Iterator[Group]:
    """The groups of a shard with an image, except quarantined samples. Raises ShardError."""
    refused = {quarantined.key for quarantined in entry.quarantined}
    for group in iterate_shard(data or fetch_shard(index, entry), index.url(entry.url)):
        if group.image is not None and group.key not in refused:
            yield group


def check_member(index: ShardIndex, member: Member) -> None:
    """Raise ShardError if the first sample of a set lacks `member`, before any work on the set."""
    if member != "image":  # every sample has an image
        for group in islice(usable_groups(index, index.shards[0]), 1):
            _image(group, member, index.url(index.shards[0].url))


def _image(group: Group, member: Member, url: str) -> bytes:
    if (image := group.member(member)) is None:
        where, remedy = f"shard {url}, sample {group.key}", "ingest a source whose samples have one, such as scenes"
        raise ShardError(f"{where}: no {member}.png next to the image; {remedy}, or set member to image")
    return image


def _fetch(url: str, expected: Digest | None = None) -> bytes:
    try:
        return read_url(url, expected=expected)
    except FileNotFoundError as error:
        raise ShardError(f"{url} is missing, but the index lists it; restore it or ingest the set again") from error
