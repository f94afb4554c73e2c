"""The demo: its images are the real digits, its VAE and classifier fit for their work, its commands work together."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from demo import digits, make_digits, run
from models.vae import LatentScale, decode_images, encode_moments, load_vae

ROOT = Path(__file__).resolve().parent.parent
PIXELS_SHA256 = "f4373c2691e98e9058dd74fac064b73170f58e0e4cd53e35b340e6b22ebbf1e6"


@pytest.fixture(scope="module")
def recorded() -> tuple[np.ndarray, np.ndarray]:
    return digits.load_digits()


@pytest.fixture(scope="module")
def unseen(recorded) -> np.ndarray:
    return np.flatnonzero(digits.held_out(np.arange(len(recorded[0]))))


@pytest.fixture(scope="module")
def classifier():
    return digits.fit_classifier()


@pytest.fixture(scope="module")
def through_vae(recorded, unseen) -> dict[str, np.ndarray | torch.Tensor]:
    """The unseen digits' images, their latents' scaled draws and stds, and what the draws are decoded to."""
    vae = load_vae(str(ROOT / "demo" / "vae"))
    images = digits.enlarge(recorded[0][unseen])
    scale = LatentScale((vae.config.scaling_factor,), (0.0,))
    mean, std = encode_moments(vae, torch.from_numpy(images)).chunk(2, dim=1)
    z = scale.scale_latent(mean + std * torch.randn(mean.shape, generator=torch.Generator().manual_seed(0)))
    decoded = decode_images(vae, z, scale).numpy()
    return {"images": images, "z": z, "z_std": std * vae.config.scaling_factor, "decoded": decoded}


def test_digits_are_written_as_they_were_recorded(tmp_path, recorded):
    make_digits.main(["--output-dir", str(tmp_path)])
    paths = sorted(tmp_path.glob("*/*.png"), key=lambda path: path.stem)
    assert len(paths) == 1797
    assert [int(path.parent.name) for path in paths] == recorded[1].tolist()
    images = np.stack([np.asarray(Image.open(path)) for path in paths])
    assert images.shape == (1797, 32, 32, 3)
    assert images.dtype == np.uint8
    # Bicubic interpolation keeps the middle of each recorded pixel but for its neighbours' small share.
    middles = images.reshape(-1, 8, 4, 8, 4, 3)[:, :, 1:3, :, 1:3].mean(axis=(2, 4, 5)).reshape(-1, 64) * 16 / 255
    assert np.sqrt(np.square(middles - recorded[0]).mean()) < 0.4
    assert hashlib.sha256(images.tobytes()).hexdigest() == PIXELS_SHA256


def test_writing_digits_again_replaces_what_is_missing_only(tmp_path):
    make_digits.write_digits(tmp_path)
    lost, kept = tmp_path / "0" / "0000.png", tmp_path / "1" / "0001.png"
    content, stamp = lost.read_bytes(), kept.stat().st_mtime_ns
    lost.unlink()
    make_digits.write_digits(tmp_path)
    assert lost.read_bytes() == content
    assert kept.stat().st_mtime_ns == stamp
    assert len(list(tmp_path.glob("*/*"))) == 1797


def test_reducing_undoes_enlarging(recorded):
    flat = np.full((1, 64), 9.0)
    assert np.abs(digits.reduce(digits.enlarge(flat)) - flat).max() < 0.04  # half a grey level of 255
    error = digits.reduce(digits.enlarge(recorded[0])) - recorded[0]
    assert np.sqrt(np.square(error).mean()) < 1.1  # of 16: the strokes' edges


def test_held_out_digits_are_a_fifth_and_of_all_classes(recorded, unseen):
    assert len(unseen) == 359
    assert np.bincount(recorded[1][unseen]).min() > 20


def test_vae_reconstructs_digits_it_never_saw(through_vae):
    error = through_vae["decoded"].astype(np.float64) - through_vae["images"]
    psnr = -10 * np.log10(np.square(error / 255).mean())
    assert psnr > 40


def test_scaled_latents_have_std_one_and_no_channel_of_noise(through_vae):
    z, z_std = through_vae["z"], through_vae["z_std"]
    assert z.shape == (359, 4, 8, 8)
    assert abs(z.std().item() - 1) < 0.03
    # A channel of noise alone would be no target to align with.
    assert (z_std.mean(dim=(0, 2, 3)) / z.std(dim=(0, 2, 3))).max() < 0.2


def test_vae_is_small_and_says_how_it_was_made():
    folder = ROOT / "demo" / "vae"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2e6
    record = json.loads((folder / "training.json").read_text())
    assert json.loads((folder / "config.json").read_text())["scaling_factor"] == pytest.approx(
        1 / record["fitted_digits"]["latent_std"], abs=1e-5
    )


def test_classifier_recognises_what_it_was_not_fitted_to(through_vae, classifier, recorded, unseen):
    images, labels = through_vae["images"], recorded[1][unseen]
    assert classifier.score(recorded[0][unseen], labels) >= 0.98
    assert classifier.score(digits.reduce(images), labels) >= 0.98
    assert classifier.score(digits.reduce(through_vae["decoded"]), labels) >= 0.98
    noise = np.random.default_rng(0).integers(0, 256, images.shape, dtype=np.uint8)
    assert classifier.score(digits.reduce(noise), labels) < 0.25


def test_copies_are_told_from_new_digits(recorded):
    copies = digits.enlarge(recorded[0][:100])
    distances = run.median_distances(copies)
    assert distances["from_samples"] == 0
    assert 1 < distances["from_other_digits"] < 4
    mixed = ((copies[:50].astype(int) + copies[50:]) // 2).astype(np.uint8)
    assert run.median_distances(mixed)["from_samples"] > 1


def test_grid_has_a_column_for_each_digit_and_marks_errors(tmp_path):
    labels = np.repeat(np.arange(10), 12)[::-1]
    images = np.broadcast_to((labels * 20).astype(np.uint8)[:, None, None, None], (120, 32, 32, 3))
    recognised = labels != 3
    run.draw_grid(np.ascontiguousarray(images), labels, recognised, tmp_path / "grid.png")
    picture = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB")).astype(int)
    width = picture.shape[1] / 10
    for digit in (0, 3, 9):
        column = picture[:, int((digit + 0.5) * width)]
        assert (np.abs(column - 20 * digit).max(axis=1) == 0).mean() > 0.7  # ten images of its grey
    red = (picture == [255, 0, 0]).all(axis=2).any(axis=0)
    assert red.any()
    assert not red[: int(2.9 * width)].any()
    assert not red[int(4.1 * width) :].any()


def test_summary_states_shares_losses_and_seconds():
    labels = np.tile(np.arange(10), 2)
    recognised = labels != 7
    rows = [
        {"step": 1, "loss": 3.0, "velocity": 2.0, "align_vae": 1.0, "images_per_second": 5.0},
        {"step": 40, "loss": 0.9, "velocity": 0.5, "align_vae": 0.4, "images_per_second": 5.0},
    ]
    seconds = {"digits": {"seconds": 1.26, "finished": True}, "training": {"seconds": 60.0, "finished": True}}
    summary = run.summarise(recognised, labels == 0, labels, rows, seconds)
    assert summary["recognised"] == pytest.approx(0.9)
    assert summary["recognised_before_training"] == pytest.approx(0.1)
    assert summary["recognised_by_digit"]["7"] == 0
    assert summary["recognised_by_digit"]["8"] == 1
    assert summary["losses"]["velocity"] == {"first": 2.0, "last": 0.5, "steps": [1, 40]}
    assert set(summary["losses"]) == {"velocity", "align_vae"}
    assert summary["seconds"] == {"digits": 1.3, "training": 60.0, "total": 61.3}


def test_stage_keeps_its_seconds_once_finished(tmp_path, capfd):
    run.run_stage("wait", "python -c 'import time; time.sleep(0.2)'", tmp_path)
    first = run.read_json(tmp_path / "seconds.json")["wait"]
    run.run_stage("wait", "python -c pass", tmp_path)
    assert run.read_json(tmp_path / "seconds.json")["wait"] == first
    assert first["finished"]
    assert first["seconds"] > 0.2
    assert "$ python -c pass" in capfd.readouterr().out


def test_failed_stage_names_itself_and_is_resumed_later(tmp_path):
    with pytest.raises(ValueError, match=r"stage 'dump' .* exit code 3 "):
        run.run_stage("dump", "python -c 'raise SystemExit(3)'", tmp_path)
    begun = run.read_json(tmp_path / "seconds.json")["dump"]
    assert not begun["finished"]
    run.run_stage("dump", "python -c pass", tmp_path)
    assert run.read_json(tmp_path / "seconds.json")["dump"]["seconds"] > begun["seconds"]


@pytest.mark.parametrize(
    "arguments, found",
    [(["--num-samples", "15"], "--num-samples"), (["--max-train-steps", "1"], "--max-train-steps"), (["--x"], "--x")],
)
def test_wrong_settings_are_one_line(tmp_path, arguments, found):
    command = [sys.executable, "-m", "demo.run", "--output-dir", str(tmp_path / "out"), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert found in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_whole_way_shortened_and_summed_up_again(tmp_path, monkeypatch):
    command = [sys.executable, *"-m demo.run --max-train-steps 3 --num-samples 20 --output-dir".split(), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["samples"] == 20
    assert 0 <= summary["recognised"] <= 1
    assert summary["losses"]["velocity"]["steps"] == [1, 3]
    assert summary["classifier"]["accuracy_reconstructed"] >= 0.98
    assert set(summary["metrics"]["before"]) == set(summary["metrics"]["after"]) >= {"vae-frechet"}
    assert all(f"$ {shown}" in done.stdout for shown in summary["commands"].values())
    assert Image.open(tmp_path / "samples.png").size == (700, 720)
    assert (tmp_path / "report.html").stat().st_size > 10_000
    # That the commands change nothing when they are given again is their own tests' matter.
    monkeypatch.setattr(run, "run_stage", lambda *_: None)
    run.main(command[3:])
    assert json.loads((tmp_path / "summary.json").read_text()) == summary  # its date and seconds included
