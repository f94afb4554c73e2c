"""Writes the README's table of measurements from `benchmarks/results/`, so that no number in it is typed by hand.

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
TEMPLATE = Path(__file__).with_name("table.md.j2")
BEGIN, END = "<!-- measured: by python -m benchmarks.table -->", "<!-- /measured -->"


def latest() -> dict[str, dict[str, Any]]:
    """The last record of each result."""
    files = sorted(RESULTS.glob("*.jsonl"))
    records = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return {record["name"]: record for record in records}


def total(found: dict[str, Any], prefix: str) -> Counter:
    """The sums of the counts of `make bench-faults` whose names begin with a prefix."""
    return sum((Counter(counts) for name, counts in found.items() if name.startswith(prefix)), Counter())


def table() -> str:
    """The table as Markdown, between its marks."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined)
    records, shown = latest(), []

    def row(what: str, name: str, form: str, bar: str) -> str:
        record = records[name]
        shown.append(record)
        missed = ""
        if not environment.compile_expression(bar)(**record):
            # Until November 2026 records called it "held_by".
            reason = record.get("bottleneck") or record.get("held_by") or "see its record"
            missed = f" (**bar missed**: {reason})"
        return f"| {what.format(**record)} | {form.format(**record)}{missed} | {record['bar']} |"

    gpu_file = RESULTS / "gpu.json"
    gpu = json.loads(gpu_file.read_text()) if gpu_file.is_file() else {}

    def gpu_row(what: str, name: str, form: str, bar: str) -> str:
        model = gpu["settings"]["models"][0] if gpu else "SiT-XL/2"
        found = gpu.get("results", {}).get(name.format(model=model), {"not_measured": True})
        text = "not measured" if "not_measured" in found else form.format(**found)
        return f"| {what.format(model=model)}, on {gpu.get('machine', 'one H100')} | {text} | {bar} |"

    faults = json.loads((RESULTS / "reliability.json").read_text())
    kills, harm = total(faults, "kills_"), total(faults, "harm_")
    template = environment.from_string(TEMPLATE.read_text())
    rows = template.render(row=row, gpu_row=gpu_row, kills=kills, harm=harm, soak=faults["soak"])
    machines, days = (sorted({record[key] for record in shown}) for key in ("machine", "date"))
    first, last = days[0][:10], days[-1][:10]
    heading = (
        f"On {' and '.join(machines)}, no GPU, {first if first == last else f'{first} to {last}'}; versions, "
        f"revisions and spread are in `benchmarks/results/`."
    )
    return "\n".join([BEGIN, heading, "", rows, END])


def main() -> None:
    text = README.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    README.write_text(before + table() + after)
    print(table())


if __name__ == "__main__":
    main()
