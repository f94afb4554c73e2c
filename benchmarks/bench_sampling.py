"""Memory and time of keeping 2,000 images of 256 x 256 and making samples.npz of them."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from analysis.timing import seconds_of
from benchmarks.record import in_own_process, memory, record
from sampling.writer import SampleWriter, create

SIDE, BATCH = 256, 64
BAR = 300  # MB above the start


def batches(count: int) -> Iterator[np.ndarray]:  # -> (B, R, R, 3) uint8
    """Random images; the last batch is as large as the others, as the sampler's is."""
    rng = np.random.default_rng(0)
    for _ in range(-(-count // BATCH)):
        yield rng.integers(0, 256, (BATCH, SIDE, SIDE, 3), np.uint8)


def write_ours(directory: Path, labels: np.ndarray) -> None:
    """Batches at their offsets of the raw file, then the streamed npz."""
    settings = {"num_samples": len(labels), "batch_size": BATCH, "resolution": SIDE, "png": False, "npz": True}
    create(directory, settings)
    samples = SampleWriter(directory, settings)
    for batch, images in enumerate(batches(len(labels))):
        samples.write(batch, images)
    samples.finish(labels, {"settings": settings})
    samples.close()


def write_plain(directory: Path, labels: np.ndarray) -> None:
    """A list of batches, concatenated, `np.savez`."""
    directory.mkdir()
    images = np.concatenate(list(batches(len(labels))))[: len(labels)]
    np.savez(directory / "samples.npz", images, labels)


def measure(way: str, count: int) -> list[float]:
    """Megabytes above the start, and seconds, of one way, in this process."""
    labels = np.arange(count) % 1000
    write = {"ours": write_ours, "plain": write_plain}[way]
    with tempfile.TemporaryDirectory() as name:
        directory, start = Path(name) / "samples", memory("VmRSS")
        seconds = seconds_of(lambda: write(directory, labels))
        peak = memory("VmHWM")
        with np.load(directory / "samples.npz") as archive:
            assert archive["arr_0"].shape == (count, SIDE, SIDE, 3)
    return [(peak - start) / 1e6, seconds]


def npz(count: int = 2_000) -> None:
    ours, plain = (in_own_process(measure, way, count) for way in ("ours", "plain"))
    about = {"images": count, "side": SIDE, "batch": BATCH}
    record("sampling/npz_memory", ours[0], "MB above the start", plain[0], bar=f"<= {BAR} MB", **about)
    record("sampling/npz_seconds", ours[1], "s", plain[1], **about)
    if ours[0] > BAR:
        sys.exit(f"above the bar of {BAR} MB")
