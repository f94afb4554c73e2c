"""Draws are functions of (seed, index, purpose), and of nothing else."""

import itertools

import numpy as np
import torch

from runtime.seeding import block_generator, numpy_generator, step_generator


def numbers(make, *arguments):
    generator = make(*arguments)
    if isinstance(generator, np.random.Generator):
        return tuple(generator.integers(0, 2**62, 4).tolist())
    return tuple(torch.randint(0, 2**62, (4,), generator=generator).tolist())


def test_same_arguments_give_the_same_numbers_whatever_was_drawn_before():
    for make in (step_generator, block_generator, numpy_generator):
        first = numbers(make, 3, 5, "noise")
        torch.rand(7), np.random.rand(7)
        assert numbers(make, 3, 5, "noise") == first


def test_every_argument_matters():
    arguments = itertools.product(range(3), range(50), ("noise", "time"))
    streams = [numbers(make, *a) for a in arguments for make in (step_generator, block_generator, numpy_generator)]
    assert len(set(streams)) == len(streams) == 900


def test_values_are_fixed_for_good():
    # A change here would change every run that is being continued.
    assert torch.rand(2, generator=step_generator(0, 0, "time")).tolist() == EXPECTED_STEP
    assert numpy_generator(0, 0, "order").permutation(5).tolist() == EXPECTED_ORDER


def test_consecutive_steps_are_uncorrelated():
    draws = torch.stack([torch.randn(1000, generator=step_generator(0, step, "noise")) for step in range(50)])
    off_diagonal = torch.corrcoef(draws) - torch.eye(50)
    assert off_diagonal.abs().max() < 5 / 1000**0.5


EXPECTED_STEP = [0.5906981229782104, 0.12008965015411377]
EXPECTED_ORDER = [3, 2, 0, 4, 1]
