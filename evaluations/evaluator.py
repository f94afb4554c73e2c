"""From sets of images to named results: which metric needs what, the reference, and the figures.

Names never pass one network's distance off as another's: "fid", "sfid" and "is" are the ADM suite's Inception network
alone; others carry their network's name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from evaluations import metrics
from evaluations.images import NpzImages, StoredStatistics, open_images, prefetched

# Of each network: a metric's name -> what is computed and on which layer.
METRICS = {
    "inception": {
        "fid": ("frechet", "pool"),
        "sfid": ("frechet", "spatial"),
        "is": ("score", "logits"),
        "precision": ("precision", "pool"),
        "recall": ("recall", "pool"),
        "kid": ("kid", "pool"),
    },
    "random": {
        "random-frechet": ("frechet", "pool"),
        "random-spatial-frechet": ("frechet", "spatial"),
        "random-precision": ("precision", "pool"),
        "random-recall": ("recall", "pool"),
        "random-kid": ("kid", "pool"),
    },
    "dinov2": {
        "fd-dinov2": ("frechet", "pool"),
        "dinov2-precision": ("precision", "pool"),
        "dinov2-recall": ("recall", "pool"),
        "dinov2-kid": ("kid", "pool"),
    },
    "vae": {
        "vae-frechet": ("frechet", "pool"),
        "vae-precision": ("precision", "pool"),
        "vae-recall": ("recall", "pool"),
        "vae-kid": ("kid", "pool"),
    },
}
FULL_COUNT = 50_000  # samples of published values
REFERENCE_COUNT = 10_000  # images of the 256 x 256 reference


@dataclass(frozen=True)
class Settings:
    """What determines the figures, apart from the images and the networks.

    Attributes:
        metrics: names from `METRICS`; empty for all but KID of the chosen networks.
        distance: "fp16" or "fp32", for precision and recall.
        k: neighbours, for precision and recall.
        split_size: images of a split of the inception score.
        batch_size: images per pass of a process.
        stored: use statistics that the reference file holds; else compute them from its images.
    """

    metrics: tuple[str, ...] = ()
    distance: str = "fp16"
    k: int = 3
    split_size: int = 5000
    batch_size: int = 64
    stored: bool = True


def chosen(names: Iterable[str], features: Iterable[str], reference: bool, saving: bool = False) -> tuple[str, ...]:
    """The metrics to compute: `names`, or all but KID (without a reference: the inception score) of these networks.

    Args:
        names: asked for; may be empty.
        features: names of the networks.
        reference: whether there is one.
        saving: whether statistics are wanted beside metrics, so that none is a choice.

    Raises:
        ValueError: a name that none of the networks has, or that needs a reference; nothing to do.
    """
    known = {name: kind for network in features for name, (kind, _) in METRICS[network].items()}
    names = tuple(names) or tuple(
        name for name, kind in known.items() if kind != "kid" and (reference or kind == "score")
    )
    for name in names:
        if name not in known:
            raise ValueError(f"expected metrics among {', '.join(known)} for these features, found {name}")
        if not reference and known[name] != "score":
            raise ValueError(f"expected a reference for {name}, found none; fix: --ref FILE")
    if not names and not saving:
        raise ValueError(f"expected a reference for {', '.join(known)}, found none; fix: --ref FILE")
    return names


def required_layers(names: Iterable[str], network: str, of_reference: bool = False) -> tuple[list[str], list[str]]:
    """Layers whose moments, and layers whose features, the metrics `names` of `network` are computed from."""
    needed = [METRICS[network][name] for name in names if name in METRICS[network]]
    needed = [(kind, layer) for kind, layer in needed if not (of_reference and kind == "score")]
    moments = sorted({layer for kind, layer in needed if kind == "frechet"})
    keep = sorted({layer for kind, layer in needed if kind != "frechet"})
    return moments, keep


class Evaluation:
    """Measures images against a reference as they come: what `evaluate.py` and a sampler need.

        evaluation = Evaluation([load_network("inception")], "VIRTUAL_imagenet256_labeled.npz", Settings())
        for images, positions in ...:
            evaluation.update(images, positions)
        figures = evaluation.finish()

    Under `torch.distributed` every process makes one, updates it with images of its own, and calls `finish`.

    Args:
        networks: `features.FeatureNetwork` objects, each name once.
        reference: path, or `None` for metrics that need none. It is measured at once, before any slow sampling.
        settings: see there.
        progress: show bars (on one process).
        saving: keep what any metric of the networks needs of the samples, to be written by `FeatureStatistics.arrays`.

    Raises:
        ValueError: metrics, networks and reference that do not fit, or a reference that cannot be read.
    """

    def __init__(
        self, networks: Iterable, reference: str | None, settings: Settings, progress: bool = True, saving: bool = False
    ):
        self.settings, self.progress = settings, progress
        self.networks = {network.name: network for network in networks}
        self.names = chosen(settings.metrics, self.networks, reference is not None, saving)
        self.samples = self._empty(every=saving)
        self.source = open_images(reference) if reference else None
        kinds = {METRICS[network][name][0] for network in self.networks for name in self._of(network)}
        count = self.source.count if self.source else 0
        if 0 < count <= settings.k and kinds & {"precision", "recall"}:
            raise ValueError(
                f"expected at least k + 1 = {settings.k + 1} reference images, found {count} in {reference}; fix: "
                "choose other metrics"
            )
        self.references = self._empty(of_reference=True) if reference else {}
        self.reference_stored = self.measure(self.references, self.source, "reference") if reference else []

    def reset(self) -> None:
        """Forget the samples, not the reference: for another set of them."""
        self.samples = self._empty()

    def _empty(self, of_reference: bool = False, every: bool = False) -> dict:
        from evaluations.feature_stats import FeatureStatistics

        return {
            name: FeatureStatistics(
                network, *required_layers(METRICS[name] if every else self.names, name, of_reference)
            )
            for name, network in self.networks.items()
        }

    def update(self, images, positions: Iterable[int] | None = None) -> None:
        """Add images (B, H, W, 3), uint8 or floating in 0..255, with their places (B,) in file order."""
        positions = None if positions is None else list(positions)
        for statistics in self.samples.values():
            statistics.update(images, positions)

    def measure(self, sets: dict, source, title: str) -> list[str]:
        """Fill `sets` from a source's stored statistics and, for the rest, from this process's share of its images.

        Returns:
            the arrays that were taken from the file instead of being computed.
        """
        stored = [name for statistics in sets.values() for name in self._take_stored(statistics, source)]
        rest = [statistics for statistics in sets.values() if statistics.wanted()]
        if not rest:
            return stored
        if source.kind == "statistics" or "arr_0" not in source.members:
            missing = ", ".join(sorted({layer for statistics in rest for layer in statistics.wanted()}))
            raise ValueError(
                f"expected images, or what the metrics need of {missing}, in {source.path}, found "
                f"{', '.join(source.members)}; fix: choose other --metrics, or give the images"
            )
        rank, processes = _process()
        start, stop = (source.count * part // processes for part in (rank, rank + 1))
        position = start
        for batch in self._bar(prefetched(source.batches(start, stop, self.settings.batch_size)), stop - start, title):
            for statistics in rest:
                statistics.update(batch, range(position, position + len(batch)))
            position += len(batch)
        for statistics in rest:
            statistics.gather()
        return stored

    def _take_stored(self, statistics, source) -> list[str]:
        from evaluations.feature_stats import MOMENT_NAMES

        network = statistics.network
        if isinstance(source, StoredStatistics):
            if (source.features, source.weights) != (network.name, network.digest):
                raise ValueError(
                    f"expected statistics of {network.name} features (weights {network.digest[:12]}), found those of "
                    f"{source.features} ({source.weights[:12]}) in {source.path}; fix: choose the same --features and "
                    "weights as when they were saved"
                )
        elif not (isinstance(source, NpzImages) and network.name == "inception" and self.settings.stored):
            return []
        taken = []
        for layer in statistics.wanted():
            names = MOMENT_NAMES.get(layer, ())
            if names and set(names) <= set(source.members) and statistics.wants_moments(layer):
                mean, covariance = (np.asarray(source.array(name), dtype=np.float64) for name in names)
                _check_moments(mean, covariance, layer, source.path)
                statistics.set_moments(layer, mean, covariance)
                taken += names
            if isinstance(source, StoredStatistics) and layer in source.members and statistics.keeps(layer):
                statistics.set_kept(layer, source.array(layer))
                taken.append(layer)
        return taken

    def _bar(self, batches: Iterator[np.ndarray], count: int, title: str) -> Iterator[np.ndarray]:
        from tqdm import tqdm

        shown = self.progress and _process()[0] == 0
        with tqdm(total=count, desc=title, unit="image", disable=not shown) as bar:
            for batch in batches:
                yield batch
                bar.update(len(batch))

    def finish(self) -> dict[str, float] | None:
        """Gather, and compute each metric: {name: value} on process 0, `None` on the others."""
        for statistics in self.samples.values():
            statistics.gather()
        if _process()[0]:
            return None
        figures = {}
        for name in self.networks:
            figures |= compute_metrics(self.samples[name], self.references.get(name), self._of(name), self.settings)
        return {name: figures[name] for name in self.names}

    def _of(self, network: str) -> tuple[str, ...]:
        return tuple(name for name in self.names if name in METRICS[network])


def compute_metrics(samples, reference, names: Iterable[str], settings: Settings) -> dict[str, float]:
    """Named figures from two `FeatureStatistics` of one network.

    Args:
        samples: of the samples, gathered.
        reference: of the reference; `None` where no metric needs it.
        names: from `METRICS[samples.network.name]`.
        settings: distance, k and split size are taken from here.
    """
    figures = {}
    pair = None  # precision and recall come together
    for name in names:
        kind, layer = METRICS[samples.network.name][name]
        if kind == "frechet":
            figures[name] = metrics.frechet_distance(*reference.moments(layer), *samples.moments(layer))
        elif kind == "score":
            figures[name] = metrics.inception_score(samples.kept(layer), settings.split_size)
        elif kind == "kid":
            figures[name] = metrics.kid(reference.kept(layer), samples.kept(layer))
        else:
            if pair is None:
                sets = reference.kept(layer), samples.kept(layer)
                pair = metrics.precision_recall(*sets, k=settings.k, distance=settings.distance)
            figures[name] = pair[("precision", "recall").index(kind)]
    return figures


def _check_moments(mean: np.ndarray, covariance: np.ndarray, layer: str, path) -> None:
    if mean.ndim != 1 or covariance.shape != (mean.size, mean.size):
        raise ValueError(
            f"expected a mean (D,) and a covariance (D, D) of {layer} features in {path}, found {mean.shape}, "
            f"{covariance.shape}"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(f"expected finite statistics in {path}, found NaN or infinity")


def _process() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def warnings_about(
    samples_count: int, labels: np.ndarray | None, reference_count: int | None, has_score: bool
) -> list[str]:
    """What a reader of the figures must know.

    Args:
        samples_count: images measured.
        labels: class (N,) of each in file order, if known.
        reference_count: images of the reference that precision and recall were computed with, if they were.
        has_score: whether the inception score is among the figures.
    """
    warnings = []
    if samples_count < FULL_COUNT:
        warnings.append(
            f"{samples_count:,} samples: published values are of {FULL_COUNT:,}; a Frechet distance of fewer is higher"
        )
    if labels is not None and len(labels) > 1 and labels[0] != labels[-1] and (labels[:-1] <= labels[1:]).all():
        text = "samples are sorted by class"
        if has_score:
            text += ": the inception score, which is taken over runs of the file, is not comparable"
        warnings.append(text)
    if reference_count is not None and reference_count != REFERENCE_COUNT:
        warnings.append(
            f"precision and recall against {reference_count:,} reference images: published values at 256 x 256 use "
            f"{REFERENCE_COUNT:,}"
        )
    return warnings
