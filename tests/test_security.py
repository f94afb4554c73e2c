"""No code is run from a path that a user gives, nothing is written outside, and sizes are bounded."""

import ast
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset import LatentDataset
from models.vae import load_vae
from preprocessing import sources
from preprocessing.sources import ZipSource
from runtime.images import decode_image
from tests.stores import make_store

ROOT = Path(__file__).resolve().parent.parent
ELSEWHERE = {".venv", "tests", "exps"}
SOURCES = [path for path in ROOT.rglob("*.py") if not ELSEWHERE & set(path.relative_to(ROOT).parts)]


def calls():
    """Every call in the project: (place, name as written, names of its keyword arguments with constant values)."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                constants = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
                yield f"{path.relative_to(ROOT)}:{node.lineno}", ast.unparse(node.func), constants


def test_nothing_in_the_project_unpickles_or_evaluates():
    found = list(calls())
    assert len(found) > 1000
    assert [place for place, name, _ in found if name in ("eval", "exec", "compile", "__import__")] == []
    for place, name, constants in found:
        assert name.rpartition(".")[0] not in ("pickle", "dill", "joblib", "marshal", "shelve"), place
        assert not name.endswith((".extractall", ".extract", "torch.hub.load", "yaml.load", "os.system")), place
        assert constants.get("shell") is not True, place
        if name.endswith("torch.load"):
            assert constants.get("weights_only") is True, place
        assert constants.get("allow_pickle") is not True, place  # numpy's own default is to refuse


def test_members_of_a_zip_stay_where_they_are(tmp_path):
    content = io.BytesIO()
    Image.new("RGB", (4, 4)).save(content, "PNG")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("cat/1.png", "../evil.png", "cat/../../evil.png", "/abs/evil.png"):
            archive.writestr(name, content.getvalue())
    before = set(tmp_path.parent.rglob("*"))
    source = ZipSource(tmp_path / "a.zip")
    assert not any(".." in name for name in source.names)
    for index in range(len(source.names)):
        source.read(index)
    assert set(tmp_path.parent.rglob("*")) == before


def test_bombs_are_refused(tmp_path, monkeypatch):
    content = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(content, "PNG")  # 400 million pixels in 60 KB
    with pytest.raises(OSError, match="more than 179 million pixels"):
        decode_image(content.getvalue())
    monkeypatch.setattr(sources, "MAX_FILE_BYTES", 1000)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("cat/1.png", bytes(1001))
    with pytest.raises(OSError, match=r"1,001 bytes when unpacked"):
        ZipSource(tmp_path / "a.zip").read(0)


@pytest.mark.parametrize("kind", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_member_of_a_zip_is_an_unreadable_file(kind, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", kind) as archive:
        archive.writestr("cat/1.png", bytes(range(256)) * 20)
    content = bytearray((tmp_path / "a.zip").read_bytes())
    for place in range(60, 200, 20):
        content[place] ^= 0xFF
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(OSError, match=r"CRC|Error|invalid"):
        ZipSource(tmp_path / "a.zip").read(0)


@pytest.mark.parametrize("error", [TypeError, OverflowError, zipfile.zlib.error])
def test_what_pillow_raises_for_damaged_files_is_an_unreadable_file(error, monkeypatch):
    def broken(*_, **__):
        raise error("inside")

    monkeypatch.setattr(Image, "open", broken)
    with pytest.raises(OSError, match="inside"):
        decode_image(b"x")


@pytest.mark.parametrize("name", ["./vae", "/models/vae", "~/vae", "a/b/c", "../vae"])
def test_hub_names_that_look_like_paths_are_paths(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the clone stands, there may be a ../vae

    def asked():
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("models.vae.hub_is_reachable", asked)
    with pytest.raises(ValueError, match=r"--vae: .*a path where there is nothing"):
        load_vae(name)


def test_arrays_of_objects_are_not_read(tmp_path):
    store = make_store(tmp_path / "store")
    np.save(store / "labels.npy", np.array([{"a": 1}] * 24, dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="damaged store"):
        LatentDataset(store)
