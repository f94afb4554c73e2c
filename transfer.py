"""Copies from the device to the host that nobody waits for before the numbers are needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


def start_copy(*tensors: Tensor) -> Callable[[], list[np.ndarray]]:
    """Begin copies to the host, in the current stream; the function returned waits for them, in any thread.

    So the device can go on meanwhile. Tensors of the CPU are handed through.
    """
    import torch  # here, so that entry points answer --help without waiting for it

    if not tensors[0].is_cuda:
        return lambda: [tensor.numpy() for tensor in tensors]
    copies = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> list[np.ndarray]:
        copied.synchronize()
        return [copy.numpy() for copy in copies]

    return wait
