"""Every curvature of `Influence` against whole matrices in float64, parameter by parameter."""

from functools import cache
from types import SimpleNamespace

import models
import numpy as np
import oracles_curvature as oracle
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import nn
from transformers import DataCollatorWithFlattening, default_data_collator

from hf_datashapley import GradDot, Influence, Partition
from hf_datashapley.attribution.curvature import kronecker
from hf_datashapley.attribution.curvature.sampled_labels import row_key, uniforms
from hf_datashapley.ranks import Ranks


SEED, DAMPING = 5, 0.1
FAMILIES = ("gpt2", "gpt2-untied", "neox", "llama", "gpt2-lora", "llama-lora", "gpt2-classifier")
ROWS, QUERIES = 7, 2


def drawn(row, count: int) -> np.ndarray:
    return uniforms(SEED, row_key(row), count)


def influence(model, **settings):
    given = {"projection_dim": None, "damping": DAMPING, "seed": SEED, "batch_size": 3}
    given |= {"data_collator": models.collate, "progress": False}
    return Influence(model, **(given | settings))


def data(name):
    return models.rows_for(name, ROWS), models.rows_for(name, QUERIES, seed=9)


@cache
def truth(name):
    """The families' float64 sums, and the scores that they give by curvature."""
    model = models.build(name, dtype=torch.float64).eval()
    train, query = data(name)
    total = oracle.fisher(model, train, models.collate, drawn)
    units, counts = oracle.summed_gradients(model, train, models.collate)
    queries, query_counts = oracle.summed_gradients(model, query, models.collate)
    assert total.tokens == sum(counts)
    found = {}
    for curvature, block in {"kfac": oracle.kfac, "ekfac": oracle.ekfac}.items():
        blocks = {p: block(p, total, p in oracle.tables(model)) for p in units[0]}
        found[curvature] = oracle.scores(blocks, units, queries, query_counts, total.tokens, DAMPING)
    return found


def error(got, expected):
    return np.abs(got - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
def test_kronecker_curvatures_are_those_of_whole_blocks(name, curvature):
    train, query = data(name)
    got = influence(models.build(name), curvature=curvature).fit(models.dataset(train)).score(models.dataset(query))
    # Eigenvectors of eigenvalues near each other turn with the rounding of the factors: 2e-5 at most here.
    assert error(got, truth(name)[curvature]) < (1e-5 if curvature == "kfac" else 1e-4)


@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
def test_they_are_exact_in_float64(curvature):
    train, query = data("gpt2")
    model = models.build("gpt2", dtype=torch.float64)
    got = influence(model, curvature=curvature).fit(models.dataset(train)).score(models.dataset(query))
    # What rounding scores to float32 leaves.
    assert error(got, truth("gpt2")[curvature]) < 2e-7


@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
def test_batches_change_nothing(curvature):
    train, query = data("gpt2")
    model = models.build("gpt2", dtype=torch.float64)
    one, many = (
        influence(model, curvature=curvature, batch_size=n).fit(models.dataset(train)).score(models.dataset(query))
        for n in (1, ROWS)
    )
    np.testing.assert_allclose(one, many, rtol=1e-5, atol=1e-6 * np.abs(many).max())


@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
def test_rows_packed_into_one_are_rows(curvature):
    """Packed, a sample is a run; what a row is padded to, or packed with, is no part of the curvature."""
    model = models.build("llama", dtype=torch.float64)
    train = models.dataset(models.text_rows(6, ragged_labels=False))
    query = models.dataset(models.text_rows(2, 9, ragged_labels=False))
    packed, padded = (
        influence(model, curvature=curvature, data_collator=collator).fit(train).score(query)
        for collator in (DataCollatorWithFlattening(), models.collate)
    )
    np.testing.assert_allclose(packed, padded, rtol=1e-4, atol=1e-5 * np.abs(padded).max())


def test_groups_are_sums_of_their_samples():
    train, query = (models.dataset(own) for own in data("gpt2"))
    model = models.build("gpt2")
    labels = np.arange(ROWS) % 3
    single = influence(model, curvature="ekfac").fit(train).score(query)
    grouped = influence(model, curvature="ekfac", partition=Partition.from_labels(labels)).fit(train).score(query)
    expected = np.stack([single[labels == group].sum(0) for group in range(3)])
    np.testing.assert_allclose(grouped, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_tokens_add_up_to_samples():
    train, query = (models.dataset(own) for own in data("gpt2"))
    model = models.build("gpt2")
    single = influence(model, curvature="ekfac").fit(train).score(query)
    by_token = influence(model, curvature="ekfac", unit="token").fit(train)
    scores, owner = by_token.score(query), by_token.units_["sample_id"]
    expected = np.stack([scores[owner == sample].sum(0) for sample in range(ROWS)])
    np.testing.assert_allclose(single, expected, rtol=1e-4, atol=1e-5 * np.abs(single).max())


def test_members_are_averaged_each_with_its_own_curvature():
    train, query = (models.dataset(own) for own in data("gpt2"))
    members = [models.build("gpt2", seed=seed) for seed in (0, 1)]
    single = [influence(model, curvature="kfac").fit(train).score(query) for model in members]
    both = influence(members, curvature="kfac").fit(train).score(query)
    np.testing.assert_allclose(both, np.mean(single, axis=0), rtol=1e-5, atol=1e-6 * np.abs(both).max())


class Apart(Ranks):
    """One of two processes, whose sums stay its own."""

    def sum_(self, tensors):
        pass


def test_processes_share_the_rows(monkeypatch):
    """What two of them sum up is what one finds."""
    monkeypatch.setattr(kronecker, "SHARD_ROWS", 2)
    model = models.build("gpt2", dtype=torch.float64).eval()
    estimator = influence(model)
    corpus = estimator.train_corpus(models.dataset(data("gpt2")[0]), model)
    found = []
    for ranks in (Ranks(), Apart(0, 2), Apart(1, 2)):
        with estimator.captured(model) as capture:
            found.append(
                kronecker.moments_of(model, capture, kronecker.TrainingRows(corpus, ranks, SEED, progress=False))
            )
    (whole, tokens), *shares = found
    assert tokens == sum(own for _, own in shares)
    for name, moments in whole.items():
        assert moments.positions == sum(own[name].positions for own, _ in shares)
        for number, side in enumerate(moments.sides):
            torch.testing.assert_close(side, sum(own[name].sides[number] for own, _ in shares))


@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
def test_half_precision_is_near(curvature):
    train, query = data("gpt2")
    model = models.build("gpt2", dtype=torch.bfloat16)
    got = influence(model, curvature=curvature).fit(models.dataset(train)).score(models.dataset(query))
    assert np.corrcoef(got.ravel(), truth("gpt2")[curvature].ravel())[0, 1] > 0.9


def test_labels_come_of_the_seed_and_not_of_global_state():
    train, query = (models.dataset(own) for own in data("gpt2"))
    model = models.build("gpt2")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one = influence(model, curvature="kfac").fit(train).score(query)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(4)
    np.testing.assert_array_equal(one, influence(model, curvature="kfac").fit(train).score(query))
    assert error(influence(model, curvature="kfac", seed=6).fit(train).score(query), one) > 1e-3


@pytest.mark.parametrize("projection_dim", [None, 512])
def test_identity_is_grad_dot_over_tokens(projection_dim):
    train, query = data("gpt2")
    model = models.build("gpt2")
    settings = {"projection_dim": projection_dim, "data_collator": models.collate, "progress": False}
    dot = GradDot(model, **settings).fit(models.dataset(train)).score(models.dataset(query))
    got = Influence(model, curvature="identity", **settings).fit(models.dataset(train)).score(models.dataset(query))
    tokens = sum(label != models.IGNORED for row in train for label in row["labels"][1:])
    np.testing.assert_allclose(got, dot / tokens, rtol=1e-5, atol=1e-6 * np.abs(got).max())


@pytest.mark.parametrize("name", models.ADAPTERS)
def test_datainf_is_a_mean_of_inverses(name):
    train, query = data(name)
    model = models.build(name, dtype=torch.float64).eval()
    units, counts = oracle.summed_gradients(model, train, models.collate)
    queries, query_counts = oracle.summed_gradients(model, query, models.collate)
    expected = oracle.datainf(units, queries, query_counts, sum(counts), DAMPING)
    got = influence(models.build(name), curvature="datainf").fit(models.dataset(train)).score(models.dataset(query))
    print(name, "datainf", error(got, expected))
    assert error(got, expected) < 1e-5


def test_datainf_of_projected_blocks_is_near_that_of_whole_ones():
    train, query = (models.dataset(own) for own in data("gpt2-lora"))
    model = models.build("gpt2-lora")
    whole = influence(model, curvature="datainf").fit(train).score(query)
    entries = sum(p.numel() for p in model.parameters() if p.requires_grad)
    same = influence(model, curvature="datainf", projection="logra", projection_dim=entries).fit(train).score(query)
    np.testing.assert_allclose(same, whole, rtol=1e-3, atol=1e-5 * np.abs(whole).max())


class OneLayer(nn.Module):
    """A linear layer that classifies: the logits of two classes."""

    def __init__(self, weight):
        super().__init__()
        self.layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float64)
        self.layer.weight.data.copy_(weight)

    def forward(self, x, labels=None):
        logits = self.layer(x)
        return SimpleNamespace(logits=logits, loss=None if labels is None else F.cross_entropy(logits, labels))


def exact_scores(weight, rows):
    """From the whole Fisher matrix of one layer and two classes, whose output gradients are s (1, -1)."""
    x = torch.stack([row["x"] for row in rows])
    p = torch.softmax(x @ weight.T, 1)
    labels = torch.tensor([row["labels"] for row in rows])
    drawn = torch.tensor([drawn_class(own, row) for own, row in zip(p, rows, strict=True)])
    sampled, given = ((p - F.one_hot(y, 2)).unsqueeze(2) * x.unsqueeze(1) for y in (drawn, labels))
    g = sampled.flatten(1)
    fisher = g.T @ g / len(rows)
    damped = fisher + DAMPING * fisher.trace() / len(fisher) * torch.eye(len(fisher), dtype=torch.float64)
    own = given.flatten(1)
    return (own @ torch.linalg.solve(damped, own.T) / len(rows)).numpy()


def drawn_class(p, row):
    return int(drawn(row, 1)[0] >= float(p[0]))


def plain(rows):
    stacked = default_data_collator([{"labels": row["labels"]} for row in rows])
    return stacked | {"x": torch.stack([torch.as_tensor(row["x"]) for row in rows])}


@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
def test_they_are_the_fisher_matrix_where_it_has_their_form(curvature):
    """EK-FAC where inputs are orthogonal; K-FAC where besides output gradients do not depend on them, but for sign."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    scale = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
    x = torch.diag(scale).repeat(3, 1)
    if curvature == "kfac":
        weight = torch.zeros_like(weight)
        x = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    rows = [{"x": own, "labels": i % 2} for i, own in enumerate(x)]
    model = OneLayer(weight)
    got = influence(model, curvature=curvature, data_collator=plain).fit(rows).score(rows)
    np.testing.assert_allclose(got, exact_scores(weight, rows), rtol=1e-6, atol=1e-7)


def test_refusals_name_the_setting():
    model, rows = models.build("gpt2"), models.dataset(models.text_rows(3))
    with pytest.raises(ValueError, match="curvature='gauss': choose one of"):
        influence(model, curvature="gauss").fit(rows)
    with pytest.raises(ValueError, match="damping=0"):
        influence(model, curvature="kfac", damping=0).fit(rows)
    with pytest.raises(ValueError, match="projection_dim=None"):
        influence(model, curvature="datainf", projection_dim=64).fit(rows)
    unlabelled = Dataset.from_list([{"input_ids": [3, 4], "labels": [models.IGNORED] * 2}] * 2)
    with pytest.raises(ValueError, match="no row has a labelled token"):
        influence(model, curvature="kfac").fit(unlabelled)
