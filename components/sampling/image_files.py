"""Image files, decoded safely and encoded as PNG; captions as token ids, by a byte-level BPE.

Without torch: the readers of shards, one on every core, would only pay for it. Readers and packed models import this
file alike, so that both see the same pixels and ids. Shapes: images are uint8 (H, W, 3), B captions, L text_length.
"""

import base64
import io
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps
from tokenizers import Tokenizer, normalizers

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")  # no other decoder runs: EPS starts Ghostscript
UPLOADED = FORMATS[:3]  # of what strangers send
MAX_PIXELS = 2**27  # of one image: 400 MB as RGB; a kilobyte of PNG can claim more
WHITE = 128  # gray levels of a mask from here on are its mask
PAD, BOS, EOS, UNK = 0, 1, 2, 3
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")  # their place is their id


def open_image(data: bytes) -> Image.Image:
    """Decodes an image file. Raises as Pillow for a corrupt file, ValueError for more than MAX_PIXELS."""
    image = open_header(data)
    image.load()
    return image


def open_header(data: bytes, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Opens an image file of some formats and reads only its header. Raises as `open_image`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is the one that counts
        image = Image.open(io.BytesIO(data), formats=formats)
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
    return image


def decode_image(data: bytes) -> Image.Image:
    """Decode a file of any mode to upright RGB, transparency flattened on white.
    Raises any of Pillow's errors for a corrupt file (OSError, ValueError, SyntaxError, DecompressionBombError)."""
    return to_rgb(ImageOps.exif_transpose(open_image(data)))


def open_given_image(data: bytes, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Decodes the image file of a request, upright and converted. Raises ValueError for no image."""
    try:
        return convert(ImageOps.exif_transpose(open_image(data)))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"the given image can't be read ({error}); give a PNG") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts gray, palette, CMYK, 16-bit and transparent images to RGB; transparent parts become white.
    Raises ValueError for floating-point images, whose range is not defined."""
    if image.mode == "F":
        raise ValueError("floating-point images have no defined range")
    if image.mode.startswith("I"):
        return eight_bits(image).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def to_mask(image: Image.Image) -> Image.Image:
    """Returns a mask in gray, white where an image is transparent; one that nowhere is stays as it is."""
    if is_transparent(image):
        return ImageOps.invert(image.convert("RGBA").getchannel("A"))
    return eight_bits(image).convert("L")


def is_transparent(image: Image.Image) -> bool:
    """Returns whether any pixel is transparent to any degree."""
    return image.has_transparency_data and np.asarray(image.convert("RGBA").getchannel("A")).min() < 255


def eight_bits(image: Image.Image) -> Image.Image:
    """Scales gray of 16 bits to 8, which Pillow's own conversion clips at 255; other images pass."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray(np.rint(np.asarray(image, np.float64).clip(0, 65535) / 257).astype(np.uint8))


def encode_png(image: Image.Image | np.ndarray, *, optimize: bool = False) -> bytes:
    """PNG bytes of an image or a uint8/uint16 array; equal pixels give equal bytes.
    `optimize`: take the time to make it smaller, for what a page shows."""
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, format="PNG", optimize=optimize)
    return buffer.getvalue()


def base64_png(image: Image.Image | np.ndarray) -> str:
    """Encodes an image as PNG in base64 text."""
    return base64.b64encode(encode_png(image)).decode()


def gray_png(side: int) -> bytes:
    """A square of gray."""
    return encode_png(Image.new("RGB", (side, side), "gray"))


def enlarged(image: np.ndarray, *, height: int, width: int) -> np.ndarray:
    """Enlarges to (height, width, 3) without smoothing, so that single pixels stay visible."""
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST))


def load_bpe(path: Path) -> Tokenizer:
    """The tokenizer in a `bpe.json` file. Raises ValueError for a damaged file."""
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # of no narrower class
        raise ValueError(f"{path} is missing or damaged ({error}): copy the model again") from None


LOWERED = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])  # captions, as the house's BPE has them


class TextIds(NamedTuple):
    """Ids around a caption; models of others have their own, or neither begin nor end."""

    begin: int | None = BOS
    end: int | None = EOS
    pad: int = PAD

    @property
    def around(self) -> int:
        """Number of tokens before and after a caption."""
        return (self.begin is not None) + (self.end is not None)


HOUSE_IDS = TextIds()


def encode_text(
    tokenizer: Tokenizer, captions: Sequence[str], *, text_length: int, special: TextIds = HOUSE_IDS
) -> np.ndarray:  # (B, L) int64
    """Encodes captions as `<bos> caption <eos> <pad>…`; long captions lose their end.
    What a tokenizer lacks is left out, and the `<eos>` is never cut. The null text of classifier-free guidance is the
    encoding of ""."""
    begin, end = ([] if each is None else [each] for each in special[:2])
    ids = np.full((len(captions), text_length), special.pad, dtype=np.int64)
    for row, encoding in zip(ids, tokenizer.encode_batch(list(captions), add_special_tokens=False), strict=True):
        tokens = [*begin, *encoding.ids[: text_length - special.around], *end]
        row[: len(tokens)] = tokens
    return ids
