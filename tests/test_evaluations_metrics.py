"""The formulas: against recorded values of the original, closed forms, brute force and scipy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg

from evaluations import metrics
from evaluations.metrics import density_coverage, frechet_distance, inception_score, kid, mind, precision_recall
from tests.golden import adm_golden


def gaussian(seed: int, width: int, count: int, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of `count` correlated random points."""
    rng = np.random.default_rng(seed)
    points = scale * rng.standard_normal((count, width)) @ rng.standard_normal((width, width)) + rng.standard_normal(
        width
    )
    return points.mean(axis=0), np.cov(points, rowvar=False)


def test_frechet_distance_of_commuting_gaussians():
    rng = np.random.default_rng(0)
    axes, _ = np.linalg.qr(rng.standard_normal((30, 30)))
    a, b = rng.uniform(0.1, 3, (2, 30))
    mu1, mu2 = rng.standard_normal((2, 30))
    expected = np.sum((mu1 - mu2) ** 2) + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
    assert frechet_distance(mu1, (axes * a) @ axes.T, mu2, (axes * b) @ axes.T) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_equals_scipy_and_is_symmetric():
    (mu1, sigma1), (mu2, sigma2) = gaussian(1, 60, 500), gaussian(2, 60, 300)
    root = scipy.linalg.sqrtm(sigma1 @ sigma2)
    expected = np.sum((mu1 - mu2) ** 2) + np.trace(sigma1 + sigma2 - 2 * root.real)
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(mu2, sigma2, mu1, sigma1) == pytest.approx(expected, rel=1e-9)
    assert abs(frechet_distance(mu1, sigma1, mu1, sigma1)) < 1e-8


@pytest.mark.parametrize("counts", [(20, 35), (35, 20), (20, 400)])
def test_frechet_distance_with_fewer_points_than_dimensions_is_exact(counts):
    """The trace of the root is the sum of the singular values of the centred features' own product."""
    rng = np.random.default_rng(3)
    sets = [rng.standard_normal((count, 80)) + offset for count, offset in zip(counts, (0, 0.5), strict=True)]
    centred = [(points - points.mean(axis=0)) / np.sqrt(len(points) - 1) for points in sets]
    trace = scipy.linalg.svdvals(centred[0] @ centred[1].T).sum()
    gap = np.sum((sets[0].mean(axis=0) - sets[1].mean(axis=0)) ** 2)
    moments = [f(points) for points in sets for f in (lambda p: p.mean(axis=0), lambda p: np.cov(p, rowvar=False))]
    expected = gap + sum(np.sum(points**2) for points in centred) - 2 * trace
    assert frechet_distance(*moments) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_of_points_without_spread():
    zero = np.zeros((4, 4))
    assert frechet_distance(np.ones(4), zero, np.zeros(4), zero) == 4.0
    assert frechet_distance(np.ones(4), zero, np.zeros(4), 2 * np.eye(4)) == pytest.approx(12.0)


def test_frechet_distance_refuses_what_it_cannot_use():
    (mu, sigma), (other, wider) = gaussian(1, 4, 9), gaussian(1, 5, 9)
    with pytest.raises(ValueError, match="of one D"):
        frechet_distance(mu, sigma, other, wider)
    with pytest.raises(ValueError, match="NaN"):
        frechet_distance(mu * np.nan, sigma, mu, sigma)


@pytest.mark.parametrize("split_size", [7, 10, 100])
def test_inception_score_is_the_literal_formula_with_a_short_last_split(split_size):
    logits = 3 * np.random.default_rng(4).standard_normal((25, 11)).astype(np.float32)
    scores = []
    for start in range(0, 25, split_size):
        part = np.exp(logits[start : start + split_size])
        part = part / part.sum(axis=1, keepdims=True)
        kl = part * (np.log(part) - np.log(np.expand_dims(np.mean(part, 0), 0)))
        scores.append(np.exp(np.mean(np.sum(kl, 1))))
    assert inception_score(logits, split_size) == pytest.approx(np.mean(scores), rel=1e-6)


def test_inception_score_of_certain_and_of_equal_answers():
    certain = 200.0 * np.eye(8, dtype=np.float32)  # other probabilities underflow to zero
    assert inception_score(certain) == pytest.approx(8)
    assert inception_score(np.ones((8, 5))) == pytest.approx(1)
    assert inception_score(np.sort(certain, axis=0)[::-1], split_size=1) == pytest.approx(1)  # order matters
    with pytest.raises(ValueError, match="NaN"):
        inception_score(np.full((3, 2), np.nan))
    with pytest.raises(ValueError, match="N >= 1"):
        inception_score(np.zeros((0, 2)))


@pytest.mark.parametrize("case", ["precision_recall", "precision_recall_equal"])
@pytest.mark.parametrize("distance", ["fp16", "fp32"])
def test_precision_and_recall_equal_the_original(case, distance):
    case = adm_golden.EXPECTED[case]
    sets = adm_golden.features(case["reference_count"], case["sample_count"], case["seed"])
    found = precision_recall(*sets, distance=distance)
    np.testing.assert_allclose(found, (case["precision"], case["recall"]), atol=0.005)


def brute_force(reference: np.ndarray, samples: np.ndarray, k: int) -> tuple[float, float]:
    """Precision and recall by the definition, one pair of points at a time, in float64."""

    def squared(u, v):
        return float(np.sum((u.astype(np.float64) - v) ** 2))

    def covered(points, centres):
        radii = [sorted(squared(centre, other) for other in centres)[k] for centre in centres]
        return np.mean([any(squared(p, c) <= r for c, r in zip(centres, radii, strict=True)) for p in points])

    return covered(samples, reference), covered(reference, samples)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("distance", ["fp16", "fp32"])
@pytest.mark.parametrize("counts", [(20, 33), (33, 20), (4, 40)])
def test_precision_and_recall_equal_brute_force_with_ties_and_duplicates(k, distance, counts, monkeypatch):
    """Whole numbers are exact in every arithmetic, so ties and points that lie on each other count alike."""
    monkeypatch.setattr(metrics, "BLOCK_ROWS", 6)  # several blocks, the last of them narrower than k + 1
    monkeypatch.setattr(metrics, "BLOCK_COLUMNS", 10)
    rng = np.random.default_rng(5)
    reference = rng.integers(0, 4, (counts[0], 3)).astype(np.float32)
    samples = rng.integers(0, 7, (counts[1], 3)).astype(np.float32)
    assert len(np.unique(reference, axis=0)) < len(reference) or len(reference) < 10
    expected = brute_force(reference, samples, k)
    assert precision_recall(reference, samples, k, distance) == pytest.approx(expected)
    assert precision_recall(samples, reference, k, distance) == pytest.approx(expected[::-1])


def test_precision_is_high_and_recall_low_for_a_collapsed_set():
    rng = np.random.default_rng(6)
    reference = rng.standard_normal((200, 8)).astype(np.float32)
    collapsed = reference[:5].mean(axis=0) * 0.1 + 0.01 * rng.standard_normal((300, 8)).astype(np.float32)
    precision, recall = precision_recall(reference, collapsed)
    assert precision > 0.95
    assert recall < 0.05


def test_the_two_distances_differ_and_overflow_falls_back_to_float32():
    sets = adm_golden.features(300, 200, 23)
    assert precision_recall(*sets, distance="fp16") != precision_recall(*sets, distance="fp32")
    large = [1000 * points for points in sets]  # norms beyond float16's 65,504
    assert precision_recall(*large, distance="fp16") == precision_recall(*large, distance="fp32")


def test_precision_and_recall_refuse_what_they_cannot_use():
    points = np.zeros((5, 2), dtype=np.float32)
    for reference, samples, message in (
        (points[:3], points, "4 reference"),
        (points, points[:3], "4 samples"),
        (points, np.zeros((5, 3)), "one width"),
        (points, points * np.nan, "NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            precision_recall(reference, samples)
    with pytest.raises(ValueError, match="fp16 or fp32"):
        precision_recall(points, points, distance="fp64")


def test_kid_equals_torch_fidelity_and_is_unbiased():
    from torch_fidelity.metric_kid import kid_features_to_metric

    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(7)
    reference, samples = rng.standard_normal((150, 16)), rng.standard_normal((120, 16)) + 0.2
    expected = kid_features_to_metric(
        torch.from_numpy(reference), torch.from_numpy(samples), kid_subsets=20, kid_subset_size=50, verbose=False
    )["kernel_inception_distance_mean"]
    assert kid(reference, samples, subsets=20, subset_size=50) == pytest.approx(expected, rel=1e-9)
    same = kid(reference, rng.standard_normal((150, 16)), subset_size=140)
    assert abs(same) < 0.05 < kid(reference, samples + 1)
    with pytest.raises(ValueError, match="of 2 or more points"):
        kid(reference, samples[:1])


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("counts", [(20, 33), (33, 20)])
def test_density_and_coverage_are_their_formulas(k, counts, monkeypatch):
    """Point by point; whole numbers, so that ties on a ball's border, which it does not hold, are exact."""
    monkeypatch.setattr(metrics, "BLOCK_ROWS", 6)
    monkeypatch.setattr(metrics, "BLOCK_COLUMNS", 10)
    rng = np.random.default_rng(5)
    reference = rng.integers(0, 4, (counts[0], 3)).astype(np.float32)
    samples = rng.integers(0, 5, (counts[1], 3)).astype(np.float32)
    balls, covered = 0, 0
    for i, point in enumerate(reference):
        others = sorted(np.square(point - other).sum() for j, other in enumerate(reference) if j != i)
        inside = sum(np.square(point - sample).sum() < others[k - 1] for sample in samples)
        balls, covered = balls + inside, covered + (inside > 0)
    expected = balls / (k * len(samples)), covered / len(reference)
    assert density_coverage(reference, samples, k) == pytest.approx(expected)


def test_density_and_coverage_of_equal_sets_and_of_a_collapsed_one():
    rng = np.random.default_rng(6)
    reference, others = rng.standard_normal((2, 1000, 8)).astype(np.float32)
    density, coverage = density_coverage(reference, others)
    assert density == pytest.approx(1, abs=0.1)
    assert coverage == pytest.approx(1 - 0.5**5, abs=0.03)  # the k nearest of 2 N points are all of one set
    collapsed = reference[:1] + 0.01 * others
    assert density_coverage(reference, collapsed)[1] < 0.1
    with pytest.raises(ValueError, match="6 reference"):
        density_coverage(reference[:5], others)


def test_mind_is_the_distance_of_sorted_projections():
    from scipy.stats import wasserstein_distance  # of order 1: what is compared below is of order 2

    rng = np.random.default_rng(7)
    x, y = rng.standard_normal((400, 5)), rng.standard_normal((400, 5))
    assert mind(x, x) == 0
    # A shift moves every projection by its own share: 3 D E[(w . shift)^2] = 3 |shift|^2.
    shift = np.array([1.0, 0, -2, 0, 0.5])
    assert mind(x, x + shift, directions=20_000) == pytest.approx(3 * np.square(shift).sum(), rel=0.03)
    # In one dimension there is one direction, up to its sign.
    first, second = x[:, :1], y[:, :1] * 2
    expected = 3 * np.square(np.sort(first[:, 0]) - np.sort(second[:, 0])).mean()
    assert mind(first, second) == pytest.approx(expected)
    assert np.sqrt(mind(first, second) / 3) >= wasserstein_distance(first[:, 0], second[:, 0])
    # Of the larger set as many are drawn as the smaller one has.
    assert mind(x, rng.permutation(x)) == pytest.approx(0, abs=1e-20)
    assert 0 < mind(x, np.concatenate([x, x, x])) < 0.3
    for broken, message in ((x[:, :4], "one width"), (x[:0], "finite features"), (x * np.nan, "finite features")):
        with pytest.raises(ValueError, match=message):
            mind(x, broken)
