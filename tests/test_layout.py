"""The house: what each room may import, how long files and functions may be, and what reads before torch."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {
    "runtime": (),
    "diffusion": ("runtime",),
    "models": ("runtime",),
    "loss": ("diffusion",),
    "dataset": ("runtime", "models"),
    "alignment": ("loss", "diffusion", "models", "runtime"),
    "sampling": ("runtime", "diffusion", "models"),
    "reporting": ("runtime",),
    "preprocessing": ("runtime", "models", "dataset"),
    "evaluations": ("runtime", "models", "dataset"),
    "training": ("runtime", "diffusion", "models", "loss", "dataset", "alignment", "reporting"),
}
BELOW = tuple(ROOMS)
ROOMS |= {"train": BELOW, "sample_ddp": BELOW, "analysis": (*BELOW, "train", "sample_ddp")}
ROOMS |= {"benchmarks": (*ROOMS, "demo"), "demo": (*ROOMS, "benchmarks")}
PATCHES = "benchmarks/cuda_audit.py"  # a program of its own that pretends to have a GPU
SCRIPTS = ("train.py", "sample_ddp.py", "loss.py", "dataset.py")
BEFORE_TORCH = {  # modules that define flags
    "analysis.compare_config",
    "runtime.cli",
    "runtime.files",
    "training.config",
    "alignment.settings",
    "sampling.config",
}


def sources():
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    names = listed or [str(p.relative_to(ROOT)) for p in ROOT.rglob("*.py") if ".venv" not in p.parts]
    return [name for name in names if not name.startswith("tests/")]


def imports(tree):
    """Top-level names of all modules that a file imports, inside functions too, and where."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0], node


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


@pytest.mark.parametrize("name", sources())
def test_arrows_point_one_way(name):
    room = Path(name).parts[0].removesuffix(".py")
    assert room in ROOMS, f"{name}: no such room"
    assert "/" in name or name in SCRIPTS, f"{name}: a file at the top level"
    allowed = {room, *ROOMS[room]}
    for module, node in imports(ast.parse((ROOT / name).read_text())):
        assert module not in ROOMS or module in allowed, f"{name}:{node.lineno}: {room} may not import {module}"
        assert module not in ("mock", "unittest") or name == PATCHES, f"{name}:{node.lineno}: patches are for tests"
        imported = {alias.name.split(".")[-1] for alias in node.names} | {(getattr(node, "module", "") or "")[-10:]}
        assert Path(PATCHES).stem not in imported, f"{name}:{node.lineno}: it patches torch for the whole process"


@pytest.mark.parametrize("name", sources())
def test_files_and_functions_are_short(name):
    text = (ROOT / name).read_text()
    assert len(text.splitlines()) <= 450, name
    limits = {"train_step": 25 + 1, "fit": 80}  # the loop and the step are read whole
    for function in functions(ast.parse(text)):
        body = function.body[1:] if ast.get_docstring(function) else function.body
        length = function.end_lineno - function.lineno + 1
        documented = function.body[0].end_lineno - function.body[0].lineno + 1 if body is not function.body else 0
        assert length - documented <= limits.get(function.name, 60), f"{name}: {function.name} has {length} lines"


def test_imports_stand_at_the_top():
    inside = [
        f"{name}:{node.lineno}"
        for name in sources()
        for function in functions(ast.parse((ROOT / name).read_text()))
        for _, node in imports(function)
    ]
    assert len(set(inside)) <= 25, inside


def test_skipped_formatting_is_rare():
    texts = [(ROOT / name).read_text() for name in sources()]
    texts += [path.read_text() for path in (ROOT / "tests").rglob("*.py")]
    assert sum(text.count("# fmt: " + "skip") for text in texts) <= 10


def test_flags_are_known_before_torch_is():
    command = f"import sys, {', '.join(sorted(BEFORE_TORCH))}; print({{'torch', 'numpy'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


@pytest.mark.parametrize(
    "name", [file.name for file in sorted((ROOT / "analysis").glob("*.py")) if "cli.run(main)" in file.read_text()]
)
def test_every_program_of_analysis_runs_as_a_file_too(name):
    done = subprocess.run([sys.executable, f"analysis/{name}", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout


def test_a_training_step_is_read_in_1300_lines():
    text = (ROOT / "README.md").read_text()
    listed = text.partition("To read one training step")[2].partition("For sampling")[0]
    files = re.findall(r"`([\w/]+\.py)`", listed)
    assert len(files) == 6
    assert sum(len((ROOT / name).read_text().splitlines()) for name in files) <= 1300
