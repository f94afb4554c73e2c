"""The deviation of a store's latents, and the scale that brings it to 1, from sums over its batches.

Shape suffixes: b images of a batch, C latent channels, H = W latent side.
"""

from __future__ import annotations

import numpy as np

from models.vae import LatentScale


def latent_statistics(moments: np.ndarray) -> list[float]:  # (b, 2C, H, W) -> (1 + 2C,)
    """Numbers per channel, then by channel the sums of posterior samples and of their squares, in expectation."""
    mean, std = np.split(moments.astype(np.float64), 2, axis=1)
    sums = [values.sum(axis=(0, 2, 3)) for values in (mean, mean**2 + std**2)]
    return [float(mean[:, 0].size), *sums[0].tolist(), *sums[1].tolist()]


def scaled_deviation(sums: np.ndarray, scale: LatentScale) -> float:
    """Deviation of all scaled posterior samples, from the summed `latent_statistics`."""
    channels = (len(sums) - 1) // 2
    mean, square = sums[1 : 1 + channels] / sums[0], sums[1 + channels :] / sums[0]
    factor, shift = (np.broadcast_to(values, channels) for values in (scale.scale, scale.shift))
    scaled_mean = (mean - shift) * factor
    scaled_square = (square - 2 * shift * mean + shift**2) * factor**2
    return float(np.sqrt(scaled_square.mean() - scaled_mean.mean() ** 2))


def measured_scale(sums: np.ndarray) -> LatentScale:
    """Scale and shift that give each channel mean 0 and deviation 1, as the path to N(0, 1) supposes."""
    channels = (len(sums) - 1) // 2
    mean, square = sums[1 : 1 + channels] / sums[0], sums[1 + channels :] / sums[0]
    deviation = np.sqrt(square - mean**2)
    if not np.all(deviation > 0):
        raise ValueError(f"--scale auto: expected latents that vary, found deviations {deviation.tolist()}; use config")
    return LatentScale(tuple((1 / deviation).tolist()), tuple(mean.tolist()))
