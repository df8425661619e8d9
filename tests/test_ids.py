"""Ids find their rows again: each row has its own number of loss tokens, which `values()` shows next to the id."""

import pytest
import torch
from datasets import Dataset
from models import build, collate
from transformers import BatchEncoding

from hf_datashapley import ShapleyConfig, ShapleyTrainer


COUNT = 9
IDS = [700, 3, 41, 0, 2**63 - 1, 12, 5, 88, 2**53 + 1]


def token_rows():
    """Row k has k + 1 loss tokens: k + 2 tokens, of which the first predicts and is not predicted."""
    return [{"input_ids": list(range(2, 4 + k)), "labels": list(range(2, 4 + k))} for k in range(COUNT)]


def with_ids(rows, ids=IDS, column="sample_id"):
    return [{**row, column: sample_id} for row, sample_id in zip(rows, ids, strict=True)]


class TorchRows(torch.utils.data.Dataset):
    """A map-style dataset of a user's own, which knows nothing but an index."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def trainer_for(
    folder, train_dataset, data_collator=collate, validation_rows=None, trainer_class=ShapleyTrainer, **settings
):
    return trainer_class(
        model=build("gpt2"),
        args=ShapleyConfig(
            output_dir=str(folder),
            **{
                "per_device_train_batch_size": 2,
                "num_train_epochs": 2,
                "save_strategy": "no",
                "report_to": "none",
                "disable_tqdm": True,
                "use_cpu": True,
                **settings,
            },
        ),
        train_dataset=train_dataset,
        validation_dataset=Dataset.from_list(validation_rows or token_rows()[:3]),
        data_collator=data_collator,
    )


def tokens_by_id(trainer):
    """Loss tokens per visit of each sample id, after two epochs in which every row was visited twice."""
    trainer.train()
    values = trainer.values()
    assert values["updates"] == [2] * len(values)
    return {row["sample_id"]: row["tokens"] / 2 for row in values}


ROW_INDEX = {k: k + 1 for k in range(COUNT)}
ID_COLUMN = {sample_id: k + 1 for k, sample_id in enumerate(IDS)}
CONTAINERS = {"datasets": Dataset.from_list, "list": list, "torch": TorchRows}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("remove_unused_columns", [True, False])
@pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS)
def test_id_column_survives_to_the_table(tmp_path, container, remove_unused_columns, workers):
    """Shuffled, two epochs, a collator that drops unknown keys."""
    trainer = trainer_for(
        tmp_path,
        container(with_ids(token_rows())),
        remove_unused_columns=remove_unused_columns,
        dataloader_num_workers=workers,
    )
    assert tokens_by_id(trainer) == ID_COLUMN


@pytest.mark.parametrize("remove_unused_columns", [True, False])
@pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS)
def test_without_a_column_the_row_index_is_the_id(tmp_path, container, remove_unused_columns):
    trainer = trainer_for(tmp_path, container(token_rows()), remove_unused_columns=remove_unused_columns)
    assert tokens_by_id(trainer) == ROW_INDEX


def test_the_order_of_training_was_not_that_of_the_rows(tmp_path):
    """Else the tests of this file would prove little."""
    trainer = trainer_for(tmp_path, Dataset.from_list(token_rows()))
    trainer.train()
    assert trainer.value_history()["sample_id"] != [*range(COUNT), *range(COUNT)]


def test_another_column_by_name(tmp_path):
    rows = with_ids(with_ids(token_rows()), ids=range(50, 50 + COUNT), column="document")
    trainer = trainer_for(tmp_path, Dataset.from_list(rows), sample_id_column="document")
    assert tokens_by_id(trainer) == {50 + k: k + 1 for k in range(COUNT)}


def test_a_collator_that_keeps_unknown_keys_never_hands_an_id_to_the_model(tmp_path):
    """With remove_unused_columns=False the id would flow into `forward`, from training and from validation rows."""

    def keeping(rows):
        kept = [key for key in rows[0] if key not in ("input_ids", "labels")]
        return {**collate(rows), **{key: torch.tensor([row[key] for row in rows]) for key in kept}}

    received = []

    class Listening(ShapleyTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            received.append(set(inputs))
            return super().compute_loss(model, inputs, *args, **kwargs)

    trainer = trainer_for(
        tmp_path,
        Dataset.from_list(with_ids(token_rows())),
        data_collator=keeping,
        validation_rows=with_ids(token_rows()[:3], IDS[:3]),
        trainer_class=Listening,
        remove_unused_columns=False,
    )
    assert tokens_by_id(trainer) == ID_COLUMN
    assert all(keys == {"input_ids", "attention_mask", "labels"} for keys in received)


def test_other_columns_still_reach_the_collator(tmp_path):
    """Labels that only the collator makes, from a column that the model does not know."""
    rows = [{"input_ids": row["input_ids"], "targets": row["labels"]} for row in token_rows()]

    def naming(rows):
        labels = [row.get("targets", row.get("labels")) for row in rows]
        return collate([{**row, "labels": label} for row, label in zip(rows, labels, strict=True)])

    trainer = trainer_for(
        tmp_path, Dataset.from_list(with_ids(rows)), data_collator=naming, remove_unused_columns=False
    )
    assert tokens_by_id(trainer) == ID_COLUMN


@pytest.mark.parametrize("ids", [None, IDS], ids=["row index", "column"])
def test_a_transform_that_drops_the_id(tmp_path, ids):
    """`set_transform` makes rows on the fly, and this one returns only what the model needs."""

    def tokenize(batch):
        tokens = [[int(word) for word in text.split()] for text in batch["text"]]
        return {"input_ids": tokens, "labels": tokens}

    table = Dataset.from_dict({"text": [" ".join(map(str, row["input_ids"])) for row in token_rows()]})
    if ids is not None:
        table = table.add_column("sample_id", ids)
    table.set_transform(tokenize)
    trainer = trainer_for(tmp_path, table, remove_unused_columns=False)
    assert tokens_by_id(trainer) == (ROW_INDEX if ids is None else ID_COLUMN)


def test_selected_and_shuffled_datasets(tmp_path):
    """`select` keeps an index map below the dataset; ids are those of the chosen rows, indices count among them."""
    chosen = [7, 2, 5, 4]
    table = Dataset.from_list(with_ids(token_rows()))
    trainer = trainer_for(tmp_path / "ids", table.select(chosen))
    assert tokens_by_id(trainer) == {IDS[k]: k + 1 for k in chosen}
    trainer = trainer_for(tmp_path / "indices", table.remove_columns("sample_id").select(chosen))
    assert tokens_by_id(trainer) == {index: k + 1 for index, k in enumerate(chosen)}
    trainer = trainer_for(tmp_path / "shuffled", table.shuffle(seed=1))
    assert tokens_by_id(trainer) == ID_COLUMN


def test_torch_format(tmp_path):
    trainer = trainer_for(
        tmp_path,
        Dataset.from_list(with_ids(token_rows())).with_format("torch"),
        data_collator=lambda rows: collate(
            [{key: torch.as_tensor(row[key]).tolist() for key in ("input_ids", "labels")} for row in rows]
        ),
    )
    assert tokens_by_id(trainer) == ID_COLUMN


def test_rows_that_are_mappings_but_no_dicts(tmp_path):
    """A tokenizer's `BatchEncoding` is what many map-style datasets hand out."""
    rows = [BatchEncoding(row) for row in with_ids(token_rows())]
    assert tokens_by_id(trainer_for(tmp_path, TorchRows(rows))) == ID_COLUMN


def test_ids_of_a_narrow_integer_column(tmp_path):
    table = Dataset.from_list(token_rows()).add_column("sample_id", torch.arange(COUNT, dtype=torch.int16).numpy())
    assert tokens_by_id(trainer_for(tmp_path, table)) == ROW_INDEX


BAD_IDS = {
    "duplicates": ([4, 1, 2, 4, 5, 2, 6, 7, 8], ("4", "2")),
    "negative": ([0, 1, 2, -3, 4, 5, -6, 7, 8], ("-3", "-6")),
    "null": ([0, 1, None, 3, 4, 5, 6, None, 8], ("row 2", "row 7")),
    "strings": ([f"id-{k}" for k in range(9)], ("id-0", "id-1")),
    "fractions": ([k + 0.5 for k in range(9)], ("0.5", "1.5")),
    "booleans": ([True, False] * 4 + [True], ("True", "False")),
}


@pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS)
@pytest.mark.parametrize(("ids", "offenders"), BAD_IDS.values(), ids=BAD_IDS)
def test_bad_ids_are_refused_with_the_first_offenders(tmp_path, ids, offenders, container):
    with pytest.raises(ValueError, match="sample_id") as refusal:
        trainer_for(tmp_path, container(with_ids(token_rows(), ids)))
    for offender in offenders:
        assert offender in str(refusal.value)


def test_a_row_that_lacks_the_column_is_refused(tmp_path):
    """In a list of dicts the column may be there for some rows only."""
    rows = with_ids(token_rows())
    del rows[4]["sample_id"]
    with pytest.raises(ValueError, match="row 4"):
        trainer_for(tmp_path, rows)
    rows = token_rows()
    rows[4]["sample_id"] = 7
    with pytest.raises(ValueError, match="row 0"):
        trainer_for(tmp_path, rows)
