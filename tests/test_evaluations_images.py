"""Reading of what is measured: every form of npz, folders, stores; what is refused, and how."""

from __future__ import annotations

import hashlib
import io
import tracemalloc
import zipfile

import numpy as np
import pytest
from PIL import Image

from evaluations.images import open_images, prefetched
from tests.stores import make_store

IMAGES = np.random.default_rng(0).integers(0, 256, (10, 6, 5, 3), dtype=np.uint8)


def read(path, start=0, stop=None, batch_size=4):
    source = open_images(str(path))
    return np.concatenate(list(source.batches(start, source.count if stop is None else stop, batch_size)))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", ["uint8", "float32", "float64", ">f4"])
def test_every_form_of_npz_is_read_alike(save, dtype, tmp_path):
    save(tmp_path / "a.npz", IMAGES.astype(dtype), np.arange(10))
    source = open_images(str(tmp_path / "a.npz"))
    assert (source.count, source.size) == (10, (6, 5))
    np.testing.assert_array_equal(source.labels, np.arange(10))
    for start, stop, batch_size in ((0, 10, 4), (0, 10, 10), (3, 8, 2), (7, 7, 2)):
        batches = list(prefetched(source.batches(start, stop, batch_size)))
        assert all(batch.dtype == ("uint8" if dtype == "uint8" else "float32") for batch in batches)
        assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
        np.testing.assert_array_equal(np.concatenate([IMAGES[:0], *batches]), IMAGES[start:stop])


def test_floats_are_not_rounded(tmp_path):
    np.savez(tmp_path / "a.npz", IMAGES[:, :, :, :] * np.float32(0.7))
    np.testing.assert_array_equal(read(tmp_path / "a.npz"), IMAGES * np.float32(0.7))


def test_an_npz_larger_than_memory_is_a_stream(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", np.zeros((600, 256, 256, 3), dtype=np.uint8))  # 118 MB
    source = open_images(str(tmp_path / "a.npz"))
    tracemalloc.start()
    total = sum(len(batch) for batch in prefetched(source.batches(0, source.count, 8)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 600
    assert peak < 40e6


def test_a_directory_is_read_in_order_of_paths_whatever_the_mode(tmp_path):
    (tmp_path / "b").mkdir()
    for name, picture in (("b/0.png", IMAGES[0]), ("1.png", IMAGES[1])):
        Image.fromarray(picture).save(tmp_path / name)
    Image.fromarray(IMAGES[2, :, :, 0]).save(tmp_path / "0.png")  # greyscale
    (tmp_path / "notes.txt").write_text("not an image")
    expected = [np.repeat(IMAGES[2, :, :, :1], 3, axis=2), IMAGES[1], IMAGES[0]]
    np.testing.assert_array_equal(read(tmp_path, batch_size=2), expected)
    source = open_images(str(tmp_path))
    assert list(source.labels) == [0, 0, 1]
    before = source.digest()
    Image.fromarray(IMAGES[3]).save(tmp_path / "1.png")
    assert open_images(str(tmp_path)).digest() != before


def test_a_latent_store_gives_its_crops_across_shards(tmp_path):
    store = make_store(tmp_path / "store", images=True, flips=True, size=2)
    images = np.concatenate([np.load(file) for file in sorted(store.glob("images-*.npy"))])
    source = open_images(str(store))
    assert (source.count, source.size) == (24, (8, 8))
    np.testing.assert_array_equal(source.labels, np.load(store / "labels.npy"))
    assert source.digest() == hashlib.sha256((store / "meta.json").read_bytes()).hexdigest()
    np.testing.assert_array_equal(read(store, batch_size=7), images)
    np.testing.assert_array_equal(read(store, 3, 17, 10), images[3:17])


def npz(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_what_cannot_be_read_is_refused_in_words(tmp_path):
    file = tmp_path / "a.npz"

    def refused(message):
        with pytest.raises(ValueError, match=message) as error:
            read(file)
        assert "\n" not in str(error.value)

    for name, arrays, message in (
        ("no arr_0", {"images": IMAGES}, "expected arr_0 in .*found images"),
        ("dtype", {"arr_0": IMAGES.astype(np.int64)}, "found .* int64"),
        ("channels", {"arr_0": IMAGES[..., :1]}, r"\(10, 6, 5, 1\) uint8"),
        ("rank", {"arr_0": IMAGES[0]}, r"\(6, 5, 3\)"),
        ("empty", {"arr_0": IMAGES[:0]}, r"\(0, 6, 5, 3\)"),
        ("objects", {"arr_0": np.array([{}, None], dtype=object)}, "object"),
        ("unit range", {"arr_0": IMAGES / 255}, "floats in 0..1"),
        ("signed range", {"arr_0": IMAGES / 127.5 - 1}, "floats in -1..1"),
        ("too large", {"arr_0": IMAGES * 2.0}, r"expected images in 0\.\.255"),
        ("NaN", {"arr_0": np.where(IMAGES > 100, np.nan, IMAGES)}, "NaN"),
        ("order", {"arr_0": np.asfortranarray(IMAGES)}, r"found Fortran's in .*fix: np.ascontiguousarray\(arr_0\)"),
        ("statistics", {"features": "vae", "digest": "abc", "mu": np.ones(3)}, "a.npz: damaged, it lacks 'count'"),
        ("newer", {"features": "vae", "digest": "", "count": 3, "median": 1}, "written by newer code: it has 'median'"),
    ):
        npz(file, **arrays)
        refused(message)
        assert name
    file.write_bytes(b"not a zip file at all")
    refused("expected an npz file")
    file.unlink()
    refused("found nothing$")


def test_a_missing_reference_of_imagenet_is_told_where_it_is(tmp_path):
    with pytest.raises(ValueError, match=r"found nothing; fix: fetch https://.*/256/VIRTUAL_imagenet256_labeled\.npz$"):
        open_images(str(tmp_path / "VIRTUAL_imagenet256_labeled.npz"))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_truncated_and_damaged_npz_are_refused(save, tmp_path):
    file = tmp_path / "a.npz"
    save(file, IMAGES)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="expected an npz file"):
        read(file)
    middle = len(whole) // 2
    file.write_bytes(whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :])
    with pytest.raises(ValueError, match="expected a whole npz file"):
        read(file)


@pytest.mark.parametrize("rows", [8, 12])
def test_a_header_that_disagrees_with_the_data_is_refused(rows, tmp_path):
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        content, {"descr": "|u1", "fortran_order": False, "shape": (rows, *IMAGES.shape[1:])}
    )
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("arr_0.npy", content.getvalue() + IMAGES.tobytes())
    with pytest.raises(ValueError, match=r"bytes than arr_0's header says"):
        read(tmp_path / "a.npz")


def test_directories_and_stores_that_cannot_be_used_are_refused_in_words(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="found none"):
        open_images(str(empty))
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    Image.fromarray(IMAGES[0]).save(mixed / "0.png")
    Image.fromarray(IMAGES[0, :4]).save(mixed / "1.png")
    with pytest.raises(ValueError, match=r"one size, found 5 x 6 in .*0.png and 5 x 4 in .*1.png"):
        open_images(str(mixed))
    (mixed / "1.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="expected an image"):
        open_images(str(mixed))
    Image.fromarray(IMAGES[0]).save(mixed / "1.png")
    (mixed / "1.png").write_bytes((mixed / "1.png").read_bytes()[:80])
    with pytest.raises(ValueError, match="expected a whole image"):
        read(mixed)
    bare = make_store(tmp_path / "bare", size=2)
    with pytest.raises(ValueError, match="--keep-images"):
        open_images(str(bare))
    damaged = make_store(tmp_path / "damaged", images=True, size=2)
    np.save(damaged / "images-00001.npy", np.zeros((9, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match=r"damaged store: expected uint8 \(10, 8, 8, 3\)"):
        open_images(str(damaged))
    (damaged / "meta.json").write_text("{")
    with pytest.raises(ValueError, match=r"damaged store: .*meta.json"):
        open_images(str(damaged))


def test_the_directory_of_a_set_of_samples_is_its_npz(tmp_path):
    np.savez(tmp_path / "samples.npz", IMAGES)
    (tmp_path / "images").mkdir()
    assert open_images(str(tmp_path)).path == tmp_path / "samples.npz"
