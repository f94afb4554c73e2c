"""Train a SiT, aligned with the clean VAE latents (VAE-REPA) or not, on a latent store.

    accelerate launch train.py --data-dir data/imagenet256 --model SiT-XL/2

A step is a pure function of (settings, data, step number): every draw comes from generators seeded by the step, for the
whole global batch, of which each rank and micro-batch takes its rows. So a stopped run resumes exactly, and 1, 2 or 8
processes with any accumulation train on the same batches.
"""

from __future__ import annotations

from runtime import cli
from training.config import TrainConfig

if __name__ == "__main__":
    cli.parse_early(TrainConfig, __doc__)  # answers --help and refuses wrong flags before torch is imported

import functools
import itertools
import sys
import time
import warnings
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor
from torchvision.utils import make_grid, save_image

from alignment.registry import needs_of
from alignment.terms import Batch
from diffusion.interpolant import Interpolant, choose_shift, shift_time
from loss import Alignment, training_loss
from models.load import has_null_class, latest_checkpoint
from models.sit import SiTConfig
from reporting.report import write_report
from runtime.distributed import peer_errors
from runtime.loading import wait_for_batches, worker_errors
from runtime.progress import Progress
from runtime.seeding import block_generator, numpy_generator, step_generator
from sampling.config import BLOCK
from sampling.generator import decode_latents, sample_latents
from training.announce import describe, warn_of_scale, warn_of_settings
from training.checkpoint import snapshot
from training.ema import save_snapshots
from training.metrics import collect_metrics, log_metrics
from training.optimizer import gather_state, learning_rate_at, release_process_group, set_learning_rate, skip_step_if
from training.out_of_memory import draw_what_fits, saved_if_out_of_memory
from training.plan import print_plan
from training.preemption import StopRequest, exit_code
from training.setup import Run, setup


def step_noise(config: TrainConfig, step: int, sit: SiTConfig, device: torch.device) -> dict[str, Tensor]:
    """The random numbers of a step, for the whole global batch B, by purpose.

    "posterior" and "noise" (B, C, H, W) normal; "time" (B,) in [0, 1], uniform unless --time-distribution or
    --time-shift say otherwise; "dropout" (B,) bool, the labels to drop; and where a method needs it "t_offset" (B,)
    uniform. Each has a stream of its own: no method changes another's draws.
    """
    B, latent_shape = config.batch_size, (sit.in_channels, sit.latent_size, sit.latent_size)
    normal, uniform = functools.partial(torch.randn, B, *latent_shape), functools.partial(torch.rand, B)
    logit_normal = config.time_distribution == "logit-normal"
    time = functools.partial(torch.randn, B) if logit_normal else uniform
    kinds = {"posterior": normal, "noise": normal, "time": time, "dropout": uniform}
    kinds |= {"t_offset": uniform} if "t_offset" in needs_of(config.align) else {}
    draws = {
        purpose: kind(
            generator=step_generator(config.seed, step, _STREAMS.get(purpose, purpose), device), device=device
        )
        for purpose, kind in kinds.items()
    }
    t = draws["time"]
    t = Interpolant(config.path_type).time_at(config.time_mean + config.time_std * t) if logit_normal else t
    t = shift_time(t, choose_shift(config.time_shift, latent_shape))
    return draws | {"time": t, "dropout": draws["dropout"] < config.label_dropout}


_STREAMS = {"t_offset": "lag"}  # a stream keeps the name that it was first drawn by: runs resume with the same numbers


@torch.no_grad()
def make_targets(run: Run, batch: Batch, alignments: dict[str, Alignment]) -> dict[str, Tensor]:
    """The target (N, T, D) of each term that has a weight; the terms of one method share it."""
    targets = {}
    for name, method in run.methods.items():
        terms = [term for term in method.term_names(name) if alignments[term].weight != 0]
        targets |= dict.fromkeys(terms, method.target(batch)) if terms else {}
    return targets


def train_step(run: Run, step: int, micro_batches: list[dict[str, Tensor]]) -> None:
    """Optimizer step number `step`, from 0, unless the guard skips it. The guard keeps what was measured, unread."""
    config, accelerator = run.config, run.accelerator
    draws = step_noise(config, step, run.sit.config, accelerator.device)
    alignments, losses = run.alignments(step), []
    for index, data in enumerate(micro_batches):
        # This rank's rows of the global batch.
        first = (index * accelerator.num_processes + accelerator.process_index) * len(data["label"])
        own = {purpose: numbers[first : first + len(data["label"])] for purpose, numbers in draws.items()}
        mean, std = data["moments"].chunk(2, dim=1)
        z, mean = (run.scale.scale_latent(f) for f in (mean + std * own["posterior"], mean))
        y = torch.where(own["dropout"], config.num_classes, data["label"])
        batch = Batch(z, mean, own["noise"], own["time"], y, own.get("t_offset"), data.get("image"))
        targets = make_targets(run, batch, alignments)
        # Forward and backward (Eq. 8); ranks exchange gradients after the last micro-batch.
        last = index == len(micro_batches) - 1
        with nullcontext() if last else accelerator.no_sync(run.model):
            terms = training_loss(run.model, z, batch.eps, batch.t, y, run.interpolant, targets, alignments)
            accelerator.backward(terms["total"] / len(micro_batches))
        losses.append(torch.stack(list(terms.values())).detach())
    # Optimizer and EMA.
    gradient_norm = accelerator.clip_grad_norm_(run.model.parameters(), config.max_grad_norm)
    values = torch.cat([torch.stack(losses).mean(dim=0), gradient_norm.detach().reshape(1)])
    set_learning_rate(run.optimizer.optimizer, learning_rate_at(config, step))
    apply_step(run, skipped=run.guard.check(step, values))
    run.ema_updater.update(step)


def apply_step(run: Run, skipped: Tensor) -> None:
    """The optimizer's step; where `skipped` () is 1 it does nothing, moments included."""
    optimizer, scaler = run.optimizer.optimizer, run.accelerator.scaler
    if scaler is None:
        skip_step_if(optimizer, skipped)
    else:  # float16's scaler has such a number of its own, for gradients that overflow
        for found in scaler._found_inf_per_device(optimizer).values():
            found.copy_(torch.maximum(found, skipped))
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)


def sample_grid(run: Run, images: int) -> Tensor:  # -> (images, R, R, 3) uint8
    """The first images of a grid by the EMA, from the same noise and classes at every step of the run."""
    config, count, device = run.config, run.config.sampling_count, run.accelerator.device
    generator = block_generator(config.seed, 0, "grid", device)
    sit = run.ema.config
    x = torch.randn(count, sit.in_channels, sit.latent_size, sit.latent_size, generator=generator, device=device)
    present = np.unique(run.store.labels)  # the model may know more classes
    classes = present[numpy_generator(config.seed, 0, "grid classes").permutation(len(present))]
    y = torch.from_numpy(classes).to(device).repeat(-(-count // len(classes)))[:count].sort().values
    x, y = x[:images], y[:images]
    # Without dropped labels the null class was never trained: nothing to guide with.
    guidance = config.sampling_guidance if has_null_class(run.state) else 1.0
    with run.accelerator.autocast():
        solver = "ode-euler", config.sampling_num_steps, run.interpolant
        shift = choose_shift(config.time_shift, x.shape[1:])
        z = sample_latents(run.ema, y, lambda: x, *solver, guidance, time_shift=shift)
    return decode_latents(run.vae, z, run.scale, block=BLOCK if images == count else images)[0]


def log_samples(run: Run, step: int) -> None:
    """Draw the grid of this step and hand it to `samples/<step>.png` and the tracker. A full disk is a warning."""
    images = draw_what_fits(run, functools.partial(sample_grid, run))
    if images is None:
        return
    images = images.permute(0, 3, 1, 2).float() / 255
    grid = make_grid(images, nrow=round(len(images) ** 0.5), padding=2)
    directory = run.config.run_dir / "samples"
    try:
        directory.mkdir(exist_ok=True)
        save_image(grid, directory / f"{step:07d}.png")
    except OSError as error:
        warnings.warn(f"cannot write the grid of step {step} to {directory}: {error}", stacklevel=2)
    for tracker in run.accelerator.trackers:
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({"samples": grid.permute(1, 2, 0)[None].cpu().numpy()}, step=step, **layout)


def save_checkpoint(run: Run, step: int) -> None:
    """Copy all that a checkpoint holds to the host on rank 0, and begin to write it. All ranks call this."""
    accelerator, state = run.accelerator, gather_state(run.optimizer.optimizer)
    if not accelerator.is_main_process:
        run.writer.follow()
        return
    trained = accelerator.unwrap_model(run.model)
    content = snapshot(trained, run.emas, state, accelerator.scaler, run.guard.state_dict())
    run.writer.save(step, content, run.state)


def due(step: int, every: int, first: int = 1) -> bool:
    """Whether something is due after a step: every so many steps, and before at 1, 2, 5, 10, 20, 50, ... x `first`."""
    if step >= every:
        return step % every == 0
    return step % first == 0 and str(step // first).rstrip("0") in ("1", "2", "5")


def fit(run: Run) -> None:
    """The loop to the last step: train, log, save, sample; or until it is asked to stop.

    Raises:
        SystemExit: a signal asked for a stop. What is done has been saved.
    """
    config, accelerator = run.config, run.accelerator
    device, rank0 = accelerator.device, accelerator.is_main_process
    stop = StopRequest()
    batches = wait_for_batches(run.loader, lambda: stop.received)
    begin, stopped, saved = time.perf_counter(), None, time.monotonic()
    profile = start_profiler(config) if config.profile and rank0 else None
    steps = range(run.start, config.max_train_steps)
    progress = Progress(steps, "training", config.max_train_steps, initial=run.start, disable=not rank0)
    for index in progress:
        # One step.
        micro_batches = [
            {name: values.to(device, non_blocking=True) for name, values in batch.items()}
            for batch in itertools.islice(batches, run.accumulation)
        ]
        if len(micro_batches) < run.accumulation:
            accelerator.print(f"stopped by {stop.received.name} while waiting for data; the same command resumes")
            sys.exit(exit_code(stop.received))
        with saved_if_out_of_memory(run, index):
            train_step(run, index, micro_batches)
        if profile:
            profile.step()
        # Rank 0's clock alone says when a checkpoint is due; all ranks hear of it a step later.
        late = rank0 and time.monotonic() - saved > 60 * config.checkpoint_minutes
        saved = time.monotonic() if late else saved
        step, (stopped, late) = index + 1, stop.agreed(late)

        # What is due after it?
        last = step == config.max_train_steps
        save = last or stopped or late or step % config.checkpointing_steps == 0
        sample = config.sampling_steps and not stopped and (last or due(step, config.sampling_steps, first=100))
        keep_ema = config.ema_power and step % config.ema_snapshot_steps == 0
        if not (save or sample or keep_ema or due(step, config.log_every)):
            continue

        # Log, save, sample. Only weights whose last step was applied are saved.
        row, healthy = collect_metrics(run, step, begin)
        if rank0:
            log_metrics(run, row, progress)
        if save and healthy:
            save_checkpoint(run, step)
            saved = time.monotonic()
        if keep_ema and rank0:
            save_snapshots(config.run_dir, step, run.emas)
        if sample and rank0:
            log_samples(run, step)
        if save and rank0:
            write_html_report(config)
        accelerator.wait_for_everyone()
        begin = time.perf_counter()
        if stopped:
            break

    # Every checkpoint is on the disk before the processes part, and before a signal ends one again.
    if profile:
        profile.stop()
    run.writer.finish()
    stop.close()
    release_process_group(run.optimizer.optimizer)
    if rank0:
        write_html_report(config)  # once more, with the last checkpoint
    if stopped and not last:
        saved = latest_checkpoint(config.run_dir)
        accelerator.print(f"stopped by {stopped.name} after step {step}; the same command resumes from {saved}")
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


@peer_errors()
def main(argv: list[str] | None = None) -> None:
    config, given = cli.parse_given(TrainConfig, argv, __doc__)
    if config.dry_run:
        return print_plan(config, given)
    run = setup(config, given)
    if run.accelerator.is_main_process:
        warn_of_settings(run, given)
        warn_of_scale(run)
        print(describe(run), flush=True)
    try:
        with worker_errors(run.reading):
            fit(run)
    finally:
        run.close()
    run.accelerator.end_training()


if __name__ == "__main__":
    cli.run(main)
