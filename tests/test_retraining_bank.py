"""The bank of retrainings: what it trains on, that it goes on after a kill, and what it refuses to go on with."""

import copy
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import oracles
import psutil
import pytest
import torch
from models import build, collate, text_rows
from retrainings import BASE, WEIGHTS, failing, language_model, language_model_bank, linear
from transformers import GPT2LMHeadModel, Trainer, set_seed

from hf_datashapley.evaluation import RetrainingBank, query_losses, query_margins, random_masks


def test_random_masks_have_one_size_and_differ():
    masks = random_masks(10, 30, fraction=0.3, seed=1)
    assert masks.dtype == bool and masks.shape == (30, 10)
    assert (masks.sum(1) == 3).all() and masks.any(0).all()
    assert len({mask.tobytes() for mask in masks}) > 20
    np.testing.assert_array_equal(masks, random_masks(10, 30, fraction=0.3, seed=1))
    assert (masks != random_masks(10, 30, fraction=0.3, seed=2)).any()
    with pytest.raises(ValueError, match="fraction=0.01 of 10 units is 0 of them"):
        random_masks(10, fraction=0.01)


def test_trains_on_the_rows_of_the_units(tmp_path):
    labels = [2, 0, 1, 1, 2, 2, 0, 3, 3, 0, 1, 2]
    masks = np.array([[1, 0, 0, 1], [0, 1, 1, 1], [1, 1, 1, 1]], bool)
    bank = RetrainingBank(tmp_path, masks, labels, seeds=[0, 5])
    with pytest.raises(ValueError, match="6 of 6 retrainings are missing: call run"):
        _ = bank.outputs
    outputs = bank.run(linear, workers=0, progress=False).outputs
    assert outputs.shape == (3, 2, 4)
    for s, mask in enumerate(masks):
        rows = [row for row, unit in enumerate(labels) if mask[unit]]
        for r, seed in enumerate([0, 5]):
            expected = BASE + seed - sum(WEIGHTS[row] for row in rows)
            np.testing.assert_allclose(outputs[s, r], expected)
    again = RetrainingBank.at(tmp_path)
    np.testing.assert_array_equal(again.masks, masks)
    np.testing.assert_array_equal(again.labels, labels)
    np.testing.assert_array_equal(again.outputs, outputs)


def test_what_is_there_is_not_trained_again(tmp_path):
    bank = RetrainingBank(tmp_path, random_masks(12, 4), seeds=2).run(linear, workers=0, progress=False)
    gone = bank.path(2, 1)
    gone.unlink()
    assert bank.missing() == [(2, 1)]
    asked = []

    def listening(rows, seed):
        asked.append(seed)
        return linear(rows, seed)

    bank.run(listening, workers=0, progress=False)
    assert asked == [1] and not bank.missing()


def test_other_settings_are_refused_by_name(tmp_path):
    masks = random_masks(12, 4)
    settings = {"args": {"learning_rate": 0.1, "betas": (0.9, 0.99)}, "data": "abc"}
    RetrainingBank(tmp_path, masks, seeds=2, settings=settings)
    RetrainingBank(tmp_path, masks, seeds=2, settings=settings)
    other = {"args": {"learning_rate": 0.2, "betas": (0.9, 0.99)}, "more": 1, "data": "abc"}
    with pytest.raises(ValueError, match="bank.json: settings.args.learning_rate, settings.more differ"):
        RetrainingBank(tmp_path, masks, seeds=2, settings=other)
    with pytest.raises(ValueError, match="bank.json: labels, masks, seeds differ"):
        RetrainingBank(tmp_path, masks[:, ::-1], np.arange(12)[::-1], seeds=3, settings=settings)
    with pytest.raises(FileNotFoundError, match="holds no bank"):
        RetrainingBank.at(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"masks": np.ones(4, bool)}, "masks has shape .4,."),
        ({"masks": np.zeros((2, 4), bool)}, "a subset of no unit"),
        ({"labels": [0, 4]}, "labels must name the unit of each row, from 0 to 3"),
        ({"labels": [0, -1]}, "labels must name the unit"),
        ({"seeds": 0}, "seeds=0"),
        ({"seeds": [1, 1]}, "none twice"),
    ],
)
def test_what_makes_no_bank_is_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        RetrainingBank(tmp_path, **{"masks": np.ones((2, 4), bool), **arguments})


@pytest.mark.parametrize("losses", [np.full(3, np.nan), np.zeros((3, 2)), 1.0])
def test_losses_that_are_none_are_not_kept(tmp_path, losses):
    bank = RetrainingBank(tmp_path, random_masks(4, 5))
    with pytest.raises(ValueError, match="losses-00000-000.npy gave losses of shape"):
        bank.run(lambda rows, seed: losses, workers=0, progress=False)
    assert len(bank.missing()) == 5
    with pytest.raises(ValueError, match="workers=-1"):
        bank.run(linear, workers=-1)


def test_what_was_complete_stays_when_a_training_fails(tmp_path):
    bank = RetrainingBank(tmp_path, np.array([[0, 1, 1], [1, 1, 0], [0, 1, 0]], bool))
    with pytest.raises(RuntimeError, match="no row 0, please"):
        bank.run(failing, workers=0, progress=False)
    assert bank.missing() == [(1, 0), (2, 0)]


def test_settings_tell_one_training_from_another(tmp_path):
    plain = language_model()
    language_model_bank(tmp_path / "bank", plain)
    with pytest.raises(ValueError, match="settings.args.learning_rate differ"):
        language_model_bank(tmp_path / "bank", language_model(learning_rate=2e-2))
    with pytest.raises(ValueError, match="of 12 rows, and train_dataset has 24"):
        plain.bank(tmp_path / "rows", random_masks(12, 8))
    assert not (tmp_path / "rows").exists()
    before = copy.deepcopy(plain.settings)
    plain(np.arange(8), 0)
    assert plain.settings == before, "training changed what the bank compares"
    assert plain.settings == language_model(output_dir="elsewhere", seed=3).settings
    assert plain.settings != language_model(learning_rate=2e-2).settings
    with pytest.raises(ValueError, match="save_strategy='no'"):
        language_model(save_strategy="epoch")


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_language_model_is_trained_as_trainer_does(strategy, tmp_path):
    """The same losses as a Trainer of one's own has, query for query, whatever order rows are trained in."""
    settings = {"train_sampling_strategy": strategy, "dataloader_drop_last": True}
    retraining = language_model(**settings)
    rows = np.array([0, 3, 4, 7, 8, 9, 15, 16, 20])
    torch.manual_seed(123)
    state = torch.get_rng_state()
    found = retraining(rows, 7)
    assert torch.equal(torch.get_rng_state(), state)

    set_seed(7)
    model = GPT2LMHeadModel(retraining.config)
    args = language_model(seed=7, data_seed=7, disable_tqdm=True, output_dir=str(tmp_path), **settings).args
    Trainer(model=model, args=args, train_dataset=retraining.train_dataset.select(rows)).train()
    model.eval()
    expected = []
    for row in retraining.query_dataset:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            expected.append(float(oracles.token_losses(model(ids).logits, ids).mean()))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert found[1] == found[3] != found[0], "queries lost their order"
    twin = retraining.model(rows, 7)
    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("name", ["gpt2", "neox", "llama"])
def test_queries_are_measured_row_by_row(name):
    model = build(name, dropout=0.3, dtype=torch.float64).train()
    rows = [row for row in text_rows(7) if any(label != -100 for label in row["labels"])]
    batches = [collate(rows[:4]), collate(rows[4:])]
    losses, margins = query_losses(model, batches), query_margins(model, batches)
    assert all(module.training for module in model.modules())
    model.eval()
    for q, row in enumerate(rows):
        batch = collate([row])
        with torch.no_grad():
            logits = model(batch["input_ids"]).logits
        found = oracles.token_losses(logits, batch["labels"])
        assert losses[q] == pytest.approx(float(found.sum() / oracles.loss_tokens(batch["labels"])), rel=1e-9)
        short = -np.inf
        for t, label in enumerate(row["labels"][1:]):
            if label != -100:
                others = torch.cat([logits[0, t, :label], logits[0, t, label + 1 :]])
                short = max(short, float(others.max() - logits[0, t, label]))
        assert margins[q] == pytest.approx(short, rel=1e-9)


@pytest.mark.slow
def test_killed_and_gone_on_with_is_the_bank_never_interrupted(tmp_path):
    """Also: processes make the same as this one, and end with the driver."""
    driver = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("retrainings.py"), tmp_path / "killed"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "killed").glob("losses-*.npy"))) < 3 and time.monotonic() < deadline:
        assert driver.poll() is None
        time.sleep(0.02)
    children = psutil.Process(driver.pid).children(recursive=True)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert children and not alive

    retraining = language_model()
    resumed = language_model_bank(tmp_path / "killed", retraining)
    assert 0 < len(resumed.missing()) <= 13
    resumed.run(retraining, workers=0, progress=False)
    whole = language_model_bank(tmp_path / "whole", retraining).run(retraining, workers=2, progress=False)
    np.testing.assert_array_equal(resumed.outputs, whole.outputs)
    assert len(np.unique(whole.outputs[..., 0])) == 16
