"""From images to a store: the crop, the sources, the entry point, and what it refuses."""

import dataclasses
import io
import itertools
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset import LatentDataset
from models.vae import encode_moments, load_vae
from preprocessing import dump_latents
from preprocessing.sources import open_source
from runtime.cli import flag
from runtime.files import Field
from runtime.images import center_crop, decode_image
from tests.stores import make_vae

ROOT = Path(__file__).resolve().parent.parent


def picture(width, height, seed=0, channels=3):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 6, channels), dtype=np.uint8).squeeze()
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------------------------- crop


def box(x):
    return float(-0.5 < x <= 0.5)


def cubic(x):
    """Keys' kernel with a = -0.5."""
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def resample(pixels, width, height, kernel, support, columns_first):
    """Each axis in turn: the kernel widened when shrinking, renormalised at edges, rounded to 8 bits."""

    def axis(values, size):
        n = values.shape[0]
        scale = n / size
        stretch = max(scale, 1.0)
        weights = np.zeros((size, n))
        for i in range(size):
            center = (i + 0.5) * scale
            first, last = int(center - support * stretch + 0.5), int(center + support * stretch + 0.5)
            for k in range(max(0, first), min(n, last)):
                weights[i, k] = kernel((k + 0.5 - center) / stretch)
        means = np.tensordot(weights / weights.sum(1, keepdims=True), values, axes=(1, 0))
        return np.clip(np.floor(means + 0.5), 0, 255)

    for columns in (columns_first, not columns_first):
        pixels = axis(pixels.swapaxes(0, 1), width).swapaxes(0, 1) if columns else axis(pixels, height)
    return pixels


@pytest.mark.parametrize(
    "width, height, size",
    [(50, 37, 16), (64, 64, 16), (33, 90, 16), (16, 16, 16), (20, 31, 16), (9, 12, 16), (130, 67, 32)],
)
def test_crop_equals_an_independent_implementation(width, height, size):
    image = picture(width, height)
    found = center_crop(image, size).astype(np.float64)
    assert found.shape == (size, size, 3)
    differences = []
    # Versions of Pillow differ in the axis they take first, and so in a few roundings.
    for order in itertools.product((True, False), repeat=2):
        pixels = np.asarray(image).astype(np.float64)
        while min(pixels.shape[:2]) >= 2 * size:
            h, w = pixels.shape[:2]
            pixels = resample(pixels, w // 2, h // 2, box, 0.5, order[0])
        h, w = pixels.shape[:2]
        factor = size / min(h, w)
        pixels = resample(pixels, round(w * factor), round(h * factor), cubic, 2.0, order[1])
        top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
        differences.append(np.abs(found - pixels[top : top + size, left : left + size]))
    closest = min(differences, key=np.sum)
    # Pillow computes in fixed point: a value on the very edge of rounding may fall to the other side.
    assert closest.max() <= 1
    assert (closest > 0).sum() <= 2


# ------------------------------------------------------------------------------------------------------------- sources


def fill(folder, classes=("cat", "ant", "bee"), count=3):
    """Class folders of small pictures; {name: pixels}."""
    made = {}
    for c, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for k in range(count):
            image = picture(40 + k, 36 + c, seed=10 * c + k)
            image.save(folder / name / f"{k}.png")
            made[f"{name}/{k}.png"] = np.asarray(image)
    return made


def check(source, made):
    assert source.class_names == ["ant", "bee", "cat"]
    assert source.names == sorted(made)
    assert source.labels == [["ant", "bee", "cat"].index(name.split("/")[0]) for name in sorted(made)]
    for index, name in enumerate(source.names):
        assert np.array_equal(np.asarray(decode_image(source.read(index))), made[name])


def test_class_folders_without_hidden_and_other_files(tmp_path):
    made = fill(tmp_path)
    (tmp_path / "ant" / "notes.txt").write_text("x")
    (tmp_path / "ant" / "._0.png").write_bytes(b"x")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "0.png").write_bytes(b"x")
    (tmp_path / "bee" / "deep").mkdir()
    picture(8, 8, seed=5).save(tmp_path / "bee" / "deep" / "7.PNG")
    check(open_source(tmp_path), made | {"bee/deep/7.PNG": np.asarray(picture(8, 8, seed=5))})


@pytest.mark.parametrize("around", ["", "ILSVRC/train/"])
def test_a_zip_of_class_folders(around, tmp_path):
    made = fill(tmp_path / "images")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for name in made:
            archive.write(tmp_path / "images" / name, around + name)
        archive.writestr("__MACOSX/ant/0.png", b"x")
    check(open_source(tmp_path / "images.zip"), made)


def parquet(path, rows, names=None, group=2):
    import pyarrow
    from pyarrow import parquet as writer

    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    schema = pyarrow.schema([("image", image), ("label", pyarrow.int64())])
    if names:
        features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        schema = schema.with_metadata({"huggingface": json.dumps(features)})
    columns = {"image": [{"bytes": content, "path": None} for content, _ in rows], "label": [k for _, k in rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    writer.write_table(pyarrow.table(columns, schema=schema), path, row_group_size=group)


def test_parquet_shards_as_on_the_hub(tmp_path):
    pictures = [picture(20 + k, 30, seed=k) for k in range(8)]
    rows = [(encoded(image, "JPEG" if k % 2 else "PNG"), k % 3) for k, image in enumerate(pictures)]
    parquet(tmp_path / "data" / "train-00000-of-00002.parquet", rows[:5], ["ant", "bee", "cat"])
    parquet(tmp_path / "data" / "train-00001-of-00002.parquet", rows[5:], ["ant", "bee", "cat"])
    source = open_source(tmp_path)
    assert source.class_names == ["ant", "bee", "cat"]
    assert source.labels == [k % 3 for k in range(8)]
    assert len(set(source.names)) == 8
    for k in (7, 0, 5, 4, 1):
        assert source.read(k) == rows[k][0]
    parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", rows[:1])
    with pytest.raises(ValueError, match=r"one split, found train, validation; .*train-\*\.parquet"):
        open_source(tmp_path)
    assert open_source(f"{tmp_path}/data/validation-*.parquet").class_names == ["0"]
    # The hub's converted layout: the same names in a folder for each split.
    for split in ("train", "validation"):
        (tmp_path / "default" / split).mkdir(parents=True)
        parquet(tmp_path / "default" / split / "0000.parquet", rows[:2])
    with pytest.raises(
        ValueError, match=r"of one folder, found those of 2, which may be splits: .*/train, .*/validation"
    ):
        open_source(tmp_path / "default")
    assert len(open_source(tmp_path / "default" / "train").names) == 2


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda p: p / "absent", "found nothing at"),
        (lambda p: p, "found none in"),
        (lambda p: (picture(8, 8).save(p / "0.png"), p)[1], "found none around 0.png"),
        (lambda p: ((p / "x.zip").write_bytes(b"PK nonsense"), p / "x.zip")[1], "is no zip"),
        (lambda p: ((p / "x.parquet").write_bytes(b"nonsense"), p / "x.parquet")[1], "expected parquet with columns"),
        (lambda p: f"{p}/*.parquet", "no file matches"),
    ],
)
def test_sources_that_are_none_are_refused(make, message, tmp_path):
    with pytest.raises(ValueError, match=f"--source: .*{message}") as error:
        open_source(make(tmp_path))
    assert "\n" not in str(error.value)


def test_unusual_files_are_read():
    rgb, grey = picture(20, 20), picture(20, 20, channels=1)
    reference = np.asarray(rgb).astype(int)
    cmyk = decode_image(encoded(rgb.convert("CMYK"), "JPEG", quality=100))
    assert np.abs(np.asarray(cmyk).astype(int) - reference).mean() < 3
    assert np.array_equal(np.asarray(decode_image(encoded(grey)))[..., 1], np.asarray(grey))
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    assert np.array_equal(np.asarray(decode_image(encoded(deep)))[..., 2], np.asarray(grey))
    palette = rgb.quantize(64)
    assert np.array_equal(np.asarray(decode_image(encoded(palette))), np.asarray(palette.convert("RGB")))
    clear = rgb.copy()
    clear.putalpha(7)
    assert np.array_equal(np.asarray(decode_image(encoded(clear))), np.asarray(rgb))
    assert all(decode_image(encoded(rgb, kind)).mode == "RGB" for kind in ("GIF", "WEBP", "BMP", "TIFF", "PPM"))


@pytest.mark.parametrize(
    "content", [b"", b"nonsense", encoded(picture(64, 64))[:300], encoded(picture(64, 64), "JPEG")[:200]]
)
def test_broken_files_are_told_from_images(content):
    with pytest.raises(OSError):  # noqa: PT011 - the words are Pillow's
        decode_image(content)


def test_image_bombs_are_refused():
    bomb = encoded(Image.new("1", (20_000, 20_000)))
    assert len(bomb) < 100_000
    with pytest.raises(OSError, match="more than 179 million pixels"):
        decode_image(bomb)


# --------------------------------------------------------------------------------------------------------- entry point


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return make_vae(tmp_path_factory.mktemp("vae") / "vae")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    fill(folder, count=50)  # 150 images: three shards
    return folder


def flags(source, output, vae, *more):
    fixed = "--resolution 32 --batch-size 16 --num-workers 0".split()
    return ["--source", str(source), "--output-dir", str(output), "--vae", str(vae), *fixed, *map(str, more)]


def run(*arguments):
    dump_latents.main(flags(*arguments))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def undisturbed(images, vae, tmp_path_factory):
    """A store with everything in it, made by one process in one go."""
    folder = tmp_path_factory.mktemp("undisturbed") / "store"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as under torchrun: another number of threads may round otherwise
    run(images, folder, vae, "--flip", "--keep-images")
    torch.set_num_threads(threads)
    return folder


def test_the_store_holds_the_moments_of_each_crop(images, vae, undisturbed):
    store = LatentDataset(undisturbed, images=True)
    assert len(store) == 150
    assert store.class_names == ["ant", "bee", "cat"]
    assert store.damaged_files(whole=True) == []
    model = load_vae(str(vae))
    source = open_source(images)
    assert (undisturbed / "paths.txt").read_text().splitlines() == source.names
    batch = store.__getitems__([0, 70, 149, 150 + 70])
    assert batch["label"].tolist() == [0, 1, 2, 1]
    for row, index in enumerate((0, 70, 149)):
        crop = center_crop(decode_image(source.read(index)), 32)
        assert np.array_equal(batch["image"][row].numpy(), crop)
        moments = encode_moments(model, torch.from_numpy(crop)[None])[0]
        torch.testing.assert_close(batch["moments"][row], moments, rtol=1e-4, atol=1e-5)
        if index == 70:
            mirrored = encode_moments(model, torch.from_numpy(crop[:, ::-1].copy())[None])[0]
            torch.testing.assert_close(batch["moments"][3], mirrored, rtol=1e-4, atol=1e-5)
            assert np.array_equal(batch["image"][3].numpy(), crop[:, ::-1])
    assert store.meta["vae"] == str(vae)
    assert (store.meta["scale"], store.meta["shift"], store.meta["scale_source"]) == ([0.9], [0.0], "config")


def test_a_killed_run_resumes_to_the_same_bytes(images, vae, undisturbed, tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    encode = dump_latents.start_encoding
    for stop in (1, 4, 3):  # batches before each kill

        def killed(*arguments, _left=[stop]):  # noqa: B006 - a counter
            _left[0] -= 1
            if _left[0] < 0:
                raise KeyboardInterrupt
            return encode(*arguments)

        monkeypatch.setattr(dump_latents, "start_encoding", killed)
        with pytest.raises(KeyboardInterrupt):
            run(images, tmp_path / "store", vae, "--flip", "--keep-images")
        with pytest.raises(ValueError, match=r"unfinished latent store .*: run the same"):
            LatentDataset(tmp_path / "store")
    monkeypatch.setattr(dump_latents, "start_encoding", encode)
    run(images, tmp_path / "store", vae, "--flip", "--keep-images", "--num-workers", 1)
    torch.set_num_threads(threads)
    assert contents(tmp_path / "store") == contents(undisturbed)


def test_nothing_is_written_behind_a_batch_that_failed(images, vae, undisturbed, tmp_path, monkeypatch):
    """The thread that writes has the next batches in hand already when one cannot be stored."""
    threads, as_stored, seen = torch.get_num_threads(), dump_latents.as_stored, []
    torch.set_num_threads(1)

    def broken(*arguments):
        seen.append(arguments)
        if len(seen) == 3:
            raise ValueError("a number that does not fit")
        return as_stored(*arguments)

    monkeypatch.setattr(dump_latents, "as_stored", broken)
    with pytest.raises(ValueError, match="does not fit"):
        run(images, tmp_path / "store", vae, "--flip", "--keep-images")
    assert len(seen) == 3
    monkeypatch.undo()
    run(images, tmp_path / "store", vae, "--flip", "--keep-images")
    torch.set_num_threads(threads)
    assert contents(tmp_path / "store") == contents(undisturbed)


@pytest.mark.slow
def test_two_processes_write_the_bytes_of_one(images, vae, undisturbed, tmp_path):
    command = [sys.executable, *"-m torch.distributed.run --standalone --nproc_per_node=2".split()]
    command.append(str(ROOT / "preprocessing" / "dump_latents.py"))
    arguments = flags(images, tmp_path / "store", vae, "--flip", "--keep-images")
    done = subprocess.run(
        command + arguments, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "store") == contents(undisturbed)


def test_rank_0_lists_the_images_for_all(images, vae, undisturbed, tmp_path, monkeypatch):
    listed = dump_latents.open_source(images)
    monkeypatch.setattr(dump_latents, "open_source", lambda path: pytest.fail("listed by a rank for itself"))
    monkeypatch.setattr(dump_latents, "run_on_rank0", lambda compute: listed)
    run(images, tmp_path / "store", vae, "--flip", "--keep-images")
    assert contents(tmp_path / "store") == contents(undisturbed)


def test_a_complete_store_is_left_alone(images, vae, undisturbed, capsys):
    before = contents(undisturbed)
    run(images, undisturbed, vae, "--flip", "--keep-images", "--batch-size", 3)
    assert "is complete: 150 images" in capsys.readouterr().out
    assert contents(undisturbed) == before


@pytest.mark.parametrize("more", ["--dtype float16", "--limit 9", "--no-flip", "--scale auto", "--resolution 16"])
def test_a_store_of_other_settings_is_refused(more, images, vae, undisturbed):
    name = {"--limit 9": "images 150 there, 9 now"}.get(more, more.split()[0].removeprefix("--").removeprefix("no-"))
    with pytest.raises(ValueError, match=f"other settings .*{name}.*another --output-dir"):
        run(images, undisturbed, vae, "--flip", "--keep-images", *more.split())


def test_what_is_not_given_on_resume_comes_from_the_record(images, vae, tmp_path, monkeypatch):
    flags = ["--flip", "--keep-images", "--dtype", "float16", "--scale", "auto", "--resolution", 16, "--limit", 100]
    run(images, tmp_path / "whole", vae, *flags)
    with monkeypatch.context() as patch:
        patch.setattr(dump_latents.ShardWriter, "close", lambda self: sys.exit())
        with pytest.raises(SystemExit):
            run(images, tmp_path / "parts", vae, *flags)
    for folder in ("parts", "whole"):  # unfinished, and complete
        few = ["--source", images, "--output-dir", tmp_path / folder, "--vae", vae, "--batch-size", 16]
        dump_latents.main([*map(str, few), "--num-workers", "0"])
        assert contents(tmp_path / folder) == contents(tmp_path / "whole")


def test_a_new_setting_has_its_historic_value_in_old_stores(images, vae, undisturbed, monkeypatch, capsys):
    colour = ("colour", str, flag("Lab", "colours of the crops"))
    newer = dataclasses.make_dataclass("Newer", [colour], bases=(dump_latents.DumpConfig,), frozen=True)
    monkeypatch.setattr(dump_latents, "DumpConfig", newer)
    monkeypatch.setattr(dump_latents, "SETTINGS", dump_latents.SETTINGS | {"colour": Field("RGB")})
    dump_latents.main(["--source", str(images), "--output-dir", str(undisturbed), "--vae", str(vae)])
    assert "is complete" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"other settings \(colour RGB there, Lab now\)"):
        run(images, undisturbed, vae, "--colour", "Lab")


def test_a_store_of_newer_code_is_one_line(images, vae, tmp_path):
    (tmp_path / "store" / "partial").mkdir(parents=True)
    settings = dict.fromkeys(dump_latents.SETTINGS, 1) | {"colour": "Lab"}
    (tmp_path / "store" / "partial" / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"settings\.json was written by newer code: it has 'colour'") as error:
        run(images, tmp_path / "store", vae)
    assert "\n" not in str(error.value)


def test_limit_is_spread_over_the_classes(images, vae, tmp_path):
    run(images, tmp_path / "store", vae, "--limit", 6)
    assert LatentDataset(tmp_path / "store").labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_float16_is_the_rounded_float32(images, vae, undisturbed, tmp_path):
    run(images, tmp_path / "store", vae, "--dtype", "float16")
    half, full = (
        LatentDataset(folder).__getitems__(range(150))["moments"] for folder in (tmp_path / "store", undisturbed)
    )
    torch.testing.assert_close(half, full, rtol=2**-10, atol=1e-5)
    assert not torch.equal(half, full)


def test_moments_beyond_float16_stop_the_run(images, tmp_path):
    folder = make_vae(tmp_path / "vae")
    vae = load_vae(str(folder)).requires_grad_(False)
    with torch.no_grad():
        vae.quant_conv.bias[0] = 1e5
    vae.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"float16 can hold.*--dtype float32"):
        run(images, tmp_path / "store", folder, "--dtype", "float16")


def test_measured_scale_gives_each_channel_mean_0_and_std_1(images, vae, undisturbed, tmp_path):
    run(images, tmp_path / "store", vae, "--scale", "auto")
    store = LatentDataset(tmp_path / "store")
    assert store.meta["scale_source"] == "measured"
    mean, std = store.__getitems__(range(150))["moments"].double().chunk(2, dim=1)
    z = store.scale.scale_latent(mean)
    variance = z.var(dim=(0, 2, 3), correction=0) + (
        std.square().mean((0, 2, 3)) * torch.tensor(store.scale.scale) ** 2
    )
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(4).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(variance, torch.ones(4).double(), rtol=1e-5, atol=0)


def test_verify_draws_originals_above_decoded_latents(images, vae, tmp_path, capsys):
    run(images, tmp_path / "store", vae, "--limit", 12, "--verify", 5)
    drawn = np.asarray(Image.open(tmp_path / "store" / "verify.png"))
    assert drawn.shape == (2 * 34 + 2, 5 * 34 + 2, 3)
    source = open_source(images)
    first = center_crop(decode_image(source.read(0)), 32)
    assert np.array_equal(drawn[2:34, 2:34], first)
    assert "mean PSNR" in capsys.readouterr().out


def test_corrupt_files_stop_the_run_or_are_listed(vae, tmp_path):
    fill(tmp_path / "images", count=30)
    broken = tmp_path / "images" / "bee" / "11.png"
    broken.write_bytes(broken.read_bytes()[:100])
    (tmp_path / "images" / "cat" / "3.jpg").write_bytes(encoded(picture(40, 40)))  # wrongly named, but an image
    with pytest.raises(ValueError, match=r"found bee/11.png .*cannot be read.*--skip-corrupt") as error:
        run(tmp_path / "images", tmp_path / "store", vae)
    assert "\n" not in str(error.value)
    run(tmp_path / "images", tmp_path / "store", vae, "--skip-corrupt")
    store = LatentDataset(tmp_path / "store")
    assert len(store) == 90
    assert [entry["path"] for entry in store.meta["skipped"]] == ["bee/11.png"]
    paths = (tmp_path / "store" / "paths.txt").read_text().splitlines()
    assert "bee/11.png" not in paths
    assert "cat/3.jpg" in paths
    assert store.labels.tolist() == [["ant", "bee", "cat"].index(path.split("/")[0]) for path in paths]


@pytest.mark.parametrize(
    "more, message",
    [
        (["--resolution", 30], "--resolution: expected a multiple of 4.*found 30"),
        (["--limit", 0], "--limit: expected at least 1, found 0"),
        (["--batch-size", 0], "--batch-size: expected at least 1"),
        (["--source", "/no/such/folder"], "--source: .*nothing at"),
        (["--vae", "/no/such/vae"], "--vae: expected a directory, file or hub name of an AutoencoderKL"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_written(more, message, images, vae, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(images, tmp_path / "store", vae, *more)
    assert not (tmp_path / "store").exists()


def test_a_user_sees_one_line_and_code_2(vae, tmp_path):
    command = [sys.executable, str(ROOT / "preprocessing" / "dump_latents.py"), *flags(tmp_path, tmp_path / "s", vae)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --source: expected images")
    assert done.stderr.count("\n") == 1
    done = subprocess.run([*command, "--limit", "0"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: --limit: expected at least 1, found 0\n")
