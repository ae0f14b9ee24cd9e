"""Errors in the form of OpenAI's API: one sentence that names the value and the remedy."""

import re
import reprlib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from components.sampling.requests import Request
from components.serving.messages import Refused, Unavailable

CODES = {  # status -> (type, code) in an error's answer
    400: ("invalid_request_error", "invalid_value"),
    401: ("invalid_request_error", "invalid_api_key"),
    403: ("invalid_request_error", "forbidden"),
    404: ("invalid_request_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    408: ("invalid_request_error", "request_timeout"),
    413: ("invalid_request_error", "too_large"),
    415: ("invalid_request_error", "unsupported_media_type"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
    503: ("server_error", "unavailable"),
}
BOUNDS = {"greater_than_equal": "at least", "greater_than": "more than", "less_than_equal": "at most"}
BOUNDS |= {"less_than": "less than"}
TYPES = {"int": "a whole number", "string": "text", "bool": "true or false", "float": "a number", "dict": "an object"}
TYPES |= {"finite_number": "a finite number", "list": "a list"}
HINTS = {  # field -> why its other values are refused
    "response_format": "no image is kept that a url could name",
    "background": "images have no transparency here",
    "output_format": "no other format is written",
}
NOWHERE = "nothing is at this address: /openapi.json names those that there are"
LONGEST = 80  # characters of a field's name
FIELDS = tuple(name for name in Request.model_fields if name not in ("generator", "sampling"))


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    """The answer to a request that can't be met."""

    error: ErrorBody


class ServiceError(Exception):
    """A request that is answered with an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, sendable(message), code
        self.param = None if param is None else sendable(param)[:LONGEST]
        self.retry_after = retry_after  # seconds

    def body(self) -> dict[str, Any]:
        """The answer's JSON."""
        kind, code = CODES.get(self.status, ("server_error", None))
        error = ErrorBody(message=self.message, type=kind, param=self.param, code=self.code or code)
        return ErrorAnswer(error=error).model_dump()

    def response(self, headers: Mapping[str, str] | None = None) -> JSONResponse:
        more = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        more |= {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        return JSONResponse(self.body(), self.status, headers={**more, **(headers or {})})


def sendable(text: str) -> str:
    """Text that UTF-8 can hold: JSON can bring halves of characters."""
    return text.encode("utf-8", "backslashreplace").decode()


def of_refused(refused: Refused, request: Request) -> ServiceError:
    """What a model that won't do a job says to the client, who asked for this and the like."""
    if refused.trouble == "invalid":
        param = param_of(refused.message, request)
        remedy = ": ask /v1/images/edits" if param == "image" and request.image is None else ""
        return ServiceError(400, refused.message + remedy, param=param)
    status, code = (429, None) if refused.trouble == "busy" else (503, "timeout")
    return ServiceError(status, refused.message, code=code, retry_after=refused.retry_after)


def of_unavailable(error: Unavailable) -> ServiceError:
    return ServiceError(503, str(error), retry_after=1)


def param_of(message: str, request: Request) -> str | None:
    """The field of a request that a model's sentence is about: the first that it names."""
    words = [word.removeprefix("num_inference_") for word in re.findall(r"\w+", message)]
    if re.match(r"\w+\.\w+: ", message):  # a setting of a stage, which some fields are short for
        return words[1] if getattr(request, words[1], None) is not None else "sampling"
    if message.startswith("no stage"):
        return "sampling"
    return next((word for word in words if word in FIELDS), None)


def of_validation(errors: Sequence[Mapping[str, Any]], known: Sequence[str] = ()) -> ServiceError:
    """The first of pydantic's errors as one sentence.

    Args:
        known: fields that there are, of which one is proposed for an unknown one.
    """
    error = errors[0]
    place = [str(part) for part in error["loc"] if part not in ("body", "form")]
    if error["type"] == "json_invalid":
        return ServiceError(400, f"the body is no JSON: {error['ctx']['error']} (character {error['loc'][-1]})")
    if not place:
        return ServiceError(400, 'the body must be a JSON object such as {"prompt": "red heart"}')
    name = _name_of(place)
    return ServiceError(400, _sentence(error, name, known), param=name.partition(".")[0])


def _name_of(place: Sequence[str]) -> str:
    """A field as the client wrote it: without the members of a union that pydantic names behind it."""
    return ".".join(place[:3] if place[0] == "sampling" else place[:1])


def _sentence(error: Mapping[str, Any], name: str, known: Sequence[str]) -> str:
    kind, context, got = str(error["type"]), error.get("ctx", {}), shown(error.get("input"))
    if kind == "extra_forbidden":
        near = get_close_matches(name, known, n=1)
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
    """A value of a client's, short enough for a sentence, however large or deep it is."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxlong, short.maxother = 2, 60, 40, 60
    return short.repr(value)


def add_error_answers(app: FastAPI) -> None:
    """Answer the errors that routes raise, and those of FastAPI itself, in OpenAI's form."""

    @app.exception_handler(ServiceError)
    async def service(request: HttpRequest, error: ServiceError) -> Response:
        del request
        return error.response()

    @app.exception_handler(Unavailable)
    async def unavailable(request: HttpRequest, error: Unavailable) -> Response:
        del request
        return of_unavailable(error).response()

    @app.exception_handler(RequestValidationError)
    async def validation(request: HttpRequest, error: RequestValidationError) -> Response:
        del request
        known = app.state.fields
        return of_validation(error.errors(), known).response()

    @app.exception_handler(HTTPException)
    async def http(request: HttpRequest, error: HTTPException) -> Response:
        allowed = (error.headers or {}).get("Allow", "")
        words = {
            404: NOWHERE,
            405: f"{request.method} is not for this address: use {allowed or 'another method'}",
            400: "the body can't be read: send JSON in UTF-8, not too deep",
        }
        answer = ServiceError(error.status_code, words.get(error.status_code, str(error.detail)))
        return answer.response(error.headers)
