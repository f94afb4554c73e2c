"""Stores that two programs, a full disk or a swapped file must not spoil silently."""

import errno
import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import UnixFileLock

import sample_ddp
import train
from dataset import LatentDataset, store_digest
from preprocessing import dump_latents
from preprocessing.store_writer import LatentStoreWriter
from runtime.distributed import copy_to_host_async, hold_directory
from runtime.files import lock_directory, to_checksummed_json
from tests.stores import make_store, make_vae
from tests.test_dump_latents import contents, flags, picture
from tests.test_import_latents import imported, repa_dump
from tests.test_sample_ddp import arguments, make_checkpoint
from tests.test_train import run, settings


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for index in range(8):
        directory = folder / "ab"[index % 2]
        directory.mkdir(exist_ok=True)
        picture(32, 32, index).save(directory / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return make_vae(tmp_path_factory.mktemp("vae"))


def dump(images, output, vae, *more):
    dump_latents.main(flags(images, output, vae, "--batch-size", 2, *more))


def test_a_second_dump_into_a_store_is_refused_while_the_first_writes(images, vae, tmp_path):
    with (
        hold_directory(tmp_path / "store"),
        pytest.raises(ValueError, match=r"another process writes to .*store; wait for it"),
    ):
        dump(images, tmp_path / "store", vae)
    dump(images, tmp_path / "store", vae)  # the lock went with its holder
    assert not (tmp_path / "store" / ".lock").exists()
    assert len(LatentDataset(tmp_path / "store")) == 8


def test_a_second_import_or_sampler_is_refused_while_the_first_writes(tmp_path):
    repa_dump(tmp_path / "repa")
    checkpoint, output = make_checkpoint(tmp_path / "trained"), tmp_path / "out"
    with hold_directory(output):
        with pytest.raises(ValueError, match=r"another process writes to .*out; wait for it"):
            imported(tmp_path / "repa", output)
        with pytest.raises(ValueError, match=r"another process writes to .*out; wait for it"):
            sample_ddp.main(arguments(checkpoint, output, device="cpu"))
        assert [path.name for path in output.iterdir()] == [".lock"]
    assert len(imported(tmp_path / "repa", output)) == 7


def test_rows_that_another_program_has_changed_do_not_pass_the_journal(tmp_path):
    writer = LatentStoreWriter(tmp_path / "store", {"count": 2}, {"moments": (8, 2, 2)}, "float32")
    shard = writer.shard(0)
    shard.append(2, {"moments": np.ones((2, 8, 2, 2))}, [0, 1], ["a", "b"])
    with open(tmp_path / "store" / "moments-00000.npy.partial", "r+b") as file:
        file.seek(-8 * 4 * 4, os.SEEK_END)  # the second row
        file.write(bytes(16))
    with pytest.raises(ValueError, match=r"expected the rows that were written in .*moments-00000.npy"):
        shard.close()


@pytest.mark.parametrize("call", [0, 1, 3])
def test_a_full_disk_ends_a_dump_in_one_line_and_the_same_command_resumes(call, images, vae, tmp_path, monkeypatch):
    dump(images, tmp_path / "whole", vae)
    calls, write = [], os.pwrite

    def full(*arguments):
        calls.append(arguments)
        if len(calls) > call:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*arguments)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(ValueError, match="the disk is full; make room and run the same command again"):
        dump(images, tmp_path / "store", vae)
    monkeypatch.setattr(os, "pwrite", write)
    dump(images, tmp_path / "store", vae)
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def changed_meta(store, **values):
    meta = json.loads((store / "meta.json").read_text())
    del meta["seal"]
    (store / "meta.json").write_text(to_checksummed_json(meta | values))


@pytest.mark.slow
def test_what_makes_two_stores_the_same_is_their_data_not_what_made_them(images, vae, tmp_path):
    data = make_store(tmp_path / "store")
    folder = run(data, tmp_path)
    changed_meta(data, versions={"torch": "9.9"}, vae="elsewhere", skipped=[{"path": "x", "reason": "0x7f11"}])
    run(data, tmp_path, max_train_steps=3)  # resumes
    assert json.loads((folder / "checkpoints" / "0000003" / "state.json").read_text())["data_digest"] == store_digest(
        LatentDataset(data).meta
    )
    changed_meta(data, scale=[1.0])
    with pytest.raises(ValueError, match="is not the store of"):
        run(data, tmp_path, max_train_steps=4)


def test_swapped_labels_or_shards_are_refused_without_being_asked(tmp_path):
    data = make_store(tmp_path / "store", shard_size=8)
    labels = np.load(data / "labels.npy")
    np.save(data / "labels.npy", labels[::-1])
    with pytest.raises(ValueError, match=r"damaged store .*labels.npy changed since"):
        run(data, tmp_path)
    np.save(data / "labels.npy", labels)
    shutil.move(data / "moments-00000.npy", data / "swap")
    shutil.move(data / "moments-00001.npy", data / "moments-00000.npy")
    shutil.move(data / "swap", data / "moments-00001.npy")
    with pytest.raises(ValueError, match=r"moments-00000.npy, moments-00001.npy changed since"):
        train.main(settings(data, tmp_path))


def test_the_end_of_a_copy_is_awaited_on_the_tensors_own_device(monkeypatch):
    """With another current device, its stream would say nothing of the copy."""
    events, device = [], torch.device("cuda", 3)

    def current_stream(of=None):
        event = SimpleNamespace(synchronize=lambda: events.append(of))
        return SimpleNamespace(record_event=lambda: event)

    host = torch.zeros(2)
    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: SimpleNamespace(copy_=lambda *_, **__: None, numpy=host.numpy))
    wait = copy_to_host_async(SimpleNamespace(is_cuda=True, shape=(2,), dtype=torch.float32, device=device))
    assert np.array_equal(wait()[0], host.numpy())
    assert events == [device]


def test_who_ends_does_not_take_the_lock_of_who_comes_next(tmp_path, monkeypatch):
    release, held = UnixFileLock.release, []

    def release_and_come_next(self, force=False):
        release(self, force)
        monkeypatch.setattr(UnixFileLock, "release", release)
        held.append(lock_directory(tmp_path / "store", "busy"))

    monkeypatch.setattr(UnixFileLock, "release", release_and_come_next)
    with hold_directory(tmp_path / "store"):
        pass
    with pytest.raises(ValueError, match="busy"):
        lock_directory(tmp_path / "store", "busy")
    held[0].release()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk says 'Disk quota exceeded'"),
        (errno.EFBIG, "the disk says 'File too large'"),
    ],
)
def test_a_full_disk_at_the_picture_for_the_eye_is_one_line_too(code, message, images, vae, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(code, os.strerror(code))

    save = dump_latents.save_image
    monkeypatch.setattr(dump_latents, "save_image", full)
    with pytest.raises(ValueError, match=f"{message}; make room and run the same command again"):
        dump(images, tmp_path / "store", vae, "--verify", 2)
    monkeypatch.setattr(dump_latents, "save_image", save)
    dump(images, tmp_path / "store", vae, "--verify", 2)
    assert (tmp_path / "store" / "verify.png").is_file()


@pytest.mark.slow
def test_a_store_dumped_again_elsewhere_is_the_same_store(images, vae, tmp_path):
    shutil.copytree(images, tmp_path / "moved" / "photos")
    for place in (images, tmp_path / "moved" / "photos"):
        (place / "a" / "9.png").write_bytes(b"no image")
    try:
        dump(images, tmp_path / "one", vae, "--skip-corrupt")
        dump(tmp_path / "moved" / "photos", tmp_path / "two", shutil.copytree(vae, tmp_path / "vae"), "--skip-corrupt")
    finally:
        (images / "a" / "9.png").unlink()
    run(tmp_path / "one", tmp_path)
    run(tmp_path / "two", tmp_path, max_train_steps=3)  # resumes
    one, two = (LatentDataset(tmp_path / name).meta for name in ("one", "two"))
    assert store_digest(one) == store_digest(two)
    assert one["vae"] != two["vae"]
    assert one["skipped"] == two["skipped"] == [{"path": "a/9.png", "reason": "no image of a known kind"}]


def test_a_system_without_fdatasync_dumps_the_same_store(images, vae, tmp_path, monkeypatch):
    """macOS has none."""
    dump(images, tmp_path / "whole", vae)
    monkeypatch.delattr(os, "fdatasync")
    dump(images, tmp_path / "store", vae)
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")
