"""Pictures and metrics of a network's tokens, beside what the formulas give, and the program itself."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LinearRegression
from sklearn.metrics import r2_score

from analysis import probe, probe_metrics, probe_pictures, probe_tokens
from analysis.probe import ProbeConfig
from analysis.probe_tokens import BLOCK, ProbedSiT
from analysis.similarity import cknna, linear_cka, principal_components
from dataset import LatentDataset
from models.load import load_sit
from models.sit import SiT, SiTConfig, patchify
from models.vae import LatentScale, decode_images, encode_moments, load_vae, vae_digest
from reporting.values import shortened
from runtime import cli
from runtime.images import center_crop
from runtime.seeding import block_generator, numpy_generator
from tests.stores import make_store, make_vae, save_checkpoint
from tests.test_similarity import moments_of

ROOT = Path(__file__).resolve().parent.parent
SIZE, PATCH, DEPTH, K, COUNT = 8, 2, 3, 3, 24  # of the small network and store
LEVELS = (0.2, 0.5, 0.9)


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
        "scale": LatentScale((0.9,), (0.1,)).to_dict(),
        "vae": str(vae),
        "vae_digest": vae_digest(load_vae(str(vae))),
        "resolution": 4 * SIZE,
        "class_names": [f"class {k}" for k in range(K)],
        "path_type": "linear",
        "config": {"align": "vae", "align_depth": [2]},
    }
    save_checkpoint(folder / "run", 7, sit, sit, None, info)
    make_store(folder / "store", COUNT, K, SIZE, images=True, vae=vae)
    make_store(folder / "plain", COUNT, K, SIZE, vae=vae)
    make_store(folder / "other-classes", COUNT, K + 1, SIZE, images=True, vae=vae)
    return folder


def look(run, output, data="store", **changes):
    settings = {"checkpoint": str(run / "run"), "output_dir": str(output), "noise_levels": LEVELS, "device": "cpu"}
    settings |= {"data_dir": str(run / data)} if data else {}
    return probe.probe(ProbeConfig(**settings | changes))


def probed(run, depths=(1, 2, 3), seed=0, **changes):
    sit, info = load_sit(run / "run")
    return ProbedSiT(sit, info["scale"], "linear", depths, LEVELS, seed, torch.device("cpu"), **changes)


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
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["features-heat.png", "features-pca.png", "features.json"]
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
    assert "VAE-REPA at block 2" in said

    with Image.open(tmp_path / "features-heat.png") as picture:
        assert picture.width > 1000
        assert picture.height > 200
        assert np.asarray(picture).std() > 20


def test_colours_span_each_component_and_grey_stands_for_none():
    scores = torch.stack([torch.arange(25.0), -torch.arange(25.0), torch.zeros(25)], dim=1)
    scores[24, 0] = 1e6  # one token with a huge number leaves the others their colours
    picture = probe_pictures.colours(scores)
    assert (picture.shape, picture.dtype) == ((5, 5, 3), np.uint8)
    flat = picture.reshape(25, 3)
    low, high = np.percentile(scores[:, 1].numpy(), [2, 98])
    expected = np.clip((scores[:, 1].numpy() - low) / (high - low), 0, 1) * 255
    np.testing.assert_array_equal(flat[:, 1], np.rint(expected))
    assert np.unique(flat[:, 2]).tolist() == [128]
    assert flat[24, 0] == 255


def drawn_squares(figure, pixels, axes, rows, columns):
    """Colours (rows, columns, 3) in the middle of equal squares of the picture in `axes`, as they are in the file."""
    left, right, bottom, top = axes.images[0].get_extent()
    x = left + (np.arange(columns) + 0.5) * (right - left) / columns
    y = top + (np.arange(rows) + 0.5) * (bottom - top) / rows
    points = axes.transData.transform([(a, b) for b in y for a in x]).astype(int)
    return pixels[len(pixels) - 1 - points[:, 1], points[:, 0]].reshape(rows, columns, 3).astype(int)


def test_the_picture_shows_what_the_formulas_give(run, tmp_path, monkeypatch):
    figures = []
    draw = probe.pca_figure
    monkeypatch.setattr(probe, "pca_figure", lambda *args: figures.append(draw(*args)) or figures[0])
    look(run, tmp_path, depths=(3, 1), num_shown=2)
    with Image.open(tmp_path / "features-pca.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    indices, store, side = np.array([0, COUNT - 1]), LatentDataset(run / "store", images=True), SIZE // PATCH
    _, f_vae = by_hand(run, indices, 0.5, 1, "features shown noise")
    assert len(figures[0].subfigs) == 2
    for image, part in enumerate(figures[0].subfigs):
        crop, features, maps = part.axes
        assert part.get_suptitle() == f"image {indices[image]}, class class {store.labels[indices[image]]}"
        assert (crop.get_title(), features.get_title()) == ("image", "VAE features")
        assert [text.get_text() for text in maps.get_xticklabels()] == ["t = 0.2", "t = 0.5", "t = 0.9"]
        assert [text.get_text() for text in maps.get_yticklabels()] == ["block 1", "block 3"]
        of_vae, _ = principal_components(f_vae[image])
        found = drawn_squares(figures[0], pixels, features, side, side)
        np.testing.assert_array_equal(found, probe_pictures.colours(of_vae))
        found = drawn_squares(figures[0], pixels, crop, 4 * SIZE, 4 * SIZE)
        np.testing.assert_array_equal(found, store[indices[image]]["image"].numpy())
        found = drawn_squares(figures[0], pixels, maps, 2 * side, 3 * side)
        for row, depth in enumerate((1, 3)):
            for column, t in enumerate(LEVELS):
                tokens, _ = by_hand(run, indices, t, depth, "features shown noise")
                scores, _ = principal_components(tokens[image], like=of_vae)
                square = found[row * side : (row + 1) * side, column * side : (column + 1) * side]
                # The other images of a batch change rounding.
                assert np.abs(square - probe_pictures.colours(scores).astype(int)).max() <= 1


def test_parts_of_the_picture_do_not_overlap(tmp_path):
    for images, blocks, levels, side in ((1, 1, 1, 4), (2, 28, 5, 16), (3, 6, 2, 32), (1, 2, 9, 64)):
        maps = np.zeros((blocks, levels, side, side, 3), np.uint8)
        panel = probe_pictures.Panel("a long name " * 20, maps[0, 0], maps[0, 0], maps, {})
        figure = probe_pictures.pca_figure([panel] * images, range(blocks), np.linspace(0, 1, levels), "heading" * 99)
        figure.savefig(tmp_path / "a.png")
        boxes = [axes.get_tightbbox().padded(-1) for part in figure.subfigs for axes in part.axes]
        assert len(boxes) == 3 * images
        for index, box in enumerate(boxes):
            assert figure.bbox.count_contains(box.corners()) == 4
            assert box.count_overlaps(boxes[:index]) == 0
        for part in figure.subfigs:
            maps = part.axes[2]
            assert maps.get_window_extent().width / levels > 60  # pixels of each map


def test_the_numbers_are_those_of_the_formulas(run):
    """Through the whole store: which images are held out, which tokens are drawn, what goes into which measure."""
    indices, t = np.arange(COUNT), LEVELS[1]
    found = probe_metrics.measure(probed(run), LatentDataset(run / "store"), indices)
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
    assert found["cknna"][2, 1] == pytest.approx(cknna(x, y, probe_metrics.NEIGHBOURS), abs=1e-4)
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
    found = probe_metrics.measure(at_zero, Narrow(), np.arange(COUNT))
    for name, values in found.items():
        assert values[0, 0] == pytest.approx(1, abs=1e-5), name
        assert values[0, 1] < 0.2, name  # noise alone
    assert found["probe_r2"][0, 1] < 0.05


def test_cknna_is_of_a_bounded_draw_of_tokens(run, monkeypatch):
    seen = []

    def count(x, y, k):
        seen.append((len(x), len(y)))
        return 0.0

    monkeypatch.setattr(probe_metrics, "cknna", count)
    monkeypatch.setattr(probe_metrics, "CKNNA_TOKENS", 50)
    probe_metrics.measure(probed(run), LatentDataset(run / "store"), np.arange(COUNT))
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
    late = probed(run).tokens(moments, y, 1.0, 3, "features noise")[probe_tokens.INPUT]
    early = probed(run).tokens(moments, y, 0.0, 3, "features noise")[probe_tokens.INPUT]
    torch.testing.assert_close(four[probe_tokens.INPUT], 0.5 * late + 0.5 * early)
    other = probed(run).tokens(moments, y, 1.0, 4, "features noise")[probe_tokens.INPUT]
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
    assert given[0].tolist() == labels[probe_tokens.pick_evenly(COUNT, 4)].tolist()
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
    found = probe_tokens.read_pictures(store, np.array([2, 5]), lambda: vae, scale, torch.device("cpu"))
    mean = store.__getitems__([2, 5])["moments"][:, :4]
    expected = decode_images(vae, scale.scale_latent(mean), scale).numpy()
    np.testing.assert_array_equal(np.stack(found), expected)


@pytest.mark.parametrize(("width", "height"), [(32, 32), (100, 40), (33, 700), (5, 9), (64, 64)])
def test_images_of_any_size_are_cropped_as_those_of_a_store(width, height, run, tmp_path):
    file = save_image(tmp_path / "a.png", width, height)
    vae = load_vae(str(run / "vae"))
    loose = probe_tokens.encode_images([file], 32, vae, K)
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
    found = probe_tokens.find_images([str(tmp_path), str(last)])
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
    config = ProbeConfig(checkpoint=str(run / "run"), data_dir="x")
    assert probe.make_output_dir(config, info) == run / "run" / "features"
    file = tmp_path / "SiT-XL-2-256x256.pt"
    file.write_bytes(b"")
    assert probe.make_output_dir(config, info | {"source": str(file)}) == tmp_path / "features"


def test_a_file_of_another_project_takes_what_it_lacks_from_the_store(tmp_path):
    torch.manual_seed(0)
    sit = SiT(SiTConfig.from_name("SiT-Ti/1", SIZE, 3, K))
    for parameter in sit.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    torch.save(sit.state_dict(), tmp_path / "other.pt")
    vae = make_vae(tmp_path / "vae", channels=3)
    make_store(tmp_path / "store", 40, K, SIZE, channels=3, vae=vae)
    settings = {"checkpoint": str(tmp_path / "other.pt"), "data_dir": str(tmp_path / "store"), "device": "cpu"}
    settings["checkpoint_format"] = "sit"
    config = ProbeConfig(**settings, depths=(1, 6), noise_levels=(0.5,))
    record = probe.probe(config)
    assert np.isfinite(record["metrics"]["probe_r2"]["blocks"]).all()
    assert (tmp_path / "features" / "features-pca.png").is_file()
    images = (str(save_image(tmp_path / "a.png", 40, 40)),)
    with pytest.raises(ValueError, match=r"expected to know the scale of the latents.*give a --data-dir"):
        probe.probe(ProbeConfig(**settings | {"data_dir": None}, images=images))


def results_of(*rows):
    """Results of which all three measures have these rows."""
    return dict.fromkeys(probe_metrics.METRICS, np.array(rows))


def test_the_best_blocks_are_named():
    results = results_of([0.5, 0.1], [0.9, 0.2], [0.8, 0.498], [0.7, 0.6])
    summary = probe_metrics.summarize(results, (2, 5, 7))
    assert summary["cka"]["best_by_noise_level"] == [2, 7]
    assert (summary["cka"]["best"], summary["cka"]["mean"]) == (7, pytest.approx([0.55, 0.649, 0.65]))
    text = "\n".join(
        probe_metrics.conclude(
            summary, (2, 5, 7), (0.25, 0.75), {"align": "vae+sra", "align_depth": [2], "sra_depth": [4]}
        )
    )
    assert "R² on held-out images: block 7 (0.650) is best on average, then 5 (0.649) and 2 (0.550)" in text
    assert "the input has 0.300" in text
    assert "block 2 (0.900) at t = 0.25, 7 (0.600) at t = 0.75" in text
    assert "the earliest within 0.01 of the best probe is block 5 (0.649)" in text
    assert "trained with an alignment (VAE-REPA at block 2; SRA at block 4)" in text
    for training in (None, {"align": "none"}):
        assert "trained" not in "\n".join(probe_metrics.conclude(summary, (2, 5, 7), (0.25, 0.75), training))


def test_long_names_lose_their_middle():
    assert shortened("image 7, class 3", 20) == "image 7, class 3"
    cut = shortened("n01440764_" + "9" * 40 + ".JPEG", 20)
    assert (len(cut), cut[:5], cut[-8:]) == (20, "n0144", "999.JPEG")
    assert "..." in cut


def test_one_block_and_one_level_are_enough(run, tmp_path):
    record = look(run, tmp_path, depths=(2,), noise_levels=(0.5,), num_shown=1)
    assert record["metrics"]["cka"]["best"] == 2


def test_the_heat_maps_frame_the_best_block_of_each_column(tmp_path):
    results = results_of([0.99, 0.99], [0.9, 0.2], [0.8, 0.6])
    probe_pictures.heat_figure(results, (1, 2), (0.3, 0.7), "$x$ a heading").savefig(tmp_path / "a.png")
    other = results_of([0.99, 0.99], [0.9, 0.6], [0.8, 0.2])
    probe_pictures.heat_figure(other, (1, 2), (0.3, 0.7), "$x$ a heading").savefig(tmp_path / "b.png")
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
    with pytest.raises(ValueError, match=r"expected an image, found .*text.png, which cannot be read"):
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
        probe_metrics.measure(broken, store, np.arange(COUNT))

    class Constant:
        def __getitems__(self, indices):
            batch = store.__getitems__(indices)
            return batch | {"moments": torch.ones_like(batch["moments"])}

    with pytest.raises(ValueError, match="expected VAE features that vary, found the same in all of the 6 images"):
        probe_metrics.measure(probed(run), Constant(), np.arange(COUNT))


def test_a_folder_that_cannot_be_is_refused(run, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="--output-dir: expected a directory to write to"):
        look(run, tmp_path / "file" / "out")


def test_the_command_line(run, tmp_path):
    command = [sys.executable, "-m", "analysis.probe", str(run / "run" / "checkpoints" / "0000007")]
    command += ["--data-dir", str(run / "store"), "--output-dir", str(tmp_path), "--device", "cpu"]
    done = subprocess.run([*command, "--depths", "9"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: --depths: expected different blocks from 1 to 3, found 9\n"
    config = cli.parse(ProbeConfig, [*command[3:], "--noise-levels", "0.25", "1"])
    assert (config.noise_levels, config.depths, config.num_images) == ((0.25, 1.0), None, 512)
