"""Memory and time of keeping 2,000 images of 256 x 256 and making samples.npz of them.

Each way runs in a process of its own, because the largest resident set is the process's. Ours: batches of 64 at their
offsets of the raw file, then the streamed npz. Plain: a list of batches, concatenated, `np.savez`.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.record import record
from sampling.writer import SampleWriter, create

COUNT, SIDE, BATCH = 2_000, 256, 64
BAR = 300  # MB above the start


def batches() -> Iterator[np.ndarray]:  # -> (B, R, R, 3) uint8
    """Random images; the last batch is as large as the others, as the sampler's is."""
    rng = np.random.default_rng(0)
    for _ in range(-(-COUNT // BATCH)):
        yield rng.integers(0, 256, (BATCH, SIDE, SIDE, 3), np.uint8)


def resident() -> int:
    """This process's resident set now, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def write_ours(folder: Path, labels: np.ndarray) -> None:
    settings = {"num_samples": COUNT, "batch_size": BATCH, "resolution": SIDE, "png": False, "npz": True}
    create(folder, settings)
    samples = SampleWriter(folder, settings)
    for batch, images in enumerate(batches()):
        samples.write(batch, images)
    samples.finish(labels, {"settings": settings})
    samples.close()


def write_plain(folder: Path, labels: np.ndarray) -> None:
    folder.mkdir()
    np.savez(folder / "samples.npz", np.concatenate(list(batches()))[:COUNT], labels)


def measure(way: str) -> dict[str, float]:
    """Megabytes above the start, and seconds, of one way, in this process."""
    folder = Path(tempfile.mkdtemp(prefix="bench-npz-"))
    labels = np.arange(COUNT) % 1000
    start, begin = resident(), time.perf_counter()
    {"ours": write_ours, "plain": write_plain}[way](folder / "samples", labels)
    seconds = time.perf_counter() - begin
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with np.load(folder / "samples" / "samples.npz") as archive:
        assert archive["arr_0"].shape == (COUNT, SIDE, SIDE, 3)
    shutil.rmtree(folder)
    return {"megabytes": (largest - start) / 1e6, "seconds": seconds}


def main() -> None:
    results = {}
    for way in ("ours", "plain"):
        command = [sys.executable, "-m", "benchmarks.bench_npz", way]
        results[way] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    ours, plain = results["ours"], results["plain"]
    extra = {"images": COUNT, "side": SIDE, "batch": BATCH}
    record(
        "sampling/npz_memory", ours["megabytes"], "MB above the start", plain["megabytes"],
        plain["megabytes"] / ours["megabytes"], bar=f"<= {BAR} MB", **extra,
    )  # fmt: skip
    record("sampling/npz_seconds", ours["seconds"], "s", plain["seconds"], plain["seconds"] / ours["seconds"], **extra)
    if ours["megabytes"] > BAR:
        sys.exit(f"above the bar of {BAR} MB")


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1]))) if len(sys.argv) > 1 else main()
