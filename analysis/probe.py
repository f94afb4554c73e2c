"""Look into a SiT: Figure 2 of the paper for your own run, and which block's tokens agree best with the VAE's features.

    python -m analysis.probe exps/b2-plain --data-dir data/imagenet256
    python -m analysis.probe SiT-XL-2-256x256.pt --data-dir data/imagenet256 --images dog.jpg cat.png

`features-pca.png`: for each image its VAE features, and the tokens of each block at each noise level, their first three
principal components as red, green and blue. `features-heat.png`: for each block and noise level, how well a linear map
of the tokens predicts the VAE features, and how alike both are by CKA and CKNNA. `features.json`: all the numbers.

The VAE features f_VAE are the scaled posterior mean, in the patches that the SiT reads. The SiT sees what it sees in
training: a sample of the posterior, noised, and the image's class. t = 0 is data, t = 1 is noise.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it can be started as a file

from runtime import cli
from runtime.cli import REQUIRED, check, flag

_files = partial(flag, group="files")
_looked_at = partial(flag, group="what to look at")


@dataclass(frozen=True)
class ProbeConfig:
    """What to look at."""

    checkpoint: str = _files(
        REQUIRED,
        "checkpoint <run>/checkpoints/<step>, or a run (its newest one), or a file of SiT's, REPA's or SRA's",
        positional=True,
    )
    checkpoint_format: str | None = _files(
        None, "whose file the checkpoint is, where it does not tell: sit, repa or sra", metavar="PROJECT"
    )
    data_dir: str | None = _files(None, "latent store, whose images are measured, and shown unless --images is given")
    images: tuple[str, ...] | None = _files(
        None, "image files or directories of them, to be shown; without --data-dir also measured", metavar="PATH"
    )
    vae: str | None = _files(None, "hub name, local directory or file of the VAE, if not where the checkpoint says")
    output_dir: str | None = _files(None, "directory of the result; by default <run>/features")

    num_images: int = _looked_at(512, "images to measure, evenly picked; all if there are fewer")
    num_shown: int | None = _looked_at(None, "images shown, evenly picked; 4, or up to 8 of --images, unless set")
    noise_levels: tuple[float, ...] = _looked_at((0.1, 0.3, 0.5, 0.7, 0.9), "times, 0 is data, 1 is noise", metavar="T")
    depths: tuple[int, ...] | None = _looked_at(None, "blocks, counted from 1; all unless set", metavar="BLOCK")
    seed: int = _looked_at(0, "seed of the noise, and of what is held out")
    device: str | None = flag(None, "a GPU if there is one, unless set", choices=("cpu", "cuda"), group="speed")

    def __post_init__(self):
        if self.data_dir is None and self.images is None:
            raise ValueError("expected images to look at, found neither --data-dir nor --images; give one, or both")
        for name in ("num_images", "num_shown"):
            check(self, name, getattr(self, name) is None or getattr(self, name) >= 1, "at least 1")
        levels = self.noise_levels
        distinct = 0 < len(levels) == len(set(levels))
        check(self, "noise_levels", distinct and all(0 <= t <= 1 for t in levels), "different times from 0 to 1")
        check(self, "seed", self.seed >= 0, "at least 0")


if __name__ == "__main__":
    cli.parse_early(ProbeConfig, __doc__)  # answers --help and refuses wrong flags before torch is imported

import json
import os
from typing import TYPE_CHECKING, Any

import torch

from analysis.probe_metrics import CKNNA_TOKENS, HELD_OUT, NEIGHBOURS, conclude, images_needed, measure, summarize
from analysis.probe_pictures import heat_figure, make_panels, pca_figure
from analysis.probe_tokens import ProbedSiT, encode_images, find_images, pick_evenly, read_pictures
from analysis.similarity import RIDGE
from dataset import LatentDataset, read_meta
from models.load import load_sit
from models.sit import SiT
from models.vae import UNKNOWN_VAE, check_vae, load_vae
from runtime import provenance
from runtime.distributed import choose_device
from runtime.files import write_atomically

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


def probe(config: ProbeConfig) -> dict[str, Any]:
    """Measure, draw and write; gives what `features.json` holds.

    Raises:
        ValueError: what is asked for is not there, or does not fit together.
    """
    # The network, and all that it fits.
    probed, info, store = load_network(config)
    sit, depths, levels = probed.sit, probed.depths, probed.levels
    output = make_output_dir(config, info)
    print(f"{info['source']} ({info['read_as']})", flush=True)
    if not probed.with_classes:
        print(
            f"{config.data_dir} has {store.num_classes} classes, the network {sit.config.num_classes}: its images are "
            f"looked at without a class",
            flush=True,
        )

    # The images.
    open_decoder = cache(lambda: open_vae(config, sit, info, probed.device))
    num_shown = config.num_shown or (8 if config.images else 4)
    files, total = None, len(store) if store else 0
    if config.images:
        found = find_images(config.images)
        kept = pick_evenly(len(found), num_shown if store else max(config.num_shown or 8, config.num_images))
        chosen, total = [found[index] for index in kept], len(found)
        files = encode_images(chosen, info["resolution"], open_decoder(), sit.config.num_classes)
    measured = pick_evenly(len(store or files), config.num_images)
    needed = images_needed(sit)
    if store and len(measured) < needed:  # said before the work; image files can be shown, if not measured
        raise ValueError(
            f"expected at least {needed} images to fit a probe to tokens of {sit.config.hidden_size} numbers, found "
            f"{len(measured)}; raise --num-images, or give a larger --data-dir"
        )

    # The picture of the tokens.
    shown = pick_evenly(len(files or store), num_shown)
    pictures = read_pictures(files or store, shown, open_decoder, probed.scale, probed.device)
    panels = make_panels(probed, files or store, shown, pictures)
    heading = f"{info['source']}: principal components"
    pca_figure(panels, depths, levels, heading).savefig(output / "features-pca.png")
    print(f"{output / 'features-pca.png'}: {len(panels)} of {total:,} images", flush=True)

    # The metrics.
    summary = None
    (output / "features-heat.png").unlink(missing_ok=True)  # an earlier one would seem to belong to this picture
    if len(measured) < needed:
        lines = [f"Nothing was measured: that takes {needed} images, --images has {len(measured)}; give a --data-dir."]
    else:
        results = measure(probed, store or files, measured)
        heading = f"{info['source']}: {len(measured)} images"
        heat_figure(results, depths, levels, heading).savefig(output / "features-heat.png")
        print(f"{output / 'features-heat.png'}: {len(measured)} images", flush=True)
        summary = summarize(results, depths)
        lines = conclude(summary, depths, levels, info.get("config"))
    findings = {"metrics": summary, "pictured": [panel.explained for panel in panels], "conclusion": lines}
    record = describe(config, info, probed, bool(store), len(measured)) | findings
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(output / "features.json", text)
    print("\n".join(lines), flush=True)
    return record


def load_network(config: ProbeConfig) -> tuple[ProbedSiT, dict[str, Any], LatentDataset | None]:
    """The network, what is known of it, and the store, from which it takes what its file does not say.

    Raises:
        ValueError: there is no such checkpoint or store, they do not fit, or nothing tells the scale of the latents.
    """
    device = choose_device(config.device)
    sit, info = load_sit(config.checkpoint, format=config.checkpoint_format)
    total, depths = sit.config.depth, tuple(sorted(config.depths or range(1, sit.config.depth + 1)))
    distinct = depths[0] >= 1 and depths[-1] <= total and len(set(depths)) == len(depths)
    check(config, "depths", distinct, f"different blocks from 1 to {total}")
    store = open_store(config, sit, info) if config.data_dir else None
    if store and info["vae_digest"] == UNKNOWN_VAE:
        info = info | {name: store.meta[name] for name in ("vae", "vae_digest", "resolution")}
    scale = info["scale"] or (store.scale if store else None)
    if scale is None:
        raise ValueError(f"expected to know the scale of the latents, {info['source']} has none; give a --data-dir")
    with_classes = store is None or store.num_classes == sit.config.num_classes
    levels = tuple(sorted(config.noise_levels))
    probed = ProbedSiT(sit.to(device), scale, info["path_type"], depths, levels, config.seed, device, with_classes)
    return probed, info, store


def open_store(config: ProbeConfig, sit: SiT, info: dict[str, Any]) -> LatentDataset:
    """The store, if its latents are those that the network was trained on; with images if it has them.

    Raises:
        ValueError: it cannot be read, or has latents of another shape, scale or VAE.
    """
    store = LatentDataset(config.data_dir, images=bool(read_meta(config.data_dir).get("images")))
    expected = (sit.config.in_channels, sit.config.latent_size, sit.config.latent_size)
    wrong = []
    if store.latent_shape != expected:
        wrong.append(f"shape {store.latent_shape} (the checkpoint's: {expected})")
    if info["scale"] not in (None, store.scale):
        wrong.append(f"scale {store.scale.to_dict()} (the checkpoint's: {info['scale'].to_dict()})")
    if len({store.meta["vae_digest"], info["vae_digest"]} - {UNKNOWN_VAE}) > 1:
        wrong.append(f"another VAE, {store.meta['vae']} (the checkpoint's: {info['vae']})")
    if wrong:
        raise ValueError(
            f"--data-dir: expected latents as the checkpoint's, found {', '.join(wrong)} in {config.data_dir}; give a "
            f"store that fits it"
        )
    return store


def open_vae(config: ProbeConfig, sit: SiT, info: dict[str, Any], device: torch.device) -> AutoencoderKL:
    """The VAE of the checkpoint.

    Raises:
        ValueError: it cannot be loaded, or is another one.
    """
    name, side = config.vae or info["vae"], sit.config.latent_size
    vae = load_vae(name, device)
    check_vae(vae, name, info["vae_digest"], "the checkpoint", info["resolution"], (sit.config.in_channels, side, side))
    return vae


def make_output_dir(config: ProbeConfig, info: dict[str, Any]) -> Path:
    """The directory of the result: `<run>/features` unless another is given; beside a file of another project's.

    Raises:
        ValueError: it cannot be written to, which is said before the work.
    """
    source = Path(info["source"]).absolute()
    run_dir = source.parent if source.is_file() else source.parent.parent
    directory = Path(config.output_dir) if config.output_dir else run_dir / "features"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not os.access(directory, os.W_OK):
            raise PermissionError("not writable")
    except OSError as error:
        raise ValueError(
            f"--output-dir: expected a directory to write to, found {directory} ({error.strerror or error}); give "
            f"another"
        ) from error
    return directory


def describe(
    config: ProbeConfig, info: dict[str, Any], probed: ProbedSiT, has_store: bool, num_measured: int
) -> dict[str, Any]:
    """What `features.json` says of how its numbers were made."""
    return {
        "settings": asdict(config),
        "checkpoint": {name: info[name] for name in ("source", "read_as", "step", "digest", "path_type")},
        "depths": list(probed.depths),
        "noise_levels": list(probed.levels),
        "images": num_measured,
        "images_held_out": num_measured // HELD_OUT,
        "classes": "of the store" if has_store and probed.with_classes else "none",
        "latent_scale": probed.scale.to_dict(),
        "constants": {"ridge": RIDGE, "cknna_neighbours": NEIGHBOURS, "cknna_tokens": CKNNA_TOKENS},
        "device_type": probed.device.type,
        **provenance.stamp(),
    }


def main(argv: list[str] | None = None) -> None:
    probe(cli.parse(ProbeConfig, argv, __doc__))


if __name__ == "__main__":
    cli.run(main)
