"""A run that goes on from a checkpoint leaves the ledger of a run that was never interrupted."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from loss_scaling import PlainOverflowing
from models import build, collate, dataset, text_rows
from transformers import DataCollatorWithFlattening, TrainerCallback

from hf_datashapley import ShapleyConfig, ShapleyTrainer, load_audit, load_updates, load_value_history


UPDATES = 12


class Overflowing(PlainOverflowing, ShapleyTrainer):
    pass


RUNS = {
    "first": {},
    "stale gradient": {"validation_interval": 5, "audit_steps": 1},
    "path": {"value_order": "path", "audit_steps": 2},
    "owen": {"value_order": "path", "path_slope": "owen"},
    # Its first update overflows: the loss scale, too, is what a run goes on with.
    "fp16": {"trainer_class": Overflowing, "fp16": True, "max_grad_norm": 0.0, "audit_steps": 4},
    "tokens": {"value_unit": "token", "value_kernel": "auto", "token_samples": 7, "value_order": "path"},
    "packed": {"data_collator": DataCollatorWithFlattening(), "value_order": "path", "second_pass": "replay"},
}


def make(folder, trainer_class=ShapleyTrainer, data_collator=collate, **settings):
    """12 updates with dropout, clipping, accumulation 2, a checkpoint every 3, two of them kept."""
    arguments = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": UPDATES,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "save_steps": 3,
        "save_total_limit": 2,
        "logging_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "value_kernel": "project",
        **settings,
    }
    return trainer_class(
        build("gpt2", dropout=0.1),
        ShapleyConfig(output_dir=str(folder), **arguments),
        train_dataset=dataset(text_rows(20), ids=range(100, 120)),
        validation_dataset={"a": dataset(text_rows(5, seed=8)), "b": dataset(text_rows(4, seed=9))},
        data_collator=data_collator,
    )


def tables(folder):
    return [read(folder / "values")[:] for read in (load_value_history, load_updates, load_audit)]


class Interrupt(TrainerCallback):
    def __init__(self, after):
        self.after = after

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.after:
            raise KeyboardInterrupt


@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS)
def test_values_are_those_of_a_run_never_interrupted(tmp_path, settings):
    """Interrupted twice, after updates 4 and 8: it goes on from updates 3 and 6."""
    make(tmp_path / "whole", **settings).train()
    for after in (4, 8, None):
        run = make(tmp_path / "broken", **settings)
        if after is None:
            run.train(resume_from_checkpoint=True)
        else:
            run.add_callback(Interrupt(after))
            with pytest.raises(KeyboardInterrupt):
                run.train(resume_from_checkpoint=after > 4)
            assert len(load_updates(tmp_path / "broken" / "values")) == after
    found = tables(tmp_path / "broken")
    assert found == tables(tmp_path / "whole")
    assert sum(found[1]["skipped"]) == ("fp16" in settings)


def test_an_earlier_checkpoint_discards_what_came_after(tmp_path):
    make(tmp_path / "run").train()
    whole = tables(tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-9"]
    make(tmp_path / "run").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-9"))
    assert tables(tmp_path / "run") == whole


SCRIPT = Path(__file__).parents[1] / "scripts" / "kill_and_resume.py"
# With a validation gradient that the checkpoint has to hold, which is more than without.
KILLS = {
    "one process": ["--kills", "2", "--updates", "12", "--validation_interval", "4"],
    "two processes": ["--kills", "1", "--updates", "9", "--processes", "2", "--validation_interval", "4"],
}


@pytest.mark.slow
@pytest.mark.parametrize("arguments", KILLS.values(), ids=KILLS)
def test_killed_at_random_moments(arguments):
    """A few of the kills that the script makes; it ends with an error unless all ledgers are the same."""
    process = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=400)
    assert process.returncode == 0, process.stderr[-3000:]
    assert f"{arguments[1]} kills" in process.stdout and "bit for bit" in process.stdout


def test_a_checkpoint_without_its_validation_gradient_is_refused(tmp_path):
    make(tmp_path / "run", validation_interval=5).train()
    (tmp_path / "run" / "checkpoint-9" / "shapley.safetensors").unlink()
    with pytest.raises(ValueError, match="lacks shapley.safetensors.*validation_interval=5.*save_only_model=False"):
        make(tmp_path / "run", validation_interval=5).train(str(tmp_path / "run" / "checkpoint-9"))


@pytest.mark.parametrize("missing", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_without_what_the_run_goes_on_with_is_refused(tmp_path, missing):
    """`Trainer` begins anew with it and says nothing."""
    make(tmp_path / "run").train()
    (tmp_path / "run" / "checkpoint-9" / missing).unlink()
    with pytest.raises(ValueError, match=f"lacks {missing[:9]}.*save_only_model=False.*new `output_dir`"):
        make(tmp_path / "run").train(str(tmp_path / "run" / "checkpoint-9"))


def test_a_run_that_is_over_makes_no_further_update(tmp_path):
    """Killed after its last checkpoint, in the midst of an epoch."""
    make(tmp_path / "run").train()
    whole = tables(tmp_path / "run")
    trainer = make(tmp_path / "run")
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == UPDATES
    assert tables(tmp_path / "run") == whole


def test_another_runs_ledger_cannot_go_on(tmp_path):
    make(tmp_path / "run").train()
    with pytest.raises(ValueError, match="value_momentum.*differ.*same settings"):
        make(tmp_path / "run", value_momentum="immediate").train(
            resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-9")
        )
    with pytest.raises(ValueError, match="holds the ledger of another run"):
        make(tmp_path / "run").train()
    with pytest.raises(ValueError, match="holds no ledger.*value_dir"):
        make(tmp_path / "run", value_dir=str(tmp_path / "elsewhere")).train(resume_from_checkpoint=True)


def test_a_ledger_that_is_not_cut_there_cannot_go_on(tmp_path):
    make(tmp_path / "run").train()
    os.rename(tmp_path / "run" / "checkpoint-9", tmp_path / "run" / "checkpoint-10")
    state = tmp_path / "run" / "checkpoint-10" / "trainer_state.json"
    state.write_text(state.read_text().replace('"global_step": 9', '"global_step": 10'))
    with pytest.raises(ValueError, match="update 10.*not cut.*3, 6, 9, 12"):
        make(tmp_path / "run").train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-10"))


@pytest.mark.parametrize("kind", ["values", "updates"])
def test_a_truncated_part_is_named(tmp_path, kind):
    make(tmp_path / "run").train()
    part = next(Path(tmp_path / "run" / "values").glob(f"{kind}-000000004-*"))
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(ValueError, match=f"{part.name} is missing or damaged.*resumed from a checkpoint"):
        tables(tmp_path / "run")


def test_a_missing_part_is_named(tmp_path):
    make(tmp_path / "run").train()
    shutil.rmtree(tmp_path / "run" / "checkpoint-9")
    values = Path(tmp_path / "run" / "values")
    updates = next(values.glob("updates-000000004-*"))
    updates.rename(tmp_path / "aside")
    with pytest.raises(ValueError, match=f"{updates.name} is missing or damaged.*resumed from a checkpoint"):
        tables(tmp_path / "run")
    (tmp_path / "aside").rename(updates)
    next(values.glob("values-000000004-*")).unlink()
    with pytest.raises(ValueError, match="up to 3, and a part of its 1 ranks begins with 7"):
        tables(tmp_path / "run")


def test_a_missing_audit_is_named(tmp_path):
    """Not every part has one: the updates that it covers tell whether it had. Values are read without."""
    make(tmp_path / "run", audit_steps=5).train()
    values = Path(tmp_path / "run" / "values")
    audits = sorted(values.glob("audit-*"))
    assert [path.name[6:15] for path in audits] == ["000000004", "000000010"], "with updates 5 and 10"
    assert load_audit(values)["step"] == [5, 5, 10, 10]
    audits[0].rename(tmp_path / "aside")
    with pytest.raises(ValueError, match=f"{audits[0].name} is missing or damaged.*put a copy of it back"):
        load_audit(values)
    assert len(load_updates(values)) == UPDATES and load_value_history(values)["step"][-1] == UPDATES
    (tmp_path / "aside").rename(audits[0])
    updates = next(values.glob("updates-000000007-*"))
    updates.unlink()
    with pytest.raises(ValueError, match=f"{updates.name} is missing or damaged"):
        load_audit(values)


def test_rows_of_updates_that_are_not_listed_are_not_read(tmp_path):
    """A kill between the two files of a part."""
    make(tmp_path / "run").train()
    whole = tables(tmp_path / "run")
    values = tmp_path / "run" / "values"
    last = next(values.glob("updates-000000010-*"))
    shutil.copy(last, values / last.name.replace("000000010", "000000013").replace("000000012", "000000015"))
    assert tables(tmp_path / "run") == whole
