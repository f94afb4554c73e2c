"""The record of a set of samples: what decides its images, how older records are read, and what a resume takes from it.

`samples.json` of a whole set and `partial/settings.json` of an unfinished one hold the settings that `describe` gives.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Set
from pathlib import Path
from typing import Any

import torch

from diffusion.interpolant import choose_shift
from models.load import guide_head
from models.sit import SiT
from models.vae import UINT8_RULES
from runtime import provenance
from runtime.files import Field, fields_of, read_record
from sampling.batch_size import configured_batch_size
from sampling.config import BLOCK, SAMPLER_OPTIONS, SampleConfig
from sampling.generator import SampleGenerator

FORMAT = "vae-repa-samples"
VERSION = 1

# Flags that are recorded under their own names. Their historic values stand at the flags.
_FLAGS = "sampler num_steps last_step_size num_samples labels classes seed mixed_precision compile vae_precision tf32 "
_FLAGS += "diffusion_form diffusion_norm last_step atol rtol guidance_channels time_shift"
FLAGS = [*_FLAGS.split(), "npz", "png"]
# What else every set of samples has recorded.
_FACTS = (
    "checkpoint_digest step path_type diffusion guidance_scale guidance_interval batch_size block_size device_type "
    "vae_digest latent_scale latent_shape resolution uint8_rule"
)
HEAD_GUIDANCE = ("head_guidance", "head_guidance_interval", "head_guidance_digest")  # None where there is none
SETTINGS = {name: fields_of(SampleConfig)[name] for name in FLAGS}
SETTINGS |= {name: Field() for name in _FACTS.split()}
SETTINGS |= {
    "checkpoint_format": Field(historic="vae-repa"),
    "prediction": Field("v"),
    "vae_decoder": Field(None),
    "autoguidance_digest": Field(None),
    **dict.fromkeys(HEAD_GUIDANCE, Field(None)),
}
# Beside the settings, which an unfinished set has alone.
_ABOUT = "checkpoint vae class_names processes device timing versions git_revision machine date npz_sha256"
RECORD = {"settings": Field()} | {name: Field(None) for name in ("format", "version", *_ABOUT.split())}


def describe(config: SampleConfig, sit: SiT, info: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Everything that determines a set of images, but for the code's version and the device's rounding.

    Args:
        config: of one set (`SampleConfig.sets`).
        sit, info: as `load_sit` gives them.

    Returns:
        JSON values by the names of `SETTINGS`; `batch_size` is None if it is still to be found, as `vae_decoder` is.
    """
    on_gpu, is_sde = device.type == "cuda", config.sampler == "sde"
    precision = "bf16" if on_gpu and not config.parity else "no"
    (scale,), (interval,) = config.guidance_scale, config.guidance_intervals()
    as_of_old = is_sde and (config.diffusion_form, config.diffusion_norm) == ("linear", 1)
    latent_shape = (sit.config.in_channels, sit.config.latent_size, sit.config.latent_size)
    settings = {name: getattr(config, name) for name in FLAGS} | {
        "mixed_precision": config.mixed_precision or precision,
        "compile": on_gpu if config.compile is None else config.compile,
        "vae_precision": config.vae_precision or precision,
        "tf32": bool(config.tf32 or config.parity) and on_gpu,
        "checkpoint_digest": info["digest"],
        "checkpoint_format": info["format"],
        "autoguidance_digest": info.get("autoguidance_digest"),
        **describe_head(config, info),
        "diffusion": "2t" if as_of_old else None,
        "guidance_scale": scale,
        "guidance_interval": interval,
        "batch_size": configured_batch_size(config, device),
        "block_size": BLOCK,
        "device_type": device.type,
        "latent_scale": info["scale"].to_dict(),
        "latent_shape": latent_shape,
        "time_shift": choose_shift(config.time_shift or info["time_shift"], latent_shape),
        "uint8_rule": UINT8_RULES[config.uint8_rule],
        "vae_decoder": None,
        **{name: info[name] for name in ("step", "path_type", "prediction", "vae_digest", "resolution")},
    }
    return _without_unused(settings)


def _without_unused(settings: dict[str, Any]) -> dict[str, Any]:
    """None for each setting that has no effect on these images beside the others, in old records as in new ones."""
    unused = [name for sampler, names in SAMPLER_OPTIONS.items() if sampler != settings["sampler"] for name in names]
    if settings["sampler"] != "sde" or settings["last_step"] == "none":
        unused.append("last_step_size")
    if settings["sampler"] == "ode-dopri5":
        unused += ["num_steps", "time_shift"]
    if settings["guidance_scale"] == 1:
        unused += ["guidance_interval", "guidance_channels", "autoguidance_digest"]
    return settings | dict.fromkeys(unused)


def describe_head(config: SampleConfig, info: dict[str, Any]) -> dict[str, Any]:
    """`HEAD_GUIDANCE`: its scale, its times, all at which the head was trained unless given, and the head's digest.

    Raises:
        ValueError: other times, or no head that can guide.
    """
    (scale,) = config.head_guidance
    if scale == 1:
        return dict.fromkeys(HEAD_GUIDANCE)
    low, high = guide_head(info)[2]
    first, last = config.head_guidance_interval or (low, high)
    if not low <= first <= last <= high:
        trained = f"LOW <= HIGH in [{low}, {high}], where the head was trained"
        raise ValueError(f"--head-guidance-interval: expected {trained}, found {first} {last}")
    return dict(zip(HEAD_GUIDANCE, (scale, (first, last), info["digests"][info["heads"]]), strict=True))


def describe_run(generator: SampleGenerator, processes: int, timing: dict[str, float]) -> dict[str, Any]:
    """What `samples.json` holds, but for what `SampleWriter.finish` adds."""
    device, info = generator.device, generator.info
    return {
        "settings": generator.settings,
        "checkpoint": info["source"],
        "vae": info["vae"],
        "class_names": info["class_names"],
        "processes": processes,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "timing": timing,
        **provenance.stamp(),
    }


def read_settings(directory: Path) -> dict[str, Any] | None:
    """The settings of the samples in a directory, whole or unfinished; None if it holds none.

    Raises:
        ValueError: a damaged record, or one of newer code.
    """
    for path in (directory / "samples.json", directory / "partial" / "settings.json"):
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text())
        except ValueError:  # of JSON and of UTF-8
            content = None
        if not isinstance(content, dict) or not isinstance(content.get("settings"), dict):
            raise ValueError(f"expected the settings of samples in {path}, found something else; delete {path.parent}")
        found = content.get("format", FORMAT), content.get("version", VERSION)
        if found != (FORMAT, VERSION):
            raise ValueError(
                f"expected samples of format {FORMAT} {VERSION}, found {' '.join(map(str, found))} in {path}"
            )
        return _without_unused(read_record(read_record(content, RECORD, path)["settings"], SETTINGS, path))
    return None


def resume(config: SampleConfig, given: Set[str], recorded: dict[str, Any]) -> SampleConfig:
    """The config of a set that was begun: what the user did not give is taken from its record.

    Args:
        config: of one set.
        given: names of the fields that the user gave.
        recorded: from `read_settings`.
    """
    values = {name: recorded[name] for name in FLAGS}
    values |= {"guidance_scale": (recorded["guidance_scale"],), "per_proc_batch_size": str(recorded["batch_size"])}
    values["uint8_rule"] = next((name for name, rule in UINT8_RULES.items() if rule == recorded["uint8_rule"]), None)
    values["head_guidance"] = None if recorded["head_guidance"] is None else (recorded["head_guidance"],)
    if "head_guidance" not in given or config.head_guidance != (1,):
        values["head_guidance_interval"] = recorded["head_guidance_interval"]
    if recorded["guidance_interval"]:
        values["guidance_low"], values["guidance_high"] = ((time,) for time in recorded["guidance_interval"])
    values["time_shift"] = recorded["time_shift"] and str(recorded["time_shift"])
    if config.parity:
        given = given | {"mixed_precision", "vae_precision", "tf32"}
    if config.per_proc_batch_size == "auto":
        given = given - {"per_proc_batch_size"}
    taken = {name: value for name, value in values.items() if name not in given and value is not None}
    return dataclasses.replace(config, **taken)
