"""Faults made on purpose: processes killed at random moments, bits flipped, files cut short, a long run.

Each function takes what to do and how often, and gives counts; `tests/test_faults.py` calls them in short form, and
`benchmarks.bench_faults` in full.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np

ROOT = Path(__file__).resolve().parent.parent


def launch(program: str, *flags: str, processes: int = 1) -> list[str]:
    """The command line of a program of this project, alone or under torchrun."""
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [sys.executable, *(several if processes > 1 else []), str(ROOT / program), *flags]


def _start(command: list[str]) -> tuple[subprocess.Popen, IO[str]]:
    """A process, and the file that its errors go to: a pipe that nobody reads would stop it when full."""
    said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - it outlives this function
    process = subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=said,
        start_new_session=True,
    )  # fmt: skip
    return process, said


def _ended_well(process: subprocess.Popen, said: IO[str]) -> None:
    process.wait()
    said.seek(0)
    assert process.returncode == 0, said.read()[-2000:]


def run_whole(command: list[str]) -> float:
    """Run a command to its end; its seconds."""
    begin = time.perf_counter()
    _ended_well(*_start(command))
    return time.perf_counter() - begin


def _family(pid: int) -> list[int]:
    """A process and all that it has started, and so on: torchrun's workers have sessions of their own."""
    parents: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents.setdefault(int(status.read_text().rpartition(")")[2].split()[1]), []).append(
                int(status.parent.name)
            )
        except OSError:
            continue  # it has ended meanwhile
    found = [pid]
    for member in found:
        found += parents.get(member, [])
    return found


def kill_until_done(command: list[str], most: int, seconds: float, rng: random.Random) -> int:
    """Start a command, kill it with all it has started at a random moment, and so on; then let it end.

    Args:
        most: kills, unless the command ends before.
        seconds: an undisturbed run takes; moments are uniform over that.

    Returns:
        Kills, each of which hit a running process.
    """
    for kills in range(most):
        process, said = _start(command)
        try:
            process.wait(rng.uniform(0.1, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            for member in _family(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(member, signal.SIGKILL)
            process.wait()
            continue
        _ended_well(process, said)
        return kills
    run_whole(command)
    return most


def kill_many(
    command: Callable[[Path], list[str]], result: Callable[[Path], dict[str, bytes]], folder: Path, kills: int,
    rng: random.Random,
) -> dict[str, int]:  # fmt: skip
    """Runs of a program, each killed up to five times, until there are `kills`; each is compared to an undisturbed one.

    Args:
        command: given the folder that it is to write.
        result: the bytes of what is to be equal in that folder.

    Returns:
        {"kills", "runs", "equal"}: `equal` of `runs` ended in the undisturbed result.
    """
    seconds = run_whole(command(folder / "whole"))
    expected, counts = result(folder / "whole"), {"kills": 0, "runs": 0, "equal": 0}
    while counts["kills"] < kills:
        output = folder / f"run{counts['runs']}"
        counts["kills"] += kill_until_done(command(output), min(5, kills - counts["kills"]), seconds, rng)
        counts["equal"] += result(output) == expected
        counts["runs"] += 1
        shutil.rmtree(output)
    return counts


def contents(folder: Path, ignore: Callable[[Path], bool] = lambda path: False) -> dict[str, bytes]:
    """The bytes of every file below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not ignore(path)
    }


def weights(run: Path) -> dict[str, bytes]:
    """The bytes of a run's weights, moments and averages at its newest checkpoint."""
    from models import load

    newest = load.latest_checkpoint(run)
    return {name: (newest / name).read_bytes() for name in ("model.safetensors", "ema.safetensors", "optimizer.pt")}


def train_command(store: Path, run: Path, steps: int, processes: int = 1) -> list[str]:
    return launch(
        "train.py", "--data-dir", str(store), "--output-dir", str(run.parent), "--exp-name", run.name, "--model",
        "SiT-Ti/4", "--batch-size", "8", "--max-train-steps", str(steps), "--checkpointing-steps", "3", "--log-every",
        "1", "--sampling-steps", "0", "--num-workers", "1", processes=processes,
    )  # fmt: skip


def corrupt_files(
    files: list[Path], find: Callable[[], bool], flips: int, cuts: int, rng: random.Random
) -> dict[str, int]:
    """Flip single bits and cut files short, one at a time, each time asking whether it is found.

    Args:
        files: chosen from evenly.
        find: whether anything is wrong is noticed; anything but True, False and a ValueError counts as a traceback.

    Returns:
        {"flips", "flips_found", "cuts", "cuts_found", "tracebacks"}.
    """
    counts = {"flips": flips, "flips_found": 0, "cuts": cuts, "cuts_found": 0, "tracebacks": 0}
    assert not find(), "found something before anything was done"
    for kind, number in (("flips", flips), ("cuts", cuts)):
        for turn in range(number):
            file = files[turn % len(files)]
            content = file.read_bytes()
            harmed = bytearray(content)
            if kind == "flips":
                harmed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            else:
                del harmed[rng.randrange(len(content)) :]
            file.write_bytes(harmed)
            try:
                counts[f"{kind}_found"] += find()
            except Exception as error:
                counts["tracebacks"] += 1
                print(f"{kind} of {file}: {type(error).__name__}: {error}")
            finally:
                file.write_bytes(content)
    return counts


def something_is_wrong(folder: Path) -> bool:
    """Whether the doctor, to whom each reader's own checks belong, complains of a folder."""
    from analysis.doctor import examine

    try:
        return any(finding.remedy for finding in examine(folder))
    except ValueError:  # not even recognised as what it was
        return True


def soak(store: Path, folder: Path, steps: int) -> dict[str, float]:
    """A long run with checkpoints and grids: memory and open files at a fifth of it, and at the end."""
    process, said = _start(
        launch(
            "train.py", "--data-dir", str(store), "--output-dir", str(folder), "--exp-name", "soak", "--model",
            "SiT-Ti/8", "--batch-size", "2", "--max-train-steps", str(steps), "--checkpointing-steps",
            str(steps // 20), "--keep-every", "0", "--log-every", "50", "--sampling-steps", str(steps // 20),
            "--sampling-count", "4", "--sampling-num-steps", "2", "--num-workers", "1",
        )
    )  # fmt: skip
    from reporting.log import read_log

    seen: dict[int, tuple[float, int]] = {}
    while process.poll() is None:
        time.sleep(0.5)
        rows = read_log(folder / "soak")
        try:
            pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
            handles = len(os.listdir(f"/proc/{process.pid}/fd"))
        except OSError:
            continue
        if rows:
            seen[int(rows[-1]["step"])] = (pages * os.sysconf("SC_PAGE_SIZE") / 2**20, handles)
    _ended_well(process, said)
    early = [values for step, values in seen.items() if 0.15 * steps <= step <= 0.3 * steps]
    late = [values for step, values in seen.items() if step >= 0.85 * steps]
    memory, handles = (tuple(float(np.median([v[k] for v in part])) for part in (early, late)) for k in (0, 1))
    return {
        "steps": steps, "memory_mib_early": memory[0], "memory_mib_late": memory[1],
        "handles_early": handles[0], "handles_late": handles[1],
    }  # fmt: skip
