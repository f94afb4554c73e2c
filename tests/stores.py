"""Small stores and VAEs for the tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from models.vae import load_vae, vae_digest
from preprocessing.store_writer import LatentStoreWriter
from training.checkpoint import snapshot, write_checkpoint


def make_vae(folder: Path, seed: int = 0, channels: int = 4) -> Path:
    """A tiny AutoencoderKL with random weights, 4 pixels to a latent, saved as diffusers does."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=channels,
        sample_size=32,
        scaling_factor=0.9,
    )
    vae.save_pretrained(folder)
    return folder


ENCODER = "vit_tiny_patch16_224"


def make_encoder(file: Path, seed: int = 0) -> Path:
    """Random weights of `ENCODER`, as timm would publish them: 5.5M, with positions for 14 x 14 patches."""
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    network = timm.create_model(ENCODER, num_classes=0)
    torch.nn.init.normal_(network.pos_embed, std=0.5)
    save_file(network.state_dict(), file)
    return file


def make_store(
    folder: Path,
    count: int = 24,
    classes: int = 3,
    size: int = 8,
    channels: int = 4,
    seed: int = 0,
    flips: bool = False,
    images: bool = False,
    vae: Path | None = None,
    dtype: str = "float32",
    shard_size: int = 10,
    scale: float = 0.9,
) -> Path:
    """A store of random moments in several shards; made for images of 4 pixels to a latent."""
    rng = np.random.default_rng(seed)
    shape = (2 * channels, size, size)
    kinds = ("moments", "flips") if flips else ("moments",)
    settings = {"seed": seed, "count": count}
    pictures = {"images": (4 * size, 4 * size, 3)} if images else {}
    writer = LatentStoreWriter(folder, settings, dict.fromkeys(kinds, shape) | pictures, dtype)
    numbers = {kind: rng.standard_normal((count, *shape)).astype(dtype) for kind in kinds}
    for values in numbers.values():
        values[:, channels:] = 0.1 * np.abs(values[:, channels:])
    labels = rng.integers(0, classes, count)
    numbers |= {kind: rng.integers(0, 256, (count, *row), dtype=np.uint8) for kind, row in pictures.items()}
    for index, begin in enumerate(range(0, count, shard_size)):
        rows = slice(begin, min(begin + shard_size, count))
        shard = writer.shard(index)
        paths = [f"{i}.png" for i in range(count)[rows]]
        shard.append(len(paths), {kind: values[rows] for kind, values in numbers.items()}, labels[rows].tolist(), paths)
        shard.close()
    meta = {
        "vae": str(vae) if vae else "none",
        "vae_digest": vae_digest(load_vae(str(vae))) if vae else "none",
        "scale": [scale],
        "shift": [0.1],
        "scale_source": "config",
        "resolution": 4 * size,
        "crop": "adm-center",
        "class_names": [f"class {k}" for k in range(classes)],
        "settings": settings,
    }
    writer.finish(index + 1, meta)
    return folder


def save_checkpoint(run_dir: Path, step: int, model, ema, optimizer, info: dict, scaler=None) -> Path:
    """A checkpoint of these objects, written at once."""
    return write_checkpoint(
        run_dir, step, snapshot(model, {"ema": ema}, optimizer and optimizer.state_dict(), scaler), info
    )
