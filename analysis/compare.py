"""Compare runs: images of the same noise and classes, curves over steps and hours, steps to the first run's value.

    python -m analysis.compare exps/b2-plain exps/b2
    python -m analysis.compare exps/b2-plain exps/b2 --steps 100000 400000 --classes 207 360 387 974 88 979 417 279

The first run is the baseline. Writes `compare.png` (as Figure 4 of the paper), `curves.png` and `compare.json`, and
prints a table. Metrics are those that sample_ddp.py --evaluate or evaluations.evaluate have left beside samples;
without any, the velocity loss stands for them.

Shape suffixes: N images, R image side, C latent channels, H = W latent side.
"""

from __future__ import annotations

import functools
import io
import itertools
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reporting.runs import Run, Samples, direction, evenly, hours, preferred, read_json, read_runs, recipe_words
from runtime import cli
from runtime.cli import REQUIRED, flag

# torch and what imports it is imported where it is used, so that --help does not wait for it.
if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image
    from torch import Tensor

    from models.sit import SiT

MOST_STEPS = 4  # checkpoints that are drawn unless --steps says which
MOST_CLASSES = 8
MOST_POINTS = 2000  # of a curve of the log in compare.json
WINDOW = 1 / 20  # of the shortest run's steps: the log's losses are means over so many
CELL = 128  # pixels that a small image is enlarged to, at least nearly
MOST_PIXELS = 16_000  # height of the picture

Curve = list[tuple[float, float]]  # (step or hours, value), by the first


@dataclass(frozen=True)
class CompareConfig:
    runs: tuple[str, ...] = flag(
        REQUIRED,
        "folders of runs, the baseline first; may also stand first, without the flag",
        group="what to compare",
        metavar="RUN",
    )
    samples: tuple[str, ...] = flag(
        (),
        "sets of samples that lie elsewhere: their folders, or files with their figures (metrics.json)",
        group="what to compare",
        metavar="PATH",
    )
    metric: str | None = flag(
        None, "metric of the curves; by default fid, or another Frechet distance that is there", group="what to compare"
    )
    output_dir: str = flag("exps/compare", "folder of the results", group="what to compare")

    images: bool = flag(True, "draw compare.png", group="images")
    steps: tuple[int, ...] | None = flag(
        None,
        f"checkpoints to draw from; by default those that all runs have, at most {MOST_STEPS}",
        group="images",
        metavar="STEP",
    )
    classes: tuple[int, ...] | None = flag(
        None,
        f"classes to draw, by number; by default {MOST_CLASSES} at even distances",
        group="images",
        metavar="CLASS",
    )
    seed: int = flag(0, "seed of the noise", group="images")
    sampler: str = flag(
        "ode-euler", "solver: ODE by Euler or Heun, SDE by Euler-Maruyama", choices=("ode-euler", "ode-heun", "sde"),
        group="images",
    )  # fmt: skip
    num_steps: int = flag(50, "steps of the solver; 250 with sde for the paper's", group="images")
    guidance_scale: float = flag(4.0, "v_null + scale (v_class - v_null): 1 is no guidance", group="images")
    vae: str | None = flag(
        None, "hub name, local folder or file of the VAE, if not where the checkpoints say", group="images"
    )
    mixed_precision: str | None = flag(
        None,
        "precision of the network; bf16 on a GPU and no (float32) on a CPU unless set",
        choices=("no", "bf16"),
        group="images",
    )
    device: str | None = flag(None, "a GPU if there is one, unless set", choices=("cpu", "cuda"), group="images")

    def __post_init__(self):
        if len(self.runs) < 2:
            raise ValueError(
                f"expected at least two runs, found {len(self.runs)}; a single one is for python -m analysis.report"
            )
        if self.seed < 0 or self.num_steps < 1 or not math.isfinite(self.guidance_scale):
            raise ValueError(
                f"expected --seed of at least 0, --num-steps of at least 1 and a finite --guidance-scale, found "
                f"{self.seed}, {self.num_steps} and {self.guidance_scale}"
            )


# What can be drawn side by side.


def check_alike(runs: list[Run]) -> None:
    """Refuse runs whose images of one class and noise would not be of one kind.

    Raises:
        ValueError: another resolution, number of classes, latent shape or VAE.
    """
    facts: dict[str, dict[str, str]] = {}
    for run in runs:
        if not run.checkpoints:
            continue
        sit = read_json(run.folder / "checkpoints" / f"{run.checkpoints[-1]:07d}" / "config.json")
        shape = sit.get("in_channels"), sit.get("latent_size"), sit.get("latent_size")
        own = {"resolution": run.state.get("resolution"), "number of classes": sit.get("num_classes"),
               "latent shape": shape, "VAE": str(run.state.get("vae_digest"))[:12]}  # fmt: skip
        for name, value in own.items():
            facts.setdefault(name, {})[run.name] = str(value)
    wrong = [
        f"{name} ({', '.join(f'{run}: {value}' for run, value in values.items())})"
        for name, values in facts.items()
        if len(set(values.values())) > 1
    ]
    if wrong:
        raise ValueError(f"expected runs that can be compared, found other {'; other '.join(wrong)}; leave one out")
    if len({tuple(run.state.get("class_names") or ()) for run in runs if run.checkpoints}) > 1:
        print("warning: the runs' classes have other names; equal numbers may mean other things", file=sys.stderr)


def choose_steps(runs: list[Run], wanted: Sequence[int] | None) -> list[int]:
    """Steps to draw from, which all runs have.

    Raises:
        ValueError: there are none, or one of `wanted` is missing.
    """
    have = "; ".join(f"{run.name}: {_listed(run.checkpoints)}" for run in runs)
    shared = sorted(set(runs[0].checkpoints).intersection(*(run.checkpoints for run in runs[1:])))
    missing = [f"{step} of {run.name}" for step in wanted or () for run in runs if step not in run.checkpoints]
    if missing:
        raise ValueError(
            f"--steps: expected checkpoints that all runs have, found none for {_listed(missing)} ({have})"
        )
    if not shared:
        raise ValueError(
            f"expected a step that all runs have a checkpoint of, found none ({have}); --no-images compares their "
            f"curves alone"
        )
    return sorted(set(wanted)) if wanted else evenly(shared, MOST_STEPS)


def _listed(items: Sequence) -> str:
    return ", ".join(map(str, items[:12])) + (f", ... ({len(items)} in all)" if len(items) > 12 else "") or "none"


def choose_classes(wanted: Sequence[int] | None, num_classes: int) -> list[int]:
    """Numbers of the classes to draw.

    Raises:
        ValueError: one that the models do not know.
    """
    wrong = [label for label in wanted or () if not 0 <= label < num_classes]
    if wrong:
        raise ValueError(f"--classes: expected numbers from 0 to {num_classes - 1}, found {_listed(wrong)}")
    return list(wanted) if wanted else evenly(range(num_classes), MOST_CLASSES)


# Images.


def draw_images(
    sit: SiT, info: dict[str, Any], vae: Any, labels: Sequence[int], config: CompareConfig, device: torch.device
) -> Tensor:  # -> (N, R, R, 3) uint8
    """An image of each of `labels`, whose noise depends on the seed and its place alone.

    It is the noise of the image in that place that sample_ddp.py draws with this seed, and so is the SDE's.

    Args:
        sit: on `device`. info: what `load_sit` told of it.
        vae: on `device`.
    """
    import torch

    from diffusion.interpolant import Interpolant
    from diffusion.samplers import block_noise, guided_velocity, solve
    from models.vae import decode_images
    from runtime.seeding import BLOCK

    lower = torch.bfloat16 if (config.mixed_precision or _usual_precision(device)) == "bf16" else None
    shape = (sit.config.in_channels, sit.config.latent_size, sit.config.latent_size)
    images = []
    for first in range(0, len(labels), BLOCK):
        y = torch.tensor(labels[first : first + BLOCK], device=device)  # (B,)
        draw = block_noise(config.seed, first, BLOCK, shape, device)
        noise = functools.partial(_first_of, draw, len(y))
        velocity = guided_velocity(sit, y, sit.config.num_classes, config.guidance_scale, (0.0, 1.0), lower)
        z = solve(config.sampler, velocity, noise, config.num_steps, Interpolant(info["path_type"]), last_step_size=0.04)
        if not z.isfinite().all():
            raise ValueError(
                f"expected finite samples, found some that are not from {info['source']}; fix: --mixed-precision no, "
                f"or a lower --guidance-scale"
            )
        images.append(decode_images(vae, z.float(), info["scale"]).cpu())
    return torch.cat(images)


def _first_of(draw: Callable[..., Tensor], count: int, step: int = -1) -> Tensor:  # -> (count, C, H, W)
    return draw(step)[:count]


def _usual_precision(device: torch.device) -> str:
    return "bf16" if device.type == "cuda" else "no"


def choose_device(name: str | None) -> torch.device:
    """Where to draw.

    Raises:
        ValueError: a GPU is asked for, and there is none.
    """
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: expected a GPU, found none; give --device cpu")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def draw_all(config: CompareConfig, runs: list[Run]) -> tuple[Image.Image, dict[str, Any]]:
    """`compare.png`, and what it was made from.

    Raises:
        ValueError: runs, steps or classes that do not fit, or the VAE is not the one they were trained with.
    """
    import torch

    from models.load import load_sit
    from models.vae import UNKNOWN_VAE, load_vae, vae_digest

    steps, device = choose_steps(runs, config.steps), choose_device(config.device)
    labels = None
    vae, rows, texts, record = None, [], [], {}
    torch.set_float32_matmul_precision("highest")
    for step, run in itertools.product(steps, runs):
        sit, info = load_sit(run.folder / "checkpoints" / f"{step:07d}")
        if vae is None:
            labels = choose_classes(config.classes, sit.config.num_classes)
            vae = load_vae(config.vae or info["vae"], device)
            if info["vae_digest"] not in (UNKNOWN_VAE, vae_digest(vae)):
                raise ValueError(
                    f"--vae: expected the VAE of {run.name} (digest {info['vae_digest'][:12]}...), found another in "
                    f"{config.vae or info['vae']} ({vae_digest(vae)[:12]}...)"
                )
        print(f"drawing {len(labels)} images: {run.name}, step {step:,}", flush=True)
        rows.append(draw_images(sit.to(device), info, vae, labels, config, device).numpy())
        texts.append((f"step {step:,}", run.name))
        record.setdefault(run.name, {})[str(step)] = info["digest"]
        names = info["class_names"]
    heads = [names[label] if label < len(names) else str(label) for label in labels]
    caption = (
        f"the same noise and classes in each column; seed {config.seed}, {config.sampler} {config.num_steps} steps, "
        f"guidance {config.guidance_scale:g}"
    )
    image, _ = compose(rows, texts, heads, caption)
    made = {"steps": steps, "classes": labels, "seed": config.seed, "sampler": config.sampler,
            "num_steps": config.num_steps, "guidance_scale": config.guidance_scale, "device": device.type,
            "mixed_precision": config.mixed_precision or _usual_precision(device),
            "checkpoint_digests": record}  # fmt: skip
    return image, made


def compose(
    rows: Sequence[np.ndarray], texts: Sequence[tuple[str, str]], heads: Sequence[str], caption: str
) -> tuple[Image.Image, list[list[tuple[int, int, int]]]]:
    """Rows of images with a label each, a heading for each column, and a line below.

    Args:
        rows: of (N, R, R, 3) uint8.
        texts: of each row, in two lines; rows with an equal first line belong together.
        heads: of each column (N).

    Returns:
        The picture, and the place (left, top, side) of each image in it, by row and column.
    """
    from PIL import Image, ImageDraw

    count, side = rows[0].shape[:2]
    cell = side * max(1, round(CELL / side)) if side < CELL else min(side, 256)
    cell = min(cell, max(32, MOST_PIXELS // len(rows)))
    size, gap = max(13, min(22, cell // 8)), max(3, cell // 32)
    margin = 4 * gap
    probe = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    fitted = [tuple(_fit(probe, text, size, 24 * size // 2 + cell) for text in pair) for pair in texts]
    left = margin + round(max(probe.textlength(text, font=_font(size)) for pair in fitted for text in pair)) + margin
    top = margin + 2 * size
    # A wider gap where the step changes.
    tops, y = [], top
    for index, pair in enumerate(texts):
        y += 3 * gap if index and pair[0] != texts[index - 1][0] else 0
        tops.append(y)
        y += cell + gap
    width = max(left + count * (cell + gap) + margin, round(probe.textlength(caption, font=_font(size))) + 2 * margin)
    image = Image.new("RGB", (width, y + margin + 2 * size), "white")
    draw = ImageDraw.Draw(image)
    for column, head in enumerate(heads):
        text = _fit(draw, head, size, cell)
        draw.text((left + column * (cell + gap) + cell / 2, top - size // 2), text, "black", _font(size), anchor="ms")
    places = []
    for row, (images, (first, second), y) in enumerate(zip(rows, fitted, tops, strict=True)):
        if row == 0 or texts[row][0] != texts[row - 1][0]:  # once for the rows of a step
            draw.text((margin, y + cell / 2 - size), first, "dimgray", _font(size), anchor="lm")
        draw.text((margin, y + cell / 2 + size // 2), second, "black", _font(size), anchor="lm")
        places.append([(left + column * (cell + gap), y, cell) for column in range(count)])
        for (x, y_place, _), pixels in zip(places[-1], images, strict=True):
            one = Image.fromarray(pixels)
            if side != cell:
                kind = Image.Resampling.NEAREST if cell % side == 0 else Image.Resampling.LANCZOS
                one = one.resize((cell, cell), kind)
            image.paste(one, (x, y_place))
    draw.text((margin, image.height - margin), caption, "dimgray", _font(size), anchor="ls")
    return image, places


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _fit(draw: Any, text: str, size: int, width: float) -> str:
    """The text in one line, cut short where it is wider than `width`."""
    text = " ".join(text.encode("utf-8", "replace").decode().split())
    short = text
    while draw.textlength(short, font=_font(size)) > width and len(text) > 1:
        text = text[:-1]
        short = text.rstrip(" ,") + "..."
    return short


# Curves.


@dataclass(frozen=True)
class MetricCurves:
    """Curves of one metric, measured alike: by run, (step, value)."""

    metric: str
    measured: str  # how, in words
    curves: dict[str, Curve]


def choose_metric_curves(runs: list[Run], wanted: str | None) -> MetricCurves | None:
    """The curves of a metric over steps; of several ways of sampling the one that most runs and steps share.

    Values of equal steps, of several seeds of sampling, are averaged.

    Raises:
        ValueError: the metric that is wanted is not there.
    """
    measured = [(run, samples) for run in runs for samples in run.samples if samples.metrics and samples.step >= 0]
    names = list(dict.fromkeys(name for _, samples in measured for name in samples.metrics))
    if wanted and wanted not in names:
        raise ValueError(f"--metric: expected one of {_listed(names)}, which these runs have, found {wanted}")
    if wanted and not direction(wanted):
        raise ValueError(f"--metric: expected one that is known to be better when higher or lower, found {wanted}")
    metric = wanted or preferred(names)
    if metric is None:
        return None
    groups: dict[tuple, dict[str, dict[int, list[float]]]] = {}
    examples: dict[tuple, Samples] = {}
    for run, samples in measured:
        if metric in samples.metrics:
            key = samples.reference, samples.recipe()
            examples.setdefault(key, samples)
            steps = groups.setdefault(key, {}).setdefault(run.name, {})
            steps.setdefault(samples.step, []).append(samples.metrics[metric])

    def rank(key: tuple) -> tuple:
        own = groups[key]
        points = sum(len(steps) for steps in own.values())
        return runs[0].name in own, len(own), points, -examples[key].scale

    best = max(groups, key=rank)
    curves = {
        name: sorted((step, sum(values) / len(values)) for step, values in steps.items())
        for name, steps in groups[best].items()
    }
    return MetricCurves(metric, f"{recipe_words(best[1])}, against {best[0]}", curves)


def smoothed(rows: list[dict[str, float]], column: str, window: float) -> Curve:
    """(step, mean of the column over the rows of the last `window` steps); numbers that are not finite have no part."""
    known = [(row["step"], row[column]) for row in rows if _finite(row.get(column))]
    curve, first, total = [], 0, 0.0
    for index, (step, value) in enumerate(known):
        total += value
        while first < index and known[first][0] <= step - window:
            total -= known[first][1]
            first += 1
        curve.append((step, total / (index - first + 1)))
    return curve


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Reach:
    """Where a curve first comes to a value.

    Args:
        at: step or hours; None if it does not get there.
        at_most: it was there at its first point already: `at` is that one, and the true place may be earlier.
    """

    at: float | None
    at_most: bool = False


def first_crossing(curve: Curve, target: float, sign: int) -> Reach:
    """Where a curve first comes to `target` or better, on straight lines between its points.

    Args:
        sign: -1 where lower is better, 1 where higher is.
    """
    before = None
    for x, y in curve:
        if sign * (y - target) >= 0:
            if before is None:
                return Reach(x, at_most=True)
            x0, y0 = before
            return Reach(x0 + (x - x0) * (target - y0) / (y - y0))
        before = x, y
    return Reach(None)


def best_point(curve: Curve, sign: int) -> tuple[float, float]:
    """The best point of a curve; of equal ones the first."""
    return max(curve, key=lambda point: (sign * point[1], -point[0]))


def hours_axis(runs: list[Run]) -> tuple[dict[str, Curve], str]:
    """(step, hours) of each run by its log, and what the hours are: GPU hours where all recorded their processes."""
    recorded = all(_finite(run.record.get("processes")) and ";" in str(run.record.get("machine")) for run in runs)
    axes = {}
    for run in runs:
        batch, own = run.settings.get("batch_size"), run.record["processes"] if recorded else 1
        known = batch and any(_finite(row.get("images_per_second")) for row in run.rows)
        spent = hours(run.rows, batch) if known else []
        axes[run.name] = [(row["step"], own * value) for row, value in zip(run.rows, spent, strict=False)]
    return axes, "GPU hours" if recorded else "hours of the run"


def at_hours(curve: Curve, axis: Curve) -> Curve:
    """A curve over steps as one over hours; points after the log's last row are left out."""
    import numpy as np

    if not axis:
        return []
    steps, spent = zip((0.0, 0.0), *axis, strict=True)
    return [(float(np.interp(step, steps, spent)), value) for step, value in curve if step <= steps[-1]]


def speed_up(run: Curve, baseline: Curve, sign: int) -> dict[str, Any]:
    """Where a curve reaches the baseline's best value, and how much sooner than the baseline that is."""
    if not run or not baseline:
        return {"reached": None, "at_most": False, "speed_up": None}
    place, target = best_point(baseline, sign)
    found = first_crossing(run, target, sign)
    ratio = place / found.at if found.at else None
    return {"reached": found.at, "at_most": found.at_most, "speed_up": ratio}


def compare_curves(runs: list[Run], wanted: str | None) -> dict[str, Any]:
    """Everything about curves that compare.json holds.

    Raises:
        ValueError: the metric that is wanted is not there, or the baseline has neither metrics nor a log.
    """
    figures = choose_metric_curves(runs, wanted)
    axes, unit = hours_axis(runs)
    lasts = [run.rows[-1]["step"] for run in runs if run.rows]
    window = min(lasts, default=0) * WINDOW
    losses = {run.name: smoothed(run.rows, "velocity", window) for run in runs}
    baseline = runs[0].name
    notes = []
    if figures and figures.curves.get(baseline):
        quantity, sign, curves = figures.metric, direction(figures.metric), figures.curves
        if any(len(curve) < 2 for curve in curves.values()):
            notes.append("a run that was measured at one step tells only whether it is there by then")
    else:
        why = "no run has metrics" if not figures else f"{baseline}, the baseline, has no metrics"
        notes.append(f"{why}: by the velocity loss, averaged over the last {window:,.0f} steps")
        quantity, sign, curves = "velocity loss", -1, {name: curve for name, curve in losses.items() if curve}
    if not curves.get(baseline):
        raise ValueError(f"expected metrics or a log of the baseline, found neither in {runs[0].folder}")
    place, target = best_point(curves[baseline], sign)
    in_hours = {name: at_hours(curve, axes[name]) for name, curve in curves.items()}
    reached = []
    for run in runs[1:]:
        curve = curves.get(run.name, [])
        best = best_point(curve, sign) if curve else (None, None)
        reached.append(
            {"run": run.name, "measured": bool(curve), "best_step": best[0], "best": best[1],
             "steps": speed_up(curve, curves[baseline], sign),
             "hours": speed_up(in_hours.get(run.name, []), in_hours[baseline], sign)}
        )  # fmt: skip
    return {
        "quantity": quantity,
        "better": "lower" if sign < 0 else "higher",
        "measured": figures.measured if figures and quantity == figures.metric else None,
        "baseline": {"run": baseline, "best": target, "step": place},
        "reach": reached,
        "hours_are": unit,
        "notes": notes,
        "metric": {"name": figures.metric, "curves": figures.curves} if figures else None,
        "velocity": {"window": window, "curves": {name: evenly(curve, MOST_POINTS) for name, curve in losses.items()}},
        "hours": {name: evenly(axis, MOST_POINTS) for name, axis in axes.items()},
    }


def table(compared: dict[str, Any]) -> str:
    """The speed-ups in Markdown."""
    base, unit = compared["baseline"], compared["hours_are"]
    head = [
        "run",
        f"best {compared['quantity']}",
        f"reaches {base['best']:.4g} ({base['run']}, step {base['step']:,.0f}) at",
        "speed-up in steps",
        f"speed-up in {unit}",
    ]
    lines = [head, ["---"] * len(head)]
    for line in compared["reach"]:
        if not line["measured"]:
            lines.append([line["run"], "not measured", "–", "–", "–"])
            continue
        found = line["steps"]
        if found["reached"] is None:
            where = "not reached"
        else:
            where = f"step {found['reached']:,.0f}" + (" at the latest" if found["at_most"] else "")
        best = f"{line['best']:.4g} at step {line['best_step']:,.0f}"
        lines.append([line["run"], best, where, _times(found), _times(line["hours"])])
    body = ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines]
    notes = [compared["measured"], *compared["notes"]]
    return "\n".join([*body, "", *(f"{note[0].upper()}{note[1:]}." for note in notes if note)])


def _times(found: dict[str, Any]) -> str:
    if found["speed_up"] is None:
        return "–"
    return ("at least " if found["at_most"] else "") + f"{found['speed_up']:.2f} times"


def draw_curves(compared: dict[str, Any], names: Sequence[str]) -> bytes:
    """`curves.png`: the metric, if any, and the velocity loss, each over steps and over hours."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    quantities = []
    if compared["metric"]:
        quantities.append((compared["metric"]["name"], compared["metric"]["curves"]))
    quantities.append(("velocity loss", compared["velocity"]["curves"]))
    figure = Figure(figsize=(11, 4 * len(quantities)), layout="constrained", dpi=120)
    panels = figure.subplots(len(quantities), 2, squeeze=False)
    for (quantity, curves), line in zip(quantities, panels, strict=True):
        decisive = quantity == compared["quantity"]
        for panel, unit in zip(line, ("steps", compared["hours_are"]), strict=True):
            for index, name in enumerate(names):
                curve = curves.get(name) or []
                if unit != "steps":
                    curve = at_hours(curve, compared["hours"][name])
                x, y = zip(*curve, strict=True) if curve else ((), ())
                marker = "o" if len(curve) <= 40 else None
                panel.plot(x, y, color=f"C{index % 10}", marker=marker, markersize=4, label=name)
            if decisive:
                panel.axhline(compared["baseline"]["best"], color="gray", linestyle="--", linewidth=1)
                kind = "steps" if unit == "steps" else "hours"
                for entry in compared["reach"]:
                    found = entry[kind]
                    if found["reached"] is not None:  # a triangle: at the latest there
                        marker = "k<" if found["at_most"] else "kx"
                        panel.plot(found["reached"], compared["baseline"]["best"], marker, markersize=8)
            if unit == "steps":
                panel.xaxis.set_major_formatter(EngFormatter(sep=""))  # 400k
            panel.set_xlabel(unit)
            panel.set_ylabel(quantity)
            panel.grid(alpha=0.3)
    handles = panels[0][0].lines[: len(names)]
    legend = figure.legend(
        handles, [f" {name}" for name in names], loc="outside upper center", ncols=min(4, len(names))
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # a name with dollar signs is no formula
    if compared["metric"] is None:
        figure.text(0.01, 0.005, "No run has metrics: losses alone.", fontsize=9, color="dimgray")
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a name in letters that the font has not: boxes
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def write(path: Path, content: bytes) -> None:
    """Write under a temporary name, then rename.

    Raises:
        ValueError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ValueError(f"--output-dir: cannot write {path} ({error.strerror}); choose another place") from error


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv and not argv[0].startswith("-"):  # the runs, by themselves
        argv = ["--runs", *argv]
    config = cli.parse(CompareConfig, argv, __doc__.splitlines()[0])
    runs, others = read_runs(config.runs, config.samples)
    if others:
        raise ValueError(
            f"--samples: expected samples of these runs, found others: {_listed([str(found.path) for found in others])}"
        )
    check_alike(runs)
    compared = compare_curves(runs, config.metric)
    if config.images:
        choose_steps(runs, config.steps)  # refused before torch is loaded
    from runtime import provenance

    folder, names = Path(config.output_dir), [run.name for run in runs]
    record = {"runs": {run.name: str(run.folder) for run in runs}, **compared, "images": None}
    write(folder / "curves.png", draw_curves(compared, names))
    if config.images:
        image, record["images"] = draw_all(config, runs)
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        write(folder / "compare.png", buffer.getvalue())
    record |= provenance.stamp()
    write(folder / "compare.json", (json.dumps(record, indent=1, allow_nan=False) + "\n").encode())
    print(f"\n{table(compared)}\n\n{folder}: {'compare.png, ' if config.images else ''}curves.png, compare.json")


if __name__ == "__main__":
    cli.run(main)
