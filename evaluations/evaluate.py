"""Measure samples against a reference: FID, sFID, inception score, precision, recall as the ADM suite does.

    python -m evaluations.evaluate samples.npz --ref VIRTUAL_imagenet256_labeled.npz
    torchrun --nproc_per_node 8 -m evaluations.evaluate samples.npz --ref VIRTUAL_imagenet256_labeled.npz

Either side is an npz file with `arr_0`, a directory of images, a latent store with images, or a file of statistics that
`--save-stats` wrote. Prints a table and writes `metrics.json`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `torchrun evaluations/evaluate.py`

from runtime import cli
from runtime.cli import REQUIRED, flag

FEATURES = ("inception", "dinov2", "vae", "random")
measured, network = partial(flag, group="what to measure"), partial(flag, group="networks")


@dataclass(frozen=True)
class EvaluateConfig:
    samples: str = flag(REQUIRED, "what to measure", group="files", positional=True)
    ref: str | None = flag(None, "what to measure against; without it only the inception score is", group="files")
    output: str | None = flag(None, "default: metrics.json in the samples' directory", group="files", metavar="JSON")
    save_stats: str | None = flag(None, "npz for the samples' statistics, to be a reference or samples", group="files")

    metrics: str | None = measured(
        None,
        "comma-separated: fid, sfid, is, precision, recall, kid, mind, density, coverage; with other features "
        "random-frechet, fd-dinov2, vae-frechet and so on; by default all but the last four",
    )
    features: str = measured(
        "inception",
        "comma-separated: inception (the ADM suite's), dinov2 (FD-DINOv2); offline: vae (needs --vae), random",
    )
    distance: str = measured(
        "fp16",
        "for precision and recall: fp16 as the ADM suite, whose sums' order is the hardware's (about 0.01), or fp32",
        choices=("fp16", "fp32"),
    )
    resolution: int | None = measured(
        None,
        "side to which image files are cropped and scaled; unless set, a reference of several sizes to the samples'",
    )
    k: int = measured(3, "for precision and recall: neighbour whose distance is the radius")
    split_size: int = measured(5000, "images of a split of the inception score")
    stored: bool = measured(True, "use statistics that an npz holds beside its images (--no-stored: compute them)")

    inception_weights: str | None = network(None, "weights-inception-2015-12-05-6726825d.pth; by default downloaded")
    dinov2_weights: str | None = network(None, "weights of DINOv2 ViT-L/14; by default from the hub")
    vae: str | None = network(None, "directory of an AutoencoderKL, for --features vae")

    batch_size: int = flag(64, "images per pass of a process", group="speed")
    device: str | None = flag(None, "cpu, cuda, cuda:1 or mps; by default a GPU if there is one", group="speed")


if __name__ == "__main__":
    cli.parse_early(EvaluateConfig, __doc__)  # answers --help and refuses wrong flags before torch is imported

import numpy as np
import torch
import torch.distributed as dist

from evaluations.evaluator import Evaluation, Settings, choose_metrics, describe_source
from evaluations.feature_stats import FeatureStatistics
from evaluations.images import open_images
from evaluations.networks import load_network
from runtime import provenance
from runtime.distributed import choose_device
from runtime.files import to_json, write_atomically


def main(argv: list[str] | None = None) -> None:
    """Entry point.

    Raises:
        ValueError: anything wrong with flags or input.
    """
    config = cli.parse(EvaluateConfig, argv, __doc__)
    # Refuse wrong flags and wrong files before a network is loaded.
    for name in ("batch_size", "k", "split_size"):
        cli.check(config, name, getattr(config, name) >= 1, "at least 1")
    features = tuple(config.features.split(","))
    once = len(set(features)) == len(features)
    cli.check(config, "features", once and {*features} <= {*FEATURES}, f"names among {', '.join(FEATURES)}, each once")
    saving = bool(config.save_stats)
    cli.check(config, "features", not saving or len(features) == 1, "one of them with --save-stats")
    names = choose_metrics(config.metrics.split(",") if config.metrics else (), features, bool(config.ref), saving)
    cli.check(config, "resolution", config.resolution is None or config.resolution >= 1, "at least 1")
    cropped = bool(config.resolution)
    source = open_images(config.samples, config.resolution, cropped)
    side = config.resolution or (source.size[0] if source.size and source.size[0] == source.size[1] else None)
    if config.ref:
        open_images(config.ref, side, cropped)
    if source.kind != "statistics" and "arr_0" in source.members and source.count <= config.k:
        raise ValueError(f"expected at least k + 1 = {config.k + 1} samples, found {source.count} in {config.samples}")
    directory = source.path if source.path.is_dir() else source.path.parent
    sampling = read_sampling(directory)
    recorded = (sampling or {}).get("npz_sha256")
    if recorded and source.kind == "npz" and recorded != source.digest():
        print(
            f"{directory / 'samples.json'} is the record of another npz than {source.path}: left out", file=sys.stderr
        )
        sampling = None
    output = Path(config.output or directory / "metrics.json")
    check_writable(output, "output")
    if config.save_stats:
        check_writable(Path(config.save_stats), "save-stats")

    # Load the networks and measure both sides, the reference first.
    settings = Settings(names, config.distance, config.k, config.split_size, config.batch_size, config.stored)
    device = join_ranks(config.device)
    weights = {name: getattr(config, name) for name in ("inception_weights", "dinov2_weights", "vae")}
    networks = [load_network(name, **weights, device=device) for name in features]
    begin = time.perf_counter()
    evaluation = Evaluation(networks, config.ref, settings, saving=saving, side=side, crop=cropped)
    stored = evaluation.measure(evaluation.samples, source, "samples")
    values = evaluation.finish()

    # Rank 0 writes the result.
    if values is not None:
        if config.save_stats:
            save_statistics(config.save_stats, evaluation.samples[features[0]])
        labels = source.labels
        if labels is None and isinstance((sampling or {}).get("labels"), list):
            labels = np.asarray(sampling["labels"])
        record = evaluation.record(values, describe_source(source, stored), labels)
        record |= {"flags": asdict(config), "sampling": sampling, **provenance.stamp()}
        record["seconds"] = time.perf_counter() - begin
        print_table(record)
        write_atomically(output, to_json(record))
        print(output)
    if dist.is_initialized():
        dist.destroy_process_group()


def join_ranks(device: str | None) -> torch.device:
    """Join the ranks that `torchrun` started, if it did; returns the device of this one."""
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")  # features are gathered on the host
    return choose_device(device)


def read_sampling(directory: Path) -> dict[str, Any] | None:
    """`samples.json`, if it is there."""
    file = directory / "samples.json"
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"expected JSON in {file}, found {error}; fix: repair or remove it") from error


def check_writable(path: Path, flag_name: str) -> None:
    """Refuse a destination before the slow work and not after it; makes its directory."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"expected a directory for --{flag_name} {path}, found {error.strerror}") from error
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"expected to write {path}, found that it cannot be; fix: --{flag_name} ELSEWHERE")


def save_statistics(path: str, statistics: FeatureStatistics) -> None:
    """Write the statistics under a temporary name, then rename."""
    partial = path + ".partial"
    with open(partial, "wb") as file:
        np.savez(file, **statistics.arrays())
    os.replace(partial, path)
    print(f"statistics: {path}")


def print_table(record: dict[str, Any]) -> None:
    print(f"\nsamples    {record['samples']['count']:,} from {record['samples']['path']}")
    if record["reference"]:
        print(f"reference  {record['reference']['count']:,} from {record['reference']['path']}")
    for name, network in record["features"].items():
        print(f"features   {name}, weights {network['weights_sha256'][:12]}")
    width = max(map(len, record["metrics"]), default=0)
    print("", *(f"  {name:<{width}}  {value:.6g}" for name, value in record["metrics"].items()), "", sep="\n")
    for warning in record["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
