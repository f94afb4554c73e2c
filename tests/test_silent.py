"""What a run must not do silently: guide by what was never trained, ignore what it was given."""

import dataclasses
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file, save_file

import train
from dataset import LatentDataset
from diffusion.guidance import guided_velocity
from diffusion.samplers import sample_ode
from models import load
from models.vae import load_vae
from tests.stores import make_store, make_vae, save_checkpoint
from tests.test_checkpoint import INFO, make
from tests.test_train import run, settings
from training.checkpoint import rotate_checkpoints

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return make_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def data(tmp_path_factory, vae):
    return make_store(tmp_path_factory.mktemp("data") / "store", vae=vae)


GRIDS = {"sampling_steps": 1, "sampling_count": 4, "sampling_num_steps": 2, "max_train_steps": 1}


@pytest.fixture
def drawn(monkeypatch):
    """Classes and guidance of each grid."""
    seen, sample = [], train.sample_latents

    def spy(sit, y, noise, sampler, steps, interpolant, scale=1.0, **more):
        seen.append((set(y.tolist()), scale))
        return sample(sit, y, noise, sampler, steps, interpolant, scale, **more)

    monkeypatch.setattr(train, "sample_latents", spy)
    return seen


def test_grids_are_of_classes_that_have_data(data, tmp_path, drawn):
    run(data, tmp_path, num_classes=1000, **GRIDS | {"sampling_count": 16})
    assert drawn == [({0, 1, 2}, 4.0)]


def test_grids_are_not_guided_by_a_null_class_that_is_not_trained(data, tmp_path, drawn):
    with pytest.warns(UserWarning, match="grids are drawn without guidance: with --label-dropout 0"):
        run(data, tmp_path, label_dropout=0.0, **GRIDS)
    assert [scale for _, scale in drawn] == [1.0]


def test_a_grid_that_finds_the_disk_full_does_not_end_training(data, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(train, "save_image", full)
    with pytest.warns(UserWarning, match="cannot write the grid of step 1 .*No space left"):
        folder = run(data, tmp_path, **GRIDS | {"max_train_steps": 2})
    assert load.latest_checkpoint(folder).name == "0000002"


@pytest.mark.parametrize(
    ("name", "value"),
    [("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR"), ("ACCELERATE_USE_FSDP", "true"), ("ACCELERATE_USE_DEEPSPEED", "true")],
)
def test_what_the_launcher_set_and_the_trainer_lacks_is_refused(name, value, data, tmp_path, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"expected accelerate to be configured without it, found {name}={value}"):
        run(data, tmp_path)
    assert not (tmp_path / "run").exists()


def test_flags_that_do_nothing_are_said(data, tmp_path):
    with pytest.warns(UserWarning, match="--align-depth, --align-weight does nothing: --align none has no vae"):
        run(data, tmp_path, align="none", align_depth=2, align_weight=0.3)
    with pytest.warns(UserWarning, match="the run is at step 2 already"):
        run(data, tmp_path, align="none")


@pytest.mark.parametrize("place", ["file", "below a file", "read-only"])
def test_an_output_directory_that_cannot_be_is_one_line(place, data, tmp_path):
    (tmp_path / "file").write_text("x")
    output = {"file": tmp_path / "file", "below a file": tmp_path / "file" / "x", "read-only": Path("/proc/x")}[place]
    done = subprocess.run(
        [sys.executable, "train.py", *settings(data, output)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert f"cannot make {output}" in done.stderr


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_a_seed_that_torch_cannot_take_is_refused(seed, data, tmp_path):
    with pytest.raises(ValueError, match=r"--seed: expected an integer in \[-2\*\*63, 2\*\*64\)"):
        train.main(settings(data, tmp_path, seed=seed))


def test_a_linked_checkpoint_is_rotated_like_another(tmp_path):
    made = make(0)
    real = save_checkpoint(tmp_path / "elsewhere", 1, *made, INFO)
    (tmp_path / "checkpoints").mkdir()
    os.symlink(real, tmp_path / "checkpoints" / "0000001")
    save_checkpoint(tmp_path, 2, *made, INFO)
    rotate_checkpoints(tmp_path, keep_last=1, keep_every=0)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["0000002"]
    assert (real / "state.json").is_file()


@pytest.mark.parametrize("harm", ["lacks one", "prefixed"])
def test_a_vae_without_all_its_tensors_is_refused(harm, vae, tmp_path):
    folder = make_vae(tmp_path / "vae")
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    name = "decoder.conv_out.weight"
    tensors = {f"vae.{k}": v for k, v in tensors.items()} if harm == "prefixed" else tensors
    tensors.pop(name, None)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match="of its tensors are not in the file"):
        load_vae(str(folder))


def test_a_file_of_our_own_checkpoint_is_read_as_our_checkpoint(tmp_path):
    folder = save_checkpoint(tmp_path, 1, *make(0), INFO)
    (sit, info), (other, expected) = load.load_sit(folder / "ema.safetensors"), load.load_sit(folder)
    assert info == expected
    assert all(map(torch.equal, sit.state_dict().values(), other.state_dict().values()))
    with pytest.raises(ValueError, match=r"expected a checkpoint's directory, found a file of it; give .*0000001"):
        load.load_sit(folder / "model.safetensors")


@pytest.mark.parametrize("steps", [5, 50, 250])
def test_the_ends_of_the_guidance_interval_belong_to_it(steps):
    """Also where they fall on a time of the solver, which are those of torch.linspace."""
    sizes = []

    def model(x, t, y):
        sizes.append((round(t[0].item(), 6), len(x)))
        return x

    velocity = guided_velocity(model, torch.zeros(1, dtype=torch.long), 1, 2.0, (0.2, 0.6))
    sample_ode(velocity, torch.zeros(1, 1, 1, 1), steps)
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1].tolist()
    assert [t for t, _ in sizes] == [round(t, 6) for t in times]
    guided = [t for t, size in sizes if size == 2]
    assert (max(guided), min(guided)) == (0.6, 0.2)


def test_every_setting_of_a_run_says_what_a_resume_may_do_with_it():
    """Free settings change neither weights nor order of data; announced ones are there to save a run."""
    from training.config import TrainConfig

    expected = json.loads((ROOT / "tests" / "fixtures" / "on_resume.json").read_text())
    found = {field.name: field.metadata["on_resume"] for field in dataclasses.fields(TrainConfig)}
    assert found == expected
    assert np.unique(list(found.values())).tolist() == ["announced", "fixed", "free"]


def test_one_rank_of_each_node_reads_all_of_the_data(data, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(LatentDataset, "damaged_files", lambda self, whole: seen.append(whole) or [])
    run(data, tmp_path, verify_data=True, max_train_steps=1)
    monkeypatch.setattr(PartialState, "is_local_main_process", property(lambda self: False))
    run(data, tmp_path, verify_data=True, max_train_steps=1, exp_name="beside")
    assert seen == [True, False]
