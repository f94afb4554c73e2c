"""Heads that take a block's tokens to the space of what they are aligned with: the MLP P of Section 3.2.2, and a
convolution.

Shape suffixes: N batch, T tokens of a square grid, D hidden size.
"""

from __future__ import annotations

import itertools
import math

from torch import Tensor, nn

from models.sit import xavier_linear

MAX_LAYERS = 8


class Projector(nn.Sequential):
    """(..., D) -> (..., out_dim): `layers` linear maps with SiLU between them, all hidden widths equal.

    The paper gives the parameter counts (Table 1: five layers 8M, two layers 1M for B; Table 4: 18M for XL), which a
    width of 2 D meets: 8.3M, 1.2M and 18.6M.

    Raises:
        ValueError: `layers` outside [1, 8].
    """

    def __init__(self, in_dim: int, out_dim: int, layers: int = 5, width: int | None = None):
        if not 1 <= layers <= MAX_LAYERS:
            raise ValueError(f"expected 1 to {MAX_LAYERS} layers in the head (--align-layers), found {layers}")
        width = 2 * in_dim if width is None else width
        sizes = [in_dim, *[width] * (layers - 1), out_dim]
        modules: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise(sizes):
            modules += [nn.Linear(fan_in, fan_out), nn.SiLU()]
        super().__init__(*modules[:-1])
        self.apply(xavier_linear)


class ConvHead(nn.Conv2d):
    """(N, T, D) -> (N, T, out_dim): one convolution over the tokens' grid; from 3 x 3 on a token sees its neighbours.

    The head that iREPA (arXiv 2512.10794) sets in place of REPA's MLP: 3 x 3 in its paper, 1 x 1 in its trainer of SiT.
    """

    def __init__(self, in_dim: int, out_dim: int, side: int = 3):
        super().__init__(in_dim, out_dim, kernel_size=side, padding=side // 2)

    def forward(self, tokens: Tensor) -> Tensor:  # (N, T, D) -> (N, T, out_dim)
        side = math.isqrt(tokens.shape[1])
        return super().forward(tokens.mT.unflatten(2, (side, side))).flatten(2).mT
