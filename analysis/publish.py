"""Make a folder in the hub's layout of a trained model, with a model card of what the run has recorded.

    python -m analysis.publish exps/b2 --samples samples/b2
    python -m analysis.publish exps/b2/checkpoints/0400000 --output-dir b2 --include-vae --push-to name/vae-repa-b2

The folder holds `config.json`, `model.safetensors` (the averaged weights), `README.md` (the card), `samples.png` if the
run has a picture, and `vae/` if it is asked for. `pipeline.VAEREPAPipeline` and `models.sit.SiT` load it. The same
command writes it anew, but for a card that was changed by hand, which is kept.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtime import cli
from runtime.cli import REQUIRED, flag

OURS = {"config.json", "model.safetensors", "README.md", "samples.png", "vae"}  # all that a published folder may hold
TERMS = {  # prefix of the flags; name; what a block's tokens were aligned with
    "vae": ("align", "VAE-REPA", "the clean latent of the VAE"),
    "repa": ("repa", "REPA", "a frozen encoder's tokens of the image"),
    "sra": ("sra", "SRA", "the tokens of a later block of the moving average"),
}
LISTED = 20  # classes that the card names


@dataclass(frozen=True)
class PublishConfig:
    """What to publish, and where."""

    run: str = flag(REQUIRED, "folder of a run (its newest checkpoint), or <run>/checkpoints/<step>", group="what")
    samples: tuple[str, ...] = flag(
        (),
        "folders that sample_ddp.py made of this checkpoint, or metrics.json files, beside those in <run>/samples",
        group="what",
        metavar="PATH",
    )
    include_vae: bool = flag(False, "put the VAE into the folder as well", group="what")
    vae: str | None = flag(
        None, "hub name, local folder or file of the VAE, if not where the checkpoint says", group="what"
    )
    output_dir: str | None = flag(None, "folder to make; by default <run>/published/<run>-<step>", group="where")
    push_to: str | None = flag(None, "also upload it to the hub as NAME/REPO", group="where", metavar="NAME/REPO")

    def __post_init__(self):
        if self.push_to is not None and self.push_to.count("/") != 1:
            raise ValueError(f"--push-to: expected NAME/REPO, found {self.push_to!r}")
        if self.vae is not None and not self.include_vae:
            raise ValueError("--vae: expected --include-vae beside it, which copies that VAE, found it alone")


@dataclass
class Drawn:
    """A picture, or metrics, of samples, and how they were drawn."""

    time: float  # when the file was written
    path: Path
    settings: dict[str, Any]  # sampler, num_steps, guidance_scale, guidance_interval, seed, ...
    record: dict[str, Any] = field(default_factory=dict)  # of metrics.json


@dataclass
class Records:
    """Everything the card is made of."""

    info: dict[str, Any]  # state.json of the checkpoint, and what `load_sit` adds
    parameters: int
    row: dict[str, float] | None  # the log's at the checkpoint's step, or the last one before
    picture: Drawn | None
    metrics: list[Drawn]

    @property
    def config(self) -> dict[str, Any]:
        """Settings of the run; empty if they were not recorded."""
        return self.info.get("config") or {}


def read_json(path: Path) -> dict[str, Any]:
    """A record that one of our programs wrote.

    Raises:
        ValueError: it is none.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:  # of JSON and of UTF-8, too
        raise ValueError(f"expected JSON in {path}, found {error}; repair or remove it") from error
    if not isinstance(content, dict):
        raise ValueError(f"expected a record in {path}, found a {type(content).__name__}; repair or remove it")
    return content


def read_records(config: PublishConfig) -> Records:
    """What is known of a checkpoint, whose files are verified.

    Raises:
        ValueError: no checkpoint, a damaged one, or one of another project; `--samples` of another checkpoint.
    """
    from models.load import load_sit
    from reporting.log import read_log

    if Path(config.run).is_file():
        raise ValueError(
            f"expected a run's folder or <run>/checkpoints/<step>, found the file {config.run}; a file of another "
            f"project is published by its own authors, or fine-tuned first: train.py --init-from"
        )
    sit, info = load_sit(config.run)
    source = Path(info["source"])
    run_dir = source.absolute().parent.parent if source.absolute().parent.name == "checkpoints" else None
    rows = [row for row in read_log(run_dir) if row["step"] <= info["step"]] if run_dir else []
    found = list(_drawn(run_dir, info, config.samples))
    pictures = [drawn for drawn in found if drawn.path.suffix == ".png"]
    metrics = [drawn for drawn in found if drawn.path.suffix == ".json" and drawn.settings["step"] == info["step"]]
    return Records(
        info,
        sum(parameter.numel() for parameter in sit.parameters()),
        rows[-1] if rows else None,
        # The newest that these weights drew; if there is none, the run's newest.
        max(pictures, key=lambda drawn: (drawn.settings["step"] == info["step"], drawn.time), default=None),
        sorted(metrics, key=lambda drawn: drawn.time),
    )


def _drawn(run_dir: Path | None, info: dict[str, Any], more: tuple[str, ...]) -> Iterator[Drawn]:
    """The pictures and metrics in a run's `samples`, and those given beside."""
    folder = run_dir / "samples" if run_dir else None
    trained = info.get("config") or {}
    for picture in sorted(folder.glob("*.png")) if folder else ():  # of train.py, by the step
        if picture.stem.isdigit() and "sampling_num_steps" in trained:
            settings = {"step": int(picture.stem), "sampler": "ode-euler", "num_steps": trained["sampling_num_steps"]}
            settings |= {"guidance_scale": trained["sampling_guidance"], "guidance_interval": [0.0, 1.0]}
            yield Drawn(picture.stat().st_mtime, picture, settings)
    for record in sorted(folder.glob("*/samples.json")) if folder else ():
        yield from _of_set(record.parent, info, required=False)
    for path in map(Path, more):
        yield from _of_metrics(path, info, required=True) if path.is_file() else _of_set(path, info, required=True)


def _of_set(folder: Path, info: dict[str, Any], required: bool) -> Iterator[Drawn]:
    """Picture and metrics of a folder of samples."""
    if not (folder / "samples.json").is_file():
        raise ValueError(f"--samples: expected a folder with samples.json, or a metrics.json, found {folder}")
    settings = read_json(folder / "samples.json").get("settings") or {}
    if not _belongs(folder, settings, info, required):
        return
    if (folder / "samples.png").is_file():
        yield Drawn((folder / "samples.png").stat().st_mtime, folder / "samples.png", settings)
    if (folder / "metrics.json").is_file():
        yield from _of_metrics(folder / "metrics.json", info, required)


def _of_metrics(path: Path, info: dict[str, Any], required: bool) -> Iterator[Drawn]:
    record = read_json(path)
    settings = (record.get("sampling") or {}).get("settings") or {}
    if _belongs(path, settings, info, required):
        yield Drawn(path.stat().st_mtime, path, settings, record)


def _belongs(path: Path, settings: dict[str, Any], info: dict[str, Any], required: bool) -> bool:
    """Whether samples are known to be of the same run: those of another step are told by their settings.

    Raises:
        ValueError: they must be of this very checkpoint, and are not.
    """
    same = settings.get("checkpoint_digest") == info["digest"]
    if required and not same:
        raise ValueError(
            f"--samples {path}: expected samples of {info['source']} (digest {info['digest'][:12]}...), found those of "
            f"{'another checkpoint' if settings.get('checkpoint_digest') else 'an unknown one'}; leave them out"
        )
    # In the run's own folder another step's are welcome as a picture; the same step's must be of the same weights.
    return same or (isinstance(settings.get("step"), int) and settings["step"] != info["step"])


def describe_model(records: Records, include_vae: bool) -> dict[str, Any]:
    """`config.json`: the fields of `SiTConfig`, and what sampling needs beside them."""
    from sampling.pipeline import FORMAT, VERSION

    info = records.info
    fields = read_json(Path(info["source"]) / "config.json")
    # Of a VAE that comes along nobody needs to know where it lay.
    vae = _short(info["vae"]) if include_vae else info["vae"]
    return fields | {
        "format": FORMAT, "format_version": VERSION, "step": info["step"], "weights_sha256": info["digest"],
        "path_type": info["path_type"], "latent_scale": info["scale"].to_dict(), "vae": vae,
        "vae_digest": info["vae_digest"], "resolution": info["resolution"], "class_names": info["class_names"],
    }  # fmt: skip


def is_local(name: str) -> bool:
    """Whether a VAE's name is a path, or seems one, and not a name on the hub."""
    return Path(name).expanduser().exists() or name.startswith((".", "/", "~")) or name.count("/") != 1


def _short(name: str) -> str:
    """A path without the folders it lies in, which are nobody's business; a name on the hub as it is."""
    return Path(name).name if is_local(name) else name


def write_card(records: Records, name: str, include_vae: bool) -> str:
    """The model card: YAML that the hub reads, then what the records say, and how to sample.

    Args:
        records: of the run.
        name: what to load the model by.
        include_vae: whether the folder holds the VAE.
    """
    from huggingface_hub import ModelCardData

    info, config = records.info, records.config
    terms = [term for term in config.get("align", "none").split("+") if term in TERMS]
    title = " + ".join([config.get("model", "SiT"), *(TERMS[term][1] for term in terms)])
    classes = len(info["class_names"])
    kind = "class-conditional-image-generation"
    tags = ["vae-repa", "sit", "diffusion", "image-generation", *([kind] if classes > 1 else [])]
    data = ModelCardData(  # of the hub's tasks, this one is for models that take no text and no image
        license="apache-2.0", library_name="vae-repa", pipeline_tag="unconditional-image-generation",
        tags=[*tags, "pytorch_model_hub_mixin", "model_hub_mixin"],
    )  # fmt: skip
    aligned = [f"{TERMS[term][2]} ({TERMS[term][1]})" for term in terms]
    lines = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {title}, step {info['step']:,}\n",
        f"A diffusion transformer (SiT, {records.parameters / 1e6:.1f}M parameters) that draws images of "
        f"{_size(info)} of {_count(classes, 'class', 'classes')}. "
        + (f"While it was trained, tokens within it were aligned with {' and '.join(aligned)}. " if aligned else "")
        + f"The weights are the moving average (EMA) after step {info['step']:,}.\n",
        "This card is made from the run's own records: what it does not say was not recorded.\n",
        *_picture(records),
        "## Use\n",
        *_usage(records, name, include_vae),
        "## Training\n",
        _table(_training(records, terms, include_vae)),
        *_losses(records),
        "## Measured\n",
        *_measured(records),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _size(info: dict[str, Any]) -> str:
    return f"{info['resolution']} x {info['resolution']} pixels"


def _count(number: int, one: str, several: str) -> str:
    return f"{number:,} {one if number == 1 else several}"


def _figure(value: Any) -> str:
    """A value as the card shows it."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_figure, value))
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _table(rows: dict[str, str], heads: tuple[str, str] = ("", "")) -> str:
    """A Markdown table of two columns."""
    rows = {name: value.replace("|", "\\|") for name, value in rows.items()}
    lines = [f"| {heads[0]} | {heads[1]} |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    return "\n".join(lines) + "\n"


def _sampling(settings: dict[str, Any]) -> str:
    """How samples were drawn, in words."""
    scale, interval = settings.get("guidance_scale", 1.0), settings.get("guidance_interval") or [0.0, 1.0]
    guidance = f"guidance {scale:g}" if scale != 1 else "no guidance"
    if scale != 1 and list(interval) != [0.0, 1.0]:
        guidance += f" for t in [{interval[0]:g}, {interval[1]:g}]"
    seed = f", seed {settings['seed']}" if "seed" in settings else ""
    return f"{settings['sampler']}, {_count(settings['num_steps'], 'step', 'steps')}, {guidance}{seed}"


def _picture(records: Records) -> list[str]:
    picture = records.picture
    if picture is None:
        return ["No picture of samples was recorded.\n"]
    if picture.settings["step"] == records.info["step"]:
        by = "Drawn by these weights"
    else:
        by = f"Drawn after step {picture.settings['step']:,} of the same run, not by these weights"
    return ["![Samples](samples.png)\n", f"{by}: {_sampling(picture.settings)}.\n"]


def _usage(records: Records, name: str, include_vae: bool) -> list[str]:
    """How to load and sample: Python that runs as it stands, by the settings of the picture if there is one."""
    from runtime import provenance

    info, picture = records.info, records.picture
    settings = {"guidance_scale": 4.0, "sampler": "sde", "num_steps": 250} | (picture.settings if picture else {})
    classes = info["class_names"]
    arguments = f"guidance_scale={settings['guidance_scale']:g}, "
    if settings["guidance_scale"] != 1 and list(settings.get("guidance_interval") or [0.0, 1.0]) != [0.0, 1.0]:
        arguments += f"guidance_interval={tuple(settings['guidance_interval'])}, "
    if settings.get("last_t") not in (None, 0.04):
        arguments += f"last_t={settings['last_t']:g}, "
    arguments += f'num_inference_steps={settings["num_steps"]}, sampler="{settings["sampler"]}"'
    alone = not include_vae and is_local(info["vae"])
    quoted = json.dumps(name, ensure_ascii=False)
    vae = f", vae={json.dumps(info['vae'], ensure_ascii=False)}" if alone else ""
    revision = provenance.git_revision()  # of this code: the run's may be older than the pipeline
    revision = "" if revision == "unknown" else f" (git revision `{revision}`)"
    if classes == [str(number) for number in range(len(classes))]:
        named = f"0 to {len(classes) - 1}" if len(classes) > 1 else "0"
    else:
        named = ", ".join(f"{number} = {label}" for number, label in enumerate(classes[:LISTED]))
        named += "" if len(classes) <= LISTED else ", ...; all are in `config.json`"
    return [
        f"Run this in a copy of the code that it comes from{revision}, with its `requirements.txt` installed. "
        f"`{name}` is this folder, or its name on the hub."
        + (" The VAE is not part of this model; `vae` is where it lay when it was trained." if alone else "")
        + "\n",
        "```python",
        "from pipeline import VAEREPAPipeline",
        "",
        f"pipe = VAEREPAPipeline.from_pretrained({quoted}{vae})",
        f"images = pipe(class_labels={list(range(min(4, len(classes))))}, {arguments}, seed=0).images",
        "for number, image in enumerate(images):",
        '    image.save(f"sample-{number}.png")',
        "```\n",
        f"A class is given by its number or its name: {named}.\n",
        "The network by itself, without VAE and sampler:\n",
        "```python",
        "from models.sit import SiT",
        "",
        f"sit = SiT.from_pretrained({quoted})  # velocity = sit(x (N, C, H, W), t (N,), y (N,)); t = 1 is noise",
        "```\n",
    ]


def _training(records: Records, terms: list[str], include_vae: bool) -> dict[str, str]:
    """What was trained, on what, and how, by the heads of the table's rows."""
    from models.vae import UNKNOWN_VAE

    info, config, row = records.info, records.config, records.row
    rows = {"model": f"{config.get('model', 'SiT')}, {records.parameters / 1e6:.1f}M parameters"}
    rows["path"] = info["path_type"]
    rows["steps"] = f"{info['step']:,}" + (f" ({row['epoch']:.1f} epochs)" if row and "epoch" in row else "")
    if "align" in config and not terms:
        rows["alignment"] = "none (plain SiT)"
    common = ("align_beta", "align_time_range")
    for term in terms:
        prefix, name, _ = TERMS[term]
        own = {key: value for key, value in config.items() if key.startswith(prefix + "_") and key not in common}
        if own.get("repa_weights"):
            own["repa_weights"] = _short(own["repa_weights"])
        said = [f"{key.removeprefix(prefix + '_').replace('_', ' ')} {_figure(value)}" for key, value in own.items()]
        rows[f"alignment: {name}"] = "; ".join(said)
    if terms:
        times = " to ".join(map(_figure, config["align_time_range"]))
        rows["every alignment"] = f"beta of smooth L1 {_figure(config['align_beta'])}; times {times}"
    data = f"`{Path(config['data_dir']).name}`, " if "data_dir" in config else ""
    data += f"{_size(info)}, {_count(len(info['class_names']), 'class', 'classes')}"
    rows["data"] = data + (", mirrored at random" if config.get("random_flip") else "")
    scale = info["scale"]
    rows["latents"] = f"z = (f - shift) x scale; scale {_figure(scale.scale)}; shift {_figure(scale.shift)}"
    name = "in `vae/`" if include_vae else f"`{_short(info['vae'])}`, not included"
    rows["VAE"] = f"{name}; digest {'not recorded' if info['vae_digest'] == UNKNOWN_VAE else info['vae_digest']}"
    for head, keys in {
        "batch": ("batch_size",),
        "learning rate": ("learning_rate",),
        "AdamW": ("adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon"),
        "gradient norm clipped at": ("max_grad_norm",),
        "EMA decay": ("ema_decay",),
        "labels dropped": ("label_dropout",),
        "mixed precision": ("mixed_precision",),
        "seed": ("seed",),
    }.items():
        if set(keys) <= set(config):
            several = len(keys) > 1
            said = [f"{key.removeprefix('adam_').replace('_', ' ')} " * several + _figure(config[key]) for key in keys]
            rows[head] = "; ".join(said)
    if info.get("initial"):
        initial = info["initial"]
        rows["started from"] = f"`{Path(initial['source']).name}` ({initial['read_as']}), SHA-256 {initial['digest']}"
    if info.get("versions"):
        rows["versions"] = ", ".join(f"{name} {version}" for name, version in info["versions"].items())
    for head, key in (("git revision", "git_revision"), ("hardware", "machine"), ("started or last continued", "date")):
        if info.get(key):
            rows[head] = info[key]
    rows["weights"] = f"SHA-256 {info['digest']}"
    return rows


def _losses(records: Records) -> list[str]:
    """The log's last row."""
    row = records.row
    if row is None:
        return ["No log of the losses was kept.\n"]
    shown = {
        f"`{name}`": _figure(value)
        for name, value in row.items()
        if name in ("loss", "velocity", "grad_norm") or name.startswith("align_")
    }
    return [f"Means over the last logged steps, up to step {row['step']:,}:\n", _table(shown, ("", "mean"))]


def _measured(records: Records) -> list[str]:
    """Each set of samples of these weights that was measured."""
    lines = []
    for drawn in records.metrics:
        record, reference = drawn.record, drawn.record.get("reference")
        count = (record.get("samples") or {}).get("count")
        labels = f", labels {drawn.settings['labels']}" if "labels" in drawn.settings else ""
        said = f"{_count(count, 'sample', 'samples') if count else 'Samples'} ({_sampling(drawn.settings)}{labels})"
        if reference:
            said += f", compared with {_count(reference['count'], 'image', 'images')} of `{_short(reference['path'])}`"
        features = ", ".join(record.get("features") or {})
        said += f"; features: {features}." if features else "."
        metrics = {f"`{name}`": _figure(value) for name, value in record.get("metrics", {}).items()}
        lines += [f"{said}\n", _table(metrics, ("", "value"))]
        warnings = [f"- {' '.join(warning.split())}" for warning in record.get("warnings") or ()]
        lines += ["\n".join(warnings) + "\n"] if warnings else []
    return lines or ["No metrics of samples of these weights were recorded.\n"]


def _beside(folder: Path, kind: str) -> Path:
    return folder.absolute().with_name(f".{folder.absolute().name}.{kind}")


def choose_folder(config: PublishConfig, info: dict[str, Any]) -> Path:
    """Where to write; refused before anything is written.

    Raises:
        ValueError: there is something else, or another model with a card that was changed by hand.
    """
    from sampling.pipeline import FORMAT

    source = Path(info["source"]).absolute()
    if config.output_dir:
        folder = Path(config.output_dir)
    elif source.parent.name == "checkpoints":
        run_dir = source.parent.parent
        folder = run_dir / "published" / f"{run_dir.name}-{source.name}"
    else:
        folder = source.with_name(f"{source.name}-published")
    old = _beside(folder, "old")
    if old.is_dir():  # a process was killed while it put the new folder in the old one's place, or just after
        shutil.rmtree(old) if folder.is_dir() else os.replace(old, folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output-dir: expected a folder, found the file {folder}; choose another")
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if not there:
        return folder
    published = read_json(folder / "config.json") if "config.json" in there else {}
    if there - OURS or published.get("format") != FORMAT:
        raise ValueError(
            f"--output-dir: expected a new folder, or one that this command made, found other things in {folder} "
            f"({', '.join(sorted(there - OURS or there)[:3])}); choose another"
        )
    if published["weights_sha256"] != info["digest"] and _changed_card(folder):
        raise ValueError(
            f"--output-dir: {folder} holds step {published['step']}, with a README.md that was changed by hand, not "
            f"step {info['step']}; choose another, or delete that README.md"
        )
    return folder


def _changed_card(folder: Path) -> str | None:
    """The card of a published folder if it is not the one that was written."""
    from hashlib import sha256

    file = folder / "README.md"
    if not file.is_file():
        return None
    card = file.read_text()
    published = read_json(folder / "config.json")
    return None if sha256(card.encode()).hexdigest() == published.get("card_sha256") else card


def publish(config: PublishConfig) -> Path:
    """Write the folder; it appears whole, or is left as it was.

    Raises:
        ValueError: see `read_records` and `choose_folder`; a VAE that cannot be loaded, or is another.
    """
    from hashlib import sha256

    records = read_records(config)
    info = records.info
    folder = choose_folder(config, info)
    kept = _changed_card(folder) if (folder / "config.json").is_file() else None
    card = write_card(records, config.push_to or folder.absolute().name, config.include_vae)
    content = describe_model(records, config.include_vae) | {"card_sha256": sha256(card.encode()).hexdigest()}
    partial, old = _beside(folder, "partial"), _beside(folder, "old")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # what a killed process left
        partial.mkdir(parents=True)
        (partial / "config.json").write_text(json.dumps(content, indent=2) + "\n")
        (partial / "README.md").write_text(kept or card)
        shutil.copyfile(Path(info["source"]) / "ema.safetensors", partial / "model.safetensors")
        if records.picture:
            shutil.copyfile(records.picture.path, partial / "samples.png")
        if config.include_vae:
            save_vae(config.vae or info["vae"], info["vae_digest"], partial / "vae")
        if folder.is_dir():
            os.replace(folder, old)
        os.replace(partial, folder)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise ValueError(f"cannot write {folder} ({error.strerror or error}); make room, or choose another") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if kept:
        print(f"{folder / 'README.md'} was changed by hand and is kept; delete it for a new one", flush=True)
    if not config.include_vae and is_local(info["vae"]):
        print(
            f"warning: the VAE of this model is a local one ({info['vae']}), which nobody else has, and its path is in "
            f"{folder / 'config.json'}; --include-vae puts it into the folder",
            file=sys.stderr,
        )
    return folder


def save_vae(name: str, expected: str, folder: Path) -> None:
    """A copy of the model's VAE as diffusers saves it.

    Raises:
        ValueError: it cannot be loaded, or is another.
    """
    from models.vae import UNKNOWN_VAE, load_vae, vae_digest

    vae = load_vae(name)
    found = vae_digest(vae)
    if expected not in (found, UNKNOWN_VAE):
        raise ValueError(
            f"--vae: expected the VAE of the checkpoint (digest {expected[:12]}...), found another in {name} "
            f"({found[:12]}...); give the one that dumped the latents"
        )
    vae.save_pretrained(folder)
    settings = read_json(folder / "config.json")
    settings.pop("_name_or_path", None)  # where it was loaded from on this machine
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")


def push(folder: Path, name: str) -> str:
    """Upload a published folder; gives its address.

    Raises:
        ValueError: the hub does not answer, or refuses.
    """
    from huggingface_hub import HfApi

    from models.vae import hub_is_reachable

    again = f"{folder} is kept: run the same command again, or upload it by hand (hf upload {name} {folder})"
    if not hub_is_reachable():
        raise ValueError(f"--push-to {name}: the hub cannot be reached; with a network, {again}")
    api = HfApi()
    try:
        api.create_repo(name, exist_ok=True)
        # What an earlier upload had and this one has not, such as vae/, goes.
        api.upload_folder(
            repo_id=name, folder_path=folder, commit_message=f"Published from {folder.name}",
            delete_patterns=["vae/*", "samples.png"],
        )  # fmt: skip
    except (OSError, ValueError) as error:  # the client's own errors are of these kinds
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"--push-to {name}: the hub refused ({reason}); after `hf auth login`, {again}") from error
    return f"{api.endpoint}/{name}"


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv and not argv[0].startswith("-"):  # the run, by itself
        argv = ["--run", *argv]
    config = cli.parse(PublishConfig, argv, __doc__.splitlines()[0])
    folder = publish(config)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}; {size / 1e6:.1f} MB", flush=True)
    if config.push_to:
        print(push(folder, config.push_to))


if __name__ == "__main__":
    cli.run(main)
