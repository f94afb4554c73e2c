"""`make audit`: what a training or sampling step would launch on an H100, found out on a machine without any GPU.

    python -m benchmarks.cuda_audit                                     # all, and the README's table
    python -m benchmarks.cuda_audit train-32 --kernels 40 --output none
    python -m benchmarks.cuda_audit guided-128 --inductor combo_kernels=true --output none

The project's own code (`training.setup`, `train.train_step`, the model, its compiled blocks) runs on fake CUDA tensors,
which have shapes, types and strides but no memory. Dynamo, AOTAutograd and Inductor are made to believe in an H100 and
compile as they would there; the wrapper code that they write is then really called, and each launch of the second step
recorded: Triton kernels with the bytes Inductor says they move; products, attention and the kernels of eager code with
the bytes under their operands and their FLOPs.

It can say which kernels are launched and how often, what is fused into them, their bytes and FLOPs, and how many graphs
are compiled; and so what a change of the code adds or takes away. It cannot say a measured time: a kernel is taken to
last max(bytes / memory, FLOPs / rate, SHORTEST), and the GPU never to wait for the host. "floor" takes rates that large
kernels reach; "likely" takes guesses for kernels of this size (products: waves of tiles over 132 SMs, and short sums),
to be set right in RATES once a GPU was seen. Not modelled: L2, uncoalesced access, tensors that one kernel reads twice,
autotuning, clocks under load, NCCL. SDPA is taken to choose cuDNN's kernel, as torch does on an H100 with cuDNN above
9.15.1. Torch is patched in this process, which is why this is a program of its own that nobody imports.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.util
import json
import math
import platform
import re
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.utils import clip_grad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import train
from analysis.timing import random_store, training_run
from benchmarks import table
from benchmarks.record import RESULTS
from diffusion.guidance import guided_velocity
from models.sit import SiT, SiTConfig
from runtime import cli, provenance
from runtime.files import to_json
from sampling.generator import put_on_device

OUTPUT = RESULTS / "cuda_audit.json"
KNOWN = "2.14."  # versions of torch whose inner names are those patched here
H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    total_memory=80 * 2**30,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
)
SHORTEST = 2e-6  # seconds of the smallest kernel
RATES = {  # bytes/s, and FLOP/s of products and of attention, forward and backward
    "floor": {"memory": 2.8e12, "product": 790e12, "attention": 500e12, "attention backward": 400e12},
    "likely": {"memory": 2.5e12, "product": 740e12, "attention": 300e12, "attention backward": 220e12},
}
TILES = ((128, 256), (256, 128), (128, 192), (192, 128), (128, 128))  # of a product's output, one to an SM
MOVES = {"to", "copy", "clone", "transpose", "permute", "view", "unsafe", "cat", "stack", "slice", "select", "t", ""}
NO_KERNEL = set(
    "empty empty_like empty_strided new_empty new_empty_strided as_strided lift_fresh _unsafe_view _reshape_alias "
    "resize_ set_ device".split()
)


@dataclass(frozen=True)
class AuditConfig:
    cases: tuple[str, ...] = cli.flag(
        ("train-32", "train-128", "sample-128", "guided-128"),
        "train (a step), sample or guided (one evaluation, of a doubled batch), and how many images",
        positional=True,
    )
    model: str = cli.flag("SiT-XL/2", "model")
    align: str = cli.flag("vae", "as train.py's")
    inductor: tuple[str, ...] = cli.flag((), "settings of torch._inductor.config", metavar="KEY=VALUE")
    kernels: int = cli.flag(0, "list so many kernels of each case")
    output: str = cli.flag(str(OUTPUT), "the result; none writes nothing")


class Launch(NamedTuple):
    part: str
    name: str
    kind: str  # of kernel
    bytes: float
    flops: float = 0
    shape: tuple[int, ...] = ()  # of a product's output

    def seconds(self, guess: str) -> float:
        rates, share = RATES[guess], 1.0
        if guess == "likely" and self.shape:
            (m, n), terms = self.shape, self.flops / 2 / math.prod(self.shape)
            spent = [math.ceil(math.ceil(m / a) * math.ceil(n / b) / 132) * 132 * a * b for a, b in TILES]
            share = m * n / min(spent) * terms / (terms + 128)
        kind = "attention" + " backward" * ("backward" in self.name) if self.kind == "attention" else "product"
        return max(self.bytes / rates["memory"], self.flops / (rates[kind] * share), SHORTEST)


class Audit(TorchDispatchMode):
    """Records what fake tensors are computed with, and in which `part`, while it is entered."""

    def __init__(self):
        super().__init__()
        self.fake, self.current = FakeTensorMode(allow_non_fake_inputs=True), ""
        self.launches: list[Launch] = []
        self.graphs: dict[Any, str] = {}  # a graph has the name of the part that called it first

    ignore_compile_internals = classmethod(lambda cls: True)

    def part(self, name: str, function: Callable) -> Callable:
        """The function, whose launches belong to `name`."""

        def named(*args, **kwargs):
            with mock.patch.object(self, "current", name):
                return function(*args, **kwargs)

        return named

    def name_compiled(self, **modules) -> None:
        """Name the launches of compiled modules after their kind."""
        for name, members in modules.items():
            for module in members:
                if module._compiled_call_impl is not None:
                    module._compiled_call_impl = self.part(name, module._compiled_call_impl)

    def second(self, function: Callable[[int], Any]) -> None:
        """Record the second of two calls: the first one compiles, and makes the moments."""
        self.graphs.clear()
        with self:
            function(0)
            self.launches.clear()
            function(1)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, out = kwargs or {}, func(*args, **(kwargs or {}))
        results = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        if not all(isinstance(x, FakeTensor) and x.fake_mode is self.fake for x in results):
            return out  # the compiler at work, on fakes of its own
        name, arguments = func._schema.name.split("::")[1], func._schema.arguments
        given = dict(zip((x.name for x in arguments), args, strict=False)) | kwargs
        read, written = [], []
        for argument in arguments:
            tensors = [x for x in tree_leaves(given.get(argument.name)) if isinstance(x, torch.Tensor)]
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if name.startswith("_fused_adam") and argument.name == "grads":  # written only where they are scaled
                writes = given.get("grad_scale") is not None
            read += [] if writes and (argument.name == "out" or name in ("copy_", "zero_", "fill_")) else tensors
            written += tensors if writes else []
        makes = written or (results and not any(result.alias_info for result in func._schema.returns))
        if makes and name not in NO_KERNEL and not func.is_view:
            written, formula = written or results, flop_registry.get(func._overloadpacket)
            other = {key: value for key, value in kwargs.items() if key != "out"}
            flops = formula(*args, **other, out_val=out) if formula else 0
            kind = "attention" if "attention" in name else "product" if flops else "eager"
            kind = "cast or copy" if name in ("_to_copy", "copy_", "clone", "cat", "stack") else kind
            shape = tuple(written[0].shape) if name in ("mm", "addmm") else ()
            on_gpu = [x for x in read + written if x.device.type == "cuda"]
            sizes = [math.prod(n for n, s in zip(x.shape, x.stride(), strict=True) if s) for x in on_gpu]
            count = sum(x.itemsize * size for x, size in zip(on_gpu, sizes, strict=True))
            self.launches.append(Launch(self.current, f"aten.{name}", kind, count, flops, shape))
        return out

    def triton(self, name: str, source: str, device_str: str = "cuda") -> SimpleNamespace:
        """In place of a kernel that Inductor wrote."""
        count = 1e9 * float(re.findall(r"'kernel_num_gb': ([0-9.e+-]+)", source)[-1])
        words = set(re.sub(r"^triton_[a-z]+_fused_|_?\d+$", "", name).split("_"))
        kind = "cast or copy" if words <= MOVES and len(words) > 1 else "fused"
        return SimpleNamespace(run=lambda *_, **__: self.launches.append(Launch(self.current, name, kind, count)))


def training(audit: Audit, config: AuditConfig, batch: int, data: Path) -> None:
    """The second step of a run, as `training.setup` builds it."""
    sized = {"batch_size": batch, "micro_batch": str(batch), "align": config.align, "report_to": "none"}
    with training_run(data, Path(tempfile.mkdtemp(dir=data.parent)), config.model, **sized) as run:
        audit.name_compiled(block=run.sit.blocks, final=[run.sit.final_layer], head=run.model.heads.values())
        run.model.forward = audit.part("outside", run.model.forward)
        run.accelerator.backward = audit.part("outside, backward", run.accelerator.backward)
        run.accelerator.clip_grad_norm_ = audit.part("clip", run.accelerator.clip_grad_norm_)
        run.optimizer.step = audit.part("Adam", run.optimizer.step)
        run.ema_updater.update = audit.part("EMA", run.ema_updater.update)
        moments = torch.empty(batch, 8, 32, 32, device="cuda")
        given = {"moments": moments, "label": torch.empty(batch, dtype=torch.long, device="cuda")}
        step = audit.part("draws, data, guard", train.train_step)
        with mock.patch.object(train, "step_generator", return_value=None):  # there is no generator on a fake device
            audit.second(lambda index: step(run, index, [given]))


def sampling(audit: Audit, config: AuditConfig, batch: int, guided: bool) -> None:
    """One evaluation of the velocity, as `sample_ddp.py` makes it."""
    sit = SiT(SiTConfig.from_name(config.model)).eval().requires_grad_(False)
    put_on_device(sit, nn.Identity(), torch.device("cuda", 0), compile=True, mixed_precision="bf16")
    audit.name_compiled(block=sit.blocks, final=[sit.final_layer])
    y = torch.empty(batch, dtype=torch.long, device="cuda")
    x = torch.empty(batch, 4, 32, 32, dtype=torch.float64, device="cuda")
    velocity = guided_velocity(sit, y, 1000, 1.8 if guided else 1.0, (0.0, 1.0), torch.bfloat16)
    with torch.no_grad():
        audit.second(lambda _: audit.part("outside", velocity)(x, 0.5))
    torch._dynamo.reset()


def misfit() -> str | None:
    """Why this machine or its torch cannot be audited on, in one line; None where it can."""
    found = {
        "x86-64 Linux": (platform.system(), platform.machine()) == ("Linux", "x86_64"),
        f"torch {KNOWN}*": torch.__version__.startswith(KNOWN),
        "a torch built for CUDA": torch.version.cuda is not None,
        "Triton": importlib.util.find_spec("triton") is not None,
    }
    missing = ", ".join(name for name, there in found.items() if not there)
    return f"expected {missing}; found torch {torch.__version__} on {platform.platform()}" if missing else None


def pretend_gpu(audit: Audit) -> None:
    """Patch torch so that fake CUDA tensors can be computed with, differentiated, and compiled for an H100."""
    patch_library()
    # The device.
    torch._C._ensureCUDADeviceGuardSet()
    FakeTensorMode.avoid_device_init = property(lambda self: True)
    nn.Module.to = move
    answers = {
        torch.cuda: {
            **dict.fromkeys(("_lazy_init", "synchronize", "set_rng_state", "manual_seed_all", "set_device")),
            **dict.fromkeys(("is_available", "is_initialized", "is_bf16_supported"), True),
            **dict.fromkeys(("current_device", "_exchange_device", "_maybe_exchange_device"), 0),
            **dict.fromkeys(("get_device_properties", "_get_device_properties"), H100),
            **{"device_count": 1, "get_device_capability": (9, 0), "get_device_name": H100.name},
            **{"is_current_stream_capturing": False, "mem_get_info": (H100.total_memory, H100.total_memory)},
            "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        },
        torch._C: {
            f"_cuda_{name}": 0 for name in "getDevice exchangeDevice maybeExchangeDevice getCurrentRawStream".split()
        },
    }
    for module, functions in answers.items():
        for name, answer in functions.items():
            setattr(module, name, lambda *_, answer=answer, **__: answer)
    clip_grad._has_foreach_support = lambda *_, **__: True  # it knows no fakes

    def attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        assert attn_mask is None, "attention without a mask is all that is known here"
        sums, cudnn = query.requires_grad, torch.ops.aten._scaled_dot_product_cudnn_attention
        return cudnn(query, key, value, None, sums, dropout_p, is_causal, scale=scale)[0]

    audit.library = torch.library.Library("aten", "IMPL")  # SDPA itself would ask the device
    audit.library.impl("scaled_dot_product_attention", attend, "AutogradCUDA")
    patch_inductor(audit)


def move(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """In place of `Module.to`, which does not move fakes."""
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    for tensors in (x for part in module.modules() for x in (part._parameters, part._buffers)):
        for name, old in tensors.items():
            new = old if old is None else old.detach().to(device, dtype if old.is_floating_point() else None)
            if new is not None and (new.device, new.dtype) != (old.device, old.dtype):
                tensors[name] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
    return module


def patch_library() -> None:
    """Autograd's engine asks the driver for streams, unless there is no accelerator: return std::nullopt, and false."""
    library = ctypes.CDLL(f"{torch.__path__[0]}/lib/libtorch_cpu.so")
    for symbol in ("_ZN2at11accelerator14getAcceleratorEb", "_ZN2at11accelerator13isAcceleratorEN3c1010DeviceTypeE"):
        address = ctypes.cast(getattr(library, symbol), ctypes.c_void_p).value
        if ctypes.CDLL(None).mprotect(ctypes.c_void_p(address & ~4095), ctypes.c_size_t(8192), 7):
            raise OSError("cannot patch the code of libtorch")
        ctypes.memmove(address, b"\x31\xc0\xc3", 3)  # xor eax, eax; ret


def patch_inductor(audit: Audit) -> None:
    """Compile for an H100, and record launches in place of kernels."""
    import triton.runtime.driver
    from torch._inductor import async_compile, config, output_code
    from torch._inductor.codegen.triton import TritonKernel
    from torch._inductor.codegen.triton_combo_kernel import ComboKernel
    from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder
    from triton.backends.compiler import GPUTarget

    config.force_disable_caches, config.compile_threads = True, 1
    config.size_asserts = config.alignment_asserts = False
    config.shape_padding = False  # it times both ways on the GPU, where a size is no multiple of 8
    triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32)))

    def combine(self, *args, make=ComboKernel.codegen_kernel):
        return f"{make(self, *args)}\n# 'kernel_num_gb': {self._kernel_num_gb}\n"

    def call(graph, inputs, call=output_code.CompiledFxGraph.__call__):
        part = audit.graphs.setdefault(graph.fx_kwargs.get("graph_id"), audit.current)
        return audit.part(part + ", backward" * bool(graph.fx_kwargs.get("is_backward")), call)(graph, inputs)

    with_bytes = config.patch(benchmark_combo_kernel=True)(TritonKernel.inductor_meta_per_kernel)
    TritonKernel.inductor_meta_per_kernel, ComboKernel.codegen_kernel = with_bytes, combine
    output_code.CompiledFxGraph.__call__, guards = call, torch._C._dynamo.guards
    guards._empty_strided_cuda = lambda size, step, dtype: torch.empty_strided(size, step, dtype=dtype, device="cuda")
    guards._reinterpret_tensor = lambda x, size, stride, offset: x.as_strided(size, stride, x.storage_offset() + offset)
    async_compile.AsyncCompile.triton = lambda self, *args, **kwargs: audit.triton(*args, **kwargs)
    UniformValueConstantFolder._deduce_value = lambda self, node: self.unknown_value  # it computes on the GPU


def sums(launches: list[Launch], *fields: str) -> dict[str, dict[str, float]]:
    """Launches, GB, GFLOP, and ms by each guess, per value of the fields; the longest first."""
    found: dict[str, dict[str, float]] = {}
    for launch in launches:
        row = found.setdefault(": ".join(getattr(launch, field) for field in fields) or "total", {})
        times = {f"{guess}_ms": 1e3 * launch.seconds(guess) for guess in RATES}
        for name, value in {"launches": 1, "gb": launch.bytes / 1e9, "gflop": launch.flops / 1e9, **times}.items():
            row[name] = row.get(name, 0) + value
    return dict(sorted(found.items(), key=lambda item: -item[1]["likely_ms"]))


def show(title: str, rows: dict[str, dict[str, float]]) -> None:
    print(f"\n{title:74} launches       GB   GFLOP floor ms likely ms")
    for name, row in rows.items():
        counts = f"{row['launches']:8.0f} {row['gb']:8.2f} {row['gflop']:7.0f}"
        print(f"{name[:74]:74} {counts} {row['floor_ms']:8.2f} {row['likely_ms']:9.2f}")


def main(argv: list[str] | None = None) -> None:
    config = cli.parse(AuditConfig, argv, __doc__)
    if misfit():
        raise ValueError(misfit())
    warnings.simplefilter("ignore")
    about = provenance.stamp() | {"settings": dataclasses.asdict(config), "rates": RATES}  # before it is all pretence
    for setting in config.inductor:
        key, value = setting.split("=")
        torch._inductor.config.patch({key: json.loads(value.lower())}).__enter__()
    audit, results = Audit(), {}
    with tempfile.TemporaryDirectory() as directory:
        data = random_store(Path(directory) / "store", 32, count=max(int(case.split("-")[1]) for case in config.cases))
        pretend_gpu(audit)
        for case in config.cases:
            what, batch = case.split("-")
            with audit.fake:
                if what == "train":
                    training(audit, config, int(batch), data)
                else:
                    sampling(audit, config, int(batch), guided=what == "guided")
            kinds, parts = sums(audit.launches, "kind"), sums(audit.launches, "part")
            show(f"{case}: kinds", kinds)
            show(f"{case}: parts", parts)
            kernels = sums(audit.launches, "part", "name", "kind")
            show(f"{case}: kernels", dict(list(kernels.items())[: config.kernels])) if config.kernels else None
            total = sums(audit.launches)["total"]
            show(case, {f"total; graphs: {len(audit.graphs)}": total})
            results[case] = {"total": total, "graphs": len(audit.graphs), "kinds": kinds, "parts": parts}
    if config.output != "none":
        Path(config.output).write_text(to_json(about | {"results": results}))
        if Path(config.output) == OUTPUT:
            table.main()


if __name__ == "__main__":
    cli.run(main)
