"""Pods that are whole GPU nodes: what they take of the node, what NCCL is told, and what a training makes of them."""

from pathlib import Path
from typing import Any

import pytest

from pipelines.planning.profiles import Cluster, load_profile
from pipelines.planning.shares import share_cluster
from pipelines.recipes.catalog import RECIPES
from pipelines.workflows import build_workflow
from tests.contracts.manifests import Manifest, build, group_named, only

FOLDER = "infra/kuberay/overlays/whole-node"
WHOLE = [FOLDER, f"{FOLDER}-efa", f"{FOLDER}-rdma"]
FABRICS = {f"{FOLDER}-efa": "vpc.amazonaws.com/efa", f"{FOLDER}-rdma": "rdma/rdma_shared_device_a"}
OBJECT_STORE = min(0.3, 200e9 / (960 * 2**30))  # Ray's share of a pod's memory


def gigabytes(amount: str) -> int:
    assert amount.endswith("Gi")
    return int(amount.removesuffix("Gi"))


def container_of(folder: Path) -> dict[str, Any]:
    (container,) = group_named("gpu", build(folder))["template"]["spec"]["containers"]
    return container


@pytest.mark.parametrize("folder", WHOLE)
def test_a_pod_takes_all_eight_gpus_of_a_node_and_is_else_what_it_is_with_one(repository: Path, folder: str) -> None:
    whole, one = container_of(repository / folder), container_of(repository / "infra/kuberay/base")
    assert {whole["resources"][kind]["nvidia.com/gpu"] for kind in ("requests", "limits")} == {"8"}
    own = ("resources", "volumeMounts", "envFrom", "securityContext", "image")
    assert {name: value for name, value in whole.items() if name not in own} == {
        name: value for name, value in one.items() if name not in own
    }


@pytest.mark.parametrize("folder", WHOLE)
def test_shared_memory_holds_ray_s_object_store_and_leaves_most_of_the_pod_s_memory(
    repository: Path, folder: str
) -> None:
    pod = group_named("gpu", build(repository / folder))["template"]["spec"]
    (volume,) = pod["volumes"]
    (mount,) = pod["containers"][0]["volumeMounts"]
    assert mount == {"name": volume["name"], "mountPath": "/dev/shm"}
    memory = gigabytes(pod["containers"][0]["resources"]["limits"]["memory"])
    assert volume["emptyDir"]["medium"] == "Memory"
    assert OBJECT_STORE * memory < gigabytes(volume["emptyDir"]["sizeLimit"]) < memory / 2


@pytest.mark.parametrize("folder", FABRICS)
def test_a_fabric_comes_with_its_devices_and_with_what_nccl_is_told(repository: Path, folder: str) -> None:
    manifests, container = build(repository / folder), container_of(repository / folder)
    resources = container["resources"]
    assert int(resources["requests"][FABRICS[folder]]) == int(resources["limits"][FABRICS[folder]]) > 0
    read = [source["configMapRef"]["name"] for source in container["envFrom"] if "configMapRef" in source]
    assert read == ["cascade-settings", "cascade-network"]
    network = only(manifests, "ConfigMap", "cascade-network")
    assert network["metadata"]["namespace"] == "image-cascade"
    assert network["data"]["NCCL_SOCKET_IFNAME"] == "eth0"


def test_efa_has_huge_pages_and_says_which_network_was_taken(repository: Path) -> None:
    manifests, container = build(repository / f"{FOLDER}-efa"), container_of(repository / f"{FOLDER}-efa")
    assert container["resources"]["requests"]["hugepages-2Mi"] == container["resources"]["limits"]["hugepages-2Mi"]
    told = only(manifests, "ConfigMap", "cascade-network")["data"]
    assert (told["FI_PROVIDER"], told["NCCL_DEBUG"]) == ("efa", "INFO")


@pytest.mark.parametrize("folder", WHOLE)
def test_memory_is_locked_by_rdma_alone_and_only_there_the_namespace_lets_it(repository: Path, folder: str) -> None:
    locks = "IPC_LOCK" in container_of(repository / folder)["securityContext"]["capabilities"].get("add", [])
    namespace: Manifest = only(build(repository / folder), "Namespace", "image-cascade")
    level = namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
    assert (locks, level) == ((True, "privileged") if folder.endswith("rdma") else (False, "baseline"))


@pytest.mark.parametrize("pods", [1, 8])
def test_a_training_has_a_worker_on_each_gpu_of_every_pod_and_their_cpus_fit_beside_readers(
    repository: Path, pods: int
) -> None:
    cpus = int(container_of(repository / FOLDER)["resources"]["requests"]["cpu"])
    cluster = Cluster(cpus=pods * cpus, gpus=8 * pods, cpus_per_gpu=cpus / 8, nodes=pods)
    workflow = build_workflow(RECIPES["adm_imagenet_256"]())
    base = share_cluster(workflow, load_profile("kuberay"), cluster, running=["base"])["base"]
    assert (base.num_workers, base.gpus_per_worker, base.cpus_per_worker) == (8 * pods, 1, 4)
    assert 8 * base.cpus_per_worker <= cpus
