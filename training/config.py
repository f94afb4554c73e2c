"""Every setting of a training run: flags, YAML keys and what is saved, in one dataclass."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.cli import REQUIRED, flag

if TYPE_CHECKING:
    from dataset import LatentDataset


OBJECTIVES = ("smooth_l1", "l1", "l2", "cosine")
HEADS = "an MLP, or one 3 x 3 convolution over the tokens' grid"
NORMALIZE = "bring each channel of the target to mean 0 and deviation 1 over an image's tokens"
SCHEDULES = (
    "its weight over steps: constant, linear:K or cosine:K (falls to 0 at step K), off:K (0 from step K on), or sra "
    "(falls slowly after epoch 149)"
)


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
    verify_data: bool = flag(False, "compare the digests of the whole store before the first step", group="data")

    output_dir: str = flag("exps", "folder of all runs", group="run")
    exp_name: str | None = flag(None, "name of this run; by default made of model and alignment", group="run")
    resume: bool = flag(True, "go on from the newest checkpoint if the run's folder has one", group="run")
    init_from: str | None = flag(
        None, "start from these weights: a checkpoint or run of ours, or a file of SiT's, REPA's or SRA's", group="run"
    )
    seed: int = flag(0, "seed of the initial weights and of every draw", group="run")

    model: str = flag("SiT-XL/2", "SiT-SIZE/PATCH: sizes Ti, S, B, L, XL; patches 1, 2, 4, 8", group="model")
    path_type: str = flag("linear", "path between data and noise (Eq. 1)", choices=("linear", "cosine"), group="model")

    align: str = flag(
        "vae",
        "vae: VAE-REPA; repa: an external encoder; sra: the model's own average; sums such as repa+vae; "
        "none: plain SiT",
        group="alignment",
    )
    align_beta: float = flag(0.05, "half-width of smooth L1's quadratic part, for every method", group="alignment")
    align_time_range: tuple[float, float] = flag(
        (0.0, 1.0), "align only samples with t in this range, by every method", group="alignment", metavar="T"
    )

    align_depth: tuple[int, ...] | None = flag(
        None,
        "blocks that are aligned, counted from 1; several share the weight; by default S 2, B 2, L 8, XL 8",
        group="alignment: vae",
        aliases=("--encoder-depth",),
    )
    align_weight: float = flag(1.0, "lambda of Eq. 8", group="alignment: vae", aliases=("--proj-coeff",))
    align_schedule: str = flag("constant", SCHEDULES, group="alignment: vae")
    align_objective: str = flag("smooth_l1", "objective of Eq. 7", choices=OBJECTIVES, group="alignment: vae")
    align_head: str = flag("mlp", HEADS, choices=("mlp", "conv"), group="alignment: vae")
    align_layers: int = flag(5, "linear layers in the MLP head, 1 to 8", group="alignment: vae")
    align_target: str = flag(
        "sample",
        "the posterior sample that is noised, or the posterior mean",
        choices=("sample", "mean"),
        group="alignment: vae",
    )
    align_normalize: bool = flag(False, NORMALIZE, group="alignment: vae")

    repa_encoder: str = flag(
        "dinov2-vit-b",
        "encoder: dinov2-vit-s, -b, -l, -g, dinov2reg-vit-b, -l, -g, dinov3-vit-s, -b, -l, mae-vit-b, -l, "
        "clip-vit-b, -l, siglip-vit-b, -l, or a vision transformer's name in timm",
        group="alignment: repa",
        aliases=("--enc-type",),
    )
    repa_weights: str | None = flag(
        None,
        "local file with its weights, in place of the hub; random: none, to measure speed",
        group="alignment: repa",
    )
    repa_depth: tuple[int, ...] | None = flag(
        None, "blocks that are aligned; by default Ti 2, S 4, B 4, L 8, XL 8", group="alignment: repa"
    )
    repa_weight: float = flag(0.5, "weight of its term", group="alignment: repa")
    repa_schedule: str = flag("constant", SCHEDULES, group="alignment: repa")
    repa_objective: str = flag("cosine", "objective of its term", choices=OBJECTIVES, group="alignment: repa")
    repa_head: str = flag("mlp", HEADS, choices=("mlp", "conv"), group="alignment: repa")
    repa_normalize: bool = flag(False, NORMALIZE, group="alignment: repa")

    sra_depth: tuple[int, ...] | None = flag(
        None,
        "blocks that are aligned; by default Ti 2, S 4, B 4, L 8, XL 8",
        group="alignment: sra",
        aliases=("--block-out-s",),
    )
    sra_teacher_depth: int | None = flag(
        None,
        "block of the average that they learn from; by default Ti 4, S 8, B 8, L 16, XL 20",
        group="alignment: sra",
        aliases=("--block-out-t",),
    )
    sra_t_max: float = flag(
        0.2, "the average sees a time up to this much earlier", group="alignment: sra", aliases=("--t-max",)
    )
    sra_weight: float = flag(0.2, "weight of its term", group="alignment: sra")
    sra_schedule: str = flag("sra", SCHEDULES, group="alignment: sra")
    sra_objective: str = flag("smooth_l1", "objective of its term", choices=OBJECTIVES, group="alignment: sra")

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

    max_bad_steps: int = flag(
        20,
        "stop after this many steps in a row that could not be applied: a loss or gradient was not finite",
        group="stability",
    )
    spike_factor: float = flag(10.0, "report a gradient norm above this many running medians", group="stability")
    skip_spikes: bool = flag(False, "do not apply such steps", group="stability")
    timeout: int = flag(600, "seconds after which a process that waits for another gives up", group="stability")

    mixed_precision: str | None = flag(
        None,
        "precision of the network; bf16 on a GPU and no (float32) elsewhere unless set",
        choices=("no", "bf16", "fp16"),
        group="speed",
    )
    allow_tf32: bool = flag(False, "TF32 for float32 products on the GPU", group="speed")
    grad_checkpoint: int = flag(
        0, "run every k-th block again in the backward pass, to save memory (1: each, 0: none)", group="speed"
    )
    zero1: bool = flag(
        False, "divide the optimizer's moments over the processes: the same weights, less memory", group="speed"
    )
    profile: int = flag(0, "write a trace of this many steady steps to <run>/profile.json (0: none)", group="speed")
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
        None, "VAE that decodes the grids: hub name, local folder or file; by default the store's", group="sampling"
    )

    def __post_init__(self):
        for name in ("batch_size", "gradient_accumulation_steps", "max_train_steps", "checkpointing_steps",
                     "keep_last", "log_every", "sampling_count", "sampling_num_steps", "max_bad_steps",
                     "timeout"):  # fmt: skip
            _check(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("sampling_steps", "num_workers", "grad_checkpoint", "profile", "keep_every", "align_weight",
                     "repa_weight", "sra_weight", "adam_weight_decay"):  # fmt: skip
            _check(self, name, getattr(self, name) >= 0, "at least 0")
        for name in ("learning_rate", "max_grad_norm", "adam_epsilon", "spike_factor"):
            _check(self, name, getattr(self, name) > 0, "more than 0")
        for name in ("ema_decay", "label_dropout", "sra_t_max"):
            _check(self, name, 0 <= getattr(self, name) <= 1, "a value in [0, 1]")
        for name in ("adam_beta1", "adam_beta2"):
            _check(self, name, 0 <= getattr(self, name) < 1, "a value in [0, 1)")

    @property
    def run_dir(self) -> Path:
        name = self.exp_name or f"{self.model}-{self.align}".lower().replace("/", "-").replace("+", "-")
        return Path(self.output_dir) / name


# Settings that may differ when a run goes on: they change neither its weights nor its order of data.
FREE_ON_RESUME = {
    "data_dir", "num_workers", "output_dir", "exp_name", "resume", "gradient_accumulation_steps", "max_train_steps",
    "compile", "checkpointing_steps", "keep_last", "keep_every", "log_every", "report_to", "tracker_project",
    "sampling_steps", "sampling_count", "sampling_guidance", "sampling_num_steps", "vae", "resolution",
    "max_bad_steps", "timeout", "verify_data", "grad_checkpoint", "zero1",
    "profile",
}  # fmt: skip
# Settings that may be changed when a run goes on, to bring one through an instability; a change is announced.
CHANGEABLE_ON_RESUME = {"learning_rate", "max_grad_norm", "mixed_precision", "spike_factor", "skip_spikes"}
# Depths by size. VAE-REPA: Section 4.2; REPA: B, L and XL by its authors; SRA: XL by its authors, B the default of
# their code. S, Ti, and SRA's of L are ours.
DEFAULT_DEPTHS = {
    "align_depth": {"Ti": (2,), "S": (2,), "B": (2,), "L": (8,), "XL": (8,)},
    "repa_depth": {"Ti": (2,), "S": (4,), "B": (4,), "L": (8,), "XL": (8,)},
    "sra_depth": {"Ti": (2,), "S": (4,), "B": (4,), "L": (8,), "XL": (8,)},
    "sra_teacher_depth": {"Ti": 4, "S": 8, "B": 8, "L": 16, "XL": 20},
}


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
        **{name: depths.get(size) for name, depths in DEFAULT_DEPTHS.items()},  # SiTConfig reports an unknown size
        "exp_name": config.run_dir.name,
        "mixed_precision": "bf16" if on_gpu else "no",
        "compile": on_gpu,
        "vae": store.meta["vae"],
    }
    config = dataclasses.replace(config, **{k: v for k, v in decided.items() if getattr(config, k) is None})
    if config.mixed_precision == "fp16" and not on_gpu:
        raise ValueError("--mixed-precision fp16: expected a GPU, found none; use bf16 or no")
    if config.zero1 and config.mixed_precision == "fp16":
        raise ValueError("--zero1: expected --mixed-precision bf16 or no with it, found fp16")
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
