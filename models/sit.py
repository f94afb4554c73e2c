"""The Scalable Interpolant Transformer: a DiT backbone that predicts the velocity of Eq. 2.

State-dict keys are those of SiT and REPA, so that their checkpoints fit. Time runs as in the paper (t = 1 is noise);
labels are dropped by the caller, who passes `num_classes` as the null class.

Shape suffixes: N batch, C latent channels, H = W latent side, p patch side, T = (H / p)^2 tokens, D hidden size,
K classes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.tensor_file import load_exactly, read_tensor_file
from runtime.files import Field, fields_of, read_record

# name: (depth, hidden size, heads). S to XL are those of DiT and SiT; Ti is for tests and the demo.
SIT_SIZES = {"Ti": (6, 192, 3), "S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
PATCH_SIZES = (1, 2, 4, 8)
TIME_FREQUENCIES = 256


RECORDED = {"record": Field()}  # every config.json has the field
SETTINGS = "the SiT's settings"  # in errors, where a file is not known


@dataclasses.dataclass(frozen=True)
class SiTConfig:
    """Everything that determines the shape of a `SiT`; stored beside its weights as `config.json`.

    A new field needs `metadata={"record": Field(historic)}`: what the checkpoints that lack it were trained with.
    """

    depth: int
    hidden_size: int
    num_heads: int
    patch_size: int
    latent_size: int = dataclasses.field(default=32, metadata=RECORDED)
    in_channels: int = dataclasses.field(default=4, metadata=RECORDED)
    num_classes: int = dataclasses.field(default=1000, metadata=RECORDED)
    mlp_ratio: float = dataclasses.field(default=4.0, metadata=RECORDED)
    qk_norm: bool = dataclasses.field(default=False, metadata={"record": Field(False)})

    @classmethod
    def from_name(
        cls, name: str, latent_size: int = 32, in_channels: int = 4, num_classes: int = 1000, qk_norm: bool = False
    ) -> SiTConfig:
        """The config of a size in `SIT_SIZES` at a patch size in `PATCH_SIZES`, such as "SiT-XL/2".

        Raises:
            ValueError: unknown name, or a latent side that the patch side does not divide.
        """
        names = [f"SiT-{size}/{patch}" for size in SIT_SIZES for patch in PATCH_SIZES]
        if name not in names:
            known = f"SIZE in {', '.join(SIT_SIZES)} and PATCH in {', '.join(map(str, PATCH_SIZES))}"
            raise ValueError(f"expected a model SiT-SIZE/PATCH with {known} (--model), found {name!r}")
        size, patch = name.removeprefix("SiT-").split("/")
        depth, hidden_size, num_heads = SIT_SIZES[size]
        shape = depth, hidden_size, num_heads, int(patch)
        return cls(*shape, latent_size, in_channels, num_classes, qk_norm=qk_norm)

    def __post_init__(self):
        if self.latent_size % self.patch_size:
            found = f"{self.latent_size}; choose another patch size (the number after the slash of --model)"
            raise ValueError(f"expected a latent side divisible by the patch side {self.patch_size}, found {found}")
        if self.num_classes < 1 or self.in_channels < 1:
            raise ValueError(f"expected a class and a channel at least, found {self.num_classes}, {self.in_channels}")

    @property
    def num_tokens(self) -> int:
        return (self.latent_size // self.patch_size) ** 2

    @property
    def patch_dim(self) -> int:
        """Numbers in one patch, p * p * C."""
        return self.patch_size**2 * self.in_channels

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict, source: str | Path = SETTINGS) -> SiTConfig:
        """Inverse of `to_dict`; also reads what older code wrote.

        Raises:
            ValueError: missing or unknown keys in `source`.
        """
        return cls(**read_record(values, fields_of(cls), source))


# What the config.json of a published model says beside these settings; `sampling/pipeline.py` reads it.
_PUBLISHED = "format format_version step weights_sha256 path_type latent_scale vae vae_digest resolution class_names"
PUBLISHED = (*_PUBLISHED.split(), "card_sha256", "null_class", "prediction", "time_shift")


def patchify(x: Tensor, p: int) -> Tensor:  # (N, C, H, W) -> (N, T, p*p*C)
    """Cut latents into the tokens' patches: rows of patches first, and (row, column, channel) within one."""
    N, C, H, W = x.shape
    x = x.view(N, C, H // p, p, W // p, p).permute(0, 2, 4, 3, 5, 1)
    return x.reshape(N, (H // p) * (W // p), p * p * C)


def unpatchify(x: Tensor, p: int) -> Tensor:  # (N, T, p*p*C) -> (N, C, H, W)
    """Inverse of `patchify`, for square latents."""
    N, T, patch_dim = x.shape
    side = math.isqrt(T)
    x = x.view(N, side, side, p, p, patch_dim // p**2).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(N, -1, side * p, side * p)


def position_embedding(hidden_size: int, side: int) -> Tensor:  # () -> (1, T, D)
    """Fixed sines and cosines of each token's column (first half) and row (second half), as in MAE and DiT."""
    frequencies = 10000.0 ** -(torch.arange(hidden_size // 4, dtype=torch.float64) / (hidden_size // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, D/2)
    columns, rows = axis.repeat(side, 1), axis.repeat_interleave(side, dim=0)
    return torch.cat([columns, rows], dim=1).float()[None]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:  # (N, T, D), (N, D), (N, D) -> (N, T, D)
    return x * (1 + scale[:, None]) + shift[:, None]


class PatchEmbed(nn.Module):
    def __init__(self, config: SiTConfig):
        super().__init__()
        p = config.patch_size
        self.proj = nn.Conv2d(config.in_channels, config.hidden_size, kernel_size=p, stride=p)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, T, D)
        return self.proj(x).flatten(2).transpose(1, 2)


def time_frequencies() -> Tensor:  # -> (128,)
    """Angles per unit of time, from 1 down to nearly 1 / 10,000."""
    half = TIME_FREQUENCIES // 2
    return torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)


class TimestepEmbedder(nn.Module):
    """An MLP over sines and cosines of t in [0, 1], unscaled as in SiT."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(TIME_FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )
        self.register_buffer("frequencies", time_frequencies(), persistent=False)

    def forward(self, t: Tensor) -> Tensor:  # (N,) -> (N, D)
        angles = t[:, None] * self.frequencies
        # In float32 always: it costs nothing. (The meta device, on which shapes are counted, knows no autocast.)
        with nullcontext() if t.is_meta else torch.autocast(t.device.type, enabled=False):
            return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))


class LabelEmbedder(nn.Module):
    """A table of K classes and, in the last row, the null class."""

    def __init__(self, num_classes: int, hidden_size: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y: Tensor) -> Tensor:  # (N,) int64 in [0, K] -> (N, D)
        return self.embedding_table(y)


class Attention(nn.Module):
    """Self-attention; with `qk_norm` each head's queries and keys are normalised first, as in REPA."""

    def __init__(self, config: SiTConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)
        if config.qk_norm:
            self.q_norm, self.k_norm = (nn.LayerNorm(config.hidden_size // config.num_heads) for _ in range(2))
        self.qk_norm = config.qk_norm

    def forward(self, x: Tensor) -> Tensor:  # (N, T, D) -> (N, T, D)
        N, T, D = x.shape
        q, k, v = self.qkv(x).view(N, T, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        if self.qk_norm:  # under autocast the norms give float32
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(N, T, D))


class Mlp(nn.Module):
    def __init__(self, config: SiTConfig):
        super().__init__()
        width = int(config.hidden_size * config.mlp_ratio)
        self.fc1 = nn.Linear(config.hidden_size, width)
        self.fc2 = nn.Linear(width, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:  # (N, T, D) -> (N, T, D)
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SiTBlock(nn.Module):
    """Attention and MLP, each normalised, shifted, scaled and gated by the condition (adaLN-Zero)."""

    def __init__(self, config: SiTConfig):
        super().__init__()
        D = config.hidden_size
        self.norm1 = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(config)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:  # (N, T, D), (N, D) -> (N, T, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    def __init__(self, config: SiTConfig):
        super().__init__()
        D = config.hidden_size
        self.norm_final = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(D, config.patch_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 2 * D))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:  # (N, T, D), (N, D) -> (N, T, p*p*C)
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


HUB = {"library_name": "vae-repa", "license": "apache-2.0", "pipeline_tag": "unconditional-image-generation"}


class SiT(nn.Module, PyTorchModelHubMixin, **HUB):
    """v(y_t, t | class), float32 weights; under autocast the tokens between blocks are in the lower precision.

    `save_pretrained`, `push_to_hub` and `from_pretrained` (a directory or a name on the hub; in eval mode) know config
    and weights alone. What sampling needs beside them is written by `analysis.publish`, and read by
    `sampling/pipeline.py`.

    Attributes:
        checkpoint_every: recompute every k-th block in the backward pass, of which only the input is kept (0: none).
    """

    def __init__(self, config: SiTConfig):
        super().__init__()
        self.config = config
        self.checkpoint_every = 0
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = TimestepEmbedder(config.hidden_size)
        self.y_embedder = LabelEmbedder(config.num_classes, config.hidden_size)
        side = config.latent_size // config.patch_size
        self.register_buffer("pos_embed", position_embedding(config.hidden_size, side))
        self.blocks = nn.ModuleList(SiTBlock(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self._initialize()

    def _initialize(self) -> None:
        """adaLN-Zero: Xavier for linear maps, small normals for embeddings, zeros for the gates and the output."""
        self.apply(xavier_linear)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.config.hidden_size, -1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        for layer in (*self.blocks, self.final_layer):
            nn.init.zeros_(layer.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, return_blocks: Sequence[int] = ()
    ) -> Tensor | tuple[Tensor, list[Tensor]]:  # (N, C, H, W), (N,), (N,) int64 -> (N, C, H, W) [, list of (N, T, D)]
        """Velocity at the noised latents x and times t in [0, 1] for the classes y in [0, K], K being none.

        With `return_blocks`, depths counted from 1, also the tokens that leave those blocks, in that order; for 0 the
        condition (N, D).
        """
        x, c = self._embed(x, t, y)
        kept = {0: c}
        for depth, block in enumerate(self.blocks, start=1):
            if self.checkpoint_every and depth % self.checkpoint_every == 0 and torch.is_grad_enabled():
                x = checkpoint(block, x, c, use_reentrant=False)
            else:
                x = block(x, c)
            if depth in return_blocks:
                kept[depth] = x
        velocity = unpatchify(self.final_layer(x, c), self.config.patch_size)
        return (velocity, [kept[depth] for depth in return_blocks]) if return_blocks else velocity

    def tokens(self, x: Tensor, t: Tensor, y: Tensor, depth: int) -> Tensor:  # as forward -> (N, T, D)
        """The tokens that leave block `depth`, counted from 1; no later block is run."""
        x, c = self._embed(x, t, y)
        for block in self.blocks[:depth]:
            x = block(x, c)
        return x

    @classmethod
    def _from_pretrained(cls, *, model_id: str, config: dict | None = None, map_location: Any = "cpu", **hub) -> SiT:
        """What the mixin's `from_pretrained` loads by. Its own would take a file that lacks weights, or a pickled one.

        Raises:
            ValueError: settings or weights are missing, or do not fit.
        """
        said = read_record(config or {}, dict.fromkeys(PUBLISHED, Field(None)) | fields_of(SiTConfig), SETTINGS)
        sit = cls(SiTConfig.from_dict({name: value for name, value in said.items() if name not in PUBLISHED}))
        directory, name = Path(model_id), "model.safetensors"
        file = directory / name if directory.is_dir() else hf_hub_download(model_id, name, **hub)
        try:
            load_exactly(sit, read_tensor_file(Path(file)), "this SiT")
        except ValueError as error:
            raise ValueError(f"expected weights of this SiT in {file}, found other ones or none ({error})") from error
        return sit.to(map_location).eval()

    def _embed(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:  # -> (N, T, D), (N, D)
        """The tokens that enter the first block, and the condition of every block."""
        x = self.x_embedder(x)
        x = x + self.pos_embed.to(x.dtype)  # a float32 table would keep every token in float32 under autocast
        return x, self.t_embedder(t) + self.y_embedder(y)


def xavier_linear(module: nn.Module) -> None:
    """Initialise a linear map as SiT does: Xavier uniform, zero bias. For `nn.Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
