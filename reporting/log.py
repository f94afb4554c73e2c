"""The run's own log, written whatever tracker is used: `log.jsonl` and `metrics.csv`, one row per logged step."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import TextIO

from runtime.files import write_atomically


class RunLog:
    """Appends rows to `log.jsonl` and `metrics.csv` of a run.

    Args:
        run_dir: existing directory.
        start_step: the step that the run resumes from. Rows of later steps, which a killed run had logged after its
            last checkpoint, are removed: those steps are done again, and each is logged once.
    """

    def __init__(self, run_dir: str | Path, start_step: int):
        self.files = {Path(run_dir) / "log.jsonl": _write_jsonl, Path(run_dir) / "metrics.csv": _write_csv}
        rows = [row for row in read_log(run_dir) if row["step"] <= start_step]
        for path, write in self.files.items():
            text = io.StringIO(newline="")
            write(text, rows)
            write_atomically(path, text.getvalue())

    def write(self, row: dict[str, float]) -> None:
        """Append one row, which names its columns, to both files."""
        for path, write in self.files.items():
            with open(path, "a", newline="") as file:
                write(file, [row])


def read_log(run_dir: str | Path) -> list[dict[str, float]]:
    """The rows of a run's `log.jsonl`; a last line that a kill cut short is left out."""
    path = Path(run_dir) / "log.jsonl"
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _write_jsonl(file: TextIO, rows: list[dict]) -> None:
    file.writelines(json.dumps(row) + "\n" for row in rows)


def _write_csv(file: TextIO, rows: list[dict]) -> None:
    if rows:
        writer = csv.DictWriter(file, rows[0])
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(rows)
