"""The EMA of another width after training, beside a run that tracked that width itself."""

import pytest
import torch

from analysis import posthoc_ema
from models.load import load_sit
from tests.stores import make_store
from tests.test_train import run


def test_a_posthoc_ema_is_the_one_that_the_run_tracked(tmp_path, capsys):
    make_store(tmp_path / "store")
    emas = {"ema_power": (0.05, 0.08, 0.1), "ema_snapshot_steps": 10}
    folder = run(tmp_path / "store", tmp_path, max_train_steps=40, log_every=20, **emas)
    for file in (folder / "ema_snapshots" / "0.08").iterdir():
        file.unlink()  # eight are left, of the two widths around it
    tracked, _ = load_sit(folder, "power-0.08")
    posthoc_ema.main([str(folder), "--sigma-rel", "0.08"])
    assert "8 snapshots" in capsys.readouterr().out
    found, info = load_sit(folder / "posthoc" / "0.08")
    assert info["step"] == 40
    assert info["class_names"] == ["class 0", "class 1", "class 2"]
    norm = error = 0.0
    for a, b in zip(tracked.state_dict().values(), found.state_dict().values(), strict=True):
        error += (a - b).square().sum().item()
        norm += a.square().sum().item()
    assert (error / norm) ** 0.5 < 1e-2

    for arguments, message in (
        (["--sigma-rel", "0.2"], "--sigma-rel: expected 0.05 to 0.1"),
        (["--sigma-rel", "0.08", "--step", "15"], "--step: expected one of"),
    ):
        with pytest.raises(ValueError, match=message):
            posthoc_ema.main([str(folder), *arguments])
    with pytest.raises(ValueError, match="--ema: expected one of ema, power"):
        load_sit(folder, "0.5")
    assert not torch.equal(tracked.blocks[0].mlp.fc1.weight, load_sit(folder)[0].blocks[0].mlp.fc1.weight)
