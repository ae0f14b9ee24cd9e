"""A look at a user's source before any work: counts, captions, some images, and likely refusals.

Reads are bounded, so that it takes seconds: a dozen files of a folder, the first Parquet file, the first bytes of a few
tars. What only a whole reading can tell, such as a damaged image in the middle, stays for the ingest.
"""

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

from components.data.images import decode_sample, fit_square
from components.data.ingest import INSTALLED, PACKAGED, IngestConfig
from components.data.listing import FileVersion, ShardError, SourceError, reason_of
from components.data.shards import load_index, order_of
from components.data.sources.folder import list_folder
from components.data.sources.parquet import list_parquet
from components.data.sources.source import NO_CLASS, Item, Source
from components.data.sources.webdataset import NO_END, check_labels, checked_groups, judged_groups, list_tars
from components.data.tars import END, GZIP, Group, iterate_shard
from components.runtime.storage.store import absolute, in_parallel, read_range

IMAGES = 12  # that are decoded and shown
SIDE = 64  # pixels of a shown image
TARS_SEEN, TAR_BYTES, SAMPLES = 3, 8 * 2**20, 300  # tars that are read, and how far
CLASSES = 8  # that are named
CUT = "unexpected end of data"  # tarfile's words for a tar that goes on


class SourceLook(NamedTuple):
    """Lines and images for the user, from a look at a source."""

    lines: tuple[str, ...]
    images: tuple[np.ndarray, ...]  # uint8 (SIDE, SIDE, 3)
    captions: tuple[str, ...]  # of these images: captions, else classes


class SeenSample(NamedTuple):
    """A sample that was looked at."""

    key: str
    label: str | None
    caption: str
    image: np.ndarray | None  # None: it can't be used
    reason: str | None


def look_at(source: str, path: str | None, config: IngestConfig) -> SourceLook | None:
    """Looks at the source as `ingest` will read it; None for packaged images, which are known.
    Raises SourceError or ShardError for a source of which the ingest can use nothing."""
    if path is None or source in (*PACKAGED, *INSTALLED):
        return None
    path = absolute(path)
    if source == "folder":
        return _look_at_items(path, list_folder(path, columns=config.columns), "", config)
    if source == "parquet":
        return _look_at_items(path, list_parquet(path, config.columns, most_files=1), "the first file: ", config)
    if source == "webdataset":
        tars = list_tars(path)
        seen = _tar_samples(tars)
        labels = Counter(each.label for each in seen if each.label is not None)
        check_labels(labels, len(seen) - labels.total(), path)
        size = sum(tar.bytes for tar in tars)
        about = f"{path}: {len(tars):,} tars of {size / 1e6:,.0f} MB; of the first {len(seen):,} samples"
        return _described(f"{about} {_classes(labels)}", seen, config)
    index = load_index(path)
    seen = _tar_samples([FileVersion(index.url(entry.url), entry.bytes, "") for entry in islice(index.shards, 1)])
    names = dict.fromkeys(index.classes, 0)
    return _described(f"{path}: {index.samples:,} images in shards, {_classes(names)}", seen, config)


def _look_at_items(path: str, listing: Source, part: str, config: IngestConfig) -> SourceLook:
    def see(item: Item) -> SeenSample:
        named = listing.classes[item.label] if item.label >= 0 else None
        try:
            drawing = listing.reader.draw(item, listing.reader.read(item), resolution=SIDE)
        except Exception as error:  # Pillow's decoders raise a dozen kinds for a corrupt file
            return SeenSample(item.key, named, item.caption, None, reason_of(error))
        return SeenSample(item.key, named, item.caption, np.asarray(drawing.image), None)

    labels = Counter(listing.classes[item.label] for item in listing.items if item.label >= 0)
    about = f"{path}: {part}{len(listing.items):,} images, {_classes(labels)}"
    if listing.runs:  # rows of Parquet, each group of which is read in order
        return _described(about, [see(item) for item in listing.items[:IMAGES]], config)
    seen = in_parallel(see, heapq.nsmallest(IMAGES, listing.items, key=lambda item: order_of(item.key)))
    return _described(about, seen, config)


def _tar_samples(tars: Sequence[FileVersion]) -> list[SeenSample]:
    """Samples at the start of a few tars, the first IMAGES of them decoded."""
    chosen = tars[:: max(1, len(tars) // TARS_SEEN)][:TARS_SEEN]
    seen, shown = list[SeenSample](), 0
    for group, reason in (pair for pairs in in_parallel(_first_groups, chosen) for pair in pairs):
        image = None
        if reason is None and group.image is not None and shown < IMAGES:
            image, shown = np.asarray(fit_square(decode_sample(group.image), SIDE)), shown + 1
        seen.append(SeenSample(group.key, group.words.label, group.words.caption, image, reason))
    return seen


def _first_groups(tar: FileVersion) -> list[tuple[Group, str | None]]:
    """Groups in the first bytes of a tar, each with the reason why it can't be used, or None.
    Raises ShardError as `checked_groups`, as far as the beginning and the last bytes tell."""
    data = read_range(tar.path, 0, min(tar.bytes, TAR_BYTES))
    if tar.bytes <= TAR_BYTES:
        return list(checked_groups(data, tar.path))
    if not data.startswith(GZIP) and read_range(tar.path, tar.bytes - len(END), tar.bytes) != END:
        raise ShardError(NO_END.format(url=tar.path))
    found: list[tuple[Group, str | None]] = []
    try:
        for pair in islice(judged_groups(iterate_shard(data, tar.path)), SAMPLES):
            found.append(pair)
    except ShardError as error:
        if not (isinstance(error.__cause__, EOFError) or CUT in str(error.__cause__)):
            raise
    return found


def _classes(labels: Mapping[str, int]) -> str:
    """Classes with the number of their samples, the most frequent first; a number of 0 is not known."""
    if not labels or set(labels) == {NO_CLASS}:
        return "no classes"
    largest = sorted(labels.items(), key=lambda item: (-item[1], item[0]))[:CLASSES]
    named = ", ".join(f"{name} {count:,}" if count else name for name, count in largest)
    return f"{len(labels):,} classes: {named}{', …' if len(labels) > CLASSES else ''}"


def _described(about: str, seen: Sequence[SeenSample], config: IngestConfig) -> SourceLook:
    captions = list(dict.fromkeys(each.caption for each in seen if each.caption))[:2]
    told = f"captions such as {' and '.join(map(repr, captions))}" if captions else "no captions"
    lines, bad = [f"{about}; {told}"], [each for each in seen if each.reason is not None]
    if bad:
        fault = f"{len(bad)} of {len(seen)} samples that were looked at can't be used: {bad[0].key} ({bad[0].reason})"
        if len(bad) == len(seen):
            raise SourceError(f"{fault}; mend the source")
        lines.append(f"{fault}; the ingest stops where they are more than {config.max_corrupt_fraction:.1%}")
    shown = [(each.image, each.caption or each.label or "") for each in seen if each.image is not None]
    return SourceLook(tuple(lines), tuple(image for image, _ in shown), tuple(caption for _, caption in shown))
