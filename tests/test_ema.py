import copy
import errno
import math

import numpy as np
import pytest
import torch
from torch import nn

from analysis.posthoc_ema import combine, profile
from training import ema as ema_module
from training.config import TrainConfig
from training.ema import EMAUpdater, decays, gamma_of, power_decay


def test_update_equals_the_formula_and_leaves_the_model_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    ema = copy.deepcopy(model)
    expected = [p.detach().double() for p in ema.parameters()]
    for _ in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        before = [p.clone() for p in model.parameters()]
        EMAUpdater([ema], model, [lambda k: 0.9]).update(0)
        expected = [0.9 * e + 0.1 * p.detach().double() for e, p in zip(expected, before, strict=True)]
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    for found, wanted in zip(ema.parameters(), expected, strict=True):
        torch.testing.assert_close(found.detach().double(), wanted, rtol=1e-6, atol=1e-7)


def test_buffers_are_copied():
    model = nn.BatchNorm1d(2)
    ema = copy.deepcopy(model)
    model(torch.randn(8, 2))
    EMAUpdater([ema], model, [lambda k: 0.5]).update(0)
    assert torch.equal(ema.running_mean, model.running_mean)


def test_a_full_disk_costs_a_snapshot_and_no_more(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    emas = {"ema": nn.Linear(2, 2), "ema-power-0.05": nn.Linear(2, 2)}
    monkeypatch.setattr(ema_module, "write_atomically", full)
    with pytest.warns(UserWarning, match="no EMA snapshot of step 4 in .*ema_snapshots.*No space left"):
        ema_module.save_snapshots(tmp_path, 4, emas)
    monkeypatch.undo()
    ema_module.save_snapshots(tmp_path, 5, emas)
    assert [file.name for file in tmp_path.rglob("*.safetensors")] == ["0000005.safetensors"]


def test_other_architectures_are_refused():
    with pytest.raises(AssertionError, match="different parameters"):
        EMAUpdater([nn.Linear(2, 2, bias=False)], nn.Linear(2, 2), [lambda k: 0.9])


def test_each_ema_has_its_own_decay_and_name():
    config = TrainConfig(data_dir="", ema_decay=(0.9999, 0.99), ema_power=(0.05,), ema_warmup=True)
    named = decays(config)
    assert list(named) == ["ema", "ema-0.99", "ema-power-0.05"]
    assert [named["ema"](k) for k in (0, 90, 10**6)] == [0.1, 0.91, 0.9999]
    assert [named["ema-0.99"](k) for k in (0, 10**6)] == [0.1, 0.99]
    assert decays(TrainConfig(data_dir=""))["ema"](0) == 0.9999


@pytest.mark.parametrize("sigma", [0.05, 0.1, 0.25])
def test_the_width_of_a_power_function_is_the_one_asked_for(sigma):
    gamma = gamma_of(sigma)
    assert math.sqrt(gamma + 1) / ((gamma + 2) * math.sqrt(gamma + 3)) == pytest.approx(sigma, rel=1e-9)
    # The same by the profile that the decays give: its standard deviation over the length of the run.
    shares = profile(20_000, gamma, 20_000)
    times = np.arange(20_000) / 20_000
    mean = shares @ times
    assert shares.sum() == pytest.approx(1)
    assert math.sqrt(shares @ (times - mean) ** 2) == pytest.approx(sigma, rel=1e-3)


def test_a_power_function_weighs_the_steps_by_its_profile():
    gamma, steps = gamma_of(0.1), 30
    model, decay = nn.Linear(1, 1, bias=False), power_decay(gamma)
    ema = copy.deepcopy(model)
    updater, values = EMAUpdater([ema], model, [decay]), torch.randn(steps, generator=torch.Generator().manual_seed(0))
    for step in range(steps):
        with torch.no_grad():
            model.weight.fill_(values[step].item())
        updater.update(step)
    expected = float(profile(steps, gamma, steps) @ values.double().numpy())
    assert ema.weight.item() == pytest.approx(expected, rel=1e-5)


def test_eight_snapshots_of_two_widths_give_a_width_between_them():
    snapshots = [(step, width) for width in (0.05, 0.1) for step in range(1000, 4001, 1000)]
    factors, distance = combine(snapshots, 4000, 0.075)
    assert factors.sum() == pytest.approx(1, abs=1e-12)
    assert distance < 0.1
    exact, nothing = combine(snapshots, 4000, 0.1)
    assert nothing < 1e-9
    assert exact[-1] == pytest.approx(1)
