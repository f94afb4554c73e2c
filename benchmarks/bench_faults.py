"""`make bench-faults`: processes killed at random moments, flipped bits, cut files, a long run.

Each function takes what to do and how often, and gives counts; `tests/test_faults.py` calls them in short form. The
result is `results/reliability.json`.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import psutil

from analysis.doctor import examine
from analysis.timing import seconds_of
from benchmarks.record import RESULTS, ROOT
from demo.make_digits import main as make_digits
from models.load import latest_checkpoint
from reporting.log import read_log
from runtime import cli, provenance
from runtime.files import to_json

TRAIN = "--sampling-steps 0 --num-workers 1 --model SiT-Ti/4 --batch-size 8 --log-every 1 --checkpointing-steps 3"
SOAK = "--num-workers 1 --model SiT-Ti/8 --batch-size 2 --keep-every 0 --log-every 50 --sampling-count 4"
DUMP = "--resolution 32 --flip --keep-images --batch-size 16 --num-workers 1"
SAMPLE = "--num-samples 512 --num-steps 40 --per-proc-batch-size 16 --png"


@dataclass(frozen=True)
class FaultsConfig:
    share: float = cli.flag(1.0, "share of the full counts of kills, flips, cuts and steps")
    output: str = cli.flag(str(RESULTS / "reliability.json"), "the result")


def launch(program: str, flags: str, processes: int = 1, **paths: Any) -> list[str]:
    """The command line of a program of this project, alone or under torchrun."""
    several = f"-m torch.distributed.run --standalone --nproc_per_node={processes}".split() if processes > 1 else []
    named = [f"--{name.replace('_', '-')}={path}" for name, path in paths.items()]
    return [sys.executable, *several, str(ROOT / program), *flags.split(), *named]


def train_command(store: Path, steps: int, run: Path, processes: int = 1) -> list[str]:
    where = {"data_dir": store, "output_dir": run.parent, "exp_name": run.name}
    return launch("train.py", TRAIN, processes, max_train_steps=steps, **where)


def start(command: list[str]) -> tuple[psutil.Popen, IO[str]]:
    """A process, and the file that its errors go to: a pipe that nobody reads would stop it when full."""
    errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - it outlives this function
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return psutil.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors), errors


def ended_well(process: psutil.Popen, errors: IO[str]) -> None:
    process.wait()
    errors.seek(0)
    assert process.returncode == 0, errors.read()[-2000:]


def run_whole(command: list[str]) -> None:
    ended_well(*start(command))


def kill_until_done(command: list[str], most: int, seconds: float, rng: random.Random) -> int:
    """Start a command, kill it with all it has started at a random moment, and so on; then let it end.

    Args:
        most: kills, unless the command ends before.
        seconds: an undisturbed run takes; moments are uniform over that.

    Returns:
        Kills, each of which hit a running process.
    """
    for kills in range(most):
        process, errors = start(command)
        try:
            process.wait(rng.uniform(0.1, 1.0) * seconds)
        except psutil.TimeoutExpired:
            for member in [process, *process.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            process.wait()
            continue
        ended_well(process, errors)
        return kills
    run_whole(command)
    return most


def kill_many(
    command: Callable[[Path], list[str]],
    result: Callable[[Path], dict[str, bytes]],
    directory: Path,
    kills: int,
    rng: random.Random,
) -> dict[str, int]:
    """Runs of a program, each killed up to five times, until there are `kills`; each is compared to an undisturbed one.

    Args:
        command: given the directory that it is to write.
        result: the bytes of what is to be equal in that directory.

    Returns:
        {"kills", "runs", "equal"}: `equal` of `runs` ended in the undisturbed result.
    """
    seconds = seconds_of(lambda: run_whole(command(directory / "whole")))
    expected, counts = result(directory / "whole"), {"kills": 0, "runs": 0, "equal": 0}
    while counts["kills"] < kills:
        output = directory / f"run{counts['runs']}"
        counts["kills"] += kill_until_done(command(output), min(5, kills - counts["kills"]), seconds, rng)
        counts["equal"] += result(output) == expected
        counts["runs"] += 1
        shutil.rmtree(output)
    return counts


def contents(directory: Path) -> dict[str, bytes]:
    """The bytes of every file below a directory, but for samples.json, which tells how long sampling took."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != "samples.json")
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def weights(run: Path) -> dict[str, bytes]:
    """The bytes of a run's weights, moments and EMA at its newest checkpoint."""
    names, newest = ("model.safetensors", "ema.safetensors", "optimizer.pt"), latest_checkpoint(run)
    return {name: (newest / name).read_bytes() for name in names}


def corrupt_files(
    files: list[Path], find: Callable[[], bool], flips: int, cuts: int, rng: random.Random
) -> dict[str, int]:
    """Flip single bits and cut files short, one at a time, each time asking whether it is found.

    Args:
        files: chosen from evenly.
        find: whether anything is wrong is noticed; an exception counts as a traceback.

    Returns:
        {"flips", "flips_found", "cuts", "cuts_found", "tracebacks"}.
    """
    counts = {"flips": flips, "flips_found": 0, "cuts": cuts, "cuts_found": 0, "tracebacks": 0}
    assert not find(), "found something before anything was done"
    for turn, kind in enumerate(["flips"] * flips + ["cuts"] * cuts):
        file = files[turn % len(files)]
        content = file.read_bytes()
        place = rng.randrange(len(content))
        corrupt = bytearray(content)
        if kind == "flips":
            corrupt[place] ^= 1 << rng.randrange(8)
        else:
            del corrupt[place:]
        file.write_bytes(corrupt)
        try:
            counts[f"{kind}_found"] += find()
        except Exception as error:
            counts["tracebacks"] += 1
            print(f"{kind} of {file}: {type(error).__name__}: {error}")
        finally:
            file.write_bytes(content)
    return counts


def something_is_wrong(directory: Path) -> bool:
    """Whether `analysis.doctor`, which makes each reader's own checks, complains of a directory."""
    try:
        return any(finding.remedy for finding in examine(directory))
    except ValueError:  # not even recognised as what it was
        return True


def soak(store: Path, output: Path, steps: int) -> dict[str, float]:
    """A long run with checkpoints and grids: memory and open files at a fifth of it, and at the end."""
    often = {"checkpointing_steps": steps // 20, "sampling_steps": steps // 20, "max_train_steps": steps}
    command = launch("train.py", SOAK, data_dir=store, output_dir=output, exp_name="soak", **often)
    process, errors = start(command)
    seen: dict[int, tuple[float, int]] = {}
    while process.poll() is None:
        time.sleep(0.5)
        rows = read_log(output / "soak")
        with contextlib.suppress(psutil.Error):  # it has just ended
            now = process.memory_info().rss / 2**20, process.num_fds()
            seen |= {int(rows[-1]["step"]): now} if rows else {}
    ended_well(process, errors)
    early = [values for step, values in seen.items() if 0.15 * steps <= step <= 0.3 * steps]
    late = [values for step, values in seen.items() if step >= 0.85 * steps]
    memory, handles = ([float(np.median([v[k] for v in part])) for part in (early, late)] for k in (0, 1))
    found = {"memory_mib_early": memory[0], "memory_mib_late": memory[1]}
    return {"steps": steps} | found | {"handles_early": handles[0], "handles_late": handles[1]}


def measure(directory: Path, share: float) -> dict[str, dict]:
    """All counts, printed as they come."""
    rng, found, small = random.Random(0), {}, directory / "small"
    vae, digits = ROOT / "demo" / "vae", directory / "digits"
    make_digits([f"--output-dir={digits}"])

    def times(full: int) -> int:
        return max(1, round(share * full))

    def add(name: str, counts: dict) -> None:
        found[name] = counts
        print(f"{name}: {counts}", flush=True)

    def dump(output: Path) -> list[str]:
        return launch("preprocessing/dump_latents.py", DUMP, source=digits, output_dir=output, vae=vae)

    def sample(output: Path) -> list[str]:
        checkpoint = directory / "runs1" / "whole"
        return launch("sample_ddp.py", SAMPLE, checkpoint=checkpoint, output_dir=output, vae=vae)

    # Kills, beside the long run.
    run_whole(dump(directory / "store"))
    soaking = ThreadPoolExecutor(1).submit(soak, directory / "store", directory / "soak", max(400, times(20_000)))
    for processes, kills in ((1, 40), (2, 20)):
        train = partial(train_command, directory / "store", 100, processes=processes)
        counts = kill_many(train, weights, directory / f"runs{processes}", times(kills), rng)
        add(f"kills_training_{processes}", counts)
    add("kills_dumping", kill_many(dump, contents, directory / "dumps", times(20), rng))
    add("kills_sampling", kill_many(sample, contents, directory / "draws", times(20), rng))

    # Flipped bits and cut files.
    run_whole([*dump(small), "--limit=64"])
    run_whole(train_command(small, 3, directory / "runs" / "small"))
    for what, place, pattern, flips, cuts in (
        ("store", small, "*", 400, 80),
        ("checkpoint", directory / "runs" / "small", "checkpoints/*/*", 300, 60),
        ("npz", directory / "draws" / "whole", "samples.npz", 300, 60),
    ):
        files = sorted(path for path in place.glob(pattern) if path.is_file())
        add(f"harm_{what}", corrupt_files(files, partial(something_is_wrong, place), times(flips), times(cuts), rng))
    add("soak", soaking.result())
    return found


def main(argv: list[str] | None = None) -> None:
    config = cli.parse(FaultsConfig, argv, __doc__)
    with tempfile.TemporaryDirectory() as name:
        found = measure(Path(name), config.share)
    Path(config.output).write_text(to_json(found | provenance.stamp()))


if __name__ == "__main__":
    cli.run(main)
