"""`make bench`: every benchmark that runs on a CPU, one after the other, so that none disturbs another."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks import table

MODULES = (
    "bench_startup",
    "bench_data",
    "bench_npz",
    "bench_checkpoint",
    "bench_train",
    "bench_evaluations",
    "bench_demo",
)


def main() -> None:
    failed = []
    for module in MODULES:
        print(f"--- {module}", flush=True)
        # A process of its own: memory figures are the process's largest, and must not be another benchmark's.
        command = [sys.executable, "-m", f"benchmarks.{module}"]
        if subprocess.run(command, cwd=Path(__file__).resolve().parent.parent).returncode:
            failed.append(module)
    table.main()
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
