"""A run's directory, read without torch: settings, log, grids, and sets of samples with their metrics.

A run may be training now, or have been killed: files may be missing, and a log may end in the midst of a line.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reporting.log import read_log
from reporting.values import finite
from runtime.files import Field, read_record

# Settings of sampling that change metrics by more than chance, and their text; metrics are compared at equal ones.
RECIPE: dict[str, Callable[[Any], str]] = {
    "sampler": str,
    "num_steps": lambda value: f"{value} steps",
    "last_step_size": lambda value: f"last step of {value}",
    "guidance_scale": lambda value: f"guidance {value:g}",
    "guidance_interval": lambda value: "on t {:g} to {:g}".format(*value),
    # Of what older records lack, the value that they were drawn with has no text.
    "diffusion_form": lambda value: "" if value == "linear" else f"diffusion {value}",
    "diffusion_norm": lambda value: "" if value == 1 else f"diffusion norm {value:g}",
    "last_step": lambda value: "" if value == "mean" else f"last step by {value}",
    "atol": lambda value: f"atol {value:g}",
    "rtol": lambda value: f"rtol {value:g}",
    "guidance_channels": lambda value: "" if value == "all" else f"on {value} channels",
    "autoguidance_digest": lambda value: f"autoguided by {value[:12]}",
    "time_shift": lambda value: "" if value == 1 else f"times shifted by {value:g}",
    "head_guidance": lambda value: f"head guidance {value:g}",
    "head_guidance_interval": lambda value: "by the head on t {:g} to {:g}".format(*value),
    "uint8_rule": lambda value: {"floor(clamp(255": "pixels cut off", "round(clamp(255": "pixels rounded"}.get(
        value.partition(" ")[0], ""
    ),
    "vae_decoder": lambda value: f"decoded by {value[:12]}",
    "num_samples": lambda value: f"{value:,} images",
    "labels": lambda value: f"{value} labels",
    "classes": lambda value: f"classes {' '.join(map(str, value))}",
}
RECIPE_FIELDS = {name: Field(None) for name in RECIPE} | {"last_step_size": Field(None, old_names=("last_t",))}
# Where one metric must stand for all: the first of these that is there.
PREFERRED = ("fid", "fd-dinov2", "vae-frechet", "random-frechet", "sfid", "random-spatial-frechet")


@dataclass(frozen=True)
class Samples:
    """A set of samples, measured or not.

    Args:
        path: its directory, or its metrics.json where that lies elsewhere.
        run: name of the run that it is of.
        settings: what it was drawn with, as in `samples.json`; at least "step", which may be None.
        checkpoint: the checkpoint it was drawn from, as recorded; empty if it was not.
        metrics: finite values by name; empty if it was not measured.
        reference: what it was measured against; differs for different references.
        warnings: what a reader of the metrics must know.
        picture: its first images, if there is such a file.
    """

    path: Path
    run: str
    settings: dict[str, Any]
    checkpoint: Path
    metrics: dict[str, float]
    reference: str
    warnings: tuple[str, ...]
    picture: Path | None

    @property
    def step(self) -> int:
        """Step of the checkpoint; -1 where it was not recorded."""
        step = self.settings.get("step")
        return step if isinstance(step, int) else -1

    @property
    def scale(self) -> float:
        return float(self.settings.get("guidance_scale") or 1.0)

    @property
    def interval(self) -> str:
        """Where it is guided: "none", "all t" or "t 0 to 0.7"."""
        interval = self.settings.get("guidance_interval")
        if self.scale == 1 or not interval:
            return "none"
        return "all t" if list(interval) == [0, 1] else "t {:g} to {:g}".format(*interval)

    @property
    def unusual(self) -> str:
        """What of the recipe few samples have: the text of all but solver, class guidance, number and labels."""
        usual = (
            "sampler num_steps last_step_size guidance_scale guidance_interval vae_decoder num_samples labels classes"
        )
        return ", ".join(filter(None, self.recipe(usual.split())))

    def recipe(self, without: Sequence[str] = ()) -> tuple[str, ...]:
        """The settings of `RECIPE` as text, empty where there is none, and for those of `without`."""
        recorded = {name: value for name, value in self.settings.items() if name in {"last_t", *RECIPE}}
        values = read_record(recorded, RECIPE_FIELDS, self.path)
        return tuple(
            "" if name in without or values[name] is None else as_text(values[name]) for name, as_text in RECIPE.items()
        )


@dataclass(frozen=True)
class Run:
    """A run's directory.

    Args:
        directory: its path.
        name: last part of its path, with as many parts before as tell it from the other runs.
        record: `config.json`: "config", "groups" (names of the settings, by heading), "versions", "git_revision",
            "machine", "date", "data_digest"; may be empty.
        rows: of `log.jsonl`, by step, each step once.
        checkpoints: steps of the finished ones.
        state: `state.json` of the newest checkpoint; may be empty.
        grids: pictures drawn while training, by step.
        samples: of this run, by step and guidance.
    """

    directory: Path
    name: str
    record: dict[str, Any]
    rows: list[dict[str, float]]
    checkpoints: list[int]
    state: dict[str, Any]
    grids: dict[int, Path]
    samples: list[Samples]

    @property
    def settings(self) -> dict[str, Any]:
        """The flags of training; empty if they were not recorded."""
        return self.record.get("config") or self.state.get("config") or {}


def read_runs(directories: Sequence[str | Path], samples: Iterable[str | Path] = ()) -> tuple[list[Run], list[Samples]]:
    """The runs, and those of `samples` that come from none of them.

    Args:
        directories: of the runs.
        samples: further sets: their directories, or their `metrics.json`.

    Raises:
        ValueError: a directory is no run or is named twice, or a file in it is damaged.
    """
    paths = [Path(directory) for directory in directories]
    names = distinct_names(paths)
    runs = [read_run(path, name) for path, name in zip(paths, names, strict=True)]
    known = {found.path.resolve() for run in runs for found in run.samples}
    others: list[Samples] = []
    for given in map(read_samples, samples):
        if {given.path.resolve(), given.path.resolve().parent} & known:
            continue
        owner = next((run for run in runs if _is_from(given, run)), None)
        if owner:
            owner.samples.append(dataclasses.replace(given, run=owner.name))
        else:
            others.append(given)
    for run in runs:
        run.samples[:] = _joined(run.samples)
    return runs, _joined(others)


def _joined(found: list[Samples]) -> list[Samples]:
    """By step and guidance, with one entry for samples and metrics of the same settings in different places."""
    result = []
    for given in found:
        twins = [other for other in found if other.settings == given.settings]
        if given.metrics:
            picture = next((other.picture for other in (given, *twins) if other.picture), None)
            result.append(dataclasses.replace(given, picture=picture))
        elif not any(other.metrics for other in twins):
            result.append(given)
    return sorted(result, key=lambda one: (one.step, one.scale, str(one.settings.get("guidance_interval")), one.path))


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, or as many more as it takes to tell them apart.

    Raises:
        ValueError: two of them are the same directory.
    """
    parts = [path.resolve().parts for path in paths]
    if len(set(parts)) < len(parts):
        twice = next(str(path) for index, path in enumerate(paths) if parts[index] in parts[:index])
        raise ValueError(f"expected different runs, found {twice} twice; name each once")

    def name(own: tuple[str, ...]) -> str:
        alike = [[other[-count:] for other in parts].count(own[-count:]) for count in range(1, len(own))]
        return "/".join(own[-(alike.index(1) + 1 if 1 in alike else len(own)) :])

    return [name(own) for own in parts]


def read_run(directory: str | Path, name: str) -> Run:
    """A run's directory as it is now.

    Raises:
        ValueError: it is no run, or a file in it is damaged.
    """
    directory = Path(directory)
    if not any((directory / part).exists() for part in ("config.json", "log.jsonl", "checkpoints")):
        found = f"{'none of these in' if directory.is_dir() else 'nothing at'} {directory}"
        raise ValueError(f"expected the directory of a run (config.json, log.jsonl or checkpoints/), found {found}")
    try:
        rows = [row for row in read_log(directory) if isinstance(row, dict) and finite(row.get("step")) is not None]
    except UnicodeDecodeError as error:
        raise ValueError(f"expected JSON in {directory / 'log.jsonl'}, found bytes that are no text") from error
    states = directory.glob("checkpoints/*/state.json")
    steps = {int(path.parent.name): path for path in states if path.parent.name.isdigit()}
    return Run(
        directory=directory,
        name=name,
        record=read_json(directory / "config.json"),
        # A killed run has rows after its last checkpoint, which it writes again when it resumes.
        rows=[row for _, row in sorted({row["step"]: row for row in rows}.items())],
        checkpoints=sorted(steps),
        state=read_json(steps[max(steps)]) if steps else {},
        grids={int(path.stem): path for path in sorted(directory.glob("samples/*.png")) if path.stem.isdigit()},
        samples=[read_samples(path, name) for path in _sample_directories(directory)],
    )


def _sample_directories(run_dir: Path) -> list[Path]:
    """Directories with `samples.json` anywhere below a run's; those of single images and checkpoints are left out."""
    found = []
    for directory, inner, files in os.walk(run_dir):
        inner[:] = sorted(set(inner) - {"images", "partial", "checkpoints", "wandb"})
        if "samples.json" in files:
            found.append(Path(directory))
    return found


def read_samples(path: str | Path, run: str = "") -> Samples:
    """A set of samples from its directory, or from its metrics.json, which holds the settings of sampling as well.

    Args:
        run: name of its run; by default the run, or else the file, that its record names.

    Raises:
        ValueError: neither, or damaged.
    """
    path = Path(path)
    record, measured = read_json(path / "samples.json"), read_json(path / "metrics.json" if path.is_dir() else path)
    warnings = list(measured.get("warnings") or [])
    sampling = measured.get("sampling") or {}
    if record and sampling and sampling.get("settings") != record.get("settings"):
        measured = {}  # of samples that were here before
        warnings = [f"{path / 'metrics.json'} is of samples with other settings: left out; measure these anew"]
    record = record or sampling
    if not isinstance(record.get("settings"), dict):
        found = f"{'neither in' if path.exists() else 'nothing at'} {path}"
        raise ValueError(f"expected a set of samples (samples.json, or metrics.json with settings), found {found}")
    settings, checkpoint = record["settings"], Path(record.get("checkpoint") or "")
    metrics, reference = measured.get("metrics") or {}, measured.get("reference") or {}
    if not (_is_whole(settings) and isinstance(metrics, dict) and isinstance(reference, dict)):
        raise ValueError(f"expected a record of samples as sample_ddp.py writes it, found another in {path}; remove it")
    source = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint
    picture = path / "samples.png"
    return Samples(
        path=path,
        run=run or str(source if checkpoint.name else path),
        settings=settings,
        checkpoint=checkpoint,
        metrics={str(name): float(value) for name, value in metrics.items() if finite(value) is not None},
        reference=f"{Path(reference.get('path') or 'unknown').name} ({str(reference.get('sha256'))[:8]})",
        warnings=tuple(map(str, warnings)),
        picture=picture if picture.is_file() else None,
    )


def _is_whole(settings: dict[str, Any]) -> bool:
    """Whether settings of sampling have the types that are read here."""
    interval = settings.get("guidance_interval") or [0, 1]
    return (
        isinstance(interval, list)
        and len(interval) == 2
        and None not in map(finite, [*interval, settings.get("guidance_scale", 1)])
        and isinstance(settings.get("classes") or [], list)
        and isinstance(settings.get("num_samples", 0), int)
    )


def _is_from(samples: Samples, run: Run) -> bool:
    """Whether a run's checkpoint is what they were drawn from: by its digest, or by its path if that one is gone."""
    state = read_json(run.directory / "checkpoints" / f"{samples.step:07d}" / "state.json")
    if state:
        return samples.settings.get("checkpoint_digest") in (state.get("digests") or {}).values()
    return bool(samples.checkpoint.name) and run.directory.resolve() == samples.checkpoint.resolve().parent.parent


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty if there is no file.

    Raises:
        ValueError: something else is in it.
    """
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:  # of JSON and of UTF-8
        raise ValueError(f"expected JSON in {path}, found something else ({error}); repair or remove it") from error
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object in {path}, found a {type(content).__name__}; repair or remove it")
    return content


def hours(rows: Sequence[dict[str, float]], batch_size: int) -> list[float]:
    """Hours of training up to each row: steps since the row before, times images of a step, over images a second.

    Time in which grids were drawn and checkpoints copied is not in it, nor steps that were repeated after a kill. Rows
    without a speed add nothing.
    """
    total, before, result = 0.0, 0, []
    for row in rows:
        speed = finite(row.get("images_per_second"))
        if speed and speed > 0:
            total += (row["step"] - before) * batch_size / speed / 3600
        before = row["step"]
        result.append(total)
    return result


def direction(metric: str) -> int:
    """-1 if a lower value of the metric is better, 1 if a higher one is, 0 if the name is not known."""
    kind = metric.lower().rpartition("-")[2]
    if kind in ("fid", "sfid", "frechet", "kid", "mind", "mmd") or metric.lower().startswith("fd-"):
        return -1
    return 1 if kind in ("is", "precision", "recall", "density", "coverage") else 0


def preferred(metrics: Iterable[str]) -> str | None:
    """The metric that stands for all: the first of `PREFERRED`, else any with a direction."""
    metrics = list(metrics)
    return next((name for name in (*PREFERRED, *metrics) if name in metrics and direction(name)), None)
