"""Programs as a user starts them: `--help` of each entry point, and the demo."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

from analysis.timing import seconds_of
from benchmarks.record import ROOT, in_turn, record

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
        (seconds,) = in_turn(
            lambda command=command: subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL), times=3
        )
        record(f"startup/{name}_help", seconds, "s", bar="< 3 s")


def demo() -> None:
    """From images to judged samples: 8 minutes on 2 cores, 90% of digits recognised."""
    result = ROOT / "exps" / "demo"
    shutil.rmtree(result, ignore_errors=True)
    seconds = seconds_of(lambda: subprocess.run([sys.executable, "-m", "demo.run"], cwd=ROOT, check=True))
    summary = json.loads((result / "summary.json").read_text())
    record("demo/time", seconds, "s", bar="<= 480 s", stages=summary["seconds"])
    record("demo/recognised", summary["recognised"], "share of 1,000", bar=">= 0.90")
