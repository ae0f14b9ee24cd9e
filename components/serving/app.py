"""Routes of the service: OpenAI's image API over models on any machine, and the page."""

import asyncio
import json
import math
import mimetypes
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Form, Security
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from starlette.datastructures import UploadFile as FormFile
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.staticfiles import StaticFiles

from components.sampling.requests import form_choices, form_fields
from components.serving import messages, responses
from components.serving.api_models import EditForm, Generation, check_limits, decoded, generator_of, job_of
from components.serving.keys import KEYS, Keyring, TakeShare
from components.serving.messages import NO_KEY, Backend, Card, ErrorAnswer, ServiceError, Unavailable, invalid
from components.serving.middleware import EDITS, GENERATIONS, NOTES, gate, limited, noted
from components.serving.responses import Call, ImageEvent, ImagesAnswer, Kind, ModelEntry, ModelList
from components.serving.settings import ServiceSettings
from components.serving.uploads import Decoders

PAGE, FIELDS_MODULE = Path(__file__).parent / "page", "/page/fields.js"  # the module is generated
FILES = ("image", "mask", "condition")
MOST_FIELDS = 100  # of a form
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorAnswer, "description": "What the request must say instead"},
    "503": {"model": ErrorAnswer, "description": "Not now: Retry-After says in how many seconds"},
}
EVENT = ImageEvent.model_json_schema(ref_template="#/components/schemas/{model}")
EVENT = {name: value for name, value in EVENT.items() if name != "$defs"}  # which the other answer has
STREAM = {"content": {"text/event-stream": {"schema": EVENT}}}
BEARER = Security(HTTPBearer(auto_error=False, description="Where the service has keys"))
AskedCard = tuple[float, asyncio.Task[Card]]  # when, by time.monotonic(); the task that asks


@dataclass(frozen=True)
class Service:
    """Served models, and the latest request for the card of each."""

    backends: Mapping[str, Backend]
    settings: ServiceSettings
    take: TakeShare | None  # images from a key's share; None: shares are of any size
    decoders: Decoders
    asked: dict[str, AskedCard] = field(default_factory=dict)  # by model

    def name(self, name: str | None) -> str:
        """Returns the name of the answering model.
        Raises ServiceError if no model of this name is served, or none is named and there are several."""
        there = " or ".join(self.backends)
        if name is None and len(self.backends) > 1:
            raise invalid("model", f"several models are served: set model to {there}")
        name = there if name is None else name
        if name not in self.backends:
            message = f"no model {name!r:.80} is served here: choose {there}"
            raise ServiceError(404, message, param="model", code="model_not_found")
        return name

    async def card(self, name: str, *, most_age: float) -> Card:
        """Returns a model's card as asked for in the last `most_age` seconds. Raises Unavailable."""
        when, task = self.asked.get(name, (0.0, None))
        is_old = time.monotonic() - when >= most_age
        if task is None or (task.done() and (is_old or task.exception())):
            task = asyncio.create_task(self._ask(name))
            self.asked[name] = time.monotonic(), task
        return await asyncio.shield(task)

    async def take_share(self, key: str, images: int) -> None:
        """Takes images from a key's share. Raises ServiceError where there are too few."""
        wait = 0.0 if self.take is None or key == NO_KEY else await self.take(key, images)
        if wait > 0:
            seconds, most = math.ceil(wait), self.settings.limits.key_images_minute
            message = f"this key may ask for {most:g} images a minute: try again in {seconds} s"
            raise ServiceError(429, message, retry_after=seconds)

    async def _ask(self, name: str) -> Card:
        try:
            async with asyncio.timeout(self.settings.limits.seconds):
                return await self.backends[name].card()
        except TimeoutError:
            raise Unavailable(f"model {name} does not answer now; try again in a moment") from None


def build_app(
    backends: Mapping[str, Backend],
    settings: ServiceSettings,
    *,
    read_keys: Callable[[], Sequence[str]] = tuple,
    take_share: TakeShare | None = None,
) -> FastAPI:
    """Returns the application of a service.
    `backends`: by the names of models. `read_keys`: gives those that clients may send, now and every few seconds; none
    now: this machine's own programs are answered alone. `take_share`: None: shares are of any size. Raises
    ValueError, in one line, if the settings require keys and there is none, and as `read_keys` does."""
    keys = Keyring(read_keys)
    if settings.keys_required and not keys:
        where = "in the environment of the process that answers (on a cluster, of its nodes)"
        raise ValueError(f"this service needs keys: set {KEYS} {where}")
    limits = settings.limits
    app = FastAPI(
        title="image-cascade",
        version="1",
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
        docs_url=None,  # as the next, it would load scripts of other hosts
        redoc_url=None,
        form_limits={"max_files": len(FILES), "max_fields": MOST_FIELDS, "max_part_size": limits.body_bytes},
        exception_handlers=dict.fromkeys((ServiceError, RequestValidationError, HTTPException), answer_error),
    )
    service = Service(backends, settings, take_share, Decoders(limits))
    add_image_routes(app, service)
    add_model_routes(app, service)
    add_page(app)
    app.add_middleware(limited, limits=limits, calls=settings.calls)
    app.add_middleware(gate, keys=keys)
    app.add_middleware(noted)  # the last one added is the outermost
    return app


async def answer_error(request: HttpRequest, error: Exception) -> Response:
    """Answers an error of a route, of a model, or of FastAPI in OpenAI's form."""
    match error:
        case ServiceError():
            return error.response()
        case RequestValidationError():
            model = EditForm if request.scope["route"].path == EDITS else Generation
            return messages.of_validation(error.errors(), model.model_fields).response()
        case HTTPException(status_code=404):
            message = "nothing is at this address: /openapi.json names those that there are"
        case HTTPException(status_code=405):
            allowed = (error.headers or {}).get("Allow", "another method")
            message = f"{request.method} is not for this address: use {allowed}"
        case HTTPException(status_code=400) if request.headers.get("content-type", "").startswith("multipart/"):
            message = f"the form can't be read ({error.detail.rstrip('.')}): send multipart/form-data"
        case HTTPException(status_code=400):
            message = "the body can't be read: send JSON in UTF-8, not too deep"
        case HTTPException():
            message = error.detail
        case _:
            raise error
    return ServiceError(error.status_code, message).response(error.headers)


def needs(kind: str, remedy: str) -> Any:
    """Returns the dependency that raises ServiceError for a body of another media type."""

    def check(request: HttpRequest) -> None:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != kind:
            raise ServiceError(415, f"{remedy}: Content-Type must be {kind}")

    return Depends(check)


async def needs_image(request: HttpRequest) -> None:
    """Raises ServiceError for a missing image, and fields of the form that FastAPI ignores."""
    given: dict[tuple[str, bool], object] = {}  # by name, and whether it is a file
    for name, value in (await request.form()).multi_items():  # which FastAPI has read
        is_file = isinstance(value, FormFile)
        name = name.removesuffix("[]") if is_file else name
        if is_file and name not in FILES:
            raise invalid(name, f"unknown file {messages.shown(name)}: give image, and mask or condition")
        if (name, is_file) in given and is_file:
            raise invalid(name, f"{name} is given twice: one image is worked on at a time")
        if (name, is_file) in given:
            raise invalid(name, f"field {messages.shown(name)} is given twice: give it once")
        given[name, is_file] = value
    for name in ("image", "mask"):
        if (name, True) not in given and (name == "image" or given.get((name, False))):
            raise invalid(name, f"{name} is missing: send it as a file of the form")
    if ("condition", True) in given and given.get(("condition", False)):
        raise invalid("condition", "condition is given as a file and as text: give it once")


def add_image_routes(app: FastAPI, service: Service) -> None:
    """Adds the routes for images."""
    post = partial(app.post, response_model=ImagesAnswer, responses={200: STREAM, **ERRORS})

    @post(GENERATIONS, dependencies=[BEARER, needs("application/json", "send JSON")])
    async def create_images(asked: Generation, request: HttpRequest) -> Response | ImagesAnswer:
        """Make images of a prompt or a class; with `stream` as server-sent events."""
        return await answer(service, request, asked, {}, kind="image_generation")

    @post(EDITS, dependencies=[BEARER, needs("multipart/form-data", "send the image in a form"), Depends(needs_image)])
    async def edit_image(
        asked: Annotated[EditForm, Form(media_type="multipart/form-data")], request: HttpRequest
    ) -> Response | ImagesAnswer:
        """Make an image of one that is given: fill its mask, or do what `task` says."""
        given = {name: getattr(asked, name) for name in FILES}
        files = {name: await file.read() for name, file in given.items() if isinstance(file, FormFile)}
        return await answer(service, request, asked, files, kind="image_edit")


def add_model_routes(app: FastAPI, service: Service) -> None:
    """Adds the routes for lists of models."""

    @app.get("/v1/models", responses=ERRORS, dependencies=[BEARER])
    async def list_models() -> ModelList:
        """The served models, and what each of them can do."""
        answers = await asyncio.gather(
            *(service.card(name, most_age=0) for name in service.backends), return_exceptions=True
        )
        cards = [card for card in answers if isinstance(card, Card)]
        for failure in answers:  # one that is away leaves the list to the others
            if isinstance(failure, BaseException) and not (cards and isinstance(failure, Unavailable)):
                raise failure
        return ModelList(data=[responses.entry(card) for card in cards])

    @app.get("/v1/models/{model:path}", responses=ERRORS, dependencies=[BEARER])
    async def get_model(model: str) -> ModelEntry:
        """A served model, and what it can do."""
        return responses.entry(await service.card(service.name(model), most_age=0))

    @app.api_route("/healthz", methods=["GET", "HEAD"], include_in_schema=False)
    async def healthz() -> Response:
        return JSONResponse({"status": "ok"})


def add_page(app: FastAPI) -> None:
    """Serves the page at `/` and the page's files at `/page/NAME`, without a key."""
    mimetypes.add_type("text/javascript", ".js")  # the tables of some machines know it by an older name
    files = StaticFiles(directory=PAGE)

    @app.api_route(FIELDS_MODULE, methods=["GET", "HEAD"], include_in_schema=False)
    async def fields() -> Response:
        return Response(fields_module(), media_type="text/javascript")

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    @app.api_route("/page/{name}", methods=["GET", "HEAD"], include_in_schema=False)
    async def page_file(request: HttpRequest) -> Response:
        return await files.get_response(request.path_params.get("name", "index.html"), request.scope)


def fields_module() -> str:
    """Returns the page's module of controls: `OPTIONS` of a request, `CHOICES` of a stage's settings."""
    values = {"OPTIONS": form_fields(), "CHOICES": form_choices()}
    return "".join(f"export const {name} = {json.dumps(value)};\n" for name, value in values.items())


async def answer(
    service: Service, request: HttpRequest, asked: Generation, files: Mapping[str, bytes], *, kind: Kind
) -> Response | ImagesAnswer:
    """Returns the answer to a request for images. `files`: encoded images by their field.
    Raises ServiceError or Unavailable before the first byte of the answer."""
    limits, notes = service.settings.limits, request.scope[NOTES]
    notes.model = name = service.name(asked.model)
    check_limits(asked, limits)
    card = await service.card(name, most_age=service.settings.poll_seconds)
    generator = generator_of(asked, card, on_images=kind == "image_edit")
    await service.take_share(notes.key, asked.n or 1)  # before uploads are decoded
    if isinstance(asked.condition, str):
        files = {**files, "condition": decoded("condition", asked.condition)}
    task = getattr(asked, "task", None)
    if task is None and len(generator.tasks) == 1:
        (task,) = generator.tasks
    images = await service.decoders.read(files, task=task, side=generator.width)
    job = job_of(asked, generator, images)._replace(key=notes.key)
    notes.images = len(job.requests)
    quality = 100 if asked.output_compression is None else asked.output_compression
    call = Call(kind, name, job, asked.output_format or "png", quality)
    times = {"started": notes.started, "seconds": limits.seconds}
    events = responses.watched(service.backends[name].make(job), job, receive=request.receive, **times)
    return await (responses.stream_answer if asked.stream else responses.images_answer)(call, events)
