"""What is asked about besides single queries: their mean, and property functions of the model."""

import copy

import numpy as np
import pytest
import torch
from models import build, collate, dataset
from oracles import Float64
from oracles_attribution import Oracle, flat
from test_attribution import FLOAT32, error, estimator, rows_of

from hf_datashapley import GradCos, GradDot, Influence, Partition, TracIn, Trak


def entropy(model):
    """Of what the model says next, in a text that is no query."""
    logits = model(input_ids=torch.tensor([[3, 5, 7, 11]])).logits[0, -1]
    return torch.distributions.Categorical(logits=logits).entropy()


def size(model):
    """Does not depend on any row."""
    return sum(parameter.square().sum() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("route", ["summed", "batched"])
def test_of_property_functions(route):
    model, (train, queries) = build("gpt2"), rows_of("gpt2")
    labels = [0, 1, 0, 2, 1]
    groups = [[row for row, label in zip(train, labels, strict=True) if label == g] for g in range(3)]
    oracle = Oracle(model, groups, queries)
    with Float64():
        exact = copy.deepcopy(model).double().eval()
        directions_2P = torch.stack([flat(function(exact), exact) for function in (entropy, size)])
    settings = {"partition": Partition.from_labels(labels), "route": route}
    fitted = estimator(GradDot, model, **settings).fit(dataset(train))
    found = fitted.score([entropy, size])
    assert error(fitted.score(entropy), found[:, :1]) < FLOAT32
    expected_N2 = oracle.g_NP @ directions_2P.T
    for k in range(2):
        assert error(found[:, k], expected_N2[:, k]) < FLOAT32


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (GradDot, {}),
        (GradDot, {"projection_dim": 128}),
        (Influence, {"projection_dim": 128}),
        (Influence, {"curvature": "ekfac"}),
        (TracIn, {"learning_rates": [0.1]}),
        (Trak, {"projection_dim": 128}),
        (GradCos, {"projection_dim": 128}),
    ],
)
def test_the_mean_of_queries_is_one_property(kind, settings):
    """Rows of different lengths count alike. A property function that makes the same mean is scored alike."""
    model, (train, queries) = build("gpt2"), rows_of("gpt2")

    def mean_loss(model):
        return torch.stack([model(**collate([row])).loss for row in queries]).mean()

    members = [model] if kind is TracIn else model
    fitted = estimator(kind, members, **settings).fit(dataset(train))
    found = fitted.score(dataset(queries), mean=True)
    assert found.shape == (len(train), 1)
    assert error(found, fitted.score(mean_loss)) < FLOAT32
    single = fitted.score(dataset(queries)).mean(1, keepdims=True)
    if kind in (GradDot, Influence, TracIn):
        assert error(found, single) < FLOAT32
    else:  # neither cosines nor log odds of queries are losses
        assert error(found, single) > 1e-3


def test_top_of_a_property():
    model, (train, _) = build("gpt2"), rows_of("gpt2")
    fitted = estimator(GradDot, model).fit(dataset(train))
    best = fitted.top(entropy, 2)
    order = np.argsort(-fitted.score(entropy)[:, 0])
    assert best["sample_id"] == order[:2].tolist()


def test_refusals():
    model, (train, queries) = build("gpt2"), rows_of("gpt2")
    fitted = estimator(GradDot, model).fit(dataset(train))
    with pytest.raises(ValueError, match=r"property function 0 gives float: return one number"):
        fitted.score(lambda model: 1.0)
    with pytest.raises(ValueError, match=r"property function 1 gives a tensor of shape \[4, "):
        fitted.score([entropy, lambda model: model(input_ids=torch.tensor([[3, 5, 7, 11]])).logits[0]])
    with pytest.raises(ValueError, match="depends on the model's parameters, with its graph"):
        fitted.score(lambda model: entropy(model).detach())
    with pytest.raises(ValueError, match="mean=True is of rows"):
        fitted.score(entropy, mean=True)
    none = [{**queries[0], "labels": [-100] * len(queries[0]["labels"])}]
    with pytest.raises(ValueError, match=r"rows \[1\] have no labelled token"):
        fitted.score(dataset([*queries[:1], *none]), mean=True)
