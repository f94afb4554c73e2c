"""Images of several runs from the same noise and classes, drawn as in Figure 4 of the paper.

Shape suffixes: N images, R image side, C latent channels, H = W latent side.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from analysis.compare_config import CompareConfig
from diffusion.guidance import HeadGuidance
from diffusion.interpolant import Interpolant
from models.load import guide_head, has_null_class, load_head, load_sit
from models.sit import SiT
from models.vae import check_vae, load_vae
from reporting.runs import Run
from reporting.values import evenly, listed, shortened
from runtime.distributed import allow_tf32, choose_device
from sampling.config import BLOCK
from sampling.generator import block_noise, decode_latents, sample_latents

MAX_STEPS = 4  # checkpoints that are drawn unless --steps names them
MAX_CLASSES = 8
MAX_NAME = 36  # characters of a run's name
CELL = 128  # pixels that a small image is enlarged to, at least nearly
MAX_PIXELS = 16_000  # height of the picture
DPI = 100


def choose_steps(runs: list[Run], wanted: Sequence[int] | None) -> list[int]:
    """Steps to draw from, which all runs have.

    Raises:
        ValueError: there are none, or one of `wanted` is missing.
    """
    have = "; ".join(f"{run.name}: {listed(run.checkpoints)}" for run in runs)
    shared = sorted(set(runs[0].checkpoints).intersection(*(run.checkpoints for run in runs[1:])))
    missing = [f"{step} of {run.name}" for step in wanted or () for run in runs if step not in run.checkpoints]
    if missing:
        raise ValueError(f"--steps: expected checkpoints of all runs, found none for {listed(missing)} ({have})")
    if not shared:
        raise ValueError(f"expected a step that all runs have a checkpoint of, found none ({have}); give --no-images")
    return sorted(set(wanted)) if wanted else evenly(shared, MAX_STEPS)


def choose_classes(wanted: Sequence[int] | None, num_classes: int) -> list[int]:
    """Numbers of the classes to draw.

    Raises:
        ValueError: one that the models do not know.
    """
    wrong = [label for label in wanted or () if not 0 <= label < num_classes]
    if wrong:
        raise ValueError(f"--classes: expected numbers from 0 to {num_classes - 1}, found {listed(wrong)}")
    return list(wanted) if wanted else evenly(range(num_classes), MAX_CLASSES)


def choose_precision(config: CompareConfig, device: torch.device) -> str:
    return config.mixed_precision or ("bf16" if device.type == "cuda" else "no")


def draw_images(
    sit: SiT, info: dict[str, Any], vae: Any, labels: Sequence[int], config: CompareConfig, device: torch.device
) -> Tensor:  # -> (N, R, R, 3) uint8
    """An image of each of `labels`, whose noise depends on the seed and its place alone.

    It is the noise of the image in that place that sample_ddp.py draws with this seed, and so is the SDE's.

    Args:
        sit, vae: on `device`.
        info: what `load_sit` tells of `sit`.
    """
    y, count = torch.tensor(labels, device=device), len(labels)  # (N,)
    shape = (sit.config.in_channels, sit.config.latent_size, sit.config.latent_size)
    blocks = block_noise(config.seed, 0, -(-count // BLOCK) * BLOCK, shape, device)

    def noise(step: int = -1) -> Tensor:  # -> (N, C, H, W)
        return blocks(step)[:count]

    solver = config.sampler, config.num_steps, Interpolant(info["path_type"], info["prediction"])
    autocast = torch.bfloat16 if choose_precision(config, device) == "bf16" else None
    head = None
    if config.head_guidance != 1:
        head = HeadGuidance(load_head(sit, info), config.head_guidance, guide_head(info)[2])
    more = {"autocast": autocast, "time_shift": info["time_shift"], "head": head}
    z = sample_latents(sit, y, noise, *solver, config.guidance_scale, **more)
    images, finite = decode_latents(vae, z, info["scale"])
    if not finite.all():
        hint = "fix: --mixed-precision no, or a lower --guidance-scale"
        raise ValueError(f"expected finite samples, found some that are not from {info['source']}; {hint}")
    return images.cpu()


def draw_all(config: CompareConfig, runs: list[Run]) -> tuple[Figure, dict[str, Any]]:
    """The picture, and what it was made from.

    Raises:
        ValueError: runs, steps or classes that do not fit, or the VAE is not the one they were trained with.
    """
    steps, device = choose_steps(runs, config.steps), choose_device(config.device)
    allow_tf32(False)
    vae, rows, texts, digests = None, [], [], {}
    for step, run in itertools.product(steps, runs):
        sit, info = load_sit(run.directory / "checkpoints" / f"{step:07d}")
        if config.guidance_scale != 1 and not has_null_class(info):
            found = f"{run.name}, trained with --label-dropout 0: it has no null class"
            raise ValueError(f"--guidance-scale: expected 1 for {found}, found {config.guidance_scale:g}")
        if vae is None:
            labels = choose_classes(config.classes, sit.config.num_classes)
            name = config.vae or info["vae"]
            vae = load_vae(name, device)
            check_vae(vae, name, info["vae_digest"], whose=run.name)
        print(f"drawing {len(labels)} images: {run.name}, step {step:,}", flush=True)
        rows.append(draw_images(sit.to(device), info, vae, labels, config, device).numpy())
        texts.append(f"step {step:,}\n{shortened(run.name, MAX_NAME)}")
        digests.setdefault(run.name, {})[str(step)] = info["digest"]
    names = info["class_names"]
    heads = [names[label] if label < len(names) else str(label) for label in labels]
    recipe = f"seed {config.seed}, {config.sampler} {config.num_steps} steps, guidance {config.guidance_scale:g}"
    recipe += f", head guidance {config.head_guidance:g}" if config.head_guidance != 1 else ""
    record = {"steps": steps, "classes": labels, "device": device.type}
    record |= {name: getattr(config, name) for name in "seed sampler num_steps guidance_scale head_guidance".split()}
    record |= {"mixed_precision": choose_precision(config, device), "checkpoint_digests": digests}
    return compose(rows, texts, heads, f"the same noise and classes in each column\n{recipe}"), record


def compose(rows: Sequence[np.ndarray], texts: Sequence[str], heads: Sequence[str], caption: str) -> Figure:
    """Rows of images with a text each, a heading for each column, and a caption below. Enlarged by whole factors.

    Args:
        rows: of (N, R, R, 3) uint8.
        texts: of each row.
        heads: of each column (N).
    """
    # Sizes in pixels.
    count, side = rows[0].shape[:2]
    cell = side * max(1, round(CELL / side)) if side < CELL else min(side, 256)
    cell = min(cell, max(32, MAX_PIXELS // len(rows)))
    font, gap = max(13, min(22, cell // 8)), max(3, cell // 32)
    widest = [round(0.65 * font * max(map(len, text.split("\n")))) for text in ("\n".join(texts), caption)]
    left, top, bottom = max(16 * font, widest[0] + font), 2 * font, 3 * font
    right, height = left + count * (cell + gap), top + len(rows) * (cell + gap) + bottom
    width = max(right, widest[1] + font)

    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    edges = {
        "left": left / width,
        "right": (right - gap) / width,
        "top": 1 - top / height,
        "bottom": (bottom + gap) / height,
    }
    spaces = {"wspace": gap / cell, "hspace": gap / cell}
    panels = figure.subplots(len(rows), count, squeeze=False, gridspec_kw=edges | spaces)
    style = {"fontsize": font * 72 / DPI, "parse_math": False}  # a name with dollar signs is no formula
    for panel, head in zip(panels[0], heads, strict=True):
        panel.set_title(shortened(head, int(cell / font * 1.6), from_end=0), pad=gap / 2, **style)
    for line, images, text in zip(panels, rows, texts, strict=True):
        line[0].text(-gap / cell, 0.5, text, transform=line[0].transAxes, ha="right", va="center", **style)
        for panel, image in zip(line, images, strict=True):
            panel.imshow(image)
            panel.set_axis_off()
    figure.text(font / width, font / height / 2, caption, color="dimgray", va="bottom", **style)
    return figure
