"""A published model: the checkpoint's weights, a card of what the run recorded, and the images of sample_ddp.py."""

import copy
import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from huggingface_hub import ModelCard, metadata_load
from PIL import Image
from safetensors.torch import load_file, save_file

import sample_ddp
import train
from analysis import publish
from models import load
from models.sit import SiT, SiTConfig
from models.vae import LatentScale, load_vae, vae_digest
from reporting.log import read_log
from runtime import cli
from sampling.pipeline import VAEREPAPipeline
from tests.stores import make_store, make_vae, save_checkpoint
from training.config import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["crane", "goldfish, Carassius auratus", "crane", "Tench, Tinca tinca", "3"]


def make_checkpoint(folder, names=tuple(NAMES), **changes):
    """A run with one checkpoint of a small SiT, none of whose weights is zero, and its VAE."""
    vae = make_vae(folder / "vae")
    torch.manual_seed(0)
    sit = SiT(SiTConfig(2, 32, 2, patch_size=2, latent_size=4, in_channels=4, num_classes=len(names)))
    with torch.no_grad():
        for parameter in sit.parameters():
            parameter.normal_(std=0.15)
    info = {
        "scale": LatentScale((0.9,), (0.1,)).to_dict(),
        "vae": str(vae),
        "vae_digest": vae_digest(load_vae(str(vae))),
        "resolution": 16,
        "class_names": list(names),
        "path_type": "linear",
    }
    trained = copy.deepcopy(sit)
    torch.nn.init.zeros_(trained.final_layer.linear.weight)  # the EMA is what counts
    return save_checkpoint(folder / "run", 7, trained, sit, None, info | changes)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def published(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "small"
    publish.main([str(checkpoint), "--output-dir", str(folder), "--include-vae"])
    return folder


@pytest.fixture(scope="module")
def pipe(published):
    return VAEREPAPipeline.from_pretrained(published, device="cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of train.py with a grid, and samples of its last step that sample_ddp.py has measured; and its card."""
    folder = tmp_path_factory.mktemp("trained")
    store = make_store(folder / "store", images=True, vae=make_vae(folder / "vae"))
    flags = (
        f"--data-dir {store} --output-dir {folder} --exp-name digits --model SiT-Ti/4 --batch-size 6 "
        "--max-train-steps 2 --log-every 1 --sampling-steps 1 --sampling-num-steps 3 --sampling-count 4 "
        "--checkpointing-steps 1 --num-workers 0 --learning-rate 0.00123 --align-weight 0.75 --align-depth 3 --seed 5"
    )
    train.main(flags.split())
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    drawn = (
        f"--checkpoint {folder}/digits --num-samples 32 --sampler ode-heun --num-steps 2 --guidance-scale 1.5 "
        f"--guidance-high 0.7 --evaluate {store} --features vae --seed 3"
    )
    sample_ddp.main(drawn.split())
    publish.main([str(folder / "digits"), "--include-vae"])
    return folder / "digits"


def refused(capsys, *flags):
    """The line that a user sees."""
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: publish.main(list(map(str, flags))))
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def pixels(images):
    return np.stack([np.asarray(image) for image in images])


# The folder


def test_the_folder_holds_the_ema_weights_and_what_sampling_needs(checkpoint, published):
    assert {path.name for path in published.iterdir()} == {"config.json", "model.safetensors", "README.md", "vae"}
    assert (published / "model.safetensors").read_bytes() == (checkpoint / "ema.safetensors").read_bytes()
    config, (sit, info) = json.loads((published / "config.json").read_text()), load.load_sit(checkpoint)
    assert {name: config[name] for name in sit.config.to_dict()} == sit.config.to_dict()
    expected = {
        "format": "vae-repa-model",
        "format_version": 1,
        "step": 7,
        "path_type": "linear",
        "resolution": 16,
        "latent_scale": {"scale": [0.9], "shift": [0.1]},
        "vae": "vae",
        "vae_digest": info["vae_digest"],
        "class_names": NAMES,
        "weights_sha256": hashlib.sha256((published / "model.safetensors").read_bytes()).hexdigest(),
    }
    assert expected.items() <= config.items()
    assert vae_digest(load_vae(str(published / "vae"))) == info["vae_digest"]


def test_no_path_of_this_machine_is_published_with_the_vae(published, checkpoint, trained, tmp_path):
    for folder in (published, trained / "published" / "digits-0000002"):
        for file in [*folder.glob("*.json"), *folder.glob("*/*.json"), folder / "README.md"]:
            assert str(trained.parent.parent) not in file.read_text(), file
    publish.main([str(checkpoint), "--output-dir", str(tmp_path / "bare")])
    assert json.loads((tmp_path / "bare" / "config.json").read_text())["vae"].endswith("/vae")  # there it is needed


def test_a_local_vae_that_is_left_out_is_warned_of_and_still_found(checkpoint, published, tmp_path, capsys):
    publish.main([str(checkpoint), "--output-dir", str(tmp_path / "bare")])
    assert "--include-vae" in capsys.readouterr().err
    images = VAEREPAPipeline.from_pretrained(tmp_path / "bare")([1], num_inference_steps=2).images
    again = VAEREPAPipeline.from_pretrained(published)([1], num_inference_steps=2).images
    assert np.array_equal(pixels(images), pixels(again))
    vae = checkpoint.parents[2] / "vae"
    assert f'from_pretrained("bare", vae="{vae}")' in (tmp_path / "bare" / "README.md").read_text()


def test_a_run_or_its_checkpoint_gives_the_same(trained, tmp_path):
    publish.main([str(trained), "--output-dir", str(tmp_path / "a" / "same")])
    publish.main([str(trained / "checkpoints" / "0000002"), "--output-dir", str(tmp_path / "b" / "same")])
    for name in ("README.md", "config.json", "model.safetensors", "samples.png"):
        assert (tmp_path / "a" / "same" / name).read_bytes() == (tmp_path / "b" / "same" / name).read_bytes()
    publish.main([str(trained / "checkpoints" / "0000001"), "--output-dir", str(tmp_path / "older")])
    assert "step 1\n" in (tmp_path / "older" / "README.md").read_text()
    assert not (tmp_path / "older" / "model.safetensors").samefile(tmp_path / "a" / "same" / "model.safetensors")


# The SiT by itself


def test_what_is_saved_is_what_is_loaded(checkpoint, published, tmp_path):
    sit, _ = load.load_sit(checkpoint)
    loaded = SiT.from_pretrained(published)
    copy.deepcopy(loaded).save_pretrained(tmp_path / "again")
    again = SiT.from_pretrained(str(tmp_path / "again"))
    for other in (loaded, again):
        assert other.config == sit.config
        assert not other.training
        assert list(other.state_dict()) == list(sit.state_dict())
        assert all(torch.equal(other.state_dict()[name], value) for name, value in sit.state_dict().items())
        assert torch.equal(other.t_embedder.frequencies, sit.t_embedder.frequencies)  # of no file
    assert SiTConfig.from_dict(json.loads((tmp_path / "again" / "config.json").read_text())) == sit.config


def test_a_sit_comes_from_the_hubs_cache_by_name(published, tmp_path):
    cache_model(tmp_path, published)
    loaded = SiT.from_pretrained("name/small", cache_dir=tmp_path, local_files_only=True)
    for name, value in load_file(published / "model.safetensors").items():
        assert torch.equal(loaded.state_dict()[name], value)


def cache_model(cache, folder):
    """The folder as the hub's client keeps the model name/small."""
    snapshot = cache / "models--name--small" / "snapshots" / ("a" * 40)
    shutil.copytree(folder, snapshot)
    (cache / "models--name--small" / "refs").mkdir()
    (cache / "models--name--small" / "refs" / "main").write_text("a" * 40)


@pytest.mark.parametrize("harm", ["missing weight", "other shape", "cut", "no weights", "no config"])
def test_a_sit_is_never_loaded_in_part(published, tmp_path, harm):
    folder = tmp_path / "harmed"
    shutil.copytree(published, folder)
    file = folder / "model.safetensors"
    state = load_file(file)
    if harm == "missing weight":
        save_file({name: value for name, value in state.items() if name != "blocks.1.attn.qkv.weight"}, file)
    elif harm == "other shape":
        save_file(state | {"final_layer.linear.bias": torch.zeros(3)}, file)
    elif harm == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        (file if harm == "no weights" else folder / "config.json").unlink()
    with pytest.raises(
        ValueError, match="the SiT.s settings: damaged" if harm == "no config" else "expected weights of this SiT"
    ):
        SiT.from_pretrained(folder)
    with pytest.raises(
        ValueError, match="expected a published model" if harm == "no config" else "as it was published"
    ):
        VAEREPAPipeline.from_pretrained(folder)


# The card


def card_of(run):
    return (run / "published" / "digits-0000002" / "README.md").read_text()


def rows_of(card):
    """Every row of its tables."""
    return dict(re.findall(r"^\| (.+?) \| (.+) \|$", card, re.MULTILINE))


def test_the_hub_can_read_the_card(trained):
    file = trained / "published" / "digits-0000002" / "README.md"
    data = metadata_load(file)
    assert data["license"] == "apache-2.0"
    assert data["pipeline_tag"] == "unconditional-image-generation"
    assert data["library_name"] == "vae-repa"
    assert "class-conditional-image-generation" in data["tags"]
    assert ModelCard.load(file).data.to_dict() == data
    assert ModelCard.load(file).text.lstrip().startswith("# SiT-Ti/4 + VAE-REPA, step 2\n")
    assert "title     = {SRA 2: Variational Autoencoder Self-Representation Alignment" in file.read_text()


def test_the_card_says_what_the_run_recorded(trained):
    card, rows = card_of(trained), rows_of(card_of(trained))
    state = load.read_state(trained / "checkpoints" / "0000002")
    last = read_log(trained)[-1]
    assert last["step"] == 2
    for name in ("loss", "velocity", "align_vae", "grad_norm"):
        assert rows[f"`{name}`"] == f"{last[name]:.6g}"
    count = sum(value.numel() for name, value in load_file(trained / "checkpoints/0000002/ema.safetensors").items())
    count -= 4 * 192  # the position table is no parameter
    expected = {
        "model": f"SiT-Ti/4, {count / 1e6:.1f}M parameters",
        "path": "linear",
        "batch": "6",
        "steps": f"2 ({last['epoch']:.1f} epochs)",
        "learning rate": "0.00123",
        "seed": "5",
        "EMA decay": "0.9999",
        "labels dropped": "0.1",
        "data": "`store`, 32 x 32 pixels, 3 classes",
        "latents": "z = (f - shift) x scale; scale 0.9; shift 0.1",
        "VAE": f"in `vae/`; digest {state['vae_digest']}",
        "git revision": state["git_revision"],
        "hardware": state["machine"],
        "started or last resumed": state["date"],
        "weights": f"SHA-256 {state['digests']['ema.safetensors']}",
    }
    assert expected.items() <= rows.items()
    assert rows["alignment: VAE-REPA"].startswith("depth 3; weight 0.75; schedule constant; objective smooth_l1;")
    assert f"torch {state['versions']['torch']}" in rows["versions"]
    assert "0 = class 0, 1 = class 1, 2 = class 2." in card


def test_the_card_has_the_metrics_with_how_they_came_about(trained):
    card, rows = card_of(trained), rows_of(card_of(trained))
    (file,) = (trained / "samples").glob("*/metrics.json")
    metrics = json.loads(file.read_text())["metrics"]
    assert len(metrics) >= 3
    assert {f"`{name}`": f"{value:.6g}" for name, value in metrics.items()}.items() <= rows.items()
    assert (
        "32 samples (ode-heun, 2 steps, guidance 1.5 for t in [0, 0.7], seed 3, labels random), "
        "compared with 24 images of `store`; features: vae." in card
    )
    assert "32 samples: published values are of 50,000" in card


def test_the_picture_is_the_newest_of_these_weights(trained, tmp_path):
    folder = trained / "published" / "digits-0000002"
    (drawn,) = (trained / "samples").glob("*/samples.png")
    assert (folder / "samples.png").read_bytes() == drawn.read_bytes()
    assert "Drawn by these weights: ode-heun, 2 steps, guidance 1.5 for t in [0, 0.7], seed 3." in card_of(trained)

    run = tmp_path / "digits"
    shutil.copytree(trained, run, copy_function=shutil.copy2)
    os.utime(run / "samples" / "0000001.png", (2**33, 2**33))  # newer, but of other weights
    os.utime(run / "samples" / "0000002.png", (2**32, 2**32))
    publish.main([str(run), "--output-dir", str(tmp_path / "out"), "--include-vae"])
    assert (tmp_path / "out" / "samples.png").read_bytes() == (run / "samples" / "0000002.png").read_bytes()
    assert "Drawn by these weights: ode-euler, 3 steps, guidance 4.\n" in (tmp_path / "out" / "README.md").read_text()

    shutil.rmtree(drawn_copy := run / "samples" / drawn.parent.name)
    (run / "samples" / "0000002.png").unlink()
    publish.main([str(run), "--output-dir", str(tmp_path / "out"), "--include-vae"])
    assert not drawn_copy.exists()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Drawn after step 1 of the same run, not by these weights: ode-euler, 3 steps, guidance 4.\n" in card
    assert "No metrics of samples of these weights were recorded." in card


def test_what_was_not_recorded_is_not_claimed(published):
    card = (published / "README.md").read_text()
    assert "No picture of samples was recorded." in card
    assert "No log of the losses was kept." in card
    assert "No metrics of samples of these weights were recorded." in card
    assert "samples.png" not in card
    assert set(rows_of(card)) == {"model", "path", "steps", "data", "latents", "VAE", "weights"}
    for word in ("learning", "aligned", "hardware", "None", "versions"):
        assert word not in card, word


def test_every_kind_of_alignment_and_a_start_from_elsewhere_are_told(tmp_path):
    config = TrainConfig(
        data_dir="/home/someone/imagenet256",
        model="SiT-B/2",
        align="repa+vae",
        align_depth=(2, 8),
        repa_depth=(4,),
        repa_weights="/home/someone/dinov2.safetensors",
        align_time_range=(0.0, 0.5),
        random_flip=True,
    )
    initial = {"source": "/home/someone/SiT-XL-2.pt", "read_as": "SiT's file: time reversed", "digest": "f00d"}
    made = make_checkpoint(tmp_path, ["cat|dog"], config=dataclasses.asdict(config), initial=initial)
    publish.main([str(made), "--include-vae"])
    folder = tmp_path / "run" / "published" / "run-0000007"
    card = (folder / "README.md").read_text()
    rows = rows_of(card)
    assert "# SiT-B/2 + REPA + VAE-REPA, step 7\n" in card
    assert "tokens within it were aligned by REPA and VAE-REPA." in card
    assert rows["alignment: VAE-REPA"].startswith("depth 2, 8; weight 1; ")
    assert rows["alignment: REPA"].startswith(
        "encoder dinov2-vit-b; weights dinov2.safetensors; final norm none; depth 4; weight 0.5; "
    )
    assert rows["every alignment"] == "beta of smooth L1 0.05; times 0 to 0.5"
    assert rows["started from"] == "`SiT-XL-2.pt` (SiT's file: time reversed), SHA-256 f00d"
    assert rows["data"] == "`imagenet256`, 16 x 16 pixels, 1 class, mirrored at random"
    assert "someone" not in card
    assert "class-conditional" not in card
    assert "class_labels=[0], " in card

    plain = dataclasses.asdict(dataclasses.replace(config, align="none"))
    made = make_checkpoint(tmp_path / "plain", config=plain)
    publish.main([str(made), "--output-dir", str(tmp_path / "out"), "--include-vae"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# SiT-B/2, step 7\n" in card
    assert rows_of(card)["alignment"] == "none (plain SiT)"
    assert "aligned" not in card
    assert "REPA" not in card.replace("VAEREPAPipeline", "")


def code_of(card):
    return re.findall(r"^```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_the_cards_code_runs_as_it_stands(trained, tmp_path):
    """In the folder that the model lies in, whose name is what the card loads."""
    folder = trained / "published" / "digits-0000002"
    shutil.copytree(folder, tmp_path / folder.name)
    blocks = code_of(card_of(trained))
    assert len(blocks) == 2
    assert 'sampler="ode-heun"' in blocks[0]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", "\n".join([*blocks, "print(sit.config)"])]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "hidden_size=192" in done.stdout
    saved = [Image.open(tmp_path / f"sample-{number}.png") for number in range(3)]
    expected = VAEREPAPipeline.from_pretrained(folder)(
        [0, 1, 2], guidance_scale=1.5, guidance_interval=(0, 0.7), num_inference_steps=2, sampler="ode-heun"
    ).images
    assert np.array_equal(pixels(saved), pixels(expected))


# Samples and folders that do not belong


def test_samples_from_elsewhere_are_taken_if_they_are_of_this_checkpoint(checkpoint, trained, tmp_path, capsys):
    flags = f"--checkpoint {checkpoint} --output-dir {tmp_path / 'drawn'} --num-samples 16 --num-steps 3"
    sample_ddp.main(flags.split())
    publish.main([str(checkpoint), "--samples", str(tmp_path / "drawn"), "--output-dir", str(tmp_path / "out")])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Drawn by these weights: sde, 3 steps, no guidance, seed 0." in card
    assert 'guidance_scale=1, num_inference_steps=3, sampler="sde"' in code_of(card)[0]
    assert (tmp_path / "out" / "samples.png").read_bytes() == (tmp_path / "drawn" / "samples.png").read_bytes()

    line = refused(capsys, trained, "--samples", tmp_path / "drawn", "--output-dir", tmp_path / "other")
    assert "expected samples of" in line
    assert "another checkpoint" in line
    (metrics,) = (trained / "samples").glob("*/metrics.json")
    line = refused(capsys, checkpoint, "--samples", metrics, "--output-dir", tmp_path / "other")
    assert "another checkpoint" in line
    line = refused(capsys, checkpoint, "--samples", tmp_path, "--output-dir", tmp_path / "other")
    assert "expected a set of samples (samples.json" in line
    assert not (tmp_path / "other").exists()


def test_names_of_classes_cannot_become_markup():
    assert publish.plain("<script>\n[a](b) | `x`") == r"\<script\> \[a\](b) \| \`x\`"


def test_samples_of_newer_code_do_not_keep_a_model_from_being_published(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    (file, *_) = sorted((tmp_path / "run").glob("samples/*/samples.json"))
    record = json.loads(file.read_text())
    record["settings"]["swirl"] = 1
    file.write_text(json.dumps(record))
    with pytest.warns(UserWarning, match="left out: .* was written by newer code: it has 'swirl'"):
        publish.main([str(tmp_path / "run"), "--output-dir", str(tmp_path / "out")])
    with pytest.raises(ValueError, match="written by newer code"):
        publish.main([str(tmp_path / "run"), "--samples", str(file.parent), "--output-dir", str(tmp_path / "out")])


def test_a_published_sit_of_newer_code_is_refused(published, tmp_path):
    folder = shutil.copytree(published, tmp_path / "newer")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"registers": True}))
    with pytest.raises(ValueError, match="written by newer code: it has 'registers'"):
        SiT.from_pretrained(folder)


def test_a_damaged_record_is_named(trained, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (file,) = (run / "samples").glob("*/metrics.json")
    file.write_text(file.read_text()[:-20])
    assert f"expected JSON in {file}" in refused(capsys, run, "--output-dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_checkpoint_is_refused(tmp_path, capsys, published):
    assert "not a checkpoint: nothing at" in refused(capsys, tmp_path / "absent")
    assert "not a checkpoint" in refused(capsys, tmp_path)
    assert "not a checkpoint" in refused(capsys, published)
    (tmp_path / "sit.pt").write_bytes(b"x")
    assert "expected a run's directory" in refused(capsys, tmp_path / "sit.pt")
    assert "--push-to: expected NAME/REPO" in refused(capsys, tmp_path, "--push-to", "name")
    assert "missing --run" in refused_by_parser(capsys)


def refused_by_parser(capsys):
    with pytest.raises(SystemExit):
        publish.main([])
    return capsys.readouterr().err


def test_a_damaged_checkpoint_is_refused(checkpoint, tmp_path, capsys):
    shutil.copytree(checkpoint, tmp_path / "0000007")
    file = tmp_path / "0000007" / "ema.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    assert "damaged checkpoint" in refused(capsys, tmp_path / "0000007")
    assert {path.name for path in tmp_path.iterdir()} == {"0000007"}


def test_a_folder_with_other_things_is_refused_and_left_alone(checkpoint, published, tmp_path, capsys):
    for name in ("notes.txt", "README.md", "config.json"):
        folder = tmp_path / name / "out"
        folder.mkdir(parents=True)
        (folder / name).write_text('{"hidden_size": 4}')
        line = refused(capsys, checkpoint, "--output-dir", folder)
        assert f"found other things in {folder} ({name})" in line
        assert [path.name for path in folder.iterdir()] == [name]
    shutil.copytree(published, tmp_path / "mine")
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "mine").rglob("*")}
    assert "(notes.txt)" in refused(capsys, checkpoint, "--output-dir", tmp_path / "mine")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "mine").rglob("*")} == before
    assert "found the file" in refused(capsys, checkpoint, "--output-dir", tmp_path / "notes.txt" / "out" / "notes.txt")


def test_the_same_command_writes_anew_but_for_a_card_that_was_changed(trained, tmp_path, capsys):
    folder = tmp_path / "out"
    flags = [str(trained), "--output-dir", str(folder)]
    publish.main([*flags, "--include-vae"])
    before = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (folder / "model.safetensors").write_bytes(b"damaged")
    publish.main([*flags, "--include-vae"])
    assert {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    publish.main(flags)
    assert not (folder / "vae").exists()
    assert "not included" in (folder / "README.md").read_text()

    (folder / "README.md").write_text("my own words")
    capsys.readouterr()
    publish.main([*flags, "--include-vae"])
    assert "is kept" in capsys.readouterr().out
    assert (folder / "README.md").read_text() == "my own words"
    assert (folder / "vae").is_dir()
    line = refused(capsys, trained / "checkpoints" / "0000001", "--output-dir", folder)
    assert "holds step 2, with a README.md that was changed by hand" in line
    assert (folder / "README.md").read_text() == "my own words"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("killed", ["before the new one", "after it"])
def test_a_kill_while_folders_change_places_loses_nothing(checkpoint, tmp_path, killed):
    folder = tmp_path / "out"
    flags = [str(checkpoint), "--output-dir", str(folder)]
    publish.main(flags)
    (folder / "README.md").write_text("my own words")
    if killed == "before the new one":
        folder.rename(tmp_path / ".out.old")
    else:
        shutil.copytree(folder, tmp_path / ".out.old")
    publish.main(flags)
    assert (folder / "README.md").read_text() == "my own words"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_another_vae_is_not_published(checkpoint, tmp_path, capsys):
    other = make_vae(tmp_path / "other", seed=1)
    line = refused(capsys, checkpoint, "--include-vae", "--vae", other, "--output-dir", tmp_path / "out")
    assert "--vae: expected the VAE of the checkpoint" in line
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    assert "expected --include-vae beside it" in refused(capsys, checkpoint, "--vae", other)


# The hub


def test_without_a_hub_the_folder_is_kept(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(publish, "hub_is_reachable", lambda: False)
    folder = tmp_path / "out"
    line = refused(capsys, checkpoint, "--output-dir", folder, "--include-vae", "--push-to", "name/small")
    assert "the hub cannot be reached" in line
    assert f"{folder} is kept" in line
    assert f"hf upload name/small {folder}" in line
    assert 'from_pretrained("name/small")' in (folder / "README.md").read_text()
    VAEREPAPipeline.from_pretrained(folder)


def test_a_folder_is_pushed_as_it_is(checkpoint, tmp_path, capsys, monkeypatch):
    calls = []
    monkeypatch.setattr(publish, "hub_is_reachable", lambda: True)
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, name, **more: calls.append((name, more)))
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda self, **more: calls.append(more))
    flags = ["--output-dir", tmp_path / "out", "--push-to", "name/small"]
    publish.main(list(map(str, [checkpoint, *flags])))
    assert calls[0] == ("name/small", {"exist_ok": True})
    assert (calls[1]["repo_id"], calls[1]["folder_path"]) == ("name/small", tmp_path / "out")
    assert capsys.readouterr().out.endswith("/name/small\n")

    def refuse(self, name, **more):
        raise OSError("401 Client Error: you must be logged in")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
    line = refused(capsys, checkpoint, *flags)
    assert "the hub refused (401" in line
    assert "hf auth login" in line


def test_help_does_not_wait_for_torch():
    command = [sys.executable, "-X", "importtime", "-m", "analysis.publish", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert "--push-to" in done.stdout
    assert "| torch\n" not in done.stderr
