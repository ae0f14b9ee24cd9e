"""How long a run waits for its store: a submitted job from its first look on, a person's once storage was seen; and
a run whose report can't be drawn.
"""

import os
import re
from pathlib import Path
from unittest import mock

import pytest
from rich.console import Console

from components.configuration.usage import UsageError
from components.runtime import events
from components.runtime.execution import Resources
from components.runtime.storage import outages
from components.runtime.storage.artifact import ArtifactError
from components.runtime.storage.store import Store, StoreError
from pipelines.engine import driver, execute
from pipelines.engine.execute import Outcome
from pipelines.engine.recorder import RunRecorder
from pipelines.engine.session import JOB_VARIABLE
from tests.waiting import eventually


@pytest.mark.parametrize(
    ("variables", "seconds"),
    [
        ({}, 0),
        ({JOB_VARIABLE: "{}"}, 900),
        ({JOB_VARIABLE: "{}", outages.SETTING: "60"}, 60),
        ({outages.SETTING: "60"}, 60),
    ],
)
def test_the_first_look_at_storage_waits_where_nobody_would_start_it_again(
    variables: dict[str, str], seconds: float, monkeypatch: pytest.MonkeyPatch
):
    def look(options: driver.RunOptions) -> driver.Prepared:
        raise UsageError(f"waits {outages.patience():g} s")

    monkeypatch.setattr(driver, "prepare", look)
    with mock.patch.dict(os.environ):
        for name in (JOB_VARIABLE, outages.SETTING):
            os.environ.pop(name, None)
        os.environ.update(variables)
        with pytest.raises(UsageError, match=f"^waits {seconds} s$"):
            driver.run(driver.RunOptions(), Console())


def test_a_setting_that_is_no_time_is_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(driver, "prepare", lambda options: pytest.fail("it began"))
    monkeypatch.setenv(outages.SETTING, "15m")
    with pytest.raises(UsageError, match="15m: write how many seconds"):
        driver.run(driver.RunOptions(), Console())


@pytest.mark.parametrize("kind", [StoreError, ArtifactError])
def test_a_report_that_can_not_be_drawn_is_a_failure_in_a_line(kind: type[Exception], monkeypatch: pytest.MonkeyPatch):
    """Such as for a damaged image of the run before: the run ends as any other, and MLflow hears of its end."""
    monkeypatch.setattr(driver, "_save", mock.Mock())
    monkeypatch.setattr(driver.run_report, "render_run", mock.Mock(side_effect=kind("samples/k differs")))
    outcome = Outcome()
    assert driver._report(mock.Mock(), outcome, [], mock.Mock(), seconds=1.0) == "none"
    assert outcome.failures == {"report": "samples/k differs"}


def test_a_stage_whose_lease_can_not_be_had_has_failed_and_waits_for_nothing(tmp_path: Path):
    """Such as for a store that stays away: the table said "queued" to the end."""
    store, recorder = Store(str(tmp_path)), RunRecorder()
    job = execute.StageJob("prior", "k", mock.Mock(), {}, {}, store, Resources(), {}, forced="")
    recorder.emit(events.StageHeld("prior", "queued", "waiting: the lease"))
    emitter = mock.Mock(emit=lambda event, *, wait=False: recorder.emit(event))
    with (
        mock.patch.object(execute.Lease, "look", side_effect=StoreError("s3://bucket is away")),
        pytest.raises(StoreError),
    ):
        execute.run_stage(job, emitter)
    (status,) = recorder.snapshot()
    assert (status.state, status.note) == ("failed", "s3://bucket is away")


def test_a_worker_of_a_run_gives_its_words_to_the_runs_recorder(ray_cluster: None):
    """By name: what reads a source in Ray Data's workers knows no recorder."""
    import ray

    class Listener:
        def __init__(self) -> None:
            self.heard: list[tuple[str, str, bool]] = []

        def waits(self, store: str, line: str, *, ended: bool) -> None:
            self.heard.append((store, line, ended))

        def all(self) -> list[tuple[str, str, bool]]:
            return self.heard

    def wait() -> None:
        with mock.patch.object(outages, "FIRST_WORD", 0.0):
            outages.unanswered("s3://bucket", "no route")
        outages.answered("s3://bucket")

    listener = ray.remote(num_cpus=0)(Listener).options(name=outages.RECORDER).remote()
    ray.get(listener.all.remote())
    ray.get(ray.remote(num_cpus=0)(wait).remote())
    eventually(lambda: len(ray.get(listener.all.remote())) == 2)  # nobody waits for what a worker says to an actor
    heard = ray.get(listener.all.remote())
    ray.kill(listener)
    assert [(store, ended) for store, _, ended in heard] == [("s3://bucket", False), ("s3://bucket", True)]
    assert re.fullmatch(r"store s3://bucket away for 0:0\d, waiting until 0:0\d: no route", heard[0][1])
    assert re.fullmatch(r"store s3://bucket was away for 0:0\d: no route", heard[1][1])
