"""Documents that share rows, packed by hand, and a recorder that tells the oracle of them one by one."""

import torch
from models import IGNORED, PAD, dataset, text_rows
from prepared import prepare
from recorder import Recorder
from transformers import default_data_collator


BLOCK = 24
# By row: pieces of documents, (document id, its first token, its last but one); the rest of a row is padding.
ROWS = [[7, 3], [3, 0, 12], [5, 9], [1, 2, 4], [6, 8], [10, 11]]


def pieces(ragged_labels=True):
    """What each row holds: (document id, tokens and labels); document 3 goes on in the second row."""
    texts = iter(text_rows(sum(map(len, ROWS)), ragged_labels=ragged_labels))
    made = [[(document, next(texts)) for document in row] for row in ROWS]
    for row in made:
        for _, text in row:
            text["input_ids"], text["labels"] = text["input_ids"][:8], text["labels"][:8]
    return made


def packed_rows(rows):
    packed = []
    for row in rows:
        columns = {"input_ids": [], "labels": [], "position_ids": [], "document_id": []}
        for document, text in row:
            length = len(text["input_ids"])
            columns["input_ids"] += text["input_ids"]
            columns["labels"] += [IGNORED, *text["labels"][1:]]
            columns["position_ids"] += range(length)
            columns["document_id"] += [document] * length
        left = BLOCK - len(columns["input_ids"])
        columns["input_ids"] += [PAD] * left
        columns["labels"] += [IGNORED] * left
        columns["position_ids"] += range(left)
        columns["document_id"] += [-1] * left
        packed.append(columns)
    return packed


def short_rows(count):
    """Of one length, so that they need no padding."""
    return [{key: row[key][:5] for key in row} for row in text_rows(count, seed=9, ragged_labels=False)]


class DocumentRecorder(Recorder):
    """Tells the oracle of the pieces one by one: a new one begins where position 0 does."""

    def padded(self, inputs):
        found = []
        for tokens, labels, places in zip(inputs["input_ids"], inputs["labels"], inputs["position_ids"], strict=True):
            starts = places.eq(0).nonzero().flatten().tolist()
            for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
                if tokens[start] != PAD:
                    found.append((tokens[start:end], labels[start:end]))
        assert len(found) > len(inputs["input_ids"]), "no row is shared"
        longest = max(len(tokens) for tokens, _ in found)
        padded = {
            "input_ids": torch.full((len(found), longest), PAD),
            "attention_mask": torch.zeros((len(found), longest), dtype=torch.int64),
            "labels": torch.full((len(found), longest), IGNORED),
        }
        for i, (tokens, labels) in enumerate(found):
            padded["input_ids"][i, : len(tokens)] = tokens
            padded["attention_mask"][i, : len(tokens)] = 1
            padded["labels"][i, : len(labels)] = labels
        return padded


KEYS = ("sample_id", "document_id")


def prepare_documents(folder, *arguments, **settings):
    """Three updates of 2 rows; a trainer, the replay, and which of the replay's rows a (sample, document) is."""
    rows = pieces()
    flat = [(100 + sample, document, text) for sample, row in enumerate(rows) for document, text in row]
    trainer, replay = prepare(
        folder,
        *arguments,
        trainer_class=DocumentRecorder,
        rows=[text for _, _, text in flat],
        train_dataset=dataset(packed_rows(rows), ids=range(100, 100 + len(rows))),
        validation_rows=short_rows(5),
        **{
            "data_collator": default_data_collator,
            "value_unit": "document",
            "gradient_accumulation_steps": 1,
            "max_steps": 3,
            **settings,
        },
    )
    return trainer, replay, {(sample, document): i for i, (sample, document, _) in enumerate(flat)}
