"""`--dry-run`: what a run would need, told before anything is made."""

import re
import subprocess
import sys
import time

import pytest
from accelerate.state import AcceleratorState, PartialState

import train
from models.load import latest_checkpoint
from tests.stores import ENCODER, make_store, make_vae
from tests.test_train import ROOT, run, settings
from training import plan


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return make_store(folder / "store", vae=make_vae(folder / "vae"))


def plan_of(data, output, capsys, **changes):
    train.main(settings(data, output, dry_run=True, **changes))
    AcceleratorState._reset_state(reset_partial_state=True)
    return dict(re.split(r"  +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())


def test_a_plan_is_what_then_happens_and_makes_nothing(data, tmp_path, capsys):
    options = {"sampling_steps": 5, "ema_power": 0.1, "ema_snapshot_steps": 1, "images_per_second": 0.5}
    told = plan_of(data, tmp_path, capsys, micro_batch=2, **options)
    assert not list(tmp_path.iterdir())
    assert told["run"].endswith("a new one")
    assert told["data"].endswith("24 images, 4.0 steps an epoch")
    assert told["batch"] == "6 = 1 processes x 3 micro-batches x 2"
    assert told["time"] == "2 steps, 0.5 epochs: 0.0 h"
    folder = run(data, tmp_path, **options)
    checkpoint = sum(file.stat().st_size for file in latest_checkpoint(folder).iterdir())
    assert float(re.search(r"of ([\d.]+) and", told["disk"])[1]) == pytest.approx(checkpoint / 1e9, abs=0.006)
    assert plan_of(data, tmp_path, capsys)["run"].endswith("0000002")
    assert "not measured" in plan_of(data, tmp_path, capsys)["time"]


def test_a_plan_counts_passes_and_what_is_left_and_refuses_what_training_does(data, tmp_path, capsys):
    told = plan_of(data, tmp_path, capsys, max_train_steps=400_000, epochs=80, images_per_second=0.01)
    assert told["time"].startswith("320 steps, 80.0 epochs: 53.3 h")
    run(data, tmp_path, max_train_steps=2)
    told = plan_of(data, tmp_path, capsys, max_train_steps=8, images_per_second=0.01)
    assert told["time"] == "from step 2 to 8 steps, 2.0 epochs: 1.0 h"
    for changes, message in (
        ({"resume": False}, "--no-resume: .* holds a run"),
        ({"exp_name": "new", "gradient_accumulation_steps": 4}, "batch"),
    ):
        with pytest.raises(ValueError, match=message):
            train.main(settings(data, tmp_path, dry_run=True, **changes))
        AcceleratorState._reset_state(reset_partial_state=True)


def test_a_plan_tries_the_encoder_of_repa(tmp_path, capsys):
    store = make_store(tmp_path / "store", images=True, vae=make_vae(tmp_path / "vae"))
    told = plan_of(store, tmp_path / "out", capsys, preset="repa", repa_encoder=ENCODER, repa_weights="random")
    assert told["checked"].endswith("--repa-weights")
    assert not (tmp_path / "out").exists()


def test_a_plan_of_the_largest_model_takes_a_moment(data, tmp_path, capsys):
    begin = time.process_time()
    told = plan_of(data, tmp_path, capsys, model="SiT-XL/2", batch_size=256)
    assert time.process_time() - begin < 5
    assert told["parameters"].startswith("SiT-XL/2 67")
    needed, free = map(float, re.match(r"([\d.]+) GB of ([\d.]+) free", told["disk"]).groups())
    assert ("too little" in told["disk"]) == (needed > free)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_dir": "absent"}, "absent"),
        ({"sampling_steps": 5, "vae": "no/such-vae"}, "--vae"),
        ({"init_from": "absent"}, "not a checkpoint: nothing at absent"),
        ({"report_to": "wandb"}, "--report-to wandb: expected it to be installed; pip install wandb"),
        ({"images_per_second": 0}, "--images-per-second: expected more than 0"),
        ({"micro_batch": 4}, "--micro-batch: expected a divisor"),
    ],
)
def test_a_plan_tells_what_would_keep_the_run_from_starting(changes, message, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plan, "get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(ValueError, match=re.escape(message)):
        plan_of(data, tmp_path, capsys, **changes)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_ranks_plan_together(data, tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(ROOT / "train.py"),
    ]
    command += settings(data, tmp_path, dry_run=True, zero1=True)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("6 = 2 processes x 1 micro-batches x 3") == 1
    assert not list(tmp_path.iterdir())
