"""Weights from files that others wrote: read without running code, and refused if they are not those of the model."""

from __future__ import annotations

import argparse
import hashlib
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn


def read_tensor_file(path: Path) -> dict[str, Any]:
    """The tensors and plain values of a .safetensors file, or of one of torch's (.pt, .pth, .ckpt).

    Training files of other projects also hold their command line, an `argparse.Namespace`: that one class is let
    through, which cannot run code, and no other.

    Raises:
        ValueError: it cannot be read as such, or holds no dictionary.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Mapped where the file can be: it may hold an optimizer's state, too, which nobody reads here.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, SafetensorError) as error:
        lines = [line for line in str(error).splitlines() if "nsupported" in line] or ["it is damaged, or no such file"]
        raise ValueError(
            f"expected tensors and plain values (.pt or .safetensors), found a file that cannot be read as such "
            f"({' '.join(lines[0].split())[:200]}); nothing in it was run"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"expected a dictionary of tensors, found a {type(content).__name__}")
    return content


def unwrap(content: dict[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """The state dict in a file's content, which may lie under one of `keys`, or under several in turn."""
    for key in keys:
        content = content[key] if isinstance(content.get(key), dict) else content
    return content


def load_exactly(model: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Put `tensors` into `model`, which is called `what` in errors.

    Raises:
        ValueError: names or shapes are not the model's; the first that differs is named.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"expected the tensors of {what}, found {len(wrong)} that are not: {name} is {found.get(name, 'absent')}, "
            f"there {expected.get(name, 'absent')}"
        )
    model.load_state_dict(tensors)


def state_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over sorted names and tensors as float32."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
