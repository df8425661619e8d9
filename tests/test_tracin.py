"""TracIn and LESS over checkpoints that plain `Trainer` wrote, held against float64 autograd."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from models import build, collate, dataset, text_rows
from oracles_attribution import Oracle
from peft import load_peft_weights, set_peft_model_state_dict
from test_attribution import FLOAT32, error, estimator
from transformers import Trainer, TrainingArguments

from hf_datashapley import CheckpointEnsemble, GradDot, Less, TracIn


RATES = {2: (4 + 3) / 2 * 2.5e-3, 4: (2 + 1) / 2 * 2.5e-3}  # linear from 1e-2 in 4 updates


class Run:
    """Four updates with a checkpoint after every second."""

    def __init__(self, folder, name):
        self.start = build(name)
        arguments = TrainingArguments(
            str(folder),
            max_steps=4,
            per_device_train_batch_size=3,
            learning_rate=1e-2,
            weight_decay=0.1,
            logging_steps=1,
            save_steps=2,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        )
        model = copy.deepcopy(self.start)
        trainer = Trainer(
            model, arguments, train_dataset=dataset(text_rows(12, ragged_labels=False)), data_collator=collate
        )
        trainer.train()
        names = {parameter: name for name, parameter in trainer.model.named_parameters()}
        self.names = [names[p] for group in trainer.optimizer.param_groups for p in group["params"]]
        self.paths = [folder / "checkpoint-2", folder / "checkpoint-4"]
        self.train, self.queries = text_rows(5), text_rows(2, seed=7)

    def load(self, folder):
        model = copy.deepcopy(self.start)
        set_peft_model_state_dict(model, load_peft_weights(folder, device="cpu"))
        return model

    def ensemble(self):
        adapter = (self.paths[0] / "adapter_config.json").is_file()
        return CheckpointEnsemble(self.paths, self.load if adapter else None, device="cpu")

    def oracles(self):
        return [Oracle(model, [[row] for row in self.train], self.queries) for model in self.ensemble()]

    def moments(self, path, oracle):
        """Flat m and v in the oracle's order, and the number of updates."""
        saved = torch.load(path / "optimizer.pt", weights_only=True)["state"]
        state = {name: saved[number] for number, name in enumerate(self.names)}
        names = [name for name, p in oracle.model.named_parameters() if p.requires_grad]
        assert sorted(names) == sorted(self.names)
        made = [torch.cat([state[n][key].double().flatten() for n in names]) for key in ("exp_avg", "exp_avg_sq")]
        return *made, int(saved[0]["step"])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("run"), "gpt2")


@pytest.fixture(scope="module")
def adapter_run(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("adapters"), "gpt2-lora")


def scored(kind, run, **settings):
    fitted = estimator(kind, run.ensemble(), **settings).fit(dataset(run.train))
    return fitted, fitted.score(dataset(run.queries))


WHOLE = 10**6


@pytest.mark.parametrize("stored", [False, True])
def test_tracin(run, stored, monkeypatch):
    """Of all parameters or, as features, of all of them as they are."""
    if stored:
        monkeypatch.setattr(TracIn, "_stores", lambda self: True)
    expected = sum(rate * oracle.dot() for rate, oracle in zip(RATES.values(), run.oracles(), strict=True))
    fitted, found = scored(TracIn, run)
    assert fitted.learning_rates_ == pytest.approx(list(RATES.values()))
    assert error(found, expected) < FLOAT32


def adam_expected(run):
    total = 0
    for rate, path, oracle in zip(RATES.values(), run.paths, run.oracles(), strict=True):
        _, v, t = run.moments(path, oracle)
        factor = torch.where(v > 0, 1 / ((v / (1 - 0.999**t)).sqrt() + 1e-8), 0)
        total = total + rate * oracle.g_NP @ (factor * oracle.g_QP).T
    return total


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("which", ["run", "adapter_run"])
def test_tracin_under_adam(which, stored, request, monkeypatch):
    if stored:
        monkeypatch.setattr(TracIn, "_stores", lambda self: True)
    run = request.getfixturevalue(which)
    assert error(scored(TracIn, run, preconditioner="adam")[1], adam_expected(run)) < FLOAT32


def test_tracin_under_adam_through_projections_is_unbiased(run):
    expected = adam_expected(run).numpy()
    found = [
        scored(TracIn, run, preconditioner="adam", projection_dim=512, projection="sjlt", seed=seed)[1]
        for seed in range(8)
    ]
    spread = np.std(found, axis=0, ddof=1) / 8**0.5
    assert (np.abs(np.mean(found, axis=0) - expected) <= 5 * spread).all()


def test_of_models_with_given_rates(run):
    models = list(copy.deepcopy(model) for model in run.ensemble())
    found = estimator(TracIn, models, learning_rates=[0.5, 2.0]).fit(dataset(run.train)).score(dataset(run.queries))
    expected = sum(
        rate * estimator(GradDot, model).fit(dataset(run.train)).score(dataset(run.queries))
        for rate, model in zip((0.5, 2.0), models, strict=True)
    )
    assert error(found, expected) < FLOAT32


def test_less(adapter_run):
    """A query's gradient and units' updates, by formulas of torch's Adam."""
    expected = 0
    for rate, path, oracle in zip(RATES.values(), adapter_run.paths, adapter_run.oracles(), strict=True):
        m, v, t = adapter_run.moments(path, oracle)
        updates = []
        for g, losses in zip(oracle.g_NP, oracle.units, strict=True):
            g = g / max(1, len(losses))
            mean = (0.9 * m + 0.1 * g) / (1 - 0.9 ** (t + 1))
            square = (0.999 * v + 0.001 * g**2) / (1 - 0.999 ** (t + 1))
            updates.append(mean / (square.sqrt() + 1e-8) * bool(len(losses)))
        cosines = torch.nn.functional.normalize(torch.stack(updates)) @ torch.nn.functional.normalize(oracle.g_QP).T
        expected = expected + rate * cosines
    fitted, found = scored(Less, adapter_run, projection_dim=None)
    assert error(found, expected) < FLOAT32
    assert not found[2].any() and found[[0, 1, 3, 4]].all()  # row 2 has no label
    # In pieces, and projected.
    assert error(scored(Less, adapter_run, projection_dim=None, batch_size=1)[1], expected) < FLOAT32
    projected = scored(Less, adapter_run, projection_dim=2048)[1]
    assert np.corrcoef(projected.flatten(), expected.flatten())[0, 1] > 0.9


def test_less_of_groups_takes_the_groups_gradient(adapter_run, monkeypatch):
    """Pieces are put together before the update is made of them, and few units are whole at a time."""
    from hf_datashapley import Partition
    from hf_datashapley.attribution import mapped

    partition = Partition.from_labels([0, 1, 0, 1, 0])
    whole = scored(Less, adapter_run, projection_dim=None, partition=partition)[1]
    monkeypatch.setattr(mapped, "WHOLE_BYTES", 1)
    single = scored(Less, adapter_run, projection_dim=None, partition=partition, batch_size=1)[1]
    assert error(single, whole) < FLOAT32
    alone = scored(Less, adapter_run, projection_dim=None)[1]
    assert np.abs(whole - np.stack([alone[::2].sum(0), alone[1::2].sum(0)])).max() > 1e-2 * np.abs(alone).max()


def test_rates_between_logged_updates(run, tmp_path):
    """Those of a run that logged less are interpolated; another run's checkpoints begin no interval."""
    for place, run_name in ((run.paths[0], "a"), (run.paths[1], "b")):
        shutil.copytree(place, tmp_path / run_name / place.name)
    paths = [tmp_path / "a" / "checkpoint-2", tmp_path / "b" / "checkpoint-4"]
    state = json.loads((paths[1] / "trainer_state.json").read_text())
    state["log_history"] = [entry for entry in state["log_history"] if entry["step"] in (1, 4)]
    (paths[1] / "trainer_state.json").write_text(json.dumps(state))
    fitted = estimator(TracIn, CheckpointEnsemble(paths, device="cpu")).fit(dataset(run.train))
    assert fitted.learning_rates_ == pytest.approx([3.5 * 2.5e-3, 2.5 * 2.5e-3])


def test_refusals(run, tmp_path):
    model, rows = build("gpt2"), dataset(text_rows(3))
    for members, settings, message in [
        (model, {}, "learning_rates=None is read from checkpoints"),
        (model, {"learning_rates": [1.0, 2.0]}, "learning_rates has 2 entries and members 1"),
        (model, {"learning_rates": [1.0], "preconditioner": "adam"}, "members=CheckpointEnsemble"),
        (run.ensemble(), {"preconditioner": "sgd"}, "preconditioner='sgd'"),
    ]:
        with pytest.raises(ValueError, match=message):
            estimator(TracIn, members, **settings).fit(rows)
    bare = tmp_path / "checkpoint-2"
    shutil.copytree(run.paths[0], bare)
    (bare / "optimizer.pt").unlink()
    for kind, settings in ((TracIn, {"preconditioner": "adam"}), (Less, {})):
        with pytest.raises(ValueError, match="lacks optimizer.pt"):
            estimator(kind, CheckpointEnsemble([bare], device="cpu"), **settings).fit(rows).score(rows.select([0]))
    (bare / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match="lacks trainer_state.json: give learning_rates"):
        estimator(TracIn, CheckpointEnsemble([bare], device="cpu")).fit(rows)
