"""train.py, with what goes into the loss written to $SPY_DIR: run by test_train.py, alone or under torchrun."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import train
from runtime import cli

calls = []
compute = train.training_loss


def spy(model, z, eps, t, y, interpolant, targets, alignments):
    file = Path(os.environ["SPY_DIR"]) / f"rank{os.environ.get('RANK', 0)}-call{len(calls)}.pt"
    torch.save({"z": z, "eps": eps, "t": t, "y": y, "target": targets["vae"]}, file)
    calls.append(file)
    return compute(model, z, eps, t, y, interpolant, targets, alignments)


train.training_loss = spy
cli.run(train.main)
