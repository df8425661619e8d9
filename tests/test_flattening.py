"""`DataCollatorWithFlattening` packs the samples of a micro-batch into one row; each still has a value of its own."""

import pytest
import torch
from accelerate import Accelerator
from models import IGNORED, PAD, build, collate, dataset, text_rows
from oracles import Float64
from prepared import config, prepare, two_groups
from recorder import Recorder, assert_history
from torch.optim import SGD, AdamW
from transformers import AttentionInterface, DataCollatorWithFlattening, Trainer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_datashapley import ShapleyTrainer
from hf_datashapley.ghost.capture import Capture
from hf_datashapley.ghost.units import Runs


FLOAT32 = 1e-5
FLOAT64 = 2e-6
ORDERS = {
    "first": {"value_order": "first"},
    "second": {"value_order": "second"},
    "stash": {"value_order": "path", "second_pass": "stash"},
    "replay": {"value_order": "path", "second_pass": "replay"},
    "owen": {"value_order": "path", "path_slope": "owen"},
}


class PackedRecorder(Recorder):
    """Tells the oracle of the samples one by one: a new one begins where position 0 does."""

    def padded(self, inputs):
        starts = [p for p, position in enumerate(inputs["position_ids"][0].tolist()) if position == 0]
        ends = [*starts[1:], inputs["input_ids"].shape[1]]
        longest = max(end - start for start, end in zip(starts, ends, strict=True))
        shape = (len(starts), longest)
        padded = {
            "input_ids": torch.full(shape, PAD),
            "attention_mask": torch.zeros(shape, dtype=torch.int64),
            "labels": torch.full(shape, IGNORED),
        }
        for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
            padded["attention_mask"][i, : end - start] = 1
            for key in ("input_ids", "labels"):
                padded[key][i, : end - start] = inputs[key][0, start:end]
        assert len(starts) > 1, "nothing was packed"
        return padded


def packed(folder, *arguments, **settings):
    return prepare(
        folder,
        *arguments,
        trainer_class=PackedRecorder,
        data_collator=DataCollatorWithFlattening(),
        **{"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "max_steps": 2, **settings},
    )


CASES = [("gpt2", "fused", "sdpa", order) for order in ORDERS] + [
    ("gpt2", "project", "eager", "first"),
    ("gpt2", "project", "sdpa", "replay"),
    ("gpt2", "project", "eager", "owen"),
    ("neox", "fused", "eager", "first"),
    ("neox", "project", "sdpa", "stash"),
    ("llama", "fused", "sdpa", "first"),
    ("llama", "fused", "eager", "stash"),
    ("llama", "project", "sdpa", "second"),
]


@pytest.mark.parametrize(("name", "kernel", "attention", "order"), CASES)
def test_values_are_those_of_the_samples_one_by_one(tmp_path, name, kernel, attention, order):
    """Also of the validation rows, which are packed three to a row. Tokens are each sample's own."""
    trainer, replay = packed(
        tmp_path,
        name,
        # The oracle takes order "second" from a difference of gradients, too coarse for Adam's first updates.
        two_groups(SGD, momentum=0.9) if order == "second" else two_groups(AdamW),
        dtype=torch.float64,
        attention=attention,
        value_kernel=kernel,
        validation_batch_size=3,
        **ORDERS[order],
    )
    with Float64():
        trainer.train()
    assert_history(trainer, replay, FLOAT64)


@pytest.mark.parametrize("order", ["first", "stash"])
def test_recomputed_activations_adapters_and_float32(tmp_path, order):
    trainer, replay = packed(
        tmp_path, "llama-lora", two_groups(SGD, momentum=0.9), gradient_checkpointing=True, **ORDERS[order]
    )
    trainer.train()
    assert_history(trainer, replay, FLOAT32)


def test_bf16_autocast(tmp_path):
    trainer, replay = packed(tmp_path, "llama", two_groups(SGD), bf16=True)
    replay.loss_tolerance = 1e-2
    trainer.train()
    assert 1e-4 < assert_history(trainer, replay, 5e-2)


@pytest.mark.parametrize("dispatch", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_streams_and_batches_that_are_dispatched(tmp_path, dispatch, workers):
    """In one process; accelerate then slices every tensor of the batch by its first dimension, which is 1."""
    rows = text_rows(12)
    trainer, replay = packed(
        tmp_path,
        "gpt2",
        two_groups(SGD),
        rows=rows,
        train_dataset=dataset(rows, ids=range(12)).to_iterable_dataset(num_shards=2),
        dataloader_num_workers=workers,
        accelerator_config={"dispatch_batches": dispatch},
    )
    trainer.train()
    assert_history(trainer, replay, FLOAT32)


@pytest.mark.parametrize(("kernel", "optim"), [("project", "adamw_torch"), ("fused", "sgd")])
def test_training_is_that_of_plain_trainer(tmp_path, kernel, optim):
    """With dropout; "project" bit for bit, "fused" up to rounding (which Adam would magnify)."""
    runs = []
    for trainer_class in (Trainer, ShapleyTrainer):
        values = {"validation_dataset": dataset(text_rows(6, seed=9))} if trainer_class is ShapleyTrainer else {}
        trainer = trainer_class(
            build("gpt2", dropout=0.1),
            config(tmp_path / trainer_class.__name__, value_kernel=kernel, optim=optim, per_device_train_batch_size=3),
            train_dataset=dataset(text_rows(24)),
            data_collator=DataCollatorWithFlattening(),
            **values,
        )
        trainer.train()
        losses = torch.tensor([row["loss"] for row in trainer.state.log_history if "loss" in row])
        runs.append((losses, torch.cat([p.detach().flatten() for p in trainer.model.parameters()])))
    (losses, weights), (own_losses, own_weights) = runs
    assert len(losses) == 6
    if kernel == "project":
        assert torch.equal(own_losses, losses) and torch.equal(own_weights, weights)
    else:
        torch.testing.assert_close(own_losses, losses, rtol=1e-5, atol=0)
        torch.testing.assert_close(own_weights, weights, rtol=0, atol=1e-6)


def test_rows_without_labels_are_not_drawn(tmp_path):
    """They are told apart before rows are packed."""
    unlabelled = [{"input_ids": [3, 4, 5], "labels": [5, IGNORED, IGNORED]}] * 3
    trainer = make(tmp_path, validation=[*unlabelled, *text_rows(2)], validation_batch_size=2)
    assert {int(row) for step in range(1, 9) for row in trainer.validation_rows(step)[""]} == {3, 4}


def make(folder, *, model=None, collator=None, validation=None, **settings):
    return ShapleyTrainer(
        build("llama") if model is None else model,
        config(folder, **settings),
        train_dataset=dataset(text_rows(8)),
        validation_dataset=text_rows(4, seed=2) if validation is None else validation,
        data_collator=DataCollatorWithFlattening() if collator is None else collator,
    )


class WithMask(DataCollatorWithFlattening):
    def __call__(self, *arguments, **kwargs):
        batch = super().__call__(*arguments, **kwargs)
        return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}


class Reversed(DataCollatorWithFlattening):
    def __call__(self, rows, *arguments, **kwargs):
        rows = [{key: row[key][::-1] for key in ("input_ids", "labels")} for row in rows]
        return super().__call__(rows, *arguments, **kwargs)


@pytest.mark.parametrize(
    ("collator", "settings", "fault"),
    [
        (DataCollatorWithFlattening(return_position_ids=False), {}, "attend to each other.*return_position_ids=True"),
        (WithMask(), {}, "attend to each other.*no attention_mask"),
        (DataCollatorWithFlattening(), {"use_cache": True}, "attend to each other.*use_cache=False"),
        (DataCollatorWithFlattening(separator_id=5), {}, "labels the first token.*separator_id at -100"),
        (Reversed(), {}, "is not the tokens of its 2 samples"),
    ],
    ids=["no positions", "attention mask", "cache", "separator", "other tokens"],
)
@pytest.mark.parametrize("name", ["gpt2", "neox"])
def test_samples_that_are_not_apart_are_refused(tmp_path, name, collator, settings, fault):
    with pytest.raises(ValueError, match=fault + ".*DataCollatorForLanguageModeling"):
        make(tmp_path, model=build(name), collator=collator, **settings)


def test_attention_without_a_mask_is_refused(tmp_path):
    def unmasked(module, query, key, value, attention_mask, **kwargs):
        assert attention_mask is None
        return sdpa_attention_forward(module, query, key, value, None, is_causal=True, **kwargs)

    AttentionInterface.register("unmasked", unmasked)
    with pytest.raises(ValueError, match="attend to each other.*attn_implementation='sdpa'"):
        make(tmp_path, model=build("llama", attention="unmasked"))


def test_the_trial_leaves_no_trace(tmp_path):
    model = build("gpt2", dropout=0.1)
    model.eval()
    model.transformer.h[1].train()
    flags = [module.training for module in model.modules()]
    make(tmp_path / "packed", model=model)
    assert [module.training for module in model.modules()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    drawn = []
    for collator in (DataCollatorWithFlattening(), collate):
        make(tmp_path / "either", model=build("gpt2", dropout=0.1), collator=collator)
        drawn.append(torch.rand(3))  # Trainer seeds when it is made
    assert torch.equal(*drawn)


def test_a_subclass_may_add_what_the_model_takes(tmp_path):
    class Noting(DataCollatorWithFlattening):
        def __call__(self, *arguments, **kwargs):
            return {**super().__call__(*arguments, **kwargs), "logits_to_keep": 0}

    trainer = make(tmp_path, collator=Noting(), max_steps=1, optim="sgd")
    trainer.train()
    assert any(trainer.values()["value"])


def test_packed_rows_cannot_be_handed_out_to_several_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda self: 2))
    with pytest.raises(ValueError, match="DataCollatorWithFlattening.*accelerator_config=.*dispatch_batches"):
        make(tmp_path, accelerator_config={"dispatch_batches": True})


def test_a_layer_that_sees_another_shape_is_noticed():
    layer = torch.nn.Sequential(torch.nn.Linear(2, 2))
    capture = Capture(layer)
    directions = {name: torch.ones(1, *p.shape) for name, p in capture.parameters.items()}
    with capture.attached(), capture.scoring(directions, Runs([2, 1], rows=1)):
        layer(torch.randn(1, 3, 2))
        with pytest.raises(ValueError, match=r"0: its input \[3, 2\].*micro-batch's \[1, 3\].*value_modules"):
            layer(torch.randn(3, 2))
