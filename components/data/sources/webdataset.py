"""A user's own tars: indexed in place, or written elsewhere as smaller tars; never written to.

`cls` holds a label or a class name, `txt` a caption; a sample with neither may have both in its `json`. Smaller tars
are for sets of which a few images cost a gigabyte. Samples stay byte for byte; those of a tar are shuffled (by a hash
of their keys, so that equal tars give equal bytes) before they are cut into shards. A tar's record is written after its
shards: after a kill no tar is read again whose shards are all there, and whole.
"""

import fnmatch
import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import ClassVar, NamedTuple

from pydantic import Field

from components.configuration.config import Config
from components.data.images import decode_sample
from components.data.listing import FileVersion, ShardError, SourceError, list_versions, reason_of
from components.data.parts import Task, even_parts
from components.data.shards import Quarantined, ShardEntry, order_of, split_of
from components.data.tars import (
    CONVERT,
    Group,
    Member,
    SampleWords,
    has_end,
    is_image,
    is_unread,
    iterate_shard,
    write_shard,
)
from components.runtime.storage.artifact import FileEntry, write_record
from components.runtime.storage.connection import at
from components.runtime.storage.store import Store, digest_of, read_url

LICENSE = "unspecified"
TARS = (".tar", ".tar.gz", ".tgz")
NO_END = "shard {url} has no end mark: truncated, or still being written; restore it"
MEMBERS: tuple[Member, ...] = ("image", "depth", "mask")


class TarFacts(Config):
    """Facts from one pass over a tar. Missing members are counted, not guessed."""

    entries: tuple[ShardEntry, ...]  # the tar itself, or the shards made of the tar
    classes: tuple[str, ...]  # raw classes that occur
    captions: tuple[str, ...]  # of its training samples
    unlabeled: int  # usable samples without class
    counts: dict[str, int] = Field(default_factory=dict)  # usable samples by raw class

    done: ClassVar[int] = 1  # tars that were read


class Surveyed(NamedTuple):
    """The words of a sample in a user's tar."""

    key: str
    words: SampleWords


@dataclass(frozen=True)
class TarSurvey:
    """Surveys tars, each described by URL and mark of its version. Raises as `checked_groups`.
    Images that can't be decoded are quarantined here: the order of training depends on the index alone."""

    out: Store
    holdout_fraction: float

    def part_name(self, content: str) -> str:
        """Name of the tar's part: a digest of all that decides the facts."""
        return hashlib.sha256(f"index 2, {self.holdout_fraction}\n{content}".encode()).hexdigest()[:32]

    def __call__(self, task: Task) -> dict[str, TarFacts]:
        return {name: self.make(name, content.partition("\n")[0]) for name, content in task.items()}

    def make(self, part: str, url: str) -> TarFacts:
        """Reads a tar and writes a part. Returns the contribution of the usable samples to the set."""
        data, samples, quarantined = read_url(url), [], []
        for group, reason in checked_groups(data, url):
            if reason is None:
                samples.append(Surveyed(group.key, group.words))
            else:
                quarantined.append(Quarantined(key=group.key, shard=url, reason=reason))
        return self.record(part, samples, [self.entry(url, data, samples, quarantined)], [])

    def entry(
        self, url: str, data: bytes, samples: Sequence[Surveyed], quarantined: Sequence[Quarantined]
    ) -> ShardEntry:
        """The entry, in an index, of a tar with the bytes `data` and the usable `samples`."""
        counts = {"samples": len(samples), "train_samples": len(self.training(samples))}
        return ShardEntry(url=url, **digest_of(data)._asdict(), **counts, quarantined=tuple(quarantined))

    def training(self, samples: Sequence[Surveyed]) -> list[Surveyed]:
        """The samples of the training split."""
        return [sample for sample in samples if split_of(sample.key, self.holdout_fraction) == "train"]

    def record(
        self, part: str, samples: Sequence[Surveyed], entries: Sequence[ShardEntry], files: Sequence[FileEntry]
    ) -> TarFacts:
        """Writes the record of a part, and returns its facts."""
        labels = Counter(sample.words.label for sample in samples if sample.words.label is not None)
        facts = TarFacts(
            entries=tuple(entries),
            classes=tuple(sorted(labels)),
            captions=tuple(sample.words.caption for sample in self.training(samples)),
            unlabeled=len(samples) - labels.total(),
            counts=labels,
        )
        write_record(self.out, part, *files, **facts.model_dump())
        return facts


@dataclass(frozen=True)
class TarResharder(TarSurvey):
    """Reshards tars into `out`."""

    samples_per_shard: int

    def part_name(self, content: str) -> str:
        """Name of the tar's part: a digest of all that decides the shards."""
        recipe = f"shards of {self.samples_per_shard}, {self.holdout_fraction}\n{content}"
        return hashlib.sha256(recipe.encode()).hexdigest()[:32]

    def make(self, part: str, url: str) -> TarFacts:
        checked = list(checked_groups(read_url(url), url))
        groups = sorted((group for group, reason in checked if reason is None), key=lambda group: order_of(group.key))
        refused = [Quarantined(key=group.key, shard=url, reason=said) for group, said in checked if said is not None]
        entries, usable = list[ShardEntry](), list[Surveyed]()
        for place, shard in enumerate(even_parts(groups, self.samples_per_shard)):
            name, samples = f"shard-{part[:12]}-{place:05d}.tar", [Surveyed(each.key, each.words) for each in shard]
            data = write_shard({"__key__": group.key, **group.members} for group in shard)
            if list(iterate_shard(data, name)) != shard:
                raise ShardError(f"shard {name} does not read as it was written: its members have unusual names")
            self.out.write(name, data)
            entries.append(self.entry(name, data, samples, [] if entries else refused))
            usable += samples
        files = [FileEntry(path=entry.url, bytes=entry.bytes, sha256=entry.sha256) for entry in entries]
        return self.record(part, usable, entries, files)


def list_tars(path: str) -> list[FileVersion]:
    """The tars of a folder, of a glob, or a single tar; absolute URLs, sorted. Raises SourceError if none."""
    folder, pattern = split_glob(path)
    tars = [
        version._replace(path=folder if folder.endswith(TARS) else Store(folder).url(version.path))
        for version in list_versions(folder)
        if fnmatch.fnmatchcase(version.path, pattern or "*") and version.path.endswith(TARS)
    ]
    if not tars:
        raise SourceError(f"no tars at {path}; give their folder, or a glob such as s3://bucket/set/*.tar")
    if empty := [tar.path for tar in tars if not tar.bytes]:
        raise SourceError(f"{len(empty)} of {len(tars)} tars are empty, of 0 bytes, such as {empty[0]}; restore them")
    return tars


def split_glob(path: str) -> tuple[str, str | None]:
    """Splits `a/b/*.tar` into (`a/b`, `*.tar`); a path without a glob gives (path, None).
    Brackets are no glob in a name that is there, as `photos [2024]`. Raises StoreError if storage can't tell."""
    scheme, separator, rest = path.rpartition("://")
    parts = PurePosixPath(rest).parts
    for place, part in enumerate(parts):
        here = f"{scheme}{separator}{PurePosixPath(*parts[: place + 1])}"
        if {"*", "?"} & set(part) or ("[" in part and not at(here, lambda system, name: system.exists(name))):
            return f"{scheme}{separator}{PurePosixPath(*parts[:place])}", "/".join(parts[place:])
    return path.rstrip("/"), None


def checked_groups(data: bytes, url: str) -> Iterator[tuple[Group, str | None]]:
    """Yields `judged_groups` of a tar.
    Raises ShardError if the tar can't be read, has no end, or holds no images."""
    empty = True
    if not has_end(data, url):
        raise ShardError(NO_END.format(url=url))
    for judged in judged_groups(iterate_shard(data, url)):
        empty = False
        yield judged
    if empty:
        raise ShardError(f"shard {url} holds no images (png, jpg, webp, ... members); leave it out of the source")


def judged_groups(groups: Iterable[Group]) -> Iterator[tuple[Group, str | None]]:
    """Yields the groups with an image, each with the reason why images can't be used, or None."""
    for group in groups:
        reason, others = None, [name for name in group.members if is_unread(f"x.{name}") or is_image(f"x.{name}")]
        if group.image is None and not others:
            continue
        try:
            if group.image is None:
                dotted = f"names are cut at their first dot, which leaves .{others[0]}: write them without other dots"
                raise ValueError(dotted if "." in others[0] else f".{others[0]} is not read: {CONVERT}")
            for member in MEMBERS:
                if (image := group.member(member)) is not None:
                    decode_sample(image)
        except Exception as error:  # Pillow's decoders raise a dozen kinds for a corrupt file
            reason = reason_of(error)
        yield group, reason


def check_labels(classes: Collection[str], unlabeled: int, path: str) -> None:
    """Raise SourceError if samples have one of the classes and `unlabeled` others have none."""
    if classes and unlabeled:
        raise SourceError(f"{unlabeled} samples in {path} have no class and others do; give it to all or to none")
