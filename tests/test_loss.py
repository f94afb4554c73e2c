"""Each term against an element-wise loop in float64, formula by formula."""

import math

import pytest
import torch

from diffusion.interpolant import PATHS, Interpolant
from loss import ALIGN_OBJECTIVES, Alignment, alignment_loss, training_loss


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def element(objective, d, beta):
    """One element of Eq. 7 and of its rivals in Table 1."""
    if objective == "smooth_l1":
        return d * d / (2 * beta) if abs(d) <= beta else abs(d) - beta / 2
    return abs(d) if objective == "l1" else d * d


def loop(objective, f, target, t, beta, low, high):
    """alignment_loss, one number at a time."""
    total = 0.0
    for n in range(len(f)):
        if not low <= float(t[n]) <= high:
            continue
        values, pair = [], (f[n], target[n])
        if objective == "cosine_over_tokens":  # a channel is a vector over the tokens
            pair = (f[n].T, target[n].T)
        for f_token, target_token in zip(*(tokens.tolist() for tokens in pair), strict=True):
            if objective.startswith("cosine"):
                dot = sum(a * b for a, b in zip(f_token, target_token, strict=True))
                norms = math.sqrt(sum(a * a for a in f_token)) * math.sqrt(sum(b * b for b in target_token))
                values.append(1 - dot / norms)
            else:
                values += [element(objective, a - b, beta) for a, b in zip(f_token, target_token, strict=True)]
        total += sum(values) / len(values)
    return total / len(f)


@pytest.mark.parametrize("objective", ALIGN_OBJECTIVES)
@pytest.mark.parametrize("beta", [0.05, 1.3])
@pytest.mark.parametrize("time_range", [(0.0, 1.0), (0.0, 0.5), (0.5, 1.0)])
def test_alignment_equals_an_elementwise_loop(objective, beta, time_range):
    f, target = draw(6, 5, 8, seed=1), draw(6, 5, 8, seed=2)
    t = torch.tensor([0.0, 0.2, 0.5, 0.51, 0.9, 1.0], dtype=torch.float64)
    found = alignment_loss(f, target, t, Alignment(objective=objective, beta=beta, time_range=time_range))
    assert found.item() == pytest.approx(loop(objective, f, target, t, beta, *time_range), rel=1e-12)


def test_smooth_l1_is_continuous_where_its_branches_meet():
    # The paper prints |d| / beta - 1/2 for the outer branch, which jumps at |d| = beta.
    beta = 0.05

    def at(d):
        difference = torch.full((1, 1, 1), d, dtype=torch.float64)
        return alignment_loss(difference, torch.zeros_like(difference), torch.zeros(1), Alignment(beta=beta)).item()

    assert at(beta) == pytest.approx(beta / 2, rel=1e-12)
    assert at(beta * (1 + 1e-9)) - at(beta * (1 - 1e-9)) < 1e-9
    assert at(2.0) == pytest.approx(2.0 - beta / 2, rel=1e-12)


def test_alignment_of_equal_features_is_zero_and_the_target_gets_no_gradient():
    f = draw(2, 3, 4).requires_grad_()
    target = draw(2, 3, 4, seed=3).requires_grad_()
    for objective in ALIGN_OBJECTIVES:
        same = alignment_loss(f, f.detach().clone(), torch.zeros(2), Alignment(objective=objective))
        assert same.item() == pytest.approx(0, abs=1e-12)
        alignment_loss(f, target, torch.zeros(2), Alignment(objective=objective)).backward()
    assert f.grad.abs().sum() > 0
    assert target.grad is None


def test_a_sample_outside_the_time_range_passes_on_nothing():
    f = torch.tensor([[[1.0]], [[math.inf]]], requires_grad=True)
    t = torch.tensor([0.2, 0.8])
    loss = alignment_loss(f, torch.zeros(2, 1, 1), t, Alignment(objective="l2", time_range=(0.0, 0.5)))
    assert loss.item() == 0.5  # the mean is over the whole batch


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_training_loss_is_the_sum_of_eq_8(path, weight):
    z, eps, out = draw(3, 2, 4, 4, seed=1), draw(3, 2, 4, 4, seed=2), draw(3, 2, 4, 4, seed=3)
    t, y = torch.tensor([0.1, 0.4, 0.8], dtype=torch.float64), torch.tensor([0, 1, 2])
    f, target = draw(3, 4, 8, seed=4), draw(3, 4, 8, seed=5)
    seen = {}

    def model(y_t, time, label):
        seen.update(y_t=y_t, t=time, y=label)
        return out, {"vae": f}

    alignment = Alignment(weight=weight)
    losses = training_loss(model, z, eps, t, y, Interpolant(path), {"vae": target}, {"vae": alignment})

    velocity = 0.0
    for n, time in enumerate(t.tolist()):
        if path == "linear":
            a, b, da, db = 1 - time, time, -1.0, 1.0
        else:
            half = math.pi / 2
            a, b = math.cos(half * time), math.sin(half * time)
            da, db = -half * b, half * a
        pairs = list(zip(z[n].flatten().tolist(), eps[n].flatten().tolist(), out[n].flatten().tolist(), strict=True))
        expected = torch.tensor([a * data + b * noise for data, noise, _ in pairs], dtype=torch.float64)
        torch.testing.assert_close(seen["y_t"][n].flatten(), expected)
        velocity += sum((v - (da * data + db * noise)) ** 2 for data, noise, v in pairs) / len(pairs) / len(t)
    align = loop("smooth_l1", f, target, t, 0.05, 0, 1)
    assert losses["velocity"].item() == pytest.approx(velocity, rel=1e-12)
    assert losses["align_vae"].item() == pytest.approx(align, rel=1e-12)
    assert losses["total"].item() == pytest.approx(velocity + weight * align, rel=1e-12)
    assert torch.equal(seen["t"], t)
    assert torch.equal(seen["y"], y)


@pytest.mark.parametrize("objective", ["smooth_l1", "l2"])
def test_normalised_samples_are_compared_by_their_z_scores(objective):
    f, target = draw(3, 4, 6, seed=1), 40 * draw(3, 4, 6, seed=2) + 7
    t, alignment = torch.rand(3), Alignment(objective=objective, normalize=True)
    scores = [torch.stack([(s - s.mean()) / s.std(correction=0) for s in x]) for x in (f, target)]
    found = alignment_loss(f, target, t, alignment)
    assert found.item() == pytest.approx(loop(objective, *scores, t, 0.05, 0, 1), rel=1e-6)
    torch.testing.assert_close(found, alignment_loss(3 * f - 1, target / 100, t, alignment))
    assert found < 10 < alignment_loss(f, target, t, Alignment(objective=objective))


@pytest.mark.parametrize("path", PATHS)
def test_predicted_data_are_compared_as_velocities(path):
    """Both divided by max(t, 0.05), so that the exact z has no loss; above that t it is the loss of the velocity."""
    z, eps, x = (draw(4, 2, 3, 3, seed=k) for k in (1, 2, 3))
    t = torch.tensor([0.0, 0.02, 0.3, 1.0], dtype=torch.float64)

    def loss(output, prediction, part=slice(None)):
        def model(y_t, t, y):
            return output[part], {}

        batch = z[part], eps[part], t[part]
        return training_loss(model, *batch, None, Interpolant(path, prediction), {}, {})["velocity"].item()

    assert loss(z, "x") == 0
    y_t = Interpolant(path).interpolate(z, eps, t)
    if path == "linear":
        expected = sum(
            (((y_t[n] - x[n]) / max(time, 0.05) - (y_t[n] - z[n]) / max(time, 0.05)) ** 2).mean().item() / len(t)
            for n, time in enumerate(t.tolist())
        )
        assert loss(x, "x") == pytest.approx(expected, rel=1e-10)
    late = slice(2, None)
    a, b = Interpolant(path).a(t), Interpolant(path).b(t)
    a, b, da, db = (c.view(-1, 1, 1, 1) for c in (a, b, Interpolant(path).da(t), Interpolant(path).db(t)))
    v = da * x + db * (y_t - a * x) / b  # Eq. 3 of x and of the noise that x leaves
    assert loss(x, "x", late) == pytest.approx(loss(v, "v", late), rel=1e-10)


def test_without_alignments_the_total_is_the_velocity_loss():
    z = draw(2, 1, 2, 2)
    losses = training_loss(
        lambda y_t, t, y: (torch.zeros_like(y_t), {}), z, z, torch.zeros(2).double(), None, Interpolant(), {}, {}
    )
    assert list(losses) == ["total", "velocity"]
    assert losses["total"] is losses["velocity"]


def test_losses_are_float32_for_a_half_precision_network():
    z, eps = draw(4, 2, 4, 4, seed=1, dtype=torch.float32), draw(4, 2, 4, 4, seed=2, dtype=torch.float32)
    v, f, target = (draw(*s, seed=k).to(torch.bfloat16) for k, s in ((3, (4, 2, 4, 4)), (4, (4, 4, 8)), (5, (4, 4, 8))))
    t, y = torch.rand(4), torch.zeros(4, dtype=torch.long)
    arguments = (z, eps, t, y, Interpolant(), {"vae": target}, {"vae": Alignment()})
    with torch.autocast("cpu", torch.bfloat16):
        half = training_loss(lambda *_: (v, {"vae": f}), *arguments)
    full = training_loss(lambda *_: (v.float(), {"vae": f.float()}), *arguments)
    for name, value in half.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, full[name])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"objective": "huber"}, "smooth_l1, l1, l2, cosine, cosine_over_tokens, found 'huber'"),
        ({"beta": 0.0}, "--align-beta"),
        ({"time_range": (0.5, 0.5)}, "--align-time-range"),
        ({"time_range": (-0.1, 0.5)}, "--align-time-range"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Alignment(**settings)
