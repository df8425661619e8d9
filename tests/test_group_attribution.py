"""Scores of groups, held against float64 autograd of the group's own loss; and what they do not depend on."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import oracles_curvature as whole
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import build, collate, dataset, text_rows
from oracles import trainable
from oracles_attribution import Oracle
from packed_documents import packed_rows, pieces, short_rows
from test_attribution import FLOAT32, error
from transformers import default_data_collator

import hf_datashapley.attribution.store as store
import hf_datashapley.attribution.whole as engine
from hf_datashapley import GradCos, GradDot, Influence, Less, Partition, TracIn, Trak
from hf_datashapley.attribution.curvature.sampled_labels import row_key, uniforms
from hf_datashapley.attribution.projection import projection_for


SEED, DAMPING, RATES = 5, 0.3, [0.1, 0.4]
UNITS, ROUTES = ("sample", "document"), ("summed", "batched")
QUERIES = short_rows(2)


@dataclass(frozen=True)
class Corpus:
    """Rows as they are trained on, and the texts of each unit, one of which has no label."""

    rows: Any
    texts: list[list[dict[str, Any]]]
    collate: Any


@cache
def corpus(unit):
    """Document 3 lies in two rows."""
    if unit != "document":
        rows = text_rows(9)
        return Corpus(dataset(rows), [[row] for row in rows], collate)
    packed, texts = pieces(), {}
    for row in packed:
        for document, text in row:
            texts.setdefault(document, []).append(text)
    return Corpus(dataset(packed_rows(packed)), list(texts.values()), default_data_collator)


def groups_of(unit, count=3):
    """Every `count`-th unit, but for the last ones, which are in the first group."""
    labels = np.arange(len(corpus(unit).texts)) % count
    labels[-2:] = 0
    return labels


KINDS = {
    "GradDot": (GradDot, {}),
    "GradDot, sjlt": (GradDot, {"projection_dim": 64, "projection": "sjlt"}),
    "GradDot, logra": (GradDot, {"projection_dim": 200, "projection": "logra"}),
    "TracIn": (TracIn, {"learning_rates": RATES}),
    "identity": (Influence, {"curvature": "identity", "projection_dim": None}),
    "fisher": (Influence, {"curvature": "fisher", "projection_dim": None, "damping": DAMPING}),
    "kfac": (Influence, {"curvature": "kfac", "damping": DAMPING}),
    "ekfac": (Influence, {"curvature": "ekfac", "damping": DAMPING}),
    "datainf": (Influence, {"curvature": "datainf", "projection_dim": None, "damping": DAMPING}),
    "Trak, mean": (Trak, {"projection_dim": None, "damping": DAMPING, "output": "mean"}),
    "Trak, tokens": (Trak, {"projection_dim": None, "damping": DAMPING, "output": "tokens"}),
}
# Whose curvature, or kernel, is made of what is scored: of groups it is another one than of their members.
OF_UNITS = ("fisher", "datainf", "Trak, mean", "Trak, tokens")
LINEAR = [name for name in KINDS if name not in OF_UNITS]


@cache
def members(name):
    if name == "TracIn":
        return [build("gpt2", seed=seed) for seed in range(len(RATES))]
    return [build("gpt2-lora" if name == "datainf" else "gpt2")]


def made(name, unit, **settings):
    kind, own = KINDS[name]
    common = {"unit": unit, "data_collator": corpus(unit).collate, "seed": SEED, "batch_size": 4, "progress": False}
    return kind(members(name), **{**common, **own, **settings})


def scores(name, unit, labels=None, rows=None, **settings):
    partition = None if labels is None else Partition.from_labels(labels)
    fitted = made(name, unit, partition=partition, **settings)
    return fitted.fit(corpus(unit).rows if rows is None else rows).score(QUERIES)


def sums(scores_NQ, labels):
    return np.stack([scores_NQ[labels == group].sum(0) for group in np.unique(labels)])


def oracle(model, unit, labels):
    texts = corpus(unit).texts
    return Oracle(
        model, [[t for k in np.flatnonzero(labels == g) for t in texts[k]] for g in np.unique(labels)], QUERIES
    )


def by_name(g_NP, model):
    own = trainable(model)
    parts = torch.split(g_NP, [p.numel() for p in own.values()], dim=1)
    shaped = [part.view(len(g_NP), *p.shape) for part, p in zip(parts, own.values(), strict=True)]
    return dict(zip(own, shaped, strict=True))


def gradients(g_NP, model):
    """As `oracles_curvature` has them."""
    shaped = by_name(g_NP, model)
    return [{name: own[i].numpy() for name, own in shaped.items()} for i in range(len(g_NP))]


@cache
def blocks(name, unit):
    """Of the curvature, which is of rows, whatever is scored; and the tokens of all rows."""
    model = build("gpt2", dtype=torch.float64).eval()
    collated = corpus(unit).collate

    def known(rows):
        return {key: own for key, own in collated(rows).items() if key not in ("document_id", "sample_id")}

    def uncached(rows):
        # With a cache, documents of a row would attend to each other.
        return known(rows) | {"use_cache": False}

    def drawn(row, count):
        return uniforms(SEED, row_key(row), count)

    total = whole.fisher(model, list(corpus(unit).rows), uncached, drawn)
    tables = whole.tables(model)
    block = {"kfac": whole.kfac, "ekfac": whole.ekfac}[name]
    return {p: block(p, total, p in tables) for p in trainable(model)}, total.tokens


def tokens_of(unit):
    return sum(label != -100 for texts in corpus(unit).texts for text in texts for label in text["labels"][1:])


@cache
def truth(name, unit, labels):
    return np.asarray(exact(name, unit, np.array(labels)))


def exact(name, unit, labels):
    made_of = [oracle(model, unit, labels) for model in members(name)]
    own, tokens = made_of[0], tokens_of(unit)
    if name == "GradDot":
        return own.dot()
    if name == "identity":
        return own.dot() / tokens
    if name == "TracIn":
        return sum(rate * each.dot() for rate, each in zip(RATES, made_of, strict=True))
    if name == "fisher":
        return own.influence(DAMPING)
    if name.startswith("Trak"):
        kernel, q_N = own.trak(DAMPING, name.removeprefix("Trak, "))
        return kernel * q_N[:, None]
    if name.startswith("GradDot, "):
        return projected(own, KINDS[name][1])
    units, queries = gradients(own.g_NP, own.model), gradients(own.g_QP, own.model)
    ones = [1] * len(queries)  # their gradients are means already
    if name == "datainf":
        return whole.datainf(units, queries, ones, tokens, DAMPING)
    found, count = blocks(name, unit)
    assert count == tokens
    return whole.scores(found, units, queries, ones, tokens, DAMPING)


def projected(own, settings):
    with made("GradDot", "sample").captured(own.model) as capture:
        kind, dim = settings["projection"], settings["projection_dim"]
        projection = projection_for(capture, kind, dim, SEED, torch.device("cpu"), torch.float64)
        left, right = (projection.of_dense(by_name(g, own.model)) for g in (own.g_NP, own.g_QP))
    return left @ right.T


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", KINDS)
def test_scores_are_of_the_groups_own_losses(name, unit, route):
    labels = groups_of(unit)
    found = scores(name, unit, labels, route=route)
    assert error(found, truth(name, unit, tuple(labels))) < FLOAT32


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(
    "name, count", [("fisher", 1), ("Trak, mean", 1), ("Trak, mean", 2), ("Trak, tokens", 1), ("Trak, tokens", 2)]
)
def test_under_the_kernel_of_members_groups_are_sums(name, count, unit):
    """Of the scores that members have by themselves."""
    kind, own = KINDS[name]
    models = [build("gpt2-lora", seed=seed) for seed in range(count)]
    labels = groups_of(unit)
    alone = [oracle(model, unit, np.arange(len(labels))) for model in models]
    if name == "fisher":
        expected = alone[0].influence(DAMPING)
    else:
        kernels, softness = zip(*(each.trak(DAMPING, own["output"]) for each in alone), strict=True)
        expected = sum(kernels) / count * (sum(softness) / count)[:, None]
    settings = {**own, "kernel": "unit", "unit": unit, "data_collator": corpus(unit).collate, "progress": False}
    grouped = {**settings, "partition": Partition.from_labels(labels)}
    for route in ROUTES:
        if route == "batched" and (count, name) not in ((1, "fisher"), (1, "Trak, mean")):
            with pytest.raises(ValueError, match="kernel='unit' weighs each member.*set route='summed'"):
                kind(models, route=route, **grouped).fit(corpus(unit).rows)
            continue
        found = kind(models, route=route, **grouped).fit(corpus(unit).rows).score(QUERIES)
        assert error(found, sums(expected, labels)) < FLOAT32
    units = kind(models, **settings).fit(corpus(unit).rows)
    assert error(units.group_scores(QUERIES, Partition.from_labels(labels)), sums(expected, labels)) < FLOAT32


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", KINDS)
def test_groups_of_one_are_units(name, unit, route):
    labels = np.arange(len(corpus(unit).texts))
    alone = scores(name, unit, route=route)
    assert error(scores(name, unit, labels, route=route), alone) < 1e-6
    assert error(alone, truth(name, unit, tuple(labels))) < FLOAT32


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", LINEAR)
def test_one_group_is_the_total(name, unit, route):
    labels = np.zeros(len(corpus(unit).texts), int)
    total = truth(name, unit, tuple(range(len(labels)))).sum(0, keepdims=True)
    assert error(scores(name, unit, labels, route=route), total) < FLOAT32


def documents(rows):
    """As they first appear."""
    return list(dict.fromkeys(own for row in rows["document_id"] for own in row if own >= 0))


def permuted(unit, labels):
    """Rows in another order, and labels in that of the units in them."""
    rows = corpus(unit).rows
    order = np.random.default_rng(0).permutation(len(rows))
    if unit == "sample":
        return rows.select(order), labels[order]
    known, now = (documents(own) for own in (rows, rows.select(order)))
    return rows.select(order), labels[[known.index(document) for document in now]]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", KINDS)
def test_the_order_of_rows_changes_nothing(name, unit, route):
    labels = groups_of(unit)
    rows, moved = permuted(unit, labels)
    assert not np.array_equal(moved, labels)
    found = scores(name, unit, moved, rows, route=route)
    assert error(found, truth(name, unit, tuple(labels))) < FLOAT32


@settings(max_examples=8, deadline=None)
@given(st.data(), st.sampled_from(["GradDot", "GradDot, sjlt"]), st.sampled_from(UNITS), st.sampled_from(ROUTES))
def test_any_groups(data, name, unit, route):
    count = len(corpus(unit).texts)
    drawn = data.draw(st.lists(st.integers(0, 4), min_size=count, max_size=count))
    expected = sums(truth(name, unit, tuple(range(count))), np.array(drawn))
    assert error(scores(name, unit, drawn, route=route), expected) < FLOAT32


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", [GradDot, Trak])
def test_the_store_is_smaller_by_the_mean_group_size(tmp_path, kind, route):
    """The manifest beside it does not grow with the corpus."""
    rows = dataset(text_rows(64, ragged_labels=False))
    uneven = Partition.from_labels(np.arange(64) ** 2 // 512)
    assert uneven.num_groups == 8 and np.ptp(uneven.sizes()) > 4
    given = {"projection_dim": 2048, "projection": "sjlt", "data_collator": collate, "progress": False, "route": route}
    sizes = {}
    for name, partition in (("units", None), ("groups", uneven)):
        kind(members("GradDot"), partition=partition, store_dir=tmp_path / name, **given).fit(rows)
        sizes[name] = sum(path.stat().st_size for path in (tmp_path / name).rglob("*.safetensors"))
    assert sizes["units"] / sizes["groups"] == pytest.approx(64 / 8, rel=0.05)


# Sums of fitted units' scores.


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", KINDS)
def test_scores_add_up_over_groups(name, unit, monkeypatch):
    """Block by block; and, where no kernel is of what is scored, to those of the groups' own losses."""
    monkeypatch.setattr(store, "SHARD_UNITS", 4)
    monkeypatch.setattr(engine, "BLOCK_UNITS", 4)
    labels = groups_of(unit)
    partition = Partition.from_labels(labels)
    fitted = made(name, unit).fit(corpus(unit).rows)
    found = fitted.group_scores(QUERIES, partition)
    assert error(found, sums(truth(name, unit, tuple(range(len(labels)))), labels)) < FLOAT32
    if name in LINEAR:
        assert error(found, truth(name, unit, tuple(labels))) < FLOAT32
        assert error(found, scores(name, unit, labels)) < FLOAT32
    mean = fitted.group_scores(QUERIES, partition, mean=True)
    assert error(mean, sums(fitted.score(QUERIES, mean=True), labels)) < 1e-6


def test_tokens_add_up_to_groups():
    rows = corpus("sample").rows
    fitted = made("GradDot", "token").fit(rows)
    labels = groups_of("sample")
    of_tokens = Partition.from_labels(labels[fitted.units_["sample_id"]])
    expected = truth("GradDot", "sample", tuple(labels))
    assert error(fitted.group_scores(QUERIES, of_tokens), expected) < FLOAT32
    with pytest.raises(ValueError, match="partition has 9 labels, and .* tokens were fitted"):
        fitted.group_scores(QUERIES, Partition.from_labels(labels))


def test_what_does_not_add_up_is_refused():
    rows, partition = corpus("sample").rows, Partition.from_labels(groups_of("sample"))
    common = {"data_collator": collate, "progress": False}
    assert not Less.additive and all(kind.additive for kind, _ in KINDS.values())
    with pytest.raises(ValueError, match="GradCos's scores do not add up over units: fit with partition="):
        GradCos(members("GradDot"), **common).fit(rows).group_scores(QUERIES, partition)
    with pytest.raises(ValueError, match="GradDot was not fitted"):
        GradDot(members("GradDot"), **common).group_scores(QUERIES, partition)
    with pytest.raises(ValueError, match="groups were fitted.*fit without"):
        GradDot(members("GradDot"), partition=partition, **common).fit(rows).group_scores(QUERIES, partition)
    fitted = GradDot(members("GradDot"), **common).fit(rows)
    with pytest.raises(ValueError, match="partition has 2 labels, and 9 samples were fitted.*train_dataset"):
        fitted.group_scores(QUERIES, Partition.from_labels([0, 1]))
    with pytest.raises(ValueError, match="partition is a list: give a Partition"):
        fitted.group_scores(QUERIES, [0] * 9)
