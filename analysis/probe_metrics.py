"""How well each block's tokens agree with the VAE's features, at each noise level, and what that says about depths.

Shape suffixes: T tokens, D numbers of a token, d numbers of a patch of the VAE's features, L noise levels, B blocks
looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from alignment.registry import METHODS
from analysis.probe_tokens import BLOCK, INPUT, ImageFiles, ProbedSiT, batches
from analysis.similarity import Moments, cknna, fit_probe, linear_cka, probe_r2
from dataset import LatentDataset
from models.sit import SiT
from runtime.progress import Progress
from runtime.seeding import numpy_generator

HELD_OUT = 4  # one image in so many is kept from the fit of the probe, to measure it
NEIGHBOURS = 10  # k of CKNNA, as in REPA
TOKENS_PER_INPUT = 10  # the probe loses about 1 / 10 of what it cannot explain to chance; with fewer it means little
CKNNA_TOKENS = 2048  # drawn from all images: its kernels have the square of it
CLOSE = 0.01  # R² within which blocks count as alike
METRICS = {
    "probe_r2": "linear probe of f_VAE, R² on held-out images",
    "cka": "linear CKA with f_VAE",
    "cknna": f"CKNNA with f_VAE, k = {NEIGHBOURS}",
}


def images_needed(sit: SiT) -> int:
    """Images with which the probe has `TOKENS_PER_INPUT` tokens to be fitted to for each of its D inputs."""
    fitted = -(-TOKENS_PER_INPUT * sit.config.hidden_size // sit.config.num_tokens)
    return max(HELD_OUT, -(-fitted * HELD_OUT // (HELD_OUT - 1)))


def measure(probed: ProbedSiT, source: LatentDataset | ImageFiles, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Each of `METRICS` for the input and each block (rows), and each noise level (columns): (1 + B, L) float64.

    The probe is fitted on three quarters of the images and measured on the others; CKA takes all tokens, and CKNNA
    `CKNNA_TOKENS` of them. CKNNA is of tokens, not of means over images as where encoders are compared: it is tokens
    that are aligned, and the mean of an image's latent says little but its brightness. Noise levels are taken one after
    the other: 2 D^2 numbers in float64 and D `CKNNA_TOKENS` in float32 are held for each block, however many images
    there are (SiT-XL/2: 0.9 GB; with a pass of the network 2 GB beside its weights).

    Raises:
        ValueError: features that do not vary, or tokens that are not finite.
    """
    count = len(indices)
    held_out = np.zeros(count, bool)
    held_out[numpy_generator(probed.seed, 0, "features held out").permutation(count)[: count // HELD_OUT]] = True
    order = numpy_generator(probed.seed, 0, "features tokens").permutation(count * probed.sit.config.num_tokens)
    drawn = np.sort(order[:CKNNA_TOKENS])
    passes = len(probed.levels) * -(-count // BLOCK)
    with Progress(total=passes, desc="measuring", unit="pass") as bar:
        levels = [_measure_level(probed, source, indices, t, held_out, drawn, bar) for t in probed.levels]
    return dict(zip(METRICS, np.stack(levels, axis=2), strict=True))


def _measure_level(
    probed: ProbedSiT,
    source: Any,
    indices: np.ndarray,
    t: float,
    held_out: np.ndarray,
    drawn: np.ndarray,
    bar: Progress,
) -> np.ndarray:  # -> (3, 1 + B)
    """The metrics at one noise level, the input first, then each block."""
    config, device = probed.sit.config, probed.device
    T, D, d = config.num_tokens, config.hidden_size, config.patch_dim
    widths = {INPUT: d} | dict.fromkeys(probed.depths, D)
    fitted, tested = ({depth: Moments.empty(width, d, device) for depth, width in widths.items()} for _ in range(2))
    kept: dict[int, list[torch.Tensor]] = {depth: [] for depth in widths}
    kept_features = []
    for block, rows, batch in batches(source, indices):
        features = probed.f_vae(batch["moments"])  # (N, T, d)
        tokens = probed.tokens(batch["moments"], batch["label"], t, block, "features noise")
        held = torch.from_numpy(held_out[rows]).to(device)
        chosen = drawn[(drawn >= rows.start * T) & (drawn < rows.stop * T)] - rows.start * T
        chosen = torch.from_numpy(chosen).to(device)
        kept_features.append(features.flatten(0, 1)[chosen])
        for depth, x in tokens.items():
            fitted[depth].update(x[~held].flatten(0, 1), features[~held].flatten(0, 1))
            tested[depth].update(x[held].flatten(0, 1), features[held].flatten(0, 1))
            kept[depth].append(x.flatten(0, 1)[chosen])
        bar.update()
    if not tested[INPUT].yy.trace() > 0:
        raise ValueError(
            f"expected VAE features that vary, found the same in all of the {int(held_out.sum())} images that are "
            f"held out; give other images"
        )
    found = []
    for depth in widths:
        r2 = probe_r2(tested[depth], *fit_probe(fitted[depth]))
        fitted[depth].join(tested[depth])
        neighbours = cknna(torch.cat(kept[depth]), torch.cat(kept_features), NEIGHBOURS)
        found.append((r2, linear_cka(fitted[depth]), neighbours))
    return np.array(found).T


def summarize(results: dict[str, np.ndarray], depths: Sequence[int]) -> dict[str, Any]:
    """The numbers of `measure` as JSON: by metric those of the input and of each block, means over t, and the best."""
    return {
        name: {
            "meaning": METRICS[name],
            "input": values[0].tolist(),
            "blocks": values[1:].tolist(),
            "mean": values[1:].mean(axis=1).tolist(),
            "best_by_noise_level": [depths[row] for row in values[1:].argmax(axis=0)],
            "best": depths[int(values[1:].mean(axis=1).argmax())],
        }
        for name, values in results.items()
    }


def conclude(
    summary: dict[str, Any], depths: Sequence[int], levels: Sequence[float], training: dict[str, Any] | None
) -> list[str]:
    """Which depth looks best, in sentences with numbers.

    Args:
        summary: as `summarize` gives it.
        depths, levels: its rows and columns.
        training: settings of the run, if they are known.
    """
    lines = []
    for entry in summary.values():
        order = sorted(range(len(depths)), key=lambda row: -entry["mean"][row])
        first, *others = [f"{depths[row]} ({entry['mean'][row]:.3f})" for row in order[:3]]
        by_level = ", ".join(
            f"{depth} ({entry['blocks'][depths.index(depth)][column]:.3f}) at t = {levels[column]:g}"
            for column, depth in enumerate(entry["best_by_noise_level"])
        )
        then = f", then {' and '.join(others)}" if others else ""
        given = sum(entry["input"]) / len(levels)
        lines.append(f"{entry['meaning']}: block {first} is best on average{then}; the input has {given:.3f}.")
        lines.append(f"  At each noise level: block {by_level}.")
    means, best = summary["probe_r2"]["mean"], {name: entry["best"] for name, entry in summary.items()}
    close = next(row for row, mean in enumerate(means) if mean >= max(means) - CLOSE)
    lines += [
        f"Best on average: block {best['probe_r2']} by the probe, {best['cka']} by CKA, {best['cknna']} by CKNNA; the "
        f"earliest within {CLOSE:g} of the best probe is block {depths[close]} ({means[close]:.3f}).",
        "The velocity itself makes the last blocks predict f_VAE (z is a sum of y_t and the velocity): a late best "
        "block is no reason to align there. Alignment is to bring early what comes late; the sweep over depths "
        "(analysis.sweep) decides.",
    ]
    align = (training or {}).get("align", "none")
    if align != "none":
        aligned = "; ".join(_aligned(name, training) for name in align.split("+"))
        lines.append(
            f"This run was trained with an alignment ({aligned}), which itself raises the metrics there; one with "
            f"--align none shows where they lie without."
        )
    return lines


def _aligned(name: str, training: dict[str, Any]) -> str:
    """A method of a run, and where its record says that it aligned."""
    method = METHODS.get(name)  # none for a run of other code
    depths = training.get(method.depth_setting) if method and method.depth_setting else None
    where = f" at block {', '.join(map(str, depths if isinstance(depths, Sequence) else [depths]))}" if depths else ""
    return (method.label if method else name) + where
