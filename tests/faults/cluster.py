"""A Ray cluster of several nodes on this machine, whose processes can be killed one by one."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tests.nodes import title_of

NODE_CPUS = 4  # logical
TRAINER, CONTROLLER = "ray::RayTrainWorker", "ray::TrainController"


class Nodes:
    """A head that works for no stage, and nodes that do."""

    def __init__(self) -> None:
        from ray._private.authentication.authentication_token_setup import enable_token_auth_by_default

        from pipelines.engine.session import _protect_token

        _protect_token()
        enable_token_auth_by_default()
        self.cluster = _head()

    @property
    def address(self) -> str:
        return self.cluster.address

    def add(self) -> Any:
        return self.cluster.add_node(num_cpus=NODE_CPUS)

    def kill(self, node: Any) -> None:
        """`kill -9` of all of a node's processes; its workers go with it."""
        workers = processes(node)
        self.cluster.remove_node(node, allow_graceful=False)
        for process in workers:
            if process.is_running():
                process.kill()

    def replace(self) -> None:
        """`kill -9` of all nodes, the head too; as many others take their places."""
        count, head = len(self.cluster.worker_nodes), processes(self.cluster.head_node)
        for node in [*self.cluster.worker_nodes]:
            self.kill(node)
        self.cluster.shutdown()
        for process in head:
            if process.is_running():
                process.kill()
        self.cluster = _head()
        for _ in range(count):
            self.add()

    def drain(self, node: Any, *, seconds: int) -> None:
        """What a cloud says before it takes a machine back."""
        command = [str(Path(sys.executable).with_name("ray")), "drain-node", "--address", self.address]
        command += ["--node-id", node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
        command += ["--reason-message", "spot", "--deadline-remaining-seconds", str(seconds)]
        subprocess.run(command, check=True, capture_output=True, timeout=120)

    def working(self) -> Any | None:
        """The node on which training workers are now, if any."""
        return next((node for node in self.cluster.worker_nodes if processes(node, TRAINER)), None)

    def trainers(self) -> list[psutil.Process]:
        return [process for node in self.cluster.worker_nodes for process in processes(node, TRAINER)]

    def is_training(self) -> bool:
        return self.working() is not None and bool(self.controllers())

    def controllers(self) -> list[psutil.Process]:
        return processes(self.cluster.head_node, CONTROLLER)


def _head() -> Any:
    from ray.cluster_utils import Cluster

    return Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})


def processes(node: Any, title: str = "") -> list[psutil.Process]:
    """The node's processes whose title starts so."""
    found = []
    for info in node.all_processes.get("raylet", []):
        with contextlib.suppress(psutil.NoSuchProcess):
            found += psutil.Process(info.process.pid).children(recursive=True)
    return [process for process in found if title_of(process).startswith(title)]


@contextmanager
def nodes(count: int) -> Iterator[Nodes]:
    cluster = Nodes()
    try:
        for _ in range(count):
            cluster.add()
        yield cluster
    finally:
        cluster.cluster.shutdown()
