"""`make bench`: the benchmarks that need no GPU, one after the other, so that none disturbs another.

python -m benchmarks.run                # all, and the README's table
python -m benchmarks.run loader crop    # some
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

from benchmarks import table
from benchmarks.bench_data import crop, loader
from benchmarks.bench_evaluations import frechet, neighbours, passes, trace_of_root
from benchmarks.bench_programs import demo, startup
from benchmarks.bench_sampling import npz
from benchmarks.bench_train import checkpoint, start, step
from benchmarks.record import ROOT
from runtime import cli

ALL = (startup, loader, crop, npz, checkpoint, step, start, passes, frechet, trace_of_root, neighbours, demo)
BENCHES = {bench.__name__: bench for bench in ALL}


@dataclass(frozen=True)
class RunConfig:
    names: tuple[str, ...] = cli.flag(tuple(BENCHES), "what to measure", choices=tuple(BENCHES), positional=True)


def main(argv: list[str] | None = None) -> None:
    names = cli.parse(RunConfig, argv, __doc__).names
    if len(names) == 1:
        BENCHES[names[0]]()
        return
    # A process for each: one must not find another's memory, caches and threads.
    commands = {name: [sys.executable, "-m", "benchmarks.run", name] for name in names}
    failed = [name for name, command in commands.items() if subprocess.run(command, cwd=ROOT).returncode]
    table.main()
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    cli.run(main)
