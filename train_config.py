"""Every setting of a training run: flags, YAML keys and what is saved, in one dataclass."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cli import REQUIRED, flag

if TYPE_CHECKING:
    from dataset import LatentDataset


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run; saved as `config.json` in its folder and in every checkpoint."""

    data_dir: str = flag(REQUIRED, "latent store made by preprocessing/dump_latents.py", group="data")
    resolution: int | None = flag(
        None, "side of the images in pixels; checked against the store, which knows it", group="data"
    )
    num_classes: int | None = flag(None, "classes the model can tell apart, at least the store's", group="data")
    random_flip: bool = flag(False, "mirror each image with probability 1/2 (store made with --flip)", group="data")
    num_workers: int = flag(2, "processes that read the store, per GPU", group="data")

    output_dir: str = flag("exps", "folder of all runs", group="run")
    exp_name: str | None = flag(None, "name of this run; by default made of model and alignment", group="run")
    resume: bool = flag(True, "go on from the newest checkpoint if the run's folder has one", group="run")
    seed: int = flag(0, "seed of the initial weights and of every draw", group="run")

    model: str = flag("SiT-XL/2", "SiT-SIZE/PATCH: sizes Ti, S, B, L, XL; patches 1, 2, 4, 8", group="model")
    path_type: str = flag("linear", "path between data and noise (Eq. 1)", choices=("linear", "cosine"), group="model")

    align: str = flag("vae", "vae: VAE-REPA; none: plain SiT", choices=("vae", "none"), group="alignment")
    align_depth: int | None = flag(
        None,
        "block that is aligned, counted from 1; by default S 2, B 2, L 8, XL 8",
        group="alignment",
        aliases=("--encoder-depth",),
    )
    align_weight: float = flag(1.0, "lambda of Eq. 8", group="alignment", aliases=("--proj-coeff",))
    align_layers: int = flag(5, "linear layers in the head, 1 to 8", group="alignment")
    align_objective: str = flag(
        "smooth_l1", "objective of Eq. 7", choices=("smooth_l1", "l1", "l2", "cosine"), group="alignment"
    )
    align_beta: float = flag(0.05, "half-width of smooth L1's quadratic part", group="alignment")
    align_time_range: tuple[float, float] = flag(
        (0.0, 1.0), "align only samples with t in this range", group="alignment", metavar="T"
    )
    align_target: str = flag(
        "sample",
        "the posterior sample that is noised, or the posterior mean",
        choices=("sample", "mean"),
        group="alignment",
    )

    batch_size: int = flag(256, "images per step, over all processes and accumulation steps", group="optimisation")
    gradient_accumulation_steps: int = flag(1, "micro-batches per step and process", group="optimisation")
    max_train_steps: int = flag(400_000, "steps in all", group="optimisation")
    learning_rate: float = flag(1e-4, "constant learning rate of AdamW", group="optimisation")
    adam_beta1: float = flag(0.9, "AdamW's decay of the first moment", group="optimisation")
    adam_beta2: float = flag(0.999, "AdamW's decay of the second moment", group="optimisation")
    adam_weight_decay: float = flag(0.0, "AdamW's weight decay", group="optimisation")
    adam_epsilon: float = flag(1e-8, "AdamW's epsilon", group="optimisation")
    max_grad_norm: float = flag(1.0, "gradients are scaled down to this global norm (inf: never)", group="optimisation")
    ema_decay: float = flag(0.9999, "decay per step of the averaged weights", group="optimisation")
    label_dropout: float = flag(
        0.1, "share of labels replaced by the null class, for guidance", group="optimisation", aliases=("--cfg-prob",)
    )

    mixed_precision: str | None = flag(
        None,
        "precision of the network; bf16 on a GPU and no (float32) elsewhere unless set",
        choices=("no", "bf16", "fp16"),
        group="speed",
    )
    allow_tf32: bool = flag(False, "TF32 for float32 products on the GPU", group="speed")
    compile: bool | None = flag(None, "torch.compile each block; on a GPU unless set", group="speed")

    checkpointing_steps: int = flag(50_000, "save every this many steps, and at the end", group="checkpoints")
    keep_last: int = flag(2, "newest checkpoints that are kept", group="checkpoints")
    keep_every: int = flag(100_000, "also keep those whose step this divides (0: none)", group="checkpoints")

    log_every: int = flag(100, "write a row of metrics every this many steps", group="logging")
    report_to: str = flag(
        "none", "tracker beside log.jsonl and metrics.csv", choices=("none", "wandb", "tensorboard"), group="logging"
    )
    tracker_project: str = flag("vae-repa", "project name for the tracker", group="logging")

    sampling_steps: int = flag(10_000, "draw a grid of EMA samples every this many steps (0: never)", group="sampling")
    sampling_count: int = flag(16, "images in a grid", group="sampling")
    sampling_guidance: float = flag(4.0, "guidance scale of a grid (1: none)", group="sampling")
    sampling_num_steps: int = flag(50, "Euler steps of a grid", group="sampling")
    vae: str | None = flag(
        None, "VAE that decodes the grids: hub name or local folder; by default the store's", group="sampling"
    )

    def __post_init__(self):
        for name in ("batch_size", "gradient_accumulation_steps", "max_train_steps", "checkpointing_steps",
                     "keep_last", "log_every", "sampling_count", "sampling_num_steps"):  # fmt: skip
            _check(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("sampling_steps", "num_workers", "keep_every", "align_weight", "adam_weight_decay"):
            _check(self, name, getattr(self, name) >= 0, "at least 0")
        for name in ("learning_rate", "max_grad_norm", "adam_epsilon"):
            _check(self, name, getattr(self, name) > 0, "more than 0")
        for name in ("ema_decay", "label_dropout"):
            _check(self, name, 0 <= getattr(self, name) <= 1, "a value in [0, 1]")
        for name in ("adam_beta1", "adam_beta2"):
            _check(self, name, 0 <= getattr(self, name) < 1, "a value in [0, 1)")

    @property
    def run_dir(self) -> Path:
        name = self.exp_name or f"{self.model}-{self.align}".lower().replace("/", "-")
        return Path(self.output_dir) / name


# Settings that may differ when a run goes on: they change neither its weights nor its order of data.
FREE_ON_RESUME = {
    "data_dir", "num_workers", "output_dir", "exp_name", "resume", "gradient_accumulation_steps", "max_train_steps",
    "compile", "checkpointing_steps", "keep_last", "keep_every", "log_every", "report_to", "tracker_project",
    "sampling_steps", "sampling_count", "sampling_guidance", "sampling_num_steps", "vae", "resolution",
}  # fmt: skip
# Settings that may be changed when a run goes on, to bring one through an instability; a change is announced.
CHANGEABLE_ON_RESUME = {"learning_rate", "max_grad_norm", "mixed_precision"}
DEFAULT_DEPTHS = {"Ti": 2, "S": 2, "B": 2, "L": 8, "XL": 8}  # Section 4.2; S and Ti are ours


def _check(config: TrainConfig, name: str, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"--{name.replace('_', '-')}: expected {expected}, found {getattr(config, name)}")


def resolve(config: TrainConfig, store: LatentDataset, on_gpu: bool) -> TrainConfig:
    """The config with every `None` decided, checked against the store.

    Raises:
        ValueError: store and settings disagree.
    """
    size = config.model.removeprefix("SiT-").split("/")[0]
    decided = {
        "resolution": store.meta["resolution"],
        "num_classes": store.num_classes,
        "align_depth": DEFAULT_DEPTHS.get(size),  # an unknown size is reported by SiTConfig
        "exp_name": config.run_dir.name,
        "mixed_precision": "bf16" if on_gpu else "no",
        "compile": on_gpu,
        "vae": store.meta["vae"],
    }
    config = dataclasses.replace(config, **{k: v for k, v in decided.items() if getattr(config, k) is None})
    if config.mixed_precision == "fp16" and not on_gpu:
        raise ValueError("--mixed-precision fp16: expected a GPU, found none; use bf16 or no")
    if config.resolution != store.meta["resolution"]:
        raise ValueError(
            f"--resolution: expected {store.meta['resolution']}, which {config.data_dir} was made at, "
            f"found {config.resolution}; leave the flag out or dump the images again"
        )
    if config.num_classes < store.num_classes:
        raise ValueError(
            f"--num-classes: expected at least {store.num_classes}, the classes in {config.data_dir}, "
            f"found {config.num_classes}"
        )
    if config.random_flip and not store.has_flips:
        raise ValueError(f"--random-flip: {config.data_dir} has no mirrored latents; dump it again with --flip")
    return config
