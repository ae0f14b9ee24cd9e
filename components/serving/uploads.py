"""Images of requests: decoded under limits, upright, with masks of both meanings."""

import base64
import re
import warnings
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from components.sampling.image_files import WHITE, encode_png, open_header, open_image
from components.serving.errors import ServiceError
from components.serving.settings import Limits

SHRINKABLE = (None, "inpainting", "uncropping", "colorization")  # tasks that a smaller image is the same for


class GivenImages(NamedTuple):
    """The images of a request as PNG."""

    image: bytes | None = None
    mask: bytes | None = None  # white is to be made
    condition: bytes | None = None


def decoded(name: str, text: str) -> bytes:
    """Decodes an image of a JSON body, from base64 or a data: address. Raises ServiceError."""
    try:
        return base64.b64decode(re.sub(r"^data:image/\w+;base64,", "", text), validate=True)
    except ValueError:
        raise ServiceError(400, f"{name} must be an image in base64, and is not base64", param=name) from None


def read_upload(name: str, data: bytes, limits: Limits) -> Image.Image:
    """Returns an uploaded image, decoded and upright. Raises ServiceError for no image or too many pixels."""
    if not data:
        raise ServiceError(400, f"{name} is empty: give a PNG, JPEG or WebP file", param=name)
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
    """Returns the images of a request in the form of a generator's input.

    Args:
        side: pixels of the generator's images; a larger square is shrunk to it where the task is then the same one.

    Raises ServiceError for what is no image, or a mask of another size than its image.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they would fill the log with what clients send
        images = {name: read_upload(name, data, limits) for name, data in files.items()}
    image, mask, condition = images.get("image"), images.get("mask"), images.get("condition")
    if image is not None and mask is None and is_transparent(image) and task in (None, "inpainting", "uncropping"):
        mask = image  # OpenAI's meaning
    if image is not None and mask is not None and image.size != mask.size:
        sizes = f"{mask.width}x{mask.height} pixels, the image {image.width}x{image.height}"
        raise ServiceError(400, f"the mask has {sizes}: they must be the same", param="mask")
    if mask is not None:
        mask = white_mask(mask)
    if image is not None and image.width == image.height > side and task in SHRINKABLE:
        image = image.convert("RGB").resize((side, side), Image.Resampling.BOX)
        mask = None if mask is None else shrunk_mask(mask, side)
    if condition is not None:
        check_condition(condition)
    return GivenImages(
        image=None if image is None else encode_png(image.convert("RGB")),
        mask=None if mask is None else encode_png(mask),
        condition=None if condition is None else encode_png(condition.convert("RGB")),
    )


def check_condition(image: Image.Image) -> None:
    """Raises ServiceError for a condition that the model's input would distort or clip."""
    if image.width != image.height:
        message = f"the condition has {image.width}x{image.height} pixels: give a square image"
        raise ServiceError(400, message, param="condition")
    if image.mode.startswith(("I", "F")):
        raise ServiceError(400, "the condition has more than 8 bits a channel: give one of 8 bits", param="condition")


def is_transparent(image: Image.Image) -> bool:
    """Returns whether any pixel is transparent to any degree."""
    if not image.has_transparency_data:
        return False
    alpha = np.asarray(image.convert("RGBA").getchannel("A"))
    return bool(alpha.min() < np.iinfo(np.uint8).max)


def white_mask(mask: Image.Image) -> Image.Image:
    """Returns a mask with white for pixels to make.

    Those are the transparent ones, if there are any, else the white ones.
    """
    if is_transparent(mask):
        return ImageOps.invert(mask.convert("RGBA").getchannel("A"))
    return mask.convert("L")


def shrunk_mask(mask: Image.Image, side: int) -> Image.Image:
    """Returns a smaller mask, white where any source pixel was white.

    No part of what is to go may be seen in what stays.
    """
    white = Image.fromarray((np.asarray(mask) >= WHITE).astype(np.float32))
    return Image.fromarray(np.asarray(white.resize((side, side), Image.Resampling.BOX)) > 0).convert("L")
