"""The record of a checkpoint, `state.json`: older ones are read, newer ones are refused in one line."""

import pytest

from models import load
from models.sit import SiT, SiTConfig
from runtime.files import Field, read_checksummed_json, to_checksummed_json
from tests.stores import save_checkpoint

INFO = {
    "scale": {"scale": [0.9], "shift": [0.1]},
    "vae": "some/vae",
    "vae_digest": "abc",
    "resolution": 32,
    "class_names": ["a", "b"],
    "path_type": "linear",
}


@pytest.fixture
def checkpoint(tmp_path):
    sit = SiT(SiTConfig(1, 8, 1, 2, 4, 3, 2))
    return save_checkpoint(tmp_path / "run", 5, sit, sit, None, INFO)


def edit(checkpoint, **changes):
    state = {k: v for k, v in (read_checksummed_json(checkpoint / "state.json") | changes).items() if v is not ...}
    (checkpoint / "state.json").write_text(to_checksummed_json(state))


def test_a_new_field_has_its_historic_value_in_old_checkpoints(checkpoint, monkeypatch):
    before = load.read_state(checkpoint)
    assert before["class_names"] == ["a", "b"]
    monkeypatch.setattr(load, "STATE", load.STATE | {"precision": Field("float32")})
    assert load.read_state(checkpoint) == before | {"precision": "float32"}
    _, info = load.load_sit(checkpoint)
    assert (info["precision"], info["step"]) == ("float32", 5)


def test_a_renamed_field_is_read_by_its_old_name(checkpoint, monkeypatch):
    renamed = load.STATE | {"path": Field(old_names=("path_type",), read_old=str.upper)}
    del renamed["path_type"]
    monkeypatch.setattr(load, "STATE", renamed)
    assert load.read_state(checkpoint)["path"] == "LINEAR"


def test_a_checkpoint_of_newer_code_is_one_line(checkpoint):
    edit(checkpoint, precision="float8")
    for read in (load.read_state, load.load_sit):
        with pytest.raises(ValueError, match=r"state\.json was written by newer code: it has 'precision'") as error:
            read(checkpoint)
        assert "\n" not in str(error.value)


def test_a_checkpoint_that_lacks_what_sampling_needs_is_one_line(checkpoint):
    edit(checkpoint, scale=...)
    with pytest.raises(ValueError, match=r"state\.json: damaged, it lacks 'scale'"):
        load.load_sit(checkpoint)
