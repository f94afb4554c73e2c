"""Draw images from a checkpoint: `samples.npz`, `samples.png` and `samples.json`, on a CPU, one GPU or many.

    torchrun --nproc_per_node=8 sample_ddp.py --checkpoint exps/run/checkpoints/0400000
    python sample_ddp.py --checkpoint exps/run/checkpoints/0400000 --num-samples 64
    torchrun ... sample_ddp.py --checkpoint exps/run --guidance-scale 1 1.5 2 --guidance-high 1 0.7 --evaluate REF

Model, latent scale and VAE come from the checkpoint. Images are drawn in fixed blocks of `BLOCK`, each with a generator
of its own, and the label of image i depends on the seed and i alone: any number of processes gives the same bytes, and
a stopped run goes on by the same command. Another batch size keeps every draw and changes rounding alone.

Shape suffixes: N images, B images of a batch, R image side, C latent channels, H = W latent side.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime import cli
from runtime.distributed import barrier, choose_device, copy_to_host_async, run_on_rank0
from runtime.seeding import BLOCK
from sampling.config import CPU_BATCH, LARGEST_BATCH, NEIGHBOURS, Guidance, SampleConfig

# torch and what imports it is imported where it is used, so that --help does not wait for it.
if TYPE_CHECKING:
    import numpy as np
    import torch
    from diffusers import AutoencoderKL
    from torch import Tensor

    from evaluations.evaluator import Evaluation
    from models.sit import SiT
    from sampling.writer import SampleWriter


def draw_labels(rule: str, classes: np.ndarray, seed: int, first: int, count: int) -> np.ndarray:  # (K,) -> (count,)
    """Labels (int64) of `count` images from number `first` on; each depends on rule, classes, seed and number alone.

    `balanced`: each round of K images is a permutation of the K classes of its own, so that the order has no class
    structure, as metrics computed on parts of the file need, and any multiple of K images has each class equally often.
    """
    import numpy as np

    from runtime.seeding import numpy_generator

    K = len(classes)
    period = K if rule == "balanced" else BLOCK
    pieces = []
    for index in range(first // period, -(-(first + count) // period)):
        generator = numpy_generator(seed, index, f"sample labels {rule}")
        pieces.append(generator.permutation(K) if rule == "balanced" else generator.integers(K, size=period))
    return classes[np.concatenate(pieces)[first % period :][:count]].astype(np.int64)


def choose_classes(config: SampleConfig, num_classes: int) -> np.ndarray:  # -> (K,) int64
    """The classes to draw from.

    Raises:
        ValueError: one that the model does not know, or one named twice.
    """
    import numpy as np

    if config.classes is None:
        return np.arange(num_classes)
    wrong = [label for label in config.classes if not 0 <= label < num_classes]
    if wrong or len(set(config.classes)) != len(config.classes):
        raise ValueError(
            f"--classes: expected different numbers from 0 to {num_classes - 1}, "
            f"found {' '.join(map(str, config.classes))}"
        )
    return np.array(config.classes)


def describe(
    config: SampleConfig, guidance: Guidance, sit: SiT, info: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    """Everything that determines a set of images, but for the code's version and the device's rounding. JSON values.

    The size of a batch is left to `choose_batch_size`.
    """
    from models.vae import UINT8_RULE

    on_gpu = device.type == "cuda"
    return {
        "checkpoint_digest": info["digest"],
        "checkpoint_format": info["format"],
        "step": info["step"],
        "path_type": info["path_type"],
        "sampler": config.sampler,
        "num_steps": config.num_steps,
        "last_t": config.last_t if config.sampler == "sde" else None,
        "diffusion": "2t" if config.sampler == "sde" else None,
        "guidance_scale": guidance.scale,
        "guidance_interval": guidance.interval and list(guidance.interval),
        "num_samples": config.num_samples,
        "labels": config.labels,
        "classes": config.classes and list(config.classes),
        "seed": config.seed,
        "block_size": BLOCK,
        "mixed_precision": config.mixed_precision or ("bf16" if on_gpu else "no"),
        "compile": on_gpu if config.compile is None else config.compile,
        "vae_precision": config.vae_precision or ("bf16" if on_gpu else "no"),
        "tf32": config.tf32 and on_gpu,
        "device_type": device.type,
        "vae_digest": info["vae_digest"],
        "latent_scale": info["scale"].to_dict(),
        "latent_shape": [sit.config.in_channels, sit.config.latent_size, sit.config.latent_size],
        "resolution": info["resolution"],
        "uint8_rule": UINT8_RULE,
        "npz": config.npz,
        "png": config.png,
    }


def default_folder(info: dict[str, Any], settings: dict[str, Any]) -> Path:
    """`<run>/samples/0400000-sde250-cfg1.8-t0-0.7-seed0-n50000`; for a file beside it, with its name for the step."""
    source = Path(info["source"]).absolute()
    run_dir, model = (source.parent, source.stem) if source.is_file() else (source.parent.parent, source.name)
    name = f"{model}-{settings['sampler']}{settings['num_steps']}-cfg{settings['guidance_scale']:g}"
    if settings["guidance_interval"] not in (None, [0.0, 1.0]):
        name += "-t{:g}-{:g}".format(*settings["guidance_interval"])
    return run_dir / "samples" / f"{name}-seed{settings['seed']}-n{settings['num_samples']}"


def load_decoder(name: str, settings: dict[str, Any], device: torch.device) -> AutoencoderKL:
    """The checkpoint's VAE.

    Raises:
        ValueError: it cannot be loaded, or is another one.
    """
    import torch

    from models.vae import load_vae, vae_digest, vae_factor

    vae = load_vae(name, device)
    found = vae_digest(vae)
    if found != settings["vae_digest"]:
        raise ValueError(
            f"--vae: expected the VAE of the checkpoint (digest {settings['vae_digest'][:12]}...), "
            f"found another in {name} ({found[:12]}...); give the one that dumped the latents"
        )
    channels, latent_side, _ = settings["latent_shape"]
    if vae_factor(vae) * latent_side != settings["resolution"] or vae.config.latent_channels != channels:
        raise ValueError(
            f"expected images of side {settings['resolution']} from latents of {channels} channels, found "
            f"{vae_factor(vae)} times latents of side {latent_side} and {vae.config.latent_channels} channels with the "
            f"VAE {name}; the checkpoint and its VAE do not belong together"
        )
    if settings["vae_precision"] == "bf16":  # whose convolutions run on the GPU's matrix units, channels last
        vae = vae.bfloat16().to(memory_format=torch.channels_last)
    return vae


@dataclass
class SampleGenerator:
    """Draws batches: what they depend on, on one device. On a GPU they are decoded in a stream of its own."""

    settings: dict[str, Any]
    sit: SiT
    vae: AutoencoderKL
    info: dict[str, Any]
    classes: np.ndarray  # (K,) int64
    device: torch.device
    stream: torch.cuda.Stream | None = None

    def labels(self, first: int, count: int) -> np.ndarray:  # -> (count,) int64
        return draw_labels(self.settings["labels"], self.classes, self.settings["seed"], first, count)

    def latents(self, batch: int) -> Tensor:  # -> (B, C, H, W) float64
        """Batch number `batch` at t = 0."""
        import torch

        from diffusion.interpolant import Interpolant
        from diffusion.samplers import block_noise, guided_velocity, solve

        settings, size = self.settings, self.settings["batch_size"]
        y = torch.from_numpy(self.labels(batch * size, size)).to(self.device)
        velocity = guided_velocity(
            self.sit, y, self.sit.config.num_classes, settings["guidance_scale"],
            tuple(settings["guidance_interval"] or (0.0, 1.0)),
            torch.bfloat16 if settings["mixed_precision"] == "bf16" else None,
        )  # fmt: skip
        noise = block_noise(settings["seed"], batch * size, size, settings["latent_shape"], self.device)
        interpolant = Interpolant(settings["path_type"])
        return solve(settings["sampler"], velocity, noise, settings["num_steps"], interpolant, settings["last_t"])

    def decode(self, z: Tensor) -> tuple[Tensor, Tensor]:  # (B, C, H, W) -> (B, R, R, 3) uint8, (B,) bool
        """Images, and which are finite as latents and in colour. Block by block: the decoder needs memory."""
        import torch

        from models.vae import decode, to_uint8

        images, finite = [], z.isfinite().flatten(1).all(dim=1)
        for block in z.float().split(BLOCK):
            x = decode(self.vae, block, self.info["scale"])  # (b, 3, R, R)
            images.append(to_uint8(x))
            first = (len(images) - 1) * BLOCK
            finite[first : first + BLOCK] &= x.isfinite().flatten(1).all(dim=1)
        return torch.cat(images), finite

    @contextmanager
    def on_side_stream(self, *tensors: Tensor) -> Iterator[None]:
        """On a GPU: what is started here, on tensors that are being computed, does not hold up the next batch."""
        import torch

        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield
        for tensor in tensors:  # the allocator must not give their memory away before the stream is done with it
            tensor.record_stream(self.stream)


def round_up_to_block(images: int) -> int:
    """As many images or a few more: batches are whole even at the end, so that an image always has the same company."""
    return -(-images // BLOCK) * BLOCK


def configured_batch_size(config: SampleConfig, folder: Path, device: torch.device) -> int | None:
    """Images per batch: as the flag says, or by `auto` what the folder was begun with; None if that is to be tried."""
    from sampling import writer as sample_folder

    if config.per_proc_batch_size != "auto":
        return min(int(config.per_proc_batch_size), round_up_to_block(config.num_samples))
    begun = sample_folder.batch_size_of(folder)
    on_cpu = min(CPU_BATCH, round_up_to_block(config.num_samples)) if device.type == "cpu" else None
    return on_cpu if begun is None else begun


def largest_batch_size(fits: Callable[[int], bool], share: int) -> int:
    """The largest batch of whole blocks, up to LARGEST_BATCH and a process's `share` of the images, that fits.

    Raises:
        ValueError: there is no memory for a single block.
    """
    for size in range(min(LARGEST_BATCH, round_up_to_block(share)), 0, -BLOCK):
        if fits(size):
            return size
    raise ValueError(
        f"--per-proc-batch-size auto: expected memory for {BLOCK} images at once, found too little on the GPU; free "
        f"it from other programs, or give --device cpu"
    )


def fits_on_gpu(drawer: SampleGenerator, size: int) -> bool:
    """Whether a guided evaluation of the network and the decoder leave a tenth of the memory free."""
    import torch

    tried = {"batch_size": size, "num_steps": 1, "guidance_interval": [0.0, 1.0]}
    drawer = dataclasses.replace(drawer, settings=drawer.settings | tried, stream=None)
    torch.cuda.empty_cache()
    try:
        with torch.compiler.set_stance("force_eager"):  # shapes that are only tried must not be compiled
            drawer.decode(drawer.latents(0))
        free, total = torch.cuda.mem_get_info(drawer.device)  # what was used is kept until the next line but one
        return free >= 0.1 * total
    except torch.cuda.OutOfMemoryError:
        return False
    finally:
        torch.cuda.empty_cache()


def store_batch(samples: SampleWriter, batch: int, wait: Callable[[], list[np.ndarray]]) -> None:
    """Wait for a batch to reach the host, look at it, and write it.

    Raises:
        ValueError: a latent is not finite.
    """
    images, finite = wait()
    bad = [index for index in range(len(finite)) if not finite[index]]
    if bad:
        first = batch * samples.batch_size + bad[0]
        raise ValueError(
            f"expected finite samples, found {len(bad)} that are not in batch {batch}: the first is image {first} "
            f"of block {first // BLOCK}; fix: --mixed-precision no, a lower --guidance-scale, or an older checkpoint"
        )
    samples.write(batch, images)


def start_evaluation(config: SampleConfig, vae_name: str, settings: dict[str, Any], device: torch.device) -> Evaluation:
    """What the samples are shown to as they are drawn. The reference is measured here, before any of them."""
    from evaluations.evaluator import Evaluation, Settings
    from evaluations.images import open_images
    from evaluations.networks import load_network

    open_images(config.evaluate)  # refused before a network is loaded
    network = load_network(config.features, inception_weights=config.inception_weights, vae=vae_name, device=device)
    measured = Settings(k=NEIGHBOURS, batch_size=settings["batch_size"])
    return Evaluation([network], config.evaluate, measured)


def describe_metrics(evaluation: Evaluation, figures: dict[str, float], labels: np.ndarray) -> dict[str, Any]:
    """What metrics.json holds beside the record of sampling."""
    import dataclasses

    from evaluations.evaluator import METRICS, warnings_about

    kinds = {METRICS[name][metric][0] for name in evaluation.networks for metric in evaluation.names}
    reference = evaluation.source
    neighbours = reference.count if kinds & {"precision", "recall"} else None
    return {
        "metrics": figures,
        "samples": {"count": len(labels), "kind": "drawn"},
        "reference": {
            "path": str(reference.path),
            "count": reference.count,
            "sha256": reference.digest(),
            "stored": evaluation.reference_stored,
        },
        "features": {name: {"weights_sha256": network.digest} for name, network in evaluation.networks.items()},
        "settings": dataclasses.asdict(evaluation.settings),
        "warnings": warnings_about(len(labels), labels, neighbours, "score" in kinds),
    }


def update_evaluation(evaluation: Evaluation, samples: SampleWriter, batch: int, images: Tensor | np.ndarray) -> None:
    """Add a batch (B, R, R, 3) uint8 to what is measured, but for images that come after the last one."""
    first = batch * samples.batch_size
    images = images[: samples.num_samples - first]
    evaluation.update(images, range(first, first + len(images)))


def draw_batches(
    drawer: SampleGenerator,
    samples: SampleWriter,
    batches: list[int],
    evaluation: Evaluation | None,
    show_progress: bool,
) -> None:
    """Draw these batches and write them; a thread writes one while the device draws the next."""
    from tqdm import tqdm

    progress = tqdm(
        total=samples.num_samples, desc="sampling", unit="image", initial=samples.count(), disable=not show_progress,
        dynamic_ncols=True,
    )  # fmt: skip
    with progress, ThreadPoolExecutor(1) as writer:
        in_flight: deque = deque()
        for batch in batches:
            z = drawer.latents(batch)
            with drawer.on_side_stream(z):
                images, finite = drawer.decode(z)
                in_flight.append(writer.submit(store_batch, samples, batch, copy_to_host_async(images, finite)))
                if evaluation:
                    update_evaluation(evaluation, samples, batch, images)
            if len(in_flight) > 1:
                in_flight.popleft().result()
            progress.update(samples.count() - progress.n)  # those of the other processes as well
        for task in in_flight:
            task.result()
        if drawer.stream is not None:  # what was shown to the evaluation is read elsewhere from now on
            drawer.stream.synchronize()
        progress.update(samples.count() - progress.n)


def main(argv: list[str] | None = None) -> None:
    config = cli.parse(SampleConfig, argv, __doc__.splitlines()[0])
    import torch.distributed as dist

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes == 1:
        sample(config, 0, 1)
        return
    # Processes exchange words, not tensors: gloo does for GPUs too. torchrun ends all of them when one fails.
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=config.timeout))
    try:
        sample(config, dist.get_rank(), processes)
    finally:
        dist.destroy_process_group()


def sample(config: SampleConfig, rank: int, processes: int) -> None:
    """Draw each set of samples that is asked for, as process `rank` of `processes`."""
    import torch

    from sampling import writer as sample_folder

    device = choose_device(config.device)
    torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = config.tf32
    torch.backends.cudnn.deterministic = True

    evaluation = None
    for checkpoint in config.checkpoint:
        sit, info, vae_name, classes = load_model(config, checkpoint, rank)
        vae = None
        for guidance in config.guidances():
            settings = describe(config, guidance, sit, info, device)
            folder = choose_folder(config, info, settings)
            settings["batch_size"] = configured_batch_size(config, folder, device)
            if run_on_rank0(lambda folder=folder, settings=settings: sample_folder.is_complete(folder, settings)):
                report_complete(config, folder, settings, rank)
                continue
            if vae is None:
                vae = load_decoder(vae_name, settings, device)
                sit.to(device)
                if settings["compile"]:  # two static shapes: a batch, and with guidance a doubled one
                    for block in sit.blocks:
                        block.compile(fullgraph=True, dynamic=False)
            stream = torch.cuda.Stream(device) if device.type == "cuda" else None
            drawer = SampleGenerator(settings, sit, vae, info, classes, device, stream)
            if settings["batch_size"] is None:
                settings["batch_size"] = find_batch_size(drawer, processes)
            if config.evaluate and evaluation is None:
                evaluation = start_evaluation(config, vae_name, settings, device)
            elif evaluation:
                evaluation.reset()
            draw_set(drawer, folder, vae_name, evaluation, rank, processes)


def find_batch_size(drawer: SampleGenerator, processes: int) -> int:
    """The largest batch that fits on every process's GPU."""
    import torch

    share = -(-drawer.settings["num_samples"] // processes)
    size = torch.tensor(largest_batch_size(lambda size: fits_on_gpu(drawer, size), share))
    if processes > 1:
        torch.distributed.all_reduce(size, torch.distributed.ReduceOp.MIN)
    return size.item()


def choose_folder(config: SampleConfig, info: dict[str, Any], settings: dict[str, Any]) -> Path:
    """Where a set of samples goes; of a sweep each into a folder of its own, named after what it is."""
    folder = default_folder(info, settings)
    if config.output_dir is None:
        return folder
    sweep = len(config.checkpoint) * len(config.guidances()) > 1
    return Path(config.output_dir) / f"{folder.parent.parent.name}-{folder.name}" if sweep else Path(config.output_dir)


def report_complete(config: SampleConfig, folder: Path, settings: dict[str, Any], rank: int) -> None:
    """Say that there is nothing to do.

    Raises:
        ValueError: metrics are asked for, and the samples were drawn without.
    """
    from sampling import writer as sample_folder

    if rank == 0:
        sample_folder.remove_partial(folder)
        print(f"{folder} is complete: {settings['num_samples']:,} images of these settings; nothing to do")
    if config.evaluate and not (folder / "metrics.json").is_file():
        raise ValueError(f"{folder} was drawn without --evaluate; run python -m evaluations.evaluate on it")


def draw_set(
    drawer: SampleGenerator, folder: Path, vae_name: str, evaluation: Evaluation | None, rank: int, processes: int
) -> None:
    """Draw what is missing of one set of samples; process 0 makes the folder whole."""
    import torch

    from runtime import provenance
    from sampling import writer as sample_folder

    settings, info, device = drawer.settings, drawer.info, drawer.device
    run_on_rank0(lambda: sample_folder.create(folder, settings))
    samples = sample_folder.SampleWriter(folder, settings)
    if rank == 0:
        print(f"{info['source']} ({info['read_as']}) -> {folder}", flush=True)
    begin, before = time.perf_counter(), samples.count()
    # Process 0's view of what is missing: another's may already have changed when a slow one looks.
    missing = run_on_rank0(lambda: [batch for batch, done in enumerate(samples.done()) if not done])
    if evaluation:
        for batch in sorted(set(range(samples.num_batches)) - set(missing))[rank::processes]:
            update_evaluation(evaluation, samples, batch, samples.read(batch))
    draw_batches(drawer, samples, missing[rank::processes], evaluation, show_progress=rank == 0)
    barrier()
    figures = evaluation.finish() if evaluation else None
    if rank == 0:
        seconds, drawn = time.perf_counter() - begin, settings["num_samples"] - before
        record = {
            "settings": settings,
            "checkpoint": info["source"],
            "vae": vae_name,
            "class_names": info["class_names"],
            "processes": processes,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            # Of the last start alone: a run that was stopped had drawn the others before.
            "timing": {"images": drawn, "seconds": seconds, "images_per_second": drawn / seconds},
            **provenance.stamp(),
        }
        labels = drawer.labels(0, settings["num_samples"])
        metrics = describe_metrics(evaluation, figures, labels) | {"sampling": record} if figures else None
        samples.finish(labels, record, metrics)
        for name, value in (figures or {}).items():
            print(f"{name:>24}  {value:.6g}")
        print(f"{folder}: {settings['num_samples']:,} images, {drawn / seconds:.3g} images/s", flush=True)
    samples.close()


def load_model(config: SampleConfig, checkpoint: str, rank: int) -> tuple[SiT, dict[str, Any], str, np.ndarray]:
    """The SiT of a checkpoint, what is known of it, the name of its VAE, and the classes to draw from.

    Raises:
        ValueError: it does not tell enough, or has not the classes.
    """
    from models.load import load_sit
    from models.vae import UNKNOWN_VAE, load_vae, vae_digest

    sit, info = load_sit(checkpoint)
    if info["scale"] is None:
        raise ValueError(
            f"--checkpoint {checkpoint}: expected a file that tells the scale of its latents, or latents of 4 "
            f"channels (the SD-VAE's), found {sit.config.in_channels} channels; fine-tune it on a store by train.py "
            f"--init-from, whose checkpoints tell it"
        )
    vae_name = config.vae or info["vae"]
    if info["vae_digest"] == UNKNOWN_VAE:  # taken as it is, and held fast for this folder
        info["vae_digest"] = vae_digest(load_vae(vae_name))
        if rank == 0:
            print(f"{checkpoint} does not say which VAE it was trained with: taking {vae_name}", flush=True)
    return sit, info, vae_name, choose_classes(config, len(info["class_names"]))


if __name__ == "__main__":
    cli.run(main)
