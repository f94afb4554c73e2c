"""Writes the README's table of measurements from `benchmarks/results/`, so that no number in it is typed by hand.

python -m benchmarks.table
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- measured: by python -m benchmarks.table -->", "<!-- /measured -->"
# What, name of the result, how it is told, and where the bar is a number in the record: its name there and the bar.
ROWS = (
    ("`make demo`, after installation", "demo/time", "{value:.0f} s", "value <= 480"),
    ("digits that an independent classifier recognises in the demo's samples", "demo/recognised", "{value:.1%}",
     "value >= 0.9"),
    ("loader: SD-VAE moments in random batches of 256, warm, one process", "data/loader",
     "{value:,.0f}/s, {ratio:.1f} times one `.npy` per image", "ratio >= 20"),
    ("start of training with 1,281,167 latents, from the command to the first batch", "train/start", "{value:.1f} s",
     "value <= 5"),
    ("memory of a process that reads them (anonymous)", "train/loader_memory", "{value:.0f} MiB", "value <= 500"),
    ("training step of {model}, batch {batch}, beside a plain loop", "train/step", "{ratio:.2f} times as fast",
     "ratio >= 1.1"),
    ("average of the weights, beside the plain loop's", "train/ema", "{ratio:.2f} times as fast", "ratio >= 1.5"),
    ("alignment loss, beside the plain loop's", "train/alignment_loss", "{ratio:.1f} times as fast", "ratio >= 1.5"),
    ("a save holds training up, beside copying the tensors ({model})", "checkpoint/pause",
     "{ratio:.2f} times, {value:.2f} s", "ratio <= 1.1"),
    ("crop with 2 workers", "data/crop_2_workers", "{value:.0f} images/s, {ratio:.2f} times one worker",
     "ratio >= 1.8"),
    ("memory for the npz of 2,000 images at 256", "sampling/npz_memory", "{value:.0f} MB", "value <= 300"),
    ("FID, sFID, IS, precision, recall, beside the bare network's passes", "evaluations/five-metrics",
     "{value:.2f} times", "value <= 1.1"),
    ("two Fréchet distances (2,048 and 2,023 dimensions)", "evaluations/two-frechet-distances", "{value:.1f} s",
     "value <= 20"),
    ("memory of precision and recall, 10,000 against 50,000", "evaluations/precision-recall-memory", "{value:.1f} GB",
     "value <= 4"),
    ("`train.py --help`, warm", "startup/train_help", "{value:.1f} s", "value <= 3"),
)  # fmt: skip
GPU = (
    ("{model} with its head, batch 32, beside a plain loop", "train/{model}/with-head/batch-32/ours",
     "{images_per_second:.0f} images/s, {times_plain:.1f} times", "600 images/s, 2.3 times"),
    ("{model} with its head, batch 128", "train/{model}/with-head/batch-128/ours",
     "{images_per_second:.0f} images/s, {memory_gib:.0f} GiB", "700 images/s"),
    ("what the head adds to a step of 128", "train/{model}/head_cost/batch-128", "{share_of_step:.1%}", "4.5%"),
    ("sampling {model}, 250 steps, guided on [0, 0.7]", "sample/{model}/ours",
     "{images_per_second:.1f} images/s, {times_plain:.1f} times", "5 images/s, 3 times"),
)  # fmt: skip


def latest() -> dict[str, dict[str, Any]]:
    """The last record of each result."""
    files = sorted(RESULTS.glob("*.jsonl"))
    records = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return {record["name"]: record for record in records}


def met(record: dict[str, Any], bar: str) -> bool:
    """Whether a record keeps a bar such as "ratio >= 1.5"."""
    name, sign, limit = bar.split()
    value = record[name]
    return value >= float(limit) if sign == ">=" else value <= float(limit)


def table() -> str:
    """The table as Markdown, between its marks."""
    records = latest()
    told = [records[name] for _, name, *_ in ROWS]
    machines, days = ({record[key] for record in told} for key in ("machine", "date"))
    first, last = min(days)[:10], max(days)[:10]
    lines = [
        f"On {' and '.join(sorted(machines))}, no GPU, {first if first == last else f'{first} to {last}'}; versions, "
        f"revisions and spread are in `benchmarks/results/`.",
        "",
        "| what | measured | bar |",
        "|---|---|---|",
    ]
    for what, name, form, bar in ROWS:
        record = records[name]
        missed = "" if met(record, bar) else f" (**bar missed**: {record.get('bottleneck', 'see its record')})"
        lines.append(f"| {what.format(**record)} | {form.format(**record)}{missed} | {record['bar']} |")
    lines += _reliability(json.loads((RESULTS / "reliability.json").read_text()))
    gpu = RESULTS / "gpu.json"
    content = json.loads(gpu.read_text()) if gpu.is_file() else {"results": {}, "settings": {"models": ["SiT-XL/2"]}}
    model = content["settings"]["models"][0]
    for what, name, form, bar in GPU:
        found = content["results"].get(name.format(model=model), {})
        shown = form.format(**found) if found and "not_measured" not in found else "not measured"
        lines.append(f"| {what.format(model=model)}, on {content.get('machine', 'one H100')} | {shown} | {bar} |")
    return "\n".join([BEGIN, *lines, END])


def _reliability(found: dict[str, Any]) -> list[str]:
    """Rows of `make bench-faults`."""
    kills = [value for name, value in found.items() if name.startswith("kills_")]
    harm = [value for name, value in found.items() if name.startswith("harm_")]
    soak = found["soak"]
    equal, runs = (sum(value[key] for value in kills) for key in ("equal", "runs"))
    flips, cuts = (
        [sum(value[f"{kind}{end}"] for value in harm) for end in ("", "_found")] for kind in ("flips", "cuts")
    )
    return [
        f"| {sum(value['kills'] for value in kills)} SIGKILLs of training, dumping and sampling at random moments | "
        f"{equal} of {runs} runs ended in the undisturbed bytes | all |",
        f"| single flipped bits, cut files, in a store, a checkpoint, an npz | {flips[1]:,} of {flips[0]:,}, {cuts[1]} "
        f"of {cuts[0]} found | all |",
        f"| {soak['steps']:,} steps with 20 checkpoints and grids: memory, open files, at a fifth and at the end | "
        f"{soak['memory_mib_early']:.0f} and {soak['memory_mib_late']:.0f} MiB, {soak['handles_early']:.0f} and "
        f"{soak['handles_late']:.0f} | flat |",
    ]


def main() -> None:
    text = README.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    README.write_text(before + table() + after)
    print(table())


if __name__ == "__main__":
    main()
