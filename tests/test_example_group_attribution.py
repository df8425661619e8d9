"""The example runs as its README says, takes what it has made from its folder, and its measures are what they say."""

import importlib
import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch


FOLDER = Path(__file__).parents[1] / "examples" / "group_attribution"
sys.path.insert(0, str(FOLDER))
setting, values, removal, junk, runtime = (
    importlib.import_module(f"group_{name}") for name in ("setting", "values", "removal", "junk", "runtime")
)
QUICK = {"rows": 48, "queries": 4, "row_tokens": 32, "vocabulary": 300, "layers": 1, "width": 32, "base_updates": 3}
QUICK |= {"updates": 6, "batch_size": 8, "checkpoints": 2, "projection_dim": 64, "draws": 2, "seeds": 2}
QUICK |= {"repeats": 1, "workers": 0}
LISTS = {"sizes": [4], "fractions": [0.1, 0.25], "pruned": [0.5], "targets": ["a"]}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    file = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    generator = random.Random(0)
    rows = []
    for number in range(60):
        letters = "abcdefgh" if number % 2 else "stuvwxyz"
        words = ["".join(generator.choices(letters, k=4)) for _ in range(60)]
        rows.append(json.dumps({"text": " ".join(words), "domain": "ab"[number % 2]}))
    file.write_text("\n".join(rows))
    return str(file)


def run(corpus, output_dir):
    script = str(FOLDER / "group_attribution.py")
    command = [sys.executable, script, "--corpus", corpus, "--output_dir", str(output_dir)]
    command += [str(part) for name, value in QUICK.items() for part in (f"--{name}", value)]
    command += [str(part) for name, found in LISTS.items() for part in (f"--{name}", *found)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_script_makes_its_tables_once(corpus, tmp_path):
    printed = run(corpus, tmp_path)
    written = (tmp_path / "table.md").read_text()
    assert written in printed and "nan" not in written
    lines = [line for line in written.splitlines() if line.startswith("| TracIn, gradients |")]
    assert len(lines) == len(LISTS["fractions"]) + len(LISTS["pruned"]) + 2  # of junk
    assert all(cell.strip() for line in lines for cell in line.split("|")[1:-1])
    for name in ("removal", "applications", "runtime"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.np[yz]")}
    run(corpus, tmp_path)
    assert (tmp_path / "table.md").read_text() == written
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.np[yz]")} == before


@pytest.fixture(scope="module")
def config(corpus, tmp_path_factory):
    return setting.GroupAttribution(corpus=corpus, output_dir=str(tmp_path_factory.mktemp("out")), **QUICK, **LISTS)


@pytest.fixture(scope="module")
def text(config):
    return setting.make_text(config)


def test_what_is_asked_about_is_of_other_documents(config, text):
    assert text.train.shape == (48, 32) and text.tabled.shape == text.chosen_on.shape == (4, 32)
    assert text.of_targets_N.sum() == 24
    known = [{tuple(row) for row in part.tolist()} for part in (text.base, text.train, text.tabled, text.chosen_on)]
    for place, rows in enumerate(known):
        assert all(not rows & others for others in known[place + 1 :])
    rows, is_junk_N = text.with_junk(0.25, 0)
    assert is_junk_N.sum() == 12 and torch.equal(rows[~is_junk_N], text.train[~is_junk_N])


def test_shares_are_equal_where_there_is_enough():
    assert setting.shares({"a": 2, "b": 100, "c": 100}, 32) == {"a": 2, "b": 15, "c": 15}
    assert setting.shares({"a": 2, "b": 3}, 32) == {"a": 2, "b": 3}


def test_a_retraining_is_its_last_checkpoint_and_leaves_the_random_state(config, text):
    training = setting.TrainedOn(config, setting.make_base(config, text), text.train, text.queries)
    before = torch.random.get_rng_state()
    losses_Q = training(np.arange(40), 3)
    models, rates = training.checkpoints(np.arange(40), 3, 2)
    assert torch.equal(torch.random.get_rng_state(), before)
    with torch.no_grad():
        again_Q = setting.token_losses(models[-1], text.queries).mean(1).double().numpy()
    assert np.array_equal(losses_Q, again_Q) and len(rates) == 2
    assert not np.array_equal(losses_Q, training(np.arange(40), 4))


def test_groups_are_taken_by_value_and_the_last_in_part():
    labels_N = np.array([0, 1, 0, 2, 1, 2])
    order_N = removal.ranked(values.Values(np.array([1.0, 3.0, 1.0, 2.0, 3.0, 2.0]), labels_N), True, 0)
    assert labels_N[order_N].tolist() == [1, 1, 2, 2, 0, 0]
    lowest_N = removal.ranked(values.Values(np.ones(6), labels_N), False, 0)
    assert labels_N[lowest_N].tolist() == [0, 0, 1, 1, 2, 2]
    assert removal.without(order_N[:3], 6).sum() == 3


class Counted:
    """A retraining whose losses are how many rows it had, and its seed."""

    settings: dict[str, str] = {}

    def __init__(self):
        self.calls = []

    def __call__(self, rows, seed):
        self.calls.append((tuple(rows), seed))
        return np.array([len(rows), 10.0 * seed + len(rows)])


def test_no_part_is_trained_on_twice(tmp_path):
    training = Counted()
    whole_N, half_N = np.ones(4, bool), np.arange(4) < 2
    bank = removal.Retrainings(tmp_path, training, 0)
    bank.make([whole_N, half_N, half_N], 0)
    again = removal.Retrainings(tmp_path, training, 0)
    again.make([half_N, ~half_N, whole_N], 0)
    again.make([whole_N, half_N], 1)
    assert len(training.calls) == len(set(training.calls)) == 5
    assert again.losses(half_N, 1).tolist() == [2.0, 12.0] and again.losses(~half_N, 1) is None
    rise = again.rise([half_N], 2, slice(0, 2))
    assert rise.mean == -2.0 and rise.error == 0.0
    assert len(again.rise([~half_N], 2, slice(0, 2)).found_R) == 1
    assert str(again.rise([~half_N], 0, slice(0, 2))) == ""


def test_groups_of_additive_estimators_have_the_sums_of_their_rows(config, text):
    training = setting.TrainedOn(config, setting.make_base(config, text), text.train, text.queries)
    book = values.ValueBook(config, "test", values.Run.of(training, 48), text.train, text.tabled)
    for method in values.ADDITIVE:
        cell = values.Cell(method, "gradients", 4)
        assert book.deviation(cell) < 1e-5
        found = book.of(cell)
        for group in range(found.labels_N.max() + 1):
            own = found.values_N[found.labels_N == group]
            assert np.allclose(own, own[0])
            assert own.sum() == pytest.approx(float(book.scored(cell)["scores"][group]), rel=1e-3, abs=1e-6)


def test_auc_counts_equal_values_half():
    is_junk_N = np.array([True, True, False, False])
    assert junk.auc(np.array([0.0, 1.0, 2.0, 3.0]), is_junk_N) == 1.0
    assert junk.auc(np.array([0.0, 2.0, 1.0, 3.0]), is_junk_N) == 0.75
    assert junk.auc(np.zeros(4), is_junk_N) == 0.5


def test_speed_is_of_medians(config):
    found = [runtime.Timed("loop", "", 1, seconds, seconds) for seconds in (3.0, 8.0, 4.0)]
    found += [runtime.Timed("TRAK", "summed", 1, 2.0, 2.0, 640), runtime.Timed("TRAK", "batched", 1, 3.0, 3.0, 640)]
    found += [runtime.Timed("TRAK", "batched", 4, 0.5, 0.5, 160)]
    seconds = runtime.Seconds(found)
    assert seconds.loop("TRAK", 3) == 4.0 and seconds.loop("TracIn", 3) == 12.0
    assert "| TRAK, batched, 4 | 0.50 | 0.50 | 8.0 | 4.00 | 6.00 | 0.000 | 4.0 |" in runtime.runtime_table(
        config, seconds
    )


def test_refusals(config, corpus):
    with pytest.raises(ValueError, match=r"--sizes \[1\]: groups have at least 2 of the 48 --rows"):
        replace(config, sizes=[1])
    with pytest.raises(ValueError, match="--fractions and --pruned are parts"):
        replace(config, pruned=[1.0])
    with pytest.raises(ValueError, match=r"--targets \['c'\]: choose some, and not all, of a, b"):
        setting.make_text(replace(config, targets=["c"]))
    with pytest.raises(ValueError, match="--rows 9999: the text has"):
        setting.make_text(replace(config, rows=9999))
