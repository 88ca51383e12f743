"""All global random generators go on where they were."""

import random

import numpy as np
import torch

from lightning_rlvr.training.random_state import random_state, set_random_state


def draw():
    return random.random(), random.gauss(0, 1), np.random.random(), np.random.normal(), torch.rand(()).item()


def test_the_same_numbers_come_again_from_what_loads_without_pickle(tmp_path):
    draw()
    torch.save(random_state(), tmp_path / "state")
    first, second = draw(), draw()
    set_random_state(torch.load(tmp_path / "state", weights_only=True))
    assert (draw(), draw()) == (first, second)
