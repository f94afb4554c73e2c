"""train.py under torchrun, with the trouble that $TROUBLE names: run by test_ranks.py."""

import atexit
import functools
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import train
from runtime import cli
from training import checkpoint, run_dir, settle, setup

trouble, rank = os.environ["TROUBLE"], os.environ["RANK"]
flush, read_state = checkpoint.fsync, settle.read_state


def slow_fsync(path):
    time.sleep(0.5)
    flush(path)


if trouble == "slow disk":
    checkpoint.fsync = slow_fsync
if trouble == "sees no checkpoint" and rank == "1":
    run_dir.latest_valid_checkpoint = lambda directory: None
if trouble == "other weights" and rank == "1":
    settle.read_state = lambda directory: read_state(directory) | {"digests": {"ema.safetensors": "0"}}
if trouble == "a bug" and rank == "1":
    draw = train.step_noise
    train.step_noise = lambda config, step, *others: draw(config, step, *(others if step < 3 else ()))
if trouble.startswith("no memory") and rank in trouble.split():
    compute, calls = train.training_loss, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return compute(*arguments)

    train.training_loss = failing
if trouble == "counts graphs":
    compile, graphs = torch.nn.Module.compile, []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.nn.Module.compile = functools.partialmethod(compile, backend=count)
    setup.compile_if_possible = lambda config, *_: config
    atexit.register(lambda: print(f"rank {rank} compiled {len(graphs)} graphs", flush=True))
cli.run(train.main)
