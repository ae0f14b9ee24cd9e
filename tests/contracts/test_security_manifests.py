"""What a pod may do, whom it may reach and whose identity it has: as little as its work needs."""

import re
import shutil
from pathlib import Path
from typing import Any

import mlflow.environment_variables
import pytest

from tests.contracts.manifests import (
    CLOUDS,
    KUSTOMIZATIONS,
    Manifest,
    build,
    cluster_specs,
    only,
    pod_templates,
    selects,
)

# kubernetes.io/docs/concepts/security/pod-security-standards, the level `restricted`
VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
OF_HOST = ("hostNetwork", "hostPID", "hostIPC")
EVERYWHERE = {"0.0.0.0/0": {"169.254.169.254/32"}, "::/0": {"fd00:ec2::254/128", "fd20:ce::254/128"}}  # but metadata
OFF = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": False,
    "MLFLOW_ENABLE_AI_GATEWAY": False,
    "MLFLOW_ENABLE_REMOTE_ASSISTANT": False,
    "MLFLOW_ENABLE_ASSISTANT_SANDBOX": True,  # in a Docker that is not there
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": False,
}


def beyond_restricted(pod: Manifest) -> list[str]:
    """What the level `restricted` refuses of a pod's specification."""
    own = pod.get("securityContext", {})
    found = [field for field in OF_HOST if pod.get(field)]
    found += [f"volume {name}" for volume in pod.get("volumes", []) for name in volume.keys() - {"name"} - VOLUMES]
    for container in [*pod["containers"], *pod.get("initContainers", [])]:
        context = own | container.get("securityContext", {})
        capabilities = context.get("capabilities", {})
        wrong = {
            "privileged": bool(context.get("privileged")),
            "allowPrivilegeEscalation": context.get("allowPrivilegeEscalation") is not False,
            "runAsNonRoot": context.get("runAsNonRoot") is not True,
            "runAsUser": context.get("runAsUser") == 0,
            "seccompProfile": context.get("seccompProfile", {}).get("type") != "RuntimeDefault",
            "drop": capabilities.get("drop") != ["ALL"],
            "add": not set(capabilities.get("add", [])) <= {"NET_BIND_SERVICE"},
            "hostPort": any("hostPort" in port for port in container.get("ports", [])),
        }
        found += [f"{container['name']}: {name}" for name, is_wrong in wrong.items() if is_wrong]
    return found


@pytest.mark.parametrize("folder", KUSTOMIZATIONS)
def test_every_pod_is_one_that_its_namespace_admits(repository: Path, folder: str) -> None:
    """A namespace of `privileged` lets nothing in but the capability to lock memory."""
    manifests = build(repository / folder)
    levels = [
        m["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] for m in manifests if m["kind"] == "Namespace"
    ]
    refused = [each for template in pod_templates(manifests) for each in beyond_restricted(template["spec"])]
    assert refused == (["ray-worker: add"] if levels == ["privileged"] else [])
    assert set(levels) <= {"restricted", "privileged"}


@pytest.mark.parametrize("folder", KUSTOMIZATIONS)
def test_no_container_writes_to_its_image_and_what_is_written_lies_on_a_volume(repository: Path, folder: str) -> None:
    manifests = build(repository / folder)
    for template in pod_templates(manifests):
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        for container in template["spec"]["containers"]:
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
            assert mounts["/tmp"].get("emptyDir") == {}
    for spec in cluster_specs(manifests):
        sidecar = spec.get("autoscalerOptions", {"securityContext": {"readOnlyRootFilesystem": True}})
        assert sidecar["securityContext"]["readOnlyRootFilesystem"] is True
        assert only(manifests, "ConfigMap", "cascade-settings")["data"]["HOME"] == "/tmp"


@pytest.mark.parametrize("folder", KUSTOMIZATIONS)
def test_peers_of_other_namespaces_are_named_and_who_goes_out_goes_by_both_protocols(
    repository: Path, folder: str
) -> None:
    policies = [m["spec"] for m in build(repository / folder) if m["kind"] == "NetworkPolicy"]
    rules = [(rule, side) for spec in policies for side in ("ingress", "egress") for rule in spec.get(side, [])]
    for rule, side in rules:
        peers = rule["from" if side == "ingress" else "to"]
        assert all(peer.get("namespaceSelector") != {} for peer in peers)
        blocks = {
            peer["ipBlock"]["cidr"]: set(peer["ipBlock"].get("except", [])) for peer in peers if "ipBlock" in peer
        }
        wide = {cidr: closed for cidr, closed in blocks.items() if cidr.endswith("/0")}
        assert wide in ({}, EVERYWHERE)


def egress_of(manifests: list[Manifest], labels: dict[str, str]) -> list[dict[str, Any]]:
    policies = [m["spec"] for m in manifests if m["kind"] == "NetworkPolicy"]
    chosen = [spec for spec in policies if selects(spec["podSelector"], labels)]
    return [peer for spec in chosen for rule in spec.get("egress", []) for peer in rule["to"]]


@pytest.mark.parametrize("cloud", CLOUDS)
def test_pods_that_decode_what_clients_send_have_no_key_of_the_storage_and_no_way_to_it(
    repository: Path, tmp_path: Path, cloud: str
) -> None:
    """The overlay of the service on a cloud, as the README says to make it."""
    shutil.copytree(repository / "infra/kuberay", tmp_path / "kuberay")
    place = tmp_path / "kuberay/overlays/service"
    text = (place / "kustomization.yaml").read_text()
    (place / "kustomization.yaml").write_text(text.replace("  - ../../base\n", f"  - ../{cloud}\n"))
    manifests = build(place)
    assert "annotations" not in only(manifests, "ServiceAccount", "cascade-serving")["metadata"]
    assert only(manifests, "ServiceAccount", "cascade")["metadata"]["annotations"]
    (spec,) = cluster_specs(manifests)
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["serviceAccountName"] == "cascade-serving"
        read = [source.get("secretRef", {}).get("name") for source in pod["containers"][0]["envFrom"]]
        assert [name for name in read if name] == ["cascade-serving-credentials"]
    (worker,) = spec["workerGroupSpecs"]
    assert worker["template"]["spec"]["automountServiceAccountToken"] is False
    labels = worker["template"]["metadata"]["labels"] | {"ray.io/node-type": "worker"}  # KubeRay adds the last
    outside = [peer["ipBlock"]["cidr"] for peer in egress_of(manifests, labels) if "ipBlock" in peer]
    assert outside == ["169.254.20.10/32"]  # names


def test_trainings_reach_the_storage(repository: Path) -> None:
    manifests = build(repository / "infra/kuberay/base")
    (spec,) = cluster_specs(manifests)
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        peers = egress_of(manifests, group["template"]["metadata"]["labels"])
        assert {peer["ipBlock"]["cidr"] for peer in peers if "ipBlock" in peer} >= EVERYWHERE.keys()


def test_mlflow_runs_no_code_and_asks_no_service_for_its_clients(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By MLflow's own reading of the settings: one that it no longer knows is an error here."""
    told = only(build(repository / "infra/mlflow/base"), "ConfigMap", "mlflow-settings")["data"]
    for name, value in OFF.items():
        monkeypatch.setenv(name, told[name])
        assert getattr(mlflow.environment_variables, name).get() is value


@pytest.mark.parametrize("image", ["image", "mlflow"])
def test_the_user_of_an_image_owns_no_code_in_it(repository: Path, image: str) -> None:
    steps = re.findall(
        r"^(USER|COPY|RUN) (.*)$", (repository / "infra" / image / "Dockerfile").read_text(), re.MULTILINE
    )
    users = [value for step, value in steps if step == "USER"]
    assert users[-1] not in ("root", "0")
    last = max(number for number, (step, _) in enumerate(steps) if step == "USER")
    assert {step for step, _ in steps[last:]} == {"USER"}, "made by the user, who can change it"
    assert users[:-1] == (["root"] if image == "image" else [])  # python:3.11-slim begins as root
    assert not [value for _, value in steps if "--chown" in value]
