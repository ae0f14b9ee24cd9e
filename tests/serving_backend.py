"""A tiny cascade behind the service's HTTP, in this process and without Ray: what a test of the API asks."""

import asyncio
import base64
import io
import socket
import threading
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import numpy as np
import openai
import uvicorn
from PIL import Image
from starlette.types import ASGIApp

from components.runtime.tracking.registry import Named
from components.sampling.cascade import Cascade, compose
from components.sampling.generator import Look
from components.sampling.image_files import encode_png
from components.sampling.images import to_uint8
from components.serving.app import build_app
from components.serving.keys import Rates
from components.serving.messages import Card, Event, FinishedImage, ImageJob, Partial, Refused, Unavailable
from components.serving.middleware import GENERATIONS
from components.serving.settings import ServedModel, ServiceSettings
from components.serving.versions import Version
from tests.tiny_cascade import FEW, OBJECTIVE, write_cascade
from tests.tiny_diffusion_branches import base
from tests.tiny_generators import PRIORS, token_branch
from tests.tiny_palette import write_palette

CREATED = 1_700_000_000
HTTP = httpx2.Client(timeout=60)  # of tests that ask without the official client


class LeftError(Exception):
    """Nobody wants the images that are sampled."""


def pixels(b64_json: str | None) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64_json or ""))).convert("RGB")).astype(int)


class SmallBackend:
    """One job at a time in a thread, as many previews as are asked for of the first steps.

    Args:
        most: jobs that may be under way; another one is refused as busy.
        step_seconds: that each denoising step takes longer.
    """

    def __init__(
        self, cascade: Cascade, *, name: str = "tiny", version: str = "3", most: int = 8, step_seconds: float = 0
    ) -> None:
        self.cascade, self.name, self.version, self.most = cascade, name, version, most
        self.step_seconds = step_seconds
        self.jobs: list[ImageJob] = []  # all that came
        self.left: list[ImageJob] = []  # those whose reader went away before the end
        self.working = 0
        self._one = threading.Lock()

    async def card(self) -> Card:
        model = ServedModel(name=self.name, source=f"models:/{self.name}@champion")
        return Version(model, Named(self.name, self.version, CREATED), self.cascade).card

    async def make(self, job: ImageJob) -> AsyncGenerator[Event]:
        self.jobs.append(job)
        if self.working >= self.most:
            yield Refused(429, "too many images wait: try again in 2 s", 2)
            return
        try:
            for request in job.requests:
                self.cascade.resolve(request)
        except ValueError as error:
            yield Refused(400, str(error))
            return
        events: asyncio.Queue[Event | None] = asyncio.Queue()
        loop, left = asyncio.get_running_loop(), threading.Event()
        self.working += 1
        task = asyncio.create_task(asyncio.to_thread(self._sample, job, loop, events, left))
        task.add_done_callback(lambda done: events.put_nowait(None))
        try:
            while (event := await events.get()) is not None:
                yield event
            await task
        finally:
            self.working -= 1
            if not task.done():
                left.set()
                self.left.append(job)

    def _sample(
        self, job: ImageJob, loop: asyncio.AbstractEventLoop, events: asyncio.Queue[Event | None], left: threading.Event
    ) -> None:
        told = 0

        def tell(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        def on_step(stage: str, step: int, time: float, x_t: Look, x_0: Look) -> None:
            nonlocal told
            if told < job.partial_images:
                for row, image in enumerate(to_uint8(x_0())):
                    tell(Partial(row, told, stage, step + 1, encode_png(image)))
            told += 1

        def between() -> None:
            if left.wait(self.step_seconds):
                raise LeftError

        try:
            with self._one:
                finished = self.cascade.sample_stages(job.requests, on_step=on_step, between=between)
        except LeftError:
            return
        for number, images in enumerate(finished):
            tell(FinishedImage(number, encode_png(list(images.values())[-1]), self.version))


class ToldBackend(SmallBackend):
    """Does what it is told instead of making images."""

    def __init__(self, cascade: Cascade, *told: Event | Exception, name: str = "tiny", away: bool = False) -> None:
        super().__init__(cascade, name=name)
        self.told, self.away = told, away

    async def card(self) -> Card:
        if self.away:
            raise Unavailable("the model can't be reached now; try again in a moment")
        return await super().card()

    async def make(self, job: ImageJob) -> AsyncGenerator[Event]:
        for event in self.told:
            if isinstance(event, Exception):
                raise event
            yield event


def load_backends(folder: Path, **options: Any) -> dict[str, SmallBackend]:
    """A cascade, a token branch, an image-to-image model, a base alone, one of few steps, and one that sees depth."""
    few, depth = {"objective": OBJECTIVE | {"num_train_timesteps": 10}}, {"condition_member": "depth"}
    folders = {"tiny": write_cascade(folder / "tiny")}
    folders |= {"tokens": token_branch(PRIORS["transformer"], folder / "tokens")}
    folders |= {"palette": write_palette(folder / "palette"), "base": write_base(folder / "base")}
    folders |= {"short": write_base(folder / "short", settings=few)}
    folders |= {"depth": write_base(folder / "depth", settings=depth, condition_image_channels=3)}
    return {name: SmallBackend(Cascade.load(path), name=name, **options) for name, path in folders.items()}


def write_base(folder: Path, **about: Any) -> Path:
    return compose(folder / "cascade", base=base(folder, **about), sampling={"base": FEW})


def settings_of(backends: Mapping[str, object], **settings: Any) -> ServiceSettings:
    models = tuple(ServedModel(name=name, source=f"models:/{name}@champion") for name in backends)
    return ServiceSettings(models=models, **settings)


@contextmanager
def serving(*backends: SmallBackend, keys: Sequence[str] = (), **settings: Any) -> Iterator[str]:
    """The address of a service of the backends, by their names."""
    named = {backend.name: backend for backend in backends}
    read = settings_of(named, **settings)
    minute = read.limits.key_images_minute
    take = None if minute is None else Rates(minute).take
    with served(build_app(named, read, read_keys=lambda: keys, take_share=take)) as url:
        yield url


def official(url: str) -> openai.OpenAI:
    """OpenAI's client of a service, which checks each field of what it gets."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, _strict_response_validation=True)


@contextmanager
def served(app: ASGIApp) -> Iterator[str]:
    """The address of a real server of an app, on a port of its own."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, args=([place],), daemon=True)
        thread.start()
        try:
            while not server.started:
                thread.join(0.01)
            yield "http://{}:{}".format(*place.getsockname())
        finally:
            server.should_exit = True
            thread.join(20)


def sending(
    url: str, data: bytes = b"", *, path: str = GENERATIONS, method: str = "POST", length: int = 99
) -> socket.socket:
    """A connection on which so much of a body of `length` bytes was sent."""
    place = urlsplit(url)
    connection = socket.create_connection((place.hostname or "", place.port or 0), timeout=20)
    lines = (f"{method} {path} HTTP/1.1", f"Host: {place.netloc}", "Content-Type: application/json")
    connection.sendall("\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode() + data)
    return connection
