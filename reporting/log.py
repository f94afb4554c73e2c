"""The run's own log, written whatever tracker is used: `log.jsonl` and `metrics.csv`, one row per logged step."""

from __future__ import annotations

import csv
import io
import json
import os
import warnings
from pathlib import Path

from runtime.files import write_atomically


class RunLog:
    """Appends rows to `log.jsonl` and `metrics.csv` of a run.

    Args:
        run_dir: existing directory.
        start_step: the step that the run resumes from. Rows of later steps, which a killed run had logged after its
            last checkpoint, are removed: those steps are done again, and each is logged once.
    """

    def __init__(self, run_dir: str | Path, start_step: int):
        self.jsonl, self.csv = Path(run_dir) / "log.jsonl", Path(run_dir) / "metrics.csv"
        rows = [row for row in read_log(run_dir) if row["step"] <= start_step]
        write_atomically(self.jsonl, "".join(json.dumps(row) + "\n" for row in rows))
        self._write_csv(rows)

    def write(self, row: dict[str, float]) -> None:
        """Append one row, which names its columns, to both files. A full disk is a warning: training continues."""
        try:
            _append(self.jsonl, json.dumps(row) + "\n")
            if row.keys() <= set(self.columns):
                _append(self.csv, self._lines([row]))
            else:
                self._write_csv(read_log(self.jsonl.parent))
        except OSError as error:
            warnings.warn(f"step {row['step']} is not in {self.jsonl.parent}'s log: {error.strerror}", stacklevel=2)

    def _write_csv(self, rows: list[dict]) -> None:
        """All rows, under all columns that any of them has."""
        self.columns = list(dict.fromkeys(name for row in rows for name in row))
        head = {name: name for name in self.columns}
        write_atomically(self.csv, self._lines([head, *rows]) if rows else "")

    def _lines(self, rows: list[dict]) -> str:
        text = io.StringIO(newline="")
        csv.DictWriter(text, self.columns, restval="").writerows(rows)
        return text.getvalue()


def _append(path: Path, text: str) -> None:
    """All of it, or nothing: readers stop at a line that was cut short."""
    size = path.stat().st_size
    try:
        with open(path, "a", newline="") as file:
            file.write(text)
    except OSError:
        os.truncate(path, size)
        raise


def read_log(run_dir: str | Path) -> list[dict[str, float]]:
    """The rows of a run's `log.jsonl`; a last line that a kill cut short is left out."""
    path = Path(run_dir) / "log.jsonl"
    rows = []
    for line in filter(None, path.read_text().split("\n")) if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
