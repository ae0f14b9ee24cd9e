"""Whole runs of the command, to be disturbed, and what they leave, as hashes."""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file
from torch import Tensor

from components.runtime.storage.artifact import load_artifact
from components.runtime.storage.store import Store
from components.runtime.tracking.names import CHAMPION, STAGE
from components.training.run_folder import last_checkpoint
from pipelines.engine.driver import DONE, UNREGISTERED
from pipelines.engine.recorder import EXPERIMENT

CASCADE = str(Path(sys.executable).with_name("cascade"))
DEADLINE = 780  # seconds of one run
INTERVAL = 20  # steps between checkpoints
TINY = {"images.limit": 96, "images.samples_per_shard": 24, "base.global_batch_size": 8}
TINY |= {"base.checkpoint_every": INTERVAL, "base.sample_every": 100000, "base.log_every": INTERVAL}
PROFILE = {"cpus_per_worker": 1, "threads": 1}
# Time-outs as short as the pauses of proxies and gates; the attempts are those of the product.
IMPATIENT = '{"config_kwargs": {"read_timeout": 2, "retries": {"mode": "standard", "max_attempts": 3}}}'
TIMED = ("metrics.json",)  # holds seconds
MOST_TIMES = 5  # that MLflow is sent what it lacks


class Stored:
    """One storage, the drivers that work on it one after another or at once, and what they leave there."""

    def __init__(self, place: Path, *, storage: str | None = None) -> None:
        place.mkdir(parents=True, exist_ok=True)
        self.place, self.storage = place, storage or str(place / "runs")
        self.log = place / "driver.log"
        self.drivers: list[subprocess.Popen] = []

    def launch(self, *command: str, **environment: str) -> subprocess.Popen:
        """A driver in a process group of its own."""
        variables = os.environ | environment
        with open(self.log, "ab") as log:
            driver = subprocess.Popen(
                command, cwd=self.place, env=variables, stdout=log, stderr=log, start_new_session=True
            )
        self.drivers.append(driver)
        return driver

    def same_as(self, hashes: dict[str, str]) -> str:
        """The proof of a row, once what is left was found to be what was left undisturbed."""
        assert self.hashes() == hashes
        return f"same weights, sha256 {hashes['base'][:12]}…"

    def finish(self, driver: subprocess.Popen, *, seconds: float = DEADLINE) -> None:
        assert driver.wait(seconds) == 0, self.said()[-4000:]

    def fail(self, driver: subprocess.Popen, *, saying: str) -> None:
        """Wait until a driver ends with exit code 1 and these words, and without a traceback."""
        before = len(self.said())
        assert driver.wait(DEADLINE) == 1, self.said()[-4000:]
        words = " ".join(self.said()[before:].split())
        assert saying in words, words[-4000:]
        assert "Traceback" not in words

    def said(self) -> str:
        return self.log.read_text()

    def stages(self) -> list[str]:
        return Store(self.storage).folders("stages")

    def stage(self, name: str) -> Store:
        """The one folder of a stage."""
        root = Store(self.storage)
        (key,) = root.folders(f"stages/{name}")
        return root.join("stages", name, key)

    def train(self, name: str = "base") -> Store:
        """Ray Train's run folder of a stage."""
        stage = self.stage(name)
        return stage.join("train", stage.uri.rpartition("/")[2])

    def step(self, name: str = "base") -> int:
        """Steps of a stage's last checkpoint."""
        if name not in self.stages():
            return 0
        done = last_checkpoint(self.train(name))
        return done.step if done else 0

    def weights(self, name: str = "base") -> dict[str, Tensor]:
        artifact = load_artifact(self.stage(name))
        assert artifact is not None
        return load_file(artifact.download(self.place / "model") / "model.safetensors")

    def hashes(self) -> dict[str, str]:
        """Stage -> sha256 of what its manifest lists: names, sizes, sha256."""
        found = {}
        for stage in self.stages():
            artifact = load_artifact(self.stage(stage))
            assert artifact is not None
            kept = zip(artifact.names(), artifact.files, strict=True)
            lines = [[name, entry.bytes, entry.sha256] for name, entry in kept if Path(name).name not in TIMED]
            found[stage] = hashlib.sha256(json.dumps(sorted(lines)).encode()).hexdigest()
        return found


class Run(Stored):
    """The tiny recipe, with a Ray of its own or on a cluster of this machine."""

    def __init__(
        self,
        place: Path,
        *,
        steps: int,
        storage: str | None = None,
        workers: int = 2,
        max_failures: int = 20,
        until: str = "base",
        **profile: Any,
    ) -> None:
        super().__init__(place, storage=storage)
        profile = PROFILE | {"num_workers": workers, "max_failures": max_failures} | profile
        (place / "profile.yaml").write_text(json.dumps(profile))  # JSON is YAML
        self.steps, self.until = steps, until

    def start(self, *, until: str = "", tracking: str = "none", **environment: str) -> subprocess.Popen:
        settings = TINY | {"base.total_steps": self.steps}
        command = [CASCADE, "run", "--recipe", "smoke", "--until", until or self.until, "--storage", self.storage]
        command += ["--tracking", tracking, "--profile", "profile.yaml"]
        command += [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
        return self.launch(*command, **environment)


def in_mlflow(uri: str, run: Run) -> str:
    """The proof that MLflow has runs, points, images and the model of a run, each once."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert {each.info.status for each in runs} == {"FINISHED"}
    stages = [each.data.tags.get(STAGE, "") for each in runs]
    assert sorted(stages) == ["", *sorted(run.stages())], "a run is missing or twice"
    (training,) = (each for each in runs if each.data.tags.get(STAGE) == "base")
    points = [name for name in training.data.metrics if name.startswith("loss")]
    assert points
    for name in points:
        steps = [point.step for point in client.get_metric_history(training.info.run_id, name)]
        assert steps == list(range(INTERVAL, run.steps + 1, INTERVAL)), name
    names = [file.path for file in client.list_artifacts(training.info.run_id, "images")]
    images = [tuple(name.split("+")[:3]) for name in names if name.endswith(".png")]
    assert images
    assert len(images) == len({*images})
    (version,) = client.search_model_versions("name='image-cascade-smoke-base'")
    assert client.get_model_version_by_alias(version.name, CHAMPION).version == version.version
    return f"{len(runs)} runs, {len(points) * run.steps // INTERVAL} points, {len(images)} images, 1 model, each once"


def wait_until(condition: Callable[[], bool], run: Stored, *, seconds: float = DEADLINE, poll: float = 0.1) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        at_work = any(driver.poll() is None for driver in run.drivers)
        assert at_work, run.said()[-4000:]
        assert time.monotonic() < deadline, run.said()[-4000:]
        time.sleep(poll)


def kill_group(driver: subprocess.Popen) -> None:
    """`kill -9` of a driver and of its Ray, as when the machine goes away."""
    family = [*psutil.Process(driver.pid).children(recursive=True), psutil.Process(driver.pid)]
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(family, timeout=30)
    driver.wait()


def clock(place: Path, seconds: int) -> dict[str, str]:
    """Environment of a driver whose processes all see another time: `time.time` is replaced as Python starts."""
    folder = place / f"clock{seconds}"
    folder.mkdir(exist_ok=True)
    program = f"""
        import time
        real = time.time
        def moved() -> float:
            return real() + {seconds}
        time.time = moved
    """
    (folder / "sitecustomize.py").write_text(textwrap.dedent(program))
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(Path.cwd()), os.environ.get("PYTHONPATH", "")])}


@contextlib.contextmanager
def small_disk(folder: Path, *, megabytes: int) -> Iterator[None]:
    """A tmpfs at a folder; only root may mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder: Path) -> Path:
    """A file that takes all room of the disk; deleting it makes room."""
    ballast = folder / "ballast"
    with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    return ballast


def race(run: Run, drivers: list[subprocess.Popen]) -> None:
    """Drivers, each with a Ray of its own, race to the end; the one that works is killed when it has a checkpoint."""
    wait_until(lambda: run.step() >= INTERVAL, run)
    lease = run.stage("base").join("lease")
    holder = json.loads(lease.read(lease.list()[-1].path))["pid"]
    families = {each: [each, *psutil.Process(each.pid).children(recursive=True)] for each in drivers}
    (working,) = [each for each, family in families.items() if holder in [process.pid for process in family]]
    kill_group(working)
    for driver in drivers:
        if driver is not working:
            run.finish(driver)
    assert len(lease.list()) <= len(drivers)
    attempts = [name for name in run.stage("base").folders() if name.startswith("attempt-")]
    assert len(attempts) == 1, "two drivers finished the same stage"


def recorder_of(driver: subprocess.Popen) -> psutil.Process:
    """The recorder of a run with a Ray of its own."""
    family = psutil.Process(driver.pid).children(recursive=True)
    (recorder,) = (process for process in family if process.name().startswith("ray::RunRec"))
    return recorder


@contextlib.contextmanager
def stopped(driver: subprocess.Popen) -> Iterator[None]:
    """The recorder gives no sign of life inside."""
    recorder = recorder_of(driver)
    recorder.suspend()
    yield
    with contextlib.suppress(psutil.NoSuchProcess):  # a driver kills it in the end
        recorder.resume()


def registered(run: Run, driver: subprocess.Popen, tracking: str) -> str:
    """How MLflow came to have everything: by itself, or by the command that the run named, as often as it took."""
    code, times = driver.wait(DEADLINE), 0
    assert code in (DONE, UNREGISTERED), run.said()[-4000:]
    if code == UNREGISTERED:
        assert "to register, once MLflow is back: cascade register " in " ".join(run.said().split())
    while code == UNREGISTERED and times < MOST_TIMES:
        code = run.launch(CASCADE, "register", "--storage", run.storage, "--tracking", tracking).wait(DEADLINE)
        times += 1
    assert code == DONE, run.said()[-4000:]
    return f", by `cascade register`, {times} x" if times else ""
