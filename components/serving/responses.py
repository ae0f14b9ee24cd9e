"""Answers: images in base64, server-sent events, usage; a job lasts while the client waits.

A token of text is four bytes of the prompt in UTF-8, one of an image a patch of 16x16 pixels, each rounded up.
"""

import asyncio
import base64
import io
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping
from contextlib import aclosing
from math import ceil
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from components.sampling.image_files import open_header, open_image
from components.sampling.requests import Request
from components.serving import messages

BYTES, PATCH = 4, 16  # of a token: UTF-8, pixels
STOPPED = "the model stopped before its images were made; try again"
RUNNING: set[asyncio.Task[None]] = set()  # asyncio itself holds tasks weakly
Format = Literal["png", "jpeg", "webp"]
Shown = messages.Partial | messages.FinishedImage
Kind = Literal["image_generation", "image_edit"]  # prefix of the types of events


class InputTokens(BaseModel):
    """Tokens of a request's texts and images."""

    text_tokens: int
    image_tokens: int


class Usage(BaseModel):
    """Tokens: four bytes of a prompt, patches of 16x16 pixels of an image."""

    total_tokens: int
    input_tokens: int
    output_tokens: int
    input_tokens_details: InputTokens
    output_tokens_details: InputTokens


class MadeImage(BaseModel):
    """A finished image."""

    b64_json: str
    seed: int


class ImagesAnswer(BaseModel):
    """The images of a request, in the order of their seeds."""

    created: int
    background: Literal["opaque"] = "opaque"
    output_format: Format
    size: str
    data: list[MadeImage]
    usage: Usage
    model: str
    version: str


class ImageEvent(BaseModel):
    """A preview of an image, or the image.
    …partial_image has index, stage and step, …completed usage and version."""

    type: Literal[
        "image_generation.partial_image",
        "image_generation.completed",
        "image_edit.partial_image",
        "image_edit.completed",
    ]
    b64_json: str
    created_at: int
    size: str
    quality: Literal["auto"] = "auto"
    background: Literal["opaque"] = "opaque"
    output_format: Format
    image_index: int
    seed: int
    model: str
    partial_image_index: int | None = None
    stage: str | None = None
    step: int | None = None
    version: str | None = None
    usage: Usage | None = None


class ModelEntry(BaseModel):
    """A served model; its card says what requests of it may say."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["image-cascade"] = "image-cascade"
    card: dict[str, Any]


class ModelList(BaseModel):
    """The served models that answer."""

    object: Literal["list"] = "list"
    data: list[ModelEntry]


class Call(NamedTuple):
    """A job, and the form of the images in the answer."""

    kind: Kind
    model: str
    job: messages.ImageJob
    output_format: Format
    quality: int  # of jpeg and webp, 0 to 100


class EventStream(StreamingResponse):
    """Server-sent events; closes the source, however the answer ends and even before the start."""

    def __init__(self, lines: AsyncGenerator[str], source: AsyncGenerator[Shown]) -> None:
        super().__init__(lines, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self.source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.source.aclose()


def entry(card: messages.Card) -> ModelEntry:
    """Returns a model's entry for lists of models."""
    generators = [generator._asdict() for generator in card.generators]
    return ModelEntry(id=card.name, created=card.created, card=card._asdict() | {"generators": generators})


async def images_answer(call: Call, events: AsyncGenerator[Shown]) -> ImagesAnswer:
    """Returns all images of a call. Raises ServiceError for a refusal, and if some never came."""
    images: dict[int, messages.FinishedImage] = {}
    async with aclosing(events):
        async for event in events:
            if isinstance(event, messages.FinishedImage):
                images[event.image] = event
    requests = call.job.requests
    if len(images) < len(requests):
        raise messages.Unavailable(STOPPED)
    pngs = [images[number].png for number in range(len(requests))]
    texts = await asyncio.gather(*(as_text(png, call) for png in pngs))
    data = [MadeImage(b64_json=text, seed=request.seed) for text, request in zip(texts, requests, strict=True)]
    return ImagesAnswer(
        created=int(time.time()),
        output_format=call.output_format,
        size="{}x{}".format(*open_header(pngs[0]).size),
        data=data,
        usage=usage_of(requests[0], pngs[0], count=len(requests)),
        model=call.model,
        version=images[0].version,
    )


async def stream_answer(call: Call, events: AsyncGenerator[Shown]) -> EventStream:
    """Returns a call's events as a stream, once the first has come: until then an error has a status.
    An error on the way is the last event."""
    if (first := await anext(events, None)) is None:
        raise messages.Unavailable(STOPPED)

    async def lines() -> AsyncGenerator[str]:
        missing, event = len(call.job.requests), first
        try:
            while event is not None:
                yield await event_line(call, event)
                missing -= isinstance(event, messages.FinishedImage)
                event = await anext(events, None)
            if missing:
                raise messages.Unavailable(STOPPED)
        except messages.ServiceError as error:
            yield line("error", {"type": "error", **error.body()})
        except ClientDisconnect:
            return

    return EventStream(lines(), events)


async def event_line(call: Call, event: Shown) -> str:
    """Returns a preview or an image as an event of the stream."""
    request = call.job.requests[event.image]
    message: dict[str, Any] = {
        "type": f"{call.kind}.{'completed' if isinstance(event, messages.FinishedImage) else 'partial_image'}",
        "b64_json": await as_text(event.png, call),
        "created_at": int(time.time()),
        "size": "{}x{}".format(*open_header(event.png).size),
        "output_format": call.output_format,
        "image_index": event.image,
        "seed": request.seed,
        "model": call.model,
    }
    if isinstance(event, messages.FinishedImage):
        message |= {"version": event.version, "usage": usage_of(request, event.png, count=1)}
    else:
        message |= {"partial_image_index": event.number, "stage": event.stage, "step": event.step}
    return line(message["type"], ImageEvent.model_validate(message).model_dump(exclude_none=True))


def line(event: str, data: Mapping[str, Any]) -> str:
    """Returns a server-sent event."""
    return f"event: {event}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n"


async def as_text(png: bytes, call: Call) -> str:
    """Returns the base64 of an image in the wanted format."""

    def converted() -> bytes:
        buffer = io.BytesIO()
        open_image(png).convert("RGB").save(buffer, format=call.output_format.upper(), quality=call.quality)
        return buffer.getvalue()

    return base64.b64encode(png if call.output_format == "png" else await asyncio.to_thread(converted)).decode()


def usage_of(request: Request, png: bytes, *, count: int) -> Usage:
    """Returns the usage of `count` images of the same size and request."""
    text = count * ceil(len((request.prompt or "").encode()) / BYTES)
    inputs = count * sum(patches(image) for image in (request.image, request.condition) if image is not None)
    outputs = count * patches(png)
    return Usage(
        total_tokens=text + inputs + outputs,
        input_tokens=text + inputs,
        output_tokens=outputs,
        input_tokens_details=InputTokens(text_tokens=text, image_tokens=inputs),
        output_tokens_details=InputTokens(text_tokens=0, image_tokens=outputs),
    )


def patches(image: bytes) -> int:
    """Returns the tokens of an encoded image."""
    width, height = open_header(image).size
    return ceil(width / PATCH) * ceil(height / PATCH)


async def watched(
    events: AsyncIterator[messages.Event], job: messages.ImageJob, *, receive: Receive, started: float, seconds: float
) -> AsyncGenerator[Shown]:
    """Yields the events of a job, and cancels the job when this generator ends.
    `receive`: of a request whose body was read; tells that the client went away. `started`: when the request came, by
    time.monotonic(); the job may take `seconds` from then on. Raises ServiceError for a job that is refused or late,
    ClientDisconnect when the client went away, and what reading the events raises."""
    items: asyncio.Queue[messages.Event | Exception | None] = asyncio.Queue()  # None: the events are over

    async def wait_for_leaving() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        items.put_nowait(ClientDisconnect())

    tasks = [lasting(read_into(events, items)), lasting(wait_for_leaving())]
    deadline = asyncio.get_running_loop().time() + seconds - (time.monotonic() - started)
    try:
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    item = await items.get()
            except TimeoutError:
                message = f"the image was not ready within {seconds:g} s: ask for fewer images or steps"
                raise messages.ServiceError(503, message, code="timeout", retry_after=1) from None
            if item is None:
                return
            if isinstance(item, Exception):
                raise item
            if isinstance(item, messages.Refused):
                raise messages.of_refused(item, job.requests[0])
            yield item
    finally:
        for task in tasks:  # the first closes the events in its own time
            task.cancel()


def lasting(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """Returns a task that runs to the end, even after all references are dropped."""
    task = asyncio.create_task(work)
    RUNNING.add(task)
    task.add_done_callback(RUNNING.discard)
    return task


async def read_into(
    events: AsyncIterator[messages.Event], items: asyncio.Queue[messages.Event | Exception | None]
) -> None:
    """Puts events and the end marker into a queue, and closes the source."""
    try:
        async for event in events:
            items.put_nowait(event)
        items.put_nowait(None)
    except Exception as error:  # goes on where the events are read
        items.put_nowait(error)
    finally:
        if isinstance(events, AsyncGenerator):
            await events.aclose()
