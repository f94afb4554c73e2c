"""From noise to data: solvers of the probability-flow ODE (Eq. 2) and of the reverse SDE.

`sampling.generator.sample_latents` chooses among them by name.

Time runs from t = 1 (noise) down to t = 0 (data). The state is float64 throughout, so that hundreds of small steps add
up without loss; the network sees float32, or less under autocast.

Shape suffixes: N batch, ... the shape of one sample.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from diffusion.guidance import Velocity, guided_velocity  # noqa: F401 (the public name is of this module)
from diffusion.interpolant import Interpolant


def _check_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"expected at least 1 step of the solver (--num-steps), found {num_steps}")


def _times(start: float, end: float, count: int) -> list[float]:
    """`count` times at equal distances, both ends included and exact; one time is the start. Those of SiT and REPA."""
    return torch.linspace(start, end, count, dtype=torch.float64).tolist()


@torch.no_grad()
def sample_ode(
    velocity: Velocity, x: Tensor, num_steps: int, heun: bool = False, repa: bool = False
) -> Tensor:  # (N, ...) -> (N, ...)
    """Solve dy = v(y, t) dt (Eq. 2) from t = 1 to t = 0 in equal steps.

    Euler has order 1 and takes `num_steps` evaluations of the velocity. Heun has order 2 and takes 2 num_steps: the
    velocity exists at both ends of the path, so its last step needs no exception. REPA's Heun makes one, and takes
    2 num_steps - 1; both evaluations of a step are guided if its first time lies in the interval of guidance.

    Args:
        velocity: called with the state (N, ...) float64 and t as a float.
        x: standard normal noise (N, ...), any floating type.
        num_steps: steps, at least 1.
        heun: correct each Euler step by the velocity where it leads.
        repa: but for the last step, and with the step's first time as a third argument of that velocity: REPA's code.

    Returns:
        The samples (N, ...), float64.

    Raises:
        ValueError: fewer than 1 step.
    """
    _check_steps(num_steps)
    x = x.double()
    times = _times(1.0, 0.0, num_steps + 1)
    for t, t_next in itertools.pairwise(times):
        dt = t_next - t  # negative
        v = velocity(x, t).double()
        x_next = x + dt * v
        if heun and not (repa and t_next == 0):
            v_next = velocity(x_next, t_next, t) if repa else velocity(x_next, t_next)
            x_next = x + dt * 0.5 * (v + v_next.double())
        x = x_next
    return x


@torch.no_grad()
def sample_sde(
    velocity: Velocity,
    x: Tensor,
    num_steps: int,
    noise: Callable[[int], Tensor],
    interpolant: Interpolant,
    last_step_size: float = 0.04,
) -> Tensor:  # (N, ...) -> (N, ...)
    """Solve the reverse SDE by Euler-Maruyama from t = 1 to t = `last_step_size`, then step to t = 0 without noise.

    With w_t >= 0 the SDE

        dy = (v(y, t) - w_t s(y, t) / 2) dt + sqrt(w_t) dW,    t falling,

    has the densities of the ODE at every t: as dt < 0, its score term is the Langevin drift +w_t s / 2 |dt| that
    balances the noise. w_t = 2t and the score s by Eq. 6, for any path: the sampler of SiT and REPA ("SDE
    Euler-Maruyama, 250 steps").

    Args:
        velocity: called with the state (N, ...) float64 and t as a float, `num_steps` times in all.
        x: standard normal noise (N, ...), any floating type.
        num_steps: at least 1. The times are `num_steps` equally spaced ones from 1 to `last_step_size`, and 0.
        noise: called with the step, 0 to num_steps - 2 in this order; gives standard normal numbers (N, ...).
        interpolant: the path the velocity was trained on.
        last_step_size: the t at which the last step begins, in (0, 1): the score grows without bound towards t = 0.

    Returns:
        The samples (N, ...), float64.

    Raises:
        ValueError: fewer than 1 step, or `last_step_size` not in (0, 1).
    """
    _check_steps(num_steps)
    if not 0 < last_step_size < 1:
        raise ValueError(f"expected a last step of the SDE in (0, 1) (--last-step-size), found {last_step_size}")
    x = x.double()

    def drift(x: Tensor, t: float) -> Tensor:  # (N, ...) -> (N, ...)
        v = velocity(x, t).double()
        return v - 0.5 * diffusion(t) * interpolant.score(v, x, t)

    times = _times(1.0, last_step_size, num_steps)
    for step, (t, t_next) in enumerate(itertools.pairwise(times)):
        dt = t_next - t  # negative
        x = x + dt * drift(x, t) + math.sqrt(diffusion(t) * -dt) * noise(step).double()
    return x - times[-1] * drift(x, times[-1])


def diffusion(t: float) -> float:
    """w_t of the reverse SDE, as in SiT ("linear") and REPA."""
    return 2 * t
