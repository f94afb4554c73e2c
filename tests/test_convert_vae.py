"""Autoencoders of latent diffusion's layout against a forward written here from that layout."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from models.vae import LatentScale, decode_images, encode_moments, load_vae, scale_from_config, vae_factor


def ldm_state(ch, mult, blocks, attention, z, middle=True, seed=0):
    """Random weights with the keys of the layout; `attention` holds the levels that have it."""
    generator = torch.Generator().manual_seed(seed)
    state = {}

    def layer(name, shape):
        state[f"{name}.weight"] = (
            torch.randn(shape, generator=generator) / max(1, torch.tensor(shape[1:]).prod()) ** 0.5
        )
        state[f"{name}.bias"] = 0.1 * torch.randn(shape[0], generator=generator)

    def norm(name, channels):
        layer(name, (channels,))
        state[f"{name}.weight"] = 1 + 0.3 * torch.randn(channels, generator=generator)

    def block(name, before, after):
        norm(f"{name}.norm1", before)
        layer(f"{name}.conv1", (after, before, 3, 3))
        norm(f"{name}.norm2", after)
        layer(f"{name}.conv2", (after, after, 3, 3))
        if before != after:
            layer(f"{name}.nin_shortcut", (after, before, 1, 1))

    def attend(name, channels):
        norm(f"{name}.norm", channels)
        for part in ("q", "k", "v", "proj_out"):
            layer(f"{name}.{part}", (channels, channels, 1, 1))

    def mid(half, channels):
        block(f"{half}.mid.block_1", channels, channels)
        if middle:
            attend(f"{half}.mid.attn_1", channels)
        block(f"{half}.mid.block_2", channels, channels)

    last = len(mult) - 1
    layer("encoder.conv_in", (ch, 3, 3, 3))
    before = ch
    for i, factor in enumerate(mult):
        for j in range(blocks):
            block(f"encoder.down.{i}.block.{j}", before, ch * factor)
            before = ch * factor
            if i in attention:
                attend(f"encoder.down.{i}.attn.{j}", before)
        if i < last:
            layer(f"encoder.down.{i}.downsample.conv", (before, before, 3, 3))
    mid("encoder", before)
    norm("encoder.norm_out", before)
    layer("encoder.conv_out", (2 * z, before, 3, 3))
    layer("quant_conv", (2 * z, 2 * z, 1, 1))
    layer("post_quant_conv", (z, z, 1, 1))
    layer("decoder.conv_in", (before, z, 3, 3))
    mid("decoder", before)
    for i in reversed(range(len(mult))):
        for j in range(blocks + 1):
            block(f"decoder.up.{i}.block.{j}", before, ch * mult[i])
            before = ch * mult[i]
            if i in attention:
                attend(f"decoder.up.{i}.attn.{j}", before)
        if i > 0:
            layer(f"decoder.up.{i}.upsample.conv", (before, before, 3, 3))
    norm("decoder.norm_out", before)
    layer("decoder.conv_out", (3, before, 3, 3))
    return state


class Reference:
    """The layout's own forward."""

    def __init__(self, state):
        self.state = {name: tensor.double() for name, tensor in state.items()}

    def conv(self, name, x, **options):
        return F.conv2d(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"], **options)

    def norm(self, name, x):
        N, C, H, W = x.shape
        groups = x.reshape(N, 32, -1)
        mean, variance = groups.mean(-1, keepdim=True), groups.var(-1, correction=0, keepdim=True)
        x = ((groups - mean) / (variance + 1e-6).sqrt()).reshape(N, C, H, W)
        return x * self.state[f"{name}.weight"][:, None, None] + self.state[f"{name}.bias"][:, None, None]

    def block(self, name, x):
        h = self.norm(f"{name}.norm1", x)
        h = self.conv(f"{name}.conv1", h * torch.sigmoid(h), padding=1)
        h = self.norm(f"{name}.norm2", h)
        h = self.conv(f"{name}.conv2", h * torch.sigmoid(h), padding=1)
        return (self.conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in self.state else x) + h

    def attend(self, name, x):
        if f"{name}.q.weight" not in self.state:
            return x
        N, C, H, W = x.shape
        h = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", h).flatten(2) for part in "qkv")
        weights = (torch.einsum("ncq,nck->nqk", q, k) / C**0.5).softmax(dim=2)
        return x + self.conv(f"{name}.proj_out", torch.einsum("nqk,nck->ncq", weights, v).reshape(N, C, H, W))

    def mid(self, half, x):
        x = self.attend(f"{half}.mid.attn_1", self.block(f"{half}.mid.block_1", x))
        return self.block(f"{half}.mid.block_2", x)

    def moments(self, x):
        x = self.conv("encoder.conv_in", x, padding=1)
        i = 0
        while f"encoder.down.{i}.block.0.conv1.weight" in self.state:
            j = 0
            while f"encoder.down.{i}.block.{j}.conv1.weight" in self.state:
                x = self.attend(f"encoder.down.{i}.attn.{j}", self.block(f"encoder.down.{i}.block.{j}", x))
                j += 1
            if f"encoder.down.{i}.downsample.conv.weight" in self.state:
                x = self.conv(f"encoder.down.{i}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
            i += 1
        x = self.norm("encoder.norm_out", self.mid("encoder", x))
        mean, logarithm = self.conv("quant_conv", self.conv("encoder.conv_out", x * x.sigmoid(), padding=1)).chunk(2, 1)
        return torch.cat([mean, (0.5 * logarithm.clamp(-30, 20)).exp()], dim=1)

    def image(self, z):
        x = self.mid("decoder", self.conv("decoder.conv_in", self.conv("post_quant_conv", z), padding=1))
        levels = len({name.split(".")[2] for name in self.state if name.startswith("decoder.up.")})
        for i in reversed(range(levels)):
            j = 0
            while f"decoder.up.{i}.block.{j}.conv1.weight" in self.state:
                x = self.attend(f"decoder.up.{i}.attn.{j}", self.block(f"decoder.up.{i}.block.{j}", x))
                j += 1
            if i > 0:
                x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
                x = self.conv(f"decoder.up.{i}.upsample.conv", x, padding=1)
        x = self.norm("decoder.norm_out", x)
        return self.conv("decoder.conv_out", x * x.sigmoid(), padding=1)


SMALL = {"ch": 32, "mult": (1, 2, 2), "blocks": 2, "attention": (2,), "z": 4}


@pytest.mark.parametrize(
    "shape",
    [SMALL, {**SMALL, "attention": ()}, {**SMALL, "attention": (1, 2), "blocks": 1}, {**SMALL, "middle": False}],
    ids=["last level", "no attention", "two levels", "no middle"],
)
def test_a_converted_autoencoder_is_the_layouts_own_forward(shape, tmp_path):
    state = ldm_state(**shape)
    save_file(state, tmp_path / "vae.safetensors")
    vae, reference = load_vae(str(tmp_path / "vae.safetensors")).double(), Reference(state)
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
        found = torch.cat([posterior.mean, posterior.std], dim=1)
        torch.testing.assert_close(found, reference.moments(images), rtol=1e-5, atol=1e-6)
        z = torch.randn(2, 4, 4, 4, dtype=torch.float64)
        torch.testing.assert_close(vae.decode(z).sample, reference.image(z), rtol=1e-5, atol=1e-6)
    assert scale_from_config(vae) == LatentScale((1.0,), (0.0,))


@pytest.mark.parametrize("prefix", ["", "module.", "module.first_stage_model."])
@pytest.mark.parametrize("suffix", ["pt", "ckpt", "safetensors"])
def test_load_vae_takes_a_file(prefix, suffix, tmp_path):
    state = ldm_state(**SMALL)
    content = {prefix + name: value for name, value in state.items()}
    content |= {"loss.discriminator.encoder.conv_in.weight": torch.zeros(3)}
    content |= {"loss.discriminator.main.0.weight": torch.zeros(3), "foundation_model.blocks.0.weight": torch.zeros(2)}
    file = tmp_path / f"vae.{suffix}"
    if suffix == "safetensors":
        save_file(content, file)
    else:
        torch.save({"state_dict": content, "epoch": 3} if suffix == "ckpt" else content, file)
    vae = load_vae(str(file))
    assert vae.dtype == torch.float32
    assert not vae.training
    images = torch.randint(0, 256, (1, 16, 16, 3), dtype=torch.uint8)
    moments = encode_moments(vae, images)
    expected = Reference(state).moments(images.permute(0, 3, 1, 2).double() / 127.5 - 1)
    torch.testing.assert_close(moments.double(), expected, rtol=1e-3, atol=1e-4)
    assert decode_images(vae, moments[:, :4], LatentScale((1.0,), (0.0,))).shape == (1, 16, 16, 3)


@pytest.mark.slow
def test_va_vae_at_full_size_gives_32_channels_at_a_sixteenth(tmp_path):
    save_file(ldm_state(ch=128, mult=(1, 1, 2, 2, 4), blocks=2, attention=(4,), z=32), tmp_path / "vae.safetensors")
    vae = load_vae(str(tmp_path / "vae.safetensors"))
    assert vae_factor(vae) == 16
    assert list(vae.config.block_out_channels) == [128, 128, 256, 256, 512]
    moments = encode_moments(vae, torch.zeros(1, 64, 64, 3, dtype=torch.uint8))
    assert moments.shape == (1, 64, 4, 4)


class Dangerous:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_what_is_no_such_autoencoder_is_named(tmp_path):
    def refused(content):
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(ValueError, match=r"--vae .*a\.pt") as error:
            load_vae(str(tmp_path / "a.pt"))
        assert "\n" not in str(error.value)
        return str(error.value)

    state = ldm_state(**SMALL)
    assert "expected an autoencoder in latent diffusion's layout" in refused({"w": torch.zeros(2)})
    assert "found a list" in refused([1])
    assert "cannot be read as such" in refused({"state_dict": state, "hook": Dangerous(tmp_path / "ran")})
    assert not (tmp_path / "ran").exists()
    assert "expected channels in 32 groups" in refused(ldm_state(48, (1, 1), 1, (), 4))
    down = {name: value for name, value in state.items() if not name.startswith("encoder.down")}
    assert "(with encoder.down.0.block.0.conv1.weight)" in refused(down)
    assert "found diffusers'; give its directory" in refused(
        {"encoder.down_blocks.0.resnets.0.conv1.weight": torch.zeros(1)}
    )
    lacking = {name: value for name, value in state.items() if name != "decoder.up.1.block.2.conv2.bias"}
    assert "decoder.up_blocks.1.resnets.2.conv2.bias is absent, there (64,)" in refused(lacking)
    half = {name: value for name, value in state.items() if not name.startswith("encoder.down.2.attn.1")}
    assert "encoder.down_blocks.2.attentions.1" in refused(half)  # attention behind some blocks of a level only
    (tmp_path / "a.pt").write_bytes(b"garbage")
    with pytest.raises(ValueError, match="cannot be read as such"):
        load_vae(str(tmp_path / "a.pt"))
