"""Documents that share rows have values of their own: those of each one's own loss, and together the sample's."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from models import IGNORED, build, dataset, text_rows
from oracles import Float64
from packed_documents import KEYS, ROWS, DocumentRecorder, packed_rows, pieces, prepare_documents, short_rows
from prepared import ORDERS, config, prepare, two_groups
from recorder import assert_history
from torch.optim import SGD, AdamW
from transformers import DataCollatorWithFlattening, TrainerCallback, default_data_collator

from hf_datashapley import ShapleyTrainer


FLOAT32 = 1e-5
FLOAT64 = 2e-6
CASES = [("gpt2", "fused", "sdpa", order) for order in ORDERS] + [
    ("gpt2", "project", "eager", "first"),
    ("neox", "fused", "eager", "path"),
    ("neox", "project", "sdpa", "owen"),
    ("llama", "fused", "sdpa", "first"),
    ("llama", "project", "eager", "replayed"),
]


@pytest.mark.parametrize(("name", "kernel", "attention", "order"), CASES)
def test_values_are_those_of_the_documents_own_losses(tmp_path, name, kernel, attention, order):
    """Also of the two pieces of a document that goes on in the next row."""
    trainer, replay, row_of_id = prepare_documents(
        tmp_path,
        name,
        # The oracle takes order "second" from a difference of gradients, too coarse for Adam's first updates.
        two_groups(SGD, momentum=0.9) if order == "second" else two_groups(AdamW),
        dtype=torch.float64,
        attention=attention,
        value_kernel=kernel,
        **ORDERS[order],
    )
    with Float64():
        trainer.train()
    assert_history(trainer, replay, FLOAT64, row_of_id, keys=KEYS)


@pytest.mark.parametrize(
    "settings",
    [
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True},
    ],
    ids=["accumulation", "recomputed"],
)
def test_settings(tmp_path, settings):
    trainer, replay, row_of_id = prepare_documents(tmp_path, "gpt2", two_groups(SGD, momentum=0.9), **settings)
    trainer.train()
    assert_history(trainer, replay, FLOAT32, row_of_id, keys=KEYS)


def test_rows_of_one_document_each_that_a_collator_joins(tmp_path):
    rows = text_rows(8)
    trainer, replay = prepare(
        tmp_path,
        "llama",
        two_groups(SGD),
        trainer_class=DocumentRecorder,
        rows=rows,
        train_dataset=dataset([{**row, "document_id": [i] * len(row["labels"])} for i, row in enumerate(rows)]),
        data_collator=DataCollatorWithFlattening(),
        validation_rows=short_rows(5),
        value_unit="document",
        max_steps=2,
    )
    trainer.train()
    assert_history(trainer, replay, FLOAT32, {(i, i): i for i in range(8)}, keys=KEYS)


def test_a_collator_that_joins_rows_of_several_documents_is_refused(tmp_path):
    """It numbers the positions of each row through."""
    with pytest.raises(ValueError, match="position_ids do not begin again"):
        make(tmp_path, data_collator=DataCollatorWithFlattening()).train()


def make(folder, *, model=None, rows=None, **settings):
    collator = settings.pop("data_collator", default_data_collator)
    return ShapleyTrainer(
        build("gpt2") if model is None else model,
        config(folder, **{"value_unit": "document", "gradient_accumulation_steps": 1, "max_steps": 3, **settings}),
        train_dataset=dataset(packed_rows(pieces())) if rows is None else rows,
        validation_dataset={"a": short_rows(4), "b": short_rows(9)[5:]},
        data_collator=collator,
    )


@pytest.mark.parametrize("order", ["first", "path", "owen"])
def test_a_samples_value_is_the_sum_of_its_documents(tmp_path, order):
    """With dropout, whose masks are the same, since "project" leaves training as it is."""
    settings = {"optim": "adamw_torch", "value_kernel": "project", **ORDERS[order]}
    tables = {}
    for unit in ("sample", "document"):
        trainer = make(tmp_path / unit, model=build("gpt2", dropout=0.1), value_unit=unit, **settings)
        trainer.train()
        tables[unit] = trainer.value_history().to_pandas().groupby(["step", "sample_id"]).sum()
    columns = ["tokens", "value_a", "value_b"]
    assert len(tables["document"]) == len(tables["sample"]) == 6
    if order == "owen":
        # The smoothed slope is that of the game among the units: documents are other players than samples.
        columns = ["tokens"]
    scale = tables["sample"].abs().max()
    difference = (tables["document"] - tables["sample"]).abs().max() / scale
    assert difference[columns].max() < FLOAT32


def test_values_tell_a_documents_pieces_apart(tmp_path):
    trainer = make(tmp_path)
    trainer.train()
    values = trainer.values()
    assert values.column_names[:4] == ["sample_id", "document_id", "updates", "tokens"]
    seen = list(zip(values["sample_id"], values["document_id"], strict=True))
    assert seen == sorted((row, document) for row, documents in enumerate(ROWS) for document in documents)
    assert set(values["updates"]) == {1}


def test_a_stream_of_packed_rows(tmp_path):
    rows = dataset(packed_rows(pieces()), ids=range(6)).to_iterable_dataset(num_shards=2)
    tables = []
    for name, train in (("stream", rows), ("rows", list(rows))):
        trainer = make(tmp_path / name, rows=train, train_sampling_strategy="sequential")
        trainer.train()
        tables.append(trainer.values()[:])
    assert tables[0] == tables[1]


def changed(**columns):
    """Packed rows with other columns; a column that becomes None is missing."""
    rows = [{**row, **{name: change(row) for name, change in columns.items()}} for row in packed_rows(pieces())]
    return dataset([{name: value for name, value in row.items() if value is not None} for row in rows])


@pytest.mark.parametrize(
    ("columns", "fault"),
    [
        ({"document_id": lambda row: None}, "no column 'document_id'.*pack_documents"),
        ({"document_id": lambda row: [float(i) for i in row["document_id"]]}, "not a list of integers"),
        ({"document_id": lambda row: [i - 2 for i in row["document_id"]]}, "not a list of integers"),
        ({"document_id": lambda row: row["document_id"][1:]}, "one for each token.*pack_documents"),
        ({"position_ids": lambda row: None}, "position_ids do not begin again.*pack_documents"),
        ({"position_ids": lambda row: list(range(24))}, "position_ids do not begin again"),
        ({"labels": lambda row: row["input_ids"]}, "first token of a document is labelled.*-100"),
        ({"attention_mask": lambda row: [1] * 24}, "attention_mask.*default_data_collator"),
    ],
    ids=["no ids", "floats", "negative", "too few", "no positions", "one document", "labels", "mask"],
)
def test_rows_that_are_not_apart_are_refused(tmp_path, columns, fault):
    with pytest.raises(ValueError, match=fault):
        make(tmp_path, rows=changed(**columns)).train()


def test_a_collator_that_pads_is_refused(tmp_path):
    def pads(rows):
        batch = default_data_collator(rows)
        return {name: torch.nn.functional.pad(batch[name], (0, 1)) for name in ("input_ids", "labels")}

    with pytest.raises(ValueError, match=r"input_ids \[2, 25\] of rows with \[24, 24\] ids.*rows of one length"):
        make(tmp_path, data_collator=pads).train()


def test_a_cache_lets_documents_attend_to_each_other(tmp_path):
    with pytest.raises(ValueError, match="attend to each other in this model.*use_cache=False.*value_kernel='jvp'"):
        make(tmp_path, use_cache=True)


def test_compilation_and_dispatching_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="torch_compile with value_unit='document'"):
        make(tmp_path, torch_compile=True, torch_compile_backend="eager")
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda self: 2))
    with pytest.raises(ValueError, match="value_unit='document'.*dispatch_batches"):
        make(tmp_path, accelerator_config={"dispatch_batches": True})


def test_a_row_of_padding_alone_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not a list of integers"):
        make(tmp_path, rows=changed(document_id=lambda row: [-1] * 24)).train()


class SwitchesCacheOn(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        model.config.use_cache = True


def test_a_cache_that_is_turned_on_later(tmp_path):
    trainer = make(tmp_path)
    trainer.add_callback(SwitchesCacheOn())
    with pytest.raises(ValueError, match="use_cache was set while training.*use_cache=False"):
        trainer.train()
    assert trainer.state.global_step == 1


def test_validation_documents_that_a_mask_joins_are_refused(tmp_path):
    rows = [
        {**row, "attention_mask": [1] * 5, "position_ids": [0, 1, 0, 1, 2], "labels": [IGNORED, *row["labels"][1:]]}
        for row in short_rows(3)
    ]
    arguments = {"train_dataset": dataset(packed_rows(pieces())), "data_collator": default_data_collator}
    with pytest.raises(ValueError, match="validation rows hold documents.*attention_mask.*drop the column"):
        ShapleyTrainer(
            build("gpt2"), config(tmp_path, value_unit="document"), validation_dataset=dataset(rows), **arguments
        )
    whole = [{**row, "position_ids": [0, 1, 2, 3, 4]} for row in rows]
    ShapleyTrainer(
        build("gpt2"), config(tmp_path, value_unit="document"), validation_dataset=dataset(whole), **arguments
    )
