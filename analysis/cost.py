"""Table 4: what each method costs, counted for any size and measured on this machine; and what a whole training takes.

    python -m analysis.cost --model SiT-XL/2                                  # one GPU
    python -m analysis.cost --model SiT-S/2 --batch-size 8 --steps 3          # a CPU
    python -m analysis.cost --model SiT-B/2 SiT-L/2 SiT-XL/2 --no-measure     # counts alone, in seconds

The counts are of the forward pass of one image, as a training step makes it: the SiT, its heads, and what makes the
target. They are multiply-adds, which the paper calls FLOPs; its convention leaves the products inside attention out.
Speed and latency are those of the trainer's own step and network, on random data.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from runtime import cli
from runtime.cli import flag

if TYPE_CHECKING:
    import torch

    from training.config import TrainConfig

PAPER = {  # Table 4, for SiT-XL/2 on H100s: external and head parameters (M), it/s at batch 256, G, ms
    "none": (0, 0, 8.1, 114.46, 18.05),
    "repa": (303, 8, 5.4, 194.50, 29.03),
    "sra": (481, 2, 5.1, 197.57, 30.90),
    "vae": (0, 18, 7.2, 118.55, 19.20),
}
NAMES = {"none": "SiT", "repa": "+ REPA", "sra": "+ SRA", "vae": "+ VAE-REPA"}
PAPER_GPUS = 8  # not stated; a node of them is what such papers use
STEPS, BATCH, IMAGES, SAMPLES = 400_000, 256, 1_281_167, 50_000  # of a run, and of its judgement
SAMPLING = (250, 0.7)  # evaluations, and the share of them that is guided: REPA's
GPUS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class CostConfig:
    model: tuple[str, ...] = flag(("SiT-XL/2",), "models of the table", group="what", metavar="MODEL")
    align: tuple[str, ...] = flag(
        ("none", "repa", "sra", "vae"), "methods, as train.py's --align", group="what", metavar="METHOD"
    )
    repa_encoder: str = flag("dinov2-vit-l", "encoder of REPA; Table 4's has 303M parameters", group="what")
    latent_size: int = flag(32, "side of the latents", group="what")
    num_classes: int = flag(1000, "classes", group="what")
    measure: bool = flag(True, "measure speed, memory and latency, beside the counts", group="measurement")
    batch_size: int = flag(32, "images of a step on this machine", group="measurement")
    steps: int = flag(20, "steps that are timed, after 3 that are not", group="measurement")
    output_dir: str = flag("exps/cost", "folder of cost.json, cost.md and plan.md", group="files")

    def __post_init__(self):
        for name in ("latent_size", "num_classes", "batch_size", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')}: expected at least 1, found {getattr(self, name)}")


def resolved(config: CostConfig, model: str, align: str) -> TrainConfig:
    """The trainer's settings of a row of the table."""
    from training.config import TrainConfig, resolve

    store = SimpleNamespace(
        meta={"resolution": 8 * config.latent_size, "vae": "none"}, num_classes=config.num_classes, has_flips=False
    )
    settings = TrainConfig(
        data_dir="", model=model, align=align, repa_encoder=config.repa_encoder, repa_weights="random"
    )  # fmt: skip
    return resolve(settings, store, on_gpu=False)


def count(config: CostConfig, model: str, align: str) -> dict[str, float]:
    """Parameters, and multiply-adds of the forward pass of one image; nothing is computed.

    Returns:
        "parameters" of the SiT; "external_parameters" that run in training beside it, without gradient;
        "head_parameters"; "multiply_adds" in full, and "multiply_adds_paper" without the products inside attention.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from alignment.registry import METHODS, AlignmentContext, Batch, parse_align
    from diffusion.interpolant import Interpolant
    from models.aligned import AlignedSiT
    from models.sit import SiT, SiTConfig

    settings = resolved(config, model, align)
    side = config.latent_size

    def parameters(*modules: torch.nn.Module) -> int:
        return sum(parameter.numel() for module in modules for parameter in module.parameters())

    with torch.device("meta"):
        sit = SiT(SiTConfig.from_name(model, side, num_classes=config.num_classes))
        ema = SiT(sit.config)
        context = AlignmentContext(
            settings, sit, ema, Interpolant(settings.path_type), torch.device("meta"), nullcontext, IMAGES / BATCH
        )
        methods = {name: METHODS[name](context) for name in parse_align(align)}
        heads = {
            term: (depth, method.make_head())
            for name, method in methods.items()
            for term, depth in method.term_names(name).items()
        }
        z, t, y = torch.zeros(1, 4, side, side), torch.zeros(1), torch.zeros(1, dtype=torch.long)
        images = torch.zeros(1, 8 * side, 8 * side, 3, dtype=torch.uint8)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            AlignedSiT(sit, heads)(z, t, y)
            for method in methods.values():
                method.target(Batch(z, z, z, t, y, t, images))
    external = 0
    if "sra" in methods:
        external += parameters(
            ema.x_embedder, ema.t_embedder, ema.y_embedder, *ema.blocks[: settings.sra_teacher_depth]
        )
    if "repa" in methods:
        external += parameters(encoder_of(config, side // sit.config.patch_size))
    by_operator = {str(operator): flops / 2 for operator, flops in counter.get_flop_counts()["Global"].items()}
    attention = sum(flops for name, flops in by_operator.items() if "scaled_dot_product" in name or "bmm" in name)
    return {
        "parameters": parameters(sit),
        "external_parameters": external,
        "head_parameters": parameters(*(head for _, head in heads.values())),
        "multiply_adds": sum(by_operator.values()),
        "multiply_adds_paper": sum(by_operator.values()) - attention,
    }


def encoder_of(config: CostConfig, side: int) -> torch.nn.Module:
    """REPA's encoder without numbers in it."""
    import torch

    from models.encoders import load_encoder

    with torch.device("meta"):
        return load_encoder(config.repa_encoder, side, "random", torch.device("meta"))


def measure(config: CostConfig, model: str, align: str, folder: Path) -> dict[str, Any]:
    """Speed and memory of the trainer's step at this machine's batch, and latency of the forward pass of one image."""
    import torch

    from alignment.registry import Batch
    from analysis.timing import random_batch, random_store, time_steps, trainer_step, training_run, wait

    size = config.batch_size
    data = random_store(folder / "store", config.latent_size, count=size, images=True, classes=config.num_classes)
    repa = {"repa_encoder": config.repa_encoder, "repa_weights": "random"}
    name = f"{model}-{align}".replace("/", "-")
    with training_run(data, folder, model, align=align, exp_name=name, batch_size=size, **repa) as run:
        device = run.accelerator.device
        batch = random_batch(size, config.latent_size, device, config.num_classes)
        if "repa" in run.methods:
            shape = (size, 8 * config.latent_size, 8 * config.latent_size, 3)
            batch["image"] = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        step = time_steps(device, trainer_step(run, batch), config.steps, size)

        z, t, y = batch["moments"][:1, :4], torch.full((1,), 0.5, device=device), batch["label"][:1]
        one = Batch(z, z, torch.randn_like(z), t, y, t, batch["image"][:1] if "image" in batch else None)

        @torch.no_grad()
        def forward() -> float:
            begin = time.perf_counter()
            with run.accelerator.autocast():
                run.model(z, t, y)
            for method in run.methods.values():
                method.target(one)
            wait(device)
            return time.perf_counter() - begin

        seconds = [forward() for _ in range(3 + config.steps)][3:]
    return {
        "batch": size, **step, "latency_ms": 1e3 * statistics.median(seconds),
        "latency_spread_ms": [1e3 * min(seconds), 1e3 * max(seconds)],
    }  # fmt: skip


def change(value: float, baseline: float) -> str:
    return "" if value == baseline else f" ({100 * (value / baseline - 1):+.0f}%)"


def table(rows: list[dict[str, Any]], batch: int) -> str:
    """Markdown: a row for each model and method, changes against the first method of its model."""
    lines = [
        "| model | external + head parameters (M) | GFLOPs, the paper's convention | GFLOPs in full | "
        f"it/s at batch {batch} | latency (ms) | memory (GiB) | the paper's Table 4 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        first = next(other for other in rows if other["model"] == row["model"])
        counts, speed = row["counts"], row.get("measured")
        cells = [
            f"{row['model']} {NAMES.get(row['align'], '+ ' + row['align']).removeprefix('SiT')}".strip(),
            f"{counts['external_parameters'] / 1e6:.1f} + {counts['head_parameters'] / 1e6:.1f}",
            *(
                f"{counts[kind] / 1e9:.2f}{change(counts[kind], first['counts'][kind])}"
                for kind in ("multiply_adds_paper", "multiply_adds")
            ),
        ]
        if speed:
            rate, base = 1 / speed["seconds_per_step"], 1 / first["measured"]["seconds_per_step"]
            memory = "not measured" if speed["memory_gib"] is None else f"{speed['memory_gib']:.1f}"
            latency = f"{speed['latency_ms']:.2f}{change(speed['latency_ms'], first['measured']['latency_ms'])}"
            cells += [f"{rate:.3g}{change(rate, base)}", latency, memory]
        else:
            cells += ["not measured"] * 3
        known = PAPER.get(row["align"]) if row["model"] == "SiT-XL/2" else None
        cells.append(
            "{} + {}; {:.2f} G; {} it/s; {:.2f} ms".format(*known[:2], known[3], known[2], known[4]) if known else ""
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plan(rows: list[dict[str, Any]], machine: str) -> str:
    """Markdown: hours of 400,000 steps and of 50,000 samples for each size with its head, on 1 to 64 GPUs.

    A size that was measured on a GPU stands on its own images/s; the others do the arithmetic of their forward pass at
    the rate of the one that was measured, or else of the paper's SiT-XL/2.
    """
    sizes = [row for row in rows if row["align"] == "vae"]
    measured = {
        row["model"]: row["measured"]["images_per_second"]
        for row in sizes
        if row.get("measured") and row["measured"]["memory_gib"] is not None
    }
    if measured:
        source, basis = next(row for row in sizes if row["model"] in measured), f"measured on {machine}"
        rate = measured[source["model"]] * source["counts"]["multiply_adds"]
    else:
        basis = f"the paper's {PAPER['vae'][2]} it/s at batch {BATCH}, taken to be on {PAPER_GPUS} GPUs"
        rate = PAPER["vae"][2] * BATCH / PAPER_GPUS * count(CostConfig(), "SiT-XL/2", "vae")["multiply_adds"]
    lines = [
        f"Hours on 1 to 64 H100-class GPUs, from {basis}. Everything but a size's own measured rate on one GPU is "
        f"**extrapolated**: other sizes by their arithmetic, several GPUs as if they lost nothing, and sampling "
        f"({SAMPLING[0]} steps, guided on {SAMPLING[1]:.0%} of them) by its forward passes at the rate of training's.",
        "",
        "| model | images/s per GPU | what | " + " | ".join(f"{gpus}" for gpus in GPUS) + " | states per GPU | disk |",
        "|---|---|---|" + "---|" * (len(GPUS) + 2),
    ]
    for row in sizes:
        counts = row["counts"]
        own = measured.get(row["model"])
        speed = own or rate / counts["multiply_adds"]
        total = counts["parameters"] + counts["head_parameters"]
        states = (16 * total + 4 * counts["parameters"]) / 2**30  # weights, gradients, two moments; the average
        checkpoint = (12 * total + 4 * counts["parameters"]) / 1e9
        passes = SAMPLING[0] * (1 + SAMPLING[1])
        sampled = 3 * speed * counts["multiply_adds"] / (passes * counts["sit_multiply_adds"])
        for what, seconds in ((f"{STEPS:,} steps", STEPS * BATCH / speed), (f"{SAMPLES:,} samples", SAMPLES / sampled)):
            hours = " | ".join(f"{seconds / 3600 / gpus:.3g}" for gpus in GPUS)
            place = [f"{states:.1f} GiB", f"store 42 GB, a checkpoint {checkpoint:.1f} GB"]
            place = place if "steps" in what else ["", "9.8 GB"]
            shown = (
                f"{speed:.0f}{'' if own else ' (extrapolated)'}" if "steps" in what else f"{sampled:.2g} (extrapolated)"
            )
            lines.append(f"| {row['model']} | {shown} | {what} | {hours} | {' | '.join(place)} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    config = cli.parse(CostConfig, argv, __doc__.splitlines()[0])
    from alignment.registry import parse_align
    from runtime import provenance

    for align in config.align:
        parse_align(align)
    machine = provenance.machine()
    about = provenance.stamp()
    rows, output = [], Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        for model in config.model:
            alone = count(config, model, "none")["multiply_adds"]
            for align in config.align:
                row: dict[str, Any] = {"model": model, "align": align, "counts": count(config, model, align)}
                row["counts"]["sit_multiply_adds"] = alone
                if config.measure:
                    row["measured"] = measure(config, model, align, Path(name))
                rows.append(row)
                print(f"{model} {align}: {json.dumps(row['counts'] | row.get('measured', {}))}", flush=True)
                content = about | {"rows": rows}
                (output / "cost.json").write_text(json.dumps(content, indent=1) + "\n")
    heading = (
        f"Measured on {machine}, {about['date'][:10]}, torch {about['versions']['torch']}.\n\n"
        if config.measure
        else ""
    )
    (output / "cost.md").write_text(heading + table(rows, config.batch_size))
    print(f"\n{table(rows, config.batch_size)}\n{output / 'cost.md'}")
    if any(row["align"] == "vae" for row in rows):
        (output / "plan.md").write_text(plan(rows, machine))
        print(f"{output / 'plan.md'}")


if __name__ == "__main__":
    cli.run(main)
