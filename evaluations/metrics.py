"""Distances and scores between sets of features: numpy and scipy only, no images, no networks, no files.

The definitions are those of the ADM suite (openai/guided-diffusion, `evaluations/evaluator.py`); where the arithmetic
is another, the docstring says why and by how much. All functions take numpy arrays or CPU tensors.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg
import scipy.special

BLOCK_ROWS, BLOCK_COLUMNS = 1024, 8192  # of a distance matrix held at once: 32 MB


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Squared 2-Wasserstein distance of two Gaussians: |mu1 - mu2|^2 + tr(S1 + S2 - 2 sqrtm(S1 S2)).

    With S1 = A A^T and S2 = B B^T, tr sqrtm(S1 S2) is the sum of the singular values of A^T B. Ways that were compared
    (`benchmarks/bench_evaluations.py` prints times and errors on its machine):

    - `scipy.linalg.sqrtm(S1 @ S2)`, the original's, and the eigenvalues of `S1 @ S2`: Schur forms of a matrix that is
      not symmetric, many times slower. Where there are fewer images than dimensions, both take roots of eigenvalues
      that are nothing but rounding: 1e-7 of the trace, by chance of either sign.
    - A by `eigh`, then `eigvalsh(A^T S2 A)`: twice the time of what follows, and the same 1e-7.
    - A and B by `eigh`, then singular values: exact in any rank, ten times slower.

    Chosen: A and B are pivoted Cholesky factors, which end at the matrix's rank, and the singular values come from the
    `eigvalsh` of the smaller Gram matrix of A^T B. In full rank all ways agree to 1e-12. With N < D this one is exact
    (1e-12 against singular values of the features themselves) and takes a fraction of a second. It cannot give anything
    that is not finite, so the original's "add 1e-6 to the diagonals" has no place here.

    The original's value with N < D differs by its own rounding: by up to 1e-4 of a distance that is a small difference
    of large traces.

    Args:
        mu1, mu2: means, (D,).
        sigma1, sigma2: covariances, (D, D), symmetric positive semidefinite.

    Raises:
        ValueError: shapes that do not fit, or values that are not finite.
    """
    mu1, mu2 = (np.asarray(mu, dtype=np.float64) for mu in (mu1, mu2))  # (D,)
    sigma1, sigma2 = (np.asarray(sigma, dtype=np.float64) for sigma in (sigma1, sigma2))  # (D, D)
    shapes = [array.shape for array in (mu1, sigma1, mu2, sigma2)]
    width = mu1.size
    if shapes != [(width,), (width, width)] * 2:
        raise ValueError(
            f"expected two means (D,) and two covariances (D, D) of one D, found {shapes}; fix: compare statistics of "
            "the same features"
        )
    if not all(np.isfinite(array).all() for array in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("expected finite statistics, found NaN or infinity; fix: look for broken images")
    return float(np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2.0 * _trace_of_root(sigma1, sigma2))


def _trace_of_root(sigma1: np.ndarray, sigma2: np.ndarray) -> float:
    """tr sqrtm(S1 S2) of two positive semidefinite matrices (D, D)."""
    product = _factor(sigma1).T @ _factor(sigma2)  # (rank 1, rank 2)
    if product.shape[0] > product.shape[1]:
        product = product.T
    return float(np.sqrt(np.maximum(np.linalg.eigvalsh(product @ product.T), 0.0)).sum())


def _factor(sigma: np.ndarray) -> np.ndarray:
    """A (D, rank) with A A^T = sigma (D, D): pivoted Cholesky, up to where nothing but rounding is left."""
    tolerance = max(sigma.diagonal().max(), 0.0) * len(sigma) * np.finfo(np.float64).eps
    triangle, pivots, rank, _ = scipy.linalg.lapack.dpstrf(sigma, tol=tolerance, lower=1)
    factor = np.empty((len(sigma), rank))
    factor[pivots - 1] = np.tril(triangle)[:, :rank]
    return factor


def inception_score(logits: np.ndarray, split_size: int = 5000) -> float:
    """Inception score: exp of the mean of KL(p(y|x) || p(y)), averaged over contiguous splits in the given order.

    Natural logarithm; softmax in float32, as the original; averages in float64. A last split that is shorter counts as
    much as the others. Samples sorted by class give nonsense, since each split then has a p(y) of its own.

    Args:
        logits: (N, K), without the bias.
        split_size: images per split.

    Raises:
        ValueError: no rows, or values that are not finite.
    """
    logits = np.asarray(logits, dtype=np.float32)  # (N, K)
    if logits.ndim != 2 or not len(logits) or split_size < 1:
        raise ValueError(f"expected logits (N, K) with N >= 1 and split_size >= 1, found {logits.shape}, {split_size}")
    if not np.isfinite(logits).all():
        raise ValueError("expected finite logits, found NaN or infinity; fix: look for broken images")
    scores = []
    for start in range(0, len(logits), split_size):
        part = scipy.special.softmax(logits[start : start + split_size], axis=1)  # (n, K)
        part = part.astype(np.float64)
        marginal = part.mean(axis=0)  # (K,)
        # x log x with 0 log 0 = 0: the original's own formula gives NaN where a float32 probability underflows
        divergence = scipy.special.rel_entr(part, marginal).sum(axis=1)  # (n,)
        scores.append(np.exp(divergence.mean()))
    return float(np.mean(scores))


def precision_recall(
    reference: np.ndarray, samples: np.ndarray, k: int = 3, distance: str = "fp16"
) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al., 2019) as the ADM suite computes them.

    Precision: the share of samples inside the ball of at least one reference point; recall: the share of reference
    points inside the ball of at least one sample. A point's ball reaches to its k-th nearest neighbour in its own set.
    Squared distances are max(|u|^2 - 2 uv + |v|^2, 0); the border belongs to the ball.

    The original holds everything in float16. So does "fp16": one float16 product, its sums taken in float32 as on a
    tensor core, and float16 sums of it and the norms. A block that overflows float16 is computed again in float32, as
    there. The order of a float16 norm's partial sums is the hardware's. The one of `_half_sums` was chosen because it
    gives the original's recorded values: seven of eight exactly, one to 0.0025. Norms summed in float32 do as well with
    900 points and more, but miss the recall of a case of 96 points by 0.021. On pairs of 900 and 1,100 points from
    five other seeds, 20 other orders of the sums were tried: they gave up to 0.007 more or less precision and 0.011
    more or less recall, norms summed one after the other 0.008 and 0.027. So expect 0.01 between machines, and more
    for few points. "fp32" is exact to float32 and repeats everywhere.

    Time is one matrix product of R^2 + S^2 + R S rows; memory is both sets in float32, twice, and one block.

    Args:
        reference: (R, D); all of the reference file's images (10,000 at 256 x 256).
        samples: (S, D).
        k: neighbour whose distance is the radius, not counting the point itself.
        distance: "fp16", as the original, or "fp32".

    Returns:
        precision and recall, each in 0..1. Swapping the sets swaps the two.

    Raises:
        ValueError: a set of k points or fewer, widths that differ, values that are not finite.
    """
    if distance not in ("fp16", "fp32"):
        raise ValueError(f"expected a distance of fp16 or fp32, found {distance}")
    reference_points, sample_points = _pair(reference, samples, k, distance)
    reference_radii = _radii(reference_points, k)  # (R,)
    sample_radii = _radii(sample_points, k)  # (S,)
    reference_inside = np.zeros(len(reference_radii), dtype=bool)
    sample_inside = np.zeros(len(sample_radii), dtype=bool)
    for rows, columns, block in _blocks(reference_points, sample_points):  # block: (rows, columns)
        reference_inside[rows] |= (block <= sample_radii[None, columns]).any(axis=1)
        sample_inside[columns] |= (block <= reference_radii[rows, None]).any(axis=0)
    return float(sample_inside.mean()), float(reference_inside.mean())


def density_coverage(reference: np.ndarray, samples: np.ndarray, k: int = 5) -> tuple[float, float]:
    """Density and coverage (Naeem et al., 2020, arXiv 2002.09797, Eq. 5 and 8), in float32 distances.

    A reference point's ball reaches to its k-th nearest neighbour in the reference; the border does not belong to it.
    Density: the balls that a sample lies in, over k, averaged over samples (about 1 for equal sets, and not bounded).
    Coverage: the share of reference points in whose ball there is a sample. Both suppose sets of about equal size.

    Args:
        reference: (R, D). samples: (S, D).
        k: as its authors: 5.

    Raises:
        ValueError: as `precision_recall`.
    """
    reference_points, sample_points = _pair(reference, samples, k, "fp32")
    radii, balls = _radii(reference_points, k), 0  # (R,)
    covered = np.zeros(len(radii), dtype=bool)
    for rows, _, block in _blocks(reference_points, sample_points):  # block: (rows, columns)
        inside = block < radii[rows, None]
        balls += int(inside.sum())
        covered[rows] |= inside.any(axis=1)
    return balls / (k * len(sample_points.exact)), float(covered.mean())


def _pair(reference: np.ndarray, samples: np.ndarray, k: int, distance: str) -> list[_Points]:
    """Both sets, each of more than k points of one width."""
    sets = {"reference": _Points(reference, distance), "samples": _Points(samples, distance)}
    for name, points in sets.items():
        if k < 1 or len(points.exact) <= k:
            raise ValueError(
                f"expected at least k + 1 = {k + 1} {name} for precision, recall, density and coverage, found "
                f"{len(points.exact)}; fix: give more images or choose other metrics"
            )
    widths = [points.exact.shape[1] for points in sets.values()]
    if widths[0] != widths[1]:
        raise ValueError(f"expected features of one width, found {widths[0]} (reference) and {widths[1]} (samples)")
    return list(sets.values())


class _Points:
    """One set of features: `exact` (N, D) float32, `rounded` for the products, and the squared `norms` (N,)."""

    def __init__(self, features: np.ndarray, distance: str):
        self.exact = np.ascontiguousarray(features, dtype=np.float32)  # (N, D)
        if self.exact.ndim != 2 or not np.isfinite(self.exact).all():
            found = "NaN or infinity; fix: look for broken images" if self.exact.ndim == 2 else self.exact.shape
            raise ValueError(f"expected finite features (N, D), found {found}")
        self.rounded, self.norms = self.exact, np.square(self.exact).sum(axis=1)
        if distance == "fp16":
            with np.errstate(over="ignore"):  # what is infinite is computed again in float32
                half = self.exact.astype(np.float16)
                self.rounded = half.astype(np.float32)  # numpy has no fast float16 product
                starts = range(0, len(half), BLOCK_ROWS)
                self.norms = np.concatenate([_half_sums(np.square(half[i : i + BLOCK_ROWS])) for i in starts])


def _half_sums(values: np.ndarray) -> np.ndarray:  # (N, D) float16 -> (N,) float16
    """Sums with partial sums in float16: 4 lanes over runs of 128, then the runs."""
    runs = np.pad(values, ((0, 0), (0, -values.shape[1] % 128))).reshape(len(values), -1, 32, 4)  # (N, runs, 32, 4)
    lanes = np.zeros_like(runs[:, :, 0])  # (N, runs, 4)
    for step in range(32):
        lanes += runs[:, :, step]
    sums = lanes.sum(axis=2, dtype=np.float32).astype(np.float16)  # (N, runs)
    return sums.sum(axis=1, dtype=np.float32).astype(np.float16)


def _blocks(first: _Points, second: _Points):
    """Yield (row slice, column slice, squared distances (rows, columns) float32) over all pairs, row by row.

    The block's memory is used again for the next one.
    """
    buffer = np.empty(BLOCK_ROWS * BLOCK_COLUMNS, dtype=np.float32)
    for row in range(0, len(first.exact), BLOCK_ROWS):
        rows = slice(row, min(row + BLOCK_ROWS, len(first.exact)))
        for column in range(0, len(second.exact), BLOCK_COLUMNS):
            columns = slice(column, min(column + BLOCK_COLUMNS, len(second.exact)))
            shape = (rows.stop - rows.start, columns.stop - columns.start)
            block = buffer[: shape[0] * shape[1]].reshape(shape)  # (rows, columns)
            u, v = first.rounded[rows], second.rounded[columns]
            _squared_distances(u, v, first.norms[rows], second.norms[columns], block)
            if not np.isfinite(block).all():  # beyond float16
                u, v = first.exact[rows], second.exact[columns]
                _squared_distances(u, v, np.square(u).sum(axis=1), np.square(v).sum(axis=1), block)
            yield rows, columns, block


def _squared_distances(
    u: np.ndarray, v: np.ndarray, u_norms: np.ndarray, v_norms: np.ndarray, out: np.ndarray
) -> None:  # (R, D), (S, D), (R,), (S,), (R, S)
    """Fill `out` with max(|u|^2 - 2 uv + |v|^2, 0), each step rounded to the type of the norms."""
    with np.errstate(over="ignore", invalid="ignore"):
        np.matmul(u, v.T, out=out)
        for start in range(0, len(out), 64):  # rows at a time that stay in the cache
            rows = slice(start, start + 64)
            product = out[rows].astype(u_norms.dtype, copy=False)
            np.maximum(u_norms[rows, None] - 2 * product + v_norms, 0, out=out[rows])


def _radii(points: _Points, k: int) -> np.ndarray:
    """Squared distance (N,) of each point to its k-th neighbour: the (k + 1)-th smallest of a row with itself in it."""
    nearest = np.full((len(points.exact), k + 1), np.inf, dtype=np.float32)  # (N, k + 1)
    for rows, _, block in _blocks(points, points):
        if block.shape[1] > k + 1:
            block.partition(k, axis=1)
        candidates = np.concatenate([nearest[rows], block[:, : k + 1]], axis=1)  # (rows, up to 2 (k + 1))
        nearest[rows] = np.partition(candidates, k, axis=1)[:, : k + 1]
    return nearest.max(axis=1)


def kid(
    reference: np.ndarray, samples: np.ndarray, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> float:
    """Kernel distance (Bińkowski et al., 2018): unbiased MMD^2, kernel (xy / D + 1)^3, mean over random subsets.

    The draws, in the order reference then samples, are those of torch-fidelity called with the reference first.

    Args:
        reference, samples: (R, D) and (S, D).
        subsets: number of pairs of subsets.
        subset_size: images in each, drawn without repetition; never more than the smaller set has.
        seed: of the draws.

    Raises:
        ValueError: a set of fewer than two points, widths that differ, values that are not finite.
    """
    reference, samples = np.asarray(reference), np.asarray(samples)  # (R, D), (S, D)
    size = min(subset_size, len(reference), len(samples))
    if reference.ndim != 2 or samples.ndim != 2 or reference.shape[1] != samples.shape[1] or size < 2:
        raise ValueError(
            f"expected two sets of 2 or more points of one width, found {reference.shape}, {samples.shape}"
        )
    random = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        x = reference[random.choice(len(reference), size, replace=False)].astype(np.float64)  # (n, D)
        y = samples[random.choice(len(samples), size, replace=False)].astype(np.float64)  # (n, D)
        within = sum(_off_diagonal_sum(_cubic_kernel(points, points)) for points in (x, y)) / (size * (size - 1))
        values.append(within - 2.0 * _cubic_kernel(x, y).mean())
    if not np.isfinite(values).all():
        raise ValueError("expected finite features, found NaN or infinity; fix: look for broken images")
    return float(np.mean(values))


def _cubic_kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1.0) ** 3  # (n, m)


def _off_diagonal_sum(matrix: np.ndarray) -> float:
    return matrix.sum() - np.trace(matrix)


def mind(reference: np.ndarray, samples: np.ndarray, directions: int = 1000, seed: int = 2020) -> float:
    """MIND, a sliced 2-Wasserstein distance: both sets are projected on random directions and sorted, and compared.

    3 D times the mean, over directions and ranks, of (sort(x w) - sort(y w))^2, so that for two Gaussians of one
    covariance it is three times the squared distance of their means. 5,000 images are said to rank models as 50,000 do.

    Args:
        reference, samples: (R, D) and (S, D); of the larger set as many are drawn as the smaller one has.
        directions: unit vectors, uniform over the sphere.
        seed: of the draws.

    Raises:
        ValueError: no points, widths that differ, values that are not finite.
    """
    sets = [np.asarray(points, dtype=np.float64) for points in (reference, samples)]
    shapes = [points.shape for points in sets]
    if not all(points.ndim == 2 and len(points) and np.isfinite(points).all() for points in sets):
        raise ValueError(f"expected two sets of finite features (N, D), found {shapes}; fix: look for broken images")
    if shapes[0][1] != shapes[1][1]:
        raise ValueError(
            f"expected features of one width, found {shapes[0][1]} (reference) and {shapes[1][1]} (samples)"
        )
    random, size = np.random.default_rng(seed), min(map(len, sets))
    x, y = (points[random.permutation(len(points))[:size]] if len(points) > size else points for points in sets)
    total = 0.0
    for _ in range(0, directions, 50):  # at once: what is sorted stays small
        w = random.standard_normal((x.shape[1], min(50, directions)))  # (D, directions)
        w /= np.linalg.norm(w, axis=0)
        total += np.square(np.sort(x @ w, axis=0) - np.sort(y @ w, axis=0)).mean(axis=0).sum()
    return 3 * x.shape[1] * total / directions
