"""What knows the VAE: scale, moments, decoding, loading."""

import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from diffusers import AutoencoderKL
from PIL import Image

import sample_ddp
import sampling.config
import train
from dataset import LatentDataset, read_paths
from diffusion.interpolant import Interpolant
from models.load import load_sit
from models.tensor_file import state_digest
from models.vae import (
    UINT8_RULES,
    UNKNOWN_VAE,
    LatentScale,
    check_vae,
    decode_images,
    decoder_digest,
    encode_moments,
    load_vae,
    scale_from_config,
    to_uint8,
    vae_digest,
    vae_factor,
)
from preprocessing import dump_latents
from sampling.generator import block_noise, sample_latents
from tests.stores import make_vae


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_vae(tmp_path_factory.mktemp("vae") / "vae")


def test_scale_by_channel_and_back():
    scale = LatentScale((0.5, 2.0), (1.0, -1.0))
    f = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    z = scale.scale_latent(f)
    torch.testing.assert_close(z[:, 0], (f[:, 0] - 1) * 0.5)
    torch.testing.assert_close(z[:, 1], (f[:, 1] + 1) * 2)
    torch.testing.assert_close(scale.unscale(z), f)
    assert LatentScale.from_dict(json.loads(json.dumps(scale.to_dict()))) == scale
    one = LatentScale((0.18215,), (0.0,))
    torch.testing.assert_close(one.scale_latent(f), f * 0.18215)


@pytest.mark.parametrize("scale, shift", [((1.0,), (0.0, 0.0)), ((0.0,), (0.0,)), ((), ()), ((-1.0,), (0.0,))])
def test_scales_that_mean_nothing_are_refused(scale, shift):
    with pytest.raises(ValueError, match="positive scales"):
        LatentScale(scale, shift)


def test_moments_are_mean_and_std_for_inputs_in_minus_one_to_one(folder):
    vae = load_vae(str(folder))
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    moments = encode_moments(vae, images)
    assert moments.shape == (2, 8, 8, 8)
    assert moments.dtype == torch.float32
    x = images.double().permute(0, 3, 1, 2) / 255 * 2 - 1
    double = load_vae(str(folder)).double()
    mean, log_variance = double.quant_conv(double.encoder(x)).chunk(2, dim=1)
    torch.testing.assert_close(moments[:, :4].double(), mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moments[:, 4:].double(), (0.5 * log_variance).exp(), rtol=1e-4, atol=1e-5)


def test_decoding_undoes_the_scale_and_rounds_by_the_rule(folder):
    vae, scale = load_vae(str(folder)), LatentScale((0.5,), (0.25,))
    z = torch.randn(2, 4, 8, 8)
    images = decode_images(vae, z, scale)
    assert images.shape == (2, 32, 32, 3)
    assert images.dtype == torch.uint8
    x = vae.decode(z / 0.5 + 0.25).sample.permute(0, 2, 3, 1)
    assert torch.equal(images, torch.floor(torch.clamp(127.5 * x + 128, 0, 255)).to(torch.uint8))


def test_each_rule_of_pixels_is_its_projects():
    """At colours on and beside every pixel's bounds, against numpy."""
    bounds = torch.arange(-20, 276, 0.25)
    x = (bounds / 127.5 - 1).expand(1, 3, 1, -1).contiguous()
    unit = (x.numpy().transpose(0, 2, 3, 1) + 1) / 2
    expected = {
        "floor": np.clip(127.5 * x.numpy().transpose(0, 2, 3, 1) + 128, 0, 255),  # DiT, SiT
        "truncate": np.clip(255 * unit, 0, 255),  # REPA
        "round": np.round(np.clip(unit * 255, 0, 255)),  # JiT
    }
    assert expected.keys() == UINT8_RULES.keys() == set(sampling.config.UINT8_RULES)
    for name, values in expected.items():
        assert np.array_equal(to_uint8(x, UINT8_RULES[name]).numpy(), values.astype(np.uint8))
    assert torch.equal(to_uint8(x), to_uint8(x, UINT8_RULES["floor"]))
    assert len({to_uint8(x, rule).numpy().tobytes() for rule in UINT8_RULES.values()}) == 3


def test_loaded_vaes_are_frozen_and_told_apart_by_their_weights(folder, tmp_path):
    vae = load_vae(str(folder))
    assert not vae.training
    assert not any(parameter.requires_grad for parameter in vae.parameters())
    assert vae_factor(vae) == 4
    digest = vae_digest(vae)
    assert digest == vae_digest(load_vae(str(folder)))
    with torch.no_grad():
        vae.encoder.conv_in.bias[0] += 1e-6
    assert vae_digest(vae) != digest


def test_a_vae_has_a_digest_of_its_encoder_and_one_of_its_decoder(folder):
    """The encoder's tells whose latents they are, so that another decoder may be taken; each knows its config."""
    vae = load_vae(str(folder))
    before = vae_digest(vae), decoder_digest(vae)
    for prefix, changed in (("decoder.", 1), ("post_quant_conv.", 1), ("encoder.", 0), ("quant_conv.", 0)):
        other = load_vae(str(folder))
        with torch.no_grad():
            next(tensor for name, tensor in other.state_dict().items() if name.startswith(prefix)).add_(1e-6)
        found = vae_digest(other), decoder_digest(other)
        assert found[changed] != before[changed]
        assert found[1 - changed] == before[1 - changed]
    for setting, value in (("act_fn", "relu"), ("norm_num_groups", 2)):
        other = load_vae(str(folder))
        other.register_to_config(**{setting: value})
        assert vae_digest(other) != before[0]
        assert decoder_digest(other) != before[1]


def test_records_of_older_code_know_a_vae_by_all_its_weights(folder):
    vae = load_vae(str(folder))
    old = state_digest(vae.state_dict())
    assert check_vae(vae, "x", old) == old
    with torch.no_grad():
        vae.encoder.conv_in.bias[0] += 1e-6
    with pytest.raises(ValueError, match="expected the VAE of the checkpoint"):
        check_vae(vae, "x", old)


def test_another_vae_than_the_recorded_one_is_refused(folder):
    vae = load_vae(str(folder))
    digest = vae_digest(vae)
    assert check_vae(vae, "x", digest, resolution=32, latent_shape=(4, 8, 8)) == digest
    assert check_vae(vae, "x", UNKNOWN_VAE) == digest
    with pytest.raises(
        ValueError, match=r"^--vae: expected the VAE of the store \(digest f{12}\.\.\.\), found .* in x "
    ):
        check_vae(vae, "x", "f" * 64, "the store")
    for resolution, shape in ((64, (4, 8, 8)), (32, (8, 8, 8)), (32, (4, 16, 16))):
        with pytest.raises(ValueError, match=r"^--vae: expected images of side .* with x; it is not the VAE of"):
            check_vae(vae, "x", UNKNOWN_VAE, resolution=resolution, latent_shape=shape)


def test_the_vae_of_a_whole_pipeline_is_found(tmp_path, folder):
    make_vae(tmp_path / "pipeline" / "vae")
    assert vae_digest(load_vae(str(tmp_path / "pipeline"))) == vae_digest(load_vae(str(folder)))


def test_scale_comes_from_the_config(folder):
    vae = load_vae(str(folder))
    assert scale_from_config(vae) == LatentScale((0.9,), (0.0,))
    vae.register_to_config(shift_factor=0.1)
    assert scale_from_config(vae) == LatentScale((0.9,), (0.1,))
    vae.register_to_config(latents_mean=[0.0, 1.0, 2.0, 3.0], latents_std=[1.0, 2.0, 4.0, 8.0])
    assert scale_from_config(vae) == LatentScale((1.0, 0.5, 0.25, 0.125), (0.0, 1.0, 2.0, 3.0))
    vae.register_to_config(latents_mean=[[[[0.0]], [[1.0]], [[2.0]], [[3.0]]]], latents_std=[1.0, 2.0, 4.0, 8.0])
    assert scale_from_config(vae) == LatentScale((1.0, 0.5, 0.25, 0.125), (0.0, 1.0, 2.0, 3.0))
    vae.register_to_config(latents_mean=[0.0], latents_std=[1.0])
    with pytest.raises(ValueError, match=r"--vae: expected .* of 4 channels .*found 1 and 1 numbers; use --scale auto"):
        scale_from_config(vae)


@pytest.fixture
def _fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


@pytest.mark.usefixtures("_fresh_accelerate")
@pytest.mark.parametrize("by_channel", [True, False])
def test_a_vae_of_32_channels_from_images_to_images(tmp_path, by_channel):
    """Of the shape of REPA-E's, 16 pixels to a latent: dumped, scaled, trained on with patch 1, decoded."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 5,
        up_block_types=("UpDecoderBlock2D",) * 5,
        block_out_channels=(8,) * 5,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=32,
        scaling_factor=0.3,
        use_quant_conv=by_channel,
        use_post_quant_conv=by_channel,
    )
    mean, std = np.linspace(-1, 1, 32), np.linspace(0.2, 3, 32)
    if by_channel:
        vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    vae.save_pretrained(tmp_path / "vae")
    rng = np.random.default_rng(0)
    for k in range(6):
        (tmp_path / "images" / "ab"[k % 2]).mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
        picture.save(tmp_path / "images" / "ab"[k % 2] / f"{k}.png")

    dump_latents.main(
        f"--source {tmp_path / 'images'} --output-dir {tmp_path / 'store'} --resolution 64 --num-workers 0 "
        f"--vae {tmp_path / 'vae'}".split()
    )
    store = LatentDataset(tmp_path / "store")
    assert store.latent_shape == (32, 4, 4)
    scale = (1 / std, mean) if by_channel else ([0.3], [0.0])
    np.testing.assert_allclose((store.scale.scale, store.scale.shift), scale)
    crops = np.stack([np.asarray(Image.open(tmp_path / "images" / path)) for path in read_paths(tmp_path / "store")])
    with torch.no_grad():
        f = vae.eval().encode(torch.from_numpy(crops).permute(0, 3, 1, 2) / 127.5 - 1).latent_dist.mean
    torch.testing.assert_close(store.__getitems__([*range(6)])["moments"][:, :32], f, rtol=1e-4, atol=1e-5)

    flags = f"--data-dir {tmp_path / 'store'} --output-dir {tmp_path} --exp-name run --model SiT-Ti/1 --batch-size 2 "
    flags += "--max-train-steps 1 --num-workers 0 --sampling-steps 1 --sampling-num-steps 1 --sampling-count 2"
    far = pytest.warns(UserWarning, match="std near 1, found 0.3.*--align-normalize sample")
    with nullcontext() if by_channel else far:
        train.main(flags.split())
    sit, _ = load_sit(tmp_path / "run")
    assert (sit.config.patch_size, sit.config.in_channels, sit.config.num_tokens) == (1, 32, 16)
    sample_ddp.main(
        f"--checkpoint {tmp_path / 'run'} --output-dir {tmp_path / 'drawn'} --num-samples 3 --sampler ode-euler "
        "--num-steps 2 --per-proc-batch-size 16 --guidance-scale 1".split()
    )
    with np.load(tmp_path / "drawn" / "samples.npz") as archive:
        images, labels = archive["arr_0"], archive["arr_1"]
    y = torch.from_numpy(np.resize(labels, 16))
    z = sample_latents(sit, y, block_noise(0, 0, 16, (32, 4, 4), "cpu"), "ode-euler", 2, Interpolant())[:3]
    f = z * torch.from_numpy(std).view(-1, 1, 1) + torch.from_numpy(mean).view(-1, 1, 1) if by_channel else z / 0.3
    with torch.no_grad():
        x = vae.decode(f.float()).sample.permute(0, 2, 3, 1).numpy()
    assert np.abs(images - np.clip(127.5 * x + 127.5, 0, 255)).max() < 0.51


def test_an_absent_hub_is_named_at_once_without_a_warning(monkeypatch, recwarn):
    monkeypatch.setattr("models.vae.hub_is_reachable", lambda: False)
    with pytest.raises(
        ValueError, match=r"^--vae.*\(the hub cannot be reached\); without a network give a local directory"
    ):
        load_vae("stabilityai/sd-vae-ft-mse")
    assert not recwarn.list


def test_what_cannot_be_loaded_names_the_flag(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    for name in ("stabilityai/sd-vae-ft-mse", str(tmp_path / "absent"), str(tmp_path), str(tmp_path / "other")):
        with pytest.raises(ValueError, match=r"--vae.*local directory") as error:
            load_vae(name)
        assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_full_size_sd_vae_gives_8_x_32_x_32_moments(tmp_path):
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        sample_size=256,
    )
    assert round(sum(p.numel() for p in vae.parameters()) / 1e6) == 84
    vae.save_pretrained(tmp_path / "vae")
    vae = load_vae(str(tmp_path / "vae"))
    assert vae_factor(vae) == 8
    moments = encode_moments(vae, torch.randint(0, 256, (1, 256, 256, 3), dtype=torch.uint8))
    assert moments.shape == (1, 8, 32, 32)
    assert (moments[:, 4:] > 0).all()
