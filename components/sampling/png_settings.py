"""A PNG says how it was made: settings as JSON in its text chunk `parameters`, which readers of images show.

The settings are those of a request that are set, the model's name, and its version where it is registered:
    {"model": "image-cascade-openmoji", "version": "3", "prompt": "red heart", "seed": 7, "size": "64x128",
     "sampling": {"upsampler_64": {"noise_level": 20}}, "needs": ["condition"]}
`needs` names the images that the request had: they must be given again.
"""

import json
import struct
import zlib
from collections.abc import Mapping
from typing import Any

from PIL import Image
from pydantic import ValidationError

from components.sampling.image_files import open_header
from components.sampling.request_rows import IMAGES, RequestRow
from components.sampling.requests import Request, nested_settings, stage_settings

SIGNATURE = b"\x89PNG\r\n\x1a\n"
KEYWORD = "parameters"
MOST_TEXT = 2**20  # characters of settings that are read
HEADER = 33  # bytes: the signature and the first chunk, IHDR
NO_FIELDS = ("model", "version", "needs")  # of the settings, what is no field of a request


def with_settings(png: bytes, settings: Mapping[str, Any]) -> bytes:
    """The PNG with the settings in front of its pixels, which stay as they are, byte for byte.

    Raises ValueError if it is no PNG.
    """
    if not png.startswith(SIGNATURE) or png[12:16] != b"IHDR":
        raise ValueError("settings are kept in a PNG, and this is none")
    text = b"tEXt" + KEYWORD.encode() + b"\0" + json.dumps(settings).encode()  # escaped: ASCII, whatever the prompt
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    return png[:HEADER] + chunk + png[HEADER:]


def read_settings(png: bytes) -> dict[str, Any] | None:
    """The settings in a PNG; None if it has none. Raises ValueError, in one line, for no PNG or broken settings."""
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
    """What `request_of` makes the request of again, but for its images; a version that is None is left out.

    `model` is a registered name or the name of a folder: the image is shown to others.
    """
    asked: dict[str, Any] = {name: value for name, value in request._asdict().items() if value not in (None, ())}
    needs = [name for name in IMAGES if asked.pop(name, None) is not None]
    asked |= {"size": "{}x{}".format(*request.size)} if request.size else {}
    asked |= {"sampling": nested_settings(request.sampling)} if request.sampling else {}
    origin = {"model": model} | ({} if version is None else {"version": version})
    return origin | asked | ({"needs": needs} if needs else {})


def request_of(settings: Mapping[str, Any]) -> Request:
    """The request that an image was made by, without the images that it `needs`.

    Raises ValueError, in one line, for a setting that is unknown or no such value.
    """
    asked = {name: value for name, value in settings.items() if name not in NO_FIELDS}
    unknown = [name for name in asked if name not in RequestRow.model_fields or name in IMAGES]
    if unknown:
        raise ValueError(f"the PNG has settings that this version does not know: {', '.join(unknown)[:80]!r}")
    sampling, label = stage_settings(asked.pop("sampling", {})), asked.get("label")
    try:
        request = RequestRow(**asked).request()._replace(sampling=sampling)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"the PNG says {first['loc'][0]} {first['input']!r:.80}: {first['msg']}") from None
    return request._replace(label=label) if isinstance(label, int) else request  # an id, not a class of that name
