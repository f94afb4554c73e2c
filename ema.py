"""The exponential moving average of the weights, from which samples are drawn."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * model for every parameter, in one fused pass; buffers are copied.

    Args:
        ema: the average; changed in place. Same architecture as `model`.
        model: the module being trained.
        decay: in [0, 1].

    Raises:
        AssertionError: the modules do not have the same parameters and buffers.
    """
    averages, weights = dict(ema.named_parameters()), dict(model.named_parameters())
    assert averages.keys() == weights.keys(), "EMA and model have different parameters"
    torch._foreach_lerp_(list(averages.values()), list(weights.values()), 1 - decay)
    buffers, current = dict(ema.named_buffers()), dict(model.named_buffers())
    assert buffers.keys() == current.keys(), "EMA and model have different buffers"
    for name, buffer in buffers.items():
        buffer.copy_(current[name])
