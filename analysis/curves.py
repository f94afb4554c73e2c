"""Curves of runs over steps and over hours, and where each reaches the best value of the first run, the baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from reporting.runs import Run, direction, hours, preferred
from reporting.values import evenly, finite, markdown_table

MAX_POINTS = 2000  # of a curve of the log in compare.json
WINDOW = 1 / 20  # of the shortest run's steps: losses of the log are means over so many

Curve = list[tuple[float, float]]  # (step or hours, value), in order of the first


@dataclass(frozen=True)
class MetricCurves:
    """Curves of one metric, measured alike."""

    metric: str
    recipe: str  # how the samples were drawn, and what they were measured against
    curves: dict[str, Curve]  # by run: (step, value)


@dataclass(frozen=True)
class Crossing:
    """Where a curve first reaches a value.

    Args:
        at: step or hours; None if it never does.
        at_most: it was there at its first point already: `at` is that point, and the true place may be earlier.
    """

    at: float | None
    at_most: bool = False


def choose_metric_curves(runs: list[Run], wanted: str | None) -> MetricCurves | None:
    """The curves of a metric over steps; of several recipes of sampling the one that most runs and steps share.

    Values of equal steps, of several seeds of sampling, are averaged.

    Raises:
        ValueError: the metric that is wanted is not there.
    """
    measured = [(run, samples) for run in runs for samples in run.samples if samples.metrics and samples.step >= 0]
    names = list(dict.fromkeys(name for _, samples in measured for name in samples.metrics))
    known = [name for name in names if direction(name)]  # whether higher or lower is better
    if wanted and wanted not in known:
        raise ValueError(f"--metric: expected one of {', '.join(known) or 'none'} of these runs, found {wanted}")
    metric = wanted or preferred(names)
    if metric is None:
        return None

    # Values by (reference, recipe, guidance scale), run and step.
    groups: dict[tuple, dict[str, dict[int, list[float]]]] = {}
    for run, samples in measured:
        if metric in samples.metrics:
            by_run = groups.setdefault((samples.reference, samples.recipe(), samples.scale), {})
            by_run.setdefault(run.name, {}).setdefault(samples.step, []).append(samples.metrics[metric])

    def shared_by(key: tuple) -> tuple:
        by_run = groups[key]
        return runs[0].name in by_run, len(by_run), sum(map(len, by_run.values())), -key[2]

    reference, recipe, _ = best = max(groups, key=shared_by)
    curves = {
        name: sorted((step, sum(values) / len(values)) for step, values in by_step.items())
        for name, by_step in groups[best].items()
    }
    return MetricCurves(metric, ", ".join([*filter(None, recipe), f"against {reference}"]), curves)


def smoothed(rows: list[dict[str, float]], column: str, window: float) -> Curve:
    """(step, mean of the column over the rows of the last `window` steps), of finite values."""
    known = [(row["step"], row[column]) for row in rows if finite(row.get(column)) is not None]
    curve, first, total = [], 0, 0.0
    for index, (step, value) in enumerate(known):
        total += value
        while first < index and known[first][0] <= step - window:
            total -= known[first][1]
            first += 1
        curve.append((step, total / (index - first + 1)))
    return curve


def first_crossing(curve: Curve, target: float, sign: int) -> Crossing:
    """Where a curve first reaches `target` or better, on straight lines between its points.

    Args:
        sign: -1 where lower is better, 1 where higher is.
    """
    before = None
    for x, y in curve:
        if sign * (y - target) >= 0:
            if before is None:
                return Crossing(x, at_most=True)
            x0, y0 = before
            return Crossing(x0 + (x - x0) * (target - y0) / (y - y0))
        before = x, y
    return Crossing(None)


def best_point(curve: Curve, sign: int) -> tuple[float, float]:
    """The best point of a curve; of equal ones the first."""
    return max(curve, key=lambda point: (sign * point[1], -point[0]))


def speed_up(run: Curve, baseline: Curve, sign: int) -> dict[str, Any]:
    """Where a curve reaches the baseline's best value, and how many times sooner than the baseline that is."""
    if not run or not baseline:
        return {"reached": None, "at_most": False, "speed_up": None}
    place, target = best_point(baseline, sign)
    found = first_crossing(run, target, sign)
    return {"reached": found.at, "at_most": found.at_most, "speed_up": place / found.at if found.at else None}


def hours_axis(runs: list[Run]) -> tuple[dict[str, Curve], str]:
    """(step, hours) of each run by its log, and the unit: GPU hours where all recorded their processes."""
    on_gpus = all(finite(run.record.get("processes")) and ";" in str(run.record.get("machine")) for run in runs)
    axes = {}
    for run in runs:
        batch_size, processes = run.settings.get("batch_size"), run.record["processes"] if on_gpus else 1
        known = batch_size and any(finite(row.get("images_per_second")) is not None for row in run.rows)
        spent = hours(run.rows, batch_size) if known else []
        axes[run.name] = [(row["step"], processes * value) for row, value in zip(run.rows, spent, strict=False)]
    return axes, "GPU hours" if on_gpus else "hours of the run"


def at_hours(curve: Curve, axis: Curve) -> Curve:
    """A curve over steps as one over hours; points after the log's last row are left out."""
    if not axis:
        return []
    steps, spent = zip((0.0, 0.0), *axis, strict=True)
    return [(float(np.interp(step, steps, spent)), value) for step, value in curve if step <= steps[-1]]


def compare_curves(runs: list[Run], wanted: str | None) -> dict[str, Any]:
    """Everything about curves that compare.json holds.

    Raises:
        ValueError: the metric that is wanted is not there, or the baseline has neither metrics nor a log.
    """
    baseline, notes = runs[0].name, []
    measured = choose_metric_curves(runs, wanted)
    axes, unit = hours_axis(runs)
    window = WINDOW * min((run.rows[-1]["step"] for run in runs if run.rows), default=0)
    losses = {run.name: smoothed(run.rows, "velocity", window) for run in runs}

    # What decides: the metric, or else the velocity loss.
    by_metric = bool(measured and measured.curves.get(baseline))
    if by_metric:
        quantity, sign, curves = measured.metric, direction(measured.metric), measured.curves
        if any(len(curve) < 2 for curve in curves.values()):
            notes.append("a run that was measured at one step tells only whether it is there by then")
    else:
        why = f"{baseline}, the baseline, has no metrics" if measured else "no run has metrics"
        notes.append(f"{why}: by the velocity loss, averaged over the last {window:,.0f} steps")
        quantity, sign, curves = "velocity loss", -1, {name: curve for name, curve in losses.items() if curve}
    if not curves.get(baseline):
        raise ValueError(f"expected metrics or a log of the baseline, found neither in {runs[0].directory}")

    place, target = best_point(curves[baseline], sign)
    over_hours = {name: at_hours(curve, axes[name]) for name, curve in curves.items()}
    reached = []
    for run in runs[1:]:
        curve = curves.get(run.name, [])
        best_step, best = best_point(curve, sign) if curve else (None, None)
        line = {"run": run.name, "measured": bool(curve), "best_step": best_step, "best": best}
        line["steps"] = speed_up(curve, curves[baseline], sign)
        line["hours"] = speed_up(over_hours.get(run.name, []), over_hours[baseline], sign)
        reached.append(line)
    metric = {"name": measured.metric, "curves": measured.curves} if measured else None
    thinned = [{name: evenly(curve, MAX_POINTS) for name, curve in curves.items()} for curves in (losses, axes)]
    compared = {"quantity": quantity, "better": "lower" if sign < 0 else "higher"}
    compared |= {"measured": measured.recipe if by_metric else None, "metric": metric}
    compared |= {"baseline": {"run": baseline, "best": target, "step": place}, "reach": reached, "notes": notes}
    return compared | {"velocity": {"window": window, "curves": thinned[0]}, "hours": thinned[1], "hours_are": unit}


def speed_up_table(compared: dict[str, Any]) -> str:
    """The speed-ups in Markdown."""
    baseline = compared["baseline"]
    target = f"{baseline['best']:.4g} ({baseline['run']}, step {baseline['step']:,.0f})"
    head = ["run", f"best {compared['quantity']}", f"reaches {target} at", "speed-up in steps"]
    head.append(f"speed-up in {compared['hours_are']}")
    lines = []
    for line in compared["reach"]:
        cells = [line["run"], "not measured", "–", "–", "–"]
        if line["measured"]:
            cells[1:3] = f"{line['best']:.4g} at step {line['best_step']:,.0f}", "not reached"
        if line["steps"]["reached"] is not None:
            cells[2] = f"step {line['steps']['reached']:,.0f}" + (" at the latest" if line["steps"]["at_most"] else "")
        for index, found in ((3, line["steps"]), (4, line["hours"])):
            if found["speed_up"] is not None:
                cells[index] = ("at least " if found["at_most"] else "") + f"{found['speed_up']:.2f} times"
        lines.append(cells)
    notes = [f"{note[0].upper()}{note[1:]}." for note in (compared["measured"], *compared["notes"]) if note]
    return "\n".join([markdown_table(head, lines), "", *notes])


def draw_curves(compared: dict[str, Any], names: Sequence[str]) -> Figure:
    """The metric, if any, and the velocity loss, each over steps and over hours."""
    quantities = {"velocity loss": compared["velocity"]["curves"]}
    if compared["metric"]:
        quantities = {compared["metric"]["name"]: compared["metric"]["curves"]} | quantities
    figure = Figure(figsize=(11, 4 * len(quantities)), layout="constrained", dpi=120)
    panels = figure.subplots(len(quantities), 2, squeeze=False)
    for (quantity, curves), line in zip(quantities.items(), panels, strict=True):
        for panel, kind in zip(line, ("steps", "hours"), strict=True):
            for index, name in enumerate(names):
                curve = curves.get(name) or []
                curve = curve if kind == "steps" else at_hours(curve, compared["hours"][name])
                x, y = zip(*curve, strict=True) if curve else ((), ())
                marker = "o" if len(curve) <= 40 else None
                panel.plot(x, y, color=f"C{index % 10}", marker=marker, markersize=4, label=name)
            if quantity == compared["quantity"]:
                mark_crossings(panel, compared, kind)
            panel.set(xlabel="steps" if kind == "steps" else compared["hours_are"], ylabel=quantity)
            panel.grid(alpha=0.3)
        line[0].xaxis.set_major_formatter(EngFormatter(sep=""))  # 400k
    labels = [f" {name}" for name in names]  # one that begins with _ would be left out
    lines, columns = panels[0][0].lines[: len(names)], min(4, len(names))
    legend = figure.legend(lines, labels, loc="outside upper center", ncols=columns)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a name with dollar signs is no formula
    if compared["metric"] is None:
        figure.text(0.01, 0.005, "No run has metrics: losses alone.", fontsize=9, color="dimgray")
    return figure


def mark_crossings(panel: Any, compared: dict[str, Any], kind: str) -> None:
    """The baseline's best value, and where each run reaches it: a triangle where it may have been earlier."""
    best = compared["baseline"]["best"]
    panel.axhline(best, color="gray", linestyle="--", linewidth=1)
    for line in compared["reach"]:
        if line[kind]["reached"] is not None:
            panel.plot(line[kind]["reached"], best, "k<" if line[kind]["at_most"] else "kx", markersize=8)
