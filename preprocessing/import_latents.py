"""Pack latents that another project has dumped into a latent store.

    python preprocessing/import_latents.py --source REPA/data --output-dir data/imagenet256
    python preprocessing/import_latents.py --source LightningDiT/latents --output-dir data/vavae --vae vavae.pt

REPA's folder: `vae-sd/dataset.json` with the labels, one .npy of posterior means and stds per image, and the
crops in `images/`. LightningDiT's: safetensors shards of posterior samples, their mirror images and labels, with
`latents_stats.pt`. A killed run is resumed by the same command.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it can be started as a file

from runtime import cli
from runtime.cli import REQUIRED, flag

FORMATS = ("repa", "lightningdit")


@dataclass(frozen=True)
class ImportConfig:
    """Settings of an imported store."""

    source: str = flag(REQUIRED, "REPA's folder (with vae-sd/dataset.json), or LightningDiT's (shards)", group="dump")
    format: str | None = flag(None, "layout of the source, if not told from its files", choices=FORMATS, group="dump")
    output_dir: str = flag(REQUIRED, "folder of the store", group="store")
    keep_images: bool = flag(False, "also keep the crops, for external encoders (repa)", group="store")
    dtype: str = flag("float32", "dtype of the store", choices=("float32", "float16"), group="store")
    class_names: str | None = flag(None, "text file with the name of each class, one a line", group="store")
    vae: str | None = flag(None, "their VAE: hub name, local directory or file; by default the project's", group="vae")
    resolution: int | None = flag(None, "side of the images in pixels; by default the VAE's factor times", group="vae")
    scale: str = flag(
        "recorded",
        "scale and shift: what the project recorded (repa: 0.18215; lightningdit: its statistics), or measured here",
        choices=("recorded", "auto"),
        group="vae",
    )
    stats: str | None = flag(None, "lightningdit: file of means and stds, not latents_stats.pt", group="vae")
    latent_multiplier: float = flag(1.0, "lightningdit: factor of the latents after that", group="vae")

    def __post_init__(self):
        if not self.latent_multiplier > 0:
            raise ValueError(f"--latent-multiplier: expected more than 0, found {self.latent_multiplier}")


if __name__ == "__main__":
    # Answers --help and refuses wrong flags before torch is imported.
    cli.parse_early(ImportConfig, __doc__)

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from dataset import LatentDataset
from models.tensor_file import read_tensor_file
from models.vae import UNKNOWN_VAE, LatentScale, load_vae, vae_digest
from preprocessing.store_writer import LatentStoreWriter, check_directory, recorded_settings, resumed_config, shard_size
from runtime.distributed import hold_directory
from runtime.files import Field
from runtime.images import decode_image, file_names, image_names
from runtime.progress import Progress

BATCH = 256  # images written at once
READERS = 16  # threads: they wait for the disk, and Pillow decodes without Python's lock
SD_VAE_SCALE = 0.18215  # what REPA trains with: the scale that the SD-VAE's config records
DEFAULT_VAES = {"repa": "stabilityai/sd-vae-ft-mse", "lightningdit": "hustvl/vavae-imagenet256-f16d32-dinov2"}
FACTORS = {"repa": 8, "lightningdit": 16}  # pixels to a latent, of those VAEs
# What determines the content of a store, in its record. A setting that comes later needs Field(historic): what the
# stores that lack it were made with.
SETTINGS = dict.fromkeys("format source_sha256 vae dtype keep_images scale resolution class_names".split(), Field())


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
        kinds = "vae-sd/dataset.json (REPA) or *.safetensors (LightningDiT)"
        hint = f" for --format {config.format}" if config.format else ""
        raise ValueError(f"--source: expected a folder with {kinds}{hint}, found {found or 'neither'} in {source}")
    if found == "repa":
        return open_repa(features, features.parent / "images" if config.keep_images else None)
    if config.keep_images:
        raise ValueError("--keep-images: expected a source with images (repa), found LightningDiT's shards")
    return open_lightningdit(shards)


def open_repa(features: Path, images: Path | None) -> Dump:
    """REPA's directory: .npy files of (2C, H, W), paired with labels by name and with images by number."""
    # Each file has a label.
    try:
        labels = {str(name): label for name, label in json.loads((features / "dataset.json").read_text())["labels"]}
    except (KeyError, TypeError, ValueError) as error:
        form = '{"labels": [[file, class], ...]}'
        raise ValueError(f"expected {form} in {features / 'dataset.json'}, found another form") from error
    files = sorted(name for name in file_names(features) if name.endswith(".npy"))
    if set(files) != set(labels):
        alone = sorted(set(files) ^ set(labels))[0]
        kind = "a file without a label" if alone not in labels else "a label without its file"
        found = f"found {len(files)} and {len(labels)}; {kind}: {alone}"
        raise ValueError(f"expected as many .npy files in {features} as labels in dataset.json, {found}")
    if not files:
        raise ValueError(f"expected .npy files in {features}, found none")
    for name in files:
        if not isinstance(labels[name], int) or labels[name] < 0:
            raise ValueError(f"expected classes counted from 0 in dataset.json, found {labels[name]} for {name}")
    shape = _read_moments(features / files[0], None).shape

    # And an image, where they are wanted.
    pictures, resolution = [], None
    if images is not None:
        pictures = pair_images(files, images)
        resolution = _read_image(pictures[0], None).shape[0]

    pool = ThreadPoolExecutor(READERS)

    def read(begin: int, end: int) -> dict[str, np.ndarray]:
        moments = pool.map(lambda name: _read_moments(features / name, shape), files[begin:end])
        crops = list(pool.map(lambda path: _read_image(path, resolution), pictures[begin:end]))
        return {"moments": np.stack(list(moments))} | ({"images": np.stack(crops)} if crops else {})

    listing = "".join(f"{labels[name]} {name} {(features / name).stat().st_size}\n" for name in files)
    ids, latent_shape = np.array([labels[name] for name in files], np.int64), (shape[0] // 2, *shape[1:])
    return Dump("repa", ids, files, latent_shape, ("images",) if pictures else (), read, resolution, listing)


def pair_images(files: list[str], images: Path) -> list[Path]:
    """The image of each latent: in the same directory and with the same number, as `img00000012.png` and
    `img-mean-std-00000012.npy`, or with the same name where there is no number.

    Raises:
        ValueError: a latent has no image, or several.
    """

    def key(name: str) -> tuple[str, str]:
        path = PurePosixPath(name)
        return str(path.parent), (re.findall(r"\d+", path.stem) or [path.stem])[-1]

    found: dict[tuple[str, str], list[str]] = {}
    for name in image_names(images):
        found.setdefault(key(name), []).append(name)
    for name in files:
        if len(found.get(key(name), ())) != 1:
            several = ", ".join(found.get(key(name), ())) or "none"
            raise ValueError(f"expected one image in {images} with the number of the latent {name}, found {several}")
    return [images / found[key(name)][0] for name in files]


def _read_moments(path: Path, shape: tuple[int, ...] | None) -> np.ndarray:  # -> (2C, H, W)
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"expected an array in {path}, found a file that cannot be read as one") from error
    array = array[0] if array.ndim == 4 and len(array) == 1 else array
    if array.ndim != 3 or len(array) % 2 or (shape is not None and array.shape != shape):
        expected = shape or "(2C, H, W)"
        raise ValueError(f"expected means and stds {expected} in {path}, found an array {array.shape}")
    return array.astype(np.float32)


def _read_image(path: Path, resolution: int | None) -> np.ndarray:  # -> (R, R, 3)
    try:
        image = np.asarray(decode_image(path.read_bytes()))
    except OSError as error:
        raise ValueError(f"expected an image, found {path}, which cannot be read") from error
    if image.shape[0] != image.shape[1] or image.shape[0] != (resolution or image.shape[0]):
        raise ValueError(f"expected square images of side {resolution or 'R'}, found {image.shape[:2]} in {path}")
    return image


def open_lightningdit(shards: list[Path]) -> Dump:
    """LightningDiT's shards: `latents`, `latents_flip` (n, C, H, W), `labels` (n,). Samples: a std of 0."""
    labels, names, starts, shapes, listing = [], [], [0], set(), ""
    for path in shards:
        own, shape, mirrored = _read_shard(path)
        shapes.add((shape, mirrored))
        labels.append(own)
        names += [f"{path.name}/{row}" for row in range(len(own))]
        starts.append(starts[-1] + len(own))
        listing += f"{path.name} {path.stat().st_size}\n"
    if len(shapes) != 1:
        raise ValueError(f"expected shards that are alike, found latents and mirror images {sorted(shapes)}")
    ((latent_shape, mirrored),) = shapes
    kinds = {"moments": "latents"} | ({"flips": "latents_flip"} if mirrored else {})

    def read(begin: int, end: int) -> dict[str, np.ndarray]:
        parts: dict[str, list[np.ndarray]] = {kind: [] for kind in kinds}
        for path, first, last in zip(shards, starts, starts[1:], strict=False):
            if first < end and begin < last:
                with _open_shard(path) as shard:
                    for kind, key in kinds.items():
                        rows = shard.get_slice(key)[max(begin - first, 0) : min(end, last) - first]
                        parts[kind].append(rows.float().numpy())
        samples = {kind: np.concatenate(rows) for kind, rows in parts.items()}
        return {kind: np.concatenate([rows, np.zeros_like(rows)], axis=1) for kind, rows in samples.items()}

    flips = tuple(kinds)[1:]
    return Dump("lightningdit", np.concatenate(labels), names, latent_shape, flips, read, None, listing)


def _read_shard(path: Path) -> tuple[np.ndarray, tuple[int, ...], bool]:
    """Labels of a shard, the shape of a latent (C, H, W), and whether there are mirror images."""
    with _open_shard(path) as shard:
        keys = set(shard.keys())
        if not {"latents", "labels"} <= keys:
            raise ValueError(f"expected latents and labels in {path}, found {', '.join(sorted(keys)) or 'nothing'}")
        labels = shard.get_tensor("labels")
        shape = tuple(shard.get_slice("latents").get_shape())
        mirrored = tuple(shard.get_slice("latents_flip").get_shape()) if "latents_flip" in keys else None
    if labels.is_floating_point() or labels.ndim != 1 or (len(labels) and labels.min() < 0):
        found = f"{labels.dtype} {tuple(labels.shape)}"
        raise ValueError(f"expected classes counted from 0 as labels in {path}, found {found}")
    if len(shape) != 4 or shape[0] != len(labels) or mirrored not in (None, shape):
        found = f"latents {shape}, mirrored {mirrored}, labels {tuple(labels.shape)}"
        raise ValueError(f"expected as many latents (n, C, H, W) as labels in {path}, found {found}")
    return labels.numpy().astype(np.int64), shape[1:], mirrored is not None


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
        content = read_tensor_file(path)
        mean, std = (content[name].flatten().double().tolist() for name in ("mean", "std"))
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"--stats: expected tensors `mean` and `std`, found another content in {path}") from error
    channels = dump.latent_shape[0]
    if not len(mean) == len(std) == channels or min(std) <= 0:
        found = f"{len(mean)} and {len(std)} in {path}"
        raise ValueError(f"--stats: expected {channels} means and positive stds, one a channel, found {found}")
    return LatentScale(tuple(config.latent_multiplier / value for value in std), tuple(mean)), path.name


def read_class_names(config: ImportConfig, count: int) -> list[str]:
    """Names of the classes: of the file, or numbers.

    Raises:
        ValueError: fewer names than classes.
    """
    if config.class_names is None:
        return [str(label) for label in range(count)]
    try:
        names = Path(config.class_names).read_text().removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--class-names: expected a text file, found {config.class_names} ({error})") from error
    if len(names) < count:
        raise ValueError(f"--class-names: expected {count} lines or more, found {len(names)} in {config.class_names}")
    return names


def main(argv: list[str] | None = None) -> None:
    # The settings: those of the record, where a run is resumed and the user does not give them.
    config, given = cli.parse_given(ImportConfig, argv, __doc__)
    saved = recorded_settings(config.output_dir, SETTINGS)
    plain = {name: value for name, value in (saved or {}).items() if name not in ("scale", "class_names")}
    config = resumed_config(config, given, plain)
    rescaled = given & {"scale", "stats", "latent_multiplier"}
    if saved and saved["scale"] is None and not rescaled:
        config = dataclasses.replace(config, scale="auto")

    # The source, and what its project says of it.
    dump = open_dump(config)
    class_names = read_class_names(config, int(dump.labels.max()) + 1)
    scale, scale_source = (None, "measured") if config.scale == "auto" else recorded_scale(config, dump)
    if saved and "class_names" not in given:
        class_names = saved["class_names"]
    if saved and saved["scale"] and not rescaled:
        scale = LatentScale.from_dict(saved["scale"])
    vae = config.vae or DEFAULT_VAES[dump.format]
    C, H, W = dump.latent_shape
    resolution = config.resolution or dump.resolution or FACTORS[dump.format] * H
    if dump.resolution not in (None, resolution):
        raise ValueError(f"--resolution: expected {dump.resolution}, the side of the images, found {resolution}")
    digest = vae_digest(load_vae(vae)) if Path(vae).exists() else UNKNOWN_VAE  # not fetched only to be identified
    count = len(dump.names)
    read_rows(dump, 0, min(BATCH, count), config.dtype)  # what is wrong is said before a directory is made

    # The store: begun now, found half done, or complete.
    settings = {name: getattr(config, name, None) for name in SETTINGS}
    settings |= {
        "format": dump.format,
        "source_sha256": hashlib.sha256(dump.listing.encode(errors="surrogateescape")).hexdigest(),
        "vae": vae,
    }
    settings |= {"scale": scale and scale.to_dict(), "resolution": resolution, "class_names": tuple(class_names)}
    shapes = dict.fromkeys(("moments", *dump.kinds), (2 * C, H, W))
    shapes |= {"images": (resolution, resolution, 3)} if "images" in shapes else {}
    with hold_directory(Path(config.output_dir), check_directory):
        writer = LatentStoreWriter(config.output_dir, settings, shapes, config.dtype, SETTINGS)
        if writer.is_complete:
            print(f"{config.output_dir} is complete: {len(LatentDataset(config.output_dir)):,} images")
            return

        # What is left of its shards, and what they have in common.
        size = shard_size(count)
        starts = range(0, count, size)
        with Progress(total=count, desc="packing", unit="image") as progress:
            for index, begin in enumerate(starts):
                pack_shard(writer, index, begin, min(begin + size, count), dump, progress)
        crop = "adm-center" if dump.format == "repa" else "unknown"
        about = {"vae": vae, "vae_digest": digest, "scale_source": scale_source, "resolution": resolution, "crop": crop}
        writer.complete(len(starts), scale, about | {"class_names": class_names})


def read_rows(dump: Dump, begin: int, end: int, dtype: str) -> dict[str, np.ndarray]:
    """Rows [begin, end) of the source, refused if a store of that dtype cannot hold them."""
    arrays = dump.read(begin, end)
    if (np.split(arrays["moments"], 2, axis=1)[1] < 0).any():
        place = f"from {dump.names[begin]} on"
        raise ValueError(f"expected means and then stds, found negative ones {place}; are they log-variances?")
    for kind in set(arrays) - {"images"}:
        held = (np.abs(arrays[kind]) <= np.finfo(dtype).max).all(axis=(1, 2, 3))  # false for NaN, too
        if not held.all():
            name = dump.names[begin + int(held.argmin())]
            fix = "repair it, or use --dtype float32"
            raise ValueError(f"expected finite latents that {dtype} can hold, found others in {name}; {fix}")
    return arrays


def pack_shard(writer: LatentStoreWriter, index: int, begin: int, end: int, dump: Dump, progress: Progress) -> None:
    """Write what is left of one shard, rows [begin, end) of the source."""
    shard = writer.shard(index)
    progress.update(end - begin if shard.closed else shard.items)
    first = end if shard.closed else begin + shard.items
    for start in range(first, end, BATCH):
        stop = min(start + BATCH, end)
        arrays = read_rows(dump, start, stop, writer.dtype)
        shard.append(stop - start, arrays, dump.labels[start:stop].tolist(), dump.names[start:stop])
        progress.update(stop - start)
    shard.close()


if __name__ == "__main__":
    cli.run(main)
