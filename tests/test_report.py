"""The page about runs: true to the log, harmless, bounded, and working in a real browser."""

import dataclasses
import html
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from analysis import report
from evaluations.evaluator import METRICS
from reporting import report as page
from reporting.metrics import describe
from reporting.report import thinned, write_report
from reporting.runs import Samples, direction, distinct_names, hours, read_runs
from reporting.values import evenly

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = "<img src=x onerror=alert(1)>&\"'"


def log_row(step, velocity=None, **changes):
    velocity = 0.3 + 1 / (1 + step) if velocity is None else velocity
    row = {
        "step": step,
        "epoch": step / 100,
        "loss": velocity + 0.25,
        "velocity": velocity,
        "align_vae": 0.25,
        "grad_norm": 0.5,
        "skipped_steps": 0,
        "spikes": 0,
        "images_per_second": 64.0,
        "memory_gib": 1.5,
        "eta_seconds": 60.0,
    }
    return row | changes


def make_run(folder, rows=(), grids=(), side=64, **settings):
    """A run's directory as train.py leaves it, but for checkpoints."""
    (folder / "samples").mkdir(parents=True)
    config = {"model": "SiT-B/2", "batch_size": 32, "max_train_steps": 100, "learning_rate": 1e-4} | settings
    record = {
        "config": config,
        "data_digest": "d" * 64,
        "versions": {"torch": "2.6.0"},
        "git_revision": "abc123",
        "machine": "a machine",
        "date": "2026-01-02T03:04:05+00:00",
        "initial": None,
    }
    (folder / "config.json").write_text(json.dumps(record))
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step in grids:
        picture = np.random.default_rng(step).integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(picture).save(folder / "samples" / f"{step:07d}.png", compress_level=1)
    return folder


def add_samples(folder, step, scale, metrics, interval=(0.0, 1.0), checkpoint="", **settings):
    """A set of samples as sample_ddp.py leaves it."""
    folder.mkdir(parents=True)
    settings = {
        "checkpoint_digest": "c",
        "step": step,
        "sampler": "sde",
        "num_steps": 250,
        "last_t": 0.04,
        "guidance_scale": scale,
        "guidance_interval": None if scale == 1 else list(interval),
        "num_samples": 50_000,
        "labels": "random",
        "classes": None,
        "seed": 0,
    } | settings
    (folder / "samples.json").write_text(json.dumps({"settings": settings, "checkpoint": checkpoint}))
    if metrics is not None:
        content = {
            "metrics": metrics,
            "reference": {"path": "ref.npz", "sha256": "0123456789"},
            "warnings": [],
            "sampling": {"settings": settings},
        }
        (folder / "metrics.json").write_text(json.dumps(content))
    return folder


def embedded(path):
    """The numbers in the page, read as the browser does."""
    text = path.read_text()
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    return json.loads(found, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def words(path):
    """What there is to read without the script."""
    text = re.sub(r"<(script|style)[^>]*>.*?</\1>", "", path.read_text(), flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", text)).split())


def test_the_numbers_in_the_page_are_those_of_the_log(tmp_path):
    rows = [log_row(step) for step in range(1, 101)]
    run = make_run(tmp_path / "run", rows)
    data = embedded(write_report([run], tmp_path / "r.html"))
    (columns,) = (run["columns"] for run in data["runs"])
    for name in ("step", "loss", "velocity", "align_vae", "grad_norm", "images_per_second", "memory_gib"):
        assert columns[name] == [row[name] for row in rows]
    titles = [chart["title"] for chart in data["charts"]]
    assert titles[:3] == ["total loss", "velocity loss", "alignment loss, vae"]
    assert not any("spikes" in title for title in titles)  # nothing to see there
    text = words(tmp_path / "r.html")
    assert "100 of 100" in text
    assert f"velocity loss {rows[-1]['velocity']:.4g}" in text
    assert "a machine" in text
    assert "abc123" in text
    assert "d" * 64 in text


def test_numbers_that_are_not_finite_are_null(tmp_path):
    bad = log_row(2, math.nan, loss=math.inf, skipped_steps=3)
    run = make_run(tmp_path / "run", [log_row(1), bad, log_row(3), log_row(4, -math.inf)])
    data = embedded(write_report([run], tmp_path / "r.html"))
    assert data["runs"][0]["columns"]["velocity"] == [log_row(1)["velocity"], None, log_row(3)["velocity"], None]
    assert data["runs"][0]["columns"]["loss"][1] is None
    assert "steps not applied 3" in words(tmp_path / "r.html")
    assert any("not applied" in chart["title"] for chart in data["charts"])


def test_a_long_log_is_thinned_and_keeps_its_last_row_and_its_events(tmp_path):
    rows = [log_row(step) for step in range(1, 9001)]
    for index in (1234, 7777):
        rows[index] |= {"skipped_steps": 1, "loss": math.nan}
    run = make_run(tmp_path / "run", rows)
    data = embedded(write_report([run], tmp_path / "r.html"))
    steps = data["runs"][0]["columns"]["step"]
    assert 1900 <= len(steps) <= page.MAX_POINTS
    assert steps == sorted(set(steps))
    assert {1, 1235, 7778, 9000} <= set(steps)
    assert "of 9,000 rows are drawn" in words(tmp_path / "r.html")
    assert max(b - a for a, b in itertools.pairwise(steps)) <= 6


def test_thinning_keeps_to_its_count_when_everything_is_an_event():
    rows = [log_row(step, skipped_steps=1) for step in range(1000)]
    kept = [row["step"] for row in thinned(rows, 100)]
    assert len(kept) <= 100
    assert kept[-1] == 999


@pytest.mark.parametrize(("count", "limit"), [(1, 1), (5, 5), (5, 9), (100, 7), (7, 2), (3, 1)])
def test_evenly_chosen_items(count, limit):
    chosen = evenly(range(count), limit)
    assert len(chosen) == min(count, limit)
    assert chosen == sorted(set(chosen))
    assert chosen[-1] == count - 1
    distances = np.diff(chosen)
    assert distances.size == 0 or distances.max() - distances.min() <= 1


def test_names_from_files_are_harmless(tmp_path):
    run = make_run(tmp_path / EVIL, [log_row(1)], grids=(1,), model=EVIL, **{f"{EVIL}</script>": EVIL})
    closing = make_run(tmp_path / "a<!--<script>", [log_row(1)])
    add_samples(run / "samples" / f"{EVIL}set", 1, 1.0, {EVIL: 1.0, "fid": 2.0}, sampler=EVIL)
    add_samples(run / "samples" / "second", 1, 2.0, {EVIL: 1.0, "fid": 3.0}, sampler="</script><script>alert(1)")
    text = write_report([run, closing], tmp_path / "r.html").read_text()
    assert "<img src=x" not in text
    assert "<!--" not in text
    assert text.count("<script") == text.count("</script>") == 2  # the numbers and ours
    assert embedded(tmp_path / "r.html")["runs"][0]["name"] == EVIL
    assert EVIL in words(tmp_path / "r.html")


def test_the_page_needs_nothing_beside_it(tmp_path):
    text = write_report([make_run(tmp_path / "run", [log_row(1)], grids=(1, 2))], tmp_path / "r.html").read_text()
    assert "http://www.w3.org/2000/svg" in text  # names of kinds of elements, which nobody fetches
    assert set(re.findall(r"\w+://[^\"\s]+", text)) == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xhtml"}
    assert all(source.startswith("data:image/") for source in re.findall(r'(?:src|href)="([^"]*)"', text))
    assert "default-src 'none'" in text


def test_many_grids_stay_within_5_mb_and_training_waits_2_s_at_most(tmp_path):
    run = make_run(tmp_path / "run", [log_row(step) for step in range(1, 4001)])
    picture = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    Image.fromarray(picture).resize((1034, 1034), Image.Resampling.BICUBIC).save(run / "samples" / "0000001.png")
    for step in range(2, 41):
        shutil.copy(run / "samples" / "0000001.png", run / "samples" / f"{step:07d}.png")
    begin = time.process_time()
    write_report([run], tmp_path / "r.html")
    assert time.process_time() - begin < 4  # of the processor, in two threads
    assert (tmp_path / "r.html").stat().st_size < 5e6
    assert embedded(tmp_path / "r.html")["grid_steps"] == evenly(range(1, 41), 24)
    assert "24 of 40 steps are shown" in words(tmp_path / "r.html")


def test_many_runs_with_noise_for_grids_stay_within_5_mb(tmp_path):
    runs = [
        make_run(tmp_path / f"run{index}", [log_row(step) for step in range(1, 1001)], grids=range(1, 8), side=400)
        for index in range(12)
    ]
    write_report(runs, tmp_path / "r.html")
    assert (tmp_path / "r.html").stat().st_size < 5e6
    data = embedded(tmp_path / "r.html")
    assert len(data["grid_steps"]) == 4
    assert all(run["columns"]["step"][-1] == 1000 for run in data["runs"])


def test_grids_of_several_runs_are_those_that_all_have(tmp_path):
    a = make_run(tmp_path / "a", grids=range(10, 1001, 10), side=8)
    b = make_run(tmp_path / "b", grids=range(25, 1001, 25), side=8)
    runs, _ = read_runs([a, b])
    steps = page.choose_steps(runs, 24)
    assert len(steps) <= 24
    shared = [step for step in steps if step % 50 == 0]
    assert shared == evenly(range(50, 1001, 50), 18)
    assert page.choose_steps(runs[:1], 24) == evenly(range(10, 1001, 10), 24)


def test_damaged_grids_are_named_and_left_out(tmp_path):
    run = make_run(tmp_path / "run", grids=(1, 2))
    (run / "samples" / "0000003.png").write_bytes((run / "samples" / "0000002.png").read_bytes()[:200])
    (run / "samples" / "0000004.png").write_bytes(b"no picture")
    text = words(write_report([run], tmp_path / "r.html"))
    assert "2 pictures cannot be read, the first of them" in text
    assert (tmp_path / "r.html").read_text().count("<img") == 2


def test_runs_without_samples_or_rows(tmp_path):
    text = words(write_report([make_run(tmp_path / "new")], tmp_path / "r.html"))
    for expected in ("No samples yet", "No rows in the log yet", "no rows in the log yet", "No samples were measured"):
        assert expected in text
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "log.jsonl").write_text('{"step": 1, "velocity": 0.5}\n3\n{"velocity": 1}\n{"st')
    text = words(write_report([tmp_path / "bare"], tmp_path / "r.html"))
    assert "velocity loss 0.5" in text
    assert "Not recorded" in text


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (lambda run: shutil.rmtree(run), "found nothing at"),
        (lambda run: [shutil.rmtree(run), run.mkdir()], "expected the directory of a run .* found none of these in"),
        (lambda run: (run / "config.json").write_text("{"), r"expected JSON in .*config.json"),
        (lambda run: (run / "config.json").write_text("[1]"), "expected a JSON object .* found a list"),
        (lambda run: (run / "log.jsonl").write_bytes(b"\xff\xfe\x00"), "found bytes that are no text"),
    ],
)
def test_what_is_no_run_is_refused(harm, expected, tmp_path):
    run = make_run(tmp_path / "run", [log_row(1)])
    harm(run)
    with pytest.raises(ValueError, match=expected):
        write_report([run], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_samples_that_are_none_and_runs_named_twice_are_refused(tmp_path):
    run = make_run(tmp_path / "run", [log_row(1)])
    with pytest.raises(ValueError, match=r"expected a set of samples .* found nothing at"):
        write_report([run], tmp_path / "r.html", [tmp_path / "none"])
    with pytest.raises(ValueError, match="expected different runs, found"):
        write_report([run, run / ".." / "run"], tmp_path / "r.html")
    with pytest.raises(ValueError, match="expected 1 to 32 runs"):
        write_report([run] * 33, tmp_path / "r.html")


@pytest.mark.parametrize(
    "settings", [{"guidance_scale": "2"}, {"guidance_interval": [0, "x"]}, {"guidance_interval": 3}, {"classes": 1}]
)
def test_damaged_records_of_samples_are_refused(settings, tmp_path):
    run = make_run(tmp_path / "run")
    add_samples(run / "samples" / "a", 10, 2.0, {"fid": 5.0}, **settings)
    with pytest.raises(ValueError, match=r"expected a record of samples .* found another in"):
        write_report([run], tmp_path / "r.html")


def test_names_are_told_apart():
    assert distinct_names([Path("/a/x/run"), Path("/a/y/run"), Path("/b")]) == ["x/run", "y/run", "b"]
    assert distinct_names([Path("/a/run")]) == ["run"]


def test_the_page_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    run, output = make_run(tmp_path / "run", [log_row(1)]), tmp_path / "out" / "r.html"
    write_report([run], output)
    before = output.read_bytes()
    real = Path.write_bytes

    def torn(path, content):
        real(path, content[:100])
        raise OSError(28, "No space left on device")

    def not_renamed(source, target):
        assert Path(source).parent == output.parent  # a rename is atomic within one file system
        raise OSError(28, "No space left on device")

    for owner, name, broken in ((Path, "write_bytes", torn), (os, "replace", not_renamed)):
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, broken)
            with pytest.raises(ValueError, match=r"--output: cannot write .* \(No space left on device\)"):
                write_report([run], output)
        assert output.read_bytes() == before
        assert [path.name for path in output.parent.iterdir()] == ["r.html"]


def test_directions_are_those_of_the_metrics():
    better = {"frechet": -1, "kid": -1, "mind": -1} | dict.fromkeys(
        "score precision recall density coverage".split(), 1
    )
    for network in METRICS.values():
        for name, (kind, _) in network.items():
            assert direction(name) == better[kind], name
    assert direction("cmmd") == 0
    assert direction("dinov2-mmd") == -1


def sweep(run):
    """FID with its least value at guidance 2, on t 0 to 0.7, at step 20."""
    for step in (10, 20):
        add_samples(run / "samples" / f"{step}-none", step, 1.0, {"fid": 40.0 - step, "is": 50.0})
        for high in (0.7, 1.0):
            for scale in (1.5, 2.0, 4.0):
                metrics = {"fid": 20 + (scale - 2) ** 2 + high - step / 10, "is": 50 + 10 * scale}
                add_samples(run / "samples" / f"{step}-{scale}-{high}", step, scale, metrics, (0.0, high))


def test_a_sweep_is_drawn_over_guidance_and_its_best_is_named(tmp_path):
    run = make_run(tmp_path / "run")
    sweep(run)
    data = embedded(write_report([run], tmp_path / "r.html"))
    charts = {chart["title"]: chart["series"] for chart in data["charts"]}
    lines = {line["label"]: line for line in charts["fid over guidance scale, lower is better"]}
    assert set(lines) == {f"step {step}, {words}" for step in (10, 20) for words in ("all t", "t 0 to 0.7")}
    line = lines["step 20, t 0 to 0.7"]
    assert line["x"] == [1.0, 1.5, 2.0, 4.0]  # without guidance there is no interval: the point is in both lines
    assert line["y"] == pytest.approx([20.0, 18.95, 18.7, 22.7])
    over_steps = {line["label"]: line for line in charts["fid over step, lower is better"]}
    assert over_steps["guidance 2, on t 0 to 0.7"]["x"] == [10, 20]
    assert over_steps["guidance 1"]["y"] == [30.0, 20.0]
    text = words(tmp_path / "r.html")
    assert "Best by fid: 18.7 with step 20, guidance 2 on t 0 to 0.7, sde, 250 steps." in text
    assert "By is: 90 with step 10, guidance 4 on t 0 to 0.7" in text


def test_metrics_of_other_counts_are_not_compared(tmp_path):
    run = make_run(tmp_path / "run")
    add_samples(run / "samples" / "a", 10, 1.0, {"fid": 5.0})
    add_samples(run / "samples" / "b", 20, 1.0, {"fid": 4.0})
    add_samples(run / "samples" / "few", 30, 1.0, {"fid": 1.0}, num_samples=100)
    text = words(write_report([run], tmp_path / "r.html"))
    assert "Best by fid: 4" in text
    assert "100 images against ref.npz" in text


def test_metrics_of_samples_that_are_gone_are_left_out(tmp_path):
    run = make_run(tmp_path / "run")
    folder = add_samples(run / "samples" / "a", 10, 1.0, {"fid": 5.0})
    record = json.loads((folder / "samples.json").read_text())
    record["settings"]["seed"] = 1
    (folder / "samples.json").write_text(json.dumps(record))
    text = words(write_report([run], tmp_path / "r.html"))
    assert "is of samples with other settings" in text
    assert "No samples were measured" in text


def test_samples_elsewhere_find_their_run(tmp_path):
    run, other = make_run(tmp_path / "run"), make_run(tmp_path / "other")
    checkpoint = run / "checkpoints" / "0000010"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"digests": {"ema.safetensors": "mine"}}))
    by_digest = add_samples(tmp_path / "s1", 10, 1.0, {"fid": 5.0}, checkpoint_digest="mine")
    by_path = add_samples(tmp_path / "s2", 20, 1.0, {"fid": 4.0}, checkpoint=str(run / "checkpoints" / "0000020"))
    wrong = add_samples(tmp_path / "s3", 10, 1.0, None, checkpoint=str(checkpoint), checkpoint_digest="not mine")
    shutil.move(by_digest / "metrics.json", tmp_path / "metrics.json")  # as the demo has it
    Image.new("RGB", (8, 8)).save(by_digest / "samples.png")
    runs, others = read_runs([other, run], [by_digest, tmp_path / "metrics.json", by_path, wrong])
    assert runs[0].samples == []
    assert [(found.step, found.metrics) for found in runs[1].samples] == [(10, {"fid": 5.0}), (20, {"fid": 4.0})]
    assert runs[1].samples[0].picture == by_digest / "samples.png"  # metrics and pictures of the same samples
    assert [found.path for found in others] == [wrong]


def test_settings_that_differ_between_runs_are_set_out(tmp_path):
    a = make_run(tmp_path / "a", learning_rate=1e-4, align="none")
    b = make_run(tmp_path / "b", learning_rate=3e-4, align="none")
    text = write_report([a, b], tmp_path / "r.html").read_text()
    first = text[text.index("<h2>Settings</h2>") : text.index("<details>")]
    assert "--learning-rate" in first
    assert "0.0003" in first
    assert "--align" not in first
    assert "--align" in text
    assert "trained on different data" not in text


def headings(path):
    """The groups of settings, in order."""
    return re.findall(r"<h3>(.*?)</h3>", path.read_text())


def test_settings_are_grouped_as_the_record_says(tmp_path):
    run = make_run(tmp_path / "run", invented=1)
    assert headings(write_report([run], tmp_path / "r.html")) == ["settings"]  # the record of an old run has no groups
    record = json.loads((run / "config.json").read_text())
    record["groups"] = {"model": ["model", "align"], "training": ["batch_size", "max_train_steps", "learning_rate"]}
    (run / "config.json").write_text(json.dumps(record))
    assert headings(write_report([run], tmp_path / "r.html")) == ["model", "training", "others"]
    text = words(tmp_path / "r.html")
    assert "model --model SiT-B/2 training --batch-size 32" in text
    assert "others --invented 1" in text


def test_samples_of_older_records_are_compared_with_newer_ones(tmp_path):
    run = make_run(tmp_path / "run")
    old = add_samples(run / "samples" / "old", 10, 1.0, {"fid": 5.0})
    record = json.loads((old / "samples.json").read_text())["settings"]
    record = {("last_step_size" if name == "last_t" else name): value for name, value in record.items()}
    record |= {"step": 20, "unknown_yet": 1, "diffusion_form": "linear", "diffusion_norm": 1.0, "last_step": "mean"}
    record |= {"time_shift": 1.0, "guidance_channels": "all", "autoguidance_digest": None, "atol": None, "rtol": None}
    record |= {"uint8_rule": "floor(clamp(127.5 * x + 128, 0, 255))"}
    new = run / "samples" / "new"
    new.mkdir()
    (new / "samples.json").write_text(json.dumps({"settings": record}))
    (found,), _ = read_runs([run])
    one, two = found.samples
    assert one.recipe() == two.recipe()
    assert "last step of 0.04" in one.recipe()
    for name, value, text in (
        ("diffusion_form", "sigma", "diffusion sigma"),
        ("diffusion_norm", 0.5, "diffusion norm 0.5"),
        ("last_step", "euler", "last step by euler"),
        ("atol", 1e-6, "atol 1e-06"),
        ("rtol", 1e-3, "rtol 0.001"),
        ("guidance_channels", "3", "on 3 channels"),
        ("time_shift", 2.5, "times shifted by 2.5"),
        ("autoguidance_digest", "ab" * 32, "autoguided by abababababab"),
        ("head_guidance", 1.2, "head guidance 1.2"),
        ("head_guidance_interval", (0.1, 1.0), "by the head on t 0.1 to 1"),
        ("uint8_rule", "floor(clamp(255 * (x + 1) / 2, 0, 255))", "pixels cut off"),
    ):
        other = dataclasses.replace(two, settings=two.settings | {name: value})
        assert set(other.recipe()) - set(one.recipe()) == {text}


def test_hours_add_up_over_changes_of_speed_and_of_rows():
    rows = [log_row(10, images_per_second=100.0), log_row(30, images_per_second=50.0)]
    rows += [log_row(31, images_per_second=math.nan), log_row(40, images_per_second=100.0)]
    assert np.array(hours(rows, 20)) * 3600 == pytest.approx([2.0, 10.0, 10.0, 11.8])


def test_the_command_writes_beside_the_run_and_starts_quickly(tmp_path):
    run = make_run(tmp_path / "run", [log_row(1)])
    command = [sys.executable, "-m", "analysis.report"]
    done = subprocess.run([*command, str(run)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (run / "report.html").is_file()
    done = subprocess.run([*command, str(tmp_path / "none")], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    code = "import sys, analysis.report; print([name for name in ('torch', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n"


def test_several_runs_go_to_the_current_directory(tmp_path, monkeypatch):
    runs = [str(make_run(tmp_path / name, [log_row(1)])) for name in "ab"]
    monkeypatch.chdir(tmp_path)
    report.main(runs)
    assert (tmp_path / "report.html").is_file()
    report.main([*runs, "--output", "other.html"])
    assert (tmp_path / "other.html").is_file()


# What follows opens the page in a browser.

browser = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (apt-get install chromium), found none")


def opened(path, *flags):
    """The page's elements once its script has run, and the lines of the console."""
    command = [
        CHROMIUM,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        f"--user-data-dir={path.parent / 'profile'}",
        "--virtual-time-budget=3000",
        *flags,
        "--dump-dom",
        path.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def probe(path, script):
    """What `script`, run in a copy of the page at 400 px of width, gives as JSON.

    The copy stands in a frame: a window cannot be as narrow. The policy is taken out, as it would forbid the script.
    """
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", path.read_text())
    send = f"<script>parent.postMessage(JSON.stringify((() => {{{script}}})()), '*')</script></body>"
    inner = path.with_name("inner.html")
    inner.write_text(text.replace("</body>", send))
    outer = path.with_name("outer.html")
    outer.write_text(
        "<body><pre id=result></pre><script>onmessage = (event) => {"
        "document.getElementById('result').textContent = event.data}</script>"
        f"<iframe src='{inner.as_uri()}' style='width:400px;height:900px;border:0'></iframe></body>"
    )
    elements, _ = opened(outer)
    return json.loads(html.unescape(re.search(r'<pre id="result">(.*?)</pre>', elements, re.DOTALL)[1]))


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """A page with everything that there is to see: two runs, one with an evil name, grids, a sweep, NaN."""
    folder = tmp_path_factory.mktemp("browser")
    rows = [log_row(step) for step in range(1, 501)]
    rows[100] |= {"loss": math.nan, "velocity": math.inf, "skipped_steps": 2}
    run = make_run(folder / EVIL, rows, grids=(100, 300, 500), max_train_steps=500)
    sweep(run)
    other = make_run(folder / "other", [log_row(step, 0.4321) for step in range(1, 401)], grids=(100, 300))
    return write_report([run, other], folder / "r.html")


@browser
def test_the_browser_draws_the_last_numbers_and_complains_of_nothing(shown):
    elements, console = opened(shown)
    assert console == []
    text = html.unescape(re.sub(r"<[^>]+>", " ", elements))
    last = float(format(log_row(500)["velocity"], ".5g"))
    assert f"{EVIL}: {last}" in text
    assert "other: 0.4321 (at 400)" in text
    charts = len(embedded(shown)["charts"])
    assert elements.count("<svg ") == charts >= 8
    assert elements.count("<path ") >= charts
    assert "NaN" not in elements
    assert elements.count("<img ") == 5


@browser
def test_at_400_pixels_nothing_is_wider_than_the_window(shown):
    found = probe(shown, "const d = document.documentElement; return [innerWidth, d.scrollWidth, d.scrollHeight]")
    assert found[0] == 400
    assert found[1] <= 400
    assert found[2] > 2000


@browser
def test_the_slider_and_the_buttons_work(shown):
    script = """
        const slider = document.getElementById("slider"), seen = [];
        for (const place of [0, 2]) {
            slider.value = place;
            slider.dispatchEvent(new Event("input"));
            seen.push([...document.querySelectorAll("[data-grids]")].map((figure) =>
                [...figure.querySelectorAll("img")].filter((image) => image.checkVisibility()).map((image) => image.alt)
                .concat(figure.querySelector(".missing").checkVisibility() ? ["missing"] : [])));
        }
        const figure = document.querySelector("[data-chart]");
        const line = () => figure.querySelector("path").getAttribute("d");
        const before = line(), pieces = before.split("M").length - 1, button = figure.querySelector("button");
        button.click();
        const smooth = document.getElementById("smoothing"), label = button.textContent, after = line();
        smooth.value = 0.9;
        smooth.dispatchEvent(new Event("input"));
        const svg = figure.querySelector("svg"), box = svg.getBoundingClientRect();
        svg.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + 54 }));
        const output = slider.parentElement.querySelector("output").textContent;
        return { seen, output, label, pieces, changed: before !== after,
                 raw: figure.querySelectorAll("path.raw").length, legend: figure.querySelector(".legend").textContent };
    """
    found = probe(shown, script)
    assert found["seen"] == [[[f"{EVIL} at step 100"], ["other at step 100"]], [[f"{EVIL} at step 500"], ["missing"]]]
    assert found["output"] == "step 500"
    assert found["pieces"] == 2  # a gap where a row is not finite
    assert (found["label"], found["changed"], found["raw"]) == ("log", True, 2)
    assert found["legend"].startswith("step 1")
    assert f"{log_row(1)['loss']:.5g} (smooth" in found["legend"]


@browser
def test_an_evil_name_runs_nothing(shown):
    assert probe(shown, "return [document.querySelectorAll('[onerror]').length, document.scripts.length]") == [0, 3]


def test_a_recipe_that_few_have_is_said_and_decoders_are_told_apart(tmp_path):
    settings = {"step": 4, "sampler": "sde", "num_steps": 250, "guidance_scale": 1, "num_samples": 5}
    one = Samples(tmp_path, "xl2", settings, {}, {}, "", [], None)
    assert describe(one, False) == "step 4, no guidance, sde, 250 steps"
    guided = dataclasses.replace(
        one, settings=settings | {"head_guidance": 1.4, "time_shift": 1, "vae_decoder": "a" * 64}
    )
    assert describe(guided, False) == "step 4, no guidance, sde, 250 steps, head guidance 1.4"
    other = dataclasses.replace(guided, settings=guided.settings | {"vae_decoder": "b" * 64})
    assert guided.recipe() != other.recipe()
