"""The directory of a set of samples: unfinished under `partial/`, then whole.

    <directory>/partial/           settings.json, images.raw (uint8, one image after the other), done (a byte per batch)
    <directory>/samples.npz        arr_0 (N, R, R, 3) uint8, arr_1 (N,) int64 labels; stored, not compressed
    <directory>/samples.png        the first 64
    <directory>/images/000000.png  and so on; only if asked for
    <directory>/metrics.json       what was measured while sampling, if anything
    <directory>/samples.json       everything that determines the images; written last

Batches are written at fixed offsets by any process, in any order, and marked as done once they are on the disk: a
killed run resumes with the others. The images are never in memory together.

Shape suffixes: N images, B images of a batch, R image side.
"""

from __future__ import annotations

import os
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from runtime.files import LOCK, fdatasync, fsync, full_disk_is_an_error, sha256, to_json, write_at, write_atomically
from sampling.config import SampleConfig
from sampling.record import FORMAT, SETTINGS, VERSION, read_settings

CHUNK = 1 << 22  # bytes copied at a time
GRID = 64  # images in the picture


class SampleWriter:
    """The images of an unfinished directory, open for writing from several processes at once.

    Args:
        directory: of the samples, prepared by `create`.
        settings: those given to `create`; of them, `num_samples`, `batch_size`, `resolution`, `png` and `npz`
            are read.

    Raises:
        ValueError: the files are not of the size that the settings ask for.
    """

    def __init__(self, directory: str | Path, settings: dict[str, Any]):
        self.directory = Path(directory)
        self.partial = self.directory / "partial"
        self.num_samples, self.batch_size = settings["num_samples"], settings["batch_size"]
        self.shape = (self.num_samples, settings["resolution"], settings["resolution"], 3)
        self.image_bytes = settings["resolution"] ** 2 * 3
        self.num_batches = -(-self.num_samples // self.batch_size)
        self.png, self.npz = settings["png"], settings["npz"]
        for name, size in _sizes(settings).items():
            path = self.partial / name
            found = path.stat().st_size if path.is_file() else "no file"
            if found != size:
                raise ValueError(f"expected {size} bytes in {path}, found {found}; delete {self.partial}")
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
        with full_disk_is_an_error(self.directory):
            write_at(self._images, images, first * self.image_bytes)
            if self.png:
                list(self._encoders.map(self._write_png, range(first, first + len(images)), images))
            fdatasync(self._images)  # a batch must not be marked before it is on the disk
            write_at(self._done, b"\1", batch)

    def _write_png(self, index: int, image: np.ndarray) -> None:  # (R, R, 3) uint8
        Image.fromarray(image).save(self.partial / "images" / f"{index:06d}.png", compress_level=4)

    def close(self) -> None:
        os.close(self._images)
        os.close(self._done)
        if self._encoders:
            self._encoders.shutdown()

    def finish(
        self, labels: np.ndarray, record: dict[str, Any], metrics: dict[str, Any] | None = None
    ) -> None:  # (N,) int64
        """Turn the unfinished directory into a whole one. Can be killed and called again like everything else."""
        assert self.done().all()
        assert labels.shape == (self.num_samples,)
        with full_disk_is_an_error(self.directory):
            if self.npz:
                write_npz(self.partial / "samples.npz", self.partial / "images.raw", self.shape, labels)
                fsync(self.partial / "samples.npz")  # before the images it was made from are removed
                record = record | {"npz_sha256": sha256(self.partial / "samples.npz")}
                os.replace(self.partial / "samples.npz", self.directory / "samples.npz")
            write_grid(self.partial / "samples.png", self.partial / "images.raw", self.shape)
            os.replace(self.partial / "samples.png", self.directory / "samples.png")
            if (self.partial / "images").is_dir():
                os.replace(self.partial / "images", self.directory / "images")
            if metrics is not None:
                write_atomically(self.directory / "metrics.json", to_json(metrics))
            content = {"format": FORMAT, "version": VERSION, **record}
            write_atomically(self.directory / "samples.json", to_json(content))  # last: with it the set is whole
        remove_partial(self.directory)


def write_npz(path: Path, raw: Path, shape: tuple[int, ...], labels: np.ndarray) -> None:  # (N,) int64
    """`arr_0` (`shape` uint8, the bytes of the file `raw`) and `arr_1` (labels), as `np.savez` would, chunk by chunk.

    The same content always gives the same bytes: no time is written into the archive.
    """
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with open(raw, "rb") as source, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as entry:
            np.lib.format.write_array_header_1_0(entry, header)
            while chunk := source.read(CHUNK):
                entry.write(chunk)
        with archive.open(zipfile.ZipInfo("arr_1.npy"), "w", force_zip64=True) as entry:
            np.lib.format.write_array(entry, labels.astype(np.int64), version=(1, 0))


def write_grid(path: Path, raw: Path, shape: tuple[int, ...]) -> None:
    """A picture of the first `GRID` images, row by row."""
    N, R = min(GRID, shape[0]), shape[1]
    images = np.fromfile(raw, np.uint8, N * R * R * 3).reshape(N, R, R, 3)
    columns = int(np.ceil(np.sqrt(N)))
    rows = -(-N // columns)
    grid = np.full((rows * columns, R, R, 3), 255, np.uint8)
    grid[:N] = images
    grid = grid.reshape(rows, columns, R, R, 3).transpose(0, 2, 1, 3, 4).reshape(rows * R, columns * R, 3)
    Image.fromarray(grid).save(path)


def choose_directory(config: SampleConfig, one: SampleConfig, info: dict[str, Any]) -> Path:
    """Where a set goes: `<run>/samples/0400000-sde250-cfg1.8-t0-0.7-seed0-n50000`, unless --output-dir is given.

    Args:
        config: of all sets. Several go into directories of their own below --output-dir.
        one: of this set.
    """
    source = Path(info["source"]).absolute()
    run_dir, model = (source.parent, source.stem) if source.is_file() else (source.parent.parent, source.name)
    (scale,), (interval,) = one.guidance_scale, one.guidance_intervals()
    steps, guidance = "" if one.sampler == "ode-dopri5" else one.num_steps, "auto" if one.autoguidance else "cfg"
    name = f"{model}-{one.sampler}{steps}-{guidance}{scale:g}"
    if scale != 1 and interval != (0.0, 1.0):
        name += "-t{:g}-{:g}".format(*interval)
    if one.head_guidance != (1,):
        name += "-head{:g}".format(*one.head_guidance)
        name += "-t{:g}-{:g}".format(*one.head_guidance_interval) if one.head_guidance_interval else ""
    name += f"-seed{one.seed}-n{one.num_samples}" + (f"-ema-{one.ema}" if one.ema else "")
    if config.output_dir is None:
        return (Path(config.sample_dir) / f"{run_dir.name}-{name}") if config.sample_dir else run_dir / "samples" / name
    several = len(config.checkpoint) * len(config.sets()) > 1
    return Path(config.output_dir) / f"{run_dir.name}-{name}" if several else Path(config.output_dir)


def is_complete(directory: Path, settings: dict[str, Any]) -> bool:
    """Whether a directory already holds the whole set of samples that `settings` describe.

    Raises:
        ValueError: it holds samples of other settings, whole or not, or something else.
    """
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"--output-dir: expected a directory, found the file {directory}; choose another")
    recorded = read_settings(directory)
    if recorded is not None:
        differing = [
            f"{name} {recorded[name]} -> {settings[name]}" for name in SETTINGS if recorded[name] != settings[name]
        ]
        if differing:
            raise ValueError(
                f"{directory} holds samples of other settings: {'; '.join(differing)}; "
                f"give those settings, or another --output-dir"
            )
        there = not settings["npz"] or (directory / "samples.npz").is_file()  # else it is drawn again
        return there and (directory / "samples.json").is_file()
    if directory.is_dir() and {path.name for path in directory.iterdir()} - {"partial", LOCK}:
        raise ValueError(f"--output-dir: expected a new directory or one of samples, found other files in {directory}")
    return False


def remove_partial(directory: str | Path) -> None:
    """Of a whole directory, what a process that was killed at the very end has left."""
    shutil.rmtree(Path(directory) / "partial", ignore_errors=True)


def _sizes(settings: dict[str, Any]) -> dict[str, int]:
    """Bytes of each file of an unfinished set."""
    images = settings["num_samples"] * settings["resolution"] ** 2 * 3
    return {"images.raw": images, "done": -(-settings["num_samples"] // settings["batch_size"])}


def create(directory: str | Path, settings: dict[str, Any]) -> None:
    """Prepare an unfinished directory for `SampleWriter`; one that is prepared already is left as it is.

    Raises:
        ValueError: not enough room for the images and samples.npz.
    """
    directory = Path(directory)
    partial = directory / "partial"
    if (partial / "settings.json").is_file():
        return
    sizes = _sizes(settings)
    needed = sizes["images.raw"] * (2 if settings["npz"] else 1)
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ValueError(
            f"expected {needed / 1e9:.3g} GB free for the samples in {directory}, found {free / 1e9:.3g}; "
            f"make room, or choose another --output-dir"
        )
    (partial / "images" if settings["png"] else partial).mkdir(parents=True, exist_ok=True)
    for name, size in sizes.items():
        (partial / name).write_bytes(b"")
        os.truncate(partial / name, size)
    # Last: before it, the directory counts as new.
    write_atomically(partial / "settings.json", to_json({"settings": settings}))
