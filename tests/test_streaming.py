"""Streams, several workers, dispatched batches: each visit of a sample is in the ledger, under the sample's id."""

import weakref
from collections import Counter

import pytest
import torch
from datasets import Dataset, IterableDataset
from models import build, collate, dataset, text_rows
from oracles import language_model
from prepared import config, prepare, two_groups
from recorder import assert_history, history_of
from test_resume import Interrupt, tables
from torch.optim import SGD
from transformers import Trainer

from hf_datashapley import ShapleyTrainer, load_updates


FLOAT32 = 1e-5
ROWS = 11
# Not the rows' numbers, so that one cannot pass for the other; nor small.
IDS = [2**60 + 7 * k for k in range(ROWS)]
ROW_OF_ID = {sample_id: row for row, sample_id in enumerate(IDS)}
ORDERS = {
    "first": {"value_order": "first"},
    "stash": {"value_order": "path", "second_pass": "stash"},
    "replay": {"value_order": "path", "second_pass": "replay"},
}


class TorchStream(torch.utils.data.IterableDataset):
    """A user's own, which shares its rows out among workers by itself."""

    def __init__(self, rows):
        self.rows = rows
        self.begun = 0

    def __iter__(self):
        self.begun += 1
        worker = torch.utils.data.get_worker_info()
        return iter(self.rows if worker is None else self.rows[worker.id :: worker.num_workers])


def with_ids(rows, ids=IDS):
    return [{**row, "sample_id": sample_id} for row, sample_id in zip(rows, ids, strict=True)]


def sharded(rows):
    """Shuffled anew in each epoch, and of three shards, which two workers share."""
    return Dataset.from_list(with_ids(rows)).to_iterable_dataset(num_shards=3).shuffle(seed=3, buffer_size=4)


def generated(rows):
    """Without known columns."""

    def of_shards(shards):
        for shard in shards:
            yield from with_ids(rows)[shard::3]

    return IterableDataset.from_generator(of_shards, gen_kwargs={"shards": [0, 1, 2]})


STREAMS = {
    "sharded": sharded,
    "generated": generated,
    "torch format": lambda rows: sharded(rows).with_format("torch"),
    "torch": lambda rows: TorchStream(with_ids(rows)),
}


def collate_any(rows):
    return collate([{key: torch.as_tensor(row[key]).tolist() for key in ("input_ids", "labels")} for row in rows])


def streamed(folder, stream, model_name="gpt2", ragged_labels=True, **settings):
    """11 rows as 6 micro-batches in windows of 4: the first ends with a row alone, and the second spans two epochs."""
    rows = text_rows(ROWS, ragged_labels=ragged_labels)
    return prepare(
        folder,
        model_name,
        two_groups(SGD, momentum=0.9),
        rows=rows,
        train_dataset=stream(rows),
        data_collator=collate_any,
        **{"gradient_accumulation_steps": 4, "max_steps": 4, **settings},
    )


def assert_every_visit(trainer):
    """As often as the oracle's recorder saw a row, by update. Returns the visits of each row."""
    visits = Counter()
    for step, rows in history_of(trainer).items():
        seen = Counter()
        for micro_batch in trainer.updates[step - 1].micro_batches:
            inputs = zip(micro_batch.inputs["input_ids"], micro_batch.inputs["attention_mask"], strict=True)
            seen.update(tuple(tokens[mask.bool()].tolist()) for tokens, mask in inputs)
        index = {tuple(row["input_ids"]): IDS[k] for k, row in enumerate(text_rows(ROWS))}
        assert {row["sample_id"]: row["updates"] for row in rows} == {index[tokens]: n for tokens, n in seen.items()}
        visits.update({index[tokens]: n for tokens, n in seen.items()})
    return visits


@pytest.mark.parametrize(
    ("stream", "order"),
    [
        ("sharded", "first"),
        ("sharded", "stash"),
        ("sharded", "replay"),
        ("generated", "first"),
        ("torch format", "first"),
        ("torch", "first"),
        ("torch", "replay"),
    ],
)
def test_streams(tmp_path, stream, order):
    """Through three ends of the stream, each in the midst of an update."""
    trainer, replay = streamed(tmp_path, STREAMS[stream], **ORDERS[order])
    trainer.train()
    assert [len(update.micro_batches) for update in trainer.updates] == [4, 6, 6, 6]
    assert_history(trainer, replay, FLOAT32, ROW_OF_ID)
    visits = assert_every_visit(trainer)
    assert set(visits) == set(IDS) and max(visits.values()) >= 3


@pytest.mark.parametrize("order", [ORDERS["first"], ORDERS["replay"]], ids=["first", "replay"])
def test_a_loss_that_is_divided_by_the_window(tmp_path, order):
    """A model that is not told `num_items`: Trainer divides by the micro-batches it fetched, 2 at the stream's end."""
    trainer, replay = streamed(tmp_path, sharded, "gpt2-plain-mean", ragged_labels=False, **order)
    assert replay.row_losses is language_model
    trainer.train()
    assert [micro_batch.window for micro_batch in trainer.updates[1].micro_batches] == [2, 2, 4, 4, 4, 4]
    assert_history(trainer, replay, FLOAT32, ROW_OF_ID)


LOADERS = {
    "workers": {"dataloader_num_workers": 2},
    "persistent workers": {
        "dataloader_num_workers": 2,
        "dataloader_persistent_workers": True,
        "dataloader_pin_memory": False,
    },
    "dispatched": {"accelerator_config": {"dispatch_batches": True}},
    "not dispatched": {"accelerator_config": {"dispatch_batches": False, "even_batches": False}},
    "split": {"accelerator_config": {"split_batches": True}},
    "dispatched, split, workers": {
        "accelerator_config": {"dispatch_batches": True, "split_batches": True},
        "dataloader_num_workers": 2,
    },
    "columns kept": {"dataloader_num_workers": 2, "remove_unused_columns": False},
}
CONTAINERS = {
    "sharded": sharded,
    "torch": STREAMS["torch"],
    "map-style": lambda rows: dataset(rows, IDS),
}


@pytest.mark.parametrize(
    ("container", "loader"),
    [
        *[("sharded", loader) for loader in LOADERS],
        *[("map-style", loader) for loader in LOADERS if loader != "columns kept"],
        ("torch", "workers"),
        ("torch", "dispatched"),
    ],
)
def test_loaders(tmp_path, container, loader):
    settings = {"gradient_accumulation_steps": 2, "max_steps": 5, **LOADERS[loader]}
    trainer, replay = streamed(tmp_path, CONTAINERS[container], **settings)
    trainer.train()
    assert_history(trainer, replay, FLOAT32, ROW_OF_ID)
    visits = assert_every_visit(trainer)
    assert set(visits) == set(IDS) and sum(visits.values()) > ROWS


@pytest.mark.parametrize("kernel", ["project", "fused"])
def test_training_is_that_of_plain_trainer(tmp_path, kernel):
    """The same rows in the same order, two workers, and bit for bit the same weights with "project"."""
    runs = []
    for trainer_class in (Trainer, ShapleyTrainer):
        values = {"validation_dataset": dataset(text_rows(4, seed=9))} if trainer_class is ShapleyTrainer else {}
        trainer = trainer_class(
            build("gpt2", dropout=0.1),
            config(
                tmp_path / trainer_class.__name__,
                value_kernel=kernel,
                optim="sgd",
                max_steps=7,
                dataloader_num_workers=2,
            ),
            train_dataset=sharded(text_rows(ROWS)),
            data_collator=collate,
            **values,
        )
        trainer.train()
        runs.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    if kernel == "project":
        assert torch.equal(*runs)
    else:
        torch.testing.assert_close(*runs, rtol=0, atol=1e-6)


def stored(folder, stream, **settings):
    """6 updates, a checkpoint every 2, dropout: all within the stream's first pass of 40 rows."""
    return ShapleyTrainer(
        build("gpt2", dropout=0.1),
        config(
            folder,
            max_steps=6,
            gradient_accumulation_steps=2,
            save_strategy="steps",
            save_steps=2,
            value_kernel="project",
            **settings,
        ),
        train_dataset=stream,
        validation_dataset={"a": dataset(text_rows(5, seed=8)), "b": dataset(text_rows(4, seed=9))},
        data_collator=collate,
    )


def long_stream(kind):
    rows = with_ids(text_rows(40), range(500, 540))
    if kind == "torch":
        return TorchStream(rows)
    return Dataset.from_list(rows).to_iterable_dataset(num_shards=4).shuffle(seed=1, buffer_size=8)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("datasets", {"dataloader_num_workers": 2}), ("torch", {"value_order": "path"})],
    ids=["datasets", "torch"],
)
def test_a_stream_goes_on_from_a_checkpoint(tmp_path, kind, settings):
    stored(tmp_path / "whole", long_stream(kind), **settings).train()
    broken = stored(tmp_path / "broken", long_stream(kind), **settings)
    broken.add_callback(Interrupt(5))
    with pytest.raises(KeyboardInterrupt) as interruption:
        broken.train()
    interruption.value.__traceback__ = None
    del interruption  # as in `refused`
    assert len(load_updates(tmp_path / "broken" / "values")) == 5
    stored(tmp_path / "broken", long_stream(kind), **settings).train(resume_from_checkpoint=True)
    assert tables(tmp_path / "broken") == tables(tmp_path / "whole")
    assert len(load_updates(tmp_path / "whole" / "values")) == 6


def refused(folder, stream, **settings):
    """The message, at construction or else in `train`; nothing was trained and no ledger is there."""
    model, trainer = build("llama"), None
    weights = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match="sample_id") as error:
        trainer = ShapleyTrainer(
            model,
            config(folder, max_steps=2, **settings),
            train_dataset=stream,
            validation_dataset=text_rows(3, seed=9),
            data_collator=collate,
        )
        trainer.train()
    assert all(torch.equal(weight, old) for weight, old in zip(model.parameters(), weights, strict=True))
    assert not list((folder / "values").glob("*"))
    message = str(error.value)
    error.value.__traceback__ = None
    del error  # and with it a cycle through the loader, whose workers torch would wait 5 seconds for, one by one
    return message


@pytest.mark.parametrize("remove_unused_columns", [True, False])
@pytest.mark.parametrize(
    "stream",
    [
        lambda rows: Dataset.from_list(rows).to_iterable_dataset(),
        lambda rows: Dataset.from_list(rows).to_iterable_dataset().map(lambda row: row),  # columns unknown
        lambda rows: IterableDataset.from_generator(lambda: iter(rows)),
        TorchStream,
        lambda rows: TorchStream([tuple(row.values()) for row in rows]),
    ],
    ids=["columns", "mapped", "generated", "torch", "torch tuples"],
)
def test_a_stream_without_ids(tmp_path, stream, remove_unused_columns):
    message = refused(tmp_path, stream(text_rows(4)), remove_unused_columns=remove_unused_columns)
    for part in ("no column 'sample_id' (`sample_id_column`)", "add_column('sample_id'", "not by map(...,"):
        assert part in message


def test_a_stream_without_ids_is_not_begun(tmp_path):
    """It may be one that can be read once: nothing but the loader reads it."""
    stream = TorchStream(with_ids(text_rows(ROWS)))
    trainer = ShapleyTrainer(
        build("llama"),
        config(tmp_path, max_steps=1),
        train_dataset=stream,
        validation_dataset=text_rows(3, seed=9),
        data_collator=collate,
    )
    assert stream.begun == 0
    trainer.train()
    assert stream.begun == 1


BAD_IDS = {
    "null": (None, "is None"),
    "negative": (-3, "is -3"),
    "string": ("7", "is '7'"),
    "fraction": (1.0, "is 1.0"),
    "boolean": (True, "is True"),
    "too large": (2**63, f"is {2**63}"),
    "torch fraction": (torch.tensor(1.5), "1.5"),
}


@pytest.mark.parametrize(("value", "shown"), BAD_IDS.values(), ids=BAD_IDS)
def test_ids_that_are_none(tmp_path, value, shown):
    message = refused(tmp_path, TorchStream(with_ids(text_rows(4), [1, value, 2, 3])))
    assert shown in message and "not an integer from 0 to 2**63 - 1: give each row an integer" in message


def test_an_id_that_a_worker_finds_to_be_none(tmp_path):
    rows = with_ids(text_rows(4), [1, 2, -3, 3])
    assert "sample_id of a row is -3" in refused(tmp_path, TorchStream(rows), dataloader_num_workers=1)


def test_a_column_of_another_type_is_refused_at_construction(tmp_path):
    stream = Dataset.from_list(with_ids(text_rows(4), "abcd")).to_iterable_dataset()
    with pytest.raises(ValueError, match="sample_id of a row is 'a', not an integer"):
        ShapleyTrainer(
            build("llama"),
            config(tmp_path, max_steps=1),
            train_dataset=stream,
            validation_dataset=text_rows(3, seed=9),
            data_collator=collate,
        )


def test_an_empty_stream(tmp_path):
    stream = IterableDataset.from_generator(lambda: iter([]))
    with pytest.raises(ValueError, match="train_dataset is empty"):
        ShapleyTrainer(build("llama"), config(tmp_path, max_steps=1), train_dataset=stream, data_collator=collate)


def test_the_cure_works(tmp_path):
    """As the message writes it."""
    table = Dataset.from_list(text_rows(ROWS))
    table = table.add_column("sample_id", range(len(table)))
    trainer, replay = streamed(
        tmp_path, lambda rows: table.to_iterable_dataset(num_shards=3), max_steps=3, dataloader_num_workers=2
    )
    trainer.train()
    assert_history(trainer, replay, FLOAT32)


def test_numbers_made_by_map_are_not_the_rows_own():
    """What the message warns of. When this fails, the warning can go."""
    stream = Dataset.from_list(text_rows(ROWS)).to_iterable_dataset(num_shards=3)
    numbered = stream.map(lambda row, index: {"sample_id": index}, with_indices=True)
    loader = torch.utils.data.DataLoader(numbered, num_workers=2, batch_size=None)
    ids = [row["sample_id"] for row in loader]
    assert len(ids) == ROWS > len(set(ids))


def test_a_trainer_that_is_let_go_of_frees_its_model_and_its_workers_at_once(tmp_path):
    """As plain `Trainer`. In a cycle, persistent workers would wait for the garbage collector, and it for them."""
    trainer, _ = streamed(tmp_path, sharded, dataloader_num_workers=2, dataloader_persistent_workers=True, max_steps=1)
    trainer.train()
    model = weakref.ref(trainer.model)
    del trainer
    assert model() is None
