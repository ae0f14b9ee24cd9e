"""Shards: WebDataset tars, and the index that says what each of them must be.

A sample is a group of members with one key: an image (`png`, `jpg`, ...), `cls` (label), `txt` (caption), `json`
(where it comes from), and whatever else a source adds (`depth.png`, `mask.png`). A truncated tar reads without any
error in every tar library, so a reader here fetches the whole shard and checks size, sha256 and count.

Batch keys, written once: `image` uint8 (B, H, W, 3); `label` int64 (B,); `text` int64 (B, L); `position` int64 (B,);
where a second image of each sample is asked for, `condition_image` uint8 (B, H, W, 3). A set that was encoded
beforehand has arrays too (`latents.npy`, ...), float16 (B, ...) under their own names.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator, Field, ValidationError

from components.configuration.config import Config, first_fault
from components.configuration.file_names import FileName, file_name
from components.data.arrays import ArrayInfo
from components.data.errors import ShardError, SourceError
from components.data.tars import Group, Member, iterate_shard
from components.runtime.storage.store import DamagedFileError, Digest, Store, read_url

INDEX = "index.json"
BPE = "bpe.json"
Split = Literal["train", "holdout"]


class Quarantined(Config):
    """A sample that is left out of every split because its image can't be read."""

    key: str
    shard: str
    reason: str


def shard_url(url: str) -> str:
    """`url`, relative to the index or absolute. Raises ValueError for a relative one that leads out of its folder."""
    return url if "://" in url or url.startswith("/") else file_name(url)


class ShardEntry(Config):
    """What one tar must be. `samples` counts the usable ones: quarantined samples are in no split."""

    url: Annotated[str, AfterValidator(shard_url)]  # relative to the index; absolute when the tars are the user's own
    bytes: int
    sha256: str
    samples: int
    train_samples: int
    quarantined: tuple[Quarantined, ...] = ()


class TextInfo(Config):
    """The caption tokenizer that belongs to the set."""

    bpe: FileName = BPE  # relative to the index
    sha256: str
    vocab_size: int
    text_length: int


class ShardIndex(Config):
    """A data set: its shards in canonical order, and what its samples mean."""

    version: Literal[1] = 1
    source: str
    license: str
    resolution: int | None  # side of the stored images; None: of any size, resized when they are read
    classes: tuple[str, ...]
    labels: Literal["index", "name"] = "index"  # what `cls` holds: the label itself, or a name listed in `classes`
    holdout_fraction: float = Field(ge=0, lt=1)
    samples: int
    train_samples: int
    quarantined: int
    mask_values: int = Field(default=3, ge=2, le=65536)  # a `mask.png` of the set holds 0 to mask_values - 1
    text: TextInfo
    arrays: tuple[ArrayInfo, ...] = ()  # that each sample has next to its image
    shards: tuple[ShardEntry, ...]
    root: str = Field(default="", exclude=True)  # URL of the folder that holds the index: where, never part of what

    @property
    def array_names(self) -> list[str]:
        return [info.name for info in self.arrays]

    def array(self, name: str) -> ArrayInfo:
        """Raises KeyError for an array that the set has not."""
        return {info.name: info for info in self.arrays}[name]

    def url(self, path: str) -> str:
        """Absolute URL of a shard or another file of the set."""
        return path if "://" in path or path.startswith("/") else f"{self.root}/{path}"


class ShardSample(NamedTuple):
    """One sample as it is stored: nothing decoded."""

    key: str
    image: bytes  # of the member that was asked for
    label: int
    caption: str
    condition: bytes | None = None  # of the condition member, where one was asked for
    arrays: tuple[bytes, ...] = ()  # those that were asked for


def split_of(key: str, holdout_fraction: float) -> Split:
    """The split of a sample: a function of its key alone, so that it never moves when the set grows."""
    draw = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    return "holdout" if draw < holdout_fraction else "train"


def order_of(key: str) -> bytes:
    """Where a sample stands in an order that is fair to all: by a hash of its key, and another than that of the split,
    or held-out samples would stand together."""
    return hashlib.sha256(f"order {key}".encode()).digest()


def save_index(store: Store, index: ShardIndex) -> None:
    """Write `index.json` into the folder of the set."""
    store.write(INDEX, index.model_dump_json(indent=1).encode())


def load_index(url: str) -> ShardIndex:
    """The index at `url` (of the file, or of its folder). Raises SourceError if it is missing or not an index."""
    url = url if url.endswith(".json") else f"{url.rstrip('/')}/{INDEX}"
    try:
        index = ShardIndex.model_validate_json(read_url(url))
    except FileNotFoundError as error:
        raise SourceError(f"no {INDEX} at {url}; make one with `cascade data SOURCE PATH --out FOLDER`") from error
    except ValidationError as error:
        raise SourceError(f"{url} is not an index of shards ({first_fault(error)}); write it again") from error
    return index.model_copy(update={"root": url.rpartition("/")[0]})


def read_bpe(index: ShardIndex) -> str:
    """The text of the set's `bpe.json`, verified. Raises ShardError if it is not the one that the index names."""
    url = index.url(index.text.bpe)
    data = _fetch(url)
    if hashlib.sha256(data).hexdigest() != index.text.sha256:
        raise ShardError(f"{url} is not the tokenizer that the index names (sha256 differs); ingest the set again")
    return data.decode()


def fetch_shard(index: ShardIndex, entry: ShardEntry) -> bytes:
    """The whole tar, size and sha256 verified; what was damaged on its way is fetched again. Raises ShardError naming
    the shard."""
    url = index.url(entry.url)
    try:
        return _fetch(url, Digest(entry.bytes, entry.sha256))
    except DamagedFileError:
        data = _fetch(url)  # to say what is wrong with it
    if len(data) != entry.bytes:
        raise ShardError(
            f"shard {url} has {len(data)} bytes, its index says {entry.bytes}: truncated or changed; restore or ingest"
        )
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise ShardError(f"shard {url} is not the file that its index describes (sha256 differs); restore or ingest it")
    return data


def read_shard(
    index: ShardIndex,
    entry: ShardEntry,
    *,
    member: Member = "image",
    condition_member: Member | None = None,
    arrays: Sequence[str] = (),
    data: bytes | None = None,
) -> list[ShardSample]:
    """The usable samples of a shard in canonical (tar) order, verified in every way. Raises ShardError.

    Args:
        member: what of each sample is its image; which samples there are does not depend on it.
        condition_member: what of each sample is its condition image; None for no such image.
        arrays: names of the arrays to read.
        data: what `fetch_shard` gave, if it was called already.
    """
    url = index.url(entry.url)
    samples = [
        _sample(group, member, condition_member, arrays, index, url) for group in usable_groups(index, entry, data)
    ]
    train = sum(split_of(sample.key, index.holdout_fraction) == "train" for sample in samples)
    if (len(samples), train) != (entry.samples, entry.train_samples):
        raise ShardError(
            f"shard {url} holds {len(samples)} samples ({train} to train on), its index says {entry.samples} "
            f"({entry.train_samples}): the index does not match; ingest the set again"
        )
    return samples


def usable_groups(index: ShardIndex, entry: ShardEntry, data: bytes | None = None) -> Iterator[Group]:
    """The groups of a shard that are samples: with an image, and not quarantined. Raises ShardError."""
    refused = {quarantined.key for quarantined in entry.quarantined}
    for group in iterate_shard(data or fetch_shard(index, entry), index.url(entry.url)):
        if group.image is not None and group.key not in refused:
            yield group


def check_member(index: ShardIndex, member: Member) -> None:
    """Look whether the first sample has `member`, before any work on the set. Raises ShardError if it lacks."""
    if member == "image":  # without one it would be no sample
        return
    for group in usable_groups(index, index.shards[0]):
        _image(group, member, index.url(index.shards[0].url))
        return


def _image(group: Group, member: Member, url: str) -> bytes:
    image = group.member(member)
    if image is None:
        raise ShardError(
            f"shard {url}, sample {group.key}: no {member}.png next to the image; ingest a source whose samples have "
            "one, such as scenes, or set member to image"
        )
    return image


def _sample(
    group: Group,
    member: Member,
    condition_member: Member | None,
    arrays: Sequence[str],
    index: ShardIndex,
    url: str,
) -> ShardSample:
    image = _image(group, member, url)
    condition = None if condition_member is None else _image(group, condition_member, url)
    raw = group.text("cls") if "cls" in group.members else "0"
    try:
        label = int(raw) if index.labels == "index" or "cls" not in group.members else index.classes.index(raw)
    except ValueError as error:
        raise ShardError(f"shard {url}, sample {group.key}: class {raw!r} is not in the index") from error
    if not 0 <= label < len(index.classes):
        raise ShardError(f"shard {url}, sample {group.key}: label {label} of {len(index.classes)} classes")
    if missing := [name for name in arrays if f"{name}.npy" not in group.members]:
        raise ShardError(f"shard {url}, sample {group.key}: no {missing[0]}.npy, which the index lists; make it again")
    files = tuple(group.members[f"{name}.npy"] for name in arrays)
    return ShardSample(group.key, image, label, group.text("txt"), condition, files)


def _fetch(url: str, expected: Digest | None = None) -> bytes:
    try:
        return read_url(url, expected=expected)
    except FileNotFoundError as error:
        raise ShardError(f"{url} is missing, but the index lists it; restore it or ingest the set again") from error
