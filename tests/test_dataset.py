"""The store: what is written is what is read, however it was interrupted; and the order of samples."""

import itertools
import json
import pickle
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import dataset
from dataset import LatentDataset, StepSampler
from preprocessing.store_writer import LatentStoreWriter, shard_size
from runtime.files import Field, read_checksummed_json, to_checksummed_json
from tests.stores import make_store

META = {
    "vae": "some/vae",
    "vae_digest": "abc",
    "scale": [2.0],
    "shift": [0.5],
    "scale_source": "config",
    "resolution": 16,
    "crop": "adm-center",
    "class_names": ["a", "b"],
    "settings": {"x": 1},
}
SHAPES = {"moments": (4, 2, 2), "flips": (4, 2, 2), "images": (16, 16, 3)}


def rows(count, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "moments": rng.standard_normal((count, 4, 2, 2)).astype(np.float32),
        "flips": rng.standard_normal((count, 4, 2, 2)).astype(np.float32),
        "images": rng.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8),
    }


def append(shard, numbers, first, last, skipped=()):
    shard.append(
        last - first + len(skipped),
        {kind: values[first:last] for kind, values in numbers.items()},
        [k % 2 for k in range(first, last)],
        [f"image {k}.png" for k in range(first, last)],
        skipped,
    )


def write(folder, numbers, batches=((0, 3), (3, 5)), second=(5, 9)):
    """Two shards: one in batches, one at once."""
    writer = LatentStoreWriter(folder, {"x": 1}, SHAPES, "float32")
    shard = writer.shard(0)
    for first, last in batches:
        append(shard, numbers, first, last)
    shard.close()
    shard = writer.shard(1)
    append(shard, numbers, *second, skipped=[{"path": "bad.png", "reason": "cut short"}])
    shard.close()
    return writer.finish(2, META)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_written_is_what_is_read(tmp_path):
    numbers = rows(9)
    meta = write(tmp_path / "s", numbers)
    store = LatentDataset(tmp_path / "s", images=True)
    assert (len(store), store.latent_shape, store.num_classes, store.has_flips) == (9, (2, 2, 2), 2, True)
    assert store.meta == json.loads(json.dumps(meta)) | {"versions": None}
    assert store.meta["skipped"] == [{"path": "bad.png", "reason": "cut short"}]
    assert (store.scale.scale, store.scale.shift) == ((2.0,), (0.5,))
    order = [8, 0, 5, 4, 4, 17, 9]  # 9 and beyond: mirror images
    batch = store.__getitems__(order)
    latents = np.concatenate([numbers["moments"], numbers["flips"]])
    assert torch.equal(batch["moments"], torch.from_numpy(latents[order]))
    assert batch["label"].tolist() == [k % 9 % 2 for k in order]
    assert torch.equal(batch["image"][:5], torch.from_numpy(numbers["images"][order[:5]]))
    assert torch.equal(batch["image"][5], torch.from_numpy(numbers["images"][8, :, ::-1].copy()))
    assert (tmp_path / "s" / "paths.txt").read_text().splitlines() == [f"image {k}.png" for k in range(9)]
    single = store[4]
    assert torch.equal(single["moments"], batch["moments"][3])
    assert store.damaged_files(whole=True) == []
    # The shards are plain .npy files for anyone.
    assert np.array_equal(np.load(tmp_path / "s" / "moments-00001.npy"), numbers["moments"][5:])


def test_float16_is_read_as_float32(tmp_path):
    make_store(tmp_path / "s", dtype="float16")
    batch = LatentDataset(tmp_path / "s").__getitems__([3, 20])
    assert batch["moments"].dtype == torch.float32
    stored = np.load(tmp_path / "s" / "moments-00002.npy")
    assert stored.dtype == np.float16
    assert np.array_equal(batch["moments"][1].numpy(), stored[0].astype(np.float32))


@pytest.mark.parametrize("stop", ["in a batch", "between batches", "before the header", "after the rename"])
def test_a_killed_writer_resumes_to_the_same_bytes(stop, tmp_path):
    numbers = rows(9)
    write(tmp_path / "whole", numbers)
    writer = LatentStoreWriter(tmp_path / "s", {"x": 1}, SHAPES, "float32")
    shard = writer.shard(0)
    append(shard, numbers, 0, 3)
    if stop == "in a batch":  # rows are there, the journal's line is cut short
        append(shard, rows(9, seed=1), 3, 5)
        text = shard.journal.read_text()
        shard.journal.write_text(text[:-20])
    elif stop != "between batches":
        append(shard, numbers, 3, 5)
        if stop == "after the rename":
            shard.close()
            record = json.loads(shard.record_file.read_text())
            shard.record_file.unlink()
            shard.journal.write_text("")
            none = {"skipped": [], "statistics": []}
            labels, paths = record["labels"], record["paths"]
            lines = [
                {"items": n, "labels": labels[a : a + n], "paths": paths[a : a + n]} | none for a, n in ((0, 3), (3, 2))
            ]
            shard.journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    again = LatentStoreWriter(tmp_path / "s", {"x": 1}, SHAPES, "float32")
    shard = again.shard(0)
    assert shard.items == (3 if stop in ("in a batch", "between batches") else 5)
    if shard.items == 3:
        append(shard, numbers, 3, 5)
    shard.close()
    shard = again.shard(1)
    append(shard, numbers, 5, 9, skipped=[{"path": "bad.png", "reason": "cut short"}])
    shard.close()
    again.finish(2, META)
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")


def test_another_store_in_the_folder_is_refused(tmp_path):
    writer = LatentStoreWriter(tmp_path / "s", {"x": 1}, SHAPES, "float32")
    with pytest.raises(ValueError, match="other settings \\(x 1 there, 2 now\\)"):
        LatentStoreWriter(tmp_path / "s", {"x": 2}, SHAPES, "float32")
    append(writer.shard(0), rows(9), 0, 3)
    with pytest.raises(ValueError, match="unfinished latent store"):
        LatentDataset(tmp_path / "s")
    write(tmp_path / "t", rows(9))
    assert LatentStoreWriter(tmp_path / "t", {"x": 1}, SHAPES, "float32").is_complete
    with pytest.raises(ValueError, match="other settings"):
        LatentStoreWriter(tmp_path / "t", {"x": 2}, SHAPES, "float32")
    (tmp_path / "u").mkdir()
    (tmp_path / "u" / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="found other files"):
        LatentStoreWriter(tmp_path / "u", {"x": 1}, SHAPES, "float32")
    assert contents(tmp_path / "u") == {"thesis.tex": b"precious"}


def test_a_new_field_has_its_historic_value_in_old_stores(tmp_path, monkeypatch):
    write(tmp_path / "s", rows(9))
    before = dataset.read_meta(tmp_path / "s")
    monkeypatch.setattr(dataset, "META", dataset.META | {"colour": Field("RGB")})
    assert LatentDataset(tmp_path / "s").meta == before | {"colour": "RGB"}


def test_a_renamed_field_is_read_by_its_old_name(tmp_path, monkeypatch):
    write(tmp_path / "s", rows(9))
    renamed = {name: field for name, field in dataset.META.items() if name != "crop"}
    monkeypatch.setattr(dataset, "META", renamed | {"cut": Field(old_names=("crop",), read_old=str.upper)})
    assert LatentDataset(tmp_path / "s").meta["cut"] == "ADM-CENTER"


def edit(folder, **changes):
    meta = read_checksummed_json(folder / "meta.json")
    (folder / "meta.json").write_text(to_checksummed_json(meta | changes))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: (f / "meta.json").unlink(), "found no meta.json"),
        (lambda f: (f / "meta.json").write_text("{"), "damaged store: .*meta.json"),
        (lambda f: edit(f, version=2), "expected a latent store of format"),
        (lambda f: edit(f, colour="RGB"), r"meta\.json was written by newer code: it has 'colour'"),
        (lambda f: edit(f, count=8), "empty or damaged store"),
        (lambda f: edit(f, count=0, shards=[]), "empty or damaged store"),
        (lambda f: edit(f, scale=[0.0]), "positive scales"),
        (
            lambda f: (f / "meta.json").write_text(to_checksummed_json({"format": "vae-repa-latents", "version": 1})),
            "lacks",
        ),
        (lambda f: (f / "moments-00001.npy").unlink(), "cannot read .*moments-00001.npy"),
        (lambda f: (f / "flips-00000.npy").write_bytes(b"x" * 9), "cannot read .*flips-00000.npy"),
        (lambda f: np.save(f / "moments-00001.npy", np.zeros((3, 4, 2, 2), np.float32)), r"expected float32 \(4, 4"),
        (lambda f: np.save(f / "moments-00001.npy", np.zeros((4, 4, 2, 2))), "found float64"),
        (lambda f: np.save(f / "labels.npy", np.full(9, 2)), "labels outside 0..1"),
        (lambda f: np.save(f / "labels.npy", np.zeros(8, np.int64)), r"found int64 \(8,\)"),
    ],
)
def test_damage_is_found_when_a_store_is_opened(damage, message, tmp_path):
    write(tmp_path / "s", rows(9))
    damage(tmp_path / "s")
    with pytest.raises(ValueError, match=message) as error:
        LatentDataset(tmp_path / "s")
    assert "\n" not in str(error.value)


def test_truncated_and_flipped_files_are_found(tmp_path):
    write(tmp_path / "s", rows(9))
    file = tmp_path / "s" / "moments-00001.npy"
    content = bytearray(file.read_bytes())
    file.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="cannot read"):
        LatentDataset(tmp_path / "s")
    content[200] ^= 4
    file.write_bytes(content)
    assert LatentDataset(tmp_path / "s").damaged_files(whole=True) == ["moments-00001.npy"]


def test_images_must_be_there_when_wanted(tmp_path):
    make_store(tmp_path / "s")
    with pytest.raises(ValueError, match="--keep-images"):
        LatentDataset(tmp_path / "s", images=True)


def test_only_the_path_travels_to_a_worker(tmp_path):
    make_store(tmp_path / "s", count=400, shard_size=100)
    store = LatentDataset(tmp_path / "s")
    assert len(pickle.dumps(store)) < 1000
    assert torch.equal(pickle.loads(pickle.dumps(store))[7]["moments"], store[7]["moments"])


def test_loader_workers_give_the_batches_of_one_process(tmp_path):
    make_store(tmp_path / "s")
    store = LatentDataset(tmp_path / "s")
    sampler = StepSampler(len(store), 6, seed=0, num_steps=5)
    for workers in (0, 2):
        loader = DataLoader(store, batch_sampler=sampler, collate_fn=lambda batch: batch, num_workers=workers)
        for batch, indices in zip(loader, sampler, strict=True):
            assert torch.equal(batch["moments"], store.__getitems__(indices)["moments"])


def test_an_imagenet_sized_store_opens_at_once(tmp_path):
    """1,281,167 sparse entries in 64 shards: nothing may be read that grows with the pixels."""
    count, folder = 1_281_167, tmp_path / "s"
    make_store(folder, count=4, size=2, channels=1, classes=2, shard_size=4)
    size = shard_size(count)
    counts = [min(size, count - begin) for begin in range(0, count, size)]
    assert len(counts) == 64
    for index, n in enumerate(counts):
        np.lib.format.open_memmap(folder / f"moments-{index:05d}.npy", "w+", np.float32, (n, 2, 2, 2))
    np.save(folder / "labels.npy", np.zeros(count, np.int64))
    shards = [{"count": n, "moments": {"file": f"moments-{k:05d}.npy", "sha256": ""}} for k, n in enumerate(counts)]
    edit(folder, count=count, shards=shards)
    begin = time.perf_counter()
    store = LatentDataset(folder)
    next(iter(StepSampler(len(store), 256, seed=0)))
    assert time.perf_counter() - begin < 5


@pytest.mark.parametrize("count, shards", [(1, 1), (64, 1), (65, 2), (4096, 64), (1_281_167, 64)])
def test_shards_are_few(count, shards):
    assert -(-count // shard_size(count)) == shards


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 40),
    micro=st.integers(1, 5),
    world=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    seed=st.integers(0, 5),
)
def test_every_index_comes_once_an_epoch_however_the_batch_is_divided(count, micro, world, accumulation, seed):
    batch = micro * world * accumulation
    steps = -(-3 * count // batch)
    stream = np.concatenate([StepSampler(count, batch, seed).step_indices(k) for k in range(steps)])
    for epoch in range(3):
        assert sorted(stream[epoch * count : (epoch + 1) * count].tolist()) == list(range(count))
    ranks = [list(StepSampler(count, batch, seed, rank, world, accumulation, num_steps=steps)) for rank in range(world)]
    for step in range(steps):
        pieces = [ranks[r][step * accumulation + a] for a in range(accumulation) for r in range(world)]
        assert {len(piece) for piece in pieces} == {micro}
        assert list(itertools.chain(*pieces)) == stream[step * batch : (step + 1) * batch].tolist()


def test_order_depends_on_seed_and_epoch_and_can_start_anywhere():
    whole = list(StepSampler(10, 4, seed=1, num_steps=9))
    assert list(StepSampler(10, 4, seed=1, start_step=4, num_steps=5)) == whole[4:]
    assert list(StepSampler(10, 4, seed=2, num_steps=9)) != whole
    stream = np.concatenate(whole)
    assert stream[:10].tolist() != stream[10:20].tolist()


def test_flips_are_a_fair_coin_of_each_step():
    plain = np.array(list(StepSampler(1000, 500, seed=0, num_steps=20)))
    flipped = np.array(list(StepSampler(1000, 500, seed=0, num_steps=20, flip=True)))
    assert np.array_equal(flipped % 1000, plain)
    heads = (flipped >= 1000).mean()
    assert abs(heads - 0.5) < 4 * 0.5 / 10_000**0.5
    assert np.array_equal(flipped, np.array(list(StepSampler(1000, 500, seed=0, num_steps=20, flip=True))))
    assert not np.array_equal(flipped[0] >= 1000, flipped[1] >= 1000)


def test_a_batch_that_cannot_be_divided_is_refused():
    with pytest.raises(ValueError, match="divisible by 4 processes x 2 accumulation steps, found 12; set --batch-size"):
        StepSampler(100, 12, 0, rank=0, world_size=4, accumulation=2)
