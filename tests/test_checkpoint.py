"""Checkpoints: whole or absent, verified, and equal to what was saved."""

import copy
import json
import threading

import pytest
import torch

from models import load
from models.aligned import AlignedSiT
from models.load import latest_checkpoint, load_sit
from models.projector import Projector
from models.sit import SiT, SiTConfig
from models.vae import LatentScale
from runtime.files import read_checksummed_json, sha256, to_checksummed_json
from tests.stores import save_checkpoint
from training import checkpoint
from training.checkpoint import load_checkpoint, rotate_checkpoints

CONFIG = SiTConfig(depth=2, hidden_size=32, num_heads=2, patch_size=2, latent_size=4, in_channels=3, num_classes=5)
INFO = {
    "scale": LatentScale((0.5, 1.0, 2.0), (0.0, 0.1, 0.2)).to_dict(),
    "vae": "some/vae",
    "vae_digest": "abc",
    "resolution": 32,
    "class_names": list("abcde"),
    "path_type": "linear",
}


def make(seed, steps=2):
    """Model, EMA and optimizer in a state that no default has."""
    torch.manual_seed(seed)
    model = AlignedSiT(SiT(CONFIG), {"vae": (1, Projector(32, CONFIG.patch_dim, layers=2))})
    ema = copy.deepcopy(model.sit)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, fused=True)
    for _ in range(steps):
        velocity, projected = model(torch.randn(2, 3, 4, 4), torch.rand(2), torch.tensor([0, 5]))
        ((velocity - 1).square().mean() + projected["vae"].square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, ema, optimizer


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_round_trip_restores_every_tensor(tmp_path):
    model, ema, optimizer = make(0)
    folder = save_checkpoint(tmp_path, 7, model, ema, optimizer, INFO)
    assert folder == tmp_path / "checkpoints" / "0000007"
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "ema.safetensors",
        "model.safetensors",
        "optimizer.pt",
        "state.json",
    }
    other, other_ema, other_optimizer = make(1)
    load_checkpoint(folder, other, {"ema": other_ema}, other_optimizer)
    assert load.read_state(folder)["step"] == 7
    assert equal(model.state_dict(), other.state_dict())
    assert equal(ema.state_dict(), other_ema.state_dict())
    saved, loaded = optimizer.state_dict(), other_optimizer.state_dict()
    assert saved["param_groups"] == loaded["param_groups"]
    for key, values in saved["state"].items():
        assert equal(values, loaded["state"][key])


def test_load_sit_gives_the_average_with_no_further_settings(tmp_path):
    model, ema, optimizer = make(0)
    save_checkpoint(tmp_path, 1, model, ema, optimizer, INFO)
    folder = save_checkpoint(tmp_path, 20, model, ema, None, INFO)
    for path in (folder, tmp_path, str(folder)):
        sit, info = load_sit(path)
        assert equal(sit.state_dict(), ema.state_dict())
        assert not equal(sit.state_dict(), model.sit.state_dict())
        assert sit.config == CONFIG
        assert not sit.training
        assert not any(parameter.requires_grad for parameter in sit.parameters())
        assert (info["step"], info["source"], info["vae"]) == (20, str(folder), "some/vae")
        assert info["scale"] == LatentScale((0.5, 1.0, 2.0), (0.0, 0.1, 0.2))


def test_a_checkpoint_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    model, ema, optimizer = make(0)
    good = save_checkpoint(tmp_path, 1, model, ema, optimizer, INFO)

    def fail(*_):
        raise OSError("no space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(torch, "save", fail)
        with pytest.raises(OSError, match="no space"):
            save_checkpoint(tmp_path, 2, model, ema, optimizer, INFO)
    assert latest_checkpoint(tmp_path) == good
    assert latest_checkpoint(tmp_path / "elsewhere") is None
    assert save_checkpoint(tmp_path, 2, model, ema, optimizer, INFO) == latest_checkpoint(tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["0000001", "0000002"]


def test_what_is_written_in_the_background_is_what_was_given(tmp_path, monkeypatch):
    model, ema, optimizer = make(0)
    before, moments = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])
    go, write = threading.Event(), checkpoint.write_checkpoint
    monkeypatch.setattr(checkpoint, "write_checkpoint", lambda *arguments: go.wait(60) and write(*arguments))
    writer = checkpoint.CheckpointWriter(tmp_path, keep_last=1, keep_every=0)
    writer.save(1, checkpoint.snapshot(model, {"ema": ema}, optimizer.state_dict()), INFO)
    assert latest_checkpoint(tmp_path) is None  # training goes on
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for values in optimizer.state.values():
            values["exp_avg"].zero_()
    go.set()
    writer.finish()
    other, other_ema, other_optimizer = make(1)
    load_checkpoint(tmp_path / "checkpoints" / "0000001", other, {"ema": other_ema}, other_optimizer)
    assert equal(before, other.state_dict())
    assert all(equal(moments[key], values) for key, values in other_optimizer.state_dict()["state"].items())
    writer.save(2, checkpoint.snapshot(model, {"ema": ema}, None), INFO)
    writer.finish()
    assert [path.name for path in load.checkpoints(tmp_path)] == ["0000002"]


def test_rotation_keeps_the_newest_and_every_mth(tmp_path):
    model, ema, _ = make(0, steps=0)
    for step in range(10, 80, 10):
        save_checkpoint(tmp_path, step, model, ema, None, INFO)
    rotate_checkpoints(tmp_path, keep_last=2, keep_every=30)
    assert [int(path.name) for path in load.checkpoints(tmp_path)] == [30, 60, 70]
    rotate_checkpoints(tmp_path, keep_last=1, keep_every=0)
    assert [int(path.name) for path in load.checkpoints(tmp_path)] == [70]


@pytest.mark.parametrize("name", ["config.json", "ema.safetensors", "model.safetensors", "optimizer.pt"])
def test_a_changed_byte_is_found_and_nothing_is_loaded(tmp_path, name):
    model, ema, optimizer = make(0)
    folder = save_checkpoint(tmp_path, 1, model, ema, optimizer, INFO)
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    other, other_ema, other_optimizer = make(1)
    before = copy.deepcopy(other.state_dict())
    if name in ("config.json", "ema.safetensors"):
        with pytest.raises(ValueError, match=f"damaged checkpoint.*{name}"):
            load_sit(folder)
    if name != "config.json":
        with pytest.raises(ValueError, match=f"damaged checkpoint.*{name}"):
            load_checkpoint(folder, other, {"ema": other_ema}, other_optimizer)
    assert equal(before, other.state_dict())


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "damaged checkpoint: .*state.json: "),
        ("[]", "has no checksum"),
        (json.dumps({"format": "vae-repa-checkpoint", "version": 1}), "has no checksum"),
        (to_checksummed_json({"format": "other", "version": 1}), "expected a checkpoint of format"),
    ],
)
def test_a_bad_state_file_is_named(tmp_path, text, message):
    model, ema, _ = make(0, steps=0)
    folder = save_checkpoint(tmp_path, 1, model, ema, None, INFO)
    (folder / "state.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_sit(folder)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ValueError, match="not a checkpoint"):
            load_sit(path)


def test_pickles_are_not_run(tmp_path):
    class Exploit:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    model, ema, optimizer = make(0)
    folder = save_checkpoint(tmp_path, 1, model, ema, optimizer, INFO)
    torch.save({"optimizer": Exploit()}, folder / "optimizer.pt")
    state = load.read_state(folder)
    state["digests"]["optimizer.pt"] = sha256(folder / "optimizer.pt")
    (folder / "state.json").write_text(to_checksummed_json(state))
    with pytest.raises(ValueError, match=r"cannot read .*optimizer\.pt"):
        load_checkpoint(folder, model, {"ema": ema}, optimizer)
    assert not (tmp_path / "owned").exists()


def test_checksummed_json_that_has_changed_anywhere_is_found(tmp_path):
    content = {"name": "a", "numbers": [1e-05, 2.5], "inner": {"flag": True, "none": None}}
    file, text = tmp_path / "record.json", to_checksummed_json(content).encode()
    file.write_bytes(text)
    assert read_checksummed_json(file) == content
    for place in range(len(text)):
        for bit in range(8):
            changed = bytearray(text)
            changed[place] ^= 1 << bit
            file.write_bytes(changed)
            with pytest.raises(ValueError):  # noqa: PT011 - JSON's, UTF-8's or our own
                read_checksummed_json(file)
        file.write_bytes(text[:place])
        with pytest.raises(ValueError):  # noqa: PT011
            read_checksummed_json(file)


def test_damaged_checkpoints_are_set_aside_and_never_counted_as_kept(tmp_path):
    """Steps 1, 2, 3, of which 2 and 3 are damaged: resuming from 1 and saving must not leave the damaged ones alone."""
    model, ema, optimizer = make(0)
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, model, ema, optimizer, INFO)
    for step in (2, 3):
        (tmp_path / "checkpoints" / f"{step:07d}" / "ema.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"resuming from .*0000001, 0000003 is now .*0000003.damaged"):
        assert checkpoint.latest_valid_checkpoint(tmp_path).name == "0000001"
    save_checkpoint(tmp_path, 2, model, ema, optimizer, INFO)
    checkpoint.rotate_checkpoints(tmp_path, keep_last=2, keep_every=0)
    assert [path.name for path in load.checkpoints(tmp_path)] == ["0000001", "0000002"]
    assert checkpoint.latest_valid_checkpoint(tmp_path).name == "0000002"


def test_the_step_is_the_records_not_the_directorys(tmp_path):
    folder = save_checkpoint(tmp_path, 1, *make(0), INFO)
    renamed = folder.rename(folder.with_name("0000005"))
    with pytest.raises(ValueError, match=r"expected the checkpoint of step 5 in .*0000005, found that of 1"):
        checkpoint.latest_valid_checkpoint(tmp_path)
    assert renamed.is_dir()
