"""Any checkpoint to a SiT: ours, and files of SiT's, REPA's and SRA's. `training/checkpoint.py` writes ours.

    <run>/checkpoints/0400000/
        config.json          settings of the SiT
        ema.safetensors      the EMA of the SiT: what is sampled from
        heads-ema.safetensors    that of the heads that can guide sampling, if it has some
        model.safetensors    SiT and heads as trained
        optimizer.pt         optimizer state, tensors and plain values only
        state.json           step, settings of the run, latent scale, versions, git revision, SHA-256 of each file

Nothing is ever unpickled: weights are safetensors, and files of torch's are read with `weights_only=True`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from models.aligned import HeadedSiT
from models.convert import FORMATS, convert_state_dict, read_args
from models.projector import ConvHead, Projector
from models.sit import FinalLayer, SiT, SiTConfig
from models.tensor_file import load_exactly, read_tensor_file
from models.vae import UNKNOWN_VAE, LatentScale
from runtime.files import Field, read_checksummed_json, read_record, sha256

FORMAT = "vae-repa-checkpoint"
VERSION = 1
HEADS = "heads-"  # before the name of an EMA: that of the heads that can guide
STATE = {  # the fields of state.json, which training/checkpoint.py writes
    **dict.fromkeys(
        "format version step vae vae_digest resolution class_names scale path_type digests".split(), Field()
    ),
    "prediction": Field("v"),
    "time_shift": Field(1.0),
    # Not needed to sample: checkpoints that another program wrote may lack them.
    "config": Field(None),  # a record of its own: training/config.py
    "classes_present": Field(None),  # those that had images in training; not known of older runs
    **dict.fromkeys(
        "data_digest initial repa_digest processes tracker_run versions git_revision machine date".split(), Field(None)
    ),
    "micro_batch": Field({}),  # not divided
}
LEAST_TIME = 0.05  # of guidance by a head's latent: towards it v-networks' velocities grow as 1/t
SD_VAE_SCALE = 0.18215  # the scale that the SD-VAE's config records, and that SiT, REPA and SRA train with
FOREIGN_VAES = {  # what each project decodes with; REPA and SRA encode with sd-vae-ft-mse, whose encoder is the same
    "sit": "stabilityai/sd-vae-ft-ema",
    "repa": "stabilityai/sd-vae-ft-ema",
    "sra": "stabilityai/sd-vae-ft-ema",
}
FOREIGN_PATHS = {"linear": "linear", "cosine": "cosine", "cos": "cosine", "gvp": "cosine"}  # by lower-case name


def checkpoints(run_dir: str | Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    found = [
        path
        for path in (Path(run_dir) / "checkpoints").glob("*")
        if path.name.isdigit() and (path / "state.json").is_file()
    ]
    return sorted(found, key=lambda path: int(path.name))


def latest_checkpoint(run_dir: str | Path) -> Path | None:
    """The finished checkpoint with the most steps, or None."""
    return next(reversed(checkpoints(run_dir)), None)


def read_state(directory: str | Path) -> dict[str, Any]:
    """`state.json` of a checkpoint, by the names in `STATE`.

    Raises:
        ValueError: it is missing, damaged, of another format, or written by newer code.
    """
    file = Path(directory) / "state.json"
    if not file.is_file():
        raise ValueError(f"not a checkpoint: {directory} has no state.json; expected <run>/checkpoints/<step>")
    try:
        state = read_checksummed_json(file)
    except ValueError as error:  # of JSON and of UTF-8, too
        raise ValueError(f"damaged checkpoint: {file}: {error}; use an older one") from error
    if (state.get("format"), state.get("version")) != (FORMAT, VERSION):
        found = f"{state.get('format')} {state.get('version')} in {directory}"
        raise ValueError(f"expected a checkpoint of format {FORMAT} {VERSION}, found {found}")
    state = read_record(state, STATE, file)
    name = Path(directory).absolute().name
    if name.isdigit() and int(name) != state["step"]:
        raise ValueError(f"expected the checkpoint of step {int(name)} in {directory}, found that of {state['step']}")
    return state | {"class_names": list(state["class_names"])}


def verified_file(directory: Path, name: str, state: dict[str, Any]) -> Path:
    """Path of one of the checkpoint's files, once its digest has been compared."""
    path, expected = directory / name, state["digests"].get(name)
    if expected is None or not path.is_file():
        raise ValueError(f"damaged checkpoint: {path} is missing; use an older one")
    found = sha256(path)
    if found != expected:
        digests = f"{found[:12]}..., expected {expected[:12]}..."
        raise ValueError(f"damaged checkpoint: {path} has SHA-256 {digests}; use an older one")
    return path


def load_weights(module: nn.Module, path: Path) -> None:
    """Put the weights of a file of ours into `module`, whose they must be."""
    try:
        load_exactly(module, read_tensor_file(path), "the model")
    except ValueError as error:
        raise ValueError(f"damaged checkpoint: {path}: {error}; use an older one") from error


def load_sit(path: str | Path, ema: str | None = None, format: str | None = None) -> tuple[SiT, dict[str, Any]]:
    """The SiT to sample with (EMA weights), on the CPU in float32, in eval mode and frozen.

    Args:
        path: a checkpoint `<run>/checkpoints/<step>`; or a run's directory, whose newest checkpoint is taken; or a file
            of SiT's, REPA's or SRA's (.pt, or .safetensors).
        ema: which of a run's EMAs, by its decay, such as "0.999" or "power-0.05"; None: the first.
        format: a key of `FORMATS`, for a file of another project's that does not tell whose it is.

    Returns:
        The model, and what is known of it: `source` (the directory or file), `format` (ours is "vae-repa"), `read_as`
        (how it was read, in words), `step`, `digest` (SHA-256 of the weights), `scale` (`LatentScale`), `vae`,
        `vae_digest`, `resolution`, `class_names`, `path_type`, `prediction`, `time_shift`, and the rest of
        `state.json`. Files of other projects record less: there `step` may be None, and `scale` is None for latents of
        other than the SD-VAE's 4 channels.

    Raises:
        ValueError: no checkpoint there, a damaged one, or one that this project's SiT cannot represent.
    """
    directory = Path(path)
    if directory.is_file() and (directory.parent / "state.json").is_file():  # of a checkpoint of ours
        if not directory.name.startswith("ema"):
            raise ValueError(f"expected a checkpoint's directory, found a file of it; give {directory.parent}")
        return load_sit(directory.parent, ema or directory.stem.removeprefix("ema-"), format)
    if directory.is_file():
        try:
            model, info = _load_foreign(directory, format)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return model.eval().requires_grad_(False), info
    if format:
        raise ValueError(f"--checkpoint-format: expected a file of another project, found {path}; leave it out")
    if not directory.is_dir():
        expected = "<run>/checkpoints/<step>, or a .pt or .safetensors file"
        raise ValueError(f"not a checkpoint: nothing at {path}; expected {expected}")
    if not (directory / "state.json").is_file():
        directory = latest_checkpoint(path)
        if directory is None:
            raise ValueError(f"not a checkpoint: {path} holds neither state.json nor checkpoints/<step>/state.json")
    state = read_state(directory)
    config_file = verified_file(directory, "config.json", state)
    model = SiT(SiTConfig.from_dict(json.loads(config_file.read_text()), config_file))
    known = {name.removesuffix(".safetensors").removeprefix("ema-"): name for name in state["digests"]}
    known = {name: file for name, file in known.items() if file.startswith("ema")}
    weights = "ema.safetensors" if ema is None else known.get(ema)
    if weights is None:
        raise ValueError(f"--ema: expected one of {', '.join(sorted(known))} in {directory}, found {ema}")
    load_weights(model, verified_file(directory, weights, state))
    info = state | {
        "source": str(directory),
        "format": "vae-repa",
        "read_as": f"step {state['step']} of this project, {weights.removesuffix('.safetensors').upper()} weights",
        "digest": state["digests"][weights],
        "heads": HEADS + weights if HEADS + weights in state["digests"] else None,
        "scale": LatentScale.from_dict(state["scale"]),
    }
    return model.eval().requires_grad_(False), info


def guide_head(info: dict[str, Any]) -> tuple[str, list[int], tuple[float, float]]:
    """Method, depths and times of the head by which the model of `load_sit` can be guided: Internal Guidance's, or that
    of VAE-REPA. Of several depths the first is meant. The times are those that the head was trained at, and for a
    latent beside a network of velocities from `LEAST_TIME` on.

    Raises:
        ValueError: there is none, or one that is not trained, or without the scale of the latents.
    """
    config = info.get("config") or {}
    method = next((name for name in ("ig", "vae") if name in config.get("align", "").split("+")), None)
    if method is None or not info.get("heads"):
        why = "this EMA was kept without one; resume the run for it" if method else "train with --align vae, or ig"
        raise ValueError(f"--head-guidance: expected a head that can guide in {info['source']}, found none ({why})")
    prefix = {"vae": "align"}.get(method, method)
    kind, _, end = config[f"{prefix}_schedule"].partition(":")
    if config[f"{prefix}_weight"] == 0 or (end and int(end) <= info["step"]):
        found = f"--{prefix}-weight 0" if config[f"{prefix}_weight"] == 0 else f"--{prefix}-schedule {kind}:{end}"
        raise ValueError(f"--head-guidance: expected a head that was trained until step {info['step']}, found {found}")
    if method == "vae" and (config["align_normalize"] != "none" or config["align_objective"].startswith("cosine")):
        normalized = config["align_normalize"] != "none"
        found = "--align-normalize" if normalized else f"--align-objective {config['align_objective']}"
        raise ValueError(f"--head-guidance: expected a head that knows the latents' scale, found {found}; leave it out")
    low, high = config["align_time_range"]
    if method == "vae" and info["prediction"] == "v":
        low = max(low, LEAST_TIME)
    return method, config[f"{prefix}_depth"], (low, max(low, high))


def load_head(sit: SiT, info: dict[str, Any]) -> HeadedSiT:
    """The SiT of `load_sit` and the EMA of the head that guides it, where the SiT is.

    Raises:
        ValueError: as `guide_head`; a file is damaged.
    """
    (method, depths, _), config = guide_head(info), info["config"]
    D, out = sit.config.hidden_size, sit.config.patch_dim
    if method == "ig":
        head = FinalLayer(sit.config)
    else:
        head = ConvHead(D, out) if config["align_head"] == "conv" else Projector(D, out, config["align_layers"])
    file, prefix = verified_file(Path(info["source"]), info["heads"], info), f"{method}_{depths[0]}."
    prefix = f"{method}." if len(depths) == 1 else prefix
    tensors = {k.removeprefix(prefix): v for k, v in read_tensor_file(file).items() if k.startswith(prefix)}
    load_exactly(head, tensors, "the head")
    headed = HeadedSiT(sit, (depths[0], 0) if method == "ig" else (depths[0],), head, method == "ig")
    return headed.to(sit.pos_embed.device).eval().requires_grad_(False)


def has_null_class(info: dict[str, Any]) -> bool:
    """Whether the null class of what `load_sit` tells of was trained, by the run or before it, so that it can guide."""
    return (info.get("config") or {}).get("label_dropout") != 0 or bool(info.get("initial"))


def _load_foreign(path: Path, format: str | None) -> tuple[SiT, dict[str, Any]]:
    """The SiT in a file of another project's, and what the file tells."""
    content = read_tensor_file(path)
    config, tensors, kind, notes = convert_state_dict(content, format)
    args = read_args(content)
    path_type = FOREIGN_PATHS.get(str(args.get("path_type", "linear")).lower())
    if path_type is None or args.get("prediction", "v") not in ("v", "velocity"):
        found = f"trained to predict {args.get('prediction', 'v')} on the path {args.get('path_type')}"
        raise ValueError(f"expected a velocity on a linear or cosine path, found a model that was {found}")
    model = SiT(config)
    load_exactly(model, tensors, "a SiT")
    step = content.get("steps", content.get("train_steps"))
    return model, {
        "source": str(path),
        "format": kind,
        "read_as": f"{FORMATS[kind]}'s file: {'; '.join(notes)}" if notes else f"{FORMATS[kind]}'s file",
        "step": step if isinstance(step, int) else None,
        "digest": sha256(path),
        "scale": LatentScale((SD_VAE_SCALE,), (0.0,)) if config.in_channels == 4 else None,
        "vae": FOREIGN_VAES[kind],
        "vae_digest": UNKNOWN_VAE,
        "resolution": args.get("resolution") or args.get("image_size") or 8 * config.latent_size,
        "classes_present": None,
        "class_names": [str(label) for label in range(config.num_classes)],
        "path_type": path_type,
        "prediction": "v",
        "time_shift": 1.0,
        "encoder_depth": args.get("encoder_depth"),
    }
