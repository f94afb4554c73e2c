"""How long saving a checkpoint holds training up, beside copying its tensors to host memory and beside writing it."""

from __future__ import annotations

import copy
import statistics
import tempfile
import time

import torch

from benchmarks.record import record
from models.aligned import AlignedSiT
from models.projector import Projector
from models.sit import SiT, SiTConfig
from models.vae import LatentScale
from training import checkpoint

INFO = {
    "scale": LatentScale((1.0,), (0.0,)).to_dict(), "vae": "", "vae_digest": "", "resolution": 256, "class_names": [],
    "path_type": "linear",
}  # fmt: skip


def main() -> None:
    sit = SiT(SiTConfig.from_name("SiT-B/2"))
    model = AlignedSiT(sit, {"vae": (2, Projector(sit.config.hidden_size, sit.config.patch_dim))})
    ema = copy.deepcopy(sit)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    pauses, copies, writes = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        writer = checkpoint.CheckpointWriter(folder, 1, 0)
        for step in range(1, 6):
            begin = time.perf_counter()
            tensors = [model.state_dict(), ema.state_dict(), optimizer.state_dict()["state"]]
            kept = checkpoint.tree_map_only(torch.Tensor, lambda tensor: tensor.clone(), tensors)
            copies.append(time.perf_counter() - begin)
            del kept
            begin = time.perf_counter()
            writer.save(step, checkpoint.snapshot(model, ema, optimizer), INFO)
            pauses.append(time.perf_counter() - begin)
            writer.finish()
            writes.append(time.perf_counter() - begin)
    pause, plain = statistics.median(pauses), statistics.median(copies)
    record(
        "checkpoint/pause", pause, "s", plain, pause / plain, baseline_is="copying the same tensors",
        written_after=statistics.median(writes), spread=[min(pauses), max(pauses)], model="SiT-B/2 with its head",
        bar="<= 1.1 x",
    )  # fmt: skip


if __name__ == "__main__":
    main()
