"""What `kubectl apply -k` would send is what Kubernetes, KubeRay and the operators of routes and monitors accept, field
by field."""

import pathlib

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.contracts.manifests import (
    CLOUDS,
    COMPONENTS,
    KUBERAY,
    KUSTOMIZATIONS,
    NODES,
    PARTS,
    build,
    cluster_specs,
    custom_schemas,
    group_named,
    only,
    pod_templates,
    port_sources,
    quantity,
    ray_resources,
)


def test_every_kustomization_of_the_repository_is_tested(repository):
    found = [path.parent.relative_to(repository).as_posix() for path in repository.glob("infra/**/kustomization.yaml")]
    assert sorted(found) == sorted([*COMPONENTS, *KUSTOMIZATIONS])


def test_every_component_is_part_of_an_overlay_but_for_those_of_schedulers(repository):
    texts = [(repository / folder / "kustomization.yaml").read_text() for folder in KUBERAY]
    parts = {pathlib.Path(part).name for text in texts for part in yaml.safe_load(text).get("components", [])}
    assert parts == set(PARTS)


def validate(manifest):
    """By the schema of its operator, or else by Kubernetes' own."""
    if manifest["kind"] in custom_schemas():
        custom_schemas()[manifest["kind"]].validate(manifest)
    else:
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("folder", KUSTOMIZATIONS)
def test_core_objects_are_valid_kubernetes_without_unknown_fields(repository, folder):
    core = [manifest for manifest in build(repository / folder) if manifest["kind"] not in custom_schemas()]
    assert core
    for manifest in core:
        validate(manifest)


@pytest.mark.parametrize("folder", KUBERAY)
def test_ray_objects_are_valid_kuberay_without_unknown_fields(repository, folder):
    (manifest,) = ray_resources(build(repository / folder))
    validate(manifest)


JOB = ("infra/kuberay/base", "RayJob")


@pytest.mark.parametrize(
    ("folder", "kind", "path"),
    [
        (*JOB, ["spec", "shutdownAfterJobFinish"]),
        (*JOB, ["spec", "rayClusterSpec", "enableInTreeAutoscalling"]),
        (*JOB, ["spec", "rayClusterSpec", "workerGroupSpecs", 0, "maxReplica"]),
        (*JOB, ["spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "containers", 0, "envfrom"]),
        ("infra/monitoring", "PodMonitor", ["spec", "podMetricsEndpoints", 0, "prot"]),
        ("infra/kuberay/overlays/service-gateway", "HTTPRoute", ["spec", "rules", 0, "timeout"]),
        ("infra/mlflow/base", "Deployment", ["spec", "replica"]),
    ],
    ids=lambda value: str(value[-1]) if isinstance(value, list) else "",
)
def test_an_object_is_valid_and_a_misspelt_field_of_it_is_refused(repository, folder, kind, path):
    (manifest,) = [m for m in build(repository / folder) if m["kind"] == kind]
    validate(manifest)
    parent = manifest
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = {}
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError), match=path[-1]):
        validate(manifest)


@pytest.mark.parametrize("folder", KUBERAY)
def test_clusters_authenticate_by_token_and_the_head_is_given_no_work_and_never_stands_on_a_spot_node(
    repository, folder
):
    for spec in cluster_specs(build(repository / folder)):
        assert spec["authOptions"] == {"mode": "token"}
        head = spec["headGroupSpec"]
        assert head["rayStartParams"]["num-cpus"] == "0"
        affinity = head["template"]["spec"]["affinity"]["nodeAffinity"]
        (term,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
        assert {rule["operator"] for rule in term["matchExpressions"]} == {"NotIn"}


def test_the_job_runs_the_bare_command_and_is_taken_up_again_by_a_new_cluster(repository):
    (job,) = ray_resources(build(repository / "infra/kuberay/base"))
    assert job["spec"]["entrypoint"] == "python pipelines/full_cascade.py"
    assert job["spec"]["submissionMode"] == "K8sJobMode"
    assert job["spec"]["backoffLimit"] > 0
    assert job["spec"]["shutdownAfterJobFinishes"]


def test_the_long_lived_cluster_is_the_cluster_of_the_job(repository):
    (job,) = ray_resources(build(repository / "infra/kuberay/base"))
    (cluster,) = ray_resources(build(repository / "infra/kuberay/overlays/raycluster"))
    assert cluster["kind"] == "RayCluster"
    assert cluster["spec"] == job["spec"]["rayClusterSpec"]


def test_gpu_workers_ask_for_a_gpu_tolerate_its_taint_and_come_by_the_autoscaler(repository):
    (spec,) = cluster_specs(build(repository / "infra/kuberay/base"))
    gpu = group_named("gpu", build(repository / "infra/kuberay/base"))
    (container,) = gpu["template"]["spec"]["containers"]
    assert spec["enableInTreeAutoscaling"]
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert 0 < gpu["minReplicas"] < gpu["maxReplicas"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" in [toleration["key"] for toleration in gpu["template"]["spec"]["tolerations"]]


@pytest.mark.parametrize("folder", KUBERAY)
def test_prometheus_finds_and_reaches_the_metrics_of_every_pod(repository, folder):
    monitoring = build(repository / "infra/monitoring")
    monitor = only(monitoring, "PodMonitor", "ray")["spec"]
    (endpoint,) = monitor["podMetricsEndpoints"]
    for spec in cluster_specs(build(repository / folder)):
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            labels = {**group["template"]["metadata"]["labels"], "ray.io/is-ray-node": "yes"}  # KubeRay adds the last
            assert monitor["selector"]["matchLabels"].items() <= labels.items()
            (container,) = group["template"]["spec"]["containers"]
            ports = {port["name"]: port["containerPort"] for port in container["ports"]}
            assert port_sources(monitoring, labels, ports[endpoint["port"]])


@pytest.mark.parametrize("folder", KUSTOMIZATIONS)
def test_every_pod_is_sized_and_covered_by_a_network_policy(repository, folder):
    manifests = build(repository / folder)
    assert "Secret" not in {manifest["kind"] for manifest in manifests}
    policies = [m["spec"]["podSelector"].get("matchLabels") for m in manifests if m["kind"] == "NetworkPolicy"]
    for template in pod_templates(manifests):
        labels = template["metadata"]["labels"].items()
        assert any(selected and selected.items() <= labels for selected in policies)
        for container in template["spec"]["containers"]:
            assert container["resources"]["requests"].keys() >= {"cpu", "memory"}
            assert all("valueFrom" in variable for variable in container.get("env", []))


IDENTITIES = {  # cloud -> annotation of the service account, address on the node where keys are handed out
    "aws": ("eks.amazonaws.com/role-arn", "169.254.170.23/32"),  # of EKS Pod Identity; IRSA and Azure ask on port 443
    "azure": ("azure.workload.identity/client-id", None),
    "gcp": ("iam.gke.io/gcp-service-account", "169.254.169.252/32"),
}


@pytest.mark.parametrize("folder", [*(f"infra/kuberay/overlays/{cloud}" for cloud in CLOUDS), *NODES])
def test_every_pod_has_its_cloud_s_identity_and_reaches_what_hands_out_its_keys(repository, folder):
    manifests, cloud = build(repository / folder), pathlib.Path(folder).name.partition("-")[0]
    annotation, address = IDENTITIES[cloud]
    assert only(manifests, "ServiceAccount", "cascade")["metadata"]["annotations"][annotation]
    policies = [m["spec"] for m in manifests if m["kind"] == "NetworkPolicy"]
    rules = [rule for spec in policies for rule in spec.get("egress", [])]
    blocks = {peer["ipBlock"]["cidr"] for rule in rules for peer in rule["to"] if "ipBlock" in peer}
    assert address is None or address in blocks
    (spec,) = cluster_specs(manifests)
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert group["template"]["spec"]["serviceAccountName"] == "cascade"
        labels = group["template"]["metadata"]["labels"]
        assert labels.get("azure.workload.identity/use") == ("true" if cloud == "azure" else None)


@pytest.mark.parametrize("folder", sorted(set(KUBERAY) - {"infra/kuberay/overlays/dev"}))
def test_every_pod_of_ray_says_how_much_disk_it_takes_and_is_stopped_beyond(repository, folder):
    for template in pod_templates(build(repository / folder)):
        for container in template["spec"]["containers"]:
            asked, most = (container["resources"][kind]["ephemeral-storage"] for kind in ("requests", "limits"))
            assert 0 < quantity(asked) <= quantity(most)


def test_the_namespace_denies_all_traffic_that_no_policy_names(repository):
    policies = [m for m in build(repository / "infra/kuberay/base") if m["kind"] == "NetworkPolicy"]
    (deny,) = [policy["spec"] for policy in policies if not policy["spec"]["podSelector"]]
    assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


def test_mlflow_answers_to_the_name_that_the_cascade_calls(repository):
    settings = {
        m["metadata"]["name"]: m["data"]
        for folder in ("infra/kuberay/base", "infra/mlflow/base")
        for m in build(repository / folder)
        if m["kind"] == "ConfigMap"
    }
    assert settings["cascade-settings"]["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    assert "mlflow:*" in settings["mlflow-settings"]["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    assert settings["mlflow-settings"]["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"
