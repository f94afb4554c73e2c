"""Two ranks that are late, leave early or see something else: nothing is lost, and they never train apart."""

import os
import signal
import subprocess
import sys

import pytest

from models.load import checkpoints
from reporting.log import read_log
from tests.stores import make_store
from tests.test_preemption import ROOT, children, wait_for_steps
from tests.test_train import run, settings


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data") / "store")


def start(trouble, data, output, **changes):
    flags = settings(data, output, batch_size=8, **changes)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, str(ROOT / "tests" / "troubled_train.py"), *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TROUBLE": trouble}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_no_rank_leaves_while_the_last_checkpoint_is_being_written(data, tmp_path):
    """Rank 1 has nothing to write; if it left, torchrun would kill rank 0."""
    process = start("slow disk", data, tmp_path, max_train_steps=3000)
    wait_for_steps(tmp_path / "run", process)
    for child in children(process.pid):
        os.kill(child, signal.SIGTERM)
    _, err = process.communicate(timeout=90)
    (folder,) = checkpoints(tmp_path / "run")
    assert int(folder.name) >= 3, err


@pytest.mark.slow
def test_rank_0_decides_where_to_resume(data, tmp_path):
    run(data, tmp_path, batch_size=8, max_train_steps=2)
    process = start("sees no checkpoint", data, tmp_path, max_train_steps=4)
    out, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    assert "resuming from" in out
    assert [row["step"] for row in read_log(tmp_path / "run")] == [1, 2, 3, 4]


@pytest.mark.slow
def test_ranks_that_read_different_checkpoints_do_not_train(data, tmp_path):
    run(data, tmp_path, batch_size=8, max_train_steps=2)
    process = start("other weights", data, tmp_path, max_train_steps=4)
    _, err = process.communicate(timeout=90)
    assert process.returncode != 0
    assert "expected the same checkpoint on all ranks, found another on rank 1 than on rank 0" in err
    assert len(read_log(tmp_path / "run")) == 2


@pytest.mark.slow
def test_a_traceback_of_one_rank_ends_all_at_once(data, tmp_path):
    """A rank that kept its batches would wait for their workers, which ignore signals, and the others for it."""
    process = start("a bug", data, tmp_path, max_train_steps=9, num_workers=1)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "[rank1]: TypeError" in err
    assert "[rank0]: Traceback" not in err


@pytest.mark.slow
def test_ddp_does_not_split_the_graphs_of_blocks(data, tmp_path):
    """One for all six blocks, the final layer, the head, though they fill several of its buckets. The losses stay."""
    losses = []
    for compile in (False, True):
        process = start("counts graphs", data, tmp_path / f"{compile}", max_train_steps=2, compile=compile)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert out.count(f"compiled {3 * compile} graphs") == 2, out
        losses.append([row["loss"] for row in read_log(tmp_path / f"{compile}" / "run")])
    assert losses[0] == losses[1]
