"""The doctor finds what was done to a store or a run, and says what to do."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from analysis import doctor
from models.sit import SiT, SiTConfig
from models.vae import LatentScale
from runtime.files import sha256
from tests.stores import make_store, save_checkpoint

ROOT = Path(__file__).resolve().parent.parent
INFO = {
    "scale": LatentScale((1.0,), (0.0,)).to_dict(),
    "vae": "x",
    "vae_digest": "y",
    "resolution": 32,
    "class_names": ["a"],
    "path_type": "linear",
}


def complaints(folder):
    return [f"{finding.text} -> {finding.remedy}" for finding in doctor.examine(folder) if finding.remedy]


def rows(*steps, **changes):
    return [{"step": step, "loss": 1.0 + changes.get(f"at{step}", 0.0)} for step in steps]


def make_run(folder, steps=(10, 20), log=tuple(range(5, 21, 5))):
    sit = SiT(SiTConfig.from_name("SiT-Ti/4", 8, 4, 1))
    for step in steps:
        save_checkpoint(folder, step, sit, sit, torch.optim.AdamW(sit.parameters()), INFO)
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(*log)))
    return folder


def test_what_is_well_has_no_complaint(tmp_path):
    assert complaints(make_store(tmp_path / "store", flips=True, images=True)) == []
    assert complaints(make_run(tmp_path / "run")) == []


def flip_bit(file, place=0.5):
    content = bytearray(file.read_bytes())
    content[int(len(content) * place)] ^= 4
    file.write_bytes(content)


def change_numbers(file, change):
    array = np.load(file)
    change(array)
    np.save(file, array)


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (lambda f: flip_bit(f / "moments-00001.npy", 0.9), "moments-00001.npy changed since"),
        (lambda f: flip_bit(f / "flips-00000.npy", 0.9), "flips-00000.npy changed since"),
        (lambda f: flip_bit(f / "images-00002.npy", 0.9), "images-00002.npy changed since"),
        (lambda f: flip_bit(f / "paths.txt"), "paths.txt changed since"),
        (lambda f: (f / "moments-00000.npy").write_bytes(b"x"), "damaged store"),
        (lambda f: (f / "labels.npy").unlink(), "damaged store"),
        (lambda f: ((f / "meta.json").unlink(), (f / "partial").mkdir()), "unfinished latent store"),
        (lambda f: change_numbers(f / "moments-00000.npy", lambda a: a.__imul__(9)), "have a std of"),
        (lambda f: change_numbers(f / "moments-00000.npy", lambda a: a.fill(np.nan)), "std of nan"),
        (lambda f: change_numbers(f / "moments-00000.npy", lambda a: a.__imul__(-1)), "posterior below 0"),
        (lambda f: change_numbers(f / "labels.npy", lambda a: a.fill(1)), "2 classes without an image"),
    ],
)
def test_harm_to_a_store_is_found(harm, expected, tmp_path):
    store = make_store(tmp_path / "store", flips=True, images=True)
    harm(store)
    assert any(expected in line for line in complaints(store)), complaints(store)


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (lambda f: flip_bit(f / "checkpoints/0000020/optimizer.pt"), r"damaged checkpoint: .*delete .*0000020"),
        (lambda f: flip_bit(f / "checkpoints/0000010/ema.safetensors"), r"damaged checkpoint: .*delete .*0000010"),
        (lambda f: (f / "checkpoints/0000020/state.json").write_text("{"), r"damaged checkpoint: .*state\.json"),
        (lambda f: (f / "checkpoints/.0000030.partial").mkdir(), "was left by a process"),
        (lambda f: (f / "log.jsonl").write_text('{"step": 5, "loss": 1}\n{"st'), "1 of 2 lines are no JSON"),
        (lambda f: write_log(f, rows(5, 10, 25, 30)), "1 gaps, the first between steps 10 and 25"),
        (lambda f: write_log(f, rows(5, 10, 10, 15, 20)), "not in order"),
        (lambda f: write_log(f, rows(5, 10, 15, 20, at15=float("nan"))), "not finite in 1 rows, the first at step 15"),
        (lambda f: write_log(f, rows(5, 10, 15)), "ends at step 15, before checkpoint 20"),
        (lambda f: (f / "log.jsonl").unlink(), "no rows"),
    ],
)
def test_harm_to_a_run_is_found(harm, expected, tmp_path):
    run = make_run(tmp_path / "run")
    harm(run)
    assert any(re.search(expected, line) for line in complaints(run)), complaints(run)


def write_log(folder, lines):
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))


def test_samples_are_held_against_their_digest(tmp_path):
    record = {"settings": {"num_samples": 3}, "npz_sha256": sha256(Path(__file__))}
    (tmp_path / "samples.json").write_text(json.dumps(record))
    (tmp_path / "samples.npz").write_bytes(Path(__file__).read_bytes())
    assert complaints(tmp_path) == []
    flip_bit(tmp_path / "samples.npz")
    assert "samples.npz is missing or changed" in complaints(tmp_path)[0]
    (tmp_path / "samples.npz").unlink()
    assert "samples.npz is missing or changed" in complaints(tmp_path)[0]
    (tmp_path / "samples.json").write_text("[]")
    assert "samples.json is damaged" in complaints(tmp_path)[0]


def test_a_user_sees_a_list_and_a_code(tmp_path):
    def call(path):
        command = [sys.executable, "-m", "analysis.doctor", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        return done.returncode, done.stdout, done.stderr

    store = make_store(tmp_path / "store")
    code, out, _ = call(store)
    assert (code, out.splitlines()[-1]) == (0, "all is well")
    flip_bit(store / "paths.txt")
    code, out, _ = call(store)
    assert (code, out.splitlines()[-1]) == (1, "1 things to look at")
    assert "-> dump the images again" in out
    code, out, err = call(tmp_path)
    assert (code, out) == (2, "")
    assert err.startswith("error: expected a latent store")
    assert err.count("\n") == 1
