import copy

import pytest
import torch
from torch import nn

from training.ema import EMAUpdater


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
        EMAUpdater(ema, model, 0.9).update()
        expected = [0.9 * e + 0.1 * p.detach().double() for e, p in zip(expected, before, strict=True)]
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    for found, wanted in zip(ema.parameters(), expected, strict=True):
        torch.testing.assert_close(found.detach().double(), wanted, rtol=1e-6, atol=1e-7)


def test_buffers_are_copied():
    model = nn.BatchNorm1d(2)
    ema = copy.deepcopy(model)
    model(torch.randn(8, 2))
    EMAUpdater(ema, model, 0.5).update()
    assert torch.equal(ema.running_mean, model.running_mean)


def test_other_architectures_are_refused():
    with pytest.raises(AssertionError, match="different parameters"):
        EMAUpdater(nn.Linear(2, 2, bias=False), nn.Linear(2, 2), 0.9)
