"""Everything that knows the VAE: loading, encoding to posterior moments, latent scale, decoding.

Shape suffixes: N batch, R image side in pixels, C latent channels, H = W latent side.
"""

from __future__ import annotations

import functools
import hashlib
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from huggingface_hub import constants, get_session
from torch import Tensor

from models.convert_vae import convert_vae
from models.tensor_file import load_exactly, read_tensor_file, state_digest, unwrap

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

UNKNOWN_VAE = "unknown"  # in place of a digest, where it was not recorded which VAE made the latents
UINT8_RULES = {  # from colours in [-1, 1] to pixels, by name, as samples record it
    "floor": "floor(clamp(127.5 * x + 128, 0, 255))",  # DiT, SiT
    "truncate": "floor(clamp(255 * (x + 1) / 2, 0, 255))",  # REPA, SRA
    "round": "round(clamp(255 * (x + 1) / 2, 0, 255))",  # JiT; half-way goes to the even number
}


@dataclass(frozen=True)
class LatentScale:
    """z = (f - shift) * scale, by channel or alike for all; recorded in the store and in every checkpoint.

    Args:
        scale: one number, or one per latent channel.
        shift: as many numbers as `scale`.
    """

    scale: tuple[float, ...]
    shift: tuple[float, ...]

    def __post_init__(self):
        if len(self.scale) != len(self.shift) or not self.scale or min(self.scale) <= 0:
            raise ValueError(f"expected as many positive scales as shifts, found {self.scale} and {self.shift}")

    def scale_latent(self, f: Tensor) -> Tensor:  # (N, C, H, W) -> (N, C, H, W)
        """VAE latents to the latents that are noised."""
        return (f - _by_channel(self.shift, f.dtype, f.device)) * _by_channel(self.scale, f.dtype, f.device)

    def unscale(self, z: Tensor) -> Tensor:  # (N, C, H, W) -> (N, C, H, W)
        """Inverse of `scale_latent`."""
        return z / _by_channel(self.scale, z.dtype, z.device) + _by_channel(self.shift, z.dtype, z.device)

    def to_dict(self) -> dict[str, list[float]]:
        return {"scale": list(self.scale), "shift": list(self.shift)}

    @classmethod
    def from_dict(cls, values: dict) -> LatentScale:
        return cls(tuple(map(float, values["scale"])), tuple(map(float, values["shift"])))


@functools.lru_cache  # a copy to the GPU in each training step would make the host wait
def _by_channel(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor | float:
    return values[0] if len(values) == 1 else torch.tensor(values, dtype=dtype, device=device).view(-1, 1, 1)


def scale_from_config(vae: AutoencoderKL) -> LatentScale:
    """The scale that a VAE's own config records: (f - latents_mean) / latents_std by channel, where it has them, as
    those of REPA-E; or else its scaling factor, which diffusers puts into every config, and its shift factor.

    Raises:
        ValueError: statistics of other than the latents' channels.
    """
    config = vae.config
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return LatentScale((config.scaling_factor,), (config.get("shift_factor") or 0.0,))
    mean, std = (np.asarray(values, dtype=np.float64).ravel().tolist() for values in (mean, std))
    if not len(mean) == len(std) == config.latent_channels:
        raise ValueError(
            f"--vae: expected latents_mean and latents_std of {config.latent_channels} channels in its config, found "
            f"{len(mean)} and {len(std)} numbers; use --scale auto"
        )
    return LatentScale(tuple(1 / value for value in std), tuple(mean))


def hub_is_reachable() -> bool:
    """Whether the hub can be reached: asked once, since its client repeats a vain attempt for half a minute."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # requests' or httpx's own errors, by the client's version
        return False
    return True


def load_vae(name_or_path: str, device: str | torch.device = "cpu") -> AutoencoderKL:
    """A diffusers `AutoencoderKL`, frozen, float32, in eval mode: from the hub, a local directory, or a file.

    Args:
        name_or_path: a name on the hub; a directory as diffusers saves it; or a .pt or .safetensors file in the layout
            of latent diffusion's own code, such as VA-VAE's.

    Raises:
        ValueError: neither can be read; the message names `--vae`.
    """
    from diffusers import AutoencoderKL  # 4 s, which programs without a VAE do not wait for

    path = Path(name_or_path)
    if path.is_file():
        try:
            settings, tensors = convert_vae(unwrap(read_tensor_file(path), ("state_dict", "model")))
            vae = AutoencoderKL(**settings)
            load_exactly(vae, tensors, "an AutoencoderKL of diffusers")
        except ValueError as error:
            raise ValueError(f"--vae {name_or_path}: {error}") from error
        return vae.to(device).eval().requires_grad_(False)
    expected = f"--vae: expected a directory, file or hub name of an AutoencoderKL, found {name_or_path!r}"
    if not path.exists() and (name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1):
        raise ValueError(f"{expected}, a path where there is nothing; give an existing local directory or file")
    offline = not path.exists() and not hub_is_reachable()
    try:
        with warnings.catch_warnings():
            # diffusers passes an argument that newer clients of the hub warn of
            warnings.filterwarnings("ignore", "The `local_dir_use_symlinks` argument")
            vae = AutoencoderKL.from_pretrained(
                str(name_or_path),
                subfolder="vae" if (path / "vae" / "config.json").is_file() else None,
                torch_dtype=torch.float32,
                local_files_only=path.exists() or offline,
            )
    except (OSError, ValueError) as error:
        reason = "the hub cannot be reached" if offline else " ".join(str(error).split())[:200]
        raise ValueError(f"{expected} ({reason}); without a network give a local directory") from error
    absent = [name for name, value in vae.state_dict().items() if value.is_meta]  # diffusers only warns of them
    if absent:
        found = f"{len(absent)} of its tensors are not in the file, the first of them {absent[0]}"
        raise ValueError(f"{expected}: {found}; are its keys prefixed, or is it of another architecture?")
    return vae.to(device).eval().requires_grad_(False)


def vae_digest(vae: AutoencoderKL, recorded: str | None = None) -> str:
    """SHA-256 of what makes the latents: the encoder's weights as float32, and what its config adds to them.

    Decoders that were tuned for one encoder, such as those of sd-vae-ft-mse and sd-vae-ft-ema, share it.

    Args:
        recorded: a record's. Older ones hold the digest of all weights, without the config: if it is that of these, it
            is what they are called by.
    """
    found = _part_digest(vae, ("encoder.", "quant_conv."), "down_block_types")
    return recorded if recorded not in (None, found) and recorded == state_digest(vae.state_dict()) else found


def decoder_digest(vae: AutoencoderKL) -> str:
    """SHA-256 of what makes the images, as `vae_digest`."""
    return _part_digest(vae, ("decoder.", "post_quant_conv."), "up_block_types")


def _part_digest(vae: AutoencoderKL, prefixes: tuple[str, ...], blocks: str) -> str:
    weights = {name: tensor for name, tensor in vae.state_dict().items() if name.startswith(prefixes)}
    settings = [vae.config[name] for name in ("act_fn", "norm_num_groups", blocks)]
    return hashlib.sha256(json.dumps([settings, state_digest(weights)]).encode()).hexdigest()


def vae_factor(vae: AutoencoderKL) -> int:
    """Image side over latent side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def check_vae(
    vae: AutoencoderKL,
    name: str,
    expected_digest: str,
    whose: str = "the checkpoint",
    resolution: int | None = None,
    latent_shape: tuple[int, int, int] | None = None,
) -> str:
    """Refuse a VAE whose encoder did not make the latents; returns its digest.

    Args:
        name: where it was loaded from, for the message.
        expected_digest: the recorded one; `UNKNOWN_VAE` accepts any VAE.
        whose: what the VAE must belong to, for the message.
        resolution, latent_shape: of the images and their latents (C, H, W), which it must fit, if given.

    Raises:
        ValueError: the encoder is another, or its channels or its factor do not fit.
    """
    found = vae_digest(vae, expected_digest)
    if expected_digest not in (found, UNKNOWN_VAE):
        raise ValueError(
            f"--vae: expected the VAE of {whose} (digest {expected_digest[:12]}...), found another in {name} "
            f"({found[:12]}...); give the one that dumped the latents"
        )
    if latent_shape is not None:
        channels, side, _ = latent_shape
        made = vae_factor(vae) * side, vae.config.latent_channels
        if made != (resolution, channels):
            expected = f"images of side {resolution} from latents of {channels} channels"
            found = f"side {made[0]} and {made[1]} channels with {name}; it is not the VAE of {whose}"
            raise ValueError(f"--vae: expected {expected}, found {found}")
    return found


@torch.no_grad()
def encode_moments(vae: AutoencoderKL, images: Tensor) -> Tensor:  # (N, R, R, 3) uint8 -> (N, 2C, H, W) float32
    """Mean, then std, of the posterior."""
    x = images.permute(0, 3, 1, 2).to(vae.device, vae.dtype) / 127.5 - 1
    posterior = vae.encode(x).latent_dist
    return torch.cat([posterior.mean, posterior.std], dim=1).float()


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor, scale: LatentScale) -> Tensor:  # (N, C, H, W) -> (N, 3, R, R) float32
    """Scaled latents to images in [-1, 1], or a little outside, on the latents' device."""
    return vae.decode(scale.unscale(latents.float()).to(vae.dtype)).sample.float()


def to_uint8(x: Tensor, rule: str = UINT8_RULES["floor"]) -> Tensor:  # (N, 3, R, R) -> (N, R, R, 3) uint8
    """Images in [-1, 1] to pixels by a rule of `UINT8_RULES`, given in full."""
    assert rule in UINT8_RULES.values(), rule
    x = (127.5 * x + 128 if rule == UINT8_RULES["floor"] else 255 * ((x + 1) / 2)).clamp(0, 255)
    x = x.round() if rule == UINT8_RULES["round"] else x
    return x.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def decode_images(vae: AutoencoderKL, latents: Tensor, scale: LatentScale) -> Tensor:  # (N, C, H, W) -> (N, R, R, 3)
    """Scaled latents to uint8 images, on the latents' device."""
    return to_uint8(decode(vae, latents, scale))
