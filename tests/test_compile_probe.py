"""torch.compile is tried before the first step: what is missing is a warning, or one line where it was asked for."""

import os
import subprocess
import sys

import pytest
import torch

from tests.stores import make_store
from tests.test_train import ROOT, settings
from training import compile_probe
from training.config import TrainConfig

CONFIG = TrainConfig(data_dir="x", compile=True)


def without_compiler(cache, *command):
    environment = os.environ | {"CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_without_a_compiler_an_explicit_flag_is_one_line(tmp_path):
    data = make_store(tmp_path / "store")
    done = without_compiler(tmp_path / "cache", "train.py", *settings(data, tmp_path / "out", compile=True))
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: --compile: expected torch.compile to work, found that it does not (")
    assert "/nowhere/g++" in last
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_without_a_compiler_a_default_is_a_warning(monkeypatch):
    monkeypatch.setattr(compile_probe, "compile_failure", lambda device: "no compiler")
    with pytest.warns(UserWarning, match=r"does not \(no compiler\): training goes on without it"):
        config = compile_probe.compile_if_possible(CONFIG, frozenset({"data_dir"}), torch.device("cpu"))
    assert config.compile is False
    with pytest.raises(ValueError, match=r"--compile: .*\(no compiler\); install a C\+\+ compiler"):
        compile_probe.compile_if_possible(CONFIG, frozenset({"compile"}), torch.device("cpu"))


def test_where_it_works_or_is_not_wanted_nothing_is_said(monkeypatch):
    monkeypatch.setattr(compile_probe, "compile_failure", lambda device: None)
    assert compile_probe.compile_if_possible(CONFIG, None, torch.device("cpu")) is CONFIG
    monkeypatch.setattr(compile_probe, "compile_failure", None)
    plain = TrainConfig(data_dir="x", compile=False)
    assert compile_probe.compile_if_possible(plain, None, torch.device("cpu")) is plain
