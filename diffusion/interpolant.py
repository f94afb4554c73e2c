"""The path between data and noise (Section 3.1 of the paper), and what follows from it.

Time: t = 0 is data z, t = 1 is noise eps. (SiT's own code runs the other way.)

Shape suffixes: N batch, ... the shape of one sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Time = float | Tensor

PATHS = ("linear", "cosine")
PREDICTIONS = ("v", "x")
B_FLOOR = 0.05  # of b_t, by which the loss of an x-prediction divides: JiT's (arXiv 2511.13720) on the linear path
SHIFT_DIMS = 4096  # latent dimensions without a shift of time: 4 x 32 x 32, as in RAE (arXiv 2510.11690)


def at_least_float32(x: Tensor) -> Tensor:
    """Half-precision inputs are raised to float32; float64 stays (samplers keep their state in it)."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _like(coefficient: Time, x: Tensor) -> Time:
    """A (N,) coefficient shaped so that it multiplies x (N, ...); a float is left alone."""
    if not isinstance(coefficient, Tensor) or coefficient.ndim == 0:
        return coefficient
    return coefficient.view(-1, *[1] * (x.ndim - 1))


class Interpolant:
    """y_t = a_t z + b_t eps (Eq. 1), with a_t falling from 1 to 0 and b_t rising from 0 to 1 on t in [0, 1].

    `linear`: a = 1 - t, b = t. `cosine`: a = cos(pi t / 2), b = sin(pi t / 2) (SiT's variance-preserving path "GVP").
    A network on it predicts the velocity ("v"), or the data z ("x").

    Every method takes t as a float or as a tensor (N,), and computes in float32 or better whatever autocast says: only
    elementwise products are used, which autocast leaves in the type of their inputs.

    Raises:
        ValueError: `path` is none of `PATHS`, or `prediction` none of `PREDICTIONS`.
    """

    def __init__(self, path: str = "linear", prediction: str = "v"):
        if path not in PATHS:
            raise ValueError(f"expected an interpolant path among {', '.join(PATHS)}, found {path!r}")
        if prediction not in PREDICTIONS:
            raise ValueError(f"expected a prediction among {', '.join(PREDICTIONS)}, found {prediction!r}")
        self.path, self.prediction = path, prediction

    def a(self, t: Time) -> Time:
        """a_t, the weight of the data."""
        return 1 - t if self.path == "linear" else _cos(t)

    def b(self, t: Time) -> Time:
        """b_t, the weight of the noise."""
        return t if self.path == "linear" else _sin(t)

    def da(self, t: Time) -> Time:
        """Time derivative of a_t."""
        return 0 * t - 1 if self.path == "linear" else -math.pi / 2 * _sin(t)

    def db(self, t: Time) -> Time:
        """Time derivative of b_t."""
        return 0 * t + 1 if self.path == "linear" else math.pi / 2 * _cos(t)

    def interpolate(self, z: Tensor, eps: Tensor, t: Time) -> Tensor:  # (N, ...), (N, ...), (N,) -> (N, ...)
        """The noised sample y_t of Eq. 1."""
        z, eps = at_least_float32(z), at_least_float32(eps)
        # Eq. 1
        return _like(self.a(t), z) * z + _like(self.b(t), eps) * eps

    def velocity(self, z: Tensor, eps: Tensor, t: Time) -> Tensor:  # (N, ...), (N, ...), (N,) -> (N, ...)
        """The regression target of Eq. 4: the velocity of Eq. 3 for a known pair (z, eps)."""
        z, eps = at_least_float32(z), at_least_float32(eps)
        # Eq. 3 and 4
        return _like(self.da(t), z) * z + _like(self.db(t), eps) * eps

    def velocity_towards(
        self, z: Tensor, y_t: Tensor, t: Time, floor: float = 0.0
    ) -> Tensor:  # (N, ...), (N, ...), (N,) -> (N, ...)
        """The velocity at y_t of the path whose clean end is z: Eq. 3 with eps = (y_t - a_t z) / b_t.

        On the linear path (y_t - z) / t. `floor` is the least divisor, for b_t = 0 at t = 0.
        """
        z, y_t = at_least_float32(z), at_least_float32(y_t)
        a, b, da, db = (_like(c, y_t) for c in (self.a(t), self.b(t), self.da(t), self.db(t)))
        divisor = b.clamp(min=floor) if isinstance(b, Tensor) else max(b, floor)
        return (db * y_t - (a * db - da * b) * z) / divisor

    def predicted_velocity(self, output: Tensor, y_t: Tensor, t: Time, floor: float = 0.0) -> Tensor:
        """The velocity that a network's output stands for: itself, or that towards a z that it predicts."""
        return at_least_float32(output) if self.prediction == "v" else self.velocity_towards(output, y_t, t, floor)

    def time_at(self, log_ratio: Tensor) -> Tensor:  # (N,) -> (N,)
        """The t at which log(b_t / a_t) is this. Of normal numbers: REPA's "lognormal" times, as its code has them."""
        return log_ratio.sigmoid() if self.path == "linear" else 2 / math.pi * log_ratio.exp().atan()

    def score(self, v: Tensor, y_t: Tensor, t: Time) -> Tensor:  # (N, ...), (N, ...), (N,) -> (N, ...)
        """The score of the density at t in (0, 1], from the velocity v (Eq. 6). Infinite at t = 0, where b_t = 0."""
        v, y_t = at_least_float32(v), at_least_float32(y_t)
        a, b, da, db = (_like(c, y_t) for c in (self.a(t), self.b(t), self.da(t), self.db(t)))
        # Eq. 6
        return (da * y_t - a * v) / (b * (a * db - da * b))


def shift_time(t: Time, shift: float) -> Time:
    """t' = a t / (1 + (a - 1) t) with a = `shift` > 0: towards noise for a > 1. Its inverse is that of 1 / a."""
    return t if shift == 1 else shift * t / (1 + (shift - 1) * t)


def choose_shift(shift: str | float, latent_shape: Sequence[int]) -> float:
    """The a of `shift_time`: a number, or "auto", the square root of how many times 4,096 numbers a latent has."""
    return math.sqrt(math.prod(latent_shape) / SHIFT_DIMS) if shift == "auto" else float(shift)


def _cos(t: Time) -> Time:
    return torch.cos(t * (math.pi / 2)) if isinstance(t, Tensor) else math.cos(t * math.pi / 2)


def _sin(t: Time) -> Time:
    return torch.sin(t * (math.pi / 2)) if isinstance(t, Tensor) else math.sin(t * math.pi / 2)
