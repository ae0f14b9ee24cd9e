"""Pods that are whole GPU nodes: what they take of the node, what NCCL is told, and what a training makes of them."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pipelines.planning.profiles import Cluster, load_profile
from pipelines.planning.shares import share_cluster
from pipelines.recipes.catalog import RECIPES
from pipelines.workflows import build_workflow
from tests.contracts.manifests import NODES, Manifest, build, group_named, only, quantity

GIB = 2**30
OBJECT_STORE = 0.3, 200e9  # Ray's share of a pod's memory, and the most of it in bytes
DAEMONS = 2  # CPUs of the pods that stand on every node


class Machine(NamedTuple):
    """A type of node as its cloud describes it; `disk`: where the kubelet has its pods' files, as README.md says."""

    type: str
    block: str  # label that nodes of one fast network share
    cpus: int
    memory: float  # bytes
    disk: float  # bytes
    fabric: dict[str, str]


AWS, GOOGLE, AZURE = (
    "topology.k8s.aws/network-node-layer-2",
    "cloud.google.com/gce-topology-block",
    "kubernetes.azure.com/agentpool",
)
INFINIBAND = {"rdma/ib": "8"}
MACHINES = {
    # docs.aws.amazon.com/ec2/latest/instancetypes/ac.html; eks/latest/userguide/ml-workload-topology.html
    "aws-a100": Machine("p4de.24xlarge", AWS, 96, 1152 * GIB, 8e12, {"vpc.amazonaws.com/efa": "4"}),
    "aws-h100": Machine("p5.48xlarge", AWS, 192, 2048 * GIB, 30.4e12, {"vpc.amazonaws.com/efa": "32"}),
    # learn.microsoft.com/azure/virtual-machines/sizes/gpu-accelerated/nd-family; azure.github.io/aks-rdma-infiniband
    "azure-a100": Machine("Standard_ND96amsr_A100_v4", AZURE, 96, 1800 * GIB, 2900 * GIB, INFINIBAND),
    "azure-h100": Machine("Standard_ND96isr_H100_v5", AZURE, 96, 1900 * GIB, 1000 * GIB, INFINIBAND),
    # cloud.google.com/compute/docs/gpus; cloud.google.com/ai-hypercomputer/docs/workloads/schedule-gke-workloads-tas
    "gcp-a100": Machine("a2-ultragpu-8g", GOOGLE, 96, 1360e9, 8 * 375e9, {}),
    "gcp-h100": Machine("a3-highgpu-8g", GOOGLE, 208, 1872e9, 16 * 375e9, {}),
}


def machine_of(folder: str) -> Machine:
    return MACHINES[Path(folder).name]


def container_of(folder: Path) -> dict[str, Any]:
    (container,) = group_named("gpu", build(folder))["template"]["spec"]["containers"]
    return container


def allocatable(machine: Machine) -> tuple[float, float]:
    """CPUs and bytes that a node leaves to pods, by the largest reserve of the three clouds (GKE's).
    Karpenter takes 7.5 % of the memory off before (`vmMemoryOverheadPercent`), the kubelet 100 MiB after."""
    cpus = machine.cpus - 0.06 - 0.01 - 2 * 0.005 - 0.0025 * (machine.cpus - 4)
    memory = 0.925 * machine.memory
    steps = [(4, 0.25), (4, 0.2), (8, 0.1), (112, 0.06)]
    reserved = sum(size * share for size, share in steps) * GIB + 0.02 * (memory - 128 * GIB)
    return cpus, memory - reserved - 100 * 2**20


def test_every_overlay_of_a_node_has_its_machine() -> None:
    assert {Path(folder).name for folder in NODES} == MACHINES.keys()


@pytest.mark.parametrize("folder", NODES)
def test_a_pod_takes_all_gpus_of_its_node_and_no_more_of_the_rest_than_the_node_has(
    repository: Path, folder: str
) -> None:
    machine, resources = machine_of(folder), container_of(repository / folder)["resources"]
    asked = {name: quantity(amount) for name, amount in resources["requests"].items()}
    cpus, memory = allocatable(machine)
    assert asked["nvidia.com/gpu"] == 8
    assert 0.9 * machine.cpus < asked["cpu"] <= cpus - DAEMONS
    assert 0.8 * machine.memory < asked["memory"] + asked.get("hugepages-2Mi", 0) <= memory
    assert 0 < asked["ephemeral-storage"] <= 0.8 * machine.disk
    assert resources["limits"] == {name: amount for name, amount in resources["requests"].items() if name != "cpu"}
    assert resources["limits"].items() >= machine.fabric.items()


@pytest.mark.parametrize("folder", NODES)
def test_a_pod_is_else_what_it_is_with_one_gpu(repository: Path, folder: str) -> None:
    cloud = Path(folder).name.partition("-")[0]
    whole, one = container_of(repository / folder), container_of(repository / f"infra/kuberay/overlays/{cloud}")
    own = ("resources", "volumeMounts", "envFrom", "securityContext")
    assert {name: value for name, value in whole.items() if name not in own} == {
        name: value for name, value in one.items() if name not in own
    }


@pytest.mark.parametrize("folder", NODES)
def test_gpu_pods_stand_on_their_type_of_node_in_one_block_and_nobody_else_waits_for_it(
    repository: Path, folder: str
) -> None:
    (spec,) = [m["spec"]["rayClusterSpec"] for m in build(repository / folder) if m["kind"] == "RayJob"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        kueue = {
            key: value for key, value in group["template"]["metadata"]["annotations"].items() if key.startswith("kueue")
        }
        if group.get("groupName") == "gpu":
            assert group["template"]["spec"]["nodeSelector"] == {
                "node.kubernetes.io/instance-type": machine_of(folder).type
            }
            assert kueue == {"kueue.x-k8s.io/podset-required-topology": machine_of(folder).block}
        else:
            assert "nodeSelector" not in group["template"]["spec"]
            assert kueue == {}


@pytest.mark.parametrize("folder", NODES)
def test_shared_memory_holds_ray_s_object_store_and_files_lie_on_the_disk_of_the_node(
    repository: Path, folder: str
) -> None:
    pod = group_named("gpu", build(repository / folder))["template"]["spec"]
    volumes = {volume["name"]: volume["emptyDir"] for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts == {"/dev/shm": {"medium": "Memory", "sizeLimit": "256Gi"}, "/tmp": {}}
    memory = quantity(pod["containers"][0]["resources"]["limits"]["memory"])
    share, most = OBJECT_STORE
    assert min(share * memory, most) < quantity(mounts["/dev/shm"]["sizeLimit"]) < memory / 2


@pytest.mark.parametrize("folder", [folder for folder in NODES if machine_of(folder).fabric])
def test_a_fabric_comes_with_what_nccl_is_told(repository: Path, folder: str) -> None:
    manifests, container = build(repository / folder), container_of(repository / folder)
    read = [source["configMapRef"]["name"] for source in container["envFrom"] if "configMapRef" in source]
    assert read == ["cascade-settings", "cascade-network"]
    network = only(manifests, "ConfigMap", "cascade-network")
    assert network["metadata"]["namespace"] == "image-cascade"
    told = {"FI_PROVIDER": "efa", "NCCL_DEBUG": "INFO"} if "aws" in folder else {"NCCL_NET": "IB"}
    assert network["data"].items() >= (told | {"NCCL_SOCKET_IFNAME": "eth0"}).items()
    assert ("hugepages-2Mi" in container["resources"]["requests"]) == ("aws" in folder)


@pytest.mark.parametrize("folder", NODES)
def test_memory_is_locked_by_rdma_alone_and_only_there_the_namespace_lets_it(repository: Path, folder: str) -> None:
    locks = "IPC_LOCK" in container_of(repository / folder)["securityContext"]["capabilities"].get("add", [])
    namespace: Manifest = only(build(repository / folder), "Namespace", "image-cascade")
    level = namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
    assert (locks, level) == ((True, "privileged") if "azure" in folder else (False, "restricted"))


@pytest.mark.parametrize("pods", [1, 8])
def test_a_training_has_a_worker_on_each_gpu_of_every_pod_and_their_cpus_fit_beside_readers(
    repository: Path, pods: int
) -> None:
    cpus = int(container_of(repository / "infra/kuberay/overlays/aws-a100")["resources"]["requests"]["cpu"])
    cluster = Cluster(cpus=pods * cpus, gpus=8 * pods, cpus_per_gpu=cpus / 8, nodes=pods)
    workflow = build_workflow(RECIPES["adm_imagenet_256"]())
    base = share_cluster(workflow, load_profile("kuberay"), cluster, running=["base"])["base"]
    assert (base.num_workers, base.gpus_per_worker, base.cpus_per_worker) == (8 * pods, 1, 4)
    assert 8 * base.cpus_per_worker <= cpus
