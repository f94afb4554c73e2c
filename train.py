"""Train a SiT, aligned with the clean VAE latents (VAE-REPA) or not, on a latent store.

    accelerate launch train.py --data-dir data/imagenet256 --model SiT-XL/2

A step is a pure function of (settings, data, step number): every draw comes from generators seeded by the step, for the
whole global batch, of which each process and micro-batch takes its rows. So a stopped run goes on exactly, and 1, 2 or
8 processes with any accumulation train on the same batches.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
import fcntl
import functools
import itertools
import json
import os
import resource
import sys
import time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, InitProcessGroupKwargs
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from alignment.registry import METHODS, AlignmentContext, Batch, Method, parse_align
from dataset import LatentDataset, StepSampler
from diffusion.interpolant import Interpolant
from diffusion.samplers import guided_velocity, sample_ode
from loss import Alignment, training_loss
from models import load
from models.aligned import AlignedSiT
from models.sit import SiT, SiTConfig
from models.vae import UNKNOWN_VAE, LatentScale, decode_images, load_vae, vae_digest
from reporting.log import RunLog
from reporting.page import write_report
from runtime import cli, provenance
from runtime.files import sha256
from runtime.seeding import block_generator, numpy_generator, step_generator
from training import checkpoint
from training.config import CHANGEABLE_ON_RESUME, FREE_ON_RESUME, TrainConfig, resolve
from training.ema import MovingAverage
from training.nonfinite import StepGuard
from training.optimizer import consolidate_state, fix_loaded_state, make_optimizer, release_process_group, skip_step_if
from training.preemption import StopRequest, exit_code, ignore_signals


def build(config: TrainConfig, store: LatentDataset, source: tuple[SiT, dict] | None) -> tuple[SiT, SiT]:
    """The SiT and its moving average, equal before the first step: a function of the seed, whatever is aligned, or the
    weights of `source`, as `load_sit` gives it."""
    channels, height, width = store.latent_shape
    if height != width:
        raise ValueError(f"expected square latents, found {height} x {width} in {config.data_dir}")
    torch.manual_seed(config.seed)
    sit = SiT(SiTConfig.from_name(config.model, height, channels, config.num_classes))
    if source is not None:
        load_init_weights(config, sit, *source, store.scale)
    return sit, copy.deepcopy(sit).eval().requires_grad_(False)


def load_init_weights(config: TrainConfig, sit: SiT, source: SiT, info: dict, scale: LatentScale) -> None:
    """Put the weights of `--init-from` into a new SiT. Its label table stays new where the classes are others.

    Raises:
        ValueError: another architecture or path.
    """
    found, expected = source.config.to_dict(), sit.config.to_dict()
    wrong = [
        f"{name} {found[name]} (this run: {value})"
        for name, value in expected.items()
        if found[name] != value and name != "num_classes"
    ]
    if info["path_type"] != config.path_type:
        wrong.append(f"path {info['path_type']} (this run: {config.path_type})")
    if wrong:
        raise ValueError(f"--init-from {config.init_from}: expected a model as this run's, found {', '.join(wrong)}")
    weights = source.state_dict()
    if found["num_classes"] != expected["num_classes"]:
        del weights["y_embedder.embedding_table.weight"]
    sit.load_state_dict(weights, strict=False)
    if info["scale"] not in (None, scale):
        warnings.warn(
            f"--init-from {config.init_from} was trained on latents scaled by {info['scale']}, {config.data_dir} has "
            f"{scale}",
            stacklevel=2,
        )


def make_heads(config: TrainConfig, methods: dict[str, Method]) -> dict[str, tuple[int, torch.nn.Module]]:
    """Depth and head of each term of the loss, by name; its weights depend on the seed and that name alone."""
    heads = {}
    for name, method in methods.items():
        for term, depth in method.term_names(name).items():
            torch.manual_seed(step_generator(config.seed, 0, f"head {term}").initial_seed())
            heads[term] = (depth, method.make_head())
    return heads


@dataclass
class Run:
    """What a training step works on."""

    config: TrainConfig
    accelerator: Accelerator
    model: torch.nn.Module  # AlignedSiT, wrapped by DDP when there are several processes
    sit: SiT  # the backbone inside `model`
    ema: SiT  # its moving average
    average: MovingAverage  # brings `ema` up to date
    optimizer: torch.optim.Optimizer
    guard: StepGuard
    writer: checkpoint.CheckpointWriter
    interpolant: Interpolant
    methods: dict[str, Method]
    scale: LatentScale
    epoch_size: int  # images in the store

    def alignments(self, step: int) -> dict[str, Alignment]:
        """The alignment terms of the loss at an optimizer step, by name."""
        return {
            term: method.alignment_at(step) for name, method in self.methods.items() for term in method.term_names(name)
        }


def step_noise(config: TrainConfig, step: int, sit: SiTConfig, device: torch.device) -> dict[str, Tensor]:
    """The random numbers of a step, for the whole global batch B, by purpose.

    "posterior" and "noise" (B, C, H, W) normal; "time" (B,) uniform; "dropout" (B,) bool, the labels to drop; and where
    a teacher needs it "lag" (B,) uniform. Each has a stream of its own: no method changes another's draws.
    """
    B, latent_shape = config.batch_size, (sit.in_channels, sit.latent_size, sit.latent_size)
    normal, uniform = functools.partial(torch.randn, B, *latent_shape), functools.partial(torch.rand, B)
    kinds = {"posterior": normal, "noise": normal, "time": uniform, "dropout": uniform}
    kinds |= {"lag": uniform} if "sra" in parse_align(config.align) else {}
    draws = {
        purpose: kind(generator=step_generator(config.seed, step, purpose, device), device=device)
        for purpose, kind in kinds.items()
    }
    return draws | {"dropout": draws["dropout"] < config.label_dropout}


@torch.no_grad()
def make_targets(run: Run, batch: Batch, alignments: dict[str, Alignment]) -> dict[str, Tensor]:
    """The target (N, T, D) of each term that has a weight; the terms of one method share it."""
    targets = {}
    for name, method in run.methods.items():
        terms = [term for term in method.term_names(name) if alignments[term].weight != 0]
        targets |= dict.fromkeys(terms, method.target(batch)) if terms else {}
    return targets


def train_step(run: Run, step: int, micro_batches: list[dict[str, Tensor]]) -> None:
    """Optimizer step number `step`, from 0, unless the guard refuses it. The guard keeps what was measured, unread."""
    config, accelerator, sit = run.config, run.accelerator, run.sit
    draws, alignments, losses = step_noise(config, step, sit.config, accelerator.device), run.alignments(step), []
    for index, data in enumerate(micro_batches):
        first = (index * accelerator.num_processes + accelerator.process_index) * len(data["label"])
        own = {purpose: numbers[first : first + len(data["label"])] for purpose, numbers in draws.items()}
        mean, std = data["moments"].chunk(2, dim=1)
        z, mean = (run.scale.scale_latent(f) for f in (mean + std * own["posterior"], mean))
        y = torch.where(own["dropout"], config.num_classes, data["label"])
        batch = Batch(z, mean, own["noise"], own["time"], y, own.get("lag"), data.get("image"))
        targets = make_targets(run, batch, alignments)
        last = index == len(micro_batches) - 1
        with nullcontext() if last else accelerator.no_sync(run.model):
            terms = training_loss(run.model, z, batch.eps, batch.t, y, run.interpolant, targets, alignments)
            accelerator.backward(terms["total"] / len(micro_batches))
        losses.append(torch.stack(list(terms.values())).detach())
    gradient_norm = accelerator.clip_grad_norm_(run.model.parameters(), config.max_grad_norm)
    values = torch.cat([torch.stack(losses).mean(dim=0), gradient_norm.detach().reshape(1)])
    apply_step(run, refused=run.guard.check(step, values))
    run.average.update()


def apply_step(run: Run, refused: Tensor) -> None:
    """The optimizer's step; where `refused` () is 1 it does nothing, moments included."""
    optimizer, scaler = run.optimizer.optimizer, run.accelerator.scaler
    if scaler is None:
        skip_step_if(optimizer, refused)
    else:  # float16's scaler has such a number of its own, for gradients that overflow
        for found in scaler._found_inf_per_device(optimizer).values():
            found.copy_(torch.maximum(found, refused))
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def sample_grid(run: Run, vae: torch.nn.Module) -> Tensor:  # -> (count, R, R, 3) uint8
    """Images of the averaged model, from the same noise and classes at every step of the run."""
    config, count, device = run.config, run.config.sampling_count, run.accelerator.device
    generator = block_generator(config.seed, 0, "grid", device)
    sit = run.ema.config
    x = torch.randn(count, sit.in_channels, sit.latent_size, sit.latent_size, generator=generator, device=device)
    classes = numpy_generator(config.seed, 0, "grid classes").permutation(config.num_classes)
    y = torch.from_numpy(classes).to(device).repeat(-(-count // len(classes)))[:count].sort().values
    velocity = guided_velocity(run.ema, y, config.num_classes, config.sampling_guidance, (0.0, 1.0))
    with run.accelerator.autocast():
        z = sample_ode(velocity, x, config.sampling_num_steps)
    return decode_images(vae, z.float(), run.scale)


def log_samples(run: Run, vae: torch.nn.Module, step: int) -> None:
    """Draw the grid of this step and hand it to `samples/<step>.png` and the tracker."""
    from torchvision.utils import make_grid, save_image

    images = sample_grid(run, vae).permute(0, 3, 1, 2).float() / 255
    grid = make_grid(images, nrow=round(len(images) ** 0.5), padding=2)
    folder = run.config.run_dir / "samples"
    folder.mkdir(exist_ok=True)
    save_image(grid, folder / f"{step:07d}.png")
    for tracker in run.accelerator.trackers:
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({"samples": grid.permute(1, 2, 0)[None].cpu().numpy()}, step=step, **layout)


def memory_gib(device: torch.device) -> float:
    """Largest memory used so far by this process: of the GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def find_resume_checkpoint(config: TrainConfig, data_digest: str) -> Path | None:
    """The checkpoint to go on from, or None for a new run, once it is sure that they fit.

    Raises:
        ValueError: the folder holds a run that is not to be resumed, or one of other settings or data.
    """
    newest = checkpoint.latest_valid_checkpoint(config.run_dir)
    if newest is None:
        return None
    if not config.resume:
        raise ValueError(f"--no-resume: {config.run_dir} holds a run ({newest}); choose another --exp-name")
    state = load.read_state(newest)
    settings = dataclasses.asdict(config).items()
    saved = state["config"]
    changed = {
        name: f"--{name.replace('_', '-')} {saved.get(name)} -> {value}"
        for name, value in settings
        if name not in FREE_ON_RESUME and saved.get(name) != (list(value) if isinstance(value, tuple) else value)
    }
    refused = [change for name, change in changed.items() if name not in CHANGEABLE_ON_RESUME]
    if refused:
        raise ValueError(
            f"expected the settings of the run in {config.run_dir}, found {'; '.join(refused)}; "
            f"give those settings, or another --exp-name for a new run"
        )
    if changed:
        warnings.warn(f"{config.run_dir} goes on with other settings: {'; '.join(changed.values())}", stacklevel=2)
    if state["data_digest"] != data_digest:
        raise ValueError(
            f"{config.data_dir} is not the store that {newest} was trained on; give that one, or another --exp-name"
        )
    return newest


def lock_run_dir(run_dir: Path) -> int:
    """Hold the run's folder for as long as the descriptor is open: two trainers in one would spoil each other's run.

    Raises:
        ValueError: another process holds it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = os.open(run_dir / ".lock", os.O_WRONLY | os.O_CREAT)
    try:
        # A record lock: processes that read data do not inherit it, and cannot outlive a killed trainer with it.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        os.close(lock)
        raise ValueError(f"another process trains in {run_dir}; wait for it, or choose another --exp-name") from error
    except OSError:
        pass  # a file system without locks
    return lock


def load_grid_vae(config: TrainConfig, store: LatentDataset, device: torch.device) -> torch.nn.Module:
    """The decoder of the grids, refused if it is not the VAE that made the store."""
    vae = load_vae(config.vae, device)
    if store.meta["vae_digest"] == UNKNOWN_VAE:
        print(f"{config.data_dir} does not say which VAE made it: taking {config.vae}", flush=True)
    elif vae_digest(vae) != store.meta["vae_digest"]:
        raise ValueError(f"--vae {config.vae} is not the VAE that made {config.data_dir} ({store.meta['vae']})")
    return vae


def collect_metrics(run: Run, step: int, begin: float) -> tuple[dict[str, float], bool]:
    """One row of metrics over the steps since the last one and all processes; and whether the last step was applied, so
    that the weights may be saved as good ones. Here alone the host waits for the device.

    Raises:
        ValueError: too many steps in a row could not be applied, or the last one of the run.
    """
    config, verdict = run.config, run.guard.read()
    seconds = (time.perf_counter() - begin) / (verdict.applied + verdict.skipped)
    said = f"{verdict.skipped} steps up to step {step}, the first of them step {verdict.first_skipped}, "
    said += f"had {', '.join(verdict.terms)} that are not finite" if verdict.terms else "had spikes of the gradient"
    if verdict.longest_run >= config.max_bad_steps or (step == config.max_train_steps and not verdict.healthy):
        run.writer.wait()
        saved = load.latest_checkpoint(config.run_dir)
        raise ValueError(
            f"expected finite losses and gradients, found {verdict.longest_run} steps in a row that were not applied "
            f"(--max-bad-steps {config.max_bad_steps}): {said}; the last good checkpoint is {saved or 'none'}; fix: "
            f"the same command with a lower --learning-rate or --max-grad-norm, or with --mixed-precision no"
        )
    if run.accelerator.is_main_process and verdict.terms:
        warnings.warn(f"{said}; they were not applied", stacklevel=2)
    if run.accelerator.is_main_process and verdict.spikes:
        warnings.warn(
            f"{verdict.spikes} steps up to step {step} had gradient norms up to {verdict.largest:.0f} running medians"
            + (" and were not applied" if config.skip_spikes else " (--skip-spikes leaves such steps out)"),
            stacklevel=2,
        )
    row = {
        "step": step,
        "epoch": step * config.batch_size / run.epoch_size,
        **verdict.means,
        "skipped_steps": verdict.skipped,
        "spikes": verdict.spikes,
        "images_per_second": config.batch_size / seconds,
        "memory_gib": memory_gib(run.accelerator.device),
        "eta_seconds": (config.max_train_steps - step) * seconds,
    }
    return row, verdict.healthy


def log_metrics(run: Run, row: dict[str, float], log: RunLog, progress: tqdm) -> None:
    """Hand a row to the files, the tracker and the terminal."""
    log.write(row)
    run.accelerator.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])
    progress.set_postfix(loss=f"{row['loss']:.4f}", images_per_s=f"{row['images_per_second']:.1f}")
    for name, alignment in run.alignments(row["step"] - 1).items():
        weighted = alignment.weight * row[f"align_{name}"]
        if weighted > 10 * row["velocity"]:
            warnings.warn(
                f"the alignment loss ({weighted:.3g} with its weight) is more than ten times the velocity loss "
                f"({row['velocity']:.3g}): check the latents' scale, or lower the weight of {name!r}",
                stacklevel=2,
            )


def fit(run: Run, start: int, loader: DataLoader, log: RunLog, vae: torch.nn.Module | None, info: dict) -> None:
    """The loop from step `start` to the last: train, log, save, sample; or until it is asked to stop.

    Raises:
        SystemExit: a signal asked for a stop. What is done has been saved.
    """
    config, accelerator = run.config, run.accelerator
    device, main_process = accelerator.device, accelerator.is_main_process
    batches, stop = iter(loader), StopRequest()
    begin, stopped = time.perf_counter(), None
    profile = start_profiler(config) if config.profile and main_process else None
    progress = tqdm(
        range(start, config.max_train_steps), "training", config.max_train_steps,
        initial=start, disable=not main_process, dynamic_ncols=True,
    )  # fmt: skip
    for index in progress:
        micro_batches = [
            {name: values.to(device, non_blocking=True) for name, values in batch.items()}
            for batch in itertools.islice(batches, config.gradient_accumulation_steps)
        ]
        train_step(run, index, micro_batches)
        if profile:
            profile.step()
        step, stopped = index + 1, stop.agreed()

        last = step == config.max_train_steps
        save = last or stopped or step % config.checkpointing_steps == 0
        sample = config.sampling_steps and not stopped and (last or step % config.sampling_steps == 0)
        if not (save or sample or step % config.log_every == 0):
            continue
        row, healthy = collect_metrics(run, step, begin)
        if main_process:
            log_metrics(run, row, log, progress)
        if save and healthy:
            consolidate_state(run.optimizer.optimizer)
        if save and healthy and main_process:
            trained, optimizer = accelerator.unwrap_model(run.model), run.optimizer.optimizer
            state = checkpoint.snapshot(trained, run.ema, optimizer, accelerator.scaler, run.guard.state_dict())
            run.writer.save(step, state, info)
        if sample and main_process:
            log_samples(run, vae, step)
        if save and main_process:
            write_html_report(config)
        accelerator.wait_for_everyone()
        begin = time.perf_counter()
        if stopped:
            break
    if profile:
        profile.stop()
    stop.close()
    release_process_group(run.optimizer.optimizer)
    run.writer.finish()
    if main_process:
        write_html_report(config)  # once more, with the last checkpoint
    if stopped and not last:
        saved = load.latest_checkpoint(config.run_dir)
        accelerator.print(f"stopped by {stopped.name} after step {step}; the same command goes on from {saved}")
        accelerator.end_training()
        sys.exit(exit_code(stopped))


def write_html_report(config: TrainConfig) -> None:
    """`report.html` of the run as it stands. No trouble with it may end training."""
    try:
        write_report([config.run_dir], config.run_dir / "report.html")
    except (ValueError, OSError) as error:
        warnings.warn(f"cannot write {config.run_dir / 'report.html'}: {error}", stacklevel=2)


def start_profiler(config: TrainConfig) -> torch.profiler.profile:
    """Traces --profile steady steps into `profile.json`, which opens in Perfetto and chrome://tracing."""
    profile = torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=5, warmup=3, active=config.profile, repeat=1),
        on_trace_ready=lambda trace: trace.export_chrome_trace(str(config.run_dir / "profile.json")),
    )
    profile.start()
    return profile


def worker_died_error(error: RuntimeError, sampler: StepSampler, config: TrainConfig) -> ValueError:
    """What to tell the user when torch reports that a process that reads data has died."""
    samples = ", ".join(map(str, sampler.step_indices(sampler.last_step_issued)[:4]))
    return ValueError(
        f"a process that reads data died ({' '.join(str(error).split())[:200]}); the last samples handed out to be "
        f"read are those of step {sampler.last_step_issued + 1} ({samples}, ...); look at the memory, and at "
        f"the disk of {config.data_dir}"
    )


def _whole_batch(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The store gathers a batch at once: nothing is left to collate."""
    return batch


def check_scale(run: Run, store: LatentDataset) -> None:
    """Warn if the scaled latents are far from a deviation of 1, which the path to standard normal noise supposes."""
    moments = store.__getitems__(list(range(0, len(store), max(1, len(store) // 256))))["moments"]
    mean, std = moments.chunk(2, dim=1)
    generator = block_generator(run.config.seed, 0, "scale check")
    deviation = run.scale.scale_latent(mean + std * torch.randn(mean.shape, generator=generator)).std().item()
    if not 0.5 < deviation < 2:
        warnings.warn(
            f"expected scaled latents with a deviation near 1, found {deviation:.3g} in {run.config.data_dir}; "
            f"dump them again with --scale auto",
            stacklevel=2,
        )


def describe(run: Run, store: LatentDataset) -> str:
    """What is about to be trained, in a few lines."""
    config, processes = run.config, run.accelerator.num_processes

    def millions(module: torch.nn.Module) -> str:
        return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:.1f}M"

    heads = run.accelerator.unwrap_model(run.model).heads
    micro_batch = config.batch_size // processes // config.gradient_accumulation_steps
    lines = [
        f"run      {config.run_dir}",
        f"data     {config.data_dir}: {len(store):,} images, {store.num_classes} classes, latents {store.latent_shape}",
        f"model    {config.model} {millions(run.sit)} parameters, path {config.path_type}",
        f"batch    {config.batch_size} = {processes} processes x {config.gradient_accumulation_steps} micro-batches "
        f"x {micro_batch}; {len(store) / config.batch_size:.1f} steps an epoch",
        f"device   {run.accelerator.device}, precision {config.mixed_precision}, "
        f"{'compiled' if config.compile else 'not compiled'}",
    ]
    lines += [
        f"align    {term}: block {depth}, head {millions(heads[term])} parameters, "
        f"{method.alignment.objective}, weight {method.alignment.weight / len(method.depths):g}"
        for name, method in run.methods.items()
        for term, depth in method.term_names(name).items()
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    config = cli.parse(TrainConfig, argv, __doc__.splitlines()[0])
    on_gpu = torch.cuda.is_available()
    store = LatentDataset(config.data_dir, images="repa" in parse_align(config.align))
    config = resolve(config, store, on_gpu)
    damaged = store.verify_digests() if config.verify_data else []
    if damaged:
        raise ValueError(f"damaged store {config.data_dir}: {', '.join(damaged)} changed since; dump the images again")
    data_digest = sha256(Path(config.data_dir) / "meta.json")
    newest = find_resume_checkpoint(config, data_digest)
    start = int(newest.name) if newest else 0

    torch.set_float32_matmul_precision("high" if config.allow_tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = config.allow_tf32
    # Buffers are constants. (torch 2.6, which we support, does not know the newer name of this argument.)
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)
    accelerator = Accelerator(
        cpu=not on_gpu,  # else it does not join the processes that torchrun starts on CPUs
        mixed_precision=config.mixed_precision,
        # Micro-batches are counted here: an inherited environment variable must not divide the loss once more.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        log_with=None if config.report_to == "none" else config.report_to,
        project_dir=config.run_dir,
        kwargs_handlers=[ddp, InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=config.timeout))],
    )
    sampler = StepSampler(
        len(store), config.batch_size, config.seed, accelerator.process_index, accelerator.num_processes,
        config.gradient_accumulation_steps, start_step=start, flip=config.random_flip,
    )  # fmt: skip
    loader = DataLoader(
        store, batch_sampler=sampler, collate_fn=_whole_batch, num_workers=config.num_workers, pin_memory=on_gpu,
        worker_init_fn=ignore_signals,
    )  # fmt: skip
    draws_grids = config.sampling_steps > 0 and accelerator.is_main_process
    vae = load_grid_vae(config, store, accelerator.device) if draws_grids else None

    source = load.load_sit(config.init_from) if config.init_from and not newest else None
    sit, ema = (network.to(accelerator.device) for network in build(config, store, source))
    sit.checkpoint_every = config.grad_checkpoint
    interpolant, epoch = Interpolant(config.path_type), len(store) / config.batch_size
    context = AlignmentContext(config, sit, ema, interpolant, accelerator.device, accelerator.autocast, epoch)
    methods = {name: METHODS[name](context) for name in parse_align(config.align)}
    model = AlignedSiT(sit, make_heads(config, methods)).to(accelerator.device)
    if config.compile:
        for module in [*sit.blocks, *model.heads.values()]:
            module.compile(fullgraph=True, dynamic=False)
    optimizer = make_optimizer(config, model.parameters())
    terms = [f"align_{term}" for term in model.heads]
    guard = StepGuard(
        ["loss", "velocity", *terms, "grad_norm"], accelerator.device, config.spike_factor, config.skip_spikes
    )
    if newest:
        guard.load_state_dict(
            checkpoint.load_checkpoint(newest, model, ema, optimizer, accelerator.scaler, verify=False)
        )
        fix_loaded_state(optimizer, config.learning_rate)
        accelerator.print(f"going on from {newest}")
    model = accelerator.prepare(model)
    optimizer = accelerator.prepare_optimizer(optimizer, device_placement=False)  # it is where the model is
    writer = checkpoint.CheckpointWriter(config.run_dir, config.keep_last, config.keep_every)
    average = MovingAverage(ema, sit, config.ema_decay)
    run = Run(
        config, accelerator, model, sit, ema, average, optimizer, guard, writer, interpolant, methods, store.scale,
        len(store),
    )  # fmt: skip

    initial = load.read_state(newest).get("initial") if newest else None
    if source is not None:
        initial = {name: source[1][name] for name in ("source", "read_as", "digest")}
        classes = source[0].config.num_classes
        table = "" if classes == config.num_classes else f"; a new table of classes, {config.num_classes} for {classes}"
        accelerator.print(f"starting from {initial['source']} ({initial['read_as']}{table})")
    settings = {"config": dataclasses.asdict(config), "data_digest": data_digest, "initial": initial}
    settings |= {"processes": accelerator.num_processes}
    settings |= provenance.stamp()
    log = None
    if accelerator.is_main_process:
        lock = lock_run_dir(config.run_dir)
        (config.run_dir / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
        log = RunLog(config.run_dir, start)
        check_scale(run, store)
        print(describe(run, store), flush=True)
    accelerator.init_trackers(
        config.tracker_project,
        {name: str(value) for name, value in settings["config"].items()},
        {"wandb": {"name": config.run_dir.name, "dir": str(config.run_dir)}},
    )
    from_store = {name: store.meta[name] for name in ("vae", "vae_digest", "resolution", "class_names")}
    info = {**settings, **from_store, "scale": store.scale.to_dict(), "path_type": config.path_type}
    try:
        fit(run, start, loader, log, vae, info)
    except RuntimeError as error:  # raised wherever the host happens to be
        if "DataLoader worker" not in str(error):
            raise
        raise worker_died_error(error, sampler, config) from error
    finally:
        run.writer.wait()
        if accelerator.is_main_process:
            os.close(lock)
    accelerator.end_training()


if __name__ == "__main__":
    cli.run(main)
