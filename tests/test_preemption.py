"""Runs that are asked to stop, whose processes die, or whose machine is taken away: nothing is lost, all is said."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from models.load import checkpoints, latest_checkpoint
from reporting.log import read_log
from tests.stores import make_store
from tests.test_train import run, same, settings, weights
from training.preemption import RESUMABLE, StopRequest

ROOT = Path(__file__).resolve().parent.parent
STEPS = 3000  # far more than are done before the signal


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data") / "store", flips=True, images=True)


def start(data, output, processes=1, **changes):
    """Training in a process of its own, or several."""
    options = {"max_train_steps": STEPS, "batch_size": 8, "keep_last": 9} | changes
    command = [sys.executable, str(ROOT / "train.py"), *settings(data, output, **options)]
    if processes > 1:
        several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command[1:1] = several
    # A sum's order, and so its last bit, depends on the threads: alone, as many as the tests' own process has.
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if processes > 1 else {})
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_steps(folder, process, count=3):
    deadline = time.monotonic() + 120
    while len(read_log(folder)) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def children(pid):
    """Processes that `pid` has started."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(status.parent.name))
    return sorted(found)


def undisturbed(data, tmp_path, steps):
    return weights(run(data, tmp_path / "undisturbed", batch_size=8, max_train_steps=steps))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, RESUMABLE), (signal.SIGUSR1, RESUMABLE), (signal.SIGINT, 130)],
    ids=["SIGTERM", "SIGUSR1", "Ctrl-C"],
)
def test_a_signal_ends_the_step_and_saves_and_the_same_command_goes_on(number, code, data, tmp_path):
    process = start(data, tmp_path, num_workers=1)
    wait_for_steps(tmp_path / "run", process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert f"{number.name}: ending the step, then saving" in err
    step = int(latest_checkpoint(tmp_path / "run").name)
    assert re.search(rf"stopped by {number.name} after step {step}; the same command resumes from .*{step:07d}", out)
    assert "Traceback" not in err
    assert 3 <= step < STEPS
    run(data, tmp_path, batch_size=8, max_train_steps=step + 2, keep_last=9)
    assert same(weights(tmp_path / "run"), undisturbed(data, tmp_path, step + 2))


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both_and_one_goes_on(data, tmp_path):
    process = start(data, tmp_path, processes=2)
    wait_for_steps(tmp_path / "run", process)
    os.kill(children(process.pid)[1], signal.SIGUSR1)
    out, err = process.communicate(timeout=90)
    assert process.returncode != 0
    assert err.count("SIGUSR1: ending the step") == 1
    assert out.count("stopped by SIGUSR1 after step") == 1
    assert "Traceback" not in err.split("ChildFailedError")[0].split("torch/distributed")[0]
    (folder,) = checkpoints(tmp_path / "run")
    step = int(folder.name)
    run(data, tmp_path, batch_size=8, max_train_steps=step + 2)  # elastic: one process goes on where two stopped
    found, expected = weights(tmp_path / "run"), undisturbed(data, tmp_path, step + 2)
    worst = max(float((found[name] - expected[name]).abs().max()) for name in found)
    assert worst < 1e-3
    rows = {row["step"]: row["loss"] for row in read_log(tmp_path / "undisturbed" / "run")}
    for row in read_log(tmp_path / "run"):
        assert row["loss"] == pytest.approx(rows[row["step"]], rel=1e-4)


def test_a_second_ctrl_c_ends_the_process_at_once():
    request = StopRequest()
    try:
        os.kill(os.getpid(), signal.SIGINT)
        assert request.agreed() == (signal.SIGINT, False)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        request.close()
    with pytest.raises(KeyboardInterrupt):  # as before
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.slow
def test_a_process_that_dies_takes_the_others_with_it(data, tmp_path):
    process = start(data, tmp_path, processes=2)
    wait_for_steps(tmp_path / "run", process)
    begin = time.monotonic()
    os.kill(children(process.pid)[1], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    assert time.monotonic() - begin < 60
    assert "SIGKILL" in err
    assert not children(process.pid)


@pytest.mark.slow
def test_a_reader_that_dies_is_reported_with_its_samples(data, tmp_path):
    process = start(data, tmp_path, num_workers=1)
    wait_for_steps(tmp_path / "run", process)
    for child in children(process.pid):
        os.kill(child, signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2, err
    last = err.splitlines()[-1]
    assert re.search(r"error: expected .* found DataLoader worker.*samples of step \d+ \(\d+, \d+", last)
    assert "Traceback" not in err


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(data, tmp_path):
    process = start(data, tmp_path, checkpointing_steps=2)
    wait_for_steps(tmp_path / "run", process, 7)
    process.kill()
    process.communicate()
    step = int(latest_checkpoint(tmp_path / "run").name)
    run(data, tmp_path, batch_size=8, max_train_steps=step + 3, keep_last=9)
    assert same(weights(tmp_path / "run"), undisturbed(data, tmp_path, step + 3))
    assert [row["step"] for row in read_log(tmp_path / "run")] == list(range(1, step + 4))


SHORT = "import os, signal, time; from training import preemption; preemption.SECOND = 0.2"
HANGS = "import ctypes; lock = ctypes.CDLL(None).pthread_mutex_lock; it = bytes(64); lock(it); lock(it)"


@pytest.mark.parametrize("waits", ["time.sleep(9)", HANGS], ids=["in Python", "in C"])
def test_a_second_signal_ends_a_process_that_does_not_come_to_an_end(waits):
    code = (
        f"{SHORT}; preemption.StopRequest(); import threading\n"
        "def send():\n"
        "    for _ in range(2): os.kill(os.getpid(), signal.SIGTERM)\n"  # the same one by two ways
        "    time.sleep(0.5); print('here', flush=True); os.kill(os.getpid(), signal.SIGTERM)\n"
        f"threading.Thread(target=send).start(); {waits}; print('never')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "here\n")


def test_a_signal_in_the_midst_of_a_line_to_stderr_is_no_error():
    """The progress bar writes there, too; Python's buffers cannot be written by a handler meanwhile."""
    code = (
        f"{SHORT}; import io, sys\n"
        "class Terminal(io.RawIOBase):\n"
        "    def writable(self): return True\n"
        "    def write(self, content): os.kill(os.getpid(), signal.SIGTERM); return len(content)\n"
        "sys.stderr = io.TextIOWrapper(io.BufferedWriter(Terminal()))\n"
        "request = preemption.StopRequest(); print('50%', file=sys.stderr, flush=True); print(request.received.name)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "SIGTERM\n"), done.stderr
    assert done.stderr == "SIGTERM: ending the step, then saving\n"
