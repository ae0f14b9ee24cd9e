"""The cluster of infra/local, for tests: a Ray head with token authentication, an S3 server and an MLflow server."""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.waiting import eventually
from tests.warm_workers import warm_environment

ROOT = Path(__file__).resolve().parents[1]


@contextmanager
def local_cluster(folder: Path, **variables: str) -> Iterator[dict[str, str]]:
    """Environment of a user of the cluster that infra/local/cluster.sh starts, with these variables in all of it."""
    known = os.environ | variables | warm_environment("libraries")
    process = subprocess.Popen(
        ["bash", "infra/local/cluster.sh", str(folder)], cwd=ROOT, env=known, stdout=subprocess.DEVNULL
    )
    try:
        started = (folder / "cluster.env").exists
        eventually(lambda: started() or process.poll() is not None, 240, pause=0.5)
        assert started(), "the local cluster ended or does not start"
        settings = [line.removeprefix("export ") for line in (folder / "cluster.env").read_text().splitlines()]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        yield {**known, **dict("".join(shlex.split(line)).split("=", 1) for line in settings), "PATH": path}
    finally:
        process.terminate()
        process.wait(240)
