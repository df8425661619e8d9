"""What goes to trackers (`report_to`): the statistics of values, beside the loss, as scalars of their own."""

import pytest
from models import build, collate, dataset, text_rows
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hf_datashapley import ShapleyConfig, ShapleyTrainer


SCALARS = ("mean", "std", "negative_share", "validation_loss")
AUDITS = ("audit_samples", "audit_carried", "audit_predicted", "audit_actual")


@pytest.mark.parametrize("targets", [[""], ["code", "prose"]])
def test_tensorboard_has_each_targets_scalars(tmp_path, monkeypatch, targets):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    rows = dataset(text_rows(4, seed=2))
    trainer = ShapleyTrainer(
        build("gpt2"),
        ShapleyConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            max_steps=4,
            logging_steps=2,
            audit_steps=2,
            value_order="path",
            report_to="tensorboard",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=dataset(text_rows(8)),
        validation_dataset=rows if targets == [""] else dict.fromkeys(targets, rows),
        data_collator=collate,
    )
    trainer.train()
    (folder,) = {path.parent for path in tmp_path.rglob("events.out.tfevents*")}
    board = EventAccumulator(str(folder)).Reload()
    logged = {row["step"]: row for row in trainer.state.log_history if "loss" in row}
    assert list(logged) == [2, 4]
    expected = {f"shapley/{target}/{name}".replace("//", "/") for target in targets for name in (*SCALARS, *AUDITS)}
    found = {tag for tag in board.Tags()["scalars"] if "shapley" in tag}
    # Trainer puts what is logged of training into a folder of that name.
    assert found == {f"train/{name}" for name in expected}
    for name in expected:
        events = board.Scalars(f"train/{name}")
        assert [event.step for event in events] == [2, 4]
        assert [event.value for event in events] == pytest.approx([logged[step][name] for step in (2, 4)], rel=1e-6)
