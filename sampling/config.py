"""Every setting of a set of samples: flags, YAML keys and what decides the images, in one dataclass."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from runtime.cli import REQUIRED, check, flag, is_positive
from runtime.files import Field
from runtime.repa_flags import REPASampleFlags

BLOCK = 16  # images that share a generator of noise; part of what determines the images
SAMPLERS = ("sde", "ode-euler", "ode-heun", "ode-heun-repa", "ode-dopri5")
DIFFUSION_FORMS = ("constant", "SBDM", "sigma", "linear", "decreasing", "increasing-decreasing")
LAST_STEPS = ("none", "mean", "tweedie", "euler")
# Settings that are keyword arguments of a sampler, and have no effect on the others.
SAMPLER_OPTIONS = {"sde": ("diffusion_form", "diffusion_norm", "last_step"), "ode-dopri5": ("atol", "rtol")}
UINT8_RULES = ("floor", "truncate", "round")  # written out in `models.vae`
CHANNELS = ("3", "all")
LABELS, PRECISIONS = ("random", "balanced"), ("no", "bf16")
NEIGHBOURS = 3  # of precision and recall, as in the ADM suite
LARGEST_BATCH, CPU_BATCH = 256, 64  # of --per-proc-batch-size auto

_AUTO = f"the largest up to {LARGEST_BATCH} for which a GPU has memory ({CPU_BATCH} on a CPU)"
_LAST_STEP_SIZE = Field(0.04, old_names=("last_t",))
_GROUPS = "files", "evaluation", "what to draw", "solver", "speed", "compared with the checkpoint"
_file, _evaluation, _set, _solver, _speed, _stated = (partial(flag, group=group) for group in _GROUPS)
_precision = partial(_speed, None, choices=PRECISIONS, record=Field())


@dataclass(frozen=True)
class SampleConfig:
    """Settings of one set of samples, or of a sweep over checkpoints, guidance scales and intervals."""

    other_flags: ClassVar = REPASampleFlags

    checkpoint: tuple[str, ...] = _file(
        REQUIRED,
        "<run>/checkpoints/<step>, a run (its newest), or a file of SiT's, REPA's, SRA's; several: a set each",
        aliases=("--ckpt",),
    )
    output_dir: str | None = _file(
        None, "directory of the result, of several their parent; by default <run>/samples/ and a name of the settings"
    )
    sample_dir: str | None = _file(None, "directory in which the result has one of its own, named by the settings")
    checkpoint_format: str | None = _file(
        None, "whose file the checkpoint is, where it does not tell: sit, repa or sra", metavar="PROJECT"
    )
    ema: str | None = _file(None, "which EMA of a run, by its decay, as 0.999 or power-0.05; the first unless set")
    vae: str | None = _file(
        None, "hub name (ema, mse: sd-vae-ft-...), directory or file of its VAE, if not where it says"
    )
    npz: bool = _file(True, "write samples.npz", record=Field(True))
    png: bool = _file(False, "also write each image as images/000000.png")

    evaluate: str | None = _evaluation(
        None, "measure the samples against this reference as they are drawn: what evaluations.evaluate --ref takes"
    )
    features: str = _evaluation("inception", "network of --evaluate: inception, dinov2, vae or random")
    inception_weights: str | None = _evaluation(
        None, "weights-inception-2015-12-05-6726825d.pth; by default torch's cache, or a download"
    )

    num_samples: int = _set(50_000, "images in all", aliases=("--num-fid-samples",))
    labels: str = _set("random", "random: a fair draw for each image; balanced: as many of each class", choices=LABELS)
    classes: tuple[int, ...] | None = _set(None, "draw these classes only, by number", metavar="CLASS")
    seed: int = _set(0, "seed of noise and labels", aliases=("--global-seed",))
    uint8_rule: str = _set(
        "floor",
        "colours in [-1, 1] to pixels: floor 127.5x + 128, or truncate or round 255 (x + 1) / 2",
        choices=UINT8_RULES,
    )

    sampler: str = _solver(
        "sde", "SDE by Euler-Maruyama, ODE by Euler, Heun, REPA's Heun or adaptive dopri5", choices=SAMPLERS
    )
    num_steps: int = _solver(
        250, "steps; each costs one evaluation of the network (ode-heun: two); of no effect on ode-dopri5"
    )
    last_step_size: float = _solver(
        0.04, "sde: size of the last step, without noise, to t = 0", aliases=("--last-t",), record=_LAST_STEP_SIZE
    )
    time_shift: str | None = _solver(
        None,
        "shift the times of the steps, t to A t / (1 + (A - 1) t); by default as the model was trained; or auto",
        metavar="A",
        record=Field(1.0),
    )
    atol: float = _solver(1e-6, "ode-dopri5: absolute tolerance of a step's error, shared by a block of images")
    rtol: float = _solver(1e-3, "ode-dopri5: relative tolerance")
    diffusion_form: str = _solver(
        "linear", "sde: SiT's form of the diffusion; linear is REPA's", choices=DIFFUSION_FORMS
    )
    diffusion_norm: float = _solver(1.0, "sde: factor of the diffusion; in decreasing that of its cosine")
    last_step: str = _solver(
        "mean", "sde: the last step, by the drift (mean), Tweedie's formula, the velocity (euler)", choices=LAST_STEPS
    )
    guidance_scale: tuple[float, ...] = _solver(
        (1.0,), "v_null + scale (v_class - v_null): 1 is none; several: a set each", aliases=("--cfg-scale",)
    )
    guidance_low: tuple[float, ...] = _solver((0.0,), "guide from this time on (t = 0: data); several: intervals")
    guidance_high: tuple[float, ...] = _solver((1.0,), "guide up to this time (t = 1: noise); several: intervals")
    guidance_channels: str = _solver(
        "all", "guide all channels, or the first 3 as DiT's and SiT's code", choices=CHANNELS
    )

    autoguidance: str | None = _solver(
        None, "checkpoint of a smaller or less trained model, whose velocity stands for v_null"
    )

    head_guidance: tuple[float, ...] = _solver(
        (1.0,),
        "experimental: v_mid + scale (v - v_mid) before class guidance, v_mid by the head of --align vae or ig; 1 is "
        "none; several: a set each",
    )
    head_guidance_interval: tuple[float, float] | None = _solver(
        None, "at these times; by default all that the head was trained at", metavar="T"
    )

    per_proc_batch_size: str = _speed("64", f"images per batch of a process: a multiple of {BLOCK}, or auto: {_AUTO}")
    mixed_precision: str | None = _precision("precision of the network; by default bf16 on a GPU, no on a CPU")
    vae_precision: str | None = _precision("precision of the decoder; by default bf16 on a GPU, no on a CPU")
    compile: bool | None = _speed(None, "torch.compile each block; on a GPU unless set", record=Field(False))
    tf32: bool | None = _speed(None, "TF32 for float32 products on the GPU", record=Field(False))
    parity: bool = _speed(
        False, "as published numbers are drawn: network and decoder in float32 with TF32, that is --tf32 and no bf16"
    )
    timeout: int = _speed(43_200, "seconds after which a process that waits for another gives up")
    device: str | None = _speed(None, "a GPU if there is one, unless set", choices=("cpu", "cuda", "mps"))

    model: str | None = _stated(None, "its SiT, such as SiT-XL/2")
    resolution: int | None = _stated(None, "side of its images in pixels")
    num_classes: int | None = _stated(None, "classes it can tell apart")
    path_type: str | None = _stated(None, "its path", choices=("linear", "cosine"))
    qk_norm: bool | None = _stated(None, "whether its attention normalises queries and keys")
    encoder_depth: int | None = _stated(None, "block it was aligned at, where it tells")

    def __post_init__(self):
        for name in ("num_samples", "num_steps", "timeout"):
            check(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("mixed_precision", "vae_precision"):
            check(self, name, not self.parity or getattr(self, name) in (None, "no"), "no beside --parity")
        check(self, "tf32", not self.parity or self.tf32 in (None, True), "no --no-tf32 beside --parity")
        size = self.per_proc_batch_size
        whole = size == "auto" or (size.isdigit() and int(size) >= BLOCK and int(size) % BLOCK == 0)
        check(self, "per_proc_batch_size", whole, f"a multiple of {BLOCK} (one block of images), or auto")
        check(self, "last_step_size", 0 < self.last_step_size < 1, "a size in (0, 1)")
        for name in ("atol", "rtol"):
            check(self, name, 1e-8 <= getattr(self, name) < 1, "a tolerance in [1e-8, 1): the network is in float32")
        shift = self.time_shift
        check(self, "time_shift", shift in (None, "auto") or is_positive(shift), "a number above 0, or auto")
        check(self, "diffusion_norm", 0 < self.diffusion_norm < float("inf"), "a positive number")
        lone = self.sampler == "sde" and self.last_step == "none" and self.num_steps == 1
        check(self, "num_steps", not lone, "at least 2 beside --last-step none")
        check(self, "guidance_scale", all(abs(k) < float("inf") for k in self.guidance_scale), "finite scales")
        guided = self.autoguidance is None or set(self.guidance_scale) != {1}
        check(self, "autoguidance", guided, "a --guidance-scale other than 1 beside it")
        lows, highs = len(self.guidance_low), len(self.guidance_high)
        check(self, "guidance_high", lows == highs or 1 in (lows, highs), f"as many times as --guidance-low ({lows})")
        for low, high in self.guidance_intervals():
            check(self, "guidance_low", 0 <= low <= 1, "times in [0, 1]")
            check(self, "guidance_high", low <= high <= 1, f"a time in [{low}, 1], not before --guidance-low")
        check(self, "sample_dir", not (self.sample_dir and self.output_dir), "no --output-dir beside it")
        check(self, "head_guidance", all(abs(k) < float("inf") for k in self.head_guidance), "finite scales")
        guided = self.head_guidance_interval is None or set(self.head_guidance) != {1}
        check(self, "head_guidance_interval", guided, "a --head-guidance other than 1 beside it")
        check(self, "seed", 0 <= self.seed < 2**64, "an integer in [0, 2**64)")
        enough = not self.evaluate or self.num_samples > NEIGHBOURS
        check(self, "num_samples", enough, f"more than {NEIGHBOURS} beside --evaluate")
        if not (self.npz or self.png or self.evaluate):
            raise ValueError("--no-npz: expected --png or --evaluate beside it, found neither: nothing would be kept")

    def guidance_intervals(self) -> list[tuple[float, float]]:
        """The intervals of guidance, (low, high) each."""
        count = max(len(self.guidance_low), len(self.guidance_high))
        lows, highs = (times * count if len(times) == 1 else times for times in (self.guidance_low, self.guidance_high))
        return list(zip(lows, highs, strict=True))

    def sets(self) -> list[SampleConfig]:
        """The settings of each set of a checkpoint: each scale on each interval, by each of the head; without guidance
        (scale 1) one set."""
        intervals = self.guidance_intervals()
        found = [(k, interval) for k in self.guidance_scale for interval in (intervals[:1] if k == 1 else intervals)]
        return [
            dataclasses.replace(
                self,
                guidance_scale=(scale,),
                guidance_low=(low,),
                guidance_high=(high,),
                autoguidance=None if scale == 1 else self.autoguidance,
                head_guidance=(head,),
                head_guidance_interval=None if head == 1 else self.head_guidance_interval,
            )
            for scale, (low, high) in dict.fromkeys(found)
            for head in dict.fromkeys(self.head_guidance)
        ]
