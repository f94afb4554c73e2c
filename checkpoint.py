"""Checkpoints: folders that appear whole or not at all, whose files are verified when they are read.

    <run>/checkpoints/0400000/
        config.json          settings of the SiT
        ema.safetensors      the averaged SiT: what is sampled from
        model.safetensors    SiT and heads as trained
        optimizer.pt         optimizer state, tensors and plain values only
        state.json           step, settings of the run, latent scale, versions, git revision, digest of each file

Nothing is ever unpickled: weights are safetensors, and `optimizer.pt` is read with `weights_only=True`. So are the
files of other projects, which `load_sit` takes as well.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import shutil
import sys
import threading
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._pytree import tree_map_only

from models.convert import FORMATS, convert_state_dict
from models.sit import SiT, SiTConfig
from models.vae import UNKNOWN_VAE, LatentScale
from sealed import seal, unseal

FORMAT = "vae-repa-checkpoint"
VERSION = 1


def snapshot(
    model: nn.Module,
    ema: SiT,
    optimizer: torch.optim.Optimizer | None,
    scaler: torch.amp.GradScaler | None = None,
    guard: dict[str, torch.Tensor] | None = None,
) -> dict[str, Any]:
    """Copies in host memory of all that a checkpoint holds: training may go on while they are written.

    Args:
        model: the trained module, not wrapped by DDP.
        ema: the average to sample from.
        optimizer: of `model`; `None` leaves `optimizer.pt` out (such a checkpoint can be sampled from, not resumed).
        scaler: of float16 training.
        guard: what else the next step depends on.
    """
    state = None
    if optimizer is not None:
        state = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict() if scaler else None, "guard": guard}
    content = {"model": model.state_dict(), "ema": ema.state_dict(), "optimizer": state}
    copies = tree_map_only(torch.Tensor, lambda tensor: tensor.detach().to("cpu", copy=True).contiguous(), content)
    return copies | {"config": ema.config}


def write_checkpoint(run_dir: str | Path, step: int, content: dict[str, Any], info: dict[str, Any]) -> Path:
    """Write `<run_dir>/checkpoints/<step>` under a temporary name, flush it to the disk, and rename it.

    Args:
        run_dir: the run's folder.
        step: optimizer steps done.
        content: as `snapshot` gives it.
        info: JSON values that sampling and resuming need: at least `scale` (`LatentScale.to_dict()`), `vae`,
            `vae_digest`, `resolution`, `class_names`, `path_type`.

    Returns:
        The checkpoint's folder.
    """
    folder = Path(run_dir) / "checkpoints" / f"{step:07d}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.parent / f".{folder.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # what a killed process left
    try:
        partial.mkdir()
        (partial / "config.json").write_text(json.dumps(content["config"].to_dict(), indent=2) + "\n")
        save_file(content["ema"], partial / "ema.safetensors")
        save_file(content["model"], partial / "model.safetensors")
        if content["optimizer"] is not None:
            torch.save(content["optimizer"], partial / "optimizer.pt")
        digests = {file.name: file_digest(file) for file in sorted(partial.iterdir())}
        state = {"format": FORMAT, "version": VERSION, "step": step, **info, "digests": digests}
        (partial / "state.json").write_text(seal(state))
        for file in partial.iterdir():
            _flush(file)
        _flush(partial)
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one of the same step, which a resumed run makes again
        os.replace(partial, folder)
        _flush(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # above all on a full disk
        raise
    return folder


def save_checkpoint(
    run_dir: str | Path,
    step: int,
    model: nn.Module,
    ema: SiT,
    optimizer: torch.optim.Optimizer | None,
    info: dict[str, Any],
    scaler: torch.amp.GradScaler | None = None,
) -> Path:
    """`snapshot` and `write_checkpoint` in one."""
    return write_checkpoint(run_dir, step, snapshot(model, ema, optimizer, scaler), info)


class CheckpointWriter:
    """Writes checkpoints of a run in a thread, one at a time, and rotates them.

    One that cannot be written is reported, what there was stays whole, and training goes on to try again at the next.
    """

    def __init__(self, run_dir: str | Path, keep_last: int, keep_every: int):
        self.run_dir, self.keep_last, self.keep_every = Path(run_dir), keep_last, keep_every
        self.thread: threading.Thread | None = None
        self.error: ValueError | None = None

    def save(self, step: int, content: dict[str, Any], info: dict[str, Any]) -> None:
        """Begin to write; waits only for an earlier one that is still being written."""
        self.wait()
        self.thread = threading.Thread(target=self._write, args=(step, content, info), name="checkpoint writer")
        self.thread.start()

    def wait(self) -> None:
        """Return when nothing is being written."""
        if self.thread is not None:
            self.thread.join()

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
            write_checkpoint(self.run_dir, step, content, info)
            self.error = None
        except (OSError, SafetensorError, RuntimeError) as error:  # torch and safetensors wrap what the system says
            saved = latest_checkpoint(self.run_dir)
            self.error = ValueError(
                f"cannot write the checkpoint of step {step} to {self.run_dir} ({' '.join(str(error).split())[:200]}); "
                f"the last good one is {saved or 'none'}; make room on the disk"
            )
            print(f"warning: {self.error}; training goes on", file=sys.stderr, flush=True)
            return
        rotate_checkpoints(self.run_dir, self.keep_last, self.keep_every)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def checkpoints(run_dir: str | Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    folder = Path(run_dir) / "checkpoints"
    found = [path for path in folder.glob("*") if path.name.isdigit() and (path / "state.json").is_file()]
    return sorted(found, key=lambda path: int(path.name))


def latest_checkpoint(run_dir: str | Path) -> Path | None:
    """The finished checkpoint with the most steps, or None."""
    return next(reversed(checkpoints(run_dir)), None)


def rotate_checkpoints(run_dir: str | Path, keep_last: int, keep_every: int) -> None:
    """Delete all but the `keep_last` newest checkpoints and those whose step `keep_every` divides (0: none of them)."""
    for path in checkpoints(run_dir)[:-keep_last]:
        if not (keep_every and int(path.name) % keep_every == 0):
            doomed = path.with_name(f".{path.name}.partial")  # so that a kill in between leaves no half checkpoint
            os.replace(path, doomed)
            shutil.rmtree(doomed)


def newest_whole_checkpoint(run_dir: str | Path) -> Path | None:
    """The newest checkpoint whose files have their recorded digests; damaged ones are named and passed over.

    Raises:
        ValueError: there are checkpoints, and all are damaged.
    """
    errors = []
    for folder in reversed(checkpoints(run_dir)):
        try:
            verify_checkpoint(folder)
        except ValueError as error:
            errors.append(error)
            continue
        if errors:
            warnings.warn(f"{errors[0]}: going back to {folder}", stacklevel=2)
        return folder
    if errors:
        raise ValueError(
            f"expected a whole checkpoint in {run_dir}, found {len(errors)} damaged; the newest: {errors[0]}"
        )
    return None


def verify_checkpoint(folder: str | Path) -> dict[str, Any]:
    """`state.json` of a checkpoint, once the digests of all files have been compared.

    Raises:
        ValueError: one is missing, or damaged.
    """
    state = read_state(folder)
    for name in state["digests"]:
        _verified(Path(folder), name, state)
    return state


def read_state(folder: str | Path) -> dict[str, Any]:
    """`state.json` of a checkpoint.

    Raises:
        ValueError: it is missing, damaged, or of another format.
    """
    folder = Path(folder)
    if not (folder / "state.json").is_file():
        raise ValueError(f"not a checkpoint: {folder} has no state.json; expected <run>/checkpoints/<step>")
    try:
        state = unseal((folder / "state.json").read_text())
    except ValueError as error:  # of JSON and of UTF-8, too
        raise ValueError(f"damaged checkpoint: {folder / 'state.json'}: {error}; use an older one") from error
    if state.get("format") != FORMAT or state.get("version") != VERSION:
        raise ValueError(
            f"expected a checkpoint of format {FORMAT} {VERSION}, "
            f"found {state.get('format')} {state.get('version')} in {folder}"
        )
    return state


def _verified(folder: Path, name: str, state: dict[str, Any]) -> Path:
    """Path of one of the checkpoint's files, once its digest has been compared."""
    path, expected = folder / name, state["digests"].get(name)
    if expected is None or not path.is_file():
        raise ValueError(f"damaged checkpoint: {path} is missing; use an older one")
    found = file_digest(path)
    if found != expected:
        raise ValueError(
            f"damaged checkpoint: {path} has SHA-256 {found[:12]}..., expected {expected[:12]}...; use an older one"
        )
    return path


def _load_weights(module: nn.Module, path: Path) -> None:
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"damaged checkpoint: cannot read {path} ({error}); use an older one") from error
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit the model: {' '.join(str(error).split())[:300]}") from error


def load_checkpoint(
    folder: str | Path,
    model: nn.Module,
    ema: SiT,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None = None,
    verify: bool = True,
) -> dict[str, torch.Tensor] | None:
    """Put a checkpoint's values into the training objects, in place; gives what `snapshot` was given as `guard`.

    Every file's digest is compared before any of the objects is changed, unless `verify` says that it just has been.

    Raises:
        ValueError: a file is missing, damaged, or of another architecture.
    """
    folder = Path(folder)
    state = read_state(folder)
    names = ("model.safetensors", "ema.safetensors", "optimizer.pt")
    model_file, ema_file, optimizer_file = (
        _verified(folder, name, state) if verify else folder / name for name in names
    )
    _load_weights(model, model_file)
    _load_weights(ema, ema_file)
    try:
        saved = torch.load(optimizer_file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"damaged checkpoint: cannot read {optimizer_file}; use an older one") from error
    optimizer.load_state_dict(saved["optimizer"])
    if scaler is not None and saved["scaler"] is not None:
        scaler.load_state_dict(saved["scaler"])
    return saved["guard"]


def load_sit(path: str | Path) -> tuple[SiT, dict[str, Any]]:
    """The SiT to sample with (the EMA weights), on the CPU in float32, in eval mode and frozen.

    Args:
        path: a checkpoint `<run>/checkpoints/<step>`; or a run's folder, whose newest checkpoint is taken; or a file of
            SiT's, REPA's or SRA's (.pt, or .safetensors).

    Returns:
        The model, and what is known of it: `source` (the folder or file), `format` (ours is "vae-repa"), `read_as` (how
        it was read, in words), `step`, `digest` (SHA-256 of the weights), `scale` (`LatentScale`), `vae`, `vae_digest`,
        `resolution`, `class_names`, `path_type`, and the rest of `state.json`. Files of other projects record less:
        there `step` may be None, and `scale` is None for latents of other than the SD-VAE's 4 channels.

    Raises:
        ValueError: no checkpoint there, a damaged one, or one that this project's SiT cannot stand for.
    """
    folder = Path(path)
    if folder.is_file():
        return _load_foreign(folder)
    if not folder.is_dir():
        raise ValueError(
            f"not a checkpoint: nothing at {folder}; expected <run>/checkpoints/<step>, or a .pt or .safetensors file"
        )
    if not (folder / "state.json").is_file():
        newest = latest_checkpoint(folder)
        if newest is None:
            raise ValueError(f"not a checkpoint: {folder} holds neither state.json nor checkpoints/<step>/state.json")
        folder = newest
    state = read_state(folder)
    model = SiT(SiTConfig.from_dict(json.loads(_verified(folder, "config.json", state).read_text())))
    _load_weights(model, _verified(folder, "ema.safetensors", state))
    info = dict(state)
    info |= {
        "source": str(folder),
        "format": "vae-repa",
        "read_as": f"step {state['step']} of this project, EMA weights",
        "digest": state["digests"]["ema.safetensors"],
        "scale": LatentScale.from_dict(state["scale"]),
    }
    return model.eval().requires_grad_(False), info


SD_VAE_SCALE = 0.18215  # the scale that the SD-VAE's config records, and that these projects train with
FOREIGN_VAES = {  # what each project's training encodes with
    "sit": "stabilityai/sd-vae-ft-ema",
    "repa": "stabilityai/sd-vae-ft-mse",
    "sra": "stabilityai/sd-vae-ft-ema",
}
FOREIGN_PATHS = {"linear": "linear", "cosine": "cosine", "cos": "cosine", "gvp": "cosine"}  # by lower-case name


def _load_foreign(path: Path) -> tuple[SiT, dict[str, Any]]:
    content = _read_foreign(path)
    try:
        config, state, kind, notes = convert_state_dict(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    args = content.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else {}
    path_type = FOREIGN_PATHS.get(str(args.get("path_type", "linear")).lower())
    if path_type is None or args.get("prediction", "v") not in ("v", "velocity"):
        raise ValueError(
            f"{path}: expected a velocity on a linear or cosine path, found a model that was trained to predict "
            f"{args.get('prediction', 'v')} on the path {args.get('path_type')}"
        )
    model = SiT(config)
    model.load_state_dict(state)
    step = content.get("steps", content.get("train_steps"))
    info = {
        "source": str(path),
        "format": kind,
        "read_as": f"{FORMATS[kind]}'s file: {'; '.join(notes)}" if notes else f"{FORMATS[kind]}'s file",
        "step": step if isinstance(step, int) else None,
        "digest": file_digest(path),
        "scale": LatentScale((SD_VAE_SCALE,), (0.0,)) if config.in_channels == 4 else None,
        "vae": FOREIGN_VAES[kind],
        "vae_digest": UNKNOWN_VAE,
        "resolution": args.get("resolution") or args.get("image_size") or 8 * config.latent_size,
        "class_names": [str(label) for label in range(config.num_classes)],
        "path_type": path_type,
    }
    return model.eval().requires_grad_(False), info


def _read_foreign(path: Path) -> dict[str, Any]:
    """The tensors and plain values of a file of another project's.

    Such files also hold their command line, as an `argparse.Namespace`: that one class is let through, which cannot run
    code, and no other.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Mapped where the file can be: it holds the optimizer's state, too, which nobody reads here.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, SafetensorError) as error:
        reason = next(
            (line for line in str(error).splitlines() if "nsupported" in line), "it is damaged, or no such file"
        )
        raise ValueError(
            f"{path}: expected a checkpoint of tensors and plain values (.pt or .safetensors), found another "
            f"({' '.join(reason.split())[:200]}); nothing in it was run"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a dictionary of tensors, found a {type(content).__name__}")
    return content
