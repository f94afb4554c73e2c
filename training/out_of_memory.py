"""A GPU whose memory runs out, while other programs use it, say: a run ends in one line and loses nothing."""

from __future__ import annotations

import contextlib
import datetime
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from models.load import latest_checkpoint
from training.checkpoint import NOT_WRITTEN, snapshot, write_checkpoint
from training.optimizer import local_optimizer

if TYPE_CHECKING:
    from training.setup import Run


@contextlib.contextmanager
def saved_if_out_of_memory(run: Run, step: int) -> Iterator[None]:
    """Around step number `step`, from 0: if there is no memory for it, the weights before it are saved.

    Raises:
        ValueError: there was none.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        with contextlib.suppress(*NOT_WRITTEN):  # a full disk; a rank that is gone
            save_alone(run, step)
        saved, reason = latest_checkpoint(run.config.run_dir), str(error).partition(". ")[0]
        raise ValueError(
            f"expected memory for step {step + 1}, found too little ({reason}); the last checkpoint is "
            f"{saved or 'none'}; end other programs on the GPU, or give a smaller --micro-batch: the command resumes"
        ) from None


def save_alone(run: Run, step: int) -> None:
    """Write the checkpoint after `step` steps on whichever rank has trouble first, without the others, which wait for
    gradients. Sharded moments cannot be: then the checkpoint before must do."""
    run.writer.wait()
    saved, optimizer = latest_checkpoint(run.config.run_dir), run.optimizer.optimizer
    done = step == run.start or (saved and int(saved.name) == step)
    if done or run.guard.run.item() or local_optimizer(optimizer) is not optimizer:
        return
    store = dist.distributed_c10d._get_default_store() if dist.is_initialized() else None
    if store and store.add("out of memory", 1) > 1:  # another rank writes: were this one to leave, it would be ended
        store.wait(["saved"], datetime.timedelta(seconds=run.config.timeout))
        return
    model, scaler = run.accelerator.unwrap_model(run.model), run.accelerator.scaler
    content = snapshot(model, run.emas, optimizer.state_dict(), scaler, run.guard.state_dict())
    write_checkpoint(run.config.run_dir, step, content, run.state)
    if store:
        store.set("saved", "")


def draw_what_fits(run: Run, draw: Callable[[int], Tensor]) -> Tensor | None:
    """A grid, drawn by `draw` with `run.grid_images` images: with half as many as often as need be, then and from then
    on. None if there is no memory for one. The memory is given back to the training."""
    images, before = None, run.grid_images
    while images is None and run.grid_images:
        with contextlib.suppress(torch.OutOfMemoryError):
            images = draw(run.grid_images)
        run.grid_images //= 1 if images is not None else 2
        torch.cuda.empty_cache()
    if run.grid_images < before:
        warnings.warn(f"no memory for a grid of {before} images: {run.grid_images} from now on", stacklevel=2)
    return images
