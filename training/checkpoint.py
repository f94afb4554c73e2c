"""Writing checkpoints, and resuming from them: directories that appear whole or not at all.

`models/load.py` says what they hold, and reads them. Every file's SHA-256 is recorded, and compared before it is used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import pickle
import shutil
import sys
import threading
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from torch.utils._pytree import tree_map_only

from dataset import LatentDataset, store_digest
from diffusion.interpolant import choose_shift
from models.load import FORMAT, HEADS, VERSION, checkpoints, latest_checkpoint, load_weights, read_state, verified_file
from runtime import provenance
from runtime.files import fsync, sha256, to_checksummed_json
from training.config import TrainConfig
from training.optimizer import fix_loaded_state

NOT_WRITTEN = (OSError, SafetensorError, RuntimeError)  # torch and safetensors wrap what the system says


def make_records(
    config: TrainConfig,
    store: LatentDataset,
    initial: dict[str, Any] | None,
    repa_digest: str | None,
    micro_batch: dict[str, Any],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What goes into a run's `config.json`, and into `state.json` of its checkpoints beside step and digests.

    A new field of `state.json` needs its historic value in `STATE` of `models/load.py`, which reads it.

    Args:
        config: with every None decided.
        store: the latents. Its digest is the one by which it is known again.
        initial: `source`, `read_as` and `digest` of the weights that the run began with; None if they were random.
        repa_digest: SHA-256 of the file of `--repa-weights`.
        micro_batch: as `training/memory.py` has chosen it, for how many processes.
    """
    settings = {"config": dataclasses.asdict(config), "data_digest": store_digest(store.meta)}
    before = {}
    with contextlib.suppress(OSError, ValueError):
        before = json.loads((config.run_dir / "config.json").read_text())
    # The tracker's run is made with the run's directory, and resumed with it.
    tracker_run = before.get("tracker_run") or uuid.uuid4().hex
    settings |= {"initial": initial, "repa_digest": repa_digest, "tracker_run": tracker_run}
    settings |= {"processes": micro_batch["processes"], "micro_batch": micro_batch}
    settings |= provenance.stamp()
    groups: dict[str, list[str]] = {}
    for field in dataclasses.fields(config):
        groups.setdefault(field.metadata["group"], []).append(field.name)
    from_store = {name: store.meta[name] for name in ("vae", "vae_digest", "resolution", "class_names")}
    from_store |= {"scale": store.scale.to_dict(), "path_type": config.path_type, "prediction": config.prediction}
    from_store["time_shift"] = choose_shift(config.time_shift, store.latent_shape)
    from_store["classes_present"] = np.unique(store.labels).tolist()
    return settings | {"groups": groups}, settings | from_store


def snapshot(
    model: nn.Module,
    emas: Mapping[str, nn.Module],
    optimizer: dict[str, Any] | None,
    scaler: torch.amp.GradScaler | None = None,
    guard: dict[str, torch.Tensor] | None = None,
) -> dict[str, Any]:
    """Copies in host memory of all that a checkpoint holds: training may continue while they are written.

    Args:
        model: the trained module, not wrapped by DDP.
        emas: the EMAs by name, the first one of the SiT, "ema".
        optimizer: its state; `None` leaves `optimizer.pt` out (such a checkpoint can be sampled from, not resumed).
        scaler: of float16 training.
        guard: what else the next step depends on.
    """
    state = None
    if optimizer is not None:
        state = {"optimizer": optimizer, "scaler": scaler.state_dict() if scaler else None, "guard": guard}
    networks = {name: network.state_dict() for name, network in {"model": model, **emas}.items()}
    content = {"networks": networks, "optimizer": state}
    copies = tree_map_only(torch.Tensor, lambda tensor: tensor.detach().to("cpu", copy=True).contiguous(), content)
    return copies | {"config": next(iter(emas.values())).config}


def write_checkpoint(run_dir: str | Path, step: int, content: dict[str, Any], info: dict[str, Any]) -> Path:
    """Write `<run_dir>/checkpoints/<step>` under a temporary name, flush it to the disk, and rename it.

    Args:
        run_dir: the run's directory.
        step: optimizer steps done.
        content: as `snapshot` gives it; a checkpoint that is only sampled from needs no other network than "ema".
        info: JSON values that sampling and resuming need: at least `scale` (`LatentScale.to_dict()`), `vae`,
            `vae_digest`, `resolution`, `class_names`, `path_type`.

    Returns:
        The checkpoint's directory.
    """
    directory = Path(run_dir) / "checkpoints" / f"{step:07d}"
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.parent / f".{directory.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # what a killed process left
    try:
        partial.mkdir()
        (partial / "config.json").write_text(json.dumps(content["config"].to_dict(), indent=2) + "\n")
        for name, weights in content["networks"].items():
            save_file(weights, partial / f"{name}.safetensors")
        if content["optimizer"] is not None:
            torch.save(content["optimizer"], partial / "optimizer.pt")
        digests = {file.name: sha256(file) for file in sorted(partial.iterdir())}
        state = {"format": FORMAT, "version": VERSION, "step": step, **info, "digests": digests}
        (partial / "state.json").write_text(to_checksummed_json(state))
        for file in partial.iterdir():
            fsync(file)
        fsync(partial)
        remove(directory)  # a damaged one of the same step, which a resumed run makes again
        os.replace(partial, directory)
        fsync(directory.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # above all on a full disk
        raise
    return directory


class CheckpointWriter:
    """Writes checkpoints of a run in a thread of rank 0, one at a time, and rotates them. Every rank has one, and can
    wait until the last is written: a launcher ends all ranks when one leaves.

    A failure is reported, what there was stays whole, and training continues to the next checkpoint.
    """

    def __init__(self, run_dir: str | Path, keep_last: int, keep_every: int, every: int = 1, timeout: int = 600):
        self.run_dir, self.kept = Path(run_dir), (keep_last, keep_every, every)
        self.thread: threading.Thread | None = None
        self.error: ValueError | None = None
        # Of its own: the thread must not come between what the ranks exchange in the steps.
        several, limit = dist.is_initialized(), datetime.timedelta(seconds=timeout)
        self.group = dist.new_group(backend="gloo", timeout=limit) if several else None
        self.written: dist.Work | None = None  # on the other ranks

    def save(self, step: int, content: dict[str, Any], info: dict[str, Any]) -> None:
        """Begin to write; waits only for an earlier one that is still being written."""
        self.wait()
        self.thread = threading.Thread(target=self._write, args=(step, content, info), name="checkpoint writer")
        self.thread.start()

    def follow(self) -> None:
        """On the other ranks, where rank 0 calls `save`."""
        self.wait()
        self.written = dist.barrier(self.group, async_op=True)

    def wait(self) -> None:
        """Return when nothing is being written, by this rank or rank 0."""
        if self.thread is not None:
            self.thread.join()
        if self.written is not None:
            with contextlib.suppress(RuntimeError):  # rank 0 is gone
                self.written.wait()
            self.written = None

    def finish(self) -> None:
        """`wait`, then:

        Raises:
            ValueError: the last checkpoint could not be written.
        """
        self.wait()
        if self.error is not None:
            raise self.error

    def _write(self, step: int, content: dict[str, Any], info: dict[str, Any]) -> None:
        try:
            self._write_and_rotate(step, content, info)
        finally:
            if self.group:
                with contextlib.suppress(RuntimeError):  # another rank is gone
                    dist.barrier(self.group)

    def _write_and_rotate(self, step: int, content: dict[str, Any], info: dict[str, Any]) -> None:
        try:
            write_checkpoint(self.run_dir, step, content, info)
            self.error = None
        except NOT_WRITTEN as error:
            saved = latest_checkpoint(self.run_dir)
            self.error = ValueError(
                f"cannot write the checkpoint of step {step} to {self.run_dir} ({' '.join(str(error).split())[:200]}); "
                f"the last good one is {saved or 'none'}; make room on the disk"
            )
            print(f"warning: {self.error}; training continues", file=sys.stderr, flush=True)
            return
        rotate_checkpoints(self.run_dir, *self.kept)


def remove(directory: Path) -> None:
    """Remove a directory if it is there, or the link that stands for one."""
    directory.unlink() if directory.is_symlink() else shutil.rmtree(directory, ignore_errors=True)


def rotate_checkpoints(run_dir: str | Path, keep_last: int, keep_every: int, every: int = 1) -> None:
    """Delete all but the newest checkpoint, the `keep_last` newest of those whose step `every` divides (the others were
    saved by the clock, or at a stop), and those whose step `keep_every` divides (0: none of them)."""
    found = checkpoints(run_dir)
    regular = [path for path in found if int(path.name) % every == 0]
    kept = {found[-1], *(regular or found)[-keep_last:]}
    for path in found:
        if path not in kept and not (keep_every and int(path.name) % keep_every == 0):
            doomed = path.with_name(f".{path.name}.partial")  # so that a kill in between leaves no half checkpoint
            os.replace(path, doomed)
            remove(doomed)


def latest_valid_checkpoint(run_dir: str | Path) -> Path | None:
    """The newest checkpoint whose files have their recorded digests. Newer ones are damaged: they are named and set
    aside, as `<step>.damaged`, so that no rotation counts them.

    Raises:
        ValueError: there are checkpoints, and all are damaged.
    """
    damaged: dict[Path, ValueError] = {}
    for directory in reversed(checkpoints(run_dir)):
        try:
            verify_checkpoint(directory)
        except ValueError as error:
            damaged[directory] = error
            continue
        for path, error in damaged.items():
            aside = path.with_name(f"{path.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)  # of an earlier time
            os.replace(path, aside)
            warnings.warn(f"{error}: resuming from {directory}, {path.name} is now {aside}", stacklevel=2)
        return directory
    if damaged:
        first = next(iter(damaged.values()))
        raise ValueError(f"expected a whole checkpoint in {run_dir}, found {len(damaged)} damaged: {first}")
    return None


def verify_checkpoint(directory: str | Path) -> dict[str, Any]:
    """`state.json` of a checkpoint, once the digests of all files have been compared.

    Raises:
        ValueError: one is missing, or damaged.
    """
    state = read_state(directory)
    for name in state["digests"]:
        verified_file(Path(directory), name, state)
    return state


def load_checkpoint(
    directory: str | Path,
    model: nn.Module,
    emas: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None = None,
    verify: bool = True,
) -> dict[str, torch.Tensor] | None:
    """Put a checkpoint's values into the training objects, in place; gives what `snapshot` was given as `guard`.

    Older code kept no EMAs of heads: they begin with the trained ones.

    Every file's digest is compared before any of the objects is changed, unless `verify` says that it just has been.

    Raises:
        ValueError: a file is missing, damaged, or of another architecture.
    """
    directory = Path(directory)
    state = read_state(directory)
    late = [name for name in emas if name.startswith(HEADS) and f"{name}.safetensors" not in state["digests"]]
    networks = {"model": model, **{name: ema for name, ema in emas.items() if name not in late}}
    names = [*(f"{name}.safetensors" for name in networks), "optimizer.pt"]
    *files, optimizer_file = (verified_file(directory, name, state) if verify else directory / name for name in names)
    for network, file in zip(networks.values(), files, strict=True):
        load_weights(network, file)
    for name in late:
        emas[name].load_state_dict(model.heads.state_dict(), strict=False)
    if late and not (dist.is_initialized() and dist.get_rank()):
        print(f"{directory} has no EMA of the alignment's head: it begins with the trained head", flush=True)
    try:
        saved = torch.load(optimizer_file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"damaged checkpoint: cannot read {optimizer_file}; use an older one") from error
    optimizer.load_state_dict(saved["optimizer"])
    fix_loaded_state(optimizer)
    if scaler is not None and saved["scaler"] is not None:
        scaler.load_state_dict(saved["scaler"])
    return saved["guard"]
