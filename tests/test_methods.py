"""Every method of `--align`: what it aligns with, against references written here; and what it leaves alone."""

import dataclasses
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import train
from alignment.dispersive import Dispersion
from alignment.registry import METHODS, parse_align
from alignment.terms import normalize_tokens, weight_schedule
from dataset import LatentDataset, StepSampler
from diffusion.interpolant import Interpolant
from loss import Alignment
from models import load
from models.encoders import ENCODERS, load_encoder
from models.sit import FinalLayer, SiT
from reporting.log import read_log
from runtime import cli
from runtime.files import fields_of, read_checksummed_json, sha256, to_checksummed_json
from runtime.seeding import step_generator
from sampling.generator import block_noise, sample_latents
from tests.stores import ENCODER, make_encoder, make_store
from tests.test_loss import loop
from tests.test_train import run, same, settings, weights
from training.config import TrainConfig

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data") / "store", flips=True, images=True)


@pytest.fixture(scope="module")
def repa(tmp_path_factory):
    """Flags that make `--align repa` use a small encoder with random weights."""
    return {"repa_encoder": ENCODER, "repa_weights": make_encoder(tmp_path_factory.mktemp("encoder") / "w.safetensors")}


class Spy:
    """Takes the place of train.training_loss, and keeps what each call got and gave."""

    def __init__(self, monkeypatch):
        self.calls, self.compute = [], train.training_loss
        monkeypatch.setattr(train, "training_loss", self)

    def __call__(self, model, z, eps, t, y, interpolant, targets, alignments):
        seen = {}

        def watched(*inputs):
            seen["velocity"], seen["projected"] = model(*inputs)
            return seen["velocity"], seen["projected"]

        losses = self.compute(watched, z, eps, t, y, interpolant, targets, alignments)
        seen["projected"] = tree_map(lambda values: values.detach().clone(), seen["projected"])
        targets = {name: values if values is None else values.clone() for name, values in targets.items()}
        self.calls.append(
            SimpleNamespace(z=z, eps=eps, t=t, y=y, targets=targets, alignments=alignments, losses=losses, **seen)
        )
        return losses


def first_batch(data, seed=0):
    store = LatentDataset(data, images=True)
    return store.__getitems__(next(iter(StepSampler(len(store), 6, seed=seed))))


# --- REPA ---


def test_repa_aligns_with_the_encoders_tokens_by_a_cosine_for_each_token(data, repa, tmp_path, monkeypatch):
    spy = Spy(monkeypatch)
    folder = run(data, tmp_path, align="repa", max_train_steps=1, **repa)
    (call,) = spy.calls
    # The reference: timm's own network at 2 x 2 patches, its positions resampled, fed by hand.
    network = timm.create_model(ENCODER, num_classes=0, img_size=32).eval()
    state = load_file(repa["repa_weights"])
    grid = state["pos_embed"][:, 1:].view(1, 14, 14, 192).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(2, 2), mode="bicubic", antialias=True).permute(0, 2, 3, 1).reshape(1, 4, 192)
    state["pos_embed"] = torch.cat([state["pos_embed"][:, :1], grid], dim=1)
    network.load_state_dict(state)
    images = first_batch(data)["image"]
    x = (images.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5  # this network's own normalisation
    expected = network.forward_features(x)[:, 1:]
    torch.testing.assert_close(call.targets["repa"], expected, rtol=1e-4, atol=1e-5)
    projected, target = call.projected["repa"].double(), call.targets["repa"].double()
    value = loop("cosine", projected, target, call.t, 0.05, 0, 1)
    assert read_log(folder)[0]["align_repa"] == pytest.approx(value, rel=1e-5)
    assert call.alignments["repa"] == Alignment(0.5, "cosine")
    head = [tuple(v.shape) for k, v in weights(folder).items() if k.startswith("heads.repa") and k.endswith("weight")]
    assert sorted(head) == [(192, 2048), (2048, 192), (2048, 2048)]


def test_repa_shows_the_encoder_the_mirror_image_of_a_mirrored_latent(data, repa, tmp_path, monkeypatch):
    spy = Spy(monkeypatch)
    run(data, tmp_path, align="repa", max_train_steps=1, random_flip=True, **repa)
    store = LatentDataset(data, images=True)
    indices = next(iter(StepSampler(len(store), 6, seed=0, flip=True)))
    assert 0 < sum(index >= len(store) for index in indices) < 6
    images = LatentDataset(data, images=True).__getitems__([index % 24 for index in indices])["image"]
    flipped = torch.tensor([index >= 24 for index in indices])[:, None, None, None]
    encoder = load_encoder(ENCODER, 2, repa["repa_weights"])
    expected = encoder(torch.where(flipped, images.flip(2), images))
    torch.testing.assert_close(spy.calls[0].targets["repa"], expected)


def test_encoder_resizes_as_repa_does(repa):
    encoder = load_encoder(ENCODER, 3, repa["repa_weights"])
    images = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    x = (images.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    x = F.interpolate(x, 48, mode="bicubic")
    torch.testing.assert_close(encoder(images), encoder.network.forward_features(x)[:, 1:])
    assert encoder(images).shape == (2, 9, 192)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_every_named_encoder_is_known_to_timm_with_weights():
    for name, timm_name in ENCODERS.items():
        assert timm_name in timm.list_pretrained(timm_name.split(".")[0] + ".*"), name


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("vit_small_patch14_reg4_dinov2.lvd142m", 5),
        ("vit_small_patch16_dinov3.lvd1689m", 5),
        ("clip-vit-b", 1),
        ("siglip-vit-b", 0),
        ("mae-vit-b", 1),
    ],
)
def test_encoders_with_registers_rotary_positions_or_no_class_token(name, tokens, tmp_path):
    torch.manual_seed(0)
    network = timm.create_model(ENCODERS.get(name, name), num_classes=0)
    torch.save(network.state_dict(), tmp_path / "w.pth")
    encoder = load_encoder(name, 4, tmp_path / "w.pth")
    assert encoder.network.num_prefix_tokens == tokens
    out = encoder(torch.randint(0, 256, (1, 64, 64, 3), dtype=torch.uint8))
    assert out.shape == (1, 16, encoder.dim)
    assert out.isfinite().all()


@pytest.mark.parametrize(("name", "behind_norm"), [("mae-vit-b", False), ("clip-vit-b", False), ("siglip-vit-b", True)])
def test_tokens_are_taken_where_repa_takes_them(name, behind_norm, tmp_path):
    """Of MAE and CLIP behind the last block; of the others behind the last norm."""
    torch.manual_seed(0)
    torch.save(timm.create_model(ENCODERS[name], num_classes=0).state_dict(), tmp_path / "w.pth")
    encoder, normed = (load_encoder(name, 4, tmp_path / "w.pth", final_norm=norm) for norm in (None, True))
    images = torch.randint(0, 256, (1, 64, 64, 3), dtype=torch.uint8)
    seen = []
    encoder.network.blocks[-1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    found, last = encoder(images), normed(images)
    last_block = seen[0][:, encoder.network.num_prefix_tokens :]
    torch.testing.assert_close(found, last if behind_norm else last_block)
    assert not torch.allclose(last, last_block)


class Dangerous:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_encoders_that_cannot_be_had_are_named(tmp_path, monkeypatch):
    def refused(name, weights=None, side=4):
        with pytest.raises(ValueError, match="--repa-") as error:
            load_encoder(name, side, weights)
        assert "\n" not in str(error.value)
        return str(error.value)

    monkeypatch.setattr("models.encoders.hub_is_reachable", lambda: False)
    assert "did you mean dinov2-vit-b" in refused("dinov2-vitb")
    assert "did you mean vit_tiny_patch16_224" in refused("vit_tiny_patch16_2244")
    assert "vision transformer with square patches" in refused("resnet50")
    assert "vision transformer with square patches" in refused("swin_tiny_patch4_window7_224")
    assert "--repa-weights" in refused("dinov2-vit-b")
    assert "found none at" in refused(ENCODER, tmp_path / "none.pth")
    torch.save({"model": Dangerous(tmp_path / "ran")}, tmp_path / "code.pth")
    assert "expected tensors" in refused(ENCODER, tmp_path / "code.pth")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "cut.safetensors").write_bytes(b"\x10")
    assert "cannot be read" in refused(ENCODER, tmp_path / "cut.safetensors")
    torch.save([1], tmp_path / "list.pth")
    assert "found a list" in refused(ENCODER, tmp_path / "list.pth")
    weights = make_encoder(tmp_path / "w.safetensors")
    assert "expected weights of vit_small_patch16_224" in refused("vit_small_patch16_224", weights)


def test_repa_needs_a_store_with_images(tmp_path, repa):
    store = make_store(tmp_path / "store")
    with pytest.raises(ValueError, match=r"holds no images; dump them again with --keep-images"):
        run(store, tmp_path, align="repa", **repa)


# --- SRA ---


def test_sra_teacher_is_the_average_at_an_earlier_time_with_the_same_noise_and_labels(data, tmp_path, monkeypatch):
    spy = Spy(monkeypatch)
    options = {"align": "sra", "label_dropout": 0.5, "path_type": "cosine", "learning_rate": 0.003}
    folder = run(data, tmp_path, max_train_steps=3, checkpointing_steps=1, keep_last=3, **options)
    for step in (1, 2):  # the average after `step` steps is the teacher of step number `step`
        call = spy.calls[step]
        teacher, _ = load.load_sit(folder / "checkpoints" / f"{step:07d}")
        lag = torch.rand(6, generator=step_generator(0, step, "lag"))
        times = torch.tensor([max(0.0, t - 0.2 * u) for t, u in zip(call.t.tolist(), lag.tolist(), strict=True)])
        angle = (times * math.pi / 2)[:, None, None, None]
        less_noised = angle.cos() * call.z + angle.sin() * call.eps
        _, (expected,) = teacher(less_noised, times, call.y, return_blocks=(4,))
        torch.testing.assert_close(call.targets["sra"], expected, rtol=1e-4, atol=1e-5)
        assert (call.y == 3).any()
        value = loop("cosine_over_tokens", call.projected["sra"].double(), expected.double(), call.t, 0.05, 0, 1)
        assert read_log(folder)[step]["align_sra"] == pytest.approx(value, rel=1e-4)
        assert call.alignments["sra"] == Alignment(0.5, "cosine_over_tokens")
    # SRA's head: two layers, the inner one of twice the width.
    assert weights(folder)["heads.sra.0.weight"].shape == (384, 192)
    assert weights(folder)["heads.sra.2.weight"].shape == (192, 384)


def test_sra_never_runs_the_teachers_later_blocks(data, tmp_path, monkeypatch):
    run_blocks = []
    tokens = SiT.tokens

    def spy(self, x, t, y, depth):
        hooks = [
            block.register_forward_hook(lambda *_, k=k: run_blocks.append(k)) for k, block in enumerate(self.blocks)
        ]
        out = tokens(self, x, t, y, depth)
        for hook in hooks:
            hook.remove()
        assert not out.requires_grad
        return out

    monkeypatch.setattr(SiT, "tokens", spy)
    run(data, tmp_path, align="sra", max_train_steps=1, sra_teacher_depth=3)
    assert run_blocks == [0, 1, 2]


# --- LayerSync, Internal Guidance, dispersive ---

SMALL = {"dispersive_group": 3}  # of the batch of 6
ALL = "+".join(METHODS)


def scrambled(data, folder):
    """A run whose SiT has no zero weights, to begin others with: at the zero initialisation blocks are identities."""
    path = run(data, folder / "scrambled", align="none", max_train_steps=1)
    checkpoint = load.latest_checkpoint(path)
    torch.manual_seed(3)
    state = {name: value + 0.05 * torch.randn_like(value) for name, value in weights(path, "ema").items()}
    state["pos_embed"] = weights(path, "ema")["pos_embed"]
    save_file(state, checkpoint / "ema.safetensors")
    record = read_checksummed_json(checkpoint / "state.json")
    record["digests"]["ema.safetensors"] = sha256(checkpoint / "ema.safetensors")
    (checkpoint / "state.json").write_text(to_checksummed_json(record))
    return path


def blocks_of(sit, call):
    """Tokens that leave each block, counted from 1, and at 0 the condition; written out."""
    y_t = (1 - call.t)[:, None, None, None] * call.z + call.t[:, None, None, None] * call.eps
    h, c = sit.x_embedder(y_t) + sit.pos_embed, sit.t_embedder(call.t) + sit.y_embedder(call.y)
    found = [c]
    for block in sit.blocks:
        h = block(h, c)
        found.append(h)
    return found


def test_layersync_learns_the_later_block_of_the_same_forward_by_a_cosine_for_each_token(data, tmp_path, monkeypatch):
    source, spy = scrambled(data, tmp_path), Spy(monkeypatch)
    row = read_log(run(data, tmp_path, align="layersync", init_from=source, max_train_steps=1))[0]
    (call,) = spy.calls
    tokens = blocks_of(load.load_sit(source)[0], call)
    student, teacher = call.projected["layersync"]
    torch.testing.assert_close(student, tokens[2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(teacher, tokens[3], rtol=1e-4, atol=1e-5)
    value = 0.0
    for image in range(6):
        for token in range(4):
            a, b = (h[image, token].double() for h in (tokens[2], tokens[3]))
            value += (1 - (a @ b / (a.norm() * b.norm())).item()) / (6 * 4)
    assert row["align_layersync"] == pytest.approx(value, rel=1e-4)
    assert value > 0.001
    assert row["loss"] == pytest.approx(row["velocity"] + 0.2 * value, rel=1e-5)
    assert not any(name.startswith("heads.") for name in weights(tmp_path / "run"))


def test_internal_guidance_predicts_the_velocity_by_a_final_layer_of_its_own(data, tmp_path, monkeypatch):
    source, spy = scrambled(data, tmp_path), Spy(monkeypatch)
    folder = run(data, tmp_path, align="ig", init_from=source, max_train_steps=2, learning_rate=0.01)
    first, second = spy.calls
    for call, row in zip(spy.calls, read_log(folder), strict=True):
        v = (call.eps - call.z).double()  # Eq. 4 on the linear path
        token = v[:, :, 4:, :4].permute(0, 2, 3, 1).flatten(1)  # third of four: (row, column, channel)
        torch.testing.assert_close(call.targets["ig"][:, 2].double(), token)
        differences = [
            (call.projected["ig"][n, k].double() - call.targets["ig"][n, k].double()).square().mean().item()
            for n in range(6)
            for k in range(4)
        ]
        assert row["align_ig"] == pytest.approx(sum(differences) / 24, rel=1e-5)
        assert row["loss"] == pytest.approx(row["velocity"] + 0.5 * row["align_ig"], rel=1e-6)
    assert first.projected["ig"].abs().max() == 0  # zero at first
    assert second.projected["ig"].abs().max() > 0
    # The head is SiT's final layer: its own norm, shift and scale by the condition, on the tokens of block 2.
    state = weights(folder)
    assert {name for name in state if name.startswith("heads.")} == {
        f"heads.ig.{name}.{kind}" for name in ("linear", "adaLN_modulation.1") for kind in ("weight", "bias")
    }
    head = {name.removeprefix("heads.ig."): value for name, value in state.items() if name.startswith("heads.ig.")}
    layer = FinalLayer(load.load_sit(folder)[0].config)
    layer.load_state_dict(head)
    h, c = torch.randn(2, 4, 192), torch.randn(2, 192)
    shift, scale = (F.silu(c) @ head["adaLN_modulation.1.weight"].T + head["adaLN_modulation.1.bias"]).chunk(2, dim=1)
    normal = F.layer_norm(h, (192,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    torch.testing.assert_close(layer(h, c), normal @ head["linear.weight"].T + head["linear.bias"])


@pytest.mark.parametrize("tau", [0.5, 1.0])
def test_dispersive_is_its_formula_over_groups_of_consecutive_samples(tau, data, tmp_path, monkeypatch):
    source, spy = scrambled(data, tmp_path), Spy(monkeypatch)
    options = {"align": "dispersive", "dispersive_tau": tau, "init_from": source, **SMALL}
    row = read_log(run(data, tmp_path, max_train_steps=1, **options))[0]
    (call,) = spy.calls
    z = blocks_of(load.load_sit(source)[0], call)[2].detach().double().flatten(1)
    values = []
    for group in (range(0, 3), range(3, 6)):
        pairs = [math.exp(-(z[i] - z[j]).square().sum().item() / (z.shape[1] * tau)) for i in group for j in group]
        values.append(math.log(sum(pairs) / 9))
    assert row["align_dispersive"] == pytest.approx(sum(values) / 2, rel=1e-4)
    assert -math.log(3) < row["align_dispersive"] < -0.01
    assert row["loss"] == pytest.approx(row["velocity"] + 0.5 * row["align_dispersive"], rel=1e-5)
    assert not any(name.startswith("heads.") for name in weights(tmp_path / "run"))


def test_dispersive_keeps_its_value_for_tokens_that_share_a_large_part():
    h = torch.randn(4, 3, 8)
    dispersion = Dispersion(1.0, 0.5, 4)
    torch.testing.assert_close(dispersion.loss(h + 1000, None, None), dispersion.loss(h, None, None), rtol=1e-3, atol=0)
    assert dispersion.loss(torch.ones(4, 3, 8), None, None) == pytest.approx(0, abs=1e-6)
    assert dispersion.loss(100 * h.bfloat16(), None, None).item() == pytest.approx(-math.log(4))


def test_a_teacher_of_the_same_forward_gets_no_gradient(data, tmp_path, monkeypatch):
    """Of LayerSync: what is computed from the later block alone has none, and so has the block itself."""
    reached, compute = {}, train.training_loss

    def spy(model, z, *inputs):
        losses = compute(model, z, *inputs)
        blocks = [model.sit.blocks[k].mlp.fc1.weight for k in range(6)]
        found = torch.autograd.grad(losses["align_layersync"], blocks, allow_unused=True, retain_graph=True)
        reached.update(enumerate(grad is not None and bool(grad.abs().max() > 0) for grad in found))
        return losses

    source = scrambled(data, tmp_path)
    monkeypatch.setattr(train, "training_loss", spy)
    options = {"layersync_depth": 2, "layersync_teacher_depth": 5, "init_from": source}
    run(data, tmp_path, align="layersync", max_train_steps=1, **options)
    assert [reached[k] for k in range(6)] == [True, True, False, False, False, False]


# --- all of them ---


def test_the_first_velocity_loss_is_the_same_for_every_method(data, repa, tmp_path, monkeypatch):
    """From weights other than the zero initialisation, under which it is the same whatever is drawn; and so is all that
    is drawn, bit for bit."""
    source, spy = scrambled(data, tmp_path), Spy(monkeypatch)
    options = {"max_train_steps": 1, "init_from": source, "label_dropout": 0.5, **SMALL, **repa}
    first = {
        align: read_log(run(data, tmp_path / align, align=align, **options))[0]
        for align in ("none", *METHODS, "repa+vae", "sra+vae", "sra+vae+repa", "dispersive+ig+layersync+vae")
    }
    assert len({row["velocity"] for row in first.values()}) == 1
    assert len(spy.calls) == len(first)
    for call in spy.calls[1:]:
        assert all(torch.equal(getattr(call, name), getattr(spy.calls[0], name)) for name in ("z", "eps", "t", "y"))
    for align, row in first.items():
        assert {name for name in row if name.startswith("align_")} == {f"align_{name}" for name in parse_align(align)}
        for name in parse_align(align):  # nor does one method change another
            assert row[f"align_{name}"] == first[name][f"align_{name}"]


def test_the_sum_has_every_term_with_its_weight(data, repa, tmp_path):
    options = {"align": "sra+vae+repa", "align_weight": 0.3, "repa_weight": 0.7, "sra_weight": 1.1}
    row = read_log(run(data, tmp_path, max_train_steps=1, **options, **repa))[0]
    total = row["velocity"] + 0.3 * row["align_vae"] + 0.7 * row["align_repa"] + 1.1 * row["align_sra"]
    assert row["loss"] == pytest.approx(total, rel=1e-6)


class CountOperators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        self.counts[name] = self.counts.get(name, 0) + 1
        return function(*args, **(kwargs or {}))


def test_align_none_runs_the_operators_of_a_plain_sit(data, tmp_path, monkeypatch):
    counter = CountOperators()
    compute = train.training_loss

    def counted(model, *inputs):
        with counter:
            losses = compute(model, *inputs)
            losses["total"].backward()
        return {name: value.detach().requires_grad_() for name, value in losses.items()}

    monkeypatch.setattr(train, "training_loss", counted)
    run(data, tmp_path, align="none", max_train_steps=1, mixed_precision="no")

    torch.manual_seed(0)
    sit = SiT(load.load_sit(tmp_path / "run")[0].config)
    z, eps, t, y = torch.randn(6, 4, 8, 8), torch.randn(6, 4, 8, 8), torch.rand(6), torch.zeros(6, dtype=torch.long)
    plain = CountOperators()
    with plain:
        a, b = (1 - t).view(-1, 1, 1, 1), t.view(-1, 1, 1, 1)
        velocity = sit(a * z + b * eps, t, y)
        da, db = (0 * t - 1).view(-1, 1, 1, 1), (0 * t + 1).view(-1, 1, 1, 1)
        (velocity - (da * z + db * eps)).square().flatten(1).mean(dim=1).mean().backward()
    assert counter.counts == plain.counts


@pytest.mark.parametrize("align", METHODS)
def test_alignment_gradients_reach_its_blocks_and_no_later_one(align, data, repa, tmp_path, monkeypatch):
    reached = {}
    compute = train.training_loss

    def spy(model, z, *inputs):
        losses = compute(model, z, *inputs)
        names, values = zip(*model.named_parameters(), strict=True)
        grads = torch.autograd.grad(losses[f"align_{align}"], values, allow_unused=True, retain_graph=True)
        reached.update({name: grad is not None for name, grad in zip(names, grads, strict=True)})
        return losses

    monkeypatch.setattr(train, "training_loss", spy)
    flag = "align_depth" if align == "vae" else f"{align}_depth"
    later = {"layersync_teacher_depth": 5}
    run(data, tmp_path, align=align, max_train_steps=1, **{flag: 3}, **later, **SMALL, **repa)
    blocks = {int(name.split(".")[2]) for name, hit in reached.items() if hit and name.startswith("sit.blocks.")}
    assert blocks == {0, 1, 2}
    assert not reached["sit.final_layer.linear.weight"]
    assert reached["sit.x_embedder.proj.weight"]


def test_several_depths_share_the_weight_and_the_target(data, tmp_path, monkeypatch):
    spy = Spy(monkeypatch)
    row = read_log(run(data, tmp_path, align_depth=(2, 5), align_weight=0.6, max_train_steps=1))[0]
    assert row["loss"] == pytest.approx(row["velocity"] + 0.3 * row["align_vae_2"] + 0.3 * row["align_vae_5"], rel=1e-6)
    assert spy.calls[0].targets["vae_2"].equal(spy.calls[0].targets["vae_5"])
    assert sum(name.startswith("heads.vae_5.") for name in weights(tmp_path / "run")) == 10


def test_the_targets_channels_are_normalised_over_an_images_tokens(data, tmp_path, monkeypatch):
    x = torch.randn(3, 16, 5, dtype=torch.float64) * torch.tensor([1.0, 10, 0.1, 3, 5]) + torch.arange(5)
    found = normalize_tokens(x)
    for image, normal in zip(x, found, strict=True):
        for channel in range(5):
            values = image[:, channel]
            expected = (values - values.mean()) / values.std(correction=0)
            torch.testing.assert_close(normal[:, channel], expected, rtol=1e-4, atol=1e-5)
    assert normalize_tokens(torch.ones(1, 4, 2)).abs().max() == 0  # a flat image has no deviation
    assert normalize_tokens(x.bfloat16()).dtype == torch.float32
    spy = Spy(monkeypatch)
    run(data, tmp_path, max_train_steps=1, model="SiT-Ti/2", align_normalize="spatial")
    target = spy.calls[0].targets["vae"]
    assert target.mean(dim=1).abs().max() < 1e-5
    assert (target.std(dim=1, correction=0) - 1).abs().max() < 1e-4
    assert not spy.calls[0].alignments["vae"].normalize


def test_samples_are_normalised_in_the_loss_of_vae_alone(data, tmp_path, monkeypatch, repa):
    spy = Spy(monkeypatch)
    run(data, tmp_path, align="repa+vae", **repa, max_train_steps=1, align_normalize="sample")
    assert {name: found.normalize for name, found in spy.calls[0].alignments.items()} == {"repa": False, "vae": True}
    z = spy.calls[0].targets["vae"]
    assert (z.mean(), z.std()) != pytest.approx((0, 1), abs=1e-3)  # the target itself is as ever


@pytest.mark.parametrize(("old", "new"), [(False, "none"), (True, "spatial"), ("sample", "sample")])
def test_older_records_say_whether_the_target_is_normalised(old, new):
    assert fields_of(TrainConfig)["align_normalize"].read_old(old) == new


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("constant", {0: 1, 10**6: 1}),
        ("linear:10", {0: 1, 1: 0.9, 9: 0.1, 10: 0, 99: 0}),
        ("cosine:10", {0: 1, 5: 0.5, 2: (1 + math.cos(math.pi / 5)) / 2, 10: 0, 99: 0}),
        ("off:10", {0: 1, 9: 1, 10: 0, 11: 0}),
        # SRA: 2 * 0.1^(1 + (epoch - 149) / 1000) past epoch 149, in parts of the 0.2 before it; 5 steps an epoch
        ("sra", {0: 1, 749: 1, 750: 0.1**0.001, 754: 0.1**0.001, 5 * 1149: 0.1, 5 * 2149: 0.01}),
    ],
)
def test_schedules_are_their_formulas(text, expected):
    context = SimpleNamespace(resolution=256, steps_per_epoch=5.0)
    factor = weight_schedule(text, context, "--align-schedule")
    assert {step: factor(step) for step in expected} == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_sras_schedule_falls_earlier_at_512():
    context = SimpleNamespace(resolution=512, steps_per_epoch=1.0)
    factor = weight_schedule("sra", context, "--sra-schedule")
    assert (factor(99), factor(899)) == (1, pytest.approx(0.1))


def test_a_method_whose_weight_is_gone_costs_no_target_and_is_reported_as_0(data, repa, tmp_path, monkeypatch):
    calls = []
    method = METHODS["repa"]

    def counted(context):
        terms = method.build(context)
        target = terms.target
        terms.target = lambda batch: calls.append(1) or target(batch)
        return terms

    monkeypatch.setitem(METHODS, "repa", dataclasses.replace(method, build=counted))
    rows = read_log(run(data, tmp_path, align="repa", repa_schedule="off:2", max_train_steps=4, **repa))
    assert len(calls) == 2
    assert [row["align_repa"] > 0 for row in rows] == [True, True, False, False]
    assert rows[2]["loss"] == rows[2]["velocity"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"align": "dino"}, r"--align: expected none or some of vae, repa, sra, .*, as in repa.vae, found 'dino'"),
        ({"align": "vae+vae"}, r"--align: .*found 'vae\+vae'"),
        ({"align": "none+vae"}, r"--align: "),
        ({"align_depth": (0,)}, r"--align-depth: expected different blocks in 1\.\.6.*found 0"),
        ({"align_depth": (2, 2)}, r"--align-depth: expected different blocks.*found 2 2"),
        ({"align": "sra", "sra_depth": 7}, r"--sra-depth: expected different blocks in 1\.\.6.*found 7"),
        ({"align": "sra", "sra_teacher_depth": 7}, r"--sra-teacher-depth: .* in 1\.\.6.*found 7"),
        ({"align": "sra", "sra_t_max": 1.5}, r"--sra-t-max"),
        ({"align": "sra", "sra_weight": -1.0}, r"--sra-weight"),
        ({"align": "repa", "repa_depth": 9}, r"--repa-depth: .*found 9"),
        ({"align": "repa", "repa_encoder": "dinov2-vitb"}, r"--repa-encoder: .*did you mean dinov2-vit-b"),
        ({"align_schedule": "linear"}, r"--align-schedule: expected constant, sra, or linear:K.*found 'linear'"),
        ({"align_schedule": "off:0"}, r"--align-schedule: .*found 'off:0'"),
        ({"align": "sra", "sra_schedule": "sqrt:5"}, r"--sra-schedule: .*found 'sqrt:5'"),
        ({"align": "layersync", "layersync_depth": 3}, r"--layersync-teacher-depth: .*above.*\(3\), found 3"),
        ({"align": "layersync", "layersync_teacher_depth": 1}, r"--layersync-teacher-depth: .*\(2\), found 1"),
        ({"align": "layersync", "layersync_teacher_depth": 7}, r"--layersync-teacher-depth: .* in 1\.\.6.*found 7"),
        ({"align": "layersync", "layersync_weight": -1.0}, r"--layersync-weight: expected at least 0"),
        ({"align": "ig", "ig_depth": 7}, r"--ig-depth: .*found 7"),
        ({"align": "ig", "ig_weight": -1.0}, r"--ig-weight: expected at least 0"),
        (
            {"align": "dispersive"},
            r"--dispersive-group: .*divisor of the 6 samples of a micro-batch, found 32; set.* 2,",
        ),
        ({"align": "dispersive", "batch_size": 5}, r"divisor of the 5 samples.*found 32; set another --batch-size"),
        ({"align": "dispersive", "dispersive_group": 1}, r"--dispersive-group: expected at least 2, found 1"),
        ({"align": "dispersive", "dispersive_tau": 0.0}, r"--dispersive-tau: expected more than 0"),
    ],
)
def test_refusals_name_the_flag(changes, message, data, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        run(data, tmp_path / "out", **changes)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("align", [None, "layersync", "ig", "dispersive"])
def test_a_resumed_run_of_every_method_equals_an_undisturbed_one(align, data, repa, tmp_path):
    options = (
        {"align": "sra+repa", "align_schedule": "linear:9", **repa} if align is None else {"align": align, **SMALL}
    )
    whole = run(data, tmp_path / "whole", max_train_steps=4, **options)
    run(data, tmp_path / "parts", max_train_steps=2, **options)
    parts = run(data, tmp_path / "parts", max_train_steps=4, **options)
    assert same(weights(whole), weights(parts))
    assert same(weights(whole, "ema"), weights(parts, "ema"))
    # And it can be sampled from.
    y, noise = torch.arange(16) % 3, block_noise(0, 0, 16, (4, 8, 8), "cpu")
    z = sample_latents(load.load_sit(parts)[0], y, noise, "ode-euler", 2, Interpolant(), 1.5)
    assert z.isfinite().all()


@pytest.mark.slow
def test_two_processes_train_every_method_as_one_does(data, repa, tmp_path):
    options = {"align": ALL, "batch_size": 8, "max_train_steps": 3, "repa_schedule": "off:2", **repa}
    options["dispersive_group"] = 2
    alone = read_log(run(data, tmp_path / "one", **options))
    flags = settings(data, tmp_path / "two", gradient_accumulation_steps=2, **options)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(ROOT / "train.py"), *flags], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    for row, other in zip(alone, read_log(tmp_path / "two" / "run"), strict=True):
        for name in ("loss", "velocity", "grad_norm", *(f"align_{name}" for name in METHODS)):
            # LayerSync begins at 0: at the zero initialisation blocks are identities.
            assert other[name] == pytest.approx(row[name], rel=1e-5, abs=1e-6)


@pytest.mark.slow
def test_compiled_methods_equal_eager_ones(data, repa, tmp_path):
    options = {"align": ALL, "align_head": "conv", **SMALL, **repa}
    eager = read_log(run(data, tmp_path / "eager", **options))
    compiled = read_log(run(data, tmp_path / "compiled", compile=True, **options))
    for row, other in zip(eager, compiled, strict=True):
        for name in ("loss", "velocity", "grad_norm", *(f"align_{name}" for name in METHODS)):
            # LayerSync begins at 0: at the zero initialisation blocks are identities.
            assert other[name] == pytest.approx(row[name], rel=1e-5, abs=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])
def test_every_method_trains_in_bf16_on_a_gpu(compiled, data, repa, tmp_path):
    options = {"align": ALL, "max_train_steps": 3, "mixed_precision": "bf16", "compile": compiled}
    rows = read_log(run(data, tmp_path, **options, **SMALL, **repa))
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert load_encoder(ENCODER, 2, repa["repa_weights"], "cuda").network.pos_embed.dtype == torch.bfloat16


def test_a_run_is_resumed_with_the_weights_it_was_trained_with(data, tmp_path):
    """Of the encoder and of --init-from: by their digests, not by their paths."""
    weights_file = make_encoder(tmp_path / "encoder.safetensors")
    encoder = {"align": "repa", "repa_encoder": ENCODER, "repa_weights": weights_file}
    source = run(data, tmp_path / "source", max_train_steps=1)
    run(data, tmp_path, max_train_steps=1, init_from=source, **encoder)
    run(data, tmp_path, max_train_steps=2, init_from=source, **encoder)
    make_encoder(weights_file, seed=1)
    with pytest.raises(ValueError, match=r"--repa-weights: expected the weights that the run .* was trained with"):
        run(data, tmp_path, max_train_steps=3, init_from=source, **encoder)
    make_encoder(weights_file)
    folder = load.latest_checkpoint(source)
    shutil.rmtree(folder)
    other = run(data, tmp_path / "other", max_train_steps=1, seed=5)
    shutil.copytree(load.latest_checkpoint(other), folder)
    with pytest.raises(ValueError, match=r"--init-from: expected the weights that the run .* was trained with"):
        run(data, tmp_path, max_train_steps=3, init_from=source, **encoder)


def test_weights_of_something_else_are_not_an_encoder(tmp_path):
    save_file({"unrelated": torch.zeros(3)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="--repa-weights: expected weights of"):
        load_encoder(ENCODER, 2, tmp_path / "w.safetensors")


def test_the_older_switch_is_still_one(tmp_path):
    words = ["--data-dir", "x", "--align-normalize"]
    assert cli.parse(TrainConfig, words).align_normalize == "spatial"
    assert cli.parse(TrainConfig, [*words, "sample", "--seed", "1"]).align_normalize == "sample"
    assert cli.parse(TrainConfig, [*words, "--seed", "1"]).align_normalize == "spatial"
    assert cli.parse(TrainConfig, ["--data-dir", "x", "--no-align-normalize"]).align_normalize == "none"
    for text, value in (("true", "spatial"), ("false", "none"), ("sample", "sample")):
        (tmp_path / "config.yaml").write_text(f"align_normalize: {text}")
        assert cli.parse(TrainConfig, [*words[:2], "--config", str(tmp_path / "config.yaml")]).align_normalize == value
