"""The objective: velocity regression (Eq. 4) plus alignment of intermediate tokens (Eq. 7), summed by Eq. 8.

Tensors alone: no model is loaded here and no file is read. Everything is computed in float32 or better, whatever
precision the network ran in.

Shape suffixes: N batch, ... the shape of one latent, T tokens, D numbers per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion.interpolant import B_FLOOR, Interpolant, at_least_float32


def _smooth_l1(f: Tensor, target: Tensor, beta: float) -> Tensor:  # (N, T, D), (N, T, D) -> (N,)
    # Eq. 7 in its standard, continuous form: d^2 / (2 beta) up to |d| = beta, |d| - beta / 2 beyond.
    return F.smooth_l1_loss(f, target, beta=beta, reduction="none").mean(dim=(1, 2))


def _l1(f: Tensor, target: Tensor, beta: float) -> Tensor:  # (N, T, D), (N, T, D) -> (N,)
    return (f - target).abs().mean(dim=(1, 2))


def _l2(f: Tensor, target: Tensor, beta: float) -> Tensor:  # (N, T, D), (N, T, D) -> (N,)
    return (f - target).square().mean(dim=(1, 2))


def _cosine(f: Tensor, target: Tensor, beta: float) -> Tensor:  # (N, T, D), (N, T, D) -> (N,)
    return (1 - F.cosine_similarity(f, target, dim=2)).mean(dim=1)


def _cosine_over_tokens(f: Tensor, target: Tensor, beta: float) -> Tensor:  # (N, T, D), (N, T, D) -> (N,)
    return (1 - F.cosine_similarity(f, target, dim=1)).mean(dim=1)


# Table 1's objectives, and SRA's. Each gives one number per sample: a mean over elements (cosine: over tokens;
# cosine_over_tokens, SRA's: of each channel as a vector over the tokens, over channels).
ALIGN_OBJECTIVES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "smooth_l1": _smooth_l1,
    "l1": _l1,
    "l2": _l2,
    "cosine": _cosine,
    "cosine_over_tokens": _cosine_over_tokens,
}


@dataclass(frozen=True)
class Alignment:
    """One alignment term of Eq. 8.

    Args:
        weight: lambda.
        objective: a key of `ALIGN_OBJECTIVES`.
        beta: width of smooth L1's quadratic part, in units of the target.
        normalize: bring prediction and target each to mean 0 and std 1 over all numbers of a sample, so that the scale
            of the latents does not matter.
        time_range: samples with t outside this closed interval add nothing; the mean stays over the whole batch.
    """

    weight: float = 1.0
    objective: str = "smooth_l1"
    beta: float = 0.05
    time_range: tuple[float, float] = (0.0, 1.0)
    normalize: bool = False

    def __post_init__(self):
        if self.objective not in ALIGN_OBJECTIVES:
            raise ValueError(f"expected an objective of {', '.join(ALIGN_OBJECTIVES)}, found {self.objective!r}")
        if not self.beta > 0:
            raise ValueError(f"expected smooth L1's beta above 0, found {self.beta}; set --align-beta")
        low, high = self.time_range
        if not 0 <= low < high <= 1:
            raise ValueError(f"expected a time range 0 <= low < high <= 1, found {low} {high}; set --align-time-range")

    def loss(self, f_sit: Tensor, target: Tensor, t: Tensor) -> Tensor:  # (N, T, D), (N, T, D), (N,) -> ()
        return alignment_loss(f_sit, target, t, self)


def alignment_loss(f_sit: Tensor, f_vae: Tensor, t: Tensor, alignment: Alignment) -> Tensor:
    """L_align of Eq. 7, with the mean over elements in place of the sum, and then over the batch.

    Args:
        f_sit: (N, T, D) projected tokens P(h_SiT), any float type.
        f_vae: (N, T, D) target tokens in the same order; no gradient flows into them.
        t: (N,) times in [0, 1].
        alignment: objective, beta and time range (its weight is not applied here).

    Returns:
        A scalar in float32 (float64 for float64 inputs).
    """
    f_sit, f_vae = at_least_float32(f_sit), at_least_float32(f_vae.detach())
    if alignment.normalize:  # by layer norm without weights: the variance is that of the sample, not unbiased
        f_sit, f_vae = (F.layer_norm(f, f.shape[1:], eps=1e-12) for f in (f_sit, f_vae))
    per_sample = ALIGN_OBJECTIVES[alignment.objective](f_sit, f_vae, alignment.beta)  # (N,)
    low, high = alignment.time_range
    if (low, high) != (0.0, 1.0):
        # `where`, not a product: a sample outside must not pass on an infinity either.
        per_sample = torch.where((t >= low) & (t <= high), per_sample, torch.zeros_like(per_sample))
    return per_sample.mean()


def training_loss(
    model: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]],
    z: Tensor,
    eps: Tensor,
    t: Tensor,
    y: Tensor,
    interpolant: Interpolant,
    targets: Mapping[str, Tensor | None],
    alignments: Mapping[str, Alignment],
) -> dict[str, Tensor]:
    """All terms of Eq. 8 for one batch.

    Args:
        model: (y_t, t, y) -> the prediction that `interpolant` names, (N, ...), and
            {name: projected tokens (N, T, D)}, as `AlignedSiT`; a head that knows its target gives both.
        z: (N, ...) clean scaled latents. eps: (N, ...) standard normal noise.
        t: (N,) times in [0, 1]. y: (N,) int64 classes, some already dropped to the null class.
        targets: {name: (N, T, D)}, or None where the forward itself has what is needed. A term that is not in it is
            not computed, and reported as 0.
        alignments: {name: settings}, each with a weight and a `loss`; empty for plain SiT.

    Returns:
        {"total", "velocity", and "align_<name>" for each alignment, unweighted}: scalars in float32 or better.
    """
    y_t = interpolant.interpolate(z, eps, t)
    output, projected = model(y_t, t, y)
    velocity = interpolant.predicted_velocity(output, y_t, t, B_FLOOR)
    if interpolant.prediction == "v":
        v_target = interpolant.velocity(z, eps, t)
    else:  # with the same divisor, so that the exact z has no loss
        v_target = interpolant.predicted_velocity(z, y_t, t, B_FLOOR)
    # Eq. 4: a mean per sample, then over the batch.
    error = velocity - v_target
    losses = {"velocity": error.square().flatten(1).mean(dim=1).mean()}
    total = losses["velocity"]
    for name, alignment in alignments.items():
        f_sit, f_target = projected[name], targets.get(name)
        f_sit, f_target = f_sit if isinstance(f_sit, tuple) else (f_sit, f_target)
        if name not in targets:  # its head stays in the graph: DDP waits for the gradients of all
            losses[f"align_{name}"] = 0 * at_least_float32(f_sit).sum()
            total = total + losses[f"align_{name}"]
            continue
        losses[f"align_{name}"] = alignment.loss(f_sit, f_target, t)
        total = total + alignment.weight * losses[f"align_{name}"]  # Eq. 8
    return {"total": total, **losses}
