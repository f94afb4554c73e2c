"""Kills, flipped bits and cut files in short form; `make bench-faults` does the same many times."""

import random
from functools import partial

import pytest
from PIL import Image

from benchmarks.bench_faults import (
    contents,
    corrupt_files,
    damage_newest,
    disturb_many,
    fill_disk,
    kept_and_weights,
    kill_all,
    kill_reader,
    launch,
    run_whole,
    something_is_wrong,
    start_another,
    train_command,
    weights,
)
from demo.digits import enlarge, load_digits
from tests.stores import make_store, make_vae


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    return make_store(folder / "store", count=30, flips=True, vae=make_vae(folder / "vae"))


def in_order(*disturbances):
    """A disturbance that is the next of these each time."""
    left = iter(disturbances)
    return lambda *arguments: next(left)(*arguments)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "kills"), [(1, 2), (2, 1)])
def test_killed_training_ends_in_the_undisturbed_run_bit_for_bit(processes, kills, store, tmp_path):
    done = disturb_many(
        partial(train_command, store, 60, processes=processes), weights, tmp_path, kills, random.Random(processes)
    )
    assert done["equal"] == done["runs"] >= 1
    assert done["trials"] == kills


@pytest.mark.slow
def test_killed_readers_and_damaged_checkpoints_of_two_processes_leave_the_undisturbed_run(store, tmp_path):
    each = in_order(kill_reader, damage_newest)
    train = partial(train_command, store, 30, processes=2)
    done = disturb_many(train, kept_and_weights, tmp_path, 2, random.Random(0), each, most=2)
    assert done["equal"] == done["runs"] >= 1
    assert done["well"] == done["trials"] == 2


@pytest.mark.slow
def test_killed_dumping_and_sampling_end_in_the_undisturbed_bytes(store, tmp_path):
    digits, labels = load_digits()
    for index, (image, label) in enumerate(zip(enlarge(digits[:200]), labels, strict=False)):
        (tmp_path / "digits" / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "digits" / str(label) / f"{index}.png")
    vae = store.parent / "vae"

    def dump(output):
        flags = "--resolution 32 --flip --batch-size 8 --num-workers 1"
        source = tmp_path / "digits"
        return launch("preprocessing/dump_latents.py", flags, source=source, output_dir=output, vae=vae)

    # Killed, then on a full disk, then by two at once.
    each = in_order(kill_all, fill_disk, start_another)
    done = disturb_many(dump, contents, tmp_path / "dumps", 3, random.Random(0), each, most=3)
    assert done["equal"] == done["runs"] >= 1
    assert done["well"] == done["trials"] == 3
    run_whole(train_command(store, 1, tmp_path / "run"))

    def sample(output):
        flags = "--num-samples 96 --num-steps 40 --per-proc-batch-size 16"
        return launch("sample_ddp.py", flags, checkpoint=tmp_path / "run", output_dir=output)

    done = disturb_many(sample, contents, tmp_path / "draws", 1, random.Random(0))
    assert done["equal"] == done["runs"] >= 1


def test_flipped_bits_and_cut_files_are_found_and_never_a_traceback(store, tmp_path):
    files = sorted(path for path in store.iterdir() if path.is_file())
    found = corrupt_files(files, lambda: something_is_wrong(store), 60, 20, random.Random(0))
    assert (found["flips_found"], found["cuts_found"], found["tracebacks"]) == (60, 20, 0)


@pytest.mark.slow
def test_flipped_bits_and_cut_checkpoints_are_found(store, tmp_path):
    run_whole(train_command(store, 1, tmp_path / "run"))
    files = sorted(path for path in (tmp_path / "run" / "checkpoints" / "0000001").iterdir())
    found = corrupt_files(files, lambda: something_is_wrong(tmp_path / "run"), 40, 10, random.Random(0))
    assert (found["flips_found"], found["cuts_found"], found["tracebacks"]) == (40, 10, 0)
