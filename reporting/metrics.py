"""Metrics of sets of samples: the best set by each metric, curves over steps and over guidance, and pictures."""

from __future__ import annotations

from typing import Any

from reporting.pictures import encode_pictures
from reporting.runs import Samples, direction, preferred
from reporting.values import finite

MAX_PICTURES = 4  # of sets of samples

Lines = dict[tuple[str, ...], list[tuple[float, float]]]  # by what tells them apart: points (x, metric)


def metrics_section(sets: list[Samples]) -> dict[str, Any]:
    """Metrics by groups of sets that are comparable: of one reference and one number of images."""
    groups: dict[tuple, list[Samples]] = {}
    for one in sets:
        if one.metrics:
            groups.setdefault((one.reference, one.settings.get("num_samples")), []).append(one)
    return {
        "groups": [group_section(group) for group in sorted(groups.values(), key=len, reverse=True)],
        "waiting": [one.path for one in sets if not one.metrics],
        "warnings": list(dict.fromkeys(warning for one in sets for warning in one.warnings)),
    }


def group_section(group: list[Samples]) -> dict[str, Any]:
    """Of sets that are comparable: the best by each metric, and charts of lines with more than one point."""
    names = list(dict.fromkeys(name for one in group for name in one.metrics))
    best = {}
    for name in names:
        if direction(name) and len(group) > 1:
            having = [one for one in group if name in one.metrics]
            best[name] = max(having, key=lambda one, name=name: direction(name) * one.metrics[name])
    charts = []
    for name in names:
        hint = {-1: ", lower is better", 1: ", higher is better", 0: ""}[direction(name)]
        for x, lines in (("step", over_steps(group, name)), ("guidance scale", over_guidance(group, name))):
            if any(len(dict(points)) > 1 for points in lines.values()):
                charts.append({"title": f"{name} over {x}{hint}", "x": x, "series": chart_series(lines)})
    return {"sets": group, "names": names, "best": best, "main": preferred(best), "charts": charts}


def describe(one: Samples, with_run: bool) -> str:
    """Run, step, guidance, solver of a set."""
    parts = [one.run] if with_run else []
    parts += [f"step {one.step:,}"] if one.step >= 0 else []
    parts.append("no guidance" if one.scale == 1 else f"guidance {one.scale:g} on {one.interval}")
    steps = one.settings.get("num_steps")
    parts.append(one.settings.get("sampler", "unknown solver") + (f", {steps} steps" if steps else ""))
    return ", ".join(filter(None, [*parts, one.unusual]))


def over_steps(group: list[Samples], metric: str) -> Lines:
    """A line per run and recipe of sampling: the metric against steps of training."""
    lines: Lines = {}
    for one in group:
        if metric in one.metrics and one.step >= 0:
            lines.setdefault((one.run, *one.recipe()), []).append((one.step, one.metrics[metric]))
    return lines


def over_guidance(group: list[Samples], metric: str) -> Lines:
    """A line per run, step, interval and recipe: the metric against the guidance scale.

    Without guidance (scale 1) there is no interval: that point belongs to the lines of all intervals.
    """
    lines: Lines = {}
    for one in sorted(group, key=lambda one: one.scale == 1):  # those without guidance last
        if metric not in one.metrics:
            continue
        run, step, recipe = one.run, f"step {one.step:,}", one.recipe(without=("guidance_scale", "guidance_interval"))
        keys = [(run, step, one.interval, *recipe)]
        if one.scale == 1:
            keys = [key for key in lines if (*key[:2], *key[3:]) == (run, step, *recipe)] or [(run, step, "", *recipe)]
        for key in keys:
            lines.setdefault(key, []).append((one.scale, one.metrics[metric]))
    return lines


def chart_series(lines: Lines) -> list[dict[str, Any]]:
    """Series of a chart. Labels hold what differs between the lines."""
    differs = [len(set(parts)) > 1 for parts in zip(*lines, strict=True)]
    series = []
    for color, (key, points) in enumerate(lines.items()):
        label = ", ".join(part for part, shown in zip(key, differs, strict=True) if part and shown)
        x, y = zip(*sorted(points), strict=True)
        series.append({"label": label, "x": x, "y": [finite(value) for value in y], "color": color})
    return series


def pictures_section(sets: list[Samples], characters: int) -> dict[str, Any]:
    """Pictures of the sets of the latest steps."""
    having = sorted((one for one in sets if one.picture), key=lambda one: -one.step)
    wanted = having[:MAX_PICTURES]
    encoded = encode_pictures([one.picture for one in wanted], characters)
    shown = [(one, picture) for one, picture in zip(wanted, encoded, strict=True) if picture]
    return {"shown": shown, "wanted": len(wanted), "total": len(having)}
