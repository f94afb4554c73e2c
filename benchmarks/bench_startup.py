"""`--help` of every entry point, warm: bar 3 s each."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.record import record

ROOT = Path(__file__).resolve().parent.parent
ENTRY_POINTS = {
    "train": ["train.py"],
    "sample_ddp": ["sample_ddp.py"],
    "dump_latents": ["preprocessing/dump_latents.py"],
    "evaluate": ["-m", "evaluations.evaluate"],
}


def main() -> None:
    for name, command in ENTRY_POINTS.items():
        seconds = []
        for _ in range(4):
            begin = time.perf_counter()
            subprocess.run([sys.executable, *command, "--help"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            seconds.append(time.perf_counter() - begin)
        warm = seconds[1:]  # the first call fills the page cache
        record(f"startup/{name}_help", statistics.median(warm), "s", spread=[min(warm), max(warm)], bar="< 3 s")


if __name__ == "__main__":
    main()
