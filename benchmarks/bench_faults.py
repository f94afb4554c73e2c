"""`make bench-faults`: kills, flipped bits, cut files and a long run, into `results/reliability.json`."""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.faults import (
    ROOT,
    contents,
    corrupt_files,
    kill_many,
    launch,
    run_whole,
    soak,
    something_is_wrong,
    train_command,
    weights,
)
from benchmarks.record import RESULTS
from demo.make_digits import main as make_digits
from runtime import provenance

VAE = str(ROOT / "demo" / "vae")


def main() -> None:
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        figures = measure(folder, rng)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "reliability.json").write_text(json.dumps(figures | provenance.stamp(), indent=1) + "\n")
    print(json.dumps(figures, indent=1))


def measure(folder: Path, rng: random.Random) -> dict:
    """All figures, printed as they come."""
    figures: dict = {}

    def add(name: str, value: dict) -> None:
        figures[name] = value
        print(f"{name}: {value}", flush=True)

    make_digits(["--output-dir", str(folder / "digits")])

    def dump(output: Path) -> list[str]:
        return launch(
            "preprocessing/dump_latents.py", "--source", str(folder / "digits"), "--output-dir", str(output), "--vae",
            VAE, "--resolution", "32", "--flip", "--keep-images", "--batch-size", "16", "--num-workers", "1",
        )  # fmt: skip

    store = folder / "store"
    run_whole(dump(store))
    soaking = ThreadPoolExecutor(1).submit(soak, store, folder / "soak", 20_000)
    for processes, kills in ((1, 40), (2, 20)):

        def train(run: Path, processes: int = processes) -> list[str]:
            return train_command(store, run, 100, processes)

        add(f"kills_training_{processes}", kill_many(train, weights, folder / f"runs{processes}", kills, rng))
    add("kills_dumping", kill_many(dump, contents, folder / "dumps", 20, rng))

    def sample(output: Path) -> list[str]:
        return launch(
            "sample_ddp.py", "--checkpoint", str(folder / "runs1" / "whole"), "--output-dir", str(output),
            "--num-samples", "512", "--num-steps", "40", "--per-proc-batch-size", "16", "--vae", VAE, "--png",
        )  # fmt: skip

    def drawn(output: Path) -> dict[str, bytes]:  # but for samples.json, which tells how long it took
        return contents(output, lambda path: path.name == "samples.json")

    add("kills_sampling", kill_many(sample, drawn, folder / "draws", 20, rng))

    small = folder / "small"
    run_whole([*dump(small), "--limit", "64"])
    run_whole(train_command(small, folder / "runs" / "small", 3))
    shutil.copytree(folder / "draws" / "whole", folder / "samples")
    for what, place, pattern, flips, cuts in (
        ("store", small, "*", 400, 80),
        ("checkpoint", folder / "runs" / "small", "checkpoints/*/*", 300, 60),
        ("npz", folder / "samples", "samples.npz", 300, 60),
    ):
        files = sorted(path for path in place.glob(pattern) if path.is_file())
        add(f"harm_{what}", corrupt_files(files, lambda place=place: something_is_wrong(place), flips, cuts, rng))
    add("soak", soaking.result())
    return figures


if __name__ == "__main__":
    main()
