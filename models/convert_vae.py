"""Autoencoders in the layout of latent diffusion's own code, such as VA-VAE's, to diffusers' `AutoencoderKL`.

Why not diffusers' `AutoencoderKL.from_single_file` (tried with 0.42): it drops the attention of whole levels, which
VA-VAE has at its last one, with no more than a warning; it asks the hub for a config unless the user has the file of
the original one; and it does not know prefixes such as `module.`. For SD-VAE's files it gives the same tensors.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

_PARTS = ("encoder", "decoder", "quant_conv", "post_quant_conv")
_FIRST = "encoder.conv_in.weight"
_NEEDED = (_FIRST, "encoder.down.0.block.0.conv1.weight", "encoder.conv_out.weight", "decoder.conv_out.weight")
_GROUPS = 32  # of every norm in that code
_NAMES = [  # in the other code, and in diffusers, one after another
    (r"\.(down|up)\.(\d+)\.block\.", r".\1_blocks.\2.resnets."),
    (r"\.(down|up)\.(\d+)\.attn\.", r".\1_blocks.\2.attentions."),
    (r"\.(down|up)\.(\d+)\.(down|up)sample\.", r".\1_blocks.\2.\3samplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
]


def convert_vae(content: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The autoencoder of a state dict whose keys are `encoder.down.0.block.0.conv1.weight` and so on.

    Its shape is read from the weights: channels of each level, blocks, levels with attention, latent channels. Other
    parts of the file (losses, discriminators, the encoders that a VAE was aligned with) are left out. The file tells no
    scale: the result's is 1, so that latents are to be measured (`--scale auto`).

    Args:
        content: tensors by name, with or without a prefix such as `first_stage_model.`.

    Returns:
        The arguments of its `AutoencoderKL`, and its state dict, float32.

    Raises:
        ValueError: the file holds no such autoencoder.
    """
    state = _own_tensors(content)
    levels = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder.down."))
    channels = [state[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)]
    attention = [f"encoder.down.{i}.attn.0.q.weight" in state for i in range(levels)]
    if any(number % _GROUPS for number in channels):
        raise ValueError(f"expected channels in {_GROUPS} groups, as that layout has them, found {channels}")
    settings = {
        "in_channels": state["encoder.conv_in.weight"].shape[1],
        "out_channels": state["decoder.conv_out.weight"].shape[0],
        "down_block_types": ["AttnDownEncoderBlock2D" if here else "DownEncoderBlock2D" for here in attention],
        "up_block_types": ["AttnUpDecoderBlock2D" if here else "UpDecoderBlock2D" for here in reversed(attention)],
        "block_out_channels": channels,
        "layers_per_block": len({name.split(".")[4] for name in state if name.startswith("encoder.down.0.block.")}),
        "latent_channels": state["encoder.conv_out.weight"].shape[0] // 2,
        "norm_num_groups": _GROUPS,
        "scaling_factor": 1.0,
        "use_quant_conv": "quant_conv.weight" in state,
        "use_post_quant_conv": "post_quant_conv.weight" in state,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in state,
    }
    return settings, dict(_rename(name, tensor.float(), levels) for name, tensor in state.items())


def _own_tensors(content: dict[str, Any]) -> dict[str, Tensor]:
    """The autoencoder's tensors, without a prefix."""
    prefixes = [name.removesuffix(_FIRST) for name in content if name.endswith(_FIRST)]
    for prefix in sorted(prefixes, key=len):  # the shortest: a loss may hold an encoder of its own
        own = {name.removeprefix(prefix): value for name, value in content.items() if name.startswith(prefix)}
        own = {k: v for k, v in own.items() if k.split(".")[0] in _PARTS and isinstance(v, Tensor)}
        if all(name in own for name in _NEEDED):
            return own
    if any(name.startswith("encoder.down_blocks.") for name in content):
        raise ValueError("expected latent diffusion's layout, found diffusers'; give its directory (with config.json)")
    missing = next((name for name in _NEEDED if not any(key.endswith(name) for key in content)), _FIRST)
    found = ", ".join(list(content)[:3]) or "nothing"
    raise ValueError(f"expected an autoencoder in latent diffusion's layout (with {missing}), found {found}")


def _rename(name: str, tensor: Tensor, levels: int) -> tuple[str, Tensor]:
    """Name and tensor as diffusers has them."""
    # The decoder's levels count from the image there, from the latent in diffusers.
    name = re.sub(r"^decoder\.up\.(\d+)", lambda match: f"decoder.up.{levels - 1 - int(match[1])}", name)
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    if ".attentions." in name and tensor.ndim == 4:  # 1 x 1 convolutions are linear maps in diffusers
        tensor = tensor[:, :, 0, 0]
    return name, tensor
