"""Messages between the API and a model, which can be pickled, and errors in the form of OpenAI's API.

An error is a sentence with the value and the remedy.
"""

import re
import reprlib
import string
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple, Protocol

from pydantic import BaseModel
from starlette.responses import JSONResponse

from components.sampling.requests import Request, typed_options

INVALID = {400: "invalid_value", 401: "invalid_api_key", 403: "forbidden", 404: "not_found", 405: "method_not_allowed"}
INVALID |= {408: "request_timeout", 413: "too_large", 415: "unsupported_media_type"}
CODES = {status: ("invalid_request_error", code) for status, code in INVALID.items()}  # of an error
CODES |= {429: ("rate_limit_error", "rate_limit_exceeded"), 503: ("server_error", "unavailable")}
BOUNDS = {"greater_than_equal": "at least", "greater_than": "more than", "less_than_equal": "at most"}
BOUNDS |= {"less_than": "less than"}
TYPES = {"int": "a whole number", "string": "text", "bool": "true or false", "float": "a number", "dict": "an object"}
TYPES |= {"finite_number": "a finite number", "list": "a list"}
HINTS = {  # field -> reason why its other values are refused
    "response_format": "no image is kept that a url could name",
    "background": "images have no transparency here",
    "output_format": "no other format is written",
}
NO_KEY = "-"  # the name of a client of this machine, which has none
LONGEST = 80  # characters of a field's name
COSTLY = {"compile_decoding"}  # settings of stages that cost a compilation
JSON_SIGNS, JSON_FIELDS = 2**16, 500
UNCOUNTED = f"{string.ascii_letters}{string.digits}+/=\0{string.whitespace}".encode()  # base64, UTF-16's zeros
FIELDS = tuple(name for name in Request.model_fields if name not in ("generator", "sampling"))


class ImageJob(NamedTuple):
    """Images of a call, all made by a single version of the model."""

    requests: tuple[Request, ...]
    partial_images: int = 0  # previews wanted of each image, where its generator shows its steps
    key: str = NO_KEY  # the name of the client's API key


class Partial(NamedTuple):
    """A preview: the clean image that the model predicts at a step."""

    image: int  # place of the request in its job
    number: int  # of the preview, from 0
    stage: str
    step: int  # denoising steps done in this stage, from 1
    png: bytes


class FinishedImage(NamedTuple):
    """One PNG of a job, sent as soon as it is encoded."""

    image: int  # place of the request in its job
    png: bytes
    version: str  # of the model


class Refused(NamedTuple):
    """The last event of a refused job."""

    status: int  # of HTTP: 400 where the client is at fault, 429 where too many images wait
    message: str  # one sentence for the user
    retry_after: int = 0  # seconds; 0: never


Event = Partial | FinishedImage | Refused


class Taken(NamedTuple):
    """The first event of a job in a replica; for the API's side of the connection alone."""


class GeneratorCard(NamedTuple):
    """A generator's description: options and limits of requests."""

    name: str
    title: str
    options: tuple[str, ...]  # fields of a request that it takes, next to label, prompt and seed
    classes: tuple[str, ...]  # names by id; empty where it knows none
    reads_prompts: bool
    prompts: tuple[str, ...]  # captions that it learned from
    shows_steps: bool  # whether it has previews
    width: int  # of its finished images, pixels
    height: int
    steps: int | None  # denoising steps where a request names none; None: it has none to choose
    most_steps: int | None
    sampling: dict[str, dict[str, Any]]  # stage -> default sampling settings, plain values
    tasks: tuple[str, ...]  # of images to work on
    condition_side: int | None  # pixels of the image that it is conditioned on; None: on none


class Card(NamedTuple):
    """A served model's description."""

    name: str  # of the served model
    source: str  # as the user named it: models:/NAME@ALIAS, or the name of a folder
    version: str  # of the registered model
    created: int  # seconds since 1970
    generators: tuple[GeneratorCard, ...]  # in the order of preference
    refused: str = ""  # the version that the source names and that could not be loaded


class Backend(Protocol):
    """A model seen from the API, on any machine."""

    async def card(self) -> Card:
        """Returns the card of the current version."""

    def make(self, job: ImageJob) -> AsyncIterator[Event]:
        """Yields the events of a job: previews of an image in order, then the image; images interleave.
        Closing the iterator, or canceling the task that reads it, cancels the job."""


class ErrorBody(BaseModel):
    """An error: a message for people, a type and a code for programs."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    """JSON body of every answer with an error status, in the form of OpenAI's API."""

    error: ErrorBody


class ServiceError(Exception):
    """A request with an error as the answer."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: int = 0
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, sendable(message), code
        self.param = None if param is None else sendable(param)[:LONGEST]
        self.retry_after = retry_after  # seconds; 0: never

    def body(self) -> dict[str, Any]:
        """Returns the answer's JSON."""
        kind, code = CODES.get(self.status, ("server_error", None))
        error = ErrorBody(message=self.message, type=kind, param=self.param, code=self.code or code)
        return ErrorAnswer(error=error).model_dump()

    def response(self, headers: Mapping[str, str] | None = None) -> JSONResponse:
        """Returns the answer, with the given headers and the status's own."""
        own = {"Retry-After": str(self.retry_after)} if self.retry_after else {}
        own |= {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        return JSONResponse(self.body(), self.status, headers=own | dict(headers or {}))


def invalid(param: str, message: str) -> ServiceError:
    """Returns the error 400 for a field of a request."""
    return ServiceError(400, message, param=param)


class Unavailable(ServiceError):  # noqa: N818, no error of a programmer
    """A model without a live replica: 503, and the header Retry-After asks the client for another try."""

    def __init__(self, message: str) -> None:
        super().__init__(503, message, retry_after=1)


def check_json(text: bytes) -> None:
    """Raises ServiceError, within milliseconds, for JSON whose parsing would hold up others.
    Letters and digits, and so images in base64, don't count: a name or a nesting needs other signs."""
    signs = text.translate(None, UNCOUNTED)
    if len(signs) > JSON_SIGNS:
        raise ServiceError(413, f"the JSON must have at most {JSON_SIGNS} signs beside letters and digits: send less")
    if max(signs.count(b'":'), signs.count(b"{") + signs.count(b"[")) > JSON_FIELDS:
        raise ServiceError(400, f"the JSON must have at most {JSON_FIELDS} fields, lists and objects: send fewer")


def sendable(text: str) -> str:
    """Returns text that UTF-8 can encode: lone surrogates, which JSON can carry, become escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def of_refused(refused: Refused, request: Request) -> ServiceError:
    """Returns the error for a job that a model refuses. `request`: the first of the job."""
    param = param_of(refused.message, request) if refused.status == 400 else None
    remedy = ": ask /v1/images/edits" if param == "image" and request.image is None else ""
    return ServiceError(refused.status, refused.message + remedy, param=param, retry_after=refused.retry_after)


def param_of(message: str, request: Request) -> str | None:
    """Returns the first request field in a model's sentence; None without a field in the sentence."""
    if of_stage := re.match(r"(\w+)\.(\w+)[.\w]*: ", message):  # a setting, which some fields are short for
        stage, setting = of_stage.groups()
        for name, option in reversed(typed_options().items()):  # first those of this stage alone
            if option.setting == setting and option.stage in ("", stage) and getattr(request, name) is not None:
                return name
        return "sampling"
    if message.startswith("no stage"):
        return "sampling"
    words = (word.removeprefix("num_inference_") for word in re.findall(r"\w+", message))
    return next((word for word in words if word in FIELDS), None)


def of_validation(errors: Sequence[Mapping[str, Any]], fields: Iterable[str]) -> ServiceError:
    """Returns pydantic's first error as a sentence. `fields`: names, of which the nearest is proposed."""
    error = errors[0]
    place = [str(part) for part in error["loc"] if part not in ("body", "form")]
    if error["type"] == "json_invalid":
        return ServiceError(400, f"the body is no JSON: {error['ctx']['error']} (character {error['loc'][-1]})")
    if not place:
        return ServiceError(400, 'the body must be a JSON object such as {"prompt": "red heart"}')
    # As the client wrote the field: without the members of a union that pydantic names behind it.
    name = ".".join(place[:3] if place[0] == "sampling" else place[:1])
    return ServiceError(400, _sentence(error, name, fields), param=name.partition(".")[0])


def _sentence(error: Mapping[str, Any], name: str, fields: Iterable[str]) -> str:
    kind, context, got = str(error["type"]), error.get("ctx", {}), shown(error.get("input"))
    if kind == "extra_forbidden":
        near = get_close_matches(name, list(fields), n=1)
        return f"unknown field {shown(name)}: " + (f"is {near[0]} meant?" if near else "leave it out")
    if kind == "missing":
        return f"{name} is missing: give it"
    if kind == "value_error":
        return f"{name} {context['error']}"
    if kind == "literal_error":
        more = f": {HINTS[name]}" if name in HINTS else ""
        return f"{name} must be {context['expected'].replace(chr(39), '')}, not {got}{more}"
    if kind in BOUNDS:
        bound = str(next(iter(context.values()))).removesuffix(".0")
        return f"{name} must be {BOUNDS[kind]} {bound}, not {got}"
    if kind in ("string_too_short", "too_short"):
        return f"{name} is empty: leave it out, or say what it is"
    if kind == "string_too_long":
        return f"{name} must have at most {context['max_length']} characters"
    wanted = "a number or text" if name == "label" else TYPES.get(re.sub("_(type|parsing)$", "", kind))
    if name.startswith("sampling."):
        wanted = "an object of settings" if name.count(".") == 1 else "a number, text, true, false, null or a list"
    return f"{name} must be {wanted}, not {got}" if wanted else f"{name}: {error['msg']} (got {got})"


def shown(value: object) -> str:
    """Returns a client's value, short enough for a sentence, whatever the value's size or depth."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxlong, short.maxother = 2, 60, 40, 60
    return short.repr(value)
