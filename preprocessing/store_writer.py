"""Writing a latent store, shard by shard and batch by batch. Its format stands in `dataset.py`, which reads it."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dataset import FORMAT, NPY_HEADER, VERSION, npy_header, read_journal, read_json, read_meta
from runtime.files import sha256, to_checksummed_json, write_at, write_atomically


def shard_size(count: int) -> int:
    """Images of each shard but the last, for `count` images in all.

    64 shards (20,019 images of ImageNet, 656 MB each at 4 x 32 x 32): enough to divide over processes, and few enough
    that a random batch touches each with one call. Small sets have shards of 64 images.
    """
    return max(64, -(-count // 64))


class LatentStoreWriter:
    """Writes a store, shard by shard and batch by batch; a killed writer goes on behind its last whole batch.

    Args:
        folder: the store's folder, made if need be.
        settings: JSON values that determine the content. A folder begun with others is refused.
        shapes: {kind: shape of one row} for "moments" (2C, H, W) and, if wanted, "flips" (2C, H, W) and
            "images" (R, R, 3).
        dtype: "float32" or "float16", of moments and flips; images are uint8.

    Raises:
        ValueError: the folder was begun with other settings, or holds something else.
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any], shapes: dict[str, tuple[int, ...]], dtype: str):
        self.folder, self.shapes, self.dtype = Path(folder), shapes, dtype
        self.records = self.folder / "partial"
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"expected a folder to write the store to, found the file {self.folder}")
        if self.is_complete:
            _same_settings(self.folder, read_meta(self.folder)["settings"], settings)
            return
        begun = self.records / "settings.json"
        if begun.is_file():
            _same_settings(self.folder, read_json(begun), settings)
        elif self.folder.is_dir() and any(path.name != "partial" for path in self.folder.iterdir()):
            raise ValueError(f"expected a new folder or a store begun by this command, found other files in {folder}")
        else:
            self.records.mkdir(parents=True, exist_ok=True)
            write_atomically(begun, json.dumps(settings, indent=2).encode())

    @property
    def is_complete(self) -> bool:
        return (self.folder / "meta.json").is_file()

    def shard(self, index: int) -> ShardWriter:
        """The writer of one shard, at the place where it stopped."""
        return ShardWriter(self, index)

    def summed_statistics(self, num_shards: int) -> list[float]:
        """What `append` was given as statistics, summed over the batches of all shards, in order."""
        records = [read_json(self.records / f"shard-{index:05d}.json") for index in range(num_shards)]
        batches = [batch for record in records for batch in record["statistics"] if batch]
        return [math.fsum(values) for values in zip(*batches, strict=True)]

    def finish(self, num_shards: int, meta: dict[str, Any]) -> dict[str, Any]:
        """Join the shards' records to labels, paths and `meta.json`, and remove what is only needed to go on.

        Args:
            num_shards: shards in all, each of which must have been closed.
            meta: what the caller knows: vae, vae_digest, resolution, crop, class_names, settings, and scale and shift.

        Returns:
            The content of `meta.json`.
        """
        records = [read_json(self.records / f"shard-{index:05d}.json") for index in range(num_shards)]
        count = sum(record["rows"] for record in records)
        if count == 0:
            raise ValueError(f"expected at least one readable image for {self.folder}, found none")
        labels = np.array([label for record in records for label in record["labels"]], dtype=np.int64)
        paths = "".join(path + "\n" for record in records for path in record["paths"])
        with open(self.folder / "labels.npy.partial", "wb") as file:
            np.save(file, labels)
        os.replace(self.folder / "labels.npy.partial", self.folder / "labels.npy")
        write_atomically(self.folder / "paths.txt", paths.encode())
        meta = {
            "format": FORMAT,
            "version": VERSION,
            **meta,
            "latent_shape": [self.shapes["moments"][0] // 2, *self.shapes["moments"][1:]],
            "dtype": self.dtype,
            "count": count,
            "num_classes": len(meta["class_names"]),
            "flips": "flips" in self.shapes,
            "images": "images" in self.shapes,
            "shards": [{"count": record["rows"], **record["files"]} for record in records if record["rows"]],
            "labels_sha256": sha256(self.folder / "labels.npy"),
            "paths_sha256": sha256(self.folder / "paths.txt"),
            "skipped": [entry for record in records for entry in record["skipped"]],
        }
        write_atomically(self.folder / "meta.json", to_checksummed_json(meta))
        shutil.rmtree(self.records)
        return meta


class ShardWriter:
    """One shard being written. `items` says how many source items are done; go on behind them."""

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
        arrays: dict[str, np.ndarray],
        labels: Sequence[int],
        paths: Sequence[str],
        skipped: Sequence[dict] = (),
        statistics: Sequence[float] = (),
    ) -> None:
        """Add a batch: `items` source items, of which those in `skipped` have no row.

        Args:
            arrays: {kind: (b, ...)} for each kind of the store.
            labels: b class ids. paths: b sources.
            skipped: JSON values that name the others.
            statistics: numbers that `finish`'s caller sums.
        """
        for kind, rows in arrays.items():
            dtype = "uint8" if kind == "images" else self.store.dtype
            rows = np.ascontiguousarray(rows, dtype=dtype)
            assert rows.shape == (len(labels), *self.store.shapes[kind]), (kind, rows.shape)
            descriptor = os.open(self._file(kind, ".partial"), os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                write_at(descriptor, rows, NPY_HEADER + self.rows * (rows.nbytes // max(1, len(rows))))
                os.fdatasync(descriptor)  # before its line in the journal, which a power cut could keep alone
            finally:
                os.close(descriptor)
        batch = {
            "items": items, "labels": [int(label) for label in labels],
            "paths": [path.replace("\n", "\\n") for path in paths], "skipped": list(skipped),
            "statistics": list(statistics),
        }  # fmt: skip
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
        for kind, shape in self.store.shapes.items():
            if self.rows == 0:
                break
            partial, final = self._file(kind, ".partial"), self._file(kind)
            if partial.exists():  # else renamed before a kill
                dtype = np.dtype("uint8" if kind == "images" else self.store.dtype)
                with open(partial, "r+b") as file:
                    file.write(npy_header((self.rows, *shape), dtype))
                    file.truncate(NPY_HEADER + self.rows * dtype.itemsize * int(np.prod(shape)))
                    os.fsync(file.fileno())
                os.replace(partial, final)
            files[kind] = {"file": final.name, "sha256": sha256(final)}
        record = {
            "rows": self.rows, "files": files,
            "labels": [label for batch in self.batches for label in batch["labels"]],
            "paths": [path for batch in self.batches for path in batch["paths"]],
            "skipped": [entry for batch in self.batches for entry in batch["skipped"]],
            "statistics": [batch["statistics"] for batch in self.batches],
        }  # fmt: skip
        write_atomically(self.record_file, json.dumps(record).encode())
        self.journal.unlink(missing_ok=True)
        self.closed = True

    def _file(self, kind: str, suffix: str = "") -> Path:
        return self.store.folder / f"{kind}-{self.index:05d}.npy{suffix}"


def _same_settings(folder: Path, found: dict, expected: dict) -> None:
    names = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    if names:
        differing = "; ".join(f"{name} {found.get(name)} there, {expected.get(name)} now" for name in names)
        raise ValueError(f"{folder} was made with other settings ({differing}); give those, or another --output-dir")
