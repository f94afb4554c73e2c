"""Every flag of every program with a wrong value: one line, exit code 2, no traceback, nothing changed."""

import dataclasses
import importlib
import typing

import pytest

from runtime import cli
from runtime.cli import REQUIRED

PROGRAMS = {
    "training.config": "TrainConfig",
    "sampling.config": "SampleConfig",
    "preprocessing.dump_latents": "DumpConfig",
    "preprocessing.import_latents": "ImportConfig",
    "evaluations.evaluate": "EvaluateConfig",
    "analysis.sweep": "SweepConfig",
    "analysis.doctor": "DoctorConfig",
    "demo.run": "DemoConfig",
    "analysis.report": "ReportConfig",
    "analysis.compare": "CompareConfig",
    "analysis.probe": "ProbeConfig",
    "analysis.cost": "CostConfig",
    "analysis.publish": "PublishConfig",
}


def flags():
    for module, name in PROGRAMS.items():
        config = getattr(importlib.import_module(module), name)
        hints = typing.get_type_hints(config)
        for field in dataclasses.fields(config):
            hint = str(hints[field.name])
            if field.metadata["choices"]:
                yield config, field.name, ["no such choice"]
            elif "bool" in hint:
                yield config, field.name, None
            elif "int" in hint or "float" in hint:
                yield config, field.name, ["no number"]
            else:
                yield config, field.name, []  # text: its value is missing


CASES = list(flags())


def test_there_are_more_than_a_hundred():
    assert len(CASES) > 100


@pytest.mark.parametrize(("config", "name", "values"), CASES, ids=[f"{c.__name__}-{n}" for c, n, _ in CASES])
def test_a_wrong_value_is_one_line_and_code_2(config, name, values, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spelling = "--" + name.replace("_", "-")
    argv = [f"{spelling}=maybe"] if values is None else [spelling, *values]
    for field in dataclasses.fields(config):
        if field.default is REQUIRED and field.name != name:
            argv += ["--" + field.name.replace("_", "-"), "x"]
    with pytest.raises(SystemExit) as stop:
        cli.parse(config, argv)
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert spelling in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("config", dict.fromkeys(config for config, _, _ in CASES), ids=lambda config: config.__name__)
def test_an_unknown_flag_is_named_with_the_nearest(config, capsys):
    known = dataclasses.fields(config)[-1].name.replace("_", "-")
    with pytest.raises(SystemExit) as stop:
        cli.parse(config, [f"--{known}x", "1"])
    assert stop.value.code == 2
    assert "unknown flag" in capsys.readouterr().err
