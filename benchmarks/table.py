"""Writes the README's tables of measurements and predictions from `benchmarks/results/`, so that no number in them is
typed by hand.

    python -m benchmarks.table

`table.md.j2` says which results it has, how they are shown, and where the bar is a number in the record, which.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import jinja2

from benchmarks.record import RESULTS, ROOT

README = ROOT / "README.md"
BEGIN, END = "<!-- measured: by python -m benchmarks.table -->", "<!-- /measured -->"


def total(found: dict[str, Any], prefix: str) -> Counter:
    """The sums of the counts of `make bench-faults` whose names begin with a prefix."""
    return sum((Counter(counts) for name, counts in found.items() if name.startswith(prefix)), Counter())


def table() -> str:
    """The table as Markdown, between its marks."""
    files = sorted(RESULTS.glob("*.jsonl"))
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    records = {record["name"]: record for record in lines}  # the last of each
    faults, gpu = json.loads((RESULTS / "reliability.json").read_text()), RESULTS / "gpu.json"
    text, environment = Path(__file__).with_name("table.md.j2").read_text(), jinja2.Environment()
    rows = environment.from_string(text).render(
        records=records,
        shown=[record for name, record in records.items() if f'"{name}"' in text],
        keeps=lambda bar, record: environment.compile_expression(bar)(**record),
        kills=total(faults, "kills_"),
        disturbed=total(faults, "disturbed_"),
        harm=total(faults, "harm_"),
        soak=faults["soak"],
        gpu=json.loads(gpu.read_text()) if gpu.is_file() else {},
        audit=json.loads((RESULTS / "cuda_audit.json").read_text()),
    )
    return "\n".join([BEGIN, rows, END])


def main() -> None:
    text = README.read_text()
    README.write_text(text.split(BEGIN)[0] + table() + text.split(END)[1])
    print(table())


if __name__ == "__main__":
    main()
