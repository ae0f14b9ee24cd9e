"""Large tars of a user: written again though the machine goes away half-way, and read as often as the order says."""

import hashlib
import logging
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import s3fs
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from components.data.decoded import ImageSamples
from components.data.shards import View, load_index
from components.data.sources.webdataset import TarResharder, TarSurvey, list_tars
from components.data.stream import Layout, RankReader, Share
from components.runtime.storage.store import Store
from pipelines.command.data import default_samples
from tests.benchmarks.photos import DIFFERENT, photo
from tests.emulators import in_environment, of_s3
from tests.faults.conftest import Record
from tests.faults.runs import CASCADE, Stored, kill_group, wait_until
from tests.image_sets import tar_of, write_set
from tests.waiting import in_thread


class CountedS3(NamedTuple):
    """Where it is, and what it has sent."""

    endpoint: str
    sent: Counter[str]  # "bucket/key" -> bytes of bodies, of GET

    def bucket(self, name: str) -> str:
        """URL of a new bucket."""
        s3fs.S3FileSystem(endpoint_url=self.endpoint, skip_instance_cache=True).mkdir(name)
        return f"s3://{name}"

    def take(self) -> dict[str, int]:
        """Bytes of each tar, by its URL, that were sent since the last call."""
        found = {f"s3://{path}": count for path, count in self.sent.items() if path.endswith(".tar")}
        self.sent.clear()
        return found


@contextmanager
def counted_s3() -> Iterator[CountedS3]:
    """The server; its address and keys stand in the environment of this process and of all that it starts meanwhile."""
    moto, sent = DomainDispatcherApplication(create_backend_app), Counter[str]()

    def counting(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        body, path = moto(environ, start_response), environ["PATH_INFO"].lstrip("/")
        for part in body:
            if environ["REQUEST_METHOD"] == "GET":
                sent[path] += len(part)  # before the client has it all
            yield part

    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # or it says each request
    server = make_server("127.0.0.1", 0, counting, threaded=True)
    endpoint = f"http://127.0.0.1:{server.server_port}"
    with in_thread(server), in_environment(of_s3(endpoint)):
        yield CountedS3(endpoint, sent)


pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]
PROVES = ("components/data",)
TARS, TAR_BYTES = 10, 100_000_000
IMAGE_BYTES = 110_000  # of a photograph of ImageNet
TAR_SAMPLES = TAR_BYTES // (IMAGE_BYTES + 1536)  # with their headers and labels
READERS = 16
BATCH, STREAMS = 256, 48


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
        members = [
            (f"{shard:02d}-{number:05d}.{name}", data)
            for number in range(TAR_SAMPLES)
            for name, data in (("cls", str(shard % 4).encode()), ("jpg", files[number % DIFFERENT]))
        ]
        bucket.write(f"train-{shard:02d}.tar", tar_of(members))
    return bucket.uri


class Resharding(Stored):
    """The command that writes the tars again."""

    def __init__(self, place: Path, tars: str, out: str) -> None:
        super().__init__(place, storage=out)
        self.tars, self.out = tars, Store(out)

    def start(self) -> subprocess.Popen:
        return self.launch(CASCADE, "data", "webdataset", f"{self.tars}/*.tar", "--out", self.out.uri)

    def done(self) -> int:
        return len(self.out.list("parts"))

    def files(self) -> dict[str, str]:
        """Path -> sha256 of everything that was written."""
        return {info.path: hashlib.sha256(self.out.read(info.path)).hexdigest() for info in self.out.list()}


def test_tars_are_written_again_to_the_same_bytes_though_the_machine_goes_away(
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
    index = load_index(killed.out.uri)
    assert (index.samples, index.quarantined) == (TARS * TAR_SAMPLES, 0)
    gone = f"killed with {done} of {TARS} tars done: the other {len(again)} were read, all bytes are the same"
    record(f"{TARS} tars of 100 MB written again, `kill -9` half-way", 1, gone)


def test_sixteen_readers_are_sent_what_the_order_says_before_tars_are_written_again_and_after(
    server: CountedS3, tars: str, record: Record
):
    """To the byte, but for shards of the next epoch that are fetched ahead at the end."""
    store = Store(server.bucket("small"))
    header, listed = write_set(store, sizes=(2,)), list_tars(tars)
    survey = TarSurvey(store, header.holdout_fraction)
    reshard = TarResharder(store, header.holdout_fraction, default_samples("webdataset"))
    for name, work in (("before", survey), ("after", reshard)):
        facts = [fact for tar in listed for fact in work({str(tar): "\n".join(map(str, tar))}).values()]
        entries = tuple(entry for tar in facts for entry in tar.entries)
        counts = {name: sum(getattr(e, name) for e in entries) for name in ("samples", "train_samples")}
        index = header.model_copy(update={"shards": entries, "classes": tuple("0123"), "labels": "name"} | counts)
        assert index.samples == TARS * TAR_SAMPLES
        samples, sizes, positions = ImageSamples(index, View(256)), [e.bytes for e in entries], []
        due = ahead = 0
        server.take()
        for rank in range(READERS):
            share = Share(BATCH, 0, STREAMS, index.train_samples // BATCH, rank=rank, world_size=READERS)
            reader = RankReader(samples, share, layout=Layout.of(samples, share))
            for step in range(share.total_steps):
                positions.append(reader.rows(step, step + 1)["position"])
            first = set(reader.order.locate(share.positions(0, share.total_steps)).shards.tolist())
            due += sum(sizes[shard] for shard in first)
            for coming in reader.shards.values():
                coming.result()  # until the server has sent it
            ahead += sum(sizes[shard] for shard in reader.shards if shard not in first)
        sent, planned = sum(server.take().values()) - ahead, reader.order.fetched(sizes, READERS)
        assert sent == due <= planned  # a tar that only the rest of the epoch, less than a batch, needs is left out
        assert len(set(np.concatenate(positions).tolist())) == share.total_steps * BATCH
        often = f"{sent / sum(sizes):.2f} bytes for each of the set, {sent / 1e9:.2f} GB, as planned"
        record(f"{name}: {len(index.shards)} tars, {READERS} readers, 256², a batch of {BATCH}", 1, often)
        assert sent / sum(sizes) < (2.7 if name == "before" else 1.7)
