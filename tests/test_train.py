"""The trainer: exact resume, the same batches on any division, every flag's effect, refusals."""

import csv
import dataclasses
import functools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

import train
from models import load
from models.load import load_sit
from models.sit import SiTConfig
from reporting.log import read_log
from runtime import cli
from runtime.seeding import step_generator
from tests.stores import ENCODER, make_encoder, make_store, make_vae
from training import checkpoint
from training.config import TrainConfig, settings_by

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """24 random latents of 3 classes, with mirror images and crops."""
    folder = tmp_path_factory.mktemp("data")
    make_store(folder / "store", flips=True, images=True)
    return folder / "store"


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """Accelerate keeps its state for the whole process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


def settings(data, output, **changes):
    """Flags of a very small run; `changes` by field name, None leaving a flag out."""
    values = {
        "data_dir": data, "output_dir": output, "exp_name": "run", "model": "SiT-Ti/4", "batch_size": 6,
        "max_train_steps": 2, "log_every": 1, "sampling_steps": 0, "num_workers": 0, "learning_rate": 1e-3,
        "checkpointing_steps": 100, "ema_decay": 0.9,
    }  # fmt: skip
    arguments = []
    for name, value in (values | changes).items():
        spelling = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{spelling}" if value else f"--no-{spelling}")
        elif isinstance(value, tuple):
            arguments += [f"--{spelling}", *map(str, value)]
        elif value is not None:
            arguments += [f"--{spelling}", str(value)]
    return arguments


def run(data, output, **changes):
    """Train in this process; the run's folder."""
    train.main(settings(data, output, **changes))
    AcceleratorState._reset_state(reset_partial_state=True)
    return Path(output) / changes.get("exp_name", "run")


def weights(folder, name="model"):
    return load_file(load.latest_checkpoint(folder) / f"{name}.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_resumed_run_equals_an_undisturbed_one_bit_for_bit(data, tmp_path):
    whole = run(data, tmp_path / "whole", max_train_steps=4, num_workers=1)
    run(data, tmp_path / "parts", max_train_steps=2)
    parts = run(data, tmp_path / "parts", max_train_steps=4)
    for name in ("model", "ema"):
        assert same(weights(whole, name), weights(parts, name))
    a, b = (torch.load(load.latest_checkpoint(f) / "optimizer.pt", weights_only=True) for f in (whole, parts))
    assert all(same(state, b["optimizer"]["state"][key]) for key, state in a["optimizer"]["state"].items())
    timeless = [
        [{k: v for k, v in row.items() if k not in ("images_per_second", "memory_gib", "eta_seconds")} for row in rows]
        for rows in (read_log(whole), read_log(parts))
    ]
    assert timeless[0] == timeless[1]
    assert [row["step"] for row in timeless[0]] == [1, 2, 3, 4]


def spied(data, folder, processes, accumulation):
    """Losses of 3 steps, and the batch of each step put together in the order of the global batch."""
    folder.mkdir()
    flags = settings(data, folder, max_train_steps=3, batch_size=8, gradient_accumulation_steps=accumulation)
    command = [sys.executable, str(ROOT / "tests" / "spy_train.py"), *flags]
    if processes > 1:
        command[:1] = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = os.environ | {"SPY_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    batches = []
    for step in range(3):
        order = [(rank, step * accumulation + micro) for micro in range(accumulation) for rank in range(processes)]
        pieces = [torch.load(folder / f"rank{rank}-call{call}.pt") for rank, call in order]
        batches.append({name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]})
    return read_log(folder / "run"), batches


@pytest.mark.slow
def test_processes_and_accumulation_change_neither_batches_nor_losses(data, tmp_path):
    rows, batches = spied(data, tmp_path / "1x1", 1, 1)
    assert len(batches[0]["z"]) == 8
    for processes, accumulation in ((1, 4), (2, 1), (2, 2)):
        other_rows, other = spied(data, tmp_path / f"{processes}x{accumulation}", processes, accumulation)
        for batch, other_batch in zip(batches, other, strict=True):
            assert same(batch, other_batch)
        for row, other_row in zip(rows, other_rows, strict=True):
            for name in ("loss", "velocity", "align_vae", "grad_norm"):
                assert other_row[name] == pytest.approx(row[name], rel=1e-5)


def launched(processes, *arguments):
    """Train in processes of their own."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
        str(ROOT / "train.py"), *arguments,
    ]  # fmt: skip
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_run_with_divided_moments_equals_one_without_and_may_change_over(data, tmp_path):
    whole, divided = (
        functools.partial(settings, data, tmp_path, batch_size=8, zero1=zero1, keep_last=9) for zero1 in (False, True)
    )
    launched(2, *whole(exp_name="whole", max_train_steps=4))
    launched(2, *divided(exp_name="divided", max_train_steps=2))
    launched(2, *whole(exp_name="divided", max_train_steps=3))
    launched(2, *divided(exp_name="divided", max_train_steps=4))
    expected, found = (load.latest_checkpoint(tmp_path / name) for name in ("whole", "divided"))
    for file in ("model.safetensors", "ema.safetensors"):
        assert (expected / file).read_bytes() == (found / file).read_bytes()
    a, b = (torch.load(folder / "optimizer.pt", weights_only=True)["optimizer"] for folder in (expected, found))
    assert a["state"].keys() == b["state"].keys()
    assert all(same(state, b["state"][key]) for key, state in a["state"].items())


def test_the_loss_is_that_of_the_store_and_the_step(data, tmp_path, monkeypatch):
    """The first step's inputs, made again here from the store's files and the documented generators."""
    from dataset import LatentDataset, StepSampler
    from runtime.seeding import step_generator

    seen = {}
    compute = train.training_loss

    def spy(model, z, eps, t, y, interpolant, targets, alignments):
        seen.update(z=z, eps=eps, t=t, y=y, target=targets["vae"])
        return compute(model, z, eps, t, y, interpolant, targets, alignments)

    monkeypatch.setattr(train, "training_loss", spy)
    run(data, tmp_path, max_train_steps=1, seed=5, label_dropout=0.5)
    store = LatentDataset(data)
    batch = store.__getitems__(next(iter(StepSampler(len(store), 6, seed=5))))
    mean, std = batch["moments"].chunk(2, dim=1)
    noise = torch.randn(6, 4, 8, 8, generator=step_generator(5, 0, "posterior"))
    z = (mean + std * noise - torch.tensor(store.meta["shift"])) * torch.tensor(store.meta["scale"])
    torch.testing.assert_close(seen["z"], z)
    assert torch.equal(seen["eps"], torch.randn(6, 4, 8, 8, generator=step_generator(5, 0, "noise")))
    assert torch.equal(seen["t"], torch.rand(6, generator=step_generator(5, 0, "time")))
    dropped = torch.rand(6, generator=step_generator(5, 0, "dropout")) < 0.5
    assert torch.equal(seen["y"], torch.where(dropped, 3, batch["label"]))
    # Token 1 of the target is the second patch of the first row, as (row, column, channel).
    assert torch.equal(seen["target"][:, 1], seen["z"][:, :, :4, 4:].permute(0, 2, 3, 1).flatten(1))


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_times_are_drawn_and_shifted_by_formula(path):
    config = TrainConfig(
        data_dir="",
        path_type=path,
        batch_size=20_000,
        time_distribution="logit-normal",
        time_mean=-0.5,
        time_std=1.5,
        time_shift="3",
    )
    sit, cpu = SiTConfig.from_name("SiT-Ti/2", 2), torch.device("cpu")
    t = train.step_noise(config, 5, sit, cpu)["time"].double()
    normal = torch.randn(20_000, generator=step_generator(0, 5, "time")).double()
    sigma = (1.5 * normal - 0.5).exp()
    t_before = sigma / (1 + sigma) if path == "linear" else 2 / torch.pi * sigma.atan()
    torch.testing.assert_close(t, 3 * t_before / (1 + 2 * t_before), rtol=1e-4, atol=1e-6)
    ratio = t / (3 - 2 * t)  # the shift undone
    ratio = (ratio / (1 - ratio) if path == "linear" else (ratio * torch.pi / 2).tan()).log()
    assert (ratio.mean().item(), ratio.std().item()) == pytest.approx((-0.5, 1.5), abs=0.05)
    plain = dataclasses.replace(config, time_distribution="uniform", time_shift="1")
    assert torch.equal(
        train.step_noise(plain, 5, sit, cpu)["time"], torch.rand(20_000, generator=step_generator(0, 5, "time"))
    )
    auto = train.step_noise(dataclasses.replace(plain, time_shift="auto"), 5, sit, cpu)["time"]
    u = torch.rand(20_000, generator=step_generator(0, 5, "time"))
    a = (4 * 2 * 2 / 4096) ** 0.5
    torch.testing.assert_close(auto, a * u / (1 + (a - 1) * u))


@pytest.mark.parametrize("settings", [{"time_shift": text} for text in ("0", "-1", "nan", "2x")] + [{"time_std": 0.0}])
def test_a_shift_or_a_std_that_is_not_positive_is_refused(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')}: expected .*(above|more than) 0.*, found"):
        TrainConfig(data_dir="", **settings)


def test_prediction_and_shift_are_in_the_checkpoint_and_reach_the_grids(tmp_path, monkeypatch):
    seen = []
    draw = train.sample_latents

    def spy(*arguments, **options):
        seen.append((arguments[5].prediction, options["time_shift"]))
        return draw(*arguments, **options)

    monkeypatch.setattr(train, "sample_latents", spy)
    make_store(tmp_path / "store", vae=make_vae(tmp_path / "vae"))
    changes = {"prediction": "x", "time_shift": "auto", "max_train_steps": 1, "sampling_steps": 1}
    folder = run(tmp_path / "store", tmp_path, **changes)
    assert seen == [("x", 0.25)]  # sqrt(4 * 8 * 8 / 4096)
    info = load_sit(folder)[1]
    assert (info["prediction"], info["time_shift"]) == ("x", 0.25)


@pytest.mark.parametrize("changes", [{"prediction": "x"}, {"path_type": "cosine"}])
def test_fine_tuning_of_another_prediction_or_path_is_refused(data, tmp_path, changes):
    source = run(data, tmp_path / "source", max_train_steps=1, **changes)
    found = next(f"{name.removesuffix('_type')} {value}" for name, value in changes.items())
    with pytest.raises(ValueError, match=f"--init-from .*: expected a model as this run's, found {found}"):
        run(data, tmp_path, init_from=source)


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
    """Weights, EMA and log of a run with the settings that the next tests change."""
    folder = run(data, tmp_path_factory.mktemp("plain"), label_dropout=0.5)
    return weights(folder), weights(folder, "ema"), read_log(folder)


CHANGES = {
    "seed": 1, "init_from": "a run with another seed", "model": "SiT-Ti/8", "path_type": "cosine", "align": "none",
    "align_depth": 3, "align_weight": 0.5, "align_schedule": "linear:2", "align_head": "conv",
    "align_normalize": "sample", "qk_norm": True,
    "align_layers": 4, "align_objective": "l2", "align_beta": 0.5, "align_time_range": (0.0, 0.5),
    "align_target": "mean", "batch_size": 4, "learning_rate": 1e-4, "adam_beta1": 0.5, "adam_beta2": 0.5,
    "adam_weight_decay": 0.5, "adam_epsilon": 1e-3, "max_grad_norm": 0.01, "label_dropout": 1.0, "random_flip": True,
    "mixed_precision": "bf16", "num_classes": 4, "ema_decay": 0.5, "max_train_steps": 3,
    "lr_schedule": "linear", "lr_warmup_steps": 2, "ema_warmup": True,
    "prediction": "x", "time_distribution": "logit-normal", "time_shift": "auto",
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_every_flag_of_the_method_changes_the_result(name, data, tmp_path, plain):
    value = CHANGES[name]
    if name == "init_from":
        value = run(data, tmp_path / "source", label_dropout=0.5, seed=1)
    folder = run(data, tmp_path, **{"label_dropout": 0.5, name: value})
    model, ema, _ = plain
    assert not same(weights(folder, "ema"), ema)
    assert same(weights(folder), model) == name.startswith("ema_")


@pytest.fixture(scope="module")
def encoder_weights(tmp_path_factory):
    """Two files of random weights of timm's smallest ViT."""
    return [make_encoder(tmp_path_factory.mktemp("encoder") / f"{seed}.safetensors", seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def joint_settings(encoder_weights):
    # Blocks are identities at first: the teacher's depth shows once the later ones have been trained.
    return {"align": "repa+sra", "repa_encoder": ENCODER, "repa_weights": encoder_weights[0], "max_train_steps": 4}


@pytest.fixture(scope="module")
def joint(data, tmp_path_factory, joint_settings):
    """Weights of a run of REPA and SRA, whose settings the next test changes."""
    return weights(run(data, tmp_path_factory.mktemp("joint"), **joint_settings))


JOINT_CHANGES = {
    "repa_encoder": "deit_tiny_patch16_224", "repa_weights": "other", "repa_depth": (1, 3), "repa_weight": 0.1,
    "repa_schedule": "off:1", "repa_objective": "l2", "repa_head": "conv", "repa_normalize": True, "sra_depth": 1,
    "sra_teacher_depth": 5, "sra_t_max": 0.5, "sra_weight": 0.1, "sra_schedule": "cosine:2", "sra_objective": "cosine",
}  # fmt: skip


OWN_CHANGES = {
    "layersync_depth": (1, 2), "layersync_teacher_depth": 5, "layersync_weight": 0.5, "layersync_schedule": "off:2",
    "ig_depth": 3, "ig_weight": 0.1, "ig_schedule": "off:2", "dispersive_depth": 3, "dispersive_weight": 0.1,
    "dispersive_tau": 1.0, "dispersive_group": 2, "dispersive_schedule": "off:2",
}  # fmt: skip
OWN = {"align": "layersync+ig+dispersive", "dispersive_group": 3, "max_train_steps": 4}


@pytest.fixture(scope="module")
def own(data, tmp_path_factory):
    """Weights of a run of LayerSync, Internal Guidance and dispersion, whose settings the next test changes."""
    return weights(run(data, tmp_path_factory.mktemp("own"), **OWN))


@pytest.mark.parametrize("name", OWN_CHANGES)
def test_every_flag_of_methods_without_another_network_changes_the_result(name, data, tmp_path, own):
    changed = weights(run(data, tmp_path, **OWN | {name: OWN_CHANGES[name]}))
    assert not torch.equal(changed["sit.blocks.0.mlp.fc1.weight"], own["sit.blocks.0.mlp.fc1.weight"])


@pytest.mark.parametrize("name", JOINT_CHANGES)
def test_every_flag_of_repa_and_sra_changes_the_result(name, data, tmp_path, joint, joint_settings, encoder_weights):
    value = encoder_weights[1] if name == "repa_weights" else JOINT_CHANGES[name]
    changed = weights(run(data, tmp_path, **joint_settings | {name: value}))
    assert not torch.equal(changed["sit.blocks.0.mlp.fc1.weight"], joint["sit.blocks.0.mlp.fc1.weight"])


def near(a, b):
    """Equal but for steps of length 1e-30."""
    return a.keys() == b.keys() and all(torch.allclose(a[name], b[name], rtol=0, atol=1e-28) for name in a)


def test_fine_tuning_starts_at_the_sources_average_with_fresh_moments(data, tmp_path):
    source = run(data, tmp_path / "source", max_train_steps=3, learning_rate=3e-3, seed=1)
    # No step has a length: what is saved is what it began with.
    tuned = run(data, tmp_path, init_from=source, learning_rate=1e-30, adam_weight_decay=0.0)
    start = weights(source, "ema")
    assert near(weights(tuned, "ema"), start)
    assert near({k.removeprefix("sit."): v for k, v in weights(tuned).items() if k.startswith("sit.")}, start)
    saved = torch.load(load.latest_checkpoint(tuned) / "optimizer.pt", weights_only=True)
    assert saved["optimizer"]["state"][0]["step"] == 2
    initial = load.read_state(load.latest_checkpoint(tuned))["initial"]
    assert initial["digest"] == load.load_sit(source)[1]["digest"]
    # A run that goes on needs the source no more, and keeps its record.
    shutil.rmtree(source)
    run(data, tmp_path, init_from=source, learning_rate=1e-30, max_train_steps=3)
    assert load.read_state(load.latest_checkpoint(tuned))["initial"] == initial


def test_fine_tuning_from_bare_weights_asks_whose_they_are(data, tmp_path):
    """The same tensors mean another model in SiT's files (time runs the other way) and in REPA's."""
    source = weights(run(data, tmp_path / "source", learning_rate=3e-3, seed=1), "ema")
    torch.save(source, tmp_path / "bare.pt")
    settings = {"init_from": str(tmp_path / "bare.pt"), "learning_rate": 1e-30, "adam_weight_decay": 0.0}
    with pytest.raises(ValueError, match=r"say whose by .*--init-format\) sit, repa, sra"):
        run(data, tmp_path, **settings)
    tuned = [weights(run(data, tmp_path / kind, init_format=kind, **settings), "ema") for kind in ("repa", "sit")]
    assert near(tuned[0], source)
    assert not near(tuned[1], source)


def test_fine_tuning_on_other_classes_has_a_new_label_table(data, tmp_path, capsys):
    source = run(data, tmp_path / "source", learning_rate=3e-3)
    tuned = run(data, tmp_path, init_from=source, num_classes=7, learning_rate=1e-30, seed=2)
    assert "a new table of classes, 7 for 3" in capsys.readouterr().out
    found, start = weights(tuned, "ema"), weights(source, "ema")
    table = found.pop("y_embedder.embedding_table.weight")
    start.pop("y_embedder.embedding_table.weight")
    assert near(found, start)
    fresh = weights(run(data, tmp_path, exp_name="fresh", num_classes=7, learning_rate=1e-30, seed=2), "ema")
    assert near({"table": table[:-1]}, {"table": fresh["y_embedder.embedding_table.weight"][:-1]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "SiT-Ti/8"}, r"--init-from .*patch_size 4 \(this run: 8\)"),
        ({"model": "SiT-S/4"}, r"--init-from .*depth 6 \(this run: 12\), hidden_size 192"),
        ({"path_type": "cosine"}, r"--init-from .*path linear \(this run: cosine\)"),
        ({"init_from": "absent"}, r"not a checkpoint: nothing at absent"),
    ],
)
def test_fine_tuning_another_model_is_refused(changes, message, data, tmp_path):
    source = run(data, tmp_path / "source", max_train_steps=1)
    with pytest.raises(ValueError, match=message) as error:
        run(data, tmp_path / "out", **{"init_from": source} | changes)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_fine_tuning_warns_of_another_scale(data, tmp_path):
    source = run(make_store(tmp_path / "store", scale=2.5), tmp_path / "source", max_train_steps=1)
    with pytest.warns(UserWarning, match=r"was trained on latents scaled by .*2\.5"):
        run(data, tmp_path, init_from=source)


def test_what_may_change_on_resume_does_not_change_the_result(data, tmp_path, plain):
    folder = run(
        data,
        tmp_path,
        label_dropout=0.5,
        num_workers=2,
        checkpointing_steps=1,
        keep_last=1,
        keep_every=0,
        log_every=2,
        resolution=32,
    )
    assert same(weights(folder), plain[0])
    assert same(weights(folder, "ema"), plain[1])


def test_every_flag_is_either_free_on_resume_or_tested_above():
    elsewhere = {
        "allow_tf32",  # shows on a GPU alone
        "skip_spikes",
        "spike_factor",  # below
        "lr_decay_steps",
        "lr_final",
        "ema_power",  # in test_optimizer.py, test_posthoc_ema.py
        "time_mean",
        "time_std",  # below
        "repa_final_norm",
        "init_classes",  # in test_methods.py, test_first_day.py
        "preset",
        "repa_normalize_share",  # in test_field.py
    }
    tested = set(CHANGES) | set(JOINT_CHANGES) | set(OWN_CHANGES)
    assert {field.name for field in dataclasses.fields(TrainConfig)} == (
        settings_by(on_resume="free") | tested | elsewhere
    ), "a new flag needs a test of its effect"


def test_alignment_leaves_the_initial_backbone_and_first_velocity_loss_alone(data, tmp_path, plain):
    folder = run(data, tmp_path, align="none", label_dropout=0.5)
    rows = read_log(folder)
    assert rows[0]["velocity"] == plain[2][0]["velocity"]
    assert "align_vae" not in rows[0]
    assert rows[0]["loss"] == rows[0]["velocity"]
    assert not any(name.startswith("heads.") for name in weights(folder))


def test_logs_hold_what_is_promised(data, tmp_path, plain):
    folder = run(data, tmp_path, max_train_steps=4, log_every=2)
    rows = read_log(folder)
    assert [row["step"] for row in rows] == [1, 2, 4]
    for row in rows:
        names = "step epoch loss velocity align_vae grad_norm learning_rate skipped_steps spikes images_per_second"
        assert set(row) == {*names.split(), "memory_gib", "eta_seconds"}
        assert row["epoch"] == row["step"] * 6 / 24
        assert row["loss"] == pytest.approx(row["velocity"] + row["align_vae"], rel=1e-6)
        assert row["images_per_second"] > 0
        assert row["memory_gib"] > 0
    assert rows[-1]["eta_seconds"] == 0
    with open(folder / "metrics.csv") as file:
        assert [{k: float(v) for k, v in line.items()} for line in csv.DictReader(file)] == rows
    saved = json.loads((folder / "config.json").read_text())
    assert saved["config"]["align_depth"] == [2]
    assert torch.__version__.startswith(saved["versions"]["torch"])
    assert "git_revision" in saved


def test_a_row_is_the_mean_of_its_steps(data, tmp_path):
    one = read_log(run(data, tmp_path / "a", max_train_steps=4))
    two = read_log(run(data, tmp_path / "b", max_train_steps=4, log_every=2))
    assert [row["step"] for row in two] == [1, 2, 4]
    for name in ("loss", "velocity", "align_vae", "grad_norm"):
        assert [row[name] for row in two[:2]] == [row[name] for row in one[:2]]
        assert two[2][name] == pytest.approx((one[2][name] + one[3][name]) / 2, rel=1e-6)


def test_what_is_due_comes_often_at_first_and_then_every_so_many_steps():
    assert [step for step in range(1, 350) if train.due(step, 100)] == [1, 2, 5, 10, 20, 50, 100, 200, 300]
    steps = [step for step in range(1, 30_001) if train.due(step, 10_000, first=100)]
    assert steps == [100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 30_000]


def test_checkpoints_every_k_steps_and_at_the_end_with_rotation(data, tmp_path):
    folder = run(data, tmp_path, max_train_steps=7, checkpointing_steps=2, keep_last=2, keep_every=4)
    assert [int(path.name) for path in load.checkpoints(folder)] == [4, 6, 7]
    sit, info = load.load_sit(folder)
    assert (info["step"], info["resolution"], info["path_type"]) == (7, 32, "linear")
    assert sit.config.num_classes == 3


def test_grids_show_the_average_from_the_same_noise_each_time(tmp_path):
    vae = make_vae(tmp_path / "vae")
    make_store(tmp_path / "store", vae=vae)
    folder = run(
        tmp_path / "store",
        tmp_path,
        ema_decay=1.0,
        sampling_steps=1,
        sampling_count=4,
        sampling_num_steps=2,
        max_train_steps=2,
    )
    first, second = (np.asarray(Image.open(folder / "samples" / f"{step:07d}.png")) for step in (1, 2))
    assert first.shape == (2 * 32 + 6, 2 * 32 + 6, 3)
    assert np.array_equal(first, second)  # an average that never moves
    assert len(np.unique(first)) > 10


def test_a_vae_that_did_not_make_the_store_is_refused(tmp_path):
    make_store(tmp_path / "store", vae=make_vae(tmp_path / "vae"))
    other = make_vae(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"expected the VAE of the store"):
        run(tmp_path / "store", tmp_path, sampling_steps=1, vae=other)


def test_a_non_finite_loss_stops_the_run_and_keeps_the_last_good_checkpoint(data, tmp_path, monkeypatch):
    spoil(monkeypatch, {"total": dict.fromkeys(range(3, 20), math.inf)})
    message = (
        r"found 4 steps in a row that were not applied \(--max-bad-steps 4\): 1 steps up to step 6, the first of them "
        r"step 6, had loss, grad_norm that are not finite; the last good checkpoint is .*0000002; fix"
    )
    warned = pytest.warns(UserWarning, match=r"2 steps up to step 4, the first of them step 3, .*they were not applied")
    with warned, pytest.raises(ValueError, match=message) as error:
        run(data, tmp_path, max_train_steps=19, checkpointing_steps=2, log_every=50, max_bad_steps=4)
    assert "\n" not in str(error.value)
    # Step 4 was in the middle of it: its weights are not kept as good ones.
    assert [int(path.name) for path in load.checkpoints(tmp_path / "run")] == [2]


def spoil(monkeypatch, factors):
    """Multiply terms of the loss in some steps, counted from 1: {term: {step: factor}}."""
    compute, calls = train.training_loss, []

    def spoiled(*arguments):
        calls.append(1)
        losses = compute(*arguments)
        return losses | {term: losses[term] * at.get(len(calls), 1) for term, at in factors.items()}

    monkeypatch.setattr(train, "training_loss", spoiled)


@pytest.mark.parametrize("term", ["total", "align_vae"])
def test_a_step_that_is_not_finite_is_not_applied(term, data, tmp_path, monkeypatch):
    """A total of infinity spoils the gradient; a term of infinity alone would not: the loss is looked at, too."""
    good = run(data, tmp_path, exp_name="good", max_train_steps=2)
    spoil(monkeypatch, {term: {3: math.inf}})
    with pytest.warns(UserWarning, match=r"1 steps up to step 3, the first of them step 3"):
        run(data, tmp_path, max_train_steps=4, checkpointing_steps=1, keep_last=9)
    # Step 3 is in trouble and not saved; step 4 continues from the weights and moments of step 2.
    monkeypatch.undo()
    assert [int(path.name) for path in load.checkpoints(tmp_path / "run")] == [1, 2, 4]
    rows = read_log(tmp_path / "run")
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 0]
    assert math.isnan(rows[2]["loss"])
    assert same(weights(good), load_file(tmp_path / "run" / "checkpoints" / "0000002" / "model.safetensors"))
    state = torch.load(tmp_path / "run" / "checkpoints" / "0000004" / "optimizer.pt", weights_only=True)["optimizer"]
    assert {float(values["step"]) for values in state["state"].values()} == {3.0}


def test_a_run_that_ends_in_trouble_says_so(data, tmp_path):
    with pytest.raises(ValueError, match=r"found 3 steps in a row.*the last good checkpoint is none"):
        run(data, tmp_path, max_train_steps=4, learning_rate=1e30)


@pytest.mark.parametrize("skip", [False, True])
def test_a_spike_is_reported_and_left_out_if_asked(skip, data, tmp_path, monkeypatch):
    spoil(monkeypatch, {"total": {35: 1000.0}})
    with pytest.warns(UserWarning, match=r"1 steps up to step 35 had gradient norms up to \d+ running medians"):
        folder = run(data, tmp_path, max_train_steps=36, skip_spikes=skip, log_every=5, spike_factor=100.0)
    rows = {row["step"]: row for row in read_log(folder)}
    assert [step for step, row in rows.items() if row["spikes"]] == [35]
    assert rows[35]["skipped_steps"] == skip
    state = torch.load(load.latest_checkpoint(folder) / "optimizer.pt", weights_only=True)["optimizer"]
    assert {float(values["step"]) for values in state["state"].values()} == {35.0 if skip else 36.0}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data_dir": "absent"}, "absent"),
        ({"resolution": 64}, "--resolution: expected 32.*found 64"),
        ({"num_classes": 2}, "--num-classes: expected at least 3.*found 2"),
        ({"model": "SiT-Q/2"}, "found 'SiT-Q/2'"),
        ({"model": "SiT-Ti/16"}, "found 'SiT-Ti/16'"),
        ({"align_depth": 7}, r"--align-depth: .* 1\.\.6, .*found 7"),
        ({"align_depth": 0}, r"--align-depth: .* 1\.\.6, .*found 0"),
        ({"align_layers": 9}, "--align-layers.*found 9"),
        ({"align_beta": 0.0}, "--align-beta"),
        ({"align_time_range": (0.6, 0.5)}, "--align-time-range"),
        ({"batch_size": 0}, "--batch-size: expected at least 1, found 0"),
        ({"gradient_accumulation_steps": 4}, "batch size.*6"),
        ({"learning_rate": -1.0}, "--learning-rate: expected more than 0, found -1.0"),
        ({"learning_rate": float("nan")}, "--learning-rate: expected more than 0, found nan"),
        ({"ema_decay": 1.5}, "--ema-decay"),
        ({"label_dropout": -0.1}, "--label-dropout"),
        ({"sampling_steps": 5, "vae": "no/such-vae"}, "--vae"),
    ],
)
def test_refusals_name_the_flag_before_anything_is_written(changes, message, data, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        run(data, tmp_path / "out", **changes)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 works on a GPU")
def test_fp16_without_a_gpu_is_refused(data, tmp_path):
    with pytest.raises(ValueError, match="--mixed-precision fp16: expected a GPU"):
        run(data, tmp_path, mixed_precision="fp16")


def test_flips_need_a_store_that_has_them(tmp_path):
    make_store(tmp_path / "store")
    with pytest.raises(ValueError, match=r"--random-flip.*--flip"):
        run(tmp_path / "store", tmp_path, random_flip=True)


def test_a_run_goes_on_only_with_its_own_settings_and_data(data, tmp_path):
    run(data, tmp_path)
    with pytest.raises(ValueError, match=r"--adam-beta1 0\.9 -> 0\.8.*--exp-name"):
        run(data, tmp_path, adam_beta1=0.8, learning_rate=0.1, max_train_steps=3)
    with pytest.raises(ValueError, match=r"--no-resume.*holds a run"):
        run(data, tmp_path, resume=False)
    make_store(tmp_path / "other", seed=9, flips=True)
    with pytest.raises(ValueError, match=r"is not the store of"):
        run(tmp_path / "other", tmp_path, max_train_steps=3)


def test_an_inherited_environment_does_not_divide_the_loss(data, tmp_path, plain, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert same(weights(run(data, tmp_path, label_dropout=0.5)), plain[0])


def test_two_trainers_in_one_folder_are_refused(data, tmp_path):
    folder = run(data, tmp_path, max_train_steps=1)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    other = subprocess.Popen(
        [sys.executable, "-c", hold, str(folder / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    other.stdout.readline()
    with pytest.raises(ValueError, match=r"another process trains in .*--exp-name"):
        run(data, tmp_path, max_train_steps=2)
    other.communicate("\n")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    run(data, tmp_path, max_train_steps=2)


def test_an_unstable_run_can_go_on_with_a_lower_learning_rate(data, tmp_path):
    run(data, tmp_path)
    before = weights(tmp_path / "run")
    with pytest.warns(UserWarning, match=r"is resumed with other settings: --learning-rate 0\.001 -> 1e-30"):
        run(data, tmp_path, learning_rate=1e-30, max_train_steps=4)
    for name, value in weights(tmp_path / "run").items():  # two steps of no length
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-28)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "ema.safetensors", "state.json"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(name, data, tmp_path, plain):
    folder = run(data, tmp_path, label_dropout=0.5, checkpointing_steps=1)
    file = load.latest_checkpoint(folder) / name
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.warns(UserWarning, match=rf"damaged checkpoint: .*0000002.*{name}.*resuming from .*0000001"):
        run(data, tmp_path, label_dropout=0.5, checkpointing_steps=1)
    assert same(weights(folder), plain[0])


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(data, tmp_path):
    folder = run(data, tmp_path, checkpointing_steps=1)
    for path in load.checkpoints(folder):
        (path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"expected a whole checkpoint in .*found 2 damaged: .*0000002"):
        run(data, tmp_path, max_train_steps=3)


def test_a_full_disk_is_reported_and_training_goes_on(data, tmp_path, monkeypatch, capsys):
    write, calls = checkpoint.save_file, []

    def full(*arguments):
        calls.append(1)
        if len(calls) in (4, 6):  # of three files a checkpoint: the first of step 2, the second of step 3
            Path(arguments[1]).write_bytes(b"begun")
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        write(*arguments)

    monkeypatch.setattr(checkpoint, "save_file", full)
    folder = run(data, tmp_path, max_train_steps=4, checkpointing_steps=1, keep_last=9)
    told = capsys.readouterr().err
    assert "warning: cannot write the checkpoint of step 2" in told
    assert "No space left on device" in told
    assert [int(path.name) for path in load.checkpoints(folder)] == [1, 4]
    assert len(list((folder / "checkpoints").iterdir())) == 2  # nothing half-written takes up room
    calls[:] = [1] * 5
    with pytest.raises(ValueError, match=r"cannot write the checkpoint of step 5 .*last good one is .*0000004"):
        run(data, tmp_path, max_train_steps=5, checkpointing_steps=1, keep_last=9)


def test_a_user_sees_one_line_and_code_2(data, tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), *settings(data, tmp_path, align_depth=9)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --align-depth: expected different blocks in 1..6")
    assert "Traceback" not in done.stderr


def test_config_file_and_repa_names_mean_the_same(data, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("proj-coeff: 0.5\nencoder_depth: 3\ncfg-prob: 0.2\n")
    config = cli.parse(TrainConfig, ["--data-dir", "x", "--config", str(file)])
    assert (config.align_weight, config.align_depth, config.label_dropout) == (0.5, (3,), 0.2)


def test_defaults_are_the_papers():
    config = TrainConfig("x")
    assert (config.batch_size, config.learning_rate, config.adam_weight_decay) == (256, 1e-4, 0)
    assert (config.align, config.align_weight, config.align_beta, config.align_layers) == ("vae", 1.0, 0.05, 5)
    assert (config.align_objective, config.align_time_range) == ("smooth_l1", (0.0, 1.0))
    assert (config.label_dropout, config.ema_decay, config.max_grad_norm) == (0.1, (0.9999,), 1.0)


def test_a_profile_is_a_trace_of_steady_steps(data, tmp_path, plain):
    folder = run(data, tmp_path, max_train_steps=12, profile=2)
    events = json.loads((folder / "profile.json").read_text())["traceEvents"]
    steps = {event["name"] for event in events if str(event.get("name", "")).startswith("ProfilerStep")}
    assert steps == {"ProfilerStep#8", "ProfilerStep#9"}
    assert any("fused_adamw" in str(event.get("name")) for event in events)


def test_recomputed_blocks_train_the_same_weights(data, tmp_path, plain):
    assert same(weights(run(data, tmp_path, label_dropout=0.5, grad_checkpoint=1)), plain[0])


@pytest.mark.slow
def test_compiled_steps_equal_eager_ones(data, tmp_path, plain):
    folder = run(data, tmp_path, label_dropout=0.5, compile=True)
    for row, eager in zip(read_log(folder), plain[2], strict=True):
        for name in ("loss", "velocity", "align_vae", "grad_norm"):
            assert row[name] == pytest.approx(eager[name], rel=1e-5)
    assert weights(folder).keys() == plain[0].keys()


@pytest.mark.slow
@pytest.mark.parametrize("tracker", ["wandb", "tensorboard"])
def test_trackers_get_the_numbers_and_the_grids(tracker, tmp_path):
    make_store(tmp_path / "store", vae=make_vae(tmp_path / "vae"))
    flags = settings(
        tmp_path / "store", tmp_path, report_to=tracker, sampling_steps=2, sampling_count=4, sampling_num_steps=1
    )
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *flags], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    loss = read_log(tmp_path / "run")[-1]["loss"]
    if tracker == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        folders = {path.parent for path in (tmp_path / "run").rglob("events.out.tfevents.*")}
        logs = [EventAccumulator(str(folder)).Reload() for folder in folders]
        assert any("samples" in log.Tags()["images"] for log in logs)
        (log,) = (log for log in logs if "loss" in log.Tags()["scalars"])
        assert log.Scalars("loss")[-1].value == pytest.approx(loss, rel=1e-6)
    else:
        (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
        assert file.stat().st_size > 0
        assert list(file.parent.glob("files/media/images/samples_*.png"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_precisions_train_on_a_gpu(precision, data, tmp_path):
    rows = read_log(run(data, tmp_path, mixed_precision=precision, max_train_steps=20))
    assert rows[-1]["loss"] < rows[0]["loss"]
