"""The SLURM recipe of docs/many-gpus.md, run as it stands on two CPU processes; srun and scontrol are stand-ins."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from models.load import checkpoints
from tests.stores import make_store
from tests.test_preemption import ROOT, wait_for_steps
from tests.test_train import run

SRUN = """
import os, signal, subprocess, sys
arguments = sys.argv[1:]
while arguments[0].startswith("-"):
    arguments.pop(0)
named = [{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i), "SLURM_NTASKS": "2"} for i in range(2)]
tasks = [subprocess.Popen(arguments, env=os.environ | names) for names in named]
open("PID", "w").write(str(os.getpid()))
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, frame: [task.send_signal(number) for task in tasks])
codes = [task.wait() for task in tasks]
print("exit codes", *codes, flush=True)
sys.exit(max(codes))
"""
SCONTROL = """#!/bin/sh
if [ "$1" = show ]; then echo localhost; else echo "requeued $2"; fi
"""


def recipe(data, output):
    (script,) = re.findall(
        r"^```bash\n(#!/bin/bash\n#SBATCH.*?)^```", (ROOT / "docs/many-gpus.md").read_text(), re.M | re.S
    )
    small = (
        "--batch-size 8 --sampling-steps 0 --num-workers 0 --log-every 1 --max-train-steps 3000 --learning-rate 1e-3"
    )
    small += " --ema-decay 0.9 --keep-last 9"
    for old, new in {
        "/shared/imagenet256": str(data),
        "/shared/exps": str(output),
        "SiT-XL/2": "SiT-Ti/4",
        "--batch-size 1024": small,
        "29500": str(29000 + os.getpid() % 900),
    }.items():
        assert old in script
        script = script.replace(old, new)
    return script


@pytest.mark.slow
def test_the_recipe_saves_before_the_limit_and_asks_to_be_requeued(tmp_path):
    data = make_store(tmp_path / "store")
    (tmp_path / "srun.py").write_text(SRUN.replace("PID", str(tmp_path / "srun.pid")))
    python = f'#!/bin/sh\nexec "{sys.executable}" "{tmp_path / "srun.py"}" "$@"\n'  # paths may hold a space
    programs = {"srun": python, "scontrol": SCONTROL}
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "here", "OMP_NUM_THREADS": "1"}
    script = recipe(data, tmp_path / "exps")
    (tmp_path / "job.sh").write_text(script)
    job = subprocess.Popen(
        ["bash", str(tmp_path / "job.sh")],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_steps(tmp_path / "exps" / "xl2", job)
    srun = int((tmp_path / "srun.pid").read_text())
    os.kill(srun, signal.SIGUSR1)
    begin = time.monotonic()
    out, err = job.communicate(timeout=90)
    assert time.monotonic() - begin < 60
    assert "exit codes 75 75" in out, err
    assert "requeued 7" in out
    (folder,) = checkpoints(tmp_path / "exps" / "xl2")
    # The requeued job resumes: here by one process.
    step = int(folder.name)
    resumed = run(data, tmp_path / "exps", exp_name="xl2", batch_size=8, max_train_steps=step + 1, keep_last=9)
    assert int(checkpoints(resumed)[-1].name) == step + 1
