"""The service's HTTP: OpenAI's image API over models, wherever they run."""

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import Depends, FastAPI, Security
from fastapi.security import HTTPBearer
from pydantic import ValidationError
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from components.serving.api_models import (
    Asked,
    Edit,
    Generation,
    check_limits,
    check_output,
    generator_of,
    job_of,
    output_of,
)
from components.serving.bodies import EDITS, GENERATIONS, limited
from components.serving.errors import ErrorAnswer, ServiceError, add_error_answers, of_refused, of_validation
from components.serving.keys import gate
from components.serving.messages import Backend, Card, Event, GeneratorCard, Refused, Unavailable
from components.serving.middleware import noted, notes_of
from components.serving.page import add_page
from components.serving.responses import (
    STOPPED,
    Call,
    EventStream,
    ImageEvent,
    ImagesAnswer,
    Kind,
    ModelEntry,
    ModelList,
    entry,
    event_lines,
    images_answer,
)
from components.serving.settings import Limits, ServiceSettings
from components.serving.uploads import FILES, GivenImages, decoded, read_form, read_given
from components.serving.watching import ClientGoneError, watched

ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorAnswer, "description": "What the request must say instead"},
    "503": {"model": ErrorAnswer, "description": "Not now: Retry-After says in how many seconds"},
}
EVENT = ImageEvent.model_json_schema(ref_template="#/components/schemas/{model}")
EVENT = {name: value for name, value in EVENT.items() if name != "$defs"}  # the answer that is no stream has them too
STREAM = {"content": {"text/event-stream": {"schema": EVENT}}}
FILE = {"type": "string", "contentMediaType": "application/octet-stream"}


@dataclass(frozen=True)
class Service:
    """Models, and what was last heard of them."""

    backends: Mapping[str, Backend]
    settings: ServiceSettings
    heard: dict[str, tuple[float, Card]] = field(default_factory=dict)  # model -> when, by time.monotonic()
    asking: dict[str, asyncio.Task[Card]] = field(default_factory=dict)  # of a model one at a time, whoever waits

    def name(self, asked: str | None) -> str:
        """The model that is asked for. Raises ServiceError if it is not served, or is one of several without a name."""
        there = " or ".join(self.backends)
        if asked is None and len(self.backends) == 1:
            return next(iter(self.backends))
        if asked is None:
            raise ServiceError(400, f"several models are served: set model to {there}", param="model")
        if asked not in self.backends:
            message = f"no model {asked!r:.80} is served here: choose {there}"
            raise ServiceError(404, message, param="model", code="model_not_found")
        return asked

    async def card(self, name: str, *, most_age: float) -> Card:
        """What a model answers to, as heard in the last `most_age` seconds. Raises Unavailable."""
        when, card = self.heard.get(name, (-most_age, None))
        if card is not None and time.monotonic() - when < most_age:
            return card
        if name not in self.asking:
            self.asking[name] = task = asyncio.create_task(self._ask(name))
            task.add_done_callback(lambda done: self.asking.pop(name))
        return await asyncio.shield(self.asking[name])

    async def _ask(self, name: str) -> Card:
        try:
            async with asyncio.timeout(self.settings.limits.seconds):
                card = await self.backends[name].card()
        except TimeoutError:
            raise Unavailable(f"model {name} does not answer now; try again in a moment") from None
        self.heard[name] = time.monotonic(), card
        return card


def build_app(backends: Mapping[str, Backend], settings: ServiceSettings, *, keys: Sequence[str] = ()) -> FastAPI:
    """The routes of a service.

    Args:
        backends: by the names that clients choose models by.
        keys: that clients may send; none: this machine's own programs are answered alone.

    Raises ValueError, in one line, if the settings require keys and there is none.
    """
    if settings.keys_required and not keys:
        raise ValueError("on an address that others reach a service needs keys: set CASCADE_API_KEYS")
    no_pages = {"docs_url": None, "redoc_url": None}  # they would load scripts of other hosts
    app = FastAPI(
        title="image-cascade",
        version="1",
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
        **no_pages,
    )
    app.state.fields = (*Generation.model_fields,)
    service = Service(backends, settings)
    add_error_answers(app)
    add_image_routes(app, service)
    add_model_routes(app, service)
    add_page(app)
    app.add_middleware(limited, limits=settings.limits, calls=settings.calls)
    app.add_middleware(gate, keys=keys)
    app.add_middleware(noted)  # the last one added is the outermost
    return app


def needs_json(request: HttpRequest) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ServiceError(415, "send JSON: Content-Type must be application/json")


Bearer = Security(HTTPBearer(auto_error=False, description="Where the service has keys"))


def add_image_routes(app: FastAPI, service: Service) -> None:
    """What makes images."""

    @app.post(
        GENERATIONS,
        response_model=ImagesAnswer,
        responses={200: STREAM, **ERRORS},
        dependencies=[Bearer, Depends(needs_json)],
    )
    async def create_images(asked: Generation, request: HttpRequest) -> Response:
        """Make images of a prompt or a class; with `stream` as server-sent events."""
        return await answer(service, request, asked, {}, kind="image_generation")

    @app.post(
        EDITS,
        response_model=ImagesAnswer,
        responses={200: STREAM, **ERRORS},
        dependencies=[Bearer],
        openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": edit_form()}}}},
    )
    async def edit_image(request: HttpRequest) -> Response:
        """Make an image of one that is given: fill its mask, or do what `task` says."""
        form = await read_form(request, service.settings.limits)
        if "image" not in form.files:
            raise ServiceError(400, "image is missing: send it as a file of the form", param="image")
        try:
            asked = Edit.model_validate(form.fields)
        except ValidationError as error:
            raise of_validation(error.errors(), (*Edit.model_fields, *FILES)) from None
        return await answer(service, request, asked, form.files, kind="image_edit")


def add_model_routes(app: FastAPI, service: Service) -> None:
    """What says which models are there."""

    @app.get("/v1/models", responses=ERRORS, dependencies=[Bearer])
    async def list_models() -> ModelList:
        """The served models, and what each of them can do."""
        found = await asyncio.gather(
            *(service.card(name, most_age=0) for name in service.backends), return_exceptions=True
        )
        cards = [card for card in found if isinstance(card, Card)]
        for failure in found:  # one that is away leaves the list to the others
            if isinstance(failure, BaseException) and not (cards and isinstance(failure, Unavailable)):
                raise failure
        return ModelList(data=[entry(card) for card in cards])

    @app.get("/v1/models/{model:path}", responses=ERRORS, dependencies=[Bearer])
    async def get_model(model: str) -> ModelEntry:
        """A served model, and what it can do."""
        return entry(await service.card(service.name(model), most_age=0))

    @app.api_route("/healthz", methods=["GET", "HEAD"], include_in_schema=False)
    async def healthz() -> Response:
        return JSONResponse({"status": "ok"})


def edit_form() -> dict[str, Any]:
    """The schema of a form with an image."""
    schema = Edit.model_json_schema()
    mask = FILE | {"description": "Of the image's size: transparent where it is to be made, or white if nothing is"}
    files = {"image": FILE, "mask": mask, "condition": FILE}
    return schema | {"properties": schema["properties"] | files, "required": ["image"]}


async def answer(
    service: Service, request: HttpRequest, asked: Asked, files: Mapping[str, bytes], *, kind: Kind
) -> Response:
    """Make what is asked for. Raises ServiceError or Unavailable before the first byte of the answer."""
    limits, notes = service.settings.limits, notes_of(request.scope)
    notes.model = name = service.name(asked.model)
    check_limits(asked, limits)
    check_output(asked)
    card = await service.card(name, most_age=service.settings.poll_seconds)
    generator = generator_of(asked, card, on_images=kind == "image_edit")
    given = await given_images(asked, files, generator, limits)
    job = job_of(asked, generator, given)
    notes.images = len(job.requests)
    call = Call(kind, name, job, *output_of(asked))
    made = service.backends[name].make(job)
    events = watched(made, receive=request.receive, started=notes.started, seconds=limits.seconds)
    try:
        if asked.stream:
            return await stream(call, events)
        found = await images_answer(call, events)
    except ClientGoneError:
        raise ClientDisconnect from None
    return JSONResponse(found.model_dump())


async def given_images(
    asked: Asked, files: Mapping[str, bytes], generator: GeneratorCard, limits: Limits
) -> GivenImages:
    """The images of a request, decoded away from the loop that others wait for."""
    task = asked.task if isinstance(asked, Edit) else None
    if asked.condition is not None:
        files = {**files, "condition": decoded("condition", asked.condition)}
    return await asyncio.to_thread(read_given, files, task=task, side=generator.width, limits=limits)


async def stream(call: Call, events: AsyncGenerator[Event]) -> Response:
    """The events, of which the first has come: until then an error has a status."""
    first = await anext(events, None)
    if first is None:
        raise Unavailable(STOPPED)
    if isinstance(first, Refused):
        await events.aclose()
        raise of_refused(first, call.job.requests[0])
    return EventStream(event_lines(call, first, events), events)
