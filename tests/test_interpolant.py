"""The path against autograd, closed forms and the paper's boundary conditions."""

import math

import pytest
import torch

from diffusion.interpolant import PATHS, Interpolant, choose_shift, shift_time


@pytest.mark.parametrize("path", PATHS)
def test_ends_are_data_and_noise(path):
    interpolant = Interpolant(path)
    assert (interpolant.a(0.0), interpolant.b(0.0)) == (1, 0)
    assert interpolant.a(1.0) == pytest.approx(0, abs=1e-15)
    assert interpolant.b(1.0) == 1


@pytest.mark.parametrize("path", PATHS)
def test_derivatives_equal_autograd(path):
    interpolant = Interpolant(path)
    t = torch.linspace(0, 1, 17, dtype=torch.float64, requires_grad=True)
    for value, derivative in ((interpolant.a, interpolant.da), (interpolant.b, interpolant.db)):
        (expected,) = torch.autograd.grad(value(t).sum(), t)
        torch.testing.assert_close(derivative(t).detach(), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("path", PATHS)
def test_float_and_tensor_times_agree(path):
    interpolant = Interpolant(path)
    for name in ("a", "b", "da", "db"):
        coefficient = getattr(interpolant, name)
        assert coefficient(torch.tensor(0.3, dtype=torch.float64)).item() == pytest.approx(coefficient(0.3), abs=1e-15)


@pytest.mark.parametrize("path", PATHS)
def test_velocity_is_the_time_derivative_of_the_path(path):
    interpolant = Interpolant(path)
    z, eps = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    h = 1e-5
    difference = interpolant.interpolate(z, eps, t + h) - interpolant.interpolate(z, eps, t - h)
    torch.testing.assert_close(interpolant.velocity(z, eps, t), difference / (2 * h), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("path", PATHS)
def test_score_of_gaussian_data_in_closed_form(path):
    # z ~ N(m, s^2): y_t ~ N(a m, a^2 s^2 + b^2), so that score and velocity (Eq. 3) are known.
    m, s, t = 0.7, 1.9, 0.35
    interpolant = Interpolant(path)
    a, b, da, db = interpolant.a(t), interpolant.b(t), interpolant.da(t), interpolant.db(t)
    y = torch.linspace(-4, 4, 33, dtype=torch.float64)
    variance = a**2 * s**2 + b**2
    mean_z = m + a * s**2 / variance * (y - a * m)  # E[z | y]
    mean_eps = b / variance * (y - a * m)  # E[eps | y]
    velocity = da * mean_z + db * mean_eps
    torch.testing.assert_close(interpolant.score(velocity, y, t), -(y - a * m) / variance, rtol=1e-12, atol=1e-12)


def test_each_sample_has_its_own_time():
    interpolant = Interpolant()
    z, eps = torch.ones(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    y = interpolant.interpolate(z, eps, torch.tensor([0.25, 0.75]))
    assert y[:, 0, 0, 0].tolist() == [0.75, 0.25]


def test_float32_inside_autocast_and_for_half_inputs():
    interpolant = Interpolant()
    z, eps = torch.randn(2, 4, 4, 2, 2, dtype=torch.bfloat16)
    t = torch.rand(4)
    with torch.autocast("cpu", torch.bfloat16):
        for value in (
            interpolant.interpolate(z, eps, t),
            interpolant.velocity(z, eps, t),
            interpolant.score(z, eps, t),
        ):
            assert value.dtype == torch.float32
        expected = (1 - t).view(-1, 1, 1, 1) * z.float() + t.view(-1, 1, 1, 1) * eps.float()
        assert torch.equal(interpolant.interpolate(z, eps, t), expected)


def test_unknown_path_is_named():
    with pytest.raises(ValueError, match="linear, cosine, found 'quadratic'"):
        Interpolant("quadratic")


@pytest.mark.parametrize("path", PATHS)
def test_the_velocity_of_predicted_data_is_that_of_the_path(path):
    """The exact z, in place of a network's, gives the velocity of Eq. 3; another differs, more the nearer t is to 0."""
    interpolant = Interpolant(path, "x")
    z, eps = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([1e-3, 0.03, 0.3, 0.7, 1.0], dtype=torch.float64)
    y_t = interpolant.interpolate(z, eps, t)
    found = interpolant.predicted_velocity(z, y_t, t)
    torch.testing.assert_close(found, interpolant.velocity(z, eps, t), rtol=1e-10, atol=1e-10)
    for n, time in enumerate(t.tolist()):  # times as floats, as samplers have them
        torch.testing.assert_close(interpolant.predicted_velocity(z[n], y_t[n], time), found[n], rtol=1e-12, atol=1e-12)
    assert Interpolant(path).predicted_velocity(z, y_t, t) is z
    if path == "linear":
        for n, time in enumerate(t.tolist()):
            expected = (y_t[n] - eps[n]) / max(time, 0.05)
            torch.testing.assert_close(interpolant.predicted_velocity(eps, y_t, t, 0.05)[n], expected)
    with pytest.raises(ValueError, match="expected a prediction among v, x, found 'eps'"):
        Interpolant(path, "eps")


def test_log_normal_ratios_are_repas_times():
    """REPA's loss.py: sigma = exp(normal), t = sigma / (1 + sigma), or 2 / pi atan(sigma) on the cosine path."""
    normal = torch.linspace(-6, 6, 25, dtype=torch.float64)
    found = (Interpolant(path).time_at(normal).tolist() for path in PATHS)
    for number, linear, cosine in zip(normal.tolist(), *found, strict=True):
        sigma = math.exp(number)
        assert linear == pytest.approx(sigma / (1 + sigma), rel=1e-12)
        assert cosine == pytest.approx(2 / math.pi * math.atan(sigma), rel=1e-12)
    assert Interpolant("cosine").time_at(torch.tensor([1e4])) == Interpolant().time_at(torch.tensor([1e4])) == 1


def test_a_shift_of_time_keeps_the_ends_and_multiplies_the_ratio_to_noise():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    shifted = shift_time(t, 3.0)
    assert (shifted[0], shifted[-1]) == (0, 1)
    torch.testing.assert_close(shifted[:-1] / (1 - shifted[:-1]), 3 * t[:-1] / (1 - t[:-1]))
    torch.testing.assert_close(shift_time(shifted, 1 / 3), t)
    assert torch.equal(shift_time(t, 1.0), t)
    assert choose_shift("auto", (4, 32, 32)) == 1
    assert choose_shift("auto", (768, 16, 16)) == pytest.approx(6.9282, abs=1e-4)  # RAE's
    assert choose_shift("2.5", (4, 32, 32)) == 2.5


@pytest.mark.parametrize("path", PATHS)
def test_the_velocity_towards_the_mean_of_the_data_is_the_exact_one(path):
    """Data of N(m, s^2) have a closed form: E[z | y_t] and the velocity of Eq. 2, from the densities alone."""
    interpolant, m, s = Interpolant(path), 0.7, 0.4
    y = torch.linspace(-3, 3, 25, dtype=torch.float64).view(5, 5)
    for t in (0.01, 0.3, 0.8, 1.0):
        a, b, da, db = interpolant.a(t), interpolant.b(t), interpolant.da(t), interpolant.db(t)
        variance = a**2 * s**2 + b**2
        # Of a Gaussian path N(a m, variance) that each sample rides: mean' + variance' / (2 variance) (y - mean).
        exact = da * m + (a * da * s**2 + b * db) / variance * (y - a * m)
        mean = m + a * s**2 / variance * (y - a * m)
        torch.testing.assert_close(interpolant.velocity_towards(mean, y, t), exact, rtol=1e-9, atol=1e-9)
        z, eps, times = torch.randn(5, 5), torch.randn(5, 5), torch.full((5,), t)
        y_t = interpolant.interpolate(z, eps, times)
        found = interpolant.velocity_towards(z, y_t, times)
        torch.testing.assert_close(found, interpolant.velocity(z, eps, times), rtol=1e-3, atol=1e-3)
