"""Whole training runs against the float64 oracle: every value of every update, sample by sample.

Not the full product of models, optimizers and settings: each test varies one thing and lets the others differ too, so
that between them they cover it.
"""

import logging
import math
from collections import Counter

import pytest
import torch
from models import CLASSIFIERS, LANGUAGE_MODELS, rows_for, text_rows
from oracles import (
    Float64,
    label_smoothed,
    loss_tokens,
    relative_error,
    token_losses,
)
from prepared import OPTIMIZERS, prepare, two_groups
from recorder import Recorder, assert_history, history_of
from torch.optim import SGD, AdamW
from torch.utils.data import RandomSampler
from transformers.integrations.neftune import activate_neftune

from hf_datashapley import load_updates


FLOAT32 = 1e-5
FLOAT32_LOSS = 1e-6
FLOAT64 = 1e-7


@pytest.mark.parametrize("momentum", ["unrolled", "immediate"])
@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizers(tmp_path, make_optimizer, momentum):
    trainer, replay = prepare(tmp_path, "gpt2", make_optimizer, value_momentum=momentum, validation_batch_size=2)
    trainer.train()
    assert_history(trainer, replay, FLOAT32)


@pytest.mark.parametrize("kernel", ["fused", "project"])
@pytest.mark.parametrize("validation_rows", [1, 5])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_language_models(tmp_path, name, validation_rows, kernel):
    """Trainer's own AdamW with clipping, ragged and missing labels, padding, accumulation 3."""
    trainer, replay = prepare(tmp_path, name, validation_batch_size=validation_rows, value_kernel=kernel)
    trainer.train()
    assert_history(trainer, replay, FLOAT32)
    clips = [replay.truth(trainer.updates, step, trainer.validation_rows(step)).clip for step in (1, 4)]
    assert max(clips) < 1.0, "clipping was meant to be active"


@pytest.mark.parametrize("make_optimizer", [two_groups(SGD, momentum=0.9), two_groups(AdamW)], ids=["SGD", "AdamW"])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_float64_models(tmp_path, name, make_optimizer):
    """With Hugging Face's own float32 corners lifted too, what remains is that the ledger keeps values in float32."""
    trainer, replay = prepare(tmp_path, name, make_optimizer, dtype=torch.float64)
    with Float64():
        trainer.train()
    assert_history(trainer, replay, FLOAT64)


@pytest.mark.parametrize("name", ["gpt2", "gpt2-untied", "neox"])
def test_float64_models_with_hugging_face_float32_loss(tmp_path, name):
    trainer, replay = prepare(tmp_path, name, two_groups(SGD, momentum=0.9), dtype=torch.float64)
    trainer.train()
    assert_history(trainer, replay, FLOAT32_LOSS)


@pytest.mark.parametrize("kernel", ["fused", "project"])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_sequence_classification_heads(tmp_path, name, kernel):
    trainer, replay = prepare(tmp_path, name, two_groups(AdamW), validation_batch_size=3, value_kernel=kernel)
    trainer.train()
    assert_history(trainer, replay, FLOAT32)


def test_model_without_num_items(tmp_path):
    """Its loss is a mean: a sample's share is its share of that mean, over the accumulation steps."""
    trainer, replay = prepare(tmp_path, "gpt2-plain-mean", two_groups(SGD, momentum=0.5))
    trainer.train()
    assert all(micro.num_items is None for update in trainer.updates for micro in update.micro_batches)
    assert_history(trainer, replay, FLOAT32)


@pytest.mark.parametrize("kernel", ["fused", "project"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_dropout(tmp_path, name, attention, kernel):
    """The truth replays each forward pass from the random state it was made with."""
    trainer, replay = prepare(
        tmp_path, name, two_groups(AdamW), dropout=0.2, attention=attention, value_kernel=kernel, num_train_epochs=1
    )
    trainer.train()
    assert_history(trainer, replay, FLOAT32)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_neftune(tmp_path, name):
    """The noise of each forward pass is drawn again; without it the oracle would notice."""
    trainer, replay = prepare(tmp_path, name, two_groups(AdamW), neftune_noise_alpha=5.0)
    trainer.train()
    activate_neftune(replay.model, 5.0)
    assert_history(trainer, replay, FLOAT32)
    with pytest.raises(AssertionError, match="not Trainer's shares"):
        replay.model.train()
        replay.model.get_input_embeddings()._forward_hooks.clear()
        replay.truth(trainer.updates, 1, trainer.validation_rows(1))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_label_smoothing(tmp_path, name):
    """A sample's share is of the smoothed loss; the validation loss is the plain one."""
    trainer, replay = prepare(
        tmp_path, name, two_groups(SGD), label_smoothing_factor=0.2, row_losses=label_smoothed(0.2)
    )
    trainer.train()
    assert_history(trainer, replay, FLOAT32)


def focal(token_losses_BT):
    return token_losses_BT**1.5


def custom_loss(outputs, labels, num_items_in_batch=None):
    """A user's loss: hard tokens weigh more. Summed over `num_items_in_batch` in training, else the mean."""
    total = focal(token_losses(outputs.logits, labels)).sum()
    return total / (loss_tokens(labels).sum() if num_items_in_batch is None else num_items_in_batch)


def test_custom_compute_loss_func(tmp_path):
    class WithCustomLoss(Recorder):
        def __init__(self, **arguments):
            super().__init__(compute_loss_func=custom_loss, **arguments)

    trainer, replay = prepare(
        tmp_path,
        "gpt2",
        two_groups(SGD),
        trainer_class=WithCustomLoss,
        validation_batch_size=5,
        row_losses=lambda logits, labels, num_items, _: focal(token_losses(logits, labels)).sum(1) / num_items,
    )
    replay.validation_loss = lambda logits, labels: (
        focal(token_losses(logits, labels)).sum(),
        int(loss_tokens(labels).sum()),
    )
    trainer.train()
    assert_history(trainer, replay, FLOAT32)


@pytest.mark.parametrize("targets", [("code", "prose"), ("a", "b", "c")], ids=["two", "three"])
@pytest.mark.parametrize("kernel", ["fused", "project"])
def test_named_targets(tmp_path, targets, kernel):
    trainer, replay = prepare(
        tmp_path, "gpt2-untied", targets=targets, value_kernel=kernel, validation_batch_size=2, num_train_epochs=1
    )
    trainer.train()
    assert_history(trainer, replay, FLOAT32)
    columns = [f"value_{target}" for target in targets]
    assert trainer.values().column_names == ["sample_id", "updates", "tokens", *columns]
    assert set(trainer.value_history().column_names) == {"step", "sample_id", "updates", "tokens", *columns}


@pytest.mark.parametrize("interval", [2, 3])
@pytest.mark.parametrize("make_optimizer", [two_groups(SGD, momentum=0.9), two_groups(AdamW)], ids=["SGD", "AdamW"])
def test_validation_interval(tmp_path, make_optimizer, interval):
    """Between refreshes the validation gradient is the old one; S_0 is of the present step."""
    trainer, replay = prepare(
        tmp_path, "gpt2", make_optimizer, validation_interval=interval, gradient_accumulation_steps=1, max_steps=5
    )
    trainer.train()
    assert_history(trainer, replay, FLOAT32)


def test_sgd_proxy(tmp_path):
    """As if plain SGD trained with the learning rates of AdamW's groups: momentum and second moments ignored."""
    trainer, replay = prepare(tmp_path, "gpt2", two_groups(AdamW), value_optimizer="sgd")
    trainer.train()
    assert_history(trainer, replay, FLOAT32)


@pytest.mark.parametrize("targets", [("",), ("a", "b")], ids=["one target", "two targets"])
def test_table_of_updates(tmp_path, targets):
    """Clipping factor, learning rate of the first group and validation loss of each update are the oracle's."""
    trainer, replay = prepare(tmp_path, "gpt2", two_groups(SGD), targets=targets, validation_batch_size=4)
    trainer.train()
    rows = list(load_updates(trainer.value_dir))
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        truth = replay.truth(trainer.updates, row["step"], trainer.validation_rows(row["step"]))
        assert not row["skipped"]
        assert math.isclose(row["clip"], truth.clip, rel_tol=1e-5)
        assert row["learning_rate"] == 3e-2
        for target, loss in truth.validation_losses.items():
            column = f"validation_loss_{target}" if target else "validation_loss"
            assert math.isclose(row[column], loss, rel_tol=1e-5)


def test_first_adam_update_has_rows_of_zero(tmp_path):
    trainer, _ = prepare(tmp_path, "gpt2")
    trainer.train()
    history = history_of(trainer)
    assert [row["value"] for row in history[1]] == [0.0] * 6
    assert any(row["value"] for row in history[2])


def test_warm_up_from_zero_and_a_schedule(tmp_path):
    """The first update has learning rate 0 and value 0; later ones follow the schedule."""
    trainer, replay = prepare(
        tmp_path,
        "gpt2",
        lambda model: SGD(model.parameters(), lr=0.5),
        warmup_steps=2,
        lr_scheduler_type="linear",
        gradient_accumulation_steps=2,
    )
    trainer.train()
    assert_history(trainer, replay, FLOAT32)
    assert [row["value"] for row in history_of(trainer)[1]] == [0.0] * 4
    rates = [update.groups["transformer.wte.weight"]["lr"] for update in trainer.updates]
    assert rates[0] == 0.0 and len(set(rates)) >= 4


SELECTIONS = {
    "a list of names": (["c_attn", "c_fc"], lambda name: ".c_attn." in name or ".c_fc." in name),
    "a regex": (r".*\.h\.0\..*", lambda name: ".h.0." in name),
    "the head, tied to the embedding": (["lm_head"], lambda name: name == "transformer.wte.weight"),
    "the embedding, tied to the head": (["wte"], lambda name: name == "transformer.wte.weight"),
}


@pytest.mark.parametrize("kernel", ["fused", "project"])
@pytest.mark.parametrize(("modules", "chosen"), SELECTIONS.values(), ids=SELECTIONS)
def test_selected_modules(tmp_path, modules, chosen, kernel):
    """Only the selected parameters count, a tied one with all its uses; clipping is that of the whole gradient."""
    trainer, replay = prepare(
        tmp_path, "gpt2", two_groups(SGD), value_modules=modules, value_kernel=kernel, num_train_epochs=1
    )
    replay.scored = [name for name in replay.model.state_dict() if chosen(name)]
    assert replay.scored
    trainer.train()
    assert_history(trainer, replay, FLOAT32)


def test_frozen_parameters(tmp_path):
    trainer, replay = prepare(tmp_path, "neox", lambda model: SGD(model.parameters(), lr=0.1), max_steps=2)
    for model in (trainer.model, replay.model):
        for name, parameter in model.named_parameters():
            if "embed_in" in name or "layers.0.attention" in name or name.endswith("layernorm.weight"):
                parameter.requires_grad_(False)
    trainer.train()
    assert_history(trainer, replay, FLOAT32)


def test_a_layer_that_no_sample_reaches(tmp_path):
    """It trains but never runs: no gradient, no optimizer state, nothing to score."""
    trainer, replay = prepare(tmp_path, "gpt2")
    for model in (trainer.model, replay.model):
        model.spare = torch.nn.Linear(3, 3).to(model.dtype)
    trainer.train()
    assert "spare.weight" in trainer.updates[0].weights
    assert_history(trainer, replay, FLOAT32)


def test_an_optimizer_that_trains_some_of_the_parameters(tmp_path):
    """What the optimizer does not move has no value, but clipping counts its gradient."""
    trainer, replay = prepare(tmp_path, "gpt2", lambda model: SGD(model.transformer.h.parameters(), lr=0.1))
    trainer.train()
    assert_history(trainer, replay, FLOAT32)


def test_everything_at_once(tmp_path):
    modules = ("dense", "query_key_value", "lm_head", "post_attention_layernorm")
    trainer, replay = prepare(
        tmp_path,
        "neox",
        two_groups(AdamW),
        dropout=0.1,
        targets=("a", "b"),
        max_grad_norm=0.1,
        gradient_accumulation_steps=2,
        neftune_noise_alpha=3.0,
        warmup_steps=1,
        lr_scheduler_type="cosine",
        label_smoothing_factor=0.1,
        row_losses=label_smoothed(0.1),
        train_sampling_strategy="group_by_length",
        value_modules=list(modules),
        value_momentum="immediate",
        validation_interval=2,
        validation_batch_size=3,
    )
    replay.scored = [name for name in replay.model.state_dict() if name.split(".")[-2] in modules]
    assert len(replay.scored) == 13
    trainer.train()
    activate_neftune(replay.model, 3.0)
    assert_history(trainer, replay, FLOAT32)


@pytest.mark.parametrize("strategy", ["group_by_length", "sequential", "batch_rebalance"])
def test_sampling_strategies(tmp_path, strategy):
    trainer, replay = prepare(tmp_path, "gpt2", two_groups(SGD), train_sampling_strategy=strategy)
    trainer.train()
    assert_history(trainer, replay, FLOAT32)


def test_last_update_of_an_epoch_may_be_smaller(tmp_path):
    """7 rows in micro-batches of 2, three to an update: the second update has a single micro-batch of one row."""
    trainer, replay = prepare(tmp_path, "llama", two_groups(SGD), rows=text_rows(7, ragged_labels=False))
    trainer.train()
    assert [len(rows) for rows in history_of(trainer).values()] == [6, 1, 6, 1]
    assert_history(trainer, replay, FLOAT32)


def test_without_average_tokens_across_devices(tmp_path):
    """In one process it makes no difference; it is accepted."""
    trainer, replay = prepare(tmp_path, "gpt2", two_groups(SGD), average_tokens_across_devices=False, max_steps=2)
    trainer.train()
    assert_history(trainer, replay, FLOAT32)


def test_a_row_without_labels_has_value_zero(tmp_path):
    trainer, _ = prepare(tmp_path, "gpt2", two_groups(SGD))
    trainer.train()
    unlabelled = [row for rows in history_of(trainer).values() for row in rows if row["sample_id"] == 2]
    assert [(row["value"], row["tokens"]) for row in unlabelled] == [(0.0, 0), (0.0, 0)]


def test_values_sum_the_history(tmp_path):
    """Two epochs: each of 12 rows is visited twice; values add up in the order of the updates."""
    trainer, _ = prepare(tmp_path, "gpt2", targets=("a", "b"))
    trainer.train()
    values = trainer.values()
    assert sorted(values["sample_id"]) == list(range(12))
    history = [row for rows in history_of(trainer).values() for row in rows]
    for row in values:
        own = [visit for visit in history if visit["sample_id"] == row["sample_id"]]
        assert len(own) == 2 and row["updates"] == 2
        assert row["tokens"] == sum(visit["tokens"] for visit in own)
        for column in ("value_a", "value_b"):
            assert math.isclose(row[column], math.fsum(visit[column] for visit in own), rel_tol=1e-12, abs_tol=1e-300)


def test_a_row_drawn_twice_in_one_update_counts_twice(tmp_path):
    class WithReplacement(Recorder):
        def _get_train_sampler(self, train_dataset=None):
            return RandomSampler(range(6), replacement=True, num_samples=12)

    trainer, replay = prepare(
        tmp_path, "gpt2", two_groups(SGD), trainer_class=WithReplacement, rows=rows_for("gpt2", 6), num_train_epochs=1
    )
    trainer.train()
    visits = Counter(
        row
        for update in trainer.updates
        for micro_batch in update.micro_batches
        for row in replay._rows_of(micro_batch.inputs)
    )
    assert max(visits.values()) > 2
    total = Counter()
    for step in (1, 2):
        total.update(replay.truth(trainer.updates, step, trainer.validation_rows(step)).values[""])
    values = {row["sample_id"]: row for row in trainer.values()}
    assert {row: values[row]["updates"] for row in values} == visits
    rows = sorted(values)
    assert relative_error([values[row]["value"] for row in rows], [total[row] for row in rows]) < FLOAT32


def test_validation_rows_are_used_in_turn(tmp_path):
    """Every row with a label once before any is used again; a row without labels never."""
    trainer, _ = prepare(tmp_path, "gpt2", gradient_accumulation_steps=1, max_steps=8)
    used = [trainer.validation_rows(step)[""].tolist() for step in range(1, 9)]
    assert all(len(rows) == 1 for rows in used)
    assert sorted(row for rows in used for row in rows) == [0, 1, 3, 4, 5, 6, 7, 8]


def test_default_validation_batch_is_a_sixteenth_of_the_update(tmp_path):
    for accumulation, expected in ((3, 1), (8, 1), (16, 2)):
        folder = tmp_path / str(accumulation)
        trainer, _ = prepare(folder, "gpt2", gradient_accumulation_steps=accumulation)
        assert len(trainer.validation_rows(1)[""]) == expected


@pytest.mark.parametrize("poison", [float("inf"), float("nan")])
def test_non_finite_loss_is_skipped_and_warned_about_once_by_number(tmp_path, caplog, poison):
    """The loss of updates 2 and 3 is made non-finite without touching gradients; the others keep their values."""

    class Poisoned(Recorder):
        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            return loss + poison if model.training and self.state.global_step in (1, 2) else loss

    trainer, replay = prepare(tmp_path, "gpt2", two_groups(SGD), trainer_class=Poisoned)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert load_updates(trainer.value_dir)["step"] == [1, 2, 3, 4]
    assert load_updates(trainer.value_dir)["skipped"] == [False, True, True, False]
    warnings = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert len(warnings) == 1 and "Update 2" in warnings[0], caplog.text
    history = history_of(trainer)
    assert not any(row["value"] for step in (2, 3) for row in history.get(step, []))
    for step in (1, 4):
        truth = replay.truth(trainer.updates, step, trainer.validation_rows(step))
        values = {row["sample_id"]: row["value"] for row in history[step]}
        measured, expected = zip(*((values[row], truth.values[""][row]) for row in truth.tokens), strict=True)
        assert relative_error(measured, expected) < FLOAT32


def test_diverged_run_has_no_nan_in_its_table(tmp_path):
    """A learning rate that blows the weights up: from then on every update is skipped, none is a NaN."""
    trainer, _ = prepare(
        tmp_path,
        "gpt2",
        lambda model: SGD(model.parameters(), lr=1e30),
        max_grad_norm=0.0,
        gradient_accumulation_steps=1,
    )
    trainer.train()
    assert any(load_updates(trainer.value_dir)["skipped"])
    assert all(math.isfinite(row["value"]) for row in trainer.values())
    assert all(math.isfinite(row["value"]) for row in trainer.value_history())


def test_a_value_too_large_for_the_ledger_is_no_value(tmp_path):
    """Finite in the float64 of the run, infinite in the float32 of the ledger."""
    trainer, _ = prepare(
        tmp_path,
        "gpt2",
        lambda model: SGD(model.parameters(), lr=1e45),
        dtype=torch.float64,
        max_grad_norm=0.0,
        max_steps=1,
    )
    trainer.train()
    assert load_updates(trainer.value_dir)["skipped"] == [True]
    assert not any(row["value"] for row in trainer.value_history())


def test_an_update_without_any_label_is_skipped(tmp_path):
    """Its loss is 0 / 0."""
    rows = text_rows(8, ragged_labels=False)
    for row in rows[4:]:
        row["labels"] = [-100] * len(row["labels"])
    trainer, _ = prepare(
        tmp_path,
        "gpt2",
        lambda model: SGD(model.parameters(), lr=0.1),
        rows=rows,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
    )
    trainer.train()
    assert load_updates(trainer.value_dir)["skipped"] == [False, True]
    history = history_of(trainer)
    assert any(row["value"] for row in history[1])
    assert not any(row["value"] for row in history.get(2, []))


def test_auto_find_batch_size_enters_the_loop_again(tmp_path):
    """Out of memory in the middle of update 2: the run starts over with smaller micro-batches, the values too."""
    failures = []

    class OutOfMemoryOnce(Recorder):
        def compute_loss(self, model, inputs, *args, **kwargs):
            in_second_update = model.training and self.state.global_step == 1
            if in_second_update and not failures and len(self.updates[-1].micro_batches) == 2:
                failures.append(len(inputs["input_ids"]))
                raise RuntimeError("CUDA out of memory. (simulated)")
            return super().compute_loss(model, inputs, *args, **kwargs)

    trainer, replay = prepare(
        tmp_path, "gpt2", trainer_class=OutOfMemoryOnce, auto_find_batch_size=True, num_train_epochs=1
    )
    trainer.train()
    assert failures == [2]
    micro_batches = [micro_batch for update in trainer.updates for micro_batch in update.micro_batches]
    assert {len(micro_batch.inputs["input_ids"]) for micro_batch in micro_batches} == {1}
    assert_history(trainer, replay, FLOAT32)
    assert trainer.values()["updates"] == [1] * 12
