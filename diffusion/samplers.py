"""From noise to data: solvers of the probability-flow ODE (Eq. 2) and of the reverse SDE.

`sampling.generator.sample_latents` chooses among them by name; `SAMPLERS` in `sampling/config.py` lists the names.

Time runs from t = 1 (noise) down to t = 0 (data). The state is float64 throughout, so that hundreds of small steps add
up without loss; the network sees float32, or less under autocast.

Shape suffixes: N batch, ... the shape of one sample.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from diffusion.guidance import Velocity, guided_velocity  # noqa: F401 (the public name is of this module)
from diffusion.interpolant import Interpolant, shift_time
from runtime.distributed import at_best_float64

LINEAR = Interpolant("linear")
DIFFUSIONS = {  # SiT's forms of w_t / 2, of (t, norm, path)
    "constant": lambda t, norm, path: norm,
    "SBDM": lambda t, norm, path: norm * path.b(t) * (path.db(t) - path.da(t) * path.b(t) / path.a(t)),
    "sigma": lambda t, norm, path: norm * path.b(t),
    "linear": lambda t, norm, path: norm * t,
    "decreasing": lambda t, norm, path: (1 - norm * math.cos(math.pi * t)) ** 2 / 4,
    "increasing-decreasing": lambda t, norm, path: norm * math.sin(math.pi * t) ** 2,
}
LAST_STEPS = ("none", "mean", "tweedie", "euler")
SBDM_START = 1e-3  # 1 - t of its first step; SiT's sample_eps of the paths where one is needed
LAST_TIME = 1e-3  # the same, at the other end, where data are predicted


def _check_steps(num_steps: int, least: int = 1) -> None:
    if num_steps < least:
        raise ValueError(
            f"expected at least {least} step{'s' * (least > 1)} of the solver (--num-steps), found {num_steps}"
        )


def _times(start: float, end: float, count: int, shift: float = 1.0) -> list[float]:
    """`count` times, both ends included and exact; one time is the start. At equal distances, as those of SiT and REPA,
    or at distances that are equal before `shift_time`."""
    first, last = shift_time(start, 1 / shift), shift_time(end, 1 / shift)
    times = shift_time(torch.linspace(first, last, count, dtype=torch.float64), shift).tolist()
    return [start, *times[1:-1], end][:count]


@torch.no_grad()
def sample_ode(
    velocity: Velocity,
    x: Tensor,
    num_steps: int,
    heun: bool = False,
    repa: bool = False,
    time_shift: float = 1.0,
    ends_at_0: bool = True,
) -> Tensor:  # (N, ...) -> (N, ...)
    """Solve dy = v(y, t) dt (Eq. 2) from t = 1 to t = 0, in equal steps but for a shift of time.

    Euler has order 1 and takes `num_steps` evaluations of the velocity. Heun has order 2 and takes 2 num_steps: the
    velocity exists at both ends of the path, so its last step needs no exception. REPA's Heun makes one, and takes
    2 num_steps - 1; both evaluations of a step are guided if its first time lies in the interval of guidance.

    Args:
        velocity: called with the state (N, ...) float64 and t as a float.
        x: standard normal noise (N, ...), any floating type.
        num_steps: steps, at least 1.
        heun: correct each Euler step by the velocity where it leads.
        repa: but for the last step, and with the step's first time as a third argument of that velocity: REPA's code.
        time_shift: of the steps' times, as in `shift_time`; positive.
        ends_at_0: the velocity exists at t = 0. Where data are predicted it does not: Heun's last step is Euler's.

    Returns:
        The samples (N, ...), float64.

    Raises:
        ValueError: fewer than 1 step.
    """
    _check_steps(num_steps)
    x = at_best_float64(x)
    times = _times(1.0, 0.0, num_steps + 1, time_shift)
    for t, t_next in itertools.pairwise(times):
        dt = t_next - t  # negative
        v = at_best_float64(velocity(x, t))
        x_next = x + dt * v
        if heun and (t_next > 0 or (ends_at_0 and not repa)):
            v_next = velocity(x_next, t_next, t) if repa else velocity(x_next, t_next)
            x_next = x + dt * 0.5 * (v + at_best_float64(v_next))
        x = x_next
    return x


@torch.no_grad()
def sample_dopri5(
    velocity: Velocity, x: Tensor, atol: float = 1e-6, rtol: float = 1e-3, ends_at_0: bool = True
) -> Tensor:  # (N, ...) -> (N, ...)
    """Solve dy = v(y, t) dt (Eq. 2) from t = 1 to t = 0 by Dormand-Prince 5(4) in steps that suit all of x (N, ...).

    By torchdiffeq, with the tolerances of SiT. The last step ends at t = 0 (SiT's may go beyond, and interpolates).

    Args:
        velocity: called with the state (N, ...) float64 and t as a float, as often as it needs.
        x: standard normal noise (N, ...), any floating type. All of it shares the steps.
        atol, rtol: positive; a step's error is a root mean square over x.
        ends_at_0: as in `sample_ode`; else a step of Euler's ends there, from t = `LAST_TIME` on.

    Returns:
        The samples (N, ...), float64.

    Raises:
        ValueError: a velocity that is not finite, for which no step is short enough.
    """
    from torchdiffeq import odeint  # no other solver needs it

    def finite_velocity(t: Tensor, x: Tensor) -> Tensor:  # (), (N, ...) -> (N, ...)
        v = at_best_float64(velocity(x, t.item()))
        if not v.isfinite().all():
            raise ValueError(
                f"expected finite samples, found a velocity that is not finite at t = {t.item():.4g}; "
                f"fix: --mixed-precision no, or a lower --guidance-scale"
            )
        return v

    x, end = at_best_float64(x), 0.0 if ends_at_0 else LAST_TIME
    ends = torch.tensor([1.0, end], dtype=x.dtype, device=x.device)
    options = {"step_t": ends[1:]}
    x = odeint(finite_velocity, x, ends, rtol=rtol, atol=atol, method="dopri5", options=options)[1]
    return x if ends_at_0 else x - end * finite_velocity(ends[1], x)


@torch.no_grad()
def sample_sde(
    velocity: Velocity,
    x: Tensor,
    num_steps: int,
    noise: Callable[[int], Tensor],
    interpolant: Interpolant,
    last_step_size: float = 0.04,
    diffusion_form: str = "linear",
    diffusion_norm: float = 1.0,
    last_step: str = "mean",
    time_shift: float = 1.0,
) -> Tensor:  # (N, ...) -> (N, ...)
    """Solve the reverse SDE by Euler-Maruyama from t = 1 to t = `last_step_size`, then step to t = 0 without noise.

    With w_t >= 0 the SDE

        dy = (v(y, t) - w_t s(y, t) / 2) dt + sqrt(w_t) dW,    t falling,

    has the densities of the ODE at every t: as dt < 0, its score term is the Langevin drift +w_t s / 2 |dt| that
    balances the noise. The score s is that of Eq. 6, for any path, and w_t = 2t unless another of SiT's forms is named:
    the sampler of SiT and REPA ("SDE Euler-Maruyama, 250 steps").

    Args:
        velocity: called with the state (N, ...) float64 and t as a float, `num_steps` times in all.
        x: standard normal noise (N, ...), any floating type.
        num_steps: at least 1. The times are `num_steps` equally spaced ones from 1 to `last_step_size`, and 0.
        time_shift: of those between, as in `shift_time`; positive. The last step keeps its size.
        noise: called with the step, 0 to num_steps - 2 in this order; gives standard normal numbers (N, ...).
        interpolant: the path the velocity was trained on.
        last_step_size: the t at which the last step begins, in (0, 1): the score grows without bound towards t = 0.
        diffusion_form, diffusion_norm: of w_t, as in `diffusion`. "SBDM" is infinite at t = 1: there it begins at
            1 - `SBDM_START`, as SiT's `sample_eps` does.
        last_step: one of SiT's. "mean": by the drift. "euler": by the velocity. "tweedie": the mean of the data given
            the state, (y + b^2 s) / a. "none": the last of the steps with noise ends at t = 0, and is the last; it
            takes at least 2 steps, evaluates the velocity num_steps - 1 times, and `last_step_size` is not used.

    Returns:
        The samples (N, ...), float64.

    Raises:
        ValueError: fewer than 1 step (2 without a last step), unknown names, or `last_step_size` not in (0, 1).
    """
    _check_steps(num_steps, 2 if last_step == "none" else 1)
    if last_step not in LAST_STEPS:
        raise ValueError(f"expected one of {', '.join(LAST_STEPS)} (--last-step), found {last_step!r}")
    if not 0 < last_step_size < 1:
        raise ValueError(f"expected a last step of the SDE in (0, 1) (--last-step-size), found {last_step_size}")
    x = at_best_float64(x)
    w = partial(diffusion, form=diffusion_form, norm=diffusion_norm, interpolant=interpolant)

    def drift(x: Tensor, t: float) -> Tensor:  # (N, ...) -> (N, ...)
        v = at_best_float64(velocity(x, t))
        return v - 0.5 * w(t) * interpolant.score(v, x, t)

    start = 1.0 - SBDM_START if diffusion_form == "SBDM" else 1.0
    times = _times(start, 0.0 if last_step == "none" else last_step_size, num_steps, time_shift)
    for step, (t, t_next) in enumerate(itertools.pairwise(times)):
        dt = t_next - t  # negative
        x = x + dt * drift(x, t) + math.sqrt(w(t) * -dt) * at_best_float64(noise(step))
    t = times[-1]
    if last_step == "none":
        return x
    if last_step == "mean":
        return x - t * drift(x, t)
    v = at_best_float64(velocity(x, t))
    if last_step == "euler":
        return x - t * v
    return (x + interpolant.b(t) ** 2 * interpolant.score(v, x, t)) / interpolant.a(t)


def diffusion(t: float, form: str = "linear", norm: float = 1.0, interpolant: Interpolant = LINEAR) -> float:
    """w_t >= 0 of the reverse SDE, t in (0, 1): twice what SiT calls the diffusion, whose time is 1 - t.

    Args:
        form: one of `DIFFUSIONS`; "linear" is REPA's.
        norm: a positive factor; of "decreasing" that of the cosine.
        interpolant: read by "SBDM" (the diffusion of the forward SDE that has this path) and "sigma".

    Raises:
        ValueError: unknown form.
    """
    if form not in DIFFUSIONS:
        raise ValueError(f"expected one of {', '.join(DIFFUSIONS)} (--diffusion-form), found {form!r}")
    return 2 * DIFFUSIONS[form](t, norm, interpolant)
