"""SRA (Jiang et al., 2025): a block's tokens learn those of a later block of the EMA, which sees the same sample with
less noise.

Shape suffixes: N batch, T tokens, D hidden size.
"""

from __future__ import annotations

from torch import Tensor

from alignment.terms import AlignmentContext, AlignmentMethod, AlignmentTerms, Batch, check_depths, terms_by_settings
from models.projector import Projector

LAYERS = 2  # of SRA's head


def build(context: AlignmentContext) -> AlignmentTerms:
    settings, sit, ema = context.settings, context.sit.config, context.ema
    (depth,) = check_depths(context, (settings.sra_teacher_depth,), "--sra-teacher-depth")
    if context.compile:
        for block in ema.blocks[:depth]:
            block.compile(fullgraph=True, dynamic=False)

    def target(batch: Batch) -> Tensor:  # -> (N, T, D)
        t = (batch.t - settings.sra_t_max * batch.t_offset).clamp(min=0)
        with context.autocast():
            return ema.tokens(context.interpolant.interpolate(batch.z, batch.eps, t), t, batch.y, depth)

    return terms_by_settings(context, "sra", lambda: Projector(sit.hidden_size, sit.hidden_size, LAYERS), target)


METHOD = AlignmentMethod(
    label="SRA",
    build=build,
    needs=frozenset({"t_offset"}),
    # XL by its authors, B the default of their code; the others are ours.
    default_depths={
        "sra_depth": {"Ti": (2,), "S": (4,), "B": (4,), "L": (8,), "XL": (8,)},
        "sra_teacher_depth": {"Ti": 4, "S": 8, "B": 8, "L": 16, "XL": 20},
    },
    depth_setting="sra_depth",
)
