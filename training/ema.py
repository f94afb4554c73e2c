"""The exponential moving average (EMA) of the weights, from which samples are drawn."""

from __future__ import annotations

import torch
from torch import nn


class EMAUpdater:
    """ema <- decay * ema + (1 - decay) * model for every parameter, in one fused pass; buffers are copied.

    The tensors are looked up once: a step of a large model must not spend its time on walking through modules.

    Args:
        ema: changed in place. Same architecture as `model`.
        model: the module being trained. Its parameters must stay the same objects.
        decay: in [0, 1].

    Raises:
        AssertionError: the modules do not have the same parameters and buffers.
    """

    def __init__(self, ema: nn.Module, model: nn.Module, decay: float):
        parameters, weights = dict(ema.named_parameters()), dict(model.named_parameters())
        assert parameters.keys() == weights.keys(), "EMA and model have different parameters"
        buffers, current = dict(ema.named_buffers()), dict(model.named_buffers())
        assert buffers.keys() == current.keys(), "EMA and model have different buffers"
        self.decay = decay
        self.parameters, self.weights = list(parameters.values()), list(weights.values())
        self.buffers = [(buffer, current[name]) for name, buffer in buffers.items()]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the model's present weights."""
        torch._foreach_lerp_(self.parameters, self.weights, 1 - self.decay)
        for buffer, current in self.buffers:
            buffer.copy_(current)
