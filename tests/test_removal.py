"""Removal curves and brittleness where the truth is known, and tail-patch against a step of torch's own SGD."""

import copy

import numpy as np
import oracles
import pytest
import torch
from models import build, collate, text_rows
from retrainings import BASE, WEIGHTS, linear

from hf_datashapley.evaluation import brittleness, removal_curve, tail_patch


COUNTS = [1, 3, 6]


@pytest.fixture(scope="module")
def curve(tmp_path_factory):
    methods = {"truth": WEIGHTS, "reversed": -WEIGHTS}
    folder = tmp_path_factory.mktemp("removal")
    return removal_curve(folder, linear, methods, COUNTS, seeds=2, draws=200, workers=0, progress=False)


def test_loss_rises_by_what_was_removed(curve):
    assert curve.counts == COUNTS and list(curve.losses) == ["truth", "reversed", "random"]
    np.testing.assert_allclose(curve.whole, BASE + 0.5 - WEIGHTS.sum(0))
    for q in range(4):
        from_greatest = sorted(WEIGHTS[:, q], reverse=True)
        for k, count in enumerate(COUNTS):
            rises = {name: losses[k, q] - curve.whole[q] for name, losses in curve.losses.items()}
            assert rises["truth"] == pytest.approx(sum(from_greatest[:count]))
            assert rises["reversed"] == pytest.approx(sum(from_greatest[-count:]))
            # The mean of 200 draws of `count` without replacement; three standard errors.
            error = WEIGHTS[:, q].std() * np.sqrt(count / 200)
            assert rises["random"] == pytest.approx(count * WEIGHTS[:, q].mean(), abs=3 * error)


def test_curve_as_a_table(curve):
    rise = (curve.losses["truth"] - curve.whole)[1]
    lines = str(curve).splitlines()
    assert lines[0] == "| rise of the loss without | top 1 | top 3 | top 6 |"
    assert lines[2].split(" | ")[2] == f"{rise.mean():+.4f} ± {rise.std(ddof=1) / 2:.4f}"
    assert lines[-1].startswith("| random |")


def test_labels_remove_all_rows_of_a_unit(tmp_path):
    labels = np.arange(12) % 3
    scores = np.array([[0.0, 1, 2, 0], [1, 0, 0, 0], [2, 0, 1, 1]])
    curve = removal_curve(tmp_path, linear, {"given": scores}, [1, 2], labels=labels, workers=0, progress=False)
    of_units = np.array([WEIGHTS[labels == unit].sum(0) for unit in range(3)])
    first, second = [2, 0, 0, 2], [1, 1, 2, 0]  # of equal scores, the unit with the smaller number
    every = np.arange(4)
    np.testing.assert_allclose(curve.losses["given"][0] - curve.whole, of_units[first, every])
    np.testing.assert_allclose(
        curve.losses["given"][1] - curve.whole, of_units[first, every] + of_units[second, every]
    )


def test_fewest_units_that_flip_a_query(curve):
    margin = 2.0
    found = brittleness(curve, rise=margin)
    for q in range(4):
        from_greatest = np.cumsum(sorted(WEIGHTS[:, q], reverse=True))
        enough = [count for count in COUNTS if from_greatest[count - 1] >= margin]
        assert found.fewest["truth"][q] == (enough[0] if enough else np.inf)
    assert np.isinf(found.fewest["reversed"]).all()
    fewest = found.fewest["truth"]
    np.testing.assert_allclose(found.flipped("truth"), [(fewest <= count).mean() for count in COUNTS])
    assert str(found).splitlines()[0] == "| queries flipped by at most | top 1 | top 3 | top 6 |"


def test_query_flipped_before_cannot_flip(curve):
    level = np.sort(curve.whole)[1]
    found = brittleness(curve, level=level)
    before = curve.whole >= level
    assert np.isnan(found.fewest["truth"][before]).all() and before.sum() == 3
    assert not np.isnan(found.fewest["truth"][~before]).any()
    assert found.flipped("reversed")[-1] == 0.0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"methods": {}}, "methods=.*name one at least"),
        ({"methods": {"random": WEIGHTS}}, "none 'random'"),
        ({"counts": [0, 2]}, "counts=.0, 2."),
        ({"counts": [12]}, "leave at least one of the 12 units"),
        ({"counts": []}, "give at least one of each"),
        ({"draws": 0}, "give at least one of each"),
        ({"methods": {"a": WEIGHTS[:, 0]}}, r"methods\['a'\] has shape .12,."),
        ({"methods": {"a": WEIGHTS, "b": WEIGHTS[:-1]}}, "scores has shape .11, 4."),
        ({"methods": {"a": WEIGHTS[:, :3]}}, "train returned 4 losses, while scores are of 3 queries"),
    ],
)
def test_what_cannot_be_removed_is_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        removal_curve(tmp_path, linear, workers=0, **{"methods": {"a": WEIGHTS}, "counts": [1], **change})


def test_brittleness_takes_one_question(curve):
    for both in ({}, {"rise": 1.0, "level": 1.0}):
        with pytest.raises(ValueError, match="give one of the two"):
            brittleness(curve, **both)


# Tail-patch


def query_loss(model, row):
    batch = collate([row])
    with torch.no_grad():
        losses = oracles.token_losses(model(batch["input_ids"]).logits, batch["labels"])
    return float(losses.sum() / oracles.loss_tokens(batch["labels"]))


@pytest.mark.parametrize("labels", [None, [0, 1, 2, 2, 1, 0, 3]])
def test_change_is_that_of_a_step_of_sgd(labels):
    model = build("gpt2", dropout=0.4, dtype=torch.float64)
    rows, queries = text_rows(7, 1, ragged_labels=False), text_rows(3, 2, ragged_labels=False)
    units = 7 if labels is None else 4
    scores = np.random.default_rng(0).normal(size=(units, 3))
    model.transformer.h[0].eval()
    flags = [module.training for module in model.modules()]
    memory = {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    found = tail_patch(
        model, {"given": scores}, rows, queries, learning_rate=0.05, k=2, labels=labels, data_collator=collate
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == flags
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == memory[name][0] and torch.equal(parameter, memory[name][1])
        assert parameter.grad is None

    for q, query in enumerate(queries):
        top = sorted(range(units), key=lambda unit: -scores[unit, q])[:2]  # noqa: B023
        chosen = [row for i, row in enumerate(rows) if (i if labels is None else labels[i]) in top]
        twin = copy.deepcopy(model).eval()
        before = query_loss(twin, query)
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.05)
        batch = [collate([row]) for row in chosen]
        tokens = sum(oracles.loss_tokens(one["labels"]).sum() for one in batch)
        sum(
            oracles.token_losses(twin(one["input_ids"]).logits, one["labels"]).sum() / tokens for one in batch
        ).backward()
        optimizer.step()
        assert found.before[q] == pytest.approx(before, rel=1e-12)
        assert found.change["given"][q] == pytest.approx(query_loss(twin, query) - before, rel=1e-7)


def test_step_on_the_query_itself_lowers_its_loss_most():
    model = build("llama")
    rows = text_rows(12, 3, ragged_labels=False)
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    methods = {"itself": np.eye(12)[:, :5]}
    found = tail_patch(model, methods, rows, rows[:5], learning_rate=0.1, k=1, data_collator=collate)
    assert (found.change["itself"] < 0).all()
    assert found.change["itself"].mean() < found.change["random"].mean()
    lines = str(found).splitlines()
    assert lines[2].startswith("| itself | -") and lines[2].endswith("| 100% |")
    assert lines[3].startswith("| random |")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": 0}, "k=0"),
        ({"k": 4}, "at most the 3 units"),
        ({"methods": {}}, "name one at least"),
        ({"methods": {"a": np.zeros((3, 1))}}, "scores has shape .3, 1."),
        ({"labels": [0, 2, 2]}, "names 2 of 3 units"),
        ({"labels": [0, 1]}, "labels has shape .2,. for 3 rows"),
    ],
)
def test_step_that_cannot_be_taken_is_refused(change, message):
    rows = text_rows(3, 3, ragged_labels=False)
    with pytest.raises(ValueError, match=message):
        tail_patch(
            build("gpt2"),
            **{"methods": {"a": np.zeros((3, 2))}, "k": 1, **change},
            train_rows=rows,
            query_rows=rows[:2],
            learning_rate=0.1,
            data_collator=collate,
        )
