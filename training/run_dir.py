"""A run's directory: who may write in it, and where to resume."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

from runtime.files import fields_of, given_differences, lock_directory, read_record
from training.checkpoint import latest_valid_checkpoint
from training.config import TrainConfig, settings_by


def lock_run_dir(run_dir: Path) -> Any:
    """Hold the run's directory until the result's `release()`: two trainers in one would spoil each other's run.

    Raises:
        ValueError: another process holds it.
    """
    return lock_directory(run_dir, f"another process trains in {run_dir}; wait for it, or choose another --exp-name")


def find_resume_checkpoint(config: TrainConfig) -> Path | None:
    """The checkpoint to resume from, or None for a new run.

    Raises:
        ValueError: all checkpoints are damaged, or the directory holds a run that is not to be resumed.
    """
    newest = latest_valid_checkpoint(config.run_dir)
    if newest is not None and not config.resume:
        raise ValueError(f"--no-resume: {config.run_dir} holds a run ({newest}); choose another --exp-name")
    return newest


def resumed_config(
    config: TrainConfig, given: frozenset[str] | None, saved: dict[str, Any], source: Path
) -> TrainConfig:
    """The settings of a run that is resumed: those that the user gave now, and the others as they were recorded.

    Args:
        config: the settings now.
        given: names of those that the user gave; None: all of them.
        saved: the record of the run's settings. source: where it stands, for errors.

    Raises:
        ValueError: a setting that decides weights or order of data was given another value.
    """
    now = dataclasses.asdict(config)
    given = frozenset(now) if given is None else given
    given -= {name for name, value in now.items() if value is None}  # left to be decided
    record = read_record(saved or {}, fields_of(TrainConfig), source)
    free, announced = settings_by(on_resume="free"), settings_by(on_resume="announced")
    changed = [name for name in given_differences(record, now, given) if name not in free]
    told = {name: f"--{name.replace('_', '-')} {record[name]} -> {now[name]}" for name in changed}
    if refused := [told[name] for name in changed if name not in announced]:
        raise ValueError(
            f"expected the settings of the run in {config.run_dir}, found {'; '.join(refused)}; "
            f"give those settings, or another --exp-name for a new run"
        )
    if changed:
        warnings.warn(f"{config.run_dir} is resumed with other settings: {'; '.join(told.values())}", stacklevel=2)
    # Where the run is, what each machine decides for itself, and what is done once are not taken from the record.
    machine = {field.name for field in dataclasses.fields(TrainConfig) if field.default is None} & free
    here = given | machine | {"data_dir", "output_dir", "exp_name", "resume", "profile", "verify_data"}
    return dataclasses.replace(config, **{name: value for name, value in record.items() if name not in here})
