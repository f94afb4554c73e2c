"""VAE-REPA (Section 3.2): a block's tokens learn the clean latent, in the SiT's own patches, by smooth L1.

Shape suffixes: N batch, T tokens, p patch side, C latent channels.
"""

from __future__ import annotations

from torch import Tensor, nn

from alignment.terms import (
    AlignmentContext,
    AlignmentMethod,
    AlignmentTerms,
    Batch,
    normalize_tokens,
    terms_by_settings,
)
from models.projector import ConvHead, Projector
from models.sit import patchify


def build(context: AlignmentContext) -> AlignmentTerms:
    settings, sit = context.settings, context.sit.config

    def make_head() -> nn.Module:
        if settings.align_head == "conv":
            return ConvHead(sit.hidden_size, sit.patch_dim)
        return Projector(sit.hidden_size, sit.patch_dim, settings.align_layers)

    def target(batch: Batch) -> Tensor:  # -> (N, T, p*p*C)
        f_vae = patchify(batch.z if settings.align_target == "sample" else batch.mean, sit.patch_size)
        return normalize_tokens(f_vae) if settings.align_normalize == "spatial" else f_vae

    return terms_by_settings(context, "align", make_head, target)


METHOD = AlignmentMethod(
    label="VAE-REPA",
    build=build,
    # Section 4.2; S and Ti are ours.
    default_depths={"align_depth": {"Ti": (2,), "S": (2,), "B": (2,), "L": (8,), "XL": (8,)}},
    depth_setting="align_depth",
    guides=True,
)
