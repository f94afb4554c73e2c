"""The path against autograd, closed forms and the paper's boundary conditions."""

import pytest
import torch

from diffusion.interpolant import PATHS, Interpolant


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
