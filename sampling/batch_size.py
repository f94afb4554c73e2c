"""How many images a process draws at once."""

from __future__ import annotations

import dataclasses

import torch

from sampling.config import BLOCK, CPU_BATCH, LARGEST_BATCH, SampleConfig
from sampling.generator import SampleGenerator


def round_up_to_block(images: int) -> int:
    """As many images or a few more: every batch is whole, the last one too, because rounding depends on its size."""
    return -(-images // BLOCK) * BLOCK


def configured_batch_size(config: SampleConfig, device: torch.device) -> int | None:
    """Images per batch as the flag says; `None` if it is "auto" on a GPU, to be found by `find_batch_size`."""
    auto = config.per_proc_batch_size == "auto"
    if auto and device.type == "cuda":
        return None
    return min(CPU_BATCH if auto else int(config.per_proc_batch_size), round_up_to_block(config.num_samples))


def find_batch_size(generator: SampleGenerator, processes: int) -> int:
    """The largest batch of whole blocks that fits on every GPU, up to LARGEST_BATCH and a share of the images.

    Raises:
        ValueError: there is no memory for a single block.
    """
    share = -(-generator.settings["num_samples"] // processes)
    sizes = range(min(LARGEST_BATCH, round_up_to_block(share)), 0, -BLOCK)
    found = next((size for size in sizes if fits_on_gpu(generator, size)), None)
    if found is None:
        raise ValueError(
            f"--per-proc-batch-size auto: expected memory for {BLOCK} images at once, found too little on the GPU; "
            f"free it from other programs, or give --device cpu"
        )
    smallest = torch.tensor(found)
    if processes > 1:
        torch.distributed.all_reduce(smallest, torch.distributed.ReduceOp.MIN)
    return smallest.item()


def fits_on_gpu(generator: SampleGenerator, size: int) -> bool:
    """Whether a guided evaluation of the network and the decoder leave a tenth of the memory free."""
    tried = {"batch_size": size, "num_steps": 1, "last_step": "mean", "atol": 1e9, "guidance_interval": (0.0, 1.0)}
    generator = dataclasses.replace(generator, settings=generator.settings | tried, stream=None)
    torch.cuda.empty_cache()
    try:
        with torch.compiler.set_stance("force_eager"):  # shapes that are only tried must not be compiled
            generator.decode(generator.latents(0))
        free, total = torch.cuda.mem_get_info(generator.device)  # what was used is kept until `empty_cache` below
        return free >= 0.1 * total
    except torch.cuda.OutOfMemoryError:
        return False
    finally:
        torch.cuda.empty_cache()
