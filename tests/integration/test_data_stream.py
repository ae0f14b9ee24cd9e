"""The ordered stream through Ray Data itself: rows arrive as planned, whatever the number of ranks."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from components.data.decoded import ImageSamples
from components.data.shards import View
from components.data.stream import rank_batches
from components.runtime.storage.store import Store
from tests.image_sets import number_of, write_set

pytestmark = pytest.mark.usefixtures("ray_cluster")
BATCH, STEPS = 16, 200
HOW = {"global_batch_size": BATCH, "seed": 7, "streams": 12}


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> ImageSamples:
    index = write_set(Store(str(tmp_path_factory.mktemp("set"))), sizes=(50, 40, 60, 30, 20, 35))
    return ImageSamples(index, View(8))


@pytest.fixture(scope="module")
def alone(samples: ImageSamples) -> list[dict]:
    return list(rank_batches(samples, total_steps=STEPS, **HOW))


def test_positions_count_through_and_each_epoch_serves_each_sample_once(samples: ImageSamples, alone: list[dict]):
    np.testing.assert_array_equal(np.concatenate([b["position"] for b in alone]), np.arange(STEPS * BATCH))
    numbers, epoch = np.concatenate([number_of(batch["image"]) for batch in alone]), samples.index.train_samples
    for start in range(0, len(numbers) - epoch, epoch):
        assert len(set(numbers[start : start + epoch])) == epoch
    np.testing.assert_array_equal(np.concatenate([batch["label"] for batch in alone]), numbers % 3)
    assert {name: (column.dtype, column.shape) for name, column in alone[0].items()} == {
        "image": (np.uint8, (BATCH, 8, 8, 3)),
        "label": (np.int64, (BATCH,)),
        "text": (np.int64, (BATCH, 8)),
        "position": (np.int64, (BATCH,)),
    }


@pytest.mark.parametrize(("world_size", "start_step"), [(4, 0), (2, 33), (16, 133)])
def test_batches_do_not_depend_on_ranks_or_on_where_the_stream_starts(
    samples: ImageSamples, alone: list[dict], world_size: int, start_step: int
) -> None:
    """Also for 16 ranks, which don't divide the 12 streams."""
    for rank in sorted({0, 1, world_size - 1}):
        place = {"rank": rank, "world_size": world_size, "start_step": start_step}
        batches = rank_batches(samples, total_steps=STEPS, **HOW, **place)
        for step, (batch, whole) in enumerate(zip(batches, alone[start_step:], strict=True), start=start_step):
            for name in whole:
                expected = whole[name][rank::world_size]
                np.testing.assert_array_equal(batch[name], expected, err_msg=f"{name} of step {step}")


@dataclass(frozen=True)
class Killing(ImageSamples):
    """Kills the process that reads its 20th step, once."""

    mark: str = ""

    def complete(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if rows["position"][-1] >= 20 * BATCH and not Path(self.mark).exists():
            Path(self.mark).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().complete(rows)


def test_a_reader_that_is_killed_is_made_again_and_nothing_changes(
    samples: ImageSamples, alone: list[dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a run of so many tasks that others wait behind the one that is read."""
    monkeypatch.setattr("components.data.stream.BLOCK_ROWS", 4 * BATCH)
    killing = Killing(samples.index, samples.view, mark=str(tmp_path / "killed"))
    batches = rank_batches(killing, total_steps=10**9, **HOW)
    for step, (batch, expected) in enumerate(zip(batches, alone, strict=False)):
        np.testing.assert_array_equal(batch["image"], expected["image"], err_msg=f"step {step}")
    assert (tmp_path / "killed").exists()
