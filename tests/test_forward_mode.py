"""Every token's own loss and its derivatives, by differentiating forward, against a backward pass for each token.

The reference runs the model as training does: whichever attention kernel torch picks, checkpointing, the same seed.
"""

import prepared
import pytest
import torch
import torch.nn.functional as F
from models import ADAPTERS, CLASSIFIERS, IGNORED, LANGUAGE_MODELS, build, class_rows, collate, text_rows
from oracles import Float64, gradient, inner, relative_error, token_losses, token_slopes, trainable
from torch import nn
from transformers.integrations.neftune import activate_neftune

from hf_datashapley.full_precision import full_dtype
from hf_datashapley.ghost.capture import Capture, scored_parameters
from hf_datashapley.ghost.forward_mode import check_token_losses, token_derivatives


EXACT = 1e-10
SEED = 3


def directions_of(model, count=2, modules=None):
    generator = torch.Generator().manual_seed(7)
    return {
        name: torch.randn(count, *p.shape, generator=generator).to(full_dtype(p.dtype))
        for name, p in scored_parameters(model, modules).items()
    }


def batch_of(rows=3):
    return collate(text_rows(rows))


def each_of(directions):
    count = next(iter(directions.values())).shape[0]
    return [{name: u[k] for name, u in directions.items()} for k in range(count)]


def forward_mode(model, inputs, directions, shifted=True):
    torch.manual_seed(SEED)
    return token_derivatives(model, inputs, directions, shifted)


def truth(model, inputs, directions):
    """Losses and slopes where the labels stand, from a forward pass as training makes it."""
    labels = inputs["labels"]
    torch.manual_seed(SEED)
    logits = model(**{key: value for key, value in inputs.items() if key != "labels"}).logits
    losses = F.pad(token_losses(logits, labels), (1, 0))
    return losses.detach(), token_slopes(losses, trainable(model), each_of(directions))


def training_slope(model, inputs, directions, num_items):
    """The derivative of the loss that Trainer differentiates, from the model's own labels and loss, [K]."""
    torch.manual_seed(SEED)
    total = gradient(model(**inputs, num_items_in_batch=num_items).loss, trainable(model))
    each = each_of(directions)
    return torch.tensor([inner(total, u, u) for u in each], dtype=torch.float64)


def assert_every_token(model, inputs, directions, tolerance):
    losses, slopes = forward_mode(model, inputs, directions)
    true_losses, true_slopes = truth(model, inputs, directions)
    assert not losses.requires_grad and not slopes.requires_grad
    assert losses.dtype == slopes.dtype == torch.promote_types(losses.dtype, torch.float32)
    unlabelled = inputs["labels"].eq(IGNORED)
    unlabelled[:, 0] = True
    assert not losses[unlabelled].any() and not slopes[unlabelled].any()
    assert slopes[~unlabelled].all()
    error = max(relative_error(losses, true_losses), relative_error(slopes, true_slopes))
    assert error <= tolerance, f"relative error {error:.1e}"


# Exactness.


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", [*LANGUAGE_MODELS, *ADAPTERS])
def test_every_token(name, attention, dropout):
    """Ragged rows under a padding mask; with dropout the masks are those of the training forward of the same seed."""
    model = build(name, dropout=dropout, attention=attention, dtype=torch.float64).train()
    inputs, directions = batch_of(), directions_of(model)
    with Float64():
        assert_every_token(model, inputs, directions, EXACT)
        _, slopes = forward_mode(model, inputs, directions)
        of_training = training_slope(model, inputs, directions, 7)
    assert relative_error(slopes.sum((0, 1)) / 7, of_training) < EXACT


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("restarts", [True, False])
@pytest.mark.parametrize("name", ["gpt2", "neox", "llama"])
def test_documents_that_share_a_row(name, restarts, attention):
    """Apart or attending to each other: the loss of a token is its own all the same."""
    model = build(name, dropout=0.2, attention=attention, dtype=torch.float64).train()
    first, second = (row["input_ids"][:5] for row in text_rows(2))
    inputs = {
        "input_ids": torch.tensor([first + second]),
        "labels": torch.tensor([first + [IGNORED] + second[1:]]),
        "use_cache": False,
    }
    if restarts:
        inputs["position_ids"] = torch.tensor([[*range(5), *range(5)]])
    directions = directions_of(model, 1)
    with Float64():
        assert_every_token(model, inputs, directions, EXACT)


def test_of_chosen_parameters():
    """The others stand still, though they train."""
    model = build("gpt2", dropout=0.1, dtype=torch.float64).train()
    chosen = directions_of(model, modules=["attn.c_attn", "ln_f"])
    assert 0 < len(chosen) < len(directions_of(model))
    with Float64():
        assert_every_token(model, batch_of(), chosen, EXACT)


def test_labels_that_are_not_shifted():
    """A masked language model is scored at the label's own position, the first one too."""
    model = build("gpt2", dtype=torch.float64).eval()
    inputs, directions = batch_of(), directions_of(model, 1)
    moved_on = {**inputs, "labels": F.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORED)}
    with Float64():
        losses, slopes = forward_mode(model, inputs, directions)
        own_losses, own_slopes = forward_mode(model, moved_on, directions, shifted=False)
    assert torch.equal(own_losses[:, :-1], losses[:, 1:]) and torch.equal(own_slopes[:, :-1], slopes[:, 1:])


def test_parameters_that_the_logits_do_not_reach():
    model = build("gpt2", dtype=torch.float64)
    model.unused = nn.Linear(3, 3, dtype=torch.float64)
    directions = directions_of(model, modules=["unused"])
    with Float64():
        losses, slopes = forward_mode(model, batch_of(), directions)
    assert losses.any() and not slopes.any() and slopes.shape == (*losses.shape, 2)


def test_neftune():
    model = build("gpt2", dropout=0.1, dtype=torch.float64).train()
    inputs, directions = batch_of(), directions_of(model)
    with Float64():
        silent = forward_mode(model, inputs, directions)[1]
        activate_neftune(model, 5.0)
        assert_every_token(model, inputs, directions, EXACT)
        assert relative_error(forward_mode(model, inputs, directions)[1], silent) > 1e-3


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama-lora"])
def test_checkpointing(name, reentrant):
    """Passed over without another random draw, and on again afterwards, also after an exception."""
    model = build(name, dropout=0.2, dtype=torch.float64).train()
    inputs, directions = batch_of(), directions_of(model)
    with Float64():
        plain = forward_mode(model, inputs, directions)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    before = [vars(module).get("_gradient_checkpointing_func") for module in model.modules()]
    assert any(before)
    with Float64():
        losses, slopes = forward_mode(model, inputs, directions)
        torch.manual_seed(SEED)
        of_training = model(**inputs, num_items_in_batch=7).loss
    assert torch.equal(losses, plain[0]) and torch.equal(slopes, plain[1])
    assert relative_error(losses.sum() / 7, of_training) < EXACT
    with pytest.raises(IndexError):
        forward_mode(model, {**inputs, "input_ids": inputs["input_ids"] + 61}, directions)
    assert before == [vars(module).get("_gradient_checkpointing_func") for module in model.modules()]


def test_under_capture():
    """The layers' own forward runs while nothing is being scored."""
    model = build("gpt2", dtype=torch.float64)
    inputs, directions = batch_of(), directions_of(model)
    with Float64(), Capture(model).attached():
        assert_every_token(model, inputs, directions, EXACT)


# Precision.


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_float32(name, attention):
    """Against float64 with the same dropout: the worst seen is 6e-7 of the largest."""
    model = build(name, dropout=0.2, attention=attention).train()
    inputs, directions = batch_of(), directions_of(model)
    losses, slopes = forward_mode(model, inputs, directions)
    with Float64():
        exact = {n: u.double() for n, u in directions.items()}
        true_losses, true_slopes = truth(model.double(), inputs, exact)
    assert relative_error(losses, true_losses) < 2e-6
    assert relative_error(slopes, true_slopes) < 5e-6


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=["autocast", "bf16 weights"])
@pytest.mark.parametrize("name", ["gpt2", "neox", "llama"])
def test_bf16(name, weights):
    """Against float64 at the same weights: rounding of 0.4 % through all layers; the worst seen is 2.6 %."""
    model = build(name, dropout=0.2, dtype=weights).train()
    inputs, directions = batch_of(), directions_of(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=weights == torch.float32):
        losses, slopes = forward_mode(model, inputs, directions)
    assert losses.dtype == slopes.dtype == torch.float32
    with Float64():
        exact = {n: u.double() for n, u in directions.items()}
        true_losses, true_slopes = truth(model.double(), inputs, exact)
    assert 1e-4 < relative_error(slopes, true_slopes) < 5e-2


def test_training_within_the_same_autocast_keeps_its_gradients():
    """autocast remembers its copies of weights: those of a pass without a graph must not serve training's."""
    model = build("gpt2")
    inputs = batch_of()
    found = {}
    for forward_first in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            if forward_first:
                forward_mode(model, inputs, directions_of(model, 1, ["ln_f"]))
            found[forward_first] = gradient(model(**inputs).loss, trainable(model))
    for name, expected in found[False].items():
        assert torch.equal(found[True][name], expected), name


# What it leaves behind.


def test_draws_what_one_forward_pass_draws():
    """However many directions."""
    model = build("gpt2", dropout=0.2).train()
    inputs = batch_of()
    torch.manual_seed(SEED)
    model(**inputs)
    drawn = torch.get_rng_state()
    for count in (1, 3):
        forward_mode(model, inputs, directions_of(model, count))
        assert torch.equal(torch.get_rng_state(), drawn)
    assert all(parameter.grad is None for parameter in model.parameters())


# What is refused.


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_refuses_labels_of_rows(name):
    model = build(name)
    inputs = collate(class_rows(3, regression=name == "gpt2-regressor"))
    with pytest.raises(ValueError, match=r"one for each row.*value_unit='sample'"):
        token_derivatives(model, inputs, directions_of(model), True)


def test_refuses_labels_of_another_shape():
    model = build("gpt2")
    inputs = batch_of()
    inputs["labels"] = inputs["labels"][:, :-1]
    with pytest.raises(ValueError, match="do not pair with logits"):
        token_derivatives(model, inputs, directions_of(model), True)


class Doubled(torch.autograd.Function):
    """An operation of somebody's, without a forward derivative."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class HalfDifferentiable(torch.autograd.Function):
    """One whose forward derivative is wrong, without a word."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient

    @staticmethod
    def jvp(ctx, x):
        return torch.zeros_like(x)


def test_refuses_operations_without_a_forward_derivative():
    model = build("gpt2")
    model.transformer.ln_f.register_forward_hook(lambda module, inputs, output: Doubled.apply(output))
    with pytest.raises(ValueError, match="value_kernel='jvp' differentiates GPT2LMHeadModel forward"):
        token_derivatives(model, batch_of(), directions_of(model), True)


def check(model, mean_loss, inputs=None, half_precision=False):
    check_token_losses(
        model,
        scored_parameters(model, None),
        mean_loss,
        batch_of() if inputs is None else inputs,
        True,
        half_precision,
    )


def own_loss(model, inputs):
    return model(**inputs).loss


@pytest.mark.parametrize("name", [*LANGUAGE_MODELS, *ADAPTERS])
def test_accepts_training_s_own_loss(name):
    """With dropout; neither a gradient nor a random draw is left behind."""
    model = build(name, dropout=0.2).train()
    state = torch.get_rng_state()
    check(model, own_loss)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_accepts_bf16_autocast(dropout):
    model = build("gpt2", dropout=dropout).train()
    with torch.autocast("cpu", torch.bfloat16):
        check(model, own_loss, half_precision=True)


def test_accepts_a_trainer_s_loss(tmp_path):
    trainer, _ = prepared.prepare(tmp_path, dropout=0.2)
    trainer.model.train()
    check(trainer.model, trainer._validation_loss)


def test_refuses_a_loss_function_that_weighs_tokens(tmp_path):
    trainer, _ = prepared.prepare(tmp_path)
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch: (
        token_losses(outputs.logits, labels).square().sum() / num_items_in_batch
    )
    with pytest.raises(ValueError, match=r"mean loss is .* training's"):
        check(trainer.model, trainer._validation_loss)


def test_refuses_smoothed_labels(tmp_path):
    trainer, _ = prepared.prepare(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="no label smoothing"):
        check(trainer.model, trainer.compute_loss)


def test_refuses_other_dropout_than_training_s():
    """As a CUDA kernel of attention draws other masks for the same random state: here training draws once more."""

    def another_draw(model, inputs):
        torch.rand(1)
        return own_loss(model, inputs)

    with pytest.raises(ValueError, match="attention dropout of 0"):
        check(build("gpt2", dropout=0.2).train(), another_draw)


def without_gradient(x):
    with torch.no_grad():
        return 1 * x


@pytest.mark.parametrize("operation", [HalfDifferentiable.apply, without_gradient])
def test_refuses_derivatives_that_are_not_training_s(operation):
    """The losses agree; forward mode lacks a part of the derivative, or has one at which training stops."""
    model = build("gpt2")
    model.transformer.h[0].mlp.register_forward_hook(lambda module, inputs, output: operation(output))
    with pytest.raises(ValueError, match="mean derivative along a random direction"):
        check(model, own_loss)


def test_detaching_stops_both():
    model = build("gpt2", dtype=torch.float64)
    model.transformer.h[0].mlp.register_forward_hook(lambda module, inputs, output: output.detach())
    with Float64():
        assert_every_token(model, batch_of(), directions_of(model), EXACT)
