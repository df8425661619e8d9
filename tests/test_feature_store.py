"""Features on disk: what a kill leaves, what is refused, and what reading them back takes."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import python_path, torchrun
from models import IGNORED, build, collate, dataset, text_rows
from test_attribution import error, estimator

from hf_datashapley import GradDot, TracIn, Trak
from hf_datashapley.attribution import store


WORKER = Path(__file__).parent / "store_worker.py"


def work(folder, scores, kill_after=0):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, python_path()))}
    command = [sys.executable, str(WORKER), str(folder), str(scores), str(kill_after)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A store that one process has made without a break, of two members in shards of two units, and its scores."""
    folder = tmp_path_factory.mktemp("whole")
    found = work(folder / "store", folder / "scores")
    assert found.returncode == 0, found.stderr
    assert "12 shards written" in found.stdout
    return folder / "store", np.load(folder / "scores-0.npy")


@pytest.mark.slow
def test_a_killed_process_goes_on(whole, tmp_path):
    folder, scores = whole
    killed = work(tmp_path / "store", tmp_path / "scores", kill_after=8)
    assert killed.returncode == -signal.SIGKILL
    left = files(tmp_path / "store")
    assert len(left) == 9
    # A shard that was being written is written again, and what was begun goes.
    (tmp_path / "store" / "member-1" / "0000000004-0000000006.safetensors.5d41.tmp").write_bytes(b"half")
    found = work(tmp_path / "store", tmp_path / "scores")
    assert found.returncode == 0 and "4 shards written" in found.stdout
    assert files(tmp_path / "store") == files(folder)
    assert (np.load(tmp_path / "scores-0.npy") == scores).all()


@pytest.mark.slow
def test_two_processes_write_the_same_store(whole, tmp_path):
    folder, scores = whole
    found = torchrun(WORKER, str(tmp_path / "store"), str(tmp_path / "scores"), "0")
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("world 2, 6 shards written") == 2
    assert files(tmp_path / "store") == files(folder)
    for rank in (0, 1):
        assert (np.load(tmp_path / f"scores-{rank}.npy") == scores).all()


def made(folder, model=None, kind=GradDot, **settings):
    settings = {"projection_dim": 128, "store_dir": folder, **settings}
    return estimator(kind, build("gpt2") if model is None else model, **settings)


class Forwards:
    def __init__(self, model):
        self.rows = 0
        self.handle = model.register_forward_hook(self.count, with_kwargs=True)

    def count(self, model, arguments, keywords, output):
        self.rows += len(keywords["input_ids"])


def test_scoring_again_reads_no_training_row(tmp_path):
    model, rows, queries = build("gpt2"), dataset(text_rows(9)), dataset(text_rows(2, seed=7))
    expected = made(tmp_path, model).fit(rows).score(queries)
    forwards = Forwards(model)
    again = made(tmp_path, model).fit(rows)
    assert forwards.rows == 2  # the check of one row's losses
    found = again.score(queries)
    assert forwards.rows == 4
    forwards.handle.remove()
    assert (found == expected).all()


def test_what_was_made_otherwise_is_refused(tmp_path):
    model, rows = build("gpt2"), dataset(text_rows(5))
    made(tmp_path, model).fit(rows)
    for other, settings, data, names in [
        (None, {"projection_dim": 64}, rows, ["projection", "width"]),
        (None, {"projection": "logra"}, rows, ["projection"]),
        (None, {"seed": 1}, rows, ["projection"]),
        (None, {"store_dtype": "float16"}, rows, ["dtype"]),
        (None, {"modules": ["c_attn"]}, rows, ["parameters"]),
        (None, {"unit": "token"}, rows, ["unit", "units", "pieces"]),
        (None, {}, dataset(text_rows(5, seed=2)), ["dataset"]),
        (build("gpt2", seed=1), {}, rows, ["fingerprints"]),
        (None, {"kind": Trak, "output": "tokens"}, rows, ["output"]),
    ]:
        with pytest.raises(ValueError, match="made otherwise") as refused:
            made(tmp_path, model if other is None else other, **settings).fit(data)
        for name in names:
            assert f"{name} " in str(refused.value), (name, refused.value)
    made(tmp_path, model, batch_size=2).fit(rows)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else"):
        made(tmp_path / "other", model).fit(rows)


def test_one_changed_row_and_another_collator_are_refused(tmp_path):
    """Whichever row it is: another one's features would go on as its."""
    model, rows = build("gpt2"), text_rows(300, ragged_labels=False)
    made(tmp_path, model).fit(dataset(rows))
    for place in (0, 7, 141, 299):
        other = [dict(row) for row in rows]
        other[place]["labels"] = [IGNORED, IGNORED, *rows[place]["labels"][2:]]
        with pytest.raises(ValueError, match="made otherwise .*dataset "):
            made(tmp_path, model).fit(dataset(other))

    def without_first(items):
        batch = collate(items)
        batch["labels"][:, :3] = IGNORED
        return batch

    with pytest.raises(ValueError, match="made otherwise .*collated "):
        made(tmp_path, model, data_collator=without_first).fit(dataset(rows))
    made(tmp_path, model).fit(dataset(rows))


def test_a_damaged_shard_is_named(tmp_path):
    model, rows, queries = build("gpt2"), dataset(text_rows(5)), dataset(text_rows(2, seed=7))
    fitted = made(tmp_path, model).fit(rows)
    expected = fitted.score(queries)
    (shard,) = (tmp_path / "member-0").glob("*.safetensors")
    content = shard.read_bytes()
    for damaged in (content[: len(content) // 2], b""):
        shard.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{shard.name} is missing or damaged"):
            fitted.score(queries)
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name} is missing or damaged"):
        fitted.score(queries)
    assert (made(tmp_path, model).fit(rows).score(queries) == expected).all()


def test_float16_rounds_to_11_bits(tmp_path):
    model, rows, queries = build("gpt2"), dataset(text_rows(5)), dataset(text_rows(2, seed=7))
    full, half = (made(tmp_path / dtype, model, store_dtype=dtype).fit(rows) for dtype in ("float32", "float16"))
    exact, rounded = (next(iter(kind._engine.store.shards(0))).features for kind in (full, half))
    assert ((exact - rounded).abs() <= exact.abs() * 2.0**-11).all() and not torch.equal(exact, rounded)
    assert error(half.score(queries), full.score(queries)) < 2.0**-10
    sizes = [sum(map(len, files(tmp_path / dtype / "member-0").values())) for dtype in ("float16", "float32")]
    assert sizes[0] < 0.75 * sizes[1]


def test_too_little_room(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(store.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(ValueError, match="set a smaller projection_dim, store_dtype='float16'"):
        made(tmp_path / "store").fit(dataset(text_rows(5)))


def test_shards_change_nothing(tmp_path, monkeypatch):
    """Documents and groups that lie in several shards' rows are whole in each."""
    model, rows, queries = build("gpt2"), dataset(text_rows(9)), dataset(text_rows(2, seed=7))
    expected = made(tmp_path / "one", model, TracIn, learning_rates=[1.0]).fit(rows)
    monkeypatch.setattr(store, "SHARD_UNITS", 2)
    found = made(tmp_path / "some", model, TracIn, learning_rates=[1.0]).fit(rows)
    assert len(files(tmp_path / "some" / "member-0")) == 5
    assert error(found.score(queries), expected.score(queries)) < 1e-5
    assert found.top(queries, 4)["sample_id"][:] == expected.top(queries, 4)["sample_id"][:]
