"""`make bench`: the benchmarks that need no GPU, one after the other, so that none disturbs another.

python -m benchmarks.run                # all, and the README's table
python -m benchmarks.run loader crop    # some
"""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass

from analysis.timing import seconds_of
from benchmarks import table
from benchmarks.bench_data import crop, loader, npz
from benchmarks.bench_evaluations import frechet, neighbours, passes, trace_of_root
from benchmarks.bench_train import checkpoint, start, step, zero1
from benchmarks.record import ROOT, in_turn, record
from runtime import cli

ENTRY_POINTS = {
    "train": "train.py",
    "sample_ddp": "sample_ddp.py",
    "dump_latents": "preprocessing/dump_latents.py",
    "evaluate": "-m evaluations.evaluate",
}


def startup() -> None:
    """Seconds of `--help`, warm: the first call fills the page cache and is not counted."""
    for name, program in ENTRY_POINTS.items():
        command = [sys.executable, *program.split(), "--help"]
        call = functools.partial(subprocess.run, command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        (seconds,) = in_turn(call, times=3)
        record(f"startup/{name}_help", seconds, "s", bar="< 3 s")


def demo() -> None:
    """From images to judged samples: 8 minutes on 2 cores, 90% of digits recognised."""
    result = ROOT / "exps" / "demo"
    shutil.rmtree(result, ignore_errors=True)
    seconds = seconds_of(lambda: subprocess.run([sys.executable, "-m", "demo.run"], cwd=ROOT, check=True))
    summary = json.loads((result / "summary.json").read_text())
    record("demo/time", seconds, "s", bar="<= 480 s", stages=summary["seconds"])
    record("demo/recognised", summary["recognised"], "share of 1,000", bar=">= 0.90")


ALL = (startup, loader, crop, npz, checkpoint, zero1, step, start, passes, frechet, trace_of_root, neighbours, demo)
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
