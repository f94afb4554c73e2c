"""Rows of metrics: gathered from the device, handed to the log, the tracker and the terminal."""

from __future__ import annotations

import resource
import sys
import time
import warnings
from typing import TYPE_CHECKING

import torch

from models.load import latest_checkpoint
from runtime.progress import Progress
from training.optimizer import learning_rate_at

if TYPE_CHECKING:  # setup imports this module
    from training.setup import Run


def collect_metrics(run: Run, step: int, begin: float) -> tuple[dict[str, float], bool]:
    """One row of metrics over the steps since the last row and over all ranks; and whether the last step was applied,
    so that the weights may be saved as good ones. Here alone the host waits for the device.

    Args:
        step: optimizer steps done. begin: `time.perf_counter()` at the end of the last row.

    Raises:
        ValueError: too many steps in a row could not be applied, or the last one of the run.
    """
    config, stats = run.config, run.guard.read()
    seconds = (time.perf_counter() - begin) / (stats.applied + stats.skipped)
    skipped = f"{stats.skipped} steps up to step {step}, the first of them step {stats.first_skipped}, "
    skipped += f"had {', '.join(stats.terms)} that are not finite" if stats.terms else "had spikes of the gradient norm"
    if stats.longest_run >= config.max_bad_steps or (step == config.max_train_steps and not stats.healthy):
        run.writer.wait()
        saved = latest_checkpoint(config.run_dir)
        raise ValueError(
            f"expected finite losses and gradients, found {stats.longest_run} steps in a row that were not applied "
            f"(--max-bad-steps {config.max_bad_steps}): {skipped}; the last good checkpoint is {saved or 'none'}; fix: "
            f"the same command with a lower --learning-rate or --max-grad-norm, or with --mixed-precision no"
        )
    if run.accelerator.is_main_process and stats.terms:
        warnings.warn(f"{skipped}; they were not applied", stacklevel=2)
    if run.accelerator.is_main_process and stats.spikes:
        warnings.warn(
            f"{stats.spikes} steps up to step {step} had gradient norms up to {stats.largest:.0f} running medians"
            + (" and were not applied" if config.skip_spikes else " (--skip-spikes leaves such steps out)"),
            stacklevel=2,
        )
    row = {
        "step": step,
        "epoch": step * config.batch_size / len(run.store),
        **stats.means,
        "learning_rate": learning_rate_at(config, step - 1),
        "skipped_steps": stats.skipped,
        "spikes": stats.spikes,
        "images_per_second": config.batch_size / seconds,
        "memory_gib": _memory_gib(run.accelerator.device),
        "eta_seconds": (config.max_train_steps - step) * seconds,
    }
    return row, stats.healthy


def log_metrics(run: Run, row: dict[str, float], progress: Progress) -> None:
    """Hand a row to the files, the tracker and the terminal."""
    run.log.write(row)
    run.accelerator.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])
    progress.set_postfix(loss=f"{row['loss']:.4f}", images_per_s=f"{row['images_per_second']:.1f}", refresh=False)
    for name, alignment in run.alignments(row["step"] - 1).items():
        weighted = alignment.weight * row[f"align_{name}"]
        if weighted > 10 * row["velocity"]:
            warnings.warn(
                f"the alignment loss ({weighted:.3g} with its weight) is more than ten times the velocity loss "
                f"({row['velocity']:.3g}): check the latents' scale, or lower the weight of {name!r}",
                stacklevel=2,
            )


def _memory_gib(device: torch.device) -> float:
    """Largest memory used so far by this process: of the GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10  # of macOS bytes, of Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
