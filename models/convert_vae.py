"""Autoencoders in the layout of latent diffusion's own code, such as VA-VAE's, as diffusers' `AutoencoderKL`."""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

_PARTS = ("encoder", "decoder", "quant_conv", "post_quant_conv")
_FIRST = "encoder.conv_in.weight"
_NEEDED = (_FIRST, "encoder.down.0.block.0.conv1.weight", "encoder.conv_out.weight", "decoder.conv_out.weight")
_GROUPS = 32  # of every norm in that code
_MODULES = [  # in the other code, and in diffusers; {i} a level, {j} a block of it
    (r"encoder\.down\.(?P<i>\d+)\.block\.(?P<j>\d+)", "encoder.down_blocks.{i}.resnets.{j}"),
    (r"encoder\.down\.(?P<i>\d+)\.attn\.(?P<j>\d+)", "encoder.down_blocks.{i}.attentions.{j}"),
    (r"encoder\.down\.(?P<i>\d+)\.downsample", "encoder.down_blocks.{i}.downsamplers.0"),
    (r"decoder\.up\.(?P<i>\d+)\.block\.(?P<j>\d+)", "decoder.up_blocks.{last_i}.resnets.{j}"),
    (r"decoder\.up\.(?P<i>\d+)\.attn\.(?P<j>\d+)", "decoder.up_blocks.{last_i}.attentions.{j}"),
    (r"decoder\.up\.(?P<i>\d+)\.upsample", "decoder.up_blocks.{last_i}.upsamplers.0"),
    (r"(?P<half>encoder|decoder)\.mid\.block_1", "{half}.mid_block.resnets.0"),
    (r"(?P<half>encoder|decoder)\.mid\.block_2", "{half}.mid_block.resnets.1"),
    (r"(?P<half>encoder|decoder)\.mid\.attn_1", "{half}.mid_block.attentions.0"),
    (r"(?P<half>encoder|decoder)\.norm_out", "{half}.conv_norm_out"),
]
_LAYERS = {"nin_shortcut": "conv_shortcut"}
_ATTENTION_LAYERS = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def autoencoder_from_ldm(state: dict[str, Any]) -> AutoencoderKL:
    """The autoencoder of a state dict whose keys are `encoder.down.0.block.0.conv1.weight` and so on.

    Its shape is read from the weights: channels of each level, blocks, levels with attention, latent channels. Other
    parts of the file (losses, discriminators, the encoders that a VAE was aligned with) are left out. The file tells no
    scale: the result's is 1, so that latents are to be measured (`--scale auto`).

    Args:
        state: tensors by name, with or without a prefix such as `first_stage_model.`.

    Returns:
        The model on the CPU, float32.

    Raises:
        ValueError: the file holds no such autoencoder, or one that `AutoencoderKL` cannot stand for.
    """
    from diffusers import AutoencoderKL

    state = _strip(state)
    levels = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder.down."))
    channels = [state[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)]
    attention = [f"encoder.down.{i}.attn.0.q.weight" in state for i in range(levels)]
    blocks = len({name.split(".")[4] for name in state if name.startswith("encoder.down.0.block.")})
    latent_channels = state["encoder.conv_out.weight"].shape[0] // 2
    if any(number % _GROUPS for number in channels):
        raise ValueError(f"expected channels in {_GROUPS} groups, as that layout has them, found {channels}")
    model = AutoencoderKL(
        in_channels=state["encoder.conv_in.weight"].shape[1],
        out_channels=state["decoder.conv_out.weight"].shape[0],
        down_block_types=["AttnDownEncoderBlock2D" if here else "DownEncoderBlock2D" for here in attention],
        up_block_types=["AttnUpDecoderBlock2D" if here else "UpDecoderBlock2D" for here in reversed(attention)],
        block_out_channels=channels,
        layers_per_block=blocks,
        latent_channels=latent_channels,
        norm_num_groups=_GROUPS,
        scaling_factor=1.0,
        use_quant_conv="quant_conv.weight" in state,
        use_post_quant_conv="post_quant_conv.weight" in state,
        mid_block_add_attention="encoder.mid.attn_1.q.weight" in state,
    )
    converted = dict(_rename(name, tensor.float(), levels) for name, tensor in state.items())
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in converted.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"expected an autoencoder that diffusers' AutoencoderKL can stand for, found {len(wrong)} tensors that do "
            f"not fit: {name} is {found.get(name, 'absent')}, there {expected.get(name, 'absent')}"
        )
    model.load_state_dict(converted)
    return model


def _strip(state: dict[str, Any]) -> dict[str, Tensor]:
    """The autoencoder's own tensors, without a prefix."""
    prefixes = [name.removesuffix(_FIRST) for name in state if name.endswith(_FIRST)]
    for prefix in sorted(prefixes, key=len):  # the shortest: a loss may hold an encoder of its own
        names = {name: name.removeprefix(prefix) for name in state if name.startswith(prefix)}
        own = {
            bare: state[name]
            for name, bare in names.items()
            if bare.split(".")[0] in _PARTS and isinstance(state[name], Tensor)
        }
        if all(name in own for name in _NEEDED):
            return own
    if any(name.startswith("encoder.down_blocks.") for name in state):
        raise ValueError("expected latent diffusion's layout, found diffusers'; give its folder (with config.json)")
    missing = next((name for name in _NEEDED if not any(key.endswith(name) for key in state)), _FIRST)
    raise ValueError(
        f"expected an autoencoder in latent diffusion's layout (with {missing}), "
        f"found {', '.join(list(state)[:3]) or 'nothing'}"
    )


def _rename(name: str, tensor: Tensor, levels: int) -> tuple[str, Tensor]:
    for pattern, target in _MODULES:
        match = re.match(pattern + r"\.", name)
        if match is None:
            continue
        places = match.groupdict()
        if "i" in places:  # levels of the decoder count the other way
            places["last_i"] = str(levels - 1 - int(places["i"]))
        layer, _, kind = name[match.end() :].rpartition(".")
        if "attentions" in target:
            layer = _ATTENTION_LAYERS.get(layer, layer)
            tensor = tensor[:, :, 0, 0] if tensor.ndim == 4 else tensor  # 1 x 1 convolutions are linear maps there
        layer = _LAYERS.get(layer, layer)
        return ".".join(part for part in (target.format(**places), layer, kind) if part), tensor
    return name, tensor


def read_ldm_file(path: Path) -> AutoencoderKL:
    """The autoencoder of a .safetensors or .pt file; no code in it is run.

    Raises:
        ValueError: the file cannot be read, or holds no such autoencoder.
    """
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, SafetensorError) as error:
        raise ValueError(
            f"expected tensors (.safetensors or .pt), found a file that cannot be read as such: {path}"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise ValueError(f"expected a dictionary of tensors, found a {type(content).__name__} in {path}")
    return autoencoder_from_ldm(content)
