"""Inputs of the evaluator's test vectors (`adm_golden_20.json`): seeded Inception weights, images and features.

The expected values are what openai/guided-diffusion's `evaluations/evaluator.py` gave on these very inputs. Everything
is drawn with numpy's PCG64, so that every machine gets the same arrays.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

EXPECTED = json.loads((Path(__file__).parent / "adm_golden_20.json").read_text())


def inception_state(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """{key: float32 array} for every key of `shapes`, in torch-fidelity's names, drawn in sorted order.

    Keys that end in 'num_batches_tracked' are skipped. The last block is scaled so that pooled features have about the
    size of the real network's.
    """
    rng = np.random.default_rng(seed)
    rules = {
        "fc.weight": lambda noise: 0.6 * noise,
        "fc.bias": lambda noise: noise,
        "conv.weight": lambda noise: noise * np.sqrt(2.0 / np.prod(noise.shape[1:])),
        "bn.weight": lambda noise: 1.0 + 0.1 * np.tanh(noise),
        "bn.bias": lambda noise: 0.2 * noise,
        "bn.running_mean": lambda noise: 0.1 * noise,
        "bn.running_var": lambda noise: 1.0 + 0.4 * np.tanh(noise),
    }
    state = {}
    for key in sorted(key for key in shapes if not key.endswith("num_batches_tracked")):
        noise = rng.standard_normal(tuple(shapes[key]))
        (rule,) = (rule for ending, rule in rules.items() if key.endswith(ending))
        value = rule(noise)
        if key.startswith("Mixed_7c.") and key.endswith(("bn.weight", "bn.bias")):
            value = value * 0.25
        state[key] = value.astype(np.float32)
    return state


def images(count: int, size: int, seed: int, shift: float = 0.0, contrast: float = 1.0) -> np.ndarray:
    """(count, size, size, 3) uint8: blocks of a random scale, colour and contrast, plus noise."""
    rng = np.random.default_rng(seed)
    pictures = np.empty((count, size, size, 3), dtype=np.uint8)
    for picture in pictures:
        cell = size // int(rng.choice([2, 4, 8, 16]))
        cells = -(-size // cell)
        blocks = np.kron(rng.standard_normal((cells, cells, 3)), np.ones((cell, cell, 1)))[:size, :size]
        colour, spread = rng.uniform(40, 215, 3), rng.uniform(5, 90)
        value = colour + spread * blocks + rng.uniform(0, 30) * rng.standard_normal((size, size, 3))
        picture[:] = np.clip((value - 128) * contrast + 128 + shift, 0, 255).astype(np.uint8)
    return pictures


def features(reference_count: int, sample_count: int, seed: int, width: int = 2048) -> tuple[np.ndarray, np.ndarray]:
    """Two float32 arrays (count, width) like pooled features, for precision and recall."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((40, width)) * 0.06

    def draw(count: int, spread: float, shift: float) -> np.ndarray:
        core = (rng.standard_normal((count, 40)) * spread) @ mix
        return np.maximum(0.4 + shift + core + 0.25 * rng.standard_normal((count, width)), 0).astype(np.float32)

    return draw(reference_count, 1.0, 0.0), draw(sample_count, 0.9, 0.005)
