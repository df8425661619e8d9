"""In-run values by `Partition`: a label is the one of the row, or document, that was parted, whatever its id is."""

import tempfile
from pathlib import Path
from random import Random

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from ledger_rows import expected, random_visits, told, write_ledger
from models import build, dataset, text_rows
from packed_documents import ROWS, packed_rows, pieces, short_rows
from prepared import config
from test_ledger import trained
from transformers import default_data_collator

from hf_datashapley import Partition, ShapleyTrainer, load_values


SAMPLES, DOCUMENTS = 50, 6  # of `random_visits`


def parted(random, ids):
    """A label for each, and the group that each id is in."""
    partition = Partition.from_labels([random.choice("abc") for _ in ids])
    return partition, {own: partition.names[label] for own, label in zip(ids, partition.labels, strict=True)}


def packed_ids(random):
    """The documents of each token of some rows, and the order in which documents first appear."""
    rows = [[random.randrange(-1, DOCUMENTS) for _ in range(6)] for _ in range(5)] + [list(range(DOCUMENTS))]
    order = []
    for row in rows:
        order += [own for own in dict.fromkeys(row) if own >= 0 and own not in order]
    return Dataset.from_dict({"document_id": rows}), order


@settings(max_examples=25, deadline=None)
@given(st.randoms(use_true_random=False))
def test_sums_over_groups(random):
    """In fractions: of samples known by a column, or by number, and of documents in packed rows."""
    visits = random_visits(random)
    ids = random.sample(range(SAMPLES), k=SAMPLES)
    rows, (packed, documents) = Dataset.from_dict({"sample_id": ids}), packed_ids(random)
    with tempfile.TemporaryDirectory() as folder:
        write_ledger(Path(folder), visits, "document", [""])

        def summed(by, **arguments):
            return told(load_values(folder, by=by, **arguments), ["group"])

        partition, group_of = parted(random, ids)
        assert summed(partition, dataset=rows, key="sample_id") == expected(visits, lambda i, d, p: i, group_of.get)
        partition, group_of = parted(random, range(SAMPLES))
        by_number = expected(visits, lambda i, d, p: i, group_of.get)
        assert summed(partition, key="sample_id") == by_number
        assert summed(partition, dataset=Dataset.from_dict({"x": ids}), key="sample_id") == by_number
        partition, group_of = parted(random, documents)
        assert summed(partition, dataset=packed) == expected(visits, lambda i, d, p: d, group_of.get)

        everything = expected(visits, lambda i, d, p: d, lambda d: "all")
        assert summed(Partition.from_labels(["all"] * DOCUMENTS), dataset=packed) == everything
        # Each by itself: groups are called by their numbers, in the order in which documents first appear.
        alone = summed(Partition(np.arange(DOCUMENTS), DOCUMENTS), dataset=packed)
        own = told(load_values(folder, by="document_id"), ["document_id"])
        assert {documents[group]: row for group, row in alone.items()} == own


@pytest.mark.parametrize("column", [None, "sample_id", "uid"])
def test_a_trainers_samples(tmp_path, column):
    rows = dataset(text_rows(8)).add_column("source", list("abcaabca"))
    train = rows if column is None else rows.add_column(column, list(range(107, 99, -1)))
    trainer = trained(tmp_path, train_dataset=train, sample_id_column=column or "sample_id")
    trainer.train()
    partition = Partition.from_column(train, "source")
    found = trainer.values(by=partition, from_step=2)
    by_column = trainer.values(by="source", from_step=2)
    assert found["group"][:] == ["a", "b", "c"] and sum(found["updates"]) == 8
    for name in ("samples", "updates", "value"):
        assert found[name][:] == by_column[name][:]
    given = {} if column is None else {"dataset": train, "id_column": column}
    assert load_values(trainer.value_dir, 2, by=partition, **given)[:] == found[:]
    assert trainer.values(2, by=partition, dataset=train, id_column=column)[:] == found[:]
    with pytest.raises(ValueError, match="by is a partition of 2, and the dataset has 8 samples: give the"):
        trainer.values(by=Partition.from_labels([0, 1]))


def test_a_trainers_tokens(tmp_path):
    """Rows without documents are parted as samples."""
    rows = dataset(text_rows(8)).add_column("source", list("abcaabca"))
    trainer = trained(tmp_path, train_dataset=rows, value_unit="token")
    trainer.train()
    found = trainer.values(by=Partition.from_column(rows, "source"))
    assert found["value"][:] == trainer.values(by="source")["value"][:] and found["samples"][:] == [4, 2, 2]


def test_a_trainers_documents(tmp_path):
    """Whose ids are not in the order in which they lie; document 3 lies in two rows."""
    train = dataset(packed_rows(pieces(ragged_labels=False)), ids=range(100, 100 + len(ROWS)))
    trainer = ShapleyTrainer(
        build("gpt2"),
        config(tmp_path, value_unit="document", gradient_accumulation_steps=1, max_steps=3),
        train_dataset=train,
        validation_dataset=dataset(short_rows(4)),
        data_collator=default_data_collator,
    )
    trainer.train()
    own = trainer.values(by="document_id")
    order = list(dict.fromkeys(document for row in ROWS for document in row))
    odd = Partition.from_labels([document % 2 for document in order])
    found = trainer.values(by=odd)
    assert found["group"][:] == ["0", "1"] and found["documents"][:] == [7, 6]
    for group, value in enumerate(found["value"]):
        members = [v for v, document in zip(own["value"], own["document_id"], strict=True) if document % 2 == group]
        assert value == pytest.approx(sum(members), rel=1e-12)
    assert load_values(trainer.value_dir, by=odd, dataset=train)[:] == found[:]
    # Of the corpus that was packed, a row for each document.
    corpus = Dataset.from_dict({"document_id": sorted(order)})
    by_id = Partition.from_labels([document % 2 for document in sorted(order)])
    assert load_values(trainer.value_dir, by=by_id, dataset=corpus)[:] == found[:]
    assert trainer.values(by=Partition.of_documents(train, by_id))[:] == found[:]
    # Of its rows.
    rows = Partition.from_labels(list("aabbab"))
    by_row = trainer.values(by=rows, key="sample_id")
    assert by_row["samples"][:] == [3, 3]
    assert sum(by_row["value"]) == pytest.approx(sum(own["value"]), rel=1e-12)
    for arguments, message in (
        ({"by": rows}, "by is a partition of 6, and the dataset has 13 documents.*`key` for what it holds"),
        ({"by": odd, "key": "sample_id"}, "by is a partition of 13, and the dataset has 6 samples"),
        ({"by": odd, "key": "position"}, "key='position'"),
        ({"by": odd, "dataset": [{}]}, "by is a partition, and a list has no columns.*mapping"),
        ({"by": odd, "dataset": train.rename_column("labels", "x"), "id_column": "y"}, "id_column='y' is no column"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer.values(**arguments)
    with pytest.raises(ValueError, match="groups of documents need `dataset`.*key='sample_id'"):
        load_values(trainer.value_dir, by=odd)


def test_ids_that_are_none(tmp_path):
    write_ledger(tmp_path, [], "sample", [""])
    partition = Partition.from_labels([0, 1])
    for ids in (["a", "b"], [0, None], [0.0, 1.0]):
        with pytest.raises(ValueError, match="by is a partition, and the dataset's column 'sample_id' is not int"):
            load_values(tmp_path, by=partition, dataset=Dataset.from_dict({"sample_id": ids}))


def test_a_partition_that_is_too_short(tmp_path):
    write_ledger(tmp_path, random_visits(Random(0)), "sample", [""])
    with pytest.raises(ValueError, match="samples with values have no group in 'group'"):
        load_values(tmp_path, by=Partition.from_labels([0, 1]))
