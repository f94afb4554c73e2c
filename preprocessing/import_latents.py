"""Pack latents that another project has dumped into a latent store.

    python preprocessing/import_latents.py --source REPA/data --output-dir data/imagenet256
    python preprocessing/import_latents.py --source LightningDiT/latents --output-dir data/vavae --vae vavae.pt

REPA's folder: `vae-sd/dataset.json` with the labels, one .npy of posterior means and deviations per image, and the
crops in `images/`. LightningDiT's: safetensors shards of posterior samples, their mirror images and labels, with
`latents_stats.pt`. A killed run goes on by the same command.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it can be started as a file

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from dataset import read_meta
from models.vae import UNKNOWN_VAE, LatentScale, load_vae, vae_digest
from preprocessing.latent_scale import latent_statistics, measured_scale, scaled_deviation
from preprocessing.store_writer import LatentStoreWriter, shard_size
from runtime import cli, provenance
from runtime.cli import REQUIRED, flag

BATCH = 256  # images written at once
READERS = 16  # threads: they wait for the disk, and Pillow decodes without Python's lock
SD_VAE_SCALE = 0.18215  # what REPA trains with: the scale that the SD-VAE's config records
DEFAULT_VAES = {"repa": "stabilityai/sd-vae-ft-mse", "lightningdit": "hustvl/vavae-imagenet256-f16d32-dinov2"}
FACTORS = {"repa": 8, "lightningdit": 16}  # pixels to a latent, of those VAEs


@dataclass(frozen=True)
class ImportConfig:
    """Settings of an imported store."""

    source: str = flag(
        REQUIRED, "REPA's folder (with vae-sd/dataset.json), or one of LightningDiT's shards", group="dump"
    )
    format: str | None = flag(
        None, "layout of the source; told from its files unless set", choices=("repa", "lightningdit"), group="dump"
    )
    output_dir: str = flag(REQUIRED, "folder of the store", group="store")
    keep_images: bool = flag(False, "also keep the crops, for external encoders (repa)", group="store")
    dtype: str = flag("float32", "numbers in the store", choices=("float32", "float16"), group="store")
    class_names: str | None = flag(None, "text file with the name of each class, one a line", group="store")
    vae: str | None = flag(
        None, "VAE that made the latents: hub name, local folder or file; by default that of the project", group="vae"
    )
    resolution: int | None = flag(None, "side of the images in pixels; by default the VAE's factor times", group="vae")
    scale: str = flag(
        "recorded",
        "scale and shift: what the project recorded (repa: 0.18215; lightningdit: its statistics), or measured here",
        choices=("recorded", "auto"),
        group="vae",
    )
    stats: str | None = flag(
        None, "lightningdit: file with the mean and std of each channel; by default latents_stats.pt", group="vae"
    )
    latent_multiplier: float = flag(1.0, "lightningdit: factor of the latents after that", group="vae")

    def __post_init__(self):
        if not self.latent_multiplier > 0:
            raise ValueError(f"--latent-multiplier: expected more than 0, found {self.latent_multiplier}")


@dataclass
class Dump:
    """A source that has been looked through.

    Args:
        format: "repa" or "lightningdit".
        labels: (N,) int64.
        names: N names of sources.
        latent_shape: (C, H, W).
        kinds: what `read` gives besides moments: "flips", "images".
        read: rows [begin, end) -> {kind: array}, moments and flips (b, 2C, H, W) float32, images (b, R, R, 3) uint8.
        resolution: of the images, where there are any.
        listing: what identifies the source.
    """

    format: str
    labels: np.ndarray
    names: list[str]
    latent_shape: tuple[int, int, int]
    kinds: tuple[str, ...]
    read: Callable[[int, int], dict[str, np.ndarray]]
    resolution: int | None
    listing: str


def open_dump(config: ImportConfig) -> Dump:
    """The source, of the format asked for or found.

    Raises:
        ValueError: it is of neither format, or its parts disagree.
    """
    source = Path(config.source)
    features = source / "vae-sd" if (source / "vae-sd").is_dir() else source
    shards = sorted(source.glob("*.safetensors")) if source.is_dir() else []
    found = "repa" if (features / "dataset.json").is_file() else "lightningdit" if shards else None
    if found is None or config.format not in (None, found):
        raise ValueError(
            f"--source: expected {'a' if config.format is None else config.format + ' of the'} folder with "
            f"vae-sd/dataset.json (REPA) or *.safetensors (LightningDiT), found "
            f"{'neither' if found is None else found} in {source}"
        )
    if found == "repa":
        return open_repa(features, features.parent / "images" if config.keep_images else None)
    if config.keep_images:
        raise ValueError("--keep-images: expected a source with images (repa), found LightningDiT's shards")
    return open_lightningdit(shards)


def open_repa(features: Path, images: Path | None) -> Dump:
    """REPA's folder: .npy files of (2C, H, W), paired with labels by name and with images by their order."""
    try:
        entries = json.loads((features / "dataset.json").read_text())["labels"]
        labels = {str(name): label for name, label in entries}
    except (KeyError, TypeError, ValueError, UnicodeDecodeError) as error:
        raise ValueError(
            f'expected {{"labels": [[file, class], ...]}} in {features / "dataset.json"}, found another form'
        ) from error
    files = sorted(str(path.relative_to(features).as_posix()) for path in features.rglob("*.npy"))
    if set(files) != set(labels):
        without = sorted(set(files) - set(labels)) or sorted(set(labels) - set(files))
        kind = "a file without a label" if set(files) - set(labels) else "a label without its file"
        raise ValueError(
            f"expected as many .npy files in {features} as labels in dataset.json, found {len(files)} and "
            f"{len(labels)}; {kind}: {without[0]}"
        )
    if not files:
        raise ValueError(f"expected .npy files in {features}, found none")
    wrong = [name for name in files if not isinstance(labels[name], int) or labels[name] < 0]
    if wrong:
        raise ValueError(f"expected classes counted from 0 in dataset.json, found {labels[wrong[0]]} for {wrong[0]}")
    shape = _read_moments(features / files[0], None).shape
    pictures, resolution = [], None
    if images is not None:
        pictures = sorted(
            path for path in images.rglob("*") if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")
        )
        if len(pictures) != len(files):
            raise ValueError(f"expected an image in {images} for each of {len(files)} latents, found {len(pictures)}")
        resolution = _read_image(pictures[0], None).shape[0]

    pool = ThreadPoolExecutor(READERS)

    def read(begin: int, end: int) -> dict[str, np.ndarray]:
        moments = pool.map(lambda name: _read_moments(features / name, shape), files[begin:end])
        crops = pool.map(lambda path: _read_image(path, resolution), pictures[begin:end])
        arrays = {"moments": np.stack(list(moments))}
        return arrays | ({"images": np.stack(list(crops))} if images is not None else {})

    listing = "".join(f"{labels[name]} {name} {(features / name).stat().st_size}\n" for name in files)
    return Dump(
        "repa", np.array([labels[name] for name in files], np.int64), files, (shape[0] // 2, *shape[1:]),
        ("images",) if images is not None else (), read, resolution, listing,
    )  # fmt: skip


def _read_moments(path: Path, shape: tuple[int, ...] | None) -> np.ndarray:  # -> (2C, H, W)
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"expected an array in {path}, found a file that cannot be read as one") from error
    array = array[0] if array.ndim == 4 and len(array) == 1 else array
    if array.ndim != 3 or len(array) % 2 or (shape is not None and array.shape != shape):
        raise ValueError(
            f"expected means and deviations {shape or '(2C, H, W)'} in {path}, found an array {array.shape}"
        )  # fmt: skip
    return array.astype(np.float32)


def _read_image(path: Path, resolution: int | None) -> np.ndarray:  # -> (R, R, 3)
    try:
        image = np.asarray(Image.open(path).convert("RGB"))
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"expected an image, found {path}, which cannot be read") from error
    if image.shape[0] != image.shape[1] or image.shape[0] != (resolution or image.shape[0]):
        raise ValueError(f"expected square images of side {resolution or 'R'}, found {image.shape[:2]} in {path}")
    return image


def open_lightningdit(shards: list[Path]) -> Dump:
    """LightningDiT's shards: `latents`, `latents_flip` (n, C, H, W), `labels` (n,). Samples: deviation 0."""
    labels, names, starts, listing = [], [], [0], ""
    shapes, mirrored = set(), set()
    for path in shards:
        with _open_shard(path) as shard:
            keys = set(shard.keys())
            if not {"latents", "labels"} <= keys:
                raise ValueError(f"expected latents and labels in {path}, found {', '.join(sorted(keys)) or 'nothing'}")
            own = shard.get_tensor("labels")
            shape = tuple(shard.get_slice("latents").get_shape())
            flipped = tuple(shard.get_slice("latents_flip").get_shape()) if "latents_flip" in keys else None
        if own.is_floating_point() or own.ndim != 1 or (len(own) and own.min() < 0):
            raise ValueError(
                f"expected classes counted from 0 as labels in {path}, found {own.dtype} {tuple(own.shape)}"
            )
        if len(shape) != 4 or shape[0] != len(own) or flipped not in (None, shape):
            raise ValueError(
                f"expected as many latents (n, C, H, W) as labels in {path}, found latents {shape}, mirrored "
                f"{flipped}, labels {tuple(own.shape)}"
            )
        shapes.add(shape[1:])
        mirrored.add(flipped is not None)
        labels.append(own.numpy().astype(np.int64))
        names += [f"{path.name}/{row}" for row in range(len(own))]
        starts.append(starts[-1] + len(own))
        listing += f"{path.name} {path.stat().st_size}\n"
    if len(shapes) != 1 or len(mirrored) != 1:
        raise ValueError(
            f"expected shards that are alike, found latents {sorted(shapes)}, with mirror images {mirrored}"
        )
    (latent_shape,) = shapes
    kinds = ("flips",) if mirrored == {True} else ()

    def read(begin: int, end: int) -> dict[str, np.ndarray]:
        parts: dict[str, list[torch.Tensor]] = {"latents": []} | ({"latents_flip": []} if kinds else {})
        for path, first, last in zip(shards, starts, starts[1:], strict=False):
            if first < end and begin < last:
                with _open_shard(path) as shard:
                    for key, rows in parts.items():
                        rows.append(shard.get_slice(key)[max(begin - first, 0) : min(end, last) - first].float())
        samples = {key: torch.cat(rows).numpy() for key, rows in parts.items()}
        return {
            kind: np.concatenate([samples[key], np.zeros_like(samples[key])], axis=1)
            for kind, key in zip(("moments", *kinds), parts, strict=True)
        }

    return Dump("lightningdit", np.concatenate(labels), names, latent_shape, kinds, read, None, listing)


def _open_shard(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"expected a safetensors file, found {path}, which cannot be read ({error})") from error


def recorded_scale(config: ImportConfig, dump: Dump) -> tuple[LatentScale, str]:
    """Scale and shift as the source's project trains with them, and where they are from.

    Raises:
        ValueError: there are none, or not one for each channel.
    """
    if dump.format == "repa":
        return LatentScale((SD_VAE_SCALE,), (0.0,)), "recorded"
    path = Path(config.stats) if config.stats else Path(config.source) / "latents_stats.pt"
    if not path.is_file():
        raise ValueError(f"expected statistics of the latents in {path}, found none; give --stats FILE or --scale auto")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        mean, std = (content[name].flatten().double().tolist() for name in ("mean", "std"))
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"--stats: expected tensors `mean` and `std`, found another content in {path}") from error
    channels = dump.latent_shape[0]
    if not len(mean) == len(std) == channels or min(std) <= 0:
        raise ValueError(
            f"--stats: expected {channels} means and positive deviations, one for each channel of the latents, found "
            f"{len(mean)} and {len(std)} in {path}"
        )
    return LatentScale(tuple(config.latent_multiplier / value for value in std), tuple(mean)), path.name


def read_class_names(config: ImportConfig, count: int) -> list[str]:
    """Names of the classes: of the file, or numbers.

    Raises:
        ValueError: fewer names than classes.
    """
    if config.class_names is None:
        return [str(label) for label in range(count)]
    try:
        names = Path(config.class_names).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--class-names: expected a text file, found {config.class_names} ({error})") from error
    if len(names) < count:
        raise ValueError(f"--class-names: expected {count} lines or more, found {len(names)} in {config.class_names}")
    return names


def local_digest(vae: str) -> str:
    """Digest of a VAE that is here; one on the hub is not fetched only to be identified."""
    return vae_digest(load_vae(vae)) if Path(vae).exists() else UNKNOWN_VAE


def main(argv: list[str] | None = None) -> None:
    config = cli.parse(ImportConfig, argv, __doc__.splitlines()[0])
    dump = open_dump(config)
    class_names = read_class_names(config, int(dump.labels.max()) + 1)
    scale, scale_source = (None, "measured") if config.scale == "auto" else recorded_scale(config, dump)
    vae = config.vae or DEFAULT_VAES[dump.format]
    C, H, W = dump.latent_shape
    resolution = config.resolution or dump.resolution or FACTORS[dump.format] * H
    settings = {
        "format": dump.format, "source_sha256": hashlib.sha256(dump.listing.encode()).hexdigest(), "vae": vae,
        "dtype": config.dtype, "keep_images": config.keep_images, "scale": scale and scale.to_dict(),
        "resolution": resolution, "class_names": class_names,
    }  # fmt: skip
    shapes = {"moments": (2 * C, H, W)} | ({"flips": (2 * C, H, W)} if "flips" in dump.kinds else {})
    shapes |= {"images": (resolution, resolution, 3)} if "images" in dump.kinds else {}
    if dump.resolution not in (None, resolution):
        raise ValueError(f"--resolution: expected {dump.resolution}, the side of the images, found {resolution}")
    digest = local_digest(vae)
    read_rows(
        dump, 0, min(BATCH, len(dump.names)), config.dtype
    )  # what is wrong with the first batch is said before a folder is made
    writer = LatentStoreWriter(config.output_dir, settings, shapes, config.dtype)
    if writer.is_complete:
        print(f"{config.output_dir} is complete: {read_meta(config.output_dir)['count']:,} images")
        return
    total = len(dump.names)
    size = shard_size(total)
    starts = range(0, total, size)
    with tqdm(total=total, desc="packing", unit="image", dynamic_ncols=True) as progress:
        for index, begin in enumerate(starts):
            pack_shard(writer, index, begin, min(begin + size, total), dump, progress)
    sums = np.array(writer.summed_statistics(len(starts)))
    scale = scale or measured_scale(sums)
    meta = {
        "vae": vae, "vae_digest": digest, **scale.to_dict(), "scale_source": scale_source, "resolution": resolution,
        "crop": "adm-center" if dump.format == "repa" else "unknown", "class_names": class_names,
        "settings": settings, "versions": provenance.versions(),
    }  # fmt: skip
    meta = writer.finish(len(starts), meta)
    deviation = scaled_deviation(sums, scale)
    print(
        f"{config.output_dir}: {meta['count']:,} images of {meta['num_classes']} classes; latents "
        f"{tuple(meta['latent_shape'])}, scaled to a deviation of {deviation:.4f}"
    )
    if not 0.5 < deviation < 2:
        print("warning: expected a deviation near 1; import them again with --scale auto", file=sys.stderr)


def read_rows(dump: Dump, begin: int, end: int, dtype: str) -> dict[str, np.ndarray]:
    """Rows [begin, end) of the source, once it is sure that a store of that type can hold them."""
    arrays = dump.read(begin, end)
    if (np.split(arrays["moments"], 2, axis=1)[1] < 0).any():
        raise ValueError(
            f"expected means and then standard deviations in the latents, found negative ones from {dump.names[begin]} "
            f"on; are they log-variances?"
        )
    for kind in set(arrays) - {"images"}:
        held = (np.abs(arrays[kind]) <= np.finfo(dtype).max).all(axis=(1, 2, 3))  # false for NaN, too
        if not held.all():
            name = dump.names[begin + int(held.argmin())]
            raise ValueError(
                f"expected finite latents that {dtype} can hold, found others in {name} of the source; mend it, or use "
                f"--dtype float32"
            )
    return arrays


def pack_shard(writer: LatentStoreWriter, index: int, begin: int, end: int, dump: Dump, progress: tqdm) -> None:
    """Write what is left of one shard, rows [begin, end) of the source."""
    shard = writer.shard(index)
    progress.update(end - begin if shard.closed else shard.items)
    first = end if shard.closed else begin + shard.items
    for start in range(first, end, BATCH):
        stop = min(start + BATCH, end)
        arrays = read_rows(dump, start, stop, writer.dtype)
        shard.append(
            items=stop - start, arrays=arrays, labels=dump.labels[start:stop].tolist(), paths=dump.names[start:stop],
            statistics=latent_statistics(arrays["moments"]),
        )  # fmt: skip
        progress.update(stop - start)
    shard.close()


if __name__ == "__main__":
    cli.run(main)
