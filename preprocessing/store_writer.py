"""Writing a latent store, shard by shard and batch by batch. Its format stands in `dataset.py`, which reads it.

Shape suffixes: b images of a batch, C latent channels, H = W latent side, R image side.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dataset import FORMAT, NPY_HEADER, VERSION, ends_digest, npy_header, read_journal, read_json, read_meta
from models.vae import LatentScale
from runtime import provenance
from runtime.files import LOCK, Field, fdatasync, read_record, sha256, to_checksummed_json, write_at, write_atomically

NOTICED = {
    "alpha": "have transparency, which is dropped unless --alpha white is given",
    "rotated": "ask to be turned (EXIF), which they are with --exif-orientation alone",
}
Config = TypeVar("Config")
Arrays = dict[str, np.ndarray]  # by kind
Shapes = dict[str, tuple[int, ...]]
Fields = Mapping[str, Field]


def shard_size(count: int) -> int:
    """Images of each shard but the last, for `count` images in all.

    64 shards (20,019 images of ImageNet, 656 MB each at 4 x 32 x 32): enough to divide over processes, and few enough
    that a random batch touches each with one call. Small sets have shards of 64 images.
    """
    return max(64, -(-count // 64))


def recorded_settings(directory: str | Path, fields: Mapping[str, Field]) -> dict[str, Any] | None:
    """The settings that a store was made with, or begun with; None where there is no store.

    Raises:
        ValueError: the record is damaged, or written by newer code.
    """
    meta, begun = Path(directory) / "meta.json", Path(directory) / "partial" / "settings.json"
    if meta.is_file():
        return read_record(read_meta(directory)["settings"], fields, meta)
    return read_record(read_json(begun), fields, begun) if begun.is_file() else None


def resumed_config(config: Config, given: frozenset[str], saved: dict[str, Any] | None) -> Config:
    """`config` with the recorded value of each setting that the user did not give."""
    names = {field.name for field in dataclasses.fields(config)} & set(saved or ()) - given
    return dataclasses.replace(config, **{name: saved[name] for name in names})


def check_directory(directory: Path) -> None:
    """Refuse what is neither new nor a store, whole or not.

    Raises:
        ValueError: it is a file, or holds other files.
    """
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"expected a directory to write the store to, found the file {directory}")
    names = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
    if not names & {"meta.json", "partial"} and names - {LOCK}:
        raise ValueError(f"expected a new directory or a store of this command, found other files in {directory}")


def first_of(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (f", ... ({len(names):,} in all)" if len(names) > 12 else "")


def count_classes(labels: Iterable[int], class_names: Sequence[str]) -> str:
    """Images by class, and the classes that have none, in a line."""
    counts = Counter(labels)
    text = first_of([f"{name} {counts[label]:,}" for label, name in enumerate(class_names) if counts[label]])
    without = [name for label, name in enumerate(class_names) if not counts[label]]
    return text + (f"; none of {first_of(without)}" if without else "")


class LatentStoreWriter:
    """Writes a store, shard by shard and batch by batch; a killed writer resumes behind its last whole batch.

    Args:
        directory: of the store, made if need be.
        settings: JSON values that determine the content. A directory begun with others is refused.
        shapes: {kind: shape of one row} for "moments" (2C, H, W) and, if wanted, "flips" (2C, H, W) and
            "images" (R, R, 3).
        dtype: "float32" or "float16", of moments and flips; images are uint8.
        fields: how `settings` of older code are read.

    Raises:
        ValueError: the directory was begun with other settings, or holds something else.
    """

    def __init__(self, directory: str | Path, settings: dict, shapes: Shapes, dtype: str, fields: Fields | None = None):
        self.directory, self.settings, self.shapes, self.dtype = Path(directory), settings, shapes, dtype
        self.records = self.directory / "partial"
        saved = recorded_settings(directory, fields or dict.fromkeys(settings, Field()))
        differing = [name for name, value in (saved or {}).items() if value != settings[name]]
        if differing:
            found = "; ".join(f"{name} {saved[name]} there, {settings[name]} now" for name in differing)
            raise ValueError(f"{directory} was made with other settings ({found}); give those, or another --output-dir")
        if saved is not None:
            return
        check_directory(self.directory)
        self.records.mkdir(parents=True, exist_ok=True)
        write_atomically(self.records / "settings.json", json.dumps(settings, indent=2))

    @property
    def is_complete(self) -> bool:
        return (self.directory / "meta.json").is_file()

    def shard(self, index: int) -> ShardWriter:
        """The writer of one shard, at the place where it stopped."""
        return ShardWriter(self, index)

    def _records(self, num_shards: int) -> list[dict[str, Any]]:
        records = [read_json(self.records / f"shard-{index:05d}.json") for index in range(num_shards)]
        if not any(record["rows"] for record in records):
            raise ValueError(f"expected at least one readable image for {self.directory}, found none")
        return records

    def complete(self, num_shards: int, scale: LatentScale | None, about: dict[str, Any]) -> None:
        """`finish` with `scale`, or with the measured one if None, and say what the store holds.

        Args:
            about: of `meta.json`: vae, vae_digest, scale_source, resolution, crop, class_names.
        """
        records = self._records(num_shards)
        batches = [batch for record in records for batch in record["statistics"] if batch]
        sums = np.array([math.fsum(values) for values in zip(*batches, strict=True)])
        if scale is None:
            scale, about = measured_scale(sums), about | {"scale_source": "measured"}
        meta = {name: about[name] for name in ("vae", "vae_digest")} | scale.to_dict() | about
        meta = self.finish(num_shards, meta | {"settings": self.settings, "versions": provenance.versions()})
        std = scaled_std(sums, scale)
        labels = (label for record in records for label in record["labels"])
        print(f"{self.directory}: {count_classes(labels, meta['class_names'])}")
        print(
            f"{self.directory}: {meta['count']:,} images of {meta['num_classes']} classes, {len(meta['skipped'])} "
            f"skipped; latents {tuple(meta['latent_shape'])}, scaled to a std of {std:.4f}"
        )
        done = {"alpha": self.settings.get("alpha") == "white", "rotated": self.settings.get("exif_orientation")}
        for what, words in NOTICED.items():
            if meta["noticed"].get(what) and not done[what]:
                print(f"warning: {meta['noticed'][what]:,} images {words}", file=sys.stderr)
        if not 0.5 < std < 2:
            print("warning: expected a std near 1; make the store again with --scale auto", file=sys.stderr)

    def finish(self, num_shards: int, meta: dict[str, Any]) -> dict[str, Any]:
        """Join the shards' records to labels, paths and `meta.json`, and remove what is only needed to resume.

        Args:
            num_shards: shards in all, each of which must have been closed.
            meta: what the caller knows: vae, vae_digest, resolution, crop, class_names, settings, and scale and shift.

        Returns:
            The content of `meta.json`.
        """
        records = self._records(num_shards)
        labels = io.BytesIO()
        np.save(labels, np.array([label for record in records for label in record["labels"]], dtype=np.int64))
        write_atomically(self.directory / "labels.npy", labels.getvalue())
        paths = "".join(path + "\n" for record in records for path in record["paths"])
        write_atomically(self.directory / "paths.txt", paths)
        meta = {
            "format": FORMAT,
            "version": VERSION,
            "left_out": {},
            **meta,
            "latent_shape": [self.shapes["moments"][0] // 2, *self.shapes["moments"][1:]],
            "dtype": self.dtype,
            "count": sum(record["rows"] for record in records),
            "num_classes": len(meta["class_names"]),
            "flips": "flips" in self.shapes,
            "images": "images" in self.shapes,
            "shards": [{"count": record["rows"], **record["files"]} for record in records if record["rows"]],
            "labels_sha256": sha256(self.directory / "labels.npy"),
            "paths_sha256": sha256(self.directory / "paths.txt"),
            "skipped": [entry for record in records for entry in record["skipped"]],
            "noticed": dict(sum((Counter(record.get("noticed", {})) for record in records), Counter())),
        }
        write_atomically(self.directory / "meta.json", to_checksummed_json(meta))
        shutil.rmtree(self.records)
        return meta


class ShardWriter:
    """One shard being written. `items` says how many source items are done; resume behind them."""

    def __init__(self, store: LatentStoreWriter, index: int):
        self.store, self.index = store, index
        self.record_file = store.records / f"shard-{index:05d}.json"
        self.journal = store.records / f"shard-{index:05d}.jsonl"
        self.closed = self.record_file.is_file()
        self.batches = [] if self.closed else read_journal(self.journal)
        self.items = sum(batch["items"] for batch in self.batches)
        self.rows = sum(len(batch["labels"]) for batch in self.batches)

    def append(
        self,
        items: int,
        arrays: Arrays,
        labels: list[int],
        paths: list[str],
        skipped: Sequence = (),
        noticed: Mapping | None = None,
    ) -> None:
        """Add a batch: `items` source items, of which those in `skipped` have no row.

        Args:
            arrays: {kind: (b, ...)} for each kind of the store; nothing where all were skipped.
            labels: b class ids. paths: b sources.
            skipped: JSON values that name the others.
            noticed: numbers of images, by what is worth knowing of them.
        """
        digests = {}
        for kind, rows in arrays.items():
            rows = np.ascontiguousarray(rows, dtype=self._dtype(kind))
            assert rows.shape == (len(labels), *self.store.shapes[kind]), (kind, rows.shape)
            descriptor = os.open(self._file(kind, ".partial"), os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                write_at(descriptor, rows, NPY_HEADER + self.rows * (rows.nbytes // max(1, len(rows))))
                fdatasync(descriptor)  # before its line in the journal, which a power cut could keep alone
            finally:
                os.close(descriptor)
            digests[kind] = hashlib.sha256(rows).hexdigest()
        batch = {
            "items": items,
            "labels": [int(label) for label in labels],
            "paths": [path.replace("\n", "\\n") for path in paths],
            "skipped": list(skipped),
            "statistics": latent_statistics(arrays["moments"]) if arrays else [],
            "sha256": digests,
            "noticed": dict(noticed or {}),
        }
        with open(self.journal, "a") as file:  # behind the rows: a batch counts once its line is whole
            file.write(json.dumps(batch) + "\n")
        self.batches.append(batch)
        self.items += items
        self.rows += len(labels)

    def close(self) -> None:
        """Give the files their headers, digests and final names."""
        if self.closed:
            return
        files = {}
        for kind, shape in self.store.shapes.items() if self.rows else ():
            partial, final = self._file(kind, ".partial"), self._file(kind)
            if partial.exists():  # else renamed before a kill
                dtype = self._dtype(kind)
                with open(partial, "r+b") as file:
                    file.write(npy_header((self.rows, *shape), dtype))
                    file.truncate(NPY_HEADER + self.rows * dtype.itemsize * math.prod(shape))
                    os.fsync(file.fileno())
                os.replace(partial, final)
            rows = np.load(final, mmap_mode="r")
            self._compare(kind, rows)
            files[kind] = {"file": final.name, "sha256": sha256(final), "ends_sha256": ends_digest(rows)}
        record = {"rows": self.rows, "files": files}
        record |= {kind: [x for batch in self.batches for x in batch[kind]] for kind in ("labels", "paths", "skipped")}
        record["statistics"] = [batch["statistics"] for batch in self.batches]
        record["noticed"] = dict(sum((Counter(batch.get("noticed", {})) for batch in self.batches), Counter()))
        write_atomically(self.record_file, json.dumps(record))
        self.journal.unlink(missing_ok=True)
        self.closed = True

    def _compare(self, kind: str, rows: np.ndarray) -> None:  # (n, ...)
        """Refuse rows that are not those of which the journal says that they were written."""
        begin = 0
        for batch in self.batches:
            end = begin + len(batch["labels"])
            expected = batch.get("sha256", {}).get(kind)  # journals of older code lack it
            if expected and hashlib.sha256(np.ascontiguousarray(rows[begin:end])).hexdigest() != expected:
                raise ValueError(
                    f"expected the rows that were written in {self._file(kind)}, found others from row {begin} on: the "
                    f"disk or another program changed them; delete {self.store.directory} and make the store again"
                )
            begin = end

    def _dtype(self, kind: str) -> np.dtype:
        return np.dtype("uint8" if kind == "images" else self.store.dtype)

    def _file(self, kind: str, suffix: str = "") -> Path:
        return self.store.directory / f"{kind}-{self.index:05d}.npy{suffix}"


def latent_statistics(moments: np.ndarray) -> list[float]:  # (b, 2C, H, W) -> (1 + 2C,)
    """Values per channel, then by channel the sums of posterior samples and of their squares, in expectation."""
    mean, std = np.split(moments.astype(np.float64), 2, axis=1)
    sums = [values.sum(axis=(0, 2, 3)) for values in (mean, mean**2 + std**2)]
    return [float(mean[:, 0].size), *sums[0].tolist(), *sums[1].tolist()]


def scaled_std(sums: np.ndarray, scale: LatentScale) -> float:  # (1 + 2C,)
    """The std of all scaled posterior samples, from the summed `latent_statistics`."""
    mean, square = np.split(sums[1:] / sums[0], 2)
    scaled_mean = (mean - scale.shift) * scale.scale
    scaled_square = (square - 2 * np.multiply(scale.shift, mean) + np.square(scale.shift)) * np.square(scale.scale)
    return float(np.sqrt(scaled_square.mean() - scaled_mean.mean() ** 2))


def measured_scale(sums: np.ndarray) -> LatentScale:  # (1 + 2C,)
    """Scale and shift that give each channel mean 0 and std 1, as the path to N(0, 1) supposes."""
    mean, square = np.split(sums[1:] / sums[0], 2)
    std = np.sqrt(square - mean**2)
    if not np.all(std > 0):
        raise ValueError(f"--scale auto: expected latents that vary, found stds {std.tolist()}; use config")
    return LatentScale(tuple((1 / std).tolist()), tuple(mean.tolist()))
