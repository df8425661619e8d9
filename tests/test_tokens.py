"""Every token's own value, and those of documents that attend to each other: by forward-mode derivatives."""

import pytest
import torch
from models import IGNORED, build, collate, dataset, rows_for, text_rows
from oracles import Float64, gradient, token_losses, trainable
from prepared import ORDERS, config, prepare, two_groups
from recorder import Recorder, Replay, assert_history
from torch.optim import SGD, AdamW
from transformers import default_data_collator

from hf_datashapley import ShapleyTrainer


FLOAT32 = 2e-5
FLOAT64 = 2e-6
CHOSEN = [0, 1, 2, 5, 7]  # row 2 has no label at all


class TokenReplay(Replay):
    """Each token of a chosen row, and every other row, by a backward pass of its own; known by (row, position)."""

    def _samples(self, micro_batch):
        inputs = {key: value for key, value in micro_batch.inputs.items() if key != "labels"}
        labels = micro_batch.inputs["labels"]
        self.model.train()
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(micro_batch.random_state)
            with Float64():
                losses = token_losses(self.model(**inputs).logits, labels) / micro_batch.num_items
        units = {}
        for row, own, label in zip(self._rows_of(inputs), losses, labels[:, 1:], strict=True):
            labelled = label.ne(IGNORED).nonzero().flatten().tolist()
            if row in CHOSEN and labelled:
                units |= {(row, place + 1): (1, own[place]) for place in labelled}
            else:
                units[row, -1] = (len(labelled), own.sum())
        return [(key, count, gradient(loss, trainable(self.model))) for key, (count, loss) in units.items()]


def prepare_tokens(folder, *arguments, **settings):
    trainer, replay = prepare(
        folder,
        *arguments,
        **{"value_unit": "token", "token_sample_ids": CHOSEN, "max_steps": 2, "num_train_epochs": 1, **settings},
    )
    return trainer, TokenReplay(**vars(replay))


@pytest.mark.parametrize(
    ("name", "attention", "order"),
    [
        ("gpt2", "sdpa", "first"),
        ("gpt2", "eager", "second"),
        ("neox", "sdpa", "path"),
        ("llama", "eager", "first"),
        ("gpt2-lora", "sdpa", "path"),
    ],
)
def test_values_are_those_of_the_tokens_own_losses(tmp_path, name, attention, order):
    """Padded rows, dropout, accumulation; two targets."""
    trainer, replay = prepare_tokens(
        tmp_path,
        name,
        two_groups(SGD, momentum=0.9) if order == "second" else two_groups(AdamW),
        dtype=torch.float64,
        attention=attention,
        dropout=0.1,
        targets=("a", "b"),
        **ORDERS[order],
    )
    with Float64():
        trainer.train()
    assert_history(trainer, replay, FLOAT64, keys=("sample_id", "position"))


def test_float32_with_recomputed_activations(tmp_path):
    trainer, replay = prepare_tokens(tmp_path, "gpt2", two_groups(SGD), gradient_checkpointing=True)
    trainer.train()
    assert_history(trainer, replay, FLOAT32, keys=("sample_id", "position"))


CROSSED = [[7, 7, 7, 3, 3, 9, 9, 9], [9, 9, 4, 4, 4, 4, 4, 4], [0, 0, 1, 1, 1, 1, 2, 2], [5, 5, 5, 5, 5, 5, 8, 6]]


def crossed_rows():
    """Documents of which each attends to those before it in the row, as text is packed for want of anything better."""
    texts = [row["input_ids"][:8] for row in text_rows(40, seed=4) if len(row["input_ids"]) >= 8]
    return [{"input_ids": text, "labels": text, "document_id": ids} for text, ids in zip(texts, CROSSED, strict=False)]


class DocumentReplay(Replay):
    """By (row, document): the losses of the document's own labels, wherever they look."""

    def _samples(self, micro_batch):
        tokens, labels = micro_batch.inputs["input_ids"], micro_batch.inputs["labels"]
        self.model.train()
        with Float64():
            losses = token_losses(self.model(input_ids=tokens).logits, labels) / micro_batch.num_items
        units = {}
        for row, own in zip(tokens.tolist(), losses, strict=True):
            number = [other["input_ids"] for other in self.rows].index(row)
            ids = torch.tensor(CROSSED[number])
            for document in dict.fromkeys(CROSSED[number]):
                mine = ids[1:] == document
                units[number, document] = (int(mine.sum()), own[mine].sum())
        return [(key, count, gradient(loss, trainable(self.model))) for key, (count, loss) in units.items()]


class RowRecorder(Recorder):
    def padded(self, inputs):
        return {key: inputs[key].clone() for key in ("input_ids", "labels")}


@pytest.mark.parametrize(("name", "order"), [("gpt2", "first"), ("llama", "path")])
def test_documents_that_attend_to_each_other(tmp_path, name, order):
    rows = crossed_rows()
    trainer, replay = prepare(
        tmp_path,
        name,
        two_groups(AdamW),
        dtype=torch.float64,
        trainer_class=RowRecorder,
        rows=rows,
        train_dataset=dataset(rows),
        data_collator=default_data_collator,
        validation_rows=[{key: row[key][:5] for key in row} for row in text_rows(5, seed=9)],
        value_unit="document",
        value_kernel="jvp",
        gradient_accumulation_steps=1,
        max_steps=2,
        **ORDERS[order],
    )
    with Float64():
        trainer.train()
    assert_history(trainer, DocumentReplay(**vars(replay)), FLOAT64, keys=("sample_id", "document_id"))


def make(folder, **settings):
    settings = {"gradient_accumulation_steps": 1, "max_steps": 3, "value_unit": "token", **settings}
    train = settings.pop("train_dataset", dataset(text_rows(12), ids=range(50, 62)))
    collator, dropout = settings.pop("data_collator", collate), settings.pop("dropout", 0.0)
    return ShapleyTrainer(
        build("gpt2", dropout=dropout),
        config(folder, **settings),
        train_dataset=train,
        validation_dataset=dataset(rows_for("gpt2", 4, seed=3)),
        data_collator=collator,
    )


def test_a_samples_value_is_the_sum_of_its_tokens(tmp_path):
    """Training is that of "project", bit for bit, and so are the dropout masks."""
    tables = {}
    for unit in ("sample", "token"):
        trainer = make(
            tmp_path / unit, value_unit=unit, value_kernel="project" if unit == "sample" else "auto", dropout=0.1
        )
        trainer.train()
        tables[unit] = trainer.values(by="sample_id").to_pandas().set_index("sample_id")
    assert (tables["token"]["tokens"] == tables["sample"]["tokens"]).all()
    assert (tables["token"]["updates"] == tables["sample"]["updates"]).all()
    difference = (tables["token"]["value"] - tables["sample"]["value"]).abs().max()
    assert difference < FLOAT32 * tables["sample"]["value"].abs().max()


def test_a_few_samples_have_rows_for_their_tokens(tmp_path):
    """So the ledger stays bounded; the same few for the same seed."""
    trainer, again = make(tmp_path / "a", token_samples=2), make(tmp_path / "b", token_samples=2)
    for each in (trainer, again):
        each.train()
    values = trainer.values().to_pandas()
    assert values.equals(again.values().to_pandas())
    positions = values.groupby("sample_id")["position"].agg(["min", "count"])
    assert (positions["min"] > 0).sum() <= 2
    assert (positions.loc[positions["min"] == -1, "count"] == 1).all()
    assert make(tmp_path / "c")._unit_plan.token_samples == set(range(50, 62))  # 1000 by default


def test_positions_are_those_in_the_sample(tmp_path):
    """Also where it is padded on the left."""

    def left(rows):
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        gaps = (lengths.max() - lengths).tolist()
        return {
            name: torch.stack([torch.roll(row, gap) for row, gap in zip(x, gaps, strict=True)])
            for name, x in collate(rows).items()
        }

    rows = [{**row, "labels": [IGNORED, *row["labels"][1:]]} for row in text_rows(12)]
    trainer = make(tmp_path, data_collator=left, train_dataset=dataset(rows), max_steps=6)
    trainer.train()
    for sample, row in enumerate(rows):
        labelled = [place for place, label in enumerate(row["labels"]) if label != IGNORED]
        assert [r["position"] for r in trainer.values() if r["sample_id"] == sample] == (labelled or [-1])


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"value_kernel": "fused"}, "value_unit='token' takes value_kernel='jvp'"),
        (
            {"value_unit": "sample", "value_kernel": "jvp"},
            "value_kernel='jvp' is for value_unit='document' or 'token'",
        ),
        ({"second_pass": "stash", "value_order": "path"}, "second_pass='stash'"),
        ({"value_order": "path", "path_slope": "owen"}, "path_slope='owen' needs the squares"),
        ({"token_samples": -1}, "token_samples=-1"),
        ({"token_sample_ids": [50, 99, 7]}, "no sample of train_dataset has the id 7, 99"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor.*label_smoothing_factor=0"),
        ({"torch_compile": True, "torch_compile_backend": "eager"}, "torch_compile"),
        ({"train_dataset": dataset(text_rows(8), ids=range(8)).to_iterable_dataset()}, "token_sample_ids"),
    ],
    ids=["kernel", "sample", "stash", "owen", "count", "ids", "smoothing", "compiled", "stream"],
)
def test_refused(tmp_path, settings, fault):
    with pytest.raises(ValueError, match=fault):
        make(tmp_path, **settings)


def test_a_classifier_has_no_tokens(tmp_path):
    rows = rows_for("gpt2-classifier", 6)
    with pytest.raises(ValueError, match="one for each row.*value_unit='sample'"):
        ShapleyTrainer(
            build("gpt2-classifier"),
            config(tmp_path, value_unit="token"),
            train_dataset=dataset(rows),
            validation_dataset=dataset(rows),
            data_collator=collate,
        )
