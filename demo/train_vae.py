"""Train the demo's autoencoder: 32 x 32 x 3 images to 4 x 8 x 8 latents, as the diffusers folder `demo/vae/`.

    python -m demo.make_digits --output-dir exps/demo/digits
    python -m demo.train_vae --source exps/demo/digits --output-dir demo/vae

The committed weights were made by these two commands; `demo/vae/training.json` says when, with what, and how well they
reconstruct the digits that are held out.

Shape suffixes: N images, B batch, R = 32 image side, C = 4 latent channels, H = W = 8 latent side.
"""

from __future__ import annotations

import dataclasses

from runtime import cli
from runtime.cli import flag


@dataclasses.dataclass(frozen=True)
class VaeConfig:
    source: str = flag(cli.REQUIRED, "class folders of digits, as demo.make_digits writes them", group="data")
    output_dir: str = flag(cli.REQUIRED, "folder for config.json, the weights and training.json", group="data")
    epochs: int = flag(22, "passes over the digits that are not held out", group="training")
    batch_size: int = flag(64, "images per step", group="training")
    lr: float = flag(3e-3, "highest learning rate, reached after 50 steps; a cosine takes it to 0", group="training")
    kl_weight: float = flag(1e-5, "weight of the KL term (mean per latent value) beside the error", group="training")
    channels: tuple[int, ...] = flag((32, 32, 32), "widths at sides 32, 16 and 8", group="training")
    seed: int = flag(0, "seed of the initial weights and of every draw", group="training")


if __name__ == "__main__":
    cli.parse_early(VaeConfig, __doc__)  # answers --help and refuses wrong flags before torch is imported

import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from demo.digits import held_out
from runtime import provenance
from runtime.files import to_json, write_atomically
from runtime.images import open_image
from runtime.progress import Progress


def read_digits(source: Path) -> tuple[np.ndarray, np.ndarray]:  # () -> (N, R, R, 3), (N,)
    """The images (uint8) in the order of their file names, which are their positions in scikit-learn's list (int64).

    Raises:
        ValueError: no images there.
    """
    paths = sorted(source.glob("[0-9]/*.png"), key=lambda path: path.stem)
    if not paths:
        fix = f"python -m demo.make_digits --output-dir {source}"
        raise ValueError(f"expected class folders of digits in {source}, found none; fix: {fix}")
    return np.stack([np.asarray(open_image(path)) for path in paths]), np.array([int(path.stem) for path in paths])


def build_vae(config: VaeConfig) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=config.channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
    )


def train(vae: AutoencoderKL, pixels: torch.Tensor, config: VaeConfig) -> None:  # (N, 3, R, R) in [-1, 1]
    """Fit the VAE in place: mean squared error and a KL term, both means, so that neither grows with the image."""
    generator = torch.Generator().manual_seed(config.seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=1e-3)
    steps = config.epochs * (len(pixels) // config.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    progress = Progress(total=steps, desc="VAE", unit="step")
    for _ in range(config.epochs):
        order = torch.randperm(len(pixels), generator=generator)
        whole = len(order) // config.batch_size * config.batch_size  # the rest is left out; the next order is another
        for batch in order[:whole].split(config.batch_size):
            x = pixels[batch]  # (B, 3, R, R)
            posterior = vae.encode(x).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator)
            f = posterior.mean + posterior.std * noise  # (B, C, H, W)
            error = (vae.decode(f).sample - x).square().mean()
            kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
            optimizer.zero_grad()
            (error + config.kl_weight * kl).backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            progress.update()
            progress.set_postfix_str(f"error {error.item():.5f}, KL {kl.item():.3f}", refresh=False)
    progress.close()


def measure(vae: AutoencoderKL, pixels: torch.Tensor, seed: int) -> dict[str, object]:  # (N, 3, R, R) in [-1, 1]
    """PSNR in dB of reconstructions from the posterior's mean and from a draw, and the latents' statistics."""
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(seed))
        drawn = posterior.mean + posterior.std * noise  # (N, C, H, W)
        images = [vae.decode(f).sample.clamp(-1, 1) for f in (posterior.mean, drawn)]  # (N, 3, R, R) each
    psnr = [round(-10 * math.log10((image - pixels).div(2).square().mean().item()), 2) for image in images]
    return {
        "psnr_of_means_db": psnr[0],
        "psnr_of_draws_db": psnr[1],
        "latent_std": drawn.std().item(),
        "latent_mean_by_channel": [round(v, 3) for v in drawn.mean(dim=(0, 2, 3)).tolist()],
        "latent_std_by_channel": [round(v, 3) for v in drawn.std(dim=(0, 2, 3)).tolist()],
        "posterior_std_by_channel": [round(v, 3) for v in posterior.std.mean(dim=(0, 2, 3)).tolist()],
    }


def main(argv: list[str] | None = None) -> None:
    config = cli.parse(VaeConfig, argv, __doc__)
    images, index = read_digits(Path(config.source))

    start = time.perf_counter()
    torch.manual_seed(config.seed)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1  # (N, 3, R, R)
    kept_back = torch.from_numpy(held_out(index))
    vae = build_vae(config)
    train(vae, pixels[~kept_back], config)

    vae.eval()
    fitted = measure(vae, pixels[~kept_back], config.seed)
    # A scalar, as diffusers' config holds one; the same decimals here and there.
    vae.register_to_config(scaling_factor=round(1 / fitted["latent_std"], 5))
    record = {
        "settings": {k: v for k, v in dataclasses.asdict(config).items() if k not in ("source", "output_dir")},
        "parameters": sum(p.numel() for p in vae.parameters()),
        "fitted_digits": fitted,
        "held_out_digits": measure(vae, pixels[kept_back], config.seed),
        "seconds": round(time.perf_counter() - start),
        "threads": torch.get_num_threads(),
        "versions": provenance.versions(),
        "date": provenance.now(),
    }
    vae.save_pretrained(config.output_dir)
    write_atomically(Path(config.output_dir) / "training.json", to_json(record))
    print(to_json(record))


if __name__ == "__main__":
    cli.run(main)
