"""Write one self-contained HTML page about one or several runs: curves, samples over time, metrics, settings.

    python -m analysis.report exps/b2
    python -m analysis.report exps/b2-plain exps/b2 --output b2.html
    python -m analysis.report exps/demo/run --samples exps/demo/samples exps/demo/metrics.json

Sets of samples below a run's directory are found by themselves. The page works from any place without a network; for a
run in training, the same command writes a new one.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it can be started as a file

from reporting.report import write_report
from runtime import cli
from runtime.cli import REQUIRED, flag

_what = partial(flag, group="what to report on")


@dataclass(frozen=True)
class ReportConfig:
    """What to report on, and where."""

    runs: tuple[str, ...] = _what(REQUIRED, "directories of runs", metavar="RUN", positional=True)
    samples: tuple[str, ...] = _what((), "more samples: their directories, or their metrics.json", metavar="PATH")
    output: str | None = flag(None, "the page; by default <run>/report.html", group="result", metavar="HTML")


def main(argv: list[str] | None = None) -> None:
    config = cli.parse(ReportConfig, argv, __doc__)
    begin = time.perf_counter()
    directory = Path(config.runs[0]) if len(config.runs) == 1 else Path()
    output = Path(config.output) if config.output else directory / "report.html"
    write_report([Path(run) for run in config.runs], output, [Path(path) for path in config.samples])
    print(f"{output}: {output.stat().st_size / 1e6:.2f} MB, {time.perf_counter() - begin:.1f} s")


if __name__ == "__main__":
    cli.run(main)
