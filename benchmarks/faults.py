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
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent


def launch(program: str, *flags: str, processes: int = 1) -> list[str]:
    """The command line of a program of this project, alone or under torchrun."""
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [sys.executable, *(several if processes > 1 else []), str(ROOT / program), *flags]


def _start(command: list[str]) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def run_whole(command: list[str]) -> float:
    """Run a command to its end; its seconds."""
    begin = time.perf_counter()
    process = _start(command)
    _, said = process.communicate()
    assert process.returncode == 0, said
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


def kill_often(command: list[str], kills: int, seconds: float, rng: random.Random) -> int:
    """Start a command, kill it with all it has started at a random moment, and so on; then let it end.

    Args:
        kills: how often.
        seconds: an undisturbed run takes; moments are uniform over that.

    Returns:
        Kills that hit a running process: one that had ended before its moment was disturbed by none.
    """
    hits = 0
    for _ in range(kills):
        process = _start(command)
        try:
            process.wait(rng.uniform(0.2, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            hits += 1
        for member in _family(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(member, signal.SIGKILL)
        process.communicate()
    run_whole(command)
    return hits


def contents(folder: Path, ignore: Callable[[Path], bool] = lambda path: False) -> dict[str, bytes]:
    """The bytes of every file below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not ignore(path)
    }


def weights(run: Path) -> dict[str, bytes]:
    """The bytes of a run's weights, moments and averages at its newest checkpoint."""
    import checkpoint

    newest = checkpoint.latest_checkpoint(run)
    return {name: (newest / name).read_bytes() for name in ("model.safetensors", "ema.safetensors", "optimizer.pt")}


def train_command(store: Path, folder: Path, name: str, steps: int, processes: int) -> list[str]:
    return launch(
        "train.py", "--data-dir", str(store), "--output-dir", str(folder), "--exp-name", name, "--model", "SiT-Ti/4",
        "--batch-size", "8", "--max-train-steps", str(steps), "--checkpointing-steps", "3", "--log-every", "1",
        "--sampling-steps", "0", "--num-workers", "1", processes=processes,
    )  # fmt: skip


def kill_training(
    store: Path, folder: Path, runs: int, kills: int, processes: int, rng: random.Random
) -> dict[str, int]:
    """`runs` runs, each killed `kills` times, held against an undisturbed one: bit for bit."""
    steps = 120
    seconds = run_whole(train_command(store, folder, "whole", steps, processes))
    expected, hits, equal = weights(folder / "whole"), 0, 0
    for index in range(runs):
        hits += kill_often(train_command(store, folder, f"run{index}", steps, processes), kills, seconds, rng)
        equal += weights(folder / f"run{index}") == expected
        shutil.rmtree(folder / f"run{index}")
    return {"kills": runs * kills, "hits": hits, "runs": runs, "equal": equal, "processes": processes}


def kill_output(
    command: Callable[[Path], list[str]], folder: Path, runs: int, kills: int, rng: random.Random,
    ignore: Callable[[Path], bool] = lambda path: False,
) -> dict[str, int]:  # fmt: skip
    """The same for a program that leaves a folder: `command` is given the folder it is to write."""
    seconds = run_whole(command(folder / "whole"))
    expected, hits, equal = contents(folder / "whole", ignore), 0, 0
    for index in range(runs):
        hits += kill_often(command(folder / f"run{index}"), kills, seconds, rng)
        equal += contents(folder / f"run{index}", ignore) == expected
        shutil.rmtree(folder / f"run{index}")
    return {"kills": runs * kills, "hits": hits, "runs": runs, "equal": equal}


def harm_files(
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
    process = _start(
        launch(
            "train.py", "--data-dir", str(store), "--output-dir", str(folder), "--exp-name", "soak", "--model",
            "SiT-Ti/8", "--batch-size", "2", "--max-train-steps", str(steps), "--checkpointing-steps",
            str(steps // 20), "--keep-every", "0", "--log-every", "50", "--sampling-steps", str(steps // 20),
            "--sampling-count", "4", "--sampling-num-steps", "2", "--num-workers", "1",
        )
    )  # fmt: skip
    from runlog import read_log

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
    said = process.communicate()[1]
    assert process.returncode == 0, said
    early = [values for step, values in seen.items() if 0.15 * steps <= step <= 0.3 * steps]
    late = [values for step, values in seen.items() if step >= 0.85 * steps]
    memory, handles = (tuple(float(np.median([v[k] for v in part])) for part in (early, late)) for k in (0, 1))
    return {
        "steps": steps, "memory_mib_early": memory[0], "memory_mib_late": memory[1],
        "handles_early": handles[0], "handles_late": handles[1],
    }  # fmt: skip
