"""What is an image, where it lies, how it is read: one answer for stores, references and pictures."""

import io
import json
import os
import re
import struct
import subprocess
import zipfile

import numpy as np
import pytest
from PIL import Image, features
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from dataset import LatentDataset, read_meta, read_paths
from evaluations import evaluate
from evaluations.images import open_images
from preprocessing import dump_latents, import_latents
from preprocessing.sources import describe, open_source
from preprocessing.store_writer import count_classes, first_of
from reporting.pictures import encode_picture
from runtime.images import center_crop, decode_image, image_names, read_image
from tests.stores import make_vae
from tests.test_dump_latents import encoded, flags, picture
from tests.test_layout import ROOT, sources


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return make_vae(tmp_path_factory.mktemp("vae"))


def save(path, seed=0, size=32, kind=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(size, size, seed).save(path, kind, **options)
    return path


def zipped(folder, file):
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder.parent))
    return file


def test_a_folder_one_level_too_high_is_refused_and_the_right_one_named(tmp_path):
    for split in ("train", "val"):
        for name in "ab":
            save(tmp_path / "top" / split / name / "0.png")
    with pytest.raises(ValueError, match=r"found directories alone in train, val; give .*top/train,"):
        open_source(tmp_path / "top")
    with pytest.raises(ValueError, match="found directories alone in train, val; pack the class directories"):
        open_source(zipped(tmp_path / "top", tmp_path / "top.zip"))
    folder = open_source(tmp_path / "top" / "train")
    packed = open_source(zipped(tmp_path / "top/train", tmp_path / "z.zip"))
    assert (folder.names, folder.labels, folder.class_names) == (packed.names, packed.labels, packed.class_names)


def test_classes_are_not_merged_where_only_some_directories_hold_images(tmp_path):
    """ImageNet as it is unpacked: train/ has a directory for each class, val/ and test/ none."""
    for name in ("train/a/0.png", "train/b/0.png", "val/0.png", "test/0.png"):
        save(tmp_path / "s" / name)
    with pytest.raises(ValueError, match=r"found directories alone in train; give .*s/train,"):
        open_source(tmp_path / "s")


def test_classes_counts_empty_folders_and_other_files_are_said(tmp_path):
    for index, name in enumerate("aac"):
        save(tmp_path / "s" / name / f"{index}.png")
    (tmp_path / "s" / "b").mkdir()
    for name in ("notes.txt", "more.TXT", "x.psd", "._x.png"):
        (tmp_path / "s" / "a" / name).write_text("x")
    expected = "3 images: a 2, c 1; without images, and not counted as classes: b; no images, left out: 1 .psd, 2 .txt"
    assert describe(open_source(tmp_path / "s")) == expected
    assert describe(open_source(zipped(tmp_path / "s", tmp_path / "s.zip"))) == expected
    assert count_classes([0] * 2000 + [2], "abc") == "a 2,000, c 1; none of b"
    names = [str(label) for label in range(20, 40)]
    assert count_classes(range(20), [*map(str, range(40))]).endswith(
        "11 1, ... (20 in all); none of " + first_of(names)
    )


def test_a_zip_is_read_however_its_names_are_written(tmp_path):
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
        for seed, name in enumerate(("./a/0.png", "b//1.png", "/c/2.png")):
            archive.writestr(name, encoded(picture(8, 8, seed)))
    source = open_source(tmp_path / "s.zip")
    assert (source.names, source.class_names) == (["a/0.png", "b/1.png", "c/2.png"], ["a", "b", "c"])
    assert [source.read(index) for index in range(3)] == [encoded(picture(8, 8, seed)) for seed in range(3)]


def test_links_that_lead_in_a_circle_are_not_followed_round_and_round(tmp_path):
    save(tmp_path / "x" / "p" / "0.png")
    save(tmp_path / "y" / "q" / "0.png")
    os.symlink(tmp_path / "y", tmp_path / "x" / "y")
    os.symlink(tmp_path / "x", tmp_path / "y" / "x")
    assert image_names(tmp_path / "x") == ["p/0.png", "y/q/0.png"]


def test_a_directory_that_cannot_be_read_is_not_left_out_in_silence(tmp_path, monkeypatch):
    save(tmp_path / "a" / "0.png")
    save(tmp_path / "b" / "0.png")
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"expected a directory that can be read, found .*b \(Permission denied\)"):
        open_source(tmp_path)


def test_what_was_left_out_and_noticed_is_recorded(tmp_path, vae, capsys):
    save(tmp_path / "s" / "a" / "0.png")
    (tmp_path / "s" / "a" / "x.psd").write_text("x")
    clear = picture(32, 32, 1).convert("RGBA")
    clear.putalpha(7)
    clear.save(tmp_path / "s" / "a" / "1.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "s" / "a" / "2.jpg", 2, exif=exif)
    dump_latents.main(flags(tmp_path / "s", tmp_path / "store", vae))
    meta = read_meta(tmp_path / "store")
    assert (meta["left_out"], meta["noticed"]) == ({".psd": 1}, {"alpha": 1, "rotated": 1})
    out, err = capsys.readouterr()
    assert "left out: 1 .psd" in out
    assert out.count("a 3") == 2  # at the start and the end
    assert "1 images have transparency" in err
    assert "1 images ask to be turned" in err
    how = ("--alpha", "white", "--exif-orientation")
    dump_latents.main(flags(tmp_path / "s", tmp_path / "white", vae, *how))
    assert "1 images" not in capsys.readouterr().err
    assert read_meta(tmp_path / "white")["noticed"] == {"alpha": 1, "rotated": 1}
    with pytest.raises(ValueError, match="alpha white there, drop now"):
        dump_latents.main(flags(tmp_path / "s", tmp_path / "white", vae, "--alpha", "drop"))


def test_every_kind_of_image_is_taken_by_dump_and_reference_alike(tmp_path):
    kinds = "png apng jpg jpeg jpe jfif webp bmp tif tiff gif ppm pgm pbm pnm jp2 tga mpo".split()
    kinds += ["avif"] if features.check("avif") else []
    formats = {"jpe": "JPEG", "jfif": "JPEG", "jpg": "JPEG", "tif": "TIFF", "jp2": "JPEG2000", "apng": "PNG"}
    formats |= dict.fromkeys("ppm pgm pbm pnm".split(), "PPM")
    for kind in kinds:
        save(tmp_path / "real" / f"x.{kind}", kind=formats.get(kind, kind.upper()))
    os.symlink(tmp_path / "real", tmp_path / "linked")
    os.symlink(tmp_path, tmp_path / "real" / "up")  # leads back: not followed
    (tmp_path / "real" / ".ipynb_checkpoints").mkdir()
    save(tmp_path / "real" / ".ipynb_checkpoints" / "x.png")
    save(tmp_path / "real" / "._x.png")
    names = image_names(tmp_path / "linked")
    assert len(names) == len(kinds)
    (tmp_path / "sources").mkdir()
    os.symlink(tmp_path / "real", tmp_path / "sources" / "a")
    assert [name.removeprefix("a/") for name in open_source(tmp_path / "sources").names] == names
    assert [str(file.relative_to(tmp_path / "linked")) for file in open_images(str(tmp_path / "linked")).files] == names


def test_parquet_behind_a_link_is_found(tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = {"image": [{"bytes": encoded(picture(8, 8)), "path": "x"}], "label": [0]}
    (tmp_path / "real").mkdir()
    parquet.write_table(pyarrow.table(rows), tmp_path / "real" / "train.parquet")
    (tmp_path / "s").mkdir()
    os.symlink(tmp_path / "real", tmp_path / "s" / "data")
    assert open_source(tmp_path / "s").names == ["train.parquet/0"]
    save(tmp_path / "mixed" / "a" / "0.png")
    parquet.write_table(pyarrow.table({"file_name": ["a/0.png"]}), tmp_path / "mixed" / "metadata.parquet")
    assert open_source(tmp_path / "mixed").names == ["a/0.png"]  # a table beside class folders is not the source
    (tmp_path / "mixed" / "data").mkdir()
    parquet.write_table(pyarrow.table(rows), tmp_path / "mixed" / "data" / "train.parquet")
    with pytest.raises(ValueError, match=r"images or parquet files of them, found .*give '.*data/\*\.parquet'"):
        open_source(tmp_path / "mixed")  # nor is a logo beside a dataset of the hub
    odd = tmp_path / os.fsdecode(b"[c] \xff")
    odd.mkdir()
    os.rename(tmp_path / "real" / "train.parquet", odd / "train.parquet")
    source = open_source(f"{odd}/*.parquet")
    assert (source.names, source.read(0)) == (["train.parquet/0"], rows["image"][0]["bytes"])


def test_a_reference_of_several_sizes_goes_through_the_crop_of_a_store(tmp_path, capsys):
    for index, size in enumerate((40, 50, 64)):
        save(tmp_path / "ref" / f"{index}.png", index, size)
    with pytest.raises(ValueError, match=r"images of one size, .*give --resolution"):
        open_images(str(tmp_path / "ref"))
    source = open_images(str(tmp_path / "ref"), 16)
    expected = [center_crop(decode_image((tmp_path / "ref" / f"{i}.png").read_bytes()), 16) for i in range(3)]
    assert np.array_equal(np.concatenate(list(source.batches(0, 3, 2))), np.stack(expected))
    np.savez(tmp_path / "samples.npz", np.stack(expected * 2))
    (tmp_path / "ref" / "x.svg").write_text("x")
    common = "--features random --k 1 --batch-size 4 --device cpu --metrics random-precision".split()
    evaluate.main([str(tmp_path / "samples.npz"), "--ref", str(tmp_path / "ref"), *common])
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert record["metrics"]["random-precision"] == 1.0
    said = record["reference"]["notes"]
    assert "\n".join(said) in capsys.readouterr().out  # once
    assert [text.removeprefix(f"{tmp_path / 'ref'}: ") for text in said] == [
        "images of several sizes, cropped and scaled to 16 x 16",
        "no images, left out: 1 .svg",
    ]


def test_a_reference_of_one_size_is_cropped_where_a_resolution_is_given(tmp_path):
    file = save(tmp_path / "ref" / "0.png", size=40)
    assert open_images(str(file.parent), 16).size == (40, 40)  # the samples' size: measured as it is
    source = open_images(str(file.parent), 16, True)
    assert (source.size, len(source.notes)) == ((16, 16), 1)
    assert np.array_equal(next(source.batches(0, 1, 1))[0], center_crop(decode_image(file.read_bytes()), 16))


def tiff(values, **tags):
    info = ImageFileDirectory_v2()
    for tag, value in tags.items():
        info[int(tag.removeprefix("t"))] = value
    return encoded(Image.fromarray(values), "TIFF", tiffinfo=info)


def white_is_zero(values):
    """A TIFF of 16 bits with PhotometricInterpretation 0."""
    content = bytearray(tiff(values))
    entry = struct.pack("<HHI", 262, 3, 1)
    place = content.index(entry) + len(entry)
    content[place : place + 2] = b"\0\0"
    return bytes(content)


def test_more_than_8_bits_keep_their_brightness_or_are_refused_by_name():
    ramp = np.linspace(0, 1, 64).reshape(8, 8)
    expected = np.round(ramp * 255).astype(np.uint8)
    sixteen = np.round(ramp * 65535).astype(np.uint16)
    twelve = np.round(ramp * 4095).astype(np.uint16)
    ppm = b"P5 8 8 1023\n" + np.round(ramp * 1023).astype(">u2").tobytes()
    for content in (tiff(sixteen), encoded(Image.fromarray(sixteen)), tiff(twelve, t281=4095), ppm):
        found = np.asarray(decode_image(content))[..., 0]
        assert np.abs(found.astype(int) - expected).max() <= 1
    assert np.abs(np.asarray(decode_image(white_is_zero(sixteen)))[..., 0].astype(int) + expected - 255).max() <= 1
    for values, kind in ((ramp.astype(np.float32), "floats"), ((ramp * 9e5).astype(np.int32), "integers of 32 bits")):
        for tags in ({}, {"t274": 6}):  # turned, too
            with pytest.raises(OSError, match=f"{kind}, whose range is not recorded; save it with 8 or 16 bits"):
                read_image(tiff(values, **tags), exif_orientation=True)


def test_transparency_and_orientation_are_as_asked():
    image = Image.new("RGBA", (4, 2), (200, 0, 0, 0))
    content = encoded(image)
    assert (read_image(content)[0].getpixel((0, 0)), read_image(content)[1]) == ((200, 0, 0), ["alpha"])
    assert read_image(content, alpha="white")[0].getpixel((0, 0)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(picture(40, 20), "JPEG", exif=exif)
    assert (read_image(content)[0].size, read_image(content)[1]) == ((40, 20), ["rotated"])
    assert read_image(content, exif_orientation=True)[0].size == (20, 40)
    assert read_image(encoded(picture(4, 4).convert("RGBA")))[1] == []  # wholly opaque
    turned, noticed = read_image(encoded(picture(40, 20), "TIFF", exif=exif), exif_orientation=True)
    assert (turned.size, noticed) == ((20, 40), [])  # by Pillow, asked or not, and once
    exif[0x0112] = 9  # there is no such orientation
    for damaged in (exif, b"Exif\0\0nonsense"):
        assert read_image(encoded(picture(40, 20), "JPEG", exif=damaged), exif_orientation=True)[1] == []


def test_floats_are_judged_by_the_whole_file_whatever_the_batch(tmp_path):
    values = np.full((5, 4, 4, 3), 200.0, np.float32)
    values[4] = 0  # a black image at the end
    np.savez(tmp_path / "a.npz", values)
    for size in (1, 2, 5):
        assert sum(len(batch) for batch in open_images(str(tmp_path / "a.npz")).batches(0, 5, size)) == 5
    np.savez(tmp_path / "b.npz", values / 255)
    with pytest.raises(ValueError, match=r"floats in 0\.\.1"):
        next(open_images(str(tmp_path / "b.npz")).batches(0, 1, 1))
    values[4] = np.nan
    np.savez(tmp_path / "c.npz", values)
    with pytest.raises(ValueError, match=r"NaN or infinity in images 4\.\.4"):
        list(open_images(str(tmp_path / "c.npz")).batches(0, 5, 1))


def test_pictures_belong_to_the_latents_of_their_number(tmp_path, vae):
    """Class folders whose names sort otherwise as strings than as paths."""
    labels, colours = [], {}
    for label, name in enumerate(("a", "a b", "a.b", "cat", "cat-big")):
        for number in range(2):
            stem = f"{name}/img-mean-std-{number:08d}.npy"
            moments = np.full((8, 2, 2), 10 * label + number, np.float32)
            (tmp_path / "d" / "vae-sd" / name).mkdir(parents=True, exist_ok=True)
            np.save(tmp_path / "d" / "vae-sd" / stem, moments)
            labels.append([stem, label])
            colours[stem] = 10 * label + number
            file = tmp_path / "d" / "images" / name / f"img{number:08d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (colours[stem], 0, 0)).save(file)
    (tmp_path / "d" / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": labels}))
    arguments = ["--source", tmp_path / "d", "--output-dir", tmp_path / "store", "--vae", "none/here", "--keep-images"]
    import_latents.main(list(map(str, arguments)))
    store = LatentDataset(tmp_path / "store", images=True)
    batch = store.__getitems__(range(10))
    assert batch["moments"][:, 0, 0, 0].tolist() == batch["image"][:, 0, 0, 0].tolist()
    assert sorted(batch["label"].tolist()) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_no_other_program_is_started_by_an_image(tmp_path, monkeypatch):
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    (tmp_path / "x.png").write_bytes(eps)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started a program"))
    with pytest.raises(OSError, match="no image of a known kind"):
        decode_image(eps)
    with pytest.raises(ValueError, match=r"expected an image, found .*x\.png"):
        open_images(str(tmp_path))
    assert encode_picture(tmp_path / "x.png", 10**6) is None
    monkeypatch.undo()
    for name in sources():  # wherever an image is opened, its kinds are listed
        assert "Image.open(" not in re.sub(r"Image\.open\(\w+, formats=", "", (ROOT / name).read_text()), name


def test_what_is_too_long_too_large_or_empty_is_an_unreadable_image():
    with pytest.raises(OSError, match="1 x 60000 pixels are too narrow"):
        center_crop(Image.new("RGB", (1, 60_000)), 256)
    with pytest.raises(OSError, match="an empty file"):
        decode_image(b"")
    with pytest.raises(OSError, match="no image of a known kind"):
        decode_image(io.BytesIO(b"nonsense" * 9).getvalue())


def test_every_name_that_the_file_system_allows_works(tmp_path, vae):
    source, folder = tmp_path / "[cleaned] photos", os.fsdecode(b"a\xff \xe2\x80\xa8b")
    names = [
        "line\u2028break.png",
        "new\nline.png",
        "tab\x0b\x85.png",
        "back\\slash\r.png",
        os.fsdecode(b"\xff\xfe.png"),
    ]
    for seed, name in enumerate(names):
        save(source / folder / name, seed, kind="PNG")
    dump_latents.main(flags(source, tmp_path / "store", vae, "--verify", len(names)))
    paths = read_paths(tmp_path / "store")
    assert sorted(paths) == sorted(f"{folder}/" + name.replace("\n", "\\n") for name in names)
    assert (tmp_path / "store" / "verify.png").is_file()
    store = LatentDataset(tmp_path / "store")
    assert (len(store), store.class_names) == (len(names), [folder])
