"""Values on validation rows that arrive when the run is over, held against those of a run that knew them."""

import shutil

import pytest
import torch
from datasets import Dataset
from ddp_cases import Poison, summed_over_count
from models import build, collate, dataset, rows_for, text_rows
from oracles import relative_error
from packed_documents import KEYS, prepare_documents
from peft import set_peft_model_state_dict
from prepared import OPTIMIZERS, config, prepare, two_groups
from recorder import assert_history
from safetensors.torch import load_file
from test_resume import Interrupt
from torch.optim import SGD, AdamW
from transformers import GPT2Config, GPT2LMHeadModel, default_data_collator

from hf_datashapley import LateValues, ShapleyTrainer, load_updates, load_value_history, load_values
from hf_datashapley.attribution.late_directions import relative_rates
from hf_datashapley.ledger import writer


FLOAT32 = 1e-5
WHOLE = {"feature_dim": 10**6, "feature_dtype": "float32"}
EVERY_UPDATE = {"save_strategy": "steps", "save_steps": 1, "save_only_model": False}


def checkpoints(folder, updates):
    """By number of updates; the model before the first one was put into "initial"."""
    return {k: folder / ("initial" if k == 0 else f"checkpoint-{k}") for k in updates}


def late_values(folder, collator=collate, **settings):
    return LateValues(folder, data_collator=collator, batch_size=4, progress=False, **settings)


def assert_same(late, live, tolerance):
    """Two tables of values."""
    assert late.column_names == live.column_names
    for column in live.column_names:
        if column.startswith("value"):
            assert any(live[column])
            assert relative_error(late[column][:], live[column][:]) <= tolerance
        else:
            assert late[column][:] == live[column][:]


LIKE_LIVE = {
    "SGD": {"max_grad_norm": 0.0},
    "SGD dampening": {"value_momentum": "immediate"},
    "AdamW plain": {},
    "Adam, other betas": {"value_momentum": "immediate"},
    "AdamW fused": {"value_optimizer": "sgd"},
}


@pytest.mark.parametrize(("optimizer", "settings"), LIKE_LIVE.items(), ids=LIKE_LIVE)
def test_with_all_there_is_they_are_the_live_values(tmp_path, optimizer, settings):
    """A checkpoint before each update, a feature for each entry: what the oracle says of the run itself."""
    targets = ("",) if optimizer == "SGD" else ("a", "b")
    trainer, replay = prepare(
        tmp_path,
        "llama" if optimizer == "AdamW plain" else "gpt2",
        OPTIMIZERS[optimizer],
        targets=targets,
        validation_batch_size=9,
        warmup_steps=1,
        lr_scheduler_type="linear",
        value_dir=str(tmp_path / "ledger"),
        **WHOLE,
        **EVERY_UPDATE,
        **settings,
    )
    trainer.model.save_pretrained(tmp_path / "initial")
    trainer.train()
    assert_history(trainer, replay, FLOAT32)
    validation = {target: dataset(rows) for target, rows in replay.validation.items()}
    first = 0 if "SGD" in optimizer or "value_optimizer" in settings else 1
    late = late_values(tmp_path / "ledger").score(
        checkpoints(tmp_path, range(first, 4)),
        validation[""] if targets == ("",) else validation,
        value_dir=tmp_path / "late",
    )
    assert_same(late, trainer.values(), FLOAT32)
    # The late ledger is one like any other.
    assert_same(load_value_history(tmp_path / "late"), trainer.value_history(), FLOAT32)
    assert_same(load_values(tmp_path / "late", from_step=2, to_step=3), trainer.values(2, 3), FLOAT32)
    updates, own = load_updates(tmp_path / "late"), load_updates(tmp_path / "ledger")
    for column in ("step", "skipped", "clip", "learning_rate"):
        assert updates[column][:] == own[column][:]
    for column in own.column_names[4:]:
        assert updates[column][first:] == pytest.approx(own[column][first:], rel=1e-5)


def test_of_documents(tmp_path):
    trainer, replay, row_of_id = prepare_documents(
        tmp_path,
        "gpt2",
        two_groups(SGD, momentum=0.9),
        validation_batch_size=9,
        gradient_checkpointing=True,
        **WHOLE,
        **EVERY_UPDATE,
    )
    trainer.model.save_pretrained(tmp_path / "initial")
    trainer.train()
    assert_history(trainer, replay, FLOAT32, row_of_id, keys=KEYS)
    late = late_values(tmp_path, default_data_collator).score(
        checkpoints(tmp_path, range(trainer.state.max_steps)), dataset(replay.validation[""])
    )
    assert_same(late, trainer.values(), FLOAT32)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_of_runs_in_half_precision(tmp_path, precision):
    """Features are without fp16's scale of the loss. Late validation gradients are in full precision."""
    trainer, replay = prepare(
        tmp_path, "gpt2", two_groups(SGD), validation_batch_size=9, **{precision: True}, **WHOLE, **EVERY_UPDATE
    )
    trainer.model.save_pretrained(tmp_path / "initial")
    trainer.train()
    late = late_values(tmp_path).score(checkpoints(tmp_path, range(4)), dataset(replay.validation[""]))
    assert_same(late, trainer.values(), 3e-2)


# A run of rows in six languages, of which the validation rows speak two.
VOCABULARY, LENGTH = 128, 128


def languages(seed=1):
    generator = torch.Generator().manual_seed(seed)
    tables = torch.softmax(3 * torch.randn(6, VOCABULARY, VOCABULARY, generator=generator), -1)

    def rows(spoken):
        tokens = torch.randint(VOCABULARY, (len(spoken), 1), generator=generator)
        for _ in range(LENGTH - 1):
            following = tables[torch.tensor(spoken), tokens[:, -1]]
            tokens = torch.cat([tokens, torch.multinomial(following, 1, generator=generator)], 1)
        return Dataset.from_dict({"input_ids": tokens.tolist(), "labels": tokens.tolist()})

    return rows


def rank_correlation(left, right):
    ranks = [torch.tensor(values).argsort().argsort().double() for values in (left, right)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


@pytest.mark.slow
@pytest.mark.parametrize(("optim", "rate", "batch"), [("sgd", 0.1, 8), ("adamw_torch", 1e-3, 4)])
def test_few_checkpoints_and_features_rank_samples_as_live_values_do(tmp_path, optim, rate, batch):
    """12,000 features of 116,480 parameters, a checkpoint every 4 updates: 0.98 (SGD) and 0.92 to 0.93 (AdamW), for
    three draws of the projection."""
    rows = languages()
    train, validation = rows([i % 6 for i in range(256)]), rows([0] * 12 + [1] * 4)
    torch.manual_seed(0)
    shape = {"n_positions": LENGTH, "n_embd": 64, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, **shape))
    settings = {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 1,
        "learning_rate": rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": 8,
        "weight_decay": 0.0,
        "optim": optim,
        "save_strategy": "steps",
        "save_steps": 4,
        "validation_batch_size": 16,
        "feature_dim": 12_000,
    }
    trainer = ShapleyTrainer(
        model,
        config(tmp_path, **settings),
        train_dataset=train,
        validation_dataset=validation,
        data_collator=default_data_collator,
    )
    trainer.train()
    token_bytes = 4 * LENGTH * len(train)
    assert sum(path.stat().st_size for path in (tmp_path / "values").glob("features-*")) < 50 * token_bytes
    live = trainer.values()
    late = late_values(tmp_path, default_data_collator).score(tmp_path, validation)
    assert live["sample_id"][:] == late["sample_id"][:]
    assert rank_correlation(live["value"][:], late["value"][:]) >= 0.9


@pytest.mark.parametrize("model_name", ["gpt2", "llama"])
def test_features_leave_the_run_bit_identical(tmp_path, model_name):
    weights = []
    for dim in (0, 300):
        trainer, _ = prepare(
            tmp_path / str(dim), model_name, dropout=0.1, feature_dim=dim, value_kernel="project", max_steps=4
        )
        trainer.train()
        weights.append([parameter.detach().clone() for parameter in trainer.model.parameters()])
        values = trainer.values()[:]
    for own, other in zip(*weights, strict=True):
        assert torch.equal(own, other)
    assert values == load_values(tmp_path / "0" / "values")[:]


def make(folder, **settings):
    """8 updates with dropout, a checkpoint every 3."""
    arguments = {
        "gradient_accumulation_steps": 2,
        "max_steps": 8,
        "save_strategy": "steps",
        "save_steps": 3,
        "value_kernel": "project",
        "feature_dim": 200,
        **settings,
    }
    return ShapleyTrainer(
        build("gpt2", dropout=0.1),
        config(folder, **arguments),
        train_dataset=dataset(text_rows(20), ids=range(100, 120)),
        validation_dataset=dataset(text_rows(5, seed=8)),
        data_collator=collate,
    )


NEW = dataset(rows_for("gpt2", 6, seed=77))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing has happened to, and its history on new rows."""
    folder = tmp_path_factory.mktemp("whole")
    make(folder).train()
    late_values(folder).score(folder, NEW, value_dir=folder / "late")
    return folder


@pytest.mark.parametrize("after", [4, 7])
def test_a_run_that_goes_on_has_the_features_of_one_never_interrupted(tmp_path, whole, after):
    broken = make(tmp_path)
    broken.add_callback(Interrupt(after))
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    assert len(list((tmp_path / "values").glob("features-*"))) == len(list((tmp_path / "values").glob("values-*")))
    make(tmp_path).train(resume_from_checkpoint=True)
    late_values(tmp_path).score(tmp_path, NEW, value_dir=tmp_path / "late")
    assert load_value_history(tmp_path / "late")[:] == load_value_history(whole / "late")[:]


def test_parts_are_cut_before_they_get_large(tmp_path, whole, monkeypatch):
    """And where parts are cut, and how many features are read at once, changes nothing."""
    row = 200 * 2
    monkeypatch.setattr(writer, "BYTES_PER_PART", 7 * row)
    monkeypatch.setattr(writer, "PENDING_BYTES", 3 * row)
    monkeypatch.setattr("hf_datashapley.attribution.late_ledger.BATCH_BYTES", 3 * row)
    make(tmp_path).train()
    parts = sorted((tmp_path / "values").glob("features-*"))
    assert len(parts) == 5
    assert [part.stem[9:] for part in parts] == [
        part.stem[7:] for part in sorted((tmp_path / "values").glob("values-*"))
    ]
    late = late_values(tmp_path).score(tmp_path, NEW)
    assert_same(late, load_values(whole / "late"), 1e-6)


def test_float16_is_as_good_as_float32(tmp_path, whole):
    make(tmp_path, feature_dtype="float32").train()
    late = late_values(tmp_path).score(tmp_path, NEW)
    assert_same(late, load_values(whole / "late"), 1e-3)
    sizes = [sum(path.stat().st_size for path in folder.glob("values/features-*")) for folder in (tmp_path, whole)]
    assert 1.5 < sizes[0] / sizes[1] < 2.1


def test_an_update_without_a_step_gives_nothing(tmp_path):
    trainer = make(tmp_path, optim="sgd", max_grad_norm=0.0)
    trainer.add_callback(Poison(trainer, rank=0))
    trainer.train()
    assert [row["step"] for row in load_updates(trainer.value_dir) if row["skipped"]] == [2]
    late_values(tmp_path).score(tmp_path, NEW, value_dir=tmp_path / "late")
    by_step = load_value_history(tmp_path / "late").to_pandas().groupby("step").value
    magnitudes = by_step.apply(lambda values: values.abs().sum())
    assert magnitudes.notna().all() and list(magnitudes.index[magnitudes == 0]) == [2]


def test_adapters(tmp_path):
    """Where the folder alone does not say how the model was made."""
    trainer, replay = prepare(
        tmp_path, "llama-lora", two_groups(AdamW), validation_batch_size=9, **WHOLE, **EVERY_UPDATE
    )
    trainer.train()
    validation, folders = dataset(replay.validation[""]), checkpoints(tmp_path, [1, 2, 3])

    def load_model(folder):
        model = build("llama-lora")
        state = load_file(f"{folder}/adapter_model.safetensors")
        assert not set_peft_model_state_dict(model, state).unexpected_keys
        return model

    late = late_values(tmp_path, load_model=load_model).score(folders, validation)
    assert_same(late, trainer.values(), FLOAT32)
    with pytest.raises(ValueError, match="the run trained .*lora_A.*load_model"):
        late_values(tmp_path, load_model=lambda folder: build("llama")).score(folders, validation)


REFUSED = {
    "order": ({"value_order": "path"}, "feature_dim=200 .*value_order='path'.*set value_order='first'"),
    "negative": ({"feature_dim": -1}, "feature_dim=-1"),
    "tokens": ({"value_unit": "token"}, "feature_dim=200 projects.*value_unit='sample'"),
    "too few": ({"feature_dim": 5}, "feature_dim=5 is less than one feature.*value_modules"),
    "type": ({"feature_dtype": "int8"}, "feature_dtype='int8' is not offered"),
    "compiled": ({"torch_compile": True}, "feature_dim > 0 with torch_compile.*feature_dim=0"),
}


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED)
def test_settings_that_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **settings)


def test_a_run_goes_on_with_its_own_features_only(tmp_path, whole):
    shutil.copytree(whole, tmp_path / "run")
    with pytest.raises(ValueError, match="feature_dim differ"):
        make(tmp_path / "run", feature_dim=100).train(resume_from_checkpoint=True)


def test_what_late_values_need(tmp_path, whole):
    with pytest.raises(FileNotFoundError, match="holds no ledger"):
        late_values(tmp_path)
    make(tmp_path / "none", feature_dim=0, max_steps=1).train()
    with pytest.raises(ValueError, match="no features.*feature_dim > 0"):
        late_values(tmp_path / "none")
    late = late_values(whole)
    with pytest.raises(ValueError, match="names no checkpoint after an update.*save_steps"):
        late.score(tmp_path, NEW)
    with pytest.raises(ValueError, match="AdamW has no second moments.*leave out the checkpoint of 0"):
        late.score({0: whole / "checkpoint-3", 3: whole / "checkpoint-3"}, NEW)
    with pytest.raises(ValueError, match="two of the folders are of the same update"):
        late.score([whole / "checkpoint-3"] * 2, NEW)
    with pytest.raises(ValueError, match="late is there already: name a new folder"):
        late.score(whole, NEW, value_dir=whole / "late")
    with pytest.raises(ValueError, match="validation_dataset is missing"):
        late.score(whole, None)
    shutil.copytree(whole / "checkpoint-3", tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-3" / "shapley_optimizer.json").unlink()
    with pytest.raises(ValueError, match="lacks shapley_optimizer.json.*feature_dim > 0"):
        late.score(tmp_path, NEW)


def test_schedules_that_part_are_refused():
    groups = [{"lr": 0.1, "initial_lr": 0.2}, {"lr": 0.3, "initial_lr": 0.6}]
    assert relative_rates(groups) == pytest.approx([1.0, 3.0])
    with pytest.raises(ValueError, match="do not keep their proportions"):
        relative_rates([*groups, {"lr": 0.1, "initial_lr": 0.1}])
    with pytest.raises(ValueError, match="first parameter group has learning rate 0"):
        relative_rates([{"lr": 0.0}, {"lr": 0.1}])


@pytest.mark.parametrize("damage", ["missing", "truncated", "other rows"])
def test_damaged_features_are_named(tmp_path, whole, damage):
    shutil.copytree(whole / "values", tmp_path / "values")
    first, second, *_ = sorted((tmp_path / "values").glob("features-*"))
    if damage == "missing":
        second.unlink()
    elif damage == "truncated":
        second.write_bytes(second.read_bytes()[:-20])
    else:
        shutil.copy(first, second)
    with pytest.raises(ValueError, match=f"{second.name} is missing or damaged.*resumed from a checkpoint"):
        late_values(tmp_path).score(whole, NEW, value_dir=tmp_path / "late")
    assert not (tmp_path / "late").exists()


@pytest.mark.parametrize("free", [1_000, 10**12])
def test_the_size_is_said_before_training(tmp_path, monkeypatch, caplog, free):
    disk = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk)
    trainer = make(tmp_path, max_steps=1, save_strategy="no", feature_dim=300, log_level="warning")
    trainer.train()
    (message,) = [record.message for record in caplog.records if "feature_dim" in record.message]
    assert "600 bytes for each visit of a sample" in message and "4 rows of this run" in message
    assert ("set a smaller feature_dim" in message) == (free == 1_000)


def test_the_size_counts_the_documents_of_a_row(tmp_path, caplog):
    trainer, _, _ = prepare_documents(tmp_path, feature_dim=300, max_steps=1, log_level="warning")
    trainer.train()
    (message,) = [record.message for record in caplog.records if "feature_dim" in record.message]
    assert "2 rows of this run (if they hold 2.3 documents each)" in message
    assert len(trainer.value_history()) in (4, 5, 6)


def test_another_runs_checkpoints_are_refused(tmp_path, whole):
    make(tmp_path / "other").train()
    with pytest.raises(ValueError, match="are of different runs.*own checkpoints"):
        late_values(whole).score(tmp_path / "other", NEW)


def test_a_loss_function_of_the_runs_own_has_to_be_given(tmp_path):
    trainer = make(tmp_path, max_steps=3)
    trainer.compute_loss_func = summed_over_count
    trainer.train()
    with pytest.raises(ValueError, match="compute_loss_func.*`loss`"):
        LateValues(tmp_path)
    LateValues(tmp_path, loss=lambda model, batch: model(**batch).loss)


def test_updates_without_a_checkpoint_near_are_warned_of(tmp_path, caplog):
    make(tmp_path, save_steps=2, save_total_limit=1).train()
    late_values(tmp_path).score(tmp_path, NEW)
    assert any("of the updates 8 to 8 of 8" in record.message for record in caplog.records)
