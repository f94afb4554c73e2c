"""Dumps of REPA's and LightningDiT's layout, written here, and read back through the store."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dataset import LatentDataset
from models.vae import load_vae, vae_digest
from preprocessing import import_latents, store_writer
from reporting.log import read_log
from tests.stores import make_vae

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "preprocessing" / "import_latents.py"


def repa_dump(folder, count=7, size=4, leading_axis=False, seed=0):
    """REPA's folder; moments, labels and crops as they should come out, in the order of the files' names."""
    rng = np.random.default_rng(seed)
    moments = rng.standard_normal((count, 8, size, size)).astype(np.float32)
    moments[:, 4:] = np.abs(moments[:, 4:])
    labels = rng.integers(0, 3, count).tolist()
    images = rng.integers(0, 256, (count, 8 * size, 8 * size, 3), dtype=np.uint8)
    entries = []
    for k in range(count):
        part = f"{k // 3:05d}"
        (folder / "vae-sd" / part).mkdir(parents=True, exist_ok=True)
        (folder / "images" / part).mkdir(parents=True, exist_ok=True)
        name = f"{part}/img-mean-std-{k:08d}.npy"
        np.save(folder / "vae-sd" / name, moments[k][None] if leading_axis else moments[k])
        Image.fromarray(images[k]).save(folder / "images" / part / f"img{k:08d}.png")
        entries.append([name, labels[k]])
    rng.shuffle(entries)  # the labels are found by name
    (folder / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": entries}))
    return moments, labels, images


def lightningdit_dump(folder, counts=(5, 4), channels=4, size=4, flips=True, stats=True, seed=0):
    """LightningDiT's shards; latents, mirrored latents and labels as they should come out."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for index, count in enumerate(counts):
        shard = {
            "latents": 3 * torch.randn(count, channels, size, size, generator=generator) + 0.5,
            "labels": torch.randint(0, 3, (count,), generator=generator),
        }
        if flips:
            shard["latents_flip"] = shard["latents"].flip(3).contiguous()
        save_file(shard, folder / f"latents_rank00_shard{index:03d}.safetensors")
        parts.append(shard)
    if stats:
        mean, std = torch.linspace(-1, 1, channels), torch.linspace(2, 3, channels)
        torch.save({"mean": mean.view(1, -1, 1, 1), "std": std.view(1, -1, 1, 1)}, folder / "latents_stats.pt")
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def imported(source, output, *flags):
    import_latents.main(["--source", str(source), "--output-dir", str(output), *flags])
    return LatentDataset(output, images="--keep-images" in flags)


@pytest.mark.parametrize("leading_axis", [False, True])
@pytest.mark.parametrize("inner", ["", "vae-sd"])
def test_repas_folder_comes_back_with_labels_by_name_and_images_by_order(leading_axis, inner, tmp_path):
    moments, labels, images = repa_dump(tmp_path / "dump", leading_axis=leading_axis)
    store = imported(tmp_path / "dump" / inner, tmp_path / "store", "--keep-images")
    batch = store.__getitems__(list(range(7)))
    assert torch.equal(batch["moments"], torch.from_numpy(moments))
    assert batch["label"].tolist() == labels
    assert torch.equal(batch["image"], torch.from_numpy(images))
    assert (store.scale.scale, store.scale.shift) == ((0.18215,), (0.0,))
    assert (store.meta["vae"], store.meta["vae_digest"]) == ("stabilityai/sd-vae-ft-mse", "unknown")
    assert (store.meta["resolution"], store.meta["crop"]) == (32, "adm-center")
    assert store.class_names == ["0", "1", "2"]
    assert (tmp_path / "store" / "paths.txt").read_text().splitlines()[3] == "00001/img-mean-std-00000003.npy"
    assert store.damaged_files(whole=True) == []


def test_lightningdits_shards_are_samples_without_std_normalised_by_their_statistics(tmp_path):
    expected = lightningdit_dump(tmp_path / "dump")
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\ndog\n")
    store = imported(tmp_path / "dump", tmp_path / "store", "--class-names", str(tmp_path / "names.txt"))
    assert store.has_flips
    batch = store.__getitems__(list(range(18)))
    mean, std = batch["moments"].chunk(2, dim=1)
    assert torch.equal(mean, torch.cat([expected["latents"], expected["latents_flip"]]))
    assert torch.equal(std, torch.zeros_like(mean))
    assert torch.equal(batch["label"], expected["labels"].repeat(2))
    z = store.scale.scale_latent(mean[:9])
    channel = torch.arange(4).view(-1, 1, 1)
    torch.testing.assert_close(z, (expected["latents"] - (-1 + channel * 2 / 3)) / (2 + channel / 3))
    assert (store.meta["resolution"], store.class_names[2], store.num_classes) == (64, "cat", 4)
    doubled = imported(tmp_path / "dump", tmp_path / "double", "--latent-multiplier", "2")
    torch.testing.assert_close(doubled.scale.scale_latent(mean[:9]), 2 * z)


def test_statistics_can_be_another_file_or_measured(tmp_path):
    expected = lightningdit_dump(tmp_path / "dump", flips=False, stats=False)
    torch.save({"mean": torch.zeros(4), "std": torch.full((4,), 4.0)}, tmp_path / "s.pt")
    store = imported(tmp_path / "dump", tmp_path / "given", "--stats", str(tmp_path / "s.pt"))
    assert (store.scale.scale, store.scale.shift) == ((0.25,) * 4, (0.0,) * 4)
    assert not store.has_flips
    store = imported(tmp_path / "dump", tmp_path / "auto", "--scale", "auto")
    z = store.scale.scale_latent(expected["latents"]).transpose(0, 1).flatten(1).double()
    torch.testing.assert_close(z.mean(dim=1), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(z.std(dim=1, correction=0), torch.ones(4, dtype=torch.float64), rtol=1e-6, atol=0)


def test_a_local_vae_is_identified(tmp_path):
    repa_dump(tmp_path / "dump")
    vae = make_vae(tmp_path / "vae")
    store = imported(tmp_path / "dump", tmp_path / "store", "--vae", str(vae), "--resolution", "16")
    assert store.meta["vae_digest"] == vae_digest(load_vae(str(vae)))
    assert store.meta["resolution"] == 16


def content(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.mark.parametrize("kind", ["repa", "lightningdit"])
def test_a_stopped_import_resumes_to_the_same_bytes(kind, tmp_path, monkeypatch):
    if kind == "repa":
        repa_dump(tmp_path / "dump", count=150, size=2)
    else:
        lightningdit_dump(tmp_path / "dump", counts=(70, 80), size=2)
    monkeypatch.setattr(import_latents, "BATCH", 20)
    imported(tmp_path / "dump", tmp_path / "whole")
    for stop in (1, 2, 4, 7):
        append, calls = store_writer.ShardWriter.append, []

        def stopped(self, *args, append=append, calls=calls, stop=stop, **kwargs):
            if len(calls) == stop:
                raise KeyboardInterrupt
            calls.append(1)
            append(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(store_writer.ShardWriter, "append", stopped)
            with pytest.raises(KeyboardInterrupt):
                imported(tmp_path / "dump", tmp_path / f"parts{stop}")
        assert not (tmp_path / f"parts{stop}" / "meta.json").exists()
        imported(tmp_path / "dump", tmp_path / f"parts{stop}")
        assert content(tmp_path / f"parts{stop}") == content(tmp_path / "whole")


def test_what_is_not_given_on_resume_comes_from_the_record(tmp_path, monkeypatch):
    lightningdit_dump(tmp_path / "dump", size=2)
    torch.save({"mean": torch.zeros(4), "std": torch.full((4,), 4.0)}, tmp_path / "s.pt")
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\n")
    flags = ["--dtype", "float16", "--resolution", "40", "--stats", str(tmp_path / "s.pt"), "--latent-multiplier", "2"]
    flags += ["--class-names", str(tmp_path / "names.txt"), "--vae", "some/vae"]
    whole = imported(tmp_path / "dump", tmp_path / "whole", *flags)
    with monkeypatch.context() as patch:
        patch.setattr(store_writer.ShardWriter, "close", lambda self: sys.exit())
        with pytest.raises(SystemExit):
            imported(tmp_path / "dump", tmp_path / "parts", *flags)
    parts = imported(tmp_path / "dump", tmp_path / "parts")
    assert parts.meta | {"scale_source": "s.pt"} == whole.meta
    imported(tmp_path / "dump", tmp_path / "whole")  # complete
    for other in (["--dtype", "float32"], ["--latent-multiplier", "3"], ["--vae", "another/vae"]):
        with pytest.raises(ValueError, match="was made with other settings"):
            imported(tmp_path / "dump", tmp_path / "whole", *other)


@pytest.mark.slow
def test_a_killed_import_resumes_to_the_same_bytes(tmp_path):
    repa_dump(tmp_path / "dump", count=3000, size=2)
    command = [sys.executable, str(PROGRAM), "--source", str(tmp_path / "dump"), "--output-dir"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    process = subprocess.Popen([*command, str(tmp_path / "parts")], stderr=subprocess.DEVNULL)
    while not list((tmp_path / "parts" / "partial").glob("shard-*.json*")):
        assert process.poll() is None
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "parts" / "meta.json").exists()
    subprocess.run([*command, str(tmp_path / "parts")], check=True, capture_output=True)
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


def labels_of(dump, change):
    file = dump / "vae-sd" / "dataset.json"
    entries = dict(json.loads(file.read_text())["labels"])
    change(entries)
    file.write_text(json.dumps({"labels": list(entries.items())}))


def small_image(file):
    Image.new("RGB", (9, 9)).save(file)


FIRST = "00000/img-mean-std-00000000.npy"


@pytest.mark.parametrize(
    ("spoil", "flags", "message"),
    [
        (lambda d: labels_of(d, lambda e: e.pop(FIRST)), (), rf"found 7 and 6; a file without a label: {FIRST}"),
        (lambda d: (d / "vae-sd" / FIRST).unlink(), (), rf"found 6 and 7; a label without its file: {FIRST}"),
        (lambda d: labels_of(d, lambda e: e.update({FIRST: -1})), (), f"counted from 0.*found -1 for {FIRST}"),
        (lambda d: labels_of(d, lambda e: e.update({FIRST: 0.5})), (), "counted from 0.*found 0.5"),
        (lambda d: (d / "vae-sd" / "dataset.json").write_text("[]"), (), r'expected \{"labels": '),
        (lambda d: (d / "vae-sd" / "dataset.json").write_text("{"), (), r'expected \{"labels": '),
        (lambda d: np.save(d / "vae-sd" / FIRST, np.zeros((8, 2, 2))), (), r"means and stds \(8, 2, 2\)"),
        (lambda d: (d / "vae-sd" / FIRST).write_bytes(b"x"), (), "cannot be read as one"),
        (lambda d: np.save(d / "vae-sd" / FIRST, np.array([{}])), (), "cannot be read as one"),
        (lambda d: np.save(d / "vae-sd" / FIRST, np.full((8, 4, 4), np.nan)), (), f"expected finite latents.*{FIRST}"),
        (lambda d: np.save(d / "vae-sd" / FIRST, np.full((8, 4, 4), -1.0)), (), "are they log-variances"),
        (lambda d: np.save(d / "vae-sd" / FIRST, np.full((8, 4, 4), 1e6)), ("--dtype", "float16"), "--dtype float32"),
        (
            lambda d: (d / "images" / "00000" / "img00000001.png").unlink(),
            ("--keep-images",),
            "with the number of the latent 00000/img-mean-std-00000001.npy, found none",
        ),
        (lambda d: small_image(d / "images" / "00001" / "img00000004.png"), ("--keep-images",), "of side 32, found"),
        (lambda d: None, ("--keep-images", "--resolution", "64"), "--resolution: expected 32"),
        (lambda d: None, ("--format", "lightningdit"), "found repa in"),
        (lambda d: None, ("--class-names", "absent.txt"), "--class-names: expected a text file"),
        (lambda d: None, ("--vae", str(PROGRAM)), "--vae "),
    ],
)
def test_a_repa_folder_that_is_wrong_is_named_before_anything_is_written(spoil, flags, message, tmp_path):
    repa_dump(tmp_path / "dump")
    spoil(tmp_path / "dump")
    with pytest.raises(ValueError, match=message) as error:
        imported(tmp_path / "dump", tmp_path / "store", *flags)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "store").exists()


def reshard(dump, change, index=0):
    from safetensors.torch import load_file

    file = dump / f"latents_rank00_shard{index:03d}.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def statistics(dump, mean, std):
    torch.save({"mean": mean, "std": std}, dump / "latents_stats.pt")


@pytest.mark.parametrize(
    ("spoil", "flags", "message"),
    [
        (lambda d: reshard(d, lambda t: t.pop("labels")), (), "expected latents and labels in .*shard000"),
        (lambda d: reshard(d, lambda t: t.update(labels=torch.zeros(3, dtype=torch.long))), (), "as many latents"),
        (lambda d: reshard(d, lambda t: t.update(labels=torch.full((5,), -2))), (), "counted from 0"),
        (lambda d: reshard(d, lambda t: t.update(labels=torch.zeros(5))), (), "counted from 0 .*float32"),
        (lambda d: reshard(d, lambda t: t.pop("latents_flip"), 1), (), "shards that are alike"),
        (lambda d: reshard(d, lambda t: t["latents"].fill_(torch.nan)), (), "finite latents.*shard000.safetensors/0"),
        (lambda d: (d / "latents_rank00_shard001.safetensors").write_bytes(b"x" * 9), (), "cannot be read"),
        (lambda d: (d / "latents_stats.pt").unlink(), (), "expected statistics.*--stats FILE or --scale auto"),
        (lambda d: statistics(d, torch.zeros(3), torch.ones(3)), (), "4 means and positive stds.*found 3 and 3"),
        (lambda d: statistics(d, torch.zeros(4), torch.zeros(4)), (), "positive"),
        (lambda d: torch.save([1], d / "latents_stats.pt"), (), "expected tensors `mean` and `std`"),
        (lambda d: (d / "latents_stats.pt").write_bytes(b"x"), (), "expected tensors `mean` and `std`"),
        (lambda d: None, ("--keep-images",), "--keep-images: expected a source with images"),
        (lambda d: None, ("--latent-multiplier", "0"), "--latent-multiplier"),
        (lambda d: None, ("--format", "repa"), "found lightningdit in"),
    ],
)
def test_lightningdit_shards_that_are_wrong_are_named_before_anything_is_written(spoil, flags, message, tmp_path):
    lightningdit_dump(tmp_path / "dump")
    spoil(tmp_path / "dump")
    with pytest.raises(ValueError, match=message) as error:
        imported(tmp_path / "dump", tmp_path / "store", *flags)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "store").exists()


def test_a_user_sees_one_line_and_code_2(tmp_path):
    for source in (tmp_path, tmp_path / "absent"):
        command = [sys.executable, str(PROGRAM), "--source", str(source), "--output-dir", str(tmp_path / "store")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.startswith(
            "error: --source: expected a folder with vae-sd/dataset.json (REPA) or *.safetensors"
        )
        assert done.stderr.count("\n") == 1
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "else.txt").write_text("x")
    repa_dump(tmp_path / "dump")
    with pytest.raises(ValueError, match="found other files"):
        imported(tmp_path / "dump", tmp_path / "store")


def test_va_vae_latents_train_a_sit_of_patch_1(tmp_path):
    """32 channels, 16 x 16, per-channel statistics: the paper's VAVAE rows, with a small model."""
    from tests.test_train import run, weights

    lightningdit_dump(tmp_path / "dump", counts=(4, 4), channels=32, size=16)
    imported(tmp_path / "dump", tmp_path / "store")
    settings = {"batch_size": 2, "max_train_steps": 1, "random_flip": True, "num_workers": 0}
    folder = run(tmp_path / "store", tmp_path, model="SiT-Ti/1", **settings)
    (row,) = read_log(folder)
    assert 0 < row["align_vae"] < 5
    assert weights(folder)["heads.vae.8.weight"].shape == (32, 384)
    assert weights(folder)["sit.x_embedder.proj.weight"].shape == (192, 32, 1, 1)
