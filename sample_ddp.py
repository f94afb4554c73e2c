"""Draw images from a checkpoint: `samples.npz`, `samples.png` and `samples.json`, on a CPU, one GPU or many.

    torchrun --nproc_per_node=8 sample_ddp.py --checkpoint exps/run/checkpoints/0400000
    python sample_ddp.py --checkpoint exps/run/checkpoints/0400000 --num-samples 64
    torchrun ... sample_ddp.py --checkpoint exps/run --guidance-scale 1 1.5 2 --guidance-high 1 0.7 --evaluate REF

Model, latent scale and VAE come from the checkpoint. Images are drawn in fixed blocks of `BLOCK`, each with a generator
of its own, and the label of image i depends on the seed and i alone: any number of processes gives the same bytes, and
the same command resumes a stopped run. Another batch size keeps every draw and changes rounding alone.

Shape suffixes: N images, B images of a batch, R image side, C latent channels, H = W latent side.
"""

from __future__ import annotations

from runtime import cli
from sampling.config import BLOCK, NEIGHBOURS, SampleConfig

if __name__ == "__main__":
    cli.parse_early(SampleConfig, __doc__)  # answers --help and refuses wrong flags before torch is imported

import datetime
import functools
import json
import os
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from evaluations.evaluator import Evaluation, Settings, describe_source
from evaluations.images import open_images
from evaluations.networks import load_network
from models.load import has_null_class, load_head, load_sit
from models.sit import SiT, SiTConfig
from models.vae import UNKNOWN_VAE, check_vae, decoder_digest, load_vae, vae_digest
from runtime.distributed import allow_tf32, barrier, choose_device, copy_to_host_async, hold_directory, run_on_rank0
from runtime.files import to_json, write_atomically
from runtime.progress import Progress
from sampling.batch_size import find_batch_size
from sampling.generator import SampleGenerator, choose_classes, put_on_device
from sampling.record import describe, describe_run, read_settings, resume
from sampling.writer import SampleWriter, choose_directory, create, is_complete, remove_partial

FT_VAES = {name: f"stabilityai/sd-vae-ft-{name}" for name in ("ema", "mse")}  # as REPA's --vae says them


def main(argv: list[str] | None = None) -> None:
    config, given = cli.parse_given(SampleConfig, argv, __doc__)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes == 1:
        sample(config, given, 0, 1)
        return
    # Processes exchange words, not tensors: gloo does for GPUs too. torchrun ends all of them when one fails.
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=config.timeout))
    try:
        sample(config, given, dist.get_rank(), processes)
    finally:
        dist.destroy_process_group()


def sample(config: SampleConfig, given: frozenset[str], rank: int, processes: int) -> None:
    """Draw each set of samples that is asked for, as rank `rank` of `processes`.

    Args:
        given: names of the settings that the user gave; of a set that was begun, the others come from its record.
    """
    device = choose_device(config.device)
    torch.backends.cudnn.deterministic = True
    evaluation = None
    for checkpoint in config.checkpoint:
        sit, info = load_model(config, checkpoint, rank)
        guide = load_guide(config, sit, info)
        vae, loaded_as = None, None
        for one in config.sets():
            # What the set is, and whether it is there already.
            directory = choose_directory(config, one, info)
            recorded = run_on_rank0(partial(read_settings, directory))
            if recorded is not None:
                one = resume(one, given, recorded)
            settings = describe(one, sit, info, device) | identify_vae(config, info, recorded)
            classes = choose_classes(one, len(info["class_names"]), info["classes_present"])
            if run_on_rank0(partial(is_complete, directory, settings)):
                if rank == 0:
                    remove_partial(directory)
                    print(f"{directory} is complete: {settings['num_samples']:,} images of these settings")
                if config.evaluate and not run_on_rank0(partial(is_measured, config, directory)):
                    evaluation = evaluation or start_evaluation(config, info["vae"], settings, device)
                    evaluation.reset()
                    measure_again(evaluation, directory, rank)
                continue
            # SiT and VAE on the device: once, unless a resumed set was begun with another precision.
            allow_tf32(settings["tf32"])
            load_as = settings["compile"], settings["vae_precision"], settings["mixed_precision"]
            if load_as != loaded_as:
                if loaded_as is not None:
                    sit = load_sit(info["source"], config.ema, config.checkpoint_format)[0]
                    guide = load_guide(config, sit, info)
                vae, loaded_as = load_vae(info["vae"]), load_as
                shape = settings["resolution"], settings["latent_shape"]
                check_vae(vae, info["vae"], settings["vae_digest"], "the checkpoint", *shape)
                drawn_by = decoder_digest(vae)
                put_on_device(sit, vae, device, *load_as, guide)
            if settings["vae_decoder"] not in (None, drawn_by):
                raise ValueError(
                    f"--vae: expected the decoder that {directory} was begun with (digest "
                    f"{settings['vae_decoder'][:12]}...), found another in {info['vae']} ({drawn_by[:12]}...)"
                )
            stream = torch.cuda.Stream(device) if device.type == "cuda" else None
            headed = load_head(sit, info) if settings["head_guidance"] is not None else None
            generator = SampleGenerator(settings, sit, vae, info, classes, device, stream, guide, headed)
            if settings["batch_size"] is None:
                settings["batch_size"] = find_batch_size(generator, processes)
            # The reference is measured once, before the first image is drawn.
            if evaluation:
                evaluation.reset()
            elif config.evaluate:
                evaluation = start_evaluation(config, info["vae"], settings, device)
            with hold_directory(directory):
                if not run_on_rank0(partial(is_complete, directory, settings)):  # by another program meanwhile
                    draw_set(generator, directory, evaluation, rank, processes)


# The model.


def load_model(config: SampleConfig, checkpoint: str, rank: int) -> tuple[SiT, dict[str, Any]]:
    """The SiT of a checkpoint on the CPU, and what is known of it, with the VAE that is to be used.

    Raises:
        ValueError: the checkpoint does not tell enough.
    """
    sit, info = load_sit(checkpoint, config.ema, config.checkpoint_format)
    if info["scale"] is None:
        raise ValueError(
            f"--checkpoint {checkpoint}: expected a file that tells the scale of its latents, or latents of 4 "
            f"channels (the SD-VAE's), found {sit.config.in_channels} channels; fine-tune it on a store by train.py "
            f"--init-from, whose checkpoints tell it"
        )
    check_stated(config, sit, info)
    untrained = not (has_null_class(info) or config.autoguidance)
    if untrained and any(scale != 1 for scale in config.guidance_scale):
        raise ValueError(
            f"--guidance-scale: expected 1 for {checkpoint}, which was trained with --label-dropout 0: its null "
            f"class was never trained, found {' '.join(f'{scale:g}' for scale in config.guidance_scale)}"
        )
    info["vae"] = FT_VAES.get(config.vae, config.vae) or info["vae"]
    if info["vae_digest"] == UNKNOWN_VAE and rank == 0:  # any VAE is accepted, and recorded for each set
        print(f"{checkpoint} does not say which VAE it was trained with: taking {info['vae']}", flush=True)
    return sit, info


def check_stated(config: SampleConfig, sit: SiT, info: dict[str, Any]) -> None:
    """Refuse what the command says of the checkpoint if the checkpoint says something else."""
    names = "depth", "hidden_size", "num_heads", "patch_size"
    stated = SiTConfig.from_name(config.model, sit.config.latent_size) if config.model else sit.config
    same = all(getattr(stated, name) == getattr(sit.config, name) for name in names)
    shape = " ".join(f"{name} {getattr(sit.config, name)}" for name in names)
    cli.check(config, "model", same, f"{info['source']}'s: {shape}")
    found = {name: getattr(sit.config, name) for name in ("num_classes", "qk_norm")}
    found |= {name: info[name] for name in ("resolution", "path_type")}
    trained = info.get("config") or {}
    prefix = {"vae": "align"}.get(trained.get("align"), trained.get("align"))
    depths = trained.get(f"{prefix}_depth") or [info.get("encoder_depth")]
    found["encoder_depth"] = depths[0] if len(depths) == 1 else None
    for name, value in found.items():
        same = value is None or getattr(config, name) in (None, value)
        cli.check(config, name, same, f"{value}, which {info['source']} was trained with")


def load_guide(config: SampleConfig, sit: SiT, info: dict[str, Any]) -> SiT | None:
    """The SiT of --autoguidance on the CPU, if there is one; its digest is put into `info`.

    Raises:
        ValueError: it was not trained on the same latents, classes and path.
    """
    if config.autoguidance is None:
        return None
    guide, found = load_sit(config.autoguidance)

    def facts(sit: SiT, info: dict[str, Any]) -> tuple:
        config = sit.config
        names = "path_type", "prediction", "scale"
        return config.in_channels, config.latent_size, config.num_classes, *(info[name] for name in names)

    if facts(guide, found) != facts(sit, info):
        raise ValueError(
            f"--autoguidance: expected a model of the same channels, latent size, classes, path, prediction "
            f"and latent scale as {info['source']} {facts(sit, info)}, found {facts(guide, found)} in "
            f"{config.autoguidance}"
        )
    info["autoguidance_digest"] = found["digest"]
    return guide


def identify_vae(config: SampleConfig, info: dict[str, Any], recorded: dict[str, Any] | None) -> dict[str, Any]:
    """`vae_digest` and `vae_decoder` of a set: its record's, if it was begun and the user names no VAE."""
    told, known = info["vae_digest"] != UNKNOWN_VAE, recorded or {}
    if recorded and told and not (config.vae and known["vae_decoder"]):
        return {"vae_digest": info["vae_digest"], "vae_decoder": known["vae_decoder"]}
    encoder, decoder = digests(info["vae"], known.get("vae_digest"))
    decoder = decoder if known.get("vae_decoder", "new") else None  # older code did not record it
    return {"vae_digest": info["vae_digest"] if told else encoder, "vae_decoder": decoder}


@functools.cache
def digests(vae_name: str, recorded: str | None) -> tuple[str, str]:
    """Of a VAE, its encoder's and its decoder's."""
    vae = load_vae(vae_name)
    return vae_digest(vae, recorded), decoder_digest(vae)


# The sets.


def draw_set(
    generator: SampleGenerator, directory: Path, evaluation: Evaluation | None, rank: int, processes: int
) -> None:
    """Draw what is missing of one set of samples; rank 0 makes the directory whole."""
    settings = generator.settings
    run_on_rank0(partial(create, directory, settings))
    samples = SampleWriter(directory, settings)
    if rank == 0:
        print(f"{generator.info['source']} ({generator.info['read_as']}) -> {directory}", flush=True)
    begin, before = time.perf_counter(), samples.count()
    # What is missing, as rank 0 sees it: on another rank some may be done by the time it looks.
    missing = run_on_rank0(lambda: [batch for batch, done in enumerate(samples.done()) if not done])
    if evaluation:
        for batch in sorted(set(range(samples.num_batches)) - set(missing))[rank::processes]:
            update_evaluation(evaluation, samples, batch, samples.read(batch))
    draw_batches(generator, samples, missing[rank::processes], evaluation, quiet=rank > 0)
    barrier()
    values = evaluation.finish() if evaluation else None
    if rank == 0:
        seconds, drawn = time.perf_counter() - begin, settings["num_samples"] - before
        # Of the last start alone: a run that was stopped had drawn the others before.
        timing = {"images": drawn, "seconds": seconds, "images_per_second": drawn / seconds}
        labels = generator.labels(0, settings["num_samples"])
        record = describe_run(generator, processes, timing)
        metrics = None
        if values:
            metrics = evaluation.record(values, {"count": len(labels), "kind": "drawn"}, labels) | {"sampling": record}
        samples.finish(labels, record, metrics)
        for name, value in (values or {}).items():
            print(f"{name:>24}  {value:.6g}")
        print(f"{directory}: {settings['num_samples']:,} images, {drawn / seconds:.3g} images/s", flush=True)
    samples.close()


# The images.


def draw_batches(
    generator: SampleGenerator, samples: SampleWriter, batches: list[int], evaluation: Evaluation | None, quiet: bool
) -> None:
    """Draw these batches and write them; a thread writes one while the device draws the next."""
    shown = {"desc": "sampling", "unit": "image", "disable": quiet}
    progress = Progress(total=samples.num_samples, initial=samples.count(), **shown)
    with progress, ThreadPoolExecutor(1) as writer:
        in_flight: deque = deque()
        for batch in batches:
            z = generator.latents(batch)
            with generator.on_side_stream(z):
                images, finite = generator.decode(z)
                in_flight.append(writer.submit(write_batch, samples, batch, copy_to_host_async(images, finite)))
                if evaluation:
                    update_evaluation(evaluation, samples, batch, images)
            if len(in_flight) > 1:
                in_flight.popleft().result()
            progress.update(samples.count() - progress.n)  # those of the other ranks as well
        for task in in_flight:
            task.result()
        if generator.stream is not None:  # what the evaluation has computed is read in another stream from now on
            generator.stream.synchronize()
        progress.update(samples.count() - progress.n)


def write_batch(samples: SampleWriter, batch: int, wait: Callable[[], list[np.ndarray]]) -> None:
    """Wait until a batch has reached the host, check it, and write it.

    Raises:
        ValueError: a latent or a colour is not finite.
    """
    images, finite = wait()
    bad = np.flatnonzero(~finite)
    if len(bad):
        first = batch * samples.batch_size + bad[0]
        raise ValueError(
            f"expected finite samples, found {len(bad)} that are not in batch {batch}: the first is image {first} "
            f"of block {first // BLOCK}; fix: --mixed-precision no, a lower --guidance-scale, or an older checkpoint"
        )
    samples.write(batch, images)


# Measuring them.


def start_evaluation(config: SampleConfig, vae_name: str, settings: dict[str, Any], device: torch.device) -> Evaluation:
    """What the samples are compared with as they are drawn. The reference is measured here."""
    side = settings["resolution"]
    open_images(config.evaluate, side)  # refused before a network is loaded
    network = load_network(config.features, inception_weights=config.inception_weights, vae=vae_name, device=device)
    return Evaluation([network], config.evaluate, Settings(k=NEIGHBOURS, batch_size=settings["batch_size"]), side=side)


def is_measured(config: SampleConfig, directory: Path) -> bool:
    """Whether `metrics.json` of a whole set has what --evaluate asks for.

    Raises:
        ValueError: it has not, and the set has no samples.npz to measure.
    """
    file = directory / "metrics.json"
    found = json.loads(file.read_text()) if file.is_file() else {}
    path = (found.get("reference") or {}).get("path")
    if path == str(open_images(config.evaluate).path) and config.features in (found.get("features") or {}):
        return True
    if not (directory / "samples.npz").is_file():
        raise ValueError(f"--evaluate: expected {directory / 'samples.npz'} to measure, found none (--no-npz)")
    return False


def measure_again(evaluation: Evaluation, directory: Path, rank: int) -> None:
    """Measure the images of a whole set; rank 0 writes `metrics.json`."""
    source = open_images(str(directory / "samples.npz"))
    evaluation.measure(evaluation.samples, source, "samples")
    values = evaluation.finish()
    if rank == 0:
        record = evaluation.record(values, describe_source(source, []), source.labels)
        record |= {"sampling": json.loads((directory / "samples.json").read_text())}
        write_atomically(directory / "metrics.json", to_json(record))
        for name, value in values.items():
            print(f"{name:>24}  {value:.6g}")


def update_evaluation(evaluation: Evaluation, samples: SampleWriter, batch: int, images: Tensor | np.ndarray) -> None:
    """Add a batch (B, R, R, 3) uint8 to what is measured, but for images that come after the last one."""
    first = batch * samples.batch_size
    images = images[: samples.num_samples - first]
    evaluation.update(images, range(first, first + len(images)))


if __name__ == "__main__":
    cli.run(main)
