"""Uploaded images, decoded in processes of their own with limits of memory and time.

A decoder is C code that reads what strangers send: what it breaks is its process, which holds neither API keys nor
requests of others. Each is `python -m` this file: it reads requests from its standard input, answers on its standard
output, and ends where the input does.
"""

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import IO, Any

import numpy as np
import psutil
from PIL import Image, ImageOps, UnidentifiedImageError

from components.sampling.image_files import UPLOADED, WHITE, encode_png, is_transparent, open_header, to_mask, to_rgb
from components.serving.messages import ServiceError, Unavailable, invalid
from components.serving.settings import Limits

REMEDY = "give a PNG, JPEG or WebP file"
MOST = 4  # processes of a service's process for HTTP
START_SECONDS = 60.0
SHRINKABLE = (None, "inpainting", "uncropping", "colorization")  # the same for smaller images


class Decoders:
    """Processes to decode in; a new process starts where all are busy, or after a failure."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._threads = ThreadPoolExecutor(MOST, "uploads")  # each waits for a process
        self._idle: list[UploadProcess] = []

    async def read(self, files: Mapping[str, bytes], *, task: str | None, side: int) -> dict[str, bytes]:
        """Returns images as `read_given` does.
        Raises ServiceError as it does, and for an image that takes a process more memory or time than the limits, or
        ends it; Unavailable where no process starts."""
        if not files:
            return {}
        asked = {"task": task, "side": side, "pixels": self._limits.image_pixels}
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._read, files, asked)

    def _read(self, files: Mapping[str, bytes], asked: Mapping[str, Any]) -> dict[str, bytes]:
        names, limits = " or ".join(files), self._limits  # which of them it was is not known
        try:
            while not (decoder := self._idle.pop()).lives:
                pass
        except IndexError:  # none is left, or another thread was quicker
            decoder = UploadProcess(limits)
        try:
            said, images = decoder.answer(asked, files, seconds=limits.decoding_seconds)
        except TimeoutError:
            message = f"{names} takes more than {limits.decoding_seconds:g} s to decode: give a smaller one"
            raise ServiceError(413, message, param=next(iter(files))) from None
        except (OSError, ValueError):
            raise invalid(next(iter(files)), f"{names} can't be decoded: {REMEDY}") from None
        self._idle.append(decoder)
        if refused := said.get("refused"):
            raise ServiceError(**refused)
        return images


class UploadProcess:
    """A process to decode in, seen from the service."""

    def __init__(self, limits: Limits) -> None:
        """Starts the process. Raises Unavailable if it does not come up."""
        own = {"PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"}  # without keys
        command = [sys.executable, "-W", "ignore", "-m", __name__, str(limits.decoding_bytes)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=own)
        try:
            self.answer({}, {}, seconds=START_SECONDS)
        except (OSError, ValueError):
            raise Unavailable("uploads can't be decoded now; try again in a moment") from None

    @property
    def lives(self) -> bool:
        """Tells whether the process is there."""
        return self._process.poll() is None

    def answer(
        self, asked: Mapping[str, Any], files: Mapping[str, bytes], *, seconds: float
    ) -> tuple[dict[str, Any], dict[str, bytes]]:
        """Returns the process's answer to a message; a process without one is ended.
        Raises TimeoutError if none came in time, OSError or ValueError if the process ended."""
        source, sink = self._process.stdout, self._process.stdin
        assert source is not None
        assert sink is not None

        end = time.monotonic() + seconds
        watch = threading.Timer(seconds, self._process.kill)
        watch.start()
        try:
            send(sink, asked, files)
            answer = receive(source)
        except (OSError, ValueError) as error:
            self._process.kill()
            self._process.wait()
            if time.monotonic() >= end:
                raise TimeoutError from error
            raise
        finally:
            watch.cancel()
            watch.join()
        if time.monotonic() >= end:  # as late as this, an answer comes from a process that is being ended
            self._process.kill()
            self._process.wait()
            raise TimeoutError
        return answer


def send(sink: IO[bytes], said: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
    """Writes a message and the files that belong to it."""
    sizes = {name: len(data) for name, data in files.items()}
    sink.write(json.dumps({"said": dict(said), "sizes": sizes}).encode() + b"\n" + b"".join(files.values()))
    sink.flush()


def receive(source: IO[bytes]) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Reads a message and its files. Raises ValueError where the source ends."""
    message = json.loads(source.readline())
    files = {name: source.read(size) for name, size in message["sizes"].items()}
    if any(len(files[name]) < size for name, size in message["sizes"].items()):
        raise ValueError("cut off")
    return message["said"], files


def main() -> None:
    """Answers messages until there are no more. The first argument: the process's memory, bytes."""
    if hasattr(psutil, "RLIMIT_AS"):  # of Linux and FreeBSD; elsewhere only time is limited
        process = psutil.Process()
        for limit, most in ((psutil.RLIMIT_AS, int(sys.argv[1])), (psutil.RLIMIT_FSIZE, 0), (psutil.RLIMIT_CORE, 0)):
            process.rlimit(limit, (most, most))
    while True:
        try:
            asked, files = receive(sys.stdin.buffer)
        except ValueError:
            return
        said, images = dict[str, Any](), dict[str, bytes]()
        try:
            images = read_given(files, **asked) if files else {}
        except ServiceError as error:
            said = {"refused": {"status": error.status, "message": error.message, "param": error.param}}
        except MemoryError:
            message = f"{' or '.join(files)} takes too much memory to decode: give a smaller one"
            said = {"refused": {"status": 413, "message": message, "param": next(iter(files))}}
        send(sys.stdout.buffer, said, images)


def read_given(files: Mapping[str, bytes], *, task: str | None, side: int, pixels: int) -> dict[str, bytes]:
    """Returns the images of a request as PNG in the form of a generator's input, a mask white to be made.
    `side`: pixels of the generator's images; a larger square is shrunk to it where the task is then the same one.
    `pixels`: of a file at most. Raises ServiceError for what is no image, or a mask of another size than its image."""
    images = {name: read_upload(name, data, pixels) for name, data in files.items()}
    image, mask, condition = images.get("image"), images.get("mask"), images.get("condition")
    if image is not None and mask is None and is_transparent(image) and task in (None, "inpainting", "uncropping"):
        mask = image  # OpenAI's meaning
    if image is not None and mask is not None and image.size != mask.size:
        sizes = f"{mask.width}x{mask.height} pixels, the image {image.width}x{image.height}"
        raise invalid("mask", f"the mask has {sizes}: they must be the same")
    mask = mask and to_mask(mask)
    if image is not None and image.width == image.height > side and task in SHRINKABLE:
        small = partial(Image.Image.resize, size=(side, side), resample=Image.Resampling.BOX)
        image = small(to_rgb(image))
        if mask is not None:  # white where any pixel was
            white = small(Image.fromarray((np.asarray(mask) >= WHITE).astype(np.float32)))
            mask = Image.fromarray(np.asarray(white) > 0).convert("L")
    if condition is not None and condition.width != condition.height:
        size = f"{condition.width}x{condition.height}"
        raise invalid("condition", f"the condition has {size} pixels: give a square image")
    if condition is not None and condition.mode.startswith(("I", "F")):
        raise invalid("condition", "the condition has more than 8 bits a channel: give one of 8 bits")
    given = {"image": image and to_rgb(image), "mask": mask, "condition": condition and to_rgb(condition)}
    return {name: encode_png(each) for name, each in given.items() if each is not None}


def read_upload(name: str, data: bytes, pixels: int) -> Image.Image:
    """Returns an uploaded image, decoded and upright. Raises ServiceError for no image or too many pixels."""
    if not data:
        raise invalid(name, f"{name} is empty: {REMEDY}")
    try:
        image = open_header(data, formats=UPLOADED)
    except UnidentifiedImageError:
        raise invalid(name, f"{name} is neither PNG nor JPEG nor WebP: give such a file") from None
    except (ValueError, Image.DecompressionBombError):
        raise ServiceError(413, f"{name} is too large to decode: give a smaller one", param=name) from None
    except Exception:  # as below
        raise invalid(name, f"{name} can't be read: {REMEDY}") from None
    if image.width * image.height > pixels:
        message = f"{name} has {image.width}x{image.height} pixels, more than {pixels}: give a smaller one"
        raise ServiceError(413, message, param=name)
    try:
        image.load()
        return ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception:  # decoders raise whatever they stumble over
        raise invalid(name, f"{name} is cut off or damaged: give a whole image file") from None


if __name__ == "__main__":
    main()
