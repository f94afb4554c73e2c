"""Sampling from a checkpoint: the same images however divided, stopped or batched; every flag; every refusal."""

import copy
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

import sample_ddp
import sampling.batch_size
import sampling.generator
import sampling.record
from diffusion.interpolant import Interpolant
from diffusion.samplers import guided_velocity, sample_sde
from evaluations import evaluate
from models.load import load_sit
from models.sit import SiT, SiTConfig
from models.tensor_file import state_digest
from models.vae import UINT8_RULES, LatentScale, decode_images, decoder_digest, load_vae, vae_digest
from runtime import cli
from runtime.files import read_checksummed_json, to_checksummed_json, to_json
from runtime.seeding import block_generator
from sampling import writer
from sampling.config import BLOCK, DIFFUSION_FORMS, LAST_STEPS, SampleConfig
from sampling.generator import SampleGenerator, block_noise, draw_labels
from tests.stores import make_store, make_vae, save_checkpoint
from tests.test_train import run

ROOT = Path(__file__).resolve().parent.parent
K = 5


class Stopped(Exception):
    """In place of a kill."""


def make_checkpoint(folder, change=lambda sit: None, num_classes=K, **facts):
    """A run with one checkpoint of a small SiT, none of whose weights is zero, and its VAE."""
    vae = make_vae(folder / "vae")
    torch.manual_seed(0)
    sit = SiT(SiTConfig(2, 32, 2, patch_size=2, latent_size=4, in_channels=4, num_classes=num_classes))
    with torch.no_grad():
        for parameter in sit.parameters():
            parameter.normal_(std=0.15)
        change(sit)
    info = {
        "scale": LatentScale((0.9,), (0.1,)).to_dict(),
        "vae": str(vae),
        "vae_digest": vae_digest(load_vae(str(vae))),
        "resolution": 16,
        "class_names": [f"class {k}" for k in range(num_classes)],
        "path_type": "linear",
    }
    return save_checkpoint(folder / "run", 7, sit, sit, None, info | facts)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("trained"))


def arguments(path, output, **changes):
    """Flags of a small run; `changes` by field name."""
    values = {
        "checkpoint": path,
        "output_dir": output,
        "num_samples": 56,
        "num_steps": 3,
        "per_proc_batch_size": 16,
        "guidance_scale": 2.0,
    }
    flags = []
    for name, value in (values | changes).items():
        spelling = "--" + name.replace("_", "-")
        if value is True:
            flags.append(spelling)
        elif isinstance(value, tuple):
            flags += [spelling, *map(str, value)]
        elif value is not None:
            flags.append(f"{spelling}={value}")
    return flags


def draw(checkpoint, output, **changes):
    """Images and labels of such a run."""
    sample_ddp.main(arguments(checkpoint, output, **changes))
    with np.load(output / "samples.npz") as archive:
        return archive["arr_0"], archive["arr_1"]


@pytest.fixture(scope="module")
def whole(checkpoint, tmp_path_factory):
    """An undisturbed run with one process."""
    output = tmp_path_factory.mktemp("whole") / "samples"
    draw(checkpoint, output)
    return output


def same_npz(first, second):
    return (first / "samples.npz").read_bytes() == (second / "samples.npz").read_bytes()


def test_the_folder_holds_the_images_their_picture_and_their_record(checkpoint, tmp_path):
    images, labels = draw(checkpoint, tmp_path / "new", png=True, num_samples=70)
    assert (images.shape, images.dtype, labels.shape, labels.dtype) == ((70, 16, 16, 3), np.uint8, (70,), np.int64)
    assert len(np.unique(images.reshape(70, -1), axis=0)) == 70  # no two alike
    assert images.std() > 20
    folder = tmp_path / "new"
    assert {path.name for path in folder.iterdir()} == {"samples.npz", "samples.png", "samples.json", "images"}
    assert sorted(path.name for path in (folder / "images").iterdir()) == [f"{i:06d}.png" for i in range(70)]
    for i in (0, 17, 69):
        assert np.array_equal(np.asarray(Image.open(folder / "images" / f"{i:06d}.png")), images[i])
    picture = np.asarray(Image.open(folder / "samples.png"))
    assert picture.shape == (8 * 16, 8 * 16, 3)
    assert np.array_equal(picture[16:32, 32:48], images[10])  # second row, third column

    record = json.loads((folder / "samples.json").read_text())
    _, info = load_sit(checkpoint)
    expected = {"sampler": "sde", "num_steps": 3, "last_step_size": 0.04, "guidance_scale": 2.0}
    expected |= {"guidance_interval": [0.0, 1.0], "num_samples": 70, "labels": "random", "seed": 0, "batch_size": 16}
    expected |= {"block_size": 16, "mixed_precision": "no", "vae_precision": "no", "tf32": False, "resolution": 16}
    expected |= {"checkpoint_digest": info["digest"], "step": 7, "vae_digest": info["vae_digest"]}
    expected |= {"latent_scale": {"scale": [0.9], "shift": [0.1]}, "path_type": "linear"}
    expected |= {"uint8_rule": "floor(clamp(127.5 * x + 128, 0, 255))"}
    assert expected.items() <= record["settings"].items()
    assert record["checkpoint"] == str(checkpoint)
    assert record["timing"]["images"] == 70
    assert {"versions", "git_revision", "machine", "date", "vae", "class_names", "device"} <= record.keys()


def test_a_checkpoint_alone_is_enough_and_names_the_folder(checkpoint, monkeypatch):
    monkeypatch.setattr(sample_ddp, "draw_batches", lambda *_, **__: (_ for _ in ()).throw(Stopped))
    with pytest.raises(Stopped):
        sample_ddp.main(["--checkpoint", str(checkpoint)])
    folder = checkpoint.parent.parent / "samples" / "0000007-sde250-cfg1-seed0-n50000"
    settings = json.loads((folder / "partial" / "settings.json").read_text())["settings"]
    assert (settings["num_samples"], settings["num_steps"], settings["last_step_size"]) == (50_000, 250, 0.04)
    assert settings["guidance_interval"] is None


def test_images_are_those_of_the_solver_with_each_blocks_generator(checkpoint, whole):
    """Written out for the second block alone."""
    sit, info = load_sit(checkpoint)
    labels = draw_labels("random", np.arange(K), 0, 0, 56)
    generator = block_generator(0, 1, "sample noise")
    x = torch.randn(BLOCK, 4, 4, 4, generator=generator)
    velocity = guided_velocity(sit, torch.from_numpy(labels[16:32]), K, 2.0, (0.0, 1.0))
    noise = [torch.randn(BLOCK, 4, 4, 4, generator=generator) for _ in range(2)]
    z = sample_sde(velocity, x, 3, lambda step: noise[step], Interpolant("linear"), 0.04)
    expected = decode_images(load_vae(info["vae"]), z.float(), info["scale"]).numpy()
    with np.load(whole / "samples.npz") as archive:
        assert np.array_equal(archive["arr_0"][16:32], expected)
        assert np.array_equal(archive["arr_1"], labels)


def test_fewer_images_are_the_first_of_more(checkpoint, whole, tmp_path):
    images, labels = draw(checkpoint, tmp_path / "few", num_samples=10)
    with np.load(whole / "samples.npz") as archive:
        assert np.array_equal(images, archive["arr_0"][:10])
        assert np.array_equal(labels, archive["arr_1"][:10])


@pytest.mark.slow
def test_compiled_samples_differ_from_eager_ones_by_rounding_alone(checkpoint, whole, tmp_path):
    images, labels = draw(checkpoint, tmp_path / "compiled", compile=True)
    with np.load(whole / "samples.npz") as archive:
        difference = np.abs(images.astype(int) - archive["arr_0"])
        assert np.array_equal(labels, archive["arr_1"])
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


def test_another_batch_size_keeps_every_draw_and_changes_rounding_alone(checkpoint, whole, tmp_path):
    images, labels = draw(checkpoint, tmp_path / "large", per_proc_batch_size=48)
    with np.load(whole / "samples.npz") as archive:
        difference = np.abs(images.astype(int) - archive["arr_0"])
        assert np.array_equal(labels, archive["arr_1"])
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


def test_a_stopped_run_draws_only_what_is_missing(checkpoint, whole, tmp_path, monkeypatch):
    output, drawn = tmp_path / "stopped", []
    compute = SampleGenerator.latents

    def count(self, batch):
        drawn.append(batch)
        if len(drawn) == 3:
            raise Stopped
        return compute(self, batch)

    monkeypatch.setattr(SampleGenerator, "latents", count)
    with pytest.raises(Stopped):
        draw(checkpoint, output)
    assert [path.name for path in output.iterdir()] == ["partial"]
    draw(checkpoint, output)
    assert drawn == [0, 1, 2, 2, 3]
    assert same_npz(output, whole)


def test_images_written_beside_the_drawing_are_those_drawn_one_after_the_other(checkpoint, whole):
    sit, info = load_sit(checkpoint)
    vae, settings = load_vae(info["vae"]), settings_of(checkpoint, "unused")
    generator = SampleGenerator(settings, sit, vae, info, np.arange(K), torch.device("cpu"))
    serial = [decode_images(vae, generator.latents(batch).float(), info["scale"]).numpy() for batch in range(4)]
    with np.load(whole / "samples.npz") as archive:
        assert np.array_equal(np.concatenate(serial)[:56], archive["arr_0"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_decoding_beside_the_next_batch_gives_the_serial_bytes(checkpoint, tmp_path, monkeypatch):
    draw(checkpoint, tmp_path / "beside", num_samples=160)
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_: None)
    draw(checkpoint, tmp_path / "serial", num_samples=160)
    assert same_npz(tmp_path / "beside", tmp_path / "serial")


def test_a_sweep_is_each_of_its_sets_drawn_alone(checkpoint, reference, tmp_path, capsys):
    """Scale 1 has no interval and is drawn once. The reference is measured once for all."""
    sweep = {"guidance_scale": (1.0, 2.0), "guidance_high": (1.0, 0.5), "num_samples": 32}
    measured = {"evaluate": reference, "features": "vae"}
    flags = arguments(checkpoint, tmp_path / "sweep", **sweep, **measured)
    sample_ddp.main(flags)
    alone = {
        "cfg1": {"guidance_scale": 1.0},
        "cfg2": {"guidance_scale": 2.0},
        "cfg2-t0-0.5": {"guidance_scale": 2.0, "guidance_high": 0.5},
    }
    assert {folder.name for folder in (tmp_path / "sweep").iterdir()} == {
        f"run-0000007-sde3-{name}-seed0-n32" for name in alone
    }
    for name, changes in alone.items():
        folder, single = tmp_path / "sweep" / f"run-0000007-sde3-{name}-seed0-n32", tmp_path / name
        draw(checkpoint, single, num_samples=32, **changes, **measured)
        assert same_npz(folder, single)
        found, expected = (json.loads((path / "metrics.json").read_text())["metrics"] for path in (folder, single))
        assert found == pytest.approx(expected, rel=1e-9)
    capsys.readouterr()
    sample_ddp.main(flags)
    assert capsys.readouterr().out.count("is complete") == 3


def test_several_checkpoints_have_a_folder_each(checkpoint, tmp_path):
    other = make_checkpoint(tmp_path / "other", lambda sit: sit.final_layer.linear.weight.mul_(2))
    sample_ddp.main(f"--checkpoint {checkpoint} {other} --num-samples 16 --num-steps 2".split())
    folders = [path.parent.parent / "samples" / "0000007-sde2-cfg1-seed0-n16" for path in (checkpoint, other)]
    assert all((folder / "samples.npz").is_file() for folder in folders)
    assert not same_npz(*folders)
    shutil.rmtree(folders[0].parent)


def test_the_largest_batch_that_fits_is_found(monkeypatch):
    tried = []

    def fits(generator, size):
        tried.append(size)
        return size <= limit

    def find(images):
        settings = {"num_samples": images}
        return sampling.batch_size.find_batch_size(SampleGenerator(settings, None, None, {}, None, None), processes=1)

    monkeypatch.setattr(sampling.batch_size, "fits_on_gpu", fits)
    limit = 100
    assert find(1000) == 96
    assert tried[0] == 256
    limit = 1000
    assert find(50) == 64  # no more than there is to draw
    limit = 0
    with pytest.raises(ValueError, match="expected memory for 16 images at once"):
        find(1000)


def test_colours_that_are_not_finite_stop_the_run_and_name_the_image(checkpoint, tmp_path, capsys, monkeypatch):
    """Finite latents, of which the decoder makes something else."""
    real, calls = sampling.generator.decode, []

    def broken(vae, latents, scale):
        x = real(vae, latents, scale)
        calls.append(len(x))
        if len(calls) == 3:
            x[5, 0, 0, 0] = float("inf")
        return x

    monkeypatch.setattr(sampling.generator, "decode", broken)
    line = refused(capsys, arguments(checkpoint, tmp_path / "out", per_proc_batch_size=32))
    assert "1 that are not in batch 1: the first is image 37 of block 2" in line


@pytest.mark.parametrize("stage", ["write_npz", "write_grid", "write_atomically", "remove_partial"])
def test_a_run_stopped_while_it_is_made_whole_resumes(checkpoint, whole, tmp_path, monkeypatch, stage):
    output = tmp_path / "stopped"
    writer.create(output, settings_of(checkpoint, output))  # its own settings.json is not what is stopped
    with monkeypatch.context() as broken:
        broken.setattr(writer, stage, lambda *_: (_ for _ in ()).throw(Stopped))
        with pytest.raises(Stopped):
            draw(checkpoint, output, png=True)
    assert (output / "samples.json").exists() == (stage == "remove_partial")
    draw(checkpoint, output, png=True)
    assert same_npz(output, whole)
    assert {path.name for path in output.iterdir()} == {"samples.npz", "samples.png", "samples.json", "images"}
    assert len(list((output / "images").iterdir())) == 56


def settings_of(checkpoint, output):
    config = cli.parse(SampleConfig, arguments(checkpoint, output, png=True))
    return sampling.record.describe(config, *load_sit(checkpoint), torch.device("cpu"))


def launch(*flags, processes=2):
    """Start sample_ddp.py under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = command if processes > 1 else [sys.executable]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, str(ROOT / "sample_ddp.py"), *flags], env=environment, **pipes)


@pytest.mark.slow
def test_two_processes_give_the_bytes_and_metrics_of_one(checkpoint, whole, reference, tmp_path):
    measured = {"evaluate": reference, "features": "vae"}
    draw(checkpoint, tmp_path / "one", **measured)
    run = launch(*arguments(checkpoint, tmp_path / "two", **measured))
    _, errors = run.communicate(timeout=240)
    assert run.returncode == 0, errors
    assert same_npz(tmp_path / "two", whole)
    assert json.loads((tmp_path / "two" / "samples.json").read_text())["processes"] == 2
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text())["metrics"] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-6)
    run = launch(*arguments(checkpoint, tmp_path / "two", seed=1))
    _, errors = run.communicate(timeout=240)
    assert run.returncode != 0
    said = [line for line in errors.splitlines() if line.startswith("error")]  # beside what torchrun says itself
    assert len(said) == 1
    assert "seed 0 -> 1" in said[0]


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_bytes(checkpoint, tmp_path):
    flags = {"num_samples": 200, "num_steps": 30}
    draw(checkpoint, tmp_path / "undisturbed", **flags)
    output = tmp_path / "killed"
    run = launch(*arguments(checkpoint, output, **flags), processes=1)
    done = output / "partial" / "done"
    while run.poll() is None and not (done.is_file() and any(done.read_bytes())):
        time.sleep(0.005)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    assert any(done.read_bytes())
    assert not all(done.read_bytes())
    draw(checkpoint, output, **flags)
    assert same_npz(output, tmp_path / "undisturbed")


@pytest.mark.slow
def test_a_process_that_fails_ends_them_all(tmp_path):
    """Only the second process meets a class whose embedding is not a number."""
    labels = draw_labels("random", np.arange(1000), 0, 0, 32)
    (bad, *_) = set(labels[16:]) - set(labels[:16])

    def spoil(sit):
        sit.y_embedder.embedding_table.weight[bad] = torch.nan

    checkpoint = make_checkpoint(tmp_path, spoil, num_classes=1000)
    run = launch(*arguments(checkpoint, tmp_path / "out", num_samples=32))
    _, errors = run.communicate(timeout=240)
    assert run.returncode != 0
    assert "error [rank 1]: expected finite samples" in errors
    assert not (tmp_path / "out" / "samples.json").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"sampler": "ode-euler"},
        {"sampler": "ode-heun"},
        {"sampler": "ode-heun-repa"},
        {"sampler": "ode-dopri5"},
        {"num_steps": 4},
        {"last_step_size": 0.1},
        *({"diffusion_form": form} for form in DIFFUSION_FORMS if form not in ("linear", "sigma")),
        {"diffusion_norm": 0.5},
        *({"last_step": name} for name in LAST_STEPS if name != "mean"),
        {"guidance_scale": 1.0},
        {"guidance_low": 0.9},
        {"guidance_channels": "3"},
        {"time_shift": "3.0"},
        {"guidance_high": 0.3},
        {"uint8_rule": "truncate"},
        {"labels": "balanced"},
        {"classes": (0, 3)},
        {"mixed_precision": "bf16"},
        {"vae_precision": "bf16"},
    ],
)
def test_each_flag_changes_the_images_and_is_recorded(checkpoint, whole, tmp_path, changes):
    images, labels = draw(checkpoint, tmp_path / "other", num_samples=16, **changes)
    with np.load(whole / "samples.npz") as archive:
        assert not np.array_equal(images, archive["arr_0"][:16])
        if not changes.keys() & {"seed", "labels", "classes"}:
            assert np.array_equal(labels, archive["arr_1"][:16])
    settings = json.loads((tmp_path / "other" / "samples.json").read_text())["settings"]
    if "classes" in changes:
        assert set(labels) == {0, 3}
    for name, value in changes.items():
        value = UINT8_RULES[value] if name == "uint8_rule" else float(value) if name == "time_shift" else value
        recorded = settings["guidance_interval"] if name in ("guidance_low", "guidance_high") else [settings[name]]
        assert (list(value) if isinstance(value, tuple) else value) in recorded


def test_each_sampler_is_its_solver_and_all_begin_with_the_same_noise(checkpoint, tmp_path, monkeypatch):
    starts, options = {}, {}

    def spy(sampler):
        def solve(velocity, x, *positional, **named):
            starts[sampler], options[sampler] = x, (*positional[:1], named)
            return x.double()

        return solve

    ode = dict.fromkeys(("ode-euler", "ode-heun", "ode-heun-repa"), "sample_ode")
    ode["ode-dopri5"] = "sample_dopri5"
    for sampler, solver in {"sde": "sample_sde", **ode}.items():
        with monkeypatch.context() as patched:
            patched.setattr(sampling.generator, solver, spy(sampler))
            draw(checkpoint, tmp_path / sampler, num_samples=16, sampler=sampler)
    assert options["sde"] == (
        3,
        {"diffusion_form": "linear", "diffusion_norm": 1.0, "last_step": "mean", "time_shift": 1.0},
    )
    shared = {"time_shift": 1.0, "ends_at_0": True}
    assert options["ode-euler"] == (3, {"heun": False, "repa": False, **shared})
    assert options["ode-heun"] == (3, {"heun": True, "repa": False, **shared})
    assert options["ode-heun-repa"] == (3, {"heun": True, "repa": True, **shared})
    assert options["ode-dopri5"] == ({"atol": 1e-6, "rtol": 1e-3, "ends_at_0": True},)
    assert all(torch.equal(starts["sde"], start) for start in starts.values())


def test_dopri5_draws_the_same_whatever_the_batch_and_resumes_by_its_tolerances(checkpoint, tmp_path, capsys):
    flags = {"sampler": "ode-dopri5", "num_samples": 32}
    images, _ = draw(checkpoint, tmp_path / "small", **flags)
    large, _ = draw(checkpoint, tmp_path / "large", **flags, per_proc_batch_size=32)
    assert np.array_equal(images, large)
    for name, value in (("atol", 0.5), ("rtol", 0.5)):
        tolerances = {"atol": 1e-2, "rtol": 1e-2, name: value}
        assert not np.array_equal(images, draw(checkpoint, tmp_path / name, **flags | tolerances)[0])
        line = refused(capsys, arguments(checkpoint, tmp_path / name, **flags, atol=1e-6, rtol=1e-3))
        assert f"{name} 0.5 -> " in line
    settings = json.loads((tmp_path / "rtol" / "samples.json").read_text())["settings"]
    assert (settings["num_steps"], settings["atol"], settings["rtol"]) == (None, 1e-2, 0.5)
    assert settings["last_step"] is None
    capsys.readouterr()
    sample_ddp.main(["--checkpoint", str(checkpoint), "--output-dir", str(tmp_path / "rtol")])
    assert "is complete" in capsys.readouterr().out


def test_the_same_command_on_a_whole_folder_changes_nothing(checkpoint, whole, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    sample_ddp.main(arguments(checkpoint, whole))
    assert "is complete" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def refused(capsys, flags):
    """The line that a user sees."""
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: sample_ddp.main(list(map(str, flags))))
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"num_samples": 0}, "--num-samples: expected at least 1, found 0"),
        ({"num_steps": 0}, "--num-steps: expected at least 1, found 0"),
        (
            {"per_proc_batch_size": 24},
            "--per-proc-batch-size: expected a multiple of 16 (one block of images), or auto, found 24",
        ),
        ({"per_proc_batch_size": 0}, "--per-proc-batch-size: expected a multiple of 16"),
        ({"atol": 0.0}, "--atol: expected a tolerance in [1e-8, 1): the network is in float32, found 0.0"),
        ({"atol": "nan"}, "--atol: expected a tolerance in [1e-8, 1)"),
        ({"rtol": 1.0}, "--rtol: expected a tolerance in [1e-8, 1)"),
        ({"rtol": -1e-3}, "--rtol: expected a tolerance in [1e-8, 1)"),
        ({"diffusion_norm": 0.0}, "--diffusion-norm: expected a positive number, found 0.0"),
        ({"diffusion_norm": "nan"}, "--diffusion-norm: expected a positive number, found nan"),
        ({"diffusion_form": "cubic"}, "invalid choice: 'cubic'"),
        ({"last_step": "last"}, "invalid choice: 'last'"),
        ({"last_step": "none", "num_steps": 1}, "--num-steps: expected at least 2 beside --last-step none, found 1"),
        ({"last_step_size": 0.0}, "--last-step-size: expected a size in (0, 1), found 0.0"),
        ({"guidance_scale": "nan"}, "--guidance-scale: expected finite scales, found nan"),
        ({"guidance_channels": 2}, "invalid choice: '2'"),
        ({"time_shift": 0}, "--time-shift: expected a number above 0, or auto, found 0"),
        ({"time_shift": "none"}, "--time-shift: expected a number above 0, or auto, found none"),
        ({"parity": True, "mixed_precision": "bf16"}, "--mixed-precision: expected no beside --parity, found bf16"),
        ({"parity": True, "vae_precision": "bf16"}, "--vae-precision: expected no beside --parity, found bf16"),
        ({"parity": True, "no_tf32": True}, "--tf32: expected no --no-tf32 beside --parity, found False"),
        ({"guidance_low": -0.5}, "--guidance-low: expected times in [0, 1], found -0.5"),
        ({"guidance_low": 0.5, "guidance_high": 0.4}, "--guidance-high: expected a time in [0.5, 1]"),
        ({"seed": -1}, "--seed: expected an integer in [0, 2**64), found -1"),
        ({"classes": (1, K)}, "--classes: expected different numbers from 0 to 4, found 1 5"),
        ({"classes": (1, 1)}, "--classes: expected different numbers"),
        ({"sampler": "ddim"}, "invalid choice: 'ddim'"),
        ({"checkpoint": "absent"}, "not a checkpoint: nothing at absent"),
        ({"checkpoint": "."}, "not a checkpoint"),
        ({"vae": "absent/folder/vae"}, "--vae: expected a directory, file or hub name of an AutoencoderKL"),
        ({"guidance_rescale": 1}, "unknown flag --guidance-rescale"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(checkpoint, tmp_path, capsys, monkeypatch, changes, expected):
    monkeypatch.chdir(tmp_path)
    assert expected in refused(capsys, arguments(checkpoint, tmp_path / "out", **changes))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_named(checkpoint, tmp_path, capsys):
    assert "expected a GPU for each process" in refused(capsys, arguments(checkpoint, tmp_path / "out", device="cuda"))


def test_another_vae_is_refused(checkpoint, tmp_path, capsys):
    other = make_vae(tmp_path / "other", seed=1)
    line = refused(capsys, arguments(checkpoint, tmp_path / "out", vae=other))
    assert "--vae: expected the VAE of the checkpoint" in line
    assert not (tmp_path / "out").exists()


def test_the_same_vae_elsewhere_is_taken(checkpoint, whole, tmp_path):
    moved = make_vae(tmp_path / "moved")
    draw(checkpoint, tmp_path / "out", vae=moved)
    assert same_npz(tmp_path / "out", whole)


def other_decoder(path, checkpoint):
    """The checkpoint's VAE with another decoder."""
    vae = load_vae(load_sit(checkpoint)[1]["vae"])
    with torch.no_grad():
        vae.decoder.conv_out.bias += 0.1
    vae.save_pretrained(path)
    return path


def test_another_decoder_of_the_same_encoder_is_taken_and_recorded(checkpoint, whole, tmp_path, capsys):
    """As sd-vae-ft-ema decodes latents of sd-vae-ft-mse."""
    other = other_decoder(tmp_path / "other", checkpoint)
    images, _ = draw(checkpoint, tmp_path / "out", vae=other)
    with np.load(whole / "samples.npz") as archive:
        assert np.abs(images.astype(int) - archive["arr_0"]).mean() > 5
    first, second = (json.loads((path / "samples.json").read_text())["settings"] for path in (whole, tmp_path / "out"))
    assert first["vae_digest"] == second["vae_digest"]
    assert second["vae_decoder"] == decoder_digest(load_vae(str(other))) != first["vae_decoder"]
    # A set is finished by the decoder that it was begun with.
    assert "vae_decoder" in refused(capsys, arguments(checkpoint, whole, vae=other))
    draw(checkpoint, whole)
    draw(checkpoint, tmp_path / "out", vae=other)


def test_a_set_that_older_code_began_is_finished_whatever_its_decoder(checkpoint, whole, tmp_path):
    """It recorded all weights in one digest."""
    shutil.copytree(whole, tmp_path / "old")
    vae = load_vae(load_sit(checkpoint)[1]["vae"])
    run = tmp_path / "run"
    shutil.copytree(checkpoint.parent.parent, run)
    file = run / "checkpoints" / checkpoint.name / "state.json"
    state = read_checksummed_json(file) | {"vae_digest": state_digest(vae.state_dict())}
    file.write_text(to_checksummed_json(state))
    record = json.loads((tmp_path / "old" / "samples.json").read_text())
    record["settings"]["vae_digest"] = state["vae_digest"]
    del record["settings"]["vae_decoder"]
    (tmp_path / "old" / "samples.json").write_text(to_json(record))
    before = (tmp_path / "old" / "samples.npz").stat().st_mtime_ns
    draw(run / "checkpoints" / checkpoint.name, tmp_path / "old")
    assert (tmp_path / "old" / "samples.npz").stat().st_mtime_ns == before


def test_labels_are_of_the_classes_that_the_store_had(tmp_path, capsys):
    checkpoint = make_checkpoint(tmp_path, classes_present=[1, 3])
    _, labels = draw(checkpoint, tmp_path / "out")
    assert set(labels) == {1, 3}
    _, labels = draw(checkpoint, tmp_path / "told", classes=(0, 1))
    assert set(labels) == {0, 1}


def test_a_damaged_checkpoint_is_refused(tmp_path, capsys):
    checkpoint = make_checkpoint(tmp_path)
    content = bytearray((checkpoint / "ema.safetensors").read_bytes())
    content[-1] ^= 1
    (checkpoint / "ema.safetensors").write_bytes(content)
    assert "damaged checkpoint" in refused(capsys, arguments(checkpoint, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_refused_and_kept(checkpoint, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert "found other files in" in refused(capsys, arguments(checkpoint, tmp_path))
    assert "found the file" in refused(capsys, arguments(checkpoint, tmp_path / "thesis.txt"))
    assert "cannot make" in refused(capsys, arguments(checkpoint, tmp_path / "thesis.txt" / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("name", ["images.raw", "done"])
def test_a_cut_unfinished_folder_is_named(checkpoint, tmp_path, capsys, name):
    writer.create(tmp_path / "out", settings_of(checkpoint, tmp_path / "out"))
    os.truncate(tmp_path / "out" / "partial" / name, 3)
    assert f"{name}, found 3" in refused(capsys, arguments(checkpoint, tmp_path / "out", png=True))


def test_samples_that_are_not_finite_stop_the_run_and_name_the_block(tmp_path, capsys):
    labels = draw_labels("random", np.arange(1000), 0, 0, 48)
    (bad, *_) = set(labels[32:]) - set(labels[:32])

    def spoil(sit):
        sit.y_embedder.embedding_table.weight[bad] = torch.nan

    checkpoint = make_checkpoint(tmp_path, spoil, num_classes=1000)
    line = refused(capsys, arguments(checkpoint, tmp_path / "out", num_samples=48))
    first = 32 + list(labels[32:]).index(bad)
    assert f"in batch 2: the first is image {first} of block 2" in line
    assert (tmp_path / "out" / "partial" / "done").read_bytes() == b"\1\1\0"


def test_a_full_disk_is_named_and_what_was_written_is_kept(checkpoint, whole, tmp_path, capsys, monkeypatch):
    output, write = tmp_path / "out", os.pwrite

    def fill(descriptor, content, offset):
        if offset >= 2 * 16 * 16 * 16 * 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, content[:1000], offset)  # short writes are gone on with

    with monkeypatch.context() as full:
        full.setattr(os, "pwrite", fill)
        assert "the disk is full" in refused(capsys, arguments(checkpoint, output))
    assert (output / "partial" / "done").read_bytes() == b"\1\1\0\0"
    draw(checkpoint, output)
    assert same_npz(output, whole)


def test_too_little_room_is_named_before_anything_is_drawn(checkpoint, tmp_path, capsys, monkeypatch):
    usage = copy.copy(writer.shutil.disk_usage(tmp_path))._replace(free=1000)
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda _: usage)
    assert "GB free for the samples" in refused(capsys, arguments(checkpoint, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_npz_is_what_numpy_would_save(tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (9, 5, 5, 3), np.uint8), rng.integers(0, 3, 9)
    images.tofile(tmp_path / "raw")
    writer.write_npz(tmp_path / "a.npz", tmp_path / "raw", images.shape, labels)
    np.savez(tmp_path / "b.npz", images, labels)
    entries = []
    for name in ("a.npz", "b.npz"):
        with zipfile.ZipFile(tmp_path / name) as archive:
            assert archive.testzip() is None
            entries.append({entry.filename: archive.read(entry) for entry in archive.infolist()})
            assert all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
    assert entries[0] == entries[1]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    path = tmp_path_factory.mktemp("reference") / "reference.npz"
    np.savez(path, np.random.default_rng(1).integers(0, 256, (80, 16, 16, 3), np.uint8))
    return path


def test_measuring_while_drawing_gives_the_metrics_of_the_npz(checkpoint, whole, reference, tmp_path, monkeypatch):
    """Also after a stop, when some batches were drawn by an earlier start; and without any npz."""
    from evaluations import evaluate

    vae = load_sit(checkpoint)[1]["vae"]
    sides = ["--samples", str(whole / "samples.npz"), "--ref", str(reference), "--output", str(tmp_path / "after.json")]
    evaluate.main([*sides, "--features", "vae", "--vae", vae])
    expected = json.loads((tmp_path / "after.json").read_text())

    output, drawn, compute = tmp_path / "out", [], SampleGenerator.latents
    flags = [*arguments(checkpoint, output, evaluate=reference, features="vae"), "--no-npz"]

    def stop_at_third(self, batch):
        drawn.append(batch)
        if len(drawn) == 3:
            raise Stopped
        return compute(self, batch)

    monkeypatch.setattr(SampleGenerator, "latents", stop_at_third)
    with pytest.raises(Stopped):
        sample_ddp.main(flags)
    sample_ddp.main(flags)
    assert drawn == [0, 1, 2, 2, 3]
    assert {path.name for path in output.iterdir()} == {"samples.png", "samples.json", "metrics.json"}
    found = json.loads((output / "metrics.json").read_text())
    assert found["metrics"].keys() == expected["metrics"].keys() >= {"vae-frechet", "vae-precision", "vae-recall"}
    for name, value in expected["metrics"].items():
        assert found["metrics"][name] == pytest.approx(value, rel=1e-6), name
    assert found["samples"]["count"] == 56
    assert found["features"] == expected["features"]
    assert found["reference"]["sha256"] == expected["reference"]["sha256"]
    assert found["sampling"]["settings"]["num_steps"] == 3
    assert found["warnings"] == expected["warnings"]


def test_bad_flags_of_evaluation_are_named_before_anything_is_drawn(checkpoint, whole, reference, tmp_path, capsys):
    output = tmp_path / "out"
    line = refused(capsys, arguments(checkpoint, output, evaluate=tmp_path / "absent.npz", features="vae"))
    assert "absent.npz" in line
    assert "features" in refused(capsys, arguments(checkpoint, output, evaluate=reference, features="vgg"))
    line = refused(capsys, arguments(checkpoint, output, evaluate=reference, features="vae", num_samples=3))
    assert "--num-samples: expected more than 3 beside --evaluate" in line
    assert "nothing would be kept" in refused(capsys, [*arguments(checkpoint, output), "--no-npz"])
    assert not output.exists()


def test_a_whole_set_is_measured_when_another_reference_is_asked_for(
    checkpoint, whole, reference, tmp_path, monkeypatch
):
    measured = []
    output = shutil.copytree(whole, tmp_path / "set")
    asked = {"evaluate": reference, "features": "vae"}
    sample_ddp.main(arguments(checkpoint, output, **asked))
    found = json.loads((output / "metrics.json").read_text())
    sides = [str(output / "samples.npz"), "--ref", str(reference), "--output", str(tmp_path / "offline.json")]
    evaluate.main([*sides, "--features", "vae", "--vae", load_sit(checkpoint)[1]["vae"], "--device", "cpu"])
    assert found["metrics"] == pytest.approx(json.loads((tmp_path / "offline.json").read_text())["metrics"], rel=1e-6)
    before = (output / "metrics.json").stat().st_mtime_ns
    sample_ddp.main(arguments(checkpoint, output, **asked))
    assert (output / "metrics.json").stat().st_mtime_ns == before
    record = json.loads((output / "metrics.json").read_text())
    record["reference"]["path"] = "another"
    (output / "metrics.json").write_text(json.dumps(record))
    monkeypatch.setattr(sample_ddp, "measure_again", lambda *_: measured.append(True))
    sample_ddp.main(arguments(checkpoint, output, **asked))
    assert measured == [True]


def test_a_set_whose_samples_are_gone_is_not_finished(checkpoint, whole, tmp_path):
    output = shutil.copytree(whole, tmp_path / "set")
    (output / "samples.npz").unlink()
    sample_ddp.main(arguments(checkpoint, output))
    assert same_npz(output, whole)


def test_the_record_beside_another_npz_is_not_taken_for_its_own(checkpoint, whole, reference, tmp_path, capsys):
    output = shutil.copytree(whole, tmp_path / "set")
    shutil.copyfile(reference, output / "samples.npz")
    sides = [str(output / "samples.npz"), "--ref", str(reference)]
    evaluate.main([*sides, "--features", "vae", "--vae", load_sit(checkpoint)[1]["vae"], "--device", "cpu"])
    assert "is the record of another npz" in capsys.readouterr().err
    assert json.loads((output / "metrics.json").read_text())["sampling"] is None


def test_guidance_by_a_null_class_that_was_never_trained_is_refused(tmp_path, capsys):
    vae = make_vae(tmp_path / "vae")
    make_store(tmp_path / "store", vae=vae)
    folder = run(tmp_path / "store", tmp_path, label_dropout=0.0)
    AcceleratorState._reset_state(reset_partial_state=True)
    line = refused(capsys, ["--checkpoint", folder, "--guidance-scale", 4, "--num-samples", 16, "--device", "cpu"])
    assert "which was trained with --label-dropout 0" in line


@pytest.fixture(scope="module")
def weaker(tmp_path_factory):
    """A checkpoint of other weights."""
    return make_checkpoint(tmp_path_factory.mktemp("weaker"), lambda sit: sit.final_layer.linear.weight.mul_(0.5))


def test_autoguidance_is_by_the_other_checkpoint_and_recorded(checkpoint, whole, weaker, tmp_path, capsys):
    images, labels = draw(checkpoint, tmp_path / "auto", num_samples=16, autoguidance=weaker)
    (sit, info), (guide, found) = load_sit(checkpoint), load_sit(weaker)
    y, noise = torch.from_numpy(labels), block_noise(0, 0, BLOCK, (4, 4, 4), "cpu")
    velocity = guided_velocity(sit, y, K, 2.0, (0.0, 1.0), guide=guide)
    z = sample_sde(velocity, noise(), 3, noise, Interpolant("linear"), 0.04)
    assert np.array_equal(images, decode_images(load_vae(info["vae"]), z.float(), info["scale"]).numpy())
    with np.load(whole / "samples.npz") as archive:
        assert not np.array_equal(images, archive["arr_0"][:16])
    settings = json.loads((tmp_path / "auto" / "samples.json").read_text())["settings"]
    assert settings["autoguidance_digest"] == found["digest"]
    assert "autoguidance_digest" in refused(capsys, arguments(checkpoint, tmp_path / "auto", num_samples=16))
    sample_ddp.main(arguments(checkpoint, tmp_path / "auto", num_samples=16, autoguidance=weaker))
    assert "is complete" in capsys.readouterr().out


def test_a_sweep_of_autoguidance_reloads_both_and_names_its_folders(checkpoint, weaker, tmp_path):
    sweep = {"num_samples": 16, "autoguidance": weaker, "guidance_scale": (1.0, 3.0)}
    sample_ddp.main(arguments(checkpoint, tmp_path / "sweep", **sweep))
    draw(checkpoint, tmp_path / "alone", num_samples=16, autoguidance=weaker, guidance_scale=3.0)
    assert same_npz(tmp_path / "sweep" / "run-0000007-sde3-auto3-seed0-n16", tmp_path / "alone")
    plain = tmp_path / "sweep" / "run-0000007-sde3-cfg1-seed0-n16"
    assert json.loads((plain / "samples.json").read_text())["settings"]["autoguidance_digest"] is None
    draw(checkpoint, tmp_path / "plain", num_samples=16, guidance_scale=1.0)
    assert same_npz(plain, tmp_path / "plain")


def test_bad_autoguidance_is_named(checkpoint, weaker, tmp_path, capsys):
    flags = arguments(checkpoint, tmp_path / "out", autoguidance=weaker, guidance_scale=1.0)
    assert "--autoguidance: expected a --guidance-scale other than 1 beside it" in refused(capsys, flags)
    for name, facts in {"classes": {"num_classes": K + 1}, "prediction": {"prediction": "x"}}.items():
        other = make_checkpoint(tmp_path / name, **facts)
        line = refused(capsys, arguments(checkpoint, tmp_path / "out", autoguidance=other))
        assert "--autoguidance: expected a model of the same channels, latent size, classes" in line
    line = refused(capsys, arguments(checkpoint, tmp_path / "out", autoguidance="absent"))
    assert "not a checkpoint: nothing at absent" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_same_command_gives_the_same_bytes(checkpoint, tmp_path):
    for name in ("a", "b"):
        draw(checkpoint, tmp_path / name)
    assert same_npz(tmp_path / "a", tmp_path / "b")
    assert json.loads((tmp_path / "a" / "samples.json").read_text())["settings"]["mixed_precision"] == "bf16"
