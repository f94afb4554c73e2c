"""Reading a store in random batches, cropping with one DataLoader worker and with two, and writing samples.npz."""

from __future__ import annotations

import io
import sys
import tempfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from analysis.timing import random_store, seconds_of
from benchmarks.record import in_own_process, in_turn, memory, record
from dataset import LatentDataset, StepSampler
from preprocessing.dump_latents import Crops
from sampling.writer import SampleWriter, create

SIDE, BATCH = 256, 64  # of the samples
BAR = 300  # MB above the start


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
    ours, plain = ([batch * len(o) / seconds for seconds in column] for o, column in ((orders, ours), (few, plain)))
    about = {"baseline_is": "one .npy per image, stacked", "batch": batch, "images": count}
    about |= {"bar": ">= 200,000 and >= 20 x", "bottleneck": "memory: both read the same bytes into a batch"}
    record("data/loader", ours, "moments/s", plain, over_baseline=True, **about)


def photos(count: int) -> SimpleNamespace:
    """A source of photograph-like JPEGs of ImageNet's usual size, in memory: the crop alone is timed."""
    rng, contents = np.random.default_rng(0), [io.BytesIO() for _ in range(16)]
    for buffer in contents:
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=92)
    about = {"names": [str(k) for k in range(count)], "labels": [0] * count, "class_names": ["0"]}
    return SimpleNamespace(read=lambda index: contents[index % 16].getvalue(), **about)


def crop(count: int = 2400) -> None:
    """Images per second from JPEG to crop, by one DataLoader worker and by two, which stay from round to round."""
    torch.set_num_threads(1)
    settings = {"batch_size": 32, "collate_fn": len, "persistent_workers": True}
    one, two = (DataLoader(Crops(photos(count), 256), num_workers=workers, **settings) for workers in (1, 2))
    seconds = in_turn(lambda: deque(one, 0), lambda: deque(two, 0), times=5)
    single, double = ([count / each for each in column] for column in seconds)
    about = {"baseline_is": "1 worker", "image": "500 x 375 JPEG to 256 x 256", "bar": ">= 1.8 x"}
    record("data/crop_2_workers", double, "images/s", single, over_baseline=True, **about)


def batches(count: int) -> Iterator[np.ndarray]:  # -> (B, R, R, 3) uint8
    """Random images; the last batch is as large as the others, as the sampler's is."""
    rng = np.random.default_rng(0)
    for _ in range(-(-count // BATCH)):
        yield rng.integers(0, 256, (BATCH, SIDE, SIDE, 3), np.uint8)


def write_ours(directory: Path, labels: np.ndarray) -> None:
    """Batches at their offsets of the raw file, then the streamed npz."""
    settings = {"num_samples": len(labels), "batch_size": BATCH, "resolution": SIDE, "png": False, "npz": True}
    create(directory, settings)
    samples = SampleWriter(directory, settings)
    for batch, images in enumerate(batches(len(labels))):
        samples.write(batch, images)
    samples.finish(labels, {"settings": settings})
    samples.close()


def write_plain(directory: Path, labels: np.ndarray) -> None:
    """A list of batches, concatenated, `np.savez`."""
    directory.mkdir()
    np.savez(directory / "samples.npz", np.concatenate(list(batches(len(labels))))[: len(labels)], labels)


def measure_npz(ours: bool, count: int) -> list[float]:
    """Megabytes above the start, and seconds, of one way, in this process."""
    with tempfile.TemporaryDirectory() as name:
        directory, start = Path(name) / "samples", memory("VmRSS")
        seconds = seconds_of(lambda: (write_ours if ours else write_plain)(directory, np.arange(count) % 1000))
        peak = memory("VmHWM")
        with np.load(directory / "samples.npz") as archive:
            assert archive["arr_0"].shape == (count, SIDE, SIDE, 3)
    return [(peak - start) / 1e6, seconds]


def npz(count: int = 2_000) -> None:
    """Memory and time of keeping 2,000 images of 256 x 256 and making samples.npz of them."""
    ours, plain = (in_own_process(measure_npz, ours, count) for ours in (True, False))
    about = {"images": count, "side": SIDE, "batch": BATCH}
    record("sampling/npz_memory", ours[0], "MB above the start", plain[0], bar=f"<= {BAR} MB", **about)
    record("sampling/npz_seconds", ours[1], "s", plain[1], **about)
    if ours[0] > BAR:
        sys.exit(f"above the bar of {BAR} MB")
