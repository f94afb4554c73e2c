"""One HTML file about one or several runs: status, samples over time, curves, metrics, settings, provenance.

The file needs nothing beside it: style, script, data and pictures are in it, and a policy in its head forbids
everything else, other scripts included. The page itself is `templates/report.html`; here are the values that it shows.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reporting.metrics import describe, metrics_section, pictures_section
from reporting.pictures import encode_pictures
from reporting.render import TEMPLATES, render, write_result
from reporting.runs import Run, Samples, hours, read_runs
from reporting.values import count, evenly, finite, format_number, listed
from runtime import provenance

MAX_RUNS = 32
MAX_POINTS = 2000  # of a curve
MAX_NUMBERS = 80_000  # of all curves: 1.6 MB
MAX_GRIDS = 48  # of all runs; of one half of it, as training waits for them to be read
IMAGE_CHARACTERS = 2_600_000  # of all grids as text; the sets of samples may have a quarter of it beside them
LOSSES = {"loss": "total loss", "velocity": "velocity loss"}
OTHERS = {
    "grad_norm": "gradient norm before clipping",
    "images_per_second": "speed, images a second",
    "memory_gib": "largest memory, GiB",
    "skipped_steps": "steps not applied, by row",
    "spikes": "spikes of the gradient, by row",
}


def write_report(run_dirs: Sequence[Path], output: Path, samples: Sequence[Path] = ()) -> Path:
    """Write the page; a reader sees all of it or none.

    Args:
        run_dirs: directories of runs, finished or not.
        output: the file.
        samples: further sets of samples: their directories, or their metrics.json.

    Returns:
        `output`.

    Raises:
        ValueError: a directory is no run, a file in it is damaged, or `output` cannot be written.
    """
    if not 1 <= len(run_dirs) <= MAX_RUNS:
        raise ValueError(f"expected 1 to {MAX_RUNS} runs for a page, found {len(run_dirs)}; name fewer")
    runs, others = read_runs(run_dirs, samples)
    write_result(output, page_of(runs, others).encode("utf-8", "replace"), "--output")
    return Path(output)


def page_of(runs: list[Run], others: list[Samples]) -> str:
    """The page. `others` are sets of samples that come from none of the runs."""
    sets = [samples for run in runs for samples in run.samples] + others
    grids = grids_section(runs)
    columns, curves = curves_section(runs)
    metrics = metrics_section(sets)
    charts = curves["charts"] + [chart for group in metrics["groups"] for chart in group["charts"]]
    for index, chart in enumerate(charts):
        chart["index"] = index

    script = (TEMPLATES / "report.js").read_text()
    functions = {"describe": describe, "number": format_number, "setting": format_setting, "count": count}
    functions["row_names"] = lambda columns: dict.fromkeys(name for facts in columns.values() for name in facts)
    return render(
        "report.html",
        written=provenance.now(),
        style=(TEMPLATES / "report.css").read_text(),
        script=script,
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        # What the script draws: the rows of each log once, and what each chart shows of them.
        data={"runs": columns, "charts": charts, "grid_steps": grids["steps"] if grids else []},
        # The sections, in order.
        status={run.name: status(run, loss_columns(runs)) for run in runs},
        grids=grids,
        curves=curves,
        metrics=metrics,
        pictures=pictures_section(sets, IMAGE_CHARACTERS // 4),
        settings=settings_section(runs),
        provenance={run.name: provenance_facts(run) for run in runs},
        several_runs=len({one.run for one in sets}) > 1,
        several_data_sets=len({run.record.get("data_digest") for run in runs} - {None}) > 1,
        **functions,
    )


def status(run: Run, losses: list[str]) -> dict[str, Any]:
    """How far a run has come, and its latest values."""
    last = run.rows[-1] if run.rows else {}
    max_steps, batch_size = run.settings.get("max_train_steps"), run.settings.get("batch_size")
    facts = {"steps": "no rows in the log yet"}
    if last:
        facts["steps"] = f"{format_number(last['step'])} of {format_number(max_steps)}"
        facts |= {column_title(name): last.get(name) for name in losses}
        facts |= {"epochs": last.get("epoch"), "gradient norm": last.get("grad_norm")}
        facts |= {"images a second": last.get("images_per_second"), "memory, GiB": last.get("memory_gib")}
        if batch_size:
            facts["time in training steps"] = duration(3600 * hours(run.rows, batch_size)[-1])
        left = finite(last.get("eta_seconds"))
        if left and max_steps and last["step"] < max_steps:
            facts["time left"] = duration(left)
        for name, text in (("skipped_steps", "steps not applied"), ("spikes", "spikes of the gradient")):
            facts[text] = sum(finite(row.get(name)) or 0 for row in run.rows)
    some = f" (6 of {len(run.checkpoints)})" if len(run.checkpoints) > 6 else ""
    facts["checkpoints"] = (", ".join(f"{step:,}" for step in evenly(run.checkpoints, 6)) or "none yet") + some
    facts["samples"] = f"{count(len(run.grids), 'grid')}, {count(len(run.samples), 'set')}"
    return facts


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"


def columns_of(rows: list[dict[str, float]]) -> set[str]:
    return {name for row in rows for name in row}


def loss_columns(runs: list[Run]) -> list[str]:
    """Columns of the logs: total loss, velocity loss, and each alignment term."""
    found = set().union(*(columns_of(run.rows) for run in runs))
    return [name for name in LOSSES if name in found] + sorted(name for name in found if name.startswith("align_"))


def column_title(column: str) -> str:
    return LOSSES.get(column) or OTHERS.get(column) or f"alignment loss, {column.removeprefix('align_')}"


def grids_section(runs: list[Run]) -> dict[str, Any] | None:
    """Grids of samples over time, by run and step, and the step that is shown first."""
    if not any(run.grids for run in runs):
        return None
    steps = choose_steps(runs, max(2, MAX_GRIDS // max(2, len(runs))))
    wanted = {(run.name, step): run.grids[step] for run in runs for step in steps if step in run.grids}
    encoded = dict(zip(wanted, encode_pictures(list(wanted.values()), IMAGE_CHARACTERS), strict=True))
    pictures = {
        run.name: {step: encoded[run.name, step] for step in steps if encoded.get((run.name, step))} for run in runs
    }
    total = len({step for run in runs for step in run.grids})
    broken = [path for key, path in wanted.items() if encoded[key] is None]
    start = max(steps, key=lambda step: (sum(step in run.grids for run in runs), step))
    return {"steps": steps, "start": start, "pictures": pictures, "total": total, "broken": broken}


def choose_steps(runs: list[Run], limit: int) -> list[int]:
    """Steps whose grids are shown: at most `limit`, evenly chosen; those that all runs have come first."""
    union = sorted({step for run in runs for step in run.grids})
    shared = [step for step in union if all(step in run.grids for run in runs)]
    rest = [step for step in union if step not in shared]
    if len(union) <= limit or not shared:
        return evenly(union, limit)
    first = evenly(shared, limit if not rest else max(1, limit * 3 // 4))
    return sorted(first + (evenly(rest, limit - len(first)) if len(first) < limit else []))


def curves_section(runs: list[Run]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of the logs by column, and the charts that show them."""
    found = [columns_of(run.rows) for run in runs]
    events = {name for run in runs for row in run.rows for name in ("skipped_steps", "spikes") if row.get(name)}
    shown = loss_columns(runs)
    shown += [name for name in OTHERS if any(name in own for own in found)]

    # Logs, thinned so that all of them together stay within the limit.
    limit = min(MAX_POINTS, MAX_NUMBERS // max(1, sum(len(own & {*shown, "step"}) for own in found)))
    columns, shortened = [], []
    for run, own in zip(runs, found, strict=True):
        rows = thinned(run.rows, limit)
        if len(rows) < len(run.rows):
            shortened.append((run.name, len(rows), len(run.rows)))
        names = [name for name in ("step", *shown) if name in own]
        columns.append({"name": run.name, "columns": {name: [finite(row.get(name)) for row in rows] for name in names}})

    charts = []
    for name in shown:
        if name in ("skipped_steps", "spikes") and name not in events:
            continue
        series = [
            {"label": run.name if len(runs) > 1 else "", "run": index, "column": name, "color": index}
            for index, run in enumerate(runs)
            if name in found[index]
        ]
        charts.append({"title": column_title(name), "x": "step", "series": series})
    return columns, {"charts": charts, "shortened": shortened, "events": events}


def thinned(rows: list[dict[str, float]], limit: int) -> list[dict[str, float]]:
    """At most `limit` rows, the first and last among them; rows with an event stay before others do.

    An event is a step that was not applied, a spike, or a loss that is not finite.
    """
    if len(rows) <= limit:
        return rows

    def is_event(row: dict[str, float]) -> bool:
        return bool(row.get("skipped_steps") or row.get("spikes")) or finite(row.get("loss", 0)) is None

    events = [index for index, row in enumerate(rows) if is_event(row)]
    kept = set(evenly(events, max(1, limit // 2))) if events else set()
    kept |= set(evenly(range(len(rows)), limit - len(kept)))
    return [rows[index] for index in sorted(kept)]


def settings_section(runs: list[Run]) -> dict[str, Any]:
    """Settings by run and group, and of several runs those that differ."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    differing = [name for name in names if len({json.dumps(run.settings.get(name)) for run in runs}) > 1]
    return {
        "by_run": {run.name: grouped_settings(run) for run in runs if run.settings},
        "differing": {run.name: settings_by_flag(run, differing) for run in runs} if differing else None,
    }


def settings_by_flag(run: Run, names: Sequence[str]) -> dict[str, Any]:
    return {"--" + name.replace("_", "-"): run.settings[name] for name in names if name in run.settings}


def grouped_settings(run: Run) -> dict[str, dict[str, Any]]:
    """A run's settings by the groups of its record; in one group if the record has none."""
    groups = run.record.get("groups") or {}
    grouped = {name for names in groups.values() for name in names}
    groups = groups | {"others" if groups else "settings": [name for name in run.settings if name not in grouped]}
    shown = {heading: settings_by_flag(run, names) for heading, names in groups.items()}
    return {heading: values for heading, values in shown.items() if values}


def format_setting(value: Any) -> str:
    text = " ".join(map(str, value)) if isinstance(value, list) else "not set" if value is None else str(value)
    return text[:300]


def provenance_facts(run: Run) -> dict[str, Any]:
    """Versions, revision, machine, dates, digests."""
    state, record, classes = run.state, run.state | run.record, run.state.get("class_names")
    facts = {"directory": run.directory.resolve(), "last started": record.get("date")}
    facts |= {name.replace("_", " "): record.get(name) for name in "machine processes git_revision data_digest".split()}
    initial, scale = run.record.get("initial") or state.get("initial"), state.get("scale")
    if isinstance(initial, dict):
        facts["started from"] = f"{initial.get('source')} ({initial.get('read_as')})"
    facts |= {"VAE": state.get("vae"), "VAE digest": state.get("vae_digest")}
    if isinstance(scale, dict):
        facts["latent scale"] = f"{scale.get('scale')}, shift {scale.get('shift')}"
    facts["classes"] = listed(classes, 8) if classes else None
    facts |= {f"version of {name}": value for name, value in (record.get("versions") or {}).items()}
    return {name: value for name, value in facts.items() if value is not None}
