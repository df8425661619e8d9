"""Where other tools for data attribution were seen to break, and the test here that would notice if we did too.

| failure seen elsewhere | test |
|---|---|
| values are wrong with several validation rows | `test_values.py::test_language_models` |
| | `test_validation_rows_count_by_their_tokens` |
| tied weights, or their cross terms, are left out | `test_rules.py::test_tied_parameter_counts_once_with_both_uses` |
| | `test_values.py::test_language_models` |
| inner products are taken in half precision | `test_products_of_half_precision_are_summed_in_full` |
| unequal label counts change the training gradient | `test_the_training_gradient_is_that_of_trainer` |
| accumulation loses samples | `test_values.py::test_language_models` |
| | `test_micro_batches_and_padding_do_not_matter` |
| a padded batch loses causality, gradients depend on padding | `test_micro_batches_and_padding_do_not_matter` |
| crash under DDP | `test_ddp.py` |
| crash under torch.compile | `test_compile.py` |
| crash of Llama | `test_values.py::test_language_models` |
| crash of a Conv2d | `test_a_convolution_is_refused_where_it_trains` |
| under PEFT everything becomes trainable | `test_launches.py::test_adapters`, `test_nothing_else_becomes_trainable` |
| no start on transformers 5 | `test_parity.py::test_private_methods_of_trainer_are_those_we_know` |
| crash under activation checkpointing | `test_launches.py::test_recomputed_activations` |
| positions are scored by batch, not by row | `test_rules.py::test_embedding_of_positions_broadcast_over_the_batch` |
| exact duplicates merge, and values cannot be joined to the dataset | `test_duplicates_keep_ids_of_their_own` |
| several validation rows make training slow | a measurement, `scripts/benchmark_overhead.py` |
| crash under bf16 in a clamp with float32 bounds | `test_values_in_bf16_are_no_noise` |
| weights in bf16 | `test_half_precision.py` |
| packed batches | `test_flattening.py` |
| iterable datasets are refused | `test_streaming.py` |
| rows are lost on resume, and at each epoch's end | `test_every_epoch_is_in_the_ledger` |
| | `test_resume.py::test_values_are_those_of_a_run_never_interrupted` |
| updates are on different scales (Adam's bias correction) | `test_updates_are_on_one_scale` |
| embeddings, norms and the tied head are not attributed | `test_every_kind_of_parameter_has_its_part` |
| | `test_rules.py::test_identity_directions_give_the_per_sample_gradients_of_whole_models` |
| crash of a model without pad_token_id | `test_a_model_without_padding_token` |
| settings leak between objects through shared defaults | `test_two_trainers_share_nothing` |
| no Conv1D, embeddings, norms | `test_rules.py::test_conv1d` |
| | `test_rules.py::test_embedding` |
| | `test_rules.py::test_layer_norm_with_bias` |
| | `test_rules.py::test_rms_norm` |
| Conv1D's second moments are transposed | `test_second_moments_of_square_conv1d` |
| parameter groups in another order than the model | `test_each_parameter_has_the_settings_of_its_own_group` |
| crash on documents under two tokens | `test_rows_of_one_token` |
| | `test_an_update_of_rows_of_one_token` |
| | `test_validation_rows_of_one_token` |
| a document starts twice (double BOS) | `test_a_document_starts_once` |
| scores in bf16 are noise | `test_values_in_bf16_are_no_noise`, `test_half_precision.py::test_bf16_autocast` |

Of attribution after training, and so of later versions: projections that weight modules by shape, dropout masks that
differ between train and query gradients, EK-FAC, TRAK's defaults on a small set, projections of language models.
"""

import copy
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import prepared
import pytest
import torch
from datasets import Dataset
from models import IGNORED, build, collate, dataset, text_rows
from oracles import Float64, relative_error
from prepared import config, prepare, two_groups
from recorder import Recorder, assert_history
from test_rules import assert_scores, draw, draw_weights
from tokenizers import processors
from torch import nn
from torch.optim import SGD, AdamW
from transformers import Trainer, TrainerCallback

from hf_datashapley import ShapleyTrainer, load_updates
from hf_datashapley.demo.corpus import Document
from hf_datashapley.demo.rows import tokenise, train_tokenizer
from hf_datashapley.ghost.capture import Capture
from hf_datashapley.ghost.kernels import weight_gradients
from hf_datashapley.ghost.units import Rows


FLOAT32 = 1e-5
LEDGER = 1e-6  # of a float64 run, whose ledger holds float32


def test_the_table_above_names_tests_that_exist():
    here = Path(__file__)
    named = re.findall(r"`(?:(test_\w+\.py)::)?(test_\w+)`", __doc__)
    assert len(named) > 30
    for file, name in named:
        assert f"def {name}(" in here.with_name(file or here.name).read_text(), f"{file}::{name}"


def train(folder, model, rows, validation, collator=collate, trainer_class=ShapleyTrainer, **settings):
    trainer = trainer_class(
        model,
        config(folder, **settings),
        train_dataset=rows if isinstance(rows, Dataset) else dataset(rows),
        validation_dataset=validation if isinstance(validation, dict) else dataset(validation),
        data_collator=collator,
    )
    if next(model.parameters()).dtype == torch.float64:
        with Float64():
            trainer.train()
    else:
        trainer.train()
    return trainer


def values_of(trainer, column="value"):
    """By sample id, the values of every update in order."""
    history = trainer.value_history()
    assert any(history[column])
    return [value for _, _, value in sorted(zip(history["step"], history["sample_id"], history[column], strict=True))]


# Batches


def padded(side, extra=0, token=0, mask=True):
    """A collator that pads to the longest row and `extra` more; positions count from a row's first token."""

    def collate_padded(rows):
        length = max(len(row["input_ids"]) for row in rows) + extra
        columns = {"input_ids": token, "attention_mask": 0, "labels": IGNORED, "position_ids": 0}
        batch = {name: [] for name in columns}
        for row in rows:
            count = len(row["input_ids"])
            whole = {**row, "attention_mask": [1] * count, "position_ids": list(range(count))}
            for name, filler in columns.items():
                padding = [filler] * (length - count)
                batch[name].append(padding + whole[name] if side == "left" else whole[name] + padding)
        if not mask:
            del batch["attention_mask"]
        return {name: torch.tensor(values) for name, values in batch.items()}

    return collate_padded


BATCHES = {
    "rows by themselves": (padded("right"), 1),
    "pairs": (padded("right"), 2),
    "more padding": (padded("right", extra=3), 4),
    "padding on the left": (padded("left"), 4),
    "more padding on the left": (padded("left", extra=3, token=7), 2),
    "another padding token": (padded("right", token=7), 4),
    "no mask": (padded("right", mask=False), 4),
}


@pytest.mark.parametrize(("name", "order"), [("gpt2", "path"), ("llama", "first")])
def test_micro_batches_and_padding_do_not_matter(tmp_path, name, order):
    """A sample's value is its own: whatever shares its batch, and wherever the padding stands."""
    rows = text_rows(8)
    validation = text_rows(4, seed=2)
    for row in rows + validation:
        row["labels"] = [IGNORED, *row["labels"][1:]]  # on the left it would be predicted, from padding

    def run(case, collator, batch_size):
        trainer = train(
            tmp_path / case,
            build(name, dtype=torch.float64),
            rows,
            validation,
            collator,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=4 // batch_size,
            train_sampling_strategy="sequential",
            validation_batch_size=3,
            optim="sgd",
            max_steps=2,
            value_order=order,
        )
        assert sorted(trainer.values()["sample_id"]) == list(range(8))
        return values_of(trainer)

    truth = run("four", padded("right"), 4)
    assert len(truth) == 8
    for case, (collator, batch_size) in BATCHES.items():
        assert relative_error(run(case, collator, batch_size), truth) < LEDGER, case


def test_validation_rows_count_by_their_tokens(tmp_path):
    """The value against a batch is the mean of those against its rows, by their loss tokens."""
    validation = [row for row in text_rows(5, seed=2) if set(row["labels"]) != {IGNORED}]
    rows = {str(i): dataset([row]) for i, row in enumerate(validation)}
    tokens = [sum(label != IGNORED for label in row["labels"][1:]) for row in validation]
    assert len(set(tokens)) > 2, "equal lengths would prove little"
    for name in ("gpt2", "llama"):
        model = build(name, dtype=torch.float64)
        targets = {**rows, "all": dataset(validation)}
        trainer = train(tmp_path / name, model, text_rows(8), targets, validation_batch_size=4, optim="sgd")
        alone = torch.tensor([values_of(trainer, f"value_{i}") for i in rows], dtype=torch.float64)
        shares = torch.tensor(tokens, dtype=torch.float64) / sum(tokens)
        assert relative_error(values_of(trainer, "value_all"), shares @ alone) < LEDGER


class Gradients(TrainerCallback):
    """The gradients that the optimizer is about to take."""

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.seen.append(torch.cat([p.grad.flatten() for p in model.parameters()]).clone())


@pytest.mark.parametrize("kernel", ["fused", "project"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_training_gradient_is_that_of_trainer(tmp_path, name, kernel):
    """With 1 to 14 labels a row: the mean over the update's tokens, not over rows or micro-batches."""
    rows = [{"input_ids": list(range(2, 4 + k)), "labels": list(range(2, 4 + k))} for k in range(14)]
    validation = dataset(text_rows(5, seed=2))
    found = {}
    for trainer_class in (Trainer, ShapleyTrainer):
        gradients = Gradients()
        trainer = trainer_class(
            build(name),
            config(
                tmp_path / trainer_class.__name__,
                max_grad_norm=0.0,
                max_steps=2,
                value_kernel=kernel,
                validation_batch_size=4,
            ),
            train_dataset=dataset(rows),
            data_collator=collate,
            callbacks=[gradients],
            **({"validation_dataset": validation} if trainer_class is ShapleyTrainer else {}),
        )
        trainer.train()
        found[trainer_class] = torch.stack(gradients.seen)
    if kernel == "project":
        assert torch.equal(found[ShapleyTrainer], found[Trainer])
    else:
        assert relative_error(found[ShapleyTrainer], found[Trainer]) < 1e-5


# Rows


def test_duplicates_keep_ids_of_their_own(tmp_path):
    """Four copies of a row, in one update: four ids, four equal values, and each finds its row again."""
    rows = text_rows(12, ragged_labels=False)
    for copied in (4, 7, 11):
        rows[copied] = copy.deepcopy(rows[0])
    ids = [70 + 3 * i for i in range(12)]
    table = dataset(rows, ids)
    trainer = train(
        tmp_path,
        build("gpt2", dtype=torch.float64),
        table,
        text_rows(4, seed=2),
        gradient_accumulation_steps=6,
        num_train_epochs=1,
        optim="sgd",
    )
    values = {row["sample_id"]: row for row in trainer.values()}
    assert sorted(values) == ids
    assert all(values[row["sample_id"]]["tokens"] == len(row["input_ids"]) - 1 for row in table)
    assert all(row["updates"] == 1 for row in values.values())
    copies = [values[ids[i]]["value"] for i in (0, 4, 7, 11)]
    assert copies[0] and relative_error(copies, [copies[0]] * 4) < LEDGER
    assert len({round(row["value"], 12) for row in values.values()}) == 9


SHORT = [{"input_ids": [token], "labels": [token]} for token in (5, 9)]


@pytest.mark.parametrize("order", [{"value_order": "first"}, {"value_order": "path", "path_slope": "owen"}])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_rows_of_one_token(tmp_path, name, order):
    """They predict nothing: in a batch with others, and as a micro-batch of their own."""
    rows = text_rows(6)
    rows[2], rows[4], rows[5] = SHORT[0], SHORT[1], {"input_ids": [11], "labels": [11]}
    trainer, replay = prepare(
        tmp_path,
        name,
        two_groups(AdamW),
        rows=rows,
        dtype=torch.float64,
        train_sampling_strategy="sequential",
        **order,
    )
    with Float64():
        trainer.train()
    assert_history(trainer, replay, 2e-6)
    assert [len(micro.inputs["input_ids"][0]) for micro in trainer.updates[0].micro_batches][-1] == 1
    short = [row for row in trainer.value_history() if row["sample_id"] in (2, 4, 5)]
    assert len(short) == 6 and all((row["value"], row["tokens"]) == (0.0, 0) for row in short)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_an_update_of_rows_of_one_token(tmp_path, name):
    """GPT-2's loss is then 0; Llama's is 0 / 0, also in plain Trainer, and the update is marked. The run goes on."""
    trainer = train(
        tmp_path,
        build(name),
        [*text_rows(2, ragged_labels=False), *SHORT],
        [*text_rows(2, seed=2), *SHORT],
        gradient_accumulation_steps=1,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        optim="sgd",
    )
    assert load_updates(trainer.value_dir)["skipped"] == [False, name == "llama"]
    values = {row["sample_id"]: (row["value"], row["tokens"]) for row in trainer.values()}
    assert values[2] == values[3] == (0.0, 0)
    assert values[0][0] and values[1][0]


def test_validation_rows_of_one_token(tmp_path):
    """Never drawn; where there are no others, there is no loss to explain."""
    validation = [SHORT[0], text_rows(1)[0], SHORT[1]]
    trainer = train(tmp_path / "some", build("gpt2"), text_rows(6), validation, validation_batch_size=3, optim="sgd")
    assert all(trainer.validation_rows(step)[""].tolist() == [1] for step in (1, 2))
    with pytest.raises(ValueError, match="no loss to explain"):
        train(tmp_path / "none", build("gpt2"), text_rows(6), SHORT)


@pytest.mark.parametrize("text", ["one two three", "<|endoftext|>one two three"], ids=["plain", "marked"])
@pytest.mark.parametrize("adds", [False, True], ids=["bare tokenizer", "tokenizer that marks starts"])
def test_a_document_starts_once(text, adds):
    tokenizer = train_tokenizer(["one two three four"] * 9, 300, 16)
    start = tokenizer.bos_token_id
    if adds:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, start)]
        )
        assert tokenizer("one")["input_ids"][0] == start
    ((row,),) = (document.rows for document in tokenise([Document(text, "a", "a")], tokenizer, 16))
    assert row[0] == start and row.count(start) == 1
    assert tokenizer.decode(row[1:]) == "one two three"


# Models


def test_nothing_else_becomes_trainable(tmp_path):
    """A base that PEFT has frozen stays frozen: when the trainer is made, while it trains, afterwards."""
    model = build("gpt2-lora")
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert not all(before.values())
    during = []

    class Looking(ShapleyTrainer):
        def training_step(self, *args, **kwargs):
            during.append({name: p.requires_grad for name, p in self.model.named_parameters()})
            return super().training_step(*args, **kwargs)

    for number, settings in enumerate([{}, {"value_order": "second"}, {"value_modules": ["lora_A"]}]):
        trainer = train(
            tmp_path / str(number), model, text_rows(6), text_rows(4, seed=2), trainer_class=Looking, **settings
        )
        during.append({name: p.requires_grad for name, p in model.named_parameters()})
        assert trainer.get_num_trainable_parameters() == sum(
            p.numel() for n, p in model.named_parameters() if before[n]
        )
    assert len(during) > 6 and all(seen == before for seen in during)


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(1, 4, 2, stride=2)
        self.head = nn.Linear(4, 3)

    def forward(self, x_BHW):
        return self.head(torch.tanh(self.patches(x_BHW.unsqueeze(1))).flatten(2).transpose(1, 2))


@pytest.mark.parametrize("kernel", ["fused", "project"])
def test_a_convolution_is_refused_where_it_trains(kernel):
    """By name, with the cure; frozen it is part of any model."""
    model = Convolution()
    with pytest.raises(ValueError, match="Conv2d patches.*patches.weight.*value_modules.*freeze"):
        Capture(model)
    assert set(Capture(model, ["head"]).parameters) == {"head.weight", "head.bias"}
    model.patches.requires_grad_(False)
    generator = draw_weights(model, 3)
    assert_scores(model, [draw(generator, 3, 4, 6)], kernel, 2, generator)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_model_without_padding_token(tmp_path, monkeypatch, name):
    def without(*args, **settings):
        model = build(*args, **settings)
        configuration = copy.deepcopy(model.config)
        configuration.pad_token_id = None
        fresh = type(model)(configuration).to(model.dtype)
        fresh.load_state_dict(model.state_dict())
        return fresh

    monkeypatch.setattr(prepared, "build", without)
    trainer, replay = prepare(tmp_path, name, two_groups(SGD), validation_batch_size=3, max_steps=2)
    assert trainer.model.config.pad_token_id is None
    assert trainer.model.get_input_embeddings().padding_idx is None
    trainer.train()
    assert_history(trainer, replay, FLOAT32)


PARTS = {
    "token embedding and tied head": r"transformer\.wte",
    "position embedding": r"transformer\.wpe",
    "norms": r".*\.ln_[12f]",
    "attention": r".*\.attn\..*",
    "multilayer perceptron": r".*\.mlp\..*",
}


def test_every_kind_of_parameter_has_its_part(tmp_path):
    """The parts of a model add up to the whole, and none is nothing."""
    found = {}
    for number, (part, modules) in enumerate([("all", None), *PARTS.items()]):
        trainer = train(
            tmp_path / str(number),
            build("gpt2", dtype=torch.float64),
            text_rows(6),
            text_rows(4, seed=2),
            value_modules=modules,
            value_kernel="project",
            optim="sgd",
            max_steps=1,
        )
        found[part] = torch.tensor(values_of(trainer), dtype=torch.float64)
    scale = found["all"].abs().max()
    assert all(found[part].abs().max() > 1e-3 * scale for part in PARTS)
    assert relative_error(sum(found[part] for part in PARTS), found["all"]) < LEDGER


# Optimizers


class Slope(nn.Module):
    """A loss that is linear in the weights: the same gradient at every update."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 1, bias=False)

    def forward(self, x, labels):
        return {"loss": (self.linear(x)[:, 0] * labels).mean()}


@pytest.mark.parametrize("momentum", ["unrolled", "immediate"])
def test_updates_are_on_one_scale(tmp_path, momentum):
    """The same gradient, the same value at every update; without bias correction update 2 would count 32 times."""
    rows = Dataset.from_list([{"x": [0.1, 2.0, -0.3, 40.0], "labels": 1.0}] * 12)
    trainer = ShapleyTrainer(
        Slope().double(),
        config(tmp_path, value_momentum=momentum, weight_decay=0.0, max_steps=12, max_grad_norm=0.0),
        train_dataset=rows,
        validation_dataset=rows,
        data_collator=lambda rows: {
            name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in ("x", "labels")
        },
    )
    trainer.train()
    history = trainer.value_history().to_pandas()
    values = history[history["step"] > 1].groupby("step")["value"].sum().to_numpy()
    steps = range(2, 13)
    if momentum == "immediate":  # the share of the step that is this gradient's own
        values = [value / (0.1 / (1 - 0.9**step)) for value, step in zip(values, steps, strict=True)]
    # Each weight moves by the learning rate.
    truth = 1e-2 * (0.1 + 2.0 + 0.3 + 40.0)
    assert len(values) == 11 and relative_error(values, [truth] * 11) < 1e-5


@pytest.mark.parametrize("order", [{"value_order": "first"}, {"value_order": "path"}], ids=["first", "path"])
def test_second_moments_of_square_conv1d(tmp_path, order):
    """Where weight and second moment are square, transposing one of them goes through without an error."""
    trainer, replay = prepare(
        tmp_path, "gpt2", two_groups(AdamW), dtype=torch.float64, value_modules=r".*\.attn\.c_proj", **order
    )
    replay.scored = [name for name in replay.model.state_dict() if name.endswith("attn.c_proj.weight")]
    replay.scored += [name.replace("weight", "bias") for name in replay.scored]
    assert all(w.shape == (16, 16) for n, w in trainer.model.named_parameters() if n in replay.scored[:2])
    with Float64():
        trainer.train()
    assert_history(trainer, replay, 2e-6)


@pytest.mark.parametrize("order", [{"value_order": "first"}, {"value_order": "path"}], ids=["first", "path"])
def test_each_parameter_has_the_settings_of_its_own_group(tmp_path, order):
    """Trainer's own groups, with and without weight decay, hold the parameters in another order than the model."""

    class OwnRates(Recorder):
        def create_optimizer(self, *args, **kwargs):
            optimizer = super().create_optimizer(*args, **kwargs)
            decayed, others = optimizer.param_groups
            assert decayed["weight_decay"] == 0.1 and others["weight_decay"] == 0.0
            others["lr"], others["betas"], others["eps"] = 1e-1 * decayed["lr"], (0.7, 0.9), 1e-3
            return optimizer

    trainer, replay = prepare(tmp_path, "gpt2", dtype=torch.float64, trainer_class=OwnRates, **order)
    with Float64():
        trainer.train()
    own = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert [id(p) for p in own] != [id(p) for p in trainer.model.parameters()]
    assert_history(trainer, replay, 2e-6)


# Precision


@pytest.mark.parametrize(("rows", "columns"), [(64, 48), (600, 600)], ids=["small", "large"])
def test_products_of_half_precision_are_summed_in_full(rows, columns):
    """Inputs and output gradients in bf16, directions in float32: no more error than the products' own rounding."""
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(3, 40, rows, generator=generator).bfloat16()
    right = torch.randn(3, 40, columns, generator=generator).bfloat16()
    gradients = torch.einsum("bpl,bpr->blr", left.double(), right.double())
    # One direction along a gradient: its score is large, and would lose more in bf16 than all products together.
    direction = torch.stack([gradients[0].float(), torch.randn(rows, columns, generator=generator)])
    total, scores = weight_gradients(left, right, direction, Rows(len(left)))
    assert total.dtype == scores.dtype == torch.float32
    truth = torch.einsum("blr,klr->bk", gradients, direction.double())
    size = gradients.flatten(1).norm(dim=1).unsqueeze(1) * direction.double().flatten(1).norm(dim=1)
    # 2^-9 an entry; independent, so that they average out over the entries.
    assert ((scores - truth).abs() / size).max() < 4 * 2**-9 / math.sqrt(rows * columns)
    assert relative_error(total, gradients.sum(0)) < 2**-7


def rank_correlation(left, right):
    """Spearman's correlation of two columns without ties."""
    left, right = (np.argsort(np.argsort(column)) for column in (left, right))
    return float(np.corrcoef(left, right)[0, 1])


def afresh(model):
    """accelerate marks a model that it has prepared, and does not give it, or a copy, another precision."""
    fresh = type(model)(model.config)
    fresh.load_state_dict(model.state_dict())
    return fresh


SMALL_STEPS = {
    "sgd": {"optim": "sgd"},
    "adamw": {},
    "owen": {"value_order": "path", "path_slope": "owen"},
}


@pytest.mark.parametrize("settings", SMALL_STEPS.values(), ids=SMALL_STEPS)
def test_values_in_bf16_are_no_noise(tmp_path, settings):
    """A model that has been trained for a while, small steps, clipping: bf16 orders samples as float32 does.

    From the fifth update on: Adam's second moments are young before, and magnify any rounding. The steps move the loss
    by less than the rounding of a loss in bf16.
    """
    model = build("gpt2", width=32)
    rows = text_rows(48, ragged_labels=False)
    common = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "num_train_epochs": 10}
    Trainer(
        model, config(tmp_path / "before", max_steps=60, **common), train_dataset=dataset(rows), data_collator=collate
    ).train()
    found, audits = {}, {}
    for bf16 in (False, True):
        trainer = ShapleyTrainer(
            afresh(model),
            config(
                tmp_path / str(bf16),
                bf16=bf16,
                learning_rate=1e-4,
                max_grad_norm=0.1,
                max_steps=16,
                validation_batch_size=4,
                audit_steps=4,
                **common,
                **settings,
            ),
            train_dataset=dataset(rows),
            validation_dataset=dataset(rows[:8]),
            data_collator=collate,
        )
        trainer.train()
        updates = load_updates(trainer.value_dir)
        assert max(updates["clip"]) < 1.0 and not any(updates["skipped"])
        history = trainer.value_history().to_pandas().sort_values(["step", "sample_id"])
        found[bf16] = history[history["step"] > 4]["value"].to_numpy().reshape(12, 8)
        audits[bf16] = trainer.audit().to_pandas()[["carried", "actual"]].to_numpy()
    assert not np.array_equal(found[True], found[False])
    correlations = [rank_correlation(*pair) for pair in zip(found[True], found[False], strict=True)]
    assert min(correlations) > 0.9, correlations
    assert relative_error(found[True].sum(1), found[False].sum(1)) < 0.1
    # What the steps did to the loss is measured in full precision.
    assert relative_error(audits[True], audits[False]) < 0.1


def test_full_precision_and_flash_attention(tmp_path):
    """Its kernels take half precision only, so what is measured in full precision is refused."""
    for settings, named in (
        ({"value_order": "path", "path_slope": "owen"}, "path_slope='owen'"),
        ({"audit_steps": 5}, "audit_steps=5"),
    ):
        model = build("gpt2")
        model.config._attn_implementation = "flash_attention_2"
        with pytest.raises(ValueError, match=f"{named}.*attn_implementation='sdpa'"):
            train(tmp_path, model, text_rows(4), text_rows(2, seed=2), bf16=True, **settings)


# Runs


def test_two_trainers_share_nothing(tmp_path):
    """Made one after the other, trained in turns: each gives the values that it gives alone."""
    # Trainer shuffles by the global random state, which each of them sets.
    settings = {
        "one": {"value_order": "path", "path_nodes": 2, "value_modules": ["c_fc"], "optim": "sgd", "seed": 3},
        "two": {"value_kernel": "project", "value_momentum": "immediate", "validation_batch_size": 3},
    }
    rows = {"one": text_rows(8), "two": text_rows(6, seed=3)}

    def make(folder, name):
        return ShapleyTrainer(
            build("gpt2"),
            config(tmp_path / folder / name, train_sampling_strategy="sequential", **settings[name]),
            train_dataset=dataset(rows[name]),
            validation_dataset=dataset(text_rows(4, seed=2)),
            data_collator=collate,
        )

    alone = {}
    for name in settings:
        trainer = make("alone", name)
        trainer.train()
        alone[name] = values_of(trainer)
    together = {name: make("together", name) for name in settings}

    class InBetween(TrainerCallback):
        """A whole run of the other, in the midst of this one."""

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                together["two"].train()

    together["one"].add_callback(InBetween())
    together["one"].train()
    for name, trainer in together.items():
        assert values_of(trainer) == alone[name]


def test_every_epoch_is_in_the_ledger(tmp_path):
    """Three epochs, with resumption at the end of the first and in the midst of the third."""

    class Stop(TrainerCallback):
        def __init__(self, after):
            self.after = after

        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == self.after

    def run(folder, after=None, resume=None):
        trainer = ShapleyTrainer(
            build("gpt2", dropout=0.1),
            config(tmp_path / folder, num_train_epochs=3, save_strategy="steps", save_steps=1),
            train_dataset=dataset(text_rows(11)),
            validation_dataset=dataset(text_rows(4, seed=2)),
            data_collator=collate,
            callbacks=[] if after is None else [Stop(after)],
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run("whole")
    run("broken", after=2)
    run("broken", after=5, resume=True)
    broken = run("broken", resume=True)
    assert broken.state.global_step == 6
    for trainer in (whole, broken):
        assert trainer.values()["updates"] == [3] * 11
        visits = Counter(zip(trainer.value_history()["step"], trainer.value_history()["sample_id"], strict=True))
        assert len(visits) == 33 and Counter(step for step, _ in visits) == {1: 6, 2: 5, 3: 6, 4: 5, 5: 6, 6: 5}
    assert broken.value_history()[:] == whole.value_history()[:]
