"""The probe's two pictures: principal components of the tokens (Figure 2 of the paper), and heat maps of the metrics.

Shape suffixes: N images, R image side, T tokens, L noise levels, B blocks looked at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from analysis.probe_metrics import METRICS
from analysis.probe_tokens import ImageFiles, ProbedSiT, batches
from analysis.similarity import principal_components
from dataset import LatentDataset
from reporting.values import shortened


@dataclass
class Panel:
    """One image of the picture."""

    title: str
    image: np.ndarray  # (R, R, 3) uint8
    f_vae: np.ndarray  # (side, side, 3) uint8
    blocks: np.ndarray  # (B, L, side, side, 3) uint8
    explained: dict[str, Any]  # share of the variance that the three components have


def colours(scores: Tensor) -> np.ndarray:  # (T, 3) -> (side, side, 3) uint8
    """Scores as red, green and blue: each component from its 2nd to its 98th percentile, so that single tokens with
    huge numbers, as transformers have them, do not turn all others into one colour. A constant one is grey."""
    values = scores.cpu().numpy()
    low, high = np.percentile(values, [2, 98], axis=0)
    span = high - low
    share = np.where(span > 0, (values - low) / np.where(span > 0, span, 1), 0.5).clip(0, 1)
    side = math.isqrt(len(values))
    return (255 * share).round().astype(np.uint8).reshape(side, side, 3)


def make_panels(
    probed: ProbedSiT, source: LatentDataset | ImageFiles, indices: np.ndarray, pictures: list[np.ndarray]
) -> list[Panel]:
    """Principal components for each of the images, fitted to the tokens of that image, block and noise level alone.

    The sign of a component, which is free, is chosen to agree with that of the VAE's features.

    Args:
        probed: the network.
        source: has the images.
        indices: (N,) int64.
        pictures: the images to show beside, (R, R, 3) uint8 each.
    """
    panels: list[Panel] = []
    side = math.isqrt(probed.sit.config.num_tokens)
    for block, rows, batch in batches(source, indices):
        of_vae = [principal_components(features) for features in probed.f_vae(batch["moments"])]
        maps = np.zeros((len(of_vae), len(probed.depths), len(probed.levels), side, side, 3), np.uint8)
        shares = np.zeros(maps.shape[:3])
        for column, t in enumerate(probed.levels):
            tokens = probed.tokens(batch["moments"], batch["label"], t, block, "features shown noise")
            for row, depth in enumerate(probed.depths):
                for image, x in enumerate(tokens[depth]):
                    scores, shares[image, row, column] = principal_components(x, like=of_vae[image][0])
                    maps[image, row, column] = colours(scores)
        for image, (scores, share) in enumerate(of_vae):
            place = rows.start + image
            title = _title(source, int(indices[place]))
            explained = {"name": title, "f_vae": share, "blocks": shares[image].tolist()}
            panels.append(Panel(title, pictures[place], colours(scores), maps[image], explained))
    return panels


def _title(source: LatentDataset | ImageFiles, index: int) -> str:
    if isinstance(source, ImageFiles):
        return source.names[index]
    return f"image {index}, class {source.class_names[int(source.labels[index])]}"


def pca_figure(panels: list[Panel], depths: Sequence[int], levels: Sequence[float], heading: str) -> Figure:
    """Figure 2: images side by side, each with its VAE features, and below them blocks (rows) by noise levels."""
    B, L, side = len(depths), len(levels), len(panels[0].f_vae)
    width = max(L, 4)  # inches: one for each map, two for an image
    figure = Figure(figsize=(len(panels) * (width + 1), B + 3.3), layout="constrained")
    figure.suptitle(shortened(heading, 11 * len(panels) * width), fontsize=10, parse_math=False)
    for part, panel in zip(figure.subfigures(1, len(panels), squeeze=False)[0], panels, strict=True):
        part.suptitle(shortened(panel.title, 10 * width), fontsize=10, weight="bold", parse_math=False)
        axes = part.subplot_mosaic([["image", "VAE features"], ["maps", "maps"]], height_ratios=(2, B))
        for name, picture, anchor in (("image", panel.image, "E"), ("VAE features", panel.f_vae, "W")):
            axes[name].imshow(picture)
            axes[name].set_anchor(anchor)  # side by side above the middle of the maps
            axes[name].set_title(name, fontsize=9)
            axes[name].axis("off")
        # All maps are one picture, each a unit square of it.
        maps = panel.blocks.transpose(0, 2, 1, 3, 4).reshape(B * side, L * side, 3)
        axes["maps"].imshow(maps, extent=(0, L, B, 0), interpolation="nearest")
        axes["maps"].hlines(range(1, B), 0, L, "white", linewidth=3)
        axes["maps"].vlines(range(1, L), 0, B, "white", linewidth=3)
        axes["maps"].set_xticks(np.arange(L) + 0.5, [f"t = {t:g}" for t in levels], fontsize=9)
        axes["maps"].set_yticks(np.arange(B) + 0.5, [f"block {depth}" for depth in depths], fontsize=9)
        axes["maps"].tick_params(length=0, labeltop=True, labelbottom=False)
        axes["maps"].set_frame_on(False)
    figure.draw_without_rendering()  # the layout of squares with labels needs a second pass, that of saving
    return figure


def heat_figure(results: dict[str, np.ndarray], depths: Sequence[int], levels: Sequence[float], heading: str) -> Figure:
    """The heat maps: for each metric the input and the blocks (rows) by noise levels and their mean (columns).

    The best block of each column is framed.
    """
    rows, columns = 1 + len(depths), len(levels) + 1
    width = max(4.2, 0.62 * columns + 1.4)  # inches
    figure = Figure(figsize=(len(METRICS) * width + 0.3, 0.34 * rows + 1.9), dpi=120, layout="constrained")
    figure.suptitle(shortened(heading, 140), fontsize=10, parse_math=False)
    for axes, (name, title) in zip(figure.subplots(1, len(METRICS)), METRICS.items(), strict=True):
        values = np.column_stack([results[name], results[name].mean(axis=1)])  # (1 + B, L + 1)
        low, high = max(0.0, values.min()), max(values.max(), 1e-6)
        image = axes.imshow(values, cmap="viridis", vmin=min(low, high), vmax=high, aspect="auto")
        bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02, aspect=max(20, 2 * rows))
        bar.ax.tick_params(labelsize=7)
        for (row, column), value in np.ndenumerate(values):
            best = row > 0 and row == 1 + values[1:, column].argmax()
            style = {"color": "white" if image.norm(value) < 0.6 else "black", "weight": "bold" if best else "normal"}
            axes.text(column, row, f"{value:.3f}", ha="center", va="center", fontsize=7, **style)
            if best:
                frame = {"fill": False, "edgecolor": "red", "linewidth": 2, "zorder": 3}
                axes.add_patch(Rectangle((column - 0.47, row - 0.46), 0.94, 0.92, **frame))
        axes.axhline(0.5, color="white", linewidth=3)
        axes.axvline(columns - 1.5, color="white", linewidth=3)
        axes.set_title(title, fontsize=9)
        axes.set_xticks(range(columns), [*(f"{t:g}" for t in levels), "mean"], fontsize=8)
        axes.set_yticks(range(rows), ["input", *map(str, depths)], fontsize=8)
        axes.set_xlabel("noise level t", fontsize=8)
        axes.set_ylabel("block", fontsize=8)
        axes.tick_params(length=0)
    return figure
