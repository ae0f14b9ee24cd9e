"""Jobs that wait for room for all of their pods: Kueue's rules, admission by the sample queue, Volcano's labels.

Kueue's rules are those of 0.19 (kubernetes-sigs/kueue, `pkg/controller`), each by the file that states it.
"""

import copy
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.contracts.manifests import (
    CLOUDS,
    NODES,
    Manifest,
    composed,
    custom_schemas,
    quantity,
    ray_resources,
)

JOBS = ["infra/kuberay/base", *(f"infra/kuberay/overlays/{cloud}" for cloud in CLOUDS), *NODES]
KUEUE, ELASTIC = "kueue.x-k8s.io/", "kueue.x-k8s.io/elastic-job"
REQUESTS = [f"{KUEUE}podset-{kind}-topology" for kind in ("required", "preferred", "unconstrained")]
NAME = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")  # of an object, RFC 1123
LABEL = re.compile(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-\w.]*[A-Za-z0-9])?")
POD_SETS = 18  # jobframework/constants.go MaxPodSets


def cluster(job: Manifest) -> dict[str, Any]:
    return job["spec"].get("rayClusterSpec", {})


def groups(job: Manifest) -> dict[str, Manifest]:
    """Pod templates by the name that Kueue gives their set (raycluster/common.go BuildPodSets), with their counts."""
    head = {"template": cluster(job)["headGroupSpec"]["template"], "replicas": 1}
    submitter = {"template": job["spec"]["submitterPodTemplate"], "replicas": 1}
    return {"head": head} | {g["groupName"]: g for g in cluster(job)["workerGroupSpecs"]} | {"submitter": submitter}


def topologies(group: Manifest) -> dict[str, str]:
    annotations = group["template"]["metadata"].get("annotations", {})
    return {key: value for key, value in annotations.items() if key in REQUESTS}


def is_elastic(job: Manifest) -> bool:
    return job["metadata"].get("annotations", {}).get(ELASTIC) == "true"


def has_a_queue(job: Manifest) -> bool:
    """jobframework/validation.go ValidateQueueName: the name of an object. Without one Kueue lets the job run."""
    return bool(NAME.fullmatch(job["metadata"]["labels"].get(f"{KUEUE}queue-name", "")))


def has_its_own_cluster(job: Manifest) -> bool:
    """rayjob_webhook.go validateCreate: a job on a cluster that exists is not managed, or refused."""
    return not job["spec"].get("clusterSelector") and bool(cluster(job))


def deletes_its_cluster(job: Manifest) -> bool:
    """rayjob_webhook.go validateCreate: or it would go on holding the queue's resources."""
    return job["spec"].get("shutdownAfterJobFinishes") is True


def is_fixed_or_elastic(job: Manifest) -> bool:
    """raycluster/common.go ValidateCreate: the autoscaler only with the annotation (gate on since 0.18)."""
    return is_elastic(job) or not cluster(job).get("enableInTreeAutoscaling")


def has_few_pod_sets(job: Manifest) -> bool:
    """raycluster/common.go ValidateCreate: the head and the groups are a pod set each."""
    return len(cluster(job)["workerGroupSpecs"]) + 1 <= POD_SETS


def has_no_group_called_head(job: Manifest) -> bool:
    """raycluster/common.go ValidateCreate: the name is that of the head's pod set."""
    return "head" not in [group["groupName"] for group in cluster(job)["workerGroupSpecs"]]


def has_one_topology_request_a_group(job: Manifest) -> bool:
    """jobframework/tas_validation.go ValidateTASPodSetRequest: at most one annotation, a label's name."""
    found = [topologies(group) for group in groups(job).values()]
    return all(len(each) <= 1 and all(map(LABEL.fullmatch, each.values())) for each in found)


def is_placed_or_elastic(job: Manifest) -> bool:
    """concepts/elastic_workload.md: no topology for elastic jobs (an alpha gate of its own, off)."""
    return not is_elastic(job) or not any(topologies(group) for group in groups(job).values())


def is_sized_without_an_autoscaler(job: Manifest) -> bool:
    """KubeRay, utils/validation.go ValidateRayClusterSpec: both bounds; what is asked for lies within."""
    bounds = [(g.get("minReplicas"), g["replicas"], g.get("maxReplicas")) for g in cluster(job)["workerGroupSpecs"]]
    return all(None not in each and list(each) == sorted(each) for each in bounds)


GROUP = ("spec", "rayClusterSpec", "workerGroupSpecs", 0)
RULES: dict[Callable[[Manifest], bool], tuple[tuple[str | int, ...], Any]] = {  # rule -> a field and what breaks it
    has_a_queue: (("metadata", "labels", f"{KUEUE}queue-name"), "Cascade_Queue"),
    has_its_own_cluster: (("spec", "clusterSelector"), {"ray.io/cluster": "cascade"}),
    deletes_its_cluster: (("spec", "shutdownAfterJobFinishes"), False),
    is_fixed_or_elastic: (("spec", "rayClusterSpec", "enableInTreeAutoscaling"), True),
    has_few_pod_sets: (GROUP[:-1], [{"groupName": str(number)} for number in range(POD_SETS)]),
    has_no_group_called_head: ((*GROUP, "groupName"), "head"),
    has_one_topology_request_a_group: ((*GROUP, "template", "metadata", "annotations"), dict.fromkeys(REQUESTS, "a/b")),
    is_placed_or_elastic: (("metadata", "annotations"), {ELASTIC: "true"}),
    is_sized_without_an_autoscaler: ((*GROUP, "maxReplicas"), 0),
}


@pytest.fixture
def job(repository: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Manifest:
    (found,) = ray_resources(composed(repository, tmp_path, *request.param))
    return found


def queued(folders: list[str], component: str = "kueue") -> pytest.MarkDecorator:
    return pytest.mark.parametrize("job", [(f, component) for f in folders], indirect=True, ids=folders)


@queued(JOBS)
def test_a_queued_job_is_valid_and_keeps_every_rule_of_kueue_s_webhook(job: Manifest) -> None:
    custom_schemas()["RayJob"].validate(job)
    assert [rule.__name__ for rule in RULES if not rule(job)] == []


@queued(NODES[:1])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_job_that_breaks_a_rule_is_found_out(job: Manifest, rule: Callable[[Manifest], bool]) -> None:
    (*path, field), value = RULES[rule]
    broken = copy.deepcopy(job)
    parent: Any = broken
    for key in path:
        parent = parent[key]
    parent[field] = value
    assert rule(job)
    assert not rule(broken)


@pytest.fixture
def queues(repository: Path) -> dict[str, dict[str, Manifest]]:
    """Objects of the sample by kind and name."""
    found: dict[str, dict[str, Manifest]] = {}
    for manifest in yaml.safe_load_all((repository / "infra/kuberay/queues.yaml").read_text()):
        custom_schemas()[manifest["kind"]].validate(manifest)
        found.setdefault(manifest["kind"], {})[manifest["metadata"]["name"]] = manifest
    return found


def fits(group: Manifest, flavor: Manifest, levels: list[str]) -> bool:
    """Whether Kueue may put a pod set on a flavor, for labels and topology (flavorassigner.go)."""
    spec, pod, wanted = flavor["spec"], group["template"]["spec"], topologies(group).values()
    labels, selector = spec.get("nodeLabels", {}), pod.get("nodeSelector", {})
    return (
        all(labels[key] == selector[key] for key in labels.keys() & selector.keys())
        and bool(wanted) == ("topologyName" in spec)
        and all(label in levels for label in wanted)
    )


def admission(job: Manifest, queues: dict[str, dict[str, Manifest]]) -> dict[str, str | None]:
    """Pod set -> the first flavor that fits and has room; None: the job waits."""
    (resource_group,) = queues["ClusterQueue"]["cascade"]["spec"]["resourceGroups"]
    used: Counter[tuple[str, str]] = Counter()
    found: dict[str, str | None] = {}
    for name, group in groups(job).items():
        asked: Counter[str] = Counter()
        for container in group["template"]["spec"]["containers"]:
            for kind, amount in (container["resources"]["limits"] | container["resources"]["requests"]).items():
                asked[kind] += group["replicas"] * quantity(amount)
        found[name] = None
        for flavor in resource_group["flavors"]:
            manifest = queues["ResourceFlavor"][flavor["name"]]
            topology = queues["Topology"].get(manifest.setdefault("spec", {}).get("topologyName"))
            levels = [level["nodeLabel"] for level in topology["spec"]["levels"]] if topology else []
            quota = {each["name"]: quantity(each["nominalQuota"]) for each in flavor["resources"]}
            has_room = all(used[flavor["name"], kind] + asked[kind] <= quota.get(kind, -1) for kind in asked)
            if fits(group, manifest, levels) and has_room:
                found[name] = flavor["name"]
                used.update({(flavor["name"], kind): amount for kind, amount in asked.items()})
                break
    return found


AWS_H100 = "infra/kuberay/overlays/aws-h100"
ADMITTED = {"head": "general", "gpu": "h100", "cpu": "general", "submitter": "general"}


@queued([AWS_H100])
def test_the_sample_queue_admits_as_many_nodes_as_it_has_and_only_with_all_that_a_pod_asks_for(
    job: Manifest, queues: dict[str, dict[str, Manifest]]
) -> None:
    gpu = groups(job)["gpu"]
    for nodes, flavor in ((gpu["maxReplicas"] + 1, None), (gpu["maxReplicas"], "h100"), (1, "h100")):
        gpu["replicas"] = nodes
        assert admission(job, queues) == ADMITTED | {"gpu": flavor}
    gpu["template"]["spec"]["containers"][0]["resources"]["requests"]["rdma/ib"] = "8"
    assert admission(job, queues) == ADMITTED | {"gpu": None}


@queued([AWS_H100])
def test_the_sample_queue_takes_the_job_by_its_labels_and_keeps_the_rules_of_its_own_objects(
    job: Manifest, queues: dict[str, dict[str, Manifest]]
) -> None:
    labels, spec = job["metadata"]["labels"], queues["ClusterQueue"]["cascade"]["spec"]
    local = queues["LocalQueue"][labels[f"{KUEUE}queue-name"]]
    assert local["metadata"]["namespace"] == job["metadata"]["namespace"]
    assert local["spec"]["clusterQueue"] in queues["ClusterQueue"]
    assert spec["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"] == job["metadata"]["namespace"]
    assert labels[f"{KUEUE}priority-class"] in queues["WorkloadPriorityClass"]
    for group in spec["resourceGroups"]:  # the rules of the definitions that only an API server evaluates
        assert all([r["name"] for r in f["resources"]] == group["coveredResources"] for f in group["flavors"])
    for topology in queues["Topology"].values():
        levels = [level["nodeLabel"] for level in topology["spec"]["levels"]]
        assert len(set(levels)) == len(levels)
        assert levels.index("kubernetes.io/hostname") == len(levels) - 1  # taints are respected only then
    for flavor in queues["ResourceFlavor"].values():
        assert "topologyName" not in flavor.get("spec", {}) or flavor["spec"]["nodeLabels"]


@queued(JOBS, "volcano")
def test_volcano_s_group_holds_all_that_the_job_starts_with(job: Manifest) -> None:
    """KubeRay, batchscheduler/volcano: labels that become the PodGroup's, and the least of each group as its size."""
    custom_schemas()["RayJob"].validate(job)
    labels = {key for key in job["metadata"]["labels"] if key.startswith(("volcano.sh/", "ray.io/"))}
    assert labels == {"volcano.sh/queue-name", "ray.io/priority-class-name"}
    assert has_its_own_cluster(job)
    assert all(group["minReplicas"] == group["replicas"] > 0 for group in cluster(job)["workerGroupSpecs"])
