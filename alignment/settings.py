"""The flags of every alignment method, one dataclass each. No torch here, so that `--help` does not wait for it.

`training/config.py` holds them flat: each field is a flag, a YAML key and part of every record of a run.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from runtime.cli import check, flag
from runtime.files import Field

_alignment = partial(flag, group="alignment")
_alignment_vae = partial(flag, group="alignment: vae")
_alignment_repa = partial(flag, group="alignment: repa")
_alignment_sra = partial(flag, group="alignment: sra")
_alignment_layersync = partial(flag, group="alignment: layersync")
_alignment_ig = partial(flag, group="alignment: ig")
_alignment_dispersive = partial(flag, group="alignment: dispersive")

OBJECTIVES = ("smooth_l1", "l1", "l2", "cosine", "cosine_over_tokens")
_HEAD = "an MLP, or one 3 x 3 convolution over the grid of tokens"
_NORMALIZE = "bring each channel of the target to mean 0 and std 1 over the tokens of an image"
# Older records hold whether it is spatial.
_SPATIAL = Field("none", read_old=lambda value: {False: "none", True: "spatial"}.get(value, value))
_SCHEDULE = (
    "its weight over steps: constant, linear:K or cosine:K (falls to 0 at step K), off:K (0 from step K on), or sra "
    "(falls slowly after epoch 149)"
)


@dataclass(frozen=True)
class CommonSettings:
    """What all methods share."""

    align: str = _alignment(
        "vae",
        "vae: VAE-REPA; repa: an external encoder; sra: the model's own EMA; layersync: its own later block; ig: the "
        "velocity (Internal Guidance); dispersive: away from other samples; sums such as repa+vae; none: plain SiT",
    )
    align_beta: float = _alignment(0.05, "half-width of smooth L1's quadratic part, for every method")
    align_time_range: tuple[float, float] = _alignment(
        (0.0, 1.0), "align only samples with t in this range, by every method but dispersive", metavar="T"
    )


@dataclass(frozen=True)
class VAESettings:
    """VAE-REPA, Section 3.2 of the paper."""

    align_depth: tuple[int, ...] | None = _alignment_vae(
        None, "blocks that are aligned, counted from 1; several share the weight; by default S 2, B 2, L 8, XL 8"
    )
    align_weight: float = _alignment_vae(1.0, "lambda of Eq. 8")
    align_schedule: str = _alignment_vae("constant", _SCHEDULE)
    align_objective: str = _alignment_vae("smooth_l1", "objective of Eq. 7", choices=OBJECTIVES)
    align_head: str = _alignment_vae("mlp", _HEAD, choices=("mlp", "conv"))
    align_layers: int = _alignment_vae(5, "linear layers in the MLP head, 1 to 8")
    align_target: str = _alignment_vae(
        "sample", "the posterior sample that is noised, or the posterior mean", choices=("sample", "mean")
    )
    align_normalize: str = _alignment_vae(
        "none",
        f"spatial: {_NORMALIZE}; sample: prediction and target to mean 0 and std 1 over all numbers of an image each",
        choices=("none", "spatial", "sample"),
        bare="spatial",
        record=_SPATIAL,
    )


@dataclass(frozen=True)
class REPASettings:
    """REPA (Yu et al., 2024)."""

    repa_encoder: str = _alignment_repa(
        "dinov2-vit-b",
        "encoder: dinov2-vit-s, -b, -l, -g, dinov2reg-vit-b, -l, -g, dinov3-vit-s, -b, -l, mae-vit-b, -l, "
        "clip-vit-b, -l, siglip-vit-b, -l, or a vision transformer's name in timm",
    )
    repa_weights: str | None = _alignment_repa(None, "local file of its weights, not the hub; random: to measure speed")
    repa_final_norm: bool | None = _alignment_repa(
        None, "tokens behind the encoder's last norm; as REPA unless set: not for mae and clip", record=Field(True)
    )
    repa_depth: tuple[int, ...] | None = _alignment_repa(None, "aligned blocks; by default Ti 2, S 4, B 4, L 8, XL 8")
    repa_weight: float = _alignment_repa(0.5, "weight of its term")
    repa_schedule: str = _alignment_repa("constant", _SCHEDULE)
    repa_objective: str = _alignment_repa("cosine", "objective of its term", choices=OBJECTIVES)
    repa_head: str = _alignment_repa("mlp", f"{_HEAD}; conv1: a 1 x 1 one", choices=("mlp", "conv", "conv1"))
    repa_normalize: bool = _alignment_repa(False, _NORMALIZE)
    repa_normalize_share: float = _alignment_repa(
        1.0, "share of the mean that --repa-normalize takes off; iREPA's is 0.6"
    )


@dataclass(frozen=True)
class SRASettings:
    """SRA (Jiang et al., 2025), as its authors train it now (SRA@1723f85); the paper's: `--preset sra-paper`."""

    sra_depth: tuple[int, ...] | None = _alignment_sra(
        None, "aligned blocks; by default Ti 2, S 4, B 4, L 8, XL 8", aliases=("--block-out-s",)
    )
    sra_teacher_depth: int | None = _alignment_sra(
        None,
        "block of the EMA that they learn from; by default Ti 4, S 8, B 8, L 16, XL 20",
        aliases=("--block-out-t",),
    )
    sra_t_max: float = _alignment_sra(0.2, "the EMA sees a time up to this much earlier", aliases=("--t-max",))
    sra_weight: float = _alignment_sra(0.5, "weight of its term", record=Field(0.2))
    sra_schedule: str = _alignment_sra("constant", _SCHEDULE, record=Field("sra"))
    sra_objective: str = _alignment_sra(
        "cosine_over_tokens", "objective of its term", choices=OBJECTIVES, record=Field("smooth_l1")
    )


@dataclass(frozen=True)
class LayerSyncSettings:
    """LayerSync (Haghighi et al., 2025)."""

    layersync_depth: tuple[int, ...] | None = _alignment_layersync(
        None, "aligned blocks; by default Ti 2, S 3, B 3, L 7, XL 8"
    )
    layersync_teacher_depth: int | None = _alignment_layersync(
        None, "later block that they learn from; by default Ti 3, S 7, B 7, L 14, XL 16"
    )
    layersync_weight: float = _alignment_layersync(0.2, "weight of its term")
    layersync_schedule: str = _alignment_layersync("constant", _SCHEDULE)


@dataclass(frozen=True)
class IGSettings:
    """Internal Guidance (arXiv 2512.24176)."""

    ig_depth: tuple[int, ...] | None = _alignment_ig(
        None, "blocks that predict the velocity too; by default Ti 2, S 4, B 4, L 8, XL 8"
    )
    ig_weight: float = _alignment_ig(0.5, "weight of its term")
    ig_schedule: str = _alignment_ig("constant", _SCHEDULE)


@dataclass(frozen=True)
class DispersiveSettings:
    """Dispersive loss (arXiv 2506.09027)."""

    dispersive_depth: tuple[int, ...] | None = _alignment_dispersive(
        None, "dispersed blocks; by default Ti 2, S 3, B 3, L 6, XL 7"
    )
    dispersive_weight: float = _alignment_dispersive(0.5, "weight of its term")
    dispersive_tau: float = _alignment_dispersive(0.5, "temperature of the squared distances")
    dispersive_group: int = _alignment_dispersive(32, "samples that disperse each other; it divides a micro-batch")
    dispersive_schedule: str = _alignment_dispersive("constant", _SCHEDULE)


@dataclass(frozen=True)
class AlignmentSettings(
    DispersiveSettings, IGSettings, LayerSyncSettings, SRASettings, REPASettings, VAESettings, CommonSettings
):
    """All of them, flat. (Fields come in the order of the bases from last to first.)"""

    def __post_init__(self):
        for prefix in ("align", "repa", "sra", "layersync", "ig", "dispersive"):
            check(self, f"{prefix}_weight", getattr(self, f"{prefix}_weight") >= 0, "at least 0")
        check(self, "repa_normalize_share", 0 <= self.repa_normalize_share <= 1, "a value in [0, 1]")
        check(self, "dispersive_tau", self.dispersive_tau > 0, "more than 0")
        check(self, "dispersive_group", self.dispersive_group >= 2, "at least 2")
        check(self, "sra_t_max", 0 <= self.sra_t_max <= 1, "a value in [0, 1]")
