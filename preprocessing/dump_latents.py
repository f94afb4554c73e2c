"""Encode images to a latent store: ADM's centre crop, the VAE's posterior mean and deviation.

    python preprocessing/dump_latents.py --source imagenet/train --output-dir data/imagenet256
    torchrun --nproc_per_node=8 preprocessing/dump_latents.py ...      # one process per GPU, the same bytes

Each shard belongs to one process and its batches are the same for any number of them. A killed run goes on by the same
command, behind the last whole batch of each shard.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it can be started as a file

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from dataset import LatentDataset, read_meta
from models.vae import decode_images, encode_moments, load_vae, scale_from_config, vae_digest, vae_factor
from preprocessing.latent_scale import latent_statistics, measured_scale, scaled_deviation
from preprocessing.sources import Source, open_source
from preprocessing.store_writer import LatentStoreWriter, ShardWriter, shard_size
from runtime import cli, provenance
from runtime.cli import REQUIRED, flag
from runtime.distributed import copy_to_host_async
from runtime.images import center_crop, decode_image


@dataclass(frozen=True)
class DumpConfig:
    """Settings of a store."""

    source: str = flag(
        REQUIRED, "folder of class folders, zip of them, or parquet (folder, file or 'pattern*')", group="images"
    )
    output_dir: str = flag(REQUIRED, "folder of the store", group="store")
    resolution: int = flag(256, "side of the square crop, in pixels", group="images")
    limit: int | None = flag(None, "take this many images, evenly spaced over the source", group="images")
    skip_corrupt: bool = flag(False, "leave out files that cannot be read, and list them in meta.json", group="images")
    vae: str = flag(
        "stabilityai/sd-vae-ft-mse", "AutoencoderKL: hub name, local folder, or file as VA-VAE's", group="vae"
    )
    scale: str = flag(
        "config", "scale and shift of the latents: the VAE's own, or measured by channel", choices=("config", "auto"),
        group="vae",
    )  # fmt: skip
    flip: bool = flag(False, "also encode the mirror image of each crop", group="store")
    keep_images: bool = flag(False, "also keep the crops, for external encoders", group="store")
    dtype: str = flag("float32", "numbers in the store", choices=("float32", "float16"), group="store")
    verify: int = flag(0, "draw this many decoded latents beside their originals, in verify.png", group="store")
    mixed_precision: str = flag("no", "precision of the encoder", choices=("no", "bf16"), group="speed")
    batch_size: int = flag(32, "images encoded at once, per process", group="speed")
    num_workers: int = flag(4, "processes that read and crop images, per process that encodes", group="speed")
    timeout: int = flag(43_200, "seconds after which a process that waits for another gives up", group="speed")
    device: str | None = flag(None, "cpu, cuda or cuda:N; by default a GPU where there is one", group="speed")

    def __post_init__(self):
        for name, least in (("resolution", 1), ("batch_size", 1), ("num_workers", 0), ("verify", 0), ("timeout", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name.replace('_', '-')}: expected at least {least}, found {getattr(self, name)}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"--limit: expected at least 1, found {self.limit}")


class Crops(torch.utils.data.Dataset):
    """The crops of a source's images; one that cannot be read gives the reason in place of pixels."""

    def __init__(self, source: Source, size: int):
        self.source, self.size = source, size

    def __len__(self) -> int:
        return len(self.source.names)

    def __getitem__(self, index: int) -> tuple[int, np.ndarray | str]:
        try:
            return index, center_crop(decode_image(self.source.read(index)), self.size)
        except (OSError, KeyError, RuntimeError) as error:  # a zip names a missing or locked member by the last two
            return index, " ".join(str(error).split()) or type(error).__name__


def as_tensors(batch: list[tuple[int, np.ndarray | str]]) -> tuple[list[int], Tensor | None, list[tuple[int, str]]]:
    """Of a batch: the indices that could be read and their crops (b, R, R, 3) uint8, and the others with the reason."""
    kept = [(index, crop) for index, crop in batch if not isinstance(crop, str)]
    crops = torch.from_numpy(np.stack([crop for _, crop in kept])) if kept else None
    return [index for index, _ in kept], crops, [(index, crop) for index, crop in batch if isinstance(crop, str)]


@torch.no_grad()
def start_encoding(vae: torch.nn.Module, crops: Tensor, config: DumpConfig) -> Callable[[], list[np.ndarray]]:
    """Begin to encode crops (b, R, R, 3) uint8; the function returned waits for the result.

    That is their moments (b, 2C, H, W) float32, and where asked for those of their mirror images.
    """
    images = crops.to(vae.device, non_blocking=True)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16"):
        moments = [encode_moments(vae, images)]
        if config.flip:
            moments.append(encode_moments(vae, images.flip(2)))
    return copy_to_host_async(*moments)


def encode_shards(
    shards: list[tuple[ShardWriter, list[int]]], source: Source, vae: torch.nn.Module, config: DumpConfig, rank: int
) -> None:
    """Encode what is left of this process's shards, each given with the indices of its images.

    Processes of their own read and crop, a thread writes: the device waits for neither.
    """
    todo = [  # the batches of a shard are cut from its first image, wherever a killed run had stopped
        (shard, indices[begin : begin + config.batch_size])
        for shard, indices in shards
        for begin in range(shard.items, len(indices), config.batch_size)
        if not shard.closed
    ]
    loader = DataLoader(
        Crops(source, config.resolution), batch_sampler=[indices for _, indices in todo], collate_fn=as_tensors,
        num_workers=config.num_workers, prefetch_factor=4 if config.num_workers else None,
        pin_memory=vae.device.type == "cuda",
    )  # fmt: skip
    total = sum(len(indices) for _, indices in shards)
    done = total - sum(len(indices) for _, indices in todo)
    lengths = {shard: len(indices) for shard, indices in shards}
    with (
        tqdm(total=total, initial=done, desc="encoding", unit="image", disable=rank > 0, dynamic_ncols=True) as bar,
        ThreadPoolExecutor(1) as writer,
    ):
        in_flight: deque[Future[int]] = deque()
        for (shard, _), (indices, crops, unread) in zip(todo, loader, strict=True):
            refuse_unread(unread, source, config)
            wait = start_encoding(vae, crops, config) if indices else None
            before = in_flight[-1] if in_flight else None
            content = (indices, crops, unread, wait)
            in_flight.append(writer.submit(write, shard, lengths[shard], *content, source, config, before))
            if len(in_flight) > 2:
                bar.update(in_flight.popleft().result())
        for written in in_flight:
            bar.update(written.result())
    for shard in lengths:
        shard.close()  # one that was killed between its last batch and its end


def refuse_unread(unread: list[tuple[int, str]], source: Source, config: DumpConfig) -> None:
    if unread and not config.skip_corrupt:
        index, reason = unread[0]
        raise ValueError(
            f"expected an image, found {source.names[index]} in {config.source}, which cannot be read ({reason}); "
            f"replace it, or leave such files out by --skip-corrupt"
        )


def write(
    shard: ShardWriter,
    length: int,
    indices: list[int],
    crops: Tensor | None,
    unread: list[tuple[int, str]],
    wait: Callable[[], list[np.ndarray]] | None,
    source: Source,
    config: DumpConfig,
    before: Future[int] | None,
) -> int:
    """Wait for the moments of a batch and append it to its shard, which is closed with its last one; images done."""
    if before is not None:
        before.result()  # nothing may be written behind a batch that was not
    arrays, sums = {}, []
    if wait is not None:
        for name, moments in zip(("moments", "flips"), wait(), strict=False):
            arrays[name] = as_stored(moments, config.dtype)
        sums = latent_statistics(arrays["moments"])
        if config.keep_images:
            arrays["images"] = crops.numpy()
    shard.append(
        items=len(indices) + len(unread),
        arrays=arrays,
        labels=[source.labels[index] for index in indices],
        paths=[source.names[index] for index in indices],
        skipped=[{"path": source.names[index], "reason": reason} for index, reason in unread],
        statistics=sums,
    )
    if shard.items == length:
        shard.close()
    return len(indices) + len(unread)


def as_stored(moments: np.ndarray, dtype: str) -> np.ndarray:  # (b, 2C, H, W) float32 -> the same in `dtype`
    """Moments as they are stored.

    Raises:
        ValueError: a number that `dtype` cannot hold.
    """
    if not np.all(np.abs(moments) <= np.finfo(dtype).max):  # catches NaN, too
        raise ValueError(
            f"expected moments that {dtype} can hold, found {np.abs(moments).max()}; use --dtype float32 and "
            f"--mixed-precision no"
        )
    return moments.astype(dtype)


def verify(config: DumpConfig, source: Source, vae: torch.nn.Module) -> None:
    """`verify.png`: originals above the decoded posterior means of as many images, evenly spaced."""
    from torchvision.utils import make_grid, save_image

    store = LatentDataset(config.output_dir)
    rows = np.unique(np.linspace(0, len(store) - 1, config.verify).round().astype(int))
    paths = (Path(config.output_dir) / "paths.txt").read_text().splitlines()
    numbers = {name.replace("\n", "\\n"): index for index, name in enumerate(source.names)}
    originals = torch.from_numpy(
        np.stack([center_crop(decode_image(source.read(numbers[paths[row]])), config.resolution) for row in rows])
    )
    mean = store.__getitems__(rows)["moments"].chunk(2, dim=1)[0]
    latents = store.scale.scale_latent(mean).to(vae.device)
    decoded = torch.cat([decode_images(vae, part, store.scale).cpu() for part in latents.split(config.batch_size)])
    error = (originals.double() - decoded.double()).square().flatten(1).mean(dim=1)
    psnr = (10 * torch.log10(255**2 / error)).mean()
    pairs = torch.stack([originals, decoded]).flatten(0, 1).permute(0, 3, 1, 2)
    file = Path(config.output_dir) / "verify.png"
    save_image(make_grid(pairs.float() / 255, nrow=len(rows)), file)
    print(f"{file}: originals above, decoded latents below; mean PSNR {psnr:.2f} dB over {len(rows)} images")


def main(argv: list[str] | None = None) -> None:
    config = cli.parse(DumpConfig, argv, __doc__.splitlines()[0])
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda":  # of the processes of a machine, each has a GPU of its own
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if device.startswith("cuda"):
        torch.backends.cudnn.allow_tf32 = False  # moments are the ground that everything else stands on
    source = open_source(config.source)
    items = list(range(len(source.names)))
    if config.limit is not None and config.limit < len(items):
        items = [place * len(items) // config.limit for place in range(config.limit)]
    vae = load_vae(config.vae, device)
    if device.startswith("cuda") and config.mixed_precision == "bf16":  # for the GPU's matrix units
        vae = vae.to(memory_format=torch.channels_last)
    factor = vae_factor(vae)
    if config.resolution % factor:
        raise ValueError(
            f"--resolution: expected a multiple of {factor}, by which {config.vae} reduces images, "
            f"found {config.resolution}"
        )
    digest = vae_digest(vae)
    listing = "".join(f"{source.labels[index]} {source.names[index]}\n" for index in items)
    settings = {
        "vae_digest": digest, "resolution": config.resolution, "crop": "adm-center", "dtype": config.dtype,
        "flip": config.flip, "keep_images": config.keep_images, "scale": config.scale,
        "mixed_precision": config.mixed_precision, "images": len(items),
        "images_sha256": hashlib.sha256(listing.encode()).hexdigest(),
    }  # fmt: skip
    side = config.resolution // factor
    shapes = {"moments": (2 * vae.config.latent_channels, side, side)}
    shapes |= {"flips": shapes["moments"]} if config.flip else {}
    shapes |= {"images": (config.resolution, config.resolution, 3)} if config.keep_images else {}
    writer = LatentStoreWriter(config.output_dir, settings, shapes, config.dtype)
    if writer.is_complete:
        if rank == 0:
            print(f"{config.output_dir} is complete: {read_meta(config.output_dir)['count']:,} images")
            if config.verify:
                verify(config, source, vae)
        return

    if world_size > 1:
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=config.timeout))
    size = shard_size(len(items))
    shards = [items[begin : begin + size] for begin in range(0, len(items), size)]
    mine = [(writer.shard(index), shards[index]) for index in range(rank, len(shards), world_size)]
    encode_shards(mine, source, vae, config, rank)
    if world_size > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if rank > 0:
        return

    sums = np.array(writer.summed_statistics(len(shards)))
    scale = measured_scale(sums) if config.scale == "auto" else scale_from_config(vae)
    meta = {
        "vae": config.vae, "vae_digest": digest, **scale.to_dict(),
        "scale_source": {"auto": "measured", "config": "config"}[config.scale],
        "resolution": config.resolution, "crop": "adm-center", "class_names": source.class_names,
        "settings": settings, "versions": provenance.versions(),
    }  # fmt: skip
    meta = writer.finish(len(shards), meta)
    deviation = scaled_deviation(sums, scale)
    print(
        f"{config.output_dir}: {meta['count']:,} images of {meta['num_classes']} classes, "
        f"{len(meta['skipped'])} skipped; latents {tuple(meta['latent_shape'])}, "
        f"scaled to a deviation of {deviation:.4f}"
    )
    if not 0.5 < deviation < 2:
        print("warning: expected a deviation near 1; dump them again with --scale auto", file=sys.stderr)
    if config.verify:
        verify(config, source, vae)


if __name__ == "__main__":
    cli.run(main)
