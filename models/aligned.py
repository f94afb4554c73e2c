"""A SiT with the heads that are trained beside it: the one module that DDP wraps and the optimizer sees; or with
one of them, to sample from."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from models.sit import SiT, unpatchify


class AlignedSiT(nn.Module):
    """`sit` plus, per alignment, a head on the tokens of one block.

    Args:
        sit: the backbone.
        heads: {name: (depth, head)}; depth counts blocks from 1, and the head takes tokens (N, T, D). With several
            depths it takes the tokens of each; 0 stands for the condition (N, D).
    """

    def __init__(self, sit: SiT, heads: Mapping[str, tuple[int | tuple[int, ...], nn.Module]]):
        super().__init__()
        self.sit = sit
        self.depths = {name: depth if isinstance(depth, tuple) else (depth,) for name, (depth, _) in heads.items()}
        assert all(0 < d[0] <= max(d) <= sit.config.depth for d in self.depths.values()), "a depth outside the backbone"
        self.heads = nn.ModuleDict({name: head for name, (_, head) in heads.items()})

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:  # (N, C, H, W), (N,), (N,) -> (N, C, H, W), {name: (N, T, out)}
        """The velocity, and each head's projection f_SiT of its block's tokens."""
        if not self.heads:
            return self.sit(x, t, y), {}
        wanted = tuple(depth for depths in self.depths.values() for depth in depths)
        velocity, tokens = self.sit(x, t, y, return_blocks=wanted)
        h = dict(zip(wanted, tokens, strict=True))
        return velocity, {name: self.heads[name](*(h[d] for d in depths)) for name, depths in self.depths.items()}


class HeadedSiT(AlignedSiT):
    """A SiT with one head, whose tokens are the patches of a latent: the clean one, or the velocity."""

    def __init__(self, sit: SiT, depths: tuple[int, ...], head: nn.Module, predicts_velocity: bool):
        super().__init__(sit, {"head": (depths, head)})
        self.predicts_velocity = predicts_velocity

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:  # as SiT's -> (N, C, H, W) each
        velocity, projected = super().forward(x, t, y)
        return velocity, unpatchify(projected["head"], self.sit.config.patch_size)
