"""The latent store on disk, and the order in which its samples are trained on.

A store is a directory: `meta.json` (written last: without it the store is unfinished), memory-mapped shards
`moments-00000.npy` (n, 2C, H, W) of mean and std, `labels.npy` (N,) int64, `paths.txt` (one source a line); with
mirror images `flips-00000.npy`, shaped as the moments; with the crops `images-00000.npy` (n, R, R, 3) uint8.

Shape suffixes: N images of the store, B of a batch, n of a shard, C latent channels, H = W latent side, R image side.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.vae import LatentScale
from runtime.files import Field, read_checksummed_json, read_record, sha256, write_atomically
from runtime.seeding import numpy_generator

FORMAT = "vae-repa-latents"
VERSION = 1
# The fields of meta.json. One that comes later needs Field(historic): its value in the stores that lack it.
_META = """
    format version vae vae_digest scale shift scale_source resolution crop class_names settings latent_shape dtype count
    num_classes flips images shards labels_sha256 paths_sha256 skipped
"""
META = dict.fromkeys(_META.split(), Field()) | {"versions": Field(None), "left_out": Field({}), "noticed": Field({})}
KINDS = ("moments", "flips", "images")
NPY_HEADER = 128  # bytes before the values: room for any shape, so that a shard's length can be set at its end


def npy_header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """Header of a version 1.0 .npy file, padded to `NPY_HEADER` bytes."""
    text = repr({"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape})
    start = b"\x93NUMPY\x01\x00" + (NPY_HEADER - 10).to_bytes(2, "little")
    return start + text.encode().ljust(NPY_HEADER - 11) + b"\n"


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"damaged store: cannot read {path} ({error}); dump the images again") from error


def read_journal(path: Path) -> list[dict]:
    """The whole batches of a shard; a last line cut short by a kill is dropped from the file, too."""
    batches, lines = [], path.read_text().removesuffix("\n").split("\n") if path.exists() else []
    for line in lines:
        try:
            batches.append(json.loads(line))
        except json.JSONDecodeError:
            break
    if len(batches) < len(lines):
        write_atomically(path, "".join(line + "\n" for line in lines[: len(batches)]))
    return batches


def read_paths(directory: str | Path) -> list[str]:
    """The sources of a store's images, one a line of `paths.txt`: names may hold whatever a file system allows."""
    return (Path(directory) / "paths.txt").read_bytes().decode(errors="surrogateescape").removesuffix("\n").split("\n")


def read_meta(directory: str | Path) -> dict[str, Any]:
    """`meta.json` of a store, by the names in `META`.

    Raises:
        ValueError: no store there, an unfinished one, or one of another format or of newer code.
    """
    file = Path(directory) / "meta.json"
    if not file.is_file():
        if (file.parent / "partial").is_dir():
            raise ValueError(f"unfinished latent store {directory}: run the same command again to finish it")
        raise ValueError(f"expected a latent store, found no meta.json in {directory}; make one by dump_latents.py")
    try:
        meta = read_checksummed_json(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"damaged store: {file}: {error}; dump the images again") from error
    if (meta.get("format"), meta.get("version")) != (FORMAT, VERSION):
        raise ValueError(f"expected a latent store of format {FORMAT} {VERSION}, found another in {directory}")
    meta = read_record(meta, META, file)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in meta.items()}  # as in JSON


def store_digest(meta: dict[str, Any]) -> str:
    """What makes two stores the same: their data and settings, not the machine, versions or names that made them."""
    names = "vae_digest scale shift resolution crop class_names latent_shape dtype flips images labels_sha256".split()
    same = {name: meta[name] for name in names}
    same["shards"] = [
        [shard["count"], *(shard[kind]["sha256"] for kind in KINDS if kind in shard)] for shard in meta["shards"]
    ]
    return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()


def ends_digest(rows: np.ndarray) -> str:  # (n, ...)
    """SHA-256 of a shard's first and last row: tells swapped shards apart without reading them."""
    return hashlib.sha256(rows[0].tobytes() + rows[-1].tobytes()).hexdigest()


def _bytes(array: np.ndarray) -> memoryview:
    """The bytes of a contiguous array, or of its map."""
    return memoryview(array.reshape(-1).view(np.uint8))


class LatentDataset(torch.utils.data.Dataset):
    """A store, opened for reading: sizes, headers and counts are checked, and each shard is mapped once.

    Attributes:
        meta: the content of `meta.json`.
        scale: the `LatentScale` recorded there.
        latent_shape: (C, H, W).
        num_classes, class_names, has_flips: as recorded.

    Args:
        path: the store's directory.
        images: also give the crops, which the store must have.

    Raises:
        ValueError: no store, an unfinished, empty or damaged one, or one without images though they are wanted.
    """

    def __init__(self, path: str | Path, images: bool = False):
        self.path, self.meta = Path(path), read_meta(path)
        self.scale, self.latent_shape = LatentScale.from_dict(self.meta), tuple(self.meta["latent_shape"])
        self.num_classes, self.class_names = self.meta["num_classes"], self.meta["class_names"]
        self.has_flips, count = self.meta["flips"], self.meta["count"]
        counts = [shard["count"] for shard in self.meta["shards"]]
        if count < 1 or sum(counts) != count:
            raise ValueError(f"empty or damaged store {self.path}: {count} images in shards of {counts}")
        if images and not self.meta["images"]:
            raise ValueError(f"{self.path} holds no images; dump them again with --keep-images")
        self.labels = self._open("labels.npy", (count,), "int64")
        if self.labels.min() < 0 or self.labels.max() >= self.num_classes:
            raise ValueError(f"damaged store {self.path}: labels outside 0..{self.num_classes - 1}; dump it again")
        C, H, W = self.latent_shape
        dtype, R = self.meta["dtype"], self.meta["resolution"]
        kinds = {"moments": ((2 * C, H, W), dtype), "images": ((R, R, 3), "uint8")}
        self._rows = {}  # by kind: shape and type of a row, and the bytes of each shard
        for kind in ("moments", *["images"] * images):
            shape, dtype = kinds[kind]
            shards = [self._open(shard[kind]["file"], (shard["count"], *shape), dtype) for shard in self.meta["shards"]]
            if kind == "moments" and self.has_flips:  # index N + i is the mirror image of i: its shards simply follow
                shards += [self._open(s["flips"]["file"], (s["count"], *shape), dtype) for s in self.meta["shards"]]
            self._rows[kind] = (shape, dtype, [_bytes(shard) for shard in shards])
        self._starts = np.concatenate([[0], np.cumsum(counts * (1 + self.has_flips))])

    def _open(self, name: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        path = self.path / name
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"damaged store: cannot read {path} ({error}); dump the images again") from error
        if array.shape != shape or array.dtype != np.dtype(dtype):
            found = f"{array.dtype} {array.shape}"
            raise ValueError(f"damaged store: expected {dtype} {shape} in {path}, found {found}; dump it again")
        return np.asarray(array)  # still the map, without the overhead that np.memmap adds to each access

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:  # B -> moments (B, 2C, H, W), label (B,)
        """A batch, gathered at once: "moments" float32, "label" int64, and with images "image" (B, R, R, 3) uint8.

        Index N + i gives the mirror image of i, in stores that have them.
        """
        indices = np.asarray(indices, dtype=np.int64)
        originals = indices % len(self)
        batch = {
            "moments": torch.from_numpy(self._gather("moments", indices)).float(),
            "label": torch.from_numpy(self.labels[originals]),
        }
        if "images" in self._rows:
            image = self._gather("images", originals)
            image[indices >= len(self)] = image[indices >= len(self), :, ::-1]
            batch["image"] = torch.from_numpy(image)
        return batch

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: values[0] for name, values in self.__getitems__([index]).items()}

    def _gather(self, kind: str, indices: np.ndarray) -> np.ndarray:  # (B,) -> (B, ...)
        """Rows of a concatenation of shards, each copied once, to its place.

        A loop over bytes, since a row is 32 KB: grouping rows by shard for numpy's own gather costs a second copy, and
        is slower (1.4 times on two cores).
        """
        shape, dtype, sources = self._rows[kind]
        rows = np.empty((len(indices), *shape), dtype)
        size, target = rows[:1].nbytes, _bytes(rows)
        shard_of = np.searchsorted(self._starts, indices, side="right") - 1
        begins = (indices - self._starts[shard_of]) * size
        place = 0
        for shard, begin in zip(shard_of.tolist(), begins.tolist(), strict=True):
            target[place : place + size] = sources[shard][begin : begin + size]
            place += size
        return rows

    def __getstate__(self) -> dict:
        """Only the path travels to a DataLoader worker that is not forked; maps are opened there."""
        return {"path": self.path, "images": "images" in self._rows}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)

    def damaged_files(self, whole: bool) -> list[str]:
        """Names of files that are not the recorded ones: by the labels, and of each shard its first and last row; or by
        the SHA-256 of each file, if the whole store is to be read."""
        shards = [shard[kind] for shard in self.meta["shards"] for kind in KINDS if kind in shard]
        recorded = {"labels.npy": self.meta["labels_sha256"]}
        if whole:
            recorded |= {"paths.txt": self.meta["paths_sha256"]} | {shard["file"]: shard["sha256"] for shard in shards}
        files = {self.path / name: digest for name, digest in recorded.items()}
        found = [file.name for file, digest in files.items() if not file.is_file() or sha256(file) != digest]
        for shard in shards if not whole else ():
            expected = shard.get("ends_sha256")  # stores of older code lack it
            if expected and ends_digest(np.load(self.path / shard["file"], mmap_mode="r")) != expected:
                found.append(shard["file"])
        return found


@dataclass
class StepSampler:
    """The indices of each micro-batch of this process, as a function of (seed, step).

    The global order is an endless sequence of permutations, one an epoch; step k takes its positions [k B, (k + 1) B).
    Micro-batch a of rank r takes rows [(a * world_size + r) m, ... + m) of them, m = B / (world_size * accumulation):
    every image comes once an epoch however the batch is divided.

    Args:
        num_samples: N, images in the store.
        batch_size: B, over all processes and accumulation steps.
        seed: of the order.
        rank, world_size: of this process.
        accumulation: micro-batches of a step.
        start_step: first step, counted from 0.
        num_steps: steps to give; endless if None.
        flip: give N + i in place of i with probability 1/2.

    Attributes:
        last_step_issued: the last step whose indices were given out, to be read ahead of the training.

    Raises:
        ValueError: the batch cannot be divided evenly.
    """

    num_samples: int
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1
    accumulation: int = 1
    start_step: int = 0
    num_steps: int | None = None
    flip: bool = False

    def __post_init__(self):
        if self.batch_size % (self.world_size * self.accumulation):
            divisor = f"{self.world_size} processes x {self.accumulation} accumulation steps"
            found = f"{self.batch_size}; set --batch-size or --gradient-accumulation-steps"
            raise ValueError(f"expected a batch size divisible by {divisor}, found {found}")
        self.last_step_issued = self.start_step
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def step_indices(self, step: int) -> np.ndarray:  # -> (B,) int64
        """Indices of the whole global batch of a step, counted from 0."""
        indices, begin = [], step * self.batch_size
        end = begin + self.batch_size
        while begin < end:
            epoch, place = divmod(begin, self.num_samples)
            if epoch != self._epoch:
                order = numpy_generator(self.seed, epoch, "order").permutation(self.num_samples)
                self._epoch, self._order = epoch, order
            indices.append(self._order[place : place + end - begin])
            begin += len(indices[-1])
        joined = np.concatenate(indices)
        if self.flip:
            joined = joined + self.num_samples * numpy_generator(self.seed, step, "flip").integers(0, 2, len(joined))
        return joined

    def __iter__(self) -> Iterator[list[int]]:
        m = self.batch_size // (self.world_size * self.accumulation)
        step = self.start_step
        while self.num_steps is None or step < self.start_step + self.num_steps:
            indices, self.last_step_issued = self.step_indices(step), step
            for micro in range(self.accumulation):
                first = (micro * self.world_size + self.rank) * m
                yield indices[first : first + m].tolist()
            step += 1
