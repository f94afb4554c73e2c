"""LayerSync (arXiv 2510.12581): a block's tokens learn those of a later block of the same forward, without gradient.

No head, no other network and no draws: the free control of every comparison.

Shape suffixes: N batch, T tokens, D hidden size.
"""

from __future__ import annotations

from torch import Tensor, nn

from alignment.terms import AlignmentContext, AlignmentMethod, AlignmentTerms, check_depths, terms_by_settings


class Teach(nn.Module):
    """Tokens as they are, and what they are to learn, which gets no gradient."""

    def forward(self, h: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:  # (N, T, D) each -> (N, T, D) each
        return h, teacher.detach()


def build(context: AlignmentContext) -> AlignmentTerms:
    teacher = check_depths(context, (context.settings.layersync_teacher_depth,), "--layersync-teacher-depth")
    terms = terms_by_settings(context, "layersync", Teach, objective="cosine", also=teacher)
    if teacher[0] <= max(terms.depths):
        raise ValueError(
            f"--layersync-teacher-depth: expected a block above those of --layersync-depth "
            f"({' '.join(map(str, terms.depths))}), found {teacher[0]}"
        )
    return terms


METHOD = AlignmentMethod(
    label="LayerSync",
    build=build,
    # XL by its authors; the others are ours, at 0.29 and 0.57 of the blocks as XL's are.
    default_depths={
        "layersync_depth": {"Ti": (2,), "S": (3,), "B": (3,), "L": (7,), "XL": (8,)},
        "layersync_teacher_depth": {"Ti": 3, "S": 7, "B": 7, "L": 14, "XL": 16},
    },
    depth_setting="layersync_depth",
)
