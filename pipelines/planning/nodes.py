"""Asks the nodes that work, before anything starts, whether they have and see what the stages need.

Nodes share the network, and maybe a mounted folder; their packages, variables and disks are their own.
"""

import logging
import uuid
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from components.configuration.usage import UsageError
from components.data.errors import SourceError
from components.runtime.pool import one_line, portable
from components.runtime.storage.store import Store, StoreError
from pipelines.planning.checkpoint_space import Space
from pipelines.planning.preflight import Needs, check_needs

logger = logging.getLogger("cascade")
ANSWER_SECONDS = 300.0  # longer than storage is tried again


def check_nodes(needs: Needs, root: Store, space: Space) -> None:
    """Raise UsageError or StoreError, in one line, if a node that works lacks a package or room, or can't read or write
    what it will have to."""
    nodes = working_nodes()
    if not nodes:
        logger.warning("no node is there yet that works: what nodes need is not asked")
    own = ray.get_runtime_context().get_node_id()
    others = {node: address for node, address in nodes.items() if node != own}
    space.check(root=None, works=own in nodes)
    if not others:
        return
    probe = f".probe-{uuid.uuid4().hex[:8]}"
    root.write(probe, probe.encode())
    try:
        answers = {node: _ask(node, needs, root, probe, space) for node in others}
        ray.wait(list(answers.values()), num_returns=len(answers), timeout=ANSWER_SECONDS)
        lines = {node: _line(node, answer) for node, answer in answers.items()}
    finally:
        root.delete(probe)
    for node, line in lines.items():
        if line:
            raise UsageError(f"worker node {others[node]}: {line}{_remedy(line, [root.uri, *needs.addresses()])}")


def working_nodes() -> dict[str, str]:
    """Id -> address of the nodes that have logical CPUs or GPUs."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    return {
        node["NodeID"]: node["NodeManagerAddress"]
        for node in alive
        if node["Resources"].get("CPU", 0) > 0 or node["Resources"].get("GPU", 0) > 0
    }


def try_node(needs: Needs, root: Store, probe: str, space: Space) -> str:
    """What is wrong on the node that calls this, in one line; "" if nothing is."""
    try:
        if not root.exists(probe):
            raise StoreError(f"storage {root.uri} is another place there than on the driver's node")
        root.check_writable()
        check_needs(needs)
        space.check(root=None, works=True)
    except (UsageError, SourceError, StoreError) as error:
        return str(error)
    return ""


def _ask(node: str, *arguments: Any) -> Any:
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(try_node)
    return task.remote(*portable(arguments, what="what a node is asked"))


def _line(node: str, answer: Any) -> str:
    try:
        return ray.get(answer, timeout=0)
    except ray.exceptions.GetTimeoutError:
        return f"no answer in {ANSWER_SECONDS:.0f} s whether it has what the stages need"
    except RayError as error:
        if node not in working_nodes():  # it is gone, and what it lacks does not matter
            return ""
        return (
            f"it can't run this program ({one_line(error)}); give it the program's image, or submit with --working-dir"
        )


def _remedy(line: str, addresses: list[str]) -> str:
    """Of a path, which one node may see and another not."""
    if not any("://" not in address and address in line for address in addresses):
        return ""
    return "; every node must see it: give a URL such as s3://bucket/path, or a folder that all of them mount"
