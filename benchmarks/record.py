"""One result is one JSON line, with everything needed to judge it, in `benchmarks/results/`; and how it is measured."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from analysis.timing import seconds_of
from runtime import provenance

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"


def record(
    name: str,
    value: float | list[float],
    unit: str,
    baseline: float | list[float] | None = None,
    over_baseline: bool = False,
    **extra: Any,
) -> None:
    """Print a result and append it to `results/<first part of name>.jsonl`.

    Args:
        name: "area/what", such as "data/loader".
        value: measured, in `unit`; of several the median counts and the spread is kept.
        baseline: the same for the plain way, measured in the same run.
        over_baseline: the ratio is value / baseline, in place of baseline / value.
        extra: settings of the measurement, the bar it is held against.
    """
    for key, values in (("spread", value), ("spread_baseline", baseline)):
        extra |= {key: [min(values), max(values)]} if isinstance(values, list) else {}
    value, baseline = (statistics.median(v) if isinstance(v, list) else v for v in (value, baseline))
    ratio = baseline and (value / baseline if over_baseline else baseline / value)
    line = {"name": name, "value": value, "unit": unit, "baseline": baseline, "ratio": ratio}
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f"{name.split('/')[0]}.jsonl", "a") as file:
        file.write(json.dumps(line | extra | provenance.stamp()) + "\n")
    beside = f"; baseline {baseline:.6g} {unit}, ratio {ratio:.3g}" if baseline else ""
    print(f"{name}: {value:.6g} {unit}{beside} (bar: {extra.get('bar', 'none')})", flush=True)


def in_turn(*calls: Callable[[], Any], times: int) -> list[list[float]]:
    """Seconds of each call, one after the other so that a disturbance hits all; the first round is not counted."""
    rounds = [[seconds_of(call) for call in calls] for _ in range(1 + times)]
    return [list(column) for column in zip(*rounds[1:], strict=True)]


def in_own_process(function: Callable, *arguments: Any, processes: int = 1) -> Any:
    """What a function of a module gives for JSON values, computed by a new Python: for memory, and for start-up; or by
    several under torchrun, to all of which it gives the same."""
    code = "import json, sys; from {} import {} as f; print(json.dumps(f(*json.loads(sys.argv[1]))))"
    code = code.format(function.__module__, function.__name__)
    command = [sys.executable, "-c", code, json.dumps(arguments)]
    if processes > 1:
        command = [*torchrun(processes), "--no-python", *command]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def torchrun(processes: int) -> list[str]:
    """What starts so many processes of the program behind it, on this machine."""
    return [sys.executable, *f"-m torch.distributed.run --standalone --nproc_per_node={processes}".split()]


def memory(kind: str, process: int | str = "self") -> int:
    """Bytes of a process's memory, as Linux counts `kind`: VmRSS resident, VmHWM its peak, RssAnon not of files."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(kind))
