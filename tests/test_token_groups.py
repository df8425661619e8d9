"""Groups of tokens, each scored by its own loss, against one float64 backward pass for each group."""

import copy
import random
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import IGNORED, build, collate, dataset, text_rows
from oracles import Float64
from oracles_attribution import Oracle, flat
from packed_documents import BLOCK, packed_rows, pieces
from test_attribution import FLOAT32, Numbers, error, left
from test_pack_documents import make_tokenizer
from test_tracin import Run
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    GPT2LMHeadModel,
    default_data_collator,
)

from hf_datashapley import DropoutEnsemble, GradCos, GradDot, Influence, Less, Partition, TracIn, Trak
from hf_datashapley.attribution import whole
from hf_datashapley.attribution.influence import Curvature
from hf_datashapley.attribution.token_groups import group_positions


def make(kind, members, **settings):
    given = {"unit": "group", "data_collator": default_data_collator, "progress": False, "batch_size": 4}
    return kind(members, **(given | settings))


def scored(fitted, queries):
    """One by one: they have no one length, and the default collator does not pad."""
    return np.concatenate([fitted.score([query]) for query in queries], axis=1)


def queries():
    return text_rows(2, seed=7)


# What is grouped: rows of pieces of text that do not see each other, and for each piece its tokens' groups.


def by_document():
    """Document 3 goes on in the second row."""
    rows = pieces()
    return rows, [[[document] * len(text["input_ids"]) for document, text in row] for row in rows]


def by_several_documents():
    rows, groups = by_document()
    return rows, [[[(group * 5) % 4 for group in piece] for piece in row] for row in groups]


def by_halves():
    """Of each document one half is in a group with other documents' halves."""
    rows, groups = by_document()
    return rows, [[[g % 3 if t < 4 else 3 + g % 2 for t, g in enumerate(piece)] for piece in row] for row in groups]


def at_random():
    """Tokens of group -1 and -7 are in none."""
    draw, rows = random.Random(3), pieces()
    return rows, [
        [[draw.choice([40, 7, 23, -1, 8, -7]) for _ in text["input_ids"]] for _, text in row] for row in rows
    ]


def sections():
    """Of rows of one text each, that attend to what stands before them."""
    rows = [[(None, text)] for text in text_rows(5)]
    return rows, [[[(t // 3 + i) % 4 for t in range(len(row[0][1]["input_ids"]))]] for i, row in enumerate(rows)]


def tokens_of_rows():
    draw, rows = random.Random(4), [[(None, text)] for text in text_rows(5)]
    return rows, [[[draw.choice([5, 2, 9, -1]) for _ in row[0][1]["input_ids"]]] for row in rows]


PACKED = {"documents": by_document, "several": by_several_documents, "halves": by_halves, "random": at_random}
WHOLE = {"sections": sections, "tokens": tokens_of_rows}


def packed_with_groups(rows, groups):
    made = packed_rows(rows)
    for row, own in zip(made, groups, strict=True):
        row["group_id"] = [group for piece in own for group in piece]
        row["group_id"] += [-1] * (BLOCK - len(row["group_id"]))
    return made


def whole_with_groups(rows, groups):
    return [{**row[0][1], "group_id": own[0]} for row, own in zip(rows, groups, strict=True)]


def only(text, groups, group):
    """The text with the labels of one group."""
    return {**text, "labels": [y if g == group else IGNORED for y, g in zip(text["labels"], groups, strict=True)]}


def units_of(rows, groups):
    """For each group the pieces that hold tokens of it, in the order in which groups first appear."""
    units = {}
    for row, row_groups in zip(rows, groups, strict=True):
        for (_, text), own in zip(row, row_groups, strict=True):
            for group in dict.fromkeys(own):
                if group >= 0:
                    units.setdefault(group, []).append(only(text, own, group))
    return units


def layout(name):
    """The training set, its collator, and the oracle's units."""
    rows, groups = (PACKED | WHOLE)[name]()
    units = units_of(rows, groups)
    if name in PACKED:
        return packed_with_groups(rows, groups), default_data_collator, units
    return dataset(whole_with_groups(rows, groups)), collate, units


@pytest.mark.parametrize("name", [*PACKED, *WHOLE])
@pytest.mark.parametrize("model_name", ["gpt2", "llama"])
def test_scores_are_autograds_of_each_groups_own_loss(model_name, name):
    model, (train, collator, units) = build(model_name), layout(name)
    oracle = Oracle(model, units.values(), queries())

    def found(kind, **settings):
        fitted = make(kind, model, data_collator=collator, **settings).fit(train)
        assert fitted.units_["group_id"].tolist() == list(units)
        return scored(fitted, queries())

    assert error(found(GradDot), oracle.dot()) < FLOAT32
    assert error(found(GradDot, route="batched"), oracle.dot()) < FLOAT32
    assert error(found(GradCos), oracle.cos()) < FLOAT32
    assert error(found(Influence, projection_dim=None, damping=0.3), oracle.influence(0.3)) < FLOAT32
    for output in ("mean", "tokens"):
        kernel, q_N = oracle.trak(0.3, output)
        for route in ("summed", "batched"):
            own = found(Trak, projection_dim=None, damping=0.3, output=output, route=route)
            assert error(own, kernel * q_N[:, None]) < FLOAT32, (output, route)


# Rows whose documents are not apart.


class Joined(GPT2LMHeadModel):
    """Documents of a row attend to each other, whatever their positions say."""

    def forward(self, input_ids, position_ids=None, labels=None, use_cache=None):
        given = {"position_ids": position_ids, "labels": labels, "use_cache": use_cache}
        return super().forward(input_ids, attention_mask=torch.ones_like(input_ids), **given)


def joined():
    model = build("gpt2")
    made = Joined(model.config)
    made.load_state_dict(model.state_dict())
    return made


def masked(rows):
    return [{**row, "attention_mask": [1] * BLOCK} for row in rows]


def first_labelled(rows):
    """What begins a document is predicted by the document before it."""
    return [{**row, "labels": [IGNORED if t == 0 else t for t in row["input_ids"]]} for row in rows]


def whole_units(rows, order):
    return [[only(row, row["group_id"], group) for row in rows] for group in order]


@pytest.mark.parametrize("name", [*PACKED])
@pytest.mark.parametrize(
    ("members", "changed"),
    [(joined, list), (lambda: build("gpt2"), masked), (lambda: build("llama"), first_labelled)],
    ids=["model", "mask", "labels"],
)
def test_documents_that_are_not_apart_are_scored_all_the_same(members, changed, name):
    model, (rows, _, units) = members(), layout(name)
    rows = changed(rows)
    oracle = Oracle(model, whole_units(rows, units), queries())
    apart = Oracle(model, units.values(), queries())
    found = scored(make(GradDot, model).fit(rows), queries())
    assert error(found, oracle.dot()) < FLOAT32
    assert error(found, apart.dot()) > 1e-2, "the same as if they were apart"
    with pytest.raises(ValueError, match="attend to each|attention_mask|first token of a document is labelled"):
        make(GradDot, model, unit="document").fit(rows)


# What it costs.


def rows_passed(model, train, **settings):
    """In a pass over the training set."""
    fitted, counts = make(GradDot, model, **settings).fit(train), []
    handle = model.register_forward_pre_hook(
        lambda _, arguments, inputs: counts.append(len(inputs["input_ids"])), with_kwargs=True
    )
    fitted.score([text_rows(1)[0]])
    handle.remove()
    assert max(counts) <= fitted.batch_size
    return sum(counts) - 1  # the query


def most(rows, groups):
    """Over the pieces of each row: groups with a loss; summed over rows."""
    counts = [
        [
            len({g for g, y in list(zip(own, text["labels"], strict=True))[1:] if g >= 0 and y != IGNORED})
            for (_, text), own in zip(row, row_groups, strict=True)
        ]
        for row, row_groups in zip(rows, groups, strict=True)
    ]
    return sum(max(own) for own in counts)


@pytest.mark.parametrize("name", [*PACKED, *WHOLE])
def test_a_row_is_passed_as_often_as_its_piece_with_the_most_groups_has_them(name):
    train, collator, _ = layout(name)
    expected = most(*(PACKED | WHOLE)[name]())
    assert rows_passed(build("gpt2"), train, data_collator=collator) == expected
    if name in ("documents", "several"):
        assert expected == len(train)


def test_a_row_of_one_group_is_passed_once():
    rows = text_rows(5, ragged_labels=False)
    one = [{**row, "group_id": [i % 2] * len(row["input_ids"])} for i, row in enumerate(rows)]
    assert rows_passed(build("gpt2"), one, data_collator=collate) == 5
    # Also where the others' tokens have no loss; and one without a loss token of a group is left out.
    answers = [{**row, "group_id": [6] * 3 + [5] * (len(row["input_ids"]) - 3)} for row in rows]
    for row in answers:
        row["labels"] = [IGNORED] * 3 + row["labels"][3:]
    answers[4]["group_id"] = [-1] * len(rows[4]["input_ids"])
    assert rows_passed(build("gpt2"), answers, data_collator=collate) == 4
    packed = packed_with_groups(*by_document())
    assert rows_passed(joined(), packed) > rows_passed(build("gpt2"), packed) == 6


# What other units say of the same tokens.


ESTIMATORS = [
    (GradDot, {}),
    (GradDot, {"projection_dim": 256}),
    (GradDot, {"projection_dim": 256, "projection": "sjlt", "store_dtype": "float16"}),
    (TracIn, {"learning_rates": [0.3]}),
    (TracIn, {"learning_rates": [0.3], "projection_dim": 256}),
    *((Influence, {"curvature": name, "projection_dim": None}) for name in get_args(Curvature)),
    (Influence, {"curvature": "identity", "projection_dim": 256}),
    (Trak, {"projection_dim": 256}),
]


@pytest.mark.parametrize(("kind", "settings"), ESTIMATORS)
def test_groups_that_are_documents_have_their_scores(kind, settings):
    model, (rows, _, _) = build("llama-lora"), layout("documents")
    by_group, by_document = (make(kind, model, unit=unit, **settings).fit(rows) for unit in ("group", "document"))
    assert by_group.units_["group_id"].tolist() == by_document.units_["document_id"].tolist()
    assert error(scored(by_group, queries()), scored(by_document, queries())) < FLOAT32


def test_in_ensembles():
    rows, _, _ = layout("documents")
    for members in (
        [build("gpt2", seed=seed) for seed in (0, 1)],
        DropoutEnsemble(build("gpt2"), passes=2, p=0.2),
        DropoutEnsemble(build("gpt2"), passes=2, p=0.2, forward_only=True),
    ):
        found, expected = (
            scored(make(Trak, members, unit=unit, projection_dim=128).fit(rows), queries())
            for unit in ("group", "document")
        )
        assert error(found, expected) < FLOAT32


@pytest.mark.parametrize("settings", [{}, {"projection_dim": 256}])
def test_groups_of_one_token_have_its_score(settings):
    model, train, numbers = build("llama"), text_rows(5), iter(range(100))
    train = [{**row, "group_id": [next(numbers) for _ in row["input_ids"]]} for row in train]
    tokens, groups = (
        make(GradDot, model, unit=unit, data_collator=collate, **settings).fit(train) for unit in ("token", "group")
    )
    which = [train[s]["group_id"][p] for s, p in zip(*(tokens.units_[k] for k in tokens.units_), strict=True)]
    found, expected = np.zeros((len(groups.units_["group_id"]), 2), np.float32), scored(tokens, queries())
    found[which] = expected
    assert error(scored(groups, queries()), found) < FLOAT32  # 0 where there is no loss


def test_less_of_groups_that_are_rows(tmp_path):
    run = Run(tmp_path, "gpt2")
    train = [{**row, "group_id": [9 - i] * len(row["input_ids"])} for i, row in enumerate(run.train)]
    found, expected = (
        make(Less, run.ensemble(), unit=unit, data_collator=collate, projection_dim=None).fit(train).score(run.queries)
        for unit in ("group", "sample")
    )
    assert error(found, expected) < FLOAT32
    assert not found[2].any()  # row 2 has no label


def test_whole_rows_make_the_curvature():
    """Also tokens of no group are trained on. What groups and those have adds up to the samples'."""
    model, (train, collator, units) = build("gpt2"), layout("tokens")
    rest = train.map(lambda row: {"group_id": [50 if g < 0 else g for g in row["group_id"]]})
    settings = {"data_collator": collator, "projection_dim": None}
    for curvature in ("kfac", "identity"):
        some, every, samples = (
            make(Influence, model, unit=unit, curvature=curvature, **settings).fit(rows).score(dataset(queries()))
            for rows, unit in ((train, "group"), (rest, "group"), (train, "sample"))
        )
        assert error(every.sum(0), samples.sum(0)) < FLOAT32
        order = [list(dict.fromkeys(g for row in rest for g in row["group_id"])).index(group) for group in units]
        assert error(some, every[order]) < FLOAT32
    tokens = sum(label != IGNORED for row in train for label in row["labels"][1:])
    for dim in (None, 256):
        settings = {"data_collator": collator, "projection_dim": dim}
        dot, found = (
            make(kind, model, **settings, **own).fit(train).score(dataset(queries()))
            for kind, own in ((GradDot, {}), (Influence, {"curvature": "identity"}))
        )
        assert error(found * tokens, dot) < FLOAT32


@pytest.mark.parametrize("name", ["documents", "random", "sections"])
@pytest.mark.parametrize("kind", [GradDot, GradCos, Trak])
def test_groups_of_groups(kind, name):
    """Numbered in the order in which their ids first appear."""
    model, (train, collator, units) = build("gpt2"), layout(name)
    labels = [k % 2 for k in range(len(units))]
    parts = list(units.values())
    oracle = Oracle(model, [sum(parts[start::2], []) for start in (0, 1)], queries())
    expected = {GradDot: oracle.dot, GradCos: oracle.cos}.get(kind, lambda: None)()
    if kind is Trak:
        kernel, q_N = oracle.trak(1.0, "mean")
        expected = kernel * q_N[:, None]
    settings = {"projection_dim": None, "data_collator": collator, "partition": Partition.from_labels(labels)}
    fitted = make(kind, model, **settings).fit(train)
    assert fitted.units_["group"].tolist() == ["0", "1"]
    assert error(scored(fitted, queries()), expected) < FLOAT32


# What they do not depend on, and what is said of them.


@pytest.mark.parametrize("route", ["summed", "batched"])
@pytest.mark.parametrize("name", ["halves", "random", "sections"])
def test_groups_of_groups_under_the_kernel_of_members(name, route):
    model, (train, collator, units) = build("gpt2"), layout(name)
    labels = [k % 2 for k in range(len(units))]
    settings = {"data_collator": collator, "projection_dim": 128, "route": route}
    single = scored(make(Influence, model, **settings).fit(train), queries())
    grouped = make(Influence, model, partition=Partition.from_labels(labels), kernel="unit", **settings).fit(train)
    expected = np.stack([single[[label == g for label in labels]].sum(0) for g in range(2)])
    assert error(scored(grouped, queries()), expected) < FLOAT32


@pytest.mark.parametrize("settings", [{}, {"projection_dim": 512}])
def test_batches_and_padding_change_nothing(settings):
    """Collators pad what they know of; the groups' column stays as long as its row is."""
    model, (rows, groups) = build("llama"), sections()
    train, expected = dataset(whole_with_groups(rows, groups)), None
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "left"
    for own in (
        {"batch_size": 1},
        {"batch_size": 3},
        {"batch_size": 5, "data_collator": left},
        {"data_collator": DataCollatorForSeq2Seq(make_tokenizer())},
        {"data_collator": DataCollatorForSeq2Seq(tokenizer)},
        {"data_collator": DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8)},
    ):
        fitted = make(GradDot, model, **{"data_collator": collate, **settings, **own}).fit(train)
        found = scored(fitted, queries())
        expected = found if expected is None else expected
        assert error(found, expected) < FLOAT32


def test_shards_and_batches_change_nothing(monkeypatch):
    """A shard's units are passed without the others'."""
    model, (train, _, _) = build("gpt2"), layout("random")
    expected = scored(make(GradDot, model).fit(train), queries())
    monkeypatch.setattr(whole, "BLOCK_UNITS", 2)
    for size in (1, 2, 6):
        assert error(scored(make(GradDot, model, batch_size=size).fit(train), queries()), expected) < FLOAT32


def masked_language_model(positions):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        given = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = BertForMaskedLM(BertConfig(**given, intermediate_size=32, max_position_embeddings=positions)).eval()
    model.cls.predictions.bias.requires_grad_(False)  # no rule covers it
    return model


def test_of_a_model_that_predicts_labels_where_they_stand():
    """No label belongs to the document before its own."""
    model = masked_language_model(16)
    draw = random.Random(5)
    train = [{**row, "group_id": [draw.randrange(3) for _ in row["input_ids"]]} for row in text_rows(4)]
    asked = text_rows(1, seed=7)
    fitted = make(GradDot, model, data_collator=collate).fit(train)
    truth = copy.deepcopy(model).double()

    def gradient(rows):
        losses = []
        for row in rows:
            logits = truth(input_ids=torch.tensor([row["input_ids"]])).logits[0]
            losses.append(F.cross_entropy(logits, torch.tensor(row["labels"]), ignore_index=IGNORED, reduction="sum"))
        return flat(sum(losses), truth)

    with Float64():
        g_GP = torch.stack([gradient(rows) for rows in whole_units(train, fitted.units_["group_id"])])
        query = gradient(asked) / sum(label != IGNORED for label in asked[0]["labels"])
    assert error(fitted.score(asked), (g_GP @ query)[:, None]) < FLOAT32
    # Its positions say nothing to it of documents: every row is passed for each of its groups.
    packed = packed_with_groups(*by_several_documents())
    labelled = [
        {g for g, y in zip(row["group_id"], row["labels"], strict=True) if g >= 0 and y != IGNORED} for row in packed
    ]
    assert rows_passed(masked_language_model(32), packed) == sum(map(len, labelled)) > len(packed)


def test_texts_are_the_groups_own_tokens():
    for name in ("documents", "random", "sections"):
        (rows, groups), (train, collator, units) = (PACKED | WHOLE)[name](), layout(name)
        top = (
            make(GradDot, build("gpt2"), data_collator=collator).fit(train).top(queries()[:1], 9, tokenizer=Numbers())
        )
        assert len(top) == min(9, len(units))
        for group, text in zip(top["group_id"], top["text"], strict=True):
            own = [
                token
                for row, row_groups in zip(rows, groups, strict=True)
                for (_, piece), ids in zip(row, row_groups, strict=True)
                for token, own in zip(piece["input_ids"], ids, strict=True)
                if own == group
            ]
            assert text == " ".join(map(str, own))


def test_a_row_may_be_padded_with_a_token_of_its_own():
    """Then the mask says on which side, or else the labels do not fit both."""
    row = {"input_ids": [0, 0, 0], "group_id": [4, 5, 6]}
    for side in (0, 1):
        mask = torch.tensor([[1 - side, 1, 1, side]])
        batch = {"input_ids": torch.zeros(1, 4, dtype=torch.int64), "attention_mask": mask}
        expected = [[4, 5, 6, -1]] if side == 0 else [[-1, 4, 5, 6]]
        assert group_positions([row], batch, "group_id").tolist() == expected


def test_kept_features_are_those_of_their_column(tmp_path):
    """Other groups of the same rows are others."""
    train = [{**row, "a": [0, 1, 1] * 4, "b": [0, 0, 1] * 4} for row in text_rows(3, ragged_labels=False)]
    for row in train:
        row["a"], row["b"] = (row[key][: len(row["input_ids"])] for key in "ab")
    settings = {"projection_dim": 64, "store_dir": tmp_path / "kept", "data_collator": collate}
    model = build("gpt2")
    for _ in range(2):
        make(GradDot, model, group_id_column="a", **settings).fit(train)
    with pytest.raises(ValueError, match="made otherwise .*pieces"):
        make(GradDot, model, group_id_column="b", **settings).fit(train)


def truncated(rows):
    return collate([{key: values[:3] for key, values in row.items()} for row in rows])


@pytest.mark.parametrize(
    ("changed", "settings", "message"),
    [
        ({}, {"group_id_column": "section"}, "no column 'section' .`group_id_column`.: give each row a list"),
        ({"group_id": [1, 2]}, {}, "'group_id' .`group_id_column`. of a row has 2 entries for 6 input_ids"),
        ({"group_id": [0.5] * 6}, {}, "not a list of integers: number the groups"),
        ({"group_id": [True] * 6}, {}, "not a list of integers"),
        ({"group_id": [None, 1] * 3}, {}, "not a list of integers"),
        ({"group_id": [2**63] * 6}, {}, "not a list of integers"),
        ({"group_id": [[1], [2]] * 3}, {}, "not a list of integers"),
        ({"group_id": 3}, {}, "not a list of integers"),
        ({"group_id": [-1] * 6}, {}, "no token of train_dataset has a group"),
        ({}, {"data_collator": DataCollatorWithFlattening()}, "unit='group' needs a row for each sample: use a coll"),
        ({}, {"data_collator": truncated}, "data_collator makes other tokens of a row than its 6 input_ids"),
        ({}, {"partition": Partition.from_labels([0, 1])}, "partition has 2 labels and train_dataset 3 groups"),
        ({"labels": 1}, {}, "unit='group', and labels .2. are not one for each token"),
    ],
)
def test_refusals(changed, settings, message):
    row = {"input_ids": [5, 6, 7, 8, 9, 4], "labels": [5, 6, 7, 8, 9, 4], "group_id": [1, 1, 2, 3, 3, 3], **changed}
    with pytest.raises(ValueError, match=message):
        make(GradDot, build("gpt2"), **{"data_collator": collate, **settings}).fit([row, row])


def test_rows_without_tokens_are_refused():
    with pytest.raises(ValueError, match="a row has no input_ids beside 'group_id'"):
        make(GradDot, build("gpt2")).fit([{"text": "a", "group_id": [1]}])
