"""Steps of the trainer on random data, timed: for the table of costs and for the benchmarks."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor

import train
from models.vae import LatentScale
from preprocessing.store_writer import LatentStoreWriter, shard_size
from training.config import TrainConfig
from training.setup import Run, setup

WARMUP = 3  # steps that are not timed: they allocate, compile and tune


def seconds_of(call: Callable[[], Any]) -> float:
    """Wall-clock seconds of a call."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def wait(device: torch.device) -> None:
    """Return when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_steps(device: torch.device, step: Callable[[int], Any], steps: int, images: int) -> dict[str, Any]:
    """Time `step(0)`, `step(1)`, ..., each of which works on `images` images.

    Returns:
        "seconds_per_step" and "images_per_second" of steps that follow each other without a wait, as in training;
        "seconds_alone_median" and "seconds_alone_spread" (least, most) of steps each of which is waited for;
        "memory_gib", the peak, on a GPU.
    """

    def run(first: int, count: int) -> None:
        for index in range(first, first + count):
            step(index)
        wait(device)

    run(0, WARMUP)
    alone = [seconds_of(lambda index=index: run(index, 1)) for index in range(WARMUP, WARMUP + steps)]
    together = seconds_of(lambda: run(WARMUP + steps, steps)) / steps
    return {
        "seconds_per_step": together,
        "images_per_second": images / together,
        "seconds_alone_median": statistics.median(alone),
        "seconds_alone_spread": [min(alone), max(alone)],
        "memory_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
    }


@contextlib.contextmanager
def training_run(data: Path, output: Path, model: str, **settings: Any) -> Iterator[Run]:
    """What `train.py` builds for these settings, without grids. What it prints is not shown."""
    settings = {"sampling_steps": 0, "num_workers": 0} | settings
    config = TrainConfig(data_dir=str(data), output_dir=str(output), model=model, **settings)
    try:
        with contextlib.redirect_stdout(None):
            run = setup(config)
        yield run
        run.close()
    finally:  # accelerate keeps its state, and dynamo its graphs, for the whole process
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()
        torch._dynamo.reset()


def trainer_step(run: Run, batch: dict[str, Tensor]) -> Callable[[int], None]:
    """The trainer's step, given its number, on the same global batch each time."""
    config = dataclasses.replace(run.config, batch_size=len(batch["label"]))
    sized = dataclasses.replace(run, config=config)
    return lambda index: train.train_step(sized, index, [batch])


def random_store(directory: Path, size: int, count: int = 2048, images: bool = False, classes: int = 1000) -> Path:
    """A store of random moments (and crops), `size` latents high; made once. (Zeros would be multiplied faster.)"""
    if (directory / "meta.json").is_file():
        return directory
    rows, side = shard_size(count), 8 * size
    shapes = {"moments": (8, size, size)} | ({"images": (side, side, 3)} if images else {})
    writer = LatentStoreWriter(directory, {}, shapes, "float32")
    for index, first in enumerate(range(0, count, rows)):
        numbers = range(first, min(first + rows, count))
        batch = random_batch(len(numbers), size, torch.device("cpu"), classes, images, seed=index)
        arrays = {"moments": batch["moments"].numpy()} | ({"images": batch["image"].numpy()} if images else {})
        shard = writer.shard(index)
        shard.append(len(numbers), arrays, [k % classes for k in numbers], [f"{k}" for k in numbers])
        shard.close()
    about = {"vae": "none", "vae_digest": "none", "scale_source": "config", "resolution": side, "crop": "none"}
    names = [str(k) for k in range(classes)]
    writer.finish(index + 1, about | {"class_names": names, "settings": {}} | LatentScale((1.0,), (0.0,)).to_dict())
    return directory


def random_batch(
    count: int, size: int, device: torch.device, classes: int = 1000, images: bool = False, seed: int = 1
) -> dict[str, Tensor]:
    """A batch as a store gives it: "moments" (B, 8, H, W), "label" (B,) and, if wanted, "image" (B, 8H, 8W, 3)."""
    generator = torch.Generator(device).manual_seed(seed)
    moments = torch.randn(count, 8, size, size, generator=generator, device=device)
    moments[:, 4:] = 0.1 * moments[:, 4:].abs()
    batch = {"moments": moments, "label": torch.arange(count, device=device) % classes}
    if images:
        shape = (count, 8 * size, 8 * size, 3)
        batch["image"] = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator, device=device)
    return batch
