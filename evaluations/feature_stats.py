"""Statistics of the features of many images, updated batch by batch on one process or several.

Features are float32; means and covariances are float64.

Shapes: B images of a batch, N of all, D the width of a feature.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from evaluations.images import MOMENT_NAMES, NpzImages, StoredStatistics
from evaluations.networks import FeatureNetwork
from runtime.distributed import WITHOUT_FLOAT64


class Moments:
    """Mean (D,) and scatter (D, D), the sum of outer products about the mean, in float64, updated as batches come.

    Pairwise updates (Chan, Golub, LeVeque, 1983): no difference of large sums, whatever the mean. Batches wait until
    `ROWS` are there, since an update reads and writes all of the scatter; `flush` before reading.
    """

    ROWS = 512

    def __init__(self, width: int, device: torch.device):
        device = torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device
        self.count = 0
        self.waiting: list[Tensor] = []
        self.mean = torch.zeros(width, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(width, width, dtype=torch.float64, device=device)

    def update(self, features: Tensor) -> None:  # (B, D)
        self.waiting.append(features)
        if sum(map(len, self.waiting)) >= self.ROWS:
            self.flush()

    def flush(self) -> None:
        """Add the batches that wait."""
        if not self.waiting:
            return
        features = torch.cat(self.waiting).to(self.mean.device).double()  # (n, D)
        self.waiting = []
        mean = features.mean(dim=0)  # (D,)
        centred = features - mean  # (n, D)
        self.scatter.addmm_(centred.T, centred)
        self._add_mean(len(features), mean)

    def merge(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        """Add what another rank has."""
        self.scatter += scatter.to(self.mean.device)
        self._add_mean(count, mean.to(self.mean.device))

    def _add_mean(self, count: int, mean: Tensor) -> None:
        total = self.count + count
        gap = mean - self.mean  # (D,)
        self.scatter.addr_(gap, gap, alpha=self.count * count / total)
        self.mean += gap * (count / total)
        self.count = total


class FeatureStatistics:
    """What metrics need of a set of images: moments of some layers, features of others.

    Several ranks each update their own with the images they have, then all call `gather`. `positions` are places in
    file order; features come out in that order whichever rank computed them, so that the splits of the inception score
    are those of one process.

    Args:
        network: the features; its digest goes into what is saved.
        moments: layers whose mean and covariance are wanted.
        keep: layers whose features are wanted themselves, each N x D float32 in host memory, once.
    """

    def __init__(self, network: FeatureNetwork, moments: Iterable[str] = (), keep: Iterable[str] = ()):
        self.network = network
        # Of images.
        self.count = 0
        self._moments: dict[str, Moments | None] = dict.fromkeys(moments)
        self._positions: list[np.ndarray] = []
        self._kept: dict[str, list[np.ndarray]] = {layer: [] for layer in keep}
        # Of a file, in their place.
        self._stored_moments: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._stored_features: dict[str, np.ndarray] = {}

    def wanted(self) -> list[str]:
        """Layers that images are needed for: those asked for and not taken from a file."""
        return list(dict.fromkeys([*self._moments, *self._kept]))

    def take_stored(self, source: NpzImages | StoredStatistics) -> list[str]:
        """Take what a file holds of the wanted layers, for which images are then no longer needed.

        Returns:
            the names of the arrays that were taken.

        Raises:
            ValueError: arrays that do not fit, or that are not finite.
        """
        taken = []
        for layer in self.wanted():
            names = MOMENT_NAMES.get(layer, ())
            if names and set(names) <= set(source.members) and layer in self._moments:
                mean, covariance = (np.asarray(source.array(name), dtype=np.float64) for name in names)
                if mean.ndim != 1 or covariance.shape != (mean.size, mean.size):
                    raise ValueError(
                        f"expected a mean (D,) and a covariance (D, D) of {layer} features in {source.path}, found "
                        f"{mean.shape}, {covariance.shape}"
                    )
                if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
                    raise ValueError(f"expected finite statistics in {source.path}, found NaN or infinity")
                del self._moments[layer]
                self._stored_moments[layer] = mean, covariance
                taken += names
            if isinstance(source, StoredStatistics) and layer in source.members and layer in self._kept:
                del self._kept[layer]
                self._stored_features[layer] = source.array(layer)
                taken.append(layer)
        return taken

    @torch.inference_mode()
    def update(self, images: Tensor | np.ndarray, positions: Iterable[int] | None = None) -> None:
        """Run the network on images (B, H, W, 3), uint8 or floating in 0..255, and add the result.

        Args:
            images: on any device; an empty batch is allowed.
            positions: place (B,) of each image in file order; `None` continues after the last ones.
        """
        if not len(images):
            return
        features = self.network(images)
        for layer, moments in self._moments.items():
            if moments is None:
                self._moments[layer] = moments = Moments(features[layer].shape[1], features[layer].device)
            moments.update(features[layer])
        for layer, chunks in self._kept.items():
            chunks.append(features[layer].cpu().numpy())
        if positions is None:
            positions = range(self.count, self.count + len(images))
        self._positions.append(np.fromiter(positions, dtype=np.int64, count=len(images)))
        self.count += len(images)

    @torch.inference_mode()
    def gather(self) -> None:
        """Bring everything to rank 0. All ranks of `torch.distributed` call it; on one process it does nothing."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return
        group = dist.new_group(backend="gloo")  # these are host arrays, whatever the default group is for
        if dist.get_rank():
            dist.send_object_list([self._take_all()], 0, group=group)
        else:
            for sender in range(1, dist.get_world_size()):
                received = [None]
                dist.recv_object_list(received, sender, group=group)
                self._merge(*received[0])
        dist.barrier(group=group)
        dist.destroy_process_group(group)

    def _take_all(self) -> tuple[int, list[np.ndarray], dict[str, tuple[int, Tensor, Tensor]], dict[str, list]]:
        """What `_merge` adds, of which nothing stays here: a second `gather` brings nothing twice."""
        sums = {}
        for layer, moments in self._moments.items():
            if moments is not None:
                moments.flush()
                sums[layer] = moments.count, moments.mean.cpu(), moments.scatter.cpu()
        everything = self.count, self._positions, sums, self._kept
        self.count, self._positions = 0, []
        self._moments = dict.fromkeys(self._moments)
        self._kept = {layer: [] for layer in self._kept}
        return everything

    def _merge(self, count: int, positions: list, sums: dict[str, tuple], kept: dict[str, list]) -> None:
        self.count += count
        self._positions += positions
        for layer, (images, mean, scatter) in sums.items():
            if self._moments[layer] is None:
                self._moments[layer] = Moments(len(mean), self.network.device)
            self._moments[layer].merge(images, mean, scatter)
        for layer, chunks in kept.items():
            self._kept[layer] += chunks

    @torch.inference_mode()
    def moments(self, layer: str) -> tuple[np.ndarray, np.ndarray]:
        """Mean (D,) and covariance (D, D), ddof 1, float64."""
        if layer in self._stored_moments:
            return self._stored_moments[layer]
        moments = self._moments[layer]
        if moments is not None:
            moments.flush()
        if moments is None or moments.count < 2:
            raise ValueError(f"expected at least 2 images for a covariance, found {self.count}; fix: give more images")
        return moments.mean.cpu().numpy(), (moments.scatter / (moments.count - 1)).cpu().numpy()

    def kept(self, layer: str) -> np.ndarray:
        """Features (N, D) float32 in file order.

        Raises:
            ValueError: no images.
        """
        if layer in self._stored_features:
            return self._stored_features[layer]
        if not self.count:
            raise ValueError("expected images, found none")
        if len(self._positions) > 1:
            self._sort()
        return self._kept[layer][0]

    def _sort(self) -> None:
        """Join the chunks of each kept layer in file order; each chunk is freed as soon as it is copied."""
        positions = np.concatenate(self._positions)
        order = np.argsort(positions, kind="stable")
        if (np.diff(positions[order]) == 0).any():
            raise ValueError("expected each image once, found positions that repeat")
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        places = np.split(place, np.cumsum([len(chunk) for chunk in self._positions])[:-1])
        for chunks in self._kept.values():
            joined = np.empty((len(order), chunks[0].shape[1]), dtype=chunks[0].dtype)
            for rows in places:
                joined[rows] = chunks.pop(0)
            chunks.append(joined)
        self._positions = [positions[order]]

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything as `numpy.savez` takes it; `images.STATISTICS` defines the names."""
        arrays = {"features": self.network.name, "digest": self.network.digest, "count": self.count}
        for layer, (mean, covariance) in MOMENT_NAMES.items():
            if layer in self._moments or layer in self._stored_moments:
                arrays[mean], arrays[covariance] = self.moments(layer)
        return arrays | {layer: self.kept(layer) for layer in (*self._kept, *self._stored_features)}
