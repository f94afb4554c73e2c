"""Pictures and figures of a network's features: each measure beside an independent formula, then the program itself."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.metrics import r2_score

from analysis import probe as features
from analysis.probe import BLOCK, FeaturesConfig, Probed
from analysis.similarity import Moments, cknna, fit_probe, linear_cka, principal_components, probe_r2
from dataset import LatentDataset
from models.load import load_sit
from models.sit import SiT, SiTConfig, patchify
from models.vae import LatentScale, decode_images, encode_moments, load_vae, vae_digest
from runtime import cli
from runtime.images import center_crop
from runtime.seeding import block_generator
from tests.stores import make_store, make_vae, save_checkpoint

ROOT = Path(__file__).resolve().parent.parent
SIZE, PATCH, DEPTH, K, COUNT = 8, 2, 3, 3, 24  # of the small network and store
LEVELS = (0.2, 0.5, 0.9)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def related(count=60, D=7, d=4, seed=0):
    """Features that share some directions, with means and scales of their own."""
    x = normal(count, D, seed=seed) * torch.arange(1.0, D + 1) + 3
    return x, x @ normal(D, d, seed=seed + 1) + 4 * normal(count, d, seed=seed + 2) - 5


def moments_of(x, y, *cuts):
    moments = Moments.empty(x.shape[1], y.shape[1])
    for begin, end in zip((0, *cuts), (*cuts, len(x)), strict=True):
        moments.update(x[begin:end], y[begin:end])
    return moments


# Principal components


@pytest.mark.parametrize("shape", [(16, 40), (40, 6)])
def test_components_are_those_of_the_svd_and_of_the_covariance(shape):
    x = normal(*shape) * torch.linspace(3, 1, shape[1]) + 10
    scores, share = principal_components(x)
    centred = x.numpy() - x.numpy().mean(0)
    vt = np.linalg.svd(centred, full_matrices=False)[2]
    expected = centred @ vt[:3].T
    expected *= np.sign(expected[np.abs(expected).argmax(0), range(3)])
    np.testing.assert_allclose(scores.numpy(), expected, atol=1e-9)
    values = np.linalg.eigvalsh(np.cov(x.numpy().T))[::-1]
    np.testing.assert_allclose(scores.var(0).numpy(), values[:3], rtol=1e-9)
    assert share == pytest.approx(values[:3].sum() / values.sum(), rel=1e-9)


def test_a_sign_agrees_with_what_it_is_to_be_like():
    x = normal(16, 5)
    scores, _ = principal_components(x)
    wanted = scores * torch.tensor([-2.0, 3.0, -0.5])
    np.testing.assert_allclose(principal_components(x, like=wanted)[0], scores * torch.tensor([-1, 1, -1]))


def test_components_beyond_the_rank_are_zero_and_not_rounding():
    line = normal(16, 1) @ normal(1, 30) + 1000
    scores, share = principal_components(line.float())
    assert (scores[:, 1:].abs().max() / scores[:, 0].abs().max()) < 1e-4  # float32's own rounding of the input
    scores, share = principal_components(line)
    assert torch.equal(scores[:, 1:], torch.zeros(16, 2, dtype=torch.float64))
    assert share == pytest.approx(1)
    scores, share = principal_components(torch.ones(16, 30))
    assert (torch.count_nonzero(scores), share) == (0, 0.0)
    assert principal_components(normal(16, 1))[0].shape == (16, 3)


def test_colours_span_each_component_and_grey_stands_for_none():
    scores = torch.stack([torch.arange(25.0), -torch.arange(25.0), torch.zeros(25)], dim=1)
    scores[24, 0] = 1e6  # one token with a huge number leaves the others their colours
    picture = features.colours(scores)
    assert (picture.shape, picture.dtype) == ((5, 5, 3), np.uint8)
    flat = picture.reshape(25, 3)
    low, high = np.percentile(scores[:, 1].numpy(), [2, 98])
    expected = np.clip((scores[:, 1].numpy() - low) / (high - low), 0, 1) * 255
    np.testing.assert_array_equal(flat[:, 1], np.rint(expected))
    assert np.unique(flat[:, 2]).tolist() == [128]
    assert flat[24, 0] == 255


# CKA


def hsic(K, L):
    """tr(K H L H), by Gram matrices over tokens (Gretton et al. 2005)."""
    H = np.eye(len(K)) - 1 / len(K)
    return np.trace(K @ H @ L @ H)


def test_cka_is_that_of_gram_matrices():
    x, y = related()
    K, L = (x @ x.T).numpy(), (y @ y.T).numpy()
    expected = hsic(K, L) / np.sqrt(hsic(K, K) * hsic(L, L))
    assert 0.1 < expected < 0.95
    assert linear_cka(moments_of(x, y)) == pytest.approx(expected, rel=1e-10)


def test_cka_ignores_rotation_scale_and_shift_alone():
    x, y = related()
    value = linear_cka(moments_of(x, y))
    rotation = torch.linalg.qr(normal(7, 7, seed=9))[0]
    assert linear_cka(moments_of(0.3 * x @ rotation - 8, -5 * y)) == pytest.approx(value, rel=1e-10)
    assert linear_cka(moments_of(y, x)) == pytest.approx(value, rel=1e-10)
    assert linear_cka(moments_of(x * torch.arange(1.0, 8) ** 2, y)) != pytest.approx(value, rel=1e-3)
    assert linear_cka(moments_of(x, x)) == pytest.approx(1, rel=1e-12)
    assert linear_cka(moments_of(x, 2 * x @ rotation)) == pytest.approx(1, rel=1e-10)
    assert linear_cka(moments_of(x, torch.ones_like(y))) == 0.0


# CKNNA


def brute_force_cknna(x, y, k):
    """Word by word: neighbours by sorting, then Song et al.'s estimator, Equation 5, as sums over indices."""
    x, y = ([row / np.sqrt((row**2).sum()) for row in features.numpy()] for features in (x, y))
    M = len(x)

    def kernel(rows):
        return [[float(np.dot(a, b)) for b in rows] for a in rows]

    def nearest(kernel, i):
        others = sorted((j for j in range(M) if j != i), key=lambda j: kernel[i][j], reverse=True)
        return set(others[:k])

    def aligned(K, L):
        A, B = np.zeros((M, M)), np.zeros((M, M))
        for i in range(M):
            for j in nearest(K, i) & nearest(L, i):
                A[i, j], B[i, j] = K[i][j], L[i][j]
        trace = cross = total_a = total_b = 0.0
        for i in range(M):
            for j in range(M):
                trace += A[i, j] * B[j, i]
                total_a += A[i, j]
                total_b += B[i, j]
                for q in range(M):
                    cross += A[i, q] * B[q, j]
        return (trace + total_a * total_b / ((M - 1) * (M - 2)) - 2 * cross / (M - 2)) / (M * (M - 3))

    K, L = kernel(x), kernel(y)
    return aligned(K, L) / np.sqrt(aligned(K, K) * aligned(L, L))


@pytest.mark.parametrize("k", [2, 5, 11, 29])
def test_cknna_is_its_definition(k):
    x, y = related(30)
    expected = brute_force_cknna(x, y, k)
    assert abs(expected) > 0.01
    assert cknna(x, y, k) == pytest.approx(expected, rel=1e-9)


def test_cknna_of_equal_and_of_unrelated_features():
    x = related(80)[0]
    assert cknna(x, x, 10) == pytest.approx(1, rel=1e-12)
    rotation = torch.linalg.qr(normal(7, 7, seed=9))[0]
    lengths = 1 + normal(80, 1, seed=8).abs()
    assert cknna(x * lengths, x @ rotation, 10) == pytest.approx(1, rel=1e-10)
    assert abs(cknna(normal(400, 6, seed=1), normal(400, 6, seed=2), 10)) < 0.05


@pytest.mark.parametrize(("count", "k"), [(10, 10), (3, 1), (10, 0)])
def test_cknna_of_too_few_is_refused(count, k):
    with pytest.raises(ValueError, match="CKNNA: expected at least 4 tokens"):
        cknna(normal(count, 3), normal(count, 3), k)


# The probe


def test_the_probe_is_least_squares_measured_on_other_tokens():
    x, y = related(200)
    W, b = fit_probe(moments_of(x[:150], y[:150]))
    reference = LinearRegression().fit(x[:150].numpy(), y[:150].numpy())
    np.testing.assert_allclose(W.T.numpy(), reference.coef_, atol=1e-4)
    expected = r2_score(y[150:].numpy(), reference.predict(x[150:].numpy()), multioutput="variance_weighted")
    assert probe_r2(moments_of(x[150:], y[150:]), W, b) == pytest.approx(expected, abs=1e-5)


def test_the_penalty_is_that_of_a_ridge_on_standardised_inputs():
    x, y = related(50)
    W, b = fit_probe(moments_of(x, y), ridge=0.3)
    standard = (x - x.mean(0)) / x.std(0, correction=0)
    reference = Ridge(alpha=0.3 * 50).fit(standard.numpy(), y.numpy())
    np.testing.assert_allclose(x @ W + b, reference.predict(standard.numpy()), rtol=1e-9)


def test_a_planted_feature_is_found_and_noise_is_not():
    x = normal(3000, 20) * torch.logspace(-3, 3, 20) + 50
    planted = (x - 50) / torch.logspace(-3, 3, 20) @ normal(20, 5, seed=1) + 7
    W, b = fit_probe(moments_of(x[:2000], planted[:2000]))
    assert probe_r2(moments_of(x[2000:], planted[2000:]), W, b) == pytest.approx(1, abs=1e-9)
    noise = normal(3000, 5, seed=2)
    W, b = fit_probe(moments_of(x[:2000], noise[:2000]))
    assert -0.05 < probe_r2(moments_of(x[2000:], noise[2000:]), W, b) < 0.01


def test_inputs_that_never_vary_or_repeat_do_no_harm():
    x, y = related(200)
    W, b = fit_probe(moments_of(x, y))
    odd = torch.cat([x, torch.full((200, 1), 1234.5), torch.zeros(200, 1), x[:, :2]], dim=1)
    W_odd, b_odd = fit_probe(moments_of(odd, y, 60, 130))
    assert torch.equal(W_odd[7:9], torch.zeros(2, 4, dtype=torch.float64))
    np.testing.assert_allclose(odd @ W_odd + b_odd, x @ W + b, atol=1e-4)


# Sums


def test_sums_gathered_in_batches_are_those_of_all_at_once():
    x, y = related(100)
    x, y = x + 1e6, y - 1e5  # where sums of squares would lose 9 digits
    streamed = moments_of(x, y, 1, 2, 40, 40, 97)
    other = moments_of(x[:30], y[:30])
    other.join(moments_of(x[30:], y[30:]))
    other.join(Moments.empty(7, 4))
    for moments in (streamed, other):
        assert moments.count == 100
        np.testing.assert_allclose(moments.mean_x, x.mean(0), rtol=1e-14)
        np.testing.assert_allclose(moments.mean_y, y.mean(0), rtol=1e-14)
        for name, (a, b) in {"xx": (x, x), "xy": (x, y), "yy": (y, y)}.items():
            expected = (a - a.mean(0)).T @ (b - b.mean(0))
            found = getattr(moments, name)
            np.testing.assert_allclose(found, expected, atol=1e-8 * expected.abs().max())
    empty = Moments.empty(7, 4)
    empty.join(streamed)
    assert torch.equal(empty.xx, streamed.xx)


# The program


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with one checkpoint none of whose weights is 0, its VAE (4 pixels to a latent), and stores."""
    folder = tmp_path_factory.mktemp("run")
    vae = make_vae(folder / "vae")
    torch.manual_seed(0)
    sit = SiT(SiTConfig(DEPTH, 24, 2, PATCH, SIZE, 4, K))
    for parameter in sit.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    info = {
        "scale": LatentScale((0.9,), (0.1,)).to_dict(), "vae": str(vae), "vae_digest": vae_digest(load_vae(str(vae))),
        "resolution": 4 * SIZE, "class_names": [f"class {k}" for k in range(K)], "path_type": "linear",
        "config": {"align": "vae", "align_depth": [2]},
    }  # fmt: skip
    save_checkpoint(folder / "run", 7, sit, sit, None, info)
    make_store(folder / "store", COUNT, K, SIZE, images=True, vae=vae)
    make_store(folder / "plain", COUNT, K, SIZE, vae=vae)
    make_store(folder / "other-classes", COUNT, K + 1, SIZE, images=True, vae=vae)
    return folder


def look(run, output, data="store", **changes):
    settings = {"checkpoint": str(run / "run"), "output_dir": str(output), "noise_levels": LEVELS, "device": "cpu"}
    settings |= {"data_dir": str(run / data)} if data else {}
    return features.look(FeaturesConfig(**settings | changes))


def probed(run, depths=(1, 2, 3), seed=0, **changes):
    sit, info = load_sit(run / "run")
    return Probed(sit, info["scale"], "linear", depths, LEVELS, seed, torch.device("cpu"), **changes)


def save_image(path, width, height, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 2 + 1, width // 2 + 1, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(path)
    return path


def by_hand(run, indices, t, depth, purpose, seed=0):
    """Tokens and VAE features of images of the store, for one block of them, by the formulas."""
    sit, _ = load_sit(run / "run")
    batch = LatentDataset(run / "store").__getitems__(indices)
    mean, std = batch["moments"].chunk(2, dim=1)
    tokens = []
    for block in range(0, len(indices), BLOCK):
        rows = slice(block, block + BLOCK)
        generator = block_generator(seed, block // BLOCK, purpose)
        draws = torch.randn(BLOCK, 2, 4, SIZE, SIZE, generator=generator)[: len(mean[rows])]
        z = (mean[rows] + std[rows] * draws[:, 0] - 0.1) * 0.9
        y_t = (1 - t) * z + t * draws[:, 1]
        tokens.append(sit.tokens(y_t, torch.full((len(z),), t), batch["label"][rows], depth))
    return torch.cat(tokens), patchify((mean - 0.1) * 0.9, PATCH)


def test_pictures_and_numbers_of_a_run(run, tmp_path, capsys):
    record = look(run, tmp_path, depths=(3, 1), num_shown=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "features-heat.png", "features-pca.png", "features.json",
    ]  # fmt: skip
    assert json.loads((tmp_path / "features.json").read_text()) == json.loads(json.dumps(record))
    assert (record["depths"], record["noise_levels"]) == ([1, 3], list(LEVELS))
    for name in ("probe_r2", "cka", "cknna"):
        entry = record["metrics"][name]
        assert np.shape(entry["blocks"]) == (2, 3)
        assert np.isfinite(entry["blocks"]).all()
        assert np.isfinite(entry["input"]).all()
        np.testing.assert_allclose(entry["mean"], np.mean(entry["blocks"], axis=1))
    assert {"versions", "git_revision", "machine", "date"} < set(record)
    assert record["images"] == COUNT
    said = capsys.readouterr().out
    assert "\n".join(record["conclusion"]) in said
    assert "vae at block 2" in said

    with Image.open(tmp_path / "features-heat.png") as picture:
        assert picture.width > 1000
        assert picture.height > 200
        assert np.asarray(picture).std() > 20

    # The other picture is compared pixel by pixel with what the formulas give.
    with Image.open(tmp_path / "features-pca.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    side = SIZE // PATCH
    layout = features.pca_layout(2, 2, 3, side)
    assert pixels.shape[1::-1] == layout["size"]
    assert layout["cell"] % side == 0

    def square(corner, size):
        x, y = corner
        assert x >= 0
        assert y >= 0
        cut = pixels[y : y + size, x : x + size]
        assert cut.shape == (size, size, 3)
        return cut

    indices, store = np.array([0, COUNT - 1]), LatentDataset(run / "store", images=True)
    _, f_vae = by_hand(run, indices, 0.5, 1, "features shown noise")
    for image in range(2):
        of_vae, _ = principal_components(f_vae[image])
        up = layout["large"] // side
        expected = features.colours(of_vae).repeat(up, axis=0).repeat(up, axis=1)
        np.testing.assert_array_equal(square(layout["f_vae"][image], layout["large"]), expected)
        crop = Image.fromarray(store[indices[image]]["image"].numpy()).resize((layout["large"],) * 2, 0)
        np.testing.assert_array_equal(square(layout["image"][image], layout["large"]), np.asarray(crop))
        for row, depth in enumerate((1, 3)):
            for column, t in enumerate(LEVELS):
                tokens, _ = by_hand(run, indices, t, depth, "features shown noise")
                scores, _ = principal_components(tokens[image], like=of_vae)
                up = layout["cell"] // side
                expected = features.colours(scores).repeat(up, axis=0).repeat(up, axis=1).astype(int)
                cell = square(layout["cells"][image][row][column], layout["cell"])
                assert np.abs(cell - expected).max() <= 1  # the company of a batch changes rounding


def test_squares_of_the_picture_do_not_overlap():
    for arguments in ((1, 1, 1, 4), (2, 28, 5, 16), (3, 6, 2, 32), (1, 2, 9, 128)):
        layout = features.pca_layout(*arguments)
        width, height = layout["size"]
        used = np.zeros((height, width), int)
        corners = [(corner, layout["large"]) for name in ("image", "f_vae") for corner in layout[name]]
        corners += [(corner, layout["cell"]) for panel in layout["cells"] for row in panel for corner in row]
        for (x, y), size in corners:
            assert x >= features.LEFT
            assert x + size < width
            assert y + size < height
            used[y - 1 : y + size + 1, x - 1 : x + size + 1] += 1
        assert used.max() == 1
        assert layout["cell"] >= features.CELL


def test_the_numbers_are_those_of_the_formulas(run):
    """Through the whole store: which images are held out, which tokens are drawn, what goes into which measure."""
    from runtime.seeding import numpy_generator

    indices, t = np.arange(COUNT), LEVELS[1]
    found = features.measure(probed(run), LatentDataset(run / "store"), indices)
    tokens, f_vae = by_hand(run, indices, t, 2, "features noise")
    held = numpy_generator(0, 0, "features held out").permutation(COUNT)[: COUNT // 4]
    others = np.setdiff1d(indices, held)
    x, y = tokens.double(), f_vae.double()
    probe = LinearRegression().fit(x[others].flatten(0, 1).numpy(), y[others].flatten(0, 1).numpy())
    predicted = probe.predict(x[held].flatten(0, 1).numpy())
    expected = r2_score(y[held].flatten(0, 1).numpy(), predicted, multioutput="variance_weighted")
    assert found["probe_r2"][2, 1] == pytest.approx(expected, abs=2e-4)
    x, y = x.flatten(0, 1), y.flatten(0, 1)  # fewer than are drawn: all of them
    assert found["cka"][2, 1] == pytest.approx(linear_cka(moments_of(x, y)), abs=1e-5)
    assert found["cknna"][2, 1] == pytest.approx(cknna(x, y, features.NEIGHBOURS), abs=1e-4)
    assert found["cka"].shape == (1 + DEPTH, len(LEVELS))


def test_the_input_at_no_noise_is_the_feature_itself(run):
    """Row 0 is the noised patches: at t = 0, with a posterior without width, f_VAE."""
    store = LatentDataset(run / "store")

    class Narrow:
        def __getitems__(self, indices):
            batch = store.__getitems__(indices)
            batch["moments"][:, 4:] = 0
            return batch

    at_zero = probed(run, (1,))
    at_zero.levels = (0.0, 1.0)
    found = features.measure(at_zero, Narrow(), np.arange(COUNT))
    for name, values in found.items():
        assert values[0, 0] == pytest.approx(1, abs=1e-5), name
        assert values[0, 1] < 0.2, name  # noise alone
    assert found["probe_r2"][0, 1] < 0.05


def test_cknna_is_of_a_bounded_draw_of_tokens(run, monkeypatch):
    seen = []

    def count(x, y, k):
        seen.append((len(x), len(y)))
        return 0.0

    monkeypatch.setattr("analysis.similarity.cknna", count)
    monkeypatch.setattr(features, "CKNNA_TOKENS", 50)
    features.measure(probed(run), LatentDataset(run / "store"), np.arange(COUNT))
    assert set(seen) == {(50, 50)}


def test_the_seed_determines_all(run, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        look(run, tmp_path / name, seed=seed)
    a, b, c = (json.loads((tmp_path / name / "features.json").read_text()) for name in "abc")
    assert a["metrics"] == b["metrics"]
    assert a["pictured"] == b["pictured"]
    for picture in ("features-pca.png", "features-heat.png"):
        first, second, third = ((tmp_path / name / picture).read_bytes() for name in "abc")
        assert first == second
        assert first != third
    assert a["metrics"] != c["metrics"]


def test_noise_is_an_images_own_whatever_the_company_and_the_level(run):
    moments = LatentDataset(run / "store").__getitems__(np.arange(4))["moments"]
    y = torch.zeros(4, dtype=torch.int64)
    four = probed(run).tokens(moments, y, 0.5, 3, "features noise")
    one = probed(run).tokens(moments[:1], y[:1], 0.5, 3, "features noise")
    torch.testing.assert_close(four[2][:1], one[2])
    late = probed(run).tokens(moments, y, 1.0, 3, "features noise")[features.INPUT]
    early = probed(run).tokens(moments, y, 0.0, 3, "features noise")[features.INPUT]
    torch.testing.assert_close(four[features.INPUT], 0.5 * late + 0.5 * early)
    other = probed(run).tokens(moments, y, 1.0, 4, "features noise")[features.INPUT]
    assert not torch.equal(other, late)


def test_classes_come_from_the_store_if_they_are_the_networks(run, tmp_path, monkeypatch, capsys):
    given = []
    forward = SiT.forward

    def watched(self, x, t, y, return_blocks=()):
        given.append(y.clone())
        return forward(self, x, t, y, return_blocks)

    monkeypatch.setattr(SiT, "forward", watched)
    shown = {"num_shown": 4, "noise_levels": (0.5,)}
    look(run, tmp_path / "a", **shown)
    labels = LatentDataset(run / "store").labels
    assert given[0].tolist() == labels[features.pick_evenly(COUNT, 4)].tolist()
    assert torch.cat(given[1:]).tolist() == labels.tolist()
    given.clear()
    record = look(run, tmp_path / "b", "other-classes", **shown)
    assert set(torch.cat(given).tolist()) == {K}
    assert record["classes"] == "none"
    assert "has 4 classes, the network 3" in capsys.readouterr().out
    given.clear()
    look(run, tmp_path / "c", images=(str(save_image(tmp_path / "x.png", 40, 50)),), **shown)
    assert given[0].tolist() == [K]
    assert torch.cat(given[1:]).tolist() == labels.tolist()


def test_a_store_without_images_shows_what_the_vae_decodes(run):
    store = LatentDataset(run / "plain")
    vae, scale = load_vae(str(run / "vae")), LatentScale((0.9,), (0.1,))
    found = features.originals(store, np.array([2, 5]), lambda: vae, scale, torch.device("cpu"))
    mean = store.__getitems__([2, 5])["moments"][:, :4]
    expected = decode_images(vae, scale.scale_latent(mean), scale).numpy()
    np.testing.assert_array_equal(np.stack(found), expected)


@pytest.mark.parametrize(("width", "height"), [(32, 32), (100, 40), (33, 700), (5, 9), (64, 64)])
def test_images_of_any_size_are_cropped_as_those_of_a_store(width, height, run, tmp_path):
    file = save_image(tmp_path / "a.png", width, height)
    vae = load_vae(str(run / "vae"))
    loose = features.encode_images([file], 32, vae, K)
    with Image.open(file) as image:
        crop = center_crop(image.convert("RGB"), 32)
    batch = loose.__getitems__(np.array([0]))
    np.testing.assert_array_equal(batch["image"][0].numpy(), crop)
    torch.testing.assert_close(batch["moments"], encode_moments(vae, torch.from_numpy(crop)[None]))
    assert batch["label"].tolist() == [K]


def test_folders_of_images_are_listed_sorted_without_hidden_files(tmp_path):
    for name in ("b/2.png", "a.jpg", "b/1.PNG", ".hidden/3.png", "b/.4.png"):
        save_image(tmp_path / name, 8, 8)
    (tmp_path / "notes.txt").write_text("x")
    last = save_image(tmp_path.parent / f"{tmp_path.name}.png", 8, 8)
    found = features.find_images([str(tmp_path), str(last)])
    assert found == [tmp_path / "a.jpg", tmp_path / "b/1.PNG", tmp_path / "b/2.png", last]


def test_loose_images_alone(run, tmp_path, capsys):
    folder = tmp_path / "images"
    for index in range(21):
        save_image(folder / f"{index}.png", 40 + index, 50, seed=index)
    few = look(run, tmp_path / "few", None, images=(str(folder / "1.png"), str(folder / "2.png")), vae=str(run / "vae"))
    assert [entry["name"] for entry in few["pictured"]] == ["1.png", "2.png"]
    assert few["metrics"] is None
    assert "takes 20 images, --images has 2; give a --data-dir" in capsys.readouterr().out
    assert not (tmp_path / "few" / "features-heat.png").exists()
    (tmp_path / "few" / "features-heat.png").write_bytes(b"an earlier one")
    look(run, tmp_path / "few", None, images=(str(folder / "1.png"),))
    assert not (tmp_path / "few" / "features-heat.png").exists()
    many = look(run, tmp_path / "many", None, images=(str(folder),))
    assert len(many["pictured"]) == 8
    assert many["images"] == 21
    assert (tmp_path / "many" / "features-heat.png").exists()


def test_where_the_result_goes(run, tmp_path):
    _, info = load_sit(run / "run")
    config = FeaturesConfig(checkpoint=str(run / "run"), data_dir="x")
    assert features.make_folder(config, info) == run / "run" / "features"
    file = tmp_path / "SiT-XL-2-256x256.pt"
    file.write_bytes(b"")
    assert features.make_folder(config, info | {"source": str(file)}) == tmp_path / "features"


def test_a_file_of_another_project_takes_what_it_lacks_from_the_store(tmp_path):
    torch.manual_seed(0)
    sit = SiT(SiTConfig.from_name("SiT-Ti/1", SIZE, 3, K))
    for parameter in sit.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    torch.save(sit.state_dict(), tmp_path / "other.pt")
    vae = make_vae(tmp_path / "vae", channels=3)
    make_store(tmp_path / "store", 40, K, SIZE, channels=3, vae=vae)
    config = FeaturesConfig(
        checkpoint=str(tmp_path / "other.pt"), data_dir=str(tmp_path / "store"), depths=(1, 6), noise_levels=(0.5,),
        device="cpu",
    )  # fmt: skip
    record = features.look(config)
    assert np.isfinite(record["metrics"]["probe_r2"]["blocks"]).all()
    assert (tmp_path / "features" / "features-pca.png").is_file()
    images = (str(save_image(tmp_path / "a.png", 40, 40)),)
    with pytest.raises(ValueError, match=r"expected to know the scale of the latents.*give a --data-dir"):
        features.look(FeaturesConfig(checkpoint=config.checkpoint, images=images, device="cpu"))


def results_of(*rows):
    """Results of which all three measures have these rows."""
    return dict.fromkeys(features.METRICS, np.array(rows))


def test_the_best_blocks_are_named():
    results = results_of([0.5, 0.1], [0.9, 0.2], [0.8, 0.498], [0.7, 0.6])
    summary = features.summarize(results, (2, 5, 7))
    assert summary["cka"]["best_by_noise_level"] == [2, 7]
    assert (summary["cka"]["best"], summary["cka"]["mean"]) == (7, pytest.approx([0.55, 0.649, 0.65]))
    text = "\n".join(
        features.conclude(summary, (2, 5, 7), (0.25, 0.75), {"align": "vae+sra", "align_depth": [2], "sra_depth": [4]})
    )
    assert "R² on held-out images: block 7 (0.650) is best on average, then 5 (0.649) and 2 (0.550)" in text
    assert "the input has 0.300" in text
    assert "block 2 (0.900) at t = 0.25, 7 (0.600) at t = 0.75" in text
    assert "the earliest within 0.01 of the best probe is block 5 (0.649)" in text
    assert "trained with an alignment (vae at block 2; sra at block 4)" in text
    for training in (None, {"align": "none"}):
        assert "trained" not in "\n".join(features.conclude(summary, (2, 5, 7), (0.25, 0.75), training))


def test_long_names_lose_their_middle():
    assert features.shortened("image 7, class 3", 20) == "image 7, class 3"
    cut = features.shortened("n01440764_" + "9" * 40 + ".JPEG", 20)
    assert (len(cut), cut[:5], cut[-8:]) == (20, "n0144", "999.JPEG")
    assert "..." in cut


def test_one_block_and_one_level_are_enough(run, tmp_path):
    record = look(run, tmp_path, depths=(2,), noise_levels=(0.5,), num_shown=1)
    assert record["metrics"]["cka"]["best"] == 2


def test_the_heat_maps_frame_the_best_block_of_each_column(tmp_path):
    results = results_of([0.99, 0.99], [0.9, 0.2], [0.8, 0.6])
    features.draw_heat(tmp_path / "a.png", results, (1, 2), (0.3, 0.7), "$x$ a heading")
    other = results_of([0.99, 0.99], [0.9, 0.6], [0.8, 0.2])
    features.draw_heat(tmp_path / "b.png", other, (1, 2), (0.3, 0.7), "$x$ a heading")
    reds = []
    for name in ("a", "b"):
        pixels = np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")).astype(int)
        reds.append((pixels[..., 0] > 230) & (pixels[..., 1] < 30) & (pixels[..., 2] < 30))
    rows = [np.flatnonzero(red.any(axis=1)) for red in reds]
    assert rows[0].max() > rows[1].max() + 20  # in b all of the frames are around block 1
    assert rows[0].min() == rows[1].min()
    assert reds[0].sum() == pytest.approx(reds[1].sum(), rel=0.1)  # as many frames


# Refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": (1, 4)}, "--depths: expected different blocks from 1 to 3, found 1 4"),
        ({"depths": (0,)}, "--depths: expected different blocks from 1 to 3, found 0"),
        ({"depths": (2, 2)}, "--depths: expected different blocks from 1 to 3, found 2 2"),
        ({"noise_levels": (0.5, 1.5)}, "--noise-levels: expected different times from 0 to 1, found 0.5 1.5"),
        ({"noise_levels": (0.5, 0.5)}, "--noise-levels: expected different times"),
        ({"noise_levels": (float("nan"),)}, "--noise-levels: expected different times"),
        ({"num_images": 0}, "--num-images: expected at least 1, found 0"),
        ({"num_shown": 0}, "--num-shown: expected at least 1, found 0"),
        ({"num_images": 19}, "expected at least 20 images to fit a probe to tokens of 24 numbers, found 19"),
        ({"seed": -1}, "--seed: expected at least 0, found -1"),
        ({"data": None}, "found neither --data-dir nor --images"),
        ({"checkpoint": "nowhere"}, "not a checkpoint: nothing at nowhere"),
        ({"data": "vae"}, "expected a latent store, found no meta.json"),
        ({"images": ("nowhere.png",)}, "--images: expected image files .* found nothing at nowhere.png"),
    ],
)
def test_what_cannot_be_is_refused(changes, message, run, tmp_path):
    with pytest.raises(ValueError, match=message):
        look(run, tmp_path / "out", **{"data": "store"} | changes)


def test_a_run_without_a_checkpoint_is_refused(run, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"not a checkpoint: .*empty holds neither"):
        look(run, tmp_path / "out", checkpoint=str(tmp_path / "empty"))


def test_images_that_are_none_are_refused(run, tmp_path):
    long = save_image(tmp_path / "long.png", 510, 10)
    with pytest.raises(
        ValueError, match=r"at most 50 times as long as it is wide, found .*long.png of 510 x 10 pixels"
    ):
        look(run, tmp_path / "out", images=(str(long),))
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"expected an image, found .*text.png, which cannot be read .*leave it out"):
        look(run, tmp_path / "out", images=(str(tmp_path / "text.png"),))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"found no image in .*empty"):
        look(run, tmp_path / "out", images=(str(tmp_path / "empty"),))


def test_stores_and_vaes_that_do_not_fit_are_refused(run, tmp_path):
    vae = run / "vae"
    make_store(tmp_path / "large", 6, K, 16, vae=vae)
    make_store(tmp_path / "scaled", 6, K, SIZE, vae=vae, scale=0.5)
    other = make_vae(tmp_path / "other", seed=1)
    make_store(tmp_path / "foreign", 6, K, SIZE, vae=other)
    for name, message in (
        ("large", r"found shape \(4, 16, 16\) \(the checkpoint's: \(4, 8, 8\)\)"),
        ("scaled", r"found scale .*0\.5.*the checkpoint's: .*0\.9"),
        ("foreign", "found another VAE"),
    ):
        with pytest.raises(ValueError, match=f"--data-dir: expected latents as the checkpoint's, {message}"):
            look(run, tmp_path / "out", data_dir=str(tmp_path / name))
    image = str(save_image(tmp_path / "a.png", 40, 40))
    with pytest.raises(ValueError, match="--vae: expected the VAE of the checkpoint"):
        look(run, tmp_path / "out", images=(image,), vae=str(other))


def test_numbers_that_are_not_finite_and_constant_features_are_refused(run):
    store = LatentDataset(run / "store")
    broken = probed(run)
    broken.sit.blocks[1].mlp.fc2.bias[0] = torch.nan
    with pytest.raises(ValueError, match=r"found others in the tokens of block 2 at t = 0\.2"):
        features.measure(broken, store, np.arange(COUNT))

    class Constant:
        def __getitems__(self, indices):
            batch = store.__getitems__(indices)
            return batch | {"moments": torch.ones_like(batch["moments"])}

    with pytest.raises(ValueError, match="expected VAE features that vary, found the same in all of the 6 images"):
        features.measure(probed(run), Constant(), np.arange(COUNT))


def test_a_folder_that_cannot_be_is_refused(run, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="--output-dir: expected a folder to write to"):
        look(run, tmp_path / "file" / "out")


def test_the_command_line(run, tmp_path):
    command = [sys.executable, "-m", "analysis.probe", "--checkpoint", str(run / "run" / "checkpoints" / "0000007")]
    command += ["--data-dir", str(run / "store"), "--output-dir", str(tmp_path), "--device", "cpu"]
    done = subprocess.run([*command, "--depths", "9"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: --depths: expected different blocks from 1 to 3, found 9\n"
    config = cli.parse(FeaturesConfig, [*command[3:], "--noise-levels", "0.25", "1"])
    assert (config.noise_levels, config.depths, config.num_images) == ((0.25, 1.0), None, 512)
