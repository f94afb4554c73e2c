"""The device of this rank, what ranks agree on, and async copies to the host."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


def choose_device(name: str | None) -> torch.device:
    """This rank's device, made the current one.

    Raises:
        ValueError: a GPU is asked for, and there is none for this rank.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"expected a GPU for each process, found {torch.cuda.device_count()} on this machine and process "
            f"{local_rank}, counted from 0; start fewer processes, or give --device cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def run_on_rank0(compute: Callable[[], Any]) -> Any:
    """What `compute` gives on rank 0, on every rank. An error is raised there; the other ranks exit with code 2."""
    if not dist.is_initialized():
        return compute()
    message: list = [None, None]  # result, error
    try:
        if dist.get_rank() == 0:
            message[0] = compute()
    except Exception as error:
        message[1] = str(error) or repr(error)
        raise
    finally:
        dist.broadcast_object_list(message)
    if message[1] is not None:
        sys.exit(2)
    return message[0]


def barrier() -> None:
    """Return when every rank is here.

    Raises:
        ValueError: one of them has failed.
    """
    if not dist.is_initialized():
        return
    try:
        dist.barrier()
    except RuntimeError as error:  # gloo: the connection was closed
        raise ValueError("another process failed (see its message); the same command resumes") from error


def copy_to_host_async(*tensors: Tensor) -> Callable[[], list[np.ndarray]]:
    """Begin copies to the host, in the current stream; the function returned waits for them, in any thread.

    So the device can work on meanwhile. Tensors of the CPU are handed through.
    """
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


def allow_tf32(allowed: bool) -> None:
    """Whether float32 products and convolutions may run in TF32 on the GPU."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
