"""AdamW in one kernel, divided over processes, refused: the same numbers as the plain one."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from training.config import TrainConfig
from training.optimizer import (
    fix_loaded_state,
    gather_state,
    learning_rate_at,
    local_optimizer,
    make_optimizer,
    release_process_group,
    set_learning_rate,
    skip_step_if,
)

ROOT = Path(__file__).resolve().parent.parent
CONFIG = TrainConfig(data_dir="", learning_rate=1e-2, adam_weight_decay=0.1, zero1=True)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 16), nn.SiLU(), nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, 3))


def train(model, optimizer, first, last, refused=()):
    """Steps on made-up data; those in `refused` are not applied."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 7, generator=generator), torch.randn(8, 3, generator=generator)
        (model(x) - y).square().mean().backward()
        if local_optimizer(optimizer).defaults["fused"]:
            skip_step_if(optimizer, torch.tensor(float(step in refused)))
        optimizer.step()
        optimizer.zero_grad()


def test_the_fused_optimizer_equals_the_plain_one_over_20_steps():
    """To float32's rounding: the kernel multiplies and adds in one operation where the plain one rounds twice."""
    fused, plain = network(), network()
    train(fused, make_optimizer(CONFIG, fused.parameters()), 0, 20)
    reference = torch.optim.AdamW(
        plain.parameters(), lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, fused=False, foreach=False
    )
    train(plain, reference, 0, 20)
    for ours, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def divided(folder: Path) -> None:
    """What each of two processes does in the test below; started by torchrun."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    model, plain = network(), network()
    reference = torch.optim.AdamW(
        plain.parameters(), lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, fused=True
    )
    train(plain, reference, 0, 6, refused=(2,))
    whole = copy.deepcopy(reference.state_dict())
    train(plain, reference, 6, 12, refused=(7,))

    optimizer = make_optimizer(CONFIG, model.parameters())
    train(model, optimizer, 0, 6, refused=(2,))
    share = sum(values["exp_avg"].numel() for values in local_optimizer(optimizer).state.values())
    gathered = gather_state(optimizer)
    assert (gathered is None) == (rank > 0)
    if rank == 0:
        assert gathered["state"].keys() == whole["state"].keys()
        for key, values in whole["state"].items():
            assert all(torch.equal(value, gathered["state"][key][name]) for name, value in values.items())
        missing = whole["param_groups"][0].keys() - gathered["param_groups"][0].keys()
        assert not missing, missing
    train(model, optimizer, 6, 12, refused=(7,))
    equal = all(map(torch.equal, model.parameters(), plain.parameters()))

    # From a whole state, as a checkpoint of an undivided run holds it, the same way on.
    again = network()
    first = torch.optim.AdamW(again.parameters(), lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, fused=True)
    train(again, first, 0, 6, refused=(2,))
    continued = make_optimizer(CONFIG, again.parameters())
    continued.load_state_dict(whole)
    fix_loaded_state(continued)
    train(again, continued, 6, 12, refused=(7,))
    resumed = all(map(torch.equal, again.parameters(), plain.parameters()))
    total = sum(parameter.numel() for parameter in model.parameters())
    torch.save({"equal": equal, "resumed": resumed, "share": share, "total": total}, folder / f"{rank}.pt")
    release_process_group(optimizer)
    release_process_group(continued)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # torch's threads of gloo can abort while Python takes itself apart; all that is tested is done


@pytest.mark.slow
def test_divided_over_two_processes_it_does_the_same_with_half_the_moments(tmp_path):
    code = f"from pathlib import Path; from tests.test_optimizer import divided; divided(Path({str(tmp_path)!r}))"
    script = tmp_path / "divided.py"
    script.write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert all(each["equal"] and each["resumed"] for each in found)
    assert sum(each["share"] for each in found) == found[0]["total"]
    assert all(each["share"] < 0.6 * each["total"] for each in found)


def test_one_process_has_nothing_to_divide():
    optimizer = make_optimizer(CONFIG, network().parameters())
    assert type(optimizer) is torch.optim.AdamW
    assert local_optimizer(optimizer) is optimizer


def test_a_changed_learning_rate_holds_after_loading():
    model = network()
    optimizer = make_optimizer(CONFIG, model.parameters())
    train(model, optimizer, 0, 1)
    other = make_optimizer(CONFIG, network().parameters())
    other.load_state_dict(optimizer.state_dict())
    set_learning_rate(other, 0.5)
    assert [group["lr"] for group in other.param_groups] == [0.5]


def rates(steps, **settings):
    config = TrainConfig(data_dir="", learning_rate=1.0, max_train_steps=10, lr_decay_steps=10, **settings)
    return [learning_rate_at(config, step) for step in steps]


def test_learning_rate_is_a_function_of_the_step_by_formula():
    assert rates(range(4)) == [1.0] * 4
    assert rates(range(5), lr_warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0]
    linear = rates(range(12), lr_schedule="linear", lr_warmup_steps=2, lr_final=0.2)
    assert linear == pytest.approx([0.5, 1.0, *(1 - 0.1 * k for k in range(1, 9)), 0.2, 0.2])
    cosine = rates([1, 5, 9, 20], lr_schedule="cosine", lr_warmup_steps=2, lr_final=0.2)
    assert cosine == pytest.approx([1.0, 0.6, 0.2, 0.2])
    root = rates([3, 15, 63], lr_schedule="inverse-sqrt", lr_warmup_steps=4)
    assert root == pytest.approx([1.0, 0.5, 0.25])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lr_schedule": "cosine", "lr_warmup_steps": 10}, "--lr-decay-steps: expected more than the 10"),
        ({"lr_schedule": "inverse-sqrt"}, "--lr-warmup-steps: expected 1 or more"),
        ({"lr_final": -1.0}, "--lr-final"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        rates([0], **wrong)


def test_zero1_refuses_float16():
    from training.settle import resolve

    store = SimpleNamespace(meta={"resolution": 32, "vae": "none"}, num_classes=3, has_flips=False)
    config = TrainConfig(data_dir="", model="SiT-Ti/2", zero1=True, mixed_precision="fp16")
    with pytest.raises(ValueError, match="--zero1: expected --mixed-precision bf16 or no"):
        resolve(config, store, on_gpu=True)
