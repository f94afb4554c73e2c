"""Check a latent store, a run or a set of samples: say what is wrong with it, and what to do.

    python -m analysis.doctor data/imagenet256
    python -m analysis.doctor exps/b2
    python -m analysis.doctor samples/b2

Everything is read: each file of a store, each checkpoint of a run. Exit code 0 if all is well, 1 if not.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it can be started as a file

from runtime import cli
from runtime.cli import REQUIRED, flag


@dataclass(frozen=True)
class DoctorConfig:
    """What to check."""

    path: str = flag(REQUIRED, "a latent store, a run, or a set of samples", group="what to check", positional=True)


if __name__ == "__main__":
    cli.parse_early(DoctorConfig, __doc__)  # answers --help and refuses wrong flags before torch is imported

import numpy as np
import torch

from dataset import LatentDataset
from models.load import checkpoints, load_sit
from reporting.runs import read_json
from runtime.files import sha256
from training.checkpoint import verify_checkpoint

SAMPLED = 2048  # latents of which the std is taken


@dataclass
class Finding:
    """One thing that was checked: all is well if `remedy` is empty."""

    text: str
    remedy: str = ""


def choose(well: bool, text: str, wrong: str, remedy: str) -> Finding:
    return Finding(text) if well else Finding(wrong, remedy)


def examine(path: str | Path) -> Iterator[Finding]:
    """All findings about a store, a run or a set of samples, as they are made.

    Raises:
        ValueError: the path is none of these.
    """
    directory = Path(path)
    if (directory / "partial" / "images.raw").is_file():
        raise ValueError(f"unfinished samples in {directory}: run the same command again to finish them")
    if (directory / "meta.json").is_file() or (directory / "partial").is_dir():
        return examine_store(directory)
    if any((directory / name).exists() for name in ("checkpoints", "log.jsonl", "config.json")):
        return examine_run(directory)
    if (directory / "samples.json").is_file():
        return examine_samples(directory)
    kinds = "a latent store (meta.json), a run (config.json) or samples (samples.json)"
    raise ValueError(f"expected {kinds}, found none in {directory}")


def examine_store(directory: Path) -> Iterator[Finding]:
    """Format, sizes, counts, labels, digests, and the std of the scaled latents."""
    try:
        store = LatentDataset(directory)
    except ValueError as error:
        yield Finding(str(error), "finish or repeat the dump with the same command")
        return
    yield Finding(f"{len(store):,} images of {store.num_classes} classes, latents {store.latent_shape}; sizes agree")

    damaged = store.damaged_files(whole=True)
    changed = f"digests: {', '.join(damaged)} changed since they were written"
    yield choose(not damaged, "digests: all files as written", changed, "dump the images again")

    # Latents at even distances.
    rows = np.unique(np.linspace(0, len(store) - 1, SAMPLED).round().astype(int))
    mean, std = store.__getitems__(rows)["moments"].chunk(2, dim=1)
    z = store.scale.scale_latent(mean + std * torch.randn(std.shape, generator=torch.Generator().manual_seed(0)))
    text = f"scaled latents have a std of {z.std():.4f}"
    yield choose(0.5 < z.std() < 2, text, text, "dump the images again with --scale auto")  # false for NaN, too
    remedy = "these are no stds (log-variances?): dump the images again"
    yield choose(not (std < 0).any(), "stds of the posterior are not negative", "stds of the posterior below 0", remedy)

    empty = sorted(set(range(store.num_classes)) - set(np.unique(store.labels).tolist()))
    if empty:
        text = f"{len(empty)} classes without an image, the first of them {store.class_names[empty[0]]!r}"
        yield Finding(text, "look at the source; a model can be trained, but not on those classes")
    skipped = store.meta["skipped"]
    if skipped:
        first = f"{skipped[0]['path']} ({skipped[0]['reason']})"
        text = f"{len(skipped)} files were left out, the first of them {first}"
        yield Finding(text, "repair them and dump again, or leave it at that")


def examine_run(directory: Path) -> Iterator[Finding]:
    """Each checkpoint's files and config, what a stopped process left, and the log."""
    valid = []
    for path in checkpoints(directory):
        try:
            verify_checkpoint(path)
            _, info = load_sit(path)
        except ValueError as error:
            yield Finding(str(error), f"delete {path}; the run resumes from the latest valid one")
            continue
        valid.append(path)
        yield Finding(f"{path.name}: digests agree, its model loads (step {info['step']}, path {info['path_type']})")
    if not valid:
        yield Finding("no valid checkpoint", "the run begins anew; look for a copy if it was to resume")
    for path in sorted((directory / "checkpoints").glob(".*.partial")):
        yield Finding(f"{path} was left by a process that ended while writing", "nothing: the next one removes it")
    yield from examine_log(directory, int(valid[-1].name) if valid else 0)


def examine_samples(directory: Path) -> Iterator[Finding]:
    """The record, and the digest of samples.npz."""
    try:
        record = json.loads((directory / "samples.json").read_text())
        count, digest = record["settings"]["num_samples"], record.get("npz_sha256")
    except (ValueError, KeyError, TypeError, AttributeError):
        yield Finding("samples.json is damaged", "draw the samples again into another directory")
        return
    if digest is None:
        yield Finding(f"{count:,} images, no samples.npz recorded")
        return
    file, wrong = directory / "samples.npz", "samples.npz is missing or changed since it was written"
    remedy = "delete the directory and draw the samples again: the same command gives the same bytes"
    whole = file.is_file() and sha256(file) == digest
    yield choose(whole, f"{count:,} images, samples.npz as written", wrong, remedy)


def examine_log(directory: Path, newest: int) -> Iterator[Finding]:
    """Gaps, repetitions and numbers that are not finite. `newest` is the step of the newest checkpoint."""
    file = directory / "log.jsonl"
    lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    broken = len(lines) - len(rows)
    if broken:
        yield Finding(f"log.jsonl: {broken} of {len(lines)} lines are no JSON", "the run removes them when it resumes")
    if not rows:
        yield Finding("log.jsonl: no rows", "" if newest == 0 else "the log was lost; the checkpoints were not")
        return

    steps = [row["step"] for row in rows]
    if steps != sorted(set(steps)):
        yield Finding("log.jsonl: steps are not in order", "the run removes the repetitions when it resumes")
    every = (read_json(directory / "config.json").get("config") or {}).get("log_every", 1)
    regular = [step for step in steps if step >= every]  # at first rows come more often
    distances = [b - a for a, b in itertools.pairwise(regular)]
    usual = max(set(distances), key=distances.count, default=0)
    gaps = [(a, b) for a, b in itertools.pairwise(regular) if b - a > 1.5 * usual]
    if gaps:
        text = f"log.jsonl: {len(gaps)} gaps, the first between steps {gaps[0][0]} and {gaps[0][1]}"
        yield Finding(text, "rows were lost, or --log-every was changed; the weights do not depend on it")
    bad = [row["step"] for row in rows if not all(math.isfinite(v) for v in row.values() if isinstance(v, float))]
    if bad:
        text = f"log.jsonl: numbers that are not finite in {len(bad)} rows, the first at step {bad[0]}"
        yield Finding(text, "the steps were not applied; if there are more, lower --learning-rate or --max-grad-norm")
    if steps[-1] < newest:
        yield Finding(f"log.jsonl ends at step {steps[-1]}, before checkpoint {newest}", "rows were lost; resume")
    if not (broken or gaps or bad):
        yield Finding(f"log.jsonl: {len(rows)} rows up to step {steps[-1]}, none missing, all finite")


def main(argv: list[str] | None = None) -> None:
    config = cli.parse(DoctorConfig, argv, __doc__)
    problems = 0
    for finding in examine(config.path):
        problems += bool(finding.remedy)
        text = f"look  {finding.text}\n      -> {finding.remedy}" if finding.remedy else f"ok    {finding.text}"
        print(text, flush=True)
    print(f"{problems} things to look at" if problems else "all is well")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    cli.run(main)
