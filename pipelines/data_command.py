"""`cascade data`: images into shards, with a progress bar."""

import ray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from components.data.ingest import PACKAGED, IngestConfig, ingest
from components.data.shards import INDEX
from components.data.source_check import check_file, check_source, file_to_try
from components.storage.store import Store, absolute
from pipelines.session import on_cluster, start_ray

MOST_CLASSES = 10  # that the summary names


def check_workers(source: str, path: str | None, store: Store) -> None:
    """Raise UsageError or SourceError, in one line, if the nodes that work can't read the source or write shards."""
    from pipelines.checkpoint_space import Space
    from pipelines.nodes import check_nodes  # with torch, which `cascade data` does without on one machine
    from pipelines.preflight import needs_of_source

    check_nodes(needs_of_source(source, path), store, Space())


def write_shards(source: str, path: str | None, *, out: str, config: IngestConfig, console: Console) -> None:
    """Write shards and index to `out`. Raises SourceError or StoreError before anything is written."""
    check_source(source, path, config.columns)
    store = Store(absolute(out))
    store.check_writable()
    file = None if source in PACKAGED else file_to_try(source, path)
    if file is not None:
        check_file(file)
    cluster = start_ray(worker_start_timeout=600, verbose=False, num_gpus=0)
    if on_cluster():
        check_workers(source, path, store)
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
    print_classes(classes, console)


def print_classes(counts: dict[str, int], console: Console) -> None:
    """A line for each class with its number of images, the largest first; of many classes the first ten."""
    largest = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    width = max((len(f"{count:,}") for _, count in largest), default=0)
    for name, count in largest[:MOST_CLASSES]:
        console.print(f"  {count:{width},}  {name}", highlight=False, markup=False, soft_wrap=True)
    if len(largest) > MOST_CLASSES:
        console.print(f"  … and {len(largest) - MOST_CLASSES:,} more", highlight=False)
