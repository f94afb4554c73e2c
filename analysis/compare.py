"""Compare runs: images of the same noise and classes, curves over steps and hours, steps to the first run's value.

    python -m analysis.compare exps/b2-plain exps/b2
    python -m analysis.compare exps/b2-plain exps/b2 --steps 100000 400000 --classes 207 360 387 974 88 979 417 279

The first run is the baseline. Writes `compare.png` (as Figure 4 of the paper), `curves.png` and `compare.json`, and
prints a table. Metrics are those that sample_ddp.py --evaluate or evaluations.evaluate wrote beside samples; where
there are none, runs are compared by the velocity loss.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it can be started as a file

from analysis.compare_config import CompareConfig
from runtime import cli

if __name__ == "__main__":
    cli.parse_early(CompareConfig, __doc__)  # answers --help and refuses wrong flags before torch is imported

import io
import warnings

from matplotlib.figure import Figure

from analysis.curves import compare_curves, draw_curves, speed_up_table
from analysis.side_by_side import choose_steps, draw_all
from reporting.render import write_result
from reporting.runs import Run, read_json, read_runs
from reporting.values import listed
from runtime import provenance
from runtime.files import to_json


def check_alike(runs: list[Run]) -> None:
    """Refuse runs whose images of one class and noise would not be of one kind.

    Raises:
        ValueError: another resolution, number of classes, latent shape or VAE.
    """
    facts: dict[str, dict[str, str]] = {}
    for run in runs:
        if not run.checkpoints:
            continue
        sit = read_json(run.directory / "checkpoints" / f"{run.checkpoints[-1]:07d}" / "config.json")
        own = {"resolution": run.state.get("resolution"), "number of classes": sit.get("num_classes")}
        own["latent shape"] = tuple(sit.get(name) for name in ("in_channels", "latent_size", "latent_size"))
        own["VAE"] = str(run.state.get("vae_digest"))[:12]
        for name, value in own.items():
            facts.setdefault(name, {})[run.name] = str(value)
    by_run = {name: ", ".join(f"{run}: {value}" for run, value in own.items()) for name, own in facts.items()}
    wrong = [f"{name} ({by_run[name]})" for name, own in facts.items() if len(set(own.values())) > 1]
    if wrong:
        raise ValueError(f"expected runs that can be compared, found other {'; other '.join(wrong)}; leave one out")
    if len({tuple(run.state.get("class_names") or ()) for run in runs if run.checkpoints}) > 1:
        print("warning: the runs' classes have other names; equal numbers may mean other things", file=sys.stderr)


def to_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a name in letters that the font has not: boxes
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def main(argv: list[str] | None = None) -> None:
    config = cli.parse(CompareConfig, argv, __doc__)
    runs, others = read_runs(config.runs, config.samples)
    if others:
        raise ValueError(f"--samples: expected samples of these runs, found {listed([one.path for one in others])}")
    check_alike(runs)
    compared = compare_curves(runs, config.metric)
    if config.images:
        choose_steps(runs, config.steps)  # refused before anything is written

    directory = Path(config.output_dir)
    record = {"runs": {run.name: str(run.directory) for run in runs}, **compared, "images": None}
    figures = {"curves.png": draw_curves(compared, [run.name for run in runs])}
    if config.images:
        figures["compare.png"], record["images"] = draw_all(config, runs)
    for name, figure in figures.items():
        write_result(directory / name, to_png(figure), "--output-dir")
    record |= provenance.stamp()
    write_result(directory / "compare.json", to_json(record), "--output-dir")
    print(f"\n{speed_up_table(compared)}\n\n{directory}: {', '.join(figures)}, compare.json")


if __name__ == "__main__":
    cli.run(main)
