"""The first day of a run: it shows something soon, keeps what it has, and is one run for its tracker."""

import json

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState

import sample_ddp
from models import load
from models.load import load_sit
from reporting.log import read_log
from tests.stores import make_store, make_vae, save_checkpoint
from tests.test_checkpoint import INFO, make
from tests.test_ranks import start
from tests.test_train import run, weights
from training.checkpoint import rotate_checkpoints

TABLE = "y_embedder.embedding_table.weight"


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data") / "store")


def test_a_checkpoint_by_the_clock_replaces_the_one_before_and_leaves_the_others(data, tmp_path):
    folder = run(data, tmp_path, max_train_steps=7, checkpointing_steps=3, checkpoint_minutes=1e-9)
    assert [path.name for path in load.checkpoints(folder)] == ["0000003", "0000006", "0000007"]


def test_without_regular_checkpoints_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, *make(0), INFO)
    rotate_checkpoints(tmp_path, keep_last=2, keep_every=0, every=100)
    assert [path.name for path in load.checkpoints(tmp_path)] == ["0000002", "0000003"]


@pytest.mark.slow
def test_the_clock_of_rank_0_decides_for_all_ranks(data, tmp_path):
    process = start("none", data, tmp_path, max_train_steps=6, checkpoint_minutes=1e-9, keep_last=9)
    _, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    # Rank 0 says so in steps 1, 2, ...; all hear of it a step later.
    assert [int(path.name) for path in load.checkpoints(tmp_path / "run")] == [2, 3, 4, 5, 6]


def test_a_run_is_one_run_for_its_tracker_through_any_number_of_stops(data, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(Accelerator, "init_trackers", lambda self, project, config, kwargs: seen.append(kwargs))
    for steps in (1, 2, 3):
        run(data, tmp_path, max_train_steps=steps)
    run(data, tmp_path, exp_name="other", max_train_steps=1)
    ids = [kwargs["wandb"]["id"] for kwargs in seen]
    assert ids[0] == ids[1] == ids[2] != ids[3]
    assert {kwargs["wandb"]["resume"] for kwargs in seen} == {"allow"}
    assert [kwargs["tensorboard"]["purge_step"] for kwargs in seen] == [1, 2, 3, 1]
    state = load.read_state(load.latest_checkpoint(tmp_path / "run"))
    assert state["tracker_run"] == ids[0]


@pytest.mark.slow
def test_a_run_stopped_five_times_is_the_undisturbed_one(data, tmp_path, monkeypatch):
    """One wandb run, no step twice; learning rate, weights, moments and EMAs bit for bit."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    options = {"lr_schedule": "cosine", "lr_decay_steps": 6, "lr_warmup_steps": 2, "log_every": 1}
    options |= {"ema_warmup": True, "ema_decay": (0.9, 0.5), "ema_power": (0.1,)}
    whole = run(data, tmp_path / "whole", max_train_steps=6, **options)
    for steps in range(1, 7):
        folder = run(data, tmp_path, max_train_steps=steps, report_to="wandb", **options)
    names = [path.name for path in (folder / "wandb").glob("offline-run-*")]
    assert len(names) == 6
    assert len({name.rsplit("-", 1)[1] for name in names}) == 1
    rows, expected = read_log(folder), read_log(whole)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for name in ("loss", "learning_rate", "grad_norm"):
        assert [row[name] for row in rows] == [row[name] for row in expected]
    newest, undisturbed = load.latest_checkpoint(folder), load.latest_checkpoint(whole)
    files = [path.name for path in undisturbed.iterdir() if path.suffix in (".safetensors", ".pt")]
    assert {"ema.safetensors", "ema-0.5.safetensors", "ema-power-0.1.safetensors", "optimizer.pt"} <= {*files}
    for name in files:
        assert (newest / name).read_bytes() == (undisturbed / name).read_bytes()


def tuned(data, tmp_path, source, **changes):
    """The weights that a run begins with: its only step has no length."""
    return weights(run(data, tmp_path, init_from=source, learning_rate=1e-30, max_train_steps=1, **changes), "ema")


def test_fine_tuning_on_other_classes_takes_over_the_null_class_and_those_named(data, tmp_path):
    source = run(data, tmp_path / "source", learning_rate=3e-3)
    theirs = weights(source, "ema")[TABLE]
    own = tuned(data, tmp_path, source, num_classes=7)[TABLE]
    torch.testing.assert_close(own[-1], theirs[-1])
    assert not torch.isclose(own[:3], theirs[:3]).all(dim=1).any()

    (tmp_path / "map.json").write_text(json.dumps({"class 0": "class 2", "1": "0"}))
    mapped = tuned(data, tmp_path, source, num_classes=7, init_classes=tmp_path / "map.json", exp_name="mapped")[TABLE]
    torch.testing.assert_close(mapped[[0, 1, -1]], theirs[[2, 0, -1]])
    torch.testing.assert_close(mapped[2:-1], own[2:-1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"zebra": "class 0"}', "expected a class of the store .*found 'zebra'"),
        ('{"class 0": "9"}', "expected a class of --init-from .*found '9'"),
        ("[1, 2]", "expected .*found another form"),
    ],
)
def test_classes_that_neither_side_has_are_refused(content, message, data, tmp_path):
    source = run(data, tmp_path / "source", max_train_steps=1)
    (tmp_path / "map.json").write_text(content)
    with pytest.raises(ValueError, match=f"--init-classes: {message}"):
        tuned(data, tmp_path, source, init_classes=tmp_path / "map.json")


def test_fine_tuning_on_another_latent_size_keeps_all_but_the_fixed_positions(data, tmp_path, capsys):
    source = run(data, tmp_path / "source", learning_rate=3e-3)
    larger = make_store(tmp_path / "larger", size=16)
    own, theirs = tuned(larger, tmp_path, source), weights(source, "ema")
    assert "positions for latents of side 16, not 8" in capsys.readouterr().out
    for name, value in theirs.items():
        if name != "pos_embed":
            torch.testing.assert_close(own[name], value)


def test_fine_tuning_warms_its_ema_up_and_says_so(data, tmp_path, capsys):
    source = run(data, tmp_path / "source")
    folder = run(data, tmp_path, init_from=source)
    assert "EMA with a warm-up" in capsys.readouterr().out
    assert load.read_state(load.latest_checkpoint(folder))["config"]["ema_warmup"] is True


def test_each_ema_is_sampled_from_by_its_decay(tmp_path):
    vae = make_vae(tmp_path / "vae")
    folder = run(make_store(tmp_path / "store", vae=vae), tmp_path, ema_decay=(0.9, 0.5))
    common = ["--checkpoint", str(folder), "--num-samples", "16", "--num-steps", "2", "--device", "cpu"]
    common += ["--per-proc-batch-size", "16"]
    sample_ddp.main(common)
    sample_ddp.main([*common, "--ema", "0.5"])
    records = [json.loads(file.read_text()) for file in sorted((folder / "samples").glob("*/samples.json"))]
    digests = {record["settings"]["checkpoint_digest"] for record in records}
    assert digests == {load_sit(folder)[1]["digest"], load_sit(folder, "0.5")[1]["digest"]}
    assert len(digests) == 2
