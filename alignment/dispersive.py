"""Dispersive loss (arXiv 2506.09027): a block's tokens keep away from those of other samples. No head, no target.

Who disperses whom is a fixed number of consecutive samples of the global batch, so that no number depends on how the
batch is divided. (In its authors' code it is the local batch.)

Shape suffixes: N batch, G samples of a group, T tokens, D hidden size.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from torch import Tensor, nn

from alignment.terms import AlignmentContext, AlignmentMethod, AlignmentTerms, terms_by_settings
from diffusion.interpolant import at_least_float32


@dataclass(frozen=True)
class Dispersion:
    """The InfoNCE form with squared distances: over all pairs of a group, a sample with itself included,

    log mean_ij exp(-|z_i - z_j|^2 / (T D tau)), which lies in [-log G, 0].
    """

    weight: float
    tau: float
    group: int
    objective: str = "dispersive"

    def loss(self, h: Tensor, target: None, t: Tensor) -> Tensor:  # (N, T, D), None, (N,) -> ()
        """The mean over the groups, in float32 or better; all times count."""
        z = at_least_float32(h).flatten(1).unflatten(0, (-1, self.group))  # (N / G, G, T * D)
        z = z - z.mean(dim=1, keepdim=True)  # distances stay, and their rounding is less
        products = z @ z.mT  # (N / G, G, G)
        squares = products.diagonal(dim1=1, dim2=2)
        distances = (squares[:, :, None] + squares[:, None] - 2 * products).clamp(min=0)
        exponents = -distances / (z.shape[2] * self.tau)
        return (exponents.flatten(1).logsumexp(dim=1) - 2 * math.log(self.group)).mean()


def build(context: AlignmentContext) -> AlignmentTerms:
    settings, size = context.settings, context.micro_batch
    group = settings.dispersive_group
    if size % group:
        shared = math.gcd(size, group)
        fix = "another --batch-size" if shared == 1 else f"--dispersive-group {shared}"
        raise ValueError(
            f"--dispersive-group: expected a divisor of the {size} samples of a micro-batch, found {group}; set {fix}, "
            f"or other processes or --gradient-accumulation-steps"
        )
    terms = terms_by_settings(context, "dispersive", nn.Identity, objective="l2")
    alignment = Dispersion(settings.dispersive_weight, settings.dispersive_tau, group)
    return dataclasses.replace(terms, alignment=alignment, group=group)


METHOD = AlignmentMethod(
    label="Dispersive",
    build=build,
    # A quarter of the blocks, as its authors' JAX code.
    default_depths={"dispersive_depth": {"Ti": (2,), "S": (3,), "B": (3,), "L": (6,), "XL": (7,)}},
    depth_setting="dispersive_depth",
)
