"""Feature networks, their statistics, and `evaluate.py` as a user runs it."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluations import evaluate, networks
from evaluations.evaluator import Evaluation, Settings
from evaluations.feature_stats import FeatureStatistics
from evaluations.images import open_images
from evaluations.metrics import frechet_distance, inception_score, precision_recall
from evaluations.networks import FeatureNetwork
from runtime import cli
from tests.golden import adm_golden

ROOT = Path(__file__).resolve().parent.parent
SEED = adm_golden.EXPECTED["weights_seed"]


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    shapes = {key: value.shape for key, value in networks.build_inception({}).state_dict().items()}
    return {key: torch.from_numpy(value) for key, value in adm_golden.inception_state(shapes, SEED).items()}


@pytest.fixture(scope="module")
def inception(weights) -> FeatureNetwork:
    return networks.inception_from_state("inception", weights, digest="seed 20")


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return adm_golden.images(5, 64, 31)


def features_of(batches: list[np.ndarray], network: FeatureNetwork) -> list[np.ndarray]:
    """Pool features (N, 2048), spatial features (N, 2023) and logits (N, 1008) of all images."""
    layers = ("pool", "spatial", "logits")
    statistics = FeatureStatistics(network, keep=layers)
    for batch in batches:
        statistics.update(batch)
    return [statistics.kept(layer) for layer in layers]


def golden_features(case: dict, network: FeatureNetwork) -> list[list[np.ndarray]]:
    sets = (adm_golden.images(**case[side]) for side in ("reference", "samples"))
    return [features_of(np.split(images, range(32, len(images), 32)), network) for images in sets]


@pytest.mark.parametrize("name", ["64px", pytest.param("256px", marks=pytest.mark.slow)])
def test_every_value_of_the_original_program(name, inception):
    case = adm_golden.EXPECTED["cases"][name]
    reference, samples = golden_features(case, inception)
    pool, spatial, logits = samples
    count = case["samples"]["count"]
    assert (pool.shape, spatial.shape, logits.shape) == ((count, 2048), (count, case["spatial_width"]), (count, 1008))
    assert pool.dtype == spatial.dtype == logits.dtype == np.float32
    for layer, found, tolerance in (("pool", pool, 1e-5), ("spatial", spatial, 1e-4)):
        largest = np.abs(found).max()
        np.testing.assert_allclose(found[0, :8], case[f"{layer}_row0_first8"], atol=tolerance * largest)
        assert found.mean() == pytest.approx(case[f"{layer}_mean"], rel=1e-5)
        assert found.std() == pytest.approx(case[f"{layer}_std"], rel=1e-5)
    assert inception_score(logits) == pytest.approx(case["inception_score"], rel=1e-5)
    assert inception_score(logits, 50) == pytest.approx(case["inception_score_split50"], rel=1e-5)
    moments = [(x.mean(axis=0, dtype=np.float64), np.cov(x, rowvar=False)) for x in (*reference[:2], *samples[:2])]
    assert frechet_distance(*moments[0], *moments[2]) == pytest.approx(case["fid"], rel=1e-4)
    assert frechet_distance(*moments[1], *moments[3]) == pytest.approx(case["sfid"], rel=1e-4)
    found = precision_recall(reference[0], pool)
    np.testing.assert_allclose(found, (case["precision"], case["recall"]), atol=0.005)


def test_pool_logits_and_spatial_features_are_those_of_torch_fidelitys_own_forward(weights, pictures):
    """The hook's layer, range and order too, taken from the outside."""
    module = networks.build_inception(weights)
    module.features_list = ["2048", "logits_unbiased"]
    outputs = []
    module.Mixed_6d.branch1x1.bn.register_forward_hook(lambda *args: outputs.append(args[2].clone().relu()))
    expected = module(torch.from_numpy(pictures).permute(0, 3, 1, 2))
    spatial = [outputs[0][:, channel, row, column] for row in range(17) for column in range(17) for channel in range(7)]
    network = networks.inception_features("inception", module, digest="", device=torch.device("cpu"))
    found = features_of([pictures], network)
    for value, wanted in zip(found, (expected[0], torch.stack(spatial, dim=1), expected[1]), strict=True):
        np.testing.assert_allclose(value, wanted.numpy(), rtol=0, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (256, 256), (512, 512), (48, 80)])
def test_resize_is_tensorflow_1_bilinear_bit_by_bit(size):
    image = adm_golden.images(1, max(size), 32)[0, : size[0], : size[1]]
    side, f = 299, np.float32
    expected = np.empty((side, side, 3), dtype=np.float32)
    for i in range(side):
        y = f(i) * f(size[0] / side)
        top, dy = int(y), y - f(int(y))
        bottom = min(top + 1, size[0] - 1)
        for j in range(side):
            x = f(j) * f(size[1] / side)
            left, dx = int(x), x - f(int(x))
            right = min(left + 1, size[1] - 1)
            a, b, c, d = (image[p].astype(f) for p in ((top, left), (top, right), (bottom, left), (bottom, right)))
            upper, lower = a + (b - a) * dx, c + (d - c) * dx
            expected[i, j] = upper + (lower - upper) * dy
    found = networks.resize_like_tensorflow(torch.from_numpy(image)[None], side)[0]
    np.testing.assert_array_equal(found.numpy(), expected)


def test_batch_size_changes_rounding_alone(inception, pictures):
    whole = features_of([pictures], inception)
    for sizes in ([1], [1, 4]):
        for value, wanted in zip(features_of(np.split(pictures, sizes), inception), whole, strict=True):
            np.testing.assert_allclose(value, wanted, atol=1e-5 * np.abs(wanted).max())
    with pytest.raises(ValueError, match="expected images, found none"):
        features_of([], inception)
    with pytest.raises(ValueError, match=r"\(B, H, W, 3\), found"):
        inception(pictures.transpose(0, 3, 1, 2))


def test_features_ignore_and_restore_the_callers_precision(inception, pictures):
    expected = inception(pictures[:2])["pool"]
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    seen = []
    network = FeatureNetwork(
        "x",
        "",
        torch.device("cpu"),
        lambda images: (
            seen.append(
                (
                    torch.get_float32_matmul_precision(),
                    torch.backends.cudnn.allow_tf32,
                    torch.is_autocast_enabled("cpu"),
                )
            )
            or {}
        ),
    )
    try:
        with torch.autocast("cpu", torch.bfloat16):
            network(pictures)
            found = inception(pictures[:2])["pool"]
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == [("highest", False, False)]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_float_images_are_not_rounded(inception, pictures):
    exact = inception(pictures[:1].astype(np.float64))["pool"]
    torch.testing.assert_close(exact, inception(pictures[:1])["pool"], rtol=0, atol=0)
    assert (inception(pictures[:1] + np.float32(0.4))["pool"] != exact).any()


# Weights


class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_weights_are_loaded_by_digest_and_never_unpickled(weights, pictures, inception, tmp_path):
    file = tmp_path / "weights.pth"
    torch.save(weights, file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    network = networks.load_inception(str(file), sha256=digest)
    assert network.digest == digest
    torch.testing.assert_close(network(pictures[:1])["pool"], inception(pictures[:1])["pool"])
    with pytest.raises(ValueError, match=f"SHA-256 6726825d.*found {digest}"):
        networks.load_inception(str(file))
    trap = tmp_path / "trap"
    file.write_bytes(pickle.dumps(RunsCode(str(trap)), protocol=2))
    with pytest.raises(ValueError, match="expected SHA-256"):
        networks.load_inception(str(file))
    with pytest.raises(pickle.UnpicklingError):
        networks.load_inception(str(file), sha256=hashlib.sha256(file.read_bytes()).hexdigest())
    assert not trap.exists()
    with pytest.raises(ValueError, match=r"--inception-weights PATH of https://.*95,628,359 bytes, SHA-256 6726825d"):
        networks.load_inception(str(tmp_path / "none.pth"))


def test_without_network_the_way_out_is_named(monkeypatch, tmp_path):
    def offline(url, path, hash_prefix, progress):
        assert (url, hash_prefix) == (networks.INCEPTION_URL, networks.INCEPTION_SHA256)
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(ValueError, match="--inception-weights PATH, or choose --features vae or random"):
        networks.load_inception()


def test_published_values_with_the_true_weights_and_files():
    """ADM-G-U at 256: ADM_FILES names a directory with weights, reference and samples, by their own names."""
    directory = os.environ.get("ADM_FILES")
    if not directory:
        pytest.skip("the true weights and ADM's files are not at hand: set ADM_FILES to their directory")
    network = networks.load_inception(str(Path(directory) / networks.INCEPTION_URL.rsplit("/", 1)[1]))
    evaluation = Evaluation([network], str(Path(directory) / "VIRTUAL_imagenet256_labeled.npz"), Settings())
    source = open_images(str(Path(directory) / "admnet_guided_upsampled_imagenet256.npz"))
    evaluation.measure(evaluation.samples, source, "samples")
    found = evaluation.finish()
    values = {"is": 215.837, "fid": 3.94256, "sfid": 6.14043, "precision": 0.8265, "recall": 0.5309}
    tolerances = {"is": 0.3, "fid": 0.005, "sfid": 0.005, "precision": 0.003, "recall": 0.003}
    for name, value in values.items():
        assert found[name] == pytest.approx(value, abs=tolerances[name])


def test_random_weights_are_the_same_everywhere_and_tell_images_apart(pictures):
    first, second = networks.load_random_inception(), networks.load_random_inception()
    assert (first.name, first.digest) == ("random", second.digest)
    found = first(pictures)
    torch.testing.assert_close(found["pool"], second(pictures)["pool"], rtol=0, atol=0)
    assert 0.01 < float(found["pool"].mean()) < 100
    assert float(found["pool"].std(dim=0).mean()) > 0.001


def test_vae_features(pictures, tmp_path):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=3,
        norm_num_groups=4,
        layers_per_block=1,
    ).eval()
    vae.save_pretrained(tmp_path / "vae")
    network = networks.load_network("vae", vae=str(tmp_path / "vae"))
    found = network(pictures)["pool"]  # means of 4 x 4 cells of a 32 x 32 latent
    with torch.no_grad():
        means = vae.encode(torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1).latent_dist.mean
    torch.testing.assert_close(found, means.reshape(5, 3, 8, 4, 8, 4).mean(dim=(3, 5)).flatten(1))
    with pytest.raises(ValueError, match="factor 2 divides, found 63 x 64"):
        network(pictures[:, :, :63])
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"broken")
    (tmp_path / "empty").mkdir()
    for name, message in (("vae", "--vae: expected"), ("empty", "config.json"), ("none", "where there is nothing")):
        with pytest.raises(ValueError, match=message) as error:
            networks.load_network("vae", vae=str(tmp_path / name))
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="fix: --vae"):
        networks.load_network("vae")
    with pytest.raises(ValueError, match="expected features inception"):
        networks.load_network("clip")


@pytest.mark.slow
def test_dinov2_features(pictures, tmp_path):
    timm = pytest.importorskip("timm")
    from PIL import Image

    torch.manual_seed(0)
    model = "vit_small_patch14_dinov2.lvd142m"
    native = timm.create_model(model, num_classes=0).eval()
    torch.save(native.state_dict(), tmp_path / "weights.pth")
    network = networks.load_dinov2(str(tmp_path / "weights.pth"), model=model)
    found = network(pictures)["pool"]
    assert found.shape == (5, 384)
    # the native network at its own 518 x 518 differs only by the position embeddings: give it DINOv2's own
    resized = [np.asarray(Image.fromarray(p).resize((224, 224), Image.Resampling.BICUBIC)) for p in pictures]
    x = (np.stack(resized) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    small = timm.create_model(model, num_classes=0, img_size=224).eval()
    patches = native.pos_embed[:, 1:].reshape(1, 37, 37, 384).permute(0, 3, 1, 2)
    patches = torch.nn.functional.interpolate(patches, scale_factor=16.1 / 37, mode="bicubic", antialias=False)
    state = native.state_dict()
    state["pos_embed"] = torch.cat([native.pos_embed[:, :1], patches.permute(0, 2, 3, 1).reshape(1, 256, 384)], dim=1)
    small.load_state_dict(state)
    with torch.no_grad():
        expected = small(torch.from_numpy(x).permute(0, 3, 1, 2).float())
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * float(expected.abs().max()))  # PIL: one grey level
    (tmp_path / "weights.pth").write_bytes(pickle.dumps(RunsCode(str(tmp_path / "trap")), protocol=2))
    with pytest.raises(ValueError, match="--dinov2-weights"):
        networks.load_dinov2(str(tmp_path / "weights.pth"), model=model)
    assert not (tmp_path / "trap").exists()


# Statistics


def cheap_network(name: str = "inception") -> FeatureNetwork:
    """Takes no time: fixed random projections of the pixels."""
    rng = np.random.default_rng(8)
    maps = {"pool": 12, "spatial": 9, "logits": 6}
    maps = {
        layer: torch.from_numpy(rng.standard_normal((8 * 8 * 3, width)).astype("f4")) for layer, width in maps.items()
    }

    def forward(images):
        flat = images.reshape(len(images), -1).float() / 255
        return {layer: flat @ matrix for layer, matrix in maps.items()}

    return FeatureNetwork(name, f"digest of {name}", torch.device("cpu"), forward)


@pytest.fixture
def small() -> np.ndarray:
    return np.random.default_rng(9).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)


def test_statistics_in_any_order_and_batches(small):
    network = cheap_network()
    expected = {layer: value.numpy() for layer, value in network(small).items()}
    statistics = FeatureStatistics(network, moments=("pool", "spatial"), keep=("pool", "logits"))
    order = np.random.default_rng(10).permutation(40)
    for part in np.split(order, [1, 17, 17, 30]):  # one of them empty
        statistics.update(torch.from_numpy(small[part]), part)
        for layer, value in network(small[part]).items() if len(part) else ():  # rounding depends on the batch's size
            expected[layer][part] = value.numpy()
    assert statistics.count == 40
    for layer in ("pool", "spatial"):
        mean, covariance = statistics.moments(layer)
        np.testing.assert_allclose(mean, expected[layer].mean(axis=0, dtype="f8"), rtol=1e-6)
        np.testing.assert_allclose(covariance, np.cov(expected[layer].astype("f8"), rowvar=False), rtol=1e-6, atol=1e-9)
    for layer in ("pool", "logits"):
        np.testing.assert_allclose(statistics.kept(layer), expected[layer], rtol=1e-5, atol=1e-6)
    statistics.update(small[:1], [3])
    with pytest.raises(ValueError, match="positions that repeat"):
        statistics.kept("pool")
    alone = FeatureStatistics(network, moments=("pool",))
    alone.update(small[:1])
    with pytest.raises(ValueError, match="at least 2 images"):
        alone.moments("pool")


# evaluate.py


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Call the entry point with the cheap network; returns (exit code, stdout, stderr)."""
    monkeypatch.setattr(evaluate, "load_network", lambda name, **_: cheap_network(name))

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
        code = 0
        try:
            cli.run(evaluate.main)
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def files(tmp_path, small):
    rng = np.random.default_rng(11)
    np.savez(tmp_path / "samples.npz", small, rng.integers(0, 3, len(small)))
    np.savez_compressed(tmp_path / "ref.npz", arr_0=rng.integers(0, 256, (30, 8, 8, 3), dtype=np.uint8))
    (tmp_path / "samples.json").write_text(json.dumps({"settings": {"num_steps": 250}}))
    return tmp_path


def metrics_of(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def test_the_table_and_the_record(run, files, small):
    code, out, err = run(files / "samples.npz", "--ref", files / "ref.npz", "--batch-size", 7, "--device", "cpu")
    assert code == 0, err
    record = metrics_of(files)
    assert list(record["metrics"]) == ["fid", "sfid", "is", "precision", "recall"]
    for name, value in record["metrics"].items():
        assert f"{name:<9}  {value:.6g}" in out
    network = cheap_network()
    found = {layer: value.numpy() for layer, value in network(small).items()}
    reference = {layer: value.numpy() for layer, value in network(np.load(files / "ref.npz")["arr_0"]).items()}
    moments = [f(x) for x in (reference["pool"], found["pool"]) for f in (lambda x: x.mean(0), lambda x: np.cov(x.T))]
    assert record["metrics"]["fid"] == pytest.approx(frechet_distance(*moments), rel=1e-4)
    assert record["metrics"]["is"] == pytest.approx(inception_score(found["logits"]), rel=1e-5)
    pair = precision_recall(reference["pool"], found["pool"])
    assert (record["metrics"]["precision"], record["metrics"]["recall"]) == pytest.approx(pair, abs=0.03)
    for side, file, count in (("samples", "samples.npz", 40), ("reference", "ref.npz", 30)):
        assert record[side]["count"] == count
        assert record[side]["sha256"] == hashlib.sha256((files / file).read_bytes()).hexdigest()
    assert record["features"] == {"inception": {"weights_sha256": "digest of inception"}}
    assert record["sampling"] == {"settings": {"num_steps": 250}}
    assert record["settings"]["batch_size"] == 7
    assert {"versions", "git_revision", "machine", "date"} <= record.keys()
    assert "40 samples" in err
    assert "30 reference images" in err
    assert "sorted" not in err
    assert not list(files.glob("*.partial"))


def test_only_what_the_chosen_metrics_need_is_computed(run, files, monkeypatch):
    assert run(files / "samples.npz", "--metrics", "fid,kid", f"--ref={files / 'ref.npz'}")[0] == 0
    assert list(metrics_of(files)["metrics"]) == ["fid", "kid"]
    asked = []
    monkeypatch.setattr(FeatureStatistics, "update", lambda self, *_: asked.append(self.wanted()))
    with pytest.raises(ValueError, match="expected images, found none"):
        evaluate.main([str(files / "samples.npz"), "--metrics", "is"])
    assert asked == [["logits"]]


def test_samples_sorted_by_class_are_reported(run, files, small):
    np.savez(files / "samples.npz", small, np.repeat(np.arange(4), 10))
    assert "samples are sorted by class: the inception score" in run(files / "samples.npz", "--metrics", "is")[2]
    np.savez(files / "samples.npz", small)
    assert "sorted" not in run(files / "samples.npz", "--metrics", "is")[2]
    (files / "samples.json").write_text(json.dumps({"labels": [0] * 20 + [1] * 20}))
    assert "sorted by class" in run(files / "samples.npz", "--metrics", "is")[2]


def test_stored_statistics_are_used_and_can_be_ignored(run, files):
    run(files / "samples.npz", "--ref", files / "ref.npz")
    plain = metrics_of(files)["metrics"]
    images = np.load(files / "ref.npz")["arr_0"]
    pool, spatial = (np.eye(width) for width in (12, 9))
    np.savez(files / "adm.npz", arr_0=images, mu=np.ones(12), sigma=pool, mu_s=np.ones(9), sigma_s=spatial)
    run(files / "samples.npz", "--ref", files / "adm.npz")
    record = metrics_of(files)
    assert record["reference"]["stored"] == ["mu", "sigma", "mu_s", "sigma_s"]
    assert record["metrics"]["fid"] != plain["fid"]
    assert record["metrics"]["sfid"] != plain["sfid"]
    assert record["metrics"]["recall"] == plain["recall"]
    run(files / "samples.npz", "--ref", files / "adm.npz", "--no-stored")
    assert metrics_of(files)["metrics"] == plain
    # They are the Inception network's: other features are computed from the images.
    run(files / "samples.npz", "--ref", files / "adm.npz", "--features", "random")
    assert metrics_of(files)["reference"]["stored"] == []
    np.savez(files / "adm.npz", mu=np.ones(12), sigma=pool)
    assert run(files / "samples.npz", "--ref", files / "adm.npz", "--metrics", "fid")[0] == 0
    code, _, err = run(files / "samples.npz", "--ref", files / "adm.npz", "--metrics", "fid,recall")
    assert code == 2
    assert "expected images" in err
    np.savez(files / "adm.npz", mu=np.ones(12) * np.nan, sigma=pool)
    code, _, err = run(files / "samples.npz", "--ref", files / "adm.npz", "--metrics", "fid")
    assert (code, "NaN" in err) == (2, True)


@pytest.mark.parametrize("kind", ["inception", "vae"])
def test_saved_statistics_serve_as_either_side(run, files, kind):
    run(files / "samples.npz", "--ref", files / "ref.npz", "--features", kind)
    plain = metrics_of(files)["metrics"]
    for name in ("samples", "ref"):
        code, _, err = run(files / f"{name}.npz", "--features", kind, "--save-stats", files / f"{name}-stats.npz")
        assert code == 0, err
    run(files / "samples-stats.npz", "--ref", files / "ref-stats.npz", "--features", kind)
    record = metrics_of(files)
    assert record["metrics"] == pytest.approx(plain, rel=1e-9)
    assert record["samples"]["kind"] == "statistics"
    assert record["samples"]["count"] == 40
    code, _, err = run(files / "samples.npz", "--ref", files / "ref-stats.npz", "--features", "random")
    assert code == 2
    assert f"expected statistics of random features (weights digest of ra), found those of {kind}" in err


@pytest.mark.parametrize("kind", ["random", "vae", "dinov2"])
def test_other_features_are_never_called_fid(run, files, kind):
    code, out, _ = run(files / "samples.npz", "--ref", files / "ref.npz", "--features", kind)
    assert code == 0
    names = metrics_of(files)["metrics"]
    prefix = "fd-dinov2" if kind == "dinov2" else f"{kind}-frechet"
    assert prefix in names
    assert all(kind in name for name in names)
    assert "fid" not in out.replace(str(files), "")
    code, _, err = run(files / "samples.npz", "--ref", files / "ref.npz", "--features", kind, "--metrics", "fid")
    assert code == 2
    assert "found fid" in err


def test_two_networks_in_one_pass(run, files):
    run(
        files / "samples.npz",
        "--ref",
        files / "ref.npz",
        "--features",
        "inception,dinov2",
        "--metrics",
        "fid,fd-dinov2",
    )
    assert list(metrics_of(files)["metrics"]) == ["fid", "fd-dinov2"]


def test_mistakes_are_one_line_and_code_2(run, files, small):
    samples, reference = files / "samples.npz", files / "ref.npz"
    np.savez(files / "few.npz", small[:3])
    np.savez(files / "unit.npz", small / 255.0)
    (files / "cut.npz").write_bytes(samples.read_bytes()[:300])
    for arguments, message in (
        ((), "missing --samples"),
        ((samples, "--metrics", "fid"), "expected a reference for fid"),
        ((samples, "--features", "vae"), "expected a reference"),
        ((samples, "--metrics", "fod", "--ref", reference), "expected metrics among fid, sfid"),
        ((samples, "--features", "clip"), "--features: expected names among"),
        (
            (samples, "--features", "vae,random", "--save-stats", files / "x"),
            "--features: expected one of them with --save-stats",
        ),
        ((samples, "--batch-size", 0), "--batch-size: expected at least 1"),
        ((samples, "--device", "tpu"), "--device"),
        ((samples, "--device", "cuda:99"), "on this machine, and GPU 99"),
        ((samples, "--output", files), "expected to write"),
        ((samples, "--output", samples / "metrics.json"), "expected a directory for --output"),
        ((samples, "--ref", files / "none.npz"), "found nothing"),
        ((files / "few.npz", "--ref", reference), "at least k + 1 = 4 samples, found 3"),
        ((samples, "--ref", files / "few.npz"), "at least k + 1 = 4 reference"),
        ((files / "unit.npz",), "floats in 0..1"),
        ((files / "cut.npz",), "expected an npz file"),
        ((samples, "--mertics", "is"), "did you mean --metrics?"),
    ):
        code, out, err = run(*arguments)
        lines = [line for line in err.splitlines() if line.startswith("error")]
        assert code == 2, (arguments, out, err)
        assert len(lines) == 1
        assert message in lines[0]
        assert "Traceback" not in err
        assert not (files / "metrics.json").exists()


def test_help_is_quick():
    code = "import runpy, sys\nsys.argv = ['evaluate', '--help']\n"
    code += "try: runpy.run_module('evaluations.evaluate', run_name='__main__')\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'scipy', 'diffusers', 'timm', 'torch_fidelity'} & set(sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "--inception-weights" in result.stdout


@pytest.mark.slow
def test_two_processes_equal_one(files, tmp_path):
    """The real program and network, images split unevenly, precision and recall included."""
    np.savez(files / "samples.npz", adm_golden.images(11, 32, 40))
    np.savez(files / "ref.npz", adm_golden.images(9, 32, 41))
    records = []
    for launcher in ([], ["-m", "torch.distributed.run", "--nproc_per_node=2"]):
        arguments = ["samples.npz", "--ref", "ref.npz", "--features", "random", "--batch-size", "3", "--device", "cpu"]
        arguments[0], arguments[2] = str(files / "samples.npz"), str(files / "ref.npz")
        command = [sys.executable, *launcher, "-m", "evaluations.evaluate", *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)
        assert result.returncode == 0, result.stderr
        records.append(metrics_of(files)["metrics"])
    assert records[1] == pytest.approx(records[0], rel=1e-5)


def test_the_network_for_gpus_gives_the_same_features_from_one_shape(weights, inception, monkeypatch):
    """Compiled (here without generating code), channels last, smaller batches filled up."""
    import torch._dynamo
    from torch._dynamo.utils import counters

    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *module, **flags: real(*module, backend="eager", **flags))
    torch._dynamo.reset()
    counters.clear()
    static = networks.inception_features("inception", networks.build_inception(weights), "", torch.device("cpu"), True)
    images = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    graphs = []
    for batch in (images[:3], images[3:]):
        found, expected = static(batch), inception(batch)
        graphs.append(counters["stats"]["unique_graphs"])
        assert found.keys() == expected.keys()
        for layer, features in expected.items():
            assert found[layer].shape == features.shape
            torch.testing.assert_close(found[layer], features, rtol=1e-4, atol=1e-4 * features.abs().max().item())
    assert graphs[0] == graphs[1] > 0
    torch._dynamo.reset()
