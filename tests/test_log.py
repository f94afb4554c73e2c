import csv
import errno
import io
import json

import pytest

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


def test_a_new_column_gets_a_header_and_older_rows_stay(tmp_path):
    RunLog(tmp_path, 0).write(row(10))
    log = RunLog(tmp_path, 10)
    log.write(row(20) | {"new": 3.0})
    log.write(row(30) | {"new": 4.0})
    with open(tmp_path / "metrics.csv") as file:
        lines = list(csv.DictReader(file))
    assert [line["new"] for line in lines] == ["", "3.0", "4.0"]
    assert [line["loss"] for line in lines] == ["0.5"] * 3


def test_a_full_disk_costs_a_row_and_no_more(tmp_path, monkeypatch):
    log = RunLog(tmp_path, 0)
    log.write(row(10))

    class Full(io.StringIO):
        def __init__(self, *_, **__):
            super().__init__()

        def write(self, text):
            with open(tmp_path / "log.jsonl", "ab") as file:
                file.write(text[:9].encode())  # what still had room
            raise OSError(errno.ENOSPC, "No space left on device")

    real = open
    monkeypatch.setattr(
        "builtins.open", lambda path, mode="r", **how: (Full if mode == "a" else real)(path, mode, **how)
    )
    with pytest.warns(UserWarning, match="step 20 is not in .*No space left"):
        log.write(row(20))
    monkeypatch.undo()
    log.write(row(30))
    assert read_log(tmp_path) == [row(10), row(30)]
