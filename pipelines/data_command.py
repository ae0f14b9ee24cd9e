"""`cascade data`: pictures into shards, with a progress bar."""

import ray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from components.data.ingest import IngestConfig, ingest
from components.data.preflight import check_source
from components.data.shards import INDEX
from components.storage.store import Store, absolute
from pipelines.nodes import check_nodes
from pipelines.preflight import check_needs, needs_of_source
from pipelines.session import on_cluster, start_ray
from pipelines.space import Space


def write_shards(source: str, path: str | None, *, out: str, config: IngestConfig, console: Console) -> None:
    """Write shards and index to `out`. Raises SourceError or StoreError before anything is written."""
    check_source(source, path)
    store = Store(absolute(out))
    store.check_writable()
    needs = needs_of_source(source, path)
    check_needs(needs)
    cluster = start_ray(worker_start_timeout=600, verbose=False, num_gpus=0)
    if on_cluster():
        check_nodes(needs, store, Space())
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
            )
    finally:
        ray.shutdown()
    console.print(
        f"{index.samples} pictures of {len(index.classes)} classes in {len(index.shards)} shards"
        f" ({index.quarantined} quarantined): {store.url(INDEX)}",
        highlight=False,
        soft_wrap=True,
    )
