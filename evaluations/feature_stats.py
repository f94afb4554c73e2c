"""Features of many images, and their statistics, gathered batch by batch over one process or several.

Features are float32; means and covariances are float64.

Shapes: B images of a batch, N of all, D the width of a feature.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch

from evaluations.networks import FeatureNetwork, inception_features

if TYPE_CHECKING:
    from torch_fidelity import FeatureExtractorInceptionV3


def extract_features(
    images: Iterable[np.ndarray | torch.Tensor], network: FeatureNetwork | FeatureExtractorInceptionV3
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pool features, spatial features and logits of all images, from one pass.

    Args:
        images: batches (B, H, W, 3), uint8 or floating in 0..255.
        network: from `load_network("inception", ...)`, or torch-fidelity's module itself.

    Returns:
        pool (N, 2048), spatial (N, 2023) in H W C order, logits without bias (N, 1008), all float32.
    """
    if isinstance(network, torch.nn.Module):
        network = inception_features("inception", network, digest="", device=next(network.parameters()).device)
    batches = [{layer: value.cpu() for layer, value in network(batch).items()} for batch in images]
    if not batches:
        raise ValueError("expected at least one batch of images, found none")
    pool, spatial, logits = (torch.cat([batch[layer] for batch in batches]) for layer in ("pool", "spatial", "logits"))
    return pool.numpy(), spatial.numpy(), logits.numpy()


class _Moments:
    """Mean (D,) and scatter (D, D), the sum of outer products about the mean, in float64, updated as batches come.

    Pairwise updates (Chan, Golub, LeVeque, 1983): no difference of large sums, whatever the mean. Batches wait until
    `ROWS` are there, since an update reads and writes all of the scatter; `flush` before reading.
    """

    ROWS = 512

    def __init__(self, width: int, device: torch.device):
        self.count = 0
        self.waiting: list[torch.Tensor] = []
        self.mean = torch.zeros(width, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(width, width, dtype=torch.float64, device=device)

    def update(self, features: torch.Tensor) -> None:
        """Add features (B, D)."""
        self.waiting.append(features)
        if sum(map(len, self.waiting)) >= self.ROWS:
            self.flush()

    def flush(self) -> None:
        """Take in what waits."""
        if not self.waiting:
            return
        features = torch.cat(self.waiting).double()  # (n, D)
        self.waiting = []
        mean = features.mean(dim=0)  # (D,)
        centred = features - mean  # (n, D)
        self.scatter.addmm_(centred.T, centred)
        self._move(len(features), mean)

    def merge(self, count: int, mean: torch.Tensor, scatter: torch.Tensor) -> None:
        """Add what another process has."""
        self.scatter += scatter
        self._move(count, mean)

    def _move(self, count: int, mean: torch.Tensor) -> None:
        total = self.count + count
        gap = mean - self.mean  # (D,)
        self.scatter.addr_(gap, gap, alpha=self.count * count / total)
        self.mean += gap * (count / total)
        self.count = total


class FeatureStatistics:
    """What metrics need of a set of images, gathered batch by batch: moments of some layers, features of others.

    Several processes each update their own with the images they have, then all call `gather`. `positions` are places in
    file order; kept features come out in that order whoever computed them, so that the splits of the inception score
    are those of one process.

    Args:
        network: the features; its digest goes into what is saved.
        moments: layers whose mean and covariance are wanted.
        keep: layers whose features are wanted themselves, each N x D float32 in host memory, once.
    """

    def __init__(self, network: FeatureNetwork, moments: Iterable[str] = (), keep: Iterable[str] = ()):
        self.network = network
        self.count = 0
        self._moments: dict[str, _Moments | None] = dict.fromkeys(moments)
        self._stored_moments: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._stored_features: dict[str, np.ndarray] = {}
        self._positions: list[np.ndarray] = []
        self._kept: dict[str, list[np.ndarray]] = {layer: [] for layer in keep}

    @torch.inference_mode()
    def update(self, images: torch.Tensor | np.ndarray, positions: Iterable[int] | None = None) -> None:
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
                self._moments[layer] = moments = _Moments(features[layer].shape[1], features[layer].device)
            moments.update(features[layer])
        for layer, chunks in self._kept.items():
            chunks.append(features[layer].cpu().numpy())
        if positions is None:
            positions = range(self.count, self.count + len(images))
        self._positions.append(np.fromiter(positions, dtype=np.int64, count=len(images)))
        self.count += len(images)

    @torch.inference_mode()
    def gather(self) -> None:
        """Bring everything to process 0. All processes of `torch.distributed` call it; alone, it does nothing."""
        dist = torch.distributed
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return
        group = dist.new_group(backend="gloo")  # these are host arrays, whatever the default group is for
        rank = dist.get_rank()

        def pass_on(tensor: torch.Tensor, sender: int) -> torch.Tensor:
            tensor = tensor.contiguous()
            dist.send(tensor, 0, group=group) if rank else dist.recv(tensor, sender, group=group)
            return tensor

        for sender in range(1, dist.get_world_size()):
            if rank not in (0, sender):
                continue
            count = int(pass_on(torch.tensor([self.count]), sender))
            if not count:
                continue
            for layer, own in list(self._moments.items()):
                width = int(pass_on(torch.tensor([own.mean.numel() if own else 0]), sender))
                other = own if rank else _Moments(width, torch.device("cpu"))
                other.flush()
                mean, scatter = pass_on(other.mean.cpu(), sender), pass_on(other.scatter.cpu(), sender)
                if rank == 0:
                    self._moments[layer] = own = own or _Moments(width, self.network.device)
                    own.merge(count, mean.to(own.mean.device), scatter.to(own.mean.device))
            positions = np.concatenate(self._positions) if rank else np.empty(count, dtype=np.int64)
            positions = pass_on(torch.from_numpy(positions), sender).numpy()
            for chunks in self._kept.values():
                own = torch.from_numpy(np.concatenate(chunks)) if rank else None
                width = int(pass_on(torch.tensor([own.shape[1] if rank else 0]), sender))
                features = pass_on(own if rank else torch.empty(count, width), sender).numpy()
                if rank == 0:
                    chunks.append(features)
            if rank == 0:
                self._positions.append(positions)
                self.count += count
        if rank:  # all of it is process 0's now: a second call brings nothing twice
            self.count, self._positions = 0, []
            self._moments = dict.fromkeys(self._moments)
            self._kept = {layer: [] for layer in self._kept}
        dist.barrier(group=group)
        dist.destroy_process_group(group)

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

    def wanted(self) -> list[str]:
        """Layers that images are needed for: those asked for and not set from a file."""
        return list(dict.fromkeys([*self._moments, *self._kept]))

    def wants_moments(self, layer: str) -> bool:
        """Whether mean and covariance of this layer are to be computed from images."""
        return layer in self._moments

    def keeps(self, layer: str) -> bool:
        """Whether features of this layer are to be computed from images."""
        return layer in self._kept

    def set_moments(self, layer: str, mean: np.ndarray, covariance: np.ndarray) -> None:
        """Take moments that were computed before; images no longer count for them."""
        del self._moments[layer]
        self._stored_moments[layer] = (mean, covariance)

    def set_kept(self, layer: str, features: np.ndarray) -> None:
        """Take features (N, D), in file order, that were computed before; images no longer count for them."""
        del self._kept[layer]
        self._stored_features[layer] = features

    def kept(self, layer: str) -> np.ndarray:
        """Features (N, D) float32 in file order.

        Raises:
            ValueError: no images.
        """
        if layer in self._stored_features:
            return self._stored_features[layer]
        if not self.count:
            raise ValueError("expected images, found none")
        self._sort()
        return self._kept[layer][0]

    def _sort(self) -> None:
        """Join the chunks of each kept layer in file order; each chunk is freed as soon as it is copied."""
        if len(self._positions) <= 1:
            return
        positions = np.concatenate(self._positions)
        order = np.argsort(positions, kind="stable")
        if (np.diff(positions[order]) == 0).any():
            raise ValueError("expected each image once, found positions that repeat")
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        for chunks in self._kept.values():
            joined = np.empty((len(order), chunks[0].shape[1]), dtype=chunks[0].dtype)
            start = 0
            while chunks:
                chunk = chunks.pop(0)
                joined[place[start : start + len(chunk)]] = chunk
                start += len(chunk)
            chunks.append(joined)
        self._positions = [positions[order]]

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything as named arrays, as `--save-stats` writes it; the moments' names are those of ADM's files."""
        arrays = {
            "features": np.array(self.network.name),
            "digest": np.array(self.network.digest),
            "count": np.array(self.count),
        }
        for layer, (mean, covariance) in MOMENT_NAMES.items():
            if layer in self._moments or layer in self._stored_moments:
                arrays[mean], arrays[covariance] = self.moments(layer)
        return arrays | {layer: self.kept(layer) for layer in (*self._kept, *self._stored_features)}


MOMENT_NAMES = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # of a layer's mean and covariance in a file
