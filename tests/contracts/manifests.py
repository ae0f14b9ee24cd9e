"""What `kubectl apply -k` would send, and the schemas that it is held against."""

import functools
import json
import os
import pathlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import yaml

Manifest = dict[str, Any]

CLOUDS = ("aws", "azure", "gcp")
SERVICES = ("service", "service-gateway", "service-ingress")
NODES = [f"infra/kuberay/overlays/{cloud}-{gpu}" for cloud in CLOUDS for gpu in ("a100", "h100")]
OVERLAYS = (*CLOUDS, "dev", "raycluster", *SERVICES)
KUBERAY = ["infra/kuberay/base", *(f"infra/kuberay/overlays/{name}" for name in OVERLAYS), *NODES]
MLFLOW = ["infra/mlflow/base", *(f"infra/mlflow/overlays/{name}" for name in CLOUDS)]
KUSTOMIZATIONS = [*KUBERAY, *MLFLOW, "infra/monitoring"]
PARTS, SCHEDULERS = ("efa", "rdma", "whole-node"), ("kueue", "volcano")  # of overlays; for users to add to any of them
COMPONENTS = [f"infra/kuberay/components/{name}" for name in (*PARTS, *SCHEDULERS)]
UNITS = {"m": 1e-3, "": 1, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


@functools.cache
def kustomize(folder: pathlib.Path) -> str:
    built = subprocess.run(["kustomize", "build", folder], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return built.stdout


def build(folder: pathlib.Path) -> list[Manifest]:
    if shutil.which("kustomize") is None:
        pytest.skip("kustomize is not installed")
    return list(yaml.safe_load_all(kustomize(folder)))


def composed(repository: pathlib.Path, place: pathlib.Path, overlay: str, component: str) -> list[Manifest]:
    """An overlay with one more component, as a user would add it."""
    parts = {
        key: [os.path.relpath(repository / path, place)]
        for key, path in {"resources": overlay, "components": f"infra/kuberay/components/{component}"}.items()
    }
    (place / "kustomization.yaml").write_text(yaml.safe_dump(parts))
    return build(place)


def quantity(text: str | int) -> float:
    """A quantity of Kubernetes as a number."""
    number, unit = re.fullmatch(r"([\d.]+)(\w*)", str(text)).groups()
    return float(number) * UNITS[unit]


def closed(schema: Any) -> Any:
    """A structural OpenAPI v3 schema as JSON schema in which a field that is not named is an error."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: closed(value) for key, value in schema.items()}
    is_open = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not is_open:
        result["additionalProperties"] = False
    return result


def ray_resources(manifests: list[Manifest]) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["apiVersion"].startswith("ray.io/")]


def group_named(name: str, manifests: list[Manifest]) -> Manifest:
    (spec,) = cluster_specs(manifests)
    (found,) = [group for group in spec["workerGroupSpecs"] if group["groupName"] == name]
    return found


def port_sources(manifests: list[Manifest], labels: dict[str, str], port: int) -> list[Manifest]:
    """Who may open a port of the pods with these labels."""
    policies = [m["spec"] for m in manifests if m["kind"] == "NetworkPolicy"]
    chosen = [spec for spec in policies if selects(spec["podSelector"], labels)]
    rules = [rule for spec in chosen for rule in spec.get("ingress", [])]
    return [source for rule in rules if port in [p["port"] for p in rule.get("ports", [])] for source in rule["from"]]


def selects(selector: Manifest, labels: dict[str, str]) -> bool:
    """Whether a pod with these labels is chosen, by `matchLabels` and the operator `NotIn`."""
    rules = selector.get("matchExpressions", [])
    assert {rule["operator"] for rule in rules} <= {"NotIn"}
    excluded = any(labels.get(rule["key"]) in rule["values"] for rule in rules)
    return selector.get("matchLabels", {}).items() <= labels.items() and not excluded


def cluster_specs(manifests: list[Manifest]) -> list[Manifest]:
    specs = [manifest["spec"] for manifest in ray_resources(manifests)]
    return [spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec for spec in specs]


def only(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    (found,) = [m for m in manifests if (m["kind"], m["metadata"]["name"]) == (kind, name)]
    return found


@functools.cache
def custom_schemas() -> dict[str, jsonschema.Draft202012Validator]:
    """Validator of each kind in `schemas/`: all that is not Kubernetes' own."""
    texts = {file.stem: file.read_text() for file in (pathlib.Path(__file__).parent / "schemas").glob("*.json")}
    schemas = {name: closed(json.loads(text)) for name, text in texts.items()}
    several = schemas.pop("KubeRay") | schemas.pop("Kueue")
    shared = {"$defs": several.pop("$defs")}
    schemas |= {kind: schema | shared for kind, schema in several.items() if not kind.startswith("$")}
    return {kind: jsonschema.Draft202012Validator(schema) for kind, schema in schemas.items()}


def pod_templates(node: Any) -> Iterator[Manifest]:
    """Every pod template below, wherever it stands."""
    if isinstance(node, list):
        for item in node:
            yield from pod_templates(item)
    elif isinstance(node, dict):
        if "containers" in node.get("spec", {}):
            yield node
        for value in node.values():
            yield from pod_templates(value)
