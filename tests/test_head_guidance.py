"""Guidance by a head inside the network: its velocity, its EMA, its records, and what is refused."""

import copy
import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import sample_ddp
from analysis import compare
from analysis.compare_config import CompareConfig
from analysis.side_by_side import draw_images
from diffusion.guidance import HeadGuidance, guided_velocity
from diffusion.interpolant import PATHS, Interpolant
from models import load
from models.aligned import HeadedSiT
from models.load import load_head, load_sit
from models.projector import Projector
from models.sit import FinalLayer, unpatchify
from models.vae import load_vae
from runtime.files import read_checksummed_json, to_checksummed_json
from sampling.generator import block_noise, sample_latents
from tests.stores import make_store, make_vae
from tests.test_methods import _fresh_accelerate  # noqa: F401
from tests.test_sample_ddp import draw, refused
from tests.test_samplers import GaussianData, random_sit
from tests.test_train import run, same, weights

K = 3
SET = {"num_samples": 16, "guidance_scale": 1.5, "device": "cpu", "sampler": "ode-heun"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return make_store(folder / "store", vae=make_vae(folder / "vae"))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """Runs of each head that can guide, whose velocity is not zero any more."""
    options = {"max_train_steps": 3, "learning_rate": 0.01}
    folder = tmp_path_factory.mktemp("trained")
    flags = {"vae": {"align_time_range": (0.2, 1.0)}, "ig": {}, "none": {}, "vae+ig": {}, "conv": {}, "several": {}}
    flags["conv"] = {"align": "vae", "align_head": "conv"}
    flags["several"] = {"align": "vae", "align_depth": (3, 2), "align_layers": 2}
    return {name: run(data, folder, **{"align": name} | own | options, exp_name=name) for name, own in flags.items()}


# --- the velocity ---


class Headed:
    """A network and what its head predicts, which is counted."""

    def __init__(self, network, predict, predicts_velocity):
        self.network, self.predict, self.predicts_velocity, self.calls = network, predict, predicts_velocity, 0

    def __call__(self, x, t, y):
        self.calls += 1
        return self.network(x, t, y), self.predict(x, t, y)


@pytest.mark.parametrize("predicts_velocity", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_it_is_its_formula_before_class_guidance(path, predicts_velocity):
    sit, y = random_sit(), torch.tensor([0, 2])
    x, t = torch.randn(2, 4, 4, 4, dtype=torch.float64), 0.3
    headed = Headed(sit, lambda x, t, y: 0.5 * x + y.view(-1, 1, 1, 1), predicts_velocity)
    head = HeadGuidance(headed, 1.7, (0.0, 1.0))
    a, b, da, db = GaussianData(path).coefficients(t)
    sides = []
    for classes in (y, torch.tensor([K, K])):
        v = sit(x.float(), torch.full((2,), t), classes).double()
        predicted = 0.5 * x.float().double() + classes.view(-1, 1, 1, 1)
        eps = (x - a * predicted) / b
        v_mid = predicted if predicts_velocity else da * predicted + db * eps
        sides.append(v_mid + 1.7 * (v - v_mid))
    found = guided_velocity(sit, y, K, 2.5, (0.0, 1.0), interpolant=Interpolant(path), head=head)(x, t)
    torch.testing.assert_close(found, sides[1] + 2.5 * (sides[0] - sides[1]), rtol=1e-4, atol=1e-5)
    assert headed.calls == 1  # v_class and v_null in one batch, as without a head
    # The guide of autoguidance is not guided.
    found = guided_velocity(
        sit, y, K, 2.5, (0.0, 1.0), guide=copy.deepcopy(sit), interpolant=Interpolant(path), head=head
    )(x, t)
    plain = sit(x.float(), torch.full((2,), t), y).double()
    torch.testing.assert_close(found, plain + 2.5 * (sides[0] - plain), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_a_head_that_gives_the_exact_latent_gives_the_exact_velocity(path):
    """Guided with w = 0, so that the head's velocity is all there is."""
    data = GaussianData(path)

    def mean(x, t, y):
        t = t[0].item()
        a, *_ = data.coefficients(t)
        return 1.5 + a * 0.3**2 / data.variance(t) * (x.double() - a * 1.5)

    headed = Headed(lambda x, t, y: torch.zeros_like(x), mean, predicts_velocity=False)
    head = HeadGuidance(headed, 0.0, (0.0, 1.0))
    x, y = torch.randn(2, 1, 3, 3).double(), torch.tensor([0, 1])
    for t in (1.0, 0.75, 0.5, 0.125):
        found = guided_velocity(headed.network, y, K, 1.0, (0.0, 1.0), interpolant=Interpolant(path), head=head)(x, t)
        torch.testing.assert_close(found, data.velocity(x, t), rtol=1e-6, atol=1e-6)


def test_it_keeps_to_its_times_and_a_latent_has_no_velocity_at_the_end():
    sit, y, x = random_sit(), torch.tensor([0, 2]), torch.randn(2, 4, 4, 4, dtype=torch.float64)
    plain = guided_velocity(sit, y, K, 1.0, (0.0, 1.0))
    for predicts_velocity, expected in ((False, [0.75, 0.5, 0.25]), (True, [0.75, 0.5, 0.25])):
        head = HeadGuidance(Headed(sit, lambda x, *_: x, predicts_velocity), 2.0, (0.25, 0.75))
        velocity = guided_velocity(sit, y, K, 1.0, (0.0, 1.0), head=head)
        times = (1.0, 0.76, 0.75, 0.5, 0.25, 0.24, 0.0)
        assert [t for t in times if not torch.equal(velocity(x, t), plain(x, t))] == expected
    for predicts_velocity in (False, True):
        head = HeadGuidance(Headed(sit, lambda x, *_: x, predicts_velocity), 2.0, (0.0, 1.0))
        velocity = guided_velocity(sit, y, K, 1.0, (0.0, 1.0), head=head)
        assert torch.equal(velocity(x, 0.0), plain(x, 0.0)) != predicts_velocity


@pytest.mark.parametrize("kind", ["vae", "ig"])
@pytest.mark.parametrize("sampler", ["sde", "ode-euler", "ode-heun", "ode-heun-repa", "ode-dopri5"])
def test_scale_one_is_none_byte_for_byte_and_its_neighbour_is_near(kind, sampler):
    sit = random_sit()
    head = FinalLayer(sit.config) if kind == "ig" else Projector(sit.config.hidden_size, sit.config.patch_dim)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    headed = HeadedSiT(sit, (1, 0) if kind == "ig" else (1,), head, kind == "ig").requires_grad_(False)
    y, side = torch.arange(16) % K, sit.config.latent_size

    def sample(scale):
        guided = None if scale is None else HeadGuidance(headed, scale, (0.0, 1.0))
        noise = block_noise(0, 0, 16, (4, side, side), "cpu")
        return sample_latents(sit, y, noise, sampler, 4, Interpolant(), 1.5, head=guided)

    plain = sample(None)
    assert torch.equal(sample(1.0), plain)
    near, far = sample(1 + 1e-6), sample(1.5)
    assert not torch.equal(near, plain)
    # dopri5 chooses its steps by the error: another last digit, another step.
    torch.testing.assert_close(near, plain, rtol=1e-5, atol=1e-5 if sampler != "ode-dopri5" else 1e-3)
    assert (far - plain).abs().max() > 1e-2


# --- the EMA ---


@pytest.mark.parametrize("align", ["vae", "ig"])
def test_the_ema_of_a_head_is_its_formula_and_has_a_file_of_its_own(align, data, tmp_path):
    options = {"align": align, "checkpointing_steps": 1, "keep_last": 9, "ema_decay": (0.9, 0.5), "learning_rate": 0.01}
    folder = run(data, tmp_path, max_train_steps=3, **options)
    steps = load.checkpoints(folder)
    assert {path.name for path in steps[0].glob("*.safetensors")} == {
        "model.safetensors",
        *(f"{kind}{name}.safetensors" for kind in ("", "heads-") for name in ("ema", "ema-0.5")),
    }
    for decay, name in ((0.9, "heads-ema"), (0.5, "heads-ema-0.5")):
        for before, after in itertools.pairwise(steps):
            heads, then = (load_file(path / f"{name}.safetensors") for path in (before, after))
            raw = load_file(after / "model.safetensors")
            assert heads.keys() == {key.removeprefix("heads.") for key in raw if key.startswith("heads.")}
            for key, value in heads.items():
                expected = decay * value.double() + (1 - decay) * raw[f"heads.{key}"].double()
                torch.testing.assert_close(then[key].double(), expected, rtol=1e-5, atol=1e-7)
    # The readers of the SiT see what they saw.
    sit, info = load_sit(folder, ema="0.5")
    assert same(sit.state_dict(), load_file(steps[-1] / "ema-0.5.safetensors"))
    with pytest.raises(ValueError, match=r"--ema: expected one of 0\.5, ema in"):
        load_sit(folder, ema="heads-ema")
    assert info["heads"] == "heads-ema-0.5.safetensors"


@pytest.mark.parametrize("align", ["sra", "layersync", "none"])
def test_heads_that_cannot_guide_have_no_ema(align, data, tmp_path):
    folder = run(data, tmp_path, align=align, max_train_steps=1)
    assert not list(load.latest_checkpoint(folder).glob("heads-*"))


def test_the_resumed_ema_of_a_head_equals_an_undisturbed_one(data, tmp_path):
    options = {"align": "vae+ig", "align_depth": (1, 2)}
    whole = run(data, tmp_path / "whole", max_train_steps=4, **options)
    run(data, tmp_path / "parts", max_train_steps=2, **options)
    parts = run(data, tmp_path / "parts", max_train_steps=4, **options)
    assert same(weights(whole, "heads-ema"), weights(parts, "heads-ema"))
    assert {key.split(".")[0] for key in weights(whole, "heads-ema")} == {"vae_1", "vae_2", "ig"}


def without_heads(folder):
    """A run as older code wrote it."""
    checkpoint = load.latest_checkpoint(folder)
    state = read_checksummed_json(checkpoint / "state.json")
    state["digests"].pop("heads-ema.safetensors")
    (checkpoint / "state.json").write_text(to_checksummed_json(state))
    (checkpoint / "heads-ema.safetensors").unlink()
    return checkpoint


def test_an_older_checkpoint_resumes_with_the_trained_head_and_says_so(data, tmp_path, capsys):
    run(data, tmp_path, max_train_steps=2, learning_rate=1e-2)
    old = without_heads(tmp_path / "run")
    before = load_file(old / "model.safetensors")
    capsys.readouterr()
    run(data, tmp_path, max_train_steps=3, learning_rate=1e-2)
    assert f"{old} has no EMA of the alignment's head: it begins with the trained head" in capsys.readouterr().out
    after, ema = weights(tmp_path / "run"), weights(tmp_path / "run", "heads-ema")
    for key, value in ema.items():
        expected = 0.9 * before[f"heads.{key}"] + 0.1 * after[f"heads.{key}"]
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)
    run(data, tmp_path, max_train_steps=4, learning_rate=1e-2)
    assert "has no EMA" not in capsys.readouterr().out


# --- samples ---


@pytest.mark.parametrize("name", ["vae", "ig", "conv", "several", "vae+ig"])
def test_samples_are_guided_by_the_checkpoints_own_head(name, trained, tmp_path, monkeypatch):
    """By the average of the head at the first depth; Internal Guidance's before that of VAE-REPA."""
    images, _ = draw(trained[name], tmp_path / "guided", head_guidance=1.5, **SET)
    plain, _ = draw(trained[name], tmp_path / "plain", **SET)
    assert not np.array_equal(images, plain)
    # The head's own tokens, written out: from the block's, by the weights in the file.
    sit, info = load_sit(trained[name])
    headed = load_head(sit, info)
    depth = {"vae": 2, "ig": 2, "conv": 2, "several": 3, "vae+ig": 2}[name]
    prefix = {"several": "vae_3.", "vae+ig": "ig.", "ig": "ig."}.get(name, "vae.")
    file = load_file(load.latest_checkpoint(trained[name]) / "heads-ema.safetensors")
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 1])
    v, (tokens, c) = sit(x, t, y, return_blocks=(depth, 0))
    state = {key.removeprefix(prefix): value for key, value in file.items() if key.startswith(prefix)}
    head = headed.heads["head"]
    assert same(head.state_dict(), state)
    found = headed(x, t, y)
    assert torch.equal(found[0], v)
    expected = head(tokens, c) if prefix == "ig." else head(tokens)
    torch.testing.assert_close(found[1], unpatchify(expected, 4))
    assert headed.predicts_velocity == (prefix == "ig.")
    torch.testing.assert_close(c, sit.t_embedder(t) + sit.y_embedder(y))


def test_it_is_recorded_resumed_and_named(trained, tmp_path, capsys):
    flags = SET | {"num_samples": 32, "head_guidance": 1.5, "head_guidance_interval": (0.3, 0.9)}
    draw(trained["vae"], tmp_path / "one", **flags)
    settings = json.loads((tmp_path / "one" / "samples.json").read_text())["settings"]
    digest = read_checksummed_json(load.latest_checkpoint(trained["vae"]) / "state.json")["digests"]
    assert (settings["head_guidance"], settings["head_guidance_interval"]) == (1.5, [0.3, 0.9])
    assert settings["head_guidance_digest"] == digest["heads-ema.safetensors"]
    draw(trained["vae"], tmp_path / "all", **SET, head_guidance=1.5)
    settings = json.loads((tmp_path / "all" / "samples.json").read_text())["settings"]
    assert settings["head_guidance_interval"] == [0.2, 1.0]  # the trained one
    draw(trained["vae"], tmp_path / "none", **SET, head_guidance=1.0)
    settings = json.loads((tmp_path / "none" / "samples.json").read_text())["settings"]
    assert all(settings[f"head_guidance{name}"] is None for name in ("", "_interval", "_digest"))
    # What is not given comes from the record; what is given is compared with it.
    capsys.readouterr()
    again = ["--checkpoint", str(trained["vae"]), "--output-dir", str(tmp_path / "one")]
    sample_ddp.main(again)
    assert "is complete" in capsys.readouterr().out
    assert "head_guidance 1.5 -> 1.2" in refused(capsys, [*again, "--head-guidance", "1.2"])
    assert "head_guidance 1.5 -> None" in refused(capsys, [*again, "--head-guidance", "1"])
    flags["head_guidance"] = 0.0  # the head alone; the number counts as one that was given
    draw(trained["vae"], tmp_path / "zero", **flags)
    sample_ddp.main(["--checkpoint", str(trained["vae"]), "--output-dir", str(tmp_path / "zero")])
    assert "is complete" in capsys.readouterr().out
    assert "head_guidance None -> 1.2" in refused(
        capsys, ["--checkpoint", trained["vae"], "--output-dir", tmp_path / "none", "--head-guidance", 1.2]
    )


def test_a_sweep_draws_each_scale_as_alone(trained, tmp_path):
    sweep = {"head_guidance": (1.0, 1.3), "head_guidance_interval": (0.25, 1.0), "guidance_scale": (1.0, 2.0)}
    flags = ["--checkpoint", str(trained["ig"]), "--output-dir", str(tmp_path / "sweep"), "--num-samples", "16"]
    flags += ["--num-steps", "2", "--device", "cpu"]
    for name, values in sweep.items():
        flags += [f"--{name.replace('_', '-')}", *map(str, values)]
    sample_ddp.main(flags)
    folders = {path.name for path in (tmp_path / "sweep").iterdir()}
    assert folders == {
        f"ig-0000003-sde2-cfg{scale}{head}-seed0-n16" for scale in (1, 2) for head in ("", "-head1.3-t0.25-1")
    }
    alone = {"num_samples": 16, "num_steps": 2, "device": "cpu", "guidance_scale": 2.0, "per_proc_batch_size": 64}
    draw(trained["ig"], tmp_path / "alone", **alone, head_guidance=1.3, head_guidance_interval=(0.25, 1.0))
    found = tmp_path / "sweep" / "ig-0000003-sde2-cfg2-head1.3-t0.25-1-seed0-n16"
    assert (found / "samples.npz").read_bytes() == (tmp_path / "alone" / "samples.npz").read_bytes()


def test_a_comparison_draws_what_sampling_draws(trained, tmp_path, capsys):
    flags = SET | {"head_guidance": 1.5, "sampler": "ode-euler", "per_proc_batch_size": 16}
    images, labels = draw(trained["vae"], tmp_path / "samples", **flags)
    runs = [str(trained[name]) for name in ("vae", "ig", "none")]
    settings = {"guidance_scale": 1.5, "num_steps": 3, "head_guidance": 1.5, "mixed_precision": "no"}
    config = CompareConfig(tuple(runs[:2]), **settings)
    sit, info = load_sit(trained["vae"])
    vae = load_vae(info["vae"])
    found = draw_images(sit, info, vae, labels.tolist(), config, torch.device("cpu")).numpy()
    assert np.array_equal(found, images)
    flags = ["--num-steps", "2", "--head-guidance", "1.5", "--device", "cpu"]
    compare.main([*runs[:2], *flags, "--output-dir", str(tmp_path / "out")])
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["images"]["head_guidance"] == 1.5
    with pytest.raises(ValueError, match=r"--head-guidance: expected a head that can guide in .*none"):
        compare.main([*runs[1:], *flags, "--output-dir", str(tmp_path / "refused")])
    assert not (tmp_path / "refused").exists()
    with pytest.raises(ValueError, match="--head-guidance: expected a finite number"):
        CompareConfig(tuple(runs[:2]), head_guidance=float("nan"))


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"head_guidance": "nan"}, "--head-guidance: expected finite scales, found nan"),
        ({"head_guidance_interval": (0.3, 0.9)}, "--head-guidance-interval: expected a --head-guidance other than 1"),
        (
            {"head_guidance_interval": (0.1, 0.9), "head_guidance": 2},
            "LOW <= HIGH in [0.2, 1.0], where the head was tra",
        ),
        (
            {"head_guidance_interval": (0.9, 0.3), "head_guidance": 2},
            "--head-guidance-interval: expected LOW <= HIGH in",
        ),
        ({"head_guidance_interval": (0.3, 1.1), "head_guidance": 2}, "found 0.3 1.1"),
    ],
)
def test_bad_settings_are_one_line(changes, expected, trained, tmp_path, capsys):
    flags = ["--checkpoint", trained["vae"], "--output-dir", tmp_path / "out"]
    for name, value in changes.items():
        flags += [f"--{name.replace('_', '-')}", *(value if isinstance(value, tuple) else (value,))]
    assert expected in refused(capsys, flags)
    assert not (tmp_path / "out").exists()


def test_a_step_that_counts_as_one_time_is_guided_by_that_time():
    """REPA's Heun: both slopes of a step are guided, by classes and by the head, if its first time is."""
    sit, y, x = random_sit(), torch.tensor([0, 2]), torch.randn(2, 4, 4, 4, dtype=torch.float64)
    headed = Headed(sit, lambda x, *_: x, False)
    velocity = guided_velocity(sit, y, K, 1.0, (0.0, 1.0), head=HeadGuidance(headed, 2.0, (0.0, 0.5)))
    for t, gate, guided in ((0.5, 0.75, 0), (0.75, 0.5, 1), (0.0, 0.25, 0)):
        headed.calls = 0
        velocity(x, t, gate)
        assert headed.calls == guided


def test_a_latents_velocity_is_not_taken_near_the_end():
    """v_mid = (y - x_mid) / t: from t = 0.05 on, unless the network's own velocity has the same divisor."""
    config = {"align": "vae", "align_time_range": (0.0, 1.0), "align_depth": [2], "align_normalize": "none"}
    config |= {"align_objective": "smooth_l1", "align_weight": 1.0, "align_schedule": "constant"}
    config |= {"ig_depth": [1], "ig_weight": 0.5, "ig_schedule": "off:10"}
    info = {"config": config, "heads": "h", "source": "run", "step": 9, "prediction": "v"}
    assert load.guide_head(info) == ("vae", [2], (0.05, 1.0))
    assert load.guide_head(info | {"prediction": "x"})[2] == (0.0, 1.0)
    assert load.guide_head(info | {"config": config | {"align_time_range": (0.3, 0.7)}})[2] == (0.3, 0.7)
    assert load.guide_head(info | {"config": config | {"align": "vae+ig"}}) == ("ig", [1], (0.0, 1.0))
    # A head that nothing has trained, or no longer.
    stale = info | {"config": config | {"align": "ig"}, "step": 10}
    for broken, message in (
        (stale, "trained until step 10, found --ig-schedule off:10"),
        (info | {"config": config | {"align_weight": 0}}, "found --align-weight 0"),
    ):
        with pytest.raises(ValueError, match=message):
            load.guide_head(broken)


def test_what_has_no_head_that_can_guide_is_refused(data, trained, tmp_path, capsys):
    def line(checkpoint, *more):
        flags = ["--checkpoint", checkpoint, "--output-dir", tmp_path / "out", "--head-guidance", 1.2, *more]
        return refused(capsys, flags)

    said = line(trained["none"])
    assert "--head-guidance: expected a head that can guide in" in said
    assert "train with --align vae, or ig" in said
    old = shutil.copytree(trained["vae"], tmp_path / "old")
    without_heads(old)
    assert "this EMA was kept without one; resume the run for it" in line(old)
    for name, changes in {
        "--align-normalize": {"align_normalize": "spatial"},
        "cosine": {"align_objective": "cosine"},
    }.items():
        folder = run(data, tmp_path, exp_name=name.strip("-"), max_train_steps=1, **changes)
        assert f"knows the latents' scale, found {name}" in line(folder).replace("--align-objective ", "")
    foreign = tmp_path / "foreign.safetensors"
    save_file({key: value.contiguous() for key, value in weights(trained["none"], "ema").items()}, foreign)
    assert "--head-guidance: expected a head that can guide in" in line(foreign, "--checkpoint-format", "sit")
    assert not (tmp_path / "out").exists()


def test_a_damaged_head_is_named(trained, tmp_path, capsys):
    folder = shutil.copytree(trained["ig"], tmp_path / "copy")
    file = load.latest_checkpoint(folder) / "heads-ema.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    flags = ["--checkpoint", folder, "--output-dir", tmp_path / "out", "--head-guidance", 1.2, "--device", "cpu"]
    assert "damaged checkpoint" in refused(capsys, [*flags, "--num-samples", 16])
