"""`make bench-gpu`: what each optimization brings on one GPU, in one run of at most ten minutes.

Training steps of the trainer itself beside the plain loop of `benchmarks/plain.py`; each optimization switched off in
turn; the cost of the head; memory; share of the peak; where the time goes; sampling, decoding, and training fed by the
DataLoader. The result is `results/gpu.json`, written anew after each measurement. What there is no time or memory for
says so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

import train
from analysis import cost
from analysis.timing import WARMUP, random_batch, random_store, seconds_of, time_steps, trainer_step, training_run, wait
from benchmarks.plain import PlainLoop
from benchmarks.record import RESULTS
from diffusion.interpolant import Interpolant
from models.sit import SiT, SiTConfig
from models.vae import LatentScale
from reporting.log import read_log
from runtime import cli, provenance
from runtime.distributed import allow_tf32
from runtime.files import to_json
from sampling.generator import block_noise, decode_latents, sample_latents
from training.ema import EMAUpdater
from training.setup import Run

HEADS = {"with": "vae", "without": "none"}
KINDS = {"plain": {"compile": False, "mixed_precision": "no"}, "ours": {}}  # the plain loop sets its precision itself
GUIDANCE = (1.8, (0.0, 0.7))  # REPA's
KERNELS = {  # by the first expression that a kernel's name matches
    "matrix products": r"gemm|nvjet|cutlass|xmma|addmm|::mm|::bmm",
    "attention": r"flash|fmha|attention",
    "optimizer, EMA, norms": r"multi_tensor|adam|lerp|foreach",
    "copies": r"memcpy|memset|copy",
    "compiled (norms, gates, activations)": r"triton",
}


@dataclass(frozen=True)
class BenchConfig:
    models: tuple[str, ...] = cli.flag(("SiT-XL/2", "SiT-L/2", "SiT-B/2"), "models, the most important first")
    batches: tuple[int, ...] = cli.flag((32, 128, 256), "images per step")
    steps: int = cli.flag(20, "steps that are timed, after 3 that are not; the plain loop half as many")
    sampling_steps: int = cli.flag(250, "steps of the SDE")
    sampling_batch: int = cli.flag(128, "images per batch of sampling; the plain way a half")
    seconds: float = cli.flag(540.0, "begin nothing after this time")
    latent_size: int = cli.flag(32, "side of the latents")
    output: str = cli.flag(str(RESULTS / "gpu.json"), "the result")


class Bench:
    """Measures and keeps: a result is a dictionary of numbers, or the reason why there is none."""

    def __init__(self, config: BenchConfig, data: Path):
        self.config, self.begin = config, time.perf_counter()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.data = random_store(data, config.latent_size)
        self.results: dict[str, Any] = {}
        self.about = provenance.stamp() | {"settings": dataclasses.asdict(config)}

    def measure(self, name: str, call: Callable[..., dict[str, Any] | None], *arguments: Any) -> dict[str, Any]:
        """Run one measurement, or a part that measures by itself, and keep what it gives, or why it failed."""
        late = time.perf_counter() - self.begin > self.config.seconds
        try:
            found = {"not_measured": "no time was left"} if late else call(*arguments)
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            found = {"not_measured": "out of memory" if isinstance(error, torch.OutOfMemoryError) else reason}
        if found:
            self.results[name] = found
            print(f"[{time.perf_counter() - self.begin:5.0f} s] {name}: {found}", flush=True)
            Path(self.config.output).write_text(to_json(self.about | {"results": self.results}))
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return found or {}

    def steps(self, step: Callable[[int], Any], images: int, steps: int | None = None) -> dict[str, Any]:
        return time_steps(self.device, step, steps or self.config.steps, images)

    def run(self, model: str, **settings: Any) -> contextlib.AbstractContextManager[Run]:
        """A run of the trainer in a directory of its own."""
        return training_run(self.data, Path(tempfile.mkdtemp(dir=self.data.parent)), model, **settings)


def training(bench: Bench, model: str) -> None:
    """The trainer beside the plain loop, with and without the head, at each batch."""
    config, results = bench.config, bench.results
    names = {(head, size): f"train/{model}/{head}-head/batch-{size}" for head in HEADS for size in config.batches}
    for kind, head in ((kind, head) for kind in KINDS for head in HEADS):
        with bench.run(model, align=HEADS[head], **KINDS[kind]) as run:
            loop = PlainLoop(run.model) if kind == "plain" else None
            steps = max(1, config.steps // 2) if loop else config.steps
            for size in config.batches:
                batch = random_batch(size, config.latent_size, bench.device)
                step = (lambda _, loop=loop, batch=batch: loop.step(batch)) if loop else trainer_step(run, batch)
                bench.measure(f"{names[head, size]}/{kind}", bench.steps, step, size, steps)
        del run, loop, step

    # What follows from the rates: each image needs three passes, of two operations for each MAC.
    macs = cost.count(cost.CostConfig(latent_size=config.latent_size), model, "none")["macs"]
    peak = results["peak/bf16_matmul"].get("tflops")
    for name in names.values():
        ours, plain = results[f"{name}/ours"], results[f"{name}/plain"].get("images_per_second")
        if rate := ours.get("images_per_second"):
            tflops = rate * 6 * macs / 1e12
            ours |= {"model_tflops": tflops, "share_of_measured_peak": tflops / peak if peak else None}
            ours |= {"times_plain": rate / plain if plain else None}
    for size in config.batches:
        both = [results[f"{names[head, size]}/ours"].get("seconds_per_step") for head in HEADS]
        if all(both):
            bench.measure(f"train/{model}/head_cost/batch-{size}", lambda b=both: {"share_of_step": b[0] / b[1] - 1})


class OneByOneEMA(EMAUpdater):
    @torch.no_grad()
    def update(self, step: int) -> None:
        for ema, weight in zip(self.parameters[0], self.weights, strict=True):
            ema.mul_(0.9999).add_(weight, alpha=1 - 0.9999)


class UnfusedAdamW(torch.optim.AdamW):
    found_inf = property(lambda self: None, lambda self, skipped: None)  # it cannot skip a step on the device


def float32_tokens(sit: SiT, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return sit.x_embedder(x) + sit.pos_embed, sit.t_embedder(t) + sit.y_embedder(y)


def ablations(run: Run, batch: dict[str, Tensor]) -> dict[str, Callable[[int], None]]:
    """Steps of one run with one optimization off, by name."""
    step = trainer_step(run, batch)
    config = dataclasses.replace(run.config, batch_size=len(batch["label"]))

    def host_draws(index: int) -> None:
        """The same draws on the host beside those on the device, which take next to nothing."""
        draws = train.step_noise(config, index, run.sit.config, torch.device("cpu"))
        for numbers in draws.values():
            numbers.to(run.accelerator.device)
        step(index)

    def recomputed(index: int) -> None:
        run.sit.checkpoint_every = 1
        step(index)
        run.sit.checkpoint_every = 0

    ema = OneByOneEMA([run.ema], run.sit, run.ema_updater.decays)
    plain = UnfusedAdamW(run.model.parameters(), config.learning_rate, weight_decay=0.0, foreach=False)
    optimizer = run.accelerator.prepare_optimizer(plain, device_placement=False)
    return {
        "all": step,
        "without_foreach_ema": trainer_step(dataclasses.replace(run, ema_updater=ema), batch),
        "without_draws_on_the_device": host_draws,
        "with_a_read_in_each_step": lambda index: (step(index), run.guard.sums.tolist()),
        "with_every_block_recomputed": recomputed,
        "without_fused_adamw": trainer_step(dataclasses.replace(run, optimizer=optimizer), batch),
    }


def ablate_optimizations(bench: Bench, model: str, size: int) -> None:
    """Training with one optimization off at a time."""
    name, batch = f"means/{model}/batch-{size}", random_batch(size, bench.config.latent_size, bench.device)
    with bench.run(model) as run:
        steps = ablations(run, batch)
        for ablation, step in steps.items():
            bench.measure(f"{name}/{ablation}", bench.steps, step, size)
        bench.measure(f"{name}/where_the_time_goes", where_the_time_goes, bench.device, steps["all"])
        del run, steps, step
    others = {"without_compile": {"compile": False}, "without_bf16_tokens": {}}
    others |= {"with_fp16_and_scaler": {"mixed_precision": "fp16"}} if bench.device.type == "cuda" else {}
    for ablation, settings in others.items():
        with bench.run(model, **settings) as run:
            if ablation == "without_bf16_tokens":
                run.sit._embed = functools.partial(float32_tokens, run.sit)
            bench.measure(f"{name}/{ablation}", bench.steps, trainer_step(run, batch), size)
        del run
    whole = bench.results[f"{name}/all"].get("seconds_per_step")
    for ablation, found in bench.results.items():
        if ablation.startswith(name) and whole and "seconds_per_step" in found:
            found["times_all"] = found["seconds_per_step"] / whole


def where_the_time_goes(device: torch.device, step: Callable[[int], None]) -> dict[str, Any]:
    """Shares of the time of a step by kind of kernel; the rest of the clock's time is the device's idle time."""
    activity, count = torch.profiler.ProfilerActivity, 5

    def run(first: int, last: int) -> None:
        for index in range(first, last):
            step(index)
        wait(device)

    run(0, WARMUP)
    on_gpu = device.type == "cuda"
    with torch.profiler.profile(activities=[activity.CUDA if on_gpu else activity.CPU]) as profile:
        wall = seconds_of(lambda: run(WARMUP, WARMUP + count))
    shares = dict.fromkeys([*KERNELS, "other"], 0.0)
    for event in profile.key_averages():
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        kind = next((kind for kind, names in KERNELS.items() if re.search(names, event.key, re.I)), "other")
        shares[kind] += spent / 1e6 / wall
    return {"shares": shares, "idle": 1 - sum(shares.values()), "seconds_per_step_profiled": wall / count}


def loader_in_the_loop(bench: Bench, model: str, size: int) -> dict[str, Any]:
    """The trainer's own loop, reading from a store."""
    steps = bench.config.steps
    settings = {"max_train_steps": 4 * steps, "log_every": steps, "checkpointing_steps": 10**6, "num_workers": 2}
    with bench.run(model, batch_size=size, **settings) as run, contextlib.redirect_stdout(None):
        train.fit(run)
        rows = [row for row in read_log(run.config.run_dir) if steps < row["step"] < 4 * steps]
    rates = [row["images_per_second"] for row in rows]
    return {"images_per_second": statistics.median(rates), "rows": rates}


def sampling(bench: Bench, model: str) -> None:
    """One batch of the paper's sampler with guidance on [0, 0.7], beside eager float32 with TF32, as REPA samples."""
    config, device = bench.config, bench.device
    torch.manual_seed(0)
    with device:
        sit = SiT(SiTConfig.from_name(model, config.latent_size)).eval().requires_grad_(False)
        for parameter in sit.parameters():  # zeros would compute faster
            torch.nn.init.normal_(parameter, std=0.02)
    lower = torch.bfloat16 if device.type == "cuda" else None

    def draw(size: int, steps: int, autocast: torch.dtype | None) -> None:
        noise = block_noise(0, 0, size, (4, config.latent_size, config.latent_size), device)
        y = torch.arange(size, device=device) % 1000
        sample_latents(sit, y, noise, "sde", steps, Interpolant("linear"), *GUIDANCE, autocast=autocast)
        wait(device)

    def timed(size: int, steps: int, autocast: torch.dtype | None) -> dict[str, Any]:
        draw(size, 10, autocast)  # compiles, with and without guidance
        seconds = seconds_of(lambda: draw(size, steps, autocast)) * config.sampling_steps / steps
        return {"images_per_second": size / seconds, "batch": size, "steps_timed": steps, "of": config.sampling_steps}

    few, size = max(2, config.sampling_steps // 10), config.sampling_batch
    allow_tf32(True)
    plain = bench.measure(f"sample/{model}/plain", timed, max(16, size // 2), few, None)
    allow_tf32(False)
    bench.measure(f"sample/{model}/without_compile", timed, size, few, lower)
    for block in sit.blocks:
        block.compile(fullgraph=True, dynamic=False)
    ours = bench.measure(f"sample/{model}/ours", timed, size, config.sampling_steps, lower)
    if "images_per_second" in ours and "images_per_second" in plain:
        ours["times_plain"] = ours["images_per_second"] / plain["images_per_second"]
    torch._dynamo.reset()


def decoding(bench: Bench) -> dict[str, Any]:
    """The SD-VAE's decoder with random weights, in float32 and in bfloat16 with channels last."""
    widths = (128, 256, 512, 512)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(block_out_channels=widths, layers_per_block=2, latent_channels=4, **blocks)
    vae = vae.eval().requires_grad_(False).to(bench.device)
    side = bench.config.latent_size
    z, scale = torch.randn(16, 4, side, side, device=bench.device), LatentScale((1.0,), (0.0,))
    plain = bench.steps(lambda _: decode_latents(vae, z, scale), len(z))
    vae.bfloat16().to(memory_format=torch.channels_last)
    ours = bench.steps(lambda _: decode_latents(vae, z, scale), len(z))
    return ours | {"times_float32": ours["images_per_second"] / plain["images_per_second"]}


def matmul_peak(bench: Bench) -> dict[str, Any]:
    """What this device reaches in one large bfloat16 product: the ceiling that shares are of."""
    side = 8192 if bench.device.type == "cuda" else 512
    a, b = (torch.randn(side, side, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    return {"tflops": 2 * side**3 / bench.steps(lambda _: a @ b, 1)["seconds_per_step"] / 1e12}


def main(argv: list[str] | None = None) -> None:
    config = cli.parse(BenchConfig, argv, __doc__)
    first, *others = config.models
    middle = config.batches[min(1, len(config.batches) - 1)]
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(config, Path(name) / "store")
        bench.measure("peak/bf16_matmul", matmul_peak, bench)
        bench.measure(f"train/{first}", training, bench, first)
        bench.measure(f"means/{first}", ablate_optimizations, bench, first, config.batches[0])
        bench.measure(f"sample/{first}", sampling, bench, first)
        bench.measure("decode", decoding, bench)
        bench.measure("loop", loader_in_the_loop, bench, first, middle)
        for model in others:
            bench.measure(f"train/{model}", training, bench, model)
    bench.measure("total_seconds", lambda: {"seconds": time.perf_counter() - bench.begin})


if __name__ == "__main__":
    cli.run(main)
