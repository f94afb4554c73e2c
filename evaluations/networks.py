"""Feature networks: images in, the numbers that metrics compare out.

Images are NHWC, uint8 or float32 in 0..255. Features are float32, computed with TF32 and autocast off on any device.
The Inception network is torch-fidelity's port of the ADM suite's TensorFlow graph (github.com/toshas/torch-fidelity,
Apache-2.0), of which nothing else is used.

Shapes: B images of a batch, H x W their size, D the width of a feature.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch_fidelity import FeatureExtractorInceptionV3

from models.tensor_file import read_tensor_file, state_digest
from models.vae import encode_moments, load_vae, vae_digest, vae_factor
from runtime.distributed import allow_tf32, barrier

Device = str | torch.device

INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION = f"{INCEPTION_URL} (95,628,359 bytes, SHA-256 {INCEPTION_SHA256})"
INCEPTION_SIDE = 299
SPATIAL_CHANNELS = 7  # of 192: channels 0..6 of `mixed_6/conv:0`, 17 x 17 x 7 = 2,023 numbers
RANDOM_SEED = 0
DINOV2_MODEL = "vit_large_patch14_dinov2.lvd142m"
DINOV2_SIDE = 224
VAE_GRID = 8


@dataclass(frozen=True)
class FeatureNetwork:
    """A frozen network that turns images into features.

    Attributes:
        name: "inception", "random", "dinov2" or "vae"; part of every result's name.
        digest: SHA-256 of the weights.
        device: where images are sent.
        forward: images (B, H, W, 3) on the device -> {layer: (B, D) float32}.
        old_digest: by which older files of statistics know it.
    """

    name: str
    digest: str
    device: torch.device
    forward: Callable[[Tensor], dict[str, Tensor]]
    old_digest: str | None = None

    @torch.inference_mode()
    def __call__(self, images: Tensor | np.ndarray) -> dict[str, Tensor]:
        """Features by layer, (B, D) float32 on the device, of images (B, H, W, 3) uint8 or floating in 0..255."""
        if isinstance(images, np.ndarray):  # torch wants memory that it could write to
            images = torch.from_numpy(np.require(images, requirements=["C", "W"]))
        if images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(f"expected images (B, H, W, 3), found {tuple(images.shape)}")
        if images.dtype != torch.uint8:
            images = images.float()
        images = images.to(self.device, non_blocking=True)
        with _full_float32(), torch.autocast(self.device.type, enabled=False):
            return self.forward(images)


@contextlib.contextmanager
def _full_float32() -> Iterator[None]:
    """Float32 products without TF32 or bf16 shortcuts, whatever the caller has set; the caller's settings return."""
    matmul, convolution = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    allow_tf32(False)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolution


def load_network(
    name: str,
    *,
    inception_weights: str | None = None,
    dinov2_weights: str | None = None,
    vae: str | None = None,
    device: Device = "cpu",
) -> FeatureNetwork:
    """The network called `name`.

    Args:
        name: "inception", "random" (the same network, seeded weights), "dinov2" or "vae".
        inception_weights: path of the weights; `None` takes torch's cache, and downloads 96 MB there if need be.
        dinov2_weights: path of the weights (.safetensors or .pth); `None` takes them from the hub.
        vae: directory of an AutoencoderKL, or what else `load_vae` reads, for "vae".
        device: where it runs.

    Raises:
        ValueError: unknown name, weights that are missing, cannot be had, or have another digest.
    """
    loaders = {
        "inception": lambda: load_inception(inception_weights, device),
        "random": lambda: load_random_inception(device),
        "dinov2": lambda: load_dinov2(dinov2_weights, device),
        "vae": lambda: load_vae_features(vae, device),
    }
    if name not in loaders:
        raise ValueError(f"expected features {', '.join(loaders)}, found {name}")
    return loaders[name]()


def load_inception(path: str | None = None, device: Device = "cpu", sha256: str = INCEPTION_SHA256) -> FeatureNetwork:
    """The ADM suite's Inception network.

    Nothing of the file is unpickled before its digest has been checked, and then only tensors are.

    Args:
        path: `weights-inception-2015-12-05-6726825d.pth`; `None` takes it from torch's cache, or downloads it.
        device: where it runs.
        sha256: digest that the file must have. Tests give that of their own files.

    Raises:
        ValueError: no such file, another digest, no network.
    """
    path = Path(path) if path else _downloaded_inception()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"expected Inception weights at {path}: {error.strerror}; fix: --inception-weights PATH of {INCEPTION}"
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(f"expected SHA-256 {sha256}, found {found} in {path}; fix: fetch {INCEPTION}")
    state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return inception_from_state("inception", state, digest=found, device=device)


def _downloaded_inception() -> Path:
    """The weights in torch's cache; rank 0 of each machine downloads them if they are not there."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_URL.rsplit("/", 1)[1]
    if not path.exists() and os.environ.get("LOCAL_RANK", "0") == "0":
        path.parent.mkdir(parents=True, exist_ok=True)
        try:  # to a temporary name, renamed when its digest is right
            torch.hub.download_url_to_file(INCEPTION_URL, str(path), hash_prefix=INCEPTION_SHA256, progress=True)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"expected to download {INCEPTION}, found {error}; fix: fetch that file on another machine and "
                "give --inception-weights PATH, or choose --features vae or random"
            ) from error
    barrier()
    return path


def load_random_inception(device: Device = "cpu") -> FeatureNetwork:
    """The Inception network with seeded random weights: the same on every machine, and to be had without any download.

    Its distances tell two sets of images apart, but are on no known scale; never call them FID.
    """
    random = np.random.Generator(np.random.PCG64(RANDOM_SEED))
    state = {}
    for key, value in sorted(build_inception({}).state_dict().items()):
        shape = tuple(value.shape)
        if key.endswith("conv.weight"):  # keeps the scale of the activations through the ReLUs
            drawn = random.standard_normal(shape) * np.sqrt(2.0 / np.prod(shape[1:]))
        elif key == "fc.weight":
            drawn = random.standard_normal(shape) / np.sqrt(shape[1])
        else:  # batch norms that change nothing
            drawn = np.full(shape, float(key.endswith(("bn.weight", "running_var"))))
        state[key] = torch.from_numpy(np.asarray(drawn)).to(value.dtype)
    return inception_from_state("random", state, digest=state_digest(state), device=device)


def inception_from_state(name: str, state: dict[str, Tensor], digest: str, device: Device = "cpu") -> FeatureNetwork:
    """The Inception network called `name` with the weights `state`, which has torch-fidelity's keys."""
    device = torch.device(device)
    network = build_inception(state).to(device)
    return inception_features(name, network, digest, device, static=device.type == "cuda")


def build_inception(state: dict[str, Tensor]) -> FeatureExtractorInceptionV3:
    """torch-fidelity's network, in eval mode, with the weights `state`; `{}` leaves them as initialised.

    Its constructor loads a file by unpickling or downloads one. It is handed an empty dictionary of our own instead,
    and the weights are set afterwards.
    """

    class Network(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict, *args, **kwargs):
            if state_dict:  # the constructor's own call has none
                return super().load_state_dict(state_dict, *args, **kwargs)

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    network = Network("inception", ["2048"], feature_extractor_weights_path=nothing)
    network.load_state_dict(state)
    return network.eval().requires_grad_(False)


_INCEPTION_STEM = (
    "Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 MaxPool_1 Conv2d_3b_1x1 Conv2d_4a_3x3 MaxPool_2 "
    "Mixed_5b Mixed_5c Mixed_5d Mixed_6a Mixed_6b Mixed_6c Mixed_6d Mixed_6e Mixed_7a Mixed_7b Mixed_7c AvgPool"
).split()


def inception_features(
    name: str, network: FeatureExtractorInceptionV3, digest: str, device: torch.device, static: bool = False
) -> FeatureNetwork:
    """The network as features.

    Args:
        static: compile it, channels last, for batches of one size: smaller ones are filled up. For a GPU.
    """
    if static:
        network.to(memory_format=torch.channels_last)
        for module in _INCEPTION_STEM:
            if module != "Mixed_6d":  # out of which features are taken
                getattr(network, module).compile(fullgraph=True, dynamic=False)

    def forward(images: Tensor) -> dict[str, Tensor]:
        spatial = []

        def keep(_module, _inputs, output: Tensor) -> None:
            # (B, 192, 17, 17); stored statistics are in H W C order
            spatial.append(output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1))  # (B, 2023)

        # torch-fidelity's own forward takes no float images, and hands out no spatial features
        x = (resize_like_tensorflow(images, INCEPTION_SIDE) - 128) / 128  # (B, 299, 299, 3)
        x = x.permute(0, 3, 1, 2)  # (B, 3, 299, 299)
        handle = network.Mixed_6d.branch1x1.register_forward_hook(keep)
        try:
            for module in _INCEPTION_STEM:
                x = getattr(network, module)(x)
        finally:
            handle.remove()
        pool = x.flatten(1)  # (B, 2048)
        return {"pool": pool, "spatial": spatial[0], "logits": pool @ network.fc.weight.T}  # logits: (B, 1008)

    return FeatureNetwork(name, digest, device, pad_batch(forward) if static else forward)


def pad_batch(forward: Callable[[Tensor], dict[str, Tensor]]) -> Callable[[Tensor], dict[str, Tensor]]:
    """`forward` for batches of any size, called with one shape alone as long as the first batch is the largest."""
    largest = 0

    def fill(images: Tensor) -> dict[str, Tensor]:  # (B, H, W, 3)
        nonlocal largest
        count, largest = len(images), max(largest, len(images))
        if count < largest:
            images = torch.cat([images, images[:1].expand(largest - count, -1, -1, -1)])
        return {layer: features[:count] for layer, features in forward(images).items()}

    return fill


def resize_like_tensorflow(images: Tensor, side: int) -> Tensor:
    """TensorFlow 1's `resize_bilinear(align_corners=False)`: pixel i of the result lies at i * size / side.

    Neither half-pixel centres nor antialiasing. Columns first, then rows, each as low + (high - low) * weight: the
    order of TensorFlow's kernel, so that results are its own to the last bit.

    Args:
        images: (B, H, W, C), uint8 or float32.
        side: of the result, pixels.

    Returns:
        (B, side, side, C) float32.
    """
    low, high, weight = _neighbors(images.shape[2], side, images.device)
    weight = weight[:, None]  # (side, 1)
    left = images.index_select(2, low).float()  # (B, H, side, C)
    right = images.index_select(2, high).float()
    rows = left + (right - left) * weight  # (B, H, side, C)
    low, high, weight = _neighbors(images.shape[1], side, images.device)
    weight = weight[:, None, None]  # (side, 1, 1)
    top, bottom = rows.index_select(1, low), rows.index_select(1, high)  # (B, side, side, C)
    return top + (bottom - top) * weight


def _neighbors(size: int, side: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For each of `side` results: the two source indices (side,) int64 and the weight of the second (side,) float32."""
    position = torch.arange(side, dtype=torch.float32) * torch.tensor(size / side, dtype=torch.float32)  # (side,)
    low = position.long()
    return low.to(device), (low + 1).clamp(max=size - 1).to(device), (position - low).to(device)


def load_dinov2(path: str | None = None, device: Device = "cpu", model: str = DINOV2_MODEL) -> FeatureNetwork:
    """DINOv2's class token after the last norm, as FD-DINOv2 uses it (Stein et al., 2023): 1,024 numbers for ViT-L/14.

    Bicubic resize to 224 with antialiasing, rounded to whole grey levels as PIL does; ImageNet normalisation. Position
    embeddings are resampled by DINOv2's own rule, which differs from timm's.

    Args:
        path: weights, .safetensors or .pth, with timm's or DINOv2's keys; `None` takes them from the hub.
        device: where it runs.
        model: timm's name.

    Raises:
        ValueError: weights that cannot be read, do not fit, or cannot be downloaded.
    """
    import timm  # 3 s, for this network alone
    from timm.models.vision_transformer import checkpoint_filter_fn

    fix = "fix: --dinov2-weights PATH, with a .safetensors or .pth file of " + model
    try:
        native = timm.create_model(model, pretrained=path is None, num_classes=0)
        if path is not None:
            native.load_state_dict(checkpoint_filter_fn(read_tensor_file(Path(path)), native))
    except Exception as error:  # timm's own errors, the hub's, or those of its HTTP client
        expected = f"weights of {model} in {path}" if path else f"to download {model}"
        raise ValueError(f"expected {expected}, found {_first_line(error)}; {fix}") from error
    state = native.state_dict()
    digest = state_digest(state)
    patch = native.patch_embed.patch_size[0]
    state["pos_embed"] = _resample_positions(state["pos_embed"], DINOV2_SIDE // patch)
    network = timm.create_model(model, num_classes=0, img_size=DINOV2_SIDE)
    network.load_state_dict(state)
    device = torch.device(device)
    network = network.eval().requires_grad_(False).to(device)
    mean = torch.tensor([0.485, 0.456, 0.406], device=device)[:, None, None]  # ImageNet, of 0..1
    std = torch.tensor([0.229, 0.224, 0.225], device=device)[:, None, None]

    def forward(images: Tensor) -> dict[str, Tensor]:
        x = images.permute(0, 3, 1, 2).float()  # (B, 3, H, W)
        x = F.interpolate(x, (DINOV2_SIDE, DINOV2_SIDE), mode="bicubic", antialias=True)  # (B, 3, 224, 224)
        x = x.round().clamp(0, 255) / 255
        return {"pool": network((x - mean) / std)}  # (B, D)

    return FeatureNetwork("dinov2", digest, device, forward)


def _resample_positions(positions: Tensor, grid: int) -> Tensor:
    """DINOv2's `interpolate_pos_encoding`: bicubic without antialiasing, by a factor with 0.1 added to the grid.

    positions (1, 1 + M*M, D), the class token's first -> (1, 1 + grid*grid, D).
    """
    native = round((positions.shape[1] - 1) ** 0.5)
    patches = positions[:, 1:].reshape(1, native, native, -1).permute(0, 3, 1, 2)  # (1, D, M, M)
    patches = F.interpolate(patches.float(), scale_factor=(grid + 0.1) / native, mode="bicubic")  # (1, D, grid, grid)
    return torch.cat([positions[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)


def load_vae_features(name_or_path: str | None, device: Device = "cpu") -> FeatureNetwork:
    """Posterior means of an AutoencoderKL, averaged to a grid of at most 8 x 8: C * 64 numbers for most.

    For offline use: distances in the space of the VAE at hand, comparable only under that VAE.

    Args:
        name_or_path: of an AutoencoderKL, as `load_vae` takes it.
        device: where it runs.

    Raises:
        ValueError: no AutoencoderKL there.
    """
    if not name_or_path:
        raise ValueError("expected a VAE for --features vae, found none; fix: --vae DIRECTORY, with an AutoencoderKL")
    vae = load_vae(name_or_path, device)
    factor = vae_factor(vae)

    def forward(images: Tensor) -> dict[str, Tensor]:  # (B, H, W, 3)
        height, width = images.shape[1:3]
        if height % factor or width % factor:
            raise ValueError(
                f"expected images with sides that the VAE's factor {factor} divides, found {width} x {height}; fix: "
                "another --vae, or --features random"
            )
        means, _ = encode_moments(vae, images).chunk(2, dim=1)  # (B, C, h, w)
        grid = tuple(min(side, VAE_GRID) for side in means.shape[2:])
        return {"pool": F.adaptive_avg_pool2d(means, grid).flatten(1)}  # (B, C * grid * grid)

    return FeatureNetwork("vae", vae_digest(vae), torch.device(device), forward, state_digest(vae.state_dict()))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
