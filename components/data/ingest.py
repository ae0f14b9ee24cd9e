"""Ingest: writes shards and an index from any source of images, a Ray Data task for each shard.
Shards have fixed names and a record each in `parts/`: a run that was killed redoes no finished shard that is whole.
`bpe.json` and `index.json` are written last: without an index there is no set."""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from heapq import nsmallest
from typing import Annotated, Any, TypeVar

from pydantic import Field
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from components.configuration.config import Config, Since
from components.data.listing import DataError, SourceError
from components.data.parts import WARN, Part, PartWriter, Task, Warn, cut_tasks, run_pieces, whole_parts
from components.data.shards import BPE, ShardEntry, ShardIndex, TextInfo, load_index, order_of, read_bpe, save_index
from components.data.sources import packaged, photographs
from components.data.sources.folder import list_folder
from components.data.sources.packaged import OPENMOJI_VERSION, list_fashion_mnist, list_openmoji, package_versions
from components.data.sources.parquet import list_parquet
from components.data.sources.scenes import GENERATOR_VERSION, list_scenes
from components.data.sources.source import COMMON, ONE_CLASS, Columns, Source, ordered_classes
from components.data.sources.webdataset import LICENSE, TarFacts, TarResharder, TarSurvey, check_labels, list_tars
from components.runtime.storage.store import Store, absolute
from components.sampling.image_files import LOWERED, SPECIAL_TOKENS

logger = logging.getLogger(__name__)

SOURCES = ("openmoji", "scenes", "folder", "parquet", "fashion_mnist", "photographs", "webdataset", "shards")
PACKAGED: dict[str, Callable[[], object]] = {  # sources without a path -> versions of all that draws their images
    "openmoji": lambda: [OPENMOJI_VERSION, package_versions()],
    "scenes": lambda: GENERATOR_VERSION,
}
# Sources in Debian's packages -> finds their folder, or raises SourceError.
INSTALLED = {"fashion_mnist": packaged.installed_folder, "photographs": photographs.installed_folder}
BPE_CAPTIONS = 1_000_000  # that the BPE is trained on, evenly from all shards
EXAMPLES = 12  # captions that the index names, first by hash: in any order the same
Facts = TypeVar("Facts", Part, TarFacts)
Progress = Callable[[int, int], None]  # done, in all: images, or tars of a webdataset
ClassCounts = Callable[[dict[str, int]], None]  # usable images by class


class IngestConfig(Config):
    """All numbers that decide the set."""

    resolution: int = Field(ge=1)  # side of the stored images, pixels
    samples_per_shard: int = Field(ge=1)  # a reading task holds three shards at a time
    holdout_fraction: float = Field(ge=0, lt=1)  # share of the images, by hash of the key, that training never sees
    vocab_size: int = Field(ge=260)  # ids of the caption tokenizer: the bytes and the special tokens at least
    text_length: int = Field(ge=3)  # ids of one caption, with its begin and end
    limit: int | None = Field(None, ge=1)  # at most so many images, by hash of the key; for scenes their number
    max_corrupt_fraction: float = Field(0.01, ge=0, le=1)  # of the images: quarantined and counted
    columns: Annotated[Columns, Since(COMMON)] = COMMON  # of Parquet or a captions file
    held_out_pairs: Annotated[int, Since(0)] = Field(0, ge=0, le=8)  # of scenes: never trained on


def ingest(
    source: str,
    path: str | None = None,
    *,
    out: Store,
    config: IngestConfig,
    num_cpus: float = 1.0,
    reshard: bool = False,
    progress: Progress = lambda done, total: None,
    class_counts: ClassCounts | None = None,
    warn: Warn = WARN,
) -> ShardIndex:
    """Write shards and index of a source to `out`; of `webdataset` and `shards` the index alone.

    Args:
        source: one of SOURCES; "shards" is a set that has an index already.
        path: URL of the source's files; None for packaged, procedural and installed sources.
        num_cpus: logical CPUs of a task.
        reshard: write the samples of a `webdataset` too, unchanged, into shards of `config.samples_per_shard`.
        class_counts: called once with the set's classes, but not for "shards", whose images are not read.
        warn: receives a line for each damaged shard of an earlier try, before the shard is made again.
    Raises SourceError (nothing has been written), ShardError for a tar that can't be read, DataError for too many
    corrupt images (no index has been written)."""
    path = None if path is None else absolute(path)
    make = partial(make_parts, out=out, num_cpus=num_cpus, warn=warn)
    if source == "shards":
        index = load_index(needed_path(source, path))  # adopted in place
        check_adopted(index, config, str(path), warn)
        out.write(BPE, read_bpe(index).encode())
        shards = tuple(entry.model_copy(update={"url": index.url(entry.url)}) for entry in index.shards)
        save_index(out, index.model_copy(update={"shards": shards}))
        return load_index(out.uri)
    if source == "webdataset":
        share = config.holdout_fraction
        work = TarResharder(out, share, config.samples_per_shard) if reshard else TarSurvey(out, share)
        index, counts = _index_tars(needed_path(source, path), work, out, config, make, progress)
    else:
        unseen = {"held_out_pairs": config.held_out_pairs, "holdout_fraction": config.holdout_fraction}
        listing = open_source(source, path, limit=config.limit, columns=config.columns, **unseen)
        index, counts = _write_shards(listing, out, config, make, progress)
    if class_counts is not None:
        class_counts(counts)
    return index


def open_source(
    source: str,
    path: str | None,
    *,
    limit: int | None = None,
    columns: Columns = COMMON,
    held_out_pairs: int = 0,
    holdout_fraction: float = 0.0,
) -> Source:
    """The listing of a source in canonical order. Raises SourceError for a source that can't be used.
    `held_out_pairs` is of `list_scenes`; `holdout_fraction` of those and of `list_photographs`.
    The order is by hash of the key: each shard is a fair sample of the set, and a limit keeps the same images."""
    match source:
        case "openmoji":
            listing = list_openmoji()
        case "scenes":
            if limit is None:
                raise SourceError("scenes are endless: say how many with limit")
            return list_scenes(limit, held_out_pairs=held_out_pairs, holdout_fraction=holdout_fraction)
        case "folder":
            listing = list_folder(needed_path(source, path), columns=columns)
        case "parquet":
            listing = list_parquet(needed_path(source, path), columns)  # in the order of its row groups
            return replace(listing, items=listing.items[:limit])
        case "fashion_mnist":
            listing = list_fashion_mnist(path)
        case "photographs":
            listing = photographs.list_photographs(path, holdout_fraction=holdout_fraction)
        case _:
            raise SourceError(f"no source {source!r}; there are {', '.join(SOURCES)}")
    items = sorted(listing.items, key=lambda item: order_of(item.key))
    return replace(listing, items=tuple(items[:limit]))


def train_bpe(captions: Iterable[str], *, vocab_size: int) -> str:
    """Train a byte-level BPE (Sennrich et al., 2016) on captions, and return it as the text of `bpe.json`.
    The same set of captions gives the same bytes, in whatever order they come. `vocab_size`: ids with the four special
    tokens and the 256 bytes, so at least 260; few captions may give fewer."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = LOWERED
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    return tokenizer.to_str()


def with_some_captions(facts: Facts, most: int) -> Facts:
    """Facts of a shard or a tar with at most `most` captions, evenly spaced: the driver holds no more."""
    captions = [caption for caption in facts.captions if caption]
    return facts.model_copy(update={"captions": tuple(captions[:: max(1, -(-len(captions) // most))])})


def make_parts(
    make: Callable[[Task], dict[str, Facts]],
    tasks: Sequence[Task],
    kind: type[Facts],
    *,
    recipes: dict[str, str],
    out: Store,
    num_cpus: float,
    warn: Warn,
    report: Callable[[int], None],
) -> list[Facts]:
    """Facts of all parts, in the order of the tasks; makes parts that `out` does not hold whole.
    `recipes`: of each part, as of `whole_parts`. `report`: called with the sum of `done` after each task."""
    most = max(1, BPE_CAPTIONS // max(1, len(recipes)))
    records = whole_parts(recipes, files=out, num_cpus=num_cpus, warn=warn)
    facts = {name: with_some_captions(kind.model_validate(each.facts), most) for name, each in records.items()}
    missing = [{name: task[name] for name in task if name not in facts} for task in tasks]
    done = sum(each.done for each in facts.values())
    report(done)
    for made in run_pieces(make, list(filter(None, missing)), num_cpus=num_cpus):
        facts |= {name: with_some_captions(each, most) for name, each in made.items()}
        report(done := done + sum(each.done for each in made.values()))
    return [facts[name] for name in recipes]


def _write_shards(
    listing: Source, out: Store, config: IngestConfig, make: Callable[..., list[Any]], report: Progress
) -> tuple[ShardIndex, dict[str, int]]:
    tasks, total = cut_tasks(listing, config.samples_per_shard), len(listing.items)
    write = PartWriter(listing.reader, out, config.resolution, config.holdout_fraction)
    recipes = {name: write.recipe(content) for task in tasks for name, content in task.items()}
    parts: list[Part] = make(write, tasks, Part, recipes=recipes, report=lambda done: report(done, total))
    captions = [caption for part in parts for caption in part.captions]
    own = {"license": listing.license, "resolution": config.resolution, "classes": listing.classes}
    own |= {"held_out_pairs": listing.held_out_pairs}
    index = _commit(listing.name, [part.entry for part in parts], captions, out, config, **own)
    corrupt = {entry.key for part in parts for entry in part.entry.quarantined}
    counts = Counter(item.label for item in listing.items if item.key not in corrupt)
    return index, {name: counts[label] for label, name in enumerate(listing.classes)}


def _index_tars(
    path: str, work: TarSurvey, out: Store, config: IngestConfig, make: Callable[..., list[Any]], report: Progress
) -> tuple[ShardIndex, dict[str, int]]:
    if config.limit is not None:
        raise SourceError("limit can't cut tars that exist already; name fewer of them with a glob")
    pieces = {work.part_name(piece): piece for piece in ("\n".join(map(str, tar)) for tar in list_tars(path))}
    recipes, tasks = dict.fromkeys(pieces, ""), [{name: piece} for name, piece in pieces.items()]
    facts: list[TarFacts] = make(work, tasks, TarFacts, recipes=recipes, report=lambda done: report(done, len(pieces)))
    entries = [entry for fact in facts for entry in fact.entries]
    captions = [caption for fact in facts for caption in fact.captions]
    classes = {name for fact in facts for name in fact.classes}
    check_labels(classes, sum(fact.unlabeled for fact in facts), path)
    own = {"license": LICENSE, "resolution": None, "classes": ordered_classes(classes) or ONE_CLASS, "labels": "name"}
    index = _commit("webdataset", entries, captions, out, config, **own)
    return index, dict(sum((Counter(fact.counts) for fact in facts), Counter()))


def _commit(
    source: str, entries: Sequence[ShardEntry], captions: Sequence[str], out: Store, config: IngestConfig, **own: Any
) -> ShardIndex:
    """Writes tokenizer and index. Raises DataError for too many corrupt images, or none to train on."""
    samples, train_samples = sum(entry.samples for entry in entries), sum(entry.train_samples for entry in entries)
    quarantined = [entry for shard in entries for entry in shard.quarantined]
    if quarantined:
        total, first = samples + len(quarantined), quarantined[0]
        corrupt = (
            f"{len(quarantined)} of {total} images ({len(quarantined) / total:.1%}) are corrupt, "
            f"such as {first.key} in {first.shard} ({first.reason})"
        )
        if len(quarantined) > config.max_corrupt_fraction * total:
            most = f"more than {config.max_corrupt_fraction:.1%}; repair them or raise max_corrupt_fraction"
            raise DataError(f"{corrupt}: {most}")
        logger.warning("%s; they are quarantined and listed in the index", corrupt)
    if not train_samples:
        share = config.holdout_fraction
        raise DataError(f"{samples} images leave none to train on with holdout_fraction {share}; lower it")
    bpe = train_bpe(captions, vocab_size=config.vocab_size)
    out.write(BPE, bpe.encode())
    text = TextInfo(
        sha256=hashlib.sha256(bpe.encode()).hexdigest(),
        vocab_size=Tokenizer.from_str(bpe).get_vocab_size(),
        text_length=config.text_length,
        examples=tuple(nsmallest(EXAMPLES, {caption for caption in captions if caption}, key=order_of)),
    )
    index = ShardIndex(
        source=source,
        holdout_fraction=config.holdout_fraction,
        samples=samples,
        train_samples=train_samples,
        quarantined=len(quarantined),
        text=text,
        shards=tuple(entries),
        **own,
    )
    save_index(out, index)
    return load_index(out.uri)


def check_adopted(index: ShardIndex, config: IngestConfig, path: str, warn: Warn) -> None:
    """Warn of settings in which an indexed set differs. Raises SourceError for more pixels."""
    if index.resolution is not None and index.resolution < config.resolution:
        side = f"{path} holds images of {index.resolution}², fewer pixels than resolution {config.resolution}"
        raise SourceError(f"{side}: lower it, or write the set again")
    own: dict[str, Any] = {"holdout_fraction": index.holdout_fraction, "text_length": index.text.text_length}
    own |= {"limit": index.samples} if config.limit is not None and config.limit < index.samples else {}
    given = {name: getattr(config, name) for name in own}
    if kept := [f"{name} {own[name]} in place of {given[name]}" for name in own if own[name] != given[name]]:
        warn(f"{path} keeps what it was written with: {', '.join(kept)}")


def needed_path(source: str, path: str | None) -> str:
    """The path of a source that has one. Raises SourceError if it is left out."""
    if path is None:
        raise SourceError(f"source {source} needs a path: cascade data {source} PATH --out URI")
    return path
