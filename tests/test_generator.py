"""The sample generator: latents are those of the solver by name, noise and labels are those of the image's number."""

import copy

import numpy as np
import pytest
import torch

from diffusion.guidance import guided_velocity
from diffusion.interpolant import Interpolant
from diffusion.samplers import sample_dopri5, sample_ode, sample_sde
from models.sit import SiT, SiTConfig
from models.vae import LatentScale, decode_images, load_vae
from sampling.config import BLOCK, SAMPLERS
from sampling.generator import block_noise, cast_weights, decode_latents, draw_labels, put_on_device, sample_latents
from tests.stores import make_vae

K, SCALE, PATH = 5, LatentScale((0.9,), (0.1,)), Interpolant("linear")


@pytest.fixture(scope="module")
def sit():
    """None of its weights is zero."""
    torch.manual_seed(0)
    sit = SiT(SiTConfig(2, 32, 2, patch_size=2, latent_size=4, in_channels=4, num_classes=K))
    for parameter in sit.eval().requires_grad_(False).parameters():
        parameter.normal_(std=0.15)
    return sit


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return load_vae(str(make_vae(tmp_path_factory.mktemp("made") / "vae")))


def noise():
    return block_noise(0, 0, BLOCK, (4, 4, 4), "cpu")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_latents_are_those_of_the_named_solver(sit, sampler):
    y = torch.arange(BLOCK) % K
    z = sample_latents(sit, y, noise(), sampler, 3, PATH, 2.5, (0.1, 0.9), 0.1)
    velocity, draw = guided_velocity(sit, y, K, 2.5, (0.1, 0.9)), noise()
    if sampler == "ode-dopri5":
        expected = sample_dopri5(velocity, draw())
    elif sampler == "sde":
        expected = sample_sde(velocity, draw(), 3, draw, PATH, 0.1)
    else:
        expected = sample_ode(velocity, draw(), 3, heun=sampler != "ode-euler", repa=sampler == "ode-heun-repa")
    assert torch.equal(z, expected)
    assert z.dtype == torch.float64
    assert not torch.equal(z, sample_latents(sit, y, noise(), sampler, 3, PATH, 2.5, (0.1, 0.9), 0.1, torch.bfloat16))


@pytest.mark.parametrize("sampler", ["euler", "SDE", "", "ode-rk4"])
def test_an_unknown_sampler_is_refused(sit, sampler):
    with pytest.raises(ValueError, match=f"expected a sampler among sde, ode-euler, ode-heun, .*found '{sampler}'"):
        sample_latents(sit, torch.zeros(BLOCK, dtype=torch.int64), noise(), sampler, 3, PATH)


def test_each_block_is_integrated_by_itself(sit):
    """Alone, or beside a block that needs other steps: the same bits. Not so if a batch shared its steps."""
    y = torch.arange(2 * BLOCK) % K
    both = block_noise(0, 0, 2 * BLOCK, (4, 4, 4), "cpu")()
    z = sample_latents(sit, y, lambda: both, "ode-dopri5", 1, PATH, 2.0, atol=1e-4)
    for part in (slice(BLOCK), slice(BLOCK, None)):
        alone = sample_latents(sit, y[part], lambda part=part: both[part], "ode-dopri5", 1, PATH, 2.0, atol=1e-4)
        assert torch.equal(z[part], alone)
    louder = torch.cat([both[:BLOCK], 20 * both[BLOCK:]])
    beside = sample_latents(sit, y, lambda: louder, "ode-dopri5", 1, PATH, 2.0, atol=1e-4)
    assert torch.equal(z[:BLOCK], beside[:BLOCK])
    shared = sample_dopri5(guided_velocity(sit, y, K, 2.0, (0.0, 1.0)), louder, atol=1e-4)
    assert not torch.equal(z[:BLOCK], shared[:BLOCK])


def test_images_are_decoded_in_whole_blocks(vae):
    z = torch.randn(40, 4, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images, finite = decode_latents(vae, z, SCALE)
    assert (images.shape, images.dtype, finite.tolist()) == ((40, 16, 16, 3), torch.uint8, [True] * 40)
    blocks = (z[:16], z[16:32], torch.cat([z[32:], z[-1:].expand(8, -1, -1, -1)]))
    expected = torch.cat([decode_images(vae, block.float(), SCALE) for block in blocks])[:40]
    assert torch.equal(images, expected)
    z[17, 0, 0, 0] = torch.nan
    images, finite = decode_latents(vae, z, SCALE)
    assert (~finite).nonzero().flatten().tolist() == [17]
    assert torch.equal(images[finite], expected[finite])


def test_noise_depends_on_the_images_number_alone():
    for_large = block_noise(3, 48, 48, (4, 4, 4), "cpu")
    for_small = [block_noise(3, first, 16, (4, 4, 4), "cpu") for first in (48, 64, 80)]
    for step in range(3):
        assert torch.equal(for_large(step), torch.cat([noise(step) for noise in for_small]))


def test_balanced_labels_are_rounds_that_are_shuffled_each_for_itself():
    classes = np.arange(10, 17)
    labels = draw_labels("balanced", classes, 0, 0, 70)
    rounds = labels.reshape(10, 7)
    assert (np.sort(rounds, axis=1) == classes).all()
    assert len(np.unique(rounds, axis=0)) == 10
    assert not np.array_equal(labels, draw_labels("balanced", classes, 1, 0, 70))
    assert (np.bincount(draw_labels("balanced", np.arange(1000), 0, 0, 50_000)) == 50).all()


def test_random_labels_are_fair_draws_of_the_classes():
    labels = draw_labels("random", np.array([2, 5, 9]), 0, 0, 30_000)
    assert set(labels) == {2, 5, 9}
    assert np.abs(np.bincount(labels)[[2, 5, 9]] - 10_000).max() < 400  # five standard deviations
    assert not np.array_equal(labels[:100], draw_labels("random", np.array([2, 5, 9]), 1, 0, 100))


@pytest.mark.parametrize("rule", ["random", "balanced"])
def test_a_label_depends_on_seed_and_number_alone(rule):
    classes = np.arange(7)
    labels = draw_labels(rule, classes, 4, 0, 200)
    for first, count in ((0, 1), (16, 16), (5, 40), (48, 152), (199, 1), (0, 7)):
        assert np.array_equal(draw_labels(rule, classes, 4, first, count), labels[first : first + count])


@pytest.mark.parametrize("qk_norm", [False, True])
def test_weights_that_are_cast_once_give_the_bits_of_those_that_autocast_casts(qk_norm):
    torch.manual_seed(0)
    sit = SiT(SiTConfig(2, 32, 2, patch_size=2, latent_size=4, in_channels=4, num_classes=K, qk_norm=qk_norm)).eval()
    for parameter in sit.requires_grad_(False).parameters():
        parameter.normal_(std=0.3)
    cast = copy.deepcopy(sit)
    cast_weights(cast)
    x, y = torch.randn(BLOCK, 4, 4, 4, dtype=torch.float64), torch.arange(BLOCK) % K
    velocities = [guided_velocity(model, y, K, 2.0, (0.0, 0.7), torch.bfloat16) for model in (sit, cast)]
    for t in (0.3, 0.9):
        before, after = (velocity(x, t) for velocity in velocities)
        assert torch.equal(before, after)
        assert not torch.equal(before, guided_velocity(sit, y, K, 2.0, (0.0, 0.7))(x, t))
    kept = {name for name, weight in cast.named_parameters() if weight.dtype == torch.float32}
    assert all(name.startswith(("t_embedder", "y_embedder")) or "_norm" in name for name in kept)
    assert cast.blocks[0].mlp.fc1.weight.dtype == cast.final_layer.linear.bias.dtype == torch.bfloat16


def test_weights_are_cast_where_the_network_computes_in_bf16(sit, vae):
    for precision, dtype in (("no", torch.float32), ("bf16", torch.bfloat16)):
        models = copy.deepcopy(sit), copy.deepcopy(sit)
        put_on_device(models[0], vae, torch.device("cpu"), mixed_precision=precision, guide=models[1])
        assert {model.blocks[0].attn.qkv.weight.dtype for model in models} == {dtype}
