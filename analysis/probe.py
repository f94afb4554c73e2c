"""Look into a SiT: Figure 2 of the paper for your own run, and which block's tokens agree best with the VAE's features.

    python -m analysis.features --checkpoint exps/b2-plain --data-dir data/imagenet256
    python -m analysis.features --checkpoint SiT-XL-2-256x256.pt --data-dir data/imagenet256 --images dog.jpg cat.png

`features-pca.png`: for each image its VAE features, and the tokens of each block at each noise level, their first three
principal components as red, green and blue. `features-heat.png`: for each block and noise level, how well a linear map
of the tokens predicts the VAE features, and how alike both are by CKA and CKNNA. `features.json`: all the numbers.

The VAE features f_VAE are the scaled posterior mean, in the patches that the SiT reads. The SiT sees what it sees in
training: a sample of the posterior, noised, and the image's class. t = 0 is data, t = 1 is noise.

Shape suffixes: N images, R image side, C latent channels, H = W latent side, T tokens, D numbers of a token, p patch
side, L noise levels, B blocks looked at.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime import cli
from runtime.cli import REQUIRED, flag

# torch and what imports it is imported where it is used, so that --help does not wait for it.
if TYPE_CHECKING:
    import numpy as np
    import torch
    from diffusers import AutoencoderKL
    from torch import Tensor

    from dataset import LatentDataset
    from models.sit import SiT
    from models.vae import LatentScale

BLOCK = 16  # images that share a generator, and a pass of the network
HELD_OUT = 4  # every so manieth image is kept from the probe, to measure it
NEIGHBOURS = 10  # k of CKNNA, as in REPA
TOKENS_PER_INPUT = 10  # the probe loses about 1 / 10 of what it cannot explain to chance; with fewer it means little
CKNNA_TOKENS = 2048  # drawn from all images: its kernels have the square of it
LONGEST_SIDE = 50  # times the shorter one: the crop of a longer image would first be blown up beyond the memory
METRICS = {
    "probe_r2": "linear probe of f_VAE, R² on held-out images",
    "cka": "linear CKA with f_VAE",
    "cknna": f"CKNNA with f_VAE, k = {NEIGHBOURS}",
}
INPUT = 0  # stands for a block: the noised patches that enter the network, for comparison

CELL, GAP = 96, 4  # pixels: least side of a block's cell, and the space between two
LEFT, TOP, EDGE = 90, 84, 16  # pixels: for the blocks' names, for the captions, and around all
LINE = 20  # pixels: a line of text


@dataclass(frozen=True)
class FeaturesConfig:
    """What to look at."""

    checkpoint: str = flag(
        REQUIRED,
        "checkpoint <run>/checkpoints/<step>, or a run (its newest one), or a file of SiT's, REPA's or SRA's",
        group="files",
    )
    data_dir: str | None = flag(
        None, "latent store, whose images are measured, and shown unless --images is given", group="files"
    )
    images: tuple[str, ...] | None = flag(
        None,
        "image files or folders of them, any size, to be shown; without --data-dir also measured",
        group="files",
        metavar="PATH",
    )
    vae: str | None = flag(
        None, "hub name, local folder or file of the VAE, if not where the checkpoint says", group="files"
    )
    output_dir: str | None = flag(None, "folder of the result; by default <run>/features", group="files")

    num_images: int = flag(512, "images to measure, evenly picked; all if there are fewer", group="what to look at")
    num_shown: int | None = flag(
        None, "images in the picture, evenly picked; 4, or up to 8 of --images, unless set", group="what to look at"
    )
    noise_levels: tuple[float, ...] = flag(
        (0.1, 0.3, 0.5, 0.7, 0.9), "times from 0 (data) to 1 (noise)", group="what to look at", metavar="T"
    )
    depths: tuple[int, ...] | None = flag(
        None, "blocks, counted from 1; all unless set", group="what to look at", metavar="BLOCK"
    )
    seed: int = flag(0, "seed of the noise, and of what is held out", group="what to look at")
    device: str | None = flag(None, "a GPU if there is one, unless set", choices=("cpu", "cuda"), group="speed")

    def __post_init__(self):
        if self.data_dir is None and self.images is None:
            raise ValueError("expected images to look at, found neither --data-dir nor --images; give one, or both")
        for name, value in (("num-images", self.num_images), ("num-shown", self.num_shown)):
            if value is not None and value < 1:
                raise ValueError(f"--{name}: expected at least 1, found {value}")
        levels = self.noise_levels
        if not levels or not all(0 <= t <= 1 for t in levels) or len(set(levels)) != len(levels):
            raise ValueError(
                f"--noise-levels: expected different times from 0 to 1, found {' '.join(map(str, levels)) or 'none'}"
            )
        if self.seed < 0:
            raise ValueError(f"--seed: expected at least 0, found {self.seed}")


@dataclass
class ImageFiles:
    """Images outside a store, cropped and encoded; indexed as a `LatentDataset` with images is."""

    names: list[str]
    moments: Tensor  # (N, 2C, H, W) float32
    crops: Tensor  # (N, R, R, 3) uint8
    null_class: int

    def __len__(self) -> int:
        return len(self.names)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        import torch

        rows = torch.as_tensor(indices)
        labels = torch.full((len(rows),), self.null_class)
        return {"moments": self.moments[rows], "label": labels, "image": self.crops[rows]}


def find_images(paths: Sequence[str]) -> list[Path]:
    """The files that `--images` names, those of a folder sorted.

    Raises:
        ValueError: a path where there is nothing, or a folder without images.
    """
    from runtime.images import EXTENSIONS

    files = []
    for path in map(Path, paths):
        found = [path]
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in EXTENSIONS and file.is_file())
            found = [file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts)]
        if not found or not path.exists():
            raise ValueError(
                f"--images: expected image files ({' '.join(sorted(EXTENSIONS))}) or folders of them, "
                f"found {'no image in' if path.is_dir() else 'nothing at'} {path}"
            )
        files += found
    return files


def read_crop(path: Path, size: int) -> np.ndarray:  # -> (R, R, 3) uint8
    """The centre of an image file, cropped and resized as the images of a store are.

    Raises:
        ValueError: no image, or one much longer than wide.
    """
    from runtime.images import center_crop, decode_image

    try:
        image = decode_image(path.read_bytes())
    except OSError as error:
        raise ValueError(
            f"--images: expected an image, found {path}, which cannot be read ({error}); leave it out"
        ) from error
    if max(image.size) > LONGEST_SIDE * min(image.size):
        raise ValueError(
            f"--images: expected an image at most {LONGEST_SIDE} times as long as it is wide, found {path} of "
            f"{image.width} x {image.height} pixels; cut it, or leave it out"
        )
    return center_crop(image, size)


def encode_images(files: list[Path], size: int, vae: AutoencoderKL, null_class: int) -> ImageFiles:
    """Crop and encode image files, without a class."""
    import numpy as np
    import torch

    from models.vae import encode_moments

    crops = torch.from_numpy(np.stack([read_crop(file, size) for file in files]))
    moments = torch.cat([encode_moments(vae, batch.to(vae.device)).cpu() for batch in crops.split(BLOCK)])
    return ImageFiles([file.name for file in files], moments, crops, null_class)


def pick_evenly(total: int, count: int) -> np.ndarray:  # -> (min(count, total),) int64
    """Different indices below `total` at about equal distances, the first and last included."""
    import numpy as np

    return np.linspace(0, total - 1, min(count, total)).round().astype(np.int64)


@dataclass
class Probed:
    """A network and how it is looked at.

    Args:
        sit: on `device`.
        scale: of the latents it was trained on.
        path_type: its path between data and noise.
        depths: blocks, counted from 1.
        levels: noise levels.
        seed: of the noise.
        with_classes: give the network the class of an image; else all are without one.
    """

    sit: SiT
    scale: LatentScale
    path_type: str
    depths: tuple[int, ...]
    levels: tuple[float, ...]
    seed: int
    device: torch.device
    with_classes: bool = True

    def f_vae(self, moments: Tensor) -> Tensor:  # (N, 2C, H, W) -> (N, T, p*p*C)
        """The VAE's features of images: the scaled posterior mean, in patches."""
        from models.sit import patchify

        mean = moments.to(self.device).chunk(2, dim=1)[0]
        return patchify(self.scale.scale_latent(mean), self.sit.config.patch_size)

    def tokens(self, moments: Tensor, y: Tensor, t: float, block: int, purpose: str) -> dict[int, Tensor]:
        """The tokens (N, T, D) that leave each block, by depth, and the patches of y_t (N, T, p*p*C) as depth `INPUT`.

        Args:
            moments: (N, 2C, H, W) of at most `BLOCK` images.
            y: (N,) int64 classes.
            t: noise level.
            block: number of this block of images. Image i of it is sampled and noised by the same numbers at every t,
                on every device and in any company.
            purpose: of the draws.

        Raises:
            ValueError: a token is not finite.
        """
        import torch

        from diffusion.interpolant import Interpolant
        from models.sit import patchify
        from runtime.seeding import block_generator

        mean, std = moments.to(self.device).chunk(2, dim=1)
        shape = (BLOCK, 2, *mean.shape[1:])
        draws = torch.randn(shape, generator=block_generator(self.seed, block, purpose))[: len(mean)].to(self.device)
        z = self.scale.scale_latent(mean + std * draws[:, 0])
        times = torch.full((len(z),), t, device=self.device)
        y_t = Interpolant(self.path_type).interpolate(z, draws[:, 1], times)
        if not self.with_classes:
            y = torch.full_like(y, self.sit.config.num_classes)
        with torch.no_grad():
            _, kept = self.sit(y_t, times, y.to(self.device), return_blocks=self.depths)
        tokens = {INPUT: patchify(y_t, self.sit.config.patch_size)} | dict(zip(self.depths, kept, strict=True))
        for depth, x in tokens.items():
            if not x.isfinite().all():
                what = "noised latents" if depth == INPUT else f"tokens of block {depth}"
                raise ValueError(f"expected finite numbers, found others in the {what} at t = {t:g}; is the run sound?")
        return tokens


def batches(source: LatentDataset | ImageFiles, indices: np.ndarray) -> Iterator[tuple[int, slice, dict[str, Tensor]]]:
    """The images `indices` of a source in blocks: the block's number, its rows among `indices`, what is stored."""
    for block, begin in enumerate(range(0, len(indices), BLOCK)):
        rows = slice(begin, min(begin + BLOCK, len(indices)))
        yield block, rows, source.__getitems__(indices[rows])


def measure(probed: Probed, source: LatentDataset | ImageFiles, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Each of `METRICS` for the input and each block (rows), and each noise level (columns): (1 + B, L) float64.

    The probe is fitted on three quarters of the images and measured on the others; CKA takes all tokens, and CKNNA
    `CKNNA_TOKENS` of them. CKNNA is of tokens, not of means over images as where encoders are compared: it is tokens
    that are aligned, and the mean of an image's latent says little but its brightness. Noise levels are gone through
    one by one: 2 D^2 numbers in float64 and D `CKNNA_TOKENS` in float32 are held for each block, however many images
    there are (SiT-XL/2: 0.9 GB; with a pass of the network 2 GB beside its weights).

    Raises:
        ValueError: features that do not vary, or tokens that are not finite.
    """
    import numpy as np
    from tqdm import tqdm

    from runtime.seeding import numpy_generator

    T = probed.sit.config.num_tokens
    held_out = np.zeros(len(indices), bool)
    order = numpy_generator(probed.seed, 0, "features held out").permutation(len(indices))
    held_out[order[: len(indices) // HELD_OUT]] = True
    drawn = numpy_generator(probed.seed, 0, "features tokens").permutation(len(indices) * T)[:CKNNA_TOKENS]
    drawn.sort()

    results = {name: np.zeros((1 + len(probed.depths), len(probed.levels))) for name in METRICS}
    passes = len(probed.levels) * -(-len(indices) // BLOCK)
    with tqdm(total=passes, desc="measuring", unit="pass", dynamic_ncols=True) as progress:
        for column, t in enumerate(probed.levels):
            for name, values in _measure_level(probed, source, indices, t, held_out, drawn, progress).items():
                results[name][:, column] = values
    return results


def images_needed(sit: SiT) -> int:
    """Images with which the probe has `TOKENS_PER_INPUT` tokens to be fitted to for each of its D inputs."""
    fitted = -(-TOKENS_PER_INPUT * sit.config.hidden_size // sit.config.num_tokens)
    return max(HELD_OUT, -(-fitted * HELD_OUT // (HELD_OUT - 1)))


def _measure_level(
    probed: Probed, source: Any, indices: np.ndarray, t: float, held_out: np.ndarray, drawn: np.ndarray, progress: Any
) -> dict[str, list[float]]:
    """The metrics at one noise level, the input first, then each block."""
    import torch

    from analysis.similarity import Moments, cknna, fit_probe, linear_cka, probe_r2

    T = probed.sit.config.num_tokens
    fitted: dict[int, Moments] = {}
    tested: dict[int, Moments] = {}
    kept: dict[int, list[Tensor]] = {depth: [] for depth in (INPUT, *probed.depths)}
    kept_features = []
    for block, rows, batch in batches(source, indices):
        features = probed.f_vae(batch["moments"])  # (N, T, p*p*C)
        tokens = probed.tokens(batch["moments"], batch["label"], t, block, "features noise")
        held = torch.from_numpy(held_out[rows]).to(probed.device)
        chosen = drawn[(drawn >= rows.start * T) & (drawn < rows.stop * T)] - rows.start * T
        chosen = torch.from_numpy(chosen).to(probed.device)
        kept_features.append(features.flatten(0, 1)[chosen])
        for depth, x in tokens.items():
            for moments, mask in ((fitted, ~held), (tested, held)):
                if depth not in moments:
                    moments[depth] = Moments.empty(x.shape[2], features.shape[2], probed.device)
                moments[depth].update(x[mask].flatten(0, 1), features[mask].flatten(0, 1))
            kept[depth].append(x.flatten(0, 1)[chosen])
        progress.update()
    if not tested[INPUT].yy.trace() > 0:
        raise ValueError(
            f"expected VAE features that vary, found the same in all of the {int(held_out.sum())} images that are "
            f"held out; give other images"
        )
    results: dict[str, list[float]] = {name: [] for name in METRICS}
    for depth in kept:
        results["probe_r2"].append(probe_r2(tested[depth], *fit_probe(fitted[depth])))
        fitted[depth].join(tested[depth])
        results["cka"].append(linear_cka(fitted[depth]))
        results["cknna"].append(cknna(torch.cat(kept[depth]), torch.cat(kept_features), NEIGHBOURS))
    return results


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
    import numpy as np

    values = scores.cpu().numpy()
    low, high = np.percentile(values, [2, 98], axis=0)
    span = high - low
    share = np.where(span > 0, (values - low) / np.where(span > 0, span, 1), 0.5).clip(0, 1)
    side = math.isqrt(len(values))
    return (255 * share).round().astype(np.uint8).reshape(side, side, 3)


def make_panels(
    probed: Probed, source: LatentDataset | ImageFiles, indices: np.ndarray, pictures: list[np.ndarray]
) -> list[Panel]:
    """Principal components for each of the images, fitted to the tokens of that image, block and noise level alone.

    The sign of a component, which is free, is chosen to agree with that of the VAE's features.

    Args:
        probed: the network.
        source: has the images.
        indices: (N,) int64.
        pictures: the images to show beside, (R, R, 3) uint8 each.
    """
    import numpy as np

    from analysis.similarity import principal_components

    panels: list[Panel] = []
    for block, rows, batch in batches(source, indices):
        of_vae = [principal_components(features) for features in probed.f_vae(batch["moments"])]
        maps: list[list[list[np.ndarray]]] = [[[] for _ in probed.depths] for _ in of_vae]
        shares: list[list[list[float]]] = [[[] for _ in probed.depths] for _ in of_vae]
        for t in probed.levels:
            tokens = probed.tokens(batch["moments"], batch["label"], t, block, "features shown noise")
            for row, depth in enumerate(probed.depths):
                for image, x in enumerate(tokens[depth]):
                    scores, share = principal_components(x, like=of_vae[image][0])
                    maps[image][row].append(colours(scores))
                    shares[image][row].append(share)
        for image, (scores, share) in enumerate(of_vae):
            place = rows.start + image
            title = _title(source, int(indices[place]))
            explained = {"name": title, "f_vae": share, "blocks": shares[image]}
            panels.append(Panel(title, pictures[place], colours(scores), np.array(maps[image]), explained))
    return panels


def _title(source: LatentDataset | ImageFiles, index: int) -> str:
    if isinstance(source, ImageFiles):
        return source.names[index]
    return f"image {index}, class {source.class_names[int(source.labels[index])]}"


def cell_side(side: int) -> int:
    """Pixels of a map of `side` tokens in the picture: a whole number for each token, at least `CELL` in all."""
    return side * -(-CELL // side)


def pca_layout(num_panels: int, num_blocks: int, num_levels: int, side: int) -> dict[str, Any]:
    """Where things stand in `features-pca.png`, in pixels from the top left.

    Returns:
        `size` (width, height); `image` and `f_vae`, for each panel the corner (x, y) of a square of side `large`; and
        `cells`, for each panel, block and level the corner of a square of side `cell`.
    """
    cell = cell_side(side)
    large = 2 * cell
    width = max(num_levels * (cell + GAP) - GAP, 2 * large + GAP)
    grid_top = TOP + large + 2 * LINE + EDGE
    lefts = [LEFT + panel * (width + 2 * EDGE) for panel in range(num_panels)]
    height = grid_top + num_blocks * (cell + GAP) - GAP + EDGE
    return {
        "cell": cell,
        "large": large,
        "width": width,
        "size": (lefts[-1] + width + EDGE, height),
        "image": [(left, TOP) for left in lefts],
        "f_vae": [(left + large + GAP, TOP) for left in lefts],
        "cells": [
            [
                [(left + level * (cell + GAP), grid_top + block * (cell + GAP)) for level in range(num_levels)]
                for block in range(num_blocks)
            ]
            for left in lefts
        ],
    }


def shortened(text: str, length: int) -> str:
    """Text of at most so many letters: its middle gives way, since names and paths differ at their ends."""
    if len(text) <= length:
        return text
    end = (length - 3) * 2 // 3
    return f"{text[: length - 3 - end]}...{text[len(text) - end :]}"


def draw_pca(path: Path, panels: list[Panel], depths: Sequence[int], levels: Sequence[float], heading: str) -> None:
    """Write Figure 2: images side by side, each with its VAE features, and below them blocks (rows) by noise levels."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    layout = pca_layout(len(panels), len(depths), len(levels), len(panels[0].f_vae))
    width, height = layout["size"]
    canvas = np.full((height, width, 3), 255, np.uint8)

    def put(image: np.ndarray, corner: tuple[int, int], side: int) -> None:
        larger = Image.Resampling.NEAREST if len(image) <= side else Image.Resampling.BOX
        x, y = corner
        canvas[y : y + side, x : x + side] = np.asarray(Image.fromarray(image).resize((side, side), larger))

    dpi = 100
    figure = Figure(figsize=(width / dpi, height / dpi), dpi=dpi)
    FigureCanvasAgg(figure)

    def write(x: float, y: float, text: str, pixels: float = 13, **style: Any) -> None:
        style = {"ha": "left", "va": "center", "fontsize": pixels * 72 / dpi} | style
        figure.text(x / width, 1 - y / height, text, parse_math=False, **style)

    half = layout["cell"] / 2
    write(EDGE, EDGE + LINE / 2, shortened(heading, (width - 2 * EDGE) // 9), pixels=14)
    for index, panel in enumerate(panels):
        x, y = layout["image"][index]
        put(panel.image, (x, y), layout["large"])
        put(panel.f_vae, layout["f_vae"][index], layout["large"])
        write(x, y - 1.6 * LINE, shortened(panel.title, layout["width"] // 10), pixels=14, weight="bold")
        write(x + layout["large"] / 2, y - LINE / 2, "image", ha="center")
        write(layout["f_vae"][index][0] + layout["large"] / 2, y - LINE / 2, "VAE features", ha="center")
        for row in range(len(depths)):
            for column in range(len(levels)):
                put(panel.blocks[row, column], layout["cells"][index][row][column], layout["cell"])
        for column, t in enumerate(levels):
            left, top = layout["cells"][index][0][column]
            write(left + half, top - LINE / 2, f"t = {t:g}", ha="center")
    for row, depth in enumerate(depths):
        left, top = layout["cells"][0][row][0]
        write(left - 8, top + half, f"block {depth}", ha="right")
    figure.figimage(canvas, 0, 0, zorder=-1)
    figure.savefig(path)


def draw_heat(
    path: Path, results: dict[str, np.ndarray], depths: Sequence[int], levels: Sequence[float], heading: str
) -> None:
    """Write the heat maps: for each metric the input and the blocks (rows) by noise levels and their mean (columns).

    The best block of each column is framed.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    rows, columns = 1 + len(depths), len(levels) + 1
    each = max(4.2, 0.62 * columns + 1.4)  # inches
    figure = Figure(figsize=(len(METRICS) * each + 0.3, 0.34 * rows + 1.9), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(shortened(heading, 140), fontsize=10, parse_math=False)
    for axes, (name, title) in zip(figure.subplots(1, len(METRICS)), METRICS.items(), strict=True):
        values = np.column_stack([results[name], results[name].mean(axis=1)])  # (1 + B, L + 1)
        low, high = max(0.0, values.min()), max(values.max(), 1e-6)
        image = axes.imshow(values, cmap="viridis", vmin=min(low, high), vmax=high, aspect="auto")
        bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02, aspect=max(20, 2 * rows))
        bar.ax.tick_params(labelsize=7)
        for (row, column), value in np.ndenumerate(values):
            dark = image.norm(value) < 0.6
            best = row > 0 and row == 1 + values[1:, column].argmax()
            axes.text(
                column, row, f"{value:.3f}", ha="center", va="center", fontsize=7,
                color="white" if dark else "black", weight="bold" if best else "normal",
            )  # fmt: skip
            if best:
                frame = Rectangle(
                    (column - 0.47, row - 0.46), 0.94, 0.92, fill=False, edgecolor="red", linewidth=2, zorder=3
                )
                axes.add_patch(frame)
        axes.axhline(0.5, color="white", linewidth=3)
        axes.axvline(columns - 1.5, color="white", linewidth=3)
        axes.set_title(title, fontsize=9)
        axes.set_xticks(range(columns), [*(f"{t:g}" for t in levels), "mean"], fontsize=8)
        axes.set_yticks(range(rows), ["input", *map(str, depths)], fontsize=8)
        axes.set_xlabel("noise level t", fontsize=8)
        axes.set_ylabel("block", fontsize=8)
        axes.tick_params(length=0)
    figure.savefig(path)


def summarize(results: dict[str, np.ndarray], depths: Sequence[int]) -> dict[str, Any]:
    """The numbers of `measure` as JSON: by metric those of the input and of each block, means over t, and the best."""
    summary = {}
    for name, values in results.items():
        blocks, mean = values[1:], values[1:].mean(axis=1)
        summary[name] = {
            "meaning": METRICS[name],
            "input": values[0].tolist(),
            "blocks": blocks.tolist(),
            "mean": mean.tolist(),
            "best_by_noise_level": [depths[row] for row in blocks.argmax(axis=0)],
            "best": depths[int(mean.argmax())],
        }
    return summary


CLOSE = 0.01  # R² within which blocks count as alike


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
        means = [f"{depths[row]} ({entry['mean'][row]:.3f})" for row in order[:3]]
        by_level = ", ".join(
            f"{depth} ({entry['blocks'][depths.index(depth)][column]:.3f}) at t = {levels[column]:g}"
            for column, depth in enumerate(entry["best_by_noise_level"])
        )
        then = f", then {' and '.join(means[1:])}" if means[1:] else ""
        given = sum(entry["input"]) / len(levels)
        lines.append(f"{entry['meaning']}: block {means[0]} is best on average{then}; the input has {given:.3f}.")
        lines.append(f"  At each noise level: block {by_level}.")
    probe = summary["probe_r2"]
    means = dict(zip(depths, probe["mean"], strict=True))
    close = next(depth for depth in depths if means[depth] >= means[probe["best"]] - CLOSE)
    lines.append(
        f"Best on average: block {probe['best']} by the probe, {summary['cka']['best']} by CKA, "
        f"{summary['cknna']['best']} by CKNNA; the earliest within {CLOSE:g} of the best probe is block {close} "
        f"({means[close]:.3f})."
    )
    lines.append(
        "The velocity itself makes the last blocks predict f_VAE (z is a sum of y_t and the velocity): a late best "
        "block is no reason to align there. Alignment is to bring early what comes late; the sweep over depths "
        "(analysis.sweep) decides."
    )
    names = str((training or {}).get("align", "none")).split("+")
    if names != ["none"]:
        aligned = "; ".join(f"{name} at block {_listed(training.get(_DEPTH_FLAG[name]))}" for name in names)
        lines.append(
            f"This run was trained with an alignment ({aligned}), which itself raises the figures there; one with "
            f"--align none shows where they lie without."
        )
    return lines


_DEPTH_FLAG = {"vae": "align_depth", "repa": "repa_depth", "sra": "sra_depth"}


def _listed(depths: Sequence[int] | int | None) -> str:
    return ", ".join(map(str, depths)) if isinstance(depths, Sequence) else str(depths)


def choose_device(name: str | None) -> torch.device:
    """The device asked for, or a GPU if there is one.

    Raises:
        ValueError: a GPU is asked for, and there is none.
    """
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: expected a GPU, found none that PyTorch can use; give --device cpu")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def choose_depths(depths: Sequence[int] | None, total: int) -> tuple[int, ...]:
    """The blocks to look at, in order.

    Raises:
        ValueError: one that the network does not have, or one named twice.
    """
    if depths is None:
        return tuple(range(1, total + 1))
    if not all(1 <= depth <= total for depth in depths) or len(set(depths)) != len(depths):
        raise ValueError(f"--depths: expected different blocks from 1 to {total}, found {' '.join(map(str, depths))}")
    return tuple(sorted(depths))


def open_store(config: FeaturesConfig, sit: SiT, info: dict[str, Any]) -> LatentDataset:
    """The store, if its latents are those that the network was trained on; with images if it has them.

    Raises:
        ValueError: it cannot be read, or has latents of another shape, scale or VAE.
    """
    from dataset import LatentDataset, read_meta
    from models.vae import UNKNOWN_VAE

    store = LatentDataset(config.data_dir, images=bool(read_meta(config.data_dir).get("images")))
    expected = (sit.config.in_channels, sit.config.latent_size, sit.config.latent_size)
    wrong = []
    if store.latent_shape != expected:
        wrong.append(f"shape {store.latent_shape} (the checkpoint's: {expected})")
    if info["scale"] not in (None, store.scale):
        wrong.append(f"scale {store.scale.to_dict()} (the checkpoint's: {info['scale'].to_dict()})")
    digests = {store.meta["vae_digest"], info["vae_digest"]} - {UNKNOWN_VAE}
    if len(digests) > 1:
        wrong.append(f"another VAE, {store.meta['vae']} (the checkpoint's: {info['vae']})")
    if wrong:
        raise ValueError(
            f"--data-dir: expected latents as the checkpoint's, found {', '.join(wrong)} in {config.data_dir}; give a "
            f"store that fits it"
        )
    return store


def open_vae(config: FeaturesConfig, sit: SiT, info: dict[str, Any], device: torch.device) -> AutoencoderKL:
    """The VAE of the checkpoint.

    Raises:
        ValueError: it cannot be loaded, or is another one.
    """
    from models.vae import UNKNOWN_VAE, load_vae, vae_digest, vae_factor

    name = config.vae or info["vae"]
    vae = load_vae(name, device)
    if info["vae_digest"] != UNKNOWN_VAE and vae_digest(vae) != info["vae_digest"]:
        raise ValueError(f"--vae: expected the VAE of the checkpoint ({info['vae']}), found another in {name}")
    found = (vae.config.latent_channels, vae_factor(vae) * sit.config.latent_size)
    if found != (sit.config.in_channels, info["resolution"]):
        raise ValueError(
            f"--vae: expected one of {sit.config.in_channels} channels and images of side {info['resolution']}, found "
            f"{found[0]} and {found[1]} with {name}"
        )
    return vae


def main(argv: list[str] | None = None) -> None:
    config = cli.parse(FeaturesConfig, argv, __doc__.splitlines()[0])
    look(config)


def look(config: FeaturesConfig) -> dict[str, Any]:
    """Measure, draw and write; gives what `features.json` holds.

    Raises:
        ValueError: what is asked for is not there, or does not fit together.
    """
    from models.load import load_sit
    from models.vae import UNKNOWN_VAE

    device = choose_device(config.device)
    sit, info = load_sit(config.checkpoint)
    depths, levels = choose_depths(config.depths, sit.config.depth), tuple(sorted(config.noise_levels))
    store = open_store(config, sit, info) if config.data_dir else None
    if store and info["vae_digest"] == UNKNOWN_VAE:
        info = info | {name: store.meta[name] for name in ("vae", "vae_digest", "resolution")}
    scale = info["scale"] or (store.scale if store else None)
    if scale is None:
        raise ValueError(
            f"expected to know the scale of the latents, found none in {info['source']}; give a --data-dir"
        )
    output = make_folder(config, info)
    print(f"{info['source']} ({info['read_as']})", flush=True)
    with_classes = store is None or store.num_classes == sit.config.num_classes
    if not with_classes:
        print(
            f"{config.data_dir} has {store.num_classes} classes, the network {sit.config.num_classes}: its images are "
            f"looked at without a class",
            flush=True,
        )
    probed = Probed(sit.to(device), scale, info["path_type"], depths, levels, config.seed, device, with_classes)

    open_decoder = functools.cache(lambda: open_vae(config, sit, info, device))
    num_shown = config.num_shown or (8 if config.images else 4)
    loose, total = None, len(store) if store else 0
    if config.images:
        files = find_images(config.images)
        kept = pick_evenly(len(files), num_shown if store else max(num_shown, config.num_images))
        chosen, total = [files[index] for index in kept], len(files)
        loose = encode_images(chosen, info["resolution"], open_decoder(), sit.config.num_classes)
    measured = pick_evenly(len(store or loose), config.num_images)
    needed = images_needed(sit)
    if store and len(measured) < needed:  # said before the work; loose images can be shown, if not measured
        raise ValueError(
            f"expected at least {needed} images to fit a probe to tokens of {sit.config.hidden_size} numbers, found "
            f"{len(measured)}; raise --num-images, or give a larger --data-dir"
        )

    shown = pick_evenly(len(loose or store), num_shown)
    pictures = originals(loose or store, shown, open_decoder, scale, device)
    panels = make_panels(probed, loose or store, shown, pictures)
    draw_pca(output / "features-pca.png", panels, depths, levels, f"{info['source']}: principal components")
    print(f"{output / 'features-pca.png'}: {len(panels)} of {total:,} images", flush=True)
    summary = None
    (output / "features-heat.png").unlink(missing_ok=True)  # an earlier one would seem to belong to this picture
    if len(measured) < needed:
        lines = [f"Nothing was measured: that takes {needed} images, --images has {len(measured)}; give a --data-dir."]
    else:
        results = measure(probed, store or loose, measured)
        draw_heat(output / "features-heat.png", results, depths, levels, f"{info['source']}: {len(measured)} images")
        print(f"{output / 'features-heat.png'}: {len(measured)} images", flush=True)
        summary = summarize(results, depths)
        lines = conclude(summary, depths, levels, info.get("config"))
    record = describe(config, info, probed, bool(store), len(measured)) | {
        "metrics": summary,
        "pictured": [panel.explained for panel in panels],
        "conclusion": lines,
    }
    (output / "features.json").write_text(json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    print("\n".join(lines), flush=True)
    return record


def describe(
    config: FeaturesConfig, info: dict[str, Any], probed: Probed, has_store: bool, num_measured: int
) -> dict[str, Any]:
    """What `features.json` says of how its numbers were made."""
    from analysis.similarity import RIDGE
    from runtime import provenance

    return {
        "settings": dataclasses.asdict(config),
        "checkpoint": {name: info[name] for name in ("source", "read_as", "step", "digest", "path_type")},
        "depths": list(probed.depths),
        "noise_levels": list(probed.levels),
        "images": num_measured,
        "images_held_out": num_measured // HELD_OUT,
        "classes": "of the store" if has_store and probed.with_classes else "none",
        "latent_scale": probed.scale.to_dict(),
        "constants": {"ridge": RIDGE, "cknna_neighbours": NEIGHBOURS, "cknna_tokens": CKNNA_TOKENS},
        "device_type": probed.device.type,
        **provenance.stamp(),
    }


def make_folder(config: FeaturesConfig, info: dict[str, Any]) -> Path:
    """The folder of the result: `<run>/features` unless another is given; beside a file of another project's.

    Raises:
        ValueError: it cannot be written to, which is said before the work.
    """
    source = Path(info["source"]).absolute()
    run_dir = source.parent if source.is_file() else source.parent.parent
    folder = Path(config.output_dir) if config.output_dir else run_dir / "features"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError("not writable")
    except OSError as error:
        raise ValueError(
            f"--output-dir: expected a folder to write to, found {folder} ({error.strerror or error}); give another"
        ) from error
    return folder


def originals(
    source: LatentDataset | ImageFiles,
    indices: np.ndarray,
    decoder: Callable[[], AutoencoderKL],
    scale: LatentScale,
    device: torch.device,
) -> list[np.ndarray]:  # -> N of (R, R, 3) uint8
    """The images as they were cropped; where a store did not keep them, what the VAE makes of their posterior mean."""
    from models.vae import decode_images

    pictures = []
    for _, _, batch in batches(source, indices):
        images = batch.get("image")
        if images is None:
            mean = batch["moments"].to(device).chunk(2, dim=1)[0]
            images = decode_images(decoder(), scale.scale_latent(mean), scale).cpu()
        pictures += list(images.numpy())
    return pictures


if __name__ == "__main__":
    cli.run(main)
