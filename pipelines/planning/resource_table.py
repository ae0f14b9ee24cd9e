"""How many workers and GPUs each stage takes of a cluster, how many idle, and why: as tables."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from rich.table import Table

from components.configuration.optimization import Training
from components.runtime.execution import Resources
from pipelines.planning.cluster import Cluster
from pipelines.planning.profiles import Profile
from pipelines.planning.shares import WITHOUT_NETWORK, concurrent_stages, largest_crowd
from pipelines.workflow import Workflow


class ResourceRow(NamedTuple):
    """One stage on a cluster."""

    stage: str
    resources: Resources
    workers: int
    gpus: float  # that it takes
    idle: float  # GPUs that nobody works on while it runs with all that may run at the same time
    share: int | None  # samples of a step for each worker; None: nothing is trained
    parts: int | None  # in which it computes them; None: the profile sets no bound, and a GPU finds its own
    why: str


def resource_rows(
    workflow: Workflow, profile: Profile, cluster: Cluster, shares: Mapping[str, Resources]
) -> list[ResourceRow]:
    """A row for each stage of `shares` that runs a network."""
    configs = {
        stage.name: stage.config
        for stage in workflow.stages
        if stage.name in shares and not isinstance(stage.config, WITHOUT_NETWORK)
    }
    gpus, rows = {name: gpus_of(shares[name]) for name in configs}, []
    groups = concurrent_stages(workflow, [name for name in configs if gpus[name]])
    for name, config in configs.items():
        others = {other: gpus[other] for other in largest_crowd(groups, gpus, name) if other != name}
        resources, size = shares[name], config.optimization.global_batch_size if isinstance(config, Training) else None
        workers = resources.num_workers if size else resources.num_actors
        share = size // workers if size else None
        most = resources.max_batch_per_device
        rows.append(
            ResourceRow(
                name,
                resources,
                workers,
                gpus[name],
                max(0, cluster.gpus - gpus[name] - sum(others.values())),
                share,
                math.ceil(share / most) if share and most else None,
                reason(resources, size, others, cluster, given=profile.given(name, "num_workers") is not None),
            )
        )
    return rows


def reason(
    resources: Resources, size: int | None, others: Mapping[str, float], cluster: Cluster, *, given: bool
) -> str:
    """Why a stage takes so many GPUs of those that there are.

    Args:
        size: samples of a step, where it is a training.
        others: GPUs of the stages that may run at the same time.
        given: its number of workers stands in the profile.
    """
    taken, workers = gpus_of(resources), resources.num_workers
    room = cluster.gpus - sum(others.values())
    along = f"with {', '.join(others)}" if others else ""
    if not taken:
        return ""
    if taken > room:
        return f"takes turns {along}" if others else f"waits until there are {taken:g} GPUs"
    if taken == room:
        return along
    if given:
        why = "num_workers of the profile"
    elif size is None:
        why = "num_actors of the profile"
    else:
        larger = next((count for count in range(workers + 1, size + 1) if size % count == 0), None)
        why = f"{size} divides by {workers}, next by {larger}" if larger else f"a batch of {size}"
    return f"{taken:g} of {room:g} GPUs: {why}" + (f"; {along}" if along else "")


def gpu_count(gpus: float) -> str:
    return f"{gpus:g} GPU{'' if gpus == 1 else 's'}"


def gpus_of(resources: Resources) -> float:
    return resources.gpus_per_worker * max(resources.num_workers, resources.num_actors)


def resource_table(workflow: Workflow, profile: Profile, cluster: Cluster, shares: Mapping[str, Resources]) -> Table:
    """One row a stage: workers, GPUs, batch and CPUs of each worker, and why no more GPUs are at work."""
    title = f"{gpu_count(cluster.gpus)}, {cluster.cpus:g} logical CPUs, profile {profile.name}"
    table = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left")
    table.add_column("stage", no_wrap=True)
    for column in ("workers", "GPUs", "idle", "batch", "parts", "CPUs"):
        table.add_column(column, justify="right")
    table.add_column("why")
    for row in resource_rows(workflow, profile, cluster, shares):
        parts = row.parts or ("found" if row.share and row.gpus else "–")
        cells = (row.workers, f"{row.gpus:g}", f"{row.idle:g}", row.share or "", parts)
        table.add_row(row.stage, *map(str, cells), f"{row.resources.cpus_per_worker:g}", row.why)
    return table
