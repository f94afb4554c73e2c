"""The flags of REPA's two programs that are no settings of ours, and what each means in ours. No torch here.

Flags that are only spelled differently are aliases of the settings themselves. Those here need a rule: they depend on
others, or say what holds here anyway. `runtime.cli` reads them beside the settings, and asks for their meaning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from runtime.cli import flag

Meaning = dict[str, tuple[str, Any]]  # {setting: (the flag of REPA's that means it, its value)}

_repas = partial(flag, None, group="as REPA's programs")
_OURS = "accepted where it says what holds here anyway"
_ONLY = {  # flag: its only value here, and why
    "fused_attn": (True, "attention is always the fused one of torch"),
    "resume_step": (0, "a run resumes from its newest checkpoint by itself"),
    "logging_dir": (None, "the log and the tracker's files stand in the run's directory, <output-dir>/<exp-name>"),
}


@dataclass(frozen=True)
class REPATrainFlags:
    """Of `train.py`."""

    enc_type: str | None = _repas("the encoder, as --repa-encoder; without --align, REPA is trained")
    encoder_depth: tuple[int, ...] | None = _repas("aligned blocks of the method that --align names")
    proj_coeff: float | None = _repas("weight of the method that --align names")
    weighting: str | None = _repas("how t is drawn, as --time-distribution", choices=("uniform", "lognormal"))
    fused_attn: bool | None = _repas(_OURS)
    resume_step: int | None = _repas(_OURS)
    logging_dir: str | None = _repas("refused: it is the run's directory")
    legacy: bool | None = _repas("refused: its labels were dropped twice, which --label-dropout 0.19 does")

    @staticmethod
    def meaning(flags: Mapping[str, Any], given: Mapping[str, Any]) -> Meaning:
        """What `flags` mean beside all that is `given`, these flags included.

        Raises:
            ValueError: something that is not to be had here, or that can be understood in several ways.
        """
        _check_only(flags)
        if flags.get("legacy"):
            raise ValueError("--legacy: expected --label-dropout 0.19 in its place, which drops labels as often")
        align = given.get("align", "repa" if "enc_type" in given else "vae")
        meant: Meaning = {}
        if "enc_type" in flags:
            meant["repa_encoder"] = "enc_type", flags["enc_type"]
            meant |= {} if "align" in given else {"align": ("enc_type", "repa")}
        if "weighting" in flags:
            drawn = {"uniform": "uniform", "lognormal": "logit-normal"}[flags["weighting"]]
            meant["time_distribution"] = "weighting", drawn
        for name, setting in (("encoder_depth", "depth"), ("proj_coeff", "weight")):
            if name not in flags:
                continue
            if align == "none" or "+" in align:
                raise ValueError(
                    f"--{name.replace('_', '-')}: expected one method in --align, found {align}; "
                    f"use the method's own flag, such as --repa-{setting}"
                )
            meant[f"{'align' if align == 'vae' else align}_{setting}"] = name, flags[name]
        return meant


@dataclass(frozen=True)
class REPASampleFlags:
    """Of `generate.py`."""

    mode: str | None = _repas("the sampler: sde, or ode (--sampler ode-euler)", choices=("sde", "ode"))
    heun: bool | None = _repas("with --mode ode, --sampler ode-heun-repa")
    projector_embed_dims: str | None = _repas("widths of the heads, such as 768,1024: sampling drops the heads")
    fused_attn: bool | None = _repas(_OURS)
    legacy: bool | None = _repas("read a file of REPA's older layout; it is known by itself")

    @staticmethod
    def meaning(flags: Mapping[str, Any], given: Mapping[str, Any]) -> Meaning:
        """As `REPATrainFlags.meaning`."""
        _check_only(flags)
        widths = flags.get("projector_embed_dims", "768")
        if not all(width.strip().isdigit() for width in widths.split(",")):
            raise ValueError(f"--projector-embed-dims: expected widths such as 768,1024, found {widths}")
        mode, heun = given.get("mode", "ode"), given.get("heun", False)
        if not {"mode", "heun"} & set(flags) or ("mode" not in given and not heun):
            return {}
        if mode == "sde" and heun:
            raise ValueError("--heun: expected --mode ode beside it, found --mode sde")
        name = "mode" if "mode" in flags else "heun"
        return {"sampler": (name, "sde" if mode == "sde" else "ode-heun-repa" if heun else "ode-euler")}


def _check_only(flags: Mapping[str, Any]) -> None:
    for name, (value, why) in _ONLY.items():
        if flags.get(name, value) != value:
            found = {True: f"--{name}", False: f"--no-{name}"}.get(flags[name], f"--{name} {flags[name]}")
            raise ValueError(f"{found.replace('_', '-')}: {why}; leave it out")
