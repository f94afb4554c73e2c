"""Frozen image encoders, by timm, whose patch tokens REPA aligns a SiT with.

Shape suffixes: N batch, R image side in pixels, T = side^2 patch tokens, D numbers per token.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import constants
from torch import Tensor, nn

from models.tensor_file import read_tensor_file, unwrap
from models.vae import hub_is_reachable

# Names as in REPA's --enc-type, and the weights in timm they stand for. Any other name of timm's can be given, too.
ENCODERS = {
    "dinov2-vit-s": "vit_small_patch14_dinov2.lvd142m",
    "dinov2-vit-b": "vit_base_patch14_dinov2.lvd142m",
    "dinov2-vit-l": "vit_large_patch14_dinov2.lvd142m",
    "dinov2-vit-g": "vit_giant_patch14_dinov2.lvd142m",
    "dinov2reg-vit-b": "vit_base_patch14_reg4_dinov2.lvd142m",
    "dinov2reg-vit-l": "vit_large_patch14_reg4_dinov2.lvd142m",
    "dinov2reg-vit-g": "vit_giant_patch14_reg4_dinov2.lvd142m",
    "dinov3-vit-s": "vit_small_patch16_dinov3.lvd1689m",
    "dinov3-vit-b": "vit_base_patch16_dinov3.lvd1689m",
    "dinov3-vit-l": "vit_large_patch16_dinov3.lvd1689m",
    "mae-vit-b": "vit_base_patch16_224.mae",
    "mae-vit-l": "vit_large_patch16_224.mae",
    "clip-vit-b": "vit_base_patch16_clip_quickgelu_224.openai",
    "clip-vit-l": "vit_large_patch14_clip_quickgelu_224.openai",
    "siglip-vit-b": "vit_base_patch16_siglip_256.webli",
    "siglip-vit-l": "vit_large_patch16_siglip_256.webli",
}


WITHOUT_FINAL_NORM = ("mae-", "clip-")  # REPA takes the tokens of these before the network's last norm


class Encoder(nn.Module):
    """Images to the patch tokens of a network of timm's, without class or register tokens.

    As in REPA the image is normalised, then resized (bicubic, without antialiasing) so that it has as many patches as
    the SiT has tokens.

    Attributes:
        dim: D.
    """

    def __init__(self, network: nn.Module, image_size: int, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.network, self.image_size, self.dim = network, image_size, network.num_features
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:  # (N, R, R, 3) uint8 -> (N, T, D)
        """Tokens in the network's precision."""
        x = (images.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        if x.shape[-1] != self.image_size:
            x = F.interpolate(x, size=(self.image_size, self.image_size), mode="bicubic", align_corners=False)
        dtype = next(self.network.parameters()).dtype
        return self.network.forward_features(x.to(dtype))[:, self.network.num_prefix_tokens :]


def load_encoder(
    name: str,
    side: int,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    final_norm: bool | None = None,
) -> Encoder:
    """An encoder that gives side x side tokens: frozen, in bfloat16 on a GPU and float32 elsewhere.

    Learned positions are resampled by timm to the new grid; rotary ones need no change.

    Args:
        name: a key of `ENCODERS`, or a vision transformer's name in timm.
        side: tokens a side, as the SiT has them.
        weights: file with its weights (.safetensors, or .pth without code), in timm's or the authors' own layout; by
            default they come from the hub, or from its cache.

    Raises:
        ValueError: timm does not know the name; the network gives no such grid; the weights cannot be had.
    """
    with torch.device("cpu"):  # also where what is built beside it has no content: it is tried with an image
        encoder = _build_encoder(name, side, weights)
        if final_norm is False or (final_norm is None and name.startswith(WITHOUT_FINAL_NORM)):
            encoder.network.norm = nn.Identity()
        size = encoder.image_size
        tokens = encoder(torch.zeros(1, size, size, 3, dtype=torch.uint8))
    if tokens.shape != (1, side**2, encoder.dim):
        found = f"an output {tuple(tokens.shape)} of {name!r}; choose another encoder"
        raise ValueError(f"--repa-encoder: expected {side**2} tokens, as many as the SiT has, found {found}")
    encoder.to(device)
    if encoder.mean.is_cuda:
        encoder.network.to(torch.bfloat16)
    return encoder


def _build_encoder(name: str, side: int, weights: str | Path | None) -> Encoder:
    import timm  # 2 s, which runs without an encoder do not wait for

    # Is there such a network, and what are its patches?
    timm_name = ENCODERS.get(name, name)
    architecture, _, tag = timm_name.partition(".")
    variants = timm.list_pretrained(f"{architecture}.*")
    if not timm.is_model(architecture) or (tag and timm_name not in variants):
        near = difflib.get_close_matches(name, [*ENCODERS, *timm.list_models(), *variants], n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        known = ", ".join(ENCODERS)
        raise ValueError(f"--repa-encoder: expected {known} or another name of timm's, found {name!r}{hint}")
    with torch.device("meta"):
        bare = timm.create_model(timm_name, num_classes=0)
    patch = getattr(getattr(bare, "patch_embed", None), "patch_size", None)
    if not isinstance(patch, tuple) or patch[0] != patch[1] or not hasattr(bare, "num_prefix_tokens"):
        raise ValueError(f"--repa-encoder: expected a vision transformer with square patches, found {name!r}")

    # The network for images of as many patches, with its weights.
    size = side * patch[0]
    overlay, pretrained = {}, weights != "random"
    if pretrained and weights is not None:
        overlay = {"state_dict": _read_weights(Path(weights))}
    elif pretrained and not hub_is_reachable():
        constants.HF_HUB_OFFLINE = True  # its cache may hold them; asking the hub in vain takes most of a minute
    options = {"pretrained": pretrained, "num_classes": 0, "img_size": size, "pretrained_cfg_overlay": overlay}
    try:
        with _names_not_loaded(type(bare)) as left:
            network = timm.create_model(timm_name, **options)
    except TypeError as error:
        raise ValueError(f"--repa-encoder: {name!r} cannot be set to images of side {size} ({error})") from error
    except (OSError, RuntimeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        if weights is not None:
            raise ValueError(f"--repa-weights: expected weights of {timm_name}, found {weights} ({reason})") from error
        fix = "without a network give a local file by --repa-weights"
        raise ValueError(f"--repa-encoder: cannot get the weights of {timm_name} ({reason}); {fix}") from error
    if left := [name for name in left if not name.startswith(("head.", "fc_norm.", "attn_pool."))]:  # behind the tokens
        found = f"{weights or 'a file of the hub'} without {len(left)} of its tensors ({', '.join(left[:3])}, ...)"
        raise ValueError(f"--repa-weights: expected weights of {timm_name}, found {found}")
    data = timm.data.resolve_model_data_config(network)
    return Encoder(network, size, data["mean"], data["std"]).eval().requires_grad_(False)


@contextlib.contextmanager
def _names_not_loaded(network: type[nn.Module]) -> Iterator[list[str]]:
    """Tensors that no file had when timm made such a network: it leaves them random, and says so in its log alone."""
    left, load = [], network.load_state_dict

    def load_state_dict(*args: Any, **options: Any) -> Any:
        result = load(*args, **options)
        left.extend(result.missing_keys)
        return result

    network.load_state_dict = load_state_dict
    try:
        yield left
    finally:
        network.load_state_dict = load


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"--repa-weights: expected a file, found none at {path}")
    try:
        return unwrap(read_tensor_file(path), ("model", "state_dict", "teacher"))
    except ValueError as error:
        raise ValueError(f"--repa-weights {path}: {error}") from error
