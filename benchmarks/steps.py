"""Steps of the trainer itself, on random data, timed: what benchmarks and the table of costs share."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate.state import AcceleratorState, PartialState

import train
from preprocessing.store_writer import LatentStoreWriter


def wait(device: torch.device) -> None:
    """Return when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device: torch.device, step: Callable[[int], None], steps: int, images: int) -> dict[str, Any]:
    """Median seconds of a step, each waited for by itself, and the seconds of as many that are not waited for."""
    for index in range(3):
        step(index)
    wait(device)
    alone = []
    for index in range(3, 3 + steps):
        begin = time.perf_counter()
        step(index)
        wait(device)
        alone.append(time.perf_counter() - begin)
    begin = time.perf_counter()
    for index in range(3 + steps, 3 + 2 * steps):
        step(index)
    wait(device)
    together = (time.perf_counter() - begin) / steps
    memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    return {
        "seconds_per_step": together, "images_per_second": images / together,
        "seconds_alone_median": statistics.median(alone), "seconds_alone_spread": [min(alone), max(alone)],
        "memory_gib": memory,
    }  # fmt: skip


@contextlib.contextmanager
def trainer(data: Path, folder: Path, model: str, **changes: Any) -> Iterator[train.Run]:
    """What train.py builds for these flags, in place of its loop."""
    kept: list[train.Run] = []
    values = {"data_dir": data, "output_dir": folder, "model": model, "sampling_steps": 0, "num_workers": 0, **changes}
    arguments = []
    for name, value in values.items():
        spelling = name.replace("_", "-")
        arguments += [("--" if value else "--no-") + spelling] if isinstance(value, bool) else [f"--{spelling}={value}"]
    with mock.patch.object(train, "fit", lambda run, *_: kept.append(run)), contextlib.redirect_stdout(None):
        train.main(arguments)
    try:
        yield kept.pop()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()
        torch._dynamo.reset()


def random_store(folder: Path, size: int, count: int = 2048, images: bool = False, classes: int = 1000) -> Path:
    """Random latents (and crops), since arithmetic on zeros is faster than on numbers."""
    if (folder / "meta.json").is_file():
        return folder
    generator = torch.Generator().manual_seed(0)
    moments = torch.randn(count, 8, size, size, generator=generator)
    moments[:, 4:] = 0.1 * moments[:, 4:].abs()
    arrays, shapes = {"moments": moments.numpy()}, {"moments": (8, size, size)}
    if images:
        shapes["images"] = (8 * size, 8 * size, 3)
        pixels = torch.randint(0, 256, (count, *shapes["images"]), dtype=torch.uint8, generator=generator)
        arrays["images"] = pixels.numpy()
    writer = LatentStoreWriter(folder, {}, shapes, "float32")
    shard = writer.shard(0)
    shard.append(count, arrays, [i % classes for i in range(count)], [f"{i}" for i in range(count)])
    shard.close()
    writer.finish(1, {
        "vae": "none", "vae_digest": "none", "scale": [1.0], "shift": [0.0], "scale_source": "config",
        "resolution": 8 * size, "crop": "none", "class_names": [f"{k}" for k in range(classes)], "settings": {},
    })  # fmt: skip
    return folder


def batch_of(size: int, latent_size: int, device: torch.device, classes: int = 1000) -> dict[str, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(1)
    moments = torch.randn(size, 8, latent_size, latent_size, generator=generator, device=device)
    moments[:, 4:] = 0.1 * moments[:, 4:].abs()
    return {"moments": moments, "label": torch.arange(size, device=device) % classes}
