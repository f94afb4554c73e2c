"""State dicts of SiT, REPA and SRA, read as this project's SiT.

REPA and SRA have our keys, and our direction of time. SiT itself differs in two facts, which both go into the weights,
so that what comes out is a `SiT` like any other; a DiT has its tensors, too, and another meaning: `_find_format`.

- Its time runs the other way, t' = 1 - t, and its velocity is a derivative by t': ours is v(y, t) = -v_SiT(y, 1 - t).
- It has twice the outputs ("learn_sigma"), of which the first C channels are the velocity and the others are not used.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from models.sit import SIT_SIZES, SiTConfig, time_frequencies

FORMATS = {"sit": "SiT", "repa": "REPA", "sra": "SRA"}
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|net|_orig_mod)\.")  # of DDP, EMA classes, torch.compile
_HEADS = ("projectors.", "ap_head.")  # of REPA and SRA: not needed to sample
_SPELLINGS = {  # of --path-type and --prediction in the command lines of SiT, and of REPA and SRA
    **dict.fromkeys(("Linear", "GVP", "VP", "velocity", "score", "noise"), "sit"),
    **dict.fromkeys(("linear", "cosine", "cos", "v"), "repa"),
}
_NEEDED = """
    x_embedder.proj.weight blocks.0.mlp.fc1.weight final_layer.linear.weight final_layer.linear.bias
    t_embedder.mlp.0.weight y_embedder.embedding_table.weight pos_embed
""".split()  # what the config is read from


def read_args(content: Mapping[str, Any]) -> dict[str, Any]:
    """The command line that a training file of another project holds."""
    args = content.get("args")
    return vars(args) if isinstance(args, argparse.Namespace) else {}


def convert_state_dict(
    content: Mapping[str, Any], given: str | None = None
) -> tuple[SiTConfig, dict[str, Tensor], str, list[str]]:
    """The SiT in the content of a checkpoint file.

    Args:
        content: a state dict, or a dictionary that holds one as "ema" (preferred), "model" or "state_dict".
        given: its format, if the user says it.

    Returns:
        Its config; its state dict in our keys and conventions, float32, whose names and shapes are not checked; its
        format, a key of `FORMATS`; and what was done to read it, in words.

    Raises:
        ValueError: it holds no SiT, one that ours cannot represent, or one that can be read in several ways.
    """
    state, notes = _find(content)
    heads = sorted({name.split(".")[0] for name in state if name.startswith(_HEADS)})
    state = {name: tensor.float() for name, tensor in state.items() if not name.startswith(_HEADS)}
    if heads:
        notes.append(f"{' and '.join(heads)} dropped")
    if any(name.startswith("decoder_blocks.") for name in state):
        state = _join_blocks(state)
        notes.append("decoder_blocks renamed")
    config = _infer_config(state)
    doubled = state["final_layer.linear.weight"].shape[0] == 2 * config.patch_dim
    format_ = _find_format(read_args(content), heads, doubled, given)
    if format_ == "sit":
        state = _turn_time(_first_channels(state, config))
        notes += ["first half of the outputs taken (learn_sigma)"] * doubled + ["time reversed"]
    return config, state, format_, notes


def _find_format(args: Mapping[str, Any], heads: list[str], doubled: bool, given: str | None) -> str:
    """Whose file it is: as its command line spells things, as its heads tell, or else as the user says. A DiT, DiT-SRA
    and a SiT that was trained without learn_sigma have the tensors of others, but another meaning."""
    if given not in (None, *FORMATS):
        raise ValueError(f"expected a format among {', '.join(FORMATS)}, found {given}")
    model = str(args.get("model", ""))
    if model.startswith("DiT") or (doubled and heads):
        found = model or f"a DiT with {' and '.join(heads)}"
        raise ValueError(f"expected a SiT, found {found}: a DiT has the same tensors, but predicts noise")
    told = {_SPELLINGS.get(str(args.get(name))) for name in ("path_type", "prediction")} - {None}
    told |= {"repa"} if heads else set()
    if "ap_head" in heads or (given == "sra" and not heads):  # it spells things as REPA does
        told = {"sra" if name == "repa" else name for name in told}
    if not told and given:
        return given
    if len(told) == 1 and given in (None, *told):
        return told.pop()
    if told:
        marks = " and ".join(FORMATS[name] for name in sorted(told))
        raise ValueError(f"expected a file of {FORMATS.get(given, 'one project')}, found the marks of {marks}")
    readings = "SiT's or a DiT's" if doubled else "REPA's, SRA's, or SiT's without learn_sigma"
    raise ValueError(
        f"expected a file that tells whose it is, found one that may be {readings}; if it is a SiT, say whose by "
        f"--checkpoint-format (--init-from: --init-format) {', '.join(FORMATS)}"
    )


def _find(content: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict in `content` without wrappers' prefixes, and which one it is."""
    notes = []
    for name, words in (("ema", "EMA weights"), ("model", "raw weights, no EMA"), ("state_dict", "state_dict")):
        if isinstance(content.get(name), Mapping):
            content, notes = content[name], [words]
            break
    state = {_WRAPPERS.sub("", name): value for name, value in content.items() if isinstance(value, Tensor)}
    missing = [key for key in _NEEDED if key not in state]
    if missing:
        known = ", ".join(list(state)[:3]) or "no tensors"
        if any(".mlp.w12." in name for name in state):
            known = "LightningDiT's blocks (SwiGLU, and RoPE or RMSNorm), which this SiT does not have"
        raise ValueError(f"expected a SiT's weights (with {missing[0]}), found {known}")
    return state, notes


def _join_blocks(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """REPA's earlier layout counted the blocks behind the aligned one anew, as `decoder_blocks`."""
    first = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))

    def renamed(name: str) -> str:
        return re.sub(r"^decoder_blocks\.(\d+)", lambda match: f"blocks.{int(match[1]) + first}", name)

    return {renamed(name): tensor for name, tensor in state.items()}


def _infer_config(state: dict[str, Tensor]) -> SiTConfig:
    hidden_size, in_channels, patch_size, _ = state["x_embedder.proj.weight"].shape
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    heads = [size[2] for size in SIT_SIZES.values() if size[:2] == (depth, hidden_size)]
    if not heads:
        found = f"{depth} blocks of width {hidden_size}, whose number of attention heads the file does not tell"
        raise ValueError(f"expected a SiT of a known size ({', '.join(SIT_SIZES)}), found {found}")
    return SiTConfig(
        depth=depth,
        hidden_size=hidden_size,
        num_heads=heads[0],
        patch_size=patch_size,
        latent_size=round(state["pos_embed"].shape[1] ** 0.5) * patch_size,
        in_channels=in_channels,
        num_classes=state["y_embedder.embedding_table.weight"].shape[0] - 1,
        mlp_ratio=state["blocks.0.mlp.fc1.weight"].shape[0] / hidden_size,
        qk_norm=any(".q_norm." in name for name in state),
    )


def _first_channels(state: dict[str, Tensor], config: SiTConfig) -> dict[str, Tensor]:
    """The outputs that are the velocity, with its sign turned: those of a patch are (row, column, channel), C or 2C."""
    changed = {}
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        tensor = state[name].unflatten(0, (config.patch_size**2, -1))
        changed[name] = -tensor[:, : config.in_channels].flatten(0, 1)
    return state | changed


def _turn_time(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first layer on the time's cosines and sines, so that it gives at t what it gave at 1 - t.

    cos((1 - t) w) = cos w cos tw + sin w sin tw        sin((1 - t) w) = sin w cos tw - cos w sin tw
    """
    name = "t_embedder.mlp.0.weight"
    frequencies = time_frequencies().double()
    cos, sin = frequencies.cos(), frequencies.sin()
    on_cos, on_sin = state[name].double().chunk(2, dim=1)  # (D, F) each
    turned = torch.cat([on_cos * cos + on_sin * sin, on_cos * sin - on_sin * cos], dim=1)
    return state | {name: turned.float()}
