"""A training step beside a plain loop of the kind this family of codebases has, and what a large store costs at start.

The plain loop is that of `benchmarks/plain.py`.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import dataset
import train
from benchmarks.plain import PlainLoop
from benchmarks.record import record
from loss import Alignment, alignment_loss
from models.aligned import AlignedSiT
from models.projector import Projector
from models.sit import SiT, SiTConfig
from preprocessing import store_writer
from runtime.files import to_checksummed_json
from training.ema import update_ema

BATCH, STEPS = 4, 5
COUNT = 1_281_167  # images of ImageNet


def seconds(call: Callable[[], None]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def in_turn(ours: Callable[[], None], plain: Callable[[], None], times: int) -> tuple[list[float], list[float]]:
    """Seconds of each, one after the other, so that a disturbance hits both; the first of each is not counted."""
    ours(), plain()
    pairs = [(seconds(ours), seconds(plain)) for _ in range(times)]
    return [a for a, _ in pairs], [b for _, b in pairs]


def report(name: str, ours: list[float], plain: list[float], bar: str, **extra) -> None:
    value, baseline = statistics.median(ours), statistics.median(plain)
    record(
        name, value, "s", baseline, baseline / value, baseline_is="plain loop", spread=[min(ours), max(ours)],
        spread_baseline=[min(plain), max(plain)], bar=bar, **extra,
    )  # fmt: skip


def training_step(folder: Path) -> None:
    """Our step is the trainer's own: it is timed inside a run of train.py."""
    store = sparse_store(folder / "store", 64)
    torch.manual_seed(0)
    sit = SiT(SiTConfig.from_name("SiT-S/2"))
    plain = PlainLoop(AlignedSiT(sit, {"vae": (2, Projector(384, 16))}))
    batch = dataset.LatentDataset(store).__getitems__(list(range(BATCH)))
    ours_seconds, plain_seconds, step = [], [], train.train_step

    def both(*arguments) -> None:
        ours_seconds.append(seconds(lambda: step(*arguments)))
        plain_seconds.append(seconds(lambda: plain.step(batch["moments"], batch["label"])))

    train.train_step = both
    train.main([
        "--data-dir", str(store), "--output-dir", str(folder), "--model", "SiT-S/2", "--batch-size", str(BATCH),
        "--max-train-steps", str(STEPS + 1), "--sampling-steps", "0", "--num-workers", "0",
    ])  # fmt: skip
    train.train_step = step
    with torch.profiler.profile() as profile:
        plain.step(batch["moments"], batch["label"])
    products = ("aten::addmm", "aten::mm", "aten::_scaled_dot_product_flash_attention_for_cpu")
    products += ("aten::_scaled_dot_product_flash_attention_for_cpu_backward",)
    times = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    share = sum(times.get(name, 0.0) for name in products) / sum(times.values())
    report(
        "train/step", ours_seconds[1:], plain_seconds[1:], ">= 1.1 x", model="SiT-S/2 with its head", batch=BATCH,
        bottleneck=f"matrix products and attention, which both do alike, take {share:.0%} of the plain step",
    )  # fmt: skip
    report(
        "train/ema", *in_turn(lambda: update_ema(plain.ema, plain.model.sit, 0.9999), plain.average, 20), ">= 1.5 x",
        model="SiT-S/2", bottleneck="memory, which both are bound by: three passes over tensors against five",
    )  # fmt: skip
    f_sit, f_vae, t = torch.randn(256, 256, 16), torch.randn(256, 256, 16), torch.rand(256)
    alignment = Alignment()
    report(
        "train/alignment_loss",
        *in_turn(lambda: alignment_loss(f_sit, f_vae, t, alignment), lambda: plain.loss(f_sit, f_vae), 20),
        ">= 1.5 x", batch=256,
    )  # fmt: skip


def sparse_store(folder: Path, count: int) -> Path:
    """A store of `count` latents whose shards are holes in the file system: full size, no room."""
    size, shards = store_writer.shard_size(count), []
    folder.mkdir(parents=True)
    for index, begin in enumerate(range(0, count, size)):
        rows = min(size, count - begin)
        with open(folder / f"moments-{index:05d}.npy", "wb") as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": (rows, 8, 32, 32)}
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + rows * 8 * 32 * 32 * 4)
        shards.append({"count": rows, "moments": {"file": f"moments-{index:05d}.npy", "sha256": ""}})
    np.save(folder / "labels.npy", np.arange(count, dtype=np.int64) % 1000)
    (folder / "paths.txt").write_text("\n" * count)
    meta = {
        "format": dataset.FORMAT, "version": dataset.VERSION, "latent_shape": [4, 32, 32], "dtype": "float32",
        "count": count, "num_classes": 1000, "flips": False, "images": False, "shards": shards, "labels_sha256": "",
        "paths_sha256": "", "skipped": [], "resolution": 256, "vae": "", "vae_digest": "", "scale": [1.0],
        "shift": [0.0], "class_names": [str(k) for k in range(1000)], "crop": "adm-center", "settings": {},
    }  # fmt: skip
    (folder / "meta.json").write_text(to_checksummed_json(meta))
    return folder


START = """
import json, sys, time
begin = float(sys.argv.pop(1))
import train
def first(run, step, micro_batches):
    print(json.dumps(time.time() - begin))
    sys.stdout.flush()
    import os
    os._exit(0)
train.train_step = first
train.main()
"""

MEMORY = """
import json, sys
from dataset import LatentDataset, StepSampler
def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024
store = LatentDataset(sys.argv[1])
sampler = StepSampler(len(store), 256, seed=0)
seen = []
for step in range(200):
    store.__getitems__(sampler.step_indices(step))
    seen.append(anonymous())
print(json.dumps([seen[20], seen[-1]]))
"""


def start(folder: Path) -> None:
    """From the command to the first batch, and the memory of a process that reads."""
    store = sparse_store(folder / "imagenet", COUNT)
    root = Path(__file__).resolve().parent.parent
    times = []
    for repeat in range(4):
        command = [
            sys.executable, "-c", START, str(time.time()), "--data-dir", str(store), "--output-dir", str(folder),
            "--exp-name", f"start{repeat}", "--model", "SiT-S/2", "--batch-size", "256", "--sampling-steps", "0",
        ]  # fmt: skip
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
        times.append(float(done.stdout.splitlines()[-1]))
    record(
        "train/start", statistics.median(times[1:]), "s", spread=[min(times[1:]), max(times[1:])], images=COUNT,
        model="SiT-S/2", what="from the command to the first batch of 256, imports included", bar="< 5 s",
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(store)], cwd=root, capture_output=True, text=True, check=True
    )
    early, late = json.loads(done.stdout)
    record(
        "train/loader_memory", late, "MiB", images=COUNT, after_20_batches=early,
        what="anonymous memory of a process that has read 200 random batches; mapped pages belong to the system",
        bar="flat, < 500 MiB",
    )  # fmt: skip


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        training_step(Path(name))
        start(Path(name))


if __name__ == "__main__":
    main()
