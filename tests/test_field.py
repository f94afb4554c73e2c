"""What users of REPA, SRA and iREPA expect by habit: the commands of REPA's README, presets of methods."""

import argparse
import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState

import sample_ddp
import train
from alignment.registry import METHODS
from alignment.terms import normalize_tokens
from loss import Alignment, alignment_loss
from models.load import latest_checkpoint, load_sit, read_state
from models.projector import ConvHead
from reporting.log import read_log
from runtime import cli
from runtime.files import fields_of
from sampling.config import SampleConfig
from tests.stores import ENCODER, make_store, make_vae
from tests.test_convert import random_state
from training.config import TrainConfig, settings_by
from training.run_dir import resumed_config

# sihyun-yu/REPA@67f7145, README.md: its two commands, with other paths.
TRAIN = """
accelerate launch train.py \
  --report-to="wandb" \
  --allow-tf32 \
  --mixed-precision="fp16" \
  --seed=0 \
  --path-type="linear" \
  --prediction="v" \
  --weighting="uniform" \
  --model="SiT-XL/2" \
  --enc-type="dinov2-vit-b" \
  --proj-coeff=0.5 \
  --encoder-depth=8 \
  --output-dir="exps" \
  --exp-name="linear-dinov2-b-enc8" \
  --data-dir=DATA
"""
GENERATE = """
torchrun --nnodes=1 --nproc_per_node=8 generate.py \
  --model SiT-XL/2 \
  --num-fid-samples 50000 \
  --ckpt CHECKPOINT \
  --path-type=linear \
  --encoder-depth=8 \
  --projector-embed-dims=768 \
  --per-proc-batch-size=64 \
  --mode=sde \
  --num-steps=250 \
  --cfg-scale=1.8 \
  --guidance-high=0.7
"""


def flags(command, **paths):
    """The words of a command behind its program; `paths` replace words in capitals."""
    words = shlex.split(command)
    words = words[next(place for place, word in enumerate(words) if word.endswith(".py")) + 1 :]
    for name, path in paths.items():
        words = [word.replace(name, str(path)) for word in words]
    return words


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """Accelerate keeps its state for the whole process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return make_store(folder / "store", images=True, vae=make_vae(folder / "vae"))


TOY = ["--model=SiT-S/4", f"--enc-type={ENCODER}", "--repa-weights=random", "--mixed-precision=no", "--report-to=none"]
TOY += "--sampling-steps 0 --num-workers 0 --batch-size 6 --max-train-steps 2".split()


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """The run of REPA's command at toy size."""
    output = tmp_path_factory.mktemp("exps")
    train.main([*flags(TRAIN, DATA=data), *TOY, f"--output-dir={output}"])
    return output / "linear-dinov2-b-enc8"


def test_repas_training_command_is_understood():
    config, given = cli.parse_given(TrainConfig, flags(TRAIN, DATA="x"))
    assert (config.align, config.repa_encoder, config.repa_weight, config.repa_depth) == (
        "repa",
        "dinov2-vit-b",
        0.5,
        (8,),
    )
    assert (config.model, config.path_type, config.report_to, config.seed) == ("SiT-XL/2", "linear", "wandb", 0)
    assert (config.mixed_precision, config.allow_tf32, config.data_dir) == ("fp16", True, "x")
    assert str(config.run_dir) == "exps/linear-dinov2-b-enc8"
    assert {"align", "repa_weight", "repa_depth", "enc_type"} <= given


def test_repas_sampling_command_is_understood():
    config = cli.parse(SampleConfig, flags(GENERATE, CHECKPOINT="x.pt"))
    expected = SampleConfig(
        checkpoint=("x.pt",),
        model="SiT-XL/2",
        num_samples=50_000,
        path_type="linear",
        encoder_depth=8,
        per_proc_batch_size="64",
        sampler="sde",
        num_steps=250,
        guidance_scale=(1.8,),
        guidance_high=(0.7,),
    )
    assert config == expected


def test_repas_commands_run_at_toy_size(trained, tmp_path, capsys):
    state = read_state(trained / "checkpoints" / "0000002")
    assert (state["config"]["align"], state["config"]["repa_depth"]) == ("repa", [8])
    words = flags(GENERATE, CHECKPOINT=trained)
    sample_ddp.main([*words, "--model=SiT-S/4", "--num-fid-samples=16", "--num-steps=2", f"--sample-dir={tmp_path}"])
    (record,) = tmp_path.glob("*/samples.json")
    assert record.parent.name == "linear-dinov2-b-enc8-0000002-sde2-cfg1.8-t0-0.7-seed0-n16"
    settings = json.loads(record.read_text())["settings"]
    assert (settings["sampler"], settings["num_steps"], settings["guidance_interval"]) == ("sde", 2, [0.0, 0.7])
    # fp16 stays refused on a CPU.
    if not torch.cuda.is_available():
        AcceleratorState._reset_state(reset_partial_state=True)
        with pytest.raises(ValueError, match="fp16: expected a GPU"):
            train.main([*flags(TRAIN, DATA=state["config"]["data_dir"]), *TOY, "--mixed-precision=fp16"])


def test_the_encoder_alone_means_repa_and_is_said(data, tmp_path, capsys):
    words = [f"--data-dir={data}", f"--output-dir={tmp_path}", "--exp-name=run", *TOY, "--encoder-depth", "2"]
    train.main([*words, "--max-train-steps=1"])
    said = capsys.readouterr().out
    assert "--enc-type: REPA is trained (--align repa)" in said
    assert "align    repa: block 2" in said


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--encoder-depth 3 --proj-coeff 0.2", {"align": "vae", "align_depth": (3,), "align_weight": 0.2}),
        (
            "--align repa --encoder-depth 3 --proj-coeff 0.2",
            {"repa_depth": (3,), "repa_weight": 0.2, "align_depth": None},
        ),
        ("--align sra --encoder-depth 3 --proj-coeff 0.2", {"sra_depth": (3,), "sra_weight": 0.2, "align_weight": 1.0}),
        ("--align vae --enc-type mae-vit-b", {"align": "vae", "repa_encoder": "mae-vit-b"}),
        ("--proj-coeff 0.2 --align-weight 0.2", {"align_weight": 0.2}),
        (
            "--prediction v --weighting uniform --fused-attn --resume-step 0 --no-legacy",
            {"time_distribution": "uniform"},
        ),
        ("--weighting lognormal --qk-norm", {"time_distribution": "logit-normal", "qk_norm": True, "time_std": 1.0}),
    ],
)
def test_repas_training_flags_set_the_term_that_is_trained(words, expected):
    config = dataclasses.asdict(cli.parse(TrainConfig, ["--data-dir", "x", *words.split()]))
    assert {name: config[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--mode ode", ("ode-euler", 0)),
        ("--mode ode --heun", ("ode-heun-repa", 0)),
        ("--heun --global-seed 3", ("ode-heun-repa", 3)),
        ("--mode ode --no-heun --sampler ode-euler --tf32", ("ode-euler", 0)),
        ("--legacy --no-qk-norm", ("sde", 0)),
    ],
)
def test_repas_sampling_flags_choose_the_sampler(words, expected):
    config = cli.parse(SampleConfig, ["--ckpt", "x", *words.split()])
    assert (config.sampler, config.seed) == expected


def refused(capsys, config_class, words):
    with pytest.raises(SystemExit) as stop:
        cli.parse(config_class, words.split())
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.count("\n") == 1
    return said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--proj-coeff 0.2 --align-weight 0.3", "--proj-coeff means --align-weight 0.2, found 0.3 beside it"),
        ("--cfg-prob 0.2 --label-dropout 0.3", "--label-dropout: expected 0.2, as --cfg-prob says, found 0.3"),
        ("--align repa --encoder-depth 3 --repa-depth 4", "--encoder-depth means --repa-depth 3, found 4"),
        ("--enc-type a --repa-encoder b", "--enc-type means --repa-encoder a, found b"),
        ("--align repa+vae --proj-coeff 0.2", "--proj-coeff: expected one method in --align, found repa+vae"),
        ("--align none --encoder-depth 2", "--encoder-depth: expected one method in --align, found none"),
        (
            "--weighting lognormal --time-distribution uniform",
            "--weighting means --time-distribution logit-normal, found uniform beside it",
        ),
        ("--no-fused-attn", "--no-fused-attn: attention is always the fused one"),
        ("--resume-step 50000", "--resume-step 50000: a run resumes from its newest checkpoint by itself"),
        ("--logging-dir logs", "--logging-dir logs: the log and the tracker's files stand in the run's directory"),
        ("--legacy", "--legacy: expected --label-dropout 0.19"),
        ("--align blur --encoder-depth 2", "--encoder-depth means --blur-depth, which does not exist"),
        ("--preset rpea", "--preset: expected one of irepa, irepa-code, repa, sra, sra-paper, vae-repa, found rpea"),
    ],
)
def test_what_repas_training_flags_cannot_mean_is_one_line(words, message, capsys):
    assert message in refused(capsys, TrainConfig, f"--data-dir x {words}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--cfg-scale 1.5 --guidance-scale 2", "--guidance-scale: expected 1.5, as --cfg-scale says, found 2"),
        ("--mode ode --sampler ode-dopri5", "--mode means --sampler ode-euler, found ode-dopri5 beside it"),
        ("--mode sde --heun", "--heun: expected --mode ode beside it, found --mode sde"),
        ("--projector-embed-dims wide", "--projector-embed-dims: expected widths such as 768,1024, found wide"),
    ],
)
def test_what_repas_sampling_flags_cannot_mean_is_one_line(words, message, capsys):
    assert message in refused(capsys, SampleConfig, f"--ckpt x {words}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model SiT-B/4", "--model: expected .*hidden_size 384.*found SiT-B/4"),
        ("--resolution 256", "--resolution: expected 32, which .* was trained with, found 256"),
        ("--num-classes 1000", "--num-classes: expected 3,"),
        ("--path-type cosine", "--path-type: expected linear,"),
        ("--qk-norm", "--qk-norm: expected False,"),
        ("--encoder-depth 4", "--encoder-depth: expected 8,"),
    ],
)
def test_what_a_command_says_of_the_checkpoint_is_compared_with_it(trained, words, message):
    config = cli.parse(SampleConfig, ["--ckpt", str(trained), *words.split()])
    with pytest.raises(ValueError, match=message):
        sample_ddp.load_model(config, str(trained), 0)


def test_repas_sampling_command_takes_repas_file(tmp_path):
    state = random_state() | {f"projectors.0.{k}.weight": torch.randn(3, 3) for k in (0, 2, 4)}
    args = argparse.Namespace(path_type="linear", prediction="v", resolution=64, encoder_depth=8)
    torch.save({"ema": state, "args": args, "steps": 400_000}, tmp_path / "0400000.pt")
    words = [*flags(GENERATE, CHECKPOINT=tmp_path / "0400000.pt"), "--legacy", "--model=SiT-Ti/4", "--resolution=64"]

    def found(*more):
        config = cli.parse(SampleConfig, [*words, *more])
        return sample_ddp.load_model(config, config.checkpoint[0], 1)[1]["format"]

    assert found() == "repa"
    with pytest.raises(ValueError, match=r"--encoder-depth: expected 8, .*found 4"):
        found("--encoder-depth=4")


def test_two_directories_for_one_result_are_refused():
    with pytest.raises(ValueError, match="--sample-dir: expected no --output-dir beside it, found a"):
        cli.parse(SampleConfig, "--ckpt x --sample-dir a --output-dir b".split())


def test_repas_names_of_the_vae(trained):
    config = cli.parse(SampleConfig, ["--ckpt", str(trained), "--vae", "ema"])
    assert sample_ddp.load_model(config, str(trained), 0)[1]["vae"] == "stabilityai/sd-vae-ft-ema"


def test_epochs_are_steps(data, tmp_path):
    words = [f"--data-dir={data}", f"--output-dir={tmp_path}", "--exp-name=run", "--align=none", *TOY[:1]]
    words += "--sampling-steps 0 --num-workers 0 --batch-size 6 --mixed-precision no".split()

    def steps(*more):
        train.main([*words, *more])
        AcceleratorState._reset_state(reset_partial_state=True)
        return load_sit(tmp_path / "run")[1]["step"]

    assert steps("--epochs=1") == 4  # 24 images in batches of 6
    assert steps() == 4  # the record has them
    assert steps("--epochs=2") == 8
    assert steps("--epochs=9", "--max-train-steps=10") == 10


# Settings by preset, from the sources that the files in configs/ name.
EVERY = {
    "path_type": "linear",
    "batch_size": 256,
    "learning_rate": 1e-4,
    "lr_schedule": "constant",
    "lr_warmup_steps": 0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_weight_decay": 0.0,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "ema_decay": (0.9999,),
    "label_dropout": 0.1,
    "align_time_range": (0.0, 1.0),
    "random_flip": False,
}
REPA = {
    "align": "repa",
    "repa_encoder": "dinov2-vit-b",
    "repa_weight": 0.5,
    "repa_schedule": "constant",
    "repa_objective": "cosine",
    "repa_head": "mlp",
    "repa_normalize": False,
}
IREPA = {"repa_weight": 1.0, "repa_head": "conv", "repa_normalize": True, "repa_normalize_share": 0.6}
SRA = {"align": "sra", "sra_t_max": 0.2, "sra_weight": 0.5, "sra_schedule": "constant"}
TABLE = {  # preset: (settings, blocks of B and XL that are aligned)
    "vae-repa": (
        {
            "align": "vae",
            "align_weight": 1.0,
            "align_schedule": "constant",
            "align_objective": "smooth_l1",
            "align_beta": 0.05,
            "align_head": "mlp",
            "align_layers": 5,
            "align_target": "sample",
        },
        {"align_depth": ((2,), (8,))},
    ),
    "repa": (REPA, {"repa_depth": ((4,), (8,))}),
    "irepa": (REPA | IREPA, {"repa_depth": ((4,), (8,))}),
    "irepa-code": (REPA | IREPA | {"repa_head": "conv1"}, {"repa_depth": ((4,), (8,))}),
    "sra": (SRA | {"sra_objective": "cosine_over_tokens"}, {"sra_depth": ((4,), (8,)), "sra_teacher_depth": (8, 20)}),
    "sra-paper": (
        SRA | {"sra_weight": 0.2, "sra_schedule": "sra", "sra_objective": "smooth_l1", "align_beta": 0.05},
        {"sra_depth": ((4,), (8,)), "sra_teacher_depth": (8, 20)},
    ),
}


def test_every_preset_is_in_the_table():
    assert {file.stem for file in cli.PRESETS.iterdir()} == set(TABLE)


@pytest.mark.parametrize("preset", TABLE)
def test_presets_are_exact(preset):
    # Each value is the file's own, not a default: defaults may change.
    given = cli.parse_given(TrainConfig, ["--data-dir", "x", "--preset", preset])[1]
    config = cli.parse(TrainConfig, ["--data-dir", "x", "--preset", preset])
    values, depths = TABLE[preset]
    found = dataclasses.asdict(config)
    assert {name: found[name] for name in EVERY | values} == EVERY | values
    fixed = settings_by(on_resume="fixed")  # what may change on resume is no wish to change it
    assert (set(values) | set(EVERY) - {"align_time_range", "random_flip"}) & fixed <= given
    assert not given & settings_by(on_resume="announced")
    assert config.preset == preset
    by_size = METHODS[config.align].default_depths
    assert {name: (by_size[name]["B"], by_size[name]["XL"]) for name in depths} == depths
    # Sources: a revision, or the paper.
    assert re.search(r"@[0-9a-f]{7}\b|arXiv 2601\.17830", (cli.PRESETS / f"{preset}.yaml").read_text())


def test_flags_win_over_a_preset_and_the_config_file(tmp_path, capsys):
    file = tmp_path / "config.yaml"
    file.write_text("preset: repa\nrepa-weight: 0.7\nlearning-rate: 2e-4\n")
    config = cli.parse(TrainConfig, f"--data-dir x --config {file} --learning-rate 3e-4 --encoder-depth 5".split())
    assert (config.preset, config.align, config.repa_weight) == ("repa", "repa", 0.7)
    assert (config.learning_rate, config.repa_depth, config.align_depth) == (3e-4, (5,), None)
    with pytest.raises(SystemExit):
        cli.parse(SampleConfig, "--checkpoint x --preset repa".split())
    assert "unknown flag --preset" in capsys.readouterr().err


def test_a_preset_is_recorded_and_resumed(data, tmp_path):
    words = [f"--data-dir={data}", f"--output-dir={tmp_path}", "--exp-name=run", "--model=SiT-Ti/4", *TOY[2:]]
    words += ["--repa-weights=random", f"--repa-encoder={ENCODER}", "--preset=irepa-code"]
    train.main(words)
    state = read_state(tmp_path / "run" / "checkpoints" / "0000002")
    assert (state["config"]["preset"], state["config"]["repa_head"]) == ("irepa-code", "conv1")
    AcceleratorState._reset_state(reset_partial_state=True)
    train.main([*words, "--max-train-steps=3"])
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match="--repa-head conv1 -> mlp"):
        train.main([word for word in words if not word.startswith("--preset")] + ["--preset=repa"])


def test_sras_objective_is_a_cosine_over_tokens():
    f, target = torch.randn(2, 2, 5, 7, dtype=torch.float64).unbind(1)
    cosine = (f * target).sum(1) / (f.square().sum(1) * target.square().sum(1)).sqrt()  # (2, 7)
    expected = (1 - cosine).mean()
    found = alignment_loss(f, target, torch.rand(2), Alignment(objective="cosine_over_tokens"))
    torch.testing.assert_close(found, expected)
    other = alignment_loss(f, target, torch.rand(2), Alignment(objective="cosine"))
    assert not torch.isclose(found, other)


def test_irepas_target_keeps_a_part_of_the_mean():
    x = torch.randn(2, 9, 5, dtype=torch.float64) + 3
    expected = (x - 0.6 * x.mean(1, keepdim=True)) / (x.std(1, keepdim=True, unbiased=False) + 1e-6)
    torch.testing.assert_close(normalize_tokens(x, 0.6), expected)


def test_the_share_of_the_mean_changes_the_training(data, tmp_path):
    words = [f"--data-dir={data}", "--model=SiT-Ti/4", *TOY[1:], "--repa-normalize", "--exp-name=run"]
    found = []
    for share in ("1", "0.6"):
        train.main([*words, f"--repa-normalize-share={share}", f"--output-dir={tmp_path / share}"])
        AcceleratorState._reset_state(reset_partial_state=True)
        found.append([row["align_repa"] for row in read_log(tmp_path / share / "run")])
    assert found[0] != found[1]


def test_a_1x1_convolution_sees_a_token_alone():
    tokens = torch.randn(2, 16, 8)
    head = ConvHead(8, 5, 1)
    expected = tokens @ head.weight[:, :, 0, 0].T + head.bias
    torch.testing.assert_close(head(tokens), expected)


def test_old_runs_of_sra_resume_with_what_they_recorded():
    """A record without these settings is of the paper's SRA."""
    fields = fields_of(TrainConfig)
    assert [fields[f"sra_{name}"].historic for name in ("weight", "schedule", "objective")] == [0.2, "sra", "smooth_l1"]
    config = TrainConfig("x")
    assert (config.sra_weight, config.sra_schedule, config.sra_objective) == (0.5, "constant", "cosine_over_tokens")
    old = dataclasses.asdict(config) | {"sra_weight": 0.2, "sra_schedule": "sra", "sra_objective": "smooth_l1"}
    resumed = resumed_config(config, frozenset({"align"}), old, Path("state.json"))
    assert (resumed.sra_weight, resumed.sra_schedule, resumed.sra_objective) == (0.2, "sra", "smooth_l1")


def test_a_preset_resumes_a_run_of_its_settings_and_leaves_its_learning_rate(data, tmp_path):
    words = [f"--data-dir={data}", f"--output-dir={tmp_path}", "--exp-name=run", *TOY[:1], "--sampling-steps=0"]
    words += "--num-workers 0 --batch-size 6 --mixed-precision no".split()
    train.main([*words, "--learning-rate=2e-4", "--max-train-steps=1"])
    train.main([*words, "--preset=vae-repa", "--batch-size=6", "--max-train-steps=2"])
    saved = read_state(latest_checkpoint(tmp_path / "run"))["config"]
    assert (saved["learning_rate"], saved["align"]) == (2e-4, "vae")
    with pytest.raises(ValueError, match="found --align vae -> sra"):
        train.main([*words, "--preset=sra", "--batch-size=6", "--max-train-steps=2"])
