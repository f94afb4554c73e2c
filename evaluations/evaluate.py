"""Measure samples against a reference: FID, sFID, inception score, precision, recall as the ADM suite does.

    python -m evaluations.evaluate samples.npz --ref VIRTUAL_imagenet256_labeled.npz
    torchrun --nproc_per_node 8 -m evaluations.evaluate samples.npz --ref VIRTUAL_imagenet256_labeled.npz

Either side is an npz file with `arr_0`, a folder of images, a latent store with images, or a file of statistics that
`--save-stats` wrote. Prints a table and writes `metrics.json`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for `torchrun evaluations/evaluate.py`

from runtime import cli, provenance
from runtime.cli import REQUIRED, flag

# torch and what imports it is imported where it is used, so that --help does not wait for it.
if TYPE_CHECKING:
    from evaluations.evaluator import Evaluation

FEATURES = ("inception", "dinov2", "vae", "random")


@dataclass(frozen=True)
class EvaluateConfig:
    samples: str = flag(REQUIRED, "what to measure; may also stand alone, without the flag", group="files")
    ref: str | None = flag(None, "what to measure against; without it only the inception score is", group="files")
    output: str | None = flag(
        None, "the result; by default metrics.json in the samples' folder", group="files", metavar="JSON"
    )
    save_stats: str | None = flag(
        None, "also write the samples' statistics to this npz, to be a reference or samples later", group="files"
    )

    metrics: str | None = flag(
        None,
        "comma-separated: fid, sfid, is, precision, recall, kid; with other features random-frechet, fd-dinov2, "
        "vae-frechet and so on; by default all but kid",
        group="what to measure",
    )
    features: str = flag(
        "inception",
        "comma-separated: inception (the ADM suite's), dinov2 (FD-DINOv2); for offline use vae (needs --vae), random",
        group="what to measure",
    )
    distance: str = flag(
        "fp16",
        "for precision and recall: fp16 as the ADM suite, whose sums' order is the hardware's (about 0.002), or fp32",
        choices=("fp16", "fp32"),
        group="what to measure",
    )
    k: int = flag(3, "for precision and recall: neighbour whose distance is the radius", group="what to measure")
    split_size: int = flag(5000, "images of a split of the inception score", group="what to measure")
    stored: bool = flag(
        True, "use statistics that an npz holds beside its images (--no-stored: compute them)", group="what to measure"
    )

    inception_weights: str | None = flag(
        None, "weights-inception-2015-12-05-6726825d.pth; by default torch's cache, or a download", group="networks"
    )
    dinov2_weights: str | None = flag(None, "weights of DINOv2 ViT-L/14; by default from the hub", group="networks")
    vae: str | None = flag(None, "folder of an AutoencoderKL, for --features vae", group="networks")

    batch_size: int = flag(64, "images per pass of a process", group="speed")
    device: str | None = flag(None, "cpu, cuda or cuda:1; by default a GPU if there is one", group="speed")


def main(argv: list[str] | None = None) -> None:
    """Entry point.

    Raises:
        ValueError: anything wrong with flags or input.
    """
    config = cli.parse(EvaluateConfig, samples_flag(sys.argv[1:] if argv is None else argv), __doc__.splitlines()[0])
    features = tuple(config.features.split(","))
    names = tuple(config.metrics.split(",")) if config.metrics else ()
    for flag_name, value in (("batch-size", config.batch_size), ("k", config.k), ("split-size", config.split_size)):
        if value < 1:
            raise ValueError(f"expected --{flag_name} of at least 1, found {value}")
    if len(set(features)) < len(features) or not set(features) <= set(FEATURES):
        raise ValueError(f"expected --features among {', '.join(FEATURES)}, each once, found {config.features}")
    if config.save_stats and len(features) > 1:
        raise ValueError(f"expected one of --features with --save-stats, found {config.features}")

    from evaluations.evaluator import Evaluation, Settings, chosen
    from evaluations.images import open_images

    names = chosen(names, features, config.ref is not None, saving=bool(config.save_stats))
    source = open_images(config.samples)
    if config.ref:
        open_images(config.ref)  # refused before a network is loaded
    if source.kind != "statistics" and "arr_0" in source.members and source.count <= config.k:
        raise ValueError(f"expected at least k + 1 = {config.k + 1} samples, found {source.count} in {config.samples}")
    output = Path(config.output) if config.output else default_output(source.path)
    for path, flag_name in ((output, "output"), (config.save_stats and Path(config.save_stats), "save-stats")):
        check_writable(path, flag_name)
    settings = Settings(names, config.distance, config.k, config.split_size, config.batch_size, config.stored)
    device = join_processes(config.device)

    from evaluations.networks import load_network

    weights = {"inception_weights": config.inception_weights, "dinov2_weights": config.dinov2_weights}
    networks = [load_network(name, **weights, vae=config.vae, device=device) for name in features]
    begin = time.perf_counter()
    evaluation = Evaluation(networks, config.ref, settings, saving=bool(config.save_stats))
    stored = evaluation.measure(evaluation.samples, source, "samples")
    figures = evaluation.finish()
    if figures is not None:
        if config.save_stats:
            save_statistics(config.save_stats, evaluation.samples[features[0]])
        record = describe(config, evaluation, source, stored, figures) | {"seconds": time.perf_counter() - begin}
        report(record, output)
    leave_processes()


def samples_flag(argv: list[str]) -> list[str]:
    """`argv` with the one word that belongs to no flag turned into `--samples`: every flag but two takes one value."""
    argv, index = list(argv), 0
    while index < len(argv):
        if not argv[index].startswith("-"):
            return [*argv[:index], "--samples", *argv[index:]]
        alone = "=" in argv[index] or argv[index] in ("--stored", "--no-stored", "--help", "-h")
        index += 1 if alone else 2
    return argv


def join_processes(device: str | None) -> Any:
    """Join those that `torchrun` started, if it did; returns this process's torch device."""
    import torch

    has_gpu = torch.cuda.is_available()
    name = device or ("cuda" if has_gpu else "cpu")
    try:
        chosen_device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"expected --device cpu, cuda or cuda:N, found {name}") from error
    if chosen_device.type not in ("cpu", "cuda") or (chosen_device.type == "cuda" and not has_gpu):
        raise ValueError(f"expected a --device that this machine has, found {name}; fix: --device cpu")
    if "WORLD_SIZE" in os.environ:
        torch.distributed.init_process_group("gloo")  # features are gathered on the host
        if chosen_device.type == "cuda" and chosen_device.index is None:
            chosen_device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    if chosen_device.type == "cuda":
        torch.cuda.set_device(chosen_device)
    return chosen_device


def leave_processes() -> None:
    """Undo `join_processes`."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def describe(
    config: EvaluateConfig, evaluation: Evaluation, source: Any, stored: list[str], figures: dict[str, float]
) -> dict[str, Any]:
    """Everything that `metrics.json` holds."""
    from evaluations.evaluator import METRICS, warnings_about

    reference = evaluation.source
    kinds = {METRICS[network][name][0] for network in METRICS for name in figures if name in METRICS[network]}
    neighbours = kinds & {"precision", "recall"}
    labels = source.labels if source.labels is not None else recorded_labels(source.path)
    warnings = warnings_about(source.count, labels, reference.count if neighbours else None, "score" in kinds)
    if reference is not None and None not in (source.size, reference.size) and source.size != reference.size:
        sizes = [f"{width} x {height}" for height, width in (source.size, reference.size)]
        warnings.append(f"samples are {sizes[0]}, the reference is {sizes[1]}")
    sides = {"samples": (source, stored), "reference": (reference, evaluation.reference_stored)}
    return {
        "metrics": figures,
        **{name: side and describe_side(side, taken) for name, (side, taken) in sides.items()},
        "features": {name: {"weights_sha256": network.digest} for name, network in evaluation.networks.items()},
        "settings": asdict(evaluation.settings) | {"device": str(next(iter(evaluation.networks.values())).device)},
        "flags": asdict(config),
        "warnings": warnings,
        "sampling": sampling_record(source.path),
        **provenance.stamp(),
    }


def describe_side(source: Any, stored: list[str]) -> dict[str, Any]:
    """Path, kind, count, size, digest, and which arrays were taken as they stand in the file."""
    return {
        "path": str(source.path),
        "kind": source.kind,
        "count": source.count,
        "size": source.size and list(source.size),
        "sha256": source.digest(),
        "stored": stored,
    }


def sampling_record(path: Path) -> dict[str, Any] | None:
    """`samples.json` beside the samples, or in their folder."""
    file = (path if path.is_dir() else path.parent) / "samples.json"
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"expected JSON in {file}, found {error}; fix: repair or remove it") from error


def recorded_labels(path: Path) -> Any:
    """Class of each sample as an array if `samples.json` lists them, else `None`."""
    import numpy as np

    labels = (sampling_record(path) or {}).get("labels")
    return np.asarray(labels) if isinstance(labels, list) and labels else None


def check_writable(path: Path | None, flag_name: str) -> None:
    """Refuse a destination before the slow work and not after it; makes its folder."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"expected a folder for --{flag_name} {path}, found {error.strerror}") from error
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"expected to write {path}, found that it cannot be; fix: --{flag_name} ELSEWHERE")


def default_output(path: Path) -> Path:
    """`metrics.json` in the samples' folder."""
    return (path if path.is_dir() else path.parent) / "metrics.json"


def save_statistics(path: str, statistics: Any) -> None:
    """Write the statistics under a temporary name, then rename."""
    import numpy as np

    partial = path + ".partial"
    with open(partial, "wb") as file:
        np.savez(file, **statistics.arrays())
    os.replace(partial, path)
    print(f"statistics: {path}")


def report(record: dict[str, Any], path: Path) -> None:
    """Print the table, and write `metrics.json` under a temporary name, then rename."""
    print(f"\nsamples    {record['samples']['count']:,} from {record['samples']['path']}")
    if record["reference"]:
        print(f"reference  {record['reference']['count']:,} from {record['reference']['path']}")
    for name, network in record["features"].items():
        print(f"features   {name}, weights {network['weights_sha256'][:12]}")
    width = max(map(len, record["metrics"]), default=0)
    print()
    for name, value in record["metrics"].items():
        print(f"  {name:<{width}}  {value:.6g}")
    print()
    for warning in record["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(partial, path)
    print(path)


if __name__ == "__main__":
    cli.run(main)
