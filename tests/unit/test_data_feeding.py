"""The feeder hands out every reading task once, and forgets those that were taken long ago."""

from types import SimpleNamespace
from typing import Any

import pytest

from components.data import stream


@pytest.mark.parametrize("ahead", [4, 2000])  # of two readers, and of a thousand
def test_no_task_is_forgotten_before_it_is_taken_and_memory_is_bounded(
    monkeypatch: pytest.MonkeyPatch, ahead: int
) -> None:
    monkeypatch.setattr(stream.ray, "put", lambda task: task)
    monkeypatch.setattr(stream, "BlockEntry", lambda task, metadata: task)
    monkeypatch.setattr(stream, "RefBundle", lambda blocks, **_: blocks[0])
    metrics, handed = SimpleNamespace(num_inputs_received=0), ["task 0"]
    feeder: Any = stream.Feeder()
    feeder.input = SimpleNamespace(_input_data=handed, output_dependencies=[SimpleNamespace(metrics=metrics)])
    feeder.ahead, feeder.tasks = ahead, (f"task {number}" for number in range(1, 10_000))
    for number in range(5000):
        while feeder.waiting() < ahead:
            feeder.feed()
        assert handed[number] == f"task {number}"
        metrics.num_inputs_received += 1
    assert sum(task is not None for task in handed) <= stream.KEPT + ahead
