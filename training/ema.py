"""The exponential moving averages (EMAs) of the weights, from which samples are drawn.

A decay is a function of k, the steps before: constant, constant behind a warm-up, or the power function of EDM2 (Karras
et al., arXiv 2312.02696, Section 3.1), whose width stays the same share of the run. Averages of several widths can be
combined to one of another width after training (Section 3.2): `analysis/posthoc_ema.py`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import nn

from models.load import HEADS
from runtime.files import write_atomically
from training.config import TrainConfig

Decay = Callable[[int], float]
POWER = "ema-power-"  # before the relative width, in names of EMAs


def decays(config: TrainConfig) -> dict[str, Decay]:
    """The decay of each EMA of a run by name, the first one "ema"; its weights are `<name>.safetensors`."""

    def constant(decay: float) -> Decay:
        if config.ema_warmup:
            return lambda k: min(decay, (1 + k) / (10 + k))
        return lambda k: decay

    first, *others = config.ema_decay
    named = {"ema": constant(first)} | {f"ema-{decay:g}": constant(decay) for decay in others}
    return named | {f"{POWER}{sigma:g}": power_decay(gamma_of(sigma)) for sigma in config.ema_power}


def power_decay(gamma: float) -> Decay:
    """beta_t = (1 - 1/t)^(gamma + 1) of step t = k + 1: the first one takes the weights over."""
    return lambda k: (1 - 1 / (k + 1)) ** (gamma + 1)


def gamma_of(sigma_rel: float) -> float:
    """The exponent of the power function whose relative width is `sigma_rel` in (0, 0.288): the width is
    sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3)), and gamma the largest root (EDM2, Appendix C)."""
    roots = np.roots([1, 7, 16 - sigma_rel**-2, 12 - sigma_rel**-2])
    return float(roots.real.max())


def save_snapshots(run_dir: Path, step: int, emas: Mapping[str, nn.Module]) -> None:
    """Keep the power functions' EMAs as they are after `step` steps, in float16, for `analysis/posthoc_ema.py`.

    A full disk is a warning: training continues.
    """
    for name, ema in emas.items():
        if name.startswith(POWER):
            weights = {key: value.half().cpu() for key, value in ema.state_dict().items()}
            directory = run_dir / "ema_snapshots" / name.removeprefix(POWER)
            try:
                directory.mkdir(parents=True, exist_ok=True)
                write_atomically(directory / f"{step:07d}.safetensors", save(weights))
            except OSError as error:
                warnings.warn(f"no EMA snapshot of step {step} in {directory}: {error}", stacklevel=2)


class EMAUpdater:
    """ema <- decay * ema + (1 - decay) * model for every parameter, in one fused pass each; buffers are copied.

    The tensors are looked up once: a step of a large model must not spend its time on walking through modules.

    Args:
        emas: changed in place. Same architecture as `model`.
        model: the module being trained. Its parameters must stay the same objects.
        decays: of each, by the steps before; values in [0, 1].

    Raises:
        AssertionError: the modules do not have the same parameters and buffers.
    """

    def __init__(self, emas: Iterable[nn.Module], model: nn.Module, decays: Iterable[Decay]):
        weights, current = dict(model.named_parameters()), dict(model.named_buffers())
        self.weights, self.decays, self.parameters, self.buffers = list(weights.values()), list(decays), [], []
        for ema in emas:
            parameters, buffers = dict(ema.named_parameters()), dict(ema.named_buffers())
            assert parameters.keys() == weights.keys(), "EMA and model have different parameters"
            assert buffers.keys() == current.keys(), "EMA and model have different buffers"
            self.parameters.append(list(parameters.values()))
            self.buffers += [(buffer, current[name]) for name, buffer in buffers.items()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step number `step`, from 0."""
        for parameters, decay in zip(self.parameters, self.decays, strict=True):
            torch._foreach_lerp_(parameters, self.weights, 1 - decay(step))
        for buffer, current in self.buffers:
            buffer.copy_(current)


def with_heads(
    emas: Mapping[str, nn.Module], sit: nn.Module, heads: Mapping[str, nn.Module], config: TrainConfig
) -> tuple[dict[str, nn.Module], EMAUpdater]:
    """The EMAs of `sit` and, beside each, that of `heads`, by names with `HEADS` (none of no heads); their updater."""
    heads = nn.ModuleDict(heads)
    copies = {name: copy.deepcopy(heads).eval().requires_grad_(False) for name in emas}
    pairs = [nn.ModuleList(pair) for pair in zip(emas.values(), copies.values(), strict=True)]
    updater = EMAUpdater(pairs, nn.ModuleList([sit, heads]), decays(config).values())
    return {**emas, **{HEADS + name: copied for name, copied in copies.items() if len(heads)}}, updater
