"""Which optimizer steps are applied, decided on the device: the host does not wait for a loss in any step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

WINDOW = 128  # steps whose gradient norms the running median is taken of
LEAST = 32  # of them, before a norm is called a spike


@dataclass
class StepStats:
    """What `StepGuard.read` tells of the steps since it was last asked.

    Args:
        applied: steps that were applied.
        skipped: steps that were not. first_skipped: the first of them, counted from 1, or None.
        terms: what was not finite in them; empty where they were spikes.
        spikes: gradient norms far above the running median. largest: the largest of them in medians.
        longest_run: of steps in a row that were not applied, whenever it began.
        healthy: the last step was applied, so that the weights may be saved as good ones.
        means: of each term over the applied steps; NaN where there was none.
    """

    applied: int
    skipped: int
    first_skipped: int | None
    terms: list[str]
    spikes: int
    largest: float
    longest_run: int
    healthy: bool
    means: dict[str, float]


class StepGuard:
    """Skips steps with a loss or gradient that is not finite, and, if asked to, spikes of the gradient's norm.

    Everything is kept in tensors on the device, and read when a row of metrics is due. All ranks decide alike.

    Args:
        terms: names of what `check` is given; the last is the gradient's norm.
        device: where the numbers are.
        spike_factor: a norm above this many running medians is a spike.
        skip_spikes: do not apply such steps.
    """

    def __init__(self, terms: list[str], device: torch.device, spike_factor: float, skip_spikes: bool):
        self.terms, self.spike_factor, self.skip_spikes = terms, spike_factor, skip_spikes
        self.norms = torch.full((WINDOW,), math.nan, device=device)
        self.run = torch.zeros((), device=device)  # steps not applied in a row, up to now
        self._reset()

    def _reset(self) -> None:
        device = self.norms.device
        self.sums = torch.zeros(len(self.terms), device=device)
        self.bad_terms = torch.zeros(len(self.terms), device=device)
        # applied, first step not applied, spikes, largest spike, longest run
        self.counts = torch.tensor([0.0, math.inf, 0.0, 0.0, 0.0], device=device)
        self.steps = 0

    def check(self, step: int, values: Tensor) -> Tensor:  # (terms,) -> ()
        """1 if optimizer step `step`, counted from 0, must not be applied, else 0; float32, the same on all ranks.

        Args:
            values: this rank's losses of the step, and the gradient's norm.
        """
        broken = (~torch.isfinite(values)).float()
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(broken, torch.distributed.ReduceOp.MAX)
        norm = values[-1]
        # Not by nanmedian, for which the host waits on a GPU: NaN is sorted behind all numbers.
        known = (~self.norms.isnan()).sum()
        middle = ((known - 1).clamp(min=0) // 2).reshape(1)
        ratio = norm / self.norms.sort().values.gather(0, middle).squeeze(0)
        spike = ((ratio > self.spike_factor) & (known >= LEAST) & (broken.amax() == 0)).float()
        bad = torch.maximum(broken.amax(), spike) if self.skip_spikes else broken.amax()
        # A norm that was not applied has no part in the median.
        self.norms[step % WINDOW] = torch.where(bad > 0, math.nan, norm)
        self.run = (self.run + 1) * bad
        self.sums += torch.where(bad > 0, 0.0, values)
        self.bad_terms = torch.maximum(self.bad_terms, broken)
        applied, first, spikes, largest, longest = self.counts.unbind()
        self.counts = torch.stack(
            [
                applied + 1 - bad,
                torch.where(bad > 0, first.clamp(max=step + 1), first),
                spikes + spike,
                torch.maximum(largest, torch.where(spike > 0, ratio, 0.0)),
                torch.maximum(longest, self.run),
            ]
        )
        self.steps += 1
        return bad

    def read(self) -> StepStats:
        """What came of the steps since the last call, over all ranks. Here the host waits for the device."""
        sums = self.sums.clone()
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
            sums /= torch.distributed.get_world_size()
        numbers = torch.cat([sums, self.bad_terms, self.counts, self.run[None]]).tolist()
        count = len(self.terms)
        sums, bad, (applied, first, spikes, largest, longest, run) = numbers[:count], numbers[count:-6], numbers[-6:]
        means = [value / applied if applied else math.nan for value in sums]
        verdict = StepStats(
            applied=int(applied),
            skipped=self.steps - int(applied),
            first_skipped=int(first) if math.isfinite(first) else None,
            terms=[name for name, broken in zip(self.terms, bad, strict=True) if broken],
            spikes=int(spikes),
            largest=largest,
            longest_run=int(longest),
            healthy=run == 0,
            means=dict(zip(self.terms, means, strict=True)),
        )
        self._reset()
        return verdict

    def state_dict(self) -> dict[str, Tensor]:
        """What the next decision depends on."""
        return {"norms": self.norms.clone(), "run": self.run.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.norms.copy_(state["norms"])
        self.run.copy_(state["run"])
