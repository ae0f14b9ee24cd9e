"""What the node that works has for one worker: asked there, for the driver's node may be quite another machine."""

import os

import ray

from components.runtime.execution import Resources


def node_threads(resources: Resources) -> int:
    """Torch threads of a worker on the node that calls this: `resources.threads`, or its share of the node's cores."""
    if resources.threads is not None:
        return resources.threads
    here = ray.get_runtime_context().get_node_id()
    node = next(node["Resources"] for node in ray.nodes() if node["NodeID"] == here)
    return threads_of(resources, cpus=node.get("CPU", 0), gpus=node.get("GPU", 0), cores=os.cpu_count() or 1)


def threads_of(resources: Resources, *, cpus: float, gpus: float, cores: int) -> int:
    """A worker's share of a node's cores, at least 1: a function of the node alone, equal at each start.

    Who else works there just now does not count, or a restart would have other bits: a worker on GPUs gets the share
    of the cores that its GPUs are of the node's; on other nodes as many share the cores as may come to work there.

    Args:
        cpus: logical CPUs that Ray counts on the node. In a pod they are the pod's, where `cores` are the machine's; a
            Ray that is started here counts more of them than there are cores.
        gpus: of the node.
        cores: of the machine.
    """
    room = max(1, cpus // resources.cpus_per_worker)  # workers that find logical CPUs here
    workers = min(resources.workers_per_node, room)
    if resources.gpus_per_worker and gpus:
        workers = max(1, gpus / resources.gpus_per_worker)
    return max(1, int(min(cores, cpus) / workers))
