"""A training step beside a plain loop, the start with a large store, and how long a checkpoint holds training up."""

from __future__ import annotations

import itertools
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils._pytree import tree_map_only

import train
from analysis.timing import random_batch, random_store, trainer_step, training_run
from benchmarks.plain import PlainLoop
from benchmarks.record import in_own_process, in_turn, memory, record
from dataset import LatentDataset, StepSampler, npy_header, read_meta
from loss import Alignment, alignment_loss
from models.aligned import AlignedSiT
from models.projector import Projector
from models.sit import SiT, SiTConfig
from preprocessing.store_writer import shard_size
from runtime.distributed import gather_objects
from runtime.files import to_checksummed_json
from training.ema import EMAUpdater

IMAGENET = 1_281_167  # images
PRODUCTS = "addmm mm _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention_for_cpu_backward"


def step(batch: int = 4, steps: int = 5) -> None:
    """The trainer's step, its EMA and its alignment loss, each in turn with the plain loop's."""
    torch.manual_seed(0)
    sit, data = SiT(SiTConfig.from_name("SiT-S/2")), random_batch(batch, 32, torch.device("cpu"))
    plain = PlainLoop(AlignedSiT(sit, {"vae": (2, Projector(384, 16))}))
    with tempfile.TemporaryDirectory() as name:
        store = random_store(Path(name) / "store", 32, 64)
        with training_run(store, Path(name), "SiT-S/2", batch_size=batch) as run:
            ours, numbers = trainer_step(run, data), itertools.count()
            seconds = in_turn(lambda: ours(next(numbers)), lambda: plain.step(data), times=steps)
    with torch.profiler.profile() as profile:
        plain.step(data)
    times = {event.key.removeprefix("aten::"): event.self_cpu_time_total for event in profile.key_averages()}
    share = sum(times.get(name, 0.0) for name in PRODUCTS.split()) / sum(times.values())
    about = {"model": "SiT-S/2 with its head", "batch": batch, "baseline_is": "plain loop", "bar": ">= 1.1 x"}
    bottleneck = f"matrix products and attention, which both do alike, take {share:.0%} of the plain step"
    record("train/step", seconds[0], "s", seconds[1], **about, bottleneck=bottleneck)

    updater = EMAUpdater([plain.ema], sit, [lambda step: 0.9999])
    ours, base = in_turn(lambda: updater.update(0), plain.update_ema, times=20)
    about = {"model": "SiT-S/2", "baseline_is": "plain loop", "bar": ">= 1.5 x"}
    bottleneck = "memory, which both are bound by: three passes over tensors against five"
    record("train/ema", ours, "s", base, **about, bottleneck=bottleneck)

    f_sit, f_vae, t = torch.randn(256, 256, 16), torch.randn(256, 256, 16), torch.rand(256)
    settings = Alignment()
    ours, base = in_turn(lambda: alignment_loss(f_sit, f_vae, t, settings), lambda: plain.loss(f_sit, f_vae), times=20)
    record("train/alignment_loss", ours, "s", base, baseline_is="plain loop", bar=">= 1.5 x", batch=256)


def checkpoint(model: str = "SiT-B/2") -> None:
    """How long a save holds training up, beside copying its tensors in host memory; and when it is on the disk."""
    with tempfile.TemporaryDirectory() as name:
        store = random_store(Path(name) / "store", 32, 64)
        with training_run(store, Path(name), model, batch_size=2, keep_last=1) as run:
            trainer_step(run, random_batch(2, 32, run.accelerator.device))(0)  # AdamW has its moments
            steps = itertools.count(1)

            def copy() -> None:
                tensors = [run.model.state_dict(), run.ema.state_dict(), run.optimizer.state_dict()["state"]]
                tree_map_only(torch.Tensor, torch.clone, tensors)

            copies, pauses, rest = in_turn(
                copy, lambda: train.save_checkpoint(run, next(steps)), run.writer.finish, times=5
            )
    written = float(np.median([pause + after for pause, after in zip(pauses, rest, strict=True)]))
    about = {"baseline_is": "copying the same tensors", "written_after": written}
    about |= {"model": f"{model} with its head", "bar": "<= 1.1 x"}
    record("checkpoint/pause", pauses, "s", copies, over_baseline=True, **about)


def save_seconds(store: str, directory: str, model: str, zero1: bool, times: int) -> list[list[float]]:
    """Of saves by ranks that train together, the longest of any rank: how long each holds training up, and until it is
    on the disk. The first is not counted."""
    with training_run(Path(store), Path(directory), model, batch_size=2, keep_last=1, zero1=zero1) as run:
        train.train_step(run, 0, [random_batch(1, 32, run.accelerator.device)])  # AdamW has its moments
        seconds = []
        for index in range(1 + times):
            run.accelerator.wait_for_everyone()
            begin = time.perf_counter()
            train.save_checkpoint(run, index + 1)
            pause = time.perf_counter() - begin
            run.writer.finish()
            seconds.append([pause, time.perf_counter() - begin])
        return np.max(gather_objects(seconds), axis=0)[1:].tolist()


def zero1(model: str = "SiT-B/2", rounds: int = 2, saves: int = 3) -> None:
    """A save of moments that 2 processes have divided, gathering included, beside one of whole moments."""
    seconds: dict[bool, list[list[float]]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as name:
        store = str(random_store(Path(name) / "store", 32, 64))
        for turn in range(2 * rounds):
            divided = bool(turn % 2)
            with tempfile.TemporaryDirectory(dir=name) as runs:
                seconds[divided] += in_own_process(save_seconds, store, runs, model, divided, saves, processes=2)
    (whole_pause, whole), (pause, saved) = (list(zip(*seconds[key], strict=True)) for key in (False, True))
    about = {"baseline_is": "a save of 2 processes without --zero1", "bar": "< 2 x", "saves": len(seconds[True])}
    about |= {"model": f"{model} with its head", "pause": np.median(pause), "pause_baseline": np.median(whole_pause)}
    record("checkpoint/zero1", list(saved), "s", list(whole), over_baseline=True, **about)


def sparse_store(directory: Path, count: int) -> Path:
    """A store of `count` latents whose shards are holes in the file system: full size, no room."""
    random_store(directory, 32, 1)
    rows, shards = shard_size(count), []
    for index, first in enumerate(range(0, count, rows)):
        shape = (min(rows, count - first), 8, 32, 32)
        file = directory / f"moments-{index:05d}.npy"
        with open(file, "wb") as shard:
            shard.write(npy_header(shape, np.dtype("float32")))
            shard.truncate(shard.tell() + 4 * int(np.prod(shape)))
        shards.append({"count": shape[0], "moments": {"file": file.name, "sha256": ""}})
    np.save(directory / "labels.npy", np.arange(count, dtype=np.int64) % 1000)
    (directory / "paths.txt").write_text("\n" * count)
    meta = read_meta(directory) | {"count": count, "shards": shards}
    (directory / "meta.json").write_text(to_checksummed_json(meta))
    return directory


def first_batch(begin: float, store: str, directory: str) -> float:
    """Seconds since `begin`, when this process was started, until a run has its first batch."""
    with training_run(Path(store), Path(directory), "SiT-S/2", batch_size=256, num_workers=2) as run:
        next(iter(run.loader))
        return time.time() - begin


def anonymous_memory(store: str, batches: int) -> list[float]:
    """MiB of this process after a tenth of the batches, and after all."""
    dataset, seen = LatentDataset(store), []
    sampler = StepSampler(len(dataset), 256, seed=0)
    for index in range(batches):
        dataset.__getitems__(sampler.step_indices(index))
        seen.append(memory("RssAnon") / 2**20)
    return [seen[batches // 10], seen[-1]]


def start(count: int = IMAGENET, batches: int = 200) -> None:
    """From the command to the first batch, and the memory of a process that reads."""
    with tempfile.TemporaryDirectory() as name:
        store = str(sparse_store(Path(name) / "store", count))
        runs = [f"{name}/run{repeat}" for repeat in range(4)]
        times = [in_own_process(first_batch, time.time(), store, run) for run in runs]
        early, late = in_own_process(anonymous_memory, store, batches)
    what = "from the command to the first batch of 256, imports included"
    record("train/start", times[1:], "s", images=count, model="SiT-S/2", what=what, bar="< 5 s")
    what = "anonymous memory of a process that has read 200 random batches; mapped pages belong to the system"
    bar = "flat, < 500 MiB"
    record("train/loader_memory", late, "MiB", images=count, after_20_batches=early, what=what, bar=bar)
