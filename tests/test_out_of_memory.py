"""Memory that runs out while a run trains: what is done is saved, one line says so, and grids never end a run."""

import re

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from PIL import Image

import train
from models.load import checkpoints
from tests.stores import make_store, make_vae
from tests.test_ranks import start
from tests.test_train import run, same, weights

ERROR = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data") / "store")


def fail_at(step, monkeypatch):
    """Memory runs out in that step, counted from 1."""
    compute, calls = train.training_loss, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == step:
            raise ERROR
        return compute(*arguments)

    monkeypatch.setattr(train, "training_loss", failing)


@pytest.mark.parametrize("every", [100, 2], ids=["saved now", "saved before"])
def test_a_step_without_memory_ends_in_one_line_and_nothing_is_lost(every, data, tmp_path, monkeypatch):
    whole = run(data, tmp_path / "whole", max_train_steps=4)
    fail_at(3, monkeypatch)
    message = r"expected memory for step 3, found too little \(CUDA out of memory\); .*0000002; .*--micro-batch: "
    with pytest.raises(ValueError, match=message) as error:
        run(data, tmp_path, max_train_steps=4, checkpointing_steps=every)
    assert "\n" not in str(error.value)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["0000002"]
    monkeypatch.undo()
    assert same(weights(run(data, tmp_path, max_train_steps=4)), weights(whole))


def test_a_first_step_without_memory_saves_nothing(data, tmp_path, monkeypatch):
    fail_at(1, monkeypatch)
    with pytest.raises(ValueError, match=r"expected memory for step 1, .*the last checkpoint is none"):
        run(data, tmp_path)
    assert not checkpoints(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["0", "1", "0 1"])
def test_ranks_without_memory_save_once_and_end_all(ranks, data, tmp_path):
    process = start(f"no memory on {ranks}", data, tmp_path, max_train_steps=9)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert len(re.findall(r"^error.*: expected memory for step 3, .*0000002;", err, re.M)) >= 1, err
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["0000002"]
    assert run(data, tmp_path, batch_size=8, max_train_steps=3)


def test_a_grid_that_does_not_fit_is_made_smaller_once(tmp_path, monkeypatch):
    store = make_store(tmp_path / "store", vae=make_vae(tmp_path / "vae"))
    sample, fits = train.sample_latents, 2

    def limited(sit, y, *arguments, **options):
        if len(y) > fits:
            raise ERROR
        return sample(sit, y, *arguments, **options)

    monkeypatch.setattr(train, "sample_latents", limited)
    options = {"sampling_steps": 1, "sampling_count": 9, "sampling_num_steps": 1, "max_train_steps": 3}
    with pytest.warns(UserWarning, match="no memory for a grid of 9 images: 2 from now on") as warned:
        folder = run(store, tmp_path, **options)
    assert len([w for w in warned if "no memory" in str(w.message)]) == 1
    sizes = {Image.open(path).size for path in (folder / "samples").iterdir()}
    assert sizes == {(36, 70)}
    fits = 0
    with pytest.warns(UserWarning, match="no memory for a grid of 9 images: 0 from now on"):
        folder = run(store, tmp_path, exp_name="none", **options)
    assert not list(folder.glob("samples/*"))
    assert [path.name for path in checkpoints(folder)] == ["0000003"]
