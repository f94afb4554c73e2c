"""`train.py --dry-run`: what would be trained and what it needs. All files are checked, and nothing is written."""

from __future__ import annotations

import shutil

import torch
from accelerate.tracking import get_available_trackers

from dataset import LatentDataset
from models.load import latest_checkpoint, load_sit
from models.sit import SiT, SiTConfig
from training.config import TrainConfig
from training.finetune import check_sources
from training.memory import GIB, TrainingMemory, choose_micro_batch, count_memory, memory_limit
from training.settle import settle
from training.setup import build_methods, build_sit, guiding, load_grid_vae, make_accelerator, make_heads, make_loader


def print_plan(config: TrainConfig, given: frozenset[str]) -> None:
    """Print the plan, on rank 0.

    Raises:
        ValueError: whatever would keep the run from being started.
    """
    # Where the run stands, and its files.
    accelerator, checkpoint = make_accelerator(config), latest_checkpoint(config.run_dir)
    if checkpoint and not config.resume:
        raise ValueError(f"--no-resume: {config.run_dir} holds a run ({checkpoint}); choose another --exp-name")
    config, store, state = settle(config, given, checkpoint)
    if config.sampling_steps:
        load_grid_vae(config, store, accelerator)
    if config.report_to not in ("none", *map(str, get_available_trackers())):
        raise ValueError(f"--report-to {config.report_to}: expected it to be installed; pip install {config.report_to}")
    check_sources(config, state)
    if config.init_from and not state:
        build_sit(config, store, load_sit(config.init_from, format=config.init_format))

    # The networks, without content.
    channels, side, _ = store.latent_shape
    with torch.device("meta"):
        sit = SiT(SiTConfig.from_name(config.model, side, channels, config.num_classes, config.qk_norm))
        methods = build_methods(config, store, sit, sit, accelerator)
    memory = count_memory(config, sit.config, lambda: make_heads(config, methods), accelerator, guiding(methods))
    micro_batch = choose_micro_batch(config, accelerator, lambda: memory, 0, state and state["micro_batch"], methods)
    begin = state["step"] if state else 0
    make_loader(config, store, accelerator, micro_batch, begin)  # refuses batches that cannot be divided
    accelerator.print(f"run         {config.run_dir}, {f'resumed from {checkpoint}' if checkpoint else 'a new one'}")
    limit = memory_limit(accelerator.device, 0)
    accelerator.print(describe_plan(config, store, sit, memory, micro_batch, limit, begin))
    accelerator.end_training()


def describe_plan(
    config: TrainConfig,
    store: LatentDataset,
    sit: SiT,
    memory: TrainingMemory,
    micro_batch: dict,
    limit: int | None,
    begin: int,
) -> str:
    """The plan of the steps after `begin`, in lines. GiB of memory, GB of disk, as they are sold."""
    images, steps, networks = micro_batch["images"], config.max_train_steps, len(config.ema_decay + config.ema_power)
    batch, epochs = config.batch_size, config.max_train_steps * config.batch_size / len(store)
    backbone = sum(parameter.numel() for parameter in sit.parameters()) / 1e6
    parts = {name: getattr(memory, name) for name in ("weights", "gradients", "moments", "emas", "batch")}
    parts |= {"activations": memory.activations(images), "backward": images * memory.working, "grids": memory.grid}
    found = f"{limit / GIB:.1f}" if limit else "?"
    told = ", ".join(f"{name} {value / GIB:.2f}" for name, value in parts.items())
    checkpoint = memory.weights + 2 * memory.gradients + memory.emas
    kept = config.keep_last + 1 + (steps // config.keep_every if config.keep_every else 0)  # one by the clock
    snapshots = steps // config.ema_snapshot_steps * len(config.ema_power) * memory.emas // networks // 2
    disk = f"{kept} checkpoints of {checkpoint / 1e9:.2f} and snapshots of {snapshots / 1e9:.1f}"
    place = next(path for path in (config.run_dir.absolute(), *config.run_dir.absolute().parents) if path.exists())
    free, needed = shutil.disk_usage(place).free, kept * checkpoint + snapshots
    hours = "not measured (--images-per-second)"
    if config.images_per_second:
        hours = f"{(steps - begin) * batch / config.images_per_second / 3600:,.1f} h"
    lines = {
        "data": f"{config.data_dir}: {len(store):,} images, {len(store) / batch:,.1f} steps an epoch",
        "parameters": f"{config.model} {backbone:.1f}M, heads {memory.gradients / 4e6 - backbone:.1f}M",
        "batch": "{} = {processes} processes x {micro_batches} micro-batches x {images}".format(batch, **micro_batch),
        "memory": f"{memory.needed(images) / GIB:.2f} GiB a process of {found}: {told}",
        "disk": f"{needed / 1e9:.1f} GB of {free / 1e9:.1f} free{', too little' if needed > free else ''}: {disk}",
        "time": f"{f'from step {begin:,} to ' if begin else ''}{steps:,} steps, {epochs:,.1f} epochs: {hours}",
        "checked": "data; and as far as the run needs them VAE, tracker, --init-from, --repa-weights",
    }
    return "\n".join(f"{name:12}{text}" for name, text in lines.items())
