"""Solvers on Gaussian data, whose velocity, score and solution are known; guidance against its formula."""

import itertools
import math

import pytest
import torch
from scipy.integrate import solve_ivp

from diffusion.interpolant import PATHS, Interpolant
from diffusion.samplers import DIFFUSIONS, guided_velocity, sample_dopri5, sample_ode, sample_sde
from models.sit import SiT, SiTConfig
from sampling.config import DIFFUSION_FORMS, LAST_STEPS, SAMPLERS
from sampling.generator import sample_latents

MEAN, STD = 1.5, 0.3  # of the data


class GaussianData:
    """z ~ N(MEAN, STD^2): y_t is Gaussian with mean a m and variance a^2 s^2 + b^2, jointly with z and eps."""

    def __init__(self, path):
        self.path = path

    def coefficients(self, t):
        if self.path == "linear":
            return 1 - t, t, -1.0, 1.0
        half = math.pi / 2
        return math.cos(half * t), math.sin(half * t), -half * math.sin(half * t), half * math.cos(half * t)

    def variance(self, t):
        a, b, _, _ = self.coefficients(t)
        return a**2 * STD**2 + b**2

    def velocity(self, y, t):
        """E[da z + db eps | y], by the regression of z and eps on y."""
        a, b, da, db = self.coefficients(t)
        residual = (y - a * MEAN) / self.variance(t)
        return da * (MEAN + a * STD**2 * residual) + db * b * residual

    def score(self, y, t):
        return -(y - self.coefficients(t)[0] * MEAN) / self.variance(t)


def order(errors):
    """Slope of log error over log step, when the number of steps doubles from one entry to the next."""
    return [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("heun, expected", [(False, 1), (True, 2)])
def test_ode_converges_to_the_exact_map_with_its_order(path, heun, expected):
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    exact = MEAN + STD * x  # the flow of a Gaussian keeps each point's distance to the mean in units of its std
    velocity = GaussianData(path).velocity
    errors = [(sample_ode(velocity, x, n, heun) - exact).abs().max().item() for n in (64, 128, 256, 512)]
    assert errors[-1] < (1e-2 if not heun else 1e-4)
    assert order(errors)[-1] == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_network_of_data_samples_as_one_of_velocities(path, sampler):
    """The exact E[z | y_t], through the whole sampler: the samples of the exact velocity, whose last slope of Heun's
    is missing, and of which dopri5 integrates all but the last 1e-3."""
    data, seen = GaussianData(path), []

    class Network:
        config = SiTConfig(1, 8, 1, patch_size=1, latent_size=2, in_channels=1, num_classes=2)

        def __init__(self, prediction):
            self.prediction = prediction

        def __call__(self, y, t, label):
            seen.append(t[0].item())
            a, b, da, db = data.coefficients(t[0].item())
            x = MEAN + a * STD**2 * (y - a * MEAN) / (a**2 * STD**2 + b**2)
            return x if self.prediction == "x" else da * x + db * b * (y - a * MEAN) / (a**2 * STD**2 + b**2)

    def sample(prediction):
        noise = [torch.randn(16, 1, 2, 2, generator=torch.Generator().manual_seed(k)) for k in range(20)]
        seen.clear()
        return sample_latents(
            Network(prediction),
            torch.zeros(16, dtype=torch.long),
            lambda step=-1: noise[step],
            sampler,
            20,
            Interpolant(path, prediction),
            time_shift=2.0,
        )

    x = sample("x")
    assert min(seen) > 0
    if sampler == "ode-heun":
        noise = torch.randn(16, 1, 2, 2, generator=torch.Generator().manual_seed(19))
        expected = sample_ode(data.velocity, noise, 20, heun=True, time_shift=2.0, ends_at_0=False)
    else:
        expected = sample("v")
    torch.testing.assert_close(x, expected, rtol=0, atol=2e-3 if sampler == "ode-dopri5" else 1e-5)


@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_shifted_times_are_those_of_the_formula(num_steps):
    """t' = 3 t / (1 + 2 t) of equal steps; the SDE's last step keeps its size, so that the others begin at its t."""
    seen = []

    def velocity(x, t):
        seen.append(t)
        return torch.zeros_like(x)

    sample_ode(velocity, torch.zeros(2), num_steps, time_shift=3.0)
    equal = [1 - k / num_steps for k in range(num_steps)]
    assert seen == pytest.approx([3 * t / (1 + 2 * t) for t in equal], rel=1e-12)
    seen.clear()
    sample_sde(velocity, torch.zeros(2), num_steps, lambda step: torch.zeros(2), Interpolant(), 0.04, time_shift=3.0)
    last = 0.04 / (3 - 2 * 0.04)  # whose t' is 0.04
    equal = [1 + (last - 1) * k / max(1, num_steps - 1) for k in range(num_steps)]
    assert seen == pytest.approx([3 * t / (1 + 2 * t) for t in equal], rel=1e-12)
    assert num_steps == 1 or seen[-1] == 0.04


def test_ode_evaluations_are_where_the_docstring_says():
    times = []

    def velocity(x, t):
        assert x.dtype == torch.float64
        times.append(t)
        return torch.ones_like(x, dtype=torch.float32)

    z = sample_ode(velocity, torch.zeros(3, dtype=torch.float32), 4)
    assert times == [1.0, 0.75, 0.5, 0.25]
    assert z.dtype == torch.float64
    assert torch.equal(z, -torch.ones(3, dtype=torch.float64))  # a velocity of 1 is followed backwards
    times.clear()
    sample_ode(velocity, torch.zeros(3), 2, heun=True)
    assert times == [1.0, 0.5, 0.5, 0.0]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("steps", [1, 7])
def test_repas_heun_leaves_the_last_step_to_euler(path, steps):
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    data, gates = GaussianData(path), []

    def velocity(y, t, gate=None):
        gates.append((t, gate))
        return data.velocity(y, t)

    y = x
    for k in range(steps):
        t, s = 1 - k / steps, 1 - (k + 1) / steps
        slope = data.velocity(y, t)
        ahead = y + (s - t) * slope
        y = ahead if k == steps - 1 else y + (s - t) * (slope + data.velocity(ahead, s)) / 2
    z = sample_ode(velocity, x, steps, heun=True, repa=True)
    torch.testing.assert_close(z, y, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(z, sample_ode(velocity, x, steps, heun=True))
    assert len(gates[: 2 * steps - 1]) == 2 * steps - 1
    for k, (t, gate) in enumerate(gates[: 2 * steps - 1]):  # first and second evaluations by turns
        assert t == pytest.approx(1 - (k // 2 + k % 2) / steps)
        assert gate == (gates[k - 1][0] if k % 2 else None)


def test_repas_heun_guides_a_step_by_its_first_time():
    """Steps from 1, 0.75, 0.5, 0.25; guidance on [0.5, 0.75]: the second evaluation follows the first."""
    sizes = []

    def model(x, t, y):
        sizes.append((t[0].item(), len(x)))
        return x

    velocity = guided_velocity(model, torch.zeros(1, dtype=torch.long), 1, 2.0, (0.5, 0.75))
    sample_ode(velocity, torch.ones(1, 1, 1, 1), 4, heun=True, repa=True)
    assert sizes == [(1.0, 1), (0.75, 1), (0.75, 2), (0.5, 2), (0.5, 2), (0.25, 2), (0.25, 1)]
    sizes.clear()
    sample_ode(velocity, torch.ones(1, 1, 1, 1), 4, heun=True)
    assert sizes == [(1, 1), (0.75, 2), (0.75, 2), (0.5, 2), (0.5, 2), (0.25, 1), (0.25, 1), (0, 1)]


@pytest.mark.parametrize("path", PATHS)
def test_dopri5_is_the_exact_map_within_its_tolerances(path):
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    exact, errors, counts = MEAN + STD * x, [], []
    for tolerance in (1e-3, 1e-5, 1e-7):
        times = []

        def velocity(y, t, times=times):
            times.append(t)
            return GaussianData(path).velocity(y, t)

        z = sample_dopri5(velocity, x.float(), atol=tolerance, rtol=tolerance)
        assert z.dtype == torch.float64
        assert min(times) >= 0  # nothing is asked for beyond the data
        errors.append((z - exact).abs().max().item())
        counts.append(len(times))
        assert errors[-1] < 20 * tolerance
    assert errors[0] > errors[1] > errors[2]
    assert counts[0] < counts[1] < counts[2] < 400


@pytest.mark.parametrize("tolerances", [{}, {"atol": 1e-4, "rtol": 1e-2}, {"atol": 1e-8, "rtol": 1e-8}])
def test_dopri5_has_the_accuracy_of_scipys(tolerances):
    """An independent Dormand-Prince, of other rules for its steps."""
    x, data = torch.linspace(-2, 2, 9, dtype=torch.float64), GaussianData("cosine")
    settings = {"atol": 1e-6, "rtol": 1e-3} | tolerances
    solved = solve_ivp(lambda t, y: data.velocity(y, t), (1, 0), x.numpy(), method="RK45", **settings)
    difference = sample_dopri5(data.velocity, x, **tolerances) - torch.from_numpy(solved.y[:, -1])
    assert difference.abs().max() < 10 * (settings["atol"] + settings["rtol"])


def test_dopri5_says_when_a_velocity_is_not_finite():
    with pytest.raises(ValueError, match=r"expected finite samples, found a velocity .* at t = 1;.*--mixed-precision"):
        sample_dopri5(lambda x, t: x * torch.nan, torch.ones(2))


def exact_moments(path, num_steps, last_step_size):
    """Mean and variance of the SDE sampler's output on Gaussian data, with no random numbers.

    The sampler is then affine in its inputs, x = c + A x_1 + sum_k B_k n_k with independent standard normals x_1 and
    n_k: the mean is c and the variance A^2 + sum B_k^2. One batch of unit inputs gives all coefficients.
    """
    # Columns: x_1, each of the num_steps - 1 noises, nothing.
    units = torch.eye(num_steps, num_steps + 1, dtype=torch.float64)
    data, path = GaussianData(path), Interpolant(path)
    z = sample_sde(data.velocity, units[0], num_steps, lambda step: units[step + 1], path, last_step_size)
    c = z[-1]
    return c.item(), (z[:-1] - c).square().sum().item()


@pytest.mark.parametrize("path", PATHS)
def test_sde_converges_weakly_to_the_data_with_order_one(path):
    """Here the last step shrinks with the others: its own error is of second order in its length."""
    moments = [exact_moments(path, n, last_step_size=1 / n) for n in (100, 200, 400, 800)]
    mean_errors = [abs(mean - MEAN) for mean, _ in moments]
    variance_errors = [abs(variance - STD**2) for _, variance in moments]
    assert mean_errors[-1] < 5e-3
    assert variance_errors[-1] < 5e-3
    # The mean of the linear path moves in a straight line, which no step gets wrong.
    assert max(mean_errors) < 1e-12 if path == "linear" else order(mean_errors)[-1] > 0.9
    assert order(variance_errors)[-1] == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("path", PATHS)
def test_sde_of_the_papers_length_has_the_right_moments(path):
    mean, variance = exact_moments(path, 250, last_step_size=0.04)
    assert mean == pytest.approx(MEAN, abs=0.02)
    assert math.sqrt(variance) == pytest.approx(STD, abs=0.02)


@pytest.mark.parametrize("path", PATHS)
def test_sde_equals_a_literal_loop_with_the_known_score(path):
    data = GaussianData(path)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    noises = torch.randn(9, 5, 3, generator=generator)
    steps = []

    def noise(step):
        steps.append(step)
        return noises[step]

    z = sample_sde(data.velocity, x.float(), 10, noise, Interpolant(path), last_step_size=0.1)
    assert steps == list(range(9))
    y, times = x.float().double(), torch.linspace(1, 0.1, 10, dtype=torch.float64).tolist()
    for k in range(9):
        h = times[k] - times[k + 1]
        langevin = times[k] * data.score(y, times[k])
        y = y + h * (langevin - data.velocity(y, times[k])) + math.sqrt(2 * times[k] * h) * noises[k].double()
    y = y + 0.1 * (0.1 * data.score(y, 0.1) - data.velocity(y, 0.1))
    torch.testing.assert_close(z, y, rtol=1e-9, atol=1e-9)
    assert z.dtype == torch.float64


def sit_diffusion(form, norm, path, s):
    """SiT's diffusion, in its time s = 1 - t: alpha weighs the data, sigma the noise."""
    half = math.pi / 2
    if path == "linear":
        alpha, sigma, d_alpha, d_sigma = s, 1 - s, 1.0, -1.0
    else:
        alpha, sigma = math.sin(half * s), math.cos(half * s)
        d_alpha, d_sigma = half * math.cos(half * s), -half * math.sin(half * s)
    return {
        "constant": norm,
        "SBDM": norm * (sigma**2 * d_alpha / alpha - sigma * d_sigma) if alpha else math.inf,
        "sigma": norm * sigma,
        "linear": norm * (1 - s),
        "decreasing": 0.25 * (norm * math.cos(math.pi * s) + 1) ** 2,
        "increasing-decreasing": norm * math.sin(math.pi * s) ** 2,
    }[form]


def sit_loop(data, x, steps, noises, form="linear", norm=1.0, last="mean", h=0.1):
    """SiT's sampler in its own time and words: dx = [v + w score] ds + sqrt(2 w) dW."""

    def velocity(x, s):
        return -data.velocity(x, 1 - s)

    def drift(x, s):
        return velocity(x, s) + sit_diffusion(form, norm, data.path, s) * data.score(x, 1 - s)

    h = 0.0 if last == "none" else h
    times = torch.linspace(1e-3 if form == "SBDM" else 0, 1 - h, steps, dtype=torch.float64).tolist()
    for k in range(steps - 1):
        ds = times[k + 1] - times[k]
        w = sit_diffusion(form, norm, data.path, times[k])
        x = x + drift(x, times[k]) * ds + math.sqrt(2 * w * ds) * noises[k].double()
    s = times[-1]
    alpha, sigma, _, _ = data.coefficients(1 - s)
    ends = {"none": lambda: x, "mean": lambda: x + drift(x, s) * h, "euler": lambda: x + velocity(x, s) * h}
    ends["tweedie"] = lambda: x / alpha + sigma**2 / alpha * data.score(x, 1 - s)
    return ends[last]()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("norm", [1.0, 0.7])
@pytest.mark.parametrize("form", DIFFUSION_FORMS)
def test_each_form_of_diffusion_is_sits(path, norm, form):
    data, generator = GaussianData(path), torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    noises = torch.randn(11, 5, 3, generator=generator)
    options = {"diffusion_form": form, "diffusion_norm": norm}
    z = sample_sde(data.velocity, x, 12, lambda k: noises[k], Interpolant(path), 0.1, **options)
    expected = sit_loop(data, x, 12, noises, form, norm)
    torch.testing.assert_close(z, expected, rtol=1e-8, atol=1e-8)
    plain = sample_sde(data.velocity, x, 12, lambda k: noises[k], Interpolant(path), 0.1)
    same = form == "linear" or (form, path) == ("sigma", "linear")  # there b_t = t
    assert torch.allclose(z, plain) == (same and norm == 1)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("last_step", LAST_STEPS)
@pytest.mark.parametrize("form", ["linear", "sigma"])
def test_each_last_step_is_sits(path, last_step, form):
    data, generator = GaussianData(path), torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    noises = torch.randn(7, 5, 3, generator=generator)
    times = []

    def velocity(y, t):
        times.append(t)
        return data.velocity(y, t)

    options = {"diffusion_form": form, "last_step": last_step}
    z = sample_sde(velocity, x, 8, lambda k: noises[k], Interpolant(path), 0.2, **options)
    torch.testing.assert_close(z, sit_loop(data, x, 8, noises, form, last=last_step, h=0.2), rtol=1e-8, atol=1e-8)
    assert len(times) == (7 if last_step == "none" else 8)
    mean = sample_sde(data.velocity, x, 8, lambda k: noises[k], Interpolant(path), 0.2, diffusion_form=form)
    assert torch.allclose(z, mean) == (last_step == "mean")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("form", DIFFUSION_FORMS)
def test_every_form_leads_to_the_data(path, form):
    """Many short steps; the moments are those of an ensemble of 40,000."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40_000, generator=generator, dtype=torch.float64)
    noise = lambda _: torch.randn(40_000, generator=generator)  # noqa: E731
    z = sample_sde(GaussianData(path).velocity, x, 1000, noise, Interpolant(path), 0.001, diffusion_form=form)
    assert z.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert z.std().item() == pytest.approx(STD, abs=0.01)


def test_the_names_of_the_flags_are_those_of_the_formulas():
    assert set(DIFFUSIONS) == set(DIFFUSION_FORMS)
    common = lambda k: torch.zeros(1), Interpolant("linear"), 0.1
    with pytest.raises(ValueError, match=r"expected one of constant, SBDM.*--diffusion-form.*found 'cubic'"):
        sample_sde(lambda x, t: x, torch.ones(1), 2, *common, diffusion_form="cubic")
    with pytest.raises(ValueError, match=r"expected one of none, mean.*--last-step.*found 'last'"):
        sample_sde(lambda x, t: x, torch.ones(1), 2, *common, last_step="last")
    with pytest.raises(ValueError, match=r"expected at least 2 steps .*--num-steps.*found 1"):
        sample_sde(lambda x, t: x, torch.ones(1), 1, *common, last_step="none")


def test_sde_takes_as_many_evaluations_as_steps_from_one_to_last_step_size():
    for num_steps, expected in ((1, [1.0]), (2, [1.0, 0.04]), (4, [1.0, 0.68, 0.36, 0.04])):
        times = []

        def velocity(x, t, times=times):
            times.append(t)
            return -x

        sample_sde(velocity, torch.ones(2), num_steps, lambda _: torch.zeros(2), Interpolant("linear"))
        assert times == pytest.approx(expected)
        assert times[0] == 1.0


@pytest.mark.parametrize("last_step_size", [0.0, 1.0, -0.1, math.nan])
def test_sde_refuses_a_last_step_outside_the_path(last_step_size):
    with pytest.raises(ValueError, match=r"--last-step-size.*found"):
        sample_sde(lambda x, t: x, torch.ones(1), 2, lambda _: torch.ones(1), Interpolant("linear"), last_step_size)


@pytest.mark.parametrize("num_steps", [0, -1])
def test_solvers_refuse_no_steps(num_steps):
    with pytest.raises(ValueError, match=r"at least 1 step.*--num-steps"):
        sample_ode(lambda x, t: x, torch.ones(1), num_steps)
    with pytest.raises(ValueError, match=r"at least 1 step.*--num-steps"):
        sample_sde(lambda x, t: x, torch.ones(1), num_steps, lambda _: torch.ones(1), Interpolant("linear"))


K = 3


def random_sit():
    """A small SiT none of whose outputs is zero, as adaLN-Zero would have it."""
    torch.manual_seed(0)
    config = SiTConfig(depth=2, hidden_size=32, num_heads=2, patch_size=2, latent_size=4, in_channels=4, num_classes=K)
    sit = SiT(config).eval().requires_grad_(False)
    for parameter in sit.parameters():
        parameter.normal_(std=0.1)
    return sit


class Recorder:
    """A model that notes the size and type of what it is called with."""

    def __init__(self, model):
        self.model, self.sizes, self.times = model, [], []

    def __call__(self, x, t, y):
        assert (x.dtype, t.dtype, y.dtype) == (torch.float32, torch.float32, torch.int64)
        assert len(x) == len(t) == len(y)
        self.sizes.append(len(x))
        self.times.append(t)
        return self.model(x, t, y)


def test_guidance_is_its_formula_on_every_channel():
    sit, y = random_sit(), torch.tensor([0, 2])
    x = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    t = torch.full((2,), 0.3)
    v_class, v_null = sit(x.float(), t, y), sit(x.float(), t, torch.tensor([K, K]))
    assert ((v_class - v_null).abs().amin(dim=(0, 2, 3)) > 0).all()  # so that each channel can tell
    v = guided_velocity(sit, y, K, 2.5, (0.0, 1.0))(x, 0.3)
    assert v.dtype == torch.float64
    torch.testing.assert_close(v, (v_null + 2.5 * (v_class - v_null)).double(), rtol=1e-5, atol=1e-6)
    v = guided_velocity(sit, y, K, 0.0, (0.0, 1.0))(x, 0.3)
    torch.testing.assert_close(v, v_null.double(), rtol=1e-5, atol=1e-6)


def test_guidance_of_three_channels_leaves_the_others_to_the_class():
    sit, y = random_sit(), torch.tensor([0, 2])
    x, t = torch.randn(2, 4, 4, 4, dtype=torch.float64), torch.full((2,), 0.3)
    v_class, v_null = sit(x.float(), t, y).double(), sit(x.float(), t, torch.tensor([K, K])).double()
    v = guided_velocity(sit, y, K, 2.5, (0.0, 1.0), channels="3")(x, 0.3)
    expected = v_class.clone()
    for channel in range(3):
        expected[:, channel] = (1 - 2.5) * v_null[:, channel] + 2.5 * v_class[:, channel]
    torch.testing.assert_close(v, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(v[:, 3], guided_velocity(sit, y, K, 2.5, (0.0, 1.0))(x, 0.3)[:, 3])
    with pytest.raises(ValueError, match=r"expected 3 or all \(--guidance-channels\), found '2'"):
        guided_velocity(sit, y, K, 2.5, (0.0, 1.0), channels="2")


def test_autoguidance_is_edm2s_formula():
    main, guide, y = random_sit(), random_sit(), torch.tensor([0, 2])
    for parameter in guide.parameters():
        parameter.mul_(0.8)
    x, t = torch.randn(2, 4, 4, 4, dtype=torch.float64), torch.full((2,), 0.3)
    v_main, v_guide = main(x.float(), t, y).double(), guide(x.float(), t, y).double()
    models = Recorder(main), Recorder(guide)
    velocity = guided_velocity(models[0], y, K, 2.5, (0.2, 1.0), guide=models[1])
    torch.testing.assert_close(velocity(x, 0.3), v_guide + 2.5 * (v_main - v_guide), rtol=1e-5, atol=1e-6)
    assert torch.equal(velocity(x, 0.1), guided_velocity(main, y, K, 1.0, (0.0, 1.0))(x, 0.1))
    assert [model.sizes for model in models] == [[2, 2], [2]]  # outside its interval the guide is not asked


def test_scale_one_is_no_guidance_exactly_and_costs_nothing():
    sit, y = random_sit(), torch.tensor([0, 2])
    x = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    model = Recorder(sit)
    v = guided_velocity(model, y, K, 1.0, (0.0, 1.0))(x, 0.3)
    assert torch.equal(v, sit(x.float(), torch.full((2,), 0.3), y).double())
    assert model.sizes == [2]


def test_guidance_keeps_to_its_interval_and_doubles_no_batch_outside():
    sit, y = random_sit(), torch.tensor([0, 1, 2])
    x = torch.randn(3, 4, 4, 4, dtype=torch.float64)
    model = Recorder(sit)
    velocity = guided_velocity(model, y, K, 4.0, (0.25, 0.75))
    plain = guided_velocity(sit, y, K, 1.0, (0.0, 1.0))
    for t in (1.0, 0.76, 0.75, 0.5, 0.25, 0.24, 0.0):
        assert torch.equal(velocity(x, t), plain(x, t)) == (not 0.25 <= t <= 0.75)
    assert model.sizes == [3, 3, 6, 6, 6, 3, 3]
    assert [times[0].item() for times in model.times] == pytest.approx([1.0, 0.76, 0.75, 0.5, 0.25, 0.24, 0.0])


def test_autocast_reaches_the_network_and_not_the_state():
    types = []

    def model(x, t, y):
        types.append((x @ x).dtype)
        return x @ x

    x, y = torch.randn(2, 1, 4, 4, dtype=torch.float64), torch.tensor([0, 1])
    assert guided_velocity(model, y, K, 1.0, (0.0, 1.0), torch.bfloat16)(x, 0.5).dtype == torch.float64
    assert guided_velocity(model, y, K, 1.0, (0.0, 1.0))(x, 0.5).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):  # as train.py's grids are drawn
        guided_velocity(model, y, K, 1.0, (0.0, 1.0))(x, 0.5)
    assert types == [torch.bfloat16, torch.float32, torch.bfloat16]


@pytest.mark.parametrize(
    "scale, interval, named",
    [
        (math.nan, (0.0, 1.0), "--guidance-scale"),
        (math.inf, (0.0, 1.0), "--guidance-scale"),
        (2.0, (0.6, 0.4), "--guidance-low"),
        (2.0, (-0.1, 1.0), "--guidance-low"),
        (2.0, (0.0, 1.1), "--guidance-high"),
        (2.0, (0.0, math.nan), "--guidance-high"),
    ],
)
def test_bad_guidance_is_named(scale, interval, named):
    with pytest.raises(ValueError, match=named):
        guided_velocity(lambda x, t, y: x, torch.tensor([0]), K, scale, interval)
