"""What the probe looks at: images of a store or of files, their VAE features, and the tokens that a SiT makes of them.

Shape suffixes: N images, R image side, C latent channels, H = W latent side, T tokens, D numbers of a token, p patch
side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dataset import LatentDataset
from diffusion.interpolant import Interpolant
from models.sit import SiT, patchify
from models.vae import LatentScale, decode_images, encode_moments
from runtime.images import EXTENSIONS, center_crop, decode_image, image_names
from runtime.seeding import block_generator

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

BLOCK = 16  # images that share a generator of noise, and a pass of the network
INPUT = 0  # stands for a block: the noised patches that enter the network, for comparison
LONGEST_SIDE = 50  # times the shorter one: the crop of a longer image would first be enlarged beyond the memory


@dataclass
class ImageFiles:
    """Images outside a store, cropped and encoded; indexed as a `LatentDataset` with images is."""

    names: list[str]
    moments: Tensor  # (N, 2C, H, W) float32
    crops: Tensor  # (N, R, R, 3) uint8
    null_class: int

    def __len__(self) -> int:
        return len(self.names)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        rows = torch.as_tensor(indices)
        labels = torch.full((len(rows),), self.null_class)
        return {"moments": self.moments[rows], "label": labels, "image": self.crops[rows]}


def find_images(paths: Sequence[str]) -> list[Path]:
    """The files that `--images` names, those of a directory sorted.

    Raises:
        ValueError: a path where there is nothing, or a directory without images.
    """
    found = []
    for path in map(Path, paths):
        visible = [path / name for name in image_names(path)]
        if not path.is_file() and not visible:
            raise ValueError(
                f"--images: expected image files ({' '.join(sorted(EXTENSIONS))}) or directories of them, "
                f"found {'no image in' if path.is_dir() else 'nothing at'} {path}"
            )
        found += [path] if path.is_file() else visible
    return found


def read_crop(path: Path, size: int) -> np.ndarray:  # -> (R, R, 3) uint8
    """The centre of an image file, cropped and resized as the images of a store are.

    Raises:
        ValueError: no image, or one much longer than wide.
    """
    try:
        image = decode_image(path.read_bytes())
    except OSError as error:
        raise ValueError(f"--images: expected an image, found {path}, which cannot be read ({error})") from error
    if max(image.size) > LONGEST_SIDE * min(image.size):
        raise ValueError(
            f"--images: expected an image at most {LONGEST_SIDE} times as long as it is wide, found {path} of "
            f"{image.width} x {image.height} pixels; cut it, or leave it out"
        )
    return center_crop(image, size)


def encode_images(files: list[Path], size: int, vae: AutoencoderKL, null_class: int) -> ImageFiles:
    """Crop and encode image files, without a class."""
    crops = torch.from_numpy(np.stack([read_crop(file, size) for file in files]))
    moments = torch.cat([encode_moments(vae, batch.to(vae.device)).cpu() for batch in crops.split(BLOCK)])
    return ImageFiles([file.name for file in files], moments, crops, null_class)


def pick_evenly(total: int, count: int) -> np.ndarray:  # -> (min(count, total),) int64
    """Different indices below `total` at about equal distances, the first and last included."""
    return np.linspace(0, total - 1, min(count, total)).round().astype(np.int64)


def batches(source: LatentDataset | ImageFiles, indices: np.ndarray) -> Iterator[tuple[int, slice, dict[str, Tensor]]]:
    """The images `indices` of a source in blocks: the block's number, its rows among `indices`, what is stored."""
    for block, begin in enumerate(range(0, len(indices), BLOCK)):
        rows = slice(begin, min(begin + BLOCK, len(indices)))
        yield block, rows, source.__getitems__(indices[rows])


def read_pictures(
    source: LatentDataset | ImageFiles,
    indices: np.ndarray,
    open_decoder: Callable[[], AutoencoderKL],
    scale: LatentScale,
    device: torch.device,
) -> list[np.ndarray]:  # -> N of (R, R, 3) uint8
    """The images as they were cropped; where a store did not keep them, the decoded posterior mean."""
    pictures = []
    for _, _, batch in batches(source, indices):
        images = batch.get("image")
        if images is None:
            mean = batch["moments"].to(device).chunk(2, dim=1)[0]
            images = decode_images(open_decoder(), scale.scale_latent(mean), scale).cpu()
        pictures += list(images.numpy())
    return pictures


@dataclass
class ProbedSiT:
    """A network and how it is looked at.

    Args:
        sit: on `device`.
        scale: of the latents it was trained on.
        path_type: its path between data and noise.
        depths: blocks, counted from 1.
        levels: noise levels.
        seed: of the noise.
        with_classes: give the network the class of an image; else all are without one.
    """

    sit: SiT
    scale: LatentScale
    path_type: str
    depths: tuple[int, ...]
    levels: tuple[float, ...]
    seed: int
    device: torch.device
    with_classes: bool = True

    def f_vae(self, moments: Tensor) -> Tensor:  # (N, 2C, H, W) -> (N, T, p*p*C)
        """The VAE's features of images: the scaled posterior mean, in patches."""
        mean = moments.to(self.device).chunk(2, dim=1)[0]
        return patchify(self.scale.scale_latent(mean), self.sit.config.patch_size)

    @torch.no_grad()
    def tokens(self, moments: Tensor, y: Tensor, t: float, block: int, purpose: str) -> dict[int, Tensor]:
        """The tokens (N, T, D) that leave each block, by depth, and the patches of y_t (N, T, p*p*C) as depth `INPUT`.

        Args:
            moments: (N, 2C, H, W) of at most `BLOCK` images.
            y: (N,) int64 classes.
            t: noise level.
            block: number of this block of images. Image i of it is sampled and noised by the same numbers at every t,
                on every device and whatever the other images are.
            purpose: of the draws.

        Raises:
            ValueError: a token is not finite.
        """
        mean, std = moments.to(self.device).chunk(2, dim=1)
        shape = (BLOCK, 2, *mean.shape[1:])
        draws = torch.randn(shape, generator=block_generator(self.seed, block, purpose))[: len(mean)].to(self.device)
        z = self.scale.scale_latent(mean + std * draws[:, 0])
        times = torch.full((len(z),), t, device=self.device)
        y_t = Interpolant(self.path_type).interpolate(z, draws[:, 1], times)
        if not self.with_classes:
            y = torch.full_like(y, self.sit.config.num_classes)
        _, kept = self.sit(y_t, times, y.to(self.device), return_blocks=self.depths)
        tokens = {INPUT: patchify(y_t, self.sit.config.patch_size)} | dict(zip(self.depths, kept, strict=True))
        for depth, x in tokens.items():
            if not x.isfinite().all():
                what = "noised latents" if depth == INPUT else f"tokens of block {depth}"
                raise ValueError(f"expected finite numbers, found others in the {what} at t = {t:g}; is the run sound?")
        return tokens
