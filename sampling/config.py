"""Every setting of a set of samples: flags, YAML keys and what decides the images, in one dataclass."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from runtime.cli import REQUIRED, check, flag
from runtime.files import Field

BLOCK = 16  # images that share a generator of noise; part of what determines the images
SAMPLERS = ("sde", "ode-euler", "ode-heun")
NEIGHBOURS = 3  # of precision and recall, as in the ADM suite
LARGEST_BATCH, CPU_BATCH = 256, 64  # of --per-proc-batch-size auto


@dataclass(frozen=True)
class SampleConfig:
    """Settings of one set of samples, or of a sweep over checkpoints, guidance scales and intervals."""

    checkpoint: tuple[str, ...] = flag(
        REQUIRED,
        "checkpoint <run>/checkpoints/<step>, or a run (its newest one), or a file of SiT's, REPA's or SRA's; several "
        "make a set of samples each",
        group="files",
    )
    output_dir: str | None = flag(
        None,
        "directory of the result, of several results their parent; by default <run>/samples/ and a name made of the "
        "settings",
        group="files",
    )
    vae: str | None = flag(
        None,
        "hub name, local directory or file of the VAE, if not where the checkpoint says; must be the same VAE",
        group="files",
    )
    npz: bool = flag(True, "write samples.npz", group="files", record=Field(True))
    png: bool = flag(False, "also write each image as images/000000.png", group="files")

    evaluate: str | None = flag(
        None,
        "measure the samples against this reference as they are drawn, into metrics.json: what --ref of "
        "evaluations.evaluate takes",
        group="evaluation",
    )
    features: str = flag("inception", "network of --evaluate: inception, dinov2, vae or random", group="evaluation")
    inception_weights: str | None = flag(
        None, "weights-inception-2015-12-05-6726825d.pth; by default torch's cache, or a download", group="evaluation"
    )

    num_samples: int = flag(50_000, "images in all", group="what to draw")
    labels: str = flag(
        "random",
        "random: a fair draw per image; balanced: in every K images each of the K classes once, shuffled",
        choices=("random", "balanced"),
        group="what to draw",
    )
    classes: tuple[int, ...] | None = flag(
        None, "draw these classes only, by number", group="what to draw", metavar="CLASS"
    )
    seed: int = flag(0, "seed of noise and labels", group="what to draw")

    sampler: str = flag("sde", "solver: SDE by Euler-Maruyama, ODE by Euler or Heun", choices=SAMPLERS, group="solver")
    num_steps: int = flag(250, "steps; each costs one evaluation of the network (ode-heun: two)", group="solver")
    last_step_size: float = flag(
        0.04,
        "sde: size of the last step, which has no noise; it ends at t = 0",
        group="solver",
        aliases=("--last-t",),
        record=Field(0.04, old_names=("last_t",)),
    )
    guidance_scale: tuple[float, ...] = flag(
        (1.0,),
        "v_null + scale (v_class - v_null): 1 is no guidance; several make a set of samples each, from the same noise",
        group="solver",
        metavar="SCALE",
    )
    guidance_low: tuple[float, ...] = flag(
        (0.0,),
        "guide from this time on; t = 0 is data; several: with --guidance-high, an interval each",
        group="solver",
        metavar="T",
    )
    guidance_high: tuple[float, ...] = flag(
        (1.0,), "guide up to this time; t = 1 is noise; several: an interval each", group="solver", metavar="T"
    )

    per_proc_batch_size: str = flag(
        "64",
        f"images per batch of a process, a multiple of {BLOCK}; auto: the largest up to {LARGEST_BATCH} for which a "
        f"GPU has memory (on a CPU {CPU_BATCH})",
        group="speed",
    )
    mixed_precision: str | None = flag(
        None,
        "precision of the network; bf16 on a GPU and no (float32) on a CPU unless set",
        choices=("no", "bf16"),
        group="speed",
        record=Field(),
    )
    compile: bool | None = flag(
        None, "torch.compile each block; on a GPU unless set", group="speed", record=Field(False)
    )
    vae_precision: str | None = flag(
        None,
        "precision of the VAE's decoder; bf16 on a GPU and no (float32) on a CPU unless set",
        choices=("no", "bf16"),
        group="speed",
        record=Field(),
    )
    tf32: bool = flag(False, "TF32 for float32 products on the GPU", group="speed")
    timeout: int = flag(43_200, "seconds after which a process that waits for another gives up", group="speed")
    device: str | None = flag(None, "a GPU if there is one, unless set", choices=("cpu", "cuda"), group="speed")

    def __post_init__(self):
        for name in ("num_samples", "num_steps", "timeout"):
            check(self, name, getattr(self, name) >= 1, "at least 1")
        size = self.per_proc_batch_size
        whole = size == "auto" or (size.isdigit() and int(size) >= BLOCK and int(size) % BLOCK == 0)
        check(self, "per_proc_batch_size", whole, f"a multiple of {BLOCK} (one block of images), or auto")
        check(self, "last_step_size", 0 < self.last_step_size < 1, "a size in (0, 1)")
        check(self, "guidance_scale", all(abs(k) < float("inf") for k in self.guidance_scale), "finite scales")
        lows, highs = len(self.guidance_low), len(self.guidance_high)
        check(self, "guidance_high", lows == highs or 1 in (lows, highs), f"as many times as --guidance-low ({lows})")
        for low, high in self.guidance_intervals():
            check(self, "guidance_low", 0 <= low <= 1, "times in [0, 1]")
            check(self, "guidance_high", low <= high <= 1, f"a time in [{low}, 1], not before --guidance-low")
        check(self, "seed", self.seed >= 0, "at least 0")
        if self.evaluate and self.num_samples <= NEIGHBOURS:
            raise ValueError(
                f"--evaluate: expected more than {NEIGHBOURS} samples, found --num-samples {self.num_samples}"
            )
        if not (self.npz or self.png or self.evaluate):
            raise ValueError("--no-npz: expected --png or --evaluate beside it, found neither: nothing would be kept")

    def guidance_intervals(self) -> list[tuple[float, float]]:
        """The intervals of guidance, (low, high) each."""
        count = max(len(self.guidance_low), len(self.guidance_high))
        lows, highs = (times * count if len(times) == 1 else times for times in (self.guidance_low, self.guidance_high))
        return list(zip(lows, highs, strict=True))

    def sets(self) -> list[SampleConfig]:
        """The settings of each set of a checkpoint: each scale on each interval; without guidance (scale 1) one set."""
        intervals = self.guidance_intervals()
        found = [(k, interval) for k in self.guidance_scale for interval in (intervals[:1] if k == 1 else intervals)]
        return [
            dataclasses.replace(self, guidance_scale=(scale,), guidance_low=(low,), guidance_high=(high,))
            for scale, (low, high) in dict.fromkeys(found)
        ]
