"""Any picture file in, an upright RGB square out.

Shapes: H = W = resolution; pictures are uint8 (H, W, 3), 0..255.
"""

import io

import numpy as np
from PIL import Image, ImageOps

WHITE = (255, 255, 255, 255)


def decode_picture(data: bytes) -> Image.Image:
    """Decode a file of any mode to upright RGB: EXIF rotation applied, transparency flattened on white.

    Raises whatever Pillow raises for a corrupt file (OSError, ValueError, SyntaxError, DecompressionBombError).
    """
    image = Image.open(io.BytesIO(data))
    image.load()
    return to_rgb(ImageOps.exif_transpose(image))


def to_rgb(image: Image.Image) -> Image.Image:
    """Grey, palette, CMYK, 16-bit and transparent pictures as RGB; transparent parts become white.

    Raises ValueError for floating-point pictures, whose range is not defined.
    """
    if image.mode == "F":
        raise ValueError("floating-point pictures have no defined range")
    if image.mode.startswith("I"):  # Pillow's own conversion clips 16-bit grey at 255 instead of scaling it
        return Image.fromarray(np.rint(np.asarray(image, np.float64).clip(0, 65535) / 257).astype(np.uint8)).convert(
            "RGB"
        )
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, WHITE), rgba).convert("RGB")
    return image.convert("RGB")


def fit_square(image: Image.Image, resolution: int) -> Image.Image:
    """Center crop to a square, then resize with antialiasing.

    Halving with a box filter while the side is at least twice the target, then one bicubic step: the preparation of
    the ADM training data (Dhariwal & Nichol, 2021, `center_crop_arr`), with the crop first.
    """
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    if image.size != (side, side):
        image = image.crop((left, top, left + side, top + side))
    while side >= 2 * resolution:
        side //= 2
        image = image.resize((side, side), Image.Resampling.BOX)
    return image if side == resolution else image.resize((resolution, resolution), Image.Resampling.BICUBIC)


def load_picture(data: bytes, *, resolution: int) -> np.ndarray:
    """Picture file -> uint8 (resolution, resolution, 3)."""
    return np.asarray(fit_square(decode_picture(data), resolution))


def encode_png(image: Image.Image | np.ndarray) -> bytes:
    """PNG bytes of an image or a uint8/uint16 array; equal pixels give equal bytes."""
    buffer = io.BytesIO()
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture.save(buffer, format="PNG")
    return buffer.getvalue()
