"""The GPU's suite runs whole, at a size for a CPU; the table in the README is that of the results."""

import json

import pytest

from benchmarks import bench_gpu, table


@pytest.mark.slow
def test_every_measurement_of_the_gpu_suite_gives_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_gpu, "decoding", lambda bench: {"images_per_second": 1.0})  # the SD-VAE takes minutes
    flags = "--models SiT-Ti/4 --batches 4 8 --steps 2 --sampling-steps 4 --sampling-batch 16 --latent-size 8"
    bench_gpu.main([*flags.split(), f"--output={tmp_path / 'gpu.json'}"])
    content = json.loads((tmp_path / "gpu.json").read_text())
    results = content["results"]
    assert {"machine", "versions", "date", "git_revision", "settings"} <= content.keys()
    assert [name for name, found in results.items() if "not_measured" in found] == []
    for head in ("with", "without"):
        for size in (4, 8):
            ours = results[f"train/SiT-Ti/4/{head}-head/batch-{size}/ours"]
            plain = results[f"train/SiT-Ti/4/{head}-head/batch-{size}/plain"]
            assert ours["times_plain"] == pytest.approx(ours["images_per_second"] / plain["images_per_second"])
            assert ours["images_per_second"] == pytest.approx(size / ours["seconds_per_step"])
            assert ours["share_of_measured_peak"] > 0
    means = [name for name in results if name.startswith("means/")]
    assert len(means) == 9
    where = results["means/SiT-Ti/4/batch-4/where_the_time_goes"]
    assert sum(where["shares"].values()) + where["idle"] == pytest.approx(1)
    assert results["sample/SiT-Ti/4/ours"]["times_plain"] > 0
    assert results["loop"]["images_per_second"] > 0


@pytest.mark.slow
def test_what_fails_or_has_no_time_left_says_so_and_the_rest_goes_on(tmp_path):
    flags = "--models SiT-Nope/4 --batches 4 --steps 1 --latent-size 8"
    bench_gpu.main([*flags.split(), "--seconds=0.01", f"--output={tmp_path / 'gpu.json'}"])
    results = json.loads((tmp_path / "gpu.json").read_text())["results"]
    assert "no time was left" in results["decode"]["not_measured"]
    assert "not_measured" in results["train/SiT-Nope/4"]


def test_the_readmes_table_is_that_of_the_results():
    """Written by `python -m benchmarks.table`."""
    assert table.table() in table.README.read_text()


def test_a_gpus_results_fill_the_rows_that_say_not_measured(tmp_path, monkeypatch):
    for file in table.RESULTS.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    results = {
        "train/SiT-XL/2/with-head/batch-32/ours": {"images_per_second": 612.4, "times_plain": 2.5},
        "sample/SiT-XL/2/ours": {"not_measured": "out of memory"},
    }
    content = {"machine": "a GPU", "settings": {"models": ["SiT-XL/2"]}, "results": results}
    (tmp_path / "gpu.json").write_text(json.dumps(content))
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    lines = table.table().splitlines()
    (row,) = [line for line in lines if "batch 32, beside a plain loop, on a GPU" in line]
    assert "| 612 images/s, 2.5 times |" in row
    assert any("sampling SiT-XL/2" in line and "| not measured |" in line for line in lines)
