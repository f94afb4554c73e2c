"""Progress that reads well on a terminal and in a log file."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

SECONDS = 30  # between two lines in a log file


class Lines:
    """A text file in which each state of a bar is a line of its own."""

    def __init__(self, file: Any):
        self.file = file

    def write(self, text: str) -> None:
        if text.strip():
            self.file.write(text.strip() + "\n")

    def flush(self) -> None:
        self.file.flush()


class Progress(tqdm):
    """A bar of tqdm's where stderr is a terminal; else a line every `SECONDS`: what is done, rate, time left."""

    def __init__(self, *arguments: Any, **settings: Any):
        if not sys.stderr.isatty():
            line = "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, {remaining} left{postfix}"
            settings |= {"file": Lines(sys.stderr), "bar_format": line, "ascii": True}
            settings |= {"mininterval": SECONDS, "maxinterval": SECONDS, "miniters": 1}
        super().__init__(*arguments, dynamic_ncols=True, **settings)
