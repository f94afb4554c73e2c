"""How alike two sets of features of the same tokens are: principal components, a linear probe, CKA and CKNNA.

Tensors alone: no model and no file. Sums are kept and solved in float64.

Shape suffixes: M tokens, D numbers of a token of the network, d numbers of a patch of the VAE's features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 1e-6  # of the probe, in units of a standardised input's variance: it only keeps the solution unique


def principal_components(
    x: Tensor, count: int = 3, like: Tensor | None = None
) -> tuple[Tensor, float]:  # (M, D) -> (M, count), ()
    """Scores of the first principal components, and their share of the variance.

    With X the centred rows and X X^T = U S^2 U^T, the scores are U S (Jolliffe, Principal Component Analysis, 2002,
    Section 3.5): the form over tokens, of which an image has fewer than a token has numbers.

    Args:
        x: any floating type.
        count: components; those beyond the rank of x are zero.
        like: scores (M, count) to agree with: the sign of a component, which is free, is then the one that correlates
            with its namesake there. Without it the score of largest magnitude is positive.

    Returns:
        The scores, float64, and a share in [0, 1] (0 if x does not vary).
    """
    x = x.double()
    x = x - x.mean(dim=0)
    variances, vectors = torch.linalg.eigh(x @ x.T)  # ascending
    variances = variances.clamp(min=0).flip(0)
    kept = min(count, *x.shape)
    # Below this share a direction is rounding, whose scores would be noise stretched to full contrast.
    real = variances[:kept] > 1e-12 * variances[0]
    scores = x.new_zeros(len(x), count)
    scores[:, :kept] = vectors.flip(1)[:, :kept] * variances[:kept].sqrt() * real
    leading = scores.gather(0, scores.abs().argmax(dim=0, keepdim=True))[0]  # (count,)
    if like is not None:
        agreement = (scores * like.double()).sum(dim=0)
        leading = torch.where(agreement != 0, agreement, leading)
    scores = torch.where(leading < 0, -scores, scores)
    total = variances.sum().item()
    return scores, (scores.square().sum().item() / total if total > 0 else 0.0)


@dataclass
class Moments:
    """Means and centred sums of products of pairs (x, y), gathered batch by batch: all that probe and CKA need.

    Memory does not grow with the tokens. Batches are joined by the update of Chan, Golub and LeVeque (1979), which does
    not lose digits where a mean is large beside its std, as in the tokens of a transformer.
    """

    count: int
    mean_x: Tensor  # (D,) float64, as all of these
    mean_y: Tensor  # (d,)
    xx: Tensor  # (D, D), sum of (x - mean_x)(x - mean_x)^T
    xy: Tensor  # (D, d)
    yy: Tensor  # (d, d)

    @classmethod
    def empty(cls, D: int, d: int, device: str | torch.device = "cpu") -> Moments:
        sizes = ((D,), (d,), (D, D), (D, d), (d, d))
        return cls(0, *(torch.zeros(size, dtype=torch.float64, device=device) for size in sizes))

    def update(self, x: Tensor, y: Tensor) -> None:  # (M, D), (M, d)
        """Add tokens, of any floating type."""
        if len(x):
            x, y = x.double(), y.double()
            mean_x, mean_y = x.mean(dim=0), y.mean(dim=0)
            x, y = x - mean_x, y - mean_y
            self.join(Moments(len(x), mean_x, mean_y, x.T @ x, x.T @ y, y.T @ y))

    def join(self, other: Moments) -> None:
        """Add all of another's tokens."""
        total = self.count + other.count
        if total == 0:
            return
        step_x, step_y = other.mean_x - self.mean_x, other.mean_y - self.mean_y
        weight = self.count * other.count / total
        self.xx += other.xx.addr(step_x, step_x, alpha=weight)
        self.xy += other.xy.addr(step_x, step_y, alpha=weight)
        self.yy += other.yy.addr(step_y, step_y, alpha=weight)
        self.mean_x = self.mean_x + step_x * (other.count / total)
        self.mean_y = self.mean_y + step_y * (other.count / total)
        self.count = total


def fit_probe(moments: Moments, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:  # -> (D, d), (d,)
    """Weights W and bias b of the ridge regression y = x W + b, on inputs divided by their stds s.

        W = s^-1 (R + ridge I)^-1 r,   R the correlations of x, r the covariances of x / s and y

    (Hoerl and Kennard 1970.) The bias is free of the penalty.
    """
    s = (moments.xx.diagonal() / moments.count).sqrt()
    s = torch.where(s > 1e-10 * moments.mean_x.abs(), s, torch.inf)  # one that varies by rounding alone has no weight
    R = moments.xx / moments.count / s[:, None] / s
    R.diagonal().add_(ridge)
    r = moments.xy / moments.count / s[:, None]
    W = torch.cholesky_solve(r, torch.linalg.cholesky(R)) / s[:, None]
    return W, moments.mean_y - moments.mean_x @ W


def probe_r2(moments: Moments, W: Tensor, b: Tensor) -> float:
    """R^2 of the prediction x W + b of y over the tokens of `moments`, all d numbers together:

        1 - sum |y - x W - b|^2 / sum |y - mean y|^2

    1 is a perfect prediction, 0 what the mean of these very tokens would reach, below 0 is worse than that.
    """
    bias = moments.mean_y - moments.mean_x @ W - b
    error = moments.yy - W.T @ moments.xy - moments.xy.T @ W + W.T @ moments.xx @ W
    return 1 - ((error.trace() + moments.count * bias.square().sum()) / moments.yy.trace()).item()


def linear_cka(moments: Moments) -> float:
    """Linear centred kernel alignment (Kornblith et al. 2019, Section 3), in its form over features:

        |Y^T X|_F^2 / (|X^T X|_F |Y^T Y|_F),   X and Y centred

    In [0, 1]; 0 where either does not vary. Rotations and a common scale of either side change nothing.
    """
    scale = moments.xx.norm() * moments.yy.norm()
    return (moments.xy.square().sum() / scale).item() if scale > 0 else 0.0


def cknna(x: Tensor, y: Tensor, k: int = 10) -> float:  # (M, D), (M, d) -> ()
    """Centred kernel nearest-neighbour alignment (Huh et al. 2024, The Platonic Representation Hypothesis).

        CKNNA = A(K, L) / sqrt(A(K, K) A(L, L)),   A(K, L) = HSIC_u(m(K, L) * K, m(K, L) * L)

    K and L are the inner products of the rows of x and of y, each divided by its length. m_ij(K, L) is 1 where j is
    among the k rows other than i of largest K_ij, and also among those of largest L_ij. HSIC_u is the unbiased
    estimator of Song et al. (2012), Equation 5, on matrices whose diagonal is set to 0:

        [sum_ij K_ij L_ji + (sum K)(sum L) / ((M - 1)(M - 2)) - 2 / (M - 2) sum_ij (K L)_ij] / (M (M - 3))

    This is what the authors' program computes, and with k = 10 what REPA reports; the formula in their text masks
    centred kernels instead. 1 for equal kernels, about 0 for no neighbours in common; not quite the same for (y, x),
    as to be among another's nearest is not mutual. Memory: M x M.

    Raises:
        ValueError: not 1 <= k < M, or fewer than 4 rows.
    """
    M = len(x)
    if not 1 <= k < M or M < 4:
        raise ValueError(f"CKNNA: expected at least 4 tokens and more than the {k} neighbours, found {M}")
    (K, near_K), (L, near_L) = (_neighbours(rows, k) for rows in (x, y))
    own = _masked_hsic(K, K, near_K) * _masked_hsic(L, L, near_L)
    return (_masked_hsic(K, L, near_K & near_L) / own.sqrt()).item() if own > 0 else 0.0


def _masked_hsic(K: Tensor, L: Tensor, mask: Tensor) -> Tensor:  # (M, M), (M, M), (M, M) bool -> ()
    """HSIC_u(mask * K, mask * L) of `cknna`, but for its factor 1 / (M (M - 3)), from the few entries of the mask."""
    M = len(K)
    i, j = mask.nonzero(as_tuple=True)
    a, b = K[i, j], L[i, j]
    columns = K.new_zeros(M).index_add_(0, j, a)
    rows = L.new_zeros(M).index_add_(0, i, b)
    both_ways = (a * L[j, i] * mask[j, i]).sum()
    # The sum over all of the product of two matrices is that of column sums times row sums.
    return both_ways + a.sum() * b.sum() / ((M - 1) * (M - 2)) - 2 / (M - 2) * (columns @ rows)


def _neighbours(x: Tensor, k: int) -> tuple[Tensor, Tensor]:  # (M, D) -> (M, M) float64, (M, M) bool
    """Inner products of the rows divided by their lengths, with 0 on the diagonal; and each row's k nearest others."""
    x = torch.nn.functional.normalize(x.double(), dim=1)
    K = x @ x.T
    nearest = K.fill_diagonal_(-torch.inf).topk(k, dim=1).indices
    mask = torch.zeros_like(K, dtype=torch.bool).scatter_(1, nearest, True)
    return K.fill_diagonal_(0.0), mask
