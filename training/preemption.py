"""Being asked to stop: by Ctrl-C, or by a scheduler that takes the machine away."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType

import torch
import torch.distributed as dist

RESUMABLE = 75  # exit code (EX_TEMPFAIL of sysexits.h): stopped as asked, to be resumed
SECOND = 3  # seconds
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Catches SIGTERM, SIGUSR1 (as SLURM sends) and Ctrl-C, so that the current step can be ended and saved.

    A signal may reach one rank, or all at different steps. So in each step the ranks tell each other, on the host and
    in the background, and act on what was said in the step before: they stop at the same step, and none waits.
    A second Ctrl-C ends the process at once, as does any second signal `SECOND` later: the same one can reach a rank
    twice, from the launcher and with its process group.
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.pending: tuple[dist.Work, torch.Tensor] | None = None
        # No handler runs while the main thread waits in C++, for a rank that hangs, say: a thread is told, too.
        reading, self.wakeup = os.pipe()
        os.set_blocking(self.wakeup, False)
        signal.set_wakeup_fd(self.wakeup)
        threading.Thread(target=_end_at_second, args=(reading,), daemon=True).start()
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        os.write(2, f"{self.received.name}: ending the step, then saving\n".encode())  # print may be at work already

    def agreed(self, due: bool = False) -> tuple[signal.Signals | None, bool]:
        """The signal that all ranks now know of, and whether one has called something due. To be called once in each
        step by each of them."""
        if self.group is None:
            return self.received, due
        number, was_due = 0, False
        if self.pending is not None:
            work, told = self.pending
            work.wait()
            number, was_due = told.tolist()
        told = torch.tensor([int(self.received or 0), int(due)])
        self.pending = dist.all_reduce(told, dist.ReduceOp.MAX, group=self.group, async_op=True), told
        return signal.Signals(number) if number else None, bool(was_due)

    def close(self) -> None:
        """Leave the signals as they were, and no exchange open."""
        if self.pending is not None:
            self.pending[0].wait()
        signal.set_wakeup_fd(-1)
        os.write(self.wakeup, bytes(1))
        os.close(self.wakeup)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)


def _end_at_second(reading: int) -> None:
    """End the process at a signal that comes `SECOND` after the first one or later, as they are read from a pipe."""
    first = None
    while number := os.read(reading, 1)[0]:
        if number in SIGNALS:
            first = first or time.monotonic()
            if time.monotonic() - first > SECOND:
                os._exit(128 + number)
    os.close(reading)


def ignore_signals(worker: int) -> None:
    """For a DataLoader worker: its trainer ends it, not the signal that the whole process group may get."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def exit_code(number: signal.Signals) -> int:
    """Of a run that was stopped by a signal and saved: 130 for Ctrl-C as shells have it, else `RESUMABLE`."""
    return 130 if number == signal.SIGINT else RESUMABLE
