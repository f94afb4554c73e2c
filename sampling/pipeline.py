"""Images from a published model, in the calling convention of diffusers.

    from sampling.pipeline import VAEREPAPipeline

    pipe = VAEREPAPipeline.from_pretrained("name/model")  # or a directory that `python -m analysis.publish` made
    pipe(class_labels=[207, 360], guidance_scale=4.0, seed=0).images[0].save("golden.png")

The images are those of `sample_ddp.py` with the same seed, labels and settings. Nothing of training is imported.

No `diffusers.DiffusionPipeline` underneath: that loads each part from a subfolder by a class that diffusers itself has
(or runs code from the hub), and steps through a scheduler. Here the SiT lies at the top of the directory, where
`SiT.from_pretrained` finds it, and the solvers keep a float64 state and draw noise by blocks, which no scheduler does.

Shape suffixes: N images, B images of a batch, R image side, C latent channels, H = W latent side.
"""

from __future__ import annotations

import difflib
import json
import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from PIL import Image

from diffusion.interpolant import Interpolant
from models.sit import PUBLISHED, SiT, SiTConfig
from models.vae import LatentScale, check_vae, hub_is_reachable, load_vae
from runtime.files import Field, fields_of, read_record, sha256
from sampling.batch_size import round_up_to_block
from sampling.config import BLOCK, PRECISIONS, SAMPLERS
from sampling.generator import block_noise, decode_latents, put_on_device, sample_latents

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

FORMAT = "vae-repa-model"  # of a published directory; written by analysis/publish.py
VERSION = 1
FIELDS = dict.fromkeys(PUBLISHED, Field()) | {"card_sha256": Field(None), "null_class": Field(True)}
FIELDS |= {"prediction": Field("v"), "time_shift": Field(1.0)}
FIELDS |= fields_of(SiTConfig)
BATCH = 64  # the default of sample_ddp.py


@dataclass(frozen=True)
class PipelineOutput:
    images: list[Image.Image]  # RGB, in the order of the labels


class VAEREPAPipeline:
    """A SiT, its VAE and what sampling needs to know, on one device. Made by `from_pretrained`.

    Attributes:
        sit: with the EMA weights, frozen.
        vae: the decoder.
        config: what `config.json` says: `step`, `resolution`, `class_names`, ...
        device: where all of it is.
    """

    def __init__(
        self, sit: SiT, vae: AutoencoderKL, config: dict[str, Any], device: torch.device, mixed_precision: str
    ):
        self.sit, self.vae, self.config, self.device = sit, vae, config, device
        self.autocast = torch.bfloat16 if mixed_precision == "bf16" else None
        self.scale = LatentScale.from_dict(config["latent_scale"])
        self.interpolant = Interpolant(config["path_type"], config["prediction"])

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        vae: str | Path | None = None,
        device: str | torch.device | None = None,
        mixed_precision: str | None = None,
        vae_precision: str | None = None,
        compile: bool = False,
        revision: str | None = None,
    ) -> VAEREPAPipeline:
        """Load a published model.

        Args:
            path: its directory, or its name on the hub.
            vae: local directory or file of the VAE, or its name on the hub, if neither `vae/` in the model's directory
                nor what the model records is to be taken. It must be the VAE that the model was trained with.
            device: by default a GPU if there is one.
            mixed_precision: of the SiT, "no" (float32) or "bf16"; by default bf16 on a GPU, as sample_ddp.py does.
            vae_precision: of the decoder; the same.
            compile: torch.compile each block, as sample_ddp.py does on a GPU: its very bits there need it.
            revision: branch, tag or commit on the hub.

        Raises:
            ValueError: no published model there, a damaged one, another VAE, or a hub that does not answer.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        default = "bf16" if device.type == "cuda" else "no"
        mixed_precision, vae_precision = mixed_precision or default, vae_precision or default
        for name, value in (("mixed_precision", mixed_precision), ("vae_precision", vae_precision)):
            if value not in PRECISIONS:
                raise ValueError(f"{name}: expected one of {', '.join(PRECISIONS)}, found {value!r}")
        directory = _fetch(path, revision)
        config = read_config(directory)
        sit = SiT.from_pretrained(directory).requires_grad_(False)
        decoder = _load_decoder(directory, config, sit, vae)
        put_on_device(sit, decoder, device, compile, vae_precision)
        return cls(sit, decoder, config, device, mixed_precision)

    def __call__(
        self,
        class_labels: int | str | Iterable[int | str],
        guidance_scale: float = 4.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        num_inference_steps: int = 250,
        sampler: str = "sde",
        seed: int = 0,
        last_step_size: float = 0.04,
        batch_size: int | None = None,
        height: int | None = None,
        width: int | None = None,
        last_t: float | None = None,
    ) -> PipelineOutput:
        """Draw an image for each label.

        Image i depends on the seed, i, its label and the settings, and equals image i of `sample_ddp.py` with as many
        images, bit for bit on the same machine. The first images of a larger set need its `batch_size` (64 unless set
        there) too: another size keeps every draw, and changes rounding alone. With "ode-dopri5" the 16 images of a
        block share their steps, and depend on each other's labels to the tolerance.

        Args:
            class_labels: numbers or names of classes (see `config["class_names"]`); a name may be one of several that
                stand in a class's name with commas between.
            guidance_scale: v_null + scale (v_class - v_null): 1 is no guidance.
            guidance_interval: times at which to guide, both included: t = 1 is noise, t = 0 is data.
            num_inference_steps: steps, each one evaluation of the network (ode-heun: two); ode-dopri5 takes its own.
            sampler: one of `sampling.config.SAMPLERS`.
            seed: of the noise.
            last_step_size: sde: size of the last step, which has no noise; it ends at t = 0.
            batch_size: images at once, a multiple of 16; by default 64, or fewer if fewer are asked for.
            height, width: if given, must be what the model makes: it knows one size.
            last_t: the old name of `last_step_size`.

        Raises:
            ValueError: unknown or ambiguous classes, settings out of range, or samples that are not finite.
        """
        numbers = class_numbers(class_labels, self.config["class_names"])
        last_step_size = last_step_size if last_t is None else last_t
        low, high = guidance_interval
        whole = batch_size is None or (batch_size >= BLOCK and batch_size % BLOCK == 0)
        resolution = self.config["resolution"]
        guides = guidance_scale == 1 or self.config["null_class"]
        one_size = f"{resolution}, the one size that this model makes (leave it out, and resize the images)"
        for name, found, holds, expected in (
            ("guidance_scale", guidance_scale, math.isfinite(guidance_scale), "a finite scale (1 is none)"),
            ("guidance_scale", guidance_scale, guides, "1 (trained with --label-dropout 0, it has no null class)"),
            ("guidance_interval", (low, high), 0 <= low <= high <= 1, "times with 0 <= low <= high <= 1"),
            ("num_inference_steps", num_inference_steps, num_inference_steps >= 1, "at least 1"),
            ("sampler", sampler, sampler in SAMPLERS, f"one of {', '.join(SAMPLERS)}"),
            ("seed", seed, 0 <= seed < 2**64, "an integer in [0, 2**64)"),
            ("last_step_size", last_step_size, 0 < last_step_size < 1, "a size in (0, 1)"),
            ("batch_size", batch_size, whole, f"a multiple of {BLOCK} (one block of images)"),
            ("height", height, height in (None, resolution), one_size),
            ("width", width, width in (None, resolution), one_size),
        ):
            if not holds:
                raise ValueError(f"{name}: expected {expected}, found {found}")

        images = []
        options = sampler, num_inference_steps, self.interpolant, guidance_scale, (low, high), last_step_size
        size = batch_size or min(BATCH, round_up_to_block(len(numbers)))
        with _plain_float32():
            for first in range(0, len(numbers), size):
                labels = numbers[first : first + size]
                # Every batch is whole, the last one too, as in sample_ddp.py; padding labels change no other image.
                y = torch.tensor(labels + [0] * (size - len(labels)), device=self.device)
                noise = block_noise(seed, first, size, self.latent_shape, self.device)
                z = sample_latents(self.sit, y, noise, *options, self.autocast, time_shift=self.config["time_shift"])
                pixels, finite = decode_latents(self.vae, z[: len(labels)], self.scale)
                if not finite.all():
                    fix = "use mixed_precision='no', or a smaller guidance_scale"
                    raise ValueError(f"expected finite samples, found some that are not; {fix}")
                images += [Image.fromarray(image) for image in pixels.cpu().numpy()]
        return PipelineOutput(images)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        config = self.sit.config
        return config.in_channels, config.latent_size, config.latent_size


def class_numbers(labels: int | str | Iterable[int | str], names: Sequence[str]) -> list[int]:
    """Classes by number. A name stands for the class whose name it is, or else for the one in whose name, which may be
    several with commas between ("goldfish, Carassius auratus"), it is one, whatever the case of letters.

    Raises:
        ValueError: none or several classes of that name, a number out of range, or no label at all.
    """
    labels = [labels] if isinstance(labels, str) or not isinstance(labels, Iterable) else list(labels)
    if not labels:
        raise ValueError("class_labels: expected at least one class, found none")
    return [_class_number(label, names) for label in labels]


def _class_number(label: Any, names: Sequence[str]) -> int:
    if not isinstance(label, str):
        try:
            number = operator.index(label)
        except TypeError:
            number = -1
        if not 0 <= number < len(names):
            raise ValueError(f"class_labels: expected numbers from 0 to {len(names) - 1}, or names, found {label!r}")
        return number

    def parts(name: str) -> list[str]:
        return [part.strip().casefold() for part in name.split(",")]

    found = [number for number, name in enumerate(names) if name == label]
    found = found or [number for number, name in enumerate(names) if name.casefold() == label.casefold()]
    found = found or [number for number, name in enumerate(names) if label.strip().casefold() in parts(name)]
    if len(found) == 1:
        return found[0]
    if found:
        expected, hint = "the name of one class", f", the name of {', '.join(map(str, found[:-1]))} and {found[-1]}"
        hint += "; give the number"
    else:
        known = {part: name for name in names for part in (*parts(name), name)}
        close = difflib.get_close_matches(label.casefold(), list(known), n=1)
        expected, hint = "the name of a class", f"; the first of the {len(names)} is {names[0]!r}"
        hint = f"; did you mean {known[close[0]]!r}?" if close else hint
    raise ValueError(f"class_labels: expected {expected}, found {label!r}{hint}")


def read_config(directory: Path) -> dict[str, Any]:
    """`config.json` of a published model, whose weights have the digest that it records.

    Raises:
        ValueError: the directory holds none, a damaged one, or one of newer code.
    """
    file, weights = directory / "config.json", directory / "model.safetensors"
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError):  # of JSON and of UTF-8, too
        config = None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        ours = (directory / "state.json").is_file() or (directory / "checkpoints").is_dir()
        raise ValueError(
            f"expected a published model (config.json with the format {FORMAT}, model.safetensors), found none in "
            f"{directory}"
            + (f", which training wrote; publish it: python -m analysis.publish {directory}" if ours else "")
        )
    if config.get("format_version") != VERSION:
        raise ValueError(
            f"expected a published model of version {VERSION}, found version {config.get('format_version')} in "
            f"{directory}; use the code of that version"
        )
    config = read_record(config, FIELDS, file)
    if not weights.is_file() or sha256(weights) != config["weights_sha256"]:
        raise ValueError(
            f"expected {weights} as it was published (SHA-256 {config['weights_sha256'][:12]}...), found "
            f"{'another' if weights.is_file() else 'none'}; fetch or publish it again"
        )
    return config


def _fetch(path: str | Path, revision: str | None) -> Path:
    """The directory of a model: as named, or as the hub's client keeps it."""
    directory, name = Path(path).expanduser(), str(path)
    if directory.is_dir():
        return directory
    if directory.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ValueError(
            f"expected the directory of a published model, or NAME/REPO on the hub, found {name!r}, "
            f"{'a file' if directory.exists() else 'where there is nothing'}"
        )
    offline = not hub_is_reachable()
    files = ["config.json", "model.safetensors", "vae/*"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=files, local_files_only=offline))
    except (OSError, ValueError) as error:  # the client's own errors are of these kinds
        reason = "the hub cannot be reached" if offline else " ".join(str(error).split())[:200]
        raise ValueError(
            f"expected the directory of a published model, or its name on the hub, found {name!r} ({reason}); "
            f"without a network give a directory that was fetched before"
        ) from error


def _load_decoder(directory: Path, config: dict[str, Any], sit: SiT, vae: str | Path | None) -> AutoencoderKL:
    """The model's VAE on the CPU, in float32."""
    name = str(vae or (directory / "vae" if (directory / "vae").is_dir() else config["vae"]))
    hint = "give from_pretrained(..., vae=DIRECTORY) a local copy of the VAE that the model was trained with"
    shape = sit.config.in_channels, sit.config.latent_size, sit.config.latent_size
    try:
        decoder = load_vae(name)
        check_vae(decoder, name, config["vae_digest"], "the model", config["resolution"], shape)
    except ValueError as error:
        raise ValueError(f"cannot decode with the VAE {name!r} ({error}); {hint}") from error
    return decoder


@contextmanager
def _plain_float32() -> Iterator[None]:
    """float32 products as sample_ddp.py has them, whatever the caller's process has set; that is put back."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
