"""A Mac's device, by stand-ins, since no such machine is at hand: what it lacks is left to float32 or to the host."""

import math

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState

from diffusion import guidance, samplers
from evaluations import feature_stats
from runtime import distributed
from runtime.distributed import choose_device, copy_to_host_async
from sampling.batch_size import configured_batch_size
from sampling.config import SampleConfig
from tests.stores import make_store
from tests.test_train import run, same, spoil, weights
from training import optimizer


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


def test_mps_is_chosen_where_torch_has_it(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("mps") == torch.device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device mps: expected a Mac whose torch has MPS, found none"):
        choose_device("mps")


def test_training_takes_a_device_or_refuses_it(tmp_path):
    data = make_store(tmp_path / "store")
    plain, named = (weights(run(data, tmp_path / str(name), device=name)) for name in (None, "cpu"))
    assert same(plain, named)
    with pytest.raises(ValueError, match="--device mps: expected a Mac"):
        run(data, tmp_path / "out", device="mps")
    assert not (tmp_path / "out").exists()


def test_samplers_keep_their_state_in_float32_where_there_is_no_float64(monkeypatch):
    monkeypatch.setattr(distributed, "WITHOUT_FLOAT64", ("cpu",))
    seen, x = set(), torch.randn(2, 4, 8, 8)

    def velocity(x, t, *gate):
        seen.add(x.dtype)
        return 0.1 * x

    guided = guidance.guided_velocity(lambda x, t, y: 0.1 * x, torch.tensor([0, 1]), 3, 2.0, (0.0, 1.0))
    results = [
        samplers.sample_ode(velocity, x, 2, heun=True),
        samplers.sample_dopri5(velocity, x),
        samplers.sample_sde(velocity, x, 3, lambda step: torch.randn(x.shape), samplers.LINEAR),
        samplers.sample_ode(guided, x, 2),
    ]
    assert seen == {result.dtype for result in results} == {torch.float32}


def test_statistics_are_kept_on_the_host(monkeypatch):
    device = torch.device("meta")  # stands for one without float64
    assert feature_stats.Moments(3, device).mean.device == device
    monkeypatch.setattr(feature_stats, "WITHOUT_FLOAT64", ("meta",))
    moments = feature_stats.Moments(3, device)
    moments.update(torch.ones(4, 3))
    moments.flush()
    assert (moments.mean.device.type, moments.mean.dtype) == ("cpu", torch.float64)


def test_the_host_looks_at_steps_that_are_not_finite(tmp_path, monkeypatch):
    data = make_store(tmp_path / "store")
    good = run(data, tmp_path, exp_name="good")
    monkeypatch.setattr(optimizer, "skip_step_if", blind(optimizer.skip_step_if))
    monkeypatch.setattr(optimizer, "LOOKS_NOT", ("cpu",))
    monkeypatch.setattr("train.skip_step_if", optimizer.skip_step_if)
    spoil(monkeypatch, {"total": {3: math.inf}})
    with pytest.raises(ValueError, match="found 1 steps in a row"):
        run(data, tmp_path, max_train_steps=3, checkpointing_steps=2, ema_decay=0.9)
    assert same(weights(tmp_path / "run"), weights(good))


def blind(skip):
    """`skip_step_if`, of which the kernel then takes no notice."""

    def called(own, skipped):
        skip(own, skipped)
        own.found_inf = torch.zeros_like(skipped)

    return called


def test_what_is_cudas_alone_is_not_asked_of_mps():
    config = SampleConfig(checkpoint=("x",), per_proc_batch_size="auto", num_samples=64, device="mps")
    assert configured_batch_size(config, torch.device("mps")) == 64
    (copied,) = copy_to_host_async(torch.ones(3))()
    assert copied.tolist() == [1, 1, 1]
