"""Cost of measuring: what five metrics add to the network's passes, the Frechet distance, precision and recall."""

from __future__ import annotations

import tempfile
from functools import partial

import numpy as np
import scipy.linalg
import torch
from torch import nn

from analysis.timing import seconds_of
from benchmarks.record import in_own_process, in_turn, memory, record
from evaluations import metrics, networks
from evaluations.evaluator import Evaluation, Settings
from evaluations.images import open_images

ROUNDS = 3


def pool_like(count: int, width: int, seed: int) -> np.ndarray:
    """Features (count, width) float32 with about the spread of pooled Inception features."""
    rng = np.random.default_rng(seed)
    mix = 0.06 * np.random.default_rng(0).standard_normal((40, width), dtype=np.float32)
    points = rng.standard_normal((count, 40), dtype=np.float32) @ mix
    points += 0.25 * rng.standard_normal((count, width), dtype=np.float32)
    return np.maximum(points + 0.4, 0, out=points)


def passes(counts: tuple[int, int] = (64, 96), size: int = 256, batch_size: int = 32) -> None:
    """All five metrics from npz files beside bare passes over the same images, in turn; the median of the ratios.

    The time of the two Frechet distances, which have a bar of their own, is taken off.
    """
    torch.manual_seed(0)
    module = networks.build_inception({})
    for weight in module.parameters():
        if weight.dim() == 4:  # activations keep their size from layer to layer
            nn.init.kaiming_normal_(weight)
    network = networks.inception_from_state("inception", module.state_dict(), digest="seeded random weights")
    rng = np.random.default_rng(0)
    sets = [rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8) for count in counts]
    batches = [images[i : i + batch_size] for images in sets for i in range(0, len(images), batch_size)]

    with tempfile.TemporaryDirectory() as name:
        reference, samples = (f"{name}/{side}.npz" for side in ("reference", "samples"))
        np.savez(reference, sets[0])
        np.savez(samples, sets[1])
        last: list[Evaluation] = []

        def five_metrics() -> None:
            evaluation = Evaluation([network], reference, Settings(batch_size=batch_size), progress=False)
            evaluation.measure(evaluation.samples, open_images(samples), "samples")
            assert len(evaluation.finish()) == 5
            last[:] = [evaluation]

        def two_distances() -> None:
            pair = last[0].references["inception"], last[0].samples["inception"]
            for layer in ("pool", "spatial"):
                metrics.frechet_distance(*pair[0].moments(layer), *pair[1].moments(layer))

        def fidelity(batch: np.ndarray) -> None:
            module(torch.from_numpy(batch).permute(0, 3, 1, 2))

        passes = [lambda work=work: [work(batch) for batch in batches] for work in (network, fidelity)]
        bare, whole, distances, theirs = in_turn(passes[0], five_metrics, two_distances, passes[1], times=ROUNDS)
    five = [seconds - less for seconds, less in zip(whole, distances, strict=True)]
    columns = {"bare passes": bare, "five metrics": five, "torch-fidelity's own forward": theirs}
    median, rounds = float(np.median(np.divide(five, bare))), list(zip(*columns.values(), strict=True))
    about = {"images": sum(counts), "size": size, "batch_size": batch_size, "threads": torch.get_num_threads()}
    about |= {"rounds_seconds": rounds, "median_seconds": {name: float(np.median(c)) for name, c in columns.items()}}
    record("evaluations/five-metrics", median, "times the bare passes", bar="<= 1.10", **about)


def frechet(widths: tuple[int, int] = (2048, 2023), count: int = 5000) -> None:
    """Both distances at their real widths, in full rank."""
    calls = []
    for width in widths:
        points = [pool_like(count, width, seed).astype(np.float64) for seed in (1, 2)]
        pair = [value for side in points for value in (side.mean(axis=0), np.cov(side, rowvar=False))]
        calls.append(partial(metrics.frechet_distance, *pair))
    medians = [float(np.median(column)) for column in in_turn(*calls, times=ROUNDS)]
    seconds = dict(zip(widths, medians, strict=True))
    record("evaluations/two-frechet-distances", sum(medians), "s", bar="< 20", seconds=seconds)


def _by_eigh(a: np.ndarray, b: np.ndarray) -> float:
    values, vectors = np.linalg.eigh(a)
    factor = vectors * np.sqrt(np.maximum(values, 0))
    return np.sqrt(np.maximum(np.linalg.eigvalsh(factor.T @ b @ factor), 0)).sum()


def _by_singular_values(a: np.ndarray, b: np.ndarray) -> float:
    factors = []
    for matrix in (a, b):
        values, vectors = np.linalg.eigh(matrix)
        kept = values > values[-1] * len(values) * np.finfo(float).eps
        factors.append(vectors[:, kept] * np.sqrt(values[kept]))
    return np.linalg.svd(factors[0].T @ factors[1], compute_uv=False).sum()


WAYS = {  # to tr sqrtm(S1 S2)
    "pivoted Cholesky (ours)": metrics._trace_of_root,
    "eigh, eigvalsh": _by_eigh,
    "eigh, singular values": _by_singular_values,
    "eigenvalues of the product": lambda a, b: np.sqrt(np.linalg.eigvals(a @ b).astype(complex)).real.sum(),
    "scipy sqrtm": lambda a, b: np.trace(scipy.linalg.sqrtm(a @ b)).real,
}


def trace_of_root(width: int = 1024, few: tuple[int, int] = (96, 130)) -> None:
    """Time of each way to the trace of the root, and its relative error."""
    for name, counts in (("full rank", (3 * width, 4 * width)), ("fewer images than dimensions", few)):
        points = [pool_like(count, width, seed).astype(np.float64) for seed, count in enumerate(counts, 1)]
        centred = [(side - side.mean(axis=0)) / np.sqrt(len(side) - 1) for side in points]
        # The true value needs no covariance: nothing is squared.
        triangles = [np.linalg.qr(side, mode="r") for side in centred]
        truth = scipy.linalg.svdvals(triangles[0] @ triangles[1].T).sum()
        sigmas, ways = [side.T @ side for side in centred], {}
        for way, root in WAYS.items():
            found: list[float] = []
            seconds = seconds_of(lambda root=root, found=found, sigmas=sigmas: found.append(float(root(*sigmas))))
            ways[way] = {"seconds": seconds, "relative_error": abs(found[0] / truth - 1)}
            print(f"  {name}: {way}: {seconds:.2f} s, relative error {ways[way]['relative_error']:.1e}")
        ours, original = (ways[way]["seconds"] for way in ("pivoted Cholesky (ours)", "scipy sqrtm"))
        record(f"evaluations/trace-of-root, {name}", ours, "s", original, width=width, counts=counts, ways=ways)


def measure_neighbours(reference: int, samples: int, width: int) -> dict[str, float]:
    """Seconds, peak memory in GB and both values, in this process."""
    sets, found = [pool_like(count, width, seed) for seed, count in enumerate((reference, samples), 1)], []
    seconds = seconds_of(lambda: found.extend(metrics.precision_recall(*sets)))
    return {"peak": memory("VmHWM") / 1e9, "seconds": seconds, "precision": found[0], "recall": found[1]}


def neighbours(reference: int = 10_000, samples: int = 50_000, width: int = 2048) -> None:
    """Precision and recall in a process of its own, for its peak memory."""
    found = in_own_process(measure_neighbours, reference, samples, width)
    sizes = {"reference": reference, "samples": samples, "width": width}
    record("evaluations/precision-recall-memory", found.pop("peak"), "GB", bar="< 4", **sizes, **found)
