"""Waiting for the batches of a DataLoader: never for ever, and never longer than somebody wants the result."""

from __future__ import annotations

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

    def start_worker(worker: int) -> None:
        # A batch that cannot be handed over would be dropped by a thread, and waited for without end: end the worker.
        multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_worker)
        if start:
            start(worker)

    return {"num_workers": workers} | ({"timeout": POLL, "worker_init_fn": start_worker} if workers else {})


def _end_worker(error: BaseException, batch: Any) -> None:
    print(f"a DataLoader worker cannot hand over its batch: {error}", file=sys.stderr, flush=True)
    os._exit(1)


def wait_for_batches(
    loader: DataLoader, stopped: Callable[[], Any] = lambda: None, about: Callable[[], str] = lambda: ""
) -> Iterator[Any]:
    """The batches of a loader that was made with `loading`; ends early, between two of them, once `stopped` says so.

    Args:
        about: what was to be read, for errors.

    Raises:
        ValueError: a worker died, or none has given anything for `PATIENCE` seconds.
    """
    batches, last = iter(loader), time.monotonic()
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            timed_out = str(error).startswith("DataLoader timed out")
            if timed_out and stopped():
                return
            if timed_out and time.monotonic() - last < PATIENCE:
                continue
            if timed_out or str(error).startswith("DataLoader worker"):
                reason = f"no batch for {PATIENCE} s" if timed_out else " ".join(str(error).split())[:160]
                raise ValueError(worker_error(reason, about())) from error
            raise
        yield batch
        last = time.monotonic()


def worker_error(reason: str, about: str = "") -> str:
    """What to say of DataLoader workers that died or hang, and what helps."""
    room = f", {shutil.disk_usage(SHARED_MEMORY).free / 2**20:.0f} MB free" if SHARED_MEMORY.is_dir() else ""
    return (
        f"expected batches from the DataLoader workers, found {reason}{about}; look at the memory, the disk of the "
        f"data and the shared memory ({SHARED_MEMORY}{room}: in a container give --ipc=host or --shm-size); or give "
        f"--num-workers 0"
    )
