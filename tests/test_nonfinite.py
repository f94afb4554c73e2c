"""The guard's decisions against the same rules written out in numpy."""

import math

import numpy as np
import pytest
import torch

from training.nonfinite import LEAST, WINDOW, StepGuard

TERMS = ["loss", "velocity", "grad_norm"]


def make(**options):
    return StepGuard(TERMS, torch.device("cpu"), **{"spike_factor": 5.0, "skip_spikes": True} | options)


def test_decisions_medians_and_sums_are_those_of_a_plain_loop():
    rng = np.random.default_rng(0)
    guard, kept, applied, bad_steps, spikes, run, longest = make(), {}, [], [], [], 0, 0
    for step in range(3 * WINDOW):
        values = rng.lognormal(size=3).astype(np.float32)
        if rng.random() < 0.05:
            values[2] *= 50
        if rng.random() < 0.05:
            values[rng.integers(3)] = rng.choice([math.nan, math.inf, -math.inf])
        window = [norm for at, norm in kept.items() if at > step - 1 - WINDOW]
        broken = not np.isfinite(values).all()
        spike = not broken and len(window) >= LEAST and values[2] > 5 * np.sort(window)[(len(window) - 1) // 2]
        assert bool(guard.check(step, torch.from_numpy(values))) == (broken or spike)
        run = run + 1 if broken or spike else 0
        longest = max(longest, run)
        spikes += [values[2]] if spike else []
        if broken or spike:
            bad_steps.append(step)
        else:
            kept[step] = values[2]
            applied.append(values)
    assert len(spikes) > 3
    verdict = guard.read()
    assert (verdict.applied, verdict.skipped) == (len(applied), len(bad_steps))
    assert (verdict.first_skipped, verdict.spikes, verdict.longest_run) == (bad_steps[0] + 1, len(spikes), longest)
    assert verdict.terms == TERMS
    for k, name in enumerate(TERMS):
        assert verdict.means[name] == pytest.approx(np.mean([values[k] for values in applied]), rel=1e-5)


def test_reading_begins_anew_but_a_row_of_bad_steps_goes_on():
    guard, bad, good = make(), torch.tensor([1.0, math.nan, 1.0]), torch.ones(3)
    for step, values in enumerate((good, bad, bad)):
        guard.check(step, values)
    verdict = guard.read()
    assert (verdict.longest_run, verdict.healthy, verdict.terms) == (2, False, ["velocity"])
    guard.check(3, bad)
    verdict = guard.read()
    assert (verdict.longest_run, verdict.applied, verdict.first_skipped) == (3, 0, 4)
    assert math.isnan(verdict.means["loss"])
    guard.check(4, good)
    verdict = guard.read()
    assert (verdict.longest_run, verdict.healthy, verdict.skipped, verdict.first_skipped) == (0, True, 0, None)
    assert verdict.terms == []


def test_a_spike_is_reported_but_applied_unless_asked_otherwise():
    for skip in (False, True):
        guard = make(skip_spikes=skip)
        for step in range(LEAST):
            assert guard.check(step, torch.tensor([1.0, 1.0, 2.0])) == 0
        assert guard.check(LEAST, torch.tensor([1.0, 1.0, 11.0])) == skip
        verdict = guard.read()
        assert (verdict.spikes, verdict.skipped, verdict.largest) == (1, int(skip), 5.5)
        assert verdict.terms == []


def test_early_norms_are_no_spikes():
    guard = make()
    for step in range(LEAST - 1):
        guard.check(step, torch.ones(3))
    assert guard.check(LEAST - 1, torch.tensor([1.0, 1.0, 100.0])) == 0


def test_a_restored_guard_decides_as_the_first_one():
    guard, other = make(), make()
    for step in range(LEAST + 5):
        guard.check(step, torch.tensor([1.0, 1.0, 2.0]))
    other.load_state_dict(guard.state_dict())
    spike = torch.tensor([1.0, 1.0, 11.0])
    assert other.check(LEAST + 5, spike) == guard.check(LEAST + 5, spike) == 1


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "float16's scaler"])
@pytest.mark.parametrize("refused", [0.0, 1.0])
def test_a_refused_step_leaves_weights_and_moments_alone(refused, scaled):
    """AdamW's own number for overflows, set by hand or through the scaler, is what refuses a step."""
    from types import SimpleNamespace

    from train import apply_step

    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, fused=True)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    scaler = torch.amp.GradScaler("cpu") if scaled else None
    loss = model(torch.ones(2, 4)).sum()
    (scaler.scale(loss) if scaled else loss).backward()
    if scaled:
        scaler.unscale_(optimizer)  # as clipping does
    weight, moment = model.weight.detach().clone(), optimizer.state[model.weight]["exp_avg"].clone()
    step = (lambda: scaler.step(optimizer)) if scaled else optimizer.step
    wrapped = SimpleNamespace(optimizer=optimizer, step=step, zero_grad=optimizer.zero_grad)
    run = SimpleNamespace(optimizer=wrapped, accelerator=SimpleNamespace(scaler=scaler))
    apply_step(run, torch.tensor(refused))
    assert torch.equal(model.weight, weight) == bool(refused)
    assert torch.equal(optimizer.state[model.weight]["exp_avg"], moment) == bool(refused)
    assert optimizer.state[model.weight]["step"] == (1 if refused else 2)
    assert model.weight.grad is None
