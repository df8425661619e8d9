"""The ledger on disk: complete when it should be, readable from its directory alone, never overwritten."""

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from models import build, collate, dataset, text_rows
from transformers import TrainerCallback

from hf_datashapley import ShapleyConfig, ShapleyTrainer, load_updates, load_value_history, load_values
from hf_datashapley.ledger import Ledger, writer
from hf_datashapley.ranks import Ranks
from hf_datashapley.values.update import UpdateValues


def update(step, ids, values, *, skipped=False, finite=True):
    return UpdateValues(
        step=step,
        ids={"sample_id": torch.tensor(ids)},
        tokens=torch.full((len(ids),), 7),
        values=torch.tensor(values, dtype=torch.float32),
        validation_losses=torch.tensor([2.5] * len(values[0])),
        clip=torch.tensor(0.5),
        learning_rate=1e-3,
        skipped=torch.tensor(skipped),
        finite=torch.tensor(finite),
        totals=torch.zeros(4, len(values[0]), dtype=torch.float64),
    )


def trained(tmp_path, train_dataset=None, **settings):
    callbacks = settings.pop("callbacks", [])
    return ShapleyTrainer(
        build("gpt2"),
        ShapleyConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            **{"max_steps": 3, **settings},
        ),
        train_dataset=train_dataset or dataset(text_rows(8)),
        validation_dataset=dataset(text_rows(4, seed=2)),
        data_collator=collate,
        callbacks=callbacks,
    )


def test_round_trip(tmp_path):
    ledger = Ledger(tmp_path, ["a", "b"], {"unit": "sample"})
    ledger.append(update(1, [5, 3], [[0.25, -1.0], [0.5, 2.0]]))
    ledger.append(update(2, [3, 9], [[1.0, 1.0], [4.0, 8.0]], skipped=True))
    ledger.flush()
    ledger.append(update(3, [2**62], [[1e-20, -1e-20]]))
    ledger.close()

    values = load_values(tmp_path)
    assert values.column_names == ["sample_id", "updates", "tokens", "value_a", "value_b"]
    assert [str(values.features[name].dtype) for name in values.column_names] == [
        "int64",
        "int32",
        "int64",
        "float64",
        "float64",
    ]
    assert values[:3] == {
        "sample_id": [3, 5, 9],
        "updates": [2, 1, 1],
        "tokens": [14, 7, 7],
        "value_a": [1.5, 0.25, 4.0],
        "value_b": [3.0, -1.0, 8.0],
    }
    assert values[3]["sample_id"] == 2**62
    np.testing.assert_allclose(values[3]["value_a"], 1e-20, rtol=1e-6)
    history = load_value_history(tmp_path)
    assert history.column_names == ["sample_id", "updates", "tokens", "value_a", "value_b", "step"]
    assert history["step"][:] == [1, 1, 2, 2, 3]
    assert history["sample_id"][:] == [3, 5, 3, 9, 2**62]
    updates = load_updates(tmp_path)
    assert updates["step"][:] == [1, 2, 3]
    assert updates["skipped"][:] == [False, True, False]
    assert updates["validation_loss_b"][:] == [2.5] * 3
    assert json.loads((tmp_path / "ledger.json").read_text())["targets"] == ["a", "b"]


def test_two_visits_in_one_update_are_one_row(tmp_path):
    ledger = Ledger(tmp_path, [""], {"unit": "sample"})
    ledger.append(update(1, [4, 4, 2], [[1.0], [2.0], [8.0]]))
    ledger.close()
    history = load_value_history(tmp_path)
    assert history[:] == {
        "sample_id": [2, 4],
        "updates": [1, 2],
        "tokens": [7, 14],
        "value": [8.0, 3.0],
        "step": [1, 1],
    }


def test_parts_are_cut_between_updates(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "ROWS_PER_PART", 4)
    ledger = Ledger(tmp_path, [""], {"unit": "sample"})
    for step in range(1, 6):
        ledger.append(update(step, [1, 2, 3], [[1.0]] * 3))
    ledger.close()
    names = sorted(path.name for path in tmp_path.glob("values-*.parquet"))
    assert names == [f"values-{a:09d}-{b:09d}-00000-of-00001.parquet" for a, b in ((1, 2), (3, 4), (5, 5))]
    assert load_values(tmp_path)["value"][:] == [5.0] * 3
    assert not list(tmp_path.glob("*.tmp"))


def test_a_failed_write_is_raised_and_leaves_no_half_part(tmp_path, monkeypatch):
    ledger = Ledger(tmp_path, [""], {"unit": "sample"})
    ledger.append(update(1, [1], [[1.0]]))
    ledger.flush()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    ledger.append(update(2, [1], [[1.0]]))
    with pytest.raises(OSError, match="No space left"):
        ledger.flush()
    assert load_value_history(tmp_path)["step"][:] == [1]


def test_another_runs_ledger_is_refused_at_construction(tmp_path):
    """Where there is a checkpoint, the run may be meant to go on: then `train` decides (test_resume)."""
    trained(tmp_path, save_strategy="no").train()
    before = {path.name: path.read_bytes() for path in (tmp_path / "values").iterdir()}
    with pytest.raises(ValueError, match="holds the ledger of another run.*`value_dir`"):
        trained(tmp_path)
    assert {path.name: path.read_bytes() for path in (tmp_path / "values").iterdir()} == before
    trained(tmp_path, value_dir=str(tmp_path / "elsewhere")).train()
    assert len(load_values(tmp_path / "elsewhere")) == 8


def test_training_again_with_the_same_trainer_is_refused(tmp_path):
    trainer = trained(tmp_path)
    trainer.train()
    before = trainer.values()[:]
    with pytest.raises(ValueError, match="holds the ledger of another run"):
        trainer.train()
    assert trainer.values()[:] == before


def test_a_folder_without_a_ledger(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no ledger.*value_dir"):
        load_values(tmp_path)


def test_a_ledger_of_another_format(tmp_path):
    (tmp_path / "ledger.json").write_text('{"format": 99, "targets": []}')
    with pytest.raises(ValueError, match="format 99.*install the version"):
        load_values(tmp_path)


def test_another_process_reads_the_same(tmp_path):
    trainer = trained(tmp_path)
    trainer.train()
    code = (
        "import sys; from hf_datashapley import load_values;"
        "load_values(sys.argv[1]).to_json(sys.argv[2], double_precision=15)"
    )
    subprocess.run(
        [sys.executable, "-c", code, trainer.value_dir, str(tmp_path / "copy.json")], check=True, capture_output=True
    )
    rows = [json.loads(line) for line in (tmp_path / "copy.json").read_text().splitlines()]
    np.testing.assert_allclose([row["value"] for row in rows], trainer.values()["value"], rtol=1e-9)
    assert [row["sample_id"] for row in rows] == trainer.values()["sample_id"][:]


def test_complete_after_every_checkpoint_and_readable_while_training(tmp_path):
    seen = {}

    class Look(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            parts = (tmp_path / "values").glob("updates-*.parquet")
            seen[state.global_step] = sorted(
                step for part in parts for step in pq.read_table(part)["step"].to_pylist()
            )

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                assert trainer.value_history()["step"][-1] == 3

    trainer = trained(tmp_path, max_steps=5, save_steps=2, callbacks=[Look()])
    trainer.train()
    assert seen[2] == [1, 2] and seen[4] == [1, 2, 3, 4]
    assert load_updates(trainer.value_dir)["step"][:] == [1, 2, 3, 4, 5]


def test_complete_after_an_exception(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise KeyboardInterrupt

    trainer = trained(tmp_path, callbacks=[Stop()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert load_updates(trainer.value_dir)["step"][:] == [1, 2]


def test_log_rows_carry_the_statistics_of_their_updates(tmp_path):
    trainer = trained(tmp_path, max_steps=4, logging_steps=2, optim="sgd")
    trainer.train()
    history = trainer.value_history().to_pandas()
    updates = load_updates(trainer.value_dir).to_pandas()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["step"] for row in rows] == [2, 4]
    for row in rows:
        steps = [row["step"] - 1, row["step"]]
        values = history[history.step.isin(steps)].value
        np.testing.assert_allclose(row["shapley/mean"], values.mean(), rtol=1e-5)
        np.testing.assert_allclose(row["shapley/std"], values.std(ddof=0), rtol=1e-5)
        np.testing.assert_allclose(row["shapley/negative_share"], (values < 0).mean(), rtol=1e-6)
        loss = updates[updates.step.isin(steps)].validation_loss.mean()
        np.testing.assert_allclose(row["shapley/validation_loss"], loss, rtol=1e-6)
    assert all("shapley/mean" not in row for row in trainer.state.log_history if "loss" not in row)


def write(folder, ranks, parts, after=0):
    """What a rank writes of the given runs of updates, each a part; its only sample is 10 times its number."""
    ledger = Ledger(folder, [""], {"unit": "sample", "settings": {}}, after, ranks)
    for steps in parts:
        for step in steps:
            ledger.append(update(step, [10 * ranks.index], [[float(step)]]))
        ledger.flush()
    ledger.close()


def write_together(folder, first, second):
    """Both ranks have looked for a ledger before either begins one; here they go one after the other."""
    write(folder, Ranks(0, 2), first)
    write(folder / "other", Ranks(1, 2, is_local_main=False), second)
    merge(folder)


def merge(folder):
    for path in (folder / "other").iterdir():
        path.rename(folder / path.name)


def test_ranks_write_parts_of_their_own(tmp_path, caplog):
    """They cut them where they like; what not all have written is not read, and said."""
    (tmp_path / "other").mkdir()
    write_together(tmp_path, [range(1, 3), range(3, 7)], [range(1, 5)])
    history = load_value_history(tmp_path)
    assert "up to 6 of some ranks, and of all ranks those up to 4" in caplog.text
    assert history["step"] == [step for step in range(1, 5) for _ in range(2)]
    assert history["sample_id"] == [0, 10] * 4
    assert load_values(tmp_path)["value"] == [10.0, 10.0]
    assert load_updates(tmp_path)["step"] == [1, 2, 3, 4]


def test_a_part_that_a_rank_lacks_is_named(tmp_path):
    (tmp_path / "other").mkdir()
    write_together(tmp_path, [range(1, 7)], [range(1, 3), range(3, 5), range(5, 7)])
    (lost,) = tmp_path.glob("values-000000003-*-00001-of-00002*")
    lost.unlink()
    with pytest.raises(ValueError, match="updates up to 2, and a part of its 2 ranks begins with 5.*missing part"):
        load_values(tmp_path)


def test_a_run_goes_on_with_another_number_of_ranks(tmp_path, caplog):
    """After update 4, where all had cut; what one of the two wrote beyond it is discarded."""
    (tmp_path / "other").mkdir()
    write_together(tmp_path, [range(1, 5), range(5, 7)], [range(1, 3), range(3, 5)])
    one = Ledger(tmp_path, [""], {"unit": "sample", "settings": {}}, after=4)
    one.restart()
    for step in (5, 6, 7):
        one.append(update(step, [99], [[1.0]]))
    one.close()
    history = load_value_history(tmp_path)
    assert not caplog.text
    assert history["step"] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 6, 7]
    assert history["sample_id"] == [0, 10] * 4 + [99] * 3
    with pytest.raises(ValueError, match="after update 3.*not cut.*2, 4, 7"):
        Ledger(tmp_path, [""], {"unit": "sample", "settings": {}}, after=3)


def test_parts_that_lie_twice_are_named(tmp_path):
    (tmp_path / "other").mkdir()
    write_together(tmp_path, [range(1, 5)], [range(1, 5)])
    (part,) = tmp_path.glob("values-*-00000-of-00002*")
    (tmp_path / part.name.replace("000000001", "000000002")).write_bytes(part.read_bytes())
    with pytest.raises(ValueError, match="begins with 2.*lies there twice"):
        load_values(tmp_path)


def test_what_cannot_be_written_ends_the_run(tmp_path, monkeypatch):
    """At the next update, and once; what was complete stays so, and nothing half-written is left."""
    monkeypatch.setattr(writer, "ROWS_PER_PART", 2)
    ledger = Ledger(tmp_path, [""], {"unit": "sample"})
    for step in (1, 2):
        ledger.append(update(step, [step], [[1.0]]))
    ledger.flush()
    own = os.fsync

    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="could not be written.*No space left.*make room.*last checkpoint"):
        for step in range(3, 100):
            ledger.append(update(step, [step], [[1.0]]))
            time.sleep(0.01)
    assert step < 20
    monkeypatch.setattr(os, "fsync", own)
    ledger.close()
    assert load_values(tmp_path)["sample_id"] == [1, 2]
    assert not list(tmp_path.glob("*.tmp"))


LIMITED = """
import resource, sys
sys.path.insert(0, {tests!r})
from test_ledger import trained
from transformers import TrainerCallback
from hf_datashapley.ledger import writer

class Full(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 6:
            run.value_history()  # what there is so far is written now
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))

writer.ROWS_PER_PART = 8
run = trained({folder!r}, save_strategy="no", max_steps=40, callbacks=[Full()])
run.train()
"""


@pytest.mark.slow
def test_a_run_ends_where_its_ledger_cannot_grow(tmp_path):
    """The operating system refuses to write, after some parts of two updates each: these stay, and can be read."""
    code = LIMITED.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert process.returncode == 1
    assert process.stderr.count("could not be written (File too large): make room there") == 1
    assert load_updates(tmp_path / "values")["step"] == [1, 2, 3, 4, 5, 6]
    assert not list((tmp_path / "values").glob("*.tmp"))
