"""The whole way in a few minutes on two cores: real digits to latents, SiT + VAE-REPA, guided samples, a judgement.

    python -m demo.run

runs the project's own commands, each shown as it starts, and leaves in `exps/demo`: `samples.png` (a column for each
digit asked for), `summary.json` (the share of samples in which an independent classifier sees that digit, seconds,
losses) and all that the commands made. A run that was stopped is resumed by the same command.

Shape suffixes: N images, R = 32 image side, C = 4 latent channels, H = W = 8 latent side.
"""

from __future__ import annotations

import dataclasses

from runtime import cli
from runtime.cli import flag

CLASSES = 10
ROWS = 10  # of the picture: images of each digit


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    output_dir: str = flag("exps/demo", "folder of everything the demo makes, seen from the project's")
    max_train_steps: int = flag(1200, "training steps of 32 images")
    num_samples: int = flag(1000, "guided samples to judge, each digit equally often")

    def __post_init__(self):
        if self.num_samples < CLASSES or self.num_samples % CLASSES:
            raise ValueError(f"--num-samples: expected a multiple of {CLASSES}, found {self.num_samples}")
        if self.max_train_steps < 2:
            raise ValueError(f"--max-train-steps: expected at least 2, found {self.max_train_steps}")


if __name__ == "__main__":
    # Answers --help and refuses wrong flags before torch is imported.
    cli.parse_early(DemoConfig, __doc__)

import contextlib
import io
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.spatial.distance import cdist
from sklearn.svm import SVC

from dataset import LatentDataset, read_paths
from demo.digits import enlarge, fit_classifier, held_out, load_digits, reduce
from models.vae import decode_images, load_vae
from reporting.log import read_log
from runtime import provenance
from runtime.files import to_json, write_atomically

ROOT = Path(__file__).resolve().parent.parent


def commands(config: DemoConfig, cores: int, gpus: int) -> dict[str, str]:
    """The commands by stage, as a user would type them in the project's folder."""
    out = shlex.quote(config.output_dir)
    threads = min(cores, 8)  # a step is too small for more
    train = (
        f"accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no"
        f"{'' if gpus else ' --cpu'} --num_cpu_threads_per_process {threads}"
        f" train.py --data-dir {out}/latents --output-dir {out} --exp-name run"
        f" --model SiT-Ti/2 --align vae --align-depth 2"
        f" --batch-size 32 --learning-rate 1e-3 --ema-decay 0.99 --mixed-precision no --num-workers 1"
        f" --log-every 20 --checkpointing-steps 300 --keep-last 10"
        f" --sampling-steps 100 --sampling-count 36 --sampling-guidance 2 --sampling-num-steps 20"
    )
    sample = (
        f"torchrun --standalone --nproc_per_node={gpus or min(cores, 4)} sample_ddp.py"
        f" --num-samples {config.num_samples} --labels balanced --sampler ode-euler --num-steps 20"
        f" --guidance-scale 2 --per-proc-batch-size 128 --mixed-precision no --evaluate {out}/latents --features vae"
    )
    steps = config.max_train_steps
    return {
        "digits": f"python -m demo.make_digits --output-dir {out}/digits",
        "latents": f"python preprocessing/dump_latents.py --source {out}/digits --output-dir {out}/latents"
        f" --vae demo/vae --resolution 32 --keep-images --num-workers {cores}",
        "one training step": f"{train} --max-train-steps 1",
        "samples before training": f"{sample} --output-dir {out}/samples-before"
        f" --checkpoint {out}/run/checkpoints/0000001",
        "training": f"{train} --max-train-steps {steps}",
        "samples": f"{sample} --output-dir {out}/samples --checkpoint {out}/run/checkpoints/{steps:07d}",
        "report": f"python -m analysis.report {out}/run --samples {out}/samples-before {out}/samples"
        f" --output {out}/report.html",
    }


def run_stage(name: str, command: str, directory: Path) -> None:
    """Run a command in the project's folder, with its output in sight; its seconds are kept in `seconds.json`.

    A stage that is stopped adds to its seconds when it is resumed; one that had finished keeps them.

    Raises:
        ValueError: the command failed.
    """
    print(f"\n=== {name}\n$ {command}", flush=True)
    begin, code = time.perf_counter(), None
    # The commands' programs are those beside this Python, whether or not its environment is activated.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    # Threads that wait for each other by spinning are ten times slower on cores that other programs use, too.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PATH": path}
    if command.startswith("torchrun"):
        environment.setdefault("OMP_NUM_THREADS", "1")  # what torchrun sets, too, with a warning
    try:
        code = subprocess.run(shlex.split(command), cwd=ROOT, env=environment).returncode
    finally:
        seconds = read_json(directory / "seconds.json")
        stage = seconds.setdefault(name, {"seconds": 0.0, "finished": False})
        if not stage["finished"]:
            stage["seconds"] += time.perf_counter() - begin
            stage["finished"] = code == 0
            write_atomically(directory / "seconds.json", to_json(seconds))
    if code:
        fix = "what was made is kept: run the demo again once the cause is gone"
        raise ValueError(f"stage {name!r} of the demo failed with exit code {code} (see above); {fix}")


def read_json(path: Path) -> dict[str, Any]:
    """The content of a file of this program's; nothing if there is none, or none that can be read."""
    with contextlib.suppress(OSError, json.JSONDecodeError):
        return json.loads(path.read_text())
    return {}


def reconstruct_held_out(store_path: Path) -> tuple[np.ndarray, np.ndarray]:  # () -> (N, R, R, 3), (N,)
    """The VAE's images (uint8) of the latents' means, for the digits that nothing but the SiT was fitted to; labels."""
    store = LatentDataset(store_path)
    positions = np.array([int(Path(line).stem) for line in read_paths(store_path)])
    batch = store.__getitems__(np.flatnonzero(held_out(positions)))
    mean, _ = batch["moments"].chunk(2, dim=1)  # (N, C, H, W)
    with torch.no_grad():
        images = decode_images(load_vae(str(ROOT / "demo" / "vae")), store.scale.scale_latent(mean), store.scale)
    return images.numpy(), batch["label"].numpy()


def judge_classifier(store_path: Path) -> tuple[SVC, dict[str, float]]:
    """The classifier, and its accuracy on digits that it was not fitted to: recorded, enlarged, and through the VAE."""
    digits, labels = load_digits()
    unseen = held_out(np.arange(len(digits)))
    classifier = fit_classifier()
    images, image_labels = reconstruct_held_out(store_path)
    return classifier, {
        "held_out_digits": int(unseen.sum()),
        "accuracy": float(classifier.score(digits[unseen], labels[unseen])),
        "accuracy_enlarged": float(classifier.score(reduce(enlarge(digits[unseen])), labels[unseen])),
        "accuracy_reconstructed": float(classifier.score(reduce(images), image_labels)),
    }


def median_distances(images: np.ndarray) -> dict[str, float]:  # (N, R, R, 3) -> {}
    """How far samples are from the nearest real digit, beside how far real digits are from the nearest other one.

    Medians of the root mean square difference at 8 x 8, in grey levels of 16. Samples much nearer than digits are to
    each other would be copies.
    """
    digits = reduce(enlarge(load_digits()[0]))  # (M, 64)
    between = cdist(digits, digits)
    np.fill_diagonal(between, np.inf)
    root = digits.shape[1] ** 0.5
    return {
        "from_samples": float(np.median(cdist(reduce(images), digits).min(axis=1)) / root),
        "from_other_digits": float(np.median(between.min(axis=1)) / root),
    }


def draw_grid(images: np.ndarray, labels: np.ndarray, recognised: np.ndarray, path: Path) -> None:
    """A PNG of the first `ROWS` images (N, R, R, 3) of each digit, a column a digit; a red frame if not recognised."""
    figure = Figure(figsize=(7, 7.2), dpi=100, layout="constrained")
    axes = figure.subplots(ROWS, CLASSES)
    for cell in axes.flat:
        cell.set(xticks=[], yticks=[], frame_on=False)
    for digit in range(CLASSES):
        axes[0, digit].set_title(digit)
        for cell, index in zip(axes[:, digit], np.flatnonzero(labels == digit)[:ROWS], strict=False):
            cell.imshow(images[index], interpolation="bicubic")
            if not recognised[index]:
                cell.set_frame_on(True)
                cell.spines[:].set(color="red", linewidth=3)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    write_atomically(path, content.getvalue())


def load_samples(directory: Path) -> tuple[np.ndarray, np.ndarray]:  # () -> (N, R, R, 3), (N,)
    with np.load(directory / "samples.npz", allow_pickle=False) as samples:
        return samples["arr_0"], samples["arr_1"]


def summarise(
    recognised: np.ndarray, before: np.ndarray, labels: np.ndarray, rows: list[dict], seconds: dict[str, dict]
) -> dict[str, Any]:
    """What `summary.json` says of samples, losses and seconds.

    Args:
        recognised: (N,) bool, for each sample whether the classifier sees the digit asked for; `before`: the same for
            the samples drawn before training. labels: (N,) the digits asked for.
        rows: the training log, at least one row.
        seconds: by stage, as `run_stage` keeps them.
    """
    first, last = rows[0], rows[-1]
    losses = [name for name in first if name == "velocity" or name.startswith("align_")]
    steps = [first["step"], last["step"]]
    times = {name: stage["seconds"] for name, stage in seconds.items()}
    times["total"] = sum(times.values())
    return {
        "recognised": float(recognised.mean()),
        "recognised_by_digit": {str(digit): float(recognised[labels == digit].mean()) for digit in range(CLASSES)},
        "recognised_before_training": float(before.mean()),
        "samples": len(recognised),
        "losses": {name: {"first": first[name], "last": last[name], "steps": steps} for name in losses},
        "seconds": {name: round(value, 1) for name, value in times.items()},
    }


def main(argv: list[str] | None = None) -> None:
    config = cli.parse(DemoConfig, argv, __doc__)
    directory = ROOT / config.output_dir
    directory.mkdir(parents=True, exist_ok=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    stages = commands(config, cores, torch.cuda.device_count())
    for name, command in stages.items():
        run_stage(name, command, directory)

    # The judgement: what does the independent classifier see?
    begin = time.perf_counter()
    classifier, accuracy = judge_classifier(directory / "latents")
    images, labels = load_samples(directory / "samples")
    recognised = classifier.predict(reduce(images)) == labels
    images_before, labels_before = load_samples(directory / "samples-before")
    before = classifier.predict(reduce(images_before)) == labels_before
    draw_grid(images, labels, recognised, directory / "samples.png")
    seconds = read_json(directory / "seconds.json")
    seconds.setdefault("judgement", {"seconds": time.perf_counter() - begin, "finished": True})
    write_atomically(directory / "seconds.json", to_json(seconds))

    # The summary. A run that finds everything finished keeps the date and revision of the one that made it.
    summary = summarise(recognised, before, labels, read_log(directory / "run"), seconds)
    summary |= {"classifier": accuracy, "nearest_digit": median_distances(images), "commands": stages}
    samples = {"before": directory / "samples-before", "after": directory / "samples"}
    summary["metrics"] = {name: read_json(path / "metrics.json")["metrics"] for name, path in samples.items()}
    known = read_json(directory / "summary.json")
    if any(known.get(name) != value for name, value in summary.items()):
        write_atomically(directory / "summary.json", to_json(summary | provenance.stamp()))
    report(summary, config.output_dir)


def report(summary: dict[str, Any], output_dir: str) -> None:
    """The result in a few lines."""
    losses = ", ".join(f"{name} {loss['first']:.3f} -> {loss['last']:.3f}" for name, loss in summary["losses"].items())
    before, after = summary["metrics"]["before"], summary["metrics"]["after"]
    metrics = ", ".join(f"{name} {before[name]:.3g} -> {after[name]:.3g}" for name in after)
    classifier, seconds = summary["classifier"], summary["seconds"]
    print(
        f"\n=== result\n"
        f"{summary['recognised']:.1%} of {summary['samples']:,} guided samples show the digit asked for "
        f"({summary['recognised_before_training']:.1%} before training), says a classifier that is right on\n"
        f"{classifier['accuracy']:.1%} of {classifier['held_out_digits']} real digits it was not fitted to, and on "
        f"{classifier['accuracy_reconstructed']:.1%} of them after the VAE\n"
        f"losses   {losses}\n"
        f"metrics  {metrics}\n"
        f"seconds  {', '.join(f'{name} {value:g}' for name, value in seconds.items())}\n"
        f"see      {output_dir}/samples.png, {output_dir}/report.html, {output_dir}/summary.json"
    )


if __name__ == "__main__":
    cli.run(main)
