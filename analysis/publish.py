"""Make a directory in the hub's layout of a trained model, with a model card of what the run has recorded.

    python -m analysis.publish exps/b2 --samples samples/b2
    python -m analysis.publish exps/b2/checkpoints/0400000 --output-dir b2 --include-vae --push-to name/vae-repa-b2

The directory holds `config.json`, `model.safetensors` (the EMA weights), `README.md` (the card), `samples.png` if the
run has a picture, and `vae/` if it is asked for. `sampling.pipeline.VAEREPAPipeline` and `models.sit.SiT` load it. The
same command writes it anew, but for a card that was changed by hand, which is kept.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it can be started as a file

from runtime import cli
from runtime.cli import REQUIRED, check, flag

_what = partial(flag, group="what")
_where = partial(flag, group="where")


@dataclass(frozen=True)
class PublishConfig:
    """What to publish, and where."""

    run: str = _what(REQUIRED, "a run (its newest checkpoint), or <run>/checkpoints/<step>", positional=True)
    samples: tuple[str, ...] = _what(
        (), "directories or metrics.json of samples of this checkpoint, beside those in <run>/samples", metavar="PATH"
    )
    include_vae: bool = _what(False, "put the VAE into the directory as well")
    vae: str | None = _what(None, "hub name, local directory or file of the VAE, if not where the checkpoint says")
    output_dir: str | None = _where(None, "directory to make; by default <run>/published/<run>-<step>")
    push_to: str | None = _where(None, "also upload it to the hub as NAME/REPO", metavar="NAME/REPO")

    def __post_init__(self):
        check(self, "push_to", self.push_to is None or self.push_to.count("/") == 1, "NAME/REPO")
        if self.vae is not None and not self.include_vae:
            raise ValueError("--vae: expected --include-vae beside it, which copies that VAE, found it alone")


if __name__ == "__main__":
    cli.parse_early(PublishConfig, __doc__)  # answers --help and refuses wrong flags before torch is imported

import dataclasses
import json
import os
import re
import shutil
import warnings
from typing import Any

from huggingface_hub import HfApi

from alignment.registry import METHODS
from alignment.settings import AlignmentSettings
from models.load import has_null_class, load_sit
from models.sit import SiT
from models.vae import UNKNOWN_VAE, check_vae, hub_is_reachable, load_vae
from reporting.log import read_log
from reporting.render import environment
from reporting.runs import Samples, read_json, read_samples
from reporting.values import count
from runtime import provenance
from runtime.files import fields_of, read_record, sha256
from sampling.pipeline import FIELDS, FORMAT, VERSION
from sampling.record import SETTINGS
from training.config import TrainConfig

OURS = {"config.json", "model.safetensors", "README.md", "samples.png", "vae"}  # all that may be published


@dataclass
class Records:
    """Everything that is published, as it was recorded."""

    sit: SiT
    info: dict[str, Any]  # state.json of the checkpoint, and what `load_sit` adds
    run_dir: Path | None  # None if the checkpoint lies alone
    config: dict[str, Any]  # settings of the run; empty if they were not recorded
    log: dict[str, float] | None  # the row at the checkpoint's step, or the last one before
    picture: dict[str, Any] | None  # how it was drawn
    picture_file: Path | None
    measured: list[dict[str, Any]]  # fields of the `Samples` of these weights, and "record": their metrics.json


def read_records(config: PublishConfig) -> Records:
    """What is known of a checkpoint, whose files are verified.

    Raises:
        ValueError: no checkpoint, a damaged one, or one of another project; `--samples` of another checkpoint.
    """
    if Path(config.run).is_file():
        raise ValueError(
            f"expected a run's directory or <run>/checkpoints/<step>, found the file {config.run}; a file of another "
            f"project is published by its own authors, or fine-tuned first: train.py --init-from"
        )
    sit, info = load_sit(config.run)
    source = Path(info["source"]).absolute()
    run_dir = source.parent.parent if source.parent.name == "checkpoints" else None
    trained = read_record(info["config"], fields_of(TrainConfig), source) if info["config"] else {}
    rows = [row for row in read_log(run_dir) if row["step"] <= info["step"]] if run_dir else []
    samples = find_samples(run_dir, info, [Path(path) for path in config.samples])

    # The newest picture that these weights drew; if there is none, the run's newest.
    pictures = [(found.settings, found.picture) for found in samples if found.picture]
    for grid in run_dir.glob("samples/*.png") if run_dir and trained else ():
        if grid.stem.isdigit():
            drawn = {"step": int(grid.stem), "sampler": "ode-euler", "num_steps": trained["sampling_num_steps"]}
            drawn |= {"guidance_scale": trained["sampling_guidance"], "guidance_interval": None}
            pictures.append((drawn, grid))
    newest = max(
        pictures, key=lambda one: (one[0]["step"] == info["step"], one[1].stat().st_mtime), default=(None, None)
    )
    own = [found for found in samples if found.metrics and found.settings["step"] == info["step"]]
    measured = [vars(found) | {"record": read_json(_metrics_file(found))} for found in own]
    return Records(sit, info, run_dir, trained, rows[-1] if rows else None, *newest, measured)


def find_samples(run_dir: Path | None, info: dict[str, Any], given: list[Path]) -> list[Samples]:
    """Samples in the run's directory that are known to be of the run, and those given beside, oldest first.

    Raises:
        ValueError: those given are not of this very checkpoint.
    """
    found = []
    own = sorted(path.parent for path in run_dir.glob("samples/*/samples.json")) if run_dir else []
    for path in [*own, *given]:
        samples = read_samples(path)
        try:
            settings = read_record(samples.settings, SETTINGS, path)
        except ValueError as error:
            if path in given:
                raise
            warnings.warn(f"left out: {error}", stacklevel=2)
            continue
        same = settings["checkpoint_digest"] == info["digest"]
        if path in given and not same:
            raise ValueError(
                f"--samples {path}: expected samples of {info['source']} (digest {info['digest'][:12]}...), found "
                f"those of another checkpoint; leave them out"
            )
        if settings["guidance_scale"] == 1 or settings["guidance_interval"] == (0, 1):
            settings["guidance_interval"] = None  # none is needed to tell how they were drawn
        settings["unusual"] = samples.unusual
        # Another step's are welcome as a picture; the same step's must be of the same weights.
        if same or settings["step"] not in (None, info["step"]):
            found.append(dataclasses.replace(samples, settings=settings))
    return sorted(found, key=lambda samples: _metrics_file(samples).stat().st_mtime if samples.metrics else 0)


def _metrics_file(samples: Samples) -> Path:
    return samples.path / "metrics.json" if samples.path.is_dir() else samples.path


def is_local(name: str) -> bool:
    """Whether a VAE's name is a path, or seems one, and not a name on the hub."""
    return Path(name).expanduser().exists() or name.startswith((".", "/", "~")) or name.count("/") != 1


def short(name: str) -> str:
    """A path without the directories it lies in, which are private; a name on the hub as it is."""
    return Path(name).name if is_local(name) else name


def as_text(value: Any) -> str:
    """A value as the card shows it."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(as_text, value))
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return {None: "none", True: "yes", False: "no"}.get(value) or short(value)


def write_card(records: Records, name: str, include_vae: bool) -> str:
    """The model card: YAML that the hub reads, then what the records say, and how to sample.

    Args:
        records: of the run.
        name: what to load the model by.
        include_vae: whether the directory holds the VAE.
    """
    info, config, jinja = records.info, records.config, environment()
    quoted = partial(json.dumps, ensure_ascii=False)
    jinja.filters |= {"value": as_text, "short": short, "count": count, "quoted": quoted, "plain": plain}
    return jinja.get_template("model_card.md").render(
        **vars(records),
        name=name,
        include_vae=include_vae,
        guidance=4.0 if has_null_class(info) else 1.0,
        vae_argument=info["vae"] if not include_vae and is_local(info["vae"]) else None,
        vae_digest="not recorded" if info["vae_digest"] == UNKNOWN_VAE else info["vae_digest"],
        parameters=f"{sum(parameter.numel() for parameter in records.sit.parameters()) / 1e6:.1f}M parameters",
        methods=[_method(method, config) for method in config.get("align", "none").split("+") if method != "none"],
        revision=provenance.git_revision(),  # of this code: the run's may be older than the pipeline
    )


def _method(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """Label and settings, as pairs of texts, of an alignment method; of one that this code does not know, its name."""
    fields, group = dataclasses.fields(AlignmentSettings), f"alignment: {name}"
    own = [field.name for field in fields if field.metadata["group"] == group]
    settings = [(setting.partition("_")[2].replace("_", " "), as_text(config[setting])) for setting in own]
    return {"label": METHODS[name].label if name in METHODS else name, "settings": settings}


def choose_directory(config: PublishConfig, records: Records) -> Path:
    """Where to write; refused before anything is written.

    Raises:
        ValueError: there is something else, or another model with a card that was changed by hand.
    """
    info, run_dir, source = records.info, records.run_dir, Path(records.info["source"]).absolute()
    inside = run_dir / "published" / f"{run_dir.name}-{source.name}" if run_dir else None
    directory = Path(config.output_dir or inside or source.with_name(f"{source.name}-published"))
    old = _beside(directory, "old")
    if old.is_dir():  # a process was killed while it put the new directory in the old one's place, or just after
        shutil.rmtree(old) if directory.is_dir() else os.replace(old, directory)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"--output-dir: expected a directory, found the file {directory}; choose another")
    there = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
    if not there:
        return directory
    if there - OURS or read_json(directory / "config.json").get("format") != FORMAT:
        raise ValueError(
            f"--output-dir: expected a new directory, or one that this command made, found other things in {directory} "
            f"({', '.join(sorted(there - OURS or there)[:3])}); choose another"
        )
    published = read_record(read_json(directory / "config.json"), FIELDS, directory / "config.json")
    if published["weights_sha256"] != info["digest"] and changed_card(directory):
        raise ValueError(
            f"--output-dir: {directory} holds step {published['step']}, with a README.md that was changed by hand, not "
            f"step {info['step']}; choose another, or delete that README.md"
        )
    return directory


def _beside(directory: Path, kind: str) -> Path:
    return directory.absolute().with_name(f".{directory.absolute().name}.{kind}")


def plain(text: str) -> str:
    """Text whose characters mean nothing in Markdown or HTML, in one line."""
    return re.sub(r"([\\`*_{}\[\]<>#|!&])", r"\\\1", " ".join(str(text).split()))


def changed_card(directory: Path) -> str | None:
    """The card of a published directory if it is not the one that was written."""
    card, published = directory / "README.md", read_json(directory / "config.json")
    return card.read_text() if card.is_file() and sha256(card) != published.get("card_sha256") else None


def publish(config: PublishConfig) -> Path:
    """Write the directory; it appears whole, or is left as it was.

    Raises:
        ValueError: see `read_records` and `choose_directory`; a VAE that cannot be loaded, or is another.
    """
    records = read_records(config)
    info = records.info
    directory = choose_directory(config, records)
    kept = changed_card(directory) if directory.is_dir() else None
    card = write_card(records, config.push_to or directory.absolute().name, config.include_vae)
    partial, old = _beside(directory, "partial"), _beside(directory, "old")
    try:
        # All of it in a directory beside.
        shutil.rmtree(partial, ignore_errors=True)  # what a killed process left
        partial.mkdir(parents=True)
        (partial / "README.md").write_text(card)
        content = describe_model(records, config.include_vae) | {"card_sha256": sha256(partial / "README.md")}
        (partial / "config.json").write_text(json.dumps(content, indent=2) + "\n")
        (partial / "README.md").write_text(kept or card)
        shutil.copyfile(Path(info["source"]) / "ema.safetensors", partial / "model.safetensors")
        if records.picture_file:
            shutil.copyfile(records.picture_file, partial / "samples.png")
        if config.include_vae:
            save_vae(config.vae or info["vae"], info["vae_digest"], partial / "vae")
        # Then in its place.
        if directory.is_dir():
            os.replace(directory, old)
        os.replace(partial, directory)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise ValueError(f"cannot write {directory} ({error.strerror or error}); make room, or change it") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if kept:
        print(f"{directory / 'README.md'} was changed by hand and is kept; delete it for a new one", flush=True)
    if not config.include_vae and is_local(info["vae"]):
        print(
            f"warning: the VAE of this model is a local one ({info['vae']}), which nobody else has, and its path is in "
            f"{directory / 'config.json'}; --include-vae puts it into the directory",
            file=sys.stderr,
        )
    return directory


def describe_model(records: Records, include_vae: bool) -> dict[str, Any]:
    """`config.json`: the fields of `SiTConfig`, and what sampling needs beside them."""
    info = records.info
    names = "step path_type prediction time_shift vae vae_digest resolution class_names".split()
    content = {"format": FORMAT, "format_version": VERSION} | {name: info[name] for name in names}
    content |= {"weights_sha256": info["digest"], "latent_scale": info["scale"].to_dict()}
    content["null_class"] = has_null_class(info)
    if include_vae:
        content["vae"] = short(info["vae"])
    return records.sit.config.to_dict() | content


def save_vae(name: str, expected: str, directory: Path) -> None:
    """A copy of the model's VAE as diffusers saves it.

    Raises:
        ValueError: it cannot be loaded, or is another.
    """
    vae = load_vae(name)
    check_vae(vae, name, expected)
    vae.save_pretrained(directory)
    settings = read_json(directory / "config.json")
    settings.pop("_name_or_path", None)  # where it was loaded from on this machine
    (directory / "config.json").write_text(json.dumps(settings, indent=2) + "\n")


def push(directory: Path, name: str) -> str:
    """Upload a published directory; gives its address.

    Raises:
        ValueError: the hub does not answer, or refuses.
    """
    again = f"{directory} is kept: run the same command again, or upload it by hand (hf upload {name} {directory})"
    if not hub_is_reachable():
        raise ValueError(f"--push-to {name}: the hub cannot be reached; with a network, {again}")
    api, message = HfApi(), f"Published from {directory.name}"
    gone = ["vae/*", "samples.png"]  # what an earlier upload had and this one has not
    try:
        api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=directory, commit_message=message, delete_patterns=gone)
    except (OSError, ValueError) as error:  # the client's own errors are of these kinds
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"--push-to {name}: the hub refused ({reason}); after `hf auth login`, {again}") from error
    return f"{api.endpoint}/{name}"


def main(argv: list[str] | None = None) -> None:
    config = cli.parse(PublishConfig, argv, __doc__)
    directory = publish(config)
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    names = ", ".join(sorted(path.name for path in directory.iterdir()))
    print(f"{directory}: {names}; {size / 1e6:.1f} MB", flush=True)
    if config.push_to:
        print(push(directory, config.push_to))


if __name__ == "__main__":
    cli.run(main)
