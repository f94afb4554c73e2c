"""Cost of measuring: what five metrics add to the network's passes, the Frechet distance, precision and recall.

python -m benchmarks.bench_evaluations                # all: about 10 minutes on 2 cores
python -m benchmarks.bench_evaluations passes frechet methods neighbours
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROUNDS = 3


def seconds_of(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def pool_like(count: int, width: int, seed: int) -> np.ndarray:
    """Features (count, width) float32 with about the spread of pooled Inception features."""
    rng = np.random.default_rng(seed)
    mix = 0.06 * np.random.default_rng(0).standard_normal((40, width), dtype=np.float32)
    points = rng.standard_normal((count, 40), dtype=np.float32) @ mix
    points += 0.25 * rng.standard_normal((count, width), dtype=np.float32)
    return np.maximum(points + 0.4, 0, out=points)


def moments(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return points.mean(axis=0, dtype=np.float64), np.cov(points.astype(np.float64), rowvar=False)


def bench_passes() -> None:
    """All five metrics from npz files against bare passes over the same images, in turn, median of the ratios."""
    import torch

    from benchmarks.record import record
    from evaluations import metrics, networks
    from evaluations.evaluator import Evaluation, Settings
    from evaluations.images import open_images

    counts, size, batch_size = {"reference": 64, "samples": 96}, 256, 32
    state = {key: torch.as_tensor(value) for key, value in _inception_state().items()}
    network = networks.inception_from_state("inception", state, digest="seeded random weights")
    module = networks.build_inception(state)
    rng = np.random.default_rng(0)
    sets = {side: rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8) for side, count in counts.items()}
    batches = [images[i : i + batch_size] for images in sets.values() for i in range(0, len(images), batch_size)]

    def ours() -> None:
        for batch in batches:
            network(batch)

    def torch_fidelity() -> None:
        for batch in batches:
            module(torch.from_numpy(batch).permute(0, 3, 1, 2))

    with tempfile.TemporaryDirectory() as folder:
        for side, images in sets.items():
            np.savez(Path(folder) / f"{side}.npz", images)
        samples = str(Path(folder) / "samples.npz")

        def everything() -> float:
            """Seconds, without those of the two distances, which have a bar of their own."""
            begin = time.perf_counter()
            evaluation = Evaluation(
                [network], str(Path(folder) / "reference.npz"), Settings(batch_size=batch_size), progress=False
            )
            evaluation.measure(evaluation.samples, open_images(samples), "samples")
            assert len(evaluation.finish()) == 5
            total = time.perf_counter() - begin
            pair = evaluation.references["inception"], evaluation.samples["inception"]
            arguments = [[value for side in pair for value in side.moments(layer)] for layer in ("pool", "spatial")]
            return total - sum(seconds_of(lambda a=a: metrics.frechet_distance(*a)) for a in arguments)

        ours()
        rounds = [(seconds_of(ours), everything(), seconds_of(torch_fidelity)) for _ in range(ROUNDS)]
    bare, five, theirs = (float(np.median(column)) for column in zip(*rounds, strict=True))
    record(
        "evaluations/five-metrics",
        float(np.median([b / a for a, b, _ in rounds])),
        "times the bare passes",
        bar="<= 1.10",
        images=sum(counts.values()),
        size=size,
        batch_size=batch_size,
        rounds_seconds=rounds,
        median_seconds={"bare passes": bare, "five metrics": five, "torch-fidelity's own forward": theirs},
        threads=torch.get_num_threads(),
    )


def _inception_state() -> dict[str, np.ndarray]:
    from evaluations import networks
    from tests.golden.adm_golden import inception_state

    return inception_state({key: value.shape for key, value in networks.build_inception({}).state_dict().items()}, 20)


def bench_frechet() -> None:
    """Both distances at their real widths, in full rank."""
    from benchmarks.record import record
    from evaluations.metrics import frechet_distance

    seconds = {}
    for width in (2048, 2023):
        pair = [value for seed in (1, 2) for value in moments(pool_like(5000, width, seed))]
        seconds[width] = float(np.median([seconds_of(lambda p=pair: frechet_distance(*p)) for _ in range(ROUNDS)]))
    record("evaluations/two-frechet-distances", sum(seconds.values()), "s", bar="< 20", seconds=seconds)


def bench_methods() -> None:
    """Time of each way to tr sqrtm(S1 S2), and its relative error where there is an independent value."""
    import scipy.linalg

    from benchmarks.record import record
    from evaluations.metrics import _trace_of_root

    def by_eigh(a: np.ndarray, b: np.ndarray) -> float:
        values, vectors = np.linalg.eigh(a)
        factor = vectors * np.sqrt(np.maximum(values, 0))
        return np.sqrt(np.maximum(np.linalg.eigvalsh(factor.T @ b @ factor), 0)).sum()

    def by_singular_values(a: np.ndarray, b: np.ndarray) -> float:
        factors = []
        for matrix in (a, b):
            values, vectors = np.linalg.eigh(matrix)
            kept = values > values[-1] * len(values) * np.finfo(float).eps
            factors.append(vectors[:, kept] * np.sqrt(values[kept]))
        return np.linalg.svd(factors[0].T @ factors[1], compute_uv=False).sum()

    ways = {
        "pivoted Cholesky (ours)": _trace_of_root,
        "eigh, eigvalsh": by_eigh,
        "eigh, singular values": by_singular_values,
        "eigenvalues of the product": lambda a, b: np.sqrt(np.linalg.eigvals(a @ b).astype(complex)).real.sum(),
        "scipy sqrtm": lambda a, b: np.trace(scipy.linalg.sqrtm(a @ b)).real,
    }
    width = 1024
    for name, counts in (("full rank", (3000, 4000)), ("fewer images than dimensions", (96, 130))):
        sets = [pool_like(count, width, seed).astype(np.float64) for seed, count in enumerate(counts, 1)]
        centred = [(points - points.mean(axis=0)) / np.sqrt(len(points) - 1) for points in sets]
        triangles = [np.linalg.qr(points, mode="r") for points in centred]
        truth = scipy.linalg.svdvals(triangles[0] @ triangles[1].T).sum()  # no covariance, nothing squared
        sigmas = [points.T @ points for points in centred]
        table = {}
        for way, root in ways.items():
            begin = time.perf_counter()
            value = float(root(*sigmas))
            table[way] = {"seconds": time.perf_counter() - begin, "relative_error": abs(value / truth - 1)}
            print(f"  {name}: {way}: {table[way]['seconds']:.2f} s, relative error {table[way]['relative_error']:.1e}")
        ours, original = (table[way]["seconds"] for way in ("pivoted Cholesky (ours)", "scipy sqrtm"))
        record(
            f"evaluations/trace-of-root, {name}",
            ours,
            "s",
            original,
            original / ours,
            width=width,
            counts=counts,
            ways=table,
        )


def bench_neighbours() -> None:
    """Precision and recall of 10,000 against 50,000 in a process of its own, for its peak memory."""
    from benchmarks.record import record

    code = "from benchmarks.bench_evaluations import neighbours; neighbours()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, peak, precision, recall = map(float, result.stdout.split())
    record(
        "evaluations/precision-recall-memory",
        peak,
        "GB",
        bar="< 4",
        reference=10_000,
        samples=50_000,
        width=2048,
        seconds=seconds,
        precision=precision,
        recall=recall,
    )


def neighbours() -> None:
    from evaluations.metrics import precision_recall

    reference, samples = pool_like(10_000, 2048, 1), pool_like(50_000, 2048, 2)
    begin = time.perf_counter()
    pair = precision_recall(reference, samples)
    seconds = time.perf_counter() - begin
    print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, *pair)


BENCHES = {"passes": bench_passes, "frechet": bench_frechet, "methods": bench_methods, "neighbours": bench_neighbours}


def main(names: list[str] | None = None) -> None:
    """Run the benches named on the command line, or all."""
    for name in names or sys.argv[1:] or BENCHES:
        BENCHES[name]()


if __name__ == "__main__":
    main()
