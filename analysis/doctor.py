"""Look through a latent store, a run's folder or a folder of samples, and say what is wrong with it and what to do.

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

from runtime import cli
from runtime.cli import REQUIRED, flag

SAMPLED = 2048  # latents of which the scaled deviation is taken


@dataclass(frozen=True)
class DoctorConfig:
    """What to look through."""

    path: str = flag(REQUIRED, "latent store, folder of a run, or folder of samples", group="what to look at")


@dataclass
class Finding:
    """One thing that was looked at: all is well if `remedy` is empty."""

    what: str
    remedy: str = ""


def examine(path: str | Path) -> Iterator[Finding]:
    """All findings about a store or a run, as they are made.

    Raises:
        ValueError: the path is neither.
    """
    folder = Path(path)
    if (folder / "meta.json").is_file() or (folder / "partial").is_dir():
        return examine_store(folder)
    if (folder / "checkpoints").is_dir() or (folder / "log.jsonl").is_file() or (folder / "config.json").is_file():
        return examine_run(folder)
    if (folder / "samples.json").is_file():
        return examine_samples(folder)
    raise ValueError(
        f"expected a latent store (meta.json), a run (config.json) or samples (samples.json), found none in {folder}"
    )


def examine_store(folder: Path) -> Iterator[Finding]:
    """Format, sizes, counts, labels, digests, and the deviation of the scaled latents."""
    import numpy as np
    import torch

    from dataset import LatentDataset

    try:
        store = LatentDataset(folder)
    except ValueError as error:
        yield Finding(str(error), "finish or repeat the dump with the same command")
        return
    yield Finding(f"{len(store):,} images of {store.num_classes} classes, latents {store.latent_shape}; sizes agree")
    damaged = store.verify_digests()
    yield Finding(
        f"digests: {', '.join(damaged)} changed since they were written"
        if damaged
        else "digests: all files as written",
        "dump the images again" if damaged else "",
    )
    rows = np.unique(np.linspace(0, len(store) - 1, SAMPLED).round().astype(int))
    mean, std = store.__getitems__(rows)["moments"].chunk(2, dim=1)
    z = store.scale.scale_latent(mean + std * torch.randn(std.shape, generator=torch.Generator().manual_seed(0)))
    deviation = z.std().item()
    usual = 0.5 < deviation < 2  # false for NaN, too
    yield Finding(
        f"scaled latents have a deviation of {deviation:.4f}",
        "" if usual else "dump the images again with --scale auto",
    )
    negative = (std < 0).any().item()
    yield Finding(
        "deviations of the posterior below 0" if negative else "deviations of the posterior are not negative",
        "these are no deviations (log-variances?): dump the images again" if negative else "",
    )
    empty = sorted(set(range(store.num_classes)) - set(np.unique(store.labels).tolist()))
    if empty:
        yield Finding(
            f"{len(empty)} classes without an image, the first of them {store.class_names[empty[0]]!r}",
            "look at the source; a model can be trained, but not on those classes",
        )
    if store.meta["skipped"]:
        first = store.meta["skipped"][0]
        yield Finding(
            f"{len(store.meta['skipped'])} files were left out, the first of them {first['path']} ({first['reason']})",
            "mend them and dump again, or leave it at that",
        )


def examine_run(folder: Path) -> Iterator[Finding]:
    """Each checkpoint's files and config, what a stopped process left, and the log."""
    from models import load
    from training import checkpoint

    found = load.checkpoints(folder)
    whole = []
    for path in found:
        try:
            checkpoint.verify_checkpoint(path)
            _, info = load.load_sit(path)
        except ValueError as error:
            yield Finding(str(error), f"delete {path}; the run goes on from the newest whole one")
            continue
        whole.append(path)
        yield Finding(f"{path.name}: digests agree, its model loads (step {info['step']}, path {info['path_type']})")
    if not whole:
        yield Finding(
            f"no whole checkpoint among {len(found)}", "the run begins anew; look for a copy if it was to go on"
        )
    for path in sorted((folder / "checkpoints").glob(".*.partial")):
        yield Finding(f"{path} was left by a process that ended while writing", "nothing: the next one takes it away")
    yield from examine_log(folder, int(whole[-1].name) if whole else 0)


def examine_samples(folder: Path) -> Iterator[Finding]:
    """The record, and the digest of samples.npz."""
    from runtime.files import sha256

    try:
        record = json.loads((folder / "samples.json").read_text())
        count, digest = record["settings"]["num_samples"], record.get("npz_sha256")
    except (ValueError, KeyError, TypeError, AttributeError):
        yield Finding("samples.json is damaged", "draw the samples again into another folder")
        return
    if digest is None:
        yield Finding(f"{count:,} images, no samples.npz recorded")
        return
    file = folder / "samples.npz"
    good = file.is_file() and sha256(file) == digest
    yield Finding(
        f"{count:,} images, samples.npz as written"
        if good
        else "samples.npz is missing or changed since it was written",
        "" if good else "delete the folder and draw the samples again: the same command gives the same bytes",
    )


def examine_log(folder: Path, newest: int) -> Iterator[Finding]:
    """Gaps, repetitions and numbers that are not finite."""
    file = folder / "log.jsonl"
    lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
    rows, broken = [], 0
    for line in lines:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            broken += 1
    if broken:
        yield Finding(
            f"log.jsonl: {broken} of {len(lines)} lines are no JSON", "the run takes them away when it goes on"
        )
    if not rows:
        yield Finding("log.jsonl: no rows", "" if newest == 0 else "the log was lost; the checkpoints were not")
        return
    steps = [row["step"] for row in rows]
    if steps != sorted(set(steps)):
        yield Finding("log.jsonl: steps are not in order", "the run takes the repetitions away when it goes on")
    distances = [b - a for a, b in itertools.pairwise(steps)]
    usual = max(set(distances), key=distances.count) if distances else 0
    gaps = [(a, a + distance) for a, distance in zip(steps, distances, strict=False) if distance > 1.5 * usual]
    if gaps:
        yield Finding(
            f"log.jsonl: {len(gaps)} gaps, the first between steps {gaps[0][0]} and {gaps[0][1]}",
            "rows were lost, or --log-every was changed; the weights do not depend on it",
        )
    bad = [row["step"] for row in rows if not all(math.isfinite(v) for v in row.values() if isinstance(v, float))]
    if bad:
        yield Finding(
            f"log.jsonl: numbers that are not finite in {len(bad)} rows, the first at step {bad[0]}",
            "the steps were not applied; if there are more, lower --learning-rate or --max-grad-norm",
        )
    if steps[-1] < newest:
        yield Finding(f"log.jsonl ends at step {steps[-1]}, before checkpoint {newest}", "rows were lost; go on")
    if not (broken or gaps or bad):
        yield Finding(f"log.jsonl: {len(rows)} rows up to step {steps[-1]}, none missing, all finite")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv and not argv[0].startswith("-"):  # the path, by itself
        argv = ["--path", *argv]
    config = cli.parse(DoctorConfig, argv, __doc__.splitlines()[0])
    problems = 0
    for finding in examine(config.path):
        problems += bool(finding.remedy)
        print(
            f"look  {finding.what}\n      -> {finding.remedy}" if finding.remedy else f"ok    {finding.what}",
            flush=True,
        )
    print(f"{problems} things to look at" if problems else "all is well")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    cli.run(main)
