"""One result, one JSON line, with everything needed to judge it, in `benchmarks/results/`."""

from __future__ import annotations

import json
from pathlib import Path

from runtime import provenance

RESULTS = Path(__file__).resolve().parent / "results"


def record(
    name: str, value: float, unit: str, baseline: float | None = None, ratio: float | None = None, **extra
) -> dict:
    """Print a result and append it to `results/<first part of name>.jsonl`.

    Args:
        name: "area/what", such as "data/loader".
        value: the measured figure, in `unit`.
        baseline: figure of the plain way, measured in the same run, in the same unit.
        ratio: how many times better than the baseline.
        extra: settings of the measurement, spread, the bar it is held against.
    """
    line = {"name": name, "value": value, "unit": unit, "baseline": baseline, "ratio": ratio}
    line |= extra | provenance.stamp()
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f"{name.split('/')[0]}.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    bar = f" (bar: {extra['bar']})" if "bar" in extra else ""
    beside = "" if baseline is None else f"; baseline {baseline:.6g} {unit}, ratio {ratio:.3g}"
    print(f"{name}: {value:.6g} {unit}{beside}{bar}", flush=True)
    return line
