import csv
import json

from reporting.log import RunLog, read_log


def row(step, loss=0.5):
    return {"step": step, "loss": loss, "grad_norm": 1.0}


def test_both_files_hold_every_row(tmp_path):
    log = RunLog(tmp_path, 0)
    log.write(row(10))
    log.write(row(20, loss=0.25))
    assert read_log(tmp_path) == [row(10), row(20, loss=0.25)]
    with open(tmp_path / "metrics.csv") as file:
        assert [{k: float(v) for k, v in line.items()} for line in csv.DictReader(file)] == read_log(tmp_path)


def test_a_resumed_run_logs_each_step_once(tmp_path):
    log = RunLog(tmp_path, 0)
    for step in (10, 20, 30):
        log.write(row(step))
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write(json.dumps(row(40))[:9])  # killed while writing
    resumed = RunLog(tmp_path, 20)
    resumed.write(row(30, loss=0.75))
    assert read_log(tmp_path) == [row(10), row(20), row(30, loss=0.75)]
    with open(tmp_path / "metrics.csv") as file:
        assert [line["step"] for line in csv.DictReader(file)] == ["10", "20", "30"]


def test_a_new_run_in_a_used_folder_starts_its_log_anew(tmp_path):
    RunLog(tmp_path, 0).write(row(10))
    RunLog(tmp_path, 0)
    assert read_log(tmp_path) == []
    assert (tmp_path / "metrics.csv").read_text() == ""
