"""Reading a store in random batches, and cropping with one DataLoader worker and with two."""

from __future__ import annotations

import io
import tempfile
from collections import deque
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from analysis.timing import random_store
from benchmarks.record import in_turn, record
from dataset import LatentDataset, StepSampler
from preprocessing.dump_latents import Crops


def loader(count: int = 20_000, batch: int = 256, batches: int = 200) -> None:
    """Moments per second from the mapped store, and from one .npy per image; both are in the page cache."""
    with tempfile.TemporaryDirectory() as name:
        files = Path(name) / "files"
        files.mkdir()
        store = LatentDataset(random_store(Path(name) / "store", 32, count))
        for index in range(count):
            np.save(files / f"{index}.npy", store.__getitems__([index])["moments"][0].numpy())
        sampler = StepSampler(count, batch, seed=0)
        orders = [sampler.step_indices(step) for step in range(batches)]

        def one_file_each(order: np.ndarray) -> torch.Tensor:
            return torch.stack([torch.from_numpy(np.load(files / f"{index}.npy")) for index in order])

        for order in orders:  # which also brings every page into the cache
            assert torch.equal(one_file_each(order), store.__getitems__(order)["moments"])
        few = orders[: max(1, batches // 10)]
        ours, plain = in_turn(
            lambda: [store.__getitems__(order) for order in orders],
            lambda: [one_file_each(order) for order in few],
            times=5,
        )
        record(
            "data/loader",
            [batch * len(orders) / seconds for seconds in ours],
            "moments/s",
            [batch * len(few) / seconds for seconds in plain],
            over_baseline=True,
            baseline_is="one .npy per image, stacked",
            batch=batch,
            images=count,
            bar=">= 200,000 and >= 20 x",
            bottleneck="memory: both read the same bytes into a batch",
        )


class Photos:
    """A source of photograph-like JPEGs of ImageNet's usual size, in memory: the crop alone is timed."""

    def __init__(self, count: int):
        rng, self.contents = np.random.default_rng(0), []
        for _ in range(16):
            coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
            buffer = io.BytesIO()
            coarse.resize((500, 375), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=92)
            self.contents.append(buffer.getvalue())
        self.names, self.labels, self.class_names = [str(k) for k in range(count)], [0] * count, ["0"]

    def read(self, index: int) -> bytes:
        return self.contents[index % len(self.contents)]


def crop(count: int = 2400) -> None:
    """Images per second from JPEG to crop, by one worker and by two, which stay from round to round."""
    torch.set_num_threads(1)
    one, two = (
        DataLoader(Crops(Photos(count), 256), 32, num_workers=workers, collate_fn=len, persistent_workers=True)
        for workers in (1, 2)
    )
    seconds = in_turn(lambda: deque(one, 0), lambda: deque(two, 0), times=5)
    single, double = ([count / each for each in column] for column in seconds)
    about = {"baseline_is": "1 worker", "image": "500 x 375 JPEG to 256 x 256", "bar": ">= 1.8 x"}
    record("data/crop_2_workers", double, "images/s", single, over_baseline=True, **about)
