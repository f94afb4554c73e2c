"""Every setting of a training run: flags, YAML keys and what is recorded, in one flat dataclass. No torch here.

A setting says beside its definition what a resumed run may do with it (`on_resume`): "fixed" settings decide weights or
order of data, and stay as they are; "announced" ones may be changed to bring a run through an instability; "free" ones
change neither.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from alignment.settings import AlignmentSettings
from runtime.cli import REQUIRED, check, flag, is_positive
from runtime.files import Field
from runtime.repa_flags import REPATrainFlags

_data = partial(flag, group="data")
_run = partial(flag, group="run")
_model = partial(flag, group="model")
_optimisation = partial(flag, group="optimisation")
_stability = partial(flag, group="stability")
_speed = partial(flag, group="speed", on_resume="free")
_checkpoints = partial(flag, group="checkpoints", on_resume="free")
_logging = partial(flag, group="logging", on_resume="free")
_sampling = partial(flag, group="sampling", on_resume="free")


@dataclass(frozen=True)
class RunSettings:
    """What a run is: its data, its directory, its model."""

    data_dir: str = _data(REQUIRED, "latent store made by preprocessing/dump_latents.py", on_resume="free")
    resolution: int | None = _data(None, "side of the images in pixels; by default the store's", on_resume="free")
    num_classes: int | None = _data(None, "classes the model can tell apart, at least the store's")
    random_flip: bool = _data(False, "mirror each image with probability 1/2 (store made with --flip)")
    num_workers: int = _data(2, "DataLoader workers that read the store, per GPU", on_resume="free")
    verify_data: bool = _data(False, "compare the digests of the whole store before the first step", on_resume="free")

    preset: str | None = _run(
        None,
        "flags of a published method: a file of configs/ by its name; others' win over them",
        on_resume="free",  # its flags are compared one by one
    )
    output_dir: str = _run("exps", "directory of all runs", on_resume="free")
    exp_name: str | None = _run(None, "name of this run; by default made of model and alignment", on_resume="free")
    resume: bool = _run(True, "resume from the newest checkpoint if the run's directory has one", on_resume="free")
    init_from: str | None = _run(None, "start from these weights: our checkpoint or run, a file of SiT, REPA, SRA")
    init_format: str | None = _run(
        None, "whose file --init-from is, where it does not tell: sit, repa or sra", on_resume="free", metavar="PROJECT"
    )
    init_classes: str | None = _run(None, 'JSON file {"our class": "their class"}: rows that --init-from gives')
    dry_run: bool = _run(
        False, "say what would be trained and what it needs, check all files, and end", on_resume="free"
    )
    images_per_second: float | None = _run(None, "for the hours that --dry-run tells", on_resume="free")
    seed: int = _run(0, "seed of the initial weights and of every draw")

    model: str = _model("SiT-XL/2", "SiT-SIZE/PATCH: sizes Ti, S, B, L, XL; patches 1, 2, 4, 8")
    path_type: str = _model("linear", "path between data and noise (Eq. 1)", choices=("linear", "cosine"))
    qk_norm: bool = _model(False, "LayerNorm of each head's queries and keys, as REPA's flag")
    prediction: str = _model(
        "v", "what the network gives: the velocity, or the data, whose velocity the loss takes", choices=("v", "x")
    )
    time_distribution: str = _model(
        "uniform",
        "how t is drawn; logit-normal: log(b_t / a_t) is normal, on the linear path the logit of t",
        choices=("uniform", "logit-normal"),
    )
    time_mean: float = _model(0.0, "mean of the logit-normal distribution; above 0 is towards noise")
    time_std: float = _model(1.0, "std of the logit-normal distribution")
    time_shift: str = _model(
        "1",
        "then t becomes A t / (1 + (A - 1) t), in sampling too; auto: A = sqrt(numbers in a latent / 4096)",
        metavar="A",
    )


# Records of runs with a single EMA hold a number.
_DECAY = Field((0.9999,), read_old=lambda value: value if isinstance(value, tuple) else (value,))
_RANGES = (
    (
        "batch_size gradient_accumulation_steps max_train_steps checkpointing_steps keep_last log_every sampling_count "
        "sampling_num_steps max_bad_steps timeout ema_snapshot_steps",
        lambda value: value >= 1,
        "at least 1",
    ),
    (
        "sampling_steps num_workers grad_checkpoint profile keep_every adam_weight_decay lr_warmup_steps lr_final",
        lambda value: value >= 0,
        "at least 0",
    ),
    (
        "checkpoint_minutes learning_rate time_std max_grad_norm adam_epsilon spike_factor",
        lambda value: value > 0,
        "more than 0",
    ),
    ("images_per_second", lambda value: value is None or value > 0, "more than 0"),
    ("seed", lambda value: -(2**63) <= value < 2**64, "an integer in [-2**63, 2**64)"),
    ("time_shift", lambda value: value == "auto" or is_positive(value), "a number above 0, or auto"),
    ("time_mean", math.isfinite, "a finite number"),
    ("label_dropout", lambda value: 0 <= value <= 1, "a value in [0, 1]"),
    ("ema_decay", lambda values: all(0 <= value <= 1 for value in values), "values in [0, 1]"),
    ("ema_power", lambda values: all(0 < value < 0.288 for value in values), "relative widths in (0, 0.288)"),
    ("adam_beta1 adam_beta2", lambda value: 0 <= value < 1, "a value in [0, 1)"),
)


@dataclass(frozen=True)
class TrainConfig(AlignmentSettings, RunSettings):
    """Settings of a run; saved as `config.json` in its directory and in every checkpoint."""

    other_flags: ClassVar = REPATrainFlags

    batch_size: int = _optimisation(256, "images per step, over all processes and accumulation steps")
    gradient_accumulation_steps: int = _optimisation(1, "micro-batches per step and process", on_resume="free")
    micro_batch: str = _optimisation(
        "auto",
        "images of a process at once, in as many micro-batches as that makes; auto: the most that a GPU has memory for",
        on_resume="free",
    )
    max_train_steps: int = _optimisation(400_000, "steps in all", on_resume="free")
    epochs: int | None = _optimisation(
        None, "the same in passes over the data; if both are given, the fewer steps", on_resume="free"
    )
    learning_rate: float = _optimisation(
        1e-4, "AdamW's learning rate, the highest of a schedule", on_resume="announced"
    )
    lr_schedule: str = _optimisation(
        "constant",
        "after the warm-up: constant; cosine or linear, to --lr-final; inverse-sqrt, to sqrt(warm-up / step) of it",
        choices=("constant", "cosine", "linear", "inverse-sqrt"),
        on_resume="announced",
    )
    lr_warmup_steps: int = _optimisation(0, "steps over which it rises in a straight line", on_resume="announced")
    lr_decay_steps: int | None = _optimisation(
        None, "step at which cosine and linear reach --lr-final; by default --max-train-steps", on_resume="announced"
    )
    lr_final: float = _optimisation(0.0, "learning rate at the end of cosine and linear", on_resume="announced")
    adam_beta1: float = _optimisation(0.9, "AdamW's decay of the first moment")
    adam_beta2: float = _optimisation(0.999, "AdamW's decay of the second moment")
    adam_weight_decay: float = _optimisation(0.0, "AdamW's weight decay")
    adam_epsilon: float = _optimisation(1e-8, "AdamW's epsilon")
    max_grad_norm: float = _optimisation(1.0, "largest global norm of the gradients (inf: any)", on_resume="announced")
    ema_decay: tuple[float, ...] = _optimisation(
        (0.9999,),
        "decay of the EMA per step; several: an EMA each, of which grids and sra use the first",
        record=_DECAY,
    )
    ema_power: tuple[float, ...] = _optimisation(
        (), "further EMAs of EDM2's power functions, by relative width sigma_rel, such as 0.05 0.1", metavar="SIGMA"
    )
    ema_snapshot_steps: int = _optimisation(
        5_000, "keep those in half precision every so many steps, for analysis.posthoc_ema", on_resume="free"
    )
    ema_warmup: bool | None = _optimisation(
        None,
        "lower decays at first, min(d, (1 + k) / (10 + k)) after k steps; with --init-from unless set",
        record=Field(False),
    )
    label_dropout: float = _optimisation(0.1, "share of labels dropped, for guidance", aliases=("--cfg-prob",))

    max_bad_steps: int = _stability(
        20,
        "stop after this many steps in a row that could not be applied: a loss or gradient was not finite",
        on_resume="free",
    )
    spike_factor: float = _stability(10.0, "report gradient norms above so many medians", on_resume="announced")
    skip_spikes: bool = _stability(False, "do not apply such steps", on_resume="announced")
    timeout: int = _stability(600, "seconds after which a process that waits for another gives up", on_resume="free")

    mixed_precision: str | None = _speed(
        None,
        "precision of the network; bf16 on a GPU and no (float32) elsewhere unless set",
        choices=("no", "bf16", "fp16"),
        on_resume="announced",
    )
    allow_tf32: bool = _speed(False, "TF32 for float32 products on the GPU", on_resume="fixed")
    grad_checkpoint: int = _speed(0, "run every k-th block again in the backward pass, to save memory (0: none)")
    zero1: bool = _speed(False, "shard the optimizer's moments over the processes: the same weights, less memory")
    profile: int = _speed(0, "write a trace of this many steady steps to <run>/profile.json (0: none)")
    device: str | None = _speed(None, "a GPU if there is one, unless set", choices=("cpu", "cuda", "mps"))
    compile: bool | None = _speed(None, "torch.compile each block; on a GPU unless set")

    checkpointing_steps: int = _checkpoints(50_000, "save every this many steps, and at the end")
    checkpoint_minutes: float = _checkpoints(
        30.0, "also save after so many minutes; it replaces the one before (inf: never)"
    )
    keep_last: int = _checkpoints(2, "newest checkpoints that are kept")
    keep_every: int = _checkpoints(100_000, "also keep those whose step this divides (0: none)")

    log_every: int = _logging(100, "write a row of metrics every this many steps")
    report_to: str = _logging("none", "tracker beside log.jsonl, metrics.csv", choices=("none", "wandb", "tensorboard"))
    tracker_project: str = _logging("vae-repa", "project name for the tracker")

    sampling_steps: int = _sampling(10_000, "draw a grid of EMA samples every this many steps (0: never)")
    sampling_count: int = _sampling(16, "images in a grid")
    sampling_guidance: float = _sampling(4.0, "guidance scale of a grid (1: none)")
    sampling_num_steps: int = _sampling(50, "Euler steps of a grid")
    vae: str | None = _sampling(None, "VAE of the grids: hub name, local directory or file; by default the store's")

    def __post_init__(self):
        super().__post_init__()
        for names, holds, expected in _RANGES:
            for name in names.split():
                check(self, name, holds(getattr(self, name)), expected)
        if self.time_shift != "auto":  # one text for one number
            object.__setattr__(self, "time_shift", f"{float(self.time_shift):.12g}")
        number = self.micro_batch.isdecimal() and int(self.micro_batch) >= 1
        check(self, "micro_batch", self.micro_batch == "auto" or number, "auto or a number of at least 1")
        if self.lr_schedule in ("cosine", "linear"):
            end, begin = self.lr_decay_steps or self.max_train_steps, self.lr_warmup_steps
            if end <= begin:
                raise ValueError(f"--lr-decay-steps: expected more than the {begin} of --lr-warmup-steps, found {end}")
        rises = self.lr_warmup_steps or self.lr_schedule != "inverse-sqrt"
        check(self, "epochs", self.epochs is None or self.epochs >= 1, "at least 1")
        check(self, "lr_warmup_steps", rises, "1 or more with --lr-schedule inverse-sqrt")

    @property
    def run_dir(self) -> Path:
        name = self.exp_name or f"{self.model}-{self.align}".lower().replace("/", "-").replace("+", "-")
        return Path(self.output_dir) / name


def settings_by(**metadata: str) -> set[str]:
    """Names of the settings whose flag was defined so, such as `settings_by(on_resume="free")`."""
    fields = dataclasses.fields(TrainConfig)
    return {field.name for field in fields if metadata.items() <= field.metadata.items()}
