"""Waiting for the batches of a DataLoader: never for ever, and never longer than somebody wants the result."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing.queues
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

POLL = 5  # seconds after which a wait looks whether it is still wanted
PATIENCE = 600  # seconds without a batch after which it is given up
SHARED_MEMORY = Path("/dev/shm")


def loading(workers: int, start: Callable[[int], None] | None = None) -> dict[str, Any]:
    """The arguments of a DataLoader that is read by `wait_for_batches`.

    Args:
        workers: DataLoader workers.
        start: called in each of them with its number.
    """
    settings = {"timeout": POLL, "worker_init_fn": functools.partial(_start_worker, start)} if workers else {}
    return {"num_workers": workers} | settings


def _start_worker(start: Callable[[int], None] | None, worker: int) -> None:
    # A batch that cannot be handed over would be dropped by a thread, and waited for without end: end the worker.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_worker)
    if start:
        start(worker)


def _end_worker(error: BaseException, batch: Any) -> None:
    print(f"a DataLoader worker cannot hand over its batch: {error}", file=sys.stderr, flush=True)
    os._exit(1)


def wait_for_batches(loader: DataLoader, stopped: Callable[[], Any] = lambda: None) -> Iterator[Any]:
    """The batches of a loader that was made with `loading`, to be read within `worker_errors`; ends early, between two
    of them, once `stopped` says so.

    Raises:
        RuntimeError: none has come for `PATIENCE` seconds.
    """
    batches, last = iter(loader), time.monotonic()
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            if not str(error).startswith("DataLoader timed out"):
                raise
            if stopped():
                return
            if time.monotonic() - last > PATIENCE:
                raise RuntimeError(f"DataLoader workers gave no batch for {PATIENCE} s") from error
            continue
        yield batch
        last = time.monotonic()


@contextlib.contextmanager
def worker_errors(about: Callable[[], str] = lambda: "") -> Iterator[None]:
    """DataLoader workers that die, which torch says by an error wherever the main thread is, or hang: one line.

    Args:
        about: what was to be read, in words.

    Raises:
        ValueError: they do; names what helps.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith(("DataLoader worker", "Too many open files")):
            raise
        size = f", {shutil.disk_usage(SHARED_MEMORY).total / 2**20:.0f} MB" if SHARED_MEMORY.is_dir() else ""
        found = " ".join(str(error).partition(". ")[0].split()) + about()
        raise ValueError(
            f"expected batches from the DataLoader workers, found {found}; look at the memory, the disk of the data "
            f"and the shared memory ({SHARED_MEMORY}{size}: in a container give --ipc=host or --shm-size); or give "
            f"--num-workers 0"
        ) from error
