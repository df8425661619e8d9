"""`pack_documents` keeps every token, in its place, with its id, position and label, and says what it cannot do.

What rows have to be is written down once, as a loop over tokens.
"""

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from datasets.distributed import split_dataset_by_node
from hypothesis import given, settings
from hypothesis import strategies as st
from models import IGNORED, text_rows
from packed_documents import KEYS, DocumentRecorder, short_rows
from prepared import prepare, two_groups
from recorder import assert_history
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.optim import SGD
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast, default_data_collator
from transformers.utils import logging

from hf_datashapley import pack_documents
from hf_datashapley.documents import pack


PAD, EOS, BOS = 0, 1, 2
COLUMNS = ["sample_id", "input_ids", "labels", "position_ids", "document_id"]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """So that rows and documents reach over the batches that they are read and written in."""
    monkeypatch.setattr(pack, "READ_AT_ONCE", 3)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


def make_tokenizer(*, eos=True, pad=True, begins=False):
    """Word "w7" is token 7."""
    words = {"<pad>": PAD, "</s>": EOS, "<s>": BOS, **{f"w{i}": i for i in range(3, 61)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    names = {"eos_token": "</s>" if eos else None, "pad_token": "<pad>" if pad else None}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=8, **names)


def text(tokens):
    return None if tokens is None else " ".join("</s>" if token == EOS else f"w{token}" for token in tokens)


def expected_rows(documents, block_size, *, ids=None, eos=EOS, pad=PAD):
    """Token by token."""
    flat = []
    for index, tokens in enumerate(documents):
        tokens = list(tokens or [])
        if tokens and eos is not None and tokens[-1] != eos:
            tokens.append(eos)
        number = index if ids is None else ids[index]
        flat += [(token, number, place == 0) for place, token in enumerate(tokens)]
    rows = []
    for sample_id in range(-(-len(flat) // block_size)):
        row = {"sample_id": sample_id, "input_ids": [], "labels": [], "position_ids": [], "document_id": []}
        position = 0
        for place in range(block_size):
            at = sample_id * block_size + place
            token, number, begins = flat[at] if at < len(flat) else (pad, -1, at == len(flat))
            position = 0 if begins or place == 0 else position + 1
            row["input_ids"].append(token)
            row["labels"].append(IGNORED if position == 0 or number == -1 else token)
            row["position_ids"].append(position)
            row["document_id"].append(number)
        rows.append(row)
    return rows


def untyped(rows):
    """A stream that does not know its columns."""
    return IterableDataset.from_generator(lambda: iter(rows))


DOCUMENTS = [[5, 6, 7], None, list(range(3, 30)), [], [8], [9, EOS], [EOS], list(range(10, 20)), [11, 12]]
IDS = [7, 0, 2**63 - 1, 3, 90, 4, 5, 6, 2**53 + 1]

documents_of_tokens = st.lists(st.lists(st.integers(0, 60), max_size=30), min_size=1, max_size=12).filter(any)


@settings(deadline=None, max_examples=40)
@given(documents_of_tokens, st.integers(2, 12), st.booleans(), st.data())
def test_nothing_is_lost_and_all_is_in_its_place(documents, block_size, append_eos, data):
    """In a table and in a stream."""
    ids = data.draw(st.none() | st.permutations([3 * i + 1 for i in range(len(documents))]))
    columns = {"input_ids": documents} | ({} if ids is None else {"document_id": ids})
    features = datasets.Features({name: FEATURES[name] for name in columns})
    table = Dataset.from_dict(columns, features=features)
    wanted = expected_rows(documents, block_size, ids=ids, eos=EOS if append_eos else None)
    for source in (table, table.to_iterable_dataset(num_shards=min(2, len(documents)))):
        packed = pack_documents(source, make_tokenizer(), block_size, append_eos=append_eos)
        assert list(packed) == wanted
    tokens = [
        token for row in wanted for token, own in zip(row["input_ids"], row["document_id"], strict=True) if own + 1
    ]
    assert len(tokens) == sum(map(len, documents)) + append_eos * sum(bool(d) and d[-1] != EOS for d in documents)


FEATURES = {"input_ids": datasets.List(datasets.Value("int64")), "document_id": datasets.Value("int64")}


@pytest.mark.parametrize("ids", [None, IDS], ids=["index", "column"])
@pytest.mark.parametrize("content", ["text", "input_ids"])
def test_text_and_tokens_of_every_kind_of_dataset(content, ids):
    """Documents that are null, empty, longer than several rows, of one token, or that end in an EOS already."""
    values = DOCUMENTS if content == "input_ids" else [text(tokens) for tokens in DOCUMENTS]
    columns = {content: values, "source": ["here"] * len(values)} | ({} if ids is None else {"document_id": ids})
    table = Dataset.from_dict(columns)
    wanted = expected_rows(DOCUMENTS, 8, ids=ids)
    assert len(wanted) > 5
    for source in (
        table,
        table.with_format("torch") if content == "text" else table,
        table.to_iterable_dataset(num_shards=4),
        table.to_iterable_dataset().with_format("torch"),
        untyped(table.to_list()),
    ):
        packed = pack_documents(source, make_tokenizer(), 8)
        assert type(packed) is type(source) and packed.column_names == COLUMNS
        assert list(packed) == wanted
        assert list(packed) == wanted, "the second pass"


def test_rows_do_not_depend_on_the_number_of_processes():
    table = Dataset.from_dict({"text": [text(tokens) for tokens in DOCUMENTS * 3]})
    wanted = expected_rows(DOCUMENTS * 3, 8)
    for num_proc in (2, 5):
        packed = pack_documents(table, make_tokenizer(), 8, num_proc=num_proc)
        assert packed.to_list() == wanted
        assert packed.info.description == pack_documents(table, make_tokenizer(), 8).info.description


def test_chosen_and_shuffled_documents():
    """Ids are indices of what was handed over."""
    documents = list(filter(None, DOCUMENTS))
    table = Dataset.from_dict({"input_ids": documents})
    chosen = [5, 1, 0, 6, 2]
    wanted = expected_rows([documents[i] for i in chosen], 8)
    assert pack_documents(table.select(chosen), make_tokenizer(), 8).to_list() == wanted
    assert list(pack_documents(table.select(chosen).to_iterable_dataset(), make_tokenizer(), 8)) == wanted
    begun = expected_rows(documents[:4], 8)
    assert list(pack_documents(table.to_iterable_dataset(num_shards=3).take(4), make_tokenizer(), 8)) == begun


def test_other_columns_by_name():
    documents = [[5, 6], [7, 8, 9]]
    table = Dataset.from_dict({"body": [text(tokens) for tokens in documents], "number": np.array([40, 2], np.uint8)})
    packed = pack_documents(table, make_tokenizer(), 4, text_column="body", document_id_column="number")
    assert packed.to_list() == expected_rows(documents, 4, ids=[40, 2])
    large = table.cast_column("body", datasets.Value("large_string"))
    assert pack_documents(large, make_tokenizer(), 4, text_column="body").to_list() == expected_rows(documents, 4)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_stream_is_whole_under_any_number_of_workers(workers):
    """A stream that is read within a worker yields that worker's shards; the packed one must not inherit that."""
    table = Dataset.from_dict({"input_ids": [tokens or [] for tokens in DOCUMENTS]})
    packed = pack_documents(table.to_iterable_dataset(num_shards=3), make_tokenizer(), 8)
    batches = DataLoader(packed, batch_size=2, num_workers=workers, collate_fn=list)
    assert [row for batch in batches for row in batch] == expected_rows(DOCUMENTS, 8)
    for rank in range(2):
        part = split_dataset_by_node(packed, rank, 2)
        assert list(part) == expected_rows(DOCUMENTS, 8)[rank::2]
    shuffled = packed.shuffle(seed=1, buffer_size=4)
    shuffled.set_epoch(3)
    assert sorted(shuffled, key=lambda row: row["sample_id"]) == expected_rows(DOCUMENTS, 8)


def test_the_tokenizers_own_special_tokens():
    documents = [[5, 6], [7, 8, 9]]
    table = Dataset.from_dict({"text": [*map(text, documents), ""]})
    begun = [[BOS, *tokens] for tokens in documents]
    assert list(pack_documents(table, make_tokenizer(begins=True), 4)) == expected_rows(begun, 4)
    without = make_tokenizer(eos=False)
    assert list(pack_documents(table, without, 4)) == expected_rows(documents, 4, eos=None)
    assert list(pack_documents(table, make_tokenizer(pad=False), 4)) == expected_rows(documents, 4, pad=EOS)
    assert list(pack_documents(table, make_tokenizer(eos=False, pad=False), 4)) == expected_rows(
        documents, 4, eos=None
    )


def test_truncation_and_padding_of_the_tokenizer_are_not_applied_and_nothing_is_said(capfd):
    """To documents longer than its `model_max_length`, 8, neither."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    documents = [list(range(3, 40)), [4]]
    packed = pack_documents(Dataset.from_dict({"text": [*map(text, documents)]}), tokenizer, 8)
    assert packed.to_list() == expected_rows(documents, 8)
    assert capfd.readouterr().err == ""


def test_what_was_packed_is_told(caplog):
    """In a table's description, and of a stream by the logger; the counts are those of the rows."""
    table = Dataset.from_dict({"input_ids": [tokens or [] for tokens in DOCUMENTS]})
    packed = pack_documents(table, make_tokenizer(), 8)
    told = packed.info.description
    real = np.array(packed["document_id"]) != -1
    with_loss = (np.array(packed["labels"]) != IGNORED).sum()
    begins = np.array(packed["position_ids"]) == 0
    documents = sum(map(bool, DOCUMENTS))
    assert told == (
        f"pack_documents: {len(DOCUMENTS)} documents ({len(DOCUMENTS) - documents} empty) in {len(packed)} rows of 8: "
        f"{sum(len(d or []) for d in DOCUMENTS)} tokens, {documents - 2} ends of documents appended, "
        f"{(~real).sum()} of padding; loss on {with_loss} tokens, not on the {documents} that begin a document nor "
        f"the {(begins & real).sum() - documents} that begin a row in the midst of one"
    )
    logging.enable_propagation()
    try:
        with caplog.at_level("INFO", logger="transformers"):
            assert list(pack_documents(table.to_iterable_dataset(num_shards=2), make_tokenizer(), 8)) == list(packed)
    finally:
        logging.disable_propagation()
    assert told in caplog.messages


def test_the_same_id_twice_is_said_and_stays_two_documents(caplog):
    documents = [[5, 6, 7], [8, 9], [3]]
    table = Dataset.from_dict({"input_ids": documents, "document_id": [4, 4, 4]})
    logging.enable_propagation()
    try:
        packed = pack_documents(table, make_tokenizer(), 8)
    finally:
        logging.disable_propagation()
    assert packed.to_list() == expected_rows(documents, 8, ids=[4, 4, 4])
    assert any("2 documents have an id of 'document_id' that another" in message for message in caplog.messages)


@pytest.mark.parametrize("form", [None, "torch", "numpy"])
def test_the_default_collator_makes_batches_of_them(form):
    packed = pack_documents(Dataset.from_dict({"input_ids": [list(range(3, 16)), [4, 5]]}), make_tokenizer(), 8)
    batch = default_data_collator(list(packed.with_format(form)))
    assert set(batch) == set(COLUMNS)
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert all(batch[name].shape == (3, 8) for name in COLUMNS[1:]) and batch["sample_id"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("stream", [False, True])
def test_documents_of_packed_rows_are_valued(tmp_path, stream):
    """By `Trainer`'s own choice of collator. Pieces of a document in two rows have their rows' ids and its own."""
    table = Dataset.from_dict({"input_ids": [row["input_ids"] for row in text_rows(12)]})
    packed = pack_documents(table.to_iterable_dataset(num_shards=2) if stream else table, make_tokenizer(), 16)
    pieces, row_of_id = [], {}
    for row in packed:
        for document in dict.fromkeys(row["document_id"]):
            if document != -1:
                row_of_id[row["sample_id"], document] = len(pieces)
                own = [place for place, number in enumerate(row["document_id"]) if number == document]
                pieces.append({name: [row[name][place] for place in own] for name in ("input_ids", "labels")})
    assert len(pieces) > 12
    trainer, replay = prepare(
        tmp_path,
        "gpt2",
        two_groups(SGD),
        trainer_class=DocumentRecorder,
        rows=pieces,
        train_dataset=packed,
        data_collator=None,
        validation_rows=short_rows(5),
        value_unit="document",
        gradient_accumulation_steps=1,
        max_steps=3,
        dataloader_num_workers=2 * stream,
    )
    trainer.train()
    assert_history(trainer, replay, 1e-5, row_of_id, keys=KEYS)


GOOD = {"input_ids": [[3, 4], [5]]}
REFUSED = {
    "no dataset": ([{"text": "w3"}], {}, "dataset is a list: give a datasets.Dataset"),
    "splits": (DatasetDict(train=Dataset.from_dict(GOOD)), {}, r"is a DatasetDict: .*dataset\['train'\]"),
    "block size": (GOOD, {"block_size": 1}, "block_size=1: give at least 2"),
    "no column": ({"body": ["w3"]}, {}, r"no column 'text' \(text_column\) nor 'input_ids' among \['body'\]"),
    "both": ({"text": ["w3"], **{"input_ids": [[3]]}}, {}, r"'text' and 'input_ids' both .*remove_columns"),
    "id column": (GOOD, {"document_id_column": "nr"}, r"no column 'nr' \(document_id_column\) among"),
    "no text": ({"text": ["", None]}, {}, "none of the 2 documents has a token"),
    "numbers": ({"text": [3, 4]}, {}, "column 'text' holds int64, not text"),
    "words": ({"input_ids": [["w3"]]}, {}, "column 'input_ids' holds list<.*string>, not token ids"),
    "a negative token": ({"input_ids": [[3, -100]]}, {}, "column 'input_ids' has -100, which is no token id"),
    "a large token": ({"input_ids": [[2**31]]}, {}, "column 'input_ids' has 2147483648"),
    "a null token": ({"input_ids": [[3, None]]}, {}, "token ids that are null"),
    "string ids": ({**GOOD, "document_id": ["a", "b"]}, {}, "'document_id' are of type string.*add_column"),
    "real ids": ({**GOOD, "document_id": [0.0, 1.0]}, {}, "'document_id' are of type double.*add_column"),
    "no ids": ({**GOOD, "document_id": [None, None]}, {}, "'document_id' are of type null|have no id"),
    "a negative id": ({**GOOD, "document_id": [0, -3]}, {}, "'document_id' has -3, not an integer from 0"),
    "a null id": ({**GOOD, "document_id": [0, None]}, {}, "1 documents have no id in column 'document_id'"),
    "a large id": ({**GOOD, "document_id": np.array([0, 2**63], np.uint64)}, {}, "9223372036854775808, not|one type"),
    "no EOS": (GOOD, {"append_eos": True, "tokenizer": make_tokenizer(eos=False)}, "append_eos=True, but"),
}


@pytest.mark.parametrize("kind", ["table", "stream", "untyped stream"])
@pytest.mark.parametrize(("source", "arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused_by_name(source, arguments, message, kind):
    if isinstance(source, dict) and not isinstance(source, DatasetDict):
        if "stream" in kind and message == "none of the 2 documents has a token":
            return  # not known before its end
        source = Dataset.from_dict(source)
        if kind == "stream":
            source = source.to_iterable_dataset()
        elif kind == "untyped stream":
            source = untyped(source.to_list())
    with pytest.raises(ValueError, match=message):
        list(pack_documents(source, **{"tokenizer": make_tokenizer(), "block_size": 8, **arguments}))


def test_a_fault_that_another_process_finds_is_told_alike():
    table = Dataset.from_dict({**GOOD, "document_id": [0, -3]})
    with pytest.raises(ValueError, match="'document_id' has -3, not an integer from 0"):
        pack_documents(table, make_tokenizer(), 8, num_proc=2)


def test_sources_that_cannot_be_packed():
    stream = Dataset.from_dict(GOOD).to_iterable_dataset()
    with pytest.raises(ValueError, match="num_proc=2: a stream is packed by the process that reads it"):
        pack_documents(stream, make_tokenizer(), 8, num_proc=2)
    mixed = untyped([{"text": "w3"}, {"text": 3}])
    with pytest.raises(ValueError, match="values that are not of one type .*cast_column"):
        list(pack_documents(mixed, make_tokenizer(), 8))
    with pytest.raises(ValueError, match=r"one process's part of a stream \(split_dataset_by_node\)"):
        pack_documents(split_dataset_by_node(stream, 0, 2), make_tokenizer(), 8)
    for nothing in (untyped([]), Dataset.from_dict({"text": []})):
        with pytest.raises(ValueError, match="dataset is empty"):
            pack_documents(nothing, make_tokenizer(), 8)
    assert list(pack_documents(Dataset.from_dict({"text": [""]}).to_iterable_dataset(), make_tokenizer(), 8)) == []
