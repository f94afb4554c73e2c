"""REPA (Yu et al., 2024): a block's tokens learn the patch tokens of a frozen image encoder, by cosine similarity.

Shape suffixes: N batch, T tokens, D width of the encoder.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from alignment.terms import (
    AlignmentContext,
    AlignmentMethod,
    AlignmentTerms,
    Batch,
    check_depths,
    normalize_tokens,
    terms_by_settings,
)
from models.encoders import load_encoder
from models.projector import ConvHead, Projector

LAYERS, WIDTH = 3, 2048  # of REPA's head


def build(context: AlignmentContext) -> AlignmentTerms:
    settings, sit = context.settings, context.sit.config
    check_depths(context, settings.repa_depth, "--repa-depth")  # before the weights are fetched
    side = math.isqrt(sit.num_tokens)
    encoder = load_encoder(settings.repa_encoder, side, settings.repa_weights, context.device, settings.repa_final_norm)
    if context.compile:
        encoder.compile(dynamic=False)

    def make_head() -> nn.Module:
        if settings.repa_head != "mlp":
            return ConvHead(sit.hidden_size, encoder.dim, 1 if settings.repa_head == "conv1" else 3)
        return Projector(sit.hidden_size, encoder.dim, LAYERS, WIDTH)

    def target(batch: Batch) -> Tensor:  # -> (N, T, D)
        features = encoder(batch.images)
        return normalize_tokens(features, settings.repa_normalize_share) if settings.repa_normalize else features

    return terms_by_settings(context, "repa", make_head, target)


METHOD = AlignmentMethod(
    label="REPA",
    build=build,
    needs=frozenset({"images"}),
    # B, L and XL by its authors; S and Ti are ours.
    default_depths={"repa_depth": {"Ti": (2,), "S": (4,), "B": (4,), "L": (8,), "XL": (8,)}},
    depth_setting="repa_depth",
)
