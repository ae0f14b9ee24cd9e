"""Requests and files that nobody would send: each gets an answer that is documented, and nothing grows or hangs.

`FUZZING_CASES` says how many there are of each kind (500), `FUZZING_SEED` which.
"""

import gzip
import io
import json
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from components.data.listing import ShardError, SourceError
from components.data.sources.folder import read_rows
from components.data.sources.parquet import ParquetReader, list_parquet
from components.data.sources.source import COMMON
from components.data.sources.webdataset import checked_groups
from components.serving.messages import ErrorAnswer
from components.serving.middleware import EDITS, GENERATIONS
from tests.faults.conftest import Record
from tests.image_sets import tar_of
from tests.waiting import eventually

pytestmark = [pytest.mark.faults, pytest.mark.timeout(36_000)]
PROVES = ("components/serving", "components/data")
CASES, SEED = int(os.environ.get("FUZZING_CASES", "500")), int(os.environ.get("FUZZING_SEED", "0"))
LIMITS = {"images": 2, "steps": 4, "candidates": 2, "image_pixels": 2**16, "body_bytes": 2**17}
GROWTH = 64 * 2**20  # bytes of memory of the service after a quarter of a kind's cases
HEALTH_SECONDS = 1.0
SPAWN = multiprocessing.get_context("spawn")
OPENAPI = Path(__file__).parents[2] / "components/serving/openapi.json"
PNG, JPEG, WEBP = (io.BytesIO() for _ in range(3))
for form, place in {"PNG": PNG, "JPEG": JPEG, "WEBP": WEBP}.items():
    Image.effect_noise((16, 16), 90).convert("RGB").save(place, form)
IMAGES = [place.getvalue() for place in (PNG, JPEG, WEBP)]
WORDS = {"prompt": "red", "label": "food", "n": 1, "size": "auto", "seed": 7, "steps": 2, "model": "tiny"}
BODIES = [
    json.dumps(WORDS | {"sampling": {"base": {"eta": 0.5, "sampler": "ddim"}}, "stream": True}).encode(),
    json.dumps(
        WORDS
        | {"model": "tokens", "prompt": "", "steps": None, "top_k": 3, "top_p": 0.9, "temperature": 1.5, "size": None}
    ).encode(),
]
HEAD = b'--x\r\nContent-Disposition: form-data; name="%s"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
FIELD = b'--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n'
FORMS = [
    HEAD % b"image"
    + image
    + b"\r\n"
    + FIELD % (b"model", b"palette")
    + FIELD % (b"task", b"colorization")
    + FIELD % (b"steps", b"2")
    + b"--x--\r\n"
    for image in IMAGES
]


def serve(folder: Path, connection: Connection) -> None:
    """A service in a process of its own, until the connection says so."""
    import torch  # here, as what a kind of case alone needs below: readers of files wait for none of it

    from tests.serving_backend import load_backends, serving

    torch.set_num_threads(1)
    with serving(*load_backends(folder).values(), limits=LIMITS) as url:
        connection.send(url)
        connection.recv()


def watch(url: str, slowest: Any) -> None:
    """Asks for health all the time, and keeps the most seconds that it took.
    In a process of its own: the work of making requests is not in the figure."""
    with httpx2.Client(timeout=60) as client:
        while True:
            began = time.monotonic()
            assert client.get(f"{url}/healthz").status_code == 200
            slowest.value = max(slowest.value, time.monotonic() - began)
            time.sleep(0.1)


class Service:
    """A service and who watches its health; `answers` counts what came by status."""

    def __init__(self, url: str, process: psutil.Process) -> None:
        self.url, self.process, self.client = url, process, httpx2.Client(timeout=60)
        self.answers, self.before = Counter[int](), 0
        self.slowest = SPAWN.Value("d", 0.0)
        self.watch = SPAWN.Process(target=watch, args=(url, self.slowest), daemon=True)
        self.watch.start()
        assert eventually(lambda: self.slowest.value > 0, 60)

    def check(self, status: int, text: str, retry_after: str | None) -> None:
        """Fails for an answer that is no documented one."""
        self.answers[status] += 1
        if self.answers.total() == max(1, CASES // 4):
            self.before = self.process.memory_info().rss  # from here on nothing is new to it
        assert status == 200 or 400 <= status < 500 or (status == 503 and retry_after), (status, text)
        if status != 200:
            assert ErrorAnswer.model_validate_json(text).error.message

    def grown(self) -> int:
        """Bytes since a quarter of a kind's cases."""
        return self.process.memory_info().rss - self.before

    def post(self, path: str, body: bytes, kind: str) -> int:
        answer = self.client.post(self.url + path, content=body, headers={"Content-Type": kind})
        self.check(answer.status_code, answer.text, answer.headers.get("Retry-After"))
        return answer.status_code


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=serve, args=(tmp_path_factory.mktemp("models"), theirs))
    process.start()
    yield (known := Service(ours.recv(), psutil.Process(process.pid)))
    known.watch.kill()
    ours.send(None)
    process.join(60)


def fuzzed(cases: int = CASES) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The decorator of a law that so many cases have to keep; the seed says which."""
    slow = list(HealthCheck)
    chosen = settings(
        max_examples=cases, deadline=None, database=None, suppress_health_check=slow, phases=[Phase.generate]
    )
    return lambda law: seed(SEED)(chosen(law))


@st.composite
def damaged(draw: st.DrawFn, wholes: list[bytes]) -> bytes:
    """One of some files with a few bytes of it changed, put in, or left out, or cut off."""
    data = bytearray(draw(st.sampled_from(wholes)))
    for _ in range(draw(st.integers(1, 6))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.sampled_from([start, start + 1, start + 4]))
        data[start:end] = draw(st.binary(max_size=8) | st.sampled_from([b"\xff" * 4, b"\0" * 8, b"{" * 99, b"9" * 20]))
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.integers(0, 4)) == 0 else data)


def test_each_request_of_the_openapi_is_answered_as_it_says(service: Service, record: Record) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    known = pytest.importorskip("schemathesis.specs.openapi.checks")
    checks = [known.status_code_conformance, known.content_type_conformance, known.response_schema_conformance]
    schema = schemathesis.openapi.from_dict(json.loads(OPENAPI.read_text()))
    for result in schema.get_all_operations():
        operation: Any = result.ok()

        @fuzzed(CASES if operation.method.upper() == "POST" else CASES // 10)
        @given(case=operation.as_strategy())
        def law(case: Any) -> None:
            answer = case.call(base_url=service.url)
            service.check(answer.status_code, answer.text, (answer.headers.get("retry-after") or [None])[0])
            case.validate_response(answer, checks=checks)

        law()
    finished(service, record, "requests by the OpenAPI", 2 * CASES + 2 * (CASES // 10))


def finished(service: Service, record: Record, fault: str, cases: int) -> None:
    """Writes the row of a kind of case, and begins to count for the next one."""
    answers, grown, slowest = dict(sorted(service.answers.items())), service.grown(), service.slowest.value
    service.answers.clear()
    service.slowest.value = 0.0
    assert service.watch.is_alive()
    assert 0 < slowest < HEALTH_SECONDS
    assert grown < GROWTH
    record(fault, cases, f"{answers}; health within {slowest:.2f} s, {grown / 2**20:+.0f} MiB")


def test_bodies_that_are_no_json_are_refused(service: Service, record: Record) -> None:
    @fuzzed()
    @given(body=damaged(BODIES) | st.binary(max_size=200) | st.text().map(str.encode))
    def law(body: bytes) -> None:
        service.post(GENERATIONS, body, "application/json")

    law()
    finished(service, record, "damaged JSON", CASES)


def test_forms_and_their_images_are_answered_however_damaged(service: Service, record: Record) -> None:
    whole = st.builds(lambda image: FORMS[0].replace(IMAGES[0], image), damaged(IMAGES))

    @fuzzed()
    @given(body=damaged(FORMS) | whole)
    def law(body: bytes) -> None:
        service.post(EDITS, body, "multipart/form-data; boundary=x")

    assert {service.post(EDITS, body, "multipart/form-data; boundary=x") for body in FORMS} == {200}
    law()
    finished(service, record, "damaged forms, PNG, JPEG and WebP", CASES)


def refused(error: Exception, ends: Counter[str]) -> None:
    assert "\n" not in str(error), error
    ends["refused"] += 1


def members(image: bytes) -> list[tuple[str, bytes]]:
    return [("a.png", image), ("a.cls", b"3"), ("b.jpg", IMAGES[1]), ("b.json", b'{"caption": ["red"], "label": "x"}')]


def test_tars_are_read_or_refused_in_one_line(record: Record) -> None:
    plain = tar_of(members(IMAGES[0]))
    within = st.builds(lambda image: tar_of(members(image)), damaged(IMAGES))
    ends = Counter[str]()

    @fuzzed()
    @given(data=damaged([plain, gzip.compress(plain, mtime=0)]) | within)
    def law(data: bytes) -> None:
        try:
            for group, reason in checked_groups(data, "a.tar"):
                assert group.words.caption is not None
                assert reason is None or "\n" not in reason, reason
                ends["quarantined" if reason else "read"] += 1
        except ShardError as error:
            refused(error, ends)

    law()
    record("damaged tars and gzip", CASES, str(dict(ends)))


def parquet_file() -> bytes:
    images = pa.array([{"bytes": image, "path": "a"} for image in IMAGES * 2])
    table = pa.table({"image": images, "label": [0, 1, 2] * 2, "caption": ["red", "green", ""] * 2})
    pq.write_table(table, data := io.BytesIO(), row_group_size=3)
    return data.getvalue()


def test_parquet_is_read_or_refused_in_one_line(tmp_path: Path, record: Record) -> None:
    ends, whole = Counter[str](), parquet_file()

    @fuzzed()
    @given(data=damaged([whole]))
    def law(data: bytes) -> None:
        (tmp_path / "a.parquet").write_bytes(data)
        try:
            listing = list_parquet(str(tmp_path))
            assert isinstance(listing.reader, ParquetReader)
            for item in listing.items:
                drawn(listing.reader, item, listing.reader.read(item), ends)
        except SourceError as error:
            refused(error, ends)

    law()
    record("damaged Parquet", CASES, str(dict(ends)))


def drawn(reader: ParquetReader, item: Any, data: bytes, ends: Counter[str]) -> None:
    """Draws an image; what can't be drawn is quarantined, whatever its decoder raises."""
    try:
        reader.draw(item, data, resolution=8)
    except Exception:
        ends["quarantined"] += 1
    else:
        ends["read"] += 1


def test_descriptions_of_folders_are_read_or_refused_in_one_line(tmp_path: Path, record: Record) -> None:
    lines = b'{"file_name": "a.png", "text": "red"}\n{"file_name": "b.png", "text": ["x", "y"], "label": 3}\n'
    table = b'file_name,text,label\na.png,red,1\nb.png,"a, b",2\n'
    pq.write_table(pa.table({"file_name": ["a.png"], "text": ["red"]}), columns := io.BytesIO())
    ends = Counter[str]()
    kinds = [("jsonl", damaged([lines])), ("csv", damaged([table])), ("parquet", damaged([columns.getvalue()]))]

    @fuzzed()
    @given(file=st.one_of(*(st.tuples(st.just(kind), data) for kind, data in kinds)))
    def law(file: tuple[str, bytes]) -> None:
        place = tmp_path / f"metadata.{file[0]}"
        place.write_bytes(file[1])
        try:
            ends["read"] += bool(read_rows(str(place), COMMON).rows)
        except SourceError as error:
            refused(error, ends)

    law()
    record("damaged descriptions: JSON lines, CSV, Parquet", CASES, str(dict(ends)))
