"""Training on 10⁹ images by simulation: memory of each process, requests to the store, and what breaks first.
`make simulate` prints the tables and writes simulate.json; it takes some minutes and gigabytes.

Indexes, manifests, the plan and the order are real, each measured in a process of its own. Time and the store are
simulated (`simulated_ranks.py`): some ranks read some steps, and what all ranks fetch in an epoch is `Order.fetched`.
"""

import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer
from ray import cloudpickle
from rich.console import Console
from rich.table import Table

from components.data.decoded import ImageSamples
from components.data.order import Order
from components.data.shards import ShardEntry, ShardIndex, TextInfo, View, load_index, save_index
from components.data.stream import Share
from components.data.tokens import TokenFile, TokenSamples
from components.runtime.storage.artifact import Artifact, FileEntry, commit_artifact, load_artifact
from components.runtime.storage.model_table import column_of
from components.runtime.storage.store import SMALL_TRANSFERS, Store
from tests.benchmarks.simulated_ranks import Place, read
from tests.evidence import REPOSITORY, Row, facts, machine

RESULT = "simulate.json"
IMAGES, IMAGE_BYTES, RESOLUTION = 10**9, 28_500, 256  # a JPEG of 256², see components/data/SCALE.md
SHARDS, RANKS, STREAMS = (10**5, 3 * 10**5, 10**6), (64, 256, 1024, 4096), 192  # STREAMS: of published recipes
OF_A_RANK = 32  # images of a step
SAMPLED, WINDOW = 4, 60_000  # ranks that are simulated, and samples that each reads
TOKEN_BYTES = 2_000  # of a sample in a token file
LISTED = 1000  # names of a page of a listing
PREFIX_GETS = 5_500  # a second, that Amazon promises for a prefix
# Amazon S3 Standard, US East (N. Virginia), aws.amazon.com/s3/pricing; to machines of the region nothing is paid.
GET, PUT_OR_LIST, GIGABYTE_MONTH = 0.0004 / 1000, 0.005 / 1000, 0.023  # dollars


def index_of(shards: int, images: int) -> ShardIndex:
    """An index of equal tars of 256² JPEGs."""
    each = images // shards
    counts = {"bytes": each * IMAGE_BYTES, "samples": each, "train_samples": each}
    entries = (ShardEntry(url=f"shard-{n:07d}.tar", sha256=f"{n:064x}", **counts) for n in range(shards))
    return ShardIndex(
        source="simulated",
        license="unspecified",
        resolution=RESOLUTION,
        classes=tuple(f"class {number}" for number in range(1000)),
        holdout_fraction=0,
        samples=each * shards,
        train_samples=each * shards,
        quarantined=0,
        text=TextInfo(sha256="0" * 64, vocab_size=8192, text_length=64),
        shards=tuple(entries),
    )


def tokens_of(shards: int) -> Artifact:
    """A set of tokens with a file for each shard."""
    each, names = IMAGES // shards, [f"{n:07d}-shard-{n:07d}.parquet" for n in range(shards)]
    files = [FileEntry(path=f"files/{name}", bytes=each * TOKEN_BYTES, sha256=f"{0:064x}") for name in names]
    told = [TokenFile(name=name, samples=each, train_samples=each, keys=f"{0:064x}").model_dump() for name in names]
    metadata = {"shards": told, "grid": [16, 16], "text": {"text_length": 64}}
    return Artifact(kind="tokens", stage="tokens", key="0" * 20, files=tuple(files), metadata=metadata)


class Meter:
    """CPU seconds, and memory that stays, of parts of this process."""

    def __init__(self) -> None:
        self.figures: Row = {}

    @contextmanager
    def of(self, name: str) -> Any:
        process, start = psutil.Process(), time.process_time()
        memory = process.memory_info().rss
        yield
        self.figures[f"{name}_s"] = time.process_time() - start
        self.figures[f"{name}_MB"] = (process.memory_info().rss - memory) / 1e6

    def peak(self) -> None:
        """The most that the process has held, its imports included."""
        lines = Path("/proc/self/status").read_text().splitlines()
        self.figures["peak_MB"] = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e3


def measure_saving(shards: int, folder: Path, meter: Meter) -> None:
    """What the head of an ingest holds at its end."""
    index = index_of(shards, IMAGES)
    with meter.of("save"):
        save_index(Store(str(folder)), index)
    meter.figures["index_MB"] = (folder / "index.json").stat().st_size / 1e6
    with (folder / index.shards[0].url).open("wb") as first:  # whose size the plan asks for
        first.truncate(index.shards[0].bytes)


def measure_index(shards: int, folder: Path, meter: Meter) -> None:
    """What a process does to read the set."""
    with meter.of("load"):
        samples = ImageSamples(load_index(str(folder)), View(RESOLUTION))
    with meter.of("pickle"):
        sent = cloudpickle.dumps(samples)
    meter.figures["sent_MB"] = len(sent) / 1e6
    with meter.of("unpickle"):
        received = cloudpickle.loads(sent)
    with meter.of("order"):
        Order(received.counts, seed=0, streams=STREAMS).locate(np.arange(OF_A_RANK))


def measure_plan(shards: int, folder: Path, meter: Meter) -> None:
    """`cascade plan` of a published recipe on the set."""
    from pipelines.command.cli import app

    words = ["plan", "--recipe", "adm_imagenet_256", "--set", f"images.source={folder}", "--storage", f"{folder}/runs"]
    with meter.of("plan"):
        app(words, standalone_mode=False)


def measure_tokens(shards: int, folder: Path, meter: Meter) -> None:
    """The manifest of a set of tokens, and a rank that reads it."""
    store, artifact = Store(f"{folder}/tokens"), tokens_of(shards)
    with meter.of("commit"):
        commit_artifact(store, artifact)
    meter.figures["manifest_MB"] = (folder / "tokens/manifest.json").stat().st_size / 1e6
    del artifact
    with meter.of("load"):
        loaded = load_artifact(store)
    assert loaded is not None
    with meter.of("pickle"):
        sent = cloudpickle.dumps(TokenSamples(loaded))
    meter.figures["sent_MB"] = len(sent) / 1e6
    with meter.of("unpickle"):
        received = cloudpickle.loads(sent)
    with meter.of("entry"):  # of the first and of the last file that a reader opens
        for number in (0, -1):
            received.tokens.entry(received.tokens.metadata["shards"][number]["name"])


MEASURES: dict[str, Callable[[int, Path, Meter], None]] = {
    "saving": measure_saving,
    "index": measure_index,
    "plan": measure_plan,
    "tokens": measure_tokens,
}


def in_own_process(name: str, shards: int, folder: str) -> Row:
    """The figures of a measure, in a process whose memory is known."""
    command = [sys.executable, "-m", "tests.benchmarks.simulate", "--measure", name, "--shards", str(shards)]
    done = subprocess.run([*command, "--folder", folder], check=True, stdout=subprocess.PIPE, cwd=REPOSITORY)
    return {"name": name, "shards": shards, **json.loads(done.stdout.splitlines()[-1])}


def parts(shards: int, place: Place) -> Row:
    """Requests of a stage that writes a part for each shard: files and records, a listing before, all records after."""
    pages = math.ceil(shards / LISTED)
    seconds = {"list_s": pages * place.first_byte, "records_s": shards * place.first_byte / SMALL_TRANSFERS}
    dollars = (2 * shards + pages) * PUT_OR_LIST + shards * GET
    month = IMAGES * IMAGE_BYTES / 1e9 * GIGABYTE_MONTH
    counts = {"puts": 2 * shards, "lists": pages, "gets": shards}
    return {"name": "parts", "shards": shards, **counts, **seconds, "dollars": dollars, "dollars_month": month}


def reading(images: ImageSamples, ranks: int, streams: int, place: Place) -> Row:
    """All ranks' reading, from what some of them do in the first steps, and their first epoch as the order has it."""
    sizes, total = column_of(images.index.shards, "bytes").tolist(), images.index.train_samples
    order, batch = Order(images.counts, seed=0, streams=streams), ranks * OF_A_RANK
    share = Share(batch, 0, streams, min(WINDOW // OF_A_RANK, total // batch), world_size=ranks)
    runs = [read(images, share._replace(rank=rank), order, place) for rank in range(0, ranks, ranks // SAMPLED)]
    gets, fetched = order.fetched([1] * len(sizes), ranks), order.fetched(sizes, ranks)
    epoch = total / (ranks * place.rate)
    later = [sum(start > run.first_batch for start in run.starts) / (run.seconds - run.first_batch) for run in runs]
    return {
        "name": "reading",
        "shards": len(sizes),
        "ranks": ranks,
        "streams": streams,
        "bytes_per_byte": fetched / sum(sizes),
        "requests": gets,
        "requests_per_s": gets / epoch,
        "requests_per_s_window": ranks * sum(later) / len(runs),
        "requests_first_s": ranks * sum(start < 1 for run in runs for start in run.starts) / len(runs),
        "GB_per_s": fetched / epoch / 1e9,
        "first_batch_s": max(run.first_batch for run in runs),
        "waited_percent": 100 * max(run.waited / (run.seconds - run.first_batch) for run in runs),
        "most_samples_per_s": min(len(run.positions) / run.busy for run in runs),
        "held_shards": max(run.held_shards for run in runs),
        "held_MB": max(run.held_bytes for run in runs) / 1e6,
        "epoch_hours": epoch / 3600,
        "epoch_dollars": gets * GET,
    }


LIMITS: dict[tuple[str, str], tuple[float, str]] = {  # measure, figure -> limit, and whose
    ("saving", "peak_MB"): (4_000, "the process that ends an ingest"),
    ("index", "unpickle_MB"): (1_000, "each rank and its reader"),
    ("index", "unpickle_s"): (10, "before a rank's first step"),
    ("index", "sent_MB"): (100, "to each rank, and on to its reader"),
    ("plan", "plan_s"): (60, "`cascade plan`"),
    ("plan", "peak_MB"): (4_000, "`cascade plan`"),
    ("tokens", "peak_MB"): (4_000, "the process that commits tokens"),
    ("tokens", "load_s"): (60, "each stage that reads tokens"),
    ("tokens", "unpickle_MB"): (1_000, "each rank"),
    ("tokens", "sent_MB"): (100, "to each rank"),
    ("tokens", "entry_s"): (0.02, "to find two files of a manifest"),
    ("parts", "records_s"): (600, "between the last part and the manifest"),
    ("reading", "bytes_per_byte"): (1.1, "bytes fetched for each byte of the set"),
    ("reading", "requests_per_s"): (PREFIX_GETS, "all ranks, in an epoch"),
    ("reading", "requests_first_s"): (PREFIX_GETS, "all ranks, in their first second"),
    ("reading", "first_batch_s"): (60, "a rank"),
    ("reading", "waited_percent"): (1, "a rank that takes its samples at an even rate"),
    ("reading", "held_MB"): (8_000, "a reader"),
}


def broken(rows: list[Row]) -> Table:
    """Where each limit is passed first: the fewest shards, then the fewest ranks."""
    table = Table("measure", "figure", "limit", "passed first at", "figure there", "who", title="What breaks first")
    for (name, figure), (limit, who) in LIMITS.items():
        past = sorted(
            (row.get("ranks", 0), row["shards"], row.get("streams", 0), row[figure])
            for row in rows
            if row["name"] == name and row[figure] > limit
        )
        ranks, shards, streams, value = past[0] if past else (0, 0, 0, 0)
        where = f"{shards:,} shards" + (f", {ranks} ranks, {streams} streams" if ranks else "") if past else "never"
        table.add_row(name, figure, f"{limit:g}", where, f"{value:,.4g}" if past else "", who)
    return table


def table_of(rows: list[Row], name: str) -> Table:
    own = [row for row in rows if row["name"] == name]
    names = [figure for figure in own[0] if figure != "name"]
    table = Table(*(figure.replace("_", " ") for figure in names), title=name)
    for row in own:
        table.add_row(*(f"{row[figure]:,.4g}" if row[figure] % 1 else f"{row[figure]:,.0f}" for figure in names))
    return table


def main(
    measure: Annotated[str | None, typer.Option(hidden=True)] = None,
    shards: Annotated[list[int], typer.Option()] = [*SHARDS],  # noqa: B006  typer's own way
    ranks: Annotated[list[int], typer.Option()] = [*RANKS],  # noqa: B006
    folder: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure and simulate, print the tables, and keep the rows in simulate.json."""
    if measure is not None and folder is not None:
        MEASURES[measure](shards[0], folder, meter := Meter())
        meter.peak()
        print("\n" + json.dumps(meter.figures))
        return
    place, rows = Place(), list[Row]()
    for count in shards:
        with tempfile.TemporaryDirectory() as scratch:
            rows += [in_own_process(name, count, scratch) for name in MEASURES]
        rows.append(parts(count, place))
        images = ImageSamples(index_of(count, IMAGES), View(RESOLUTION))
        rows += [reading(images, n, c, place) for n in ranks for c in sorted({STREAMS, max(STREAMS, 3 * n)})]
    about = facts(sys.modules[__name__], machine=machine()) | {"command": "make simulate", "place": place._asdict()}
    (REPOSITORY / RESULT).write_text(json.dumps({"of": about, "rows": rows}, indent=1) + "\n")
    for name in dict.fromkeys(row["name"] for row in rows):
        Console(width=200).print(table_of(rows, name))
    Console(width=200).print(broken(rows))


if __name__ == "__main__":
    typer.run(main)
