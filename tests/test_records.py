"""Records outlive the code: everything that revision 4344d83 wrote still resumes, loads, reads and samples; and what a
record of older or of newer code means. (Records of samples, stores and models: tests of their rooms, too.)"""

import csv
import dataclasses
import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file

import sample_ddp
import train
from evaluations import evaluate
from models import sit
from preprocessing import dump_latents
from reporting.log import read_log
from runtime import cli
from runtime.cli import flag
from runtime.files import REQUIRED, Field, fields_of, read_record
from sampling.pipeline import VAEREPAPipeline
from training import run_dir
from training.config import TrainConfig
from training.run_dir import resumed_config
from training.setup import setup

OLD = Path(__file__).resolve().parent / "fixtures" / "revision-4344d83"
EXPECTED = json.loads((OLD / "expected.json").read_text())


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A copy of what the old code wrote, with its small SiT-Ti; the current directory."""
    shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    monkeypatch.setitem(sit.SIT_SIZES, "Ti", (4, 12, 3))
    yield tmp_path / "old"
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


def words(name, drop=()):
    """The flags of the command that made, or finishes, a fixture; without those named."""
    flags = shlex.split(EXPECTED[name]["command"])
    flags = flags[2:] if flags[0] == "-m" else flags[1:]
    for unwanted in drop:
        place = flags.index(unwanted)
        del flags[place : place + 2]
    return flags


@pytest.mark.parametrize("drop", [(), ("--learning-rate", "--ema-decay", "--align", "--model", "--batch-size")])
def test_an_old_run_resumes_with_the_losses_it_would_have_had(drop, old, capsys):
    """Given all its flags, or only some: the record has the others."""
    train.main(words("run", drop))
    assert "resuming from run/checkpoints/0000004" in capsys.readouterr().out
    rows = read_log("run")
    assert [row["step"] for row in rows] == list(range(1, 9))
    for row, expected in zip(rows, EXPECTED["run"]["log"], strict=True):
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=1e-4), name
    found, expected = (
        load_file("run/checkpoints/0000008/ema.safetensors"),
        load_file("expected/ema-0000008.safetensors"),
    )
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)


def test_an_old_run_resumes_again_and_again(old):
    """Its log gets the columns that newer code writes, and keeps its own rows."""
    for steps in (9, 10):
        train.main([*words("run", ("--max-train-steps",)), "--max-train-steps", str(steps)])
        AcceleratorState._reset_state(reset_partial_state=True)
    with open("run/metrics.csv") as file:
        lines = list(csv.DictReader(file))
    assert [int(line["step"]) for line in lines] == list(range(1, 11))
    assert (lines[0]["learning_rate"], float(lines[-1]["learning_rate"])) == ("", 0.01)
    assert {len(line) for line in lines} == {len(lines[0])}


def test_a_run_is_set_up_again_by_its_own_settings(old):
    """`setup(config)`: every setting counts as given, and those that are None are left to be decided."""
    since = "--sra-weight 0.2 --sra-schedule sra --sra-objective smooth_l1".split()  # defaults have changed
    config, _ = cli.parse_given(TrainConfig, [*words("run"), *since])
    run = setup(config)
    assert run.start == 4
    run.close()


def test_what_is_done_once_is_not_done_again_on_resume():
    saved = saved_settings() | {"profile": 5, "verify_data": True}
    resumed = resumed_config(TrainConfig(data_dir="x"), frozenset(), saved, Path("s"))
    assert (resumed.profile, resumed.verify_data) == (0, False)


def test_an_old_store_is_finished_and_recognised(old, capsys):
    flags = words("store_unfinished")
    dump_latents.main(flags)
    for file in Path("store").glob("*.npy"):
        made, whole = np.load(Path("store_unfinished") / file.name), np.load(file)
        np.testing.assert_allclose(made.astype(float), whole.astype(float), rtol=1e-4, atol=1e-4)
    assert Path("store_unfinished/paths.txt").read_bytes() == Path("store/paths.txt").read_bytes()
    flags[flags.index("store_unfinished")] = "store"
    dump_latents.main(flags)
    assert "is complete" in capsys.readouterr().out


def test_old_samples_are_finished_and_recognised(old, capsys):
    sample_ddp.main(words("samples_unfinished"))
    with np.load("samples_unfinished/samples.npz") as found, np.load("expected/samples.npz") as expected:
        np.testing.assert_array_equal(found["arr_1"], expected["arr_1"])
        assert np.abs(found["arr_0"].astype(int) - expected["arr_0"]).max() <= 1  # rounding of another processor
    again = ["--checkpoint", "run/checkpoints/0000004", "--output-dir", "samples", "--device", "cpu"]
    sample_ddp.main(again)
    assert "is complete" in capsys.readouterr().out
    with pytest.raises(ValueError, match="samples of other settings: seed 3 -> 4; "):
        sample_ddp.main([*again, "--seed", "4"])


def test_an_old_published_model_draws_its_images(old):
    images = VAEREPAPipeline.from_pretrained("published", device="cpu")([0, 1], seed=0, num_inference_steps=4).images
    with np.load("expected/published.npz") as expected:
        assert np.abs(np.stack(images).astype(int) - expected["images"]).max() <= 1


def test_old_statistics_are_read(old):
    evaluate.main(words("statistics"))
    found = json.loads(Path("again.json").read_text())["metrics"]
    assert found["vae-frechet"] == pytest.approx(EXPECTED["statistics"]["metrics"]["vae-frechet"], rel=1e-3)


def saved_settings():
    return json.loads((OLD / "run" / "config.json").read_text())["config"]


def test_a_new_setting_has_its_historic_value_in_an_old_run(monkeypatch):
    def extended(record=None):
        field = ("brightness", float, flag(3.0, "new", record=record))
        return dataclasses.make_dataclass("TrainConfig", [field], bases=(TrainConfig,), frozen=True)

    for config_class, expected in ((extended(), 3.0), (extended(Field(historic=1.0)), 1.0)):
        monkeypatch.setattr(run_dir, "TrainConfig", config_class)
        config = resumed_config(config_class(data_dir="x"), frozenset({"data_dir"}), saved_settings(), Path("s.json"))
        assert config.brightness == expected
        assert (config.align, config.data_dir) == ("vae+sra", "x")


def test_a_setting_of_newer_code_is_one_line():
    with pytest.raises(ValueError, match=r"^s\.json was written by newer code: it has 'brightness'; use newer"):
        resumed_config(TrainConfig(data_dir="x"), frozenset(), saved_settings() | {"brightness": 1}, Path("s.json"))


def test_what_the_user_gives_is_compared_with_the_record_and_nothing_else():
    config = TrainConfig(data_dir="x", batch_size=16, learning_rate=1.0, log_every=7)
    saved = saved_settings()
    resumed = resumed_config(config, frozenset({"log_every"}), saved, Path("s"))
    assert (resumed.batch_size, resumed.learning_rate, resumed.log_every) == (8, 0.01, 7)
    with pytest.warns(UserWarning, match=r"--learning-rate 0\.01 -> 1\.0"):
        assert resumed_config(config, frozenset({"learning_rate"}), saved, Path("s")).learning_rate == 1.0
    with pytest.raises(ValueError, match=r"found --batch-size 8 -> 16; give"):
        resumed_config(config, frozenset({"batch_size"}), saved, Path("s"))


def test_fields_that_were_renamed_or_retyped_are_read_in_their_old_form():
    fields = {
        "last_step_size": Field(0.04, old_names=("last_t",)),
        "ema_decay": Field(read_old=lambda value: value if isinstance(value, tuple) else (value,)),
    }
    old, new = {"last_t": 0.1, "ema_decay": 0.9}, {"last_step_size": 0.1, "ema_decay": [0.9]}
    assert (
        read_record(old, fields, "r") == read_record(new, fields, "r") == {"last_step_size": 0.1, "ema_decay": (0.9,)}
    )
    with pytest.raises(ValueError, match="r: damaged, it lacks 'ema_decay'"):
        read_record({}, fields, "r")


def test_the_fields_of_a_dataclass_are_its_record():
    assert fields_of(TrainConfig)["seed"] == Field(0)
    assert fields_of(TrainConfig)["data_dir"].historic is REQUIRED
