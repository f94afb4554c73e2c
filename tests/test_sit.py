"""The backbone against published sizes, an independently written forward, and its own invariants."""

import dataclasses
import math

import numpy as np
import pytest
import timm
import torch

from models.aligned import AlignedSiT
from models.projector import ConvHead, Projector
from models.sit import PATCH_SIZES, SIT_SIZES, SiT, SiTConfig, patchify, unpatchify
from runtime.files import Field


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def randomised(config, seed=0):
    """A SiT with no zero left in it, so that every part shows in the output."""
    torch.manual_seed(seed)
    model = SiT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


TINY = SiTConfig(depth=3, hidden_size=32, num_heads=4, patch_size=2, latent_size=8, in_channels=3, num_classes=5)


@pytest.mark.parametrize(
    "size, millions, head_millions", [("S", 33, 2.1), ("B", 130, 8.3), ("L", 458, 14.7), ("XL", 675, 18.6)]
)
def test_parameter_counts_are_the_published_ones(size, millions, head_millions):
    config = SiTConfig.from_name(f"SiT-{size}/2")
    with torch.device("meta"):
        assert round(count(SiT(config)) / 1e6) == millions
        assert round(count(Projector(config.hidden_size, config.patch_dim)) / 1e6, 1) == head_millions


def test_two_layer_head_has_one_million_parameters_for_b():
    assert round(count(Projector(768, 16, layers=2)) / 1e6, 1) == 1.2


@pytest.mark.parametrize("size", SIT_SIZES)
@pytest.mark.parametrize("patch", PATCH_SIZES)
@pytest.mark.parametrize("latent_size, channels", [(32, 4), (64, 16)])
def test_every_size_builds_and_keeps_the_shape(size, patch, latent_size, channels):
    config = SiTConfig.from_name(f"SiT-{size}/{patch}", latent_size, channels, num_classes=7)
    with torch.device("meta"):
        model = SiT(config)
        x, t, y = torch.empty(2, channels, latent_size, latent_size), torch.empty(2), torch.empty(2, dtype=torch.long)
        velocity, (tokens,) = model(x, t, y, return_blocks=(2,))
    assert velocity.shape == x.shape
    assert tokens.shape == (2, config.num_tokens, config.hidden_size)


def test_state_dict_keys_are_those_of_sit_and_repa():
    block = [f"attn.{layer}.{kind}" for layer in ("qkv", "proj") for kind in ("weight", "bias")] + [
        f"mlp.{layer}.{kind}" for layer in ("fc1", "fc2") for kind in ("weight", "bias")
    ]
    block += ["adaLN_modulation.1.weight", "adaLN_modulation.1.bias"]
    expected = {f"blocks.{i}.{name}" for i in range(3) for name in block}
    expected |= {"pos_embed", "y_embedder.embedding_table.weight"}
    layers = "x_embedder.proj t_embedder.mlp.0 t_embedder.mlp.2 final_layer.linear final_layer.adaLN_modulation.1"
    for layer in layers.split():
        expected |= {f"{layer}.weight", f"{layer}.bias"}
    assert set(SiT(TINY).state_dict()) == expected


def reference_forward(weights, config, x, t, y, return_blocks=()):
    """SiT written out in numpy, one sample and one head at a time, from the DiT and SiT papers."""
    w = {name: tensor.double().numpy() for name, tensor in weights.items()}
    D, heads, p = config.hidden_size, config.num_heads, config.patch_size
    side = config.latent_size // p

    def linear(name, value):
        return value @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def silu(value):
        return value / (1 + np.exp(-value))

    def normalise(value, eps=1e-6):
        return (value - value.mean(-1, keepdims=True)) / np.sqrt(value.var(-1, keepdims=True) + eps)

    def gelu(value):
        return 0.5 * value * (1 + np.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)))

    outputs, kept = [], [[] for _ in return_blocks]
    for image, time, label in zip(x.double().numpy(), t.double().numpy(), y.numpy(), strict=True):
        tokens = np.empty((side * side, D))
        for row in range(side):
            for column in range(side):
                patch = image[:, row * p : row * p + p, column * p : column * p + p]
                kernel = w["x_embedder.proj.weight"]
                tokens[row * side + column] = (kernel * patch).sum((1, 2, 3)) + w["x_embedder.proj.bias"]
        for row in range(side):
            for column in range(side):
                for k in range(D // 4):
                    omega = 1 / 10000 ** (k / (D / 4))
                    quarter = D // 4
                    token = tokens[row * side + column]
                    token[k] += math.sin(column * omega)
                    token[quarter + k] += math.cos(column * omega)
                    token[2 * quarter + k] += math.sin(row * omega)
                    token[3 * quarter + k] += math.cos(row * omega)
        angles = time * np.exp(-math.log(10000) * np.arange(128) / 128)
        embedded = linear("t_embedder.mlp.0", np.concatenate([np.cos(angles), np.sin(angles)]))
        c = linear("t_embedder.mlp.2", silu(embedded)) + w["y_embedder.embedding_table.weight"][label]
        for i in range(config.depth):
            name = f"blocks.{i}"
            shift1, scale1, gate1, shift2, scale2, gate2 = np.split(linear(f"{name}.adaLN_modulation.1", silu(c)), 6)
            h = normalise(tokens) * (1 + scale1) + shift1
            q, k, v = np.split(linear(f"{name}.attn.qkv", h), 3, axis=1)
            attended = np.empty_like(q)
            for head in range(heads):
                part = slice(head * D // heads, (head + 1) * D // heads)
                if config.qk_norm:
                    q[:, part], k[:, part] = (
                        normalise(x[:, part], 1e-5) * w[f"{name}.attn.{kind}.weight"] + w[f"{name}.attn.{kind}.bias"]
                        for kind, x in (("q_norm", q), ("k_norm", k))
                    )
                logits = q[:, part] @ k[:, part].T / math.sqrt(D // heads)
                weight = np.exp(logits - logits.max(1, keepdims=True))
                attended[:, part] = weight / weight.sum(1, keepdims=True) @ v[:, part]
            tokens = tokens + gate1 * linear(f"{name}.attn.proj", attended)
            h = normalise(tokens) * (1 + scale2) + shift2
            tokens = tokens + gate2 * linear(f"{name}.mlp.fc2", gelu(linear(f"{name}.mlp.fc1", h)))
            for place, depth in enumerate(return_blocks):
                if depth == i + 1:
                    kept[place].append(tokens)
        shift, scale = np.split(linear("final_layer.adaLN_modulation.1", silu(c)), 2)
        patches = linear("final_layer.linear", normalise(tokens) * (1 + scale) + shift)
        output = np.empty((patches.shape[1] // p**2, *image.shape[1:]))
        for row in range(side):
            for column in range(side):
                patch = patches[row * side + column].reshape(p, p, -1).transpose(2, 0, 1)
                output[:, row * p : row * p + p, column * p : column * p + p] = patch
        outputs.append(output)
    return np.stack(outputs), [np.stack(tokens) for tokens in kept]


@pytest.mark.parametrize("qk_norm", [False, True])
def test_forward_equals_an_independent_one_in_float64(qk_norm):
    config = dataclasses.replace(TINY, qk_norm=qk_norm)
    model = randomised(config).double()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)
    t, y = torch.tensor([0.2, 0.9], dtype=torch.float64), torch.tensor([0, 5])
    velocity, tokens = model(x, t, y, return_blocks=(3, 1))
    # Fixed tables are float32 in the model: the agreement is that of the tables.
    expected, expected_tokens = reference_forward(model.state_dict(), config, x, t, y, return_blocks=(3, 1))
    np.testing.assert_allclose(velocity.detach().numpy(), expected, rtol=1e-5, atol=2e-6)
    for found, wanted in zip(tokens, expected_tokens, strict=True):
        np.testing.assert_allclose(found.detach().numpy(), wanted, rtol=1e-5, atol=2e-6)


def test_adaln_zero_makes_blocks_identities_and_the_output_zero():
    model = SiT(TINY)
    x, t, y = torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([1, 5])
    velocity, (first, last) = model(x, t, y, return_blocks=(1, 3))
    assert torch.equal(velocity, torch.zeros_like(x))
    assert torch.equal(first, last)
    assert torch.equal(first, model.x_embedder(x) + model.pos_embed)


def test_returned_blocks_do_not_change_the_velocity():
    model = randomised(TINY)
    x, t, y = torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([1, 5])
    assert torch.equal(model(x, t, y), model(x, t, y, return_blocks=(2,))[0])


def test_tokens_are_the_returned_blocks_of_a_whole_pass():
    model = randomised(TINY)
    x, t, y = torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([1, 5])
    _, blocks = model(x, t, y, return_blocks=(1, 2, 3))
    for depth, tokens in enumerate(blocks, start=1):
        assert torch.equal(model.tokens(x, t, y, depth), tokens)


@pytest.mark.parametrize("every", [1, 2])
def test_blocks_that_are_run_again_give_the_same_gradients_and_keep_less(every):
    x, t, y = torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([1, 5])
    gradients, kept = [], []
    for checkpoint_every in (0, every):
        model = randomised(TINY)
        model.checkpoint_every = checkpoint_every
        tensors = []
        with torch.autograd.graph.saved_tensors_hooks(lambda v, seen=tensors: seen.append(v.numel()) or v, lambda v: v):
            velocity, (tokens,) = model(x, t, y, return_blocks=(2,))
        (velocity.square().mean() + tokens.square().mean()).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        kept.append(sum(tensors))
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
    assert kept[1] < {1: 0.4, 2: 0.8}[every] * kept[0]


def test_samples_of_a_batch_do_not_mix_and_the_null_class_is_its_own():
    model = randomised(TINY)
    x, t = torch.randn(2, 3, 8, 8), torch.rand(2)
    both = model(x, t, torch.tensor([1, 5]))
    torch.testing.assert_close(both[1:], model(x[1:], t[1:], torch.tensor([5])), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(both[1:], model(x[1:], t[1:], torch.tensor([4])))


def test_the_norms_of_heads_are_those_of_timms_attention():
    """Of which REPA's blocks are made."""
    ours = randomised(dataclasses.replace(TINY, qk_norm=True)).blocks[0].attn
    theirs = timm.models.vision_transformer.Attention(
        32, num_heads=4, qkv_bias=True, qk_norm=True, norm_layer=torch.nn.LayerNorm
    )
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 16, 32)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
    plain = SiT(TINY).blocks[0].attn
    plain.load_state_dict({name: value for name, value in ours.state_dict().items() if "_norm" not in name})
    assert not torch.allclose(ours(x), plain(x), atol=1e-3)


def test_the_time_embedding_is_in_float32_under_autocast():
    embedder, t = randomised(TINY).t_embedder, torch.tensor([0.1, 0.5, 0.9])
    with torch.autocast("cpu", torch.bfloat16):
        found = embedder(t)
    assert found.dtype == torch.float32
    assert torch.equal(found, embedder(t))


@pytest.mark.parametrize("qk_norm", [False, True])
def test_tokens_stay_in_bfloat16_under_autocast(qk_norm):
    model = randomised(dataclasses.replace(TINY, qk_norm=qk_norm))
    with torch.autocast("cpu", torch.bfloat16):
        _, tokens = model(torch.randn(1, 3, 8, 8), torch.rand(1), torch.tensor([0]), return_blocks=(1, 2, 3))
    assert [t.dtype for t in tokens] == [torch.bfloat16] * 3


@pytest.mark.parametrize("p", [1, 2, 4])
def test_patches_come_apart_and_together(p):
    x = torch.arange(2 * 3 * 8 * 8.0).view(2, 3, 8, 8)
    tokens = patchify(x, p)
    assert tokens.shape == (2, (8 // p) ** 2, p * p * 3)
    assert torch.equal(unpatchify(tokens, p), x)
    # Token 1 is the second patch of the first row; within it (row, column, channel).
    assert torch.equal(tokens[0, 1], x[0, :, :p, p : 2 * p].permute(1, 2, 0).flatten())


def test_config_round_trip_and_refusals():
    config = SiTConfig.from_name("SiT-XL/2", latent_size=16, in_channels=8, num_classes=3)
    assert SiTConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match=r"XL and PATCH in 1, 2, 4, 8.*found 'SiT-XL/3'"):
        SiTConfig.from_name("SiT-XL/3")
    with pytest.raises(ValueError, match="divisible by the patch side 8, found 4"):
        SiTConfig.from_name("SiT-S/8", latent_size=4)
    for name in set(config.to_dict()) - {"qk_norm"}:  # that came later
        lacking = {key: value for key, value in config.to_dict().items() if key != name}
        with pytest.raises(ValueError, match=rf"^x\.json: damaged, it lacks '{name}'"):
            SiTConfig.from_dict(lacking, "x.json")
    later = {key: value for key, value in config.to_dict().items() if key != "qk_norm"}
    assert SiTConfig.from_dict(later) == config
    with pytest.raises(ValueError, match=r"^x\.json was written by newer code: it has 'registers'"):
        SiTConfig.from_dict(config.to_dict() | {"registers": 4}, "x.json")


def test_a_new_field_of_the_config_reads_old_records_with_its_historic_value():
    registers = dataclasses.field(default=4, metadata={"record": Field(0)})
    newer = dataclasses.make_dataclass("Newer", [("registers", int, registers)], bases=(SiTConfig,), frozen=True)
    old = SiTConfig.from_name("SiT-XL/2").to_dict()
    assert newer.from_dict(old) == newer(**old, registers=0)
    assert newer.from_dict(newer(**old).to_dict()).registers == 4


@pytest.mark.parametrize("layers", range(1, 9))
def test_head_has_the_layers_asked_for(layers):
    head = Projector(12, 7, layers=layers)
    shapes = [tuple(m.weight.shape) for m in head if isinstance(m, torch.nn.Linear)]
    assert len(shapes) == layers
    assert shapes[0][1] == 12
    assert shapes[-1][0] == 7
    assert {shape[0] for shape in shapes[:-1]} <= {24}
    assert head(torch.randn(2, 3, 12)).shape == (2, 3, 7)


@pytest.mark.parametrize("layers", [0, 9])
def test_head_refuses_other_depths(layers):
    with pytest.raises(ValueError, match=f"--align-layers.*found {layers}"):
        Projector(12, 7, layers=layers)


def test_convolutional_head_shows_a_token_its_eight_neighbours():
    head = ConvHead(5, 7).double()
    torch.nn.init.normal_(head.bias)
    tokens = torch.randn(2, 16, 5, dtype=torch.float64)
    found = head(tokens)
    grid = torch.zeros(2, 6, 6, 5, dtype=torch.float64)
    grid[:, 1:5, 1:5] = tokens.view(2, 4, 4, 5)
    for token in range(16):
        row, column = divmod(token, 4)
        around = grid[:, row : row + 3, column : column + 3]  # (2, 3, 3, 5)
        expected = torch.einsum("nrcd,odrc->no", around, head.weight) + head.bias
        torch.testing.assert_close(found[:, token], expected)


def test_head_sees_the_tokens_of_its_block_counted_from_one():
    sit = randomised(TINY)
    x, t, y = torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([1, 5])
    for depth in (1, 2, 3):
        head = Projector(32, TINY.patch_dim)
        velocity, projected = AlignedSiT(sit, {"vae": (depth, head)})(x, t, y)
        h = sit.x_embedder(x) + sit.pos_embed
        c = sit.t_embedder(t) + sit.y_embedder(y)
        for block in sit.blocks[:depth]:
            h = block(h, c)
        torch.testing.assert_close(projected["vae"], head(h))
        assert torch.equal(velocity, sit(x, t, y))


@pytest.mark.parametrize("depth", [0, 4])
def test_depth_outside_the_model_is_refused(depth):
    with pytest.raises(AssertionError, match="outside the backbone"):
        AlignedSiT(SiT(TINY), {"vae": (depth, Projector(32, 12))})


def test_alignment_reaches_the_blocks_up_to_its_depth_and_no_further():
    model = AlignedSiT(randomised(TINY), {"vae": (2, Projector(32, 12))})
    _, projected = model(torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([1, 5]))
    projected["vae"].square().mean().backward()
    reached = [block.attn.qkv.weight.grad is not None for block in model.sit.blocks]
    assert reached == [True, True, False]
    assert model.sit.final_layer.linear.weight.grad is None
