"""Whether torch.compile works on this machine, found out before the first step."""

from __future__ import annotations

import dataclasses
import warnings

import torch

from runtime.distributed import gather_objects
from training.config import TrainConfig


def compile_if_possible(config: TrainConfig, given: frozenset[str] | None, device: torch.device) -> TrainConfig:
    """The config, without --compile if a rank cannot compile and the user has not asked for it by name.

    Args:
        given: names of the settings that the user gave; None: all.

    Raises:
        ValueError: the user has asked for it.
    """
    failures = [failure for failure in gather_objects(config.compile and compile_failure(device)) if failure]
    if not failures:
        return config
    text = f"expected torch.compile to work, found that it does not ({failures[0]})"
    if given is None or "compile" in given:
        raise ValueError(f"--compile: {text}; install a C++ compiler, a newer driver or Triton, or leave it out")
    warnings.warn(f"{text}: training goes on without it, more slowly", stacklevel=2)
    return dataclasses.replace(config, compile=False)


def compile_failure(device: torch.device) -> str | None:
    """Compile something tiny and run it; what went wrong in a few words, or None."""
    try:
        torch.compile(lambda x: x.sin() * x.sum(), fullgraph=True)(torch.ones(8, device=device))
    except Exception as error:  # a missing compiler, an old driver and a missing Triton each raise their own
        return " ".join(str(error).split())[:160]
    return None
