"""A Ray cluster of several nodes on this machine, whose processes can be killed one by one."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

NODE_CPUS = 4  # logical
TRAINER, CONTROLLER = "ray::RayTrainWorker", "ray::TrainController"


class Nodes:
    """A head that works for no stage, and nodes that do."""

    def __init__(self) -> None:
        from ray._private.authentication.authentication_token_setup import enable_token_auth_by_default
        from ray.cluster_utils import Cluster

        from pipelines.engine.session import _protect_token

        _protect_token()
        enable_token_auth_by_default()
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.address = self.cluster.address

    def add(self) -> Any:
        return self.cluster.add_node(num_cpus=NODE_CPUS)

    def kill(self, node: Any) -> None:
        """`kill -9` of all of a node's processes; its workers go with it."""
        workers = [process for pid in raylets(node) for process in psutil.Process(pid).children(recursive=True)]
        self.cluster.remove_node(node, allow_graceful=False)
        for process in workers:
            if process.is_running():
                process.kill()

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


def raylets(node: Any) -> list[int]:
    return [info.process.pid for info in node.all_processes.get("raylet", [])]


def processes(node: Any, title: str) -> list[psutil.Process]:
    """The node's processes whose title starts so."""
    found = []
    for pid in raylets(node):
        try:
            children = psutil.Process(pid).children(recursive=True)
        except psutil.NoSuchProcess:
            continue
        found += [process for process in children if _title(process).startswith(title)]
    return found


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@contextmanager
def nodes(count: int) -> Iterator[Nodes]:
    cluster = Nodes()
    try:
        for _ in range(count):
            cluster.add()
        yield cluster
    finally:
        cluster.cluster.shutdown()
