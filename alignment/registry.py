"""What `--align` can align a SiT's tokens with: one entry of `METHODS` each, joined by "+".

A method is a few values: the blocks it takes tokens from, the head on them, the settings of its loss term, and a
function that makes the target from the batch. Everything else in training is the same for all, so that methods are
compared on the same data, order, seeds and draws.

Shape suffixes: N batch, C latent channels, H = W latent side, R image side, T tokens, D numbers per token.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from diffusion.interpolant import Interpolant
from loss import Alignment
from models.encoders import load_encoder
from models.projector import ConvHead, Projector
from models.sit import SiT, patchify

if TYPE_CHECKING:
    from training.config import TrainConfig

REPA_LAYERS, REPA_WIDTH = 3, 2048  # of REPA's head
SRA_LAYERS = 2  # of SRA's


@dataclass
class Batch:
    """What a target can be made of: all that one micro-batch holds. Tensors of the process's device."""

    z: Tensor  # (N, C, H, W) scaled posterior sample, which is noised
    mean: Tensor  # (N, C, H, W) scaled posterior mean
    eps: Tensor  # (N, C, H, W) standard normal noise
    t: Tensor  # (N,) times in [0, 1]
    y: Tensor  # (N,) int64 classes, some dropped to the null class
    t_offset: Tensor | None  # (N,) uniform in [0, 1), for a teacher that looks at an earlier time
    images: Tensor | None  # (N, R, R, 3) uint8 crops, where the store was opened with them


@dataclass
class AlignmentContext:
    """What a method is made from."""

    config: TrainConfig  # resolved
    sit: SiT
    ema: SiT  # its moving average
    interpolant: Interpolant
    device: torch.device
    autocast: Callable[[], AbstractContextManager]
    steps_per_epoch: float


@dataclass
class Method:
    """One term of the loss, or one at each of several depths that share the target.

    Args:
        depths: blocks whose tokens are aligned, counted from 1; the weight is divided among them.
        make_head: a new head for the tokens of one of them.
        alignment: weight, objective, beta and time range.
        schedule: optimizer step -> factor of the weight.
        target: batch -> (N, T, D), called without gradient.
    """

    depths: tuple[int, ...]
    make_head: Callable[[], nn.Module]
    alignment: Alignment
    schedule: Callable[[int], float]
    target: Callable[[Batch], Tensor]

    def alignment_at(self, step: int) -> Alignment:
        """The settings of each of its terms at an optimizer step."""
        weight = self.alignment.weight * self.schedule(step) / len(self.depths)
        return dataclasses.replace(self.alignment, weight=weight)

    def term_names(self, name: str) -> dict[str, int]:
        """Depth by name of term: one depth bears the method's own name."""
        return {name if len(self.depths) == 1 else f"{name}_{depth}": depth for depth in self.depths}


def vae(context: AlignmentContext) -> Method:
    """VAE-REPA: the clean latent, in the SiT's own patches, by smooth L1."""
    config, sit = context.config, context.sit.config

    def target(batch: Batch) -> Tensor:  # -> (N, T, p*p*C)
        return patchify(batch.z if config.align_target == "sample" else batch.mean, sit.patch_size)

    def make_head() -> nn.Module:
        if config.align_head == "conv":
            return ConvHead(sit.hidden_size, sit.patch_dim)
        return Projector(sit.hidden_size, sit.patch_dim, config.align_layers)

    return Method(
        _depths(context, config.align_depth, "--align-depth"),
        make_head,
        _alignment(config, config.align_weight, config.align_objective),
        weight_schedule(config.align_schedule, context, "--align-schedule"),
        _normalized(target) if config.align_normalize else target,
    )


def repa(context: AlignmentContext) -> Method:
    """REPA (Yu et al., 2024): the patch tokens that a frozen encoder gives for the image, by cosine."""
    config, sit = context.config, context.sit.config
    depths = _depths(context, config.repa_depth, "--repa-depth")  # before the weights are fetched
    side = math.isqrt(sit.num_tokens)
    encoder = load_encoder(config.repa_encoder, side, config.repa_weights, context.device)
    if config.compile:
        encoder.compile(dynamic=False)

    def make_head() -> nn.Module:
        if config.repa_head == "conv":
            return ConvHead(sit.hidden_size, encoder.dim)
        return Projector(sit.hidden_size, encoder.dim, REPA_LAYERS, REPA_WIDTH)

    def target(batch: Batch) -> Tensor:  # -> (N, T, D)
        return encoder(batch.images)

    return Method(
        depths,
        make_head,
        _alignment(config, config.repa_weight, config.repa_objective),
        weight_schedule(config.repa_schedule, context, "--repa-schedule"),
        _normalized(target) if config.repa_normalize else target,
    )


def sra(context: AlignmentContext) -> Method:
    """SRA (Jiang et al., 2025): a later block of the moving average, which sees the same sample with less noise."""
    config, sit, ema = context.config, context.sit.config, context.ema
    (depth,) = _depths(context, (config.sra_teacher_depth,), "--sra-teacher-depth")
    if config.compile:
        for block in ema.blocks[:depth]:
            block.compile(fullgraph=True, dynamic=False)

    def target(batch: Batch) -> Tensor:  # -> (N, T, D)
        t = (batch.t - config.sra_t_max * batch.t_offset).clamp(min=0)
        with context.autocast():
            return ema.tokens(context.interpolant.interpolate(batch.z, batch.eps, t), t, batch.y, depth)

    return Method(
        _depths(context, config.sra_depth, "--sra-depth"),
        lambda: Projector(sit.hidden_size, sit.hidden_size, SRA_LAYERS),
        _alignment(config, config.sra_weight, config.sra_objective),
        weight_schedule(config.sra_schedule, context, "--sra-schedule"),
        target,
    )


METHODS: dict[str, Callable[[AlignmentContext], Method]] = {"vae": vae, "repa": repa, "sra": sra}


def parse_align(align: str) -> list[str]:
    """Names of the methods that a value of `--align` joins, in the order of `METHODS`.

    Raises:
        ValueError: one is unknown, or named twice.
    """
    if align == "none":
        return []
    names = align.split("+")
    if len(set(names)) != len(names) or not set(names) <= set(METHODS):
        raise ValueError(
            f"--align: expected none, or some of {', '.join(METHODS)} joined by + (such as repa+vae), found {align!r}"
        )
    return [name for name in METHODS if name in names]


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
        hold, tenth = (99, 800) if context.config.resolution >= 512 else (149, 1000)
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


def normalize_tokens(x: Tensor) -> Tensor:  # (N, T, D) -> (N, T, D)
    """Each of the D channels to mean 0 and deviation 1 over an image's tokens, in float32 or better.

    What all tokens of an image share goes, and their differences stay: iREPA's spatial normalisation (arXiv
    2512.10794, with gamma = 1).
    """
    x = x if x.dtype == torch.float64 else x.float()
    x = x - x.mean(dim=1, keepdim=True)
    return x / (x.square().mean(dim=1, keepdim=True).sqrt() + 1e-6)


def _depths(context: AlignmentContext, depths: tuple[int, ...], flag: str) -> tuple[int, ...]:
    """`depths`, once it is sure that the SiT has those blocks."""
    blocks = context.sit.config.depth
    if len(set(depths)) != len(depths) or not all(1 <= depth <= blocks for depth in depths):
        raise ValueError(
            f"{flag}: expected different blocks in 1..{blocks}, those of {context.config.model}, "
            f"found {' '.join(map(str, depths))}"
        )
    return depths


def _normalized(target: Callable[[Batch], Tensor]) -> Callable[[Batch], Tensor]:
    return lambda batch: normalize_tokens(target(batch))


def _alignment(config: TrainConfig, weight: float, objective: str) -> Alignment:
    return Alignment(weight, objective, config.align_beta, config.align_time_range)
