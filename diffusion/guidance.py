"""Classifier-free guidance, and guidance by a head inside the network: from a class-conditional model to the velocity
that a solver follows.

Shape suffixes: N batch, C latent channels, H x W latent sides.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.interpolant import Interpolant
from runtime.distributed import at_best_float64

ROUNDING = 1e-9  # of a time that falls on an end of the interval: both ends belong to it
Velocity = Callable[..., Tensor]  # (x (N, ...) float64, t) -> (N, ...); see `guided_velocity` for a third argument


@dataclass(frozen=True)
class HeadGuidance:
    """Guidance by a weak model inside the network: a head on one of its blocks (Internal Guidance, arXiv 2512.24176).

        v = v_mid + scale * (v_final - v_mid)    for low <= t <= high

    Scale 1 is none. A head that predicts the clean latent has a velocity for t > 0: at t = 0 (where an adaptive
    solver comes as near as numbers go) it is v_final alone.

    Args:
        network: (x, t, y), as of SiT, -> v_final and what the head predicts, (N, C, H, W) each, as `HeadedSiT`; its
            `predicts_velocity` says what that is: the velocity, or the clean latent.
    """

    network: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    scale: float
    interval: tuple[float, float]

    def holds(self, t: float, gate: float) -> bool:
        """Whether it guides at t, of a step that the interval takes as one at the time `gate`."""
        low, high = self.interval[0] - ROUNDING, self.interval[1] + ROUNDING
        return self.scale != 1 and low <= gate <= high and (t > ROUNDING or self.network.predicts_velocity)


def guided_velocity(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    y: Tensor,
    null_class: int,
    scale: float,
    interval: tuple[float, float],
    autocast: torch.dtype | None = None,
    channels: str = "all",
    guide: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    interpolant: Interpolant | None = None,
    head: HeadGuidance | None = None,
) -> Velocity:
    """The velocity of a class-conditional model, with classifier-free guidance on an interval of times.

        v = v_null + scale * (v_class - v_null)    for low <= t <= high, on all channels unless three are asked for
        v = v_class                                elsewhere

    So scale 1 is no guidance, the convention of DiT, SiT and REPA (where others write 1 + w, or count from 0). Scale 1,
    and times outside the interval, cost one evaluation of the batch; guidance costs one of twice the batch.

    Args:
        model: SiT or alike, called with x (N, C, H, W) float32, t (N,) float32 and classes (N,) int64.
        y: classes (N,) int64.
        null_class: the class that stands for none, `num_classes` of the model.
        scale: guidance scale, finite.
        interval: (low, high) with 0 <= low <= high <= 1, both included. t = 1 is noise.
        autocast: dtype in which the network computes on the device of x, such as `torch.bfloat16`; `None` leaves
            whatever autocast the caller has.
        channels: "all"; or "3": the others are those of v_class, as in the code of DiT and SiT.
        guide: a weaker model, called like `model`: its velocity for y stands for v_null (autoguidance, Karras et al.
            2024, Eq. 3 there).
        interpolant: the path, which guidance by a head needs, and what the models predict on it (None: the velocity, on
            the linear path). Of data that they predict there is no velocity at t = 0.
        head: guidance of the model's own velocities v_class and v_null, before they are combined.

    Returns:
        A function of (x (N, C, H, W), t float) that gives the velocity (N, C, H, W) float64. A third argument, a time,
        is looked up in the interval instead of t.

    Raises:
        ValueError: scale or interval out of range, or unknown channels.
    """
    low, high = interval
    if not math.isfinite(scale):
        raise ValueError(f"expected a finite guidance scale (--guidance-scale; 1 is none), found {scale}")
    if not 0 <= low <= high <= 1:
        raise ValueError(
            f"expected 0 <= low <= high <= 1 for the guidance interval (--guidance-low, --guidance-high), "
            f"found {low} and {high}"
        )
    if channels not in ("3", "all"):
        raise ValueError(f"expected 3 or all (--guidance-channels), found {channels!r}")
    interpolant = interpolant or Interpolant()
    y_both = torch.cat([y, torch.full_like(y, null_class)])  # (2N,)

    def network(x: Tensor, t: float, gate: float, y: Tensor, model=model) -> Tensor:  # (M, C, H, W), (M,) -> as x
        times = torch.full((len(x),), t, dtype=torch.float32, device=x.device)
        with torch.autocast(x.device.type, autocast) if autocast else nullcontext():
            if model is guide or head is None or not head.holds(t, gate):
                return interpolant.predicted_velocity(at_best_float64(model(x.float(), times, y)), x, t)
            v, v_mid = map(at_best_float64, head.network(x.float(), times, y))
        v, x = interpolant.predicted_velocity(v, x, t), at_best_float64(x)
        v_mid = v_mid if head.network.predicts_velocity else interpolant.velocity_towards(v_mid, x, t)
        return v_mid + head.scale * (v - v_mid)

    def velocity(x: Tensor, t: float, gate: float | None = None) -> Tensor:  # (N, C, H, W) -> (N, C, H, W)
        gate = t if gate is None else gate
        if scale == 1 or not low - ROUNDING <= gate <= high + ROUNDING:
            return network(x, t, gate, y)
        if guide is None:
            v_class, v_null = network(torch.cat([x, x]), t, gate, y_both).chunk(2)
        else:
            v_class, v_null = network(x, t, gate, y), network(x, t, gate, y, guide)
        v = v_null + scale * (v_class - v_null)
        return v if channels == "all" else torch.cat([v[:, :3], v_class[:, 3:]], dim=1)

    return velocity
