"""The folder of a set of samples: unfinished under `partial/`, then whole.

    <folder>/partial/           settings.json, images.raw (uint8, one image after the other), done (a byte per batch)
    <folder>/samples.npz        arr_0 (N, R, R, 3) uint8, arr_1 (N,) int64 labels; stored, not compressed
    <folder>/samples.png        the first 64
    <folder>/images/000000.png  and so on; only if asked for
    <folder>/metrics.json       what was measured while sampling, if anything
    <folder>/samples.json       everything that determines the images; written last

Batches are written at fixed offsets by any process, in any order, and marked as done once they are on the disk: a
killed run goes on with the others. The images are never in memory together.

Shape suffixes: N images, B images of a batch, R image side.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

FORMAT = "vae-repa-samples"
VERSION = 1
CHUNK = 1 << 22  # bytes copied at a time
GRID = 64  # images in the picture


class SampleWriter:
    """The images of an unfinished folder, open for writing from several processes at once.

    Args:
        folder: the folder of the samples, prepared by `create`.
        settings: those given to `create`; of them, `num_samples`, `batch_size`, `resolution`, `png` and `npz`
            are read.

    Raises:
        ValueError: the files are not of the size that the settings ask for.
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any]):
        self.folder = Path(folder)
        self.partial = self.folder / "partial"
        self.num_samples, self.batch_size = settings["num_samples"], settings["batch_size"]
        self.shape = (self.num_samples, settings["resolution"], settings["resolution"], 3)
        self.image_bytes = settings["resolution"] ** 2 * 3
        self.num_batches = -(-self.num_samples // self.batch_size)
        self.png, self.npz = settings["png"], settings["npz"]
        sizes = {"images.raw": self.num_samples * self.image_bytes, "done": self.num_batches}
        for name, size in sizes.items():
            path = self.partial / name
            found = path.stat().st_size if path.is_file() else "no file"
            if found != size:
                raise ValueError(
                    f"expected {size} bytes in {path}, found {found}; delete {self.partial} and start again"
                )
        self._images = os.open(self.partial / "images.raw", os.O_RDWR)
        self._done = os.open(self.partial / "done", os.O_RDWR)
        self._encoders = ThreadPoolExecutor(min(8, os.cpu_count() or 1)) if self.png else None

    def done(self) -> np.ndarray:  # () -> (batches,) bool
        """Which batches are written, by whatever process."""
        return np.frombuffer(os.pread(self._done, self.num_batches, 0), np.uint8) == 1

    def count(self) -> int:
        """Images written so far."""
        last = self.num_samples - (self.num_batches - 1) * self.batch_size
        done = self.done()
        return int(done.sum()) * self.batch_size - bool(done[-1]) * (self.batch_size - last)

    def read(self, batch: int) -> np.ndarray:  # -> (B, R, R, 3) uint8
        """A batch that is done; the last one may be shorter."""
        first = batch * self.batch_size
        size = min(self.batch_size, self.num_samples - first) * self.image_bytes
        content = os.pread(self._images, size, first * self.image_bytes)
        return np.frombuffer(content, np.uint8).reshape(-1, *self.shape[1:])

    def write(self, batch: int, images: np.ndarray) -> None:  # (B, R, R, 3) uint8
        """Keep a batch: images that would come after the last one are dropped.

        Raises:
            ValueError: the disk is full.
        """
        first = batch * self.batch_size
        images = np.ascontiguousarray(images[: self.num_samples - first])
        with _full_disk_named(self.folder):
            _write_at(self._images, images, first * self.image_bytes)
            if self.png:
                list(self._encoders.map(self._write_png, range(first, first + len(images)), images))
            os.fdatasync(self._images)  # a batch must not be marked before it is on the disk
            _write_at(self._done, b"\1", batch)

    def _write_png(self, index: int, image: np.ndarray) -> None:  # (R, R, 3) uint8
        from PIL import Image

        Image.fromarray(image).save(self.partial / "images" / f"{index:06d}.png", compress_level=4)

    def close(self) -> None:
        os.close(self._images)
        os.close(self._done)
        if self._encoders:
            self._encoders.shutdown()

    def finish(
        self, labels: np.ndarray, record: dict[str, Any], metrics: dict[str, Any] | None = None
    ) -> None:  # (N,) int64
        """Turn the unfinished folder into a whole one. Can be killed and called again like everything else."""
        assert self.done().all()
        assert labels.shape == (self.num_samples,)
        with _full_disk_named(self.folder):
            if self.npz:
                write_npz(self.partial / "samples.npz", self.partial / "images.raw", self.shape, labels)
                _flush(self.partial / "samples.npz")  # before the images it was made from are removed
                record = record | {"npz_sha256": _file_sha256(self.partial / "samples.npz")}
                os.replace(self.partial / "samples.npz", self.folder / "samples.npz")
            write_grid(self.partial / "samples.png", self.partial / "images.raw", self.shape)
            os.replace(self.partial / "samples.png", self.folder / "samples.png")
            if (self.partial / "images").is_dir():
                os.replace(self.partial / "images", self.folder / "images")
            if metrics is not None:
                _write_json(self.folder / "metrics.json", metrics)
            _write_json(self.folder / "samples.json", {"format": FORMAT, "version": VERSION, **record})
        remove_partial(self.folder)


@contextmanager
def _full_disk_named(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(
            f"{folder}: the disk is full; what was written is kept: make room and run the same command again"
        ) from error


def _write_at(descriptor: int, content: np.ndarray | bytes, offset: int) -> None:
    """All of `content`: `os.pwrite` may stop short."""
    view = memoryview(content).cast("B")
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _flush(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as file:
        file.write(json.dumps(content, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_npz(path: Path, raw: Path, shape: tuple[int, ...], labels: np.ndarray) -> None:  # (N,) int64
    """`arr_0` (`shape` uint8, the bytes of the file `raw`) and `arr_1` (labels), as `np.savez` would, chunk by chunk.

    The same content always gives the same bytes: no time is written into the archive.
    """
    with open(raw, "rb") as source, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as entry:
            _write_header(entry, shape, np.uint8)
            while chunk := source.read(CHUNK):
                entry.write(chunk)
        with archive.open(zipfile.ZipInfo("arr_1.npy"), "w", force_zip64=True) as entry:
            _write_header(entry, labels.shape, np.int64)
            entry.write(labels.astype(np.int64).tobytes())


def _write_header(file: BinaryIO, shape: tuple[int, ...], dtype: type) -> None:
    description = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, description)


def write_grid(path: Path, raw: Path, shape: tuple[int, ...]) -> None:
    """A picture of the first `GRID` images, row by row."""
    from PIL import Image

    N, R = min(GRID, shape[0]), shape[1]
    images = np.fromfile(raw, np.uint8, N * R * R * 3).reshape(N, R, R, 3)
    columns = int(np.ceil(np.sqrt(N)))
    rows = -(-N // columns)
    grid = np.full((rows * columns, R, R, 3), 255, np.uint8)
    grid[:N] = images
    grid = grid.reshape(rows, columns, R, R, 3).transpose(0, 2, 1, 3, 4).reshape(rows * R, columns * R, 3)
    Image.fromarray(grid).save(path)


def is_complete(folder: str | Path, settings: dict[str, Any]) -> bool:
    """Whether the folder already holds the whole set of samples that `settings` describe.

    Raises:
        ValueError: it holds samples of other settings, whole or not, or something else.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output-dir: expected a folder, found the file {folder}; choose another")
    whole, unfinished = folder / "samples.json", folder / "partial" / "settings.json"
    for path in (whole, unfinished):
        if path.is_file():
            _check_same(folder, _read_settings(path), settings)
            return path == whole
    if folder.is_dir() and {path.name for path in folder.iterdir()} - {"partial"}:
        raise ValueError(f"--output-dir: expected a new folder or one of samples, found other files in {folder}")
    return False


def batch_size_of(folder: str | Path) -> int | None:
    """Images per batch of the samples in a folder, whole or not; None if it holds none."""
    for path in (Path(folder) / "samples.json", Path(folder) / "partial" / "settings.json"):
        if path.is_file():
            return _read_settings(path).get("batch_size")
    return None


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        return content["settings"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"expected the settings of samples in {path}, found something else; delete {path.parent}"
        ) from error


def _check_same(folder: Path, saved: dict[str, Any], settings: dict[str, Any]) -> None:
    settings = json.loads(json.dumps(settings))  # tuples become lists, as in the file
    differing = [
        f"{name} {saved.get(name)} -> {settings.get(name)}"
        for name in {**saved, **settings}
        if saved.get(name) != settings.get(name)
    ]
    if differing:
        raise ValueError(
            f"{folder} holds samples of other settings: {'; '.join(differing)}; "
            f"give those settings, or another --output-dir"
        )


def remove_partial(folder: str | Path) -> None:
    """Of a whole folder, what a process that was killed at the very end has left."""
    shutil.rmtree(Path(folder) / "partial", ignore_errors=True)


def create(folder: str | Path, settings: dict[str, Any]) -> None:
    """Prepare an unfinished folder for `SampleWriter`; one that is prepared already is left as it is.

    Raises:
        ValueError: not enough room for the images and samples.npz.
    """
    folder = Path(folder)
    partial = folder / "partial"
    if (partial / "settings.json").is_file():
        return
    size = settings["num_samples"] * settings["resolution"] ** 2 * 3
    needed = size * (2 if settings["npz"] else 1)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ValueError(
            f"expected {needed / 1e9:.3g} GB free for the samples in {folder}, found {free / 1e9:.3g}; "
            f"make room, or choose another --output-dir"
        )
    try:
        (partial / "images" if settings["png"] else partial).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output-dir: cannot make {partial} ({error.strerror}); choose another folder") from error
    for name, length in (("images.raw", size), ("done", -(-settings["num_samples"] // settings["batch_size"]))):
        with open(partial / name, "wb") as file:
            file.truncate(length)
    _write_json(partial / "settings.json", {"settings": settings})  # last: before it, the folder counts as new
