"""Orders "second" and "path" and the audit against the float64 oracle, which runs torch's own optimizer for D."""

import itertools
import logging
import math

import pytest
import torch
from models import LANGUAGE_MODELS, build, collate, dataset, rows_for, text_rows
from oracles import Float64, gradient, inner, label_smoothed, relative_error
from prepared import OPTIMIZERS, config, prepare, two_groups
from recorder import Recorder, assert_history, history_of
from torch.optim import SGD, AdamW

from hf_datashapley import ShapleyConfig, ShapleyTrainer, load_audit, load_updates
from hf_datashapley.ghost.units import Rows
from hf_datashapley.trainer import passes


# Values against the oracle, of the largest in the update.
FLOAT32 = 1e-5
# The oracle's second derivative is a difference of gradients, its slope one of steps.
FLOAT64 = 2e-6
ORDERS = {
    "second": {"value_order": "second"},
    "path": {"value_order": "path"},
    "path 3": {"value_order": "path", "path_nodes": 3},
    "owen": {"value_order": "path", "path_slope": "owen"},
    "owen 3": {"value_order": "path", "path_slope": "owen", "path_nodes": 3},
}
orders = pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)


@orders
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_language_models(tmp_path, name, order):
    """Trainer's own AdamW with clipping, decay, ragged and missing labels, padding, accumulation 3; in float64."""
    trainer, replay = prepare(tmp_path, name, dtype=torch.float64, validation_batch_size=2, max_steps=3, **order)
    with Float64():
        trainer.train()
    assert_history(trainer, replay, FLOAT64)
    clip = replay.truth(trainer.updates, 1, trainer.validation_rows(1)).clip
    assert clip < 1.0, "clipping was meant to be active"


@pytest.mark.parametrize("order", [ORDERS["second"], ORDERS["path"], ORDERS["owen"]], ids=["second", "path", "owen"])
@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizers(tmp_path, make_optimizer, order):
    trainer, replay = prepare(tmp_path, "gpt2", make_optimizer, dtype=torch.float64, max_steps=3, **order)
    with Float64():
        trainer.train()
    assert_history(trainer, replay, FLOAT64)


# Adam's step from young second moments magnifies what rounding there is in a gradient; SGD's does not.
@orders
@pytest.mark.parametrize(("make_optimizer", "tolerance"), [(two_groups(SGD, momentum=0.9), FLOAT32), (None, 2e-3)])
def test_float32(tmp_path, make_optimizer, tolerance, order):
    trainer, replay = prepare(tmp_path, "gpt2", make_optimizer, max_steps=3, **order)
    trainer.train()
    assert_history(trainer, replay, tolerance)


@orders
def test_every_way_gives_the_same(tmp_path, order):
    """Stash and replay, fused and project: dropout and NEFTune draw the same again; two targets; accumulation 3."""
    found = {}
    for number, (second_pass, kernel) in enumerate(itertools.product(["stash", "replay"], ["fused", "project"])):
        trainer, _ = prepare(
            tmp_path / str(number),
            "gpt2",
            two_groups(AdamW),
            dtype=torch.float64,
            dropout=0.2,
            targets=("a", "b"),
            neftune_noise_alpha=3.0,
            max_steps=3,
            second_pass=second_pass,
            value_kernel=kernel,
            **order,
        )
        with Float64():
            trainer.train()
        history = trainer.value_history()
        found[second_pass, kernel] = torch.tensor([history["value_a"][:], history["value_b"][:]])
    reference = found.pop(("stash", "project"))
    assert reference.abs().max() > 0
    for way, values in found.items():
        assert relative_error(values, reference) < 1e-6, way


@pytest.mark.parametrize("second_pass", ["stash", "replay"])
@pytest.mark.parametrize("order", [ORDERS["second"], ORDERS["path 3"]], ids=["second", "path 3"])
def test_everything_at_once(tmp_path, order, second_pass):
    modules = ("dense", "query_key_value", "lm_head", "post_attention_layernorm")
    trainer, replay = prepare(
        tmp_path,
        "neox",
        two_groups(AdamW),
        dtype=torch.float64,
        dropout=0.1,
        targets=("a", "b"),
        max_grad_norm=0.1,
        gradient_accumulation_steps=2,
        warmup_steps=1,
        lr_scheduler_type="cosine",
        label_smoothing_factor=0.1,
        row_losses=label_smoothed(0.1),
        value_modules=list(modules),
        value_momentum="unrolled",
        validation_batch_size=3,
        second_pass=second_pass,
        **order,
    )
    replay.scored = [name for name in replay.model.state_dict() if name.split(".")[-2] in modules]
    with Float64():
        trainer.train()
    assert_history(trainer, replay, FLOAT64)


@orders
def test_frozen_parameters_and_a_layer_that_no_sample_reaches(tmp_path, order):
    trainer, replay = prepare(tmp_path, "neox", two_groups(AdamW), dtype=torch.float64, max_steps=2, **order)
    for model in (trainer.model, replay.model):
        model.spare = torch.nn.Linear(3, 3).to(model.dtype)
        for name, parameter in model.named_parameters():
            if "embed_in" in name or "layers.0.attention" in name or name.endswith("layernorm.weight"):
                parameter.requires_grad_(False)
    trainer.optimizer.add_param_group({"params": list(trainer.model.spare.parameters())})
    with Float64():
        trainer.train()
    assert_history(trainer, replay, FLOAT64)


@orders
def test_sgd_proxy(tmp_path, order):
    """The path and the curvature of the SGD step that was not made."""
    trainer, replay = prepare(
        tmp_path, "gpt2", two_groups(AdamW), dtype=torch.float64, value_optimizer="sgd", max_steps=2, **order
    )
    replay.slope = "secant"  # plain SGD has no other
    with Float64():
        trainer.train()
    assert_history(trainer, replay, FLOAT64)


def test_second_order_under_sgd_is_theorem_4(tmp_path):
    """value_i = lr <g_i, grad l_v> - lr^2 / 2 <g_i, H_v G>, by autograd, without the oracle (arXiv 2406.11011)."""
    rate = 0.05
    trainer, replay = prepare(
        tmp_path,
        "gpt2",
        lambda model: SGD(model.parameters(), lr=rate),
        attention="eager",
        dtype=torch.float64,
        max_grad_norm=0.0,
        gradient_accumulation_steps=1,
        per_device_train_batch_size=4,
        max_steps=1,
        value_order="second",
    )
    with Float64():
        trainer.train()
    (row,) = trainer.validation_rows(1)[""]
    model = replay.model.double().eval()
    parameters = dict(model.named_parameters())
    replay._load(trainer.updates[0].weights)
    samples = replay._samples(trainer.updates[0].micro_batches[0])
    batch = {name: sum(sample[name] for _, _, sample in samples) for name in parameters}
    validation = collate([replay.validation[""][int(row)]])
    with Float64():
        loss = model(**validation).loss
    slope = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
    along = sum((g * d).sum() for g, d in zip(slope, batch.values(), strict=True))
    curved = gradient(along, parameters)
    first = dict(zip(parameters, slope, strict=True))
    expected = {
        index: rate * inner(g, first, parameters) - rate**2 / 2 * inner(g, curved, parameters)
        for index, _, g in samples
    }
    values = {row["sample_id"]: row["value"] for row in trainer.values()}
    assert relative_error([values[i] for i in expected], [float(v) for v in expected.values()]) < 1e-6


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_second_order_does_not_depend_on_the_attention_that_trains(tmp_path, name, dropout, attention):
    trainer, replay = prepare(
        tmp_path,
        name,
        two_groups(SGD),
        dropout=dropout,
        attention=attention,
        dtype=torch.float64,
        max_steps=1,
        value_order="second",
    )
    with Float64():
        trainer.train()
    assert_history(trainer, replay, FLOAT64)


@pytest.mark.parametrize("make_optimizer", [two_groups(SGD, momentum=0.9), two_groups(SGD)])
def test_under_sgd_owen_is_the_secant(tmp_path, make_optimizer):
    values = []
    for slope in ("secant", "owen"):
        trainer, _ = prepare(tmp_path / slope, "gpt2", make_optimizer, value_order="path", path_slope=slope)
        trainer.train()
        values.append(trainer.value_history()["value"][:])
    assert values[0] == values[1]


def test_owen_does_not_count_samples_without_labels(tmp_path):
    """A null player changes nobody's value."""
    rows = text_rows(8, ragged_labels=False)
    for row in rows[4:]:
        row["labels"] = [-100] * len(row["labels"])
    values = []
    for count in (4, 8):
        trainer, _ = prepare(
            tmp_path / str(count),
            "gpt2",
            dtype=torch.float64,
            rows=rows[:count],
            per_device_train_batch_size=count,
            gradient_accumulation_steps=1,
            max_steps=1,
            **ORDERS["owen 3"],
        )
        with Float64():
            trainer.train()
        values.append({row["sample_id"]: row["value"] for row in trainer.value_history()})
    few, many = values
    assert all(many[i] == 0 for i in range(4, 8)) and few.keys() == set(range(4))
    assert relative_error([many[i] for i in range(4)], [few[i] for i in range(4)]) < 1e-6


def test_owen_of_an_update_without_loss_tokens_is_no_failure(tmp_path):
    """GPT-2 counts a row's first label, which has no loss: the loss is 0, and momentum and decay make a step."""
    rows = text_rows(8, ragged_labels=False)
    for row in rows[4:]:
        row["labels"] = [row["labels"][0]] + [-100] * (len(row["labels"]) - 1)
    trainer, _ = prepare(
        tmp_path,
        "gpt2",
        rows=rows,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        audit_steps=1,
        **ORDERS["owen"],
    )
    trainer.train()
    assert load_updates(trainer.value_dir)["skipped"][:] == [False, False]
    assert [row["value"] for row in history_of(trainer)[2]] == [0.0] * 4
    assert trainer.audit()["actual"][1] != 0


def test_owen_with_a_parameter_that_is_not_the_models(tmp_path):
    temperature = torch.nn.Parameter(torch.ones(()))
    trainer, _ = prepare(
        tmp_path, "gpt2", lambda model: AdamW([*model.parameters(), temperature]), max_steps=1, **ORDERS["owen"]
    )
    with pytest.raises(ValueError, match="1 parameters that are not the model's own.*path_slope='secant'"):
        trainer.train()


def test_owen_gives_a_single_sample_the_whole_change(tmp_path):
    trainer, replay = prepare(
        tmp_path,
        "gpt2",
        dtype=torch.float64,
        rows=text_rows(8, ragged_labels=False),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        max_steps=3,
        value_order="path",
        path_slope="owen",
    )
    replay.audited = True
    with Float64():
        trainer.train()
    for step, (row,) in history_of(trainer).items():
        _, without, after = replay.truth(trainer.updates, step, trainer.validation_rows(step)).ends[""]
        assert row["value"] == pytest.approx(without - after, rel=1e-5)


LINEAR = {"first": {"value_order": "first"}, **{name: ORDERS[name] for name in ("second", "path", "path 3")}}


@pytest.mark.parametrize("order", LINEAR.values(), ids=LINEAR)
def test_a_groups_value_is_the_sum_of_its_members(tmp_path, order):
    """Two documents that are one sample, packed in one row and blind for each other, or each a sample of its own."""
    documents = [[row["input_ids"], [-100, *row["input_ids"][1:]]] for row in text_rows(8, ragged_labels=False)]

    def packed(rows):
        """One row for each pair; position ids that start again keep attention within a document."""
        width = max(len(row["input_ids"]) for row in rows)
        batch = {key: torch.full((len(rows), width), pad) for key, pad in (("input_ids", 0), ("labels", -100))}
        batch["position_ids"] = torch.zeros(len(rows), width, dtype=torch.int64)
        for i, row in enumerate(rows):
            for key in ("input_ids", "labels", "position_ids"):
                batch[key][i, : len(row[key])] = torch.tensor(row[key])
        return batch

    found = []
    for size in (1, 2):
        groups = [documents[i : i + size] for i in range(0, 8, size)]
        rows = [
            {
                "input_ids": sum((ids for ids, _ in group), []),
                "labels": sum((labels for _, labels in group), []),
                "position_ids": sum((list(range(len(ids))) for ids, _ in group), []),
            }
            for group in groups
        ]
        model = build("llama", dtype=torch.float64)
        model.config.use_cache = False
        trainer = ShapleyTrainer(
            model,
            config(
                tmp_path / str(size),
                per_device_train_batch_size=4 // size,
                gradient_accumulation_steps=2,
                max_steps=2,
                train_sampling_strategy="sequential",
                **order,
            ),
            train_dataset=dataset(rows),
            validation_dataset=dataset(text_rows(3, seed=9)),
            data_collator=lambda rows: packed(rows) if "position_ids" in rows[0] else collate(rows),
        )
        with Float64():
            trainer.train()
        history = trainer.value_history().to_pandas()
        history["group"] = history["sample_id"] * size // 2
        found.append(history.groupby(["step", "group"])[["value", "tokens"]].sum())
    members, wholes = found
    assert len(wholes) == 8 and (wholes["value"] != 0).sum() >= 4
    assert (members["tokens"] == wholes["tokens"]).all()
    assert relative_error(members["value"].to_numpy(), wholes["value"].to_numpy()) < 1e-5


# The audit.


def path_run(tmp_path, **settings):
    """Float32, AdamW from the first update, lr 3e-3, decay, clipping, dropout, accumulation 2."""
    return prepare(
        tmp_path,
        settings.pop("model_name", "gpt2"),
        learning_rate=3e-3,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        dropout=0.1,
        validation_batch_size=3,
        audit_steps=1,
        **settings,
    )


@pytest.mark.parametrize("slope", ["secant", "owen"])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_path_accounts_for_every_update(tmp_path, name, slope):
    """To half a percent of the change, or of 1e-3 nats where the change is smaller."""
    trainer, _ = path_run(tmp_path, model_name=name, value_order="path", path_nodes=3, path_slope=slope)
    trainer.train()
    audit = trainer.audit()
    assert audit["step"] == list(range(1, 7))
    for row in audit:
        assert abs(row["predicted"] - row["actual"]) <= 0.005 * max(abs(row["actual"]), 1e-3), row


@pytest.mark.parametrize("order", [{"value_order": "first"}, *ORDERS.values()], ids=["first", *ORDERS])
@pytest.mark.parametrize("make_optimizer", [two_groups(SGD, momentum=0.9), two_groups(AdamW)], ids=["SGD", "AdamW"])
def test_audit(tmp_path, make_optimizer, order):
    """Samples are the immediate values; carried and actual are differences of losses that the oracle computes."""
    trainer, replay = prepare(
        tmp_path,
        "gpt2",
        make_optimizer,
        dtype=torch.float64,
        targets=("a", "b"),
        audit_steps=2,
        **order,
    )
    replay.momentum, replay.audited = "immediate", True
    with Float64():
        trainer.train()
    audit = trainer.audit()
    assert audit.column_names == ["step", "target", "samples", "carried", "predicted", "actual"]
    assert [(row["step"], row["target"]) for row in audit] == [(2, "a"), (2, "b"), (4, "a"), (4, "b")]
    truths = {step: replay.truth(trainer.updates, step, trainer.validation_rows(step)) for step in (2, 4)}
    for row in audit:
        truth = truths[row["step"]]
        before, without, after = truth.ends[row["target"]]
        samples = sum(truth.values[row["target"]].values())
        assert row["samples"] == pytest.approx(samples, rel=1e-5, abs=1e-8)
        assert row["carried"] == pytest.approx(before - without, rel=1e-6, abs=1e-9)
        assert row["actual"] == pytest.approx(before - after, rel=1e-6, abs=1e-9)
        assert row["predicted"] == pytest.approx(row["samples"] + row["carried"])
    assert load_audit(trainer.value_dir)[:] == audit[:]


def test_audit_of_the_first_order_s_unrolled_values(tmp_path):
    """Values count momentum to come; the audit of one update counts what acts in it."""
    trainer, replay = prepare(
        tmp_path, "gpt2", two_groups(AdamW), dtype=torch.float64, audit_steps=1, value_momentum="unrolled"
    )
    with Float64():
        trainer.train()
    totals = {step: sum(row["value"] for row in rows) for step, rows in history_of(trainer).items()}
    for row in trainer.audit():
        assert row["samples"] == pytest.approx(totals[row["step"]] * 0.1 / (1 - 0.9 ** row["step"]), rel=1e-5)


def test_audit_in_the_log(tmp_path):
    trainer, _ = path_run(tmp_path, value_order="path", logging_steps=3)
    trainer.train()
    audit = trainer.audit().to_pandas()
    logged = [row for row in trainer.state.log_history if "shapley/audit_actual" in row]
    assert [row["step"] for row in logged] == [3, 6]
    for row in logged:
        own = audit[(audit["step"] > row["step"] - 3) & (audit["step"] <= row["step"])]
        for column in ("samples", "carried", "predicted", "actual"):
            assert row[f"shapley/audit_{column}"] == pytest.approx(own[column].mean(), rel=1e-5)


def test_audit_of_the_proxy_measures_the_optimizer_that_ran(tmp_path):
    """Carried is AdamW's own momentum and decay, though values are made as if SGD had trained."""
    carried = []
    for proxy in ("auto", "sgd"):
        trainer, _ = prepare(
            tmp_path / proxy, "gpt2", two_groups(AdamW), value_optimizer=proxy, value_kernel="project", audit_steps=1
        )
        trainer.train()
        carried.append(trainer.audit()["carried"][:])
    assert carried[0] == carried[1] and all(carried[0][1:])


def test_audits_that_were_all_skipped_are_not_logged(tmp_path):
    class Poisoned(Recorder):
        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            return loss + math.nan if model.training and self.state.global_step == 1 else loss

    trainer, _ = prepare(tmp_path, "gpt2", trainer_class=Poisoned, audit_steps=2, logging_steps=2)
    trainer.train()
    logged = [row["step"] for row in trainer.state.log_history if "shapley/audit_actual" in row]
    assert logged == [4]


def test_no_audit(tmp_path):
    trainer, _ = prepare(tmp_path, "gpt2", max_steps=2)
    trainer.train()
    assert len(trainer.audit()) == 0
    assert not any("audit" in key for row in trainer.state.log_history for key in row)


def test_a_skipped_update_is_not_audited(tmp_path):
    class Poisoned(Recorder):
        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            return loss + math.nan if model.training and self.state.global_step == 1 else loss

    trainer, _ = prepare(tmp_path, "gpt2", trainer_class=Poisoned, audit_steps=1, value_order="path")
    trainer.train()
    assert load_updates(trainer.value_dir)["skipped"][:] == [False, True, False, False]
    assert trainer.audit()["step"][:] == [1, 3, 4]


# What is touched, and what is chosen.


@pytest.mark.parametrize("second_pass", ["stash", "replay"])
@orders
def test_validation_that_fails_leaves_the_optimizers_weights(tmp_path, order, second_pass):
    """In the midst of update 2, at weights that are not the model's own."""

    class Failing(Recorder):
        weights = None

        def _get_grad_norm(self, model, grad_norm=None):
            if self.state.global_step == 1:  # clipping is done, the step comes next
                self.weights = [parameter.detach().clone() for parameter in self.model.parameters()]
                self.memory = [parameter.data_ptr() for parameter in self.model.parameters()]
                self.grads = [p.grad.clone() for p in self.model.parameters()]
            return super()._get_grad_norm(model, grad_norm)

        def _validation_loss(self, model, batch):
            loss = super()._validation_loss(model, batch)
            if self.weights is not None:
                raise KeyboardInterrupt
            return loss

    trainer, _ = prepare(tmp_path, "gpt2", trainer_class=Failing, second_pass=second_pass, **order)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    parameters = list(trainer.model.parameters())
    assert [parameter.data_ptr() for parameter in parameters] == trainer.memory
    for parameter, before, grad in zip(parameters, trainer.weights, trainer.grads, strict=True):
        assert torch.equal(parameter, before)
        assert torch.equal(parameter.grad, grad)
    assert len(trainer.value_history()) == 6
    assert not trainer.optimizer.optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize(
    ("free", "accumulation", "expected"), [(1 << 40, 3, "stash"), (400_000, 1, "stash"), (400_000, 8, "replay")]
)
def test_auto_chooses_by_memory_and_accumulation(tmp_path, monkeypatch, caplog, free, accumulation, expected):
    monkeypatch.setattr(passes, "free_memory", lambda device: free)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    trainer, replay = prepare(
        tmp_path,
        "gpt2",
        two_groups(SGD),
        rows=rows_for("gpt2", 32),
        gradient_accumulation_steps=accumulation,
        max_steps=2,
        value_order="path",
        log_level="info",
    )
    trainer.train()
    # Records by identity: some versions of transformers hand one on twice.
    records = {id(record): record.getMessage() for record in caplog.records}
    messages = [message for message in records.values() if "second_pass='auto'" in message]
    assert len(messages) == 1 and repr(expected) in messages[0], messages
    assert_history(trainer, replay, FLOAT32)


def test_the_estimate_of_what_is_kept(tmp_path):
    """Within a factor of two of what a kept micro-batch really holds."""
    trainer, _ = prepare(tmp_path, "gpt2", rows=text_rows(4, ragged_labels=False), value_kernel="project")
    batch = collate(text_rows(4, ragged_labels=False))
    with trainer._capture.attached(), trainer._capture.keeping(Rows(4)) as kept:
        trainer.model(**batch).loss.backward()
    held = {
        tensor.data_ptr(): tensor.numel() * tensor.element_size() for use in kept._uses for tensor in (use.x, use.b)
    }
    estimate = trainer._capture.kept_bytes(batch["input_ids"].numel())
    assert 0.5 < estimate / sum(held.values()) < 2.0


class Twice(torch.autograd.Function):
    """An attention kernel without a second derivative."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, b):
        return b


def test_second_order_of_a_model_without_second_derivative(tmp_path):
    model = build("gpt2")
    block = model.transformer.h[0].attn
    block.register_forward_hook(lambda module, inputs, output: (Twice.apply(output[0]), *output[1:]))
    with pytest.raises(ValueError, match="value_order='second'.*attn_implementation.*value_order='path'"):
        Recorder(
            model,
            ShapleyConfig(output_dir=str(tmp_path), value_order="second", report_to="none", use_cpu=True),
            train_dataset=dataset(text_rows(4)),
            validation_dataset=dataset(text_rows(2)),
            data_collator=collate,
        )
