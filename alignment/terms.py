"""What an alignment method is, what it is built from, and what training gets of it.

Shape suffixes: N batch, C latent channels, H = W latent side, R image side, T tokens, D numbers per token.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from alignment.settings import AlignmentSettings
from diffusion.interpolant import Interpolant
from loss import Alignment
from models.sit import SiT


@dataclass
class Batch:
    """What a target can be made of: all that one micro-batch holds, on the device of the rank."""

    z: Tensor  # (N, C, H, W) scaled posterior sample, which is noised
    mean: Tensor  # (N, C, H, W) scaled posterior mean
    eps: Tensor  # (N, C, H, W) standard normal noise
    t: Tensor  # (N,) times in [0, 1]
    y: Tensor  # (N,) int64 classes, some dropped to the null class
    t_offset: Tensor | None  # (N,) uniform in [0, 1), where a method needs "t_offset"
    images: Tensor | None  # (N, R, R, 3) uint8 crops, where a method needs "images"


@dataclass
class AlignmentContext:
    """What a method is built from."""

    settings: AlignmentSettings  # with every None decided
    sit: SiT
    ema: SiT
    interpolant: Interpolant
    device: torch.device
    autocast: Callable[[], AbstractContextManager]
    steps_per_epoch: float
    resolution: int  # of the images, in pixels
    micro_batch: int  # samples of one forward, on each process
    compile: bool


@dataclass
class AlignmentTerms:
    """The terms of the loss that one method adds: one per aligned block, all with the same target.

    Args:
        depths: blocks whose tokens are aligned, counted from 1; the weight is divided among them.
        make_head: a new head for the tokens of one of them.
        alignment: weight, objective, beta and time range.
        schedule: optimizer step -> factor of the weight.
        target: batch -> (N, T, D), called under no_grad; None where the head gives the target too, or none is needed.
        also: what else the heads take: the tokens of further blocks, or, for 0, the condition (N, D).
        group: consecutive samples that the loss takes together: it divides every micro-batch.
    """

    depths: tuple[int, ...]
    make_head: Callable[[], nn.Module]
    alignment: Alignment
    schedule: Callable[[int], float]
    target: Callable[[Batch], Tensor | None] = lambda batch: None
    also: tuple[int, ...] = ()
    group: int = 1

    def alignment_at(self, step: int) -> Alignment:
        """The settings of each term at an optimizer step, counted from 0."""
        weight = self.alignment.weight * self.schedule(step) / len(self.depths)
        return dataclasses.replace(self.alignment, weight=weight)

    def term_names(self, method: str) -> dict[str, int]:
        """Depth by name of term: a single depth bears the method's own name."""
        return {method if len(self.depths) == 1 else f"{method}_{depth}": depth for depth in self.depths}


@dataclass(frozen=True)
class AlignmentMethod:
    """An entry of the registry: what `--align` can name.

    Args:
        label: its name in tables and model cards.
        build: makes its terms.
        needs: what it needs of a batch beside latents, noise, times and labels: "images", "t_offset".
        default_depths: {setting: {SiT size: value}} for the settings that are None unless the user gives them.
        depth_setting: the setting that holds the depths of the aligned blocks, or None if they are fixed.
        guides: whether its heads can guide sampling, so that the EMAs cover them.
    """

    label: str
    build: Callable[[AlignmentContext], AlignmentTerms]
    needs: frozenset[str] = frozenset()
    default_depths: Mapping[str, Mapping[str, int | tuple[int, ...]]] = dataclasses.field(default_factory=dict)
    depth_setting: str | None = None
    guides: bool = False


def check_depths(context: AlignmentContext, depths: tuple[int, ...], flag: str) -> tuple[int, ...]:
    """`depths`, refused if the SiT lacks one of those blocks.

    Raises:
        ValueError: it has not, or a block is named twice; the message names `flag`.
    """
    blocks = context.sit.config.depth
    if len(set(depths)) != len(depths) or not all(1 <= depth <= blocks for depth in depths):
        raise ValueError(f"{flag}: expected different blocks in 1..{blocks}, found {' '.join(map(str, depths))}")
    return depths


def make_alignment(context: AlignmentContext, weight: float, objective: str, per_sample: bool = False) -> Alignment:
    """The loss of a method, with the beta and the time range that all methods share."""
    settings = context.settings
    return Alignment(weight, objective, settings.align_beta, settings.align_time_range, per_sample)


def terms_by_settings(
    context: AlignmentContext,
    prefix: str,
    make_head: Callable[[], nn.Module],
    target: Callable[[Batch], Tensor | None] = AlignmentTerms.target,
    objective: str | None = None,
    also: tuple[int, ...] = (),
) -> AlignmentTerms:
    """The terms of a method whose settings are `<prefix>_depth`, `_weight`, `_schedule`, unless it is given
    `_objective`, and, it may be, `_normalize`."""
    per_sample = getattr(context.settings, f"{prefix}_normalize", None) == "sample"
    names = "depth weight schedule".split()
    depths, weight, schedule = (getattr(context.settings, f"{prefix}_{name}") for name in names)
    objective = objective or getattr(context.settings, f"{prefix}_objective")
    return AlignmentTerms(
        check_depths(context, depths, f"--{prefix}-depth"),
        make_head,
        make_alignment(context, weight, objective, per_sample),
        weight_schedule(schedule, context, f"--{prefix}-schedule"),
        target,
        also,
    )


def weight_schedule(schedule: str, context: AlignmentContext, flag: str) -> Callable[[int], float]:
    """The factor of a weight at each optimizer step (counted from 0).

        constant     1
        linear:K     falls in a straight line from 1 to 0 at step K, and stays there
        cosine:K     falls along half a cosine from 1 to 0 at step K, and stays there
        off:K        1 before step K, 0 from it on
        sra          SRA's own: 1 through epoch 149, then a tenth every 1,000 epochs; at 512 pixels and more, 99 and 800

    Raises:
        ValueError: another text; the message names `flag`.
    """
    kind, _, end = schedule.partition(":")
    if schedule == "constant":
        return lambda step: 1.0
    if schedule == "sra":
        hold, tenth = (99, 800) if context.resolution >= 512 else (149, 1000)
        return lambda step: 0.1 ** (max(0, int(step / context.steps_per_epoch) - hold) / tenth)
    if kind not in ("linear", "cosine", "off") or not end.isdigit() or int(end) < 1:
        raise ValueError(
            f"{flag}: expected constant, sra, or linear:K, cosine:K or off:K with a step K of 1 or more, "
            f"found {schedule!r}"
        )
    last = int(end)
    return {
        "linear": lambda step: max(0.0, 1 - step / last),
        "cosine": lambda step: 0.5 * (1 + math.cos(math.pi * min(1.0, step / last))) if step < last else 0.0,
        "off": lambda step: float(step < last),
    }[kind]


def normalize_tokens(x: Tensor, share: float = 1.0) -> Tensor:  # (N, T, D) -> (N, T, D)
    """Each of the D channels to mean 0 and std 1 over the tokens of an image, in float32 or better.

    What all tokens of an image share goes, and their differences stay: iREPA's spatial normalisation (arXiv
    2512.10794), of which `share` in [0, 1] is gamma: with less than 1 so much of the mean goes, and the rest stays.
    """
    x = x if x.dtype == torch.float64 else x.float()
    mean = x.mean(dim=1, keepdim=True)
    x = x - mean
    std = x.square().mean(dim=1, keepdim=True).sqrt() + 1e-6
    return x / std if share == 1 else (x + (1 - share) * mean) / std
