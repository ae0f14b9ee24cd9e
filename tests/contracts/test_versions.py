"""One version of each thing that runs on both sides of a wire."""

import re
import tomllib

import pytest
import yaml

from pipelines.provenance import COMMIT


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


def test_the_three_parts_of_mlflow_are_one_version(repository):
    versions = pinned(repository)
    assert versions["mlflow"] == versions["mlflow-skinny"] == versions["mlflow-tracing"]


@pytest.mark.parametrize(("package", "floor"), [("certifi", (2026, 10, 19)), ("aiohttp", (3, 14, 4))])
def test_packages_with_known_flaws_are_past_their_fix(repository, package, floor):
    assert tuple(int(part) for part in pinned(repository)[package].split(".")[:3]) >= floor


def test_constraints_are_exact_versions_without_builds_addresses_or_paths(repository):
    for name, version in pinned(repository).items():
        assert re.fullmatch(r"[A-Za-z0-9._-]+", name)
        assert re.fullmatch(r"[0-9][0-9a-z.]*", version), f"{name}=={version}"


def test_torch_is_left_to_the_machine(repository):
    assert not {"torch", "torchvision"} & pinned(repository).keys()


def test_the_hooks_run_the_commands_of_make_check(repository):
    hooks = yaml.safe_load((repository / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    recipe = (repository / "Makefile").read_text().replace("$(BIN)", ".venv/bin")
    assert all(hook["entry"] in recipe for hook in hooks)
