"""What training needs of a device's memory, counted before the first step; and the micro-batch that fits.

Activations are counted in a forward pass of the model on tensors without content: what autograd keeps for the backward
pass, each storage once, the weights left out. Two sizes of batch tell what grows with it from what does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from alignment.registry import needs_of
from alignment.terms import AlignmentTerms
from models.aligned import AlignedSiT
from models.sit import SiT, SiTConfig
from runtime.cli import check
from runtime.distributed import gather_objects
from training.config import TrainConfig
from training.ema import decays
from training.optimizer import local_optimizer

GIB = 2**30
MARGIN = 0.1  # of the memory is left free: for the kernels' workspaces, and what is lost between blocks of memory
GRID_MAPS = 3 * 256  # channels at full resolution that the SD-VAE's decoder holds at once, in float32
GRID_BLOCK = 16  # images that are decoded at once
DECIDES = (
    "batch_size gradient_accumulation_steps micro_batch mixed_precision grad_checkpoint zero1 sampling_count".split()
)
Heads = Callable[[], dict[str, tuple[int | tuple[int, ...], nn.Module]]]


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that one process holds, by what they are for."""

    weights: int  # of SiT and heads
    gradients: int
    moments: int  # of AdamW; with --zero1 the largest share of a process
    emas: int
    batch: int  # data and draws of a whole step
    grid: int  # of images that are drawn in training, when no activations are held
    saving: int  # with --zero1, the moments of a parameter on their way
    per_image: int  # activations, for each image of a micro-batch
    fixed: int  # activations that do not grow with it: the weights in a lower precision
    working: int  # of the backward pass for each image: gradients, and a block that is run again

    @property
    def states(self) -> int:
        return self.weights + self.gradients + self.moments + self.emas

    def activations(self, images: int) -> int:
        """Of a micro-batch, as they are kept for the backward pass."""
        return self.fixed + images * self.per_image

    def needed(self, images: int) -> int:
        """At the most, in a step with micro-batches of so many images or between two steps."""
        step = self.activations(images) + images * self.working
        return self.states + self.batch + max(step, self.grid, self.saving)

    def largest(self, share: int, limit: float, group: int = 1) -> int:
        """The largest divisor of `share`, of whole groups, with which a step fits in `limit` bytes; 0 if none does."""
        whole = [m for m in range(group, share + 1, group) if share % m == 0]
        return max((m for m in whole if self.needed(m) <= (1 - MARGIN) * limit), default=0)


def count_memory(
    config: TrainConfig, sit: SiTConfig, heads: Heads, accelerator: Accelerator, guiding: Iterable[str]
) -> TrainingMemory:
    """What a step of this run needs.

    Args:
        config: with every None decided.
        sit: of the backbone. heads: makes the heads anew, as `AlignedSiT` takes them.
        guiding: the terms whose heads have EMAs, too.
        accelerator: of the processes that train. On a GPU autocast leaves the normalisations in float32.
    """
    processes = accelerator.num_processes
    with FakeTensorMode():
        model = AlignedSiT(SiT(sit), heads())
        low = config.mixed_precision != "no"
        if low and accelerator.device.type == "cuda":
            for module in model.modules():
                if isinstance(module, nn.LayerNorm):
                    module.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(),))
        one, two = (count_activations(model, low, images) for images in (1, 2))
        block = (two - one) // sit.depth
        if config.grad_checkpoint:
            model.sit.checkpoint_every = config.grad_checkpoint
            one, two = (count_activations(model, low, images) for images in (1, 2))
        parameters, averaged = list(model.parameters()), [*model.sit.parameters(), *model.sit.buffers()]
        averaged += [parameter for term in guiding for parameter in model.heads[term].parameters()]
        weights, networks = size(parameters), len(decays(config))
        share = config.batch_size // processes
        latent = 4 * sit.in_channels * sit.latent_size**2
        images = 3 * config.resolution**2 if "images" in needs_of(config.align) else 0
        grid = GRID_BLOCK * GRID_MAPS * 4 * config.resolution**2 + 2 * config.sampling_count * block
        return TrainingMemory(
            weights=size([*parameters, *model.buffers()]),
            gradients=weights,
            moments=moments(parameters, processes if config.zero1 else 1),
            emas=networks * size(averaged),
            batch=2 * latent * config.batch_size + share * (2 * latent + images),
            grid=grid if config.sampling_steps else 0,
            saving=2 * max(size([parameter]) for parameter in parameters) if config.zero1 else 0,
            per_image=two - one,
            fixed=max(0, 2 * one - two),
            working=2 * block,
        )


def count_activations(model: AlignedSiT, low: bool, images: int) -> int:
    """Bytes that a forward pass of a model without content keeps; `low`: in 16 bits (bfloat16 and float16 alike)."""
    sit, kept = model.sit.config, {}
    weights = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # held, so that no other one gets its place
        return tensor

    x = torch.empty(images, sit.in_channels, sit.latent_size, sit.latent_size)
    t, y = torch.empty(images), torch.empty(images, dtype=torch.int64)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=low):
        model(x, t, y)
    return sum(storage.nbytes() for storage in kept.values())


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def moments(parameters: list[nn.Parameter], shares: int) -> int:
    """Bytes of AdamW's two moments and its count for each parameter; of the largest share, dealt out as
    ZeroRedundancyOptimizer does: from the largest parameter on, each to the process that has least."""
    numbers, held = [0] * shares, [0] * shares
    for parameter in sorted(parameters, key=lambda parameter: parameter.numel(), reverse=True):
        least = numbers.index(min(numbers))
        numbers[least] += parameter.numel()
        held[least] += 2 * size([parameter]) + 4
    return max(held)


def memory_limit(device: torch.device, counted: int) -> int | None:
    """Bytes that training may have: what is free, and the `counted` ones of its own that are held already. None where
    nothing is known of it: on a CPU."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device) + counted


def held_bytes(model: AlignedSiT, emas: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer) -> int:
    """Of the states that `TrainingMemory` counts, those that are held already."""
    held = [tensor for network in (model, *emas.values()) for tensor in (*network.parameters(), *network.buffers())]
    return size(held) + size(v for values in local_optimizer(optimizer).state.values() for v in values.values())


def choose_micro_batch(
    config: TrainConfig,
    accelerator: Accelerator,
    count: Callable[[], TrainingMemory],
    held: int,
    found: dict | None,
    methods: Mapping[str, AlignmentTerms],
) -> dict[str, Any]:
    """The "images" of a micro-batch and how many "micro_batches" a step has, the same on all ranks; with what they were
    chosen for, to be recorded.

    Args:
        count: counts the memory; called where the micro-batch is to be found.
        held: bytes of it that are held already.
        found: the record of a run that is resumed: it holds for the same settings and machine. Older code recorded
            nothing, and divided nothing.
        methods: of the alignment; images that one takes together stay so.

    Raises:
        ValueError: the flag's number does not divide the batch or is not made of whole groups, or not one group fits.
    """
    device, processes, least = accelerator.device, accelerator.num_processes, config.gradient_accumulation_steps
    images = share = config.batch_size // (processes * least)
    settings = {name: getattr(config, name) for name in DECIDES} | {"processes": processes}
    group = math.lcm(*(terms.group for terms in methods.values()))
    settings |= {"emas": len(decays(config)), "group": group}
    settings["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    limit = memory_limit(device, held)
    if config.micro_batch != "auto":
        images = int(config.micro_batch)
        divisor = f"a divisor of the {share} images that processes and accumulation steps leave of --batch-size"
        check(config, "micro_batch", share >= images and share % images == 0, divisor)
        check(
            config, "micro_batch", images % group == 0, f"a multiple of the {group} images that --align takes together"
        )
    elif limit is not None and share and found != {}:
        same = found is not None and found.items() >= settings.items()
        memory = None if same else count()
        images = min(gather_objects(found["images"] if same else memory.largest(share, limit, group)))
        if not images:
            needed = f"{memory.needed(group) / (1 - MARGIN) / GIB:.1f} GiB" if memory else "more"
            smallest = "one image" if group == 1 else f"{group} images"
            raise ValueError(
                f"expected {needed} of memory for steps with {smallest} at a time, found {limit / GIB:.1f} GiB; give "
                f"--grad-checkpoint 1, --zero1 (with several GPUs) or a smaller --model"
            )
    return {"images": images, "micro_batches": least * (share // images if share else 1), **settings}
