"""Pictures as text for the page, within a number of characters."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

QUALITIES = {512: (85, 70), 384: (75, 60), 256: (70, 50), 160: (60,), 128: (40,)}  # of JPEG, by the longer side


@dataclass(frozen=True)
class Picture:
    uri: str  # "data:image/...", which holds the picture itself
    small: bool  # to be shown enlarged


def encode_pictures(paths: Sequence[Path], characters: int) -> list[Picture | None]:
    """Each picture in an equal share of `characters`; None for those that cannot be read."""
    share = characters // max(1, len(paths))
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # Pillow releases the interpreter's lock
        return list(pool.map(lambda path: encode_picture(path, share), paths))


def encode_picture(path: Path, characters: int) -> Picture | None:
    """As PNG if it is small, else as JPEG: of the largest side and quality that fit."""
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as file:  # no other reader sees it
            small = max(file.size) <= 256
            image = file.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # what Pillow raises for damaged files
        return None
    most_bytes = characters * 3 // 4 - 64  # before they become base64
    attempts = [("png", max(image.size), {})] if small else []
    for side, qualities in QUALITIES.items():
        if side**2 / 20 <= most_bytes:  # else no picture of this side is small enough
            attempts += [("jpeg", side, {"quality": quality}) for quality in qualities]
    for kind, side, options in attempts:
        image.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        if buffer.tell() <= most_bytes:
            break
    return Picture(f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", small)
