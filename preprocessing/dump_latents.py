"""Encode images to a latent store: ADM's centre crop, the mean and std of the VAE's posterior.

    python preprocessing/dump_latents.py --source imagenet/train --output-dir data/imagenet256
    torchrun --nproc_per_node=8 preprocessing/dump_latents.py ...      # one process per GPU, the same bytes

Each shard belongs to one process and its batches are the same for any number of them. A killed run is resumed by the
same command, behind the last whole batch of each shard.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it can be started as a file

from runtime import cli
from runtime.cli import REQUIRED, flag


@dataclass(frozen=True)
class DumpConfig:
    """Settings of a store."""

    source: str = flag(REQUIRED, "class folders, a zip of them, or parquet (folder, file, 'pattern*')", group="images")
    output_dir: str = flag(REQUIRED, "folder of the store", group="store")
    resolution: int = flag(256, "side of the square crop, in pixels", group="images")
    limit: int | None = flag(None, "take this many images, evenly spaced over the source", group="images")
    alpha: str = flag("drop", "transparency: dropped, or put on white", choices=("drop", "white"), group="images")
    exif_orientation: bool = flag(False, "turn images as their camera asks for", group="images")
    skip_corrupt: bool = flag(False, "leave out files that cannot be read, and list them in meta.json", group="images")
    vae: str = flag("stabilityai/sd-vae-ft-mse", "hub name, local folder, or file as VA-VAE's", group="vae")
    scale: str = flag("config", "the VAE's, or measured by channel", choices=("config", "auto"), group="vae")
    flip: bool = flag(False, "also encode the mirror image of each crop", group="store")
    keep_images: bool = flag(False, "also keep the crops, for external encoders", group="store")
    dtype: str = flag("float32", "dtype of the store", choices=("float32", "float16"), group="store")
    verify: int = flag(0, "draw this many decoded latents beside their originals, in verify.png", group="store")
    mixed_precision: str = flag("no", "precision of the encoder", choices=("no", "bf16"), group="speed")
    batch_size: int = flag(32, "images encoded at once, per process", group="speed")
    num_workers: int = flag(4, "DataLoader workers that read and crop images, per process", group="speed")
    timeout: int = flag(43_200, "seconds after which a process that waits for another gives up", group="speed")
    device: str | None = flag(None, "cpu, cuda, cuda:N or mps; by default a GPU where there is one", group="speed")

    def __post_init__(self):
        for name, least in {"resolution": 1, "batch_size": 1, "num_workers": 0, "verify": 0, "timeout": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"--{name.replace('_', '-')}: expected at least {least}, found {getattr(self, name)}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"--limit: expected at least 1, found {self.limit}")


if __name__ == "__main__":
    # Answers --help and refuses wrong flags before torch is imported.
    cli.parse_early(DumpConfig, __doc__)

import dataclasses
import datetime
import functools
import hashlib
import os
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.utils import make_grid, save_image

from dataset import LatentDataset, read_paths
from models.vae import decode_images, encode_moments, load_vae, scale_from_config, vae_digest, vae_factor
from preprocessing.sources import Source, describe, open_source
from preprocessing.store_writer import (
    LatentStoreWriter,
    ShardWriter,
    check_directory,
    recorded_settings,
    resumed_config,
    shard_size,
)
from runtime.distributed import allow_tf32, barrier, choose_device, copy_to_host_async, hold_directory, run_on_rank0
from runtime.files import Field
from runtime.images import center_crop, read_image
from runtime.loading import loading, wait_for_batches, worker_errors
from runtime.progress import Progress

# What determines the content of a store, in its record. A setting that comes later needs Field(historic): what the
# stores that lack it were made with.
SETTINGS = dict.fromkeys(
    "vae_digest resolution crop dtype flip keep_images scale mixed_precision images images_sha256".split(), Field()
) | {"alpha": Field("drop"), "exif_orientation": Field(False)}


class Crops(torch.utils.data.Dataset):
    """The crops of a source's images, and what was noticed of them; one that cannot be read gives the reason in place
    of pixels."""

    def __init__(self, source: Source, size: int, alpha: str = "drop", exif_orientation: bool = False):
        self.source, self.size, self.how = source, size, (alpha, exif_orientation)

    def __len__(self) -> int:
        return len(self.source.names)

    def __getitem__(self, index: int) -> tuple[int, np.ndarray | str, list[str]]:
        try:
            image, noticed = read_image(self.source.read(index), *self.how)
            return index, center_crop(image, self.size), noticed
        except (OSError, KeyError, RuntimeError) as error:  # a zip names a missing or locked member by the last two
            return index, " ".join(str(error).split()) or type(error).__name__, []


class Batch(NamedTuple):
    """Images that were read together.

    Args:
        indices: of those that could be read.
        crops: (b, R, R, 3) uint8, theirs; None if there are none.
        unread: index and reason of the others.
        noticed: how many have transparency ("alpha"), or ask to be turned ("rotated").
    """

    indices: list[int]
    crops: Tensor | None
    unread: list[tuple[int, str]]
    noticed: dict[str, int]


def collate(crops: list[tuple[int, np.ndarray | str, list[str]]]) -> Batch:
    read = [(index, crop) for index, crop, _ in crops if not isinstance(crop, str)]
    stacked = torch.from_numpy(np.stack([crop for _, crop in read])) if read else None
    unread = [(index, crop) for index, crop, _ in crops if isinstance(crop, str)]
    return Batch([index for index, _ in read], stacked, unread, Counter(word for *_, words in crops for word in words))


@torch.no_grad()
def start_encoding(vae: torch.nn.Module, crops: Tensor, config: DumpConfig) -> Callable[[], dict[str, np.ndarray]]:
    """Begin to encode crops (b, R, R, 3) uint8; the function returned waits for the result.

    That is their moments (b, 2C, H, W) float32, and where asked for those of their mirror images, the flips.
    """
    images = crops.to(vae.device, non_blocking=True)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16"):
        moments = {"moments": encode_moments(vae, images)}
        if config.flip:
            moments["flips"] = encode_moments(vae, images.flip(2))
    wait = copy_to_host_async(*moments.values())
    return lambda: dict(zip(moments, wait(), strict=True))


def remaining(shards: list[tuple[ShardWriter, list[int]]], size: int) -> list[tuple[ShardWriter, list[int], bool]]:
    """The batches that are left: shard, images, and whether they are its last.

    They are cut from a shard's first image, wherever a killed run had stopped.
    """
    return [
        (shard, indices[begin : begin + size], begin + size >= len(indices))
        for shard, indices in shards
        for begin in range(shard.items, len(indices), size)
        if not shard.closed
    ]


def encode_shards(
    shards: list[tuple[ShardWriter, list[int]]], source: Source, vae: torch.nn.Module, config: DumpConfig, rank: int
) -> None:
    """Encode what is left of this process's shards, each given with the indices of its images.

    DataLoader workers read and crop, a thread writes: the device waits for neither.
    """
    todo = remaining(shards, config.batch_size)
    loader = DataLoader(
        Crops(source, config.resolution, config.alpha, config.exif_orientation),
        batch_sampler=[indices for _, indices, _ in todo],
        collate_fn=collate,
        prefetch_factor=4 if config.num_workers else None,
        pin_memory=vae.device.type == "cuda",
        **loading(config.num_workers),
    )

    def write(shard: ShardWriter, batch: Batch, last: bool, wait: Callable | None, before: Future | None) -> int:
        """Wait for a batch's moments and append it to its shard, which is closed with its last one; images done."""
        if before is not None:
            before.result()  # nothing may be written behind a batch that was not
        arrays = {}
        if wait is not None:
            arrays = {kind: as_stored(moments, config.dtype) for kind, moments in wait().items()}
            arrays |= {"images": batch.crops.numpy()} if config.keep_images else {}
        labels, paths = ([values[index] for index in batch.indices] for values in (source.labels, source.names))
        skipped = [{"path": source.names[index], "reason": reason} for index, reason in batch.unread]
        shard.append(len(labels) + len(skipped), arrays, labels, paths, skipped, batch.noticed)
        if last:
            shard.close()
        return len(labels) + len(skipped)

    total = sum(len(indices) for _, indices in shards)
    done = total - sum(len(indices) for _, indices, _ in todo)
    bar = Progress(total=total, initial=done, desc="encoding", unit="image", disable=rank > 0)
    with worker_errors(), bar, ThreadPoolExecutor(1) as writer:
        in_flight: deque[Future[int]] = deque()
        for (shard, _, last), batch in zip(todo, wait_for_batches(loader), strict=True):
            if batch.unread and not config.skip_corrupt:
                index, reason = batch.unread[0]
                found = f"{source.names[index]} in {config.source}, which cannot be read ({reason})"
                raise ValueError(f"expected an image, found {found}; replace it, or leave such out by --skip-corrupt")
            wait = start_encoding(vae, batch.crops, config) if batch.indices else None
            before = in_flight[-1] if in_flight else None
            in_flight.append(writer.submit(write, shard, batch, last, wait, before))
            if len(in_flight) > 2:
                bar.update(in_flight.popleft().result())
        for written in in_flight:
            bar.update(written.result())
    for shard, _ in shards:
        shard.close()  # one that was killed between its last batch and its end


def as_stored(moments: np.ndarray, dtype: str) -> np.ndarray:  # (b, 2C, H, W) float32 -> the same in `dtype`
    """Moments as they are stored.

    Raises:
        ValueError: a value that `dtype` cannot hold.
    """
    if not np.all(np.abs(moments) <= np.finfo(dtype).max):  # catches NaN, too
        most = np.abs(moments).max()
        raise ValueError(f"{dtype} can hold no moments of {most}; use --dtype float32 and --mixed-precision no")
    return moments.astype(dtype)


def verify(config: DumpConfig, source: Source, vae: torch.nn.Module) -> None:
    """`verify.png`: originals above the decoded posterior means of as many images, evenly spaced."""
    store = LatentDataset(config.output_dir)
    rows = np.unique(np.linspace(0, len(store) - 1, config.verify).round().astype(int))
    paths = read_paths(config.output_dir)
    index_of = {name.replace("\n", "\\n"): index for index, name in enumerate(source.names)}
    crops = Crops(source, config.resolution, config.alpha, config.exif_orientation)
    originals = torch.from_numpy(np.stack([crops[index_of[paths[row]]][1] for row in rows]))
    mean = store.__getitems__(rows)["moments"].chunk(2, dim=1)[0]
    latents = store.scale.scale_latent(mean).to(vae.device)
    decoded = torch.cat([decode_images(vae, part, store.scale).cpu() for part in latents.split(config.batch_size)])
    error = (originals.double() - decoded.double()).square().flatten(1).mean(dim=1)
    psnr = (10 * torch.log10(255**2 / error)).mean()
    pairs = torch.stack([originals, decoded]).flatten(0, 1).permute(0, 3, 1, 2)
    file = Path(config.output_dir) / "verify.png"
    save_image(make_grid(pairs.float() / 255, nrow=len(rows)), file)
    print(f"{file}: originals above, decoded latents below; mean PSNR {psnr:.2f} dB over {len(rows)} images")


def open_vae(config: DumpConfig) -> torch.nn.Module:
    """The VAE, on this process's device.

    Raises:
        ValueError: it cannot be loaded, or does not divide the images.
    """
    device = choose_device(config.device)
    allow_tf32(False)  # the moments are exact: everything else is computed from them
    vae = load_vae(config.vae, device)
    factor = vae_factor(vae)
    if config.resolution % factor:
        expected = f"a multiple of {factor}, by which {config.vae} reduces images"
        raise ValueError(f"--resolution: expected {expected}, found {config.resolution}")
    if device.type == "cuda" and config.mixed_precision == "bf16":  # for the GPU's matrix units
        vae = vae.to(memory_format=torch.channels_last)
    return vae


def open_store(config: DumpConfig, source: Source, items: list[int], vae: torch.nn.Module) -> LatentStoreWriter:
    """The store: begun now, found half done, or complete.

    Raises:
        ValueError: the directory holds a store of other settings, or something else.
    """
    listing = "".join(f"{source.labels[index]} {source.names[index]}\n" for index in items)
    settings = {name: getattr(config, name, None) for name in SETTINGS}
    saved = recorded_settings(config.output_dir, SETTINGS) or {}
    settings |= {"vae_digest": vae_digest(vae, saved.get("vae_digest")), "crop": "adm-center", "images": len(items)}
    settings["images_sha256"] = hashlib.sha256(listing.encode(errors="surrogateescape")).hexdigest()
    side = config.resolution // vae_factor(vae)
    shapes = {"moments": (2 * vae.config.latent_channels, side, side)}
    shapes |= {"flips": shapes["moments"]} if config.flip else {}
    shapes |= {"images": (config.resolution, config.resolution, 3)} if config.keep_images else {}
    return LatentStoreWriter(config.output_dir, settings, shapes, config.dtype, SETTINGS)


def main(argv: list[str] | None = None) -> None:
    config, given = cli.parse_given(DumpConfig, argv, __doc__)
    # The settings: those of the record, where a run is resumed and the user does not give them.
    saved = recorded_settings(config.output_dir, SETTINGS)
    config = resumed_config(config, given, saved)
    if saved and "limit" not in given:
        config = dataclasses.replace(config, limit=saved["images"])

    # The images, as rank 0 finds them; the VAE, the store.
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1:
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=config.timeout))
    source = run_on_rank0(functools.partial(open_source, config.source))
    if rank == 0:
        print(f"{config.source}: {describe(source)}", flush=True)
    items = list(range(len(source.names)))
    if config.limit is not None and config.limit < len(items):
        items = [place * len(items) // config.limit for place in range(config.limit)]
    vae = open_vae(config)
    with hold_directory(Path(config.output_dir), check_directory):
        make_store(config, source, items, vae, rank, world_size)
        if config.verify and rank == 0:
            verify(config, source, vae)
    if world_size > 1:
        torch.distributed.destroy_process_group()


def make_store(
    config: DumpConfig, source: Source, items: list[int], vae: torch.nn.Module, rank: int, world_size: int
) -> None:
    """Encode what is missing of the images `items`, as rank `rank` of `world_size`."""
    writer = open_store(config, source, items, vae)
    if writer.is_complete:
        if rank == 0:
            print(f"{config.output_dir} is complete: {len(LatentDataset(config.output_dir)):,} images")
        return
    # This process's shards; then, on rank 0, what all have in common.
    size = shard_size(len(items))
    shards = [items[begin : begin + size] for begin in range(0, len(items), size)]
    mine = [(writer.shard(index), shards[index]) for index in range(rank, len(shards), world_size)]
    encode_shards(mine, source, vae, config, rank)
    barrier()
    if rank == 0:
        about = {name: writer.settings.get(name) for name in "vae vae_digest scale_source resolution crop".split()}
        about |= {"vae": config.vae, "scale_source": "config", "class_names": source.class_names}
        about["left_out"] = source.left_out
        writer.complete(len(shards), None if config.scale == "auto" else scale_from_config(vae), about)


if __name__ == "__main__":
    cli.run(main)
