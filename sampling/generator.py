"""The one sample generator: from noise and classes to latents, and from latents to images.

`sample_ddp.py`, the pipeline, `analysis.compare` and the grids of training all draw by `sample_latents` and decode by
`decode_latents`. `SampleGenerator` adds what a set of samples needs: the labels and the noise of each batch, which
depend on the seed and on the image's number alone, and a side stream for decoding.

Shape suffixes: N images, B images of a batch, R image side, C latent channels, H = W latent side, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from diffusion.guidance import HeadGuidance, guided_velocity
from diffusion.interpolant import Interpolant
from diffusion.samplers import sample_dopri5, sample_ode, sample_sde
from models.aligned import HeadedSiT
from models.sit import SiT
from models.vae import UINT8_RULES, LatentScale, decode, to_uint8
from runtime.distributed import compile_each
from runtime.seeding import block_generator, numpy_generator
from sampling.config import BLOCK, SAMPLER_OPTIONS, SAMPLERS, SampleConfig

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


@torch.no_grad()
def sample_latents(
    sit: SiT,
    y: Tensor,
    noise: Callable[..., Tensor],
    sampler: str,
    num_steps: int,
    interpolant: Interpolant,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    last_step_size: float = 0.04,
    autocast: torch.dtype | None = None,
    guidance_channels: str = "all",
    guide: SiT | None = None,
    time_shift: float = 1.0,
    head: HeadGuidance | None = None,
    **options: Any,
) -> Tensor:  # (N,) -> (N, C, H, W) float64
    """Draw latents at t = 0, scaled as the model was trained with.

    Args:
        sit: on the device of `y` and of the noise.
        y: classes (N,) int64.
        noise: gives standard normal numbers (N, C, H, W): called without an argument for the state at t = 1, then, for
            the SDE, with each step, 0 to num_steps - 2.
        sampler: one of `SAMPLERS`.
        num_steps: as in `sample_ode` and `sample_sde`.
        interpolant: the path the model was trained on, and what it predicts.
        guidance_scale, guidance_interval, guidance_channels, guide, head, autocast: as in `guided_velocity`.
        last_step_size: as in `sample_sde`; of no effect on the other samplers.
        time_shift: of the times of the solver, as in `shift_time`; of no effect on ode-dopri5.
        options: further arguments of the solver; `SAMPLER_OPTIONS` has their names.

    Raises:
        ValueError: unknown sampler, or a setting out of range.
    """
    guidance = guidance_scale, guidance_interval, autocast, guidance_channels, guide, interpolant, head
    ends_at_0 = interpolant.prediction == "v"
    if sampler == "ode-dopri5":  # block by block, so that an image's steps do not depend on the size of the batch
        blocks = zip(noise().split(BLOCK), y.split(BLOCK), strict=True)
        velocities = ((x, guided_velocity(sit, y, sit.config.num_classes, *guidance)) for x, y in blocks)
        return torch.cat([sample_dopri5(velocity, x, **options, ends_at_0=ends_at_0) for x, velocity in velocities])
    velocity = guided_velocity(sit, y, sit.config.num_classes, *guidance)
    if sampler == "sde":
        options["time_shift"] = time_shift
        return sample_sde(velocity, noise(), num_steps, noise, interpolant, last_step_size, **options)
    if sampler in ("ode-euler", "ode-heun", "ode-heun-repa"):
        form = {"heun": "heun" in sampler, "repa": "repa" in sampler}
        return sample_ode(velocity, noise(), num_steps, **form, time_shift=time_shift, ends_at_0=ends_at_0)
    raise ValueError(f"expected a sampler among {', '.join(SAMPLERS)} (--sampler), found {sampler!r}")


def decode_latents(
    vae: AutoencoderKL, z: Tensor, scale: LatentScale, rule: str = UINT8_RULES["floor"], block: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """Images (N, R, R, 3) uint8 of latents (N, C, H, W); and which (N,) bool are finite as latents and in colour.

    Always in blocks of as many images, the last one padded: the decoder needs memory, and its rounding depends on the
    size of the batch. `rule` is that of `to_uint8`.
    """
    count = len(z)
    z = torch.cat([z, z[-1:].expand(-count % block, *z.shape[1:])]).float()
    images, finite = [], []
    for part in z.split(block):
        x = decode(vae, part, scale)  # (block, 3, R, R)
        images.append(to_uint8(x, rule))
        finite.append(part.isfinite().flatten(1).all(dim=1) & x.isfinite().flatten(1).all(dim=1))
    return torch.cat(images)[:count], torch.cat(finite)[:count]


def put_on_device(
    sit: SiT,
    vae: AutoencoderKL,
    device: torch.device,
    compile: bool = False,
    vae_precision: str = "no",
    mixed_precision: str = "no",
    guide: SiT | None = None,
) -> None:
    """Move SiT, VAE and guide to a device; on demand compile the SiTs' layers, decode in "bf16", not float32, and keep
    the SiTs' weights as "bf16" autocast takes them: outside of it they are then of no use."""
    if vae_precision == "bf16":  # its convolutions run on the GPU's matrix units, channels last
        vae.bfloat16().to(memory_format=torch.channels_last)
    for model in (sit, guide) if guide else (sit,):
        if compile:  # two static shapes: a batch, and with guidance a doubled one
            compile_each([*model.blocks, model.final_layer])
        if mixed_precision == "bf16":
            cast_weights(model)
        model.to(device)
    vae.to(device)


def cast_weights(sit: SiT) -> None:
    """Round once what bf16 autocast would round in each evaluation: the weights of products, outside the embeddings of
    time and class, which are computed in float32."""
    for part in (sit.x_embedder, sit.blocks, sit.final_layer):
        for module in part.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.to(torch.bfloat16)


def block_noise(
    seed: int, first: int, count: int, shape: Sequence[int], device: str | torch.device
) -> Callable[..., Tensor]:
    """A function whose calls give standard normal numbers (count, *shape): each block has a generator of its own.

    So the noise of image i depends on the seed and on i alone, however the images are divided.

    Args:
        seed: of the set of samples.
        first: number of the first image, a multiple of `BLOCK`.
        count: images, a multiple of `BLOCK`.
        shape: of one latent, (C, H, W).
        device: of the generators; CPU and GPU give different numbers.
    """
    assert first % BLOCK == 0 and count % BLOCK == 0, "whole blocks"  # noqa: PT018
    blocks = range(first // BLOCK, (first + count) // BLOCK)
    generators = [block_generator(seed, block, "sample noise", device) for block in blocks]

    def noise(step: int = -1) -> Tensor:  # -> (count, *shape)
        return torch.cat([torch.randn(BLOCK, *shape, generator=g, device=device) for g in generators])

    return noise


def draw_labels(rule: str, classes: np.ndarray, seed: int, first: int, count: int) -> np.ndarray:  # (K,) -> (count,)
    """Labels (int64) of `count` images from number `first` on; each depends on rule, classes, seed and number alone.

    `balanced`: each round of K images is a permutation of the K classes of its own, so that the order has no class
    structure, as metrics computed on parts of the file need, and any multiple of K images has each class equally often.
    """
    K = len(classes)
    period = K if rule == "balanced" else BLOCK
    pieces = []
    for index in range(first // period, -(-(first + count) // period)):
        generator = numpy_generator(seed, index, f"sample labels {rule}")
        pieces.append(generator.permutation(K) if rule == "balanced" else generator.integers(K, size=period))
    return classes[np.concatenate(pieces)[first % period :][:count]].astype(np.int64)


def choose_classes(config: SampleConfig, num_classes: int, present: list[int] | None) -> np.ndarray:  # -> (K,) int64
    """The classes to draw from: unless the user names them, those that had images in training (None: all).

    Raises:
        ValueError: one that the model does not know, or one named twice.
    """
    if config.classes is None:
        return np.arange(num_classes) if present is None else np.array(present)
    wrong = [label for label in config.classes if not 0 <= label < num_classes]
    if wrong or len(set(config.classes)) != len(config.classes):
        raise ValueError(
            f"--classes: expected different numbers from 0 to {num_classes - 1}, "
            f"found {' '.join(map(str, config.classes))}"
        )
    return np.array(config.classes)


@dataclass
class SampleGenerator:
    """Draws the batches of a set of samples on one device. On a GPU they are decoded in a side stream.

    Args:
        settings: of the set, as `sampling.record.describe` gives them.
        info: what `load_sit` tells of `sit`; of it, `scale` is read.
        classes: the classes to draw from, (K,) int64.
        stream: the side stream; `None` decodes in the current one.
        guide: the weaker model of autoguidance, on the device.
        headed: `sit` with the head that guides it, where the settings have --head-guidance.
    """

    settings: dict[str, Any]
    sit: SiT
    vae: AutoencoderKL
    info: dict[str, Any]
    classes: np.ndarray
    device: torch.device
    stream: torch.cuda.Stream | None = None
    guide: SiT | None = None
    headed: HeadedSiT | None = None

    def labels(self, first: int, count: int) -> np.ndarray:  # -> (count,) int64
        return draw_labels(self.settings["labels"], self.classes, self.settings["seed"], first, count)

    def latents(self, batch: int) -> Tensor:  # -> (B, C, H, W) float64
        """Batch number `batch` at t = 0."""
        settings, size = self.settings, self.settings["batch_size"]
        y = torch.from_numpy(self.labels(batch * size, size)).to(self.device)
        noise = block_noise(settings["seed"], batch * size, size, settings["latent_shape"], self.device)
        solver = settings["sampler"], settings["num_steps"], Interpolant(settings["path_type"], settings["prediction"])
        guidance = settings["guidance_scale"], settings["guidance_interval"] or (0.0, 1.0)
        autocast = torch.bfloat16 if settings["mixed_precision"] == "bf16" else None
        options = {name: settings[name] for name in SAMPLER_OPTIONS.get(settings["sampler"], ())}
        options["guide"] = self.guide
        if settings["head_guidance"] is not None:
            strength = settings["head_guidance"], settings["head_guidance_interval"]
            options["head"] = HeadGuidance(self.headed, *strength)
        options["guidance_channels"] = settings["guidance_channels"] or "all"
        options["time_shift"] = settings["time_shift"] or 1.0
        last_step_size = settings["last_step_size"] or 0.04  # None where it has no effect
        return sample_latents(self.sit, y, noise, *solver, *guidance, last_step_size, autocast, **options)

    def decode(self, z: Tensor) -> tuple[Tensor, Tensor]:  # (B, C, H, W) -> (B, R, R, 3) uint8, (B,) bool
        return decode_latents(self.vae, z, self.info["scale"], self.settings["uint8_rule"])

    @contextmanager
    def on_side_stream(self, *tensors: Tensor) -> Iterator[None]:
        """On a GPU: work started here, on tensors that are still being computed, does not delay the next batch."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield
        for tensor in tensors:  # the allocator must not give their memory away before the stream is done with it
            tensor.record_stream(self.stream)
