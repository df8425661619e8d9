"""Features of a backward pass are the projections of the units' gradients, each from a backward pass of its own."""

import math

import pytest
import torch
from models import build, collate, rows_for, text_rows
from oracles import gradient, language_model, per_sample_gradients, token_losses, trainable
from prepared import ROW_LOSSES
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from hf_datashapley.ghost.bits import Bits
from hf_datashapley.ghost.capture import Capture
from hf_datashapley.ghost.plans import plan
from hf_datashapley.ghost.projection import features_of
from hf_datashapley.ghost.sides import PerParameter, SidedMap
from hf_datashapley.ghost.units import Rows, Runs
from hf_datashapley.values.features import encoded


CPU = torch.device("cpu")
DOUBLE = torch.float64


class EveryLayer(nn.Module):
    """Each kind of layer, wider than a projected side; one parameter with two uses, one module used twice."""

    def __init__(self, width, vocabulary):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width, padding_idx=3)
        self.linear = nn.Linear(width, width)
        self.conv = Conv1D(width, width)
        self.norm = nn.LayerNorm(width)
        self.rms = LlamaRMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens_BT):
        x = self.tokens(tokens_BT)
        x = torch.tanh(self.linear(self.norm(torch.tanh(self.linear(x)))))
        return self.head(self.rms(self.conv(x)))


def every_layer(width=72, vocabulary=90):
    torch.manual_seed(0)
    model = EveryLayer(width, vocabulary).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) / 3)
    tokens = torch.randint(vocabulary, (4, 6))
    tokens[0, 1] = 3
    cotangent = torch.randn(4, 6, vocabulary, dtype=DOUBLE)
    return model, tokens, cotangent


def drawn(capture, width, seed=0):
    return PerParameter(capture.plan(width), seed, CPU, DOUBLE)


def dense(projection, gradients):
    """P of gradients that lie there as they are."""
    return projection.of_dense({name: torch.stack([g[name] for g in gradients]) for name in gradients[0]})


@pytest.mark.parametrize("width", [50, 3000, 10**9], ids=["narrow", "wide", "all"])
@pytest.mark.parametrize("kernel", ["fused", "project"])
def test_features_are_projected_gradients(kernel, width):
    """Beside scores; of rows, and of runs of positions, that tokens' losses are summed over."""
    model, tokens, cotangent = every_layer()
    parameters = trainable(model)
    capture = Capture(model, kernel=kernel)
    projection = drawn(capture, width)
    directions = {name: torch.randn(2, *p.shape, dtype=DOUBLE) for name, p in parameters.items()}
    losses = (torch.tanh(model(tokens)) * cotangent).sum(-1)
    lengths = [2, 7, 1, 10, 4]
    for units, own in {
        Rows(4): losses.sum(1),
        Runs(lengths, rows=4): torch.stack([part.sum() for part in losses.flatten().split(lengths)]),
    }.items():
        gradients = per_sample_gradients(own, parameters)
        truth = dense(projection, gradients)
        model.zero_grad()
        with capture.attached(), capture.projecting(projection, units) as taps, capture.scoring(directions, units):
            (torch.tanh(model(tokens)) * cotangent).sum().backward()
        found = features_of(taps)
        assert found.shape == (len(own), projection.width)
        torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-10)
        total = gradient(losses.sum(), parameters)
        for name, parameter in parameters.items():
            torch.testing.assert_close(parameter.grad, total[name])
        if width == 10**9:
            products = found @ projection.of_dense(directions).T
            for i, g in enumerate(gradients):
                exact = sum((directions[name] * g[name]).flatten(1).sum(1) for name in g)
                torch.testing.assert_close(products[i], exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["gpt2", "neox", "llama", "gpt2-lora", "llama-lora", "gpt2-classifier"])
def test_features_of_models(name):
    """By themselves, from a backward pass that computes no weight's gradient."""
    model = build(name, dtype=DOUBLE)
    batch = collate(rows_for(name, 4))
    capture = Capture(model)
    projection = drawn(capture, 300)
    row_losses = ROW_LOSSES.get(name, language_model)
    labels = batch.pop("labels")

    def losses():
        return row_losses(model(**batch).logits, labels, None, 1)

    truth = dense(projection, per_sample_gradients(losses(), trainable(model)))
    with capture.attached(), capture.projecting(projection, Rows(4)) as taps:
        found = torch.autograd.grad(losses().sum(), list(taps.values()), materialize_grads=True)
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.testing.assert_close(torch.cat(found, 1), truth, rtol=1e-9, atol=1e-9)


def test_batches_and_padding_do_not_matter():
    model = build("gpt2", dtype=DOUBLE)
    capture = Capture(model)
    projection = drawn(capture, 300)
    rows = text_rows(4)

    def features(chosen):
        batch = collate(chosen)
        with capture.attached(), capture.projecting(projection, Rows(len(chosen))) as taps:
            labels = batch.pop("labels")
            token_losses(model(**batch).logits, labels).sum().backward()
        return features_of(taps)

    torch.testing.assert_close(features(rows), torch.cat([features([row]) for row in rows]), rtol=1e-9, atol=1e-9)


def test_products_are_unbiased_for_every_rule():
    """Over draws; the spread is that of a dense projection, and of sides of 64."""
    model, tokens, cotangent = every_layer()
    parameters = trainable(model)
    losses = (torch.tanh(model(tokens)) * cotangent).flatten(1).sum(1)
    g, u = per_sample_gradients(losses[:2], parameters)
    # Some of the one lies along the other, as training rows do along validation rows.
    u = {name: u[name] + 0.5 * g[name] for name in u}
    plans = Capture(model).plan(400)
    assert set(plans) == {
        "tokens.weight", "linear.weight", "linear.bias", "conv.weight", "conv.bias", "norm.weight", "norm.bias",
        "rms.weight",
    }  # fmt: skip
    draws = 300
    for name, own in plans.items():
        pair = torch.stack([g[name], u[name]])
        products = []
        for seed in range(draws):
            first, second = SidedMap(own, Bits(seed, 7), CPU, DOUBLE).of_dense(pair)
            products.append(first @ second)
        found, exact = torch.stack(products), (pair[0] * pair[1]).sum()
        length = pair[0].norm() * pair[1].norm()
        assert (found.mean() - exact).abs() < 4 * found.std() / math.sqrt(draws), name
        assert exact.abs() > 4 * found.std() / math.sqrt(draws), name
        noise = math.sqrt(2 / own.width + sum(2 / side for side in own.sides if side not in own.shape))
        assert 0 < found.std() < 1.5 * noise * length, name


def test_a_draw_is_a_parameters_own_and_its_seeds():
    model, _, _ = every_layer()
    plans = Capture(model).plan(400)
    directions = {name: torch.ones(1, *own.shape, dtype=DOUBLE) for name, own in plans.items()}
    whole = PerParameter(plans, 5, CPU, DOUBLE)
    features = dict(
        zip(plans, whole.of_dense(directions)[0].split([own.width for own in plans.values()]), strict=True)
    )
    for name, own in plans.items():
        alone = PerParameter({name: own}, 5, CPU, DOUBLE).of_dense(directions)[0]
        assert torch.equal(alone, features[name])
        assert not torch.equal(PerParameter({name: own}, 6, CPU, DOUBLE).of_dense(directions)[0], alone)
    # Bits, not draws of a library that may draw otherwise tomorrow.
    assert Bits(1, 2).signs(8).tolist() == [1, 1, -1, -1, -1, -1, 1, -1]


def test_features_are_shared_out():
    shapes = {"wte": (500, 64), "w": (64, 256), "bias": (256,), "scalar": (1,)}
    for width in (4, 10, 333, 5000, 48640, 48641, 10**6):
        plans = plan(shapes, {"wte"}, {"w"}, width)
        assert list(plans) == list(shapes)
        assert sum(own.width for own in plans.values()) == min(width, 500 * 64 + 64 * 256 + 257)
        for own in plans.values():
            assert 1 <= own.width <= math.prod(own.shape)
            assert not own.sides or math.prod(own.sides) >= own.width
    with pytest.raises(ValueError, match="feature_dim=3 is less than one feature for each of 4.*value_modules"):
        plan(shapes, {"wte"}, {"w"}, 3)


def test_what_is_stored_is_rounded_to_eleven_bits():
    """Whatever the size of a gradient: float16 by itself ends at 6e-8."""
    features = torch.randn(6, 400) * torch.tensor([1.0, 1e-12, 1e-25, 1e9, 0.0, 1.0]).unsqueeze(1)
    features[5, 0] = 0.0
    found = encoded(features, torch.float16)
    assert found.codes.dtype == torch.float16 and found.num_bytes == 6 * 400 * 2
    restored = found.scale.unsqueeze(1) * found.codes.float()
    largest = features.abs().amax(1, keepdim=True)
    assert ((restored - features).abs() <= 2**-11 * features.abs() + 2**-38 * largest).all()
    exact = encoded(features, torch.float32)
    assert torch.equal(exact.scale.unsqueeze(1) * exact.codes, features)
