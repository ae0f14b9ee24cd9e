"""Sampling and measuring in parts: whoever does them, and however often they are broken off, the bytes are the same."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest

from components.evaluation import generated
from components.runtime import events
from components.runtime.events import Recorder
from components.runtime.execution import Resources
from components.runtime.storage.artifact import Artifact
from components.runtime.storage.store import Store
from components.stages.context import StageContext
from components.stages.evaluate import EvaluationConfig, evaluate
from components.stages.samples import SamplesConfig, sample_generators
from tests.image_sets import write_set
from tests.tiny_cascade import write_cascade, write_models
from tests.waiting import watching

JOB, MEASURED = 16, 20  # images of a job, and of each of two generators: two jobs
SAMPLES = SamplesConfig(measured_samples=MEASURED, images_per_class=1, num_prompts=1, images_per_prompt=1)
EVALUATION = EvaluationConfig(reference_samples=20, held_out_samples=6)
WORKER = "ray::PoolWorker"


class BrokenOffError(Exception):
    """As if the head were lost."""


class BreakingRecorder(Recorder):
    """Ends the stage at its n-th report."""

    def __init__(self, reports: int) -> None:
        self.left = reports

    def emit(self, event: events.Event) -> None:
        self.left -= isinstance(event, events.Progress)
        if self.left == 0:
            raise BrokenOffError


class House:
    """Images, tokenizer and cascade in storage; and the two stages."""

    def __init__(self, root: Path) -> None:
        self.root = root
        images = self.context("images", "key")
        write_set(images.files_store, sizes=(14, 14), resolution=16)
        self.images = images.commit("shards", written=[info.path for info in images.files_store.list()])
        self.cascade = self.context("cascade", "key").commit("model", folder=write_cascade(root / "cascade"))
        tokenizer = write_models(root / "models")["tokenizer"]
        self.tokenizer = self.context("tokenizer", "key").commit("model", folder=tokenizer)

    def context(self, stage: str, key: str, *, workers: int = 1, recorder: Any = None) -> StageContext:
        store = Store(str(self.root / "stages" / stage / key))
        resources = Resources(num_actors=workers, cpus_per_worker=0.1)
        return StageContext(stage, key, store, resources, recorder or Recorder(), self.root)

    def sample(self, key: str, **options: Any) -> Artifact:
        context = self.context("samples", key, **options)
        return sample_generators(SAMPLES, context, images=self.images, cascade=self.cascade)

    def evaluate(self, key: str, samples: Artifact, **options: Any) -> Artifact:
        context = self.context("evaluation", key, **options)
        return evaluate(EVALUATION, context, images=self.images, tokenizer=self.tokenizer, samples=samples)

    def written(self, stage: str, key: str, folder: str) -> dict[str, int]:
        """Files of parts, and when they were written."""
        parts = (self.root / "stages" / stage / key / folder).glob("*.npz")
        return {path.name: path.stat().st_mtime_ns for path in parts}

    def features(self) -> dict[str, int]:
        """Files of features, and when they were written."""
        return {str(path): path.stat().st_mtime_ns for path in self.root.glob("stages/**/features/*.npz")}

    def forget_features(self) -> None:
        for folder in [*self.root.glob("stages/**/features")]:
            shutil.rmtree(folder)


@pytest.fixture(scope="module")
def house(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with mock.patch.object(generated, "JOB_SIZE", JOB):
        yield House(tmp_path_factory.mktemp("house"))


@pytest.fixture(scope="module")
def samples(house: House) -> Artifact:
    return house.sample("alone")


@pytest.fixture(scope="module")
def report(house: House, samples: Artifact) -> Artifact:
    return house.evaluate("alone", samples)


def hashes(artifact: Artifact) -> dict[str, str]:
    """Of all files, by their names: folders of tries have random ones."""
    return {Path(entry.path).name: entry.sha256 for entry in artifact.files}


def test_two_workers_sample_the_bytes_of_one(house: House, samples: Artifact) -> None:
    both = house.sample("two", workers=2)
    assert hashes(both) == hashes(samples)
    assert both.metadata["contents"] == samples.metadata["contents"]
    assert samples.metadata["contents"]["measured_diffusion-001.npz"] == {"base": [4, 8], "upsampler_16": [4, 16]}


def test_sampling_that_was_broken_off_draws_what_is_missing_and_no_more(house: House, samples: Artifact) -> None:
    with pytest.raises(BrokenOffError):
        house.sample("broken", recorder=BreakingRecorder(3))
    before = house.written("samples", "broken", "files")
    again = house.sample("broken", workers=2)
    after = house.written("samples", "broken", "files")
    assert 3 <= len(before) < len(after)
    assert {name: after[name] for name in before} == before
    assert hashes(again) == hashes(samples)


def test_a_worker_killed_in_its_part_changes_no_byte(house: House, samples: Artifact) -> None:
    with killing_one(lambda: len(house.written("samples", "killed", "files")) >= 2) as killed:
        again = house.sample("killed", workers=2)
    assert len(killed) == 1
    assert hashes(again) == hashes(samples)


def test_an_evaluation_that_was_broken_off_and_goes_on_with_two_workers_measures_what_is_missing_and_no_more(
    house: House, samples: Artifact, report: Artifact
) -> None:
    house.forget_features()
    with pytest.raises(BrokenOffError):
        house.evaluate("broken", samples, recorder=BreakingRecorder(4))
    before = house.features()
    assert len(before) >= 4
    again = house.evaluate("broken", samples, workers=2)
    after = house.features()
    assert {name: after[name] for name in before} == before
    assert len(after) > len(before)
    assert again.metadata == report.metadata
    assert hashes(again) == hashes(report)


@contextmanager
def killing_one(when: Callable[[], bool]) -> Iterator[list[int]]:
    """Kills one worker of a pool as soon as it may. Yields the list of those that it killed."""
    killed: list[int] = []

    def strike() -> None:
        if killed or not when():
            return
        raylets = {str(child.pid) for child in psutil.Process().children()}  # a forked worker is no child of its raylet
        titled = [each for each in psutil.process_iter(["cmdline"]) if WORKER in " ".join(each.info["cmdline"] or ())]
        for worker in [each for each in titled if each.environ().get("RAY_RAYLET_PID") in raylets][:1]:
            os.kill(worker.pid, signal.SIGKILL)
            killed.append(worker.pid)

    with watching(strike):
        yield killed
