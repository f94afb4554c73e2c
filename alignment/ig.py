"""Internal Guidance (arXiv 2512.24176): a second final layer on an earlier block predicts the velocity too.

A weaker model inside the network, by which sampling is guided: `sample_ddp.py --head-guidance`.

Shape suffixes: N batch, T tokens, p patch side, C latent channels.
"""

from __future__ import annotations

from torch import Tensor, nn

from alignment.terms import AlignmentContext, AlignmentMethod, AlignmentTerms, Batch, terms_by_settings
from models.sit import FinalLayer, patchify


def build(context: AlignmentContext) -> AlignmentTerms:
    sit = context.sit.config

    def make_head() -> nn.Module:
        head = FinalLayer(sit)
        for parameter in head.parameters():
            nn.init.zeros_(parameter)
        return head

    def target(batch: Batch) -> Tensor:  # -> (N, T, p*p*C)
        return patchify(context.interpolant.velocity(batch.z, batch.eps, batch.t), sit.patch_size)

    return terms_by_settings(context, "ig", make_head, target, objective="l2", also=(0,))


METHOD = AlignmentMethod(
    label="Internal Guidance",
    build=build,
    # XL by its authors; the others are ours.
    default_depths={"ig_depth": {"Ti": (2,), "S": (4,), "B": (4,), "L": (8,), "XL": (8,)}},
    depth_setting="ig_depth",
    guides=True,
)
