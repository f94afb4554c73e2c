"""What a run takes over from other models: the weights of `--init-from`, and the encoder of `--repa-weights`."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from alignment.registry import parse_align
from models.load import read_state
from models.sit import SiT
from models.vae import LatentScale
from runtime.distributed import check_ranks_agree, run_on_rank0
from runtime.files import sha256
from training.config import TrainConfig


def load_init_weights(
    config: TrainConfig, sit: SiT, source: SiT, info: dict, scale: LatentScale, class_names: list[str]
) -> None:
    """Put the weights of `--init-from` into a new SiT: the null class's row always, those of classes by `init_rows`.

    Raises:
        ValueError: another architecture, path or prediction.
    """
    found, expected = source.config.to_dict(), sit.config.to_dict()
    wrong = [
        f"{name} {found[name]} (this run: {value})"
        for name, value in expected.items()
        if found[name] != value and name not in ("num_classes", "latent_size")
    ]
    wrong += [
        f"{name.removesuffix('_type')} {info[name]} (this run: {getattr(config, name)})"
        for name in ("path_type", "prediction")
        if info[name] != getattr(config, name)
    ]
    if wrong:
        raise ValueError(f"--init-from {config.init_from}: expected a model as this run's, found {', '.join(wrong)}")
    weights = {name: value for name, value in source.state_dict().items() if name != "pos_embed"}  # fixed, by formula
    table = weights.pop("y_embedder.embedding_table.weight")
    sit.load_state_dict(weights, strict=False)
    rows = init_rows(config, source.config.num_classes, info["class_names"], class_names)
    with torch.no_grad():
        own = sit.y_embedder.embedding_table.weight
        own[-1] = table[-1]  # the null class is the same one
        for label, row in rows.items():
            own[label] = table[row]
    if info["scale"] not in (None, scale):
        warnings.warn(
            f"--init-from {config.init_from} was trained on latents scaled by {info['scale']}, {config.data_dir} has "
            f"{scale}",
            stacklevel=2,
        )


def init_rows(config: TrainConfig, count: int, theirs: list[str], ours: list[str]) -> dict[int, int]:
    """Classes of this run that take over a row of the source's table, and which: as `--init-classes` says, or all, if
    both have as many classes.

    Raises:
        ValueError: the file names a class that neither side has.
    """
    if config.init_classes is None:
        return {label: label for label in range(count)} if count == config.num_classes else {}

    def number(name: str | int, names: list[str], size: int, side: str) -> int:
        found = int(name) if str(name).isdigit() else names.index(name) if name in names else -1
        if not 0 <= found < size:
            raise ValueError(f"--init-classes: expected a class of {side} (number or name), found {name!r}")
        return found

    try:
        pairs = json.loads(Path(config.init_classes).read_text()).items()
    except (OSError, ValueError, AttributeError) as error:
        form = '{"our class": "their class", ...}'
        raise ValueError(f"--init-classes: expected {form} in {config.init_classes}, found another form") from error
    sides = (ours, config.num_classes, "the store"), (theirs, count, "--init-from")
    return {number(name, *sides[0]): number(other, *sides[1]) for name, other in pairs}


def initial_weights(
    source: tuple[SiT, dict] | None,
    state: dict[str, Any] | None,
    config: TrainConfig,
    accelerator: Accelerator,
    own_side: int,
) -> dict[str, Any] | None:
    """Where the run's first weights came from, for the records; None if they were random."""
    if source is None:
        return state["initial"] if state else None
    initial = {name: source[1][name] for name in ("source", "read_as", "digest")}
    classes, side = source[0].config.num_classes, source[0].config.latent_size
    text = "" if classes == config.num_classes else f"; a new table of classes, {config.num_classes} for {classes}"
    text += f"; --init-classes {config.init_classes}" if config.init_classes else ""
    text += f"; positions for latents of side {own_side}, not {side}" if own_side != side else ""
    text += "; EMA with a warm-up" if config.ema_warmup else ""
    accelerator.print(f"starting from {initial['source']} ({initial['read_as']}{text})")
    return initial


def check_sources(config: TrainConfig, state: dict[str, Any] | None) -> str | None:
    """SHA-256 of the file of `--repa-weights`, for the records; None where there is none.

    Raises:
        ValueError: it is not the file that the run to be resumed has used, or the one of `--init-from`, if that is
            still there, is not the one that the run began with.
    """
    path = Path(config.repa_weights or "")
    digest = sha256(path) if "repa" in parse_align(config.align) and path.is_file() else None
    check_ranks_agree({"--repa-weights": digest})
    if state:
        known = state["repa_digest"] or digest
        _refuse_other("--repa-weights", path, digest is None or digest == known, config)
        run_on_rank0(lambda: _check_initial(config, state["initial"] or {}))
    return digest


def _check_initial(config: TrainConfig, initial: dict[str, Any]) -> None:
    source = Path(initial.get("source", ""))
    if (source / "state.json").is_file():
        same = initial["digest"] in read_state(source)["digests"].values()
    else:
        same = not source.is_file() or sha256(source) == initial["digest"]
    _refuse_other("--init-from", source, same, config)


def _refuse_other(flag: str, path: Path, same: bool, config: TrainConfig) -> None:
    if not same:
        raise ValueError(
            f"{flag}: expected the weights that the run in {config.run_dir} was trained with, found others at {path}; "
            f"put those back, or give another --exp-name for a new run"
        )
