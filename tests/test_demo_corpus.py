"""The demo's text, rows and numbers, and what its command line answers. A whole run, of two updates, comes last."""

from __future__ import annotations

import ast
import json
import math
import random
import re
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

from hf_datashapley import load_values
from hf_datashapley.cli.main import main
from hf_datashapley.demo import harvest, junk, measure, models
from hf_datashapley.demo.config import DemoConfig
from hf_datashapley.demo.corpus import (
    Document,
    choose_targets,
    drop_near_duplicates,
    hold_out,
    read_corpus,
)
from hf_datashapley.demo.job import new_run_folder
from hf_datashapley.demo.rows import (
    SHORTEST,
    draw,
    pad_rows,
    tokenise,
    train_tokenizer,
    training_rows,
    validation_rows,
)


SOURCE = '''"""What the module is for.

>>> import this
Beautiful is better than ugly.

And why.
"""

import os


def empty():
    """Only a docstring."""


class Thing:
    """A thing.

    ```python
    Thing()
    ```
    """

    NAME = "not a docstring"
'''


def text(seed: int, words: int = 200) -> str:
    generator = random.Random(seed)
    return " ".join("".join(generator.choices("abcdefgh", k=5)) for _ in range(words))


def documents(domain: str, count: int, words: int = 200, first: int = 0) -> list[Document]:
    return [Document(text(first + i, words), domain, f"{domain} {i}") for i in range(count)]


@pytest.fixture(autouse=True)
def bars_and_warnings():
    """The command line turns off what would stand between its own words; the other tests want it back."""
    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


# Harvest


def test_code_and_prose_of_a_source_file_do_not_mix():
    code, prose = harvest.split_source(SOURCE)
    assert not any(example in prose for example in ("import this", "Beautiful", "Thing()"))
    assert "And why." in prose
    for docstring in ("What the module", "Only a docstring", "A thing"):
        assert docstring in prose and docstring not in code
    assert 'NAME = "not a docstring"' in code
    compile(code, "code", "exec")
    assert not any(
        ast.get_docstring(node)
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
    )


@pytest.mark.parametrize("source", ["def broken(", "nul = '\0'", ""])
def test_source_that_does_not_parse_gives_nothing(source):
    assert harvest.split_source(source) == ("", "")


def test_harvest_holds_every_domain_and_is_the_same_twice():
    found = harvest.harvest(200_000, seed=3)
    assert {document.domain for document in found} == set(harvest.DOMAINS)
    assert found == harvest.harvest(200_000, seed=3)
    assert found != harvest.harvest(200_000, seed=4)
    assert all(harvest.SHORTEST <= len(document.text) <= harvest.LONGEST for document in found)
    size = {domain: sum(len(d.text) for d in found if d.domain == domain) for domain in harvest.DOMAINS}
    for domain in harvest.TARGETS:
        assert size[domain] >= harvest.DOMAINS[domain] * 200_000
    # Code and docstrings of one file would tell each other's names.
    titles = [document.title.removesuffix(" (docstrings)") for document in found]
    assert len({t for t in titles if t.endswith(".py")}) == len([t for t in titles if t.endswith(".py")])


def test_titles_hold_no_path_of_this_machine():
    home = Path(sysconfig.get_path("stdlib")).parts[1]
    assert not [d.title for d in harvest.harvest(100_000, seed=0) if d.title.startswith("/") or f"/{home}/" in d.title]


def test_what_an_installation_lacks_makes_its_domain_empty(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    monkeypatch.setattr(metadata, "distributions", lambda: [])
    domains = {document.domain for document in harvest.harvest(100_000, seed=0)}
    assert domains == {"code", "prose"}


def test_an_installation_without_library_source_says_what_to_do(monkeypatch, tmp_path, capsys):
    paths = sysconfig.get_path
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path) if name == "stdlib" else paths(name))
    assert main(["demo", "--updates", "1", "--output_dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "no text of the domain 'code'" in error and "--corpus" in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


# Near-duplicates, targets, held-out documents


def test_a_text_inside_another_is_a_near_duplicate():
    long, other = text(0, 400), text(1, 400)
    renamed = long.replace(long.split()[7], "someone", 1)
    given_documents = [
        Document(t, "a", str(i)) for i, t in enumerate([long, other, renamed, long[300:900], "x y", "x y"])
    ]
    assert [document.title for document in drop_near_duplicates(given_documents, show_progress=False)] == [
        "0",
        "1",
        "4",
    ]


def test_targets():
    corpus = documents("small", 9) + documents("large", 30) + documents("code", 12) + documents("middle", 20)
    assert choose_targets(corpus, None, ("code", "prose")) == ["code"]
    assert choose_targets(corpus, None, ("prose",)) == ["large", "middle"]
    assert choose_targets(corpus, ["middle", "code", "middle"], ()) == ["middle", "code"]
    with pytest.raises(ValueError, match="--targets nothing: no such domain; there are code, large, middle, small"):
        choose_targets(corpus, ["nothing"], ())
    with pytest.raises(ValueError, match="--targets small: only 9 documents"):
        choose_targets(corpus, ["small"], ())
    with pytest.raises(ValueError, match="no domain has 10 documents"):
        choose_targets(documents("small", 9), None, ())


def test_held_out_documents_are_never_trained_on():
    corpus = documents("a", 40) + documents("b", 500) + documents("c", 5)
    train, held_out = hold_out(corpus, ["a", "b"], seed=1)
    assert len(held_out["a"]) == 4 and len(held_out["b"]) == 24
    assert {d.domain for d in held_out["a"]} == {"a"}
    assert len(train) + 28 == len(corpus) and not set(train) & {*held_out["a"], *held_out["b"]}
    assert train == [document for document in corpus if document in set(train)]
    assert hold_out(corpus, ["a", "b"], seed=1) == (train, held_out)
    assert hold_out(corpus, ["a", "b"], seed=2)[1] != held_out


def test_a_corpus_with_splits_is_divided_by_them():
    splits = ["train", "validation", "test", None]
    corpus = [Document(text(i), "ab"[i % 2], str(i), split=splits[i // 2 % 4]) for i in range(240)]
    train, held_out = hold_out(corpus, ["b"], seed=0)
    assert train == [document for document in corpus if document.split == "train"]
    assert held_out == {"b": [d for d in corpus if d.split == "validation" and d.domain == "b"]}
    assert len(held_out["b"]) == 30
    with pytest.raises(ValueError, match="--targets c: the corpus has a column `split`, and no document of this"):
        hold_out(corpus, ["b", "c"], seed=0)


# Junk


def test_planted_junk_is_what_its_label_says():
    real = [Document("the quick brown fox jumps over the lazy dog again and again " * 300, "prose", "fox")]
    planted = junk.plant_junk(real, 8_000, seed=0)
    assert planted == junk.plant_junk(real, 8_000, seed=0)
    by_type = {kind: [d.text for d in planted if d.junk == kind] for kind in junk.TYPES}
    assert all(len(texts) > 2 for texts in by_type.values())
    assert {document.domain for document in planted} == {junk.DOMAIN}
    assert all(re.fullmatch(r"[A-Za-z0-9+/=\n]+", t) for t in by_type["base64"])
    for repeated in by_type["repetition"]:
        assert len(set(repeated.split())) <= 12
    # The passage may begin and end inside a word.
    assert all(word in real[0].text for words in by_type["shuffled words"] for word in words.split())
    assert len(set("".join(by_type["random characters"]))) > 80
    assert junk.plant_junk(real, 0, seed=0) == []


# Rows


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([text(i) for i in range(20)] + ["Übung ☃"], 300, 64)


def test_rows_of_a_document_put_together_are_the_document(tokenizer):
    corpus = [Document(t, "a", "t") for t in (text(0), "Übung ☃ macht\n\tden  Meister ", text(1, 30), "x")]
    for tokenised in tokenise(corpus, tokenizer, 64):
        tokens = [token for row in tokenised.rows for token in row]
        assert tokens[0] == tokenizer.bos_token_id and tokenizer.bos_token_id not in tokens[1:]
        assert all(len(row) == 64 for row in tokenised.rows[:-1])
        assert len(tokenised.rows) == 1 or len(tokenised.rows[-1]) >= SHORTEST
        decoded = tokenizer.decode(tokens, skip_special_tokens=True)
        assert tokenised.document.text.startswith(decoded)
        if not tokenised.dropped:
            assert decoded == tokenised.document.text
    assert [len(t.rows) for t in tokenise(corpus[-1:], tokenizer, 64)] == [1]


def test_draw_takes_whole_documents_that_fit(tokenizer):
    tokenised = list(tokenise(documents("a", 8), tokenizer, 64))
    sizes = [len(document.rows) for document in tokenised]
    drawn = draw(tokenised, sum(sizes[:3]) + 1)
    assert drawn == tokenised[:3]
    assert draw(tokenised, 0) == []
    assert draw(tokenised, sum(sizes), enough=sizes[-1]) == tokenised[:-1]


def test_units_say_where_each_row_is_from(tokenizer):
    corpus = [*documents("a", 2), Document(text(9), "junk", "j", junk="base64")]
    rows = training_rows(list(tokenise(corpus, tokenizer, 64)), tokenizer)
    assert rows.dataset["sample_id"] == rows.units["sample_id"] == list(range(len(rows.dataset)))
    for row, unit in zip(rows.dataset, rows.units, strict=True):
        source = corpus[unit["document_id"]]
        assert (unit["domain"], unit["junk"], unit["title"]) == (source.domain, source.junk, source.title)
        assert unit["text"] == tokenizer.decode(row["input_ids"], skip_special_tokens=True)
        assert unit["text"] in source.text


def test_validation_rows_are_spread_over_documents(tokenizer):
    tokenised = list(tokenise(documents("a", 3, words=600), tokenizer, 64))
    rows = validation_rows(tokenised, seed=0)
    assert len(rows) == 12
    of = [next(i for i, d in enumerate(tokenised) if row in d.rows) for row in rows["input_ids"]]
    assert sorted(of) == sorted([0, 1, 2] * 4) and of != sorted(of)


def test_padding_has_no_label():
    batch = pad_rows([{"sample_id": 0, "input_ids": [5, 6, 7]}, {"sample_id": 1, "input_ids": [8]}])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7], [8, -100, -100]]


@pytest.mark.parametrize("name", [name for name in models.NAMES if not name.endswith("20m")])
def test_named_models_have_about_the_size_they_are_called(name):
    model = models.make_model(name, models.VOCABULARY, 256, seed=0)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert 0.6 < millions / int(name.split("-")[1].removesuffix("m")) < 1.6


# Numbers


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 5), min_size=1), st.lists(st.integers(0, 5), min_size=1))
def test_auc_is_the_share_of_pairs(higher, lower):
    pairs = [(a > b) + (a == b) / 2 for a in higher for b in lower]
    assert measure.auc(np.array(higher, float), np.array(lower, float)) == pytest.approx(sum(pairs) / len(pairs))


def test_auc_of_nothing_is_not_a_number():
    assert math.isnan(measure.auc(np.array([]), np.array([1.0])))


def test_audits_are_summed_by_target():
    rows = [
        {"step": step, "target": target, "samples": 0.1, "carried": -0.3, "predicted": -0.2, "actual": 0.04 * step}
        for step in (2, 4)
        for target in ("code", "prose")
    ]
    lines = measure.align(measure.audit_table(Dataset.from_list(rows), ["prose"])).splitlines()
    assert len(lines) == 2 and lines[1].split() == ["prose", "+0.200", "-0.600", "-0.400", "+0.240"]


@pytest.mark.parametrize(("updates", "every"), [(1, 1), (40, 2), (300, 12), (10_000, 400)])
def test_about_25_updates_are_audited(updates, every):
    assert DemoConfig(updates=updates).audit_steps == every
    assert DemoConfig(updates=updates, audit_steps=0).audit_steps == 0


@pytest.fixture
def samples():
    values = Dataset.from_dict(
        {
            "sample_id": [0, 1, 2, 3],
            "updates": [1, 2, 1, 1],
            "tokens": [100, 200, 50, 50],
            "value_code": [0.2, 0.4, 0.05, -0.1],
        }
    )
    units = Dataset.from_dict(
        {
            "sample_id": [3, 2, 1, 0],
            "document_id": [2, 1, 0, 0],
            "domain": ["junk", "prose", "code", "code"],
            "junk": ["base64", None, None, None],
            "title": ["j", "p", "c", "c"],
            "text": ["", "", "", ""],
        }
    )
    return measure.label(values, units)


def test_documents_sum_their_rows(samples):
    assert samples["title"] == ["c", "c", "p", "j"]
    table = measure.document_values(samples)
    assert table["title"] == ["c", "p", "j"]
    assert table["rows"] == [2, 1, 1] and table["tokens"] == [300, 50, 50]
    assert table["value_code"] == pytest.approx([0.6, 0.05, -0.1])


def test_ranking_is_by_value_per_token(samples):
    table = measure.document_values(samples)
    assert measure.ranking(table, "code") == (1.0, 1.0, 1.0)
    lines = measure.align(measure.ranking_table(table, ["code"])).splitlines()
    assert lines[1].split() == ["code", "1.00", "1.00", "1.00"]


def test_table_has_the_domains_then_the_junk_then_all(samples):
    lines = measure.align(measure.domain_table(measure.document_values(samples))).splitlines()
    assert [line.split("  ")[0] for line in lines[2:]] == ["code", "prose", "junk: base64", "all"]
    assert lines[2].split()[1:] == ["1", "75.0%", "+0.600", "+2.0000"]
    assert lines[-1].split()[1:] == ["3", "100.0%", "+0.550", "+1.3750"]


# --corpus


def test_a_corpus_is_read_from_parquet_or_json_lines(tmp_path):
    rows = [{"text": "a b", "domain": "x", "title": "t", "split": "train"}, {"text": None, "domain": "x"}]
    rows += [{"text": "c"}, {"text": " "}]
    lines = tmp_path / "corpus.jsonl"
    lines.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    parquet = tmp_path / "corpus.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), parquet)
    expected = [Document("a b", "x", "t", split="train"), Document("c", "none", "document 2")]
    assert read_corpus(str(lines)) == read_corpus(str(parquet)) == expected
    lines.write_text('{"text": "a"}')
    assert read_corpus(str(lines)) == [Document("a", "corpus", "document 0")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.csv", "text\n", "must end in .parquet or .jsonl"),
        ("c.jsonl", '{"text": "a"}\n{', "line 2 is not JSON"),
        ("c.jsonl", "[1]", "line 1 is not an object"),
        ("c.jsonl", '{"content": "a"}', r"row 0 has no `text` but \['content'\]"),
        ("c.jsonl", '{"text": 3}', "`text` of row 0 is a int"),
        ("c.jsonl", '{"text": ""}', "no row has text"),
        ("c.parquet", "nonsense", "not a Parquet file"),
    ],
)
def test_a_corpus_that_cannot_be_used_is_refused_by_name(tmp_path, name, content, message):
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_corpus(str(file))


def test_parquet_without_text_is_refused(tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"content": "a"}]), tmp_path / "c.parquet")
    with pytest.raises(ValueError, match=r"no column `text` among \['content'\]"):
        read_corpus(str(tmp_path / "c.parquet"))


# Command line


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["help"]])
def test_help_names_the_commands(arguments, capsys):
    assert main(arguments) == 0
    assert "demo" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "hint"), [([], "commands:"), (["dmo"], "did you mean demo?")])
def test_an_unknown_command_is_refused_helpfully(arguments, hint, capsys):
    assert main(arguments) == 2
    assert hint in capsys.readouterr().err


def test_help_of_the_demo_shows_what_can_be_changed(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["demo", "--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    for option in (
        "--corpus",
        "--model",
        "--targets",
        "--updates",
        "--seed",
        "--output-dir",
        "--value_kernel",
        "--value_order",
        "--path_nodes",
        "--path_slope",
        "--audit_steps",
        "examples",
    ):
        assert option in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--updates", "0"], "--updates 0: give at least 1"),
        (["--path_nodes", "0"], "--path_nodes 0: give at least 1"),
        (["--audit_steps", "-1"], "--audit_steps -1: give at least 0"),
        (["--value_order", "path", "--validation_interval", "2"], "--validation_interval 2: order path"),
        (["--junk_share", "0.9"], "--junk_share 0.9"),
        (["--learning_rate", "nan"], "--learning_rate nan"),
        (["--seed", "-1"], "--seed -1"),
        (["--corpus", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--model", "gpt5"], "gpt2-2m, gpt2-5m"),
    ],
)
def test_errors_of_the_user_are_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not list(tmp_path.iterdir())
    with pytest.raises((ValueError, OSError)):
        main(["demo", *arguments, "--debug"])


def test_an_unknown_option_is_refused(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["demo", "--epochs", "3"])
    assert exit_.value.code == 2
    assert "unrecognized arguments: --epochs 3" in capsys.readouterr().err


def test_each_run_has_a_folder_of_its_own(tmp_path):
    (tmp_path / "run-notes").mkdir()
    assert new_run_folder(str(tmp_path)).name == "run-1"
    (tmp_path / "run-9").mkdir()
    assert new_run_folder(str(tmp_path)).name == "run-10"


@pytest.mark.slow
def test_a_whole_run_on_a_corpus_and_a_model_from_a_folder(tmp_path, capsys):
    corpus = tmp_path / "corpus.jsonl"
    given_documents = documents("a", 30, 60) + documents("b", 20, 60, first=30) + documents("c", 3, 60, first=50)
    corpus.write_text("\n".join(json.dumps({"text": d.text, "domain": d.domain}) for d in given_documents))
    config = GPT2Config(
        vocab_size=300, n_positions=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0, use_cache=False
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    arguments = ["--corpus", str(corpus), "--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out")]
    options = ["--updates", "4", "--batch_size", "8", "--junk_share", "0.5", "--targets", "b", "a"]
    options += ["--value_order", "path", "--path_nodes", "2", "--path_slope", "owen"]
    assert main(["demo", *arguments, *options]) == 0
    shown = capsys.readouterr().out
    run = tmp_path / "out" / "run-1"
    for name in ("report.html", "documents.parquet", "samples.parquet", "values", "model"):
        assert (run / name).exists() and str(run / name) in shown
    for said in ("value for b", "value for a", "junk: repetition", "of Trainer's", "own domain over junk"):
        assert said in shown
    assert "Sums over 4 audited updates" in shown and "Do the values add up?" in (run / "report.html").read_text()
    samples = load_dataset("parquet", data_files=str(run / "samples.parquet"), split="train", cache_dir=str(tmp_path))
    written = {row["sample_id"]: row["value_b"] for row in load_values(str(run / "values"))}
    assert {row["sample_id"]: row["value_b"] for row in samples} == written
    assert len(AutoTokenizer.from_pretrained(run / "model")) <= 300
