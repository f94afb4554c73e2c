"""What a run is, decided before anything is built: its settings, its data, the checkpoint that it resumes from."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from alignment.registry import METHODS, needs_of
from dataset import LatentDataset, store_digest
from models.load import read_state
from runtime.cli import check
from runtime.distributed import check_ranks_agree, choose_device
from runtime.files import sha256
from training.config import TrainConfig
from training.run_dir import resumed_config


def settle(
    config: TrainConfig, given: frozenset[str] | None, checkpoint: Path | None
) -> tuple[TrainConfig, LatentDataset, dict[str, Any] | None]:
    """The settings, all decided; the data; and the state of the checkpoint that is resumed, if one is."""
    state = read_state(checkpoint) if checkpoint else None
    if state:
        config = resumed_config(config, given, state["config"], checkpoint / "state.json")
    store = LatentDataset(config.data_dir, images="images" in needs_of(config.align))
    config = resolve(epochs_to_steps(config, given, len(store)), store, device_type(config) == "cuda")
    check_data(config, store, checkpoint, state)
    return config, store, state


def epochs_to_steps(config: TrainConfig, given: frozenset[str] | None, images: int) -> TrainConfig:
    """The config with --epochs in --max-train-steps; a resumed run without the flag has its steps from the record."""
    if config.epochs is None:
        return config
    steps = max(1, int(config.epochs * images / config.batch_size))
    both = given is None or "max_train_steps" in given
    return dataclasses.replace(config, max_train_steps=min(steps, config.max_train_steps) if both else steps)


def resolve(config: TrainConfig, store: LatentDataset, on_gpu: bool) -> TrainConfig:
    """The config with every `None` decided, checked against the store.

    Raises:
        ValueError: store and settings disagree.
    """
    size = config.model.removeprefix("SiT-").split("/")[0]
    depths = {name: by_size for method in METHODS.values() for name, by_size in method.default_depths.items()}
    decided = {
        "resolution": store.meta["resolution"],
        "num_classes": store.num_classes,
        **{name: by_size.get(size) for name, by_size in depths.items()},  # SiTConfig reports an unknown size
        "exp_name": config.run_dir.name,
        "mixed_precision": "bf16" if on_gpu else "no",
        "compile": on_gpu,
        "vae": store.meta["vae"],
        "lr_decay_steps": config.max_train_steps,
        "ema_warmup": config.init_from is not None,
    }
    config = dataclasses.replace(config, **{k: v for k, v in decided.items() if getattr(config, k) is None})
    fp16, R, K = config.mixed_precision == "fp16", store.meta["resolution"], store.num_classes
    if fp16 and not on_gpu:
        raise ValueError("--mixed-precision fp16: expected a GPU, found none; use bf16 or no")
    if config.zero1 and fp16:
        raise ValueError("--zero1: expected --mixed-precision bf16 or no with it, found fp16")
    made_at = f"{R}, which {config.data_dir} was made at (leave the flag out, or dump the images again)"
    check(config, "resolution", config.resolution == R, made_at)
    check(config, "num_classes", config.num_classes >= K, f"at least {K}, the classes in {config.data_dir}")
    if config.random_flip and not store.has_flips:
        raise ValueError(f"--random-flip: {config.data_dir} has no mirrored latents; dump it again with --flip")
    return config


def check_data(config: TrainConfig, store: LatentDataset, checkpoint: Path | None, state: dict | None) -> None:
    """Refuse data that the run cannot be trained on.

    Raises:
        ValueError: the store is damaged (with --verify-data all of it is read), or not the run's.
    """
    # All of it is read by one rank of each node: those beside it read the same disk.
    damaged = store.damaged_files(whole=config.verify_data and PartialState().is_local_main_process)
    if damaged:
        raise ValueError(f"damaged store {config.data_dir}: {', '.join(damaged)} changed since; dump the images again")
    # Runs of older code recorded the digest of meta.json, which says more than what the data are.
    if state and state["data_digest"] not in (store_digest(store.meta), sha256(store.path / "meta.json")):
        raise ValueError(f"{config.data_dir} is not the store of {checkpoint}; give that one, or another --exp-name")
    # Each rank reads files of its own node.
    check_ranks_agree({"data": store_digest(store.meta), "checkpoint": state and [state["step"], state["digests"]]})


def device_type(config: TrainConfig) -> str:
    """Of --device; accelerate chooses which GPU is whose."""
    if config.device:
        return choose_device(config.device).type
    return "cuda" if torch.cuda.is_available() else "cpu"
