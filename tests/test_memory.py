"""What fits: the micro-batch that is found by memory, and what is counted for it."""

import functools
import json
import time
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState

from models.aligned import AlignedSiT
from models.load import latest_checkpoint, read_state
from models.projector import Projector
from models.sit import SiT, SiTConfig
from reporting.log import read_log
from tests.stores import make_store
from tests.test_train import run
from training import memory, setup
from training.config import TrainConfig

GIB = 2**30


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data") / "store", size=16)


def count(name="SiT-S/2", latent_size=16, processes=1, on_gpu=False, **changes):
    config = TrainConfig(data_dir="x", resolution=256, **{"mixed_precision": "no", "sampling_steps": 0} | changes)
    sit = SiTConfig.from_name(name, latent_size, 4, 3)
    machine = SimpleNamespace(num_processes=processes, device=torch.device("cuda" if on_gpu else "cpu"))
    plain = changes.get("align", "vae") != "vae"
    heads = lambda: {} if plain else {"vae": (2, Projector(sit.hidden_size, sit.patch_dim))}  # noqa: E731
    return memory.count_memory(config, sit, heads, machine, heads()), AlignedSiT(SiT(sit), heads()), config


@pytest.mark.parametrize("changes", [{}, {"mixed_precision": "bf16"}, {"grad_checkpoint": 2}])
def test_activations_are_those_of_a_real_step(changes):
    counted, model, config = count(**changes)
    model.sit.checkpoint_every = config.grad_checkpoint
    own, kept = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}, {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    x, t, y = torch.randn(3, 4, 16, 16), torch.rand(3), torch.tensor([0, 1, 3])
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", enabled=config.mixed_precision == "bf16"):
        model(x, t, y)
    found = sum(storage.nbytes() for storage in kept.values())
    assert counted.activations(3) == pytest.approx(found, rel=0.02)


def test_states_are_exact():
    counted, model, _ = count()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    assert counted.gradients == memory.size(parameter.grad for parameter in model.parameters())
    optimizer.step()
    assert counted.moments == memory.size(v for values in optimizer.state.values() for v in values.values())
    assert counted.weights == memory.size([*model.parameters(), *model.buffers()])
    assert counted.emas == memory.size(
        [*model.parameters(), *model.sit.buffers()]
    )  # the head can guide: it has one, too
    assert count(ema_decay=(0.9, 0.99), ema_power=(0.1,))[0].emas == 3 * counted.emas


def test_what_saves_memory_is_counted():
    counts = functools.partial(count, "SiT-Ti/4", 8)
    plain, *_ = counts()
    assert counts(grad_checkpoint=1)[0].activations(8) < 0.3 * plain.activations(8)
    divided = counts(processes=2, zero1=True)[0]
    assert plain.moments / 2 <= divided.moments < 0.55 * plain.moments
    assert counts(processes=2)[0].moments == plain.moments
    low, on_gpu = (counts(mixed_precision="bf16", on_gpu=on_gpu)[0] for on_gpu in (False, True))
    assert low.per_image < on_gpu.per_image < plain.per_image
    assert counts(sampling_steps=5)[0].needed(1) > plain.needed(1)


def test_the_largest_divisor_that_fits_is_taken():
    counted = memory.TrainingMemory(1, 1, 1, 1, batch=1, grid=0, saving=0, per_image=10, fixed=5, working=10)
    assert counted.needed(4) == 90
    assert [counted.largest(24, limit) for limit in (33, 34, 99, 101, 189, 190, 1e9)] == [0, 1, 3, 4, 8, 8, 24]


@pytest.mark.parametrize("name", ["SiT-Ti/8", pytest.param("SiT-S/2", marks=pytest.mark.slow)])
def test_a_micro_batch_is_found_by_memory_and_changes_no_loss(name, data, tmp_path, monkeypatch, capsys):
    options = {"model": name, "batch_size": 32, "max_train_steps": 1}
    whole = read_log(run(data, tmp_path / "whole", **options))
    begin = time.monotonic()
    counted, *_ = count(name, batch_size=32)
    assert time.monotonic() - begin < 10
    asked, images, limit = [], 4, 1.001 * counted.needed(4) / (1 - memory.MARGIN)
    monkeypatch.setattr(memory, "memory_limit", lambda device, held: asked.append(held) or limit)
    folder = run(data, tmp_path, **options)
    assert asked == [counted.weights + counted.emas]
    assert f"32 = 1 processes x 8 micro-batches x {images};" in capsys.readouterr().out
    for name in ("loss", "velocity", "align_vae"):
        assert read_log(folder)[0][name] == pytest.approx(whole[0][name], rel=1e-6)
    # It is recorded, and taken over by the same run on the same machine alone.
    assert read_state(latest_checkpoint(folder))["micro_batch"]["images"] == images
    monkeypatch.setattr(setup, "count_memory", lambda *arguments: pytest.fail("counted anew"))
    monkeypatch.setattr(memory, "memory_limit", lambda device, held: GIB / 100)
    run(data, tmp_path, **options | {"max_train_steps": 1})
    assert f"micro-batches x {images};" in capsys.readouterr().out
    # A number that was given is no choice of auto's; and a run of older code was not divided.
    machine = SimpleNamespace(num_processes=1, device=torch.device("cpu"))
    config, found = TrainConfig(data_dir="x", **options), read_state(latest_checkpoint(folder))["micro_batch"]
    choose = functools.partial(memory.choose_micro_batch, config, machine, lambda: counted, 0, methods={})
    monkeypatch.setattr(memory, "memory_limit", lambda device, held: limit)
    assert choose(found=found | {"micro_batch": "2", "images": 2})["images"] == images
    assert choose(found={})["images"] == 32


def test_where_not_one_image_fits_a_line_says_what_to_give(data, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "memory_limit", lambda device, held: GIB / 100)
    message = r"expected 0\.\d GiB of memory .* found 0\.0 GiB; give --grad-checkpoint 1, --zero1 .* smaller --model"
    with pytest.raises(ValueError, match=message):
        run(data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_micro_batch_that_is_given_is_taken_or_refused(data, tmp_path):
    folder = run(data, tmp_path, micro_batch=3)
    assert json.loads((folder / "config.json").read_text())["micro_batch"]["micro_batches"] == 2
    folder = run(data, tmp_path, micro_batch=1, gradient_accumulation_steps=2, exp_name="both")
    assert json.loads((folder / "config.json").read_text())["micro_batch"]["micro_batches"] == 6
    for value, message in ((4, "a divisor of the 6 .*found 4"), (0, "auto or a number"), ("all", "auto or a number")):
        with pytest.raises(ValueError, match=f"--micro-batch: expected {message}"):
            run(data, tmp_path, micro_batch=value, exp_name="refused")


def test_images_that_a_method_takes_together_stay_together(data, tmp_path, monkeypatch):
    options = {"batch_size": 12, "align": "dispersive", "dispersive_group": 4, "max_train_steps": 1}
    counted, *_ = count("SiT-Ti/4", batch_size=12, align="dispersive")
    assert counted.largest(12, 1.001 * counted.needed(6) / (1 - memory.MARGIN), group=4) == 4
    assert counted.largest(12, 1.001 * counted.needed(3) / (1 - memory.MARGIN), group=4) == 0
    with pytest.raises(ValueError, match=r"expected a multiple of the 4 images that --align takes.*found 6"):
        run(data, tmp_path / "out", micro_batch=6, **options)
    monkeypatch.setattr(memory, "memory_limit", lambda device, held: 1.001 * counted.needed(6) / (1 - memory.MARGIN))
    folder = run(data, tmp_path, **options)
    assert read_state(latest_checkpoint(folder))["micro_batch"]["images"] == 4
