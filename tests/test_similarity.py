"""Measures of likeness between features, each beside an independent formula."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.metrics import r2_score

from analysis.similarity import Moments, cknna, fit_probe, linear_cka, principal_components, probe_r2


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def related(count=60, D=7, d=4, seed=0):
    """Features that share some directions, with means and scales of their own."""
    x = normal(count, D, seed=seed) * torch.arange(1.0, D + 1) + 3
    return x, x @ normal(D, d, seed=seed + 1) + 4 * normal(count, d, seed=seed + 2) - 5


def moments_of(x, y, *cuts):
    moments = Moments.empty(x.shape[1], y.shape[1])
    for begin, end in zip((0, *cuts), (*cuts, len(x)), strict=True):
        moments.update(x[begin:end], y[begin:end])
    return moments


# Principal components


@pytest.mark.parametrize("shape", [(16, 40), (40, 6)])
def test_components_are_those_of_the_svd_and_of_the_covariance(shape):
    x = normal(*shape) * torch.linspace(3, 1, shape[1]) + 10
    scores, share = principal_components(x)
    centred = x.numpy() - x.numpy().mean(0)
    vt = np.linalg.svd(centred, full_matrices=False)[2]
    expected = centred @ vt[:3].T
    expected *= np.sign(expected[np.abs(expected).argmax(0), range(3)])
    np.testing.assert_allclose(scores.numpy(), expected, atol=1e-9)
    values = np.linalg.eigvalsh(np.cov(x.numpy().T))[::-1]
    np.testing.assert_allclose(scores.var(0).numpy(), values[:3], rtol=1e-9)
    assert share == pytest.approx(values[:3].sum() / values.sum(), rel=1e-9)


def test_a_sign_agrees_with_what_it_is_to_be_like():
    x = normal(16, 5)
    scores, _ = principal_components(x)
    wanted = scores * torch.tensor([-2.0, 3.0, -0.5])
    np.testing.assert_allclose(principal_components(x, like=wanted)[0], scores * torch.tensor([-1, 1, -1]))


def test_components_beyond_the_rank_are_zero_and_not_rounding():
    line = normal(16, 1) @ normal(1, 30) + 1000
    scores, share = principal_components(line.float())
    assert (scores[:, 1:].abs().max() / scores[:, 0].abs().max()) < 1e-4  # float32's own rounding of the input
    scores, share = principal_components(line)
    assert torch.equal(scores[:, 1:], torch.zeros(16, 2, dtype=torch.float64))
    assert share == pytest.approx(1)
    scores, share = principal_components(torch.ones(16, 30))
    assert (torch.count_nonzero(scores), share) == (0, 0.0)
    assert principal_components(normal(16, 1))[0].shape == (16, 3)


# CKA


def hsic(K, L):
    """tr(K H L H), by Gram matrices over tokens (Gretton et al. 2005)."""
    H = np.eye(len(K)) - 1 / len(K)
    return np.trace(K @ H @ L @ H)


def test_cka_is_that_of_gram_matrices():
    x, y = related()
    K, L = (x @ x.T).numpy(), (y @ y.T).numpy()
    expected = hsic(K, L) / np.sqrt(hsic(K, K) * hsic(L, L))
    assert 0.1 < expected < 0.95
    assert linear_cka(moments_of(x, y)) == pytest.approx(expected, rel=1e-10)


def test_cka_ignores_rotation_scale_and_shift_alone():
    x, y = related()
    value = linear_cka(moments_of(x, y))
    rotation = torch.linalg.qr(normal(7, 7, seed=9))[0]
    assert linear_cka(moments_of(0.3 * x @ rotation - 8, -5 * y)) == pytest.approx(value, rel=1e-10)
    assert linear_cka(moments_of(y, x)) == pytest.approx(value, rel=1e-10)
    assert linear_cka(moments_of(x * torch.arange(1.0, 8) ** 2, y)) != pytest.approx(value, rel=1e-3)
    assert linear_cka(moments_of(x, x)) == pytest.approx(1, rel=1e-12)
    assert linear_cka(moments_of(x, 2 * x @ rotation)) == pytest.approx(1, rel=1e-10)
    assert linear_cka(moments_of(x, torch.ones_like(y))) == 0.0


# CKNNA


def brute_force_cknna(x, y, k):
    """Word by word: neighbours by sorting, then Song et al.'s estimator, Equation 5, as sums over indices."""
    x, y = ([row / np.sqrt((row**2).sum()) for row in features.numpy()] for features in (x, y))
    M = len(x)

    def kernel(rows):
        return [[float(np.dot(a, b)) for b in rows] for a in rows]

    def nearest(kernel, i):
        others = sorted((j for j in range(M) if j != i), key=lambda j: kernel[i][j], reverse=True)
        return set(others[:k])

    def aligned(K, L):
        A, B = np.zeros((M, M)), np.zeros((M, M))
        for i in range(M):
            for j in nearest(K, i) & nearest(L, i):
                A[i, j], B[i, j] = K[i][j], L[i][j]
        trace = cross = total_a = total_b = 0.0
        for i in range(M):
            for j in range(M):
                trace += A[i, j] * B[j, i]
                total_a += A[i, j]
                total_b += B[i, j]
                for q in range(M):
                    cross += A[i, q] * B[q, j]
        return (trace + total_a * total_b / ((M - 1) * (M - 2)) - 2 * cross / (M - 2)) / (M * (M - 3))

    K, L = kernel(x), kernel(y)
    return aligned(K, L) / np.sqrt(aligned(K, K) * aligned(L, L))


@pytest.mark.parametrize("k", [2, 5, 11, 29])
def test_cknna_is_its_definition(k):
    x, y = related(30)
    expected = brute_force_cknna(x, y, k)
    assert abs(expected) > 0.01
    assert cknna(x, y, k) == pytest.approx(expected, rel=1e-9)


def test_cknna_of_equal_and_of_unrelated_features():
    x = related(80)[0]
    assert cknna(x, x, 10) == pytest.approx(1, rel=1e-12)
    rotation = torch.linalg.qr(normal(7, 7, seed=9))[0]
    lengths = 1 + normal(80, 1, seed=8).abs()
    assert cknna(x * lengths, x @ rotation, 10) == pytest.approx(1, rel=1e-10)
    assert abs(cknna(normal(400, 6, seed=1), normal(400, 6, seed=2), 10)) < 0.05


@pytest.mark.parametrize(("count", "k"), [(10, 10), (3, 1), (10, 0)])
def test_cknna_of_too_few_is_refused(count, k):
    with pytest.raises(ValueError, match="CKNNA: expected at least 4 tokens"):
        cknna(normal(count, 3), normal(count, 3), k)


# The probe


def test_the_probe_is_least_squares_measured_on_other_tokens():
    x, y = related(200)
    W, b = fit_probe(moments_of(x[:150], y[:150]))
    reference = LinearRegression().fit(x[:150].numpy(), y[:150].numpy())
    np.testing.assert_allclose(W.T.numpy(), reference.coef_, atol=1e-4)
    expected = r2_score(y[150:].numpy(), reference.predict(x[150:].numpy()), multioutput="variance_weighted")
    assert probe_r2(moments_of(x[150:], y[150:]), W, b) == pytest.approx(expected, abs=1e-5)


def test_the_penalty_is_that_of_a_ridge_on_standardised_inputs():
    x, y = related(50)
    W, b = fit_probe(moments_of(x, y), ridge=0.3)
    standard = (x - x.mean(0)) / x.std(0, correction=0)
    reference = Ridge(alpha=0.3 * 50).fit(standard.numpy(), y.numpy())
    np.testing.assert_allclose(x @ W + b, reference.predict(standard.numpy()), rtol=1e-9)


def test_a_planted_feature_is_found_and_noise_is_not():
    x = normal(3000, 20) * torch.logspace(-3, 3, 20) + 50
    planted = (x - 50) / torch.logspace(-3, 3, 20) @ normal(20, 5, seed=1) + 7
    W, b = fit_probe(moments_of(x[:2000], planted[:2000]))
    assert probe_r2(moments_of(x[2000:], planted[2000:]), W, b) == pytest.approx(1, abs=1e-9)
    noise = normal(3000, 5, seed=2)
    W, b = fit_probe(moments_of(x[:2000], noise[:2000]))
    assert -0.05 < probe_r2(moments_of(x[2000:], noise[2000:]), W, b) < 0.01


def test_inputs_that_never_vary_or_repeat_do_no_harm():
    x, y = related(200)
    W, b = fit_probe(moments_of(x, y))
    odd = torch.cat([x, torch.full((200, 1), 1234.5), torch.zeros(200, 1), x[:, :2]], dim=1)
    W_odd, b_odd = fit_probe(moments_of(odd, y, 60, 130))
    assert torch.equal(W_odd[7:9], torch.zeros(2, 4, dtype=torch.float64))
    np.testing.assert_allclose(odd @ W_odd + b_odd, x @ W + b, atol=1e-4)


# Sums


def test_sums_gathered_in_batches_are_those_of_all_at_once():
    x, y = related(100)
    x, y = x + 1e6, y - 1e5  # where sums of squares would lose 9 digits
    streamed = moments_of(x, y, 1, 2, 40, 40, 97)
    other = moments_of(x[:30], y[:30])
    other.join(moments_of(x[30:], y[30:]))
    other.join(Moments.empty(7, 4))
    for moments in (streamed, other):
        assert moments.count == 100
        np.testing.assert_allclose(moments.mean_x, x.mean(0), rtol=1e-14)
        np.testing.assert_allclose(moments.mean_y, y.mean(0), rtol=1e-14)
        for name, (a, b) in {"xx": (x, x), "xy": (x, y), "yy": (y, y)}.items():
            expected = (a - a.mean(0)).T @ (b - b.mean(0))
            found = getattr(moments, name)
            np.testing.assert_allclose(found, expected, atol=1e-8 * expected.abs().max())
    empty = Moments.empty(7, 4)
    empty.join(streamed)
    assert torch.equal(empty.xx, streamed.xx)
