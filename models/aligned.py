"""A SiT with the heads that are trained beside it: the one module that DDP wraps and the optimizer sees."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from models.sit import SiT


class AlignedSiT(nn.Module):
    """`sit` plus, per alignment, a head on the tokens of one block.

    Args:
        sit: the backbone.
        heads: {name: (depth, head)}; depth counts blocks from 1, and the head takes tokens (N, T, D).
    """

    def __init__(self, sit: SiT, heads: Mapping[str, tuple[int, nn.Module]]):
        super().__init__()
        assert all(1 <= depth <= sit.config.depth for depth, _ in heads.values()), "a depth outside the backbone"
        self.sit = sit
        self.depths = {name: depth for name, (depth, _) in heads.items()}
        self.heads = nn.ModuleDict({name: head for name, (_, head) in heads.items()})

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:  # (N, C, H, W), (N,), (N,) -> (N, C, H, W), {name: (N, T, out)}
        """The velocity, and each head's projection f_SiT of its block's tokens."""
        if not self.heads:
            return self.sit(x, t, y), {}
        velocity, tokens = self.sit(x, t, y, return_blocks=tuple(self.depths.values()))
        return velocity, {name: self.heads[name](h) for name, h in zip(self.depths, tokens, strict=True)}
