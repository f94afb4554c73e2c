"""The flags of analysis.compare."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

from runtime.cli import REQUIRED, check, flag
from sampling.config import SAMPLERS

_compared = partial(flag, group="what to compare")
_images = partial(flag, group="images")


@dataclass(frozen=True)
class CompareConfig:
    """What to compare, and how images are drawn."""

    runs: tuple[str, ...] = _compared(REQUIRED, "run directories, the baseline first", metavar="RUN", positional=True)
    samples: tuple[str, ...] = _compared((), "more samples: their directories, or their metrics.json", metavar="PATH")
    metric: str | None = _compared(None, "of the curves; by default fid or another Frechet distance")
    output_dir: str = _compared("exps/compare", "directory of the results")

    images: bool = _images(True, "draw compare.png")
    steps: tuple[int, ...] | None = _images(None, "to draw; up to 4 that all have", metavar="STEP")
    classes: tuple[int, ...] | None = _images(None, "numbers of classes; up to 8 unless set", metavar="CLASS")
    seed: int = _images(0, "seed of the noise")
    sampler: str = _images("ode-euler", "ODE by Euler or Heun, SDE by Euler-Maruyama", choices=SAMPLERS)
    num_steps: int = _images(50, "steps of the solver; 250 with sde for the paper's")
    guidance_scale: float = _images(4.0, "v_null + scale (v_class - v_null): 1 is no guidance")
    head_guidance: float = _images(1.0, "experimental: as sample_ddp.py's; every run must have such a head; 1 is none")
    vae: str | None = _images(None, "hub name or path of the VAE, if not where the checkpoints say")
    mixed_precision: str | None = _images(None, "of the network; bf16 on a GPU, no on a CPU", choices=("no", "bf16"))
    device: str | None = _images(None, "a GPU if there is one, unless set", choices=("cpu", "cuda"))

    def __post_init__(self):
        if len(self.runs) < 2:
            raise ValueError("expected at least two runs, found one; a single one is for python -m analysis.report")
        check(self, "seed", self.seed >= 0, "at least 0")
        check(self, "num_steps", self.num_steps >= 1, "at least 1")
        for name in ("guidance_scale", "head_guidance"):
            check(self, name, math.isfinite(getattr(self, name)), "a finite number")
