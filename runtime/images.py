"""What is an image, where images lie below a directory, how they are read, and the crop that makes them square.

One answer to each for stores, references, samples and pictures to be shown.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import struct
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from runtime.progress import Progress

# Pillow's readers that may see a file, whatever its name: no other (an EPS named .png would start Ghostscript).
FORMATS = "AVIF BMP GIF JPEG JPEG2000 MPO PNG PPM TGA TIFF WEBP".split()
# Only these are looked at; what is inside is decided by content, so that a PNG named .jpg is read.
_NAMES = "jpg jpeg jpe jfif mpo png apng webp bmp dib tif tiff gif ppm pgm pbm pnm jp2 j2k jpx tga avif"
EXTENSIONS = {f".{name}" for name in _NAMES.split()}
MAX_PIXELS = Image.MAX_IMAGE_PIXELS * 2  # 179 million: Pillow opens none that have more

# What Pillow's readers raise for damaged files, beside OSError.
DAMAGE = (ValueError, SyntaxError, EOFError, IndexError, TypeError, OverflowError, struct.error, zlib.error)


def is_hidden(name: str) -> bool:
    return name.startswith((".", "__MACOSX"))


def is_image(name: str) -> bool:
    """Whether a file's name, with or without directories, is that of an image to be read."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS and not is_hidden(name.rpartition("/")[2])


def file_names(directory: str | Path) -> list[str]:
    """The files below a directory that are not hidden, relative to it, with "/" on every system; links are followed.
    Sorted directory by directory.

    Raises:
        ValueError: a directory below cannot be read.
    """
    names = []
    above = {str(directory): (os.path.realpath(directory),)}  # of each directory to come: the true places on its way
    walk = os.walk(directory, onerror=_unreadable, followlinks=True)
    for root, directories, files in Progress(walk, f"listing {directory}", unit=" directories", delay=5, leave=False):
        way = above.pop(root)
        places = {name: os.path.realpath(os.path.join(root, name)) for name in directories if not is_hidden(name)}
        directories[:] = [name for name in places if not any(_is_in(place, places[name]) for place in way)]
        above |= {os.path.join(root, name): (*way, places[name]) for name in directories}  # no link that leads back
        parts = Path(root).relative_to(directory).parts
        names += ["/".join((*parts, name)) for name in files if not is_hidden(name)]
    return sorted(names, key=lambda name: name.split("/"))


def _is_in(place: str, directory: str) -> bool:
    return os.path.join(place, "").startswith(os.path.join(directory, ""))


def _unreadable(error: OSError) -> None:
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise ValueError(f"expected a directory that can be read, found {error.filename} ({error.strerror})") from error


def image_names(directory: str | Path) -> list[str]:
    """The images among `file_names`."""
    return [name for name in file_names(directory) if is_image(name)]


def left_out(names: Iterable[str]) -> dict[str, int]:
    """How many of these files are no images, by their extension."""
    others = (name.rpartition("/")[2] for name in names if not is_image(name))
    return dict(Counter(os.path.splitext(name)[1].lower() or name for name in others))


def describe_left_out(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {kind}" for kind, count in sorted(counts.items()))


@functools.cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def open_image(file: str | Path | io.BytesIO) -> Image.Image:
    """A file of one of `FORMATS`, of which only the header has been read.

    Raises:
        OSError: it is none, or has too many pixels.
    """
    try:
        return Image.open(file, formats=_formats())
    except Image.DecompressionBombError as error:
        raise OSError(
            f"more than {MAX_PIXELS / 1e6:.0f} million pixels; shrink it first (magick IN -resize 4096x4096 OUT)"
        ) from error
    except (OSError, *DAMAGE) as error:
        unknown = isinstance(error, Image.UnidentifiedImageError)  # whose text is of the object in memory
        raise OSError("no image of a known kind" if unknown else str(error)) from error


def read_image(content: bytes, alpha: str = "drop", exif_orientation: bool = False) -> tuple[Image.Image, list[str]]:
    """An RGB image from encoded bytes of any kind: CMYK, grey, palette, more than 8 bits, transparency.

    Args:
        alpha: "drop" takes the colours below transparency, as the field's scripts do; "white" puts it on white.
        exif_orientation: turn the image as its camera asks for; the field's scripts do not.

    Returns:
        The image, and what was noticed: "alpha" if some of it is transparent, "rotated" if it asks to be turned.

    Raises:
        OSError: the bytes are no whole image, one with too many pixels, or one whose range of values is unknown.
    """
    if not content:
        raise OSError("an empty file")
    image = open_image(io.BytesIO(content))
    try:
        image.load()
        noticed = ["rotated"] if _asks_to_be_turned(image) else []
        image = ImageOps.exif_transpose(image) if exif_orientation and noticed else image
        if image.mode.startswith(("I", "F")):
            image = _to_8_bits(image)
        elif image.has_transparency_data:
            full = image.convert("RGBA")
            if full.getchannel("A").getextrema()[0] < 255:
                noticed.append("alpha")
                white = Image.new("RGBA", full.size, "white")
                image = Image.alpha_composite(white, full) if alpha == "white" else image
        return image.convert("RGB"), noticed
    except DAMAGE as error:
        raise OSError(str(error)) from error


def decode_image(content: bytes) -> Image.Image:
    """`read_image` with its defaults, without what was noticed."""
    return read_image(content)[0]


def _asks_to_be_turned(image: Image.Image) -> bool:
    """By EXIF. TIFF files do not: Pillow has turned them as they were read."""
    with contextlib.suppress(OSError, *DAMAGE):  # damaged EXIF is none
        return image.format != "TIFF" and image.getexif().get(0x0112) in range(2, 9)
    return False


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Grey values of more than 8 bits, by the largest value that their file allows."""
    tags = getattr(image, "tag_v2", {})  # of TIFF: bits of a sample, and its largest value if that is recorded
    bits, largest, signed = tags.get(258, (16,))[0], tags.get(281), 2 in tags.get(339, ())
    if image.mode.startswith("F") or ((bits > 16 or signed) and not largest):
        kind = "floats" if image.mode.startswith("F") else f"{'signed ' * signed}integers of {bits} bits"
        raise OSError(f"{kind}, whose range is not recorded; save it with 8 or 16 bits, unsigned")
    if largest:
        bits = int(max(largest) if isinstance(largest, tuple) else largest).bit_length()
    values = (np.asarray(image).astype(np.float64) * (255 / (2**bits - 1))).round().clip(0, 255).astype(np.uint8)
    return Image.fromarray(255 - values if tags.get(262) == 0 else values)  # 0: white is zero


def center_crop(image: Image.Image, size: int) -> np.ndarray:  # -> (R, R, 3) uint8
    """ADM's crop, on which the field's numbers rest: halve by boxes, then bicubic, then the centre.

    Args:
        image: RGB, any size.
        size: R, side of the result in pixels.

    Raises:
        OSError: it is so narrow that it would have too many pixels on the way.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    scaled = round(image.width * scale), round(image.height * scale)
    if scaled[0] * scaled[1] > MAX_PIXELS:
        raise OSError(f"{image.width} x {image.height} pixels are too narrow a picture for a crop of {size}")
    image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.array(image.crop((left, top, left + size, top + size)))
