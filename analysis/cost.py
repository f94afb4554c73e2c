"""Table 4: what each method costs, counted for any size and measured on this machine; and what a whole training takes.

    python -m analysis.cost SiT-XL/2                                  # one GPU
    python -m analysis.cost SiT-S/2 --batch-size 8 --steps 3          # a CPU
    python -m analysis.cost SiT-B/2 SiT-L/2 SiT-XL/2 --no-measure     # counts alone, in seconds

The counts are of the forward pass of one image, as a training step makes it: the SiT, its heads, and what makes the
target. They are MACs, which the paper calls FLOPs; its convention leaves the products inside attention out. Speed and
latency are those of the trainer's own step and network, on random data.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it can be started as a file

from runtime import cli
from runtime.cli import check, flag


@dataclass(frozen=True)
class CostConfig:
    """What to count and to measure."""

    model: tuple[str, ...] = flag(("SiT-XL/2",), "models of the table", group="what", metavar="MODEL", positional=True)
    align: tuple[str, ...] | None = flag(
        None, "methods, as train.py's --align; by default none, and each there is", group="what", metavar="METHOD"
    )
    repa_encoder: str = flag("dinov2-vit-l", "encoder of REPA; Table 4's has 303M parameters", group="what")
    latent_size: int = flag(32, "side of the latents", group="what")
    num_classes: int = flag(1000, "classes", group="what")
    measure: bool = flag(True, "measure speed, memory and latency, beside the counts", group="measurement")
    batch_size: int = flag(32, "images of a step on this machine", group="measurement")
    steps: int = flag(20, "steps that are timed, after 3 that are not", group="measurement")
    output_dir: str = flag("exps/cost", "directory of cost.json, cost.md and plan.md", group="files")

    def __post_init__(self):
        for name in ("latent_size", "num_classes", "batch_size", "steps"):
            check(self, name, getattr(self, name) >= 1, "at least 1")

    @property
    def settings(self) -> dict:
        """Settings of training that all rows of the table share."""
        group = math.gcd(32, self.batch_size)  # for any batch; it costs the same
        return {"repa_encoder": self.repa_encoder, "repa_weights": "random", "dispersive_group": max(2, group)}


if __name__ == "__main__":
    cli.parse_early(CostConfig, __doc__)  # answers --help and refuses wrong flags before torch is imported

import json
import statistics
import tempfile
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from alignment.registry import METHODS, needs_of, parse_align
from alignment.settings import AlignmentSettings
from alignment.terms import Batch
from analysis.timing import WARMUP, random_batch, random_store, seconds_of, time_steps, trainer_step, training_run, wait
from models.aligned import AlignedSiT
from models.sit import SiT, SiTConfig
from reporting.render import environment
from runtime import provenance
from runtime.files import to_json, write_atomically
from training.config import TrainConfig
from training.settle import resolve
from training.setup import build_methods, make_heads

PAPER = {  # Table 4, for SiT-XL/2 on H100s: external and head parameters (M), it/s at batch 256, G, ms
    "": (0, 0, 8.1, 114.46, 18.05),
    "REPA": (303, 8, 5.4, 194.50, 29.03),
    "SRA": (481, 2, 5.1, 197.57, 30.90),
    "VAE-REPA": (0, 18, 7.2, 118.55, 19.20),
}
PLANNED = AlignmentSettings.align  # the method of the plan: train.py's default
PAPER_GPUS = 8  # not stated; a node of them is what such papers use
STEPS, BATCH, IMAGES, SAMPLES = 400_000, 256, 1_281_167, 50_000  # of a run, and of its evaluation
SAMPLING = (250, 0.7)  # evaluations of the network, and the share of them that is guided: REPA's
GPUS = (1, 2, 4, 8, 16, 32, 64)


class ParametersRead(TorchDispatchMode):
    """Collects the parameters that operators read."""

    def __init__(self):
        super().__init__()
        self.found: dict[int, nn.Parameter] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.found |= {id(leaf): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, nn.Parameter)}
        return function(*args, **(kwargs or {}))


def count(config: CostConfig, model: str, align: str) -> dict[str, float]:
    """Parameters, and MACs of the forward pass of one image; nothing is computed.

    Returns:
        "parameters" of the SiT; "external_parameters" that run in training beside it, without gradient;
        "head_parameters"; "macs" in full, and "macs_paper" without the products inside attention.
    """
    side = config.latent_size
    store = SimpleNamespace(meta={"resolution": 8 * side, "vae": "none"}, num_classes=config.num_classes)
    settings = resolve(TrainConfig(data_dir="", model=model, align=align, **config.settings), store, on_gpu=False)
    with torch.device("meta"):
        # The networks.
        sit = SiT(SiTConfig.from_name(model, side, num_classes=config.num_classes))
        machine = SimpleNamespace(device=torch.device("meta"), autocast=nullcontext, num_processes=1)
        methods = build_methods(settings, range(IMAGES), sit, SiT(sit.config), machine)  # of the data, the number alone
        heads = make_heads(settings, methods)

        # The forward pass of one image.
        z, t, y = torch.zeros(1, 4, side, side), torch.zeros(1), torch.zeros(1, dtype=torch.long)
        batch = Batch(z, z, z, t, y, t, torch.zeros(1, 8 * side, 8 * side, 3, dtype=torch.uint8))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            AlignedSiT(sit, heads)(z, t, y)
            with ParametersRead() as external:
                for method in methods.values():
                    method.target(batch)
    macs = {str(operator): flops / 2 for operator, flops in counter.get_flop_counts()["Global"].items()}
    attention = sum(value for name, value in macs.items() if "scaled_dot_product" in name or "bmm" in name)
    return {
        "parameters": sum(parameter.numel() for parameter in sit.parameters()),
        "external_parameters": sum(parameter.numel() for parameter in external.found.values()),
        "head_parameters": sum(parameter.numel() for _, head in heads.values() for parameter in head.parameters()),
        "macs": sum(macs.values()),
        "macs_paper": sum(macs.values()) - attention,
    }


def measure(config: CostConfig, model: str, align: str, directory: Path) -> dict[str, Any]:
    """Speed and memory of the trainer's step at this machine's batch, and latency of the forward pass of one image."""
    size, latent, classes = config.batch_size, config.latent_size, config.num_classes
    data = random_store(directory / "store", latent, count=size, images=True, classes=classes)
    settings = config.settings | {"align": align, "exp_name": f"{model}-{align}".replace("/", "-"), "batch_size": size}
    with training_run(data, directory, model, **settings) as run:
        device = run.accelerator.device
        batch = random_batch(size, latent, device, classes, images="images" in needs_of(align))
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        speed = time_steps(device, trainer_step(run, batch), config.steps, size)

        z, t, y = batch["moments"][:1, :4], torch.full((1,), 0.5, device=device), batch["label"][:1]
        one = Batch(z, z, torch.randn_like(z), t, y, t, batch["image"][:1] if "image" in batch else None)

        @torch.no_grad()
        def forward() -> None:
            with run.accelerator.autocast():
                run.model(z, t, y)
            for method in run.methods.values():
                method.target(one)
            wait(device)

        milliseconds = [1e3 * seconds_of(forward) for _ in range(WARMUP + config.steps)][WARMUP:]
    latency = statistics.median(milliseconds)
    spread = [min(milliseconds), max(milliseconds)]
    return {"batch": size, **speed, "latency_ms": latency, "latency_spread_ms": spread}


def label(align: str) -> str:
    """Names of the methods of a row."""
    return " + ".join(METHODS[name].label for name in parse_align(align))


def change(value: float, baseline: float) -> str:
    return "" if value == baseline else f" ({100 * (value / baseline - 1):+.0f}%)"


def table(rows: list[dict[str, Any]], batch: int) -> str:
    """Markdown: a row for each model and method, changes against the first method of its model."""
    template = environment().get_template("cost.md")
    return template.render(rows=rows, batch=batch, change=change, label=label, paper=PAPER)


def plan(rows: list[dict[str, Any]], machine: str) -> str:
    """Markdown: hours of 400,000 steps and of 50,000 samples for each size with its head, on 1 to 64 GPUs.

    A size that was measured on a GPU stands on its own images/s; the others do the arithmetic of their forward pass at
    the rate of the one that was measured, or else of the paper's SiT-XL/2.
    """
    sizes = [row for row in rows if row["align"] == PLANNED]
    on_gpu = [row for row in sizes if row.get("measured", {}).get("memory_gib") is not None]
    measured = {row["model"]: row["measured"]["images_per_second"] for row in on_gpu}
    paper_rate = PAPER[label(PLANNED)][2]  # it/s
    if measured:
        rate = measured[on_gpu[0]["model"]] * on_gpu[0]["counts"]["macs"]
    else:
        rate = paper_rate * BATCH / PAPER_GPUS * count(CostConfig(), "SiT-XL/2", PLANNED)["macs"]
    lines = []
    for row in sizes:
        counts = row["counts"]
        speed = measured.get(row["model"]) or rate / counts["macs"]
        passes = SAMPLING[0] * (1 + SAMPLING[1])
        sampled = 3 * speed * counts["macs"] / (passes * counts["sit_macs"])
        total = counts["parameters"] + counts["head_parameters"]
        line = {"model": row["model"], "measured": row["model"] in measured, "speed": speed, "sampled": sampled}
        line["states"] = (16 * total + 4 * counts["parameters"]) / 2**30  # weights, gradients, two moments; the EMA
        line["checkpoint"] = (12 * total + 4 * counts["parameters"]) / 1e9
        lines.append(line)
    basis = f"the paper's {paper_rate} it/s at batch {BATCH}, taken to be on {PAPER_GPUS} GPUs"
    basis = f"measured on {machine}" if measured else basis
    about = {"steps": STEPS, "images": STEPS * BATCH, "samples": SAMPLES, "sampling": SAMPLING, "gpus": GPUS}
    return environment().get_template("plan.md").render(lines=lines, basis=basis, **about)


def main(argv: list[str] | None = None) -> None:
    config = cli.parse(CostConfig, argv, __doc__)
    aligns = config.align or ("none", *METHODS)
    for align in aligns:
        parse_align(align)
    machine, about = provenance.machine(), provenance.stamp()
    rows, output = [], Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        for model in config.model:
            alone = count(config, model, "none")["macs"]
            for align in aligns:
                row = {"model": model, "align": align, "counts": count(config, model, align) | {"sit_macs": alone}}
                if config.measure:
                    row["measured"] = measure(config, model, align, Path(directory))
                rows.append(row)
                print(f"{model} {align}: {json.dumps(row['counts'] | row.get('measured', {}))}", flush=True)
                write_atomically(output / "cost.json", to_json(about | {"rows": rows}))
    heading = f"Measured on {machine}, {about['date'][:10]}, torch {about['versions']['torch']}.\n\n"
    text = table(rows, config.batch_size)
    write_atomically(output / "cost.md", heading * config.measure + text)
    print(f"\n{text}\n{output / 'cost.md'}")
    if PLANNED in aligns:
        write_atomically(output / "plan.md", plan(rows, machine))
        print(f"{output / 'plan.md'}")


if __name__ == "__main__":
    cli.run(main)
