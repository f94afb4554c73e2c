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
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from models.convert import FORMATS, convert_state_dict
from models.sit import SiT, SiTConfig
from models.vae import UNKNOWN_VAE, LatentScale

FORMAT = "vae-repa-checkpoint"
VERSION = 1


def save_checkpoint(
    run_dir: str | Path,
    step: int,
    model: nn.Module,
    ema: SiT,
    optimizer: torch.optim.Optimizer | None,
    info: dict[str, Any],
    scaler: torch.amp.GradScaler | None = None,
) -> Path:
    """Write `<run_dir>/checkpoints/<step>` under a temporary name, flush it to the disk, and rename it.

    Args:
        run_dir: the run's folder.
        step: optimizer steps done.
        model: the trained module, not wrapped by DDP.
        ema: the average to sample from.
        optimizer: of `model`; `None` leaves `optimizer.pt` out (such a checkpoint can be sampled from, not resumed).
        info: JSON values that sampling and resuming need: at least `scale` (`LatentScale.to_dict()`), `vae`,
            `vae_digest`, `resolution`, `class_names`, `path_type`.
        scaler: of float16 training.

    Returns:
        The checkpoint's folder.
    """
    folder = Path(run_dir) / "checkpoints" / f"{step:07d}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.parent / f".{folder.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # what a killed process left
    partial.mkdir()
    (partial / "config.json").write_text(json.dumps(ema.config.to_dict(), indent=2) + "\n")
    save_file(_plain_tensors(ema), partial / "ema.safetensors")
    save_file(_plain_tensors(model), partial / "model.safetensors")
    if optimizer is not None:
        state = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict() if scaler else None}
        torch.save(state, partial / "optimizer.pt")
    digests = {file.name: file_digest(file) for file in sorted(partial.iterdir())}
    state = {"format": FORMAT, "version": VERSION, "step": step, **info, "digests": digests}
    (partial / "state.json").write_text(json.dumps(state, indent=2) + "\n")
    for file in partial.iterdir():
        _flush(file)
    _flush(partial)
    shutil.rmtree(folder, ignore_errors=True)  # a damaged one of the same step, which a resumed run makes again
    os.replace(partial, folder)
    _flush(folder.parent)
    return folder


def _plain_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in module.state_dict().items()}


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
            shutil.rmtree(path)


def read_state(folder: str | Path) -> dict[str, Any]:
    """`state.json` of a checkpoint.

    Raises:
        ValueError: it is missing, damaged, or of another format.
    """
    folder = Path(folder)
    state = _read_json(folder / "state.json")
    if state.get("format") != FORMAT or state.get("version") != VERSION:
        raise ValueError(
            f"expected a checkpoint of format {FORMAT} {VERSION}, "
            f"found {state.get('format')} {state.get('version')} in {folder}"
        )
    return state


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"not a checkpoint: {path.parent} has no {path.name}; expected <run>/checkpoints/<step>")
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"damaged checkpoint: {path} is not JSON ({error}); use an older one") from error
    if not isinstance(content, dict):
        raise ValueError(f"damaged checkpoint: {path} does not hold settings; use an older one")
    return content


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
) -> dict[str, Any]:
    """Put a checkpoint's values into the training objects, in place, and return its `state.json`.

    Every file's digest is compared before any of the objects is changed.

    Raises:
        ValueError: a file is missing, damaged, or of another architecture.
    """
    folder = Path(folder)
    state = read_state(folder)
    names = ("model.safetensors", "ema.safetensors", "optimizer.pt")
    model_file, ema_file, optimizer_file = (_verified(folder, name, state) for name in names)
    _load_weights(model, model_file)
    _load_weights(ema, ema_file)
    try:
        saved = torch.load(optimizer_file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"damaged checkpoint: cannot read {optimizer_file}; use an older one") from error
    optimizer.load_state_dict(saved["optimizer"])
    if scaler is not None and saved["scaler"] is not None:
        scaler.load_state_dict(saved["scaler"])
    return state


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
    model = SiT(SiTConfig.from_dict(_read_json(_verified(folder, "config.json", state))))
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
