"""Sets of images to be measured, read batch by batch: npz files, directories, latent stores, and stored statistics.

Each class has `path`, `kind`, `count`, `size` (height, width), `labels` ((N,) or None), `notes` (what was done to
images, and what was left out), `digest()` and `batches(start, stop, batch_size)`, which yields (B, H, W, 3), uint8 or
float32 in 0..255. All are opened and checked from headers alone; nothing of a file is unpickled, and no more than a few
batches are in memory.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from dataset import LatentDataset
from runtime.files import Field, read_record, sha256
from runtime.images import (
    EXTENSIONS,
    center_crop,
    decode_image,
    describe_left_out,
    file_names,
    is_image,
    left_out,
    open_image,
)

DECODING_THREADS = 8
BROKEN_ZIP = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError)

# The record of statistics that `--save-stats` writes: mean and covariance (named as in ADM's files) of some layers,
# features of others.
MOMENT_NAMES = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
STATISTICS = {"features": Field(), "digest": Field(), "count": Field()}
STATISTICS |= dict.fromkeys("mu sigma mu_s sigma_s pool spatial logits".split(), Field(None))


# ADM's statistics and 10,000 images. (We know of no digest of it.)
REFERENCE_URL = (
    "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/"
    "VIRTUAL_imagenet256_labeled.npz"
)


def open_images(
    path: str, side: int | None = None, always: bool = False
) -> NpzImages | DirectoryImages | StoreImages | StoredStatistics:
    """Open what lies at `path`, by its look; `side` and `always` are for directories: see there.

    Raises:
        ValueError: nothing there, or nothing that can be read as images or statistics.
    """
    place = Path(path)
    if (place / "samples.npz").is_file():  # the directory of a set of samples
        place = place / "samples.npz"
    if place.is_dir():
        return StoreImages(place) if (place / "meta.json").exists() else DirectoryImages(place, side, always)
    if not place.exists():
        fix = f"; fix: fetch {REFERENCE_URL}" if place.name == REFERENCE_URL.rpartition("/")[2] else ""
        raise ValueError(f"expected an npz file or a directory at {path}, found nothing{fix}")
    try:
        with zipfile.ZipFile(place) as archive:
            members = [name.removesuffix(".npy") for name in archive.namelist()]
    except (*BROKEN_ZIP, OSError) as error:
        raise ValueError(f"expected an npz file at {path}, found {error}; fix: was it copied whole?") from error
    return StoredStatistics(place, members) if "features" in members else NpzImages(place, members)


class NpzImages:
    """`arr_0` (N, H, W, 3), read as a stream out of the zip file, stored or compressed.

    Floating images go to the network as they are. `arr_1`, if it is there and one number per image, is the labels.
    ADM's reference files hold `mu, sigma, mu_s, sigma_s` too.
    """

    kind, notes = "npz", ()
    _scale_is_checked = False

    def __init__(self, path: Path, members: list[str]):
        self.path, self.members = path, members
        if "arr_0" not in members and "mu" not in members:
            raise ValueError(f"expected arr_0 in {path}, found {', '.join(members) or 'nothing'}")
        self.count, self.size, self.labels = 0, None, None
        if "arr_0" not in members:
            return
        with self._open("arr_0") as stream:
            self.shape, fortran_order, self.dtype = self._header(stream)
        allowed = self.dtype == np.uint8 or self.dtype.kind == "f"
        if len(self.shape) != 4 or self.shape[3] != 3 or not allowed or 0 in self.shape:
            raise ValueError(f"expected arr_0 (N, H, W, 3) uint8 or float, found {self.shape} {self.dtype} in {path}")
        if fortran_order:
            raise ValueError(f"expected arr_0 in C order, found Fortran's in {path}; fix: np.ascontiguousarray(arr_0)")
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
        except (ValueError, *BROKEN_ZIP) as error:
            raise ValueError(f"expected a whole npz file of numpy arrays at {self.path}, found {error}") from error

    def array(self, name: str) -> np.ndarray:
        """A whole array that is not the images."""
        try:
            with np.load(self.path, allow_pickle=False) as file:
                return file[name]
        except (ValueError, *BROKEN_ZIP) as error:
            raise ValueError(f"expected a plain array {name} in {self.path}, found {error}") from error

    def digest(self) -> str:
        """SHA-256 of the file."""
        return sha256(self.path)

    def batches(self, start: int, stop: int, batch_size: int) -> Iterator[np.ndarray]:
        """Images start..stop in file order.

        What comes before is read and dropped, so that whoever reads to the end has checked the zip file's checksum.
        """
        try:
            if self.dtype != np.uint8 and not self._scale_is_checked:
                self._check_scale()
            with self._open("arr_0") as stream:
                self._header(stream)
                for first in range(0, start, batch_size):
                    self._read(stream, first, min(batch_size, start - first))
                for first in range(start, stop, batch_size):
                    batch = self._read(stream, first, min(batch_size, stop - first))
                    yield batch if batch.dtype == np.uint8 else self._in_range(batch.astype(np.float32), first)
        except BROKEN_ZIP as error:
            raise ValueError(f"expected a whole npz file at {self.path}, found {error}") from error

    def _read(self, stream: zipfile.ZipExtFile, first: int, count: int) -> np.ndarray:  # -> (count, H, W, 3)
        """The next images, of which the first is image `first`."""
        size = count * int(np.prod(self.shape[1:])) * self.dtype.itemsize
        content = stream.read(size)
        if len(content) != size:
            raise EOFError("fewer bytes than arr_0's header says")
        if first + count == self.count and stream.read(1):  # the zip's checksum is checked at its end
            raise EOFError("more bytes than arr_0's header says")
        return np.frombuffer(content, self.dtype).reshape(count, *self.shape[1:])

    def _check_scale(self) -> None:
        """Refuse floats in 0..1: judged by the whole file, since a batch may be all black."""
        low = 0.0
        with self._open("arr_0") as stream:
            self._header(stream)
            for first in range(0, self.count, 64):
                batch = self._read(stream, first, min(64, self.count - first)).astype(np.float32)
                if not batch.max() <= 1.0:  # 0..255, mostly told from the first images; or NaN
                    self._scale_is_checked = True
                    return
                low = min(low, batch.min())
        scale = "-1..1" if low < 0 else "0..1"
        raise ValueError(f"expected images in 0..255, found floats in {scale} in {self.path}; fix: make them uint8")

    def _in_range(self, batch: np.ndarray, first: int) -> np.ndarray:  # (B, H, W, 3) -> the same
        low, high = batch.min(), batch.max()
        where = f"in images {first}..{first + len(batch) - 1} of {self.path}"
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ValueError(f"expected finite images, found NaN or infinity {where}")
        if low < 0 or high > 255:
            raise ValueError(f"expected images in 0..255, found {low:g}..{high:g} {where}")
        return batch


class DirectoryImages:
    """Image files in a directory and below, sorted by path; subdirectories are taken as classes.

    Args:
        side: images of several sizes are brought to this one by the crop of a store; without it they are refused.
        always: images of one size are, too.
    """

    kind, members = "folder", ("arr_0",)

    def __init__(self, path: Path, side: int | None = None, always: bool = False):
        names = file_names(path)
        self.path, self.notes = path, []
        self.files = [path / name for name in names if is_image(name)]
        if not self.files:
            raise ValueError(f"expected images ({' '.join(sorted(EXTENSIONS))}) in {path}, found none")
        self.count = len(self.files)
        with ThreadPoolExecutor(DECODING_THREADS) as pool:
            sizes = dict(zip(self.files, pool.map(self._size, self.files), strict=True))
        self.size = sizes[self.files[0]]
        other = next((file for file, size in sizes.items() if size != self.size), None)
        self.side = side if other or (always and self.size != (side, side)) else None
        if self.side:
            several = "several sizes" if other else f"{self.size[1]} x {self.size[0]}"
            self.notes.append(f"{path}: images of {several}, cropped and scaled to {side} x {side}")
            self.size = (side, side)
        elif other:
            raise ValueError(
                f"expected images of one size, found {self.size[1]} x {self.size[0]} in {self.files[0]} and "
                f"{sizes[other][1]} x {sizes[other][0]} in {other}; give --resolution to crop and scale them"
            )
        if others := left_out(names):
            self.notes.append(f"{path}: no images, left out: {describe_left_out(others)}")
        parents = [str(file.parent) for file in self.files]
        self.labels = np.unique(parents, return_inverse=True)[1] if len(set(parents)) > 1 else None

    def _size(self, file: Path) -> tuple[int, int]:
        try:
            with open_image(file) as image:
                return image.height, image.width
        except OSError as error:
            raise ValueError(f"expected an image, found {file}: {error}") from error

    def _read(self, file: Path) -> np.ndarray:  # -> (H, W, 3)
        try:
            image = decode_image(file.read_bytes())
            return center_crop(image, self.side) if self.side else np.asarray(image)
        except OSError as error:
            raise ValueError(f"expected a whole image, found {file}: {error}") from error

    def digest(self) -> str:
        """SHA-256 over the names and contents of all files."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(os.fsencode(file.relative_to(self.path)) + b"\0" + file.read_bytes())
        return digest.hexdigest()

    def batches(self, start: int, stop: int, batch_size: int) -> Iterator[np.ndarray]:
        """Images start..stop in order of their paths, greyscale and palettes as RGB."""
        with ThreadPoolExecutor(DECODING_THREADS) as pool:
            for first in range(start, stop, batch_size):
                yield np.stack(list(pool.map(self._read, self.files[first : min(first + batch_size, stop)])))


class StoreImages:
    """The crops of a latent store that was made with `--keep-images`."""

    kind, members, notes = "latent store", ("arr_0",), ()

    def __init__(self, path: Path):
        self.path, self.dataset = path, LatentDataset(path, images=True)
        self.count, self.labels = len(self.dataset), self.dataset.labels
        self.size = (self.dataset.meta["resolution"],) * 2

    def digest(self) -> str:
        """SHA-256 of `meta.json`, which holds a digest of every shard."""
        return sha256(self.path / "meta.json")

    def batches(self, start: int, stop: int, batch_size: int) -> Iterator[np.ndarray]:
        """Images start..stop in the store's order."""
        for first in range(start, stop, batch_size):
            yield self.dataset.__getitems__(range(first, min(first + batch_size, stop)))["image"].numpy()


class StoredStatistics:
    """A file that `--save-stats` wrote: moments and features of images that are not in it."""

    kind, notes = "statistics", ()
    size, labels = None, None

    def __init__(self, path: Path, members: list[str]):
        self.path, self.members = path, members
        read_record(dict.fromkeys(members), STATISTICS, path)  # refuses names that are missing or unknown
        self.features, self.weights, self.count = (self.array(name).item() for name in ("features", "digest", "count"))

    array, digest = NpzImages.array, NpzImages.digest


def prefetched(batches: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The same batches, each read in a thread while the one before is in use."""
    with ThreadPoolExecutor(1) as reader:
        pending = reader.submit(next, batches, None)
        while (batch := pending.result()) is not None:
            pending = reader.submit(next, batches, None)
            yield batch
