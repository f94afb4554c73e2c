"""From sets of images to named metrics: which metric needs what, the reference, and the record of the result.

Names never pass one network's distance off as another's: "fid", "sfid" and "is" are the ADM suite's Inception network
alone; others carry their network's name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor

from evaluations import metrics
from evaluations.feature_stats import FeatureStatistics
from evaluations.images import DirectoryImages, NpzImages, StoredStatistics, StoreImages, open_images, prefetched
from runtime.progress import Progress

Source = NpzImages | DirectoryImages | StoreImages | StoredStatistics

# Of each network: a metric's name -> what is computed and on which layer.
METRICS = {
    "inception": {"fid": ("frechet", "pool"), "sfid": ("frechet", "spatial"), "is": ("score", "logits")},
    "random": {"random-frechet": ("frechet", "pool"), "random-spatial-frechet": ("frechet", "spatial")},
    "dinov2": {"fd-dinov2": ("frechet", "pool")},
    "vae": {"vae-frechet": ("frechet", "pool")},
}
ON_REQUEST = ("kid", "mind", "density", "coverage")
for _network, _metrics in METRICS.items():
    _prefix = "" if _network == "inception" else f"{_network}-"
    _metrics.update({_prefix + kind: (kind, "pool") for kind in ("precision", "recall", *ON_REQUEST)})
FULL_COUNT = 50_000  # samples of published values
REFERENCE_COUNT = 10_000  # images of the 256 x 256 reference


@dataclass(frozen=True)
class Settings:
    """What determines the metrics, apart from the images and the networks.

    Attributes:
        metrics: names from `METRICS`; empty for all but those on request of the chosen networks.
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


def choose_metrics(
    names: Iterable[str], features: Iterable[str], reference: bool, saving: bool = False
) -> tuple[str, ...]:
    """The metrics to compute: `names`, or of these networks all but those on request (without a reference: the
    inception score).

    Args:
        names: asked for; may be empty.
        features: names of the networks.
        reference: whether there is one.
        saving: whether statistics are wanted beside metrics, so that no metric at all is a choice.

    Raises:
        ValueError: a name that none of the networks has, or that needs a reference; nothing to do.
    """
    known = {name: kind for network in features for name, (kind, _) in METRICS[network].items()}
    names = tuple(names) or tuple(
        name for name, kind in known.items() if kind not in ON_REQUEST and (reference or kind == "score")
    )
    for name in names:
        if name not in known:
            raise ValueError(f"expected metrics among {', '.join(known)} for these features, found {name}")
        if not reference and known[name] != "score":
            raise ValueError(f"expected a reference for {name}, found none; fix: --ref FILE")
    if not names and not saving:
        raise ValueError(f"expected a reference for {', '.join(known)}, found none; fix: --ref FILE")
    return names


class Evaluation:
    """Measures images against a reference as they come: what `evaluate.py` and a sampler need.

        evaluation = Evaluation([load_network("inception")], "VIRTUAL_imagenet256_labeled.npz", Settings())
        for images, positions in ...:
            evaluation.update(images, positions)
        values = evaluation.finish()

    Under `torch.distributed` every rank makes one, updates it with images of its own, and calls `finish`.

    Args:
        networks: `FeatureNetwork` objects, each name once.
        reference: path, or `None` for metrics that need none. It is measured at once, before any slow sampling.
        settings: see there.
        progress: show bars (on rank 0).
        side: of the samples; a reference's images of several sizes are brought to it, with `crop` those of one, too.
        saving: keep what any metric of the networks needs of the samples, to be written by `FeatureStatistics.arrays`.

    Raises:
        ValueError: metrics, networks and reference that do not fit, or a reference that cannot be read.
    """

    def __init__(
        self,
        networks: Iterable,
        reference: str | None,
        settings: Settings,
        progress: bool = True,
        saving: bool = False,
        side: int | None = None,
        crop: bool = False,
    ):
        self.settings, self.progress = settings, progress
        self.networks = {network.name: network for network in networks}
        self.names = choose_metrics(settings.metrics, self.networks, reference is not None, saving)
        self.kinds = {METRICS[network][name][0] for network in self.networks for name in self._of(network)}
        self.samples = self._empty(every=saving)
        # Measure the reference.
        self.source = open_images(reference, side, crop) if reference else None
        count = self.source.count if self.source else 0
        if 0 < count <= settings.k and self.kinds & {"precision", "recall"}:
            raise ValueError(
                f"expected at least k + 1 = {settings.k + 1} reference images, found {count} in {reference}; fix: "
                "choose other metrics"
            )
        self.references = self._empty(of_reference=True) if reference else {}
        self.reference_stored = self.measure(self.references, self.source, "reference") if reference else []

    def reset(self) -> None:
        """Forget the samples, not the reference: for another set of them."""
        self.samples = self._empty()

    def _empty(self, of_reference: bool = False, every: bool = False) -> dict[str, FeatureStatistics]:
        """Statistics, without images as yet, of the layers that this side's metrics are computed from."""
        sets = {}
        for name, network in self.networks.items():
            needed = [METRICS[name][metric] for metric in (METRICS[name] if every else self._of(name))]
            needed = [(kind, layer) for kind, layer in needed if not (of_reference and kind == "score")]
            moments = sorted({layer for kind, layer in needed if kind == "frechet"})
            keep = sorted({layer for kind, layer in needed if kind != "frechet"})
            sets[name] = FeatureStatistics(network, moments, keep)
        return sets

    def _of(self, network: str) -> tuple[str, ...]:
        return tuple(name for name in self.names if name in METRICS[network])

    def update(self, images: Tensor | np.ndarray, positions: Iterable[int] | None = None) -> None:
        """Add images (B, H, W, 3), uint8 or floating in 0..255, with their places (B,) in file order."""
        positions = None if positions is None else list(positions)
        for statistics in self.samples.values():
            statistics.update(images, positions)

    def measure(self, sets: dict[str, FeatureStatistics], source: Source, title: str) -> list[str]:
        """Fill `sets` from a source's stored statistics and, for the rest, from this rank's share of its images.

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
        # Measure this rank's images.
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if rank == 0 and source.notes:
            print(*source.notes, sep="\n", flush=True)
        start, stop = (source.count * part // world_size for part in (rank, rank + 1))
        with Progress(total=stop - start, desc=title, unit="image", disable=rank > 0 or not self.progress) as bar:
            for index, batch in enumerate(prefetched(source.batches(start, stop, self.settings.batch_size))):
                first = start + index * self.settings.batch_size
                for statistics in rest:
                    statistics.update(batch, range(first, first + len(batch)))
                bar.update(len(batch))
        for statistics in rest:
            statistics.gather()
        return stored

    def _take_stored(self, statistics: FeatureStatistics, source: Source) -> list[str]:
        network = statistics.network
        if isinstance(source, StoredStatistics):
            if source.features != network.name or source.weights not in (network.digest, network.old_digest):
                raise ValueError(
                    f"expected statistics of {network.name} features (weights {network.digest[:12]}), found those of "
                    f"{source.features} ({source.weights[:12]}) in {source.path}; fix: choose the same --features and "
                    "weights as when they were saved"
                )
        elif not (isinstance(source, NpzImages) and network.name == "inception" and self.settings.stored):
            return []
        return statistics.take_stored(source)

    def finish(self) -> dict[str, float] | None:
        """Gather, and compute each metric: {name: value} on rank 0, `None` on the others."""
        for statistics in self.samples.values():
            statistics.gather()
        if dist.is_initialized() and dist.get_rank():
            return None
        values = {}
        for name in self.networks:
            values |= compute_metrics(self.samples[name], self.references.get(name), self._of(name), self.settings)
        return {name: values[name] for name in self.names}

    def record(self, values: dict[str, float], samples: dict[str, Any], labels: np.ndarray | None) -> dict[str, Any]:
        """What `metrics.json` holds of a measurement. Its writer adds how the samples were made ("sampling").

        Args:
            values: from `finish`.
            samples: where they are from, as `describe_source` says it; at least "count" and "kind".
            labels: class (N,) of each sample in file order, if known.
        """
        reference = self.source and describe_source(self.source, self.reference_stored)
        neighbors = self.source.count if self.source and self.kinds & {"precision", "recall"} else None
        warnings = warnings_about(samples["count"], labels, neighbors, "score" in self.kinds)
        sizes = samples.get("size"), reference and reference["size"]
        if None not in sizes and sizes[0] != sizes[1]:
            (height, width), (reference_height, reference_width) = sizes
            warnings.append(f"samples are {width} x {height}, the reference is {reference_width} x {reference_height}")
        return {
            "metrics": values,
            "samples": samples,
            "reference": reference,
            "features": {name: {"weights_sha256": network.digest} for name, network in self.networks.items()},
            "settings": asdict(self.settings) | {"device": str(next(iter(self.networks.values())).device)},
            "warnings": warnings,
        }


def describe_source(source: Source, stored: list[str]) -> dict[str, Any]:
    """Path, kind, count, size, digest, which arrays were taken as they stand in the file, and what else to say."""
    return {
        "path": str(source.path),
        "kind": source.kind,
        "count": source.count,
        "size": source.size and list(source.size),
        "sha256": source.digest(),
        "stored": stored,
        "notes": source.notes,
    }


def compute_metrics(
    samples: FeatureStatistics, reference: FeatureStatistics | None, names: Iterable[str], settings: Settings
) -> dict[str, float]:
    """Named metrics from statistics of one network.

    Args:
        samples: of the samples, gathered.
        reference: of the reference; `None` where no metric needs it.
        names: from `METRICS[samples.network.name]`.
        settings: distance, k and split size are taken from here.
    """
    values, pairs = {}, {}
    for name in names:
        kind, layer = METRICS[samples.network.name][name]
        if kind == "frechet":
            values[name] = metrics.frechet_distance(*reference.moments(layer), *samples.moments(layer))
        elif kind == "score":
            values[name] = metrics.inception_score(samples.kept(layer), settings.split_size)
        elif kind in ("kid", "mind"):
            values[name] = getattr(metrics, kind)(reference.kept(layer), samples.kept(layer))
        else:
            sets = reference.kept(layer), samples.kept(layer)
            if kind not in pairs and kind in ("precision", "recall"):  # they come together
                found = metrics.precision_recall(*sets, k=settings.k, distance=settings.distance)
                pairs |= zip(("precision", "recall"), found, strict=True)
            elif kind not in pairs:
                pairs |= zip(("density", "coverage"), metrics.density_coverage(*sets), strict=True)
            values[name] = pairs[kind]
    return values


def warnings_about(count: int, labels: np.ndarray | None, reference_count: int | None, has_score: bool) -> list[str]:
    """What a reader of the metrics must know.

    Args:
        count: images measured.
        labels: class (N,) of each in file order, if known.
        reference_count: images of the reference that precision and recall were computed with, if they were.
        has_score: whether the inception score is among the metrics.
    """
    warnings = []
    if count < FULL_COUNT:
        warnings.append(f"{count:,} samples: published values are of {FULL_COUNT:,}; fewer give a higher distance")
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
