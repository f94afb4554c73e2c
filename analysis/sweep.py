"""Train, sample and measure every row of a table of settings, with several seeds, and write one table of the results.

    python -m analysis.sweep data/imagenet256 --reference VIRTUAL_imagenet256_labeled.npz --processes 8

Each row and seed is a run of its own, `<output-dir>/<row>-seed<seed>`: train.py, then sample_ddp.py with --evaluate.
The same command resumes a stopped sweep; what is finished is not run again. The table is written anew after each run.
"""

from __future__ import annotations

import csv
import json
import math
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it can be started as a file

from reporting.values import markdown_table
from runtime import cli
from runtime.cli import REQUIRED, check, flag
from runtime.files import to_json, write_atomically

ROOT = Path(__file__).resolve().parent.parent
PAPER_METRICS = ("fid", "sfid", "is", "precision", "recall")  # the order of `paper` in a table


@dataclass(frozen=True)
class SweepConfig:
    """Settings of a sweep."""

    data_dir: str = flag(REQUIRED, "latent store that every run is trained on", group="what to run", positional=True)
    reference: str = flag(REQUIRED, "what sample_ddp.py --evaluate takes", group="what to run")
    table: str = flag("analysis/ablations.yaml", "YAML with the rows", group="what to run")
    rows: tuple[str, ...] | None = flag(None, "rows to run, by name (default: all)", group="what to run", metavar="ROW")
    seeds: tuple[int, ...] = flag((0,), "seeds of training, one run each", group="what to run", metavar="SEED")
    train: str = flag("", "more flags of train.py for every run, in one string", group="what to run")
    sample: str = flag("", "more flags of sample_ddp.py for every run, in one string", group="what to run")
    output_dir: str = flag("exps/ablations", "directory of the runs, table.csv and table.md", group="how to run")
    processes: int = flag(1, "processes (GPUs) of each run", group="how to run")

    def __post_init__(self):
        check(self, "processes", self.processes >= 1, "at least 1")
        different = len(set(self.seeds)) == len(self.seeds) and min(self.seeds) >= 0
        check(self, "seeds", different, "different numbers from 0 on")


def read_table(path: str | Path) -> dict[str, Any]:
    """`train` and `sample` (flags by name) and `rows` ({name: {"flags", "paper"}}) of a table.

    Raises:
        ValueError: it cannot be read, or has another form.
    """
    try:
        table = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"--table: expected a YAML file, found {path} ({reason})") from error
    rows = table.get("rows") if isinstance(table, dict) else None
    if not (rows and isinstance(rows, dict) and all(isinstance(r, dict) and "flags" in r for r in rows.values())):
        raise ValueError(f"--table: expected `rows:` of `name: {{flags: {{...}}}}`, found another form in {path}")
    for name, row in rows.items():
        if len(row.get("paper", PAPER_METRICS)) != len(PAPER_METRICS):
            raise ValueError(f"--table: expected 5 numbers in `paper` of {name}, found {row['paper']}")
    return {"train": {}, "sample": {}} | table


def as_flags(settings: dict[str, Any]) -> list[str]:
    """Settings as a command line."""
    flags = []
    for name, value in settings.items():
        flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return flags


def train_command(config: SweepConfig, table: dict[str, Any], row: str, seed: int) -> list[str]:
    """Training of one row with one seed; a later flag wins over an earlier one."""
    flags = [*as_flags(table["train"]), *shlex.split(config.train), *as_flags(table["rows"][row]["flags"])]
    own = {"data-dir": config.data_dir, "output-dir": config.output_dir, "exp-name": f"{row}-seed{seed}", "seed": seed}
    return [*launch(config, "train.py"), *flags, *as_flags(own)]


def sample_command(config: SweepConfig, table: dict[str, Any], checkpoint: Path, output: Path) -> list[str]:
    """Samples of a checkpoint, measured as they are drawn."""
    flags = [*as_flags(table["sample"]), *shlex.split(config.sample)]
    own = {"checkpoint": checkpoint, "output-dir": output, "evaluate": config.reference}
    return [*launch(config, "sample_ddp.py"), *flags, *as_flags(own), "--no-npz"]


def launch(config: SweepConfig, program: str) -> list[str]:
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={config.processes}"]
    return [sys.executable, *(several if config.processes > 1 else []), str(ROOT / program)]


def run_one(config: SweepConfig, table: dict[str, Any], row: str, seed: int) -> None:
    """Train and measure one row with one seed, unless the same commands have finished.

    Raises:
        ValueError: one of them failed.
    """
    directory = Path(config.output_dir) / f"{row}-seed{seed}"
    record = directory / "sweep.json"
    train = train_command(config, table, row, seed)
    settings = {"train": train, "sample": sample_command(config, table, directory, directory)}
    if record.is_file() and json.loads(record.read_text())["settings"] == settings:
        return
    record.unlink(missing_ok=True)
    run_command(f"{row}, seed {seed}: training", train)
    steps = [path for path in (directory / "checkpoints").iterdir() if path.name.isdigit()]
    newest = max(steps, key=lambda path: int(path.name))
    output = directory / f"evaluation-{newest.name}"
    run_command(f"{row}, seed {seed}: sampling", sample_command(config, table, newest, output))
    write_atomically(record, to_json({"settings": settings, "metrics": str(output / "metrics.json")}))


def run_command(title: str, command: list[str]) -> None:
    print(f"=== {title}\n{shlex.join(command)}", flush=True)
    code = subprocess.run(command).returncode
    if code:
        raise ValueError(f"{title} ended with code {code} (its message is above); the same command resumes the sweep")


def results(config: SweepConfig, table: dict[str, Any]) -> list[dict[str, Any]]:
    """A line per row with a finished run: mean and std of each metric over its seeds, and the paper's values."""
    lines = []
    for row in config.rows or table["rows"]:
        # Each metric of each finished seed.
        measured: dict[str, list[float]] = {}
        steps = set()
        for seed in config.seeds:
            record = Path(config.output_dir) / f"{row}-seed{seed}" / "sweep.json"
            if record.is_file():
                metrics = json.loads(Path(json.loads(record.read_text())["metrics"]).read_text())
                steps.add(metrics["sampling"]["settings"]["step"])
                for name, value in metrics["metrics"].items():
                    measured.setdefault(name, []).append(value)
        if not measured:
            continue

        line = {"row": row, "flags": shlex.join(as_flags(table["rows"][row]["flags"]))}
        line |= {"steps": "/".join(map(str, sorted(steps))), "seeds": max(map(len, measured.values()))}
        for name, values in measured.items():
            line[name] = statistics.fmean(values)
            line[f"{name} std"] = statistics.stdev(values) if len(values) > 1 else math.nan
        paper = zip(PAPER_METRICS, table["rows"][row].get("paper", ()), strict=False)
        lines.append(line | {f"{name} (paper)": value for name, value in paper})
    return lines


def write_table(lines: list[dict[str, Any]], directory: Path) -> None:
    """`table.csv` with every number, and `table.md` to read."""
    columns = list(dict.fromkeys(name for line in lines for name in line))
    with open(directory / "table.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        for line in lines:
            writer.writerow({name: "" if value != value else value for name, value in line.items()})  # no NaN

    def cell(line: dict[str, Any], name: str) -> str:
        value, std = line.get(name, ""), line.get(f"{name} std", math.nan)
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        return text if math.isnan(std) else f"{text} ± {std:.2g}"

    head = [name for name in columns if not name.endswith(" std")]
    note = "Mean ± std over seeds. Columns marked (paper) are the paper's: SiT-B/2 on ImageNet, 400,000 steps."
    body = markdown_table(head, [[cell(line, name) for name in head] for line in lines])
    (directory / "table.md").write_text(f"{body}\n\n{note}\n")


def main(argv: list[str] | None = None) -> None:
    config = cli.parse(SweepConfig, argv, __doc__)
    path = Path(config.table)
    table = read_table(path if path.is_file() else ROOT / path)
    rows = config.rows or table["rows"]
    check(config, "rows", all(row in table["rows"] for row in rows), f"some of {', '.join(table['rows'])}")
    for name in ("data_dir", "reference"):  # refused now, not after the first run's days of training
        check(config, name, Path(getattr(config, name)).exists(), "a file or directory that exists")
    directory = Path(config.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    for seed in config.seeds:  # whole tables first: the first seed's is there early
        for row in rows:
            run_one(config, table, row, seed)
            write_table(results(config, table), directory)
    print((directory / "table.md").read_text(), flush=True)


if __name__ == "__main__":
    cli.run(main)
