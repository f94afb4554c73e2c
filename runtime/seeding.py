"""Every random draw of the project as a pure function of (seed, step or index, purpose).

No random state is ever saved: a resumed run, or a run on another number of processes, asks for the same generators
again and gets the same numbers. Purposes are short names ("noise", "time", ...); two purposes never share a stream.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def _digest(kind: str, seed: int, index: int, purpose: str) -> bytes:
    """16 bytes that depend on all four parts, so that neighbouring seeds or steps give unrelated streams."""
    return hashlib.blake2b(f"{kind}/{seed}/{index}/{purpose}".encode(), digest_size=16).digest()


def _torch_generator(kind: str, seed: int, index: int, purpose: str, device: str | torch.device) -> torch.Generator:
    state = int.from_bytes(_digest(kind, seed, index, purpose)[:8], "little")
    return torch.Generator(device).manual_seed(state)


def step_generator(seed: int, step: int, purpose: str, device: str | torch.device = "cpu") -> torch.Generator:
    """Generator for the draws of one training step (counted from 0), made for the whole global batch.

    CPU and CUDA generators of one (seed, step, purpose) give different numbers: results repeat per type of device.
    """
    return _torch_generator("step", seed, step, purpose, device)


def block_generator(seed: int, block: int, purpose: str, device: str | torch.device = "cpu") -> torch.Generator:
    """Generator for one fixed block of sampled images, so that any division of blocks over processes gives the same."""
    return _torch_generator("block", seed, block, purpose, device)


def numpy_generator(seed: int, index: int, purpose: str) -> np.random.Generator:
    """NumPy generator (Philox, a 128-bit key) for draws made on the host: the order of samples, labels."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(_digest("numpy", seed, index, purpose), "little")))
