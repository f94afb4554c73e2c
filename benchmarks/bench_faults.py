"""`make bench-faults`: processes killed, stopped and disturbed at random moments, flipped bits, cut files, a long run.

Each function takes what to do and how often, and gives counts; `tests/test_faults.py` calls them in short form. The
result is `results/reliability.json`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from analysis.doctor import examine
from analysis.timing import seconds_of
from benchmarks.record import RESULTS, ROOT, torchrun
from demo.make_digits import main as make_digits
from models.load import checkpoints, latest_checkpoint
from reporting.log import read_log
from runtime import cli, provenance
from runtime.files import to_json
from training.checkpoint import verify_checkpoint
from training.preemption import RESUMABLE

TRAIN = "--sampling-steps 0 --num-workers 1 --model SiT-Ti/4 --batch-size 8 --log-every 1 --checkpointing-steps 3"
SOAK = "--num-workers 1 --model SiT-Ti/8 --batch-size 2 --keep-every 0 --log-every 50 --sampling-count 4"
DUMP = "--resolution 32 --flip --keep-images --batch-size 16 --num-workers 1"
SAMPLE = "--num-samples 512 --num-steps 40 --per-proc-batch-size 16 --png"

PATIENCE = 120  # seconds within which all processes end after a disturbance
OWN_FRAME = re.compile(rf'File "{re.escape(str(ROOT))}/(?!\.venv/)')  # of a traceback; torchrun's own has none


@dataclass(frozen=True)
class FaultsConfig:
    share: float = cli.flag(1.0, "share of the full counts of kills, disturbances, flips, cuts and steps")
    only: str | None = cli.flag(None, "measure these alone; the result keeps its others", choices=("disturbed",))
    output: str = cli.flag(str(RESULTS / "reliability.json"), "the result")


def launch(program: str, flags: str, processes: int = 1, **paths: Any) -> list[str]:
    """The command line of a program of this project, alone or under torchrun."""
    start = torchrun(processes) if processes > 1 else [sys.executable]
    named = [f"--{name.replace('_', '-')}={path}" for name, path in paths.items()]
    return [*start, str(ROOT / program), *flags.split(), *named]


def train_command(store: Path, steps: int, run: Path, processes: int = 1) -> list[str]:
    where = {"data_dir": store, "output_dir": run.parent, "exp_name": run.name}
    return launch("train.py", TRAIN, processes, max_train_steps=steps, **where)


class Running(psutil.Popen):
    """A process, whose errors go to a file: a pipe that nobody reads would stop it when full."""

    def __init__(self, command: list[str]):
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - it outlives this function
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        super().__init__(command, env=environment, stdout=subprocess.DEVNULL, stderr=self.errors)

    def said(self) -> str:
        self.errors.seek(0)
        return self.errors.read()

    def family(self) -> list[psutil.Process]:
        """It, and all that it has started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return [self, *self.children(recursive=True)]
        return [self]

    def readers(self) -> list[psutil.Process]:
        """The DataLoader workers of its ranks, which are forks of them."""
        return [member for member in self.family()[1:] if member.cmdline() == member.parent().cmdline()]

    def wait_for(self, find: Callable[[], Any]) -> Any:
        """What `find` gives once that is something, or None when it has ended before."""
        while self.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                if found := find():
                    return found
            time.sleep(0.05)
        return None

    def ended_well(self) -> None:
        self.wait()
        assert self.returncode == 0, self.said()[-2000:]

    def ends_in_lines(self, members: list[psutil.Process]) -> bool:
        """Whether it and its `members` end in time, without a traceback of this project's code; else they are made to,
        and what was said is printed."""
        late = psutil.wait_procs(members, PATIENCE)[1]
        send(late, signal.SIGKILL)
        self.wait()
        well = not late and not OWN_FRAME.search(self.said())
        if not well:
            print(f"{self.args}: exit code {self.returncode}, {len(late)} processes hung: {self.said()}", flush=True)
        return well


def run_whole(command: list[str]) -> None:
    Running(command).ended_well()


def send(processes: list[psutil.Process], number: signal.Signals) -> None:
    for member in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.send_signal(number)


# How a running process is disturbed: given it, the directory that it writes, and the source of what is random. It tells
# whether all processes ended as they should.
Disturbance = Callable[[Running, Path, random.Random], bool]


def kill_all(process: Running, output: Path, rng: random.Random) -> bool:
    """It, and all that it has started, at once."""
    send(process.family(), signal.SIGKILL)
    process.wait()
    return True


def start_another(process: Running, output: Path, rng: random.Random) -> bool:
    """The same command once more, meanwhile: one of the two is refused in a line, or waits."""
    both = process, Running(process.args)
    well = [part.ends_in_lines(part.family()) for part in both]
    codes = sorted(part.returncode for part in both)
    refused = sum("error: another process writes to" in part.said() for part in both)
    return all(well) and codes in ([0, 0], [0, 2]) and refused == codes.count(2)


def damage_newest(process: Running, output: Path, rng: random.Random) -> bool:
    """All are killed, and its newest checkpoint, or two of more, get a flipped bit or are cut short. The same command
    sets them aside."""
    process.wait_for(lambda: len(checkpoints(output)) > 1)
    kill_all(process, output, rng)
    newest = checkpoints(output)[1:][-rng.randint(1, 2) :]
    for directory in newest:
        change_file(rng.choice(sorted(directory.iterdir())), rng.choice(("flips", "cuts")), rng)
    run_whole(process.args)
    return all(directory.with_name(f"{directory.name}.damaged").is_dir() for directory in newest)


def signal_ranks(number: signal.Signals, one: bool, process: Running, output: Path, rng: random.Random) -> bool:
    """A signal to one rank, or to all. Once steps are done it ends all with a checkpoint of the last of them."""
    ranks, members = process.wait_for(process.children) or [], process.family()
    send(rng.sample(ranks, 1) if ranks and one else ranks, number)
    well = process.ends_in_lines(members)
    if "ending the step, then saving" not in process.said():  # it came before the first step
        return well
    saved = latest_checkpoint(output)
    stopped = f"exitcode  : {RESUMABLE}" in process.said() or process.returncode == 0  # it came behind the last one
    return well and stopped and saved is not None and int(saved.name) == read_log(output)[-1]["step"]


def fill_disk(process: Running, output: Path, rng: random.Random) -> bool:
    """No file can grow beyond some size from now on: the program ends in a line."""
    members, size = process.family(), rng.randrange(2**16, 2**17)
    for member in members:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.rlimit(psutil.RLIMIT_FSIZE, (size, size))
    well = process.ends_in_lines(members)
    return well and (process.returncode == 0 or (process.returncode == 2 and process.said().count("error: ") == 1))


def kill_reader(process: Running, output: Path, rng: random.Random) -> bool:
    """A DataLoader worker of one rank, once there are some: all end, and a line says what it was to read."""
    readers, members = process.wait_for(process.readers), process.family()
    send(rng.sample(readers, 1) if readers else [], signal.SIGKILL)
    well = process.ends_in_lines(members)
    return well and (process.returncode == 0 or "from the DataLoader workers, found" in process.said())


def disturb_until_done(
    command: list[str], output: Path, most: int, seconds: float, rng: random.Random, disturb: Disturbance
) -> tuple[int, int]:
    """Start a command, disturb it at a random moment, and so on; then let it end.

    Args:
        output: the directory that it writes.
        most: disturbances, unless the command ends before.
        seconds: an undisturbed run takes; moments are uniform over that.

    Returns:
        Disturbances, each of which hit a running process; those after which all was as it should be.
    """
    well = 0
    for trials in range(most):
        process = Running(command)
        try:
            process.wait(rng.uniform(0.1, 1.0) * seconds)
        except psutil.TimeoutExpired:
            well += disturb(process, output, rng)
            continue
        process.ended_well()
        return trials, well
    run_whole(command)
    return most, well


@functools.cache  # several disturbances are compared with one run
def undisturbed(command: Callable, result: Callable, output: Path) -> tuple[float, dict[str, bytes]]:
    """Seconds that a run takes, and its result."""
    return seconds_of(lambda: run_whole(command(output))), result(output)


def disturb_many(
    command: Callable[[Path], list[str]],
    result: Callable[[Path], dict[str, bytes]],
    directory: Path,
    trials: int,
    rng: random.Random,
    disturb: Disturbance = kill_all,
    most: int = 5,
) -> dict[str, int]:
    """Runs of a program, each disturbed up to `most` times, until there are `trials`; each is compared to an
    undisturbed one.

    Args:
        command: given the directory that it is to write.
        result: the bytes of what is to be equal in that directory.

    Returns:
        {"trials", "well", "runs", "equal"}: `well` of `trials` ended at once as they should, `equal` of `runs` in the
        undisturbed result.
    """
    seconds, expected = undisturbed(command, result, directory / "whole")
    counts = dict.fromkeys(("trials", "well", "runs", "equal"), 0)
    while counts["trials"] < trials:
        output, left = directory / f"run{counts['runs']}", trials - counts["trials"]
        done, well = disturb_until_done(command(output), output, min(most, left), seconds, rng, disturb)
        equal = result(output) == expected
        counts = {name: counts[name] + more for name, more in zip(counts, (done, well, 1, equal), strict=True)}
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


def kept_and_weights(run: Path) -> dict[str, bytes]:
    """`weights`, and which checkpoints are kept, all of them whole."""
    return weights(run) | {verify_checkpoint(path) and path.name: b"" for path in checkpoints(run)}


def change_file(file: Path, kind: str, rng: random.Random) -> None:
    """Flip a bit of it ("flips"), or cut it short ("cuts"), somewhere."""
    corrupt = bytearray(file.read_bytes())
    place = rng.randrange(len(corrupt))
    if kind == "flips":
        corrupt[place] ^= 1 << rng.randrange(8)
    else:
        del corrupt[place:]
    file.write_bytes(corrupt)


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
        change_file(file, kind, rng)
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
    process = Running(command)
    seen: dict[int, tuple[float, int]] = {}
    while process.poll() is None:
        time.sleep(0.5)
        rows = read_log(output / "soak")
        with contextlib.suppress(psutil.Error):  # it has just ended
            now = process.memory_info().rss / 2**20, process.num_fds()
            seen |= {int(rows[-1]["step"]): now} if rows else {}
    process.ended_well()
    early = [values for step, values in seen.items() if 0.15 * steps <= step <= 0.3 * steps]
    late = [values for step, values in seen.items() if step >= 0.85 * steps]
    memory, handles = ([float(np.median([v[k] for v in part])) for part in (early, late)] for k in (0, 1))
    found = {"memory_mib_early": memory[0], "memory_mib_late": memory[1]}
    return {"steps": steps} | found | {"handles_early": handles[0], "handles_late": handles[1]}


def disturbances(
    dump: Callable[[Path], list[str]], directory: Path, times: Callable[[int], int], rng: random.Random
) -> Iterator[tuple[str, dict[str, int]]]:
    """What else happens to programs at random moments: two at once, a full disk, and to 2 processes that train."""

    def train(run: Path) -> list[str]:
        return [*train_command(directory / "store", 60, run, processes=2), "--keep-last=4"]

    dumped, trained = (dump, contents, directory / "dumped"), (train, kept_and_weights, directory / "trained")
    for name, place, disturb, most in (
        ("sigterm_one_rank", trained, partial(signal_ranks, signal.SIGTERM, True), 3),
        ("sigusr1_all_ranks", trained, partial(signal_ranks, signal.SIGUSR1, False), 3),
        ("killed_reader", trained, kill_reader, 3),
        ("damaged_newest", trained, damage_newest, 1),
        ("two_dumps", dumped, start_another, 1),
        ("full_disk", dumped, fill_disk, 3),
    ):
        yield name, disturb_many(*place, times(10), rng, disturb, most)


def measure(directory: Path, share: float, only: str | None) -> dict[str, dict]:
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

    # Disturbances.
    run_whole(dump(directory / "store"))
    for name, counts in disturbances(dump, directory, times, rng):
        add(f"disturbed_{name}", counts)
    if only:
        return found

    # Kills, beside the long run.
    soaking = ThreadPoolExecutor(1).submit(soak, directory / "store", directory / "soak", max(400, times(20_000)))
    for processes, kills in ((1, 40), (2, 20)):
        train = partial(train_command, directory / "store", 100, processes=processes)
        counts = disturb_many(train, weights, directory / f"runs{processes}", times(kills), rng)
        add(f"kills_training_{processes}", counts)
    add("kills_dumping", disturb_many(dump, contents, directory / "dumps", times(20), rng))
    add("kills_sampling", disturb_many(sample, contents, directory / "draws", times(20), rng))

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
        found = measure(Path(name), config.share, config.only)
    record, stamp = Path(config.output), provenance.stamp()
    if config.only:  # the others were measured elsewhere and at another time
        found = json.loads(record.read_text()) | found | {config.only: stamp}
    else:
        found |= stamp
    record.write_text(to_json(found))


if __name__ == "__main__":
    cli.run(main)
