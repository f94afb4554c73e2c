"""Metrics of sets of samples: the best set by each metric, curves over steps and over guidance, and a table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reporting.pictures import encode_pictures
from reporting.runs import Run, Samples, direction, format_interval, format_recipe, preferred
from reporting.values import finite

MAX_PICTURES = 4  # of sets of samples
MAX_ROWS = 300  # of a table of metrics


@dataclass(frozen=True)
class SampleSet:
    """A set of samples, and the run that it is of."""

    run: str
    samples: Samples

    def describe(self, with_run: bool) -> str:
        """Run, step, guidance, solver."""
        samples = self.samples
        parts = [self.run] if with_run else []
        parts += [f"step {samples.step:,}"] if samples.step >= 0 else []
        guided = f"guidance {samples.scale:g} on {format_interval(samples)}"
        parts.append("no guidance" if samples.scale == 1 else guided)
        solver, num_steps = samples.settings.get("sampler", "unknown solver"), samples.settings.get("num_steps")
        return ", ".join([*parts, f"{solver}, {num_steps} steps"])


def all_sets(runs: list[Run], others: list[Samples]) -> list[SampleSet]:
    sets = [SampleSet(run.name, samples) for run in runs for samples in run.samples]
    return sets + [SampleSet(source_of(samples), samples) for samples in others]


def source_of(samples: Samples) -> str:
    """The run, or else the file, of samples that are from none of the runs on the page."""
    if not samples.checkpoint:
        return str(samples.path)
    path = Path(samples.checkpoint)
    return str(path.parent.parent if path.parent.name == "checkpoints" else path)


def metrics_section(runs: list[Run], others: list[Samples]) -> dict[str, Any]:
    """What the page tells of metrics, by groups of sets that are comparable: of one reference and number of images."""
    sets = all_sets(runs, others)
    groups: dict[tuple, list[SampleSet]] = {}
    for one in sets:
        if one.samples.metrics:
            groups.setdefault((one.samples.reference, one.samples.settings.get("num_samples")), []).append(one)
    several_runs = len({one.run for one in sets}) > 1
    return {
        "groups": [
            {"reference": reference, "num_samples": num_samples, **group_section(group, several_runs)}
            for (reference, num_samples), group in sorted(groups.items(), key=lambda item: -len(item[1]))
        ],
        "waiting": [str(one.samples.path) for one in sets if not one.samples.metrics],
        "warnings": list(dict.fromkeys(warning for one in sets for warning in one.samples.warnings)),
    }


def group_section(group: list[SampleSet], several_runs: bool) -> dict[str, Any]:
    """Of sets that are comparable: the best, the charts, the rows of the table."""
    names = list(dict.fromkeys(name for one in group for name in one.samples.metrics))

    # The best set by each metric that has a direction.
    best = {
        name: max(
            (one for one in group if name in one.samples.metrics),
            key=lambda one, name=name: direction(name) * one.samples.metrics[name],
        )
        for name in names
        if direction(name) and len(group) > 1
    }
    main = preferred(best)

    # A chart where there is more than one point on a line.
    charts = []
    for name in names:
        hint = {-1: ", lower is better", 1: ", higher is better", 0: ""}[direction(name)]
        for x, series in (("step", over_steps(group, name)), ("guidance scale", over_guidance(group, name))):
            if any(len(set(line["x"])) > 1 for line in series):
                charts.append({"title": f"{name} over {x}{hint}", "x": x, "series": series})

    return {
        "sets": group,
        "names": names,
        "main": main,
        "best": {
            name: {"value": one.samples.metrics[name], "place": one.describe(several_runs)}
            for name, one in best.items()
        },
        "also_best": [name for name in best if name != main and best[name] is best[main]],
        "charts": charts,
        "rows": [table_row(one, [name for name in best if best[name] is one]) for one in group[:MAX_ROWS]],
    }


def table_row(one: SampleSet, best: list[str]) -> dict[str, Any]:
    samples = one.samples
    settings = [samples.step if samples.step >= 0 else None, f"{samples.scale:g}", format_interval(samples)]
    settings += [samples.settings.get(name) for name in ("sampler", "num_steps")]
    return {"run": one.run, "settings": settings, "metrics": samples.metrics, "best": best}


def over_steps(group: list[SampleSet], metric: str) -> list[dict[str, Any]]:
    """A line per run and recipe of sampling: the metric against steps of training."""
    lines: dict[tuple, list[tuple[float, float]]] = {}
    for one in group:
        if metric in one.samples.metrics and one.samples.step >= 0:
            key = (one.run, "", "", one.samples.recipe())
            lines.setdefault(key, []).append((one.samples.step, one.samples.metrics[metric]))
    return chart_series(lines)


def over_guidance(group: list[SampleSet], metric: str) -> list[dict[str, Any]]:
    """A line per run, step, interval and recipe: the metric against the guidance scale.

    Without guidance (scale 1) there is no interval: that point belongs to the lines of all intervals.
    """
    lines: dict[tuple, list[tuple[float, float]]] = {}
    unguided: dict[tuple, list[tuple[float, float]]] = {}
    for one in group:
        samples = one.samples
        if metric not in samples.metrics:
            continue
        point = samples.scale, samples.metrics[metric]
        recipe = samples.recipe(without=("guidance_scale", "guidance_interval"))
        place = one.run, f"step {samples.step:,}"
        if samples.scale == 1:
            unguided.setdefault((*place, recipe), []).append(point)
        else:
            lines.setdefault((*place, format_interval(samples), recipe), []).append(point)
    for (run, step, recipe), points in unguided.items():
        own = [key for key in lines if (key[0], key[1], key[3]) == (run, step, recipe)]
        for key in own or [(run, step, "", recipe)]:
            lines.setdefault(key, []).extend(points)
    return chart_series(lines)


def chart_series(lines: dict[tuple, list[tuple[float, float]]]) -> list[dict[str, Any]]:
    """Series of a chart from (run, step, interval, recipe) -> points. Labels hold what differs between the lines."""
    differs = [len({key[place] for key in lines}) > 1 for place in range(3)]
    recipes = [key[3] for key in lines]
    series = []
    for color, (key, points) in enumerate(lines.items()):
        parts = [text for text, shown in zip(key[:3], differs, strict=True) if shown and text]
        parts += [text for text in [format_recipe(key[3], recipes)] if text]
        x, y = zip(*sorted(points), strict=True)
        series.append({"label": ", ".join(parts), "x": x, "y": [finite(value) for value in y], "color": color})
    return series


def pictures_section(runs: list[Run], others: list[Samples], characters: int) -> dict[str, Any]:
    """Pictures of the sets of the latest steps."""
    having = sorted((one for one in all_sets(runs, others) if one.samples.picture), key=lambda one: -one.samples.step)
    wanted = having[:MAX_PICTURES]
    encoded = encode_pictures([one.samples.picture for one in wanted], characters)
    shown = [
        {"caption": f"{one.run}: {one.describe(False)}", "step": max(0, one.samples.step), "image": image}
        for one, image in zip(wanted, encoded, strict=True)
        if image
    ]
    return {"shown": shown, "wanted": len(wanted), "total": len(having)}
