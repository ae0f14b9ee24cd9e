"""Errors in the form of OpenAI's API: a sentence with the value and the remedy."""

import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel
from starlette.responses import JSONResponse

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
HINTS = {  # field -> reason why its other values are refused
    "response_format": "no image is kept that a url could name",
    "background": "images have no transparency here",
    "output_format": "no other format is written",
}
LONGEST = 80  # characters of a field's name
FIELDS = tuple(name for name in Request.model_fields if name not in ("generator", "sampling"))


class ErrorBody(BaseModel):
    """An error: a sentence for people, and what programs tell it by."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    """The answer to a request that can't be met."""

    error: ErrorBody


class ServiceError(Exception):
    """A request with an error as the answer."""

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
        """Returns the answer's JSON."""
        kind, code = CODES.get(self.status, ("server_error", None))
        error = ErrorBody(message=self.message, type=kind, param=self.param, code=self.code or code)
        return ErrorAnswer(error=error).model_dump()

    def response(self, headers: Mapping[str, str] | None = None) -> JSONResponse:
        """Returns the answer, with the given headers and the status's own."""
        own = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        own |= {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        return JSONResponse(self.body(), self.status, headers=own | dict(headers or {}))


def sendable(text: str) -> str:
    """Returns text that UTF-8 can encode, with lone surrogates as backslash escapes.

    JSON can carry halves of characters.
    """
    return text.encode("utf-8", "backslashreplace").decode()


def of_refused(refused: Refused, request: Request) -> ServiceError:
    """Returns the error for a job that a model refuses.

    Args:
        request: the first of the job, whose fields the client wrote.
    """
    if refused.trouble == "invalid":
        param = param_of(refused.message, request)
        remedy = ": ask /v1/images/edits" if param == "image" and request.image is None else ""
        return ServiceError(400, refused.message + remedy, param=param)
    status, code = (429, None) if refused.trouble == "busy" else (503, "timeout")
    return ServiceError(status, refused.message, code=code, retry_after=refused.retry_after)


def of_unavailable(error: Unavailable) -> ServiceError:
    """Returns the error for a model that can't answer now.

    The status is 503, and the header Retry-After asks the client for another try.
    """
    return ServiceError(503, str(error), retry_after=1)


def param_of(message: str, request: Request) -> str | None:
    """Returns the first request field in a model's sentence; None without a field in the sentence."""
    words = [word.removeprefix("num_inference_") for word in re.findall(r"\w+", message)]
    if re.match(r"\w+\.\w+: ", message):  # a setting of a stage, which some fields are short for
        return words[1] if getattr(request, words[1], None) is not None else "sampling"
    if message.startswith("no stage"):
        return "sampling"
    return next((word for word in words if word in FIELDS), None)


def of_validation(errors: Sequence[Mapping[str, Any]], fields: Iterable[str]) -> ServiceError:
    """Returns pydantic's first error as a sentence.

    Args:
        fields: names of fields, of which the nearest is proposed for an unknown one.
    """
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
