"""What is an image, where images lie below a directory, how they are read, and the crop that makes them square."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

# Only these are looked at; what is inside is decided by content, so that a PNG named .jpg is read.
EXTENSIONS = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}

# What Pillow's readers raise for damaged files, beside OSError.
DAMAGE = (ValueError, SyntaxError, EOFError, IndexError, TypeError, OverflowError, struct.error, zlib.error)
DAMAGE += (Image.DecompressionBombError,)


def is_hidden(name: str) -> bool:
    return name.startswith((".", "__MACOSX"))


def is_image(name: str) -> bool:
    """Whether a file's name, without directories, is that of an image to be read."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS and not is_hidden(name)


def image_names(directory: str | Path) -> list[str]:
    """The images below a directory, relative to it, with "/" on every system; sorted directory by directory."""
    names = []
    for root, directories, files in os.walk(directory, followlinks=True):  # 1.3 million files: no Path for each
        directories[:] = [name for name in directories if not is_hidden(name)]
        parts = Path(root).relative_to(directory).parts
        names += ["/".join((*parts, name)) for name in files if is_image(name)]
    return sorted(names, key=lambda name: name.split("/"))


def decode_image(content: bytes) -> Image.Image:
    """An RGB image from encoded bytes of any kind that Pillow reads: CMYK, grey, palette, 16 bits, transparency.

    Raises:
        OSError: the bytes are no whole image, or one of more than 179 million pixels.
    """
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
        if image.mode.startswith("I"):  # 16 bits in integers, which convert() would clip at 255
            return Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8)).convert("RGB")
        return image.convert("RGB")
    except DAMAGE as error:
        raise OSError(str(error)) from error


def center_crop(image: Image.Image, size: int) -> np.ndarray:  # -> (R, R, 3) uint8
    """ADM's crop, on which the field's numbers rest: halve by boxes, then bicubic, then the centre.

    Args:
        image: RGB, any size.
        size: R, side of the result in pixels.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image)[top : top + size, left : left + size].copy()
