"""The service on KubeRay: it reads what it is told, what must reach it does, and what goes is replaced first."""

import re
from pathlib import Path
from typing import Any

import pydantic
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from components.serving.deployment import APPLICATION
from components.serving.keys import KEYS_FILE
from components.serving.settings import ServiceSettings
from pipelines.command.serve import SERVING
from pipelines.command.serve import build as build_service
from tests.contracts.manifests import Manifest, build, cluster_specs, only, port_sources, ray_resources

SERVICE = "infra/kuberay/overlays/service"
GATEWAYS = [f"{SERVICE}-gateway", f"{SERVICE}-ingress"]
OPERATOR = {"app.kubernetes.io/name": "kuberay-operator"}
NAMESPACE = {"matchLabels": {"kubernetes.io/metadata.name": "kuberay-system"}}


@pytest.fixture
def manifests(repository: Path) -> list[Manifest]:
    return build(repository / SERVICE)


@pytest.fixture
def service(manifests: list[Manifest]) -> Manifest:
    (found,) = ray_resources(manifests)
    assert found["kind"] == "RayService"
    return found


@pytest.fixture
def config(service: Manifest) -> dict[str, Any]:
    return yaml.safe_load(service["spec"]["serveConfigV2"])


@pytest.fixture
def settings(config: dict[str, Any]) -> ServiceSettings:
    (application,) = config["applications"]
    return ServiceSettings.model_validate(application["args"])


def pods(service: Manifest) -> list[Manifest]:
    """Templates of the head and of each group."""
    cluster = service["spec"]["rayClusterConfig"]
    return [cluster["headGroupSpec"]["template"], *[group["template"] for group in cluster["workerGroupSpecs"]]]


def test_the_serve_config_is_one_that_ray_reads(config):
    read = ServeDeploySchema.model_validate(config)
    assert config.keys() <= ServeDeploySchema.model_fields.keys()
    assert config["http_options"].keys() <= type(read.http_options).model_fields.keys()
    (application,) = read.applications
    assert config["applications"][0].keys() <= type(application).model_fields.keys()
    assert application.import_path == f"image_cascade.{build_service.__module__}:{build_service.__name__}"
    assert (application.name, application.route_prefix) == (APPLICATION, "/")


def test_what_the_service_is_told_are_its_settings_and_nothing_else(config, settings):
    assert settings.keys_required
    args = config["applications"][0]["args"]
    with pytest.raises(pydantic.ValidationError, match="key_required"):
        ServiceSettings.model_validate({**args, "key_required": True})


def test_models_come_by_an_alias_from_the_registry_that_the_trainings_write(manifests, settings):
    assert settings.tracking == only(manifests, "ConfigMap", "cascade-settings")["data"]["MLFLOW_TRACKING_URI"]
    assert all(re.fullmatch(r"models:/image-cascade-\w+@champion", model.source) for model in settings.models)


def test_every_pod_has_the_keys_from_the_secret_and_the_variables_that_the_command_sets(repository, manifests, service):
    readme = (repository / "infra/kuberay/README.md").read_text()
    callback = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
    installed = SERVING | {callback: f"image_cascade.{SERVING[callback]}"}
    data = only(manifests, "ConfigMap", "cascade-serving")["data"]
    folder, _, file = data.pop(KEYS_FILE).rpartition("/")
    assert data == installed
    for template in pods(service):
        (container,) = template["spec"]["containers"]
        sources = [source["configMapRef"]["name"] for source in container["envFrom"] if "configMapRef" in source]
        assert sources == ["cascade-settings", "cascade-serving"]
        (volume,) = [each for each in template["spec"]["volumes"] if "secret" in each]
        (mount,) = [each for each in container["volumeMounts"] if each["name"] == volume["name"]]
        assert mount == {"name": volume["name"], "mountPath": folder, "readOnly": True}, "a subPath never changes"
        assert not volume["secret"].get("optional"), "a pod without keys must not start"
        assert f"{volume['secret']['secretName']} --from-literal={file}=" in readme
        assert volume["secret"]["defaultMode"] == 0o440, "for fsGroup, and nobody else"


def test_pods_are_those_of_the_long_lived_cluster_but_for_what_serving_needs(repository, service):
    (trained,) = cluster_specs(build(repository / "infra/kuberay/overlays/raycluster"))
    served = service["spec"]["rayClusterConfig"]
    same = ["rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions"]
    assert [served[key] for key in same] == [trained[key] for key in same]
    templates = [trained["headGroupSpec"]["template"], trained["workerGroupSpecs"][0]["template"]]
    for ours, theirs in zip(pods(service), templates, strict=True):
        (one,), (other,) = ours["spec"]["containers"], theirs["spec"]["containers"]
        assert all(one[key] == other[key] for key in ("image", "securityContext", "resources"))
        assert ours["spec"]["securityContext"] == theirs["spec"]["securityContext"]


def test_replicas_fit_their_pods_and_the_autoscaler_may_start_a_pod_for_each(service, settings):
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    requests = group["template"]["spec"]["containers"][0]["resources"]["requests"]
    assert settings.cpus < float(requests["cpu"]), "the API has to find a core next to a replica"
    assert settings.gpus == float(requests["nvidia.com/gpu"])
    assert group["minReplicas"] == group["replicas"] == settings.min_replicas * len(settings.models)
    assert group["maxReplicas"] == settings.max_replicas * len(settings.models)


def test_whoever_is_being_answered_still_is_when_a_pod_or_a_cluster_goes(service, settings):
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    script = container["lifecycle"]["preStop"]["exec"]["command"][2]
    deadline = int(re.search(r"--deadline-remaining-seconds (\d+)", script).group(1))
    assert settings.limits.seconds < deadline < group["template"]["spec"]["terminationGracePeriodSeconds"]
    assert settings.limits.seconds < service["spec"]["rayClusterDeletionDelaySeconds"]
    assert service["spec"]["upgradeStrategy"] == {"type": "NewCluster"}


def test_the_operator_reaches_dashboard_and_proxy_from_its_own_namespace(manifests, service):
    for template in pods(service):
        for port in (8265, 8000):
            sources = port_sources(manifests, template["metadata"]["labels"], port)
            assert {"namespaceSelector": NAMESPACE, "podSelector": {"matchLabels": OPERATOR}} in sources
        ports = {port["name"]: port["containerPort"] for port in template["spec"]["containers"][0]["ports"]}
        assert ports["serve"] == 8000


def test_nobody_else_reaches_the_proxy_until_a_gateway_is_named(manifests, service):
    for template in pods(service):
        (source,) = port_sources(manifests, template["metadata"]["labels"], 8000)
        assert source["podSelector"]["matchLabels"] == OPERATOR


@pytest.mark.parametrize("folder", GATEWAYS)
def test_a_gateway_reaches_the_proxy_and_waits_longer_than_the_service_takes(repository, folder, service, settings):
    manifests = build(repository / folder)
    for template in pods(service):
        sources = port_sources(manifests, template["metadata"]["labels"], 8000)
        assert [source for source in sources if source.get("namespaceSelector", {}).get("matchLabels")]
    backend = f"{service['metadata']['name']}-serve-svc"  # what KubeRay calls it
    if "gateway" in folder:
        (rule,) = only(manifests, "HTTPRoute", "cascade-serving")["spec"]["rules"]
        assert rule["backendRefs"] == [{"name": backend, "port": 8000}]
        assert float(rule["timeouts"]["request"].removesuffix("s")) > settings.limits.seconds
    else:
        spec = only(manifests, "Ingress", "cascade-serving")["spec"]
        assert spec["rules"][0]["http"]["paths"][0]["backend"]["service"] == {"name": backend, "port": {"number": 8000}}
        assert spec["tls"], "API keys must not travel in the clear"


def test_one_pod_may_be_moved_while_another_answers_and_the_head_only_by_hand(manifests, service):
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    budgets = {m["metadata"]["name"]: m["spec"] for m in manifests if m["kind"] == "PodDisruptionBudget"}
    assert budgets["serving-workers"]["minAvailable"] < group["minReplicas"]
    assert budgets["serving-head"]["minAvailable"] == 1
    for template, kind in zip(pods(service), ("head", "worker"), strict=True):
        labels = {**template["metadata"]["labels"], "ray.io/node-type": kind}  # KubeRay adds the last
        chosen = [name for name, spec in budgets.items() if spec["selector"]["matchLabels"].items() <= labels.items()]
        assert chosen == [f"serving-{kind}s".replace("heads", "head")]
        movable = template["metadata"]["annotations"]["cluster-autoscaler.kubernetes.io/safe-to-evict"]
        assert movable == str(kind == "worker").lower()
