"""One version of each thing that runs on both sides of a wire."""

import json
import os
import re
import runpy
import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pipelines.engine.provenance import COMMIT

IMAGES = ("image", "mlflow")
EXTRAS = ("azure", "demo", "features", "fidelity", "gcs", "hub", "lecture", "serve", "text")  # of the image of Ray pods
OF_A_DEVICE = re.compile("(nvidia|cuda|triton)")  # what PyTorch's builds with and without CUDA differ in


def pinned(repository) -> dict[str, str]:
    lines = (repository / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_ray_of_image_client_and_every_manifest_is_one_version(repository):
    version = pinned(repository)["ray"]
    dockerfile = (repository / "infra/image/Dockerfile").read_text()
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    (requirement,) = [line for line in project["dependencies"] if line.startswith("ray[")]
    manifests = "\n".join(path.read_text() for path in (repository / "infra").rglob("*.yaml"))
    assert re.findall(r"^ARG RAY_VERSION=(.+)$", dockerfile, re.MULTILINE) == [version]
    assert requirement.partition("==")[2] == version.rpartition(".")[0] + ".*"
    assert set(re.findall(r"rayVersion: *[\"']?([\d.]+)", manifests)) == {version}


def test_every_line_that_builds_the_image_tells_it_the_commit(repository):
    lines = [
        line
        for name in ("README.md", "infra/image/README.md", "infra/image/Dockerfile")
        for line in (repository / name).read_text().splitlines()
        if "docker build -f infra/image/Dockerfile" in line
    ]
    assert len(lines) == 3
    assert [line for line in lines if "--build-arg GIT_COMMIT=$(git describe --always --abbrev=40" not in line] == []
    dockerfile = (repository / "infra/image/Dockerfile").read_text()
    assert 'org.opencontainers.image.revision="${GIT_COMMIT}"' in dockerfile
    assert f'RUN echo "${{GIT_COMMIT}}" > {COMMIT}' in dockerfile


def test_constraints_are_exact_versions_past_known_flaws_and_leave_torch_to_the_machine(repository):
    versions = pinned(repository)
    for name, version in versions.items():
        assert re.fullmatch(r"[A-Za-z0-9._-]+", name)
        assert re.fullmatch(r"[0-9][0-9a-z.]*", version), f"{name}=={version}"
    for package, floor in (("certifi", (2026, 10, 19)), ("aiohttp", (3, 14, 4))):
        assert tuple(int(part) for part in versions[package].split(".")[:3]) >= floor
    assert versions["mlflow"] == versions["mlflow-skinny"] == versions["mlflow-tracing"]
    assert not {"torch", "torchvision"} & versions.keys()


def hashed(repository: Path, image: str) -> dict[str, str]:
    """Versions of what an image installs, each of which has a sha256."""
    lines = (repository / "infra" / image / "requirements.txt").read_text().splitlines()[1:]
    pins = [re.fullmatch(r"([\w.-]+)==([\w.]+) --hash=sha256:[0-9a-f]{64}", line) for line in lines]
    assert all(pins), [line for line, pin in zip(lines, pins, strict=True) if pin is None]
    return {canonicalize_name(pin[1]): pin[2] for pin in pins if pin}


def needs(name: str, extras: Iterable[str] = ()) -> list[Requirement]:
    """What a package that is installed here asks for on Linux with an x86_64 processor."""
    place = default_environment() | {"sys_platform": "linux", "platform_machine": "x86_64"}
    try:
        every = map(Requirement, requires(name) or ())
    except PackageNotFoundError:  # of a GPU
        return []
    chosen = [place | {"extra": extra} for extra in ("", *extras)]
    return [need for need in every if need.marker is None or any(need.marker.evaluate(each) for each in chosen)]


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_installs_what_was_tested_and_all_that_it_asks_for(repository, image):
    versions = hashed(repository, image)
    tested = {canonicalize_name(name): version for name, version in pinned(repository).items()}
    assert {name: version for name, version in versions.items() if tested.get(name, version) != version} == {}
    lacking = {
        (name, need.name) for name in versions for need in needs(name) if canonicalize_name(need.name) not in versions
    }
    assert not {pair for pair in lacking if not OF_A_DEVICE.match(pair[1])}, "run `make pins`"


def test_the_image_of_ray_pods_installs_the_package_s_requirements_and_one_torch(repository):
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    versions = hashed(repository, "image")
    lines = [*project["dependencies"], *(line for extra in EXTRAS for line in project["optional-dependencies"][extra])]
    every = [*map(Requirement, [*lines, "hatchling"])]
    of_extras = [need for whole in every for need in needs(whole.name, whole.extras)]
    for need in [*every, *of_extras]:
        if need.name != "image-cascade" and not OF_A_DEVICE.match(need.name):
            assert need.specifier.contains(versions[canonicalize_name(need.name)]), f"{need}: run `make pins`"


@pytest.mark.parametrize("image", IMAGES)
def test_the_bill_of_materials_of_an_image_names_what_it_installs(repository, image):
    """By name, version and sha256, in the words by which scanners know a package."""
    installed = (repository / "infra" / image / "requirements.txt").read_text().splitlines()[1:]
    bill = json.loads((repository / "infra" / image / "sbom.cdx.json").read_text())
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    lines = [f"{each['name']}=={each['version']}" for each in bill["components"]]
    hashes = [each["hashes"][0]["content"] for each in bill["components"]]
    assert sorted(installed) == sorted(map("{} --hash=sha256:{}".format, lines, hashes)), "run `make pins`"
    purls = [f"pkg:pypi/{canonicalize_name(each['name'])}@{each['version']}" for each in bill["components"]]
    assert [each["purl"] for each in bill["components"]] == purls


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_takes_from_outside_nothing_but_what_has_a_hash(repository, image):
    dockerfile = (repository / "infra" / image / "Dockerfile").read_text()
    installs = [line for line in dockerfile.splitlines() if "pip install" in line]
    assert "--require-hashes -r " in installs[0]
    assert all("--no-deps" in line for line in installs)
    assert all("--no-build-isolation -e ." in line for line in installs[1:])
    assert re.search(r"^ARG BASE_DIGEST=(@sha256:[0-9a-f]{64})?$", dockerfile, re.MULTILINE)
    assert re.search(r"^FROM \S+\$\{BASE_DIGEST\}$", dockerfile, re.MULTILINE)


@pytest.mark.parametrize("image", IMAGES)
def test_the_digest_that_docker_names_is_written_into_the_dockerfile(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image: str
) -> None:
    base = {"image": f"rayproject/ray:{pinned(repository)['ray']}-py311-gpu", "mlflow": "python:3.11-slim"}[image]
    docker, dockerfile = tmp_path / "docker", tmp_path / "Dockerfile"
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    pins = runpy.run_path(str(repository / "infra" / "pins.py"))
    pins["pin_base"].__globals__["REPOSITORY"] = tmp_path
    text = (repository / "infra" / image / "Dockerfile").read_text()
    dockerfile.write_text(text)
    for digest in ("a" * 64, "b" * 64):  # the tag has moved on
        docker.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\necho sha256:{digest}\n')
        docker.chmod(0o755)
        assert pins["pin_base"](dockerfile) == f"Dockerfile: {base}@sha256:{digest}"
        assert (tmp_path / "asked").read_text().startswith(f"buildx imagetools inspect {base} ")
        pinned_text = re.sub(r"^ARG BASE_DIGEST=.*$", f"ARG BASE_DIGEST=@sha256:{digest}", text, flags=re.MULTILINE)
        assert dockerfile.read_text() == pinned_text


def test_the_hooks_run_the_commands_of_make_check(repository):
    hooks = yaml.safe_load((repository / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    recipe = (repository / "Makefile").read_text().replace("$(BIN)", ".venv/bin")
    assert all(hook["entry"] in recipe for hook in hooks)
