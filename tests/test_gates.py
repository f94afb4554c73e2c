"""Counts that no machine changes: host reads, graph breaks and recompilations, MACs, operators of a step."""

import copy
import functools

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import train
from models.aligned import AlignedSiT
from models.projector import Projector
from models.sit import SiT, SiTConfig
from runtime.distributed import compile_each
from tests.stores import make_store, make_vae
from tests.test_methods import _fresh_accelerate  # noqa: F401
from tests.test_train import run

# Operators through which the host learns a number that the device has computed.
READS = ("_local_scalar_dense", "aten.item", "aten.is_nonzero", "aten.equal", "aten.nonzero", "aten.unique")
# Operators that only look at the same memory in another shape.
VIEWS = (
    "t view detach unsqueeze squeeze permute transpose _unsafe_view split unbind slice expand select alias as_strided"
).split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data") / "store", flips=True, images=True)


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def steps_seen(data, tmp_path, monkeypatch, **changes):
    """The operators of each step of a short run, from the draws to the EMA."""
    step, seen = train.train_step, []

    def watched(*arguments):
        with Operators() as operators:
            step(*arguments)
        seen.append(operators.names)

    monkeypatch.setattr(train, "train_step", watched)
    run(data, tmp_path, max_train_steps=4, log_every=100, **changes)
    return seen


@pytest.mark.parametrize("align", ["none", "vae", "sra+vae"])
def test_no_step_reads_a_number_from_the_device(align, data, tmp_path, monkeypatch):
    for names in steps_seen(data, tmp_path, monkeypatch, align=align, gradient_accumulation_steps=2)[1:]:
        assert len(names) > 100
        assert [name for name in names if any(read in name for read in READS)] == []


def test_a_steady_step_has_the_recorded_number_of_operators(data, tmp_path, monkeypatch):
    """Those that launch a kernel. It grows with each forgotten fusion or copy; lower it when a step gets cheaper."""
    seen = steps_seen(data, tmp_path, monkeypatch)
    counts = [sum(name.split(".")[1] not in VIEWS for name in names) for names in seen[1:]]
    assert len(set(counts)) == 1
    assert counts[0] <= 548
    assert sum("_fused_adamw" in name for name in seen[1]) == 1
    assert sum("_foreach_lerp" in name for name in seen[1]) == 1


def gigamacs(module, *inputs):
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        module(*inputs)
    return counter.get_total_flops() / 2 / 1e9


def test_macs_of_xl_2_are_those_of_the_table():
    with torch.device("meta"):
        sit = SiT(SiTConfig.from_name("SiT-XL/2"))
        head = Projector(sit.config.hidden_size, sit.config.patch_dim)
        inputs = torch.zeros(1, 4, 32, 32), torch.zeros(1), torch.zeros(1, dtype=torch.long)
    alone = gigamacs(sit, *inputs)
    assert alone == pytest.approx(118.6, abs=0.05)
    aligned = gigamacs(AlignedSiT(sit, {"vae": (8, head)}), *inputs)
    assert aligned - alone == pytest.approx(4.77, abs=0.005)
    # Table 4 leaves the attention's own products out: 2 T^2 D in each block.
    attention = 28 * 2 * 256**2 * 1152 / 1e9
    assert alone - attention == pytest.approx(114.4, abs=0.05)


@pytest.mark.slow
def test_compiled_training_never_breaks_or_compiles_again(tmp_path, monkeypatch):
    """20 steps, with images drawn from the EMA, in eval mode, between them."""
    store = make_store(tmp_path / "store", vae=make_vae(tmp_path / "vae"))
    torch._dynamo.reset()
    counters.clear()
    graphs, step = [], train.train_step

    def watched(*arguments):
        step(*arguments)
        graphs.append(counters["stats"]["unique_graphs"])

    monkeypatch.setattr(train, "train_step", watched)
    grids = {"sampling_steps": 5, "sampling_count": 4, "sampling_num_steps": 2}
    run(store, tmp_path, max_train_steps=20, compile=True, log_every=5, **grids)
    assert len(graphs) == 20
    assert graphs[0] > 0
    assert set(graphs) == {graphs[0]}
    assert not counters["graph_break"]
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("lower", [False, True])
def test_compiled_layers_compute_what_eager_ones_do(lower):
    """In float32 to 1e-5; in bfloat16 no farther from a float64 reference than eager, whose rounding is the measure.

    Gradients too. The names in the state dict stay.
    """
    torch._dynamo.reset()
    torch.manual_seed(0)
    sit = SiT(SiTConfig(2, 64, 4, patch_size=2, latent_size=8, in_channels=4, num_classes=3))
    with torch.no_grad():
        for parameter in sit.parameters():
            parameter.normal_(std=0.1)
    inputs = torch.randn(4, 4, 8, 8), torch.rand(4), torch.tensor([0, 1, 2, 3])

    def results(model, dtype=torch.float32):
        model.zero_grad()
        x, t, y = inputs
        with torch.autocast("cpu", torch.bfloat16, enabled=lower and dtype == torch.float32):
            velocity = model(x.to(dtype), t.to(dtype), y)
        velocity.to(dtype).square().mean().backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        return [value.detach().double() for value in (velocity, *gradients)]

    reference = results(copy.deepcopy(sit).double(), torch.float64)
    eager, names = results(sit), list(sit.state_dict())
    compile_each([*sit.blocks, sit.final_layer])
    compiled = results(sit)
    assert list(sit.state_dict()) == names
    for ours, theirs, exact in zip(compiled, eager, reference, strict=True):
        if not lower:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * exact.abs().max().item())
            continue
        error, rounding = ((value - exact).norm() / exact.norm() for value in (ours, theirs))
        assert 1e-4 < rounding < 0.1  # it is bfloat16
        assert error < 1.25 * rounding
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_steady_step_waits_for_the_gpu(data, tmp_path, monkeypatch):
    step = train.train_step

    def watched(training, index, micro_batches):
        torch.cuda.set_sync_debug_mode("error" if index >= 2 else "default")  # the first steps allocate and tune
        step(training, index, micro_batches)
        torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(train, "train_step", watched)
    run(data, tmp_path, max_train_steps=6, log_every=100, align="sra+vae", mixed_precision="bf16")


def test_one_process_may_compile_many_models_for_many_shapes(monkeypatch):
    """Blocks of all models share their code, so that a limit of graphs for each code would be met by all together."""
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(compile, backend="eager"))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(cache_size_limit=2, accumulated_cache_size_limit=4):
        for width in range(1, 6):
            modules = [torch.nn.Sequential(torch.nn.Linear(width, width)) for _ in range(2)]
            compile_each(modules)
            for batch in range(1, 5):
                assert all(module(torch.ones(batch, width)).shape == (batch, width) for module in modules)
    torch._dynamo.reset()
