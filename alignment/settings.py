"""The flags of every alignment method, one dataclass each. No torch here, so that `--help` does not wait for it.

`training/config.py` holds them flat: each field is a flag, a YAML key and part of every record of a run.
"""

from __future__ import annotations

from dataclasses import dataclass

from runtime.cli import check, flag

OBJECTIVES = ("smooth_l1", "l1", "l2", "cosine")
_HEAD = "an MLP, or one 3 x 3 convolution over the grid of tokens"
_NORMALIZE = "bring each channel of the target to mean 0 and std 1 over the tokens of an image"
_SCHEDULE = (
    "its weight over steps: constant, linear:K or cosine:K (falls to 0 at step K), off:K (0 from step K on), or sra "
    "(falls slowly after epoch 149)"
)


@dataclass(frozen=True)
class CommonSettings:
    """What all methods share."""

    align: str = flag(
        "vae",
        "vae: VAE-REPA; repa: an external encoder; sra: the model's own EMA; sums such as repa+vae; none: plain SiT",
        group="alignment",
    )
    align_beta: float = flag(0.05, "half-width of smooth L1's quadratic part, for every method", group="alignment")
    align_time_range: tuple[float, float] = flag(
        (0.0, 1.0), "align only samples with t in this range, by every method", group="alignment", metavar="T"
    )


@dataclass(frozen=True)
class VAESettings:
    """VAE-REPA, Section 3.2 of the paper."""

    align_depth: tuple[int, ...] | None = flag(
        None,
        "blocks that are aligned, counted from 1; several share the weight; by default S 2, B 2, L 8, XL 8",
        group="alignment: vae",
        aliases=("--encoder-depth",),
    )
    align_weight: float = flag(1.0, "lambda of Eq. 8", group="alignment: vae", aliases=("--proj-coeff",))
    align_schedule: str = flag("constant", _SCHEDULE, group="alignment: vae")
    align_objective: str = flag("smooth_l1", "objective of Eq. 7", choices=OBJECTIVES, group="alignment: vae")
    align_head: str = flag("mlp", _HEAD, choices=("mlp", "conv"), group="alignment: vae")
    align_layers: int = flag(5, "linear layers in the MLP head, 1 to 8", group="alignment: vae")
    align_target: str = flag(
        "sample",
        "the posterior sample that is noised, or the posterior mean",
        choices=("sample", "mean"),
        group="alignment: vae",
    )
    align_normalize: bool = flag(False, _NORMALIZE, group="alignment: vae")


@dataclass(frozen=True)
class REPASettings:
    """REPA (Yu et al., 2024)."""

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
    repa_schedule: str = flag("constant", _SCHEDULE, group="alignment: repa")
    repa_objective: str = flag("cosine", "objective of its term", choices=OBJECTIVES, group="alignment: repa")
    repa_head: str = flag("mlp", _HEAD, choices=("mlp", "conv"), group="alignment: repa")
    repa_normalize: bool = flag(False, _NORMALIZE, group="alignment: repa")


@dataclass(frozen=True)
class SRASettings:
    """SRA (Jiang et al., 2025)."""

    sra_depth: tuple[int, ...] | None = flag(
        None,
        "blocks that are aligned; by default Ti 2, S 4, B 4, L 8, XL 8",
        group="alignment: sra",
        aliases=("--block-out-s",),
    )
    sra_teacher_depth: int | None = flag(
        None,
        "block of the EMA that they learn from; by default Ti 4, S 8, B 8, L 16, XL 20",
        group="alignment: sra",
        aliases=("--block-out-t",),
    )
    sra_t_max: float = flag(
        0.2, "the EMA sees a time up to this much earlier", group="alignment: sra", aliases=("--t-max",)
    )
    sra_weight: float = flag(0.2, "weight of its term", group="alignment: sra")
    sra_schedule: str = flag("sra", _SCHEDULE, group="alignment: sra")
    sra_objective: str = flag("smooth_l1", "objective of its term", choices=OBJECTIVES, group="alignment: sra")


@dataclass(frozen=True)
class AlignmentSettings(SRASettings, REPASettings, VAESettings, CommonSettings):
    """All of them, flat. (Fields come in the order of the bases from last to first.)"""

    def __post_init__(self):
        for name in ("align_weight", "repa_weight", "sra_weight"):
            check(self, name, getattr(self, name) >= 0, "at least 0")
        check(self, "sra_t_max", 0 <= self.sra_t_max <= 1, "a value in [0, 1]")
