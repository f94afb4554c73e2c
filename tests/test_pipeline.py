"""Images from a published model: those of sample_ddp.py, by number or name; what does not fit is refused."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample_ddp
import sampling.pipeline
from analysis import publish
from runtime.files import Field
from sampling.pipeline import VAEREPAPipeline, class_numbers
from tests.stores import make_vae
from tests.test_publish import NAMES, cache_model, make_checkpoint, pixels
from training.config import TrainConfig

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def published(checkpoint, tmp_path_factory):
    directory = tmp_path_factory.mktemp("published") / "small"
    publish.main([str(checkpoint), "--output-dir", str(directory), "--include-vae"])
    return directory


@pytest.fixture(scope="module")
def pipe(published):
    return VAEREPAPipeline.from_pretrained(published, device="cpu")


def test_the_pipeline_says_when_the_hub_does_not_answer(monkeypatch, tmp_path):
    monkeypatch.setattr("sampling.pipeline.hub_is_reachable", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"'name/absent-model' .the hub cannot be reached.*give a directory"):
        VAEREPAPipeline.from_pretrained("name/absent-model")


def test_a_fresh_process_loads_it_by_name_without_the_code_of_training(published, pipe, tmp_path):
    """From the hub's cache; with accelerate hidden, since diffusers imports it for itself where it is installed."""
    cache_model(tmp_path / "hub", published)
    code = """
import sys
sys.modules["accelerate"] = None
from dataclasses import asdict
from pathlib import Path
from runtime.files import Field
from sampling.pipeline import VAEREPAPipeline
pipe = VAEREPAPipeline.from_pretrained("name/small")
images = pipe([4, "goldfish"], num_inference_steps=2).images
for index, image in enumerate(images):
    image.save(f"{index}.png")
root = Path(sys.argv[1])
files = [Path(module.__file__) for module in sys.modules.values() if getattr(module, "__file__", None)]
ours = [file.relative_to(root) for file in files if file.is_relative_to(root)]
print(*sorted(str(file) for file in ours if ".venv" not in file.parts))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    command = [sys.executable, "-c", code, str(ROOT)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rooms = {Path(name).parts[0] for name in done.stdout.split()}
    assert rooms == {"diffusion", "models", "runtime", "sampling"}
    saved = pixels([Image.open(tmp_path / f"{index}.png") for index in range(2)])
    assert np.array_equal(saved, pixels(pipe([4, 1], num_inference_steps=2).images))


@pytest.mark.parametrize("guidance", [{}, {"scale": 2.5}, {"scale": 2.0, "low": 0.2, "high": 0.8}])
@pytest.mark.parametrize(
    "sampler, steps", [("sde", 4), ("ode-heun", 2), ("ode-euler", 3), ("ode-heun-repa", 2), ("ode-dopri5", 1)]
)
def test_images_are_those_of_sample_ddp(checkpoint, pipe, tmp_path, sampler, steps, guidance):
    """40 images in batches of 32: the second is filled up with labels of which the pipeline knows nothing."""
    flags = f"--checkpoint {checkpoint} --output-dir {tmp_path / 'drawn'} --num-samples 40 --per-proc-batch-size 32"
    flags += f" --seed 11 --sampler {sampler} --num-steps {steps} --device cpu"
    flags += "".join(f" --guidance-{name} {value}" for name, value in guidance.items())
    sample_ddp.main(flags.split())
    with np.load(tmp_path / "drawn" / "samples.npz") as archive:
        expected, labels = archive["arr_0"], archive["arr_1"]
    interval = guidance.get("low", 0.0), guidance.get("high", 1.0)
    settings = {"num_inference_steps": steps, "sampler": sampler, "seed": 11, "batch_size": 32}
    output = pipe(labels, guidance.get("scale", 1.0), interval, **settings)
    assert len(np.unique(expected.reshape(40, -1), axis=0)) == 40
    same = 32 if sampler == "ode-dopri5" else 40  # a block of it shares its steps, the filled-up one others
    assert np.array_equal(pixels(output.images)[:same], expected[:same])


@pytest.mark.parametrize("sampler", ["sde", "ode-heun", "ode-dopri5"])
def test_a_network_of_data_with_shifted_times_is_published_as_such(tmp_path, sampler):
    made = make_checkpoint(tmp_path, prediction="x", time_shift=2.0)
    flags = f"--checkpoint {made} --output-dir {tmp_path / 'drawn'} --num-samples 16 --num-steps 3 --sampler {sampler}"
    sample_ddp.main([*flags.split(), "--guidance-scale", "2"])
    with np.load(tmp_path / "drawn" / "samples.npz") as archive:
        expected, labels = archive["arr_0"], archive["arr_1"].tolist()
    publish.main([str(made), "--output-dir", str(tmp_path / "published"), "--include-vae"])
    pipe = VAEREPAPipeline.from_pretrained(tmp_path / "published", device="cpu")
    drawn = pipe(labels, 2.0, num_inference_steps=3, sampler=sampler, batch_size=64)
    assert np.array_equal(pixels(drawn.images), expected)
    card = (tmp_path / "published" / "README.md").read_text()
    assert "| predicts | the data z, not the velocity |" in card
    assert "| times shifted by | 2 |" in card
    file = tmp_path / "published" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in config.items() if k not in ("prediction", "time_shift")}))
    older = VAEREPAPipeline.from_pretrained(tmp_path / "published", device="cpu")
    assert (older.config["prediction"], older.config["time_shift"]) == ("v", 1.0)
    assert not np.array_equal(pixels(older(labels, 2.0, num_inference_steps=3, sampler=sampler).images), expected)


def test_default_batches_and_defaults_of_the_sde_are_those_of_sample_ddp(checkpoint, pipe, tmp_path):
    flags = f"--checkpoint {checkpoint} --output-dir {tmp_path / 'drawn'} --num-samples 70 --num-steps 3"
    sample_ddp.main([*flags.split(), "--guidance-scale", "4"])
    with np.load(tmp_path / "drawn" / "samples.npz") as archive:
        expected, labels = archive["arr_0"], archive["arr_1"]
    assert np.array_equal(pixels(pipe(labels.tolist(), num_inference_steps=3).images), expected)
    few = pipe(labels[:5].tolist(), num_inference_steps=3, batch_size=64).images  # the first of a larger set
    assert np.array_equal(pixels(few), expected[:5])


def test_an_image_depends_on_its_own_label_and_place_alone(pipe):
    options = {"num_inference_steps": 2, "sampler": "ode-euler"}
    first, second = (pixels(pipe(labels, **options).images) for labels in ([0, 1, 2], [0, 1, 4]))
    assert np.array_equal(first[:2], second[:2])
    assert not np.array_equal(first[2], second[2])
    assert not np.array_equal(first, pixels(pipe([0, 1, 2], **options, seed=1).images))
    (one,) = pipe("goldfish", **options).images
    assert (one.mode, one.size) == ("RGB", (16, 16))
    assert np.array_equal(np.asarray(one), pixels(pipe([1], **options).images)[0])


def test_precision_changes_the_images_a_little(published, pipe):
    plain = pixels(pipe([0, 1], num_inference_steps=2).images).astype(int)
    for option in ("mixed_precision", "vae_precision"):
        other = VAEREPAPipeline.from_pretrained(published, device="cpu", **{option: "bf16"})
        difference = np.abs(pixels(other([0, 1], num_inference_steps=2).images) - plain)
        assert difference.max() > 0
        assert difference.mean() < 5


def test_settings_of_the_process_are_put_back(pipe):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        kept = torch.backends.cudnn.deterministic, torch.backends.cudnn.enabled
        expected = pixels(pipe([0], num_inference_steps=2).images)
        assert torch.get_float32_matmul_precision() == "medium"
        assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.enabled) == kept
    finally:
        torch.set_float32_matmul_precision(before)
    assert np.array_equal(expected, pixels(pipe([0], num_inference_steps=2).images))


def test_classes_by_number_and_by_name():
    assert class_numbers([4, np.int64(0), torch.tensor(2)], NAMES) == [4, 0, 2]
    assert class_numbers(["goldfish, Carassius auratus", "goldfish", "carassius auratus"], NAMES) == [1, 1, 1]
    assert class_numbers("TENCH", NAMES) == [3]
    assert class_numbers(["3"], NAMES) == [4]  # a name, not a number
    assert class_numbers(["Tench", "tench"], ["tench", "Tench"]) == [1, 0]  # as written, before any case
    assert class_numbers(["crane", "crane bird"], ["crane", "crane bird, crane"]) == [0, 1]


@pytest.mark.parametrize(
    "labels, expected",
    [
        (["crane"], "found 'crane', the name of 0 and 2; give the number"),
        (["goldfisch"], "found 'goldfisch'; did you mean 'goldfish, Carassius auratus'"),
        (["zzz"], "the first of the 5 is 'crane'"),
        ([5], "expected numbers from 0 to 4, or names, found 5"),
        ([-1], "found -1"),
        ([1.5], "found 1.5"),
        ([None], "found None"),
        ([], "expected at least one class, found none"),
    ],
)
def test_classes_that_are_not_known(labels, expected):
    with pytest.raises(ValueError, match=re.escape(expected)):
        class_numbers(labels, NAMES)


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"height": 512}, "height: expected 16, the one size that this model makes"),
        ({"width": 8}, "width: expected 16"),
        ({"sampler": "ddim"}, "sampler: expected one of sde, ode-euler, ode-heun, "),
        ({"num_inference_steps": 0}, "num_inference_steps: expected at least 1, found 0"),
        ({"guidance_scale": float("nan")}, "guidance_scale: expected a finite scale"),
        ({"guidance_interval": (0.5, 0.4)}, "guidance_interval: expected times"),
        ({"seed": -1}, "seed: expected an integer in"),
        ({"last_step_size": 0}, "last_step_size: expected a size in (0, 1)"),
        ({"last_t": 0}, "last_step_size: expected a size in (0, 1)"),
        ({"batch_size": 24}, "batch_size: expected a multiple of 16"),
    ],
)
def test_settings_that_cannot_be(pipe, options, expected):
    with pytest.raises(ValueError, match=re.escape(expected)):
        pipe([0], **options)
    assert len(pipe([0], num_inference_steps=1, height=16, width=16).images) == 1


def test_a_null_class_that_was_not_trained_does_not_guide(tmp_path):
    checkpoint = make_checkpoint(tmp_path, config=asdict(TrainConfig(data_dir="data", label_dropout=0.0)))
    publish.main([str(checkpoint), "--output-dir", str(tmp_path / "small"), "--include-vae"])
    plain = VAEREPAPipeline.from_pretrained(tmp_path / "small", device="cpu")
    with pytest.raises(ValueError, match=r"guidance_scale: expected 1 .*it has no null class.*found 4"):
        plain([0], guidance_scale=4.0, num_inference_steps=1)
    assert len(plain([0], guidance_scale=1.0, num_inference_steps=1).images) == 1
    assert "guidance_scale=1," in (tmp_path / "small" / "README.md").read_text()


def test_samples_that_are_not_finite_are_refused(published):
    broken = VAEREPAPipeline.from_pretrained(published)
    broken.sit.final_layer.linear.bias[0] = torch.nan
    with pytest.raises(ValueError, match="expected finite samples"):
        broken([0], num_inference_steps=1)


def test_a_folder_that_is_no_published_model_is_told_what_to_do(checkpoint, tmp_path, published):
    for folder in (checkpoint, checkpoint.parents[1]):
        with pytest.raises(ValueError, match=f"publish it: python -m analysis.publish {folder}"):
            VAEREPAPipeline.from_pretrained(folder)
    with pytest.raises(ValueError, match="expected a published model"):
        VAEREPAPipeline.from_pretrained(published / "vae")
    for absent in (tmp_path / "absent", "./absent", published / "config.json", "absent"):
        with pytest.raises(ValueError, match="expected the directory of a published model, or NAME/REPO"):
            VAEREPAPipeline.from_pretrained(absent)
    for change, expected in (
        ({"format_version": 2}, "found version 2 .*use the code"),
        ({"swirl": 1}, "config.json was written by newer code: it has 'swirl'"),
        ({"step": None}, "config.json: damaged, it lacks 'step'"),
    ):
        folder = tmp_path / next(iter(change))
        shutil.copytree(published, folder)
        config = json.loads((folder / "config.json").read_text()) | change
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
        with pytest.raises(ValueError, match=expected):
            VAEREPAPipeline.from_pretrained(folder)
    with pytest.raises(ValueError, match="mixed_precision: expected one of no, bf16"):
        VAEREPAPipeline.from_pretrained(published, mixed_precision="fp16")


def test_a_changed_bit_of_the_weights_is_found(published, tmp_path):
    shutil.copytree(published, tmp_path / "changed")
    file = tmp_path / "changed" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"as it was published .*found another; fetch or publish it again"):
        VAEREPAPipeline.from_pretrained(tmp_path / "changed")
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="found another"):
        VAEREPAPipeline.from_pretrained(tmp_path / "changed")


def test_the_vae_must_be_the_models_own(checkpoint, published, tmp_path):
    other = make_vae(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"expected the VAE of the model .* found another in .*other.*vae=DIRECTORY"):
        VAEREPAPipeline.from_pretrained(published, vae=other)
    with pytest.raises(ValueError, match=r"cannot decode with the VAE .*vae=DIRECTORY"):
        VAEREPAPipeline.from_pretrained(published, vae=tmp_path / "absent")
    same = checkpoint.parents[2] / "vae"
    shutil.copytree(published, tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare" / "vae")
    assert len(VAEREPAPipeline.from_pretrained(tmp_path / "bare", vae=same)([0], num_inference_steps=1).images) == 1


def test_a_vae_that_was_not_recorded_is_taken_if_it_fits(tmp_path):
    made = make_checkpoint(tmp_path, vae_digest="unknown")
    publish.main([str(made), "--include-vae"])
    folder = tmp_path / "run" / "published" / "run-0000007"
    assert "digest not recorded" in (folder / "README.md").read_text()
    assert len(VAEREPAPipeline.from_pretrained(folder)([0], num_inference_steps=1).images) == 1
    wide = make_vae(tmp_path / "wide", channels=8)
    with pytest.raises(ValueError, match="latents of 4 channels, found side 16 and 8 channels"):
        VAEREPAPipeline.from_pretrained(folder, vae=wide)


def test_a_model_that_lacks_a_new_field_has_its_historic_value(published, monkeypatch):
    monkeypatch.setitem(sampling.pipeline.FIELDS, "swirl", Field(0.0))
    pipe = VAEREPAPipeline.from_pretrained(published, device="cpu")
    assert pipe.config["swirl"] == 0.0
    assert len(pipe([0], num_inference_steps=1).images) == 1
