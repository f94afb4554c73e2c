"""Records of samples: what older and newer code wrote, and what a resume takes from them."""

import dataclasses
import json

import numpy as np
import pytest
import torch

import sample_ddp
import sampling.record
from diffusion.interpolant import Interpolant
from models.load import load_sit
from models.vae import load_vae
from runtime import cli
from runtime.files import Field
from sampling import writer
from sampling.config import SampleConfig
from sampling.generator import SampleGenerator, block_noise, decode_latents, sample_latents
from sampling.record import describe, resume
from tests.test_sample_ddp import Stopped, arguments, draw, make_checkpoint, refused, same_npz, settings_of

SMALL = {"num_samples": 40, "sampler": "ode-euler", "guidance_high": 0.5, "labels": "balanced", "seed": 3}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def whole(checkpoint, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "samples"
    draw(checkpoint, output, **SMALL)
    return output


def begin(checkpoint, output, monkeypatch, **changes):
    """A set of which the first batch is drawn; its settings.json."""
    compute, drawn = SampleGenerator.latents, []

    def stop_at_second(self, batch):
        drawn.append(batch)
        if len(drawn) == 2:
            raise Stopped
        return compute(self, batch)

    with monkeypatch.context() as patched:
        patched.setattr(SampleGenerator, "latents", stop_at_second)
        with pytest.raises(Stopped):
            draw(checkpoint, output, **changes)
    return output / "partial" / "settings.json"


def change(path, edit):
    """Edit the settings in a record as other code would have written them."""
    content = json.loads(path.read_text())
    edit(content["settings"])
    path.write_text(json.dumps(content))


def test_samples_of_other_settings_are_refused_by_name(checkpoint, whole, tmp_path, capsys, monkeypatch):
    line = refused(capsys, arguments(checkpoint, whole, **SMALL | {"num_steps": 4, "labels": "random"}))
    assert "num_steps 3 -> 4; labels balanced -> random" in line
    assert "--output-dir" in line
    begin(checkpoint, tmp_path / "unfinished", monkeypatch)
    line = refused(capsys, arguments(checkpoint, tmp_path / "unfinished", seed=1))
    assert "seed 0 -> 1" in line


def test_a_resume_takes_from_the_record_what_was_not_given(checkpoint, whole, tmp_path, monkeypatch, capsys):
    begin(checkpoint, tmp_path / "begun", monkeypatch, **SMALL)
    for directory in (tmp_path / "begun", whole):
        sample_ddp.main(["--checkpoint", str(checkpoint), "--output-dir", str(directory)])
    assert same_npz(tmp_path / "begun", whole)
    assert f"{whole} is complete" in capsys.readouterr().out
    line = refused(capsys, ["--checkpoint", checkpoint, "--output-dir", whole, "--guidance-high", "0.6"])
    assert "guidance_interval (0.0, 0.5) -> (0.0, 0.6)" in line
    line = refused(capsys, ["--checkpoint", checkpoint, "--output-dir", whole, "--per-proc-batch-size", "32"])
    assert "batch_size 16 -> 32" in line


def test_in_a_sweep_each_set_is_resumed_with_its_own_precision(checkpoint, tmp_path, monkeypatch):
    sweep = {"num_samples": 32, "guidance_scale": (1.0, 2.0, 3.0)}
    bf16 = {"num_samples": 32, "guidance_scale": 2.0, "vae_precision": "bf16"}
    name = "run-0000007-sde3-cfg{}-seed0-n32"
    begin(checkpoint, tmp_path / "sweep" / name.format(2), monkeypatch, **bf16)
    sample_ddp.main(arguments(checkpoint, tmp_path / "sweep", **sweep))
    for scale in (1, 2, 3):
        alone = {"num_samples": 32, "guidance_scale": float(scale)}
        draw(checkpoint, tmp_path / str(scale), **bf16 if scale == 2 else alone)
        assert same_npz(tmp_path / "sweep" / name.format(scale), tmp_path / str(scale))


def test_another_checkpoint_is_refused(whole, tmp_path, capsys):
    other = make_checkpoint(tmp_path, lambda sit: sit.final_layer.linear.weight.mul_(2))
    line = refused(capsys, ["--checkpoint", other, "--output-dir", whole])
    assert "checkpoint_digest" in line


def test_an_automatic_batch_is_that_of_a_set_that_was_begun(checkpoint, whole, tmp_path, capsys):
    draw(checkpoint, tmp_path / "new", per_proc_batch_size="auto")
    assert json.loads((tmp_path / "new" / "samples.json").read_text())["settings"]["batch_size"] == 64
    sample_ddp.main(arguments(checkpoint, whole, **SMALL, per_proc_batch_size="auto"))
    assert "is complete" in capsys.readouterr().out


@pytest.mark.parametrize("sampler", ["sde", "ode-euler"])
def test_records_of_older_code_are_resumed_and_recognised(checkpoint, tmp_path, monkeypatch, capsys, sampler):
    """`last_step_size` was called last_t; npz, checkpoint_format and compile came later, each with a historic value."""

    def age(settings):
        settings["last_t"] = settings.pop("last_step_size")
        for name in (
            "npz",
            "checkpoint_format",
            "compile",
            "diffusion_form",
            "diffusion_norm",
            "last_step",
            "guidance_channels",
            "time_shift",
            "prediction",
        ):
            del settings[name]

    flags = {"num_samples": 40, "sampler": sampler, "last_step_size": 0.1}
    draw(checkpoint, tmp_path / "undisturbed", **flags)
    begun = tmp_path / "begun"
    change(begin(checkpoint, begun, monkeypatch, **flags), age)
    sample_ddp.main(["--checkpoint", str(checkpoint), "--output-dir", str(begun)])
    assert same_npz(begun, tmp_path / "undisturbed")
    change(begun / "samples.json", age)
    capsys.readouterr()
    sample_ddp.main([*arguments(checkpoint, begun, **flags | {"last_step_size": None}), "--last-t", "0.1"])
    assert "is complete" in capsys.readouterr().out
    if sampler == "sde":
        line = refused(capsys, arguments(checkpoint, begun, **flags | {"last_step_size": 0.2}))
        assert "last_step_size 0.1 -> 0.2" in line


@pytest.mark.parametrize("sampler, unused", [("sde", "none"), ("ode-heun", "all")])
def test_what_has_no_effect_is_recorded_as_none_and_not_compared(checkpoint, tmp_path, capsys, sampler, unused):
    flags = {"num_samples": 16, "sampler": sampler, "diffusion_form": "sigma", "last_step": "none"}
    draw(checkpoint, tmp_path / "set", **flags)
    settings = json.loads((tmp_path / "set" / "samples.json").read_text())["settings"]
    names = ("diffusion_form", "diffusion_norm", "last_step", "last_step_size")
    assert [settings[name] for name in names] == (
        ["sigma", 1.0, "none", None] if unused == "none" else [None, None, None, None]
    )
    assert settings["diffusion"] is None
    sample_ddp.main(arguments(checkpoint, tmp_path / "set", **flags | {"last_step_size": 0.3}))
    assert "is complete" in capsys.readouterr().out
    sample_ddp.main(["--checkpoint", str(checkpoint), "--output-dir", str(tmp_path / "set")])
    assert "is complete" in capsys.readouterr().out
    if sampler == "sde":
        line = refused(capsys, arguments(checkpoint, tmp_path / "set", **flags | {"diffusion_form": "linear"}))
        assert "diffusion_form sigma -> linear" in line


def test_a_resume_keeps_the_rule_of_pixels(checkpoint, tmp_path, monkeypatch, capsys):
    flags = {"num_samples": 32, "uint8_rule": "truncate"}
    draw(checkpoint, tmp_path / "undisturbed", **flags)
    begin(checkpoint, tmp_path / "begun", monkeypatch, **flags)
    sample_ddp.main(["--checkpoint", str(checkpoint), "--output-dir", str(tmp_path / "begun")])
    assert same_npz(tmp_path / "begun", tmp_path / "undisturbed")
    line = refused(capsys, arguments(checkpoint, tmp_path / "begun", **flags | {"uint8_rule": "floor"}))
    assert "uint8_rule floor(clamp(255 * (x + 1) / 2, 0, 255)) -> floor(clamp(127.5 * x + 128, 0, 255))" in line


def test_a_new_setting_breaks_no_record(checkpoint, whole, tmp_path, monkeypatch, capsys):
    """A flag that newer code has: what was drawn before has its historic value, not the default."""
    extra = [("swirl", float, cli.flag(0.5, "a new setting", record=Field(0.0)))]
    newer = dataclasses.make_dataclass("SampleConfig", extra, bases=(SampleConfig,), frozen=True)
    begun = tmp_path / "begun"
    begin(checkpoint, begun, monkeypatch, **SMALL)
    monkeypatch.setattr(sample_ddp, "SampleConfig", newer)
    monkeypatch.setattr(sampling.record, "FLAGS", [*sampling.record.FLAGS, "swirl"])
    monkeypatch.setitem(sampling.record.SETTINGS, "swirl", Field(0.0))
    draw(checkpoint, begun, **SMALL)
    assert same_npz(begun, whole)
    assert json.loads((begun / "samples.json").read_text())["settings"]["swirl"] == 0.0
    sample_ddp.main(arguments(checkpoint, whole, **SMALL))
    assert f"{whole} is complete" in capsys.readouterr().out
    assert "swirl 0.0 -> 0.5" in refused(capsys, arguments(checkpoint, whole, **SMALL, swirl=0.5))


def test_a_record_of_newer_code_is_one_line(checkpoint, tmp_path, capsys):
    output = tmp_path / "out"
    writer.create(output, settings_of(checkpoint, output))
    change(output / "partial" / "settings.json", lambda settings: settings.update(swirl=1))
    line = refused(capsys, arguments(checkpoint, output))
    assert "settings.json was written by newer code: it has 'swirl'" in line
    change(output / "partial" / "settings.json", lambda settings: settings.pop("swirl"))
    draw(checkpoint, output, png=True)
    content = json.loads((output / "samples.json").read_text())
    (output / "samples.json").write_text(json.dumps(content | {"mood": "good"}))
    assert "samples.json was written by newer code: it has 'mood'" in refused(capsys, arguments(checkpoint, output))


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_damaged_record_is_named(checkpoint, tmp_path, capsys, content):
    (tmp_path / "samples.json").write_text(content)
    assert "expected the settings of samples in" in refused(capsys, arguments(checkpoint, tmp_path))


def test_a_record_without_what_all_have_is_named(checkpoint, tmp_path, capsys):
    (tmp_path / "samples.json").write_text('{"settings": {"seed": 0}}')
    assert "samples.json: damaged, it lacks 'mixed_precision'" in refused(capsys, arguments(checkpoint, tmp_path))


@pytest.mark.parametrize("sampler", ["sde", "ode-heun", "ode-dopri5"])
def test_the_checkpoints_prediction_and_shift_are_taken_and_recorded(tmp_path, sampler):
    """A network that predicts data; and the shift is the run's unless one is given."""
    data = make_checkpoint(tmp_path / "x", prediction="x", time_shift=2.0)
    flags = {"num_samples": 16, "sampler": sampler, "guidance_scale": 1.0}
    images, labels = draw(data, tmp_path / "own", **flags)
    sit, info = load_sit(data)
    z = sample_latents(
        sit,
        torch.from_numpy(labels),
        block_noise(0, 0, 16, (4, 4, 4), "cpu"),
        sampler,
        3,
        Interpolant("linear", "x"),
        time_shift=2.0,
    )
    assert np.array_equal(images, decode_latents(load_vae(info["vae"]), z, info["scale"])[0].numpy())
    settings = json.loads((tmp_path / "own" / "samples.json").read_text())["settings"]
    shift = None if sampler == "ode-dopri5" else 2.0
    assert (settings["prediction"], settings["time_shift"]) == ("x", shift)
    plain = make_checkpoint(tmp_path / "v")
    assert not np.array_equal(images, draw(plain, tmp_path / "plain", **flags)[0])
    assert np.array_equal(images, draw(data, tmp_path / "given", **flags, time_shift="2")[0])
    if shift:
        assert not np.array_equal(images, draw(data, tmp_path / "auto", **flags, time_shift="auto")[0])
        settings = json.loads((tmp_path / "auto" / "samples.json").read_text())["settings"]
        assert settings["time_shift"] == pytest.approx((4 * 4 * 4 / 4096) ** 0.5)
        sample_ddp.main(["--checkpoint", str(data), "--output-dir", str(tmp_path / "auto")])  # as it was begun


def test_parity_is_float32_with_tf32_on_a_gpu_and_a_resume_does_not_undo_it(checkpoint):
    sit, info = load_sit(checkpoint)
    gpu, names = torch.device("cuda"), ("mixed_precision", "vae_precision", "tf32")

    def described(given=(), recorded=None, **flags):
        config = SampleConfig(checkpoint=(str(checkpoint),), **flags)
        config = resume(config, set(given), recorded) if recorded else config
        return describe(config, sit, info, gpu)

    old = described()
    assert [old[name] for name in names] == ["bf16", "bf16", False]
    new = described(parity=True)
    assert [new[name] for name in names] == ["no", "no", True]
    assert new == described(mixed_precision="no", vae_precision="no", tf32=True)
    assert described({"parity"}, old, parity=True) == new  # and is_complete refuses it: the settings differ
    assert described((), new) == new
