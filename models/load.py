"""Any checkpoint to a SiT: ours, and files of SiT's, REPA's and SRA's. `training/checkpoint.py` writes ours.

    <run>/checkpoints/0400000/
        config.json          settings of the SiT
        ema.safetensors      the EMA of the SiT: what is sampled from
        model.safetensors    SiT and heads as trained
        optimizer.pt         optimizer state, tensors and plain values only
        state.json           step, settings of the run, latent scale, versions, git revision, SHA-256 of each file

Nothing is ever unpickled: weights are safetensors, and files of torch's are read with `weights_only=True`.
"""

from __future__ import annotations

import argparse
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from models.convert import FORMATS, convert_state_dict
from models.sit import SiT, SiTConfig
from models.vae import UNKNOWN_VAE, LatentScale
from runtime.files import read_checksummed_json, sha256

FORMAT = "vae-repa-checkpoint"


VERSION = 1


def checkpoints(run_dir: str | Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    folder = Path(run_dir) / "checkpoints"
    found = [path for path in folder.glob("*") if path.name.isdigit() and (path / "state.json").is_file()]
    return sorted(found, key=lambda path: int(path.name))


def latest_checkpoint(run_dir: str | Path) -> Path | None:
    """The finished checkpoint with the most steps, or None."""
    return next(reversed(checkpoints(run_dir)), None)


def read_state(folder: str | Path) -> dict[str, Any]:
    """`state.json` of a checkpoint.

    Raises:
        ValueError: it is missing, damaged, or of another format.
    """
    folder = Path(folder)
    if not (folder / "state.json").is_file():
        raise ValueError(f"not a checkpoint: {folder} has no state.json; expected <run>/checkpoints/<step>")
    try:
        state = read_checksummed_json(folder / "state.json")
    except ValueError as error:  # of JSON and of UTF-8, too
        raise ValueError(f"damaged checkpoint: {folder / 'state.json'}: {error}; use an older one") from error
    if state.get("format") != FORMAT or state.get("version") != VERSION:
        raise ValueError(
            f"expected a checkpoint of format {FORMAT} {VERSION}, "
            f"found {state.get('format')} {state.get('version')} in {folder}"
        )
    return state


def verified_file(folder: Path, name: str, state: dict[str, Any]) -> Path:
    """Path of one of the checkpoint's files, once its digest has been compared."""
    path, expected = folder / name, state["digests"].get(name)
    if expected is None or not path.is_file():
        raise ValueError(f"damaged checkpoint: {path} is missing; use an older one")
    found = sha256(path)
    if found != expected:
        raise ValueError(
            f"damaged checkpoint: {path} has SHA-256 {found[:12]}..., expected {expected[:12]}...; use an older one"
        )
    return path


def load_weights(module: nn.Module, path: Path) -> None:
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"damaged checkpoint: cannot read {path} ({error}); use an older one") from error
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit the model: {' '.join(str(error).split())[:300]}") from error


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
    model = SiT(SiTConfig.from_dict(json.loads(verified_file(folder, "config.json", state).read_text())))
    load_weights(model, verified_file(folder, "ema.safetensors", state))
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
        "digest": sha256(path),
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
