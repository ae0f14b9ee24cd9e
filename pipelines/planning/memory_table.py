"""What each GPU of a training holds, whole and in shards, as a Markdown table."""

from collections.abc import Sequence

from components.configuration.trainings import AnyTraining
from components.runtime.storage.connection import readable_bytes
from components.training.sharding import why_whole
from pipelines.planning.cluster import Cluster
from pipelines.planning.profiles import Profile
from pipelines.planning.shares import share_cluster
from pipelines.planning.step_memory import held_bytes
from pipelines.workflow import Stage, Workflow

HEADS = (
    *("recipe", "training", "weights", "gradients", "optimizer", "averages", "a GPU"),
    *("shards", "parts", "gathered", "a GPU, sharded"),
)


def memory_overview(workflows: Sequence[Workflow], profile: Profile, cluster: Cluster) -> list[str]:
    """The trainings of several recipes: bytes of each part of all that one holds, and of one of as many shards as a
    training has workers on this cluster, where its network can be sharded."""
    lines = [markdown(HEADS), markdown(["---", "---", *["---:"] * (len(HEADS) - 2)])]
    for workflow in workflows:
        lines += memory_lines(workflow, profile, cluster)
    return lines


def memory_lines(workflow: Workflow, profile: Profile, cluster: Cluster) -> list[str]:
    """Those of one recipe."""
    shares = share_cluster(workflow, profile, cluster)
    trained = [stage for stage in workflow.stages if isinstance(stage.config, AnyTraining)]
    return [
        markdown(memory_cells(workflow, stage, shards=shares[stage.name].num_workers))
        for stage in trained
        if stage.name in shares
    ]


def memory_cells(workflow: Workflow, stage: Stage, *, shards: int) -> list[str]:
    whole = held_bytes(stage, workflow.stages)
    cells = [f"`{workflow.name}`", stage.name, *map(readable_bytes, whole[:4]), readable_bytes(sum(whole))]
    assert isinstance(stage.config, AnyTraining)
    if shards == 1 or why_whole(stage.config.network.kind) is not None:
        return [*cells, "–", "", "", ""]
    cut = held_bytes(stage, workflow.stages, shards=shards)
    return [*cells, str(shards), *map(readable_bytes, (sum(cut[:4]), cut.gathered, sum(cut)))]


def markdown(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
