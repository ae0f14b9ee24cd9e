"""Laws of uploads: what a file does to its decoder, in memory or time, costs its own request and no other one."""

import asyncio
import io
import os
import signal
from collections.abc import Iterator

import psutil
import pytest
from PIL import Image

from components.serving import uploads
from components.serving.messages import ServiceError
from components.serving.settings import Limits
from components.serving.uploads import Decoders
from tests.serving_bad_input import png
from tests.waiting import eventually

SECONDS = 6.0  # some for a busy machine
ROOM = 400 * 2**20  # bytes: the program is 150 of them
pytestmark = pytest.mark.timeout(120)


SMALL = png(8, 8)


@pytest.fixture
def decoders() -> Decoders:
    return Decoders(Limits(decoding_bytes=ROOM, decoding_seconds=SECONDS, image_pixels=2**27))


@pytest.fixture(autouse=True)
def ended() -> Iterator[None]:
    yield
    for process in processes():
        process.kill()


def processes() -> list[psutil.Process]:
    """Those that decode for this one."""
    living = [each for each in psutil.Process().children() if each.status() != psutil.STATUS_ZOMBIE]
    return [each for each in living if uploads.__name__ in each.cmdline()]


async def read(decoders: Decoders, *images: bytes) -> list[dict[str, bytes] | ServiceError]:
    """What comes of requests that are there at the same time."""
    asked = (decoders.read({"image": image}, task=None, side=8) for image in images)
    found = await asyncio.gather(*asked, return_exceptions=True)
    known = [each for each in found if isinstance(each, dict | ServiceError)]
    assert known == found
    return known


def statuses(found: list[dict[str, bytes] | ServiceError]) -> list[int]:
    return [each.status if isinstance(each, ServiceError) else 200 for each in found]


def test_a_decompression_bomb_costs_its_own_request_and_its_process_goes_on() -> None:
    decoders = Decoders(Limits(decoding_bytes=ROOM, decoding_seconds=100, image_pixels=2**27))
    bomb = png(2**13, 2**13, 0, "RGBA")
    assert len(bomb) < 2**19, "a small file, of 256 MiB as RGBA"
    refused, made = asyncio.run(read(decoders, bomb, SMALL))
    assert isinstance(refused, ServiceError)
    assert (refused.status, refused.param) == (413, "image")
    assert refused.message == "image takes too much memory to decode: give a smaller one"
    with pytest.raises(ServiceError, match="image or mask takes too much memory to decode"):
        asyncio.run(decoders.read({"image": SMALL, "mask": bomb}, task=None, side=8))
    assert isinstance(made, dict)
    before = {each.pid for each in processes()}
    assert statuses(asyncio.run(read(decoders, SMALL, SMALL))) == [200, 200]
    assert {each.pid for each in processes()} == before


def test_a_decoder_that_hangs_is_ended_and_others_are_answered_meanwhile(decoders: Decoders) -> None:
    asyncio.run(read(decoders, SMALL))
    (hanging,) = processes()
    hanging.suspend()

    async def asked() -> list[int]:
        first = asyncio.create_task(read(decoders, png(16, 16)))  # to the process that is there
        await asyncio.sleep(0.1)
        others = await read(decoders, SMALL, SMALL)
        assert not first.done(), "they were answered while it hung"
        return statuses([*others, *await first])

    assert asyncio.run(asked()) == [200, 200, 413]
    assert eventually(lambda: not hanging.is_running())
    assert statuses(asyncio.run(read(decoders, SMALL))) == [200]


def test_a_decoder_that_dies_takes_one_request_with_it(decoders: Decoders) -> None:
    asyncio.run(read(decoders, SMALL))
    (dying,) = processes()
    dying.suspend()

    async def asked() -> list[dict[str, bytes] | ServiceError]:
        task = asyncio.create_task(read(decoders, SMALL))
        await asyncio.sleep(0.2)
        dying.send_signal(signal.SIGKILL)
        return await task

    (refused,) = asyncio.run(asked())
    assert isinstance(refused, ServiceError)
    assert (refused.status, refused.message) == (400, "image can't be decoded: give a PNG, JPEG or WebP file")
    assert statuses(asyncio.run(read(decoders, SMALL))) == [200]


def test_a_decoder_that_died_while_it_was_idle_costs_nobody_anything(decoders: Decoders) -> None:
    asyncio.run(read(decoders, SMALL))
    (idle,) = processes()
    idle.kill()
    idle.wait()
    assert statuses(asyncio.run(read(decoders, SMALL))) == [200]


class Emptied(list[uploads.UploadProcess]):
    """Idle decoders, the last of which another thread takes after this one has looked."""

    def __bool__(self) -> bool:
        return True


def test_the_last_idle_decoder_may_be_taken_by_another_thread(decoders: Decoders) -> None:
    decoders._idle = Emptied()
    assert statuses(asyncio.run(read(decoders, SMALL))) == [200]


def test_no_more_than_a_few_decode_at_a_time_and_all_are_answered(decoders: Decoders) -> None:
    assert statuses(asyncio.run(read(decoders, *[SMALL] * 12))) == [200] * 12
    assert 1 <= len(processes()) <= uploads.MOST


def test_a_decoder_has_no_keys_and_writes_no_file(decoders: Decoders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CASCADE_API_KEYS", "key-of-a-client")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "key-of-a-bucket")
    asyncio.run(read(decoders, SMALL))
    (process,) = processes()
    assert not any("key-of" in value for value in process.environ().values())
    assert process.rlimit(psutil.RLIMIT_FSIZE) == process.rlimit(psutil.RLIMIT_CORE) == (0, 0)
    assert process.rlimit(psutil.RLIMIT_AS) == (ROOM, ROOM)
    assert os.environ["CASCADE_API_KEYS"] == "key-of-a-client"


@pytest.mark.parametrize("file_format", ["GIF", "BMP", "TIFF", "PPM", "ICO"])
def test_formats_beside_three_are_not_decoded(decoders: Decoders, file_format: str) -> None:
    data = io.BytesIO()
    Image.new("RGB", (16, 16)).save(data, file_format)
    (refused,) = asyncio.run(read(decoders, data.getvalue()))
    assert isinstance(refused, ServiceError)
    assert refused.message == "image is neither PNG nor JPEG nor WebP: give such a file"
