"""Bars of the data: reading a store in random batches, and the crop with one worker and with two."""

from __future__ import annotations

import io
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks.record import record
from dataset import LatentDataset, StepSampler
from models.vae import LatentScale
from preprocessing.dump_latents import Crops
from preprocessing.store_writer import LatentStoreWriter, shard_size

COUNT, SHAPE, BATCH = 20_000, (8, 32, 32), 256


def make_files(folder: Path) -> None:
    """The same random moments as a store and as one .npy per image."""
    rng = np.random.default_rng(0)
    writer = LatentStoreWriter(folder / "store", {}, {"moments": SHAPE}, "float32")
    (folder / "files").mkdir()
    size = shard_size(COUNT)
    for index, begin in enumerate(range(0, COUNT, size)):
        moments = rng.standard_normal((min(size, COUNT - begin), *SHAPE), dtype=np.float32)
        names = [f"{begin + k}.npy" for k in range(len(moments))]
        shard = writer.shard(index)
        shard.append(len(moments), {"moments": moments}, [0] * len(moments), names)
        shard.close()
        for name, values in zip(names, moments, strict=True):
            np.save(folder / "files" / name, values)
    meta = {"vae": "", "vae_digest": "", "resolution": 256, "crop": "adm-center", "class_names": ["0"], "settings": {}}
    writer.finish(index + 1, meta | LatentScale((1.0,), (0.0,)).to_dict())


def loader() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_files(folder)
        store = LatentDataset(folder / "store")
        batches = [StepSampler(COUNT, BATCH, seed=0).step_indices(k) for k in range(200)]
        for batch in batches:  # warm: every page in the cache
            store.__getitems__(batch)

        def one_file_each(batch: np.ndarray) -> torch.Tensor:  # the same batch, as a folder of files gives it
            return torch.stack([torch.from_numpy(np.load(folder / "files" / f"{k}.npy")) for k in batch])

        for batch in batches:
            assert torch.equal(one_file_each(batch), store.__getitems__(batch)["moments"])
        ours, plain = [], []
        for repeat in range(5):  # in turn, so that a disturbance hits both
            begin = time.perf_counter()
            for batch in batches:
                store.__getitems__(batch)
            ours.append(len(batches) * BATCH / (time.perf_counter() - begin))
            few = batches[repeat * 20 :][:20]
            begin = time.perf_counter()
            for batch in few:
                one_file_each(batch)
            plain.append(len(few) * BATCH / (time.perf_counter() - begin))
        value, baseline = statistics.median(ours), statistics.median(plain)
        record(
            "data/loader", value, "moments/s", baseline, value / baseline, baseline_is="one .npy per image, stacked",
            spread=[min(ours), max(ours)], spread_baseline=[min(plain), max(plain)], batch=BATCH, images=COUNT,
            bar=">= 200,000 and >= 20 x", bottleneck="memory: both read the same bytes into a batch",
        )  # fmt: skip


class Photos:
    """A source of photograph-like JPEGs of ImageNet's usual size, in memory: the crop alone is timed."""

    def __init__(self, count: int):
        rng, self.contents = np.random.default_rng(0), []
        for _ in range(16):
            coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
            buffer = io.BytesIO()
            coarse.resize((500, 375), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=92)
            self.contents.append(buffer.getvalue())
        self.names = [str(k) for k in range(count)]
        self.labels, self.class_names = [0] * count, ["0"]

    def read(self, index: int) -> bytes:
        return self.contents[index % len(self.contents)]


def crop() -> None:
    torch.set_num_threads(1)
    count, rates = 2400, {1: [], 2: []}
    crops = Crops(Photos(count), 256)
    for _ in range(5):
        for workers in rates:
            batches = iter(DataLoader(crops, 32, num_workers=workers, collate_fn=len))
            next(batches)  # workers are up
            begin = time.perf_counter()
            done = sum(batches)
            rates[workers].append(done / (time.perf_counter() - begin))
    one, two = (statistics.median(rates[workers]) for workers in (1, 2))
    record(
        "data/crop_2_workers", two, "images/s", one, two / one, baseline_is="1 worker",
        spread=[min(rates[2]), max(rates[2])], spread_baseline=[min(rates[1]), max(rates[1])],
        image="500 x 375 JPEG to 256 x 256", bar=">= 1.8 x",
    )  # fmt: skip


def main() -> None:
    loader()
    crop()


if __name__ == "__main__":
    main()
