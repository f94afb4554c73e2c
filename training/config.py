"""Every setting of a training run: flags, YAML keys and what is recorded, in one flat dataclass. No torch here.

A setting says beside its definition what a resumed run may do with it (`on_resume`): "fixed" settings decide weights or
order of data, and stay as they are; "announced" ones may be changed to bring a run through an instability; "free" ones
change neither.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from alignment.settings import AlignmentSettings
from runtime.cli import REQUIRED, check, flag


@dataclass(frozen=True)
class RunSettings:
    """What a run is: its data, its directory, its model."""

    data_dir: str = flag(REQUIRED, "latent store made by preprocessing/dump_latents.py", group="data", on_resume="free")
    resolution: int | None = flag(
        None, "side of the images in pixels; checked against the store, which knows it", group="data", on_resume="free"
    )
    num_classes: int | None = flag(None, "classes the model can tell apart, at least the store's", group="data")
    random_flip: bool = flag(False, "mirror each image with probability 1/2 (store made with --flip)", group="data")
    num_workers: int = flag(2, "DataLoader workers that read the store, per GPU", group="data", on_resume="free")
    verify_data: bool = flag(
        False, "compare the digests of the whole store before the first step", group="data", on_resume="free"
    )

    output_dir: str = flag("exps", "directory of all runs", group="run", on_resume="free")
    exp_name: str | None = flag(
        None, "name of this run; by default made of model and alignment", group="run", on_resume="free"
    )
    resume: bool = flag(
        True, "resume from the newest checkpoint if the run's directory has one", group="run", on_resume="free"
    )
    init_from: str | None = flag(
        None, "start from these weights: a checkpoint or run of ours, or a file of SiT's, REPA's or SRA's", group="run"
    )
    seed: int = flag(0, "seed of the initial weights and of every draw", group="run")

    model: str = flag("SiT-XL/2", "SiT-SIZE/PATCH: sizes Ti, S, B, L, XL; patches 1, 2, 4, 8", group="model")
    path_type: str = flag("linear", "path between data and noise (Eq. 1)", choices=("linear", "cosine"), group="model")


_RANGES = (
    (
        "batch_size gradient_accumulation_steps max_train_steps checkpointing_steps keep_last log_every sampling_count "
        "sampling_num_steps max_bad_steps timeout",
        lambda value: value >= 1,
        "at least 1",
    ),
    (
        "sampling_steps num_workers grad_checkpoint profile keep_every adam_weight_decay",
        lambda value: value >= 0,
        "at least 0",
    ),
    ("learning_rate max_grad_norm adam_epsilon spike_factor", lambda value: value > 0, "more than 0"),
    ("ema_decay label_dropout", lambda value: 0 <= value <= 1, "a value in [0, 1]"),
    ("adam_beta1 adam_beta2", lambda value: 0 <= value < 1, "a value in [0, 1)"),
)


@dataclass(frozen=True)
class TrainConfig(AlignmentSettings, RunSettings):
    """Settings of a run; saved as `config.json` in its directory and in every checkpoint."""

    batch_size: int = flag(256, "images per step, over all processes and accumulation steps", group="optimisation")
    gradient_accumulation_steps: int = flag(
        1, "micro-batches per step and process", group="optimisation", on_resume="free"
    )
    max_train_steps: int = flag(400_000, "steps in all", group="optimisation", on_resume="free")
    learning_rate: float = flag(1e-4, "constant learning rate of AdamW", group="optimisation", on_resume="announced")
    adam_beta1: float = flag(0.9, "AdamW's decay of the first moment", group="optimisation")
    adam_beta2: float = flag(0.999, "AdamW's decay of the second moment", group="optimisation")
    adam_weight_decay: float = flag(0.0, "AdamW's weight decay", group="optimisation")
    adam_epsilon: float = flag(1e-8, "AdamW's epsilon", group="optimisation")
    max_grad_norm: float = flag(
        1.0, "gradients are scaled down to this global norm (inf: never)", group="optimisation", on_resume="announced"
    )
    ema_decay: float = flag(0.9999, "decay of the EMA per step", group="optimisation")
    label_dropout: float = flag(
        0.1, "share of labels replaced by the null class, for guidance", group="optimisation", aliases=("--cfg-prob",)
    )

    max_bad_steps: int = flag(
        20,
        "stop after this many steps in a row that could not be applied: a loss or gradient was not finite",
        group="stability",
        on_resume="free",
    )
    spike_factor: float = flag(
        10.0, "report a gradient norm above this many running medians", group="stability", on_resume="announced"
    )
    skip_spikes: bool = flag(False, "do not apply such steps", group="stability", on_resume="announced")
    timeout: int = flag(
        600, "seconds after which a process that waits for another gives up", group="stability", on_resume="free"
    )

    mixed_precision: str | None = flag(
        None,
        "precision of the network; bf16 on a GPU and no (float32) elsewhere unless set",
        choices=("no", "bf16", "fp16"),
        group="speed",
        on_resume="announced",
    )
    allow_tf32: bool = flag(False, "TF32 for float32 products on the GPU", group="speed")
    grad_checkpoint: int = flag(
        0,
        "run every k-th block again in the backward pass, to save memory (1: each, 0: none)",
        group="speed",
        on_resume="free",
    )
    zero1: bool = flag(
        False,
        "shard the optimizer's moments over the processes: the same weights, less memory",
        group="speed",
        on_resume="free",
    )
    profile: int = flag(
        0, "write a trace of this many steady steps to <run>/profile.json (0: none)", group="speed", on_resume="free"
    )
    compile: bool | None = flag(None, "torch.compile each block; on a GPU unless set", group="speed", on_resume="free")

    checkpointing_steps: int = flag(
        50_000, "save every this many steps, and at the end", group="checkpoints", on_resume="free"
    )
    keep_last: int = flag(2, "newest checkpoints that are kept", group="checkpoints", on_resume="free")
    keep_every: int = flag(
        100_000, "also keep those whose step this divides (0: none)", group="checkpoints", on_resume="free"
    )

    log_every: int = flag(100, "write a row of metrics every this many steps", group="logging", on_resume="free")
    report_to: str = flag(
        "none",
        "tracker beside log.jsonl and metrics.csv",
        choices=("none", "wandb", "tensorboard"),
        group="logging",
        on_resume="free",
    )
    tracker_project: str = flag("vae-repa", "project name for the tracker", group="logging", on_resume="free")

    sampling_steps: int = flag(
        10_000, "draw a grid of EMA samples every this many steps (0: never)", group="sampling", on_resume="free"
    )
    sampling_count: int = flag(16, "images in a grid", group="sampling", on_resume="free")
    sampling_guidance: float = flag(4.0, "guidance scale of a grid (1: none)", group="sampling", on_resume="free")
    sampling_num_steps: int = flag(50, "Euler steps of a grid", group="sampling", on_resume="free")
    vae: str | None = flag(
        None,
        "VAE that decodes the grids: hub name, local directory or file; by default the store's",
        group="sampling",
        on_resume="free",
    )

    def __post_init__(self):
        super().__post_init__()
        for names, holds, expected in _RANGES:
            for name in names.split():
                check(self, name, holds(getattr(self, name)), expected)

    @property
    def run_dir(self) -> Path:
        name = self.exp_name or f"{self.model}-{self.align}".lower().replace("/", "-").replace("+", "-")
        return Path(self.output_dir) / name


def settings_by(**metadata: str) -> set[str]:
    """Names of the settings whose flag was defined so, such as `settings_by(on_resume="free")`."""
    fields = dataclasses.fields(TrainConfig)
    return {field.name for field in fields if metadata.items() <= field.metadata.items()}
