"""What clients get: images in base64, server-sent events, usage.

Usage counts what has no price here, for clients that add it up: a token of text is four bytes of the prompt in UTF-8,
one of an image is a patch of 16x16 pixels, each rounded up; n images use n times what one does.
"""

import asyncio
import base64
import io
import json
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from math import ceil
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from components.sampling.image_files import open_header, open_image
from components.sampling.requests import Request
from components.serving.errors import ServiceError, of_refused, of_unavailable
from components.serving.messages import Card, Event, FinishedImage, ImageJob, Partial, Refused, Unavailable
from components.serving.watching import ClientGoneError

BYTES, PATCH = 4, 16  # of a token: UTF-8, pixels
STOPPED = "the model stopped before its images were made; try again"
Format = Literal["png", "jpeg", "webp"]
Kind = Literal["image_generation", "image_edit"]  # prefix of the types of events


class InputTokens(BaseModel):
    """What a request brought."""

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
    """A preview of an image (…partial_image, with index, stage and step), or the image (…completed, with usage and
    version)."""

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
    """A job, and how its images are wanted."""

    kind: Kind
    model: str
    job: ImageJob
    output_format: Format
    quality: int  # of jpeg and webp, 0 to 100


class EventStream(StreamingResponse):
    """Server-sent events; closes what they come from, however it ends and even if it never began."""

    def __init__(self, lines: AsyncGenerator[str], source: AsyncGenerator[Event]) -> None:
        super().__init__(lines, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self.source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.source.aclose()


def entry(card: Card) -> ModelEntry:
    generators = [each._asdict() for each in card.generators]
    return ModelEntry(id=card.name, created=card.created, card=card._asdict() | {"generators": generators})


async def images_answer(call: Call, events: AsyncGenerator[Event]) -> ImagesAnswer:
    """All images of a call. Raises ServiceError if they are refused, Unavailable if some never came."""
    made: dict[int, FinishedImage] = {}
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Refused):
                raise of_refused(event, call.job.requests[0])
            if isinstance(event, FinishedImage):
                made[event.image] = event
    requests = call.job.requests
    if len(made) < len(requests):
        raise Unavailable(STOPPED)
    pngs = [made[number].png for number in range(len(requests))]
    texts = await asyncio.gather(*(as_text(png, call) for png in pngs))
    data = [MadeImage(b64_json=text, seed=request.seed) for text, request in zip(texts, requests, strict=True)]
    return ImagesAnswer(
        created=int(time.time()),
        output_format=call.output_format,
        size=size_text(pngs[0]),
        data=data,
        usage=usage_of(requests[0], pngs[0], count=len(requests)),
        model=call.model,
        version=made[0].version,
    )


async def event_lines(call: Call, first: Event, events: AsyncGenerator[Event]) -> AsyncGenerator[str]:
    """A call's events as the lines of a stream; what goes wrong on the way is its last event."""
    missing = len(call.job.requests)
    try:
        yield await event_line(call, first)
        missing -= isinstance(first, FinishedImage)
        async for event in events:
            if isinstance(event, Refused):
                raise of_refused(event, call.job.requests[0])
            yield await event_line(call, event)
            missing -= isinstance(event, FinishedImage)
        if missing:
            raise Unavailable(STOPPED)
    except ServiceError as error:
        yield error_line(error)
    except Unavailable as error:
        yield error_line(of_unavailable(error))
    except ClientGoneError:
        return


async def event_line(call: Call, event: Event) -> str:
    """A preview or an image as an event of the stream."""
    assert not isinstance(event, Refused)
    kind = "completed" if isinstance(event, FinishedImage) else "partial_image"
    request = call.job.requests[event.image]
    message = ImageEvent.model_validate(
        {
            "type": f"{call.kind}.{kind}",
            "b64_json": await as_text(event.png, call),
            "created_at": int(time.time()),
            "size": size_text(event.png),
            "output_format": call.output_format,
            "image_index": event.image,
            "seed": request.seed,
            "model": call.model,
            **(of_made(request, event) if isinstance(event, FinishedImage) else of_partial(event)),
        }
    )
    return line(message.type, message.model_dump(exclude_none=True))


def of_made(request: Request, made: FinishedImage) -> dict[str, Any]:
    return {"version": made.version, "usage": usage_of(request, made.png, count=1)}


def of_partial(partial: Partial) -> dict[str, Any]:
    return {"partial_image_index": partial.number, "stage": partial.stage, "step": partial.step}


def error_line(error: ServiceError) -> str:
    return line("error", {"type": "error", **error.body()})


def line(event: str, data: Mapping[str, Any]) -> str:
    return f"event: {event}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n"


async def as_text(png: bytes, call: Call) -> str:
    """base64 of an image in the format that is wanted."""
    if call.output_format != "png":
        png = await asyncio.to_thread(converted, png, call.output_format, call.quality)
    return base64.b64encode(png).decode()


def converted(png: bytes, output_format: Format, quality: int) -> bytes:
    """A PNG as another format."""
    buffer = io.BytesIO()
    open_image(png).convert("RGB").save(buffer, format=output_format.upper(), quality=quality)
    return buffer.getvalue()


def size_text(png: bytes) -> str:
    return "{}x{}".format(*open_header(png).size)


def usage_of(request: Request, png: bytes, *, count: int) -> Usage:
    """Of `count` images of this size that are made of requests like this one."""
    text = count * ceil(len((request.prompt or "").encode()) / BYTES)
    image = count * sum(patches(each) for each in (request.image, request.condition) if each is not None)
    made = count * patches(png)
    return Usage(
        total_tokens=text + image + made,
        input_tokens=text + image,
        output_tokens=made,
        input_tokens_details=InputTokens(text_tokens=text, image_tokens=image),
        output_tokens_details=InputTokens(text_tokens=0, image_tokens=made),
    )


def patches(image: bytes) -> int:
    width, height = open_header(image).size
    return ceil(width / PATCH) * ceil(height / PATCH)
