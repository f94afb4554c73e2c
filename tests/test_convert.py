"""Checkpoints of SiT, REPA and SRA against a forward written from their papers, in their own conventions."""

import argparse
import dataclasses
import json
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import sample_ddp
from diffusion.samplers import guided_velocity, sample_ode
from models.load import load_sit
from models.sit import SiT, SiTConfig
from tests.stores import make_vae
from tests.test_sit import reference_forward

ROOT = Path(__file__).resolve().parent.parent
CONFIG = SiTConfig.from_name("SiT-Ti/4", latent_size=8, in_channels=4, num_classes=3)
C = CONFIG.in_channels
REPAS = {"args": argparse.Namespace(prediction="v")}  # marks a file as REPA's


def random_state(learn_sigma=False, seed=0, config=CONFIG):
    """A state dict with the keys that SiT, REPA and SRA share, none of whose weights is 0."""
    torch.manual_seed(seed)
    model = SiT(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    state = model.state_dict()
    if learn_sigma:
        state["final_layer.linear.weight"] = 0.05 * torch.randn(2 * CONFIG.patch_dim, CONFIG.hidden_size)
        state["final_layer.linear.bias"] = 0.05 * torch.randn(2 * CONFIG.patch_dim)
    return state


def inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, C, 8, 8, generator=generator), torch.tensor([0.0, 0.3, 0.8, 1.0]), torch.tensor([0, 2, 3, 1])


def save(content, path):
    torch.save(content, path)
    return path


def check_equal(path, expected, format=None):
    """The velocity of what is loaded from `path` is `expected(x, t, y)`."""
    model, info = load_sit(path, format=format)
    x, t, y = inputs()
    np.testing.assert_allclose(model(x, t, y).numpy(), expected(x, t, y), rtol=1e-4, atol=1e-5)
    assert model.config == CONFIG
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    return info


def sits_own(state):
    """SiT as its authors run it: time 1 is data, the velocity points to the data, half of the outputs are not used."""

    def velocity(x, t, y):
        return reference_forward(state, CONFIG, x, t, y)[0][:, :C]

    return velocity


def as_ours(state):
    return lambda x, t, y: reference_forward(state, CONFIG, x, t, y)[0]


def test_sits_file_is_turned_in_time_and_sign(tmp_path):
    state = random_state(learn_sigma=True)
    own = sits_own(state)
    path = save(state, tmp_path / "SiT-XL-2-256x256.pt")
    info = check_equal(path, lambda x, t, y: -own(x, 1 - t, y), "sit")
    assert (info["format"], info["step"], info["resolution"], info["path_type"]) == ("sit", None, 64, "linear")
    assert info["read_as"] == "SiT's file: first half of the outputs taken (learn_sigma); time reversed"
    assert (info["scale"].scale, info["scale"].shift) == ((0.18215,), (0.0,))
    assert (info["vae"], info["vae_digest"]) == ("stabilityai/sd-vae-ft-ema", "unknown")
    assert info["class_names"] == ["0", "1", "2"]


def test_sampling_a_sit_file_is_sits_own_integration(tmp_path):
    state = random_state(learn_sigma=True)
    model, _ = load_sit(save(state, tmp_path / "sit.pt"), format="sit")
    x, _, y = inputs()
    found = sample_ode(guided_velocity(model, y, 3, 1.0, (0.0, 1.0)), x, 4)
    own, latent = sits_own(state), x.double()
    for step in range(4):  # from noise at 0 to data at 1
        latent = latent + 0.25 * torch.from_numpy(own(latent, torch.full((4,), step / 4), y))
    torch.testing.assert_close(found, latent, rtol=1e-4, atol=1e-5)


def test_sits_training_file_tells_path_and_size(tmp_path):
    state = random_state(learn_sigma=True)
    args = argparse.Namespace(path_type="GVP", prediction="velocity", image_size=32, vae="ema")
    raw = {name: torch.zeros_like(value) for name, value in state.items()}
    path = save({"model": raw, "ema": state, "opt": {"state": {}}, "args": args, "train_steps": 9}, tmp_path / "9.pt")
    own = sits_own(state)
    info = check_equal(path, lambda x, t, y: -own(x, 1 - t, y))
    assert (info["path_type"], info["resolution"], info["step"]) == ("cosine", 32, 9)
    assert info["read_as"].startswith("SiT's file: EMA weights; ")


def test_a_dit_is_not_taken_for_a_sit(tmp_path):
    """The same tensors, another meaning."""
    args = argparse.Namespace(model="DiT-XL/2")
    file = save({"ema": random_state(learn_sigma=True), "args": args}, tmp_path / "dit.pt")
    reason = "a DiT has the same tensors, but predicts noise"
    with pytest.raises(ValueError, match=f"expected a SiT, found DiT-XL/2: {reason}"):
        load_sit(file)
    heads = {"ap_head.linear1.weight": torch.randn(2, 2)}  # SRA's own DiT; its SiT has one set of outputs
    file = save({"ema": random_state(learn_sigma=True) | heads}, tmp_path / "dit-sra.pt")
    for told in (None, "sra"):
        with pytest.raises(ValueError, match=f"expected a SiT, found a DiT with ap_head: {reason}"):
            load_sit(file, format=told)


@pytest.mark.parametrize("doubled", [True, False])
def test_a_file_that_fits_two_readings_is_read_as_the_user_says(doubled, tmp_path):
    """Bare weights: those of a SiT with twice the outputs may be a DiT's, those with one set SiT's, REPA's or SRA's."""
    file, state = tmp_path / "bare.pt", random_state(learn_sigma=doubled)
    save(state, file)
    readings = "SiT's or a DiT's" if doubled else "REPA's, SRA's, or SiT's without learn_sigma"
    with pytest.raises(ValueError, match=f"one that may be {readings}; .* --checkpoint-format .* sit, repa, sra"):
        load_sit(file)
    with pytest.raises(ValueError, match="expected a format among sit, repa, sra, found dit"):
        load_sit(file, format="dit")
    own = sits_own(state)
    info = check_equal(file, lambda x, t, y: -own(x, 1 - t, y), "sit")
    assert info["read_as"].endswith("time reversed")
    if not doubled:
        assert check_equal(file, as_ours(state), "sra")["format"] == "sra"


def test_a_sit_without_learn_sigma_is_told_by_the_spelling_of_its_path(tmp_path):
    state = random_state()
    own = sits_own(state)
    args = argparse.Namespace(path_type="Linear", prediction="velocity", image_size=64)
    file = save({"ema": state, "args": args}, tmp_path / "sit.pt")
    assert check_equal(file, lambda x, t, y: -own(x, 1 - t, y))["format"] == "sit"
    for told in ("repa", "sra"):
        with pytest.raises(ValueError, match=f"expected a file of {told.upper()}, found the marks of SiT"):
            load_sit(file, format=told)
    with pytest.raises(ValueError, match="found the marks of REPA and SiT"):
        load_sit(save({"ema": state | {"projectors.0.w": torch.ones(1)}, "args": args}, tmp_path / "both.pt"))


def test_the_format_of_a_checkpoint_of_ours_is_known(tmp_path):
    with pytest.raises(ValueError, match="--checkpoint-format: expected a file of another project, found "):
        load_sit(tmp_path, format="sit")


def test_repas_file_with_normalised_queries_and_keys_is_read_as_such(tmp_path):
    config = dataclasses.replace(CONFIG, qk_norm=True)
    state = random_state(config=config)
    stored = state | {"projectors.0.0.weight": torch.randn(3, 3)}
    args = argparse.Namespace(path_type="linear", prediction="v", qk_norm=True)
    model, info = load_sit(save({"ema": stored, "args": args, "steps": 5}, tmp_path / "a.pt"))
    assert (model.config, info["format"]) == (config, "repa")
    x, t, y = inputs()
    expected = reference_forward(state, config, x, t, y)[0]
    np.testing.assert_allclose(model(x, t, y).numpy(), expected, rtol=1e-4, atol=1e-5)
    assert not np.allclose(expected, reference_forward(state, CONFIG, x, t, y)[0], atol=1e-3)


@pytest.mark.parametrize("legacy", [False, True])
def test_repas_file_has_our_time_and_loses_its_projectors(legacy, tmp_path):
    state = random_state()
    stored = {f"projectors.0.{k}.weight": torch.randn(3, 3) for k in (0, 2, 4)}
    for name, value in state.items():
        head, _, rest = name.partition(".")
        if legacy and head == "blocks" and int(rest.split(".")[0]) >= 2:
            index, _, rest = rest.partition(".")
            name = f"decoder_blocks.{int(index) - 2}.{rest}"
        stored[name] = value
    args = argparse.Namespace(path_type="linear", prediction="v", resolution=256, data_dir="x", cfg_prob=0.1)
    path = save({"ema": stored, "model": {}, "opt": {}, "args": args, "steps": 400_000}, tmp_path / "0400000.pt")
    info = check_equal(path, as_ours(state))
    assert (info["format"], info["step"], info["resolution"]) == ("repa", 400_000, 256)
    assert info["vae"] == "stabilityai/sd-vae-ft-ema"
    assert info["read_as"].startswith("REPA's file: EMA weights; projectors dropped")
    assert ("decoder_blocks renamed" in info["read_as"]) == legacy


def test_sras_file_loses_its_head(tmp_path):
    state = random_state()
    head = {f"ap_head.linear{k}.{kind}": torch.randn(2, 2) for k in (1, 2) for kind in ("weight", "bias")}
    info = check_equal(save({"ema": state | head, "epoch": 3, "steps": 5}, tmp_path / "step-5.pt"), as_ours(state))
    assert (info["format"], info["step"]) == ("sra", 5)
    assert info["read_as"] == "SRA's file: EMA weights; ap_head dropped"


@pytest.mark.parametrize("prefix", ["module.", "net.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_taken_off(prefix, tmp_path):
    state = random_state()
    inner = {
        prefix + (name.replace("blocks.3.", "blocks.3._orig_mod.") if name.startswith("blocks.3.") else name): value
        for name, value in state.items()
    }
    check_equal(save({"state_dict": inner}, tmp_path / "a.pt"), as_ours(state), "repa")
    save_file({name: value.contiguous() for name, value in inner.items()}, tmp_path / "a.safetensors")
    assert load_sit(tmp_path / "a.safetensors", format="repa")[1]["read_as"] == "REPA's file"


def test_files_of_the_time_before_zip_archives_and_half_precision(tmp_path):
    state = {name: value.half() for name, value in random_state().items()}
    torch.save({"ema": state}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    model, _ = load_sit(tmp_path / "old.pt", format="sra")
    assert torch.equal(model.blocks[2].mlp.fc1.weight, state["blocks.2.mlp.fc1.weight"].float())


def test_latents_of_other_channels_load_without_a_scale(tmp_path):
    sit = SiT(SiTConfig.from_name("SiT-Ti/1", latent_size=4, in_channels=32, num_classes=3))
    _, info = load_sit(save(sit.state_dict(), tmp_path / "a.pt"), format="repa")
    assert info["scale"] is None
    flags = ["--checkpoint-format", "repa", "--num-samples", "16", "--device", "cpu"]
    with pytest.raises(ValueError, match=r"expected a file that tells the scale.*found 32 channels.*--init-from"):
        sample_ddp.main(["--checkpoint", str(tmp_path / "a.pt"), *flags])


class Dangerous:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def changed(**tensors):
    return {"ema": {k: v for k, v in (random_state() | tensors).items() if v is not None}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "expected a dictionary of tensors, found a list"),
        ({"ema": {"w": torch.zeros(2)}}, r"expected a SiT's weights \(with x_embedder.proj.weight\), found w"),
        ({"epoch": 3}, "found no tensors"),
        (
            {"ema": {k.replace("mlp.fc1", "mlp.w12"): v for k, v in random_state().items()}},
            r"found LightningDiT's blocks \(SwiGLU",
        ),
        (
            changed(**{"blocks.1.attn.proj.bias": None}) | REPAS,
            r"1 that are not: blocks\.1\.attn\.proj\.bias is absent",
        ),
        (changed(**{"blocks.9.attn.proj.bias": torch.zeros(192)}), "found 10 blocks of width 192"),
        (changed(**{"extra.weight": torch.zeros(2)}) | REPAS, r"extra\.weight is \(2,\), there absent"),
        (
            changed(**{"blocks.0.attn.q_norm.weight": torch.zeros(64)}) | REPAS,
            r"23 that are not: blocks\.0\.attn\.k_norm\.bias is absent",
        ),
        (changed() | {"args": argparse.Namespace(path_type="VP")}, "on the path VP"),
        (changed() | {"args": argparse.Namespace(prediction="score")}, "to predict score"),
    ],
)
def test_what_is_no_sit_is_named(content, message, tmp_path):
    path = save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=message) as error:
        load_sit(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_code_in_a_file_is_not_run(tmp_path):
    for content in ({"ema": random_state(), "args": Dangerous(tmp_path / "ran")}, Dangerous(tmp_path / "ran")):
        with pytest.raises(ValueError, match=r"expected tensors.*nothing in it was run") as error:
            load_sit(save(content, tmp_path / "a.pt"))
        assert "\n" not in str(error.value)
        assert not (tmp_path / "ran").exists()
    path = save({"ema": random_state(), "args": types.SimpleNamespace()}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match="SimpleNamespace"):  # harmless, but not the one class that is let through
        load_sit(path)


def test_a_damaged_file_is_named(tmp_path):
    path = save(random_state(), tmp_path / "a.pt")
    content = path.read_bytes()
    for wrong in (b"", content[: len(content) // 2], b"garbage" * 50):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=r"a\.pt: expected tensors"):
            load_sit(path)


@pytest.mark.slow
def test_samples_come_straight_from_a_sit_file(tmp_path):
    vae = make_vae(tmp_path / "vae")
    args = argparse.Namespace(path_type="Linear", image_size=32)
    path = save({"ema": random_state(learn_sigma=True), "args": args}, tmp_path / "sit.pt")
    command = [
        sys.executable,
        str(ROOT / "sample_ddp.py"),
        "--checkpoint",
        str(path),
        "--vae",
        str(vae),
        "--num-samples",
        "16",
        "--num-steps",
        "2",
        "--device",
        "cpu",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "SiT's file: EMA weights; first half of the outputs taken (learn_sigma); time reversed" in done.stdout
    assert f"does not say which VAE it was trained with: taking {vae}" in done.stdout
    folder = tmp_path / "samples" / "sit-sde2-cfg1-seed0-n16"
    with np.load(folder / "samples.npz") as samples:
        assert samples["arr_0"].shape == (16, 32, 32, 3)
    settings = json.loads((folder / "samples.json").read_text())["settings"]
    assert (settings["checkpoint_format"], settings["step"]) == ("sit", None)
    other = make_vae(tmp_path / "other", seed=1)
    done = subprocess.run([*command[:-1], "cpu", "--vae", str(other)], capture_output=True, text=True)
    assert done.returncode == 2  # the folder holds another decoder's images
    assert "vae_digest" in done.stderr
