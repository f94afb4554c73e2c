"""`make bench-gpu`: what each means of speed brings on one GPU, in one run of at most ten minutes.

Training steps of the trainer itself beside the plain loop of `benchmarks/plain.py`; each means switched off in turn;
the cost of the head; memory; share of the peak; where the time goes; sampling, decoding, and training fed by the
loader. The result is `results/gpu.json`, written anew after each measurement. What there is no time or memory for says
so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from accelerate.state import AcceleratorState, PartialState

import sample_ddp
import train
from benchmarks.plain import PlainLoop
from benchmarks.record import RESULTS
from benchmarks.steps import batch_of, random_store, timed, trainer, wait
from models.aligned import AlignedSiT
from models.sit import SiT, SiTConfig
from models.vae import LatentScale, decode_images
from runtime import cli, provenance
from runtime.cli import flag
from sampling.config import Guidance, SampleConfig
from training.ema import MovingAverage
from training.nonfinite import StepGuard
from training.optimizer import make_optimizer

HEADS = {"with": "vae", "without": "none"}
SAMPLING_GUIDANCE = (1.8, (0.0, 0.7))  # REPA's


@dataclass(frozen=True)
class BenchConfig:
    models: tuple[str, ...] = flag(("SiT-XL/2", "SiT-L/2", "SiT-B/2"), "models, the most important first")
    batches: tuple[int, ...] = flag((32, 128, 256), "images per step")
    steps: int = flag(20, "steps that are timed, after 3 that are not; the plain loop half as many")
    sampling_steps: int = flag(250, "steps of the SDE")
    sampling_batch: int = flag(128, "images per batch of sampling; the plain way a half")
    seconds: float = flag(540.0, "begin nothing after this time")
    latent_size: int = flag(32, "side of the latents")
    output: str = flag(str(RESULTS / "gpu.json"), "the result")


class Bench:
    """Measures and keeps: a result is a dictionary of numbers, or the reason why there is none."""

    def __init__(self, config: BenchConfig):
        self.config, self.begin = config, time.perf_counter()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.results: dict[str, Any] = {}
        self.about = provenance.stamp() | {"settings": dataclasses.asdict(config)}

    def measure(self, name: str, call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Run one measurement, print and keep what it gives; an error of one must not cost the others."""
        late = time.perf_counter() - self.begin > self.config.seconds
        try:
            found = {"not_measured": "no time was left"} if late else call()
        except torch.OutOfMemoryError:
            found = {"not_measured": "out of memory"}
        except Exception as error:
            found = {"not_measured": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        self.release()
        self.results[name] = found
        path = Path(self.config.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.about | {"results": self.results}, indent=1) + "\n")
        print(f"[{time.perf_counter() - self.begin:5.0f} s] {name}: {json.dumps(found)}", flush=True)
        return found

    def attempt(self, name: str, call: Callable[[], None]) -> None:
        """A part of several measurements, whose preparation may fail as well."""
        try:
            call()
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            self.measure(name, lambda: {"not_measured": reason})
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            PartialState._reset_state()
        self.release()

    def release(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def timed(self, step: Callable[[int], None], steps: int, images: int) -> dict[str, Any]:
        return timed(self.device, step, steps, images)


def forward_multiply_adds(model: str, latent_size: int) -> float:
    """Of one image through the SiT, counted without computing anything."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        sit = SiT(SiTConfig.from_name(model, latent_size))
        inputs = torch.zeros(1, 4, latent_size, latent_size), torch.zeros(1), torch.zeros(1, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            sit(*inputs)
    return counter.get_total_flops() / 2


def at_batch(run: train.Run, size: int) -> train.Run:
    return dataclasses.replace(run, config=dataclasses.replace(run.config, batch_size=size))


def without_head(run: train.Run) -> train.Run:
    """The same network without what is beside it."""
    model = run.accelerator.prepare(AlignedSiT(run.sit, {}))  # which also sets its precision
    optimizer = run.accelerator.prepare_optimizer(
        make_optimizer(run.config, model.parameters()), device_placement=False
    )
    guard = StepGuard(["loss", "velocity", "grad_norm"], run.accelerator.device, run.config.spike_factor, False)
    return dataclasses.replace(run, model=model, methods={}, optimizer=optimizer, guard=guard)


def unfused(run: train.Run) -> train.Run:
    plain = torch.optim.AdamW(run.model.parameters(), run.config.learning_rate, weight_decay=0.0, foreach=False)
    return dataclasses.replace(run, optimizer=run.accelerator.prepare_optimizer(plain, device_placement=False))


def float32_tokens(self: SiT, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return self.x_embedder(x) + self.pos_embed, self.t_embedder(t) + self.y_embedder(y)


def average_one_by_one(self: MovingAverage) -> None:
    for average, weight in zip(self.averages, self.weights, strict=True):
        average.data.mul_(self.decay).add_(weight.data, alpha=1 - self.decay)


def draws_of_the_host(draw: Callable) -> Callable:
    return lambda config, step, sit, device: {
        name: numbers.to(device) for name, numbers in draw(config, step, sit, torch.device("cpu")).items()
    }


def training(bench: Bench, data: Path, folder: Path, model: str) -> None:
    """The trainer beside the plain loop, with and without the head, at each batch."""
    config, device = bench.config, bench.device
    forward = forward_multiply_adds(model, config.latent_size)
    peak = bench.results.get("peak/bf16_matmul", {}).get("tflops")
    for head, align in HEADS.items():
        with trainer(
            data, folder, model, align=align, exp_name=f"plain-{head}", compile=False, mixed_precision="no"
        ) as run:
            loop = PlainLoop(run.model)  # sets its precision itself
        del run
        for size in config.batches:
            batch = batch_of(size, config.latent_size, device)
            bench.measure(
                f"train/{model}/{head}-head/batch-{size}/plain",
                lambda batch=batch, size=size, loop=loop: bench.timed(
                    lambda _: loop.step(batch["moments"], batch["label"]), max(1, config.steps // 2), size
                ),
            )
        del loop
        bench.release()
    with trainer(data, folder, model, exp_name="ours") as run:
        for head in HEADS:
            own = run if head == "with" else without_head(run)
            for size in config.batches:
                name = f"train/{model}/{head}-head/batch-{size}"
                batch, sized = batch_of(size, config.latent_size, device), at_batch(own, size)
                found = bench.measure(
                    f"{name}/ours",
                    lambda batch=batch, sized=sized, size=size: bench.timed(
                        lambda index: train.train_step(sized, index, [batch]), config.steps, size
                    ),
                )
                if "images_per_second" in found:
                    rate = found["images_per_second"] * 6 * forward / 1e12  # two operations each, three passes
                    found |= {"model_tflops": rate, "share_of_measured_peak": rate / peak if peak else None}
                    plain = bench.results[f"{name}/plain"].get("images_per_second")
                    found["times_plain"] = found["images_per_second"] / plain if plain else None
        for size in config.batches:
            both = [bench.results[f"train/{model}/{head}-head/batch-{size}/ours"] for head in HEADS]
            if all("seconds_per_step" in each for each in both):
                cost = both[0]["seconds_per_step"] / both[1]["seconds_per_step"] - 1
                bench.measure(f"train/{model}/head_cost/batch-{size}", lambda cost=cost: {"share_of_step": cost})


def ablate_optimizations(bench: Bench, data: Path, folder: Path, model: str, size: int) -> None:
    """Training with one means switched off at a time."""
    config, device = bench.config, bench.device
    batch = batch_of(size, config.latent_size, device)

    def timed(run: train.Run, step: Callable | None = None) -> dict[str, Any]:
        sized = at_batch(run, size)
        step = step or (lambda index: train.train_step(sized, index, [batch]))
        return bench.timed(step, config.steps, size)

    def reading(run: train.Run) -> Callable[[int], None]:
        sized = at_batch(run, size)

        def step(index: int) -> None:
            train.train_step(sized, index, [batch])
            run.guard.sums.tolist()

        return step

    name = f"means/{model}/batch-{size}"
    with trainer(data, folder, model, exp_name="means") as run:
        bench.measure(f"{name}/all", lambda: timed(run))
        bench.measure(f"{name}/where_the_time_goes", lambda: where_the_time_goes(bench, at_batch(run, size), batch))
        with mock.patch.object(MovingAverage, "update", torch.no_grad()(average_one_by_one)):
            bench.measure(f"{name}/without_foreach_average", lambda: timed(run))
        with mock.patch.object(train, "draw", draws_of_the_host(train.draw)):
            bench.measure(f"{name}/without_draws_on_the_device", lambda: timed(run))
        bench.measure(f"{name}/with_a_read_in_each_step", lambda: timed(run, reading(run)))
        run.sit.checkpoint_every = 1
        bench.measure(f"{name}/with_every_block_recomputed", lambda: timed(run))
        run.sit.checkpoint_every = 0
        with mock.patch.object(train, "skip_step_if"):
            bench.measure(f"{name}/without_fused_adamw", lambda: timed(unfused(run)))
        del run
    with trainer(data, folder, model, exp_name="means-eager", compile=False) as run:
        bench.measure(f"{name}/without_compile", lambda: timed(run))
    with (
        mock.patch.object(SiT, "_embed", float32_tokens),
        trainer(data, folder, model, exp_name="means-float32-tokens") as run,
    ):
        bench.measure(f"{name}/without_bf16_tokens", lambda: timed(run))
    if device.type == "cuda":
        with trainer(data, folder, model, exp_name="means-fp16", mixed_precision="fp16") as run:
            bench.measure(f"{name}/with_fp16_and_scaler", lambda: timed(run))
    for name_of, found in bench.results.items():
        whole = bench.results[f"{name}/all"].get("seconds_per_step")
        if name_of.startswith(name) and whole and "seconds_per_step" in found:
            found["times_all"] = found["seconds_per_step"] / whole


KERNELS = {  # by the first expression that a kernel's name matches
    "matrix products": r"gemm|nvjet|cutlass|xmma|addmm|::mm|::bmm",
    "attention": r"flash|fmha|attention",
    "optimizer, average, norms": r"multi_tensor|adam|lerp|foreach",
    "copies": r"memcpy|memset|copy",
    "compiled (norms, gates, activations)": r"triton",
}


def where_the_time_goes(bench: Bench, run: train.Run, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Shares of the time of a step by kind of kernel; the rest of the clock's time is the device's idle time."""
    activity = torch.profiler.ProfilerActivity
    on_gpu = bench.device.type == "cuda"
    for index in range(3):
        train.train_step(run, index, [batch])
    wait(bench.device)
    begin = time.perf_counter()
    with torch.profiler.profile(activities=[activity.CUDA if on_gpu else activity.CPU]) as profile:
        for index in range(3, 8):
            train.train_step(run, index, [batch])
        wait(bench.device)
    wall = time.perf_counter() - begin
    shares = dict.fromkeys([*KERNELS, "other"], 0.0)
    for event in profile.key_averages():
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        kind = next((kind for kind, names in KERNELS.items() if re.search(names, event.key, re.I)), "other")
        shares[kind] += spent / 1e6 / wall
    return {"shares": shares, "idle": 1 - sum(shares.values()), "seconds_per_step_profiled": wall / 5}


def loader_in_the_loop(bench: Bench, data: Path, folder: Path, model: str, size: int) -> dict[str, Any]:
    """The trainer's own loop, reading from a store."""
    rates = []

    def report(run: train.Run, row: dict[str, float], *_: Any) -> None:
        rates.append(row["images_per_second"])

    with mock.patch.object(train, "report", report), contextlib.redirect_stdout(None):
        train.main([
            f"--data-dir={data}", f"--output-dir={folder}", "--exp-name=loop", f"--model={model}",
            f"--batch-size={size}", f"--max-train-steps={4 * bench.config.steps}", f"--log-every={bench.config.steps}",
            "--sampling-steps=0", "--num-workers=2", "--checkpointing-steps=1000000",
        ])  # fmt: skip
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    return {"images_per_second": statistics.median(rates[1:-1]), "rows": rates}


def sampling(bench: Bench, model: str) -> None:
    """One batch of the paper's sampler with guidance on [0, 0.7], beside eager float32 with TF32, as REPA samples."""
    config, device = bench.config, bench.device
    torch.manual_seed(0)
    with device:
        sit = SiT(SiTConfig.from_name(model, config.latent_size)).eval().requires_grad_(False)
        for parameter in sit.parameters():  # zeros would compute faster
            torch.nn.init.normal_(parameter, std=0.02)
    scale, interval = SAMPLING_GUIDANCE
    info = {
        "digest": "", "format": "", "step": 0, "path_type": "linear", "vae_digest": "", "resolution": 0,
        "scale": LatentScale((1.0,), (0.0,)),
    }  # fmt: skip

    def drawer(batch: int, **changes: Any) -> sample_ddp.SampleGenerator:
        settings = sample_ddp.describe(
            SampleConfig(checkpoint=("none",), **changes), Guidance(scale, interval), sit, info, device
        )
        return sample_ddp.SampleGenerator(settings | {"batch_size": batch}, sit, None, info, np.arange(1000), device)

    def timed(drawer: sample_ddp.SampleGenerator, steps: int) -> dict[str, Any]:
        drawer.settings["num_steps"] = 10
        drawer.latents(0)  # both shapes
        wait(bench.device)
        drawer.settings["num_steps"] = steps
        begin = time.perf_counter()
        drawer.latents(1)
        wait(bench.device)
        seconds = (time.perf_counter() - begin) * config.sampling_steps / steps
        size = drawer.settings["batch_size"]
        return {"images_per_second": size / seconds, "batch": size, "steps_timed": steps, "of": config.sampling_steps}

    torch.set_float32_matmul_precision("high")
    few = max(2, config.sampling_steps // 10)
    half = max(16, config.sampling_batch // 2)
    plain = bench.measure(f"sample/{model}/plain", lambda: timed(drawer(half, mixed_precision="no"), few))
    torch.set_float32_matmul_precision("highest")
    bench.measure(f"sample/{model}/without_compile", lambda: timed(drawer(config.sampling_batch), few))
    for block in sit.blocks:
        block.compile(fullgraph=True, dynamic=False)
    ours = bench.measure(f"sample/{model}/ours", lambda: timed(drawer(config.sampling_batch), config.sampling_steps))
    if "images_per_second" in ours and "images_per_second" in plain:
        ours["times_plain"] = ours["images_per_second"] / plain["images_per_second"]
    torch._dynamo.reset()


def decoding(bench: Bench) -> dict[str, Any]:
    """The SD-VAE's decoder with random weights, in float32 and in bfloat16 with channels last."""
    from diffusers import AutoencoderKL

    size = bench.config.latent_size
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
    ).eval().requires_grad_(False).to(bench.device)  # fmt: skip
    z, scale = torch.randn(16, 4, size, size, device=bench.device), LatentScale((1.0,), (0.0,))
    plain = bench.timed(lambda _: decode_images(vae, z, scale), bench.config.steps, len(z))
    vae = vae.bfloat16().to(memory_format=torch.channels_last)
    ours = bench.timed(lambda _: decode_images(vae, z, scale), bench.config.steps, len(z))
    return ours | {"times_float32": ours["images_per_second"] / plain["images_per_second"]}


def matmul_peak(bench: Bench) -> dict[str, Any]:
    """What this device reaches in one large bfloat16 product: the ceiling that shares are of."""
    side = 8192 if bench.device.type == "cuda" else 512
    a, b = (torch.randn(side, side, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    found = bench.timed(lambda _: a @ b, bench.config.steps, 1)
    return {"tflops": 2 * side**3 / found["seconds_per_step"] / 1e12}


def main(argv: list[str] | None = None) -> None:
    config = cli.parse(BenchConfig, argv, __doc__.splitlines()[0])
    bench = Bench(config)
    first, *others = config.models
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = random_store(folder / "store", config.latent_size)
        bench.measure("peak/bf16_matmul", lambda: matmul_peak(bench))
        bench.attempt(f"train/{first}", lambda: training(bench, data, folder, first))
        bench.attempt(f"means/{first}", lambda: ablate_optimizations(bench, data, folder, first, config.batches[0]))
        bench.attempt(f"sample/{first}", lambda: sampling(bench, first))
        bench.measure("decode", lambda: decoding(bench))
        size = config.batches[min(1, len(config.batches) - 1)]
        bench.measure("loop", lambda: loader_in_the_loop(bench, data, folder, first, size))
        for model in others:
            bench.attempt(f"train/{model}", lambda model=model: training(bench, data, folder, model))
    bench.measure("total_seconds", lambda: {"seconds": time.perf_counter() - bench.begin})


if __name__ == "__main__":
    cli.run(main)
