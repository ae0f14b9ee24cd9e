"""Uploads of clients: forms, images decoded under limits, masks of both meanings."""

import base64
import json
import re
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest

from components.sampling.image_files import encode_png, open_header, open_image
from components.sampling.images import WHITE
from components.serving.errors import ServiceError, shown
from components.serving.settings import Limits

FILES = ("image", "mask", "condition")
MOST_PARTS = 100  # of a form
SETTING = re.compile(r"sampling\[(\w+)\]\[(\w+)\]")
SHRINKABLE = (None, "inpainting", "uncropping", "colorization")  # tasks that a smaller image is the same for
CUT_OFF = "the upload is cut off before its end: send it again"


class GivenImages(NamedTuple):
    """The images of a request as PNG."""

    image: bytes | None = None
    mask: bytes | None = None  # white is to be made
    condition: bytes | None = None


class Form(NamedTuple):
    """A form's texts and files, by the names of its fields."""

    fields: dict[str, Any]
    files: dict[str, bytes]


async def read_form(request: HttpRequest, limits: Limits) -> Form:
    """The form of a request. Raises ServiceError for what is none, is cut off or has too many parts."""
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data":
        raise ServiceError(415, "send the image in a form: Content-Type must be multipart/form-data")
    end = b"--" + options.get(b"boundary", b"") + b"--"
    if b"boundary" in options and end not in await request.body():
        raise ServiceError(400, CUT_OFF)
    try:
        async with request.form(max_files=len(FILES), max_fields=MOST_PARTS, max_part_size=limits.body_bytes) as form:
            return Form(fields_of(form), await files_of(form))
    except HTTPException as error:
        detail = str(error.detail).rstrip(".")
        raise ServiceError(400, f"the form can't be read ({detail}): send multipart/form-data") from None


def fields_of(form: FormData) -> dict[str, Any]:
    """The texts of a form; an empty one is not given. Settings of stages are together, as in JSON."""
    found: dict[str, Any] = {}
    stages: dict[str, dict[str, Any]] = {}
    for name, value in form.multi_items():
        if isinstance(value, UploadFile) or not value:
            continue
        if setting := SETTING.fullmatch(name):
            stage, field = setting.groups()
            stages.setdefault(stage, {})[field] = plain(value)
        elif name in found:
            raise ServiceError(400, f"field {shown(name)} is given twice: give it once", param=name)
        else:
            found[name] = value
    if stages and "sampling" in found:
        raise ServiceError(400, "sampling is given as JSON and as fields: give it once", param="sampling")
    return found | ({"sampling": stages} if stages else {})


def plain(text: str) -> Any:
    """A number, true, false, null or a list where the text is one."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


async def files_of(form: FormData) -> dict[str, bytes]:
    """The files of a form by their field; OpenAI's clients write image[] where they send a list."""
    found: dict[str, bytes] = {}
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            name = name.removesuffix("[]")
            if name not in FILES:
                raise ServiceError(400, f"unknown file {shown(name)}: give image, and mask or condition", param=name)
            if name in found:
                raise ServiceError(400, f"{name} is given twice: one image is worked on at a time", param=name)
            found[name] = await value.read()
    return found


def decoded(name: str, text: str) -> bytes:
    """An image of a JSON body, from base64, or from a data: address of it. Raises ServiceError."""
    try:
        return base64.b64decode(re.sub(r"^data:image/\w+;base64,", "", text), validate=True)
    except ValueError:
        raise ServiceError(400, f"{name} must be an image in base64, and is not base64", param=name) from None


def read_upload(name: str, data: bytes, limits: Limits) -> Image.Image:
    """An uploaded image, decoded and upright. Raises ServiceError for what is none or has too many pixels."""
    if not data:
        raise ServiceError(400, f"{name} is empty: give a PNG, JPEG or WebP file", param=name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they would fill the log with what clients send
        return _read_upload(name, data, limits)


def _read_upload(name: str, data: bytes, limits: Limits) -> Image.Image:
    try:
        size = open_header(data).size
    except UnidentifiedImageError:
        raise ServiceError(400, f"{name} is no image: give a PNG, JPEG or WebP file", param=name) from None
    except (ValueError, Image.DecompressionBombError):
        raise ServiceError(413, f"{name} is too large to decode: give a smaller one", param=name) from None
    except Exception:  # as below
        raise ServiceError(400, f"{name} can't be read: give a PNG, JPEG or WebP file", param=name) from None
    if size[0] * size[1] > limits.image_pixels:
        message = f"{name} has {size[0]}x{size[1]} pixels, more than {limits.image_pixels}: give a smaller one"
        raise ServiceError(413, message, param=name)
    try:
        return ImageOps.exif_transpose(open_image(data))
    except Exception:  # decoders raise whatever they stumble over in a file that is broken or made to break them
        raise ServiceError(400, f"{name} is cut off or damaged: give a whole image file", param=name) from None


def read_given(files: Mapping[str, bytes], *, task: str | None, side: int, limits: Limits) -> GivenImages:
    """The images of a request as a generator takes them.

    Args:
        side: pixels of the generator's images; a larger square is shrunk to it where the task is then the same one.

    Raises ServiceError for what is no image, or a mask of another size than its image.
    """
    images = {name: read_upload(name, data, limits) for name, data in files.items()}
    image, mask = images.get("image"), images.get("mask")
    if image is not None and mask is None and is_transparent(image) and task in (None, "inpainting", "uncropping"):
        mask = image  # OpenAI's meaning
    if image is not None and mask is not None and image.size != mask.size:
        sizes = f"{mask.width}x{mask.height} pixels, the image {image.width}x{image.height}"
        raise ServiceError(400, f"the mask has {sizes}: they must be the same", param="mask")
    if mask is not None:
        mask = white_mask(mask)
    if image is not None and image.width == image.height > side and task in SHRINKABLE:
        image, mask = shrunk(image, side), None if mask is None else shrunk_mask(mask, side)
    condition = images.get("condition")
    if condition is not None:
        check_condition(condition)
    return GivenImages(*(None if each is None else encode_png(each) for each in (rgb(image), mask, rgb(condition))))


def check_condition(image: Image.Image) -> None:
    """Raise ServiceError for what would be distorted or clipped on its way to the model."""
    if image.width != image.height:
        message = f"the condition has {image.width}x{image.height} pixels: give a square image"
        raise ServiceError(400, message, param="condition")
    if image.mode.startswith(("I", "F")):
        raise ServiceError(400, "the condition has more than 8 bits a channel: give one of 8 bits", param="condition")


def rgb(image: Image.Image | None) -> Image.Image | None:
    return None if image is None else image.convert("RGB")


def is_transparent(image: Image.Image) -> bool:
    """Whether any pixel is transparent to any degree."""
    if not image.has_transparency_data:
        return False
    alpha = np.asarray(image.convert("RGBA").getchannel("A"))
    return bool(alpha.min() < np.iinfo(np.uint8).max)


def white_mask(mask: Image.Image) -> Image.Image:
    """White where pixels are to be made: where it is transparent, if it is anywhere; else where it is white."""
    if is_transparent(mask):
        return ImageOps.invert(mask.convert("RGBA").getchannel("A"))
    return mask.convert("L")


def shrunk(image: Image.Image, side: int) -> Image.Image:
    return image.convert("RGB").resize((side, side), Image.Resampling.BOX)


def shrunk_mask(mask: Image.Image, side: int) -> Image.Image:
    """A pixel is to be made where any that it stands for is: what is to go must not be seen in what is kept."""
    white = Image.fromarray((np.asarray(mask) >= WHITE).astype(np.float32))
    return Image.fromarray(np.asarray(white.resize((side, side), Image.Resampling.BOX)) > 0).convert("L")
