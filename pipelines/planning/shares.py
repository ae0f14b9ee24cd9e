"""Shares of a cluster's GPUs and CPUs for the stages of a workflow; never part of a stage's identity.

Stages of which none waits for another may run at once, and then take no more GPUs together than there are: a gang of
workers finds all its room or none, and no two of them hold a half each. Where there are fewer GPUs than such stages, or
a profile asks for more, stages take turns; a gang that waits holds nothing.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from rich.table import Table

from components.configuration.optimization import Training
from components.configuration.sampling import SamplingConfig
from components.configuration.usage import UsageError
from components.evaluation.obedience import SceneJudgeConfig
from components.runtime.execution import Resources, Sharding
from components.stages.images import ImagesConfig
from components.stages.precompute import TextEncoderConfig
from pipelines.planning.cost import choices, chosen
from pipelines.planning.profiles import Aim, Cluster, Profile
from pipelines.workflow import Stage, Workflow

WITHOUT_NETWORK = (ImagesConfig, SamplingConfig, SceneJudgeConfig, TextEncoderConfig)  # no use for a GPU


class Demand(NamedTuple):
    """Workers and GPUs that a stage can use."""

    counts: tuple[int, ...]  # possible numbers of workers, or of actors, ascending
    gpus: float  # of each
    load: float = 1  # work of all of them together: samples that a training takes


def share_cluster(
    workflow: Workflow, profile: Profile, cluster: Cluster, *, running: Collection[str] | None = None
) -> dict[str, Resources]:
    """Resources of each stage that is to run, by name; None: all run.
    A training has the largest number of workers that shares its batch equally, within the GPUs that it may use and that
    pay; other stages have an actor on each GPU that concurrent trainings leave. Raises UsageError if the profile gives
    a stage GPUs that the cluster does not have."""
    stages = {stage.name: stage for stage in workflow.stages if running is None or stage.name in running}
    demands = {name: stage_demand(stage, workflow, profile, cluster) for name, stage in stages.items()}
    counts = {name: demand.counts[0] for name, demand in demands.items()}
    on_gpus = {name: demand for name, demand in demands.items() if demand.gpus > 0}
    trained = {name: demand for name, demand in on_gpus.items() if isinstance(stages[name].config, Training)}
    counts |= share_gpus(workflow, trained, gpus=cluster.gpus)
    taken = {name: counts[name] * demand.gpus for name, demand in trained.items()}
    others = {name: demand for name, demand in on_gpus.items() if name not in trained}
    counts |= share_gpus(workflow, others, gpus=cluster.gpus, taken=taken)

    working = {name: counts[name] for name, stage in stages.items() if not isinstance(stage.config, WITHOUT_NETWORK)}
    groups = concurrent_stages(workflow, working)
    shares = {}
    for name, stage in stages.items():
        crowd = sum(working[other] for other in largest_crowd(groups, working, name)) or 1
        shares[name] = stage_resources(
            stage, workflow, profile, cluster, count=counts[name], gpus=demands[name].gpus, crowd=crowd
        )
    return shares


def stage_demand(stage: Stage, workflow: Workflow, profile: Profile, cluster: Cluster) -> Demand:
    """Demand of a stage, of a training up to the number of workers that pays, where the GPU is known.
    Raises UsageError if the profile gives more GPUs than the cluster has."""
    config = stage.config
    if isinstance(config, WITHOUT_NETWORK) or (isinstance(config, Training) and not config.trains):
        return Demand((1,), 0)
    names = ("num_workers", "gpus_per_worker", "min_workers")
    number, given, least = (profile.given(stage.name, name) for name in names)
    gpus = float(cluster.gpus > 0 if given is None else given)
    if isinstance(config, Training) and number is not None:
        return Demand((number,), gpus)  # though there are fewer GPUs: more may come
    most = int(cluster.gpus / gpus) if gpus else 1
    if most == 0:
        raise UsageError(
            f"{stage.name}: profile {profile.name} gives each worker {gpus:g} GPU, the cluster has {cluster.gpus:g}; "
            "if it will have more, say so: --cluster gpus=8,cpus=64"
        )
    if not isinstance(config, Training):
        return Demand(tuple(range(1, min(most, number or most) + 1)), gpus)
    counts = worker_counts(stage, cluster, profile.given(stage.name, "sharding"), least=least or 1, most=most)
    counts = counts or (max(least or 1, most),)  # refused with its number (`check_shares`)
    if cluster.gpu is not None and gpus and len(counts) > 1:
        pays = chosen(choices(stage, profile, cluster, counts), profile.aim).workers
        counts = tuple(count for count in counts if count <= pays)
    return Demand(counts, gpus, config.optimization.global_batch_size * config.optimization.total_steps)


def worker_counts(stage: Stage, cluster: Cluster, sharding: Sharding, *, least: int, most: int) -> tuple[int, ...]:
    """Numbers of workers, ascending, that divide a training's batch and hold whole networks; maybe none.
    Where the GPU is known, so that they are chosen among, and images are read, only those that divide the streams too,
    if any do: others read shards more than once (`Order.fetched`), which is little of latents."""
    assert isinstance(stage.config, Training)
    optimization, source = stage.config.optimization, stage.inputs.get("images")
    size, streams = optimization.global_batch_size, optimization.streams
    unit = sharding if isinstance(sharding, int) else 1
    counts = tuple(n for n in range(least, most + 1) if size % n == n % unit == 0)
    if cluster.gpu is None or not isinstance(source, Stage) or not isinstance(source.config, ImagesConfig):
        return counts
    return tuple(count for count in counts if streams % count == 0) or counts


def share_gpus(
    workflow: Workflow, demands: Mapping[str, Demand], *, gpus: float, taken: Mapping[str, float] | None = None
) -> dict[str, int]:
    """Workers of each stage: an equal share of the GPUs, then the rest where a worker has most to do.
    `taken`: GPUs of further stages, which are decided."""
    counts = {name: demand.counts[0] for name, demand in demands.items()}
    fixed = dict(taken or {}) | {name: d.counts[0] * d.gpus for name, d in demands.items() if len(d.counts) == 1}
    flexible = {name: demand for name, demand in demands.items() if name not in fixed}
    shared = []  # concurrent stages, and their GPUs; all, where stages take turns
    for group in concurrent_stages(workflow, [*flexible, *fixed]):
        left = gpus - sum(fixed.get(name, 0) for name in group)
        if members := [name for name in group if name not in fixed]:
            shared.append((members, left if left > 0 else gpus))

    for name, demand in flexible.items():
        equal = min(room / len(group) for group, room in shared if name in group)
        counts[name] = max([count for count in demand.counts if count * demand.gpus <= equal] or [counts[name]])

    def grown(name: str) -> int | None:
        """The next number of a stage's workers or GPUs; None without room for more."""
        count = next((count for count in demands[name].counts if count > counts[name]), None)
        wanted = {other: number * demands[other].gpus for other, number in (counts | {name: count or 0}).items()}
        rooms = [(sum(wanted[other] for other in group), room) for group, room in shared if name in group]
        return count if all(total <= room for total, room in rooms) else None

    while growing := {name: count for name in flexible if (count := grown(name)) is not None}:
        busiest = max(growing, key=lambda name: demands[name].load / counts[name])
        counts[busiest] = growing[busiest]
    return counts


def concurrent_stages(workflow: Workflow, names: Collection[str]) -> list[list[str]]:
    """The largest sets of the stages `names` without dependencies, each in the workflow's order."""
    ordered = [stage.name for stage in workflow.stages if stage.name in names]
    groups: list[list[str]] = [[]]
    for name in ordered:
        related = workflow.before(name) | workflow.after(name)
        groups += [[*(other for other in group if other not in related), name] for group in groups]
        groups = [group for group in groups if not any(set(group) < set(other) for other in groups)]
        groups = [list(group) for group in dict.fromkeys(map(tuple, groups))]
    return groups


def largest_crowd(groups: Collection[list[str]], sizes: Mapping[str, float], name: str) -> list[str]:
    """The group with the largest sum of sizes among the stage's groups; [] for none."""
    own = [group for group in groups if name in group]
    return max(own, key=lambda group: sum(sizes[other] for other in group), default=[])


def stage_resources(
    stage: Stage, workflow: Workflow, profile: Profile, cluster: Cluster, *, count: int, gpus: float, crowd: float
) -> Resources:
    """Resources of a stage with `count` workers or actors, of `crowd` that may work at once.
    Together they claim at most half of the logical CPUs, so that short tasks, which trainings wait for, find some."""
    is_training = isinstance(stage.config, Training)
    sharing = min(2, concurrent_trainings(workflow, stage.name))  # on the cores of a node
    cores = max(1, int(cluster.cpus / cluster.nodes) // cluster.cpus_per_core)  # of a node
    on_cpus = cluster.nodes * max(1, cores // (profile.threads or max(1, cores // sharing)))  # as large as a training
    cpus = min(profile.cpus_per_worker, cluster.cpus / 2 / crowd)
    if gpus and cluster.cpus_per_gpu is not None:  # where its GPU is
        cpus = min(cpus, cluster.cpus_per_gpu * gpus)
    return profile.resources(
        stage.name,
        num_workers=count if is_training else 1,
        num_actors=count if gpus or is_training else on_cpus,
        gpus_per_worker=gpus,
        cpus_per_worker=max(0.01, math.floor(100 * cpus) / 100),
        workers_per_node=sharing * (count if is_training else 1),
        cpus_per_core=cluster.cpus_per_core,
        low_priority=cluster.here and stands_alone(workflow, stage.name),
    )


def concurrent_trainings(workflow: Workflow, stage: str) -> int:
    """Count the trainings that may run at once: those of a training with it, else the most there can be."""
    groups = concurrent_stages(workflow, trainings(workflow))
    return max(len(group) for group in [group for group in groups if stage in group] or groups) or 1


def stands_alone(workflow: Workflow, stage: str) -> bool:
    """Tell if a training has no other before or after, while another branch trains several in turn."""
    names = trainings(workflow).keys()
    in_turn = {name for name in names if (workflow.before(name) | workflow.after(name)) & names}
    return bool(in_turn) and stage in names - in_turn


def trainings(workflow: Workflow) -> dict[str, Training]:
    configs = {stage.name: stage.config for stage in workflow.stages}
    return {name: config for name, config in configs.items() if isinstance(config, Training) and config.trains}


class ResourceRow(NamedTuple):
    """A stage on a cluster."""

    stage: str
    workers: int
    gpus: float  # that it takes
    idle: float  # GPUs that stay idle beside all that may run
    share: int | None  # samples of a step for each worker; None: nothing is trained
    parts: int | None  # in which it computes them; None: a GPU finds its own
    cpus: float  # of each worker
    why: str


def resource_rows(
    workflow: Workflow, profile: Profile, cluster: Cluster, shares: Mapping[str, Resources]
) -> list[ResourceRow]:
    """Table rows of the stages of `shares` that run a network."""
    stages = (stage for stage in workflow.stages if stage.name in shares)
    configs = {stage.name: stage.config for stage in stages if not isinstance(stage.config, WITHOUT_NETWORK)}
    gpus, rows = {name: gpus_of(shares[name]) for name in configs}, []
    groups = concurrent_stages(workflow, [name for name in configs if gpus[name]])
    for name, config in configs.items():
        others = {other: gpus[other] for other in largest_crowd(groups, gpus, name) if other != name}
        resources, size = shares[name], config.optimization.global_batch_size if isinstance(config, Training) else None
        workers, most = resources.num_workers if size else resources.num_actors, resources.max_batch_per_device
        share, idle = size // workers if size else None, max(0, cluster.gpus - gpus[name] - sum(others.values()))
        parts = math.ceil(share / most) if share and most else None
        aim = None if profile.given(name, "num_workers") is not None else profile.aim
        why = reason(resources, size, others, cluster, aim=aim)
        rows.append(ResourceRow(name, workers, gpus[name], idle, share, parts, resources.cpus_per_worker, why))
    return rows


def reason(
    resources: Resources, size: int | None, others: Mapping[str, float], cluster: Cluster, *, aim: Aim | None
) -> str:
    """The reason for a stage's number of GPUs beside those of `others`, which may run at the same time.
    `size`: samples of a training's step. `aim`: of the profile; None: its number of workers stands there."""
    taken, workers = gpus_of(resources), resources.num_workers
    room = cluster.gpus - sum(others.values())
    along = f"with {', '.join(others)}" if others else ""
    if not taken:
        return ""
    if taken > room:
        return f"takes turns {along}" if others else f"waits until there are {taken:g} GPUs"
    if taken == room:
        return along
    if aim is None:
        why = "num_workers of the profile"
    elif size is None:
        why = "num_actors of the profile"
    else:
        larger = next((count for count in range(workers + 1, size + 1) if size % count == 0), None)
        why = f"{size} divides by {workers}, next by {larger}" if larger else f"a batch of {size}"
        if cluster.gpu is not None and larger and larger * resources.gpus_per_worker <= room:
            why = f"the {aim} by hours and price"
    return f"{taken:g} of {room:g} GPUs: {why}" + (f"; {along}" if along else "")


def gpu_count(gpus: float) -> str:
    return f"{gpus:g} GPU{'' if gpus == 1 else 's'}"


def gpus_of(resources: Resources) -> float:
    return resources.gpus_per_worker * max(resources.num_workers, resources.num_actors)


def table_of(first: str, numbers: Sequence[str], *, title: str | None = None) -> Table:
    """An empty table for the console: a column of names, then columns of numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left")
    table.add_column(first, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def resource_table(workflow: Workflow, profile: Profile, cluster: Cluster, shares: Mapping[str, Resources]) -> Table:
    """A table of workers, GPUs, batch, CPUs and reasons, with a row for each stage."""
    title = f"{gpu_count(cluster.gpus)}, {cluster.cpus:g} logical CPUs, profile {profile.name}"
    table = table_of("stage", ("workers", "GPUs", "idle", "batch", "parts", "CPUs"), title=title)
    table.add_column("why")
    for row in resource_rows(workflow, profile, cluster, shares):
        parts = row.parts or ("found" if row.share and row.gpus else "–")
        cells = (row.workers, f"{row.gpus:g}", f"{row.idle:g}", row.share or "", parts)
        table.add_row(row.stage, *map(str, cells), f"{row.cpus:g}", row.why)
    return table
