"""The example runs as its README says; what it tables are the ledger's sums, stage by stage, and their errors."""

import importlib
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset


FOLDER = Path(__file__).parents[1] / "examples" / "domains_over_training"
sys.path.insert(0, str(FOLDER))
example = importlib.import_module("domains_over_training")
ALPHABETS = {"early": "abcdefg", "middle": "hijklmn", "late": "opqrstu"}
QUICK = {"updates": 16, "stages": 3, "batch_size": 4, "length": 64, "vocabulary": 300}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Domains of different letters, so that each teaches most about itself; documents of about one row and a half."""
    generator = random.Random(0)
    rows = []
    for number in range(90):
        domain = list(ALPHABETS)[number % 3]
        words = ["".join(generator.choices(ALPHABETS[domain], k=4)) for _ in range(40)]
        split = "train" if number % 5 else "validation"
        rows.append(json.dumps({"text": " ".join(words), "domain": domain, "split": split}))
    file = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    file.write_text("\n".join(rows))
    return str(file)


@pytest.fixture(scope="module")
def setting(corpus):
    return example.Setting(corpus=corpus, targets=["early", "late"], models=["gpt2-2m"], **QUICK)


@pytest.fixture(scope="module")
def data(setting):
    return example.make_data(setting)


@pytest.fixture(scope="module")
def trained(setting, data, tmp_path_factory):
    return example.train("gpt2-2m", data, setting, str(tmp_path_factory.mktemp("run")))


def read_stages(trained, data, setting):
    domains, targets = ["early", "late", "middle"], list(data.validation)
    spans = example.stages(setting.updates, setting.stages)
    return [example.read_stage(trained, data.documents, domains, targets, *span) for span in spans]


def test_held_out_documents_are_not_trained_on(data, corpus):
    rows = [json.loads(line) for line in Path(corpus).read_text().splitlines()]
    trained_on = set(data.documents["text"])
    assert trained_on <= {row["text"] for row in rows if row["split"] == "train"}
    assert list(data.validation) == ["early", "late"]
    assert {number for row in data.train["document_id"] for number in row} <= set(range(len(data.documents)))


def test_stages_add_up_to_the_run(trained, data, setting):
    stages = read_stages(trained, data, setting)
    whole = trained.values(by="domain", dataset=data.documents).to_pandas().set_index("domain")
    whole = whole.loc[["early", "late", "middle"]]
    assert sum(stage.tokens_G for stage in stages).tolist() == whole.tokens.tolist()
    value_KG = sum(stage.value_KG for stage in stages)
    np.testing.assert_allclose(value_KG, whole[["value_early", "value_late"]].to_numpy().T, rtol=1e-9, atol=1e-12)
    for stage in stages:
        shares_G = stage.tokens_G / stage.tokens_G.sum()
        np.testing.assert_allclose((stage.relative_KG * shares_G).sum(1), 1)
        of_value_KG = stage.value_KG / stage.value_KG.sum(1, keepdims=True)
        np.testing.assert_allclose(stage.relative_KG, of_value_KG / shares_G)


def test_each_domain_teaches_itself_in_the_end(trained, data, setting):
    late = read_stages(trained, data, setting)[-1]
    own, other = late.relative_KG[[0, 1], [0, 1]], late.relative_KG[[0, 1], [1, 0]]
    assert (own > 1).all() and (other < 1).all(), late


def test_values_add_up_to_what_was_measured(trained):
    audit = trained.audit().to_pandas()
    assert len(audit) == 2 * 16
    scale = np.maximum(np.abs(audit.actual), 1e-3)
    assert (np.abs(audit.predicted - audit.actual) / scale).max() < 0.02


def test_stages_cover_every_update_once_and_double():
    assert example.stages(400, 4) == [(1, 50), (51, 100), (101, 200), (201, 400)]
    for updates, count in ((64, 6), (100, 6), (401, 5), (7, 2)):
        found = example.stages(updates, count)
        assert [step for first, last in found for step in range(first, last + 1)] == list(range(1, updates + 1))
        assert len(found) == count


def test_standard_error_is_the_jackknife_over_documents():
    generator = np.random.default_rng(0)
    group_D = np.repeat([0, 1, 2], [60, 100, 1])
    tokens_D = generator.integers(20, 300, 161).astype(float)
    value_D = tokens_D * (0.5 + group_D) + 40 * generator.normal(size=161)

    def relative(kept):
        sums = [np.bincount(group_D[kept], x[kept], 3) for x in (value_D, tokens_D)]
        return example.relative_value(*sums)[:2]

    without = np.array([relative(np.arange(161) != left_out) for left_out in range(160)])
    jackknife = np.sqrt(159 / 160 * np.square(without - without.mean(0)).sum(0))
    error_G = example.standard_error(value_D, tokens_D, group_D, 3)
    np.testing.assert_allclose(error_G[:2], jackknife, rtol=0.05)
    assert math.isnan(error_G[2])


def test_a_domain_that_a_stage_does_not_have_is_no_number():
    assert np.isnan(example.relative_value(np.array([1.0, 0.0]), np.array([2.0, 0.0]))).tolist() == [False, True]
    error_G = example.standard_error(np.ones(4), np.array([1.0, 2, 3, 4]), np.array([0, 0, 2, 2]), 3)
    assert np.isnan(error_G).tolist() == [False, True, False]
    cells = [example.cell(relative, error) for relative, error in ((2, 0.5), (2, math.nan), (math.nan, math.nan))]
    assert cells == ["+2.00 ± 0.50", "+2.00", "-"]


def test_rows_are_cut_from_documents_that_share_them(data, setting):
    assert isinstance(data.documents, Dataset) and len(data.train) == 64
    assert {len(row) for row in data.train["input_ids"]} == {setting.length}
    assert any(len(set(row)) > 1 for row in data.train["document_id"])


def test_refusals():
    with pytest.raises(ValueError, match="--models gpt3: choose among gpt2-2m"):
        example.Setting(models=["gpt3"])
    with pytest.raises(ValueError, match="--stages 6 of --updates 60: give at least 2 stages, and 64 updates"):
        example.Setting(updates=60)


@pytest.mark.slow
def test_the_script_writes_its_tables_and_picture(corpus, tmp_path):
    command = [sys.executable, str(FOLDER / "domains_over_training.py"), "--corpus", corpus]
    command += ["--output_dir", str(tmp_path)]
    settings = QUICK | {"updates": 8, "stages": 2}
    command += [str(part) for name, value in settings.items() for part in (f"--{name}", value)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    written = (tmp_path / "run-1" / "domains.md").read_text()
    assert written in done.stdout
    # Without --targets: the two largest domains.
    assert written.count("share of value / share of tokens") == 2 * 2
    assert "Rank correlation of the relative values of gpt2-2m and pythia-2m" in written
    assert 0 < (tmp_path / "run-1" / "domains.png").stat().st_size < 200_000
