"""Image files: the size from the header, the pixels, EXIF orientation, and one error for what is broken."""

import os
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from dfm_d2.errors import UserError

_ORIENTATION_TAG = 0x0112
# What is read; Pillow would try all that it knows, and start Ghostscript for EPS.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# What Pillow is known to raise on files that are damaged, cut short or absurdly large.
_DAMAGED = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, struct.error, MemoryError)
_DAMAGED += (ArithmeticError, AttributeError, AssertionError, RuntimeError, Image.DecompressionBombError)


class ImageError(UserError):
    """An image file that cannot be read; the message names it."""


def limit_bytes(most: int) -> None:
    """Have this process refuse images whose pixels, of three bytes, take more: DATASETS.MAX_BYTES."""
    Image.MAX_IMAGE_PIXELS = most // 6  # Pillow warns of more, and refuses more than twice as many


def image_size(path: str | Path) -> tuple[int, int]:
    """(width, height) in pixels after EXIF orientation, from the header alone.

    Raises ImageError if the file is missing or its header is not that of an image.
    """
    try:
        with _open(path) as image:
            width, height = image.size
            sideways = image.getexif().get(_ORIENTATION_TAG, 1) in (5, 6, 7, 8)
    except _DAMAGED as error:
        raise ImageError(f"{path} is not a readable image ({_reason(error)})") from error
    return (height, width) if sideways else (width, height)


def read_image(path: str | Path | BinaryIO, image_format: str = "RGB", name: str = "") -> np.ndarray:
    """Pixels, uint8 (H, W, 3), EXIF orientation applied, channels in `image_format` order ("RGB" or "BGR").

    name: of an open file, for the message.
    Raises ImageError if the file is missing, damaged or cut short.
    """
    try:
        with _open(path) as image:
            pixels = np.asarray(_eight_bits(ImageOps.exif_transpose(image)).convert("RGB"))
    except _DAMAGED as error:
        raise ImageError(f"{name or path} cannot be decoded ({_reason(error)})") from error
    return np.ascontiguousarray(pixels[:, :, ::-1]) if image_format == "BGR" else pixels


def _open(path: str | Path | BinaryIO) -> Image.Image:
    """Raises UnidentifiedImageError for other formats, OSError for a folder, a pipe or a device."""
    if isinstance(path, str | Path) and os.path.exists(path) and not os.path.isfile(path):
        raise OSError("it is a folder, a pipe or a device")
    return Image.open(path, formats=FORMATS)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Images of 16 bits scaled to 8: Pillow's own conversion clips them, to white for the most part.

    Raises ValueError for floating-point pixels, whose range is not known.
    """
    if image.mode == "F":
        raise ValueError("floating-point pixels; save it with 8 or 16 bits a channel")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        return Image.fromarray((values.clip(0, 65535) // 257).astype(np.uint8))
    return image


def _reason(error: BaseException) -> str:
    """The error in a few words; Pillow repeats the path or open file, which the caller names already."""
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {2 * Image.MAX_IMAGE_PIXELS} pixels, the limit that DATASETS.MAX_BYTES sets"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text.split(" '")[0].split(" <")[0] or type(error).__name__
