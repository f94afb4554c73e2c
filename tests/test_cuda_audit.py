"""LayerNorm, linear map and GELU in bfloat16, forward and backward: what the audit counts is what was counted by hand.

In a process of its own: the audit patches torch.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import cuda_audit

ROOT = Path(__file__).resolve().parent.parent
N, D, H = 8192, 1024, 4096  # rows, width, hidden width

needs_its_torch = pytest.mark.skipif(cuda_audit.misfit() is not None, reason=f"the audit: {cuda_audit.misfit()}")


def launches() -> None:
    """Prints the launches of a step of the three layers, and how many graphs were compiled."""
    audit, bf16 = cuda_audit.Audit(), torch.bfloat16
    cuda_audit.pretend_gpu(audit)
    with audit.fake:
        layers = nn.LayerNorm(D, elementwise_affine=False), nn.Linear(D, H, dtype=bf16), nn.GELU(approximate="tanh")
        model = nn.Sequential(*layers).to("cuda")
        model.compile(fullgraph=True, dynamic=False)
        audit.name_compiled(model=[model])
        x = torch.empty(N, D, dtype=bf16, device="cuda", requires_grad=True)
        audit.second(lambda _: torch.Tensor.backward(model(x), torch.empty(N, H, dtype=bf16, device="cuda")))
    print(json.dumps([len(audit.graphs), [launch._asdict() for launch in audit.launches]]))


@pytest.mark.slow
@needs_its_torch
def test_counts_are_those_made_by_hand():
    command = [sys.executable, "-c", "from tests.test_cuda_audit import launches; launches()"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    graphs, found = json.loads(done.stdout.splitlines()[-1])
    assert graphs == 1
    product = N * D + D * H + N * H  # numbers in the operands of each product
    # The norm reads and writes its rows, and keeps two float32 of each; the map adds a bias; GELU reads and writes.
    forward = [2 * 2 * N * D + 2 * 4 * N, 2 * (product + H), 2 * 2 * N * H]
    assert [launch["bytes"] for launch in found if launch["part"] == "model"] == pytest.approx(forward, rel=0.002)
    products = [launch for launch in found if launch["kind"] == "product"]
    assert [launch["flops"] for launch in products] == 3 * [2 * N * D * H]
    assert sorted(launch["bytes"] for launch in products) == [2 * product, 2 * product, 2 * (product + H)]
    (gelu,) = [launch for launch in found if "gelu_backward" in launch["name"]]
    assert gelu["bytes"] == pytest.approx(3 * 2 * N * H, rel=0.02)
    assert {launch["part"] for launch in found} >= {"model", "model, backward"}


@pytest.mark.slow
@needs_its_torch
def test_a_run_and_an_evaluation_are_audited_to_the_end(tmp_path):
    output = tmp_path / "audit.json"
    flags = ["train-4", "guided-4", "--model", "SiT-Ti/4", "--output", str(output)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.cuda_audit", *flags], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    content = json.loads(output.read_text())
    assert {"machine", "versions", "date", "git_revision", "rates"} <= content.keys()
    assert "H100" not in content["machine"]
    training, guided = content["results"]["train-4"], content["results"]["guided-4"]
    assert training["kinds"]["attention"]["launches"] == 2 * 6
    assert {"block", "block, backward", "head", "Adam", "clip", "EMA"} <= training["parts"].keys()
    assert guided["kinds"]["attention"]["launches"] == 6
    for found in (training, guided):
        for split in ("kinds", "parts"):
            assert sum(row["floor_ms"] for row in found[split].values()) == pytest.approx(found["total"]["floor_ms"])


def test_a_kernel_takes_as_long_as_its_bytes_or_its_flops():
    """By the rates of large kernels; and a product of 129 x 256, of which SMs compute whole tiles."""
    assert cuda_audit.Launch("", "x", "fused", 2.8e12).seconds("floor") == 1
    assert cuda_audit.Launch("", "x", "product", 0, 790e12).seconds("floor") == 1
    assert cuda_audit.Launch("", "x", "fused", 1).seconds("floor") == cuda_audit.SHORTEST
    assert cuda_audit.Launch("", "x_backward", "attention", 0, 400e12).seconds("floor") == 1
    m, n, k = 128 * 12, 256 * 11, 128  # one wave; half of the rate is lost to the short sum
    launch = cuda_audit.Launch("", "mm", "product", 0, 2 * m * n * k, (m, n))
    assert launch.seconds("likely") == pytest.approx(max(2 * 2 * m * n * k / 740e12, cuda_audit.SHORTEST))


def test_a_machine_that_does_not_fit_is_one_line(monkeypatch):
    monkeypatch.setattr(cuda_audit.platform, "machine", lambda: "arm64")
    with pytest.raises(ValueError, match=r"expected x86-64 Linux; found torch .* on "):
        cuda_audit.main(["train-4"])
