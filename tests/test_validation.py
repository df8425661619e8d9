"""The validation pass leaves the model and the random state as it found them."""

import random

import numpy as np
import torch
from models import build

from hf_datashapley.directions.validation import ValidationTarget, evaluating
from hf_datashapley.random_state import random_state_kept


def test_every_module_gets_its_own_flag_back():
    model = build("gpt2").train()
    model.transformer.h[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert {name: module.training for name, module in model.named_modules()} == before


def test_random_states_come_back():
    def draw():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()

    with random_state_kept():
        expected = draw()
    with random_state_kept():
        assert draw() == expected


def test_rows_come_in_turn_and_every_pass_in_another_order():
    target = ValidationTarget("", range(10), lambda rows: {}, np.arange(2, 9))
    drawn = [int(row) for turn in range(7) for row in target.draw(turn, 3, seed=5)]
    passes = [drawn[start : start + 7] for start in range(0, 21, 7)]
    assert all(sorted(rows) == list(range(2, 9)) for rows in passes)
    assert len({tuple(rows) for rows in passes}) == 3
    assert [int(row) for row in target.draw(4, 3, seed=5)] == drawn[12:15]
    assert sorted(target.draw(0, 100, seed=5)) == list(range(2, 9))
