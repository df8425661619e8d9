"""Values of some updates only, and of updates that all weigh the same."""

import tempfile
from fractions import Fraction
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ledger_rows import DOMAINS, UNITS, Piece, Visit, expected, magnitudes, random_visits, told, write_ledger

from hf_datashapley import load_audit, load_updates, load_value_history, load_values


def one(step, sample_id, value):
    return Visit(step, sample_id, [Piece(0, 0, [[Fraction(value)]])])


@settings(max_examples=25, deadline=None)
@given(st.randoms(use_true_random=False))
def test_a_window_is_what_its_updates_say(random):
    visits = random_visits(random, steps=6, ranks=2)
    first = random.randint(1, 6)
    last = random.randint(first, 6)
    within = [visit for visit in visits if first <= visit.step <= last]
    window = {"from_step": first, "to_step": last}
    with tempfile.TemporaryDirectory() as folder:
        write_ledger(Path(folder), visits, "document", [""], cuts=[2, 3, 6], ranks=2)
        pieces = expected(within, lambda i, d, p: (i, d))
        assert told(load_values(folder, **window), ["sample_id", "document_id"]) == pieces
        samples = expected(within, lambda i, d, p: i)
        assert told(load_values(folder, **window, by="sample_id"), ["sample_id"]) == samples
        history = {}
        for step in range(first, last + 1):
            of_step = expected([visit for visit in within if visit.step == step], lambda i, d, p: (i, d))
            history |= {(step, *keys): of_step[keys] for keys in sorted(of_step)}
        found = load_value_history(folder, **window)
        assert found.column_names == ["sample_id", "document_id", "updates", "tokens", "value", "step"]
        assert list(told(found, ["step", "sample_id", "document_id"]).items()) == list(history.items())
        assert load_updates(folder, **window)["step"][:] == list(range(first, last + 1))


def test_windows_side_by_side_make_the_whole(tmp_path):
    visits = random_visits(Random(0), steps=6)
    write_ledger(tmp_path, visits, "document", [""], cuts=[4, 6])
    everything = sum((row[2][0] for row in expected(visits, lambda i, d, p: i).values()), Fraction())
    for normalize in (None, "update"):
        early, late = load_values(tmp_path, None, 3, normalize), load_values(tmp_path, 4, None, normalize)
        np.testing.assert_allclose(
            sum(early["value"]) + sum(late["value"]), sum(load_values(tmp_path, None, None, normalize)["value"])
        )
        assert normalize or Fraction(sum(early["value"]) + sum(late["value"])) == everything != 0


@settings(max_examples=25, deadline=None)
@given(st.randoms(use_true_random=False), st.sampled_from(UNITS))
def test_each_update_is_divided_by_its_magnitude(random, unit):
    targets = ["a", "b"]
    visits = random_visits(random, targets=2, ranks=2)
    chosen = {visit.sample_id for visit in visits if random.random() < 0.5}
    first = random.randint(1, 5)
    within = [visit for visit in visits if visit.step >= first]
    sums = {
        "sample_id": lambda i, d, p: i,
        **({} if unit == "sample" else {"document_id": lambda i, d, p: d}),
    }
    with tempfile.TemporaryDirectory() as folder:
        write_ledger(Path(folder), visits, unit, targets, with_tokens=chosen, cuts=[2, 5], ranks=2)
        for by, unit_of in sums.items():
            want = expected(within, unit_of, divisors=magnitudes(visits, unit))
            found = load_values(folder, from_step=first, normalize="update", by=by)
            assert {row[by]: (row["updates"], row["tokens"]) for row in found} == {k: v[:2] for k, v in want.items()}
            for k, target in enumerate(targets):
                nats = [float(want[unit][2][k]) for unit in found[by]]
                np.testing.assert_allclose(found[f"value_{target}"], nats, rtol=1e-12, atol=1e-12)


def test_normalized_values_of_an_update_are_shares(tmp_path):
    """The magnitudes of an update's samples sum to 1; a sample that it visited twice is one of them."""
    visits = [
        one(1, 0, 3),
        one(1, 1, -1),
        one(2, 0, 0),
        one(2, 1, 0),
        one(3, 0, "1/4"),
        one(3, 0, "-1/2"),
        one(3, 1, "1/4"),
    ]
    write_ledger(tmp_path, visits, "sample", [""])
    assert load_values(tmp_path, 1, 1, normalize="update")["value"][:] == [0.75, -0.25]
    assert load_values(tmp_path, 2, 2, normalize="update")["value"][:] == [0.0, 0.0]
    assert load_values(tmp_path, 3, 3, normalize="update")["value"][:] == [-0.5, 0.5]
    assert load_values(tmp_path, normalize="update")["value"][:] == [0.25, 0.25]
    with pytest.raises(ValueError, match="normalize='step' is not offered: choose 'update'"):
        load_values(tmp_path, normalize="step")


def test_which_tokens_have_rows_does_not_move_normalized_values(tmp_path):
    visits = random_visits(Random(3), steps=8)
    samples = {visit.sample_id for visit in visits}
    for name, chosen in (("none", ()), ("some", list(samples)[:2]), ("all", samples)):
        write_ledger(tmp_path / name, visits, "token", [""], with_tokens=chosen)
    write_ledger(tmp_path / "documents", visits, "document", [""])
    tables = [
        load_values(tmp_path / name, normalize="update", by=DOMAINS) for name in ("none", "some", "all", "documents")
    ]
    assert any(tables[0]["value"])
    for table in tables[1:]:
        assert table.remove_columns("value")[:] == tables[0].remove_columns("value")[:]
        np.testing.assert_allclose(table["value"], tables[0]["value"], rtol=1e-12)


WRONG = [(0, None), (1, 6), (6, None), (4, 3), (-2, -1), (None, 0), (7, 9)]


@pytest.mark.parametrize(("first", "last"), WRONG)
@pytest.mark.parametrize("load", [load_values, load_value_history, load_updates, load_audit])
def test_a_window_that_the_ledger_does_not_hold(tmp_path, load, first, last):
    write_ledger(tmp_path, [one(step, 0, 1) for step in range(1, 6)], "sample", [""])
    with pytest.raises(ValueError, match=f"from_step={first}, to_step={last}: .* holds the updates 1 to 5; name"):
        load(tmp_path, from_step=first, to_step=last)


def test_a_window_of_a_ledger_without_updates(tmp_path):
    write_ledger(tmp_path, [], "sample", [""])
    with pytest.raises(ValueError, match="from_step=1, to_step=None: .* holds no update yet"):
        load_values(tmp_path, from_step=1)


def test_parts_outside_a_window_are_not_opened(tmp_path):
    write_ledger(tmp_path, [one(step, 0, 1) for step in range(1, 7)], "sample", [""], cuts=[2, 4, 6])
    for part in tmp_path.glob("*-000000003-*.parquet"):
        part.write_bytes(b"damaged")
    assert load_values(tmp_path, to_step=2)["value"][:] == [2.0]
    assert load_value_history(tmp_path, from_step=6)["step"][:] == [6]
    assert load_updates(tmp_path, 5, 6)["step"][:] == [5, 6]
    with pytest.raises(ValueError, match="000000003.*is missing or damaged"):
        load_values(tmp_path, to_step=3)
