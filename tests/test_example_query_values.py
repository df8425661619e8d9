"""The questions of examples/query_values: every block runs, and Python, DuckDB and polars say the same."""

import ast
import re
from fractions import Fraction
from pathlib import Path
from random import Random

import duckdb
import pandas as pd
import polars as pl
import pytest
from datasets import Dataset
from ledger_rows import Piece, Visit, write_ledger
from published import publish

from hf_datashapley import Values, mixture_weights, select


README = Path(__file__).parents[1] / "examples" / "query_values" / "README.md"
SECTIONS = [text.splitlines()[0] for text in README.read_text(encoding="utf-8").split("\n## ")[1:]]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Twelve updates of documents 0 to 19, of which 7 was never trained on; and a copy of what is pushed."""
    random = Random(0)
    visits = []
    for step in range(1, 13):
        for sample in random.sample(range(19), 6):
            values = [[Fraction(random.randint(-999, 999), 1024) for _ in range(2)] for _ in range(1 + sample % 4)]
            pieces = [Piece(sample, 0, values), Piece(sample + 1, 9, values[:1])]
            visits.append(Visit(step, sample, [piece for piece in pieces if piece.document_id != 7], sample % 2))
    folder = tmp_path_factory.mktemp("place")
    write_ledger(folder / "out" / "values", visits, "document", ["code", "prose"], cuts=[5, 12], ranks=2)
    publish(folder / "out" / "values", folder / "hub")
    corpus = {"document_id": range(20), "source": [f"source {d % 3}" for d in range(20)], "text": list("abcde" * 4)}
    Dataset.from_dict(corpus).to_parquet(folder / "corpus.parquet")
    return folder


def as_table(found):
    if isinstance(found, dict):
        return pd.DataFrame([found])
    if isinstance(found, Dataset):
        return found.to_pandas()
    return found.df() if isinstance(found, duckdb.DuckDBPyRelation) else pd.DataFrame(found.to_dicts())


def answers(section, place):
    text = README.read_text(encoding="utf-8").split(f"\n## {section}\n")[1].split("\n## ")[0]
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.S):
        block = block.replace("hf://datasets/me/corpus-values", str(place / "hub"))
        *before, last = ast.parse(block.replace('"me/corpus-values"', repr(str(place / "hub")))).body
        assert isinstance(last, ast.Expr)
        names = {"Values": Values, "Dataset": Dataset, "duckdb": duckdb, "pl": pl}
        names |= {"select": select, "mixture_weights": mixture_weights}
        exec(compile(ast.Module(before, []), section, "exec"), names)
        yield eval(compile(ast.Expression(last.value), section, "eval"), names)


@pytest.mark.parametrize("section", SECTIONS)
def test_the_three_say_the_same(section, place, monkeypatch, tmp_path):
    monkeypatch.chdir(place)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    if section == "For the next run":
        nothing, shares = answers(section, place)
        assert nothing is None and sum(shares.values()) == pytest.approx(1)
        return
    own, *others = map(as_table, answers(section, place))
    assert len(others) == 2 and len(own) > (0 if section == "In all" else 2)
    for other in others:
        pd.testing.assert_frame_equal(other, own, check_dtype=False, rtol=1e-12)
