"""Selections, held against plain pandas and loops; draws and mixtures, against what their definitions say."""

import math
from collections import Counter
from fractions import Fraction
from random import Random

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset, load_from_disk
from ledger_rows import Piece, Visit, write_ledger
from models import build, collate, dataset, text_rows
from test_query import COLUMNS, SOURCE, TARGETS, of_units, written

from hf_datashapley import (
    Partition,
    ShapleyConfig,
    ShapleyTrainer,
    Values,
    ValueSampler,
    mixture_weights,
    select,
)
from hf_datashapley.curation import writing


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Documents 0 to 29 of 40, of 1 to 9 tokens, visited up to 4 times; multiples of 1/4, so that many are equal."""
    random = Random(1)
    visits = []
    for step in range(1, 13):
        for sample in random.sample(range(29), 6):
            pieces = []
            for document in (sample, sample + 1):
                tokens = 1 + 7 * document % 9
                values = [[Fraction(random.randint(-2, 2), 4) for _ in TARGETS] for _ in range(tokens)]
                pieces.append(Piece(document, 10 * len(pieces), values))
            visits.append(Visit(step, sample, pieces))
    folder = tmp_path_factory.mktemp("run")
    write_ledger(folder / "values", visits, "document", TARGETS)
    return folder, of_units(written(visits, "document"), "document_id")


def corpus(random=0):
    """In no order, with columns of several types."""
    order = np.random.default_rng(random).permutation(40).tolist()
    return Dataset.from_dict(
        {
            "document_id": order,
            "text": [f"document {d}" for d in order],
            "source": [SOURCE[d] for d in order],
            "tags": [[d, d + 1] for d in order],
        }
    )


def in_pandas(units, data, rule, by, per_token, unvisited):
    """Row by row, and group by group."""
    rows = data.to_pandas().merge(units, on="document_id", how="left").set_index(data.to_pandas().index)
    group = rows["document_id"] if by is None else rows[by].fillna("~")
    scores = {}
    for name, members in rows.groupby(group):
        seen = members.dropna(subset="value_code")
        if len(seen):
            scores[name] = seen["value_code"].sum() / (seen["tokens"].sum() if per_token else 1)
    (setting, number), *_ = rule.items()
    if setting == "keep_fraction":
        best = sorted(scores, key=lambda name: (-scores[name], name))[: round(number * len(scores))]
        kept = set(best)
    else:
        kept = {name for name, score in scores.items() if score >= (0 if setting == "drop_negative" else number)}
    return [(name in kept) if name in scores else unvisited == "keep" for name in group], rows


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("by", [None, "source"])
@pytest.mark.parametrize("unvisited", ["keep", "drop"])
@pytest.mark.parametrize(
    "rule", [{"drop_negative": True}, {"keep_fraction": 0.7}, {"keep_fraction": 0.33}, {"min_value": 0.01}]
)
def test_what_is_kept(run, rule, by, per_token, unvisited):
    folder, units = run
    data = corpus()
    before = data.to_dict()
    found = select(folder, data, target="code", by=by, per_token=per_token, unvisited=unvisited, **rule)
    kept, rows = in_pandas(units, data, rule, by, per_token, unvisited)
    assert data.to_dict() == before
    assert 0 < sum(kept) < 40 and found.kept.tolist() == kept
    assert found.dataset.column_names == [*data.column_names, "value"]
    expected = data.select(np.flatnonzero(kept))
    assert found.dataset.remove_columns("value").to_dict() == expected.to_dict()
    value = rows["value_code"][kept]
    assert found.dataset["value"][:] == [None if np.isnan(v) else v for v in value]
    assert {str(found.dataset.features["value"].dtype)} == {"float64"}

    assert found.summary.total["rows"] == 40 and found.summary.total["kept_rows"] == sum(kept)
    rows["kept"] = kept
    for row in found.summary.by_group:
        own = rows[rows["source"].fillna("~") == (row["source"] or "~")]
        stay = own[own["kept"]]
        for prefix, part in (("", own), ("kept_", stay)):
            assert row[f"{prefix}rows"] == len(part)
            assert row[f"{prefix}unvisited"] == part["tokens"].isna().sum()
            assert row[f"{prefix}tokens"] == part["tokens"].sum()
            assert row[f"{prefix}value"] == part["value_code"].sum()


def test_groups_by_id_and_partitions(run):
    folder, units = run
    data = corpus()
    expected = select(folder, data, target="prose", keep_fraction=0.5, by="source")
    sources = {d: SOURCE[d] for d in range(40)}
    labels = [SOURCE[d] or "~" for d in data["document_id"]]
    for by in (sources, pd.Series(sources), Partition.from_labels(labels)):
        found = select(folder, data, target="prose", keep_fraction=0.5, by=by)
        assert found.kept.tolist() == expected.kept.tolist()
        assert found.summary.total == expected.summary.total
    with pytest.raises(ValueError, match="by: 1 of the dataset's 40 documents have no group, document_id 39 first"):
        select(folder, data, target="prose", keep_fraction=0.5, by={d: "a" for d in range(39)})


def test_of_equal_ones_the_smaller_ids_are_kept(tmp_path):
    visits = [Visit(1, sample, [Piece(0, 0, [[Fraction(sample == 4)]])]) for sample in range(10)]
    write_ledger(tmp_path, visits, "sample", [""])
    data = Dataset.from_dict({"sample_id": [9, 3, 8, 4, 7, 0, 1, 2, 5, 6]})
    assert sorted(select(tmp_path, data, keep_fraction=0.4).dataset["sample_id"]) == [0, 1, 2, 4]
    assert select(tmp_path, data, keep_fraction=1.0).dataset["sample_id"][:] == data["sample_id"][:]
    assert len(select(tmp_path, data, drop_negative=True).dataset) == 10  # 0 is not negative
    groups = {"by": {sample: "ba"[sample % 2] for sample in range(10)}, "keep_fraction": 0.5}
    assert sorted(select(tmp_path, data, **groups).dataset["sample_id"]) == [0, 2, 4, 6, 8]  # 4 is among them
    assert set(select(tmp_path, data.filter(lambda row: row["sample_id"] != 4), **groups).dataset["sample_id"]) == {
        1, 3, 5, 7, 9,
    }  # fmt: skip


def test_rows_that_share_an_id_stay_together(run):
    """Chunks of documents: each is judged by the whole document, whose tokens are counted once."""
    folder, units = run
    ids = np.repeat(np.arange(40), 3)
    found = select(folder, Dataset.from_dict({"document_id": ids}), keep_fraction=0.5, target="code")
    whole = select(folder, Dataset.from_dict({"document_id": range(40)}), keep_fraction=0.5, target="code")
    assert found.kept.reshape(40, 3).all(1).tolist() == found.kept.reshape(40, 3).any(1).tolist()
    assert found.kept[::3].tolist() == whole.kept.tolist()
    assert found.summary.total["kept_tokens"] == whole.summary.total["kept_tokens"]
    assert found.summary.total["value"] == whole.summary.total["value"]
    torn = Dataset.from_dict({"document_id": [3, 4, 3], "source": ["a", "a", "b"]})
    with pytest.raises(ValueError, match="document_id 3 has rows in more than one group of 'source'"):
        select(folder, torn, keep_fraction=0.5, target="code", by="source")


def test_rows_by_number_samples_and_windows(run):
    folder, units = run
    numbered = Dataset.from_dict({"text": [f"document {d}" for d in range(40)]})
    found = select(folder, numbered, min_value=0.25, target="code")
    kept = set(units["document_id"][units["value_code"] >= 0.25]) | set(range(40)) - set(units["document_id"])
    assert found.dataset["text"][:] == [f"document {d}" for d in sorted(kept)]
    assert found.summary.by_group is None
    packed = Dataset.from_dict({"sample_id": range(29), "document_id": [[d, d + 1] for d in range(29)]})
    with pytest.raises(ValueError, match="holds lists.*the corpus.*key='sample_id'"):
        select(folder, packed, drop_negative=True, target="code")
    samples = Values.open(folder).units("sample_id").to_pandas()
    found = select(folder, packed, drop_negative=True, target="code", key="sample_id", unvisited="drop")
    assert set(found.dataset["sample_id"]) == set(samples["sample_id"][samples["value_code"] >= 0])
    late = Values.open(folder, from_step=9)
    of_late = late.units().to_pandas()
    found = select(late, numbered, drop_negative=True, target="code", unvisited="drop", value_column="late")
    assert found.dataset["late"][:] == of_late["value_code"][of_late["value_code"] >= 0].tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "none of drop_negative, keep_fraction and min_value: give one"),
        ({"drop_negative": True, "min_value": 0.0}, "several of drop_negative"),
        ({"keep_fraction": 1.5}, "keep_fraction=1.5: give a number above 0"),
        ({"keep_fraction": 0.0}, "keep_fraction=0.0"),
        ({"min_value": math.nan}, "min_value=nan"),
        ({"min_value": 1e9, "unvisited": "drop"}, "nothing is left of the 40 rows"),
        ({"drop_negative": True, "unvisited": "ignore"}, "unvisited='ignore'.*'keep' or 'drop'"),
        ({"drop_negative": True, "target": None}, "target: this run has values for code, prose"),
        ({"drop_negative": True, "by": "url"}, "by='url' is not a column.*source"),
        ({"drop_negative": True, "by": "tags"}, "one group, and those in 'tags' are of type"),
        ({"drop_negative": True, "group_column": "url"}, "group_column='url' is not a column"),
        ({"drop_negative": True, "value_column": "text"}, "column 'text' already"),
    ],
)
def test_what_cannot_be_selected(run, settings, message):
    with pytest.raises(ValueError, match=message):
        select(run[0], corpus(), **{"target": "code", **settings})


def test_a_curated_dataset_can_be_curated_again(run):
    data = select(run[0], corpus(), drop_negative=True, target="code").dataset
    with pytest.raises(ValueError, match="column 'value' already"):
        select(run[0], data, drop_negative=True, target="prose")
    again = select(run[0], data, drop_negative=True, target="prose", value_column="value_prose").dataset
    assert (
        min(v for v in again["value"] if v is not None) >= 0 <= min(v for v in again["value_prose"] if v is not None)
    )


def test_the_summary_that_is_printed(run):
    found = select(run[0], corpus(), keep_fraction=0.5, target="code")
    lines = str(found.summary).splitlines()
    total = found.summary.total
    assert lines[0].startswith(f"kept {total['kept_rows']} of 40 rows ({total['kept_rows'] / 40:.1%}), with")
    assert lines[1].startswith("value_code, in nats: ") and lines[2].startswith("10 rows were never trained on")
    assert lines[4].split()[:3] == ["source", "rows", "kept"]
    assert [line.split("  ")[0] for line in lines[5:]] == ["source 0", "source 1", "source 2", "(unknown)"]
    assert "not among the rows" not in str(found.summary)
    part = select(run[0], corpus().filter(lambda row: row["document_id"] > 4), keep_fraction=0.5, target="code")
    assert "5 documents that have a value are not among the rows" in str(part.summary)
    many = Dataset.from_dict({"document_id": range(1000), "domain": [str(d) for d in range(1000)]})
    found = select(run[0], many, keep_fraction=0.5, target="code")
    assert str(found.summary).splitlines()[-1] == "and 970 smaller ones"


@pytest.mark.parametrize("name", ["curated", "curated.parquet", "new/curated-v1.2"])
def test_written_selections(run, tmp_path, name, monkeypatch):
    monkeypatch.setattr(writing, "ROWS_AT_ONCE", 7)
    selection = select(run[0], corpus(), keep_fraction=0.5, target="code")
    found = selection.dataset
    selection.write(str(tmp_path / name))
    read = Dataset.from_parquet if name.endswith(".parquet") else load_from_disk
    back = read(str(tmp_path / name))
    assert back.to_dict() == found.to_dict() and back.features == found.features
    assert not list(tmp_path.rglob("*.tmp"))
    with pytest.raises(ValueError, match="is there already, and nothing is overwritten"):
        selection.write(tmp_path / name)
    with pytest.raises(ValueError, match=r"ends in \.parquet"):
        selection.write(tmp_path / "curated.jsonl")


def test_nothing_is_written_beside_the_corpus(run, tmp_path):
    corpus().save_to_disk(tmp_path / "corpus")
    before = {path: path.read_bytes() for path in (tmp_path / "corpus").iterdir()}
    found = select(run[0], load_from_disk(tmp_path / "corpus"), keep_fraction=0.5, target="code")
    found.write(tmp_path / "curated")
    assert {path: path.read_bytes() for path in (tmp_path / "corpus").iterdir()} == before


def test_a_write_that_fails_leaves_nothing(run, tmp_path, monkeypatch):
    def full(self, path, **kwargs):
        (path / "half").mkdir(parents=True)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Dataset, "save_to_disk", full)
    with pytest.raises(OSError, match="No space left"):
        select(run[0], corpus(), keep_fraction=0.5, target="code").write(tmp_path / "curated")
    assert not list(tmp_path.iterdir())


def test_draws_by_value():
    """The first row drawn is row r with the probability of its weight, and the second of what is then left."""
    values = [1.0, None, -1.0, 3.0]
    z = (np.array([1.0, 1.0, -1.0, 3.0]) - 1.0) / np.std([1.0, -1.0, 3.0])
    weight = np.exp(z / 0.8)
    sampler = ValueSampler(values, num_samples=2, temperature=0.8, seed=5)
    pairs = Counter()
    for epoch in range(4000):
        sampler.set_epoch(epoch)
        pairs[tuple(sampler)] += 1
    for first in range(4):
        for second in range(4):
            share = (
                0.0
                if first == second
                else weight[first] / weight.sum() * weight[second] / (weight.sum() - weight[first])
            )
            assert abs(pairs[first, second] / 4000 - share) < 4 * math.sqrt(share * (1 - share) / 4000) + 1e-9


def test_draws_depend_on_seed_and_epoch_only():
    values = Dataset.from_dict({"value": [*np.random.default_rng(0).standard_normal(50), None]})["value"]
    state = torch.get_rng_state()
    first, again = ValueSampler(values, seed=1), ValueSampler(list(values), seed=1)
    assert list(first) == list(first) == list(again)
    assert sorted(first) == list(range(51)) and len(first) == 51
    again.set_epoch(1)
    assert list(first) != list(again) and list(first) != list(ValueSampler(values, seed=2))
    assert torch.equal(torch.get_rng_state(), state)
    ordered = list(ValueSampler(values, 5, temperature=1e-6))
    assert ordered == np.argsort(-np.array(values[:50]))[:5].tolist()
    assert len(list(ValueSampler([2.0] * 7, 3))) == 3  # all the same: any


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0, 2.0], 3), "num_samples=3: there are 2 rows"),
        (([],), "num_samples=0"),
        (([1.0], 1, 0.0), "temperature=0.0"),
        (([1.0, math.inf],), "1 of 2 are infinite"),
    ],
)
def test_what_cannot_be_drawn(arguments, message):
    with pytest.raises(ValueError, match=message):
        ValueSampler(*arguments)


def test_a_trainer_draws_by_value(tmp_path):
    """Of 8 rows, 4 in each epoch: those that the sampler says, in its order."""

    class CuratedTrainer(ShapleyTrainer):
        def _get_train_sampler(self, train_dataset=None):
            return ValueSampler(range(8), num_samples=4)

    trainer = CuratedTrainer(
        build("gpt2"),
        ShapleyConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            num_train_epochs=3,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
        ),
        train_dataset=dataset(text_rows(8)),
        validation_dataset=dataset(text_rows(4, seed=2)),
        data_collator=collate,
    )
    trainer.train()
    sampler, steps = ValueSampler(range(8), num_samples=4), []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        drawn = list(sampler)
        steps += [set(drawn[:2]), set(drawn[2:])]
    history = trainer.value_history().to_pandas()
    assert [set(history["sample_id"][history["step"] == step]) for step in range(1, 7)] == steps


@pytest.mark.parametrize("temperature", [0.01, 0.7, 100.0])
def test_mixtures(run, temperature):
    folder, units = run
    found = mixture_weights(folder, SOURCE, target="prose", temperature=temperature)
    groups = units.assign(group=units["document_id"].map(SOURCE).fillna("~")).groupby("group")
    tokens, value = groups["tokens"].sum(), groups["value_prose"].sum()
    each = (value / tokens).to_dict()
    of_token = np.repeat([each[g] for g in tokens.index], tokens)
    weight = {g: tokens[g] * math.exp((each[g] - of_token.max()) / of_token.std() / temperature) for g in tokens.index}
    expected = {None if g == "~" else g: weight[g] / sum(weight.values()) for g in weight}
    assert list(found) == ["source 0", "source 1", "source 2", None]
    np.testing.assert_allclose([found[g] for g in found], [expected[g] for g in found], rtol=1e-9)
    assert mixture_weights(folder, "source", corpus(), target="prose", temperature=temperature) == found


def test_mixtures_of_what_is_all_the_same(tmp_path):
    visits = [Visit(1, sample, [Piece(0, 0, [[Fraction(1)]] * (1 + sample))]) for sample in range(3)]
    write_ledger(tmp_path, visits, "sample", [""])
    found = mixture_weights(tmp_path, {0: "a", 1: "b", 2: "b"})
    np.testing.assert_allclose([found["a"], found["b"]], [1 / 6, 5 / 6], rtol=1e-12)
    with pytest.raises(ValueError, match="temperature=-1"):
        mixture_weights(tmp_path, {0: "a", 1: "b", 2: "b"}, temperature=-1)
    write_ledger(tmp_path / "empty", [], "sample", [""])
    with pytest.raises(ValueError, match="no group has a loss token"):
        mixture_weights(tmp_path / "empty", {0: "a"})
    assert COLUMNS == ["value_code", "value_prose"]
