"""Waiting for DataLoader workers: it ends, with a reason."""

import os
import time

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from runtime import loading
from runtime.loading import wait_for_batches, worker_errors
from training.preemption import ignore_signals


class Items(Dataset):
    """Numbers; `trouble` is called in the worker before item 2 is given."""

    def __init__(self, trouble=lambda: 2):
        self.trouble = trouble

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.trouble() if index == 2 else index


class Unpicklable:
    def __reduce__(self):
        raise OSError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(loading, "POLL", 1)
    monkeypatch.setattr(loading, "PATIENCE", 2)


def loader(trouble=lambda: 2, workers=1):
    return DataLoader(Items(trouble), batch_size=1, collate_fn=list, **loading.loading(workers))


@pytest.mark.parametrize("workers", [0, 2])
def test_all_batches_come_in_order(workers):
    assert list(wait_for_batches(loader(workers=workers))) == [[0], [1], [2], [3]]


def test_a_batch_that_cannot_be_handed_over_is_an_error_at_once():
    begin = time.monotonic()
    expected = r"DataLoader worker .*--ipc=host or --shm-size\); or give --num-workers 0"
    with pytest.raises(ValueError, match=expected), worker_errors():
        list(wait_for_batches(loader(Unpicklable)))
    assert time.monotonic() - begin < 20


def test_a_worker_that_is_killed_is_an_error():
    expected = "expected batches from the DataLoader workers, found DataLoader worker .* of step 3; look"
    with pytest.raises(ValueError, match=expected), worker_errors(lambda: " of step 3"):
        list(wait_for_batches(loader(lambda: os._exit(9))))


def test_a_worker_that_dies_while_the_batch_before_is_in_use_is_an_error():
    """Torch raises it there: in the encoder, say."""

    def use_slowly():
        with worker_errors():
            for _ in wait_for_batches(loader(lambda: time.sleep(1) or os._exit(9))):
                time.sleep(5)

    with pytest.raises(ValueError, match=r"found DataLoader worker .* exited unexpectedly with exit code 9; look"):
        use_slowly()


def test_a_worker_that_gives_nothing_is_not_waited_for_without_end():
    with pytest.raises(ValueError, match="found DataLoader workers gave no batch for 2 s"), worker_errors():
        list(wait_for_batches(loader(lambda: time.sleep(4))))


def test_a_wait_ends_when_a_stop_is_asked_for():
    asked = wait_for_batches(loader(lambda: time.sleep(4)), stopped=lambda: True)
    assert list(asked) == [[0], [1]]


def test_an_error_of_the_data_itself_is_passed_on():
    def broken():
        raise RuntimeError("in the data")

    with pytest.raises(RuntimeError, match="in the data"), worker_errors():
        list(wait_for_batches(loader(broken)))
    assert torch.utils.data.get_worker_info() is None


def test_workers_can_be_spawned_as_on_a_mac(monkeypatch):
    monkeypatch.setattr(loading, "PATIENCE", 60)
    made = loading.loading(1, ignore_signals)
    spawned = DataLoader(Items(two), batch_size=1, collate_fn=list, multiprocessing_context="spawn", **made)
    assert list(wait_for_batches(spawned)) == [[0], [1], [2], [3]]


def two():
    return 2
