"""The example runs as its README says: what it has made it takes from its folder, and its verdict is arithmetic."""

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


FOLDER = Path(__file__).parents[1] / "examples" / "trak_ensembles"
sys.path.insert(0, str(FOLDER))
example = importlib.import_module("trak_ensembles")
QUICK = {"documents": 8, "pieces": 2, "row_tokens": 32, "vocabulary": 300, "layers": 1, "width": 32, "epochs": 1}
QUICK |= {"subsets": 5, "workers": 0, "models": 2, "adapter_rank": 2, "adapter_epochs": 1}
LISTS = {"bases": [1, 2], "passes": [1, 2], "adapters": [1, 2], "dampings": [0.1, 10.0]}
LISTS |= {"projection_dims": [64], "other_dims": [128]}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    file = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    generator = random.Random(0)
    rows = []
    for number in range(12):
        letters = "abcdefgh" if number % 2 else "stuvwxyz"
        words = ["".join(generator.choices(letters, k=4)) for _ in range(60 if number else 3)]
        rows.append(json.dumps({"text": " ".join(words), "domain": "ab"[number % 2]}))
    file.write_text("\n".join(rows))
    return str(file)


def run(corpus, output_dir):
    command = [sys.executable, str(FOLDER / "trak_ensembles.py"), "--corpus", corpus, "--output_dir", str(output_dir)]
    command += [str(part) for name, value in QUICK.items() for part in (f"--{name}", value)]
    command += [str(part) for name, values in LISTS.items() for part in (f"--{name}", *values)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_script_makes_its_table_once(corpus, tmp_path):
    printed = run(corpus, tmp_path)
    written = (tmp_path / "table.md").read_text()
    assert written in printed
    rows = [line for line in written.splitlines() if line.startswith("| TRAK, ")]
    assert len(rows) == 2 + 2 + 3 * 4 + 2 * 2
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.np[yz]")}
    run(corpus, tmp_path)
    assert (tmp_path / "table.md").read_text() == written
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.np[yz]")} == before


@pytest.fixture(scope="module")
def config(corpus, tmp_path_factory):
    return example.TrakEnsembles(corpus=corpus, output_dir=str(tmp_path_factory.mktemp("out")), **QUICK, **LISTS)


def test_queries_are_pieces_that_are_not_trained_on(config):
    text = example.make_text(config)
    assert len(text.train) == 16 and len(text.queries) == len(text.domains) == 8
    assert text.documents_U == [document for document in range(8) for _ in range(2)]
    assert {len(row) for row in [*text.train, *text.queries]} == {32}
    assert not {tuple(row) for row in text.queries} & {tuple(row) for row in text.train}
    numbers = list(range(8))
    assert numbers[text.tabled] == [0, 1, 2, 3] and numbers[text.chosen_on] == [4, 5, 6, 7]


def members_row(kind, models, each, resampled, training, serving, space):
    members = example.Members(kind, models, each)
    scored = example.Scored(np.zeros((1, 1)), training, serving, space, 0.0)
    found = example.LinearDatamodelingScore(
        float(np.mean(resampled)), 0.0, 1.0, 0.95, np.zeros(1), np.array(resampled), 0.8, 0.9
    )
    return example.Row(f"TRAK, {members.name}", found, members, 0.1, scored)


def test_the_verdict_takes_the_cheapest_that_is_not_shown_to_be_worse():
    reference = members_row("models", 4, 0, [0.50, 0.52, 0.54], 40.0, 8.0, 400)
    better_at_times = members_row("dropout", 1, 5, [0.40, 0.45, 0.60], 10.0, 10.0, 100)
    worse = members_row("dropout", 1, 2, [0.40, 0.42, 0.44], 10.0, 4.0, 100)
    assert example.reaches(better_at_times, reference) and not example.reaches(worse, reference)
    written = example.verdict({"masks": [better_at_times, worse], "others": [worse]}, reference)
    masks, others, paper = written.splitlines()[2:]
    assert masks == (
        "| masks | 0.483 (1 model x 5 masks) | +75% (1 model x 5 masks: 0.483) | -25% (1 model x 5 masks: 0.483) "
        "| +75% (1 model x 5 masks: 0.483) |"
    )
    assert others.count("none is as good") == 3
    assert paper == "| the paper, up to |  | +80% | +60% | +80% |"


def test_damping_is_the_best_on_the_mean_of_a_kind(config):
    one, two = example.Members("models", 1), example.Members("models", 2)
    tried = [
        example.Damped(example.Trak, one, 64, [0.1, 0.2]),
        example.Damped(example.Trak, two, 64, [0.4, 0.2]),
        example.Damped(example.Trak, one, 128, [0.0, 0.1]),
        example.Damped(example.Influence, one, 64, [0.0, 0.1]),
    ]
    dampings = example.Dampings(config, tried)
    assert dampings.of(example.Trak, "models", 64) == dampings.of(example.Trak, "forward", 64) == 0.1
    assert dampings.of(example.Trak, "models", 128) == dampings.of(example.Influence, "models", 64) == 10.0


def test_training_is_that_of_models_and_of_their_adapters():
    trained = example.Trained([], [1.0, 2.0, 4.0], [], [[0.1, 0.2], [0.3, 0.4]])
    assert example.Members("models", 3).training_seconds(trained) == 7.0
    assert example.Members("dropout", 2, 5).training_seconds(trained) == 3.0
    assert example.Members("lora", 2, 1).training_seconds(trained) == pytest.approx(3.4)


def test_spread_of_seeds_and_of_subsets():
    outputs_SRQ = np.array([[[1.0], [3.0]], [[5.0], [7.0]], [[9.0], [11.0]]])
    over_seeds, over_subsets = example.spread(outputs_SRQ)
    assert over_seeds == pytest.approx(2**0.5) and over_subsets == pytest.approx(4.0)


def test_a_training_that_did_not_end_is_made_again(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "half").write_text("")
    calls = []

    def make():
        assert not path.exists()
        path.mkdir()
        calls.append(1)

    seconds = example.seconds_of(path, make)
    assert example.seconds_of(path, make) == seconds and len(calls) == 1


def test_refusals(config, corpus):
    with pytest.raises(ValueError, match="--retrainings 1: give at least 2"):
        example.TrakEnsembles(retrainings=1)
    with pytest.raises(ValueError, match="--bases 9: there are only 5 --models"):
        example.TrakEnsembles(bases=[9])
    with pytest.raises(ValueError, match="--documents 99: only 11 have 3 rows of 32 tokens"):
        example.make_text(replace(config, documents=99))
    example.check_kept(config)
    example.check_kept(replace(config, subsets=99))
    with pytest.raises(ValueError, match=r"begun with other settings \(epochs, adapter_rank\)"):
        example.check_kept(replace(config, epochs=2, adapter_rank=3))
