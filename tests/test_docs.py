"""The README and docs/: commands have flags that exist, links lead somewhere, the page on a new alignment works."""

import dataclasses
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from runtime import cli
from tests.stores import make_store, make_vae

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = {
    "train.py": ("training.config", "TrainConfig"),
    "sample_ddp.py": ("sampling.config", "SampleConfig"),
    "preprocessing/dump_latents.py": ("preprocessing.dump_latents", "DumpConfig"),
    "preprocessing/import_latents.py": ("preprocessing.import_latents", "ImportConfig"),
    "evaluations.evaluate": ("evaluations.evaluate", "EvaluateConfig"),
    "analysis.sweep": ("analysis.sweep", "SweepConfig"),
    "analysis.doctor": ("analysis.doctor", "DoctorConfig"),
    "analysis.cost": ("analysis.cost", "CostConfig"),
    "analysis.probe": ("analysis.probe", "ProbeConfig"),
    "analysis.posthoc_ema": ("analysis.posthoc_ema", "PosthocConfig"),
    "analysis.report": ("analysis.report", "ReportConfig"),
    "analysis.compare": ("analysis.compare", "CompareConfig"),
    "analysis.publish": ("analysis.publish", "PublishConfig"),
}


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


def commands(page):
    """(program, its arguments) of each line that starts one, in blocks and in rows of tables."""
    text = "\n".join(blocks(page, "bash")) + "\n" + "\n".join(re.findall(r"`(\$[A-Z]+ [^`]*)`", page.read_text()))
    text = text.replace("\\\n", " ").replace("$TRAIN", "train.py").replace("$SAMPLE", "sample_ddp.py")
    text = re.sub(r'^(TRAIN|SAMPLE)="(.*)"$', r"\2", text, flags=re.M)
    for line in text.splitlines():
        words = shlex.split(line.replace(" &", ""), comments=not line.startswith("#SBATCH"))
        for place, word in enumerate(words):
            if word in PROGRAMS:
                yield word, words[place + 1 :]


def all_commands():
    return [pytest.param(*found, id=f"{page.stem}-{found[0]}") for page in PAGES for found in commands(page)]


def test_the_pages_have_commands_of_every_program():
    assert {parameter.values[0] for parameter in all_commands()} == set(PROGRAMS)
    assert len(all_commands()) > 40


@pytest.mark.parametrize("program, arguments", all_commands())
def test_each_flag_of_each_command_exists_and_takes_its_value(program, arguments):
    module, name = PROGRAMS[program]
    config = getattr(importlib.import_module(module), name)
    flags = arguments[next((place for place, word in enumerate(arguments) if word.startswith("--")), len(arguments)) :]
    required = [field for field in dataclasses.fields(config) if field.default is cli.REQUIRED]
    given = {word.partition("=")[0] for word in flags if word.startswith("--")}
    for missing in sorted(
        field.name for field in required if not given & set(cli._spellings(field))
    ):  # left out in a pattern such as $TRAIN, or given by position
        flags += [f"--{missing.replace('_', '-')}", "x", "y"][: 3 if missing == "runs" else 2]
    cli.parse(config, flags)


def test_links_lead_somewhere():
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert target.startswith("https://") or (page.parent / target).exists(), (page.name, target)


def project_in(folder):
    """A copy of the project's own files."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    names = listed.stdout.splitlines() if listed.returncode == 0 else []
    names = names or [str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py") if ".venv" not in path.parts]
    for name in names:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.mark.slow
def test_the_page_on_a_new_alignment_works_to_the_letter_and_every_program_of_analysis_on_its_run(tmp_path):
    page = ROOT / "docs" / "add-an-alignment.md"
    project = project_in(tmp_path / "project")
    vae = make_vae(tmp_path / "vae")
    make_store(project / "exps" / "demo" / "latents", count=192, images=True, vae=vae)
    method, entry, test = blocks(page, "python")
    assert len(method.splitlines()) <= 30
    (project / "alignment" / "blur.py").write_text(method)
    with open(project / "alignment" / "registry.py", "a") as file:
        file.write("\n\n" + entry)
    (project / "tests" / "test_blur.py").write_text(test)

    def run(line):
        words = shlex.split(line)
        assert words[0] == "python"
        command, environment = [sys.executable, *words[1:]], os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, (line, done.stdout, done.stderr)
        return done.stdout

    # The page.
    (script,) = blocks(page, "bash")
    for line in script.replace("\\\n", " ").splitlines():
        said = run(line)
    assert "SiT-XL/2 + blur" in said
    logs = {
        name: [json.loads(row) for row in (project / "exps" / name / "log.jsonl").read_text().splitlines()]
        for name in ("blur", "vae-blur")
    }
    assert "align_vae" not in logs["blur"][0]
    assert {"align_blur", "align_vae"} <= logs["vae-blur"][0].keys()
    assert logs["blur"][-1]["align_blur"] < logs["blur"][0]["align_blur"]
    run("python -m pytest -q tests/test_blur.py")

    # The programs.
    rows = {"train": {"model": "SiT-Ti/2", "max-train-steps": 2, "batch-size": 8, "sampling-steps": 0}}
    rows |= {"sample": {"num-samples": 16, "num-steps": 2}, "rows": {"blur": {"flags": {"align": "blur"}}}}
    (project / "rows.yaml").write_text(json.dumps(rows))
    programs = {
        "report": "exps/blur exps/vae-blur",
        "compare": f"exps/blur exps/vae-blur --num-steps 2 --vae {vae}",
        "doctor": "exps/blur",
        "publish": f"exps/vae-blur --include-vae --vae {vae}",
        "probe": "exps/vae-blur --data-dir exps/demo/latents --noise-levels 0.5 --device cpu",
        "cost": "--model SiT-Ti/2 --align blur --latent-size 8 --batch-size 4 --steps 1",
        "sweep": "--data-dir exps/demo/latents --reference exps/demo/latents --table rows.yaml "
        "--sample '--features vae'",
    }
    known = {name.removeprefix("analysis.") for name in PROGRAMS if name.startswith("analysis.")}
    assert programs.keys() == known - {"posthoc_ema"}  # which needs a run with --ema-power, and knows no method
    (project / "all.py").write_text(  # in one process: it is their start that takes time
        "import runpy, shlex, sys\n"
        f"for program, arguments in {programs}.items():\n"
        "    sys.argv = [program, *shlex.split(arguments)]\n"
        "    print('\\f' + program, flush=True)\n"
        "    try:\n"
        "        runpy.run_module(f'analysis.{program}', run_name='__main__')\n"
        "    except SystemExit as stop:\n"
        "        assert not stop.code, (program, stop.code)\n"
    )
    said = dict(part.split("\n", 1) for part in run("python all.py").split("\f")[1:])
    assert "(VAE-REPA at block 2; blur)" in said["probe"]
    assert "SiT-Ti/2 + blur" in said["cost"]
    (card,) = project.glob("exps/vae-blur/published/*/README.md")
    assert "# SiT-Ti/2 + VAE-REPA + blur, step 40\n" in card.read_text()
    assert (project / "exps" / "ablations" / "table.csv").read_text().count("\nblur,") == 1
