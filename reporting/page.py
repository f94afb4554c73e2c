"""One HTML file about one or several runs: curves, samples over time, metrics, settings, where it all comes from.

The file needs nothing beside it: style, script, numbers and pictures are in it, and a policy in its head forbids
everything else, scripts other than ours among it. Whatever comes from files is escaped.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import io
import json
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from reporting.runs import Run, Samples, direction, evenly, hours, interval_words, preferred, read_runs, recipe_words
from runtime import provenance

MAX_RUNS = 32
MAX_POINTS = 2000  # of a curve
MAX_NUMBERS = 80_000  # of all curves: 1.6 MB
MAX_GRIDS = 48  # of all runs; of one half of it, as training waits for them to be read
MAX_PICTURES = 4  # of sets of samples
MAX_LINES = 300  # of the table of metrics
IMAGE_BYTES = 2_600_000  # of all pictures as text
# Side and JPEG quality of a picture, the first that the room allows.
ENCODINGS = ((512, 85), (512, 70), (384, 75), (384, 60), (256, 70), (256, 50), (160, 60), (128, 40))
LOSSES = {"loss": "total loss", "velocity": "velocity loss"}
OTHERS = {
    "grad_norm": "gradient norm before clipping",
    "images_per_second": "speed, images a second",
    "memory_gib": "largest memory, GiB",
    "skipped_steps": "steps not applied, by row",
    "spikes": "spikes of the gradient, by row",
}


def write_report(run_dirs: Sequence[Path], output: Path, samples: Sequence[Path] = ()) -> Path:
    """Write the page, under a temporary name first.

    Args:
        run_dirs: folders of runs, finished or not.
        output: the file.
        samples: further sets of samples: their folders, or the files with their figures.

    Returns:
        `output`.

    Raises:
        ValueError: a folder is no run, a file in it is damaged, or `output` cannot be written.
    """
    if not 1 <= len(run_dirs) <= MAX_RUNS:
        raise ValueError(f"expected 1 to {MAX_RUNS} runs for a page, found {len(run_dirs)}; name fewer")
    runs, others = read_runs(run_dirs, samples)
    output = Path(output)
    partial = output.with_name(f".{output.name}.partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(render(runs, others).encode("utf-8", "replace"))
        os.replace(partial, output)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ValueError(f"--output: cannot write {output} ({error.strerror}); choose another place") from error
    return output


def render(runs: list[Run], others: list[Samples]) -> str:
    """The page. `others` are sets of samples that come from none of the runs."""
    here = Path(__file__)
    style, script = (here.with_suffix(suffix).read_text() for suffix in (".css", ".js"))
    data: dict[str, Any] = {"runs": [], "charts": [], "grid_steps": []}
    title = ", ".join(run.name for run in runs[:4]) + (f" and {len(runs) - 4} others" if len(runs) > 4 else "")
    body = [
        f"<header><h1>{_escape(title)}</h1>",
        f'<p class="quiet">Written {_escape(provenance.now())}</p></header>',
        _overview(runs),
        _grids(runs, data),
        _curves(runs, data),
        _metrics(runs, others, data),
        _settings(runs),
        _origin(runs),
    ]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return "\n".join([
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_escape(title)}</title>",
        f"<style>\n{style}</style></head><body>",
        *body,
        f'<script type="application/json" id="data">{_embed(data)}</script>',
        f"<script>{script}</script>",
        "</body></html>\n",
    ])  # fmt: skip


def _escape(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _embed(data: Any) -> str:
    """JSON that cannot end the element it stands in: no "<" is left."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _number(value: Any) -> Any:
    """A number of the log for JSON, which has no NaN; None for all that is no number."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return value if known else None


def format_number(value: Any, unit: str = "") -> str:
    """A number to be read; the log's NaN are those of steps that were not applied."""
    if value is None:
        return "–"
    if not isinstance(value, (int, float)):
        return _escape(value)
    if not math.isfinite(value):
        return "not finite"
    text = f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{text}{unit}"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]], head_column: bool = True) -> str:
    """Cells are HTML already; one that begins with `<t` brings its own element."""

    def cell(text: str, index: int) -> str:
        name = "th" if index == 0 and head_column else "td"
        return text if text.startswith("<td") else f"<{name}>{text}</{name}>"

    body = "\n".join(f"<tr>{''.join(cell(text, index) for index, text in enumerate(line))}</tr>" for line in lines)
    top = f"<thead><tr>{''.join(f'<th>{text}</th>' for text in head)}</tr></thead>" if head else ""
    return f'<div class="table"><table>{top}<tbody>{body}</tbody></table></div>'


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"


def _overview(runs: list[Run]) -> str:
    """What each run has come to."""
    columns = {}
    for run in runs:
        last = run.rows[-1] if run.rows else {}
        asked = run.settings.get("max_train_steps")
        facts = {
            "steps": f"{format_number(last.get('step'))} of {format_number(asked)}"
            if run.rows
            else "no rows in the log yet"
        }
        if run.rows:
            facts |= {_title(name): format_number(last.get(name)) for name in _terms(runs)}
            facts["epochs"] = format_number(last.get("epoch"))
            facts["gradient norm"] = format_number(last.get("grad_norm"))
            facts["images a second"] = format_number(last.get("images_per_second"))
            facts["memory"] = format_number(last.get("memory_gib"), " GiB")
            if run.settings.get("batch_size"):
                facts["time in training steps"] = _duration(3600 * hours(run.rows, run.settings["batch_size"])[-1])
            left = _number(last.get("eta_seconds"))
            if left and asked and last["step"] < asked:
                facts["time left"] = _duration(left)
            for name, words in (("skipped_steps", "steps not applied"), ("spikes", "spikes of the gradient")):
                facts[words] = format_number(sum(_number(row.get(name)) or 0 for row in run.rows))
        facts["checkpoints"] = ", ".join(f"{step:,}" for step in evenly(run.checkpoints, 6)) or "none yet"
        if len(run.checkpoints) > 6:
            facts["checkpoints"] += f" (6 of {len(run.checkpoints)})"
        facts["samples"] = f"{_count(len(run.grids), 'grid')}, {_count(len(run.samples), 'set')}"
        columns[run.name] = facts
    names = list(dict.fromkeys(name for facts in columns.values() for name in facts))
    lines = [[_escape(name), *(facts.get(name, "–") for facts in columns.values())] for name in names]
    head = ["", *map(_escape, columns)] if len(runs) > 1 else []
    return f"<h2>Where it stands</h2>{_table(head, lines)}"


def _terms(runs: list[Run]) -> list[str]:
    """The losses' columns: total, velocity, and each alignment term."""
    found = {name for run in runs for row in run.rows for name in row}
    return [name for name in LOSSES if name in found] + sorted(name for name in found if name.startswith("align_"))


def _title(column: str) -> str:
    return LOSSES.get(column) or OTHERS.get(column) or f"alignment loss, {column.removeprefix('align_')}"


def thinned(rows: list[dict[str, float]], count: int) -> list[dict[str, float]]:
    """At most `count` rows, the first and last among them; rows with an event stay before others do.

    An event is a step that was not applied, a spike, or a number that is not finite.
    """
    if len(rows) <= count:
        return rows
    events = [
        index
        for index, row in enumerate(rows)
        if row.get("skipped_steps") or row.get("spikes") or _number(row.get("loss", 0)) is None
    ]
    kept = set(evenly(events, max(1, count // 2))) if events else set()
    kept |= set(evenly(range(len(rows)), count - len(kept)))
    return [rows[index] for index in sorted(kept)]


def _curves(runs: list[Run], data: dict[str, Any]) -> str:
    """Puts the rows of the logs, and their charts, into `data`."""
    found = {name for run in runs for row in run.rows for name in row}
    shown = _terms(runs) + [name for name in OTHERS if name in found]
    total = sum(len({name for row in run.rows for name in row} & {*shown, "step"}) for run in runs)
    limit = min(MAX_POINTS, MAX_NUMBERS // max(1, total))
    notes, events = [], 0
    for run in runs:
        rows = thinned(run.rows, limit)
        if len(rows) < len(run.rows):
            notes.append(
                f"{run.name}: {len(rows):,} of {len(run.rows):,} rows are drawn, evenly chosen; the last one, and rows "
                f"with steps that were not applied, stay."
            )
        own = {name for row in run.rows for name in row}
        columns = {name: [_number(row.get(name)) for row in rows] for name in ("step", *shown) if name in own}
        data["runs"].append({"name": run.name, "columns": columns})
        events += sum(bool(row.get("skipped_steps") or row.get("spikes")) for row in run.rows)
    figures = []
    for name in shown:
        if name in ("skipped_steps", "spikes") and not any(row.get(name) for run in runs for row in run.rows):
            continue
        having = [index for index, run in enumerate(data["runs"]) if name in run["columns"]]
        series = [
            {"label": runs[index].name if len(runs) > 1 else "", "run": index, "column": name, "color": index}
            for index in having
        ]
        figures.append(_chart(data, _title(name), "step", series))
    if not figures:
        return '<h2>Curves</h2><p class="quiet">No rows in the log yet.</p>'
    control = (
        '<div class="controls"><label for="smoothing">smoothing</label>'
        '<input type="range" id="smoothing" min="0" max="0.99" step="0.01" value="0"><output>none</output></div>'
    )
    said = "".join(f'<p class="quiet">{_escape(note)}</p>' for note in notes)
    if not events:
        said += '<p class="quiet">Every step was applied, and no spike was seen.</p>'
    return f'<h2>Curves</h2>{control}{said}<div class="cards">{"".join(figures)}</div>'


def _chart(data: dict[str, Any], title: str, x: str, series: list[dict[str, Any]]) -> str:
    """Puts a chart into `data`; returns the place where the script draws it."""
    data["charts"].append({"title": title, "x": x, "series": series})
    return (
        f'<figure class="card" data-chart="{len(data["charts"]) - 1}" data-scale="linear"><figcaption>'
        f'<span>{_escape(title)}</span><button type="button" title="scale of the vertical axis">linear</button>'
        f'</figcaption><div class="plot"></div><ul class="legend"></ul></figure>'
    )


def encode_picture(path: Path, room: int) -> tuple[str, bool] | None:
    """A picture as a data URI of at most about `room` characters, and whether it is a small one that is shown enlarged.

    None if it cannot be read.
    """
    from PIL import Image

    try:
        with Image.open(path) as file:
            side = max(file.size)
            image = file.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # what Pillow raises for damaged files
        return None
    room = room * 3 // 4 - 64  # bytes before they become text
    small = side <= 256
    if small:
        content = _encoded(image, "PNG")
        if len(content) <= room:
            return _data_uri(content, "png"), small
    resized = None, image
    for limit, quality in ENCODINGS:
        if limit**2 / 20 > room:  # no picture of this side can be so small
            continue
        if resized[0] != limit:
            shrunk = image.copy()
            shrunk.thumbnail((limit, limit), Image.Resampling.LANCZOS, reducing_gap=2.0)
            resized = limit, shrunk
        content = _encoded(resized[1], "JPEG", quality=quality)
        if len(content) <= room:
            break
    return _data_uri(content, "jpeg"), small


def _encoded(image: Any, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _encode_all(paths: Sequence[Path], room: int) -> list[tuple[str, bool] | None]:
    """Each picture within its share of `room`; in threads, as Pillow computes beside the interpreter."""
    share = room // max(1, len(paths))
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda path: encode_picture(path, share), paths))


def chosen_steps(runs: list[Run], limit: int) -> list[int]:
    """Steps whose grids are shown: at most `limit`, evenly chosen; those that all runs have come first."""
    union = sorted({step for run in runs for step in run.grids})
    shared = [step for step in union if all(step in run.grids for run in runs)]
    rest = [step for step in union if step not in shared]
    if len(union) <= limit or not shared:
        return evenly(union, limit)
    first = evenly(shared, limit if not rest else max(1, limit * 3 // 4))
    return sorted(first + (evenly(rest, limit - len(first)) if len(first) < limit else []))


def _grids(runs: list[Run], data: dict[str, Any]) -> str:
    """Samples over time: a slider over the steps, a picture of each run."""
    if not any(run.grids for run in runs):
        return (
            '<h2>Samples over time</h2><p class="quiet">No samples yet: train.py draws them every --sampling-steps.</p>'
        )
    steps = chosen_steps(runs, max(2, MAX_GRIDS // max(2, len(runs))))
    start = max(steps, key=lambda step: (sum(step in run.grids for run in runs), step))
    wanted = [(run, step) for run in runs for step in steps if step in run.grids]
    encoded = dict(
        zip(
            [(run.name, step) for run, step in wanted],
            _encode_all([run.grids[step] for run, step in wanted], IMAGE_BYTES),
            strict=True,
        )
    )
    data["grid_steps"] = steps
    figures = []
    for run in runs:
        pictures = []
        for step in steps:
            uri, small = encoded.get((run.name, step)) or ("", False)
            if uri:
                pictures.append(_image(run.name, step, uri, small, step == start))
        found = encoded.get((run.name, start)) is not None
        figures.append(
            f'<figure class="card" data-grids><figcaption>{_escape(run.name)}</figcaption>{"".join(pictures)}'
            f'<p class="quiet missing"{" hidden" if found else ""}>No grid of this step.</p></figure>'
        )
    total = len({step for run in runs for step in run.grids})
    notes = [f"{len(steps)} of {total:,} steps are shown, evenly chosen."] if len(steps) < total else []
    broken = [run.grids[step] for run, step in wanted if encoded[run.name, step] is None]
    if broken:
        notes.append(f"{len(broken)} pictures cannot be read, the first of them {broken[0]}.")
    said = "".join(f'<p class="quiet">{_escape(note)}</p>' for note in notes)
    return (
        f'<h2>Samples over time</h2><div class="controls"><input type="range" id="slider" aria-label="step" min="0" '
        f'max="{len(steps) - 1}" value="{steps.index(start)}"><output>step {start:,}</output></div>{said}'
        f'<div class="grids{" one" if len(runs) == 1 else ""}">{"".join(figures)}</div>'
    )


def _image(name: str, step: int, uri: str, small: bool, shown: bool) -> str:
    attributes = ('class="small"' if small else "") + ("" if shown else " hidden")
    return f'<img {attributes} data-step="{step}" alt="{_escape(name)} at step {step:,}" src="{uri}">'


@dataclasses.dataclass(frozen=True)
class Measured:
    """A set of samples with figures, and the run it is of."""

    run: str
    samples: Samples


def _metrics(runs: list[Run], others: list[Samples], data: dict[str, Any]) -> str:
    """Figures of sets of samples: which is best by each metric, curves over steps and over guidance, and a table."""
    every = [Measured(run.name, samples) for run in runs for samples in run.samples]
    every += [Measured(_origin_of(samples), samples) for samples in others]
    parts = ["<h2>Metrics</h2>"]
    measured = [item for item in every if item.samples.metrics]
    if not measured:
        parts.append(
            '<p class="quiet">No samples were measured: sample_ddp.py --evaluate, or python -m evaluations.evaluate.'
            "</p>"
        )
    # Figures are comparable at one reference and one number of images alone.
    groups: dict[tuple, list[Measured]] = {}
    for item in measured:
        groups.setdefault((item.samples.reference, item.samples.settings.get("num_samples")), []).append(item)
    for (reference, count), group in sorted(groups.items(), key=lambda item: -len(item[1])):
        parts.append(f"<p>{format_number(count)} images against {_escape(reference)}, {_count(len(group), 'set')}.</p>")
        parts += _group(group, data, len({item.run for item in every}) > 1)
    waiting = [item for item in every if not item.samples.metrics]
    if waiting:
        parts.append(
            f'<p class="quiet">{_count(len(waiting), "set")} of samples without figures: '
            f"{_escape(', '.join(str(item.samples.path) for item in waiting[:3]))}"
            f"{' and others' if len(waiting) > 3 else ''}.</p>"
        )
    for warning in dict.fromkeys(warning for item in every for warning in item.samples.warnings):
        parts.append(f'<p class="note">{_escape(warning)}</p>')
    parts.append(_pictures(every))
    return "".join(parts)


def _origin_of(samples: Samples) -> str:
    """Run, in words, of samples that are from none of the runs on the page."""
    if not samples.checkpoint:
        return str(samples.path)
    path = Path(samples.checkpoint)
    return str(path.parent.parent if path.parent.name == "checkpoints" else path)


def _best(group: list[Measured]) -> dict[str, Measured]:
    """The set with the best value of each metric that has a direction."""
    names = list(dict.fromkeys(name for item in group for name in item.samples.metrics if direction(name)))
    return {
        name: max(
            (item for item in group if name in item.samples.metrics),
            key=lambda item: direction(name) * item.samples.metrics[name],
        )
        for name in names
    }


def _where(item: Measured, several: bool) -> str:
    """A set in words: run, step, guidance, solver."""
    samples = item.samples
    words = [item.run] if several else []
    words += [f"step {samples.step:,}"] if samples.step >= 0 else []
    guidance = f"guidance {samples.scale:g}" if samples.scale != 1 else "no guidance"
    words.append(guidance + (f" on {interval_words(samples)}" if samples.scale != 1 else ""))
    words.append(f"{samples.settings.get('sampler', 'unknown solver')}, {samples.settings.get('num_steps')} steps")
    return ", ".join(words)


def _group(group: list[Measured], data: dict[str, Any], several: bool) -> list[str]:
    """Of sets that are comparable: the best, the charts, the table."""
    best, parts = _best(group), []
    main = preferred(best)
    if main and len(group) > 1:
        value = best[main].samples.metrics[main]
        text = f"<strong>Best by {_escape(main)}: {value:.4g}</strong> with {_escape(_where(best[main], several))}."
        alike = [name for name in best if name != main and best[name] is best[main]]
        if alike:
            text += f" It is also the best by {_escape(', '.join(alike))}."
        for name in best:
            if best[name] is not best[main]:
                figure, where = best[name].samples.metrics[name], _where(best[name], several)
                text += f" By {_escape(name)}: {figure:.4g} with {_escape(where)}."
        parts.append(f"<p>{text}</p>")
    names = list(dict.fromkeys(name for item in group for name in item.samples.metrics))
    figures = []
    for name in names:
        arrow = {-1: ", lower is better", 1: ", higher is better", 0: ""}[direction(name)]
        for x, series in (("step", over_steps(group, name)), ("guidance scale", over_guidance(group, name))):
            if any(len(set(one["x"])) > 1 for one in series):
                figures.append(_chart(data, f"{name} over {x}{arrow}", x, series))
    if figures:
        parts.append(f'<div class="cards">{"".join(figures)}</div>')
    parts.append(_metrics_table(group, names, best if len(group) > 1 else {}))
    return parts


def _lines(groups: dict[tuple, list[tuple[float, float]]]) -> list[dict[str, Any]]:
    """Series of a chart from (run, words..., recipe) -> points. Labels hold what differs between the lines."""
    shown = [len({key[place] for key in groups}) > 1 for place in range(3)]
    recipes = [key[3] for key in groups]
    series = []
    for color, (key, points) in enumerate(groups.items()):
        words = [text for text, wanted in zip(key[:3], shown, strict=True) if wanted and text]
        extra = recipe_words(key[3], recipes)
        points = sorted(points)
        series.append(
            {"label": ", ".join([*words, *([extra] if extra else [])]), "x": [x for x, _ in points],
             "y": [_number(y) for _, y in points], "color": color}
        )  # fmt: skip
    return series


def over_steps(group: list[Measured], metric: str) -> list[dict[str, Any]]:
    """A line per run and way of sampling: the metric against steps of training."""
    groups: dict[tuple, list[tuple[float, float]]] = {}
    for item in group:
        samples = item.samples
        if metric in samples.metrics and samples.step >= 0:
            key = (item.run, "", "", samples.recipe())
            groups.setdefault(key, []).append((samples.step, samples.metrics[metric]))
    return _lines(groups)


def over_guidance(group: list[Measured], metric: str) -> list[dict[str, Any]]:
    """A line per run, step, interval and solver: the metric against the guidance scale.

    Without guidance (scale 1) there is no interval: that point belongs to the lines of all intervals.
    """
    groups: dict[tuple, list[tuple[float, float]]] = {}
    unguided: dict[tuple, list[tuple[float, float]]] = {}
    for item in group:
        samples = item.samples
        if metric not in samples.metrics:
            continue
        point = samples.scale, samples.metrics[metric]
        rest = samples.recipe(without=("guidance_scale", "guidance_interval"))
        place = item.run, f"step {samples.step:,}"
        if samples.scale == 1:
            unguided.setdefault((*place, rest), []).append(point)
        else:
            groups.setdefault((*place, interval_words(samples), rest), []).append(point)
    for (run, step, rest), points in unguided.items():
        lines = [key for key in groups if (key[0], key[1], key[3]) == (run, step, rest)]
        for key in lines or [(run, step, "", rest)]:
            groups.setdefault(key, []).extend(points)
    return _lines(groups)


def _metrics_table(group: list[Measured], names: list[str], best: dict[str, Measured]) -> str:
    lines = []
    for item in group[:MAX_LINES]:
        samples = item.samples
        cells = [_escape(item.run), format_number(samples.step) if samples.step >= 0 else "–", f"{samples.scale:g}",
                 _escape(interval_words(samples)), _escape(samples.settings.get("sampler")),
                 _escape(samples.settings.get("num_steps"))]  # fmt: skip
        for name in names:
            text = format_number(samples.metrics.get(name))
            cells.append(f'<td class="best">{text}</td>' if best.get(name) is item else text)
        lines.append(cells)
    head = ["run", "step", "guidance", "guided on", "solver", "solver's steps", *map(_escape, names)]
    table = _table(head, lines)
    if len(group) > MAX_LINES:
        table += f'<p class="quiet">The first {MAX_LINES} of {len(group):,} sets.</p>'
    return table if len(lines) <= 12 else f"<details><summary>All {len(lines)} sets</summary>{table}</details>"


def _pictures(every: list[Measured]) -> str:
    """Pictures of the sets of the latest steps."""
    having = sorted((item for item in every if item.samples.picture), key=lambda item: -item.samples.step)
    shown = having[:MAX_PICTURES]
    figures = []
    encoded = _encode_all([item.samples.picture for item in shown], IMAGE_BYTES // 4)
    for item, found in zip(shown, encoded, strict=True):
        if found:
            uri, small = found
            caption = _escape(f"{item.run}: {_where(item, False)}")
            figures.append(
                f'<figure class="card"><figcaption>{caption}</figcaption>'
                f"{_image(item.run, max(0, item.samples.step), uri, small, True)}</figure>"
            )
    if not figures:
        return ""
    more = f'<p class="quiet">{len(shown)} of {len(having)} sets, of the latest steps.</p>'
    more = more if len(having) > len(shown) else ""
    return f'<h2>Sets of samples</h2>{more}<div class="grids">{"".join(figures)}</div>'


def _settings(runs: list[Run]) -> str:
    """Flags of training by their groups, folded; of several runs first those that differ."""
    from training.config import TrainConfig

    groups: dict[str, list[str]] = {}
    known = {field.name: field.metadata["group"] for field in dataclasses.fields(TrainConfig)}
    for name in (*known, *(name for run in runs for name in run.settings)):
        names = groups.setdefault(known.get(name, "others"), [])
        if name not in names and any(name in run.settings for run in runs):
            names.append(name)
    parts = ["<h2>Settings</h2>"]
    if not any(run.settings for run in runs):
        return parts[0] + '<p class="quiet">Not recorded.</p>'
    if len(runs) > 1:
        differing = [
            name
            for names in groups.values()
            for name in names
            if len({json.dumps(run.settings.get(name)) for run in runs}) > 1
        ]
        lines = [[_flag(name), *(_value(run.settings.get(name)) for run in runs)] for name in differing]
        parts.append(_table(["", *(_escape(run.name) for run in runs)], lines) if lines else "<p>All alike.</p>")
    for run in runs:
        tables = [
            f"<h3>{_escape(title)}</h3>"
            + _table([], [[_flag(name), _value(run.settings[name])] for name in names if name in run.settings])
            for title, names in groups.items()
            if any(name in run.settings for name in names)
        ]
        heading = "All settings" if len(runs) == 1 else f"All settings of {_escape(run.name)}"
        parts.append(f'<details><summary>{heading}</summary><div class="cards settings">')
        parts += [f"<div>{table}</div>" for table in tables]
        parts.append("</div></details>")
    return "".join(parts)


def _flag(name: str) -> str:
    return _escape("--" + name.replace("_", "-"))


def _value(value: Any) -> str:
    text = " ".join(map(str, value)) if isinstance(value, list) else "not set" if value is None else str(value)
    return f'<td class="long">{_escape(text[:300])}</td>'


def _origin(runs: list[Run]) -> str:
    """Versions, revision, machine, dates, digests."""
    columns = {}
    for run in runs:
        state, initial = run.state, run.record.get("initial") or run.state.get("initial")
        record = state | run.record
        facts = {"folder": run.folder.resolve(), "last started": record.get("date"), "machine": record.get("machine"),
                 "processes": record.get("processes"), "git revision": record.get("git_revision"),
                 "data digest": record.get("data_digest")}  # fmt: skip
        if isinstance(initial, dict):
            facts["started from"] = f"{initial.get('source')} ({initial.get('read_as')})"
        facts["VAE"] = state.get("vae")
        facts["VAE digest"] = state.get("vae_digest")
        if isinstance(state.get("scale"), dict):
            facts["latent scale"] = f"{state['scale'].get('scale')}, shift {state['scale'].get('shift')}"
        classes = state.get("class_names") or []
        if classes:
            more = f", ... ({len(classes):,} in all)" if len(classes) > 8 else ""
            facts["classes"] = ", ".join(map(str, classes[:8])) + more
        facts |= {f"version of {name}": value for name, value in (record.get("versions") or {}).items()}
        columns[run.name] = {name: value for name, value in facts.items() if value is not None}
    names = list(dict.fromkeys(name for facts in columns.values() for name in facts))
    lines = [[_escape(name), *(_value(facts.get(name)) for facts in columns.values())] for name in names]
    head = ["", *map(_escape, columns)] if len(runs) > 1 else []
    digests = {run.record.get("data_digest") for run in runs if run.record.get("data_digest")}
    warning = '<p class="note">These runs were trained on different data.</p>' if len(digests) > 1 else ""
    return f"<h2>Where it comes from</h2>{warning}{_table(head, lines)}"
