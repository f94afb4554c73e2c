"""AdamW, on one rank or sharded over several (ZeRO-1), whose step can be skipped without asking the host.

Sharded, each rank keeps the moments of its shard of the parameters, updates that shard and sends it to the others: the
same numbers, in less memory. Checkpoints hold the whole state either way, so that a run may change over.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from training.config import TrainConfig


LOOKS_NOT = ("mps",)  # types of devices whose fused AdamW takes no notice of found_inf


def make_optimizer(config: TrainConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW with the run's settings, in one fused kernel; with --zero1 sharded over the ranks, if several."""
    settings = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.adam_weight_decay,
        "fused": True,
    }
    if not (config.zero1 and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1):
        return torch.optim.AdamW(parameters, **settings)
    from torch.distributed.optim import ZeroRedundancyOptimizer

    # Not as views of one tensor: where a weight lies in memory changes how its products are rounded.
    return ZeroRedundancyOptimizer(parameters, torch.optim.AdamW, parameters_as_bucket_view=False, **settings)


def learning_rate_at(config: TrainConfig, step: int) -> float:
    """The learning rate of an optimizer step, counted from 0: a function of the step alone.

    Rises over w = `lr_warmup_steps` as (step + 1) / w; then stays, falls to `lr_final` at step `lr_decay_steps` along
    a line or half a cosine, or falls as sqrt(w / (step + 1)).
    """
    peak, warmup, final, done = config.learning_rate, config.lr_warmup_steps, config.lr_final, step + 1
    if done <= warmup:
        return peak * done / warmup
    if config.lr_schedule == "constant":
        return peak
    if config.lr_schedule == "inverse-sqrt":
        return peak * math.sqrt(warmup / done)
    share = min(1.0, (done - warmup) / (config.lr_decay_steps - warmup))
    share = share if config.lr_schedule == "linear" else 0.5 * (1 - math.cos(math.pi * share))
    return peak + (final - peak) * share


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Let the next step use it."""
    for group in (*optimizer.param_groups, *local_optimizer(optimizer).param_groups):
        group["lr"] = learning_rate


def local_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The AdamW that this rank steps: of all parameters, or of its shard."""
    return getattr(optimizer, "optim", optimizer)


def skip_step_if(optimizer: torch.optim.Optimizer, skipped: Tensor) -> None:
    """Let the next step do nothing, moments included, where `skipped` () float32 is 1: AdamW looks on the device."""
    local_optimizer(optimizer).found_inf = skipped
    if skipped.device.type in LOOKS_NOT and skipped.item():
        optimizer.zero_grad()  # without gradients nothing is updated


def gather_state(optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """The whole `state_dict`, on rank 0; None elsewhere, if it is sharded. All ranks call this.

    Tensors are sent as such, one at a time: ZeroRedundancyOptimizer's own way goes through lists of bytes in Python.
    """
    own, rank = local_optimizer(optimizer), torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    if own is optimizer:
        return optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    mine = {index: own.state[p]["step"].item() for index, p in enumerate(parameters) if p in own.state}
    shards: list[dict[int, float]] = [{}] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(shards, mine)
    state: dict[int, dict[str, Tensor]] = {}
    for owner, steps in enumerate(shards):
        for index, step in steps.items():
            if rank not in (0, owner):
                continue
            moments = {"step": torch.tensor(step)}
            for name in ("exp_avg", "exp_avg_sq"):
                moment = own.state[parameters[index]][name] if rank == owner else torch.empty_like(parameters[index])
                if rank < owner:
                    torch.distributed.recv(moment, owner)
                elif rank:
                    torch.distributed.send(moment, 0)
                moments[name] = moment if rank else moment.detach().cpu()
            state[index] = moments
    groups = torch.optim.Optimizer.state_dict(optimizer)["param_groups"]
    return None if rank else {"state": dict(sorted(state.items())), "param_groups": groups}


def fix_loaded_state(optimizer: torch.optim.Optimizer) -> None:
    """Make a state that has just been loaded fit for the next step."""
    for parameter, values in local_optimizer(optimizer).state.items():
        # The fused kernel counts steps where it computes; a sharded state comes with its counts on the host.
        values["step"] = values["step"].to(parameter.device)


def release_process_group(optimizer: torch.optim.Optimizer) -> None:
    """Give up the process group before it is destroyed: held until Python ends, it aborts the process at times."""
    if local_optimizer(optimizer) is not optimizer:
        optimizer.process_group = None
