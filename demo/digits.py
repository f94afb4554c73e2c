"""The demo's images and the classifier that judges its samples: scikit-learn's real handwritten digits.

The data are the 1,797 test images of the "Optical Recognition of Handwritten Digits" set (E. Alpaydin and C. Kaynak,
UCI Machine Learning Repository, 1998), 8 x 8 pixels with 17 grey levels, which scikit-learn carries: no download.

Shape suffixes: N images, R = 32 the side of an image.
"""

from __future__ import annotations

import numpy as np
from PIL import Image
from sklearn import datasets
from sklearn.svm import SVC

SMALL, SIDE = 8, 32  # sides of a digit as it was recorded and as the demo uses it
LEVELS = 16  # the brightest of the recorded grey levels
HELD_OUT_EVERY = 5  # the digits 4, 9, 14, ... are shown neither to the VAE nor to the classifier


def load_digits() -> tuple[np.ndarray, np.ndarray]:  # () -> (1797, 64), (1797,)
    """The recorded digits, float64 in [0, 16], and what they show, int64 in [0, 9]."""
    digits = datasets.load_digits()
    return digits.data, digits.target.astype(np.int64)


def held_out(index: np.ndarray) -> np.ndarray:  # (N,) -> (N,)
    """True for the positions in `load_digits` that no demo model is fitted to: a fifth."""
    return np.asarray(index) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1


def enlarge(digits: np.ndarray) -> np.ndarray:  # (N, 64) -> (N, R, R, 3)
    """Recorded digits as uint8 RGB images, four times as wide.

    Bicubic, because it keeps the strokes smooth, where nearest leaves blocks, and sharp, where bilinear blurs them.
    Pillow resizes uint8 images in fixed-point arithmetic: the pixels are the same on every machine.
    """
    small = np.rint(digits * (255 / LEVELS)).astype(np.uint8).reshape(-1, SMALL, SMALL)
    large = [np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for image in small]
    return np.repeat(np.stack(large)[..., None], 3, axis=3)


def reduce(images: np.ndarray) -> np.ndarray:  # (N, R, R, 3) -> (N, 64)
    """Images brought back to what the classifier knows: grey, each 4 x 4 box averaged, in [0, 16], float64."""
    box = SIDE // SMALL
    boxes = images.reshape(-1, SMALL, box, SMALL, box, 3).astype(np.float64)
    return boxes.mean(axis=(2, 4, 5)).reshape(-1, SMALL**2) * (LEVELS / 255)


def fit_classifier() -> SVC:
    """A support vector machine fitted to the four fifths of the recorded 8 x 8 digits that are not held out.

    It has seen neither the VAE nor an enlarged image. `predict` takes (N, 64) in [0, 16], as `reduce` gives.
    """
    digits, labels = load_digits()
    fitted = ~held_out(np.arange(len(digits)))
    return SVC(C=10, gamma=0.001).fit(digits[fitted], labels[fitted])
