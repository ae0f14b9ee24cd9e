"""Written forms of a request: the row of a registered model, and the settings in a PNG.

The settings are JSON in the PNG's text chunk `parameters`, which readers of images show. They are those of a request
that are set, the model's name, and its version where it is registered:
    {"model": "image-cascade-openmoji", "version": "3", "prompt": "red heart", "seed": 7, "size": "64x128",
     "sampling": {"upsampler_64": {"noise_level": 20}}, "needs": ["condition"]}
`needs` names the images that the request had: they must be given again.
"""

import json
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import pydantic
from PIL import Image

from components.sampling.image_files import open_header
from components.sampling.requests import IMAGES, Request, plain_type, read_request

SIGNATURE = b"\x89PNG\r\n\x1a\n"
KEYWORD = "parameters"
MOST_TEXT = 2**20  # characters of settings that are read
HEADER = 33  # bytes: the signature and the first chunk, IHDR
NO_FIELDS = ("model", "version", "needs")  # settings that are no field of a request


def row_fields() -> dict[str, Any]:
    """Returns the columns of a row by name, as arguments of `pydantic.create_model`.

    Numbers stay numbers, all else is text (a class id as digits, images in base64, `sampling` as JSON), and any column
    may be missing.
    """
    return {name: ((plain_type(field) or str) | None, None) for name, field in Request.model_fields.items()}


_Row: Any = pydantic.create_model("_Row", **row_fields())


class RequestRow(_Row):
    """One image that a registered model is asked for; a column that is left out is the model's own choice."""

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _whole(cls, value: object, info: pydantic.ValidationInfo) -> object:
        """Converts whole floats and class ids to the column's type.

        A data frame with a gap in a column of integers holds floats; a class may come as its id.
        """
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        return str(value) if info.field_name == "label" and isinstance(value, int) else value

    @classmethod
    def of(cls, request: Request) -> "RequestRow":
        """Returns the row of a request."""
        written = request.written()
        return cls(**written | ({"sampling": json.dumps(written["sampling"])} if "sampling" in written else {}))

    def request(self) -> Request:
        """Returns the request of the row. Raises ValueError, in one line, for an invalid row."""
        return read_request({name: value for name, value in self if value is not None})


def with_settings(png: bytes, settings: Mapping[str, Any]) -> bytes:
    """Returns the PNG with the settings before the pixels, whose bytes stay unchanged.

    Raises ValueError if it is no PNG.
    """
    if not png.startswith(SIGNATURE) or png[12:16] != b"IHDR":
        raise ValueError("settings are kept in a PNG, and this is none")
    text = b"tEXt" + KEYWORD.encode() + b"\0" + json.dumps(settings).encode()  # escaped: ASCII, whatever the prompt
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    return png[:HEADER] + chunk + png[HEADER:]


def read_settings(png: bytes) -> dict[str, Any] | None:
    """Returns the settings in a PNG; None for a PNG without settings.

    Raises ValueError, in one line, for no PNG or broken settings.
    """
    if not png.startswith(SIGNATURE):
        raise ValueError("this is not a PNG")
    try:
        text = open_header(png).info.get(KEYWORD)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError("this PNG can't be read: it is damaged") from error
    if text is None:
        return None
    if len(text) > MOST_TEXT:
        raise ValueError(f"the PNG has settings of {len(text):,} characters, more than {MOST_TEXT:,}")
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError("the settings in the PNG are not JSON: another program wrote them") from error
    if not isinstance(settings, dict):
        raise ValueError("the settings in the PNG are not a JSON object: another program wrote them")
    return settings


def settings_of(request: Request, *, model: str, version: str | None) -> dict[str, Any]:
    """Returns the settings of a request for `request_of`, without the images.

    `model` is a registered name or the name of a folder: the image is shown to other people. A version that is None is
    left out.
    """
    written = request.written()
    needs = [name for name in IMAGES if written.pop(name, None) is not None]
    origin = {"model": model} | ({} if version is None else {"version": version})
    return origin | written | ({"needs": needs} if needs else {})


def request_of(settings: Mapping[str, Any]) -> Request:
    """Returns the request of an image's settings, without the images that the request `needs`.

    Raises ValueError, in one line, for a setting that is unknown or no such value.
    """
    fields = {name: value for name, value in settings.items() if name not in NO_FIELDS and value is not None}
    unknown = [name for name in fields if name not in Request.model_fields or name in IMAGES]
    if unknown:
        raise ValueError(f"the PNG has settings that this version does not know: {', '.join(unknown)[:80]!r}")
    return read_request(fields, source="the PNG says ")
