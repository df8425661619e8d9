"""The oracles against each other: real Hugging Face losses, autograd of the whole batch, and real torch optimizers."""

from contextlib import nullcontext

import pytest
import torch
from models import CLASSIFIERS, LANGUAGE_MODELS, build, collate, rows_for
from oracles import (
    Float64,
    add,
    classification,
    clip_factor,
    first_order_factor,
    gradient,
    label_smoothed,
    language_model,
    loss_tokens,
    per_sample_gradients,
    regression,
    relative_error,
    trainable,
)
from transformers.trainer_pt_utils import LabelSmoother


LOSSES = {"gpt2-classifier": classification, "llama-classifier": classification, "gpt2-regressor": regression}


@pytest.mark.parametrize("name", LANGUAGE_MODELS + CLASSIFIERS)
def test_row_losses_are_the_shares_of_hugging_face_loss(name):
    model = build(name, dtype=torch.float64)
    batch = collate(rows_for(name, 5))
    num_items = torch.tensor(23) if batch["labels"].dim() == 2 else None
    with Float64():
        output = model(**batch, num_items_in_batch=num_items)
        losses = LOSSES.get(name, language_model)(output.logits, batch["labels"], num_items, 1)
    assert losses.shape == (5,)
    torch.testing.assert_close(losses.sum(), output.loss, rtol=1e-12, atol=0)


def test_smoothed_row_losses_are_the_shares_of_hugging_face_loss():
    model = build("gpt2", dtype=torch.float64)
    batch = collate(rows_for("gpt2", 5))
    labels = batch.pop("labels")
    with Float64():
        output = model(**batch)
        truth = LabelSmoother(epsilon=0.1)(output, labels, shift_labels=True, num_items_in_batch=torch.tensor(23))
        losses = label_smoothed(0.1)(output.logits, labels, torch.tensor(23), 1)
    torch.testing.assert_close(losses.sum(), truth, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_per_sample_gradients_sum_to_the_batch_gradient_and_are_those_of_batches_of_one(name):
    model = build(name, dtype=torch.float64)
    rows = rows_for(name, 4)
    batch = collate(rows)
    with Float64():
        losses = language_model(
            model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits,
            batch["labels"],
            torch.tensor(23),
            1,
        )
    samples = per_sample_gradients(losses, trainable(model))
    total = gradient(losses.sum(), trainable(model))
    for parameter, grad in add(samples).items():
        torch.testing.assert_close(grad, total[parameter], rtol=1e-9, atol=1e-12)
    for row, sample in zip(rows, samples, strict=True):
        alone = collate([row])
        with Float64():
            losses = language_model(model(alone["input_ids"]).logits, alone["labels"], torch.tensor(23), 1)
        for parameter, grad in gradient(losses.sum(), trainable(model)).items():
            torch.testing.assert_close(sample[parameter], grad, rtol=1e-9, atol=1e-10)


def test_float64_mode_replays_the_dropout_of_a_float32_run():
    batch = collate(rows_for("gpt2", 4))
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    logits = {}
    for dtype in (torch.float32, torch.float64):
        model = build("gpt2", dropout=0.2, dtype=dtype).train()
        torch.manual_seed(5)
        with Float64() if dtype == torch.float64 else nullcontext():
            logits[dtype] = model(**inputs).logits.double()
    assert relative_error(logits[torch.float32], logits[torch.float64]) < 1e-5


def test_loss_tokens_count_shifted_labels():
    assert loss_tokens(torch.tensor([[4, 5, -100, 6], [7, -100, -100, -100]])).tolist() == [2, 0]
    assert loss_tokens(torch.tensor([2, 0, 1])).tolist() == [1, 1, 1]


def test_clip_factor_is_that_of_torch():
    weight = torch.nn.Parameter(torch.zeros(7, dtype=torch.float64))
    for scale in (0.01, 3.0):
        weight.grad = scale * torch.arange(7, dtype=torch.float64)
        before = weight.grad.clone()
        torch.nn.utils.clip_grad_norm_([weight], 1.5)
        torch.testing.assert_close(clip_factor({"weight": before}, 1.5) * before, weight.grad, rtol=1e-12, atol=0)


def played_out(optimizer_class, settings, state, gradient_now, steps):
    """Change of the weights owed to one gradient: against the same run without it, no other gradient after it."""
    ends = []
    for first in (gradient_now, torch.zeros_like(gradient_now)):
        weight = torch.nn.Parameter(torch.ones_like(gradient_now))
        optimizer = optimizer_class([weight], **settings)
        optimizer.state[weight] = {key: value.clone() for key, value in state.items()}
        for step in range(steps):
            weight.grad = first.clone() if step == 0 else torch.zeros_like(gradient_now)
            optimizer.step()
        ends.append(weight.detach())
    return ends[0] - ends[1]


SGD_SETTINGS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.8, "dampening": 0.3},
    "nesterov": {"momentum": 0.9, "nesterov": True},
}


@pytest.mark.parametrize("first_step", [True, False], ids=["first", "later"])
@pytest.mark.parametrize("momentum", ["immediate", "unrolled"])
@pytest.mark.parametrize("settings", SGD_SETTINGS.values(), ids=SGD_SETTINGS)
def test_factor_of_sgd_is_what_torch_does(settings, momentum, first_step):
    settings = {"lr": 0.3, **settings}
    gradient_now = torch.linspace(-1, 1, 5, dtype=torch.float64)
    has_buffer = settings.get("momentum") and not first_step
    state = {"momentum_buffer": torch.full((5,), 0.7, dtype=torch.float64)} if has_buffer else {}
    steps = 1 if momentum == "immediate" else 400
    group = torch.optim.SGD([torch.zeros(1)], **settings).param_groups[0]
    change = played_out(torch.optim.SGD, settings, state, gradient_now, steps)
    factor = first_order_factor(torch.optim.SGD, group, state, momentum)
    torch.testing.assert_close(change, factor * gradient_now, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("momentum", ["immediate", "unrolled"])
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW])
def test_factor_of_adam_is_what_torch_does_once_the_second_moment_stands_still(optimizer, momentum):
    """With beta2 next to 1 after very many steps, v before and after the step agree and bias corrections are 1."""
    settings = {"lr": 0.3, "betas": (0.9, 1 - 1e-9), "eps": 1e-3, "weight_decay": 0.0}
    gradient_now = torch.linspace(-1, 1, 5, dtype=torch.float64)
    state = {
        "step": torch.tensor(1e12),
        "exp_avg": torch.full((5,), 0.1, dtype=torch.float64),
        "exp_avg_sq": torch.linspace(0.5, 3, 5, dtype=torch.float64),
    }
    group = optimizer([torch.zeros(1)], **settings).param_groups[0]
    change = played_out(optimizer, settings, state, gradient_now, 1 if momentum == "immediate" else 400)
    factor = first_order_factor(optimizer, group, state, momentum)
    torch.testing.assert_close(change, factor * gradient_now, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW])
def test_factor_of_adam_while_it_is_young(optimizer):
    """The bias corrections by hand: third step, beta1 0.9, beta2 0.99; no first-order value where v is 0."""
    group = optimizer([torch.zeros(1)], lr=0.3, betas=(0.9, 0.99), eps=1e-3).param_groups[0]
    state = {"step": torch.tensor(2.0), "exp_avg": torch.zeros(2), "exp_avg_sq": torch.tensor([0.0199, 0.0])}
    root = 1.0  # 0.0199 / (1 - 0.99 ** 2)
    share = 0.1 / 0.271  # 1 - 0.9 ** 3
    for momentum, expected in (("immediate", -0.3 * share / (root + 1e-3)), ("unrolled", -0.3 / (root + 1e-3))):
        factor = first_order_factor(optimizer, group, state, momentum)
        torch.testing.assert_close(factor, torch.tensor([expected, 0.0], dtype=torch.float64), rtol=1e-7, atol=0)
    assert first_order_factor(optimizer, group, {}, "unrolled") == 0.0
