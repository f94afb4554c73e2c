"""The device of this rank, what ranks agree on, and async copies to the host."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from runtime.files import LOCK, full_disk_is_an_error, lock_directory

WITHOUT_FLOAT64 = ("mps",)  # types of devices


def choose_device(name: str | None) -> torch.device:
    """This rank's device, made the current one.

    Args:
        name: "cpu"; "cuda": the GPU of this rank; "cuda:N": that one; "mps": a Mac's; None: a GPU of CUDA's where there
            is one.

    Raises:
        ValueError: another name, or a GPU that is not there.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    if name == "mps":
        if not torch.backends.mps.is_available():
            raise ValueError("--device mps: expected a Mac whose torch has MPS, found none here; give --device cpu")
        return torch.device("mps")
    if not re.fullmatch(r"cuda(:\d+)?", name):
        raise ValueError(f"--device: expected cpu, cuda, cuda:N or mps, found {name}")
    number = int(name.partition(":")[2] or os.environ.get("LOCAL_RANK", "0"))
    if number >= torch.cuda.device_count():
        raise ValueError(
            f"--device: expected a GPU for each process, found {torch.cuda.device_count()} on this machine, and GPU "
            f"{number}, counted from 0, asked for; start fewer processes, or give --device cpu"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def at_best_float64(x: Tensor) -> Tensor:
    """In float64; in float32 on a device that lacks it."""
    return x.float() if x.device.type in WITHOUT_FLOAT64 else x.double()


def run_on_rank0(compute: Callable[[], Any]) -> Any:
    """What `compute` gives on rank 0, on every rank. An error is raised there; the other ranks exit with code 2."""
    if not dist.is_initialized():
        return compute()
    message: list = [None, None]  # result, error
    try:
        if dist.get_rank() == 0:
            message[0] = compute()
    except BaseException as error:
        message[1] = str(error) or repr(error)
        raise
    finally:
        dist.broadcast_object_list(message)
    if message[1] is not None:
        sys.exit(2)
    return message[0]


def gather_objects(value: Any) -> list[Any]:
    """What each rank has, in the order of ranks."""
    found = [value]
    if dist.is_initialized():
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, value)
    return found


def check_ranks_agree(values: dict[str, Any]) -> None:
    """Compare what each rank has found by itself, such as on a disk of its own.

    Raises:
        ValueError: one has found something else than rank 0; the message names which of the `values`.
    """
    found = gather_objects(values)
    for rank, other in enumerate(found):
        for name, value in other.items():
            if value != found[0][name]:
                raise ValueError(f"expected the same {name} on all ranks, found another on rank {rank} than on rank 0")


def barrier() -> None:
    """Return when every rank is here.

    Raises:
        ValueError: one of them has failed.
    """
    if dist.is_initialized():
        with peer_errors():
            dist.barrier()


@contextlib.contextmanager
def peer_errors() -> Iterator[None]:
    """An exchange with a process that has failed, which gloo says by an error, becomes one line.

    Raises:
        ValueError: the connection to another process was closed.
    """
    try:
        yield
    except RuntimeError as error:
        if not re.search(r"gloo.*(by peer|Broken pipe)", str(error)):
            raise
        raise ValueError("another process failed (see its message); the same command resumes") from error


@contextlib.contextmanager
def hold_directory(directory: Path, check: Callable[[Path], None] = lambda directory: None) -> Iterator[None]:
    """A directory, made if need be, that no other program writes to meanwhile: rank 0 locks it for all ranks. A disk
    that runs full is one line.

    Args:
        check: called by rank 0 before anything is made.

    Raises:
        ValueError: another program writes to it, or the disk is full; and what `check` raises.
    """
    locks: list = []

    def lock() -> None:
        check(directory)
        busy = f"another process writes to {directory}; wait for it, or choose another"
        locks.append(lock_directory(directory, busy))

    run_on_rank0(lock)
    try:
        with full_disk_is_an_error(directory):
            yield
    finally:
        for held in locks:
            (directory / LOCK).unlink(missing_ok=True)  # while it is held: later, it may be another program's
            held.release()
            with contextlib.suppress(OSError):
                directory.rmdir()  # if nothing was written to it


def copy_to_host_async(*tensors: Tensor) -> Callable[[], list[np.ndarray]]:
    """Begin copies to the host, in the current stream; the function returned waits for them, in any thread.

    So the device can work on meanwhile. Tensors of the CPU are handed through.
    """
    if not tensors[0].is_cuda:
        return lambda: [tensor.cpu().numpy() for tensor in tensors]
    copies = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    # Of the tensors' own device, whatever the current one is: there the copies are queued.
    copied = torch.cuda.current_stream(tensors[0].device).record_event()

    def wait() -> list[np.ndarray]:
        copied.synchronize()
        return [copy.numpy() for copy in copies]

    return wait


def compile_each(modules: Iterable[torch.nn.Module]) -> None:
    """torch.compile each module anew for each shape that it meets: a process may see many, of several models.

    A module inside DDP stays one graph: dynamo would split it where DDP's buckets end, so that their all-reduces begin
    earlier, but they begin between the modules anyway.
    """
    torch._dynamo.config.optimize_ddp = False
    torch._dynamo.config.cache_size_limit = torch._dynamo.config.accumulated_cache_size_limit = 10_000
    for module in modules:
        module.compile(fullgraph=True, dynamic=False)


def allow_tf32(allowed: bool) -> None:
    """Whether float32 products and convolutions may run in TF32 on the GPU."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
