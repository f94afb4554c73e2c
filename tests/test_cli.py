"""Flags, YAML keys, and one line for a user's mistake."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from runtime import cli
from runtime.cli import REQUIRED, flag

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Config:
    source: str = flag(REQUIRED, "where from", group="data")
    rate: float = flag(1e-4, "speed, 100% of it", aliases=("--speed",), group="work")
    fast: bool | None = flag(None, "fast or not", group="work")
    span: tuple[float, float] = flag((0.0, 1.0), "range", group="work")
    sizes: tuple[int, ...] = flag((), "sizes", group="work")
    kind: str = flag("a", "kind", choices=("a", "b"), group="work")
    limit: int | None = flag(None, "most", group="work")


def test_defaults_and_flags():
    assert cli.parse(Config, ["--source", "x"]) == Config("x")
    found = cli.parse(Config, "--source x --speed 3e-4 --no-fast --span 0 .5 --sizes 1 2 3 --kind b --limit 7".split())
    assert found == Config("x", 3e-4, False, (0.0, 0.5), (1, 2, 3), "b", 7)


def test_config_file_sets_any_flag_and_the_command_line_wins(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("source: y\nspeed: 1e-3\nfast: true\nspan: [0, 0.5]\nsizes: 4\nkind: b\nlimit:\n")
    assert cli.parse(Config, ["--config", str(file)]) == Config("y", 1e-3, True, (0.0, 0.5), (4,), "b")
    assert cli.parse(Config, ["--kind", "a", "--config", str(file), "--no-fast"]).kind == "a"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("", "missing --source"),
        ("--source x --sped 1", "unknown flag --sped; did you mean --speed?"),
        ("--source x --rat 1", "unknown flag --rat; did you mean --rate?"),
        ("--source x --rate 1 --speed 2", "--speed: expected 1.0, as --rate says, found 2.0"),
        ("--source x --rate fast", "--rate/--speed: invalid float value: 'fast'"),
        ("--source x --kind c", "--kind: invalid choice: 'c'"),
        ("--source x --span 1", "--span: expected 2 arguments"),
        ("--source x --config /no/such.yaml", "--config /no/such.yaml: No such file"),
    ],
)
def test_mistakes_are_one_line_and_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.parse(Config, arguments.split())
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("error: ")
    assert message in error


@pytest.mark.parametrize(
    "text, message",
    [
        ("sorce: x", "unknown key sorce; did you mean source?"),
        ("rate: fast", "invalid float value"),
        ("fast: 3", "fast: expected true or false, found '3'"),
        ("- a", "expected lines of `key: value`, found a list"),
        ("a: [", "not YAML"),
        ("rate: 1\nspeed: 2", "--speed: expected 1.0, as --rate says, found 2.0"),
    ],
)
def test_mistakes_in_the_file_name_the_file(text, message, tmp_path, capsys):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(SystemExit) as stop:
        cli.parse(Config, ["--config", str(file)])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(file) in error
    assert message in error


def test_a_flag_and_its_other_name_may_agree_and_of_one_name_the_later_wins():
    assert cli.parse(Config, "--source x --rate 1 --speed 1.0".split()).rate == 1
    assert cli.parse(Config, "--source x --rate 1 --rate 2".split()).rate == 2


def test_help_groups_the_flags_and_shows_defaults(capsys):
    with pytest.raises(SystemExit):
        cli.parse(Config, ["--help"])
    text = capsys.readouterr().out
    assert text.index("data:") < text.index("--source") < text.index("work:") < text.index("--rate")
    assert "100% of it (default: 0.0001)" in text


def run_main(body, tmp_path):
    """Run `main` of a script that lies inside the project's folder, as the entry points do."""
    script = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from runtime import cli
source = {body!r}
scope = {{}}
exec(compile(source, {str(ROOT / "train.py")!r}, "exec"), scope)
cli.run(scope["main"])
"""
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)


def test_our_own_value_errors_are_one_line_and_library_ones_keep_their_traceback(tmp_path):
    ours = run_main("def main():\n    raise ValueError('expected 1, found 2')\n", tmp_path)
    assert (ours.returncode, ours.stderr) == (2, "error: expected 1, found 2\n")
    library = run_main("import fractions\ndef main():\n    fractions.Fraction('x')\n", tmp_path)
    assert library.returncode == 1
    assert "Traceback" in library.stderr


@dataclass(frozen=True)
class Texts:
    name: str = flag("x", "a name")
    number: float = flag(1.0, "a number")
    paths: tuple[str, ...] = flag((), "paths")
    on: bool = flag(False, "a switch")


@pytest.mark.parametrize(
    "text", ["no", "off", "0042", "1e-4", "12:30:45", "2024-01-01", "0x1f", "~x", "null0", "1_000"]
)
def test_a_scalar_of_a_config_file_is_the_text_that_stands_there(text, tmp_path):
    (tmp_path / "c.yaml").write_text(f"name: {text}\npaths: [{text}, a]\n")
    found = cli.parse(Texts, ["--config", str(tmp_path / "c.yaml")])
    assert (found.name, found.paths) == (text, (text, "a"))
    assert found == cli.parse(Texts, ["--name", text, "--paths", text, "a"])


def test_numbers_and_switches_are_typed_by_their_flag(tmp_path):
    (tmp_path / "c.yaml").write_text("number: 1e-4\non: True\nname:\n")
    assert cli.parse(Texts, ["--config", str(tmp_path / "c.yaml")]) == Texts("x", 1e-4, (), True)


def test_a_tilde_is_home_wherever_it_comes_from(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "c.yaml").write_text("name: ~/runs\npaths: [~, ~/a, b~]\n")
    found = cli.parse(Texts, ["--config", str(tmp_path / "c.yaml")])
    assert (found.name, found.paths) == ("/home/me/runs", ("/home/me", "/home/me/a", "b~"))
    assert cli.parse(Texts, ["--name", "~/runs"]).name == "/home/me/runs"
