"""Two processes, launched as people do, leave the ledger of one process with twice the batch."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from ddp_cases import CASES, make, tables, train
from launching import torchrun
from oracles import relative_error

from hf_datashapley import load_updates
from hf_datashapley.ledger.features import read_features
from hf_datashapley.ledger.layout import complete_parts


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """What each rank saw of each case, and the folder of the runs."""
    folder = tmp_path_factory.mktemp("ddp")
    process = torchrun(Path(__file__).with_name("ddp_worker.py"), str(folder))
    assert process.returncode == 0, process.stderr[-5000:]
    return folder


def found_by(launched, name):
    return [json.loads((launched / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if name not in ("ragged", "poisoned")])
def test_values_are_those_of_one_process(launched, tmp_path, name):
    case = CASES[name]
    first, second = found_by(launched, name)
    assert first["tables"] == second["tables"], "every rank reads the complete ledger"
    one = make(tmp_path, case, batch=2 * case.batch)
    train(one, case)
    truth, found = tables(one), first["tables"]
    for column in [column for column in truth["history"] if not column.startswith("value")]:
        assert found["history"][column] == truth["history"][column]
    for k, _ in enumerate(case.validation):
        column = f"value_t{k}"
        for step in set(truth["history"]["step"]):
            own = [i for i, at in enumerate(truth["history"]["step"]) if at == step]
            values, expected = ([table["history"][column][i] for i in own] for table in (found, truth))
            assert relative_error(values, expected) < case.tolerance, step
    assert any(found["values"]["value_t0"])
    for column in ("samples", "carried", "predicted", "actual"):
        assert found["audit"][column] == pytest.approx(truth["audit"][column], rel=1e-6, abs=1e-12)
    updates = load_updates(launched / name / "values")[:]
    for column, values in load_updates(one.value_dir)[:].items():
        # A scaled gradient that overflowed was clipped by a factor that is no number.
        assert updates[column] == pytest.approx(values, rel=1e-5, nan_ok=case.overflows), column
    assert updates["skipped"] == [case.overflows and step == 1 for step in updates["step"]]


def features_of(value_dir):
    """By update and sample; each stands in an update once."""
    found = {}
    for part in complete_parts(Path(value_dir)).values:
        rows = pq.read_table(part.path)
        samples = rows["sample_id"].to_pylist()
        for own in read_features(part, rows["step"].to_numpy(), most_bytes=2**20):
            for i, codes in enumerate(own.scale[:, None] * own.codes):
                found[own.step, samples[own.start + i]] = torch.from_numpy(codes)
    return found


def test_features_are_those_of_one_process(launched, tmp_path):
    """Of shares of the gradient as ranks average it, whatever clipping makes of it."""
    case = CASES["features"]
    one = make(tmp_path, case, batch=2 * case.batch)
    train(one, case)
    found, truth = features_of(launched / "features" / "values"), features_of(one.value_dir)
    assert found.keys() == truth.keys() and len(truth) == 2 * case.rows
    for key, features in truth.items():
        assert relative_error(found[key], features) < case.tolerance or not features.any()
    parts = list((launched / "features" / "values").glob("features-*"))
    assert {path.stem[-14:] for path in parts} == {"00000-of-00002", "00001-of-00002"}


@pytest.mark.parametrize("name", ["first", "owen"])
def test_the_log_is_that_of_one_process(launched, tmp_path, name):
    case = CASES[name]
    one = make(tmp_path, case, batch=2 * case.batch)
    train(one, case)
    logs = found_by(launched, name)[0]["logs"]
    scalars = [key for key in one.state.log_history[0] if key.startswith("shapley/")]
    assert "shapley/t0/negative_share" in scalars
    for found, truth in zip(logs[:-1], one.state.log_history[:-1], strict=True):
        for key in scalars:
            assert found[key] == pytest.approx(truth[key], rel=1e-4, abs=1e-7), key


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.parity])
def test_training_is_that_of_plain_trainer(launched, name):
    """ "project" bit for bit; that "fused" is not shows that bits were compared."""
    for found in found_by(launched, name):
        assert (found["different"] == []) == (CASES[name].settings.get("value_kernel") == "project")


def test_a_rank_may_ask_for_values_by_itself(launched):
    """It sees the updates that all ranks have written; the others are not waited for, nor asked to write.

    The first asks after update 1, which it alone has written then; the second after update 2, when both have 1.
    """
    first, second = found_by(launched, "first")
    assert (first["midway"], second["midway"]) == (0, 1)


def test_duplicates_of_even_batches_count_as_trained_on(launched):
    """21 rows in batches of 4 for 2 ranks: the last batch is filled up with rows 0, 1, 2 of the epoch's order."""
    found = found_by(launched, "ragged")[0]["tables"]
    history, values = found["history"], found["values"]
    assert values["sample_id"] == list(range(100, 121))
    assert sum(values["updates"]) == 2 * 24
    assert sum(history["updates"]) == 2 * 24 and set(history["step"]) == {1, 2, 3, 4, 5, 6}
    for step in range(1, 7):
        assert sum(n for n, at in zip(history["updates"], history["step"], strict=True) if at == step) == 8
    assert sorted(values["updates"])[-3:] != [2, 2, 2]


def test_an_update_that_one_rank_spoils_is_skipped_on_all(launched, tmp_path):
    updates = load_updates(launched / "poisoned" / "values")[:]
    assert updates["skipped"] == [step == 2 for step in updates["step"]]
    first, second = (found["tables"]["history"] for found in found_by(launched, "poisoned"))
    assert first == second
    spoilt = [value for value, step in zip(first["value_t0"], first["step"], strict=True) if step == 2]
    assert len(spoilt) == 8 and not any(spoilt)
