"""`cascade data`: images into shards, with a progress bar."""

import ray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from components.data.ingest import PACKAGED, IngestConfig, ingest
from components.data.shards import INDEX
from components.data.source_check import check_file, check_outside, check_source, file_to_try
from components.runtime.storage.store import Store, absolute
from pipelines.engine.session import on_cluster, start_ray
from pipelines.planning.room import Space, check_room

MOST_CLASSES = 10  # that the summary names


def default_samples(source: str) -> int:
    """Images in a tar where the user says nothing: drawn at 64², or as they are, 28 MB of 110 kB each."""
    return 256 if source == "webdataset" else 512


def write_shards(source: str, path: str | None, *, out: str, config: IngestConfig, console: Console) -> None:
    """Write shards and index to `out`; raises SourceError or StoreError before anything is written.
    Raises ShardError for a broken tar at its turn, DataError for too many corrupt images; the next try goes on."""
    listed = check_source(source, path, config.columns)
    store = Store(absolute(out))
    if path is not None:
        check_outside(store.uri, path)
    store.check_writable()
    if source == "webdataset":  # as many bytes as the tars have, less what an earlier try left on the disk
        needed = sum(tar.bytes for tar in listed.files) - sum(info.bytes for info in store.list())
        check_room({store.uri: max(0, needed)}, purpose="the shards")
    file = None if source in PACKAGED else file_to_try(source, path)
    if file is not None:
        check_file(file)
    cluster = start_ray(worker_start_timeout=600, verbose=False, num_gpus=0)
    if on_cluster():  # with torch, which `cascade data` does without on one machine
        from pipelines.planning.preflight import check_nodes, needs_of_source

        check_nodes(needs_of_source(source, path), store, Space())
    classes: dict[str, int] = {}
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    try:
        with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
            task = bar.add_task(source, total=None)
            index = ingest(
                source,
                path,
                out=store,
                config=config,
                num_cpus=cluster.cpus_per_core,
                reshard=True,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
                class_counts=classes.update,
            )
    finally:
        ray.shutdown()
    console.print(
        f"{index.samples} images of {len(index.classes)} classes in {len(index.shards)} shards"
        f" ({index.quarantined} quarantined): {store.url(INDEX)}",
        highlight=False,
        soft_wrap=True,
    )
    largest = sorted(classes.items(), key=lambda item: (-item[1], item[0]))
    width = max((len(f"{count:,}") for _, count in largest), default=0)
    for name, count in largest[:MOST_CLASSES]:
        console.print(f"  {count:{width},}  {name}", highlight=False, markup=False, soft_wrap=True)
    if len(largest) > MOST_CLASSES:
        console.print(f"  … and {len(largest) - MOST_CLASSES:,} more", highlight=False)
