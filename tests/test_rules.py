"""Every layer rule, in float64, against a backward pass per sample: drawn shapes, both kernels, one and three targets.

A toy model is run plainly for the truth and under `Capture` for the scores; the losses of its samples are
tanh(output) . cotangent, summed per sample, so that nothing is symmetric by accident.
"""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import LANGUAGE_MODELS, build, collate, rows_for
from oracles import gradient, inner, language_model, per_sample_gradients, trainable
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from hf_datashapley.ghost import kernels as ghost_kernels
from hf_datashapley.ghost.capture import Capture
from hf_datashapley.ghost.kernels import MANY
from hf_datashapley.ghost.units import Rows, Runs


KERNELS = ("fused", "project")
drawn = settings(derandomize=True, deadline=None, max_examples=15)
sizes = st.integers(1, 5)
seeds = st.integers(0, 2**16)
kernels = st.sampled_from(KERNELS)
targets = st.sampled_from([1, 3, MANY])


def draw_weights(model, seed):
    """Float64 weights, none of them at the 0 or 1 that norms and biases start from."""
    generator = torch.Generator().manual_seed(seed)
    model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return generator


def draw(generator, *shape):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def sample_losses(output, cotangent):
    return (torch.tanh(output) * cotangent).flatten(1).sum(1)


def assert_scores(model, inputs, kernel, target_count, generator, tolerance=1e-9):
    """Scores under capture are <g_i, u_k> of the brute force, and `.grad` is what plain training leaves."""
    batch_size = inputs[0].shape[0]
    parameters = trainable(model)
    output = model(*inputs)
    cotangent = draw(generator, *output.shape)
    losses = sample_losses(output, cotangent)
    samples = per_sample_gradients(losses, parameters)
    total = gradient(losses.sum(), parameters)
    directions = {name: draw(generator, target_count, *p.shape) for name, p in parameters.items()}

    capture = Capture(model, kernel=kernel)
    assert set(capture.parameters) == set(parameters)
    with capture.attached():
        with capture.scoring(directions, Rows(batch_size)) as tap:
            sample_losses(model(*inputs), cotangent).sum().backward()
        scores = tap.grad
    truth = torch.tensor(
        [
            [inner(sample, {n: u[k] for n, u in directions.items()}, parameters) for k in range(target_count)]
            for sample in samples
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(scores.double(), truth, rtol=tolerance, atol=tolerance)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, total[name], rtol=tolerance, atol=tolerance)
        else:
            assert parameter.grad is None


def freeze(layer, frozen):
    """Freezes "weight" or "bias" where the layer has it, unless that would leave nothing to train."""
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name != frozen)


@drawn
@given(st.integers(1, 3), st.lists(sizes, min_size=1, max_size=4), kernels, targets, st.booleans(), seeds)
def test_runs_that_share_rows(rows, lengths, kernel, target_count, ragged_rows, seed):
    """Each run's score is that of its own positions' loss, wherever it lies in its row, also where one holds none."""
    lengths = lengths if ragged_rows else [0, *lengths]
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3), nn.LayerNorm(3), LlamaRMSNorm(3), Conv1D(2, 3))
    generator = draw_weights(model, seed)
    ids = torch.randint(7, (rows, sum(lengths)), generator=generator)
    parameters = trainable(model)
    directions = {name: draw(generator, target_count, *p.shape) for name, p in parameters.items()}
    cotangent = draw(generator, rows, sum(lengths), 2)
    position_losses = (torch.tanh(model(ids)) * cotangent).sum(-1).flatten()
    losses = torch.stack([run.sum() for run in position_losses.split(lengths * rows)])
    truth = torch.tensor(
        [
            [inner(sample, {n: u[k] for n, u in directions.items()}, parameters) for k in range(target_count)]
            for sample in per_sample_gradients(losses, parameters)
        ],
        dtype=torch.float64,
    )
    capture = Capture(model, kernel=kernel)
    units = Runs(lengths * rows, rows)
    with capture.attached():
        with capture.scoring(directions, units) as tap:
            (torch.tanh(model(ids)) * cotangent).sum().backward()
        torch.testing.assert_close(tap.grad, truth, rtol=1e-9, atol=1e-9)
        with capture.keeping(units) as kept:
            (torch.tanh(model(ids)) * cotangent).sum().backward()
        torch.testing.assert_close(kept.scores(directions), truth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("target_count", [1, MANY])
@pytest.mark.parametrize("layer", [nn.Linear, Conv1D])
def test_weights_larger_than_a_block(layer, target_count, monkeypatch):
    """In several blocks of rows, the last one smaller; in several groups of units, the last one smaller."""
    monkeypatch.setattr(ghost_kernels, "BLOCK", 30)
    monkeypatch.setattr(ghost_kernels, "GROUP", 1)
    model = layer(7, 11)
    generator = draw_weights(model, 4)
    features = model.in_features if layer is nn.Linear else model.weight.shape[0]
    assert_scores(model, [draw(generator, 5, 6, features)], "fused", target_count, generator)


frozen_parts = st.sampled_from([None, "weight", "bias"])
inner_shapes = st.lists(sizes, min_size=0, max_size=2)


@drawn
@given(sizes, inner_shapes, sizes, sizes, frozen_parts, kernels, targets, seeds)
def test_linear_with_bias(batch, inner_shape, d_in, d_out, frozen, kernel, target_count, seed):
    model = nn.Sequential(nn.Linear(d_in, d_out))
    generator = draw_weights(model, seed)
    freeze(model[0], frozen)
    assert_scores(model, [draw(generator, batch, *inner_shape, d_in)], kernel, target_count, generator)


@drawn
@given(sizes, inner_shapes, sizes, sizes, kernels, targets, seeds)
def test_linear_without_bias(batch, inner_shape, d_in, d_out, kernel, target_count, seed):
    model = nn.Sequential(nn.Linear(d_in, d_out, bias=False))
    generator = draw_weights(model, seed)
    assert_scores(model, [draw(generator, batch, *inner_shape, d_in)], kernel, target_count, generator)


@drawn
@given(sizes, inner_shapes, sizes, sizes, frozen_parts, kernels, targets, seeds)
def test_conv1d(batch, inner_shape, d_in, d_out, frozen, kernel, target_count, seed):
    model = nn.Sequential(Conv1D(d_out, d_in))
    generator = draw_weights(model, seed)
    freeze(model[0], frozen)
    assert_scores(model, [draw(generator, batch, *inner_shape, d_in)], kernel, target_count, generator)


@drawn
@given(sizes, st.lists(sizes, min_size=1, max_size=2), sizes, st.sampled_from([None, 0, 3]), kernels, targets, seeds)
def test_embedding(batch, inner_shape, width, padding_index, kernel, target_count, seed):
    """A padding index takes no gradient and so no score; tokens repeat within a row."""
    model = nn.Sequential(nn.Embedding(4, width, padding_idx=padding_index))
    generator = draw_weights(model, seed)
    tokens = torch.randint(4, (batch, *inner_shape), generator=generator)
    assert_scores(model, [tokens], kernel, target_count, generator)


class BroadcastPositions(nn.Module):
    """GPT-2's way: position ids of shape [1, T], their embeddings broadcast over the batch."""

    def __init__(self, length, width):
        super().__init__()
        self.positions = nn.Embedding(length, width)

    def forward(self, x_BTD):
        return x_BTD + self.positions(torch.arange(x_BTD.shape[1]).unsqueeze(0))


@drawn
@given(sizes, sizes, sizes, kernels, targets, seeds)
def test_embedding_of_positions_broadcast_over_the_batch(batch, length, width, kernel, target_count, seed):
    model = BroadcastPositions(length, width)
    generator = draw_weights(model, seed)
    assert_scores(model, [draw(generator, batch, length, width)], kernel, target_count, generator)


@drawn
@given(sizes, inner_shapes, st.integers(2, 5), frozen_parts, kernels, targets, seeds)
def test_layer_norm_with_bias(batch, inner_shape, width, frozen, kernel, target_count, seed):
    model = nn.Sequential(nn.LayerNorm(width))
    generator = draw_weights(model, seed)
    freeze(model[0], frozen)
    assert_scores(model, [draw(generator, batch, *inner_shape, width)], kernel, target_count, generator)


@drawn
@given(sizes, inner_shapes, st.integers(2, 5), kernels, targets, seeds)
def test_layer_norm_without_bias(batch, inner_shape, width, kernel, target_count, seed):
    model = nn.Sequential(nn.LayerNorm(width, bias=False))
    generator = draw_weights(model, seed)
    assert_scores(model, [draw(generator, batch, *inner_shape, width)], kernel, target_count, generator)


RMS_NORMS = {
    "torch": (lambda width: nn.RMSNorm(width, eps=1e-2), 1e-9),
    "torch, default eps": (lambda width: nn.RMSNorm(width), 1e-9),
    "Llama": (lambda width: LlamaRMSNorm(width, eps=1e-2), 1e-9),
    # Gemma multiplies by (1 + weight) in float32 whatever the model's precision.
    "Gemma": (lambda width: GemmaRMSNorm(width, eps=1e-2), 2e-6),
}


@pytest.mark.parametrize(("norm", "tolerance"), RMS_NORMS.values(), ids=RMS_NORMS)
@drawn
@given(sizes, inner_shapes, st.integers(2, 5), kernels, targets, seeds)
def test_rms_norm(norm, tolerance, batch, inner_shape, width, kernel, target_count, seed):
    model = nn.Sequential(norm(width))
    generator = draw_weights(model, seed)
    assert_scores(model, [draw(generator, batch, *inner_shape, width)], kernel, target_count, generator, tolerance)


class Tied(nn.Module):
    """One parameter as the embedding and as the head: both uses add to its gradient."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens_BT):
        return self.head(self.norm(self.embedding(tokens_BT)))


class UsedTwice(nn.Module):
    """The same modules at two depths of one forward pass."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.RMSNorm(4)

    def forward(self, x_BTD):
        return self.linear(self.norm(torch.tanh(self.linear(self.norm(x_BTD)))))


class SameRowsEverywhere(nn.Module):
    """A layer between two others, so that gradients also have to pass through to earlier layers."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(7, 4)
        self.first = Conv1D(6, 4)
        self.norm = nn.LayerNorm(6)
        self.second = nn.Linear(6, 5)

    def forward(self, tokens_BT):
        return self.second(self.norm(torch.tanh(self.first(self.tokens(tokens_BT)))))


@pytest.mark.parametrize("target_count", [1, 3])
@pytest.mark.parametrize("kernel", KERNELS)
def test_tied_parameter_counts_once_with_both_uses(kernel, target_count):
    model = Tied()
    generator = draw_weights(model, 3)
    tokens = torch.randint(7, (4, 6), generator=generator)
    assert_scores(model, [tokens], kernel, target_count, generator)


@pytest.mark.parametrize("target_count", [1, 3])
@pytest.mark.parametrize("kernel", KERNELS)
def test_module_used_twice_in_one_forward(kernel, target_count):
    model = UsedTwice()
    generator = draw_weights(model, 3)
    assert_scores(model, [draw(generator, 3, 5, 4)], kernel, target_count, generator)


@pytest.mark.parametrize("frozen", ["tokens", "first", "norm", "second"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_frozen_layer_is_left_alone(kernel, frozen):
    model = SameRowsEverywhere()
    generator = draw_weights(model, 3)
    model.get_submodule(frozen).requires_grad_(False)
    tokens = torch.randint(7, (4, 6), generator=generator)
    assert_scores(model, [tokens], kernel, 2, generator)


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_accumulate_over_micro_batches(kernel):
    """Two backward passes without zero_grad: `.grad` adds up, each tap holds only its own micro-batch."""
    model = SameRowsEverywhere()
    generator = draw_weights(model, 3)
    parameters = trainable(model)
    micro_batches = [torch.randint(7, (size, 6), generator=generator) for size in (4, 1)]
    directions = {name: draw(generator, 2, *p.shape) for name, p in parameters.items()}
    samples = [per_sample_gradients(sample_losses(model(tokens), 1.5), parameters) for tokens in micro_batches]

    capture = Capture(model, kernel=kernel)
    with capture.attached():
        for tokens, truth in zip(micro_batches, samples, strict=True):
            with capture.scoring(directions, Rows(len(tokens))) as tap:
                sample_losses(model(tokens), 1.5).sum().backward()
            expected = torch.tensor(
                [[inner(g, {n: u[k] for n, u in directions.items()}, parameters) for k in range(2)] for g in truth]
            )
            torch.testing.assert_close(tap.grad.double(), expected.double(), rtol=1e-6, atol=1e-6)
    for name, parameter in parameters.items():
        total = sum(grad[name] for micro_batch in samples for grad in micro_batch)
        torch.testing.assert_close(parameter.grad, total, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("layer", ["second", "first", "norm"])
def test_output_gradient_may_be_an_expanded_scalar(kernel, layer):
    """`sum().backward()` hands the layer a gradient whose strides are all zero."""
    model = SameRowsEverywhere().get_submodule(layer)
    generator = draw_weights(model, 3)
    x = draw(generator, 3, 2, 4 if layer == "first" else 6)
    parameters = trainable(model)
    directions = {name: draw(generator, 2, *p.shape) for name, p in parameters.items()}
    samples = per_sample_gradients(model(x).flatten(1).sum(1), parameters)
    capture = Capture(model, kernel=kernel)
    with capture.attached(), capture.scoring(directions, Rows(3)) as tap:
        model(x).sum().backward()
    truth = [[inner(g, {n: u[k] for n, u in directions.items()}, parameters) for k in range(2)] for g in samples]
    torch.testing.assert_close(tap.grad, torch.tensor(truth, dtype=torch.float64), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_backward_outside_scoring_is_plain(kernel):
    model = SameRowsEverywhere()
    generator = draw_weights(model, 3)
    plain = copy.deepcopy(model)
    tokens = torch.randint(7, (4, 6), generator=generator)
    capture = Capture(model, kernel=kernel)
    with capture.attached():
        sample_losses(model(tokens), 1.5).sum().backward()
    sample_losses(plain(tokens), 1.5).sum().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("kernel", KERNELS)
def test_layers_are_restored_also_after_an_error(kernel):
    model = SameRowsEverywhere()
    draw_weights(model, 3)
    before = [(type(module), set(vars(module))) for module in model.modules()]
    capture = Capture(model, kernel=kernel)
    with pytest.raises(RuntimeError, match="in the middle"):
        with capture.attached():
            directions = {name: p.detach().unsqueeze(0) for name, p in trainable(model).items()}
            with capture.scoring(directions, Rows(2)):
                raise RuntimeError("in the middle")
    assert [(type(module), set(vars(module))) for module in model.modules()] == before


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", [*LANGUAGE_MODELS, "gpt2-classifier", "llama-classifier"])
def test_identity_directions_give_the_per_sample_gradients_of_whole_models(name, kernel):
    """The mother of these tests: every entry of every parameter's per-sample gradient, and their sum is `.grad`."""
    model = build(name, dtype=torch.float64, width=8, vocabulary=11)
    batch = collate(rows_for(name, 3))
    batch["input_ids"] = batch["input_ids"] % 11
    if batch["labels"].dim() == 2:
        batch["labels"] = torch.where(batch["labels"] >= 0, batch["labels"] % 11, -100)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}

    def losses():
        logits = model(**inputs).logits
        if batch["labels"].dim() == 2:
            return language_model(logits, batch["labels"], torch.tensor(17), 1)
        return torch.tanh(logits).sum(1) / 3

    parameters = trainable(model)
    samples = per_sample_gradients(losses(), parameters)
    total = gradient(losses().sum(), parameters)

    capture = Capture(model, kernel=kernel)
    assert set(capture.parameters) == set(parameters)
    with capture.attached():
        for scored, parameter in parameters.items():
            # One parameter at a time keeps the identity small; the others' directions are zero.
            entries = parameter.numel()
            directions = {n: torch.zeros(entries, *p.shape, dtype=torch.float64) for n, p in parameters.items()}
            directions[scored] = torch.eye(entries, dtype=torch.float64).view(entries, *parameter.shape)
            model.zero_grad()
            with capture.scoring(directions, Rows(3)) as tap:
                losses().sum().backward()
            truth = torch.stack([sample[scored].flatten() for sample in samples])
            torch.testing.assert_close(tap.grad.double(), truth, rtol=1e-8, atol=1e-12, msg=scored)
            torch.testing.assert_close(tap.grad.sum(0).view_as(parameter), parameter.grad, rtol=1e-8, atol=1e-12)
            torch.testing.assert_close(parameter.grad, total[scored], rtol=1e-8, atol=1e-12)


class WithBareParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.temperature = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.linear(x) * self.temperature


class ScaledLinear(nn.Linear):
    """A linear layer by name and by its weight, but with a forward of its own."""

    def __init__(self):
        super().__init__(3, 3)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return super().forward(x) * self.scale


UNCOVERED = {
    "bare parameter": (WithBareParameter, "temperature"),
    "convolution": (lambda: nn.Sequential(nn.Linear(3, 3), nn.Conv1d(3, 3, 1)), "1.weight"),
    "linear with a forward of its own": (ScaledLinear, "scale"),
}


@pytest.mark.parametrize(("model", "named"), UNCOVERED.values(), ids=UNCOVERED)
def test_uncovered_trainable_parameter_is_refused_with_its_name_and_the_cure(model, named):
    with pytest.raises(ValueError, match=named) as refusal:
        Capture(model())
    assert "value_modules" in str(refusal.value) or "freez" in str(refusal.value)


def test_frozen_uncovered_parameter_is_no_obstacle():
    model = WithBareParameter()
    model.temperature.requires_grad_(False)
    assert set(Capture(model).parameters) == {"linear.weight", "linear.bias"}


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_is_refused(affine):
    """It couples the samples of a batch even where it trains nothing."""
    with pytest.raises(ValueError, match="1: BatchNorm1d .*without batch normalisation"):
        Capture(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, affine=affine)))


class TimeFirst(nn.Module):
    """Hands its layer [T, B, D]: the first dimension is not the micro-batch."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x_BTD):
        return self.linear(x_BTD.transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize("kernel", KERNELS)
def test_input_whose_first_dimension_is_not_the_micro_batch_is_refused(kernel):
    model = TimeFirst()
    directions = {name: torch.ones(1, *p.shape) for name, p in trainable(model).items()}
    capture = Capture(model, kernel=kernel)
    with capture.attached(), pytest.raises(ValueError, match="linear"):
        with capture.scoring(directions, Rows(4)):
            model(torch.ones(4, 6, 3)).sum().backward()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("modules", "chosen"),
    [
        (["second"], {"second.weight", "second.bias"}),
        (["first", "norm"], {"first.weight", "first.bias", "norm.weight", "norm.bias"}),
        (r"(first|tokens)", {"first.weight", "first.bias", "tokens.weight"}),
    ],
    ids=["one", "two", "regex"],
)
def test_only_the_selected_modules_are_scored(kernel, modules, chosen):
    model = SameRowsEverywhere()
    generator = draw_weights(model, 3)
    tokens = torch.randint(7, (4, 6), generator=generator)
    capture = Capture(model, modules=modules, kernel=kernel)
    assert set(capture.parameters) == chosen
    parameters = trainable(model)
    samples = per_sample_gradients(sample_losses(model(tokens), 1.5), parameters)
    directions = {name: draw(generator, 1, *parameters[name].shape) for name in chosen}
    with capture.attached(), capture.scoring(directions, Rows(4)) as tap:
        sample_losses(model(tokens), 1.5).sum().backward()
    truth = torch.tensor([inner(sample, {n: directions[n][0] for n in chosen}, chosen) for sample in samples])
    torch.testing.assert_close(tap.grad[:, 0].double(), truth.double(), rtol=1e-6, atol=1e-6)


def test_module_selection_that_matches_nothing_is_refused():
    with pytest.raises(ValueError, match="value_modules"):
        Capture(SameRowsEverywhere(), modules=["no_such_layer"])
