"""Large tars of a user: written again though the machine goes away half-way, and read as often as the plan says."""

import hashlib
import io
import os
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from components.data.read_amplification import planned_reads
from components.data.shards import ShardIndex, load_index
from components.data.sources.webdataset import list_tars, survey_tar
from components.data.stream import Layout
from components.data.tar_estimate import estimated_index
from components.storage.store import Store
from tests.benchmarks.photos import DIFFERENT, photo
from tests.counted_s3 import CountedS3, counted_s3
from tests.faults.conftest import Record
from tests.faults.runs import CASCADE, Stored, kill_group, wait_until
from tests.simulated_readers import read_epoch

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]
TARS, TAR_BYTES = 10, 100_000_000
IMAGE_BYTES = 110_000  # of a photograph of ImageNet
READERS = 16
LAYOUT = Layout(256, 256, READERS // 2, 0, 16)  # two readers for each worker


@pytest.fixture(scope="module")
def server() -> Iterator[CountedS3]:
    with counted_s3() as server:
        yield server


@pytest.fixture(scope="module")
def tars(server: CountedS3) -> str:
    """A bucket with ten tars of 100 MB: images of 256², each followed by bytes up to the size of a photograph."""
    bucket, draw = Store(server.bucket("tars")), np.random.default_rng(0)
    files = [photo(draw, 256).ljust(IMAGE_BYTES, b"\0") for _ in range(DIFFERENT)]
    for shard in range(TARS):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for number in range(TAR_BYTES // (IMAGE_BYTES + 1536)):
                for name, data in (("cls", str(shard % 4).encode()), ("jpg", files[number % DIFFERENT])):
                    info = tarfile.TarInfo(f"{shard:02d}-{number:05d}.{name}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        bucket.write(f"train-{shard:02d}.tar", buffer.getvalue())
    return bucket.uri


class Resharding(Stored):
    """The command that writes the tars again."""

    def __init__(self, place: Path, tars: str, out: str) -> None:
        super().__init__(place, storage=out)
        self.tars, self.out = tars, Store(out)

    def start(self) -> subprocess.Popen:
        command = [CASCADE, "data", "webdataset", f"{self.tars}/*.tar", "--out", self.out.uri]
        with open(self.log, "ab") as log:
            driver = subprocess.Popen(
                command, cwd=self.place, env=os.environ, stdout=log, stderr=log, start_new_session=True
            )
        self.drivers.append(driver)
        return driver

    def done(self) -> int:
        return len(self.out.list("parts"))

    def files(self) -> dict[str, str]:
        """Path -> sha256 of everything that was written."""
        return {info.path: hashlib.sha256(self.out.read(info.path)).hexdigest() for info in self.out.list()}


def index_of_tars(tars: str, made: ShardIndex) -> ShardIndex:
    """The same set as its tars hold it."""
    entries = [survey_tar(tar.path, holdout_fraction=made.holdout_fraction).entries[0] for tar in list_tars(tars)]
    return made.model_copy(update={"shards": tuple(entries)})


def test_tars_are_written_again_to_the_same_bytes_though_the_machine_goes_away_and_are_read_as_planned(
    tmp_path: Path, server: CountedS3, tars: str, record: Record
):
    whole = Resharding(tmp_path / "whole", tars, server.bucket("whole"))
    whole.finish(whole.start())
    killed = Resharding(tmp_path / "killed", tars, server.bucket("killed"))
    driver = killed.start()
    wait_until(lambda: killed.done() >= TARS // 2, killed)
    kill_group(driver)
    done = killed.done()
    assert TARS // 2 <= done < TARS
    server.take()
    killed.finish(killed.start())
    again = [count for url, count in server.take().items() if url.startswith(tars) and count > 1]  # 1: it is there
    assert len(again) == TARS - done
    assert killed.files() == whole.files()
    gone = f"killed with {done} of {TARS} tars done: the other {len(again)} were read, all bytes are the same"
    record(f"{TARS} tars of 100 MB written again, `kill -9` half-way", 1, gone)

    small = load_index(killed.out.uri)
    large = index_of_tars(tars, small)
    assert (small.samples, small.quarantined) == (sum(entry.samples for entry in large.shards), 0)
    estimate = estimated_index(list_tars(tars), holdout_fraction=small.holdout_fraction, text_length=16)
    told = planned_reads(estimate, LAYOUT, readers=READERS).amplification
    for name, index in (("before", large), ("after", small)):
        planned = planned_reads(index, LAYOUT, readers=READERS)
        server.take()
        positions = read_epoch(index, LAYOUT, readers=READERS)
        assert sum(server.take().values()) == planned.fetched
        np.testing.assert_array_equal(positions, np.arange(len(positions)))
        often = f"{planned.amplification:.2f} bytes for each of the set, {planned.fetched / 1e9:.2f} GB, as planned"
        record(f"{name}: {len(index.shards)} tars, {READERS} readers, 256², a batch of 256", 1, often)
        assert (
            planned.amplification < 1.5 if name == "after" else planned.amplification == pytest.approx(told, rel=0.02)
        )
