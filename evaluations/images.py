"""Sets of images to be measured, read batch by batch: npz files, folders, latent stores, and stored statistics.

Each class has `path`, `kind`, `count`, `size` (height, width), `labels` ((N,) or None), `digest()` and
`batches(start, stop, batch_size)`, which yields (B, H, W, 3), uint8 or float32 in 0..255. All are opened and checked
from headers alone; nothing of a file is unpickled, and no more than a few batches are in memory.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
DECODING_THREADS = 8
FORTRAN_CHUNK = 256 << 20  # bytes copied at once from a file whose images are not contiguous
BROKEN_ZIP = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError)


def open_images(path: str) -> NpzImages | FolderImages | StoreImages | StoredStatistics:
    """Open what lies at `path`, by its look.

    Raises:
        ValueError: nothing there, or nothing that can be read as images or statistics.
    """
    place = Path(path)
    if place.is_dir():
        return StoreImages(place) if (place / "meta.json").exists() else FolderImages(place)
    if not place.exists():
        raise ValueError(f"expected an npz file or a folder at {path}, found nothing")
    members = _members(place)
    return StoredStatistics(place) if "features" in members else NpzImages(place, members)


def _members(path: Path) -> list[str]:
    """Names of the arrays in an npz file."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except (*BROKEN_ZIP, OSError) as error:
        raise ValueError(f"expected an npz file at {path}, found {error}; fix: was it copied whole?") from error


class NpzImages:
    """`arr_0` (N, H, W, 3), read as a stream out of the zip file, stored or compressed, in C or Fortran order.

    Floating images go to the network as they are. `arr_1`, if it is there and one number per image, is the labels.
    ADM's reference files hold `mu, sigma, mu_s, sigma_s` too.
    """

    kind = "npz"

    def __init__(self, path: Path, members: list[str]):
        self.path, self.members = path, members
        if "arr_0" not in members and "mu" not in members:
            raise ValueError(f"expected arr_0 in {path}, found {', '.join(members) or 'nothing'}")
        self.count, self.size, self.labels = 0, None, None
        if "arr_0" not in members:
            return
        with self._open("arr_0") as stream:
            self.shape, self.fortran, self.dtype = self._header(stream)
        allowed = self.dtype == np.uint8 or self.dtype.kind == "f"
        if len(self.shape) != 4 or self.shape[3] != 3 or not allowed or 0 in self.shape:
            raise ValueError(
                f"expected arr_0 (N, H, W, 3) uint8 or floating in 0..255, found {self.shape} {self.dtype} in {path}"
            )
        self.count, self.size = self.shape[0], self.shape[1:3]
        if "arr_1" in members:
            labels = self.array("arr_1")
            self.labels = labels if labels.shape == (self.count,) else None

    def _open(self, name: str) -> zipfile.ZipExtFile:
        return zipfile.ZipFile(self.path).open(name + ".npy")

    def _header(self, stream: zipfile.ZipExtFile) -> tuple[tuple[int, ...], bool, np.dtype]:
        try:
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            return read(stream)
        except BROKEN_ZIP as error:
            raise ValueError(f"expected a whole npz file at {self.path}, found {error}") from error
        except ValueError as error:
            raise ValueError(f"expected a numpy array in {self.path}, found {error}") from error

    def array(self, name: str) -> np.ndarray:
        """A whole array that is not the images."""
        try:
            with np.load(self.path, allow_pickle=False) as file:
                return file[name]
        except (ValueError, *BROKEN_ZIP) as error:
            raise ValueError(f"expected a plain array {name} in {self.path}, found {error}") from error

    def digest(self) -> str:
        """SHA-256 of the file."""
        return _file_sha256(self.path)

    def batches(self, start: int, stop: int, batch_size: int) -> Iterator[np.ndarray]:
        """Images start..stop in file order.

        What comes before is read and dropped, so that whoever reads to the end has checked the zip file's checksum.
        """
        read = self._fortran_batches if self.fortran else self._stream_batches
        position = start
        for batch in read(start, stop, batch_size):
            if batch.dtype != np.uint8:
                batch = batch.astype(np.float32)
                self._check_range(batch, position)
            position += len(batch)
            yield batch

    def _stream_batches(self, start: int, stop: int, batch_size: int) -> Iterator[np.ndarray]:
        row = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        try:
            with self._open("arr_0") as stream:
                self._header(stream)
                self._skip(stream, start * row)
                for first in range(start, stop, batch_size):
                    count = min(batch_size, stop - first)
                    content = stream.read(count * row)
                    if len(content) != count * row:
                        raise EOFError("fewer bytes than arr_0's header says")
                    if first + count == self.count and stream.read(1):  # the zip's checksum is checked at its end
                        raise EOFError("more bytes than arr_0's header says")
                    yield np.frombuffer(content, self.dtype).reshape(count, *self.shape[1:])
        except BROKEN_ZIP as error:
            raise ValueError(f"expected a whole npz file at {self.path}, found {error}") from error

    def _skip(self, stream: zipfile.ZipExtFile, size: int) -> None:
        while size:
            read = len(stream.read(min(size, 4 << 20)))
            if not read:
                raise EOFError("fewer bytes than arr_0's header says")
            size -= read

    def _fortran_batches(self, start: int, stop: int, batch_size: int) -> Iterator[np.ndarray]:
        """Every image is spread over the whole array: it is unpacked to a temporary file, and read through a map."""
        import shutil
        import tempfile

        with tempfile.TemporaryFile() as file:
            try:
                with self._open("arr_0") as stream:
                    self._header(stream)
                    shutil.copyfileobj(stream, file, 4 << 20)
                file.flush()
                if file.tell() != int(np.prod(self.shape)) * self.dtype.itemsize:
                    raise EOFError("another number of bytes than arr_0's header says")
            except BROKEN_ZIP as error:
                raise ValueError(f"expected a whole npz file at {self.path}, found {error}") from error
            images = np.memmap(file, self.dtype, mode="r", shape=self.shape, order="F")  # (N, H, W, 3)
            row = int(np.prod(self.shape[1:])) * self.dtype.itemsize
            chunk = max(FORTRAN_CHUNK // row // batch_size, 1) * batch_size  # images
            for first in range(start, stop, chunk):
                copied = np.ascontiguousarray(images[first : min(first + chunk, stop)])
                for begin in range(0, len(copied), batch_size):
                    yield copied[begin : begin + batch_size]

    def _check_range(self, batch: np.ndarray, position: int) -> None:  # (B, H, W, 3) float32
        low, high = batch.min(), batch.max()
        where = f"in images {position}..{position + len(batch) - 1} of {self.path}"
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ValueError(f"expected finite images, found NaN or infinity {where}")
        if high <= 1.0:
            scale = "-1..1" if low < 0 else "0..1"
            raise ValueError(
                f"expected images in 0..255, found floats in {scale} {where}; fix: scale them to 0..255, as uint8"
            )
        if low < 0 or high > 255:
            raise ValueError(f"expected images in 0..255, found {low:g}..{high:g} {where}")


class FolderImages:
    """Image files of one size in a folder and its subfolders, sorted by path; subfolders are taken as classes."""

    kind = "folder"

    def __init__(self, path: Path):
        self.path, self.members = path, ["arr_0"]
        self.files = sorted(
            file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()
        )
        if not self.files:
            raise ValueError(f"expected images ({' '.join(IMAGE_SUFFIXES)}) in {path}, found none")
        self.count = len(self.files)
        self.size = self._size(self.files[0])
        with ThreadPoolExecutor(DECODING_THREADS) as pool:
            for file, size in zip(self.files, pool.map(self._size, self.files), strict=True):
                if size != self.size:
                    raise ValueError(
                        f"expected images of one size, found {self.size[1]} x {self.size[0]} in {self.files[0]} and "
                        f"{size[1]} x {size[0]} in {file}"
                    )
        folders = [str(file.parent) for file in self.files]
        self.labels = np.unique(folders, return_inverse=True)[1] if len(set(folders)) > 1 else None

    def _size(self, file: Path) -> tuple[int, int]:
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(file) as image:
                return image.height, image.width
        except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
            raise ValueError(f"expected an image, found {file}: {error}") from error

    def _read(self, file: Path) -> np.ndarray:
        from PIL import Image

        try:
            with Image.open(file) as image:
                return np.asarray(image.convert("RGB"))  # (H, W, 3)
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"expected a whole image, found {file}: {error}") from error

    def digest(self) -> str:
        """SHA-256 over the names and contents of all files."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(str(file.relative_to(self.path)).encode() + b"\0" + file.read_bytes())
        return digest.hexdigest()

    def batches(self, start: int, stop: int, batch_size: int) -> Iterator[np.ndarray]:
        """Images start..stop in order of their paths, greyscale and palettes as RGB."""
        with ThreadPoolExecutor(DECODING_THREADS) as pool:
            for first in range(start, stop, batch_size):
                yield np.stack(list(pool.map(self._read, self.files[first : min(first + batch_size, stop)])))


class StoreImages:
    """The crops of a latent store that was made with `--keep-images`."""

    kind = "latent store"

    def __init__(self, path: Path):
        self.path, self.members = path, ["arr_0"]
        try:
            meta = json.loads((path / "meta.json").read_text())
            side, self.count, has_images = meta["resolution"], meta["count"], meta["images"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"expected a latent store at {path}, found an unreadable meta.json ({error})") from error
        if not has_images:
            raise ValueError(f"expected a latent store with images at {path}, found none; fix: dump with --keep-images")
        self.size = (side, side)
        try:
            self.shards = [np.load(file, mmap_mode="r") for file in sorted(path.glob("images-*.npy"))]
            self.labels = np.load(path / "labels.npy")
        except (OSError, ValueError) as error:
            raise ValueError(f"expected a whole latent store at {path}, found {error}") from error
        rows = sum(len(shard) for shard in self.shards)
        if rows != self.count or any(s.shape[1:] != (side, side, 3) or s.dtype != np.uint8 for s in self.shards):
            raise ValueError(
                f"expected {self.count} images of {side} x {side} in {path}, found {rows} in {len(self.shards)} shards"
            )

    def digest(self) -> str:
        """SHA-256 of `meta.json`, which holds a digest of every shard."""
        return _file_sha256(self.path / "meta.json")

    def batches(self, start: int, stop: int, batch_size: int) -> Iterator[np.ndarray]:
        """Images start..stop in the store's order."""
        begins = np.cumsum([0, *(len(shard) for shard in self.shards)])
        for first in range(start, stop, batch_size):
            last = min(first + batch_size, stop)
            yield np.concatenate(
                [
                    shard[max(first - begin, 0) : max(last - begin, 0)]
                    for shard, begin in zip(self.shards, begins, strict=False)
                ]
            )


class StoredStatistics:
    """A file that `--save-stats` wrote: moments and features of images that are not in it."""

    kind = "statistics"
    size, labels = None, None

    def __init__(self, path: Path):
        self.path = path
        try:
            with np.load(path, allow_pickle=False) as file:
                self.members = list(file)
                self.features, self.weights = str(file["features"]), str(file["digest"])
                self.count = int(file["count"])
        except (ValueError, KeyError, TypeError, OSError, *BROKEN_ZIP) as error:
            raise ValueError(f"expected statistics as --save-stats writes them in {path}, found {error}") from error

    array = NpzImages.array

    def digest(self) -> str:
        """SHA-256 of the file."""
        return _file_sha256(self.path)


def _file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while content := file.read(16 << 20):
            digest.update(content)
    return digest.hexdigest()


def prefetched(batches: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The same batches, each read in a thread while the one before is in use."""
    with ThreadPoolExecutor(1) as reader:
        pending = reader.submit(next, batches, None)
        while (batch := pending.result()) is not None:
            pending = reader.submit(next, batches, None)
            yield batch
