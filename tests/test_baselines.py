"""Trivial baselines against what their definitions give by hand."""

import sys

import numpy as np
import oracles
import oracles_evaluation
import pytest
import torch
from models import build, collate, text_rows

from hf_datashapley.evaluation import (
    bm25,
    cosine,
    mean_hidden_states,
    own_loss,
    same_source,
    sum_over_units,
    trivial_baselines,
)


def test_same_source():
    found = same_source(["a", "b", "a"], ["b", "a"])
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, [[0, 1], [1, 0], [0, 1]])


TEXTS = ["The cat sat on the mat.", "A dog, a cat!", "Dogs bark; mats lie", "nothing at all here, not at all"]
QUERIES = ["cat and THE mat", "unheard-of words", "", "all all dog"]


def test_bm25_of_texts():
    units = [["the", "cat", "sat", "on", "the", "mat"], ["dog", "cat"], ["dogs", "bark", "mats", "lie"]]
    units += [["nothing", "at", "all", "here", "not", "at", "all"]]
    queries = [["cat", "and", "the", "mat"], ["unheard", "of", "words"], [], ["all", "all", "dog"]]
    found = bm25(TEXTS, QUERIES)
    assert found.dtype == np.float32 and found.shape == (4, 4)
    expected = np.array([oracles_evaluation.bm25(units, query) for query in queries]).T
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert expected[0, 0] > expected[1, 0] > 0 and not expected[:, 1:3].any()


def test_bm25_of_tokens():
    draw = np.random.default_rng(0)
    units = [draw.integers(0, 9, 3 + i) for i in range(8)]
    queries = [draw.integers(0, 12, 5) for _ in range(3)]
    expected = np.array([oracles_evaluation.bm25([list(unit) for unit in units], list(query)) for query in queries]).T
    np.testing.assert_allclose(bm25(units, [query.tolist() for query in queries]), expected, rtol=1e-5)


def test_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(ImportError, match=r'pip install "hf_datashapley\[evaluation\]"'):
        bm25(TEXTS, QUERIES)


def test_cosine():
    draw = np.random.default_rng(0)
    units, queries = draw.normal(size=(5, 7)), draw.normal(size=(3, 7))
    units[2] = 0
    found = cosine(units, queries)
    for u, unit in enumerate(units):
        for q, query in enumerate(queries):
            scale = np.sqrt((unit**2).sum() * (query**2).sum())
            assert found[u, q] == pytest.approx((unit * query).sum() / scale if scale else 0, abs=1e-6)
    with pytest.raises(ValueError, match="vectors have shapes .5, 7. and .3, 6."):
        cosine(units, queries[:, :6])


@pytest.mark.parametrize("layer", [0, 1, -1])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_hidden_states_do_not_know_of_padding(name, layer):
    model = build(name, dropout=0.3).train()
    rows = text_rows(7)
    found = mean_hidden_states(model, rows, layer=layer, batch_size=3, data_collator=collate)
    assert found.shape == (7, 16) and all(module.training for module in model.modules())
    model.eval()
    for vector, row in zip(found, rows, strict=True):
        with torch.no_grad():
            hidden = model(torch.tensor([row["input_ids"]]), output_hidden_states=True).hidden_states[layer]
        np.testing.assert_allclose(vector, hidden[0].mean(0), atol=1e-5)


def test_hidden_states_keep_documents_apart():
    model, texts = build("gpt2"), text_rows(2, ragged_labels=False)
    tokens, places = [*texts[0]["input_ids"][:6], *texts[1]["input_ids"][:6]], [*range(6), *range(6)]
    model.config.use_cache = True
    found = mean_hidden_states(model, [{"input_ids": tokens, "position_ids": places}])
    assert model.config.use_cache
    with torch.no_grad():
        alone = [
            model(torch.tensor([text["input_ids"][:6]]), output_hidden_states=True).hidden_states[-1] for text in texts
        ]
    np.testing.assert_allclose(found[0], torch.cat(alone).mean((0, 1)), atol=1e-5)


def test_own_loss_is_the_sum_of_the_rows_token_losses():
    model = build("gpt2", dropout=0.3).train()
    rows = text_rows(7)
    found = own_loss(model, rows, 2, batch_size=3, data_collator=collate)
    assert found.shape == (7, 2) and all(module.training for module in model.modules())
    model.eval()
    for q in range(2):
        for i, row in enumerate(rows):
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            with torch.no_grad():
                expected = float(oracles.token_losses(model(ids).logits, labels).sum())
            assert found[i, q] == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_rows_add_up_to_units():
    scores = np.arange(10.0).reshape(5, 2)
    np.testing.assert_array_equal(sum_over_units(scores, [1, 0, 1, 1, 3]), [[2, 3], [10, 13], [0, 0], [8, 9]])


def test_all_of_them_by_name():
    model, units, queries = build("llama"), text_rows(4), text_rows(3, seed=2)
    found = trivial_baselines(
        model,
        units,
        queries,
        unit_sources=list("abab"),
        query_sources=list("bca"),
        batch_size=2,
        data_collator=collate,
    )
    assert list(found) == ["BM25", "same source", "embedding cosine", "last hidden state cosine", "loss"]
    assert all(scores.shape == (4, 3) for scores in found.values())
    np.testing.assert_array_equal(found["same source"], same_source(list("abab"), list("bca")))
    vectors = [mean_hidden_states(model, rows, data_collator=collate) for rows in (units, queries)]
    np.testing.assert_allclose(found["last hidden state cosine"], cosine(*vectors), rtol=1e-5)
    assert "same source" not in trivial_baselines(model, units, queries, data_collator=collate)
