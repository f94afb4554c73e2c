"""The EMA of another width, after training: a combination of the snapshots that a run with --ema-power has kept.

    python -m analysis.posthoc_ema exps/run --sigma-rel 0.12

writes a checkpoint that `sample_ddp.py` draws from. (Karras et al., arXiv 2312.02696, Section 3.2. The weights of the
combination are those whose sum of discrete averaging profiles is nearest to the wanted one.)
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it can be started as a file

from runtime import cli
from runtime.cli import REQUIRED, check, flag


@dataclass(frozen=True)
class PosthocConfig:
    """Settings of one post-hoc EMA."""

    run: str = flag(REQUIRED, "directory of a run with --ema-power", positional=True)
    sigma_rel: float = flag(REQUIRED, "relative width of the EMA, between those of --ema-power")
    step: int | None = flag(None, "as of this step; by default that of the last snapshot")
    output_dir: str | None = flag(None, "directory of the result; by default <run>/posthoc/<sigma-rel>")

    def __post_init__(self):
        check(self, "sigma_rel", self.sigma_rel > 0, "more than 0")


if __name__ == "__main__":
    # Answers --help and refuses wrong flags before torch is imported.
    cli.parse_early(PosthocConfig, __doc__)

import numpy as np
import torch
from safetensors.torch import load_file

from models.load import STATE, latest_checkpoint, load_sit, read_state
from runtime.progress import Progress
from training.checkpoint import write_checkpoint
from training.ema import gamma_of


def profile(step: int, gamma: float, length: int) -> np.ndarray:  # -> (length,)
    """The share that the weights after each of `length` steps have in the power function's EMA after `step` steps."""
    powers = np.minimum(np.arange(length + 1) / step, 1) ** (gamma + 1)
    return np.diff(powers)


def combine(snapshots: list[tuple[int, float]], step: int, sigma_rel: float) -> tuple[np.ndarray, float]:
    """Factors of snapshots (step, relative width), so that their sum is nearest to the EMA of width `sigma_rel`.

    Returns:
        (len(snapshots),) factors, and the distance of the profiles relative to the wanted one's norm.
    """
    wanted = profile(step, gamma_of(sigma_rel), step)
    known = np.stack([profile(at, gamma_of(width), step) for at, width in snapshots], axis=1)
    # They sum to 1, whatever is left to wish: what all snapshots share is not scaled.
    last = known[:, -1]
    factors = np.linalg.lstsq(known[:, :-1] - last[:, None], wanted - last, rcond=None)[0]
    factors = np.append(factors, 1 - factors.sum())
    return factors, float(np.linalg.norm(known @ factors - wanted) / np.linalg.norm(wanted))


def main(argv: list[str] | None = None) -> None:
    config = cli.parse(PosthocConfig, argv, __doc__)
    run = Path(config.run)
    files = {
        (int(file.stem), float(file.parent.name)): file for file in sorted(run.glob("ema_snapshots/*/*.safetensors"))
    }
    newest = latest_checkpoint(run)
    if not files or newest is None:
        raise ValueError(f"expected snapshots and a checkpoint in {run}, found none; train with --ema-power 0.05 0.1")
    step = config.step or max(at for at, _ in files)
    kept = {key: file for key, file in files.items() if key[0] <= step}
    if step not in {at for at, _ in kept}:
        raise ValueError(f"--step: expected one of {sorted({at for at, _ in files})}, found {step}")
    widths = sorted({width for _, width in kept})
    if not widths[0] <= config.sigma_rel <= widths[-1]:
        raise ValueError(f"--sigma-rel: expected {widths[0]:g} to {widths[-1]:g} in {run}, found {config.sigma_rel:g}")

    factors, distance = combine(list(kept), step, config.sigma_rel)
    total: dict[str, torch.Tensor] = {}
    for factor, file in zip(factors, Progress(kept.values(), "snapshots"), strict=True):
        for name, value in load_file(file).items():
            total[name] = total.get(name, 0) + factor * value.double()
    state = {name: value for name, value in read_state(newest).items() if name in STATE}
    state = {name: value for name, value in state.items() if name not in ("format", "version", "step", "digests")}
    weights = {name: value.float() for name, value in total.items()}
    content = {"networks": {"ema": weights}, "optimizer": None, "config": load_sit(newest)[0].config}
    output = config.output_dir or run / "posthoc" / f"{config.sigma_rel:g}"
    made = write_checkpoint(output, step, content, state)
    print(f"{made}: {len(kept)} snapshots, profile within {distance:.2%} of that of sigma_rel {config.sigma_rel:g}")


if __name__ == "__main__":
    cli.run(main)
