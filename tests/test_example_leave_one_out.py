"""The example runs as its README says, and what it calls the truth is the run without exactly one block's gradient."""

import importlib
import json
import math
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F


FOLDER = Path(__file__).parents[1] / "examples" / "leave_one_out"
sys.path.insert(0, str(FOLDER))
example = importlib.import_module("leave_one_out")
QUICK = {"blocks": 12, "block_tokens": 32, "batch_size": 4, "left_out": 4, "queries": 2}
QUICK |= {"vocabulary": 300, "layers": 1, "width": 32, "warmup": 1}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    file = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    generator = random.Random(0)
    rows = []
    for number in range(24):
        letters = "abcdefgh" if number % 2 else "stuvwxyz"
        words = ["".join(generator.choices(letters, k=4)) for _ in range(100)]
        rows.append(json.dumps({"text": " ".join(words), "domain": "ab"[number % 2]}))
    file.write_text("\n".join(rows))
    return str(file)


@pytest.fixture(scope="module")
def config(corpus):
    return example.LeaveOneOut(corpus=corpus, **QUICK)


@pytest.fixture(scope="module")
def text(config):
    return example.make_text(config)


def test_the_script_writes_its_table_and_picture(corpus, tmp_path):
    command = [sys.executable, str(FOLDER / "leave_one_out.py"), "--corpus", corpus, "--output_dir", str(tmp_path)]
    command += [str(part) for name, value in QUICK.items() for part in (f"--{name}", value)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    written = (tmp_path / "table.md").read_text()
    assert written in done.stdout
    rows = [line for line in written.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 2 * len(example.ORDERS) + 1 + 2 + 4
    assert "query losses at the end differ by 0.0e+00 nats at most" in written
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_blocks_are_different_and_of_one_length(text):
    rows = [tuple(row) for row in torch.cat([text.train_NT, text.queries_QT]).tolist()]
    assert len(set(rows)) == len(rows) == 14
    assert text.train_NT.shape == (12, 32) and len(text.sources_N) == 12 and set(text.sources_N) == {"a", "b"}


def test_exactly_the_gradient_of_the_block_is_missing(config, text):
    model = example.make_model(config).double()
    rows = text.train_NT[:4]

    def gradient(loss):
        return torch.cat([found.flatten() for found in torch.autograd.grad(loss, list(model.parameters()))])

    full, without = (
        gradient(example.SummedLoss(left_out)(model(input_ids=rows), rows, 124)) for left_out in (None, rows[2])
    )
    logits = model(input_ids=rows[2:3]).logits[0, :-1]
    own = gradient(F.cross_entropy(logits, rows[2, 1:], reduction="sum") / 124)
    torch.testing.assert_close(full - without, own, rtol=1e-9, atol=1e-12)


def test_a_run_taken_up_before_the_block_is_the_run_without_it(config, text, tmp_path):
    run = example.PlainRun(config, text, str(tmp_path))
    block = 9
    _, whole = run.train({3}, left_out=block)
    at_end, at_once = run.changes_without(block)
    assert np.array_equal(at_end, whole[3] - run.losses[3]) and at_end.any()
    assert np.array_equal(at_end, at_once), "its update is the last one"
    assert all(changes.any() for changes in run.changes_without(5))


def test_unrolled_is_what_the_trainer_says(config, text, tmp_path):
    values = {}
    for momentum in ("immediate", "unrolled"):
        settings = {"value_order": "path", "value_momentum": momentum}
        values[momentum], _ = example.in_run_values(config, text, settings, str(tmp_path / momentum))
    update_N = np.arange(12) // 4 + 1
    np.testing.assert_allclose(example.unrolled(values["immediate"], update_N), values["unrolled"], rtol=1e-5)


def test_bm25(text):
    rows, query = text.train_NT.tolist(), text.queries_QT[1].tolist()
    holding = Counter(token for row in rows for token in set(row))
    expected = 0.0
    for token in query:
        rarity = math.log(1 + (12 - holding[token] + 0.5) / (holding[token] + 0.5))
        count = rows[7].count(token)
        expected += rarity * count * 2.5 / (count + 1.5)
    assert example.bm25(text, [3, 7], 300)[1, 1] == pytest.approx(expected)
    assert expected > 0


def test_rank_correlation_leaves_out_queries_that_have_none():
    change = np.array([[1.0, 1.0, 3.0], [2.0, 2.0, 2.0], [3.0, 3.0, 1.0]])
    scores = np.array([[0.0, 0.1, 0.1], [0.0, 0.2, 0.2], [0.0, 0.3, 0.3]])
    assert example.spearman(scores, change) == pytest.approx((0.0, 1.0))
    assert all(math.isnan(x) for x in example.spearman(scores[:, :2], change[:, :2]))


def test_error_over_draws_of_blocks():
    """That of one query where all are alike, which is about 1 / sqrt(blocks)."""
    generator = np.random.default_rng(0)
    scores, change = generator.normal(size=(2, 200, 1)).repeat(3, axis=2)
    assert example.error_over_blocks(scores, change, 0) == pytest.approx(200**-0.5, rel=0.3)


def test_refusals(corpus):
    with pytest.raises(ValueError, match="--left_out 3: give at least 4"):
        example.LeaveOneOut(left_out=3)
    with pytest.raises(ValueError, match="--blocks 9999: the text gives only"):
        example.make_text(example.LeaveOneOut(corpus=corpus, **QUICK | {"blocks": 9999}))
