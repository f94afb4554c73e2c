"""The sweep: the paper's table as commands, one run per row and seed, one table of the results."""

import csv
import dataclasses
import subprocess
from pathlib import Path

import pytest

from analysis import sweep
from analysis.sweep import SweepConfig, as_flags, read_table, results, write_table
from runtime import cli
from sampling.config import SampleConfig
from tests.stores import make_store, make_vae
from training.config import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "analysis" / "ablations.yaml"
DEFAULTS = TrainConfig("x")


def trained(row):
    """The trainer's settings of a row of the paper's table."""
    table = read_table(TABLE)
    return cli.parse(
        TrainConfig, [*as_flags(table["train"]), *as_flags(table["rows"][row]["flags"]), "--data-dir", "x"]
    )


def test_the_rows_are_those_of_table_1():
    common = dataclasses.replace(DEFAULTS, model="SiT-B/2", max_train_steps=400_000, batch_size=256, sampling_steps=0)
    expected = {
        "vanilla": {"align": "none"},
        **{f"depth-{depth}": {"align_depth": (depth,)} for depth in (2, 3, 4, 6, 8)},
        "time-0-0.5": {"align_time_range": (0.0, 0.5)},
        "time-0.5-1": {"align_time_range": (0.5, 1.0)},
        **{objective: {"align_objective": objective} for objective in ("cosine", "l1", "l2")},
        **{f"lambda-{weight}": {"align_weight": weight} for weight in (0.1, 0.5)},
        "layers-2": {"align_layers": 2},
    }
    assert list(read_table(TABLE)["rows"]) == list(expected)
    for row, changes in expected.items():
        assert trained(row) == dataclasses.replace(common, **changes)
    # The paper's default row: depth 2, all times, smooth L1, lambda 1, 5 layers.
    assert (DEFAULTS.align_time_range, DEFAULTS.align_objective) == ((0.0, 1.0), "smooth_l1")
    assert (DEFAULTS.align_weight, DEFAULTS.align_layers) == (1.0, 5)


def test_the_papers_values_stand_beside_their_rows():
    paper = {row: line["paper"] for row, line in read_table(TABLE)["rows"].items()}
    assert [values[0] for values in paper.values()] == [
        33.02,
        28.89,
        29.11,
        29.51,
        32.44,
        36.20,
        30.04,
        29.59,
        29.30,
        29.50,
        29.40,
        30.10,
        29.50,
        31.32,
    ]
    assert paper["depth-8"] == [36.20, 6.50, 40.88, 0.52, 0.64]
    assert paper["layers-2"] == [31.32, 6.51, 48.15, 0.55, 0.64]


def test_samples_are_those_of_the_paper():
    config = cli.parse(SampleConfig, [*as_flags(read_table(TABLE)["sample"]), "--checkpoint", "x"])
    assert (config.num_samples, config.num_steps, config.sampler, config.guidance_scale) == (50_000, 250, "sde", (1.0,))


def test_the_table_holds_mean_and_std_over_seeds(tmp_path):
    config = SweepConfig(str(tmp_path), str(tmp_path), output_dir=str(tmp_path), seeds=(0, 1, 2), rows=("a", "b"))
    table = {"rows": {"a": {"flags": {"align-depth": 3}, "paper": [9.0, 8.0, 7.0, 0.6, 0.5]}, "b": {"flags": {}}}}
    for seed, fid in enumerate((1.0, 2.0, 6.0)):
        run = tmp_path / f"a-seed{seed}"
        run.mkdir()
        (run / "m.json").write_text(f'{{"metrics": {{"fid": {fid}}}, "sampling": {{"settings": {{"step": 7}}}}}}')
        (run / "sweep.json").write_text(f'{{"settings": {{}}, "metrics": "{run / "m.json"}"}}')
    (line,) = results(config, table)  # b has no finished run
    assert (line["row"], line["flags"], line["steps"], line["seeds"]) == ("a", "--align-depth 3", "7", 3)
    assert line["fid"] == pytest.approx(3.0)
    assert line["fid std"] == pytest.approx(7**0.5)  # (4 + 1 + 9) / 2
    assert line["fid (paper)"] == 9.0
    write_table([line], tmp_path)
    with open(tmp_path / "table.csv") as file:
        (row,) = csv.DictReader(file)
    assert float(row["fid std"]) == pytest.approx(7**0.5)
    assert "| a | --align-depth 3 | 7 | 3 | 3 ± 2.6 | 9 |" in (tmp_path / "table.md").read_text()


@pytest.mark.slow
def test_a_sweep_trains_measures_and_resumes(tmp_path, monkeypatch):
    store = make_store(tmp_path / "store", images=True, vae=make_vae(tmp_path / "vae"))
    flags = [
        "--data-dir",
        str(store),
        "--reference",
        str(store),
        "--output-dir",
        str(tmp_path / "out"),
        "--rows",
        "layers-2",
        "--seeds",
        "0",
        "1",
        "--train",
        "--model SiT-Ti/4 --batch-size 6 --max-train-steps 2 --num-workers 0",
        "--sample",
        "--num-samples 16 --num-steps 2 --features vae",
    ]
    commands = []
    run = subprocess.run

    def stopped(command, **options):
        if len(commands) == 3:
            return subprocess.CompletedProcess(command, 2)
        commands.append(command)
        return run(command, **options)

    monkeypatch.setattr(sweep.subprocess, "run", stopped)
    with pytest.raises(ValueError, match="layers-2, seed 1: sampling ended with code 2"):
        sweep.main(flags)
    monkeypatch.setattr(sweep.subprocess, "run", lambda command, **options: commands.append(command) or run(command))
    sweep.main(flags)
    assert len(commands) == 5  # 4, and the training that was asked for twice
    with open(tmp_path / "out" / "table.csv") as file:
        (layers,) = csv.DictReader(file)
    assert (layers["row"], layers["seeds"], layers["steps"]) == ("layers-2", "2", "2")
    assert layers["flags"] == "--align-layers 2"
    assert float(layers["vae-frechet"]) > 0
    assert float(layers["fid (paper)"]) == 31.32
    assert "fid" not in layers  # measured on the VAE's features, which are no FID
    sweep.main(flags)
    assert len(commands) == 5  # nothing is run again


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rows", "depth-9"], "--rows: expected some of vanilla, depth-2"),
        (["--seeds", "1", "1"], "--seeds: expected different numbers"),
        (["--processes", "0"], "--processes: expected at least 1"),
        (["--reference", "absent.npz"], "--reference: expected a file or directory that exists, found absent.npz"),
        (["--table", "absent.yaml"], "--table: expected a YAML file, found"),
        (["--table", "{form}"], "--table: expected `rows:`"),
        (["--table", "{short}"], "--table: expected 5 numbers in `paper` of a"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_run(flags, message, tmp_path):
    (tmp_path / "form.yaml").write_text("rows: [1]")
    (tmp_path / "short.yaml").write_text("rows: {a: {flags: {}, paper: [1]}}")
    files = {"{form}": str(tmp_path / "form.yaml"), "{short}": str(tmp_path / "short.yaml")}
    flags = [files.get(value, value) for value in flags]
    with pytest.raises(ValueError, match=message) as error:
        sweep.main(
            ["--data-dir", str(tmp_path), "--reference", str(tmp_path), "--output-dir", str(tmp_path / "out"), *flags]
        )
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
