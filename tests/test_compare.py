"""Comparing runs: the same images as the samplers give, where a curve gets to a value, and runs that do not fit."""

import io
import itertools
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample_ddp
from analysis import compare, curves, side_by_side
from analysis.compare import CompareConfig
from analysis.curves import Crossing, first_crossing, smoothed, speed_up
from analysis.side_by_side import compose, draw_images
from diffusion.guidance import guided_velocity
from diffusion.interpolant import Interpolant
from diffusion.samplers import sample_ode, sample_sde
from models.load import load_sit
from models.sit import SiT, SiTConfig
from models.vae import LatentScale, decode_images, load_vae, vae_digest
from reporting.render import write_result
from reporting.runs import read_runs
from reporting.values import shortened
from runtime import cli
from runtime.seeding import block_generator
from tests.stores import make_vae, save_checkpoint
from tests.test_report import add_samples, log_row

ROOT = Path(__file__).resolve().parent.parent
K = 5


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return make_vae(tmp_path_factory.mktemp("vae") / "vae")


def make_run(folder, vae, steps=(10, 20), seed=0, classes=K, side=4, rows=(), record=(), **changes):
    """A run with checkpoints of a small SiT, none of whose weights is zero, and a log."""
    info = {
        "scale": LatentScale((0.9,), (0.1,)).to_dict(),
        "vae": str(vae),
        "vae_digest": vae_digest(load_vae(str(vae))),
        "resolution": 4 * side,
        "class_names": [f"class {k}" for k in range(classes)],
        "path_type": "linear",
    } | changes
    for step in steps:
        torch.manual_seed(1000 * seed + step)
        sit = SiT(SiTConfig(2, 32, 2, patch_size=2, latent_size=side, in_channels=4, num_classes=classes))
        with torch.no_grad():
            for parameter in sit.parameters():
                parameter.normal_(std=0.15)
        save_checkpoint(folder, step, sit, sit, None, info)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"config": {"batch_size": 32}} | dict(record)))
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def straight(start, end, last=100, speed=64.0):
    """A log whose velocity loss goes straight from `start` at step 0 to `end` at step `last`."""
    return [log_row(step, start + (end - start) * step / last, images_per_second=speed) for step in range(1, last + 1)]


def run_compare(*arguments):
    compare.main([*map(str, arguments[0]), *map(str, arguments[1:])])


def config(**changes):
    return CompareConfig(runs=("a", "b"), **{"num_steps": 3, "guidance_scale": 2.5} | changes)


def pixels(figure):  # -> (height, width, 3) uint8
    return np.asarray(Image.open(io.BytesIO(compare.to_png(figure))).convert("RGB"))


def places(figure):
    """(left, top, side) of each image in a picture, in pixels."""
    boxes = [axes.get_window_extent() for axes in figure.axes]
    return [(round(box.x0), round(figure.bbox.height - box.y1), round(box.width)) for box in boxes]


@pytest.mark.parametrize("sampler", ["ode-euler", "ode-heun", "sde"])
def test_images_are_those_of_the_samplers_called_directly(sampler, vae, tmp_path):
    run = make_run(tmp_path / "run", vae)
    sit, info = load_sit(run)
    decoder, labels = load_vae(str(vae)), [4, 0, 2]
    images = draw_images(sit, info, decoder, labels, config(sampler=sampler, seed=7), torch.device("cpu"))
    generator = block_generator(7, 0, "sample noise")
    x = torch.randn(16, 4, 4, 4, generator=generator)[:3]
    velocity = guided_velocity(sit, torch.tensor(labels), K, 2.5, (0.0, 1.0))
    if sampler == "sde":
        z = sample_sde(
            velocity, x, 3, lambda _: torch.randn(16, 4, 4, 4, generator=generator)[:3], Interpolant("linear")
        )
    else:
        z = sample_ode(velocity, x, 3, heun=sampler == "ode-heun")
    assert torch.equal(images, decode_images(decoder, z.float(), info["scale"]))
    assert images.float().std() > 1


@pytest.mark.parametrize("facts", [{}, {"prediction": "x", "time_shift": 3.0}])
def test_images_are_those_of_sample_ddp_with_the_same_labels(vae, tmp_path, facts):
    """Image by image, over more than one block; another batch changes rounding alone."""
    run = make_run(tmp_path / "run", vae, **facts)
    flags = ["--num-samples=20", "--num-steps=3", "--guidance-scale=2.5", "--seed=7", "--per-proc-batch-size=32"]
    sample_ddp.main([f"--checkpoint={run}", f"--output-dir={tmp_path / 'out'}", "--sampler=sde", *flags])
    with np.load(tmp_path / "out" / "samples.npz") as archive:
        expected, labels = archive["arr_0"], archive["arr_1"].tolist()
    sit, info = load_sit(run)
    images = draw_images(
        sit, info, load_vae(str(vae)), labels, config(sampler="sde", seed=7), torch.device("cpu")
    ).numpy()
    assert np.abs(images.astype(int) - expected).max() <= 1


def test_the_picture_holds_the_images_of_all_runs_and_steps(vae, tmp_path):
    runs = [make_run(tmp_path / name, vae, seed=index) for index, name in enumerate(("plain", "ours"))]
    for run in runs:
        (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in straight(1, 0.5)))
    out = tmp_path / "out"
    flags = ["--output-dir", out, "--num-steps", 3, "--guidance-scale", 2.5, "--seed", 7, "--classes", 4, 0, 2]
    run_compare(runs, *flags)
    picture = np.asarray(Image.open(out / "compare.png").convert("RGB"))
    drawn = [(step, run) for step in (10, 20) for run in runs]
    images = []
    for step, run in drawn:
        sit, info = load_sit(run / "checkpoints" / f"{step:07d}")
        images.append(
            draw_images(sit, info, load_vae(str(vae)), [4, 0, 2], config(seed=7), torch.device("cpu")).numpy()
        )
    assert not np.array_equal(images[0], images[1])
    texts = [f"step {step}\n{run.name}" for step, run in drawn]
    heads = ["class 4", "class 0", "class 2"]
    caption = "the same noise and classes in each column\nseed 7, ode-euler 3 steps, guidance 2.5"
    expected = compose(images, texts, heads, caption)
    assert np.array_equal(picture, pixels(expected))
    for image, (x, y, cell) in zip(itertools.chain(*images), places(expected), strict=True):
        assert cell == 128
        assert np.array_equal(picture[y + 4 : y + cell : 8, x + 4 : x + cell : 8], image)
    record = json.loads((out / "compare.json").read_text())
    assert record["images"]["steps"] == [10, 20]
    assert record["images"]["classes"] == [4, 0, 2]
    state = json.loads((runs[1] / "checkpoints" / "0000020" / "state.json").read_text())
    assert record["images"]["checkpoint_digests"]["ours"]["20"] == state["digests"]["ema.safetensors"]
    assert {"versions", "git_revision", "machine", "date"} <= set(record)
    assert sorted(path.name for path in out.iterdir()) == ["compare.json", "compare.png", "curves.png"]


@pytest.mark.parametrize("side", [16, 32, 100, 256, 400])
def test_pictures_do_not_overlap_and_have_room_for_text(side):
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 100, (3, side, side, 3), dtype=np.uint8) for _ in range(4)]
    names = ["a", "a very long name of a run, " * 20, "a", "$^\udcff"]
    texts = [f"step 1\n{shortened(name, 24)}" for name in names]
    figure = compose(rows, texts, ["x"] * 3, "c")
    picture = pixels(figure)
    taken = np.zeros(picture.shape[:2], int)
    for x, y, cell in places(figure):
        assert 64 <= cell <= 256
        taken[y : y + cell, x : x + cell] += 1
    assert taken.max() == 1
    left = min(x for x, _, _ in places(figure))
    assert 80 < left < 600
    assert (picture[:, :left].min(axis=2) < 128).any()  # the texts
    assert (picture[:, 0].min(axis=1) > 200).all()  # which begin within the picture
    assert (picture[:, left - 3 : left - 1].min(axis=2) > 200).all()  # and end before the images


def test_large_images_keep_their_pixels():
    rows = [np.random.default_rng(0).integers(0, 256, (2, 256, 256, 3), dtype=np.uint8)] * 2
    figure = compose(rows, ["a", "b"], ["x"] * 2, "c")
    for image, (x, y, cell) in zip(itertools.chain(*rows), places(figure), strict=True):
        assert np.array_equal(pixels(figure)[y : y + cell, x : x + cell], image)


def test_a_name_is_the_same_width_however_long():
    assert shortened("n" * 1000, 24, from_end=0) == "n" * 21 + "..."
    assert shortened("two  words\nand $^\udcff", 24) == "two words and $^?"


# Curves.


def test_where_a_curve_gets_to_a_value():
    assert first_crossing([(0, 10.0), (10, 0.0)], 5.0, -1) == Crossing(5.0)
    assert first_crossing([(0, 10.0), (10, 6.0), (20, 2.0), (30, 8.0)], 3.0, -1) == Crossing(17.5)  # the first time
    assert first_crossing([(0, 10.0), (10, 5.0)], 5.0, -1) == Crossing(10.0)
    assert first_crossing([(0, 10.0), (10, 5.0)], 4.9, -1) == Crossing(None)
    assert first_crossing([(4, 3.0), (10, 1.0)], 5.0, -1) == Crossing(4, at_most=True)
    assert first_crossing([(0, 1.0), (10, 3.0)], 2.0, 1) == Crossing(5.0)  # where higher is better
    assert first_crossing([], 2.0, 1) == Crossing(None)
    for target in np.linspace(0.2, 0.9, 5):  # exp(-x) on straight lines of many points
        x = np.linspace(0, 3, 3001)
        assert first_crossing(list(zip(x, np.exp(-x), strict=True)), target, -1).at == pytest.approx(
            -math.log(target), abs=1e-6
        )


def test_the_speed_up_is_to_the_baselines_best_value_at_its_step():
    baseline = [(100, 20.0), (200, 10.0), (400, 12.0)]  # gets worse again: its best is what counts
    found = speed_up([(50, 30.0), (100, 10.0)], baseline, -1)
    assert found == {"reached": 100.0, "at_most": False, "speed_up": 2.0}
    assert speed_up([(50, 30.0), (100, 11.0)], baseline, -1)["speed_up"] is None
    assert speed_up([(50, 1.0)], baseline, -1) == {"reached": 50, "at_most": True, "speed_up": 4.0}


def test_means_over_the_last_steps():
    rows = [{"step": step, "velocity": float(step)} for step in range(10, 101, 10)]
    rows[4]["velocity"] = math.nan
    curve = smoothed(rows, "velocity", 30)
    assert curve[0] == (10, 10.0)
    assert (40, 30.0) in curve
    assert (60, 50.0) in curve  # of 40 and 60: that of step 50 was not applied
    assert (100, 90.0) in curve
    assert 50 not in dict(curve)
    assert smoothed(rows, "velocity", 0)[-1] == (100, 100.0)


def measured(folder, metrics, **settings):
    """A run's sets of samples: {step: fid}."""
    for step, value in metrics.items():
        add_samples(folder / "samples" / f"{step}-{len(settings)}", step, 1.0, {"fid": value, "is": 1.0}, **settings)


def test_metrics_over_steps_and_hours(vae, tmp_path, capsys):
    """Ours goes straight from 40 to 10 and takes twice the time for a step; the baseline ends at 20."""
    plain = make_run(tmp_path / "plain", vae, (), rows=straight(1, 0.5, 400, speed=64.0))
    ours = make_run(tmp_path / "ours", vae, (), rows=straight(1, 0.4, 400, speed=32.0))
    slow = make_run(tmp_path / "slow", vae, (), rows=straight(1, 0.6, 400))
    measured(plain, {200: 30.0, 400: 20.0})
    measured(ours, {100: 40.0, 400: 10.0})
    measured(slow, {400: 25.0})
    measured(ours, {400: 1.0}, num_samples=100)  # drawn in another way: not to be compared
    run_compare([plain, ours, slow], "--no-images", "--output-dir", tmp_path / "out")
    record = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert record["quantity"] == "fid"
    assert record["baseline"] == {"run": "plain", "best": 20.0, "step": 400}
    one, two = record["reach"]
    assert one["steps"] == {"reached": 300.0, "at_most": False, "speed_up": pytest.approx(4 / 3)}
    assert one["hours"]["reached"] == pytest.approx(300 * 32 / 32 / 3600)
    assert one["hours"]["speed_up"] == pytest.approx(2 / 3)
    assert two["steps"] == {"reached": None, "at_most": False, "speed_up": None}
    assert record["metric"]["curves"]["ours"] == [[100, 40.0], [400, 10.0]]
    assert record["hours"]["plain"][-1] == [400, pytest.approx(400 * 32 / 64 / 3600)]
    text = capsys.readouterr().out
    assert "| ours | 10 at step 400 | step 300 | 1.33 times | 0.67 times |" in text
    assert "| slow | 25 at step 400 | not reached | – | – |" in text
    assert "hours of the run" in text
    assert "50,000 images" in text
    assert Image.open(tmp_path / "out" / "curves.png").size == (1320, 960)
    assert not (tmp_path / "out" / "compare.png").exists()


def test_hours_of_gpus_where_the_runs_recorded_their_number(vae, tmp_path):
    record = {"processes": 8, "machine": "a processor, 2 cores; NVIDIA H100 80GB HBM3 x8"}
    runs = [make_run(tmp_path / name, vae, (), rows=straight(1, 0.5), record=record) for name in "ab"]
    axes, unit = curves.hours_axis(read_runs(runs)[0])
    assert unit == "GPU hours"
    assert axes["a"][-1] == (100, pytest.approx(8 * 100 * 32 / 64 / 3600))
    (runs[1] / "config.json").write_text(json.dumps({"config": {"batch_size": 32}}))
    axes, unit = curves.hours_axis(read_runs(runs)[0])
    assert unit == "hours of the run"
    assert axes["a"][-1] == (100, pytest.approx(100 * 32 / 64 / 3600))


def test_without_metrics_the_velocity_loss_is_compared_and_said_to_be(vae, tmp_path, capsys):
    """Both go straight to their end: the mean over 5 steps lags by 2 on both, so that it is got to 2 steps later."""
    plain = make_run(tmp_path / "plain", vae, (), rows=straight(1.0, 0.5))
    ours = make_run(tmp_path / "ours", vae, (), rows=straight(1.0, 0.0))
    run_compare([plain, ours], "--no-images", "--output-dir", tmp_path / "out")
    record = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert record["quantity"] == "velocity loss"
    assert record["metric"] is None
    assert record["baseline"]["best"] == pytest.approx(0.51)
    assert record["reach"][0]["steps"]["reached"] == pytest.approx(49 + 2)
    assert "No run has metrics: by the velocity loss" in capsys.readouterr().out
    assert Image.open(tmp_path / "out" / "curves.png").size == (1320, 480)


def test_a_baseline_without_metrics_is_said(vae, tmp_path, capsys):
    runs = [make_run(tmp_path / name, vae, (), rows=straight(1, 0.5)) for name in ("plain", "ours")]
    measured(runs[1], {100: 3.0})
    run_compare(runs, "--no-images", "--output-dir", tmp_path / "out")
    assert "Plain, the baseline, has no metrics: by the velocity loss" in capsys.readouterr().out


def test_of_several_ways_of_sampling_the_common_one_is_taken(vae, tmp_path):
    runs = [make_run(tmp_path / name, vae, (), rows=straight(1, 0.5)) for name in ("plain", "ours")]
    measured(runs[0], {50: 9.0, 100: 8.0})
    measured(runs[1], {50: 7.0})
    for step in (10, 20, 30):
        add_samples(runs[1] / "samples" / f"guided {step}", step, 2.0, {"fid": 1.0})
    add_samples(runs[1] / "samples" / "other seed", 50, 1.0, {"fid": 5.0}, seed=1)
    chosen = curves.choose_metric_curves(read_runs(runs)[0], None)
    assert chosen.curves == {"plain": [(50, 9.0), (100, 8.0)], "ours": [(50, 6.0)]}  # a mean over seeds
    assert curves.choose_metric_curves(read_runs(runs)[0], "is").metric == "is"


@pytest.mark.parametrize("name", ["$a^{b$", "_hidden", "日本", "a|b", "<b>"])
def test_names_do_not_disturb_the_curves(name, vae, tmp_path, capsys):
    runs = [make_run(tmp_path / each, vae, (), rows=straight(1, 0.5)) for each in ("plain", name)]
    run_compare(runs, "--no-images", "--output-dir", tmp_path / "out")
    assert name.replace("|", "\\|") in capsys.readouterr().out
    assert name in json.loads((tmp_path / "out" / "compare.json").read_text())["velocity"]["curves"]


# What does not fit.


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"side": 8}, r"other resolution \(a: 16, b: 32\); other latent shape \(a: \(4, 4, 4\), b: \(4, 8, 8\)\)"),
        ({"classes": 3}, r"other number of classes \(a: 5, b: 3\)"),
        ({"vae_digest": "f" * 64}, r"other VAE \(a: [0-9a-f]{12}, b: f{12}\)"),
        (
            {"steps": (11, 21)},
            r"expected a step that all runs have .* found none \(a: 10, 20; b: 11, 21\); give --no-images",
        ),
        ({"steps": ()}, r"found none \(a: 10, 20; b: none\)"),
        ({"config": {"label_dropout": 0.0}}, "--guidance-scale: expected 1 for b, .*: it has no null class, found"),
    ],
)
def test_runs_that_do_not_fit_are_refused(changes, expected, vae, tmp_path):
    a = make_run(tmp_path / "a", vae, rows=straight(1, 0.5))
    b = make_run(tmp_path / "b", vae, rows=straight(1, 0.5), **changes)
    with pytest.raises(ValueError, match=expected):
        run_compare([a, b], "--output-dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--steps", 10, 30], r"--steps: .* found none for 30 of a, 30 of b"),
        (["--classes", 5], "--classes: expected numbers from 0 to 4, found 5"),
        (["--metric", "fid"], "--metric: expected one of none"),
        (["--num-steps", 0], "--num-steps"),
        (["--samples", "nothing"], "expected a set of samples"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags, expected, vae, tmp_path):
    runs = [make_run(tmp_path / name, vae, rows=straight(1, 0.5)) for name in "ab"]
    with pytest.raises(ValueError, match=expected):
        run_compare(runs, "--output-dir", tmp_path / "out", *flags)


def test_other_input_that_does_not_fit_is_refused(vae, tmp_path):
    a = make_run(tmp_path / "a", vae, rows=straight(1, 0.5))
    with pytest.raises(ValueError, match="expected at least two runs"):
        run_compare([a])
    with pytest.raises(ValueError, match="found nothing at"):
        run_compare([a, tmp_path / "none"])
    empty = make_run(tmp_path / "empty", vae)
    with pytest.raises(ValueError, match="expected metrics or a log of the baseline, found neither"):
        run_compare([empty, a], "--output-dir", tmp_path / "out")
    other = make_vae(tmp_path / "other-vae", seed=1)
    with pytest.raises(ValueError, match="--vae: expected the VAE of a"):
        run_compare([a, empty], "--output-dir", tmp_path / "out", "--vae", other)
    stray = add_samples(tmp_path / "stray", 5, 1.0, {"fid": 1.0})
    with pytest.raises(ValueError, match="--samples: expected samples of these runs"):
        run_compare([a, empty], "--samples", stray)


def test_a_run_with_an_empty_log_is_not_measured(vae, tmp_path, capsys):
    a, b = make_run(tmp_path / "a", vae, rows=straight(1, 0.5)), make_run(tmp_path / "b", vae)
    run_compare([a, b], "--no-images", "--output-dir", tmp_path / "out")
    assert "| b | not measured | – | – | – |" in capsys.readouterr().out


def test_checkpoints_are_at_most_four_evenly_chosen_and_shared(vae, tmp_path):
    a = make_run(tmp_path / "a", vae, (1,))
    runs, _ = read_runs([a, shutil.copytree(a, tmp_path / "b")])
    for run, extra in zip(runs, ([5], [7]), strict=True):
        run.checkpoints[:] = sorted([*range(100, 1100, 100), *extra])
    assert side_by_side.choose_steps(runs, None) == [100, 400, 700, 1000]
    assert side_by_side.choose_steps(runs, [200, 100]) == [100, 200]
    assert side_by_side.choose_classes(None, 1000) == [0, 143, 285, 428, 571, 714, 856, 999]
    assert side_by_side.choose_classes(None, 3) == [0, 1, 2]


def test_results_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    write_result(tmp_path / "a", b"before", "--output-dir")
    real = Path.write_bytes

    def torn(path, content):
        real(path, content[:2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", torn)
    with pytest.raises(ValueError, match="--output-dir: cannot write"):
        write_result(tmp_path / "a", b"after", "--output-dir")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"before")]


def test_mistakes_are_one_line_and_help_loads_nothing_heavy(tmp_path):
    command = [sys.executable, "-m", "analysis.compare", str(tmp_path / "a"), str(tmp_path / "b")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    done = subprocess.run([*command[:3], "a"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr[:34]) == (2, "error: expected at least two runs,")
    command = [sys.executable, "-X", "importtime", "-m", "analysis.compare", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    loaded = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert not loaded & {"torch", "PIL", "numpy", "matplotlib"}
    assert cli.parse(CompareConfig, ["--runs", "a", "b"]).runs == ("a", "b")
